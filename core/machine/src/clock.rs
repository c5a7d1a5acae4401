//! The machine's clock and the timers on it.
//!
//! A *real* clock follows the host's, and a thread of its own fires the timers. A *virtual* clock is moved by the engine as the guest's
//! instructions run, and timers fire on the vCPU's thread that moved it: the same run gives the same result every time.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The time of day at which a virtual clock starts: 2026-01-01 00:00:00 UTC, in nanoseconds since 1970.
const VIRTUAL_EPOCH: u64 = 1_767_225_600 * 1_000_000_000;

type Callback = Arc<dyn Fn(u64) + Send + Sync>;

struct Armed {
    period: Option<u64>,
    callback: Callback,
}

struct State {
    /// By deadline, then by timer.
    armed: BTreeMap<(u64, u64), Armed>,
    /// The deadline under which each armed timer stands.
    deadlines: BTreeMap<u64, u64>,
    next_timer: u64,
    /// A real clock: where the host's clock stood when the machine's clock read `base`; none while paused.
    running_since: Option<Instant>,
    base: u64,
}

/// The machine's clock, in nanoseconds from 0. It never goes back.
pub struct Clock {
    is_virtual: bool,
    /// A virtual clock's time.
    ticks: AtomicU64,
    /// The earliest deadline, or `u64::MAX`; for engines that look at it between blocks.
    earliest: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
}

impl Clock {
    /// A clock that follows the host's, with a thread that fires its timers. The thread ends when the clock is dropped.
    ///
    /// # Errors
    /// The host gives no thread.
    pub fn real() -> std::io::Result<Arc<Self>> {
        let clock = Self::new(false);
        let weak = Arc::downgrade(&clock);
        std::thread::Builder::new().name("clock".into()).spawn(move || Self::serve(&weak))?;
        Ok(clock)
    }

    /// A clock that stands until [`Clock::advance_to`].
    #[must_use]
    pub fn virtual_time() -> Arc<Self> {
        Self::new(true)
    }

    fn new(is_virtual: bool) -> Arc<Self> {
        Arc::new(Self {
            is_virtual,
            ticks: AtomicU64::new(0),
            earliest: AtomicU64::new(u64::MAX),
            state: Mutex::new(State {
                armed: BTreeMap::new(),
                deadlines: BTreeMap::new(),
                next_timer: 0,
                running_since: Some(Instant::now()),
                base: 0,
            }),
            changed: Condvar::new(),
        })
    }

    /// Whether the engine moves this clock.
    #[must_use]
    pub fn is_virtual(&self) -> bool {
        self.is_virtual
    }

    /// The time in nanoseconds.
    #[must_use]
    pub fn now(&self) -> u64 {
        if self.is_virtual { self.ticks.load(Ordering::Acquire) } else { Self::host_time(&self.lock()) }
    }

    /// The time of day in nanoseconds since 1970-01-01 UTC; a fixed start plus [`Clock::now`] for a virtual clock.
    #[must_use]
    pub fn wall(&self) -> u64 {
        if self.is_virtual {
            VIRTUAL_EPOCH + self.now()
        } else {
            let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
        }
    }

    /// Makes a timer that calls `callback` with the time at which it fires: on the clock's thread, or for a virtual clock on the thread
    /// that moved it. The callback may use the clock and its timers.
    pub fn timer(self: &Arc<Self>, callback: impl Fn(u64) + Send + Sync + 'static) -> Timer {
        let mut state = self.lock();
        state.next_timer += 1;
        Timer { clock: self.clone(), id: state.next_timer, callback: Arc::new(callback) }
    }

    /// The earliest deadline of a timer, or `u64::MAX`. Cheap.
    #[must_use]
    pub fn next_deadline(&self) -> u64 {
        self.earliest.load(Ordering::Acquire)
    }

    /// Moves a virtual clock to `time`, firing the timers that are due on the way, each at its own time. Time that has passed is ignored,
    /// and so is the call for a real clock.
    pub fn advance_to(&self, time: u64) {
        if !self.is_virtual {
            return;
        }
        while self.next_deadline() <= time {
            let due = {
                let mut state = self.lock();
                let Some(deadline) = state.armed.keys().next().map(|key| key.0).filter(|d| *d <= time) else {
                    break;
                };
                self.ticks.fetch_max(deadline, Ordering::AcqRel);
                self.take_due(&mut state, deadline)
            };
            if let Some((at, callback)) = due {
                callback(at);
            }
        }
        self.ticks.fetch_max(time, Ordering::AcqRel);
    }

    /// Stops the clock: time stands, and no timer fires.
    pub fn pause(&self) {
        let mut state = self.lock();
        state.base = Self::host_time(&state);
        state.running_since = None;
        self.changed.notify_all();
    }

    /// Lets a stopped clock go on.
    pub fn resume(&self) {
        let mut state = self.lock();
        if state.running_since.is_none() {
            state.running_since = Some(Instant::now());
            self.changed.notify_all();
        }
    }

    /// Sets the time, such as to that of a saved machine. It can only go forward.
    pub fn set(&self, time: u64) {
        self.ticks.fetch_max(time, Ordering::AcqRel);
        let mut state = self.lock();
        if Self::host_time(&state) < time {
            state.base = time;
            if state.running_since.is_some() {
                state.running_since = Some(Instant::now());
            }
        }
        self.changed.notify_all();
    }

    fn host_time(state: &State) -> u64 {
        let run = state.running_since.map_or(Duration::ZERO, |since| since.elapsed());
        state.base.saturating_add(u64::try_from(run.as_nanos()).unwrap_or(u64::MAX))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self, state: &State) {
        let earliest = state.armed.keys().next().map_or(u64::MAX, |key| key.0);
        self.earliest.store(earliest, Ordering::Release);
    }

    fn arm(&self, timer: u64, deadline: u64, period: Option<u64>, callback: Callback) {
        let mut state = self.lock();
        if let Some(old) = state.deadlines.insert(timer, deadline) {
            state.armed.remove(&(old, timer));
        }
        state.armed.insert((deadline, timer), Armed { period, callback });
        self.publish(&state);
        self.changed.notify_all();
    }

    fn cancel(&self, timer: u64) {
        let mut state = self.lock();
        if let Some(old) = state.deadlines.remove(&timer) {
            state.armed.remove(&(old, timer));
            self.publish(&state);
        }
    }

    /// Takes the first timer that is due at `now`, and arms it again if it is periodic.
    fn take_due(&self, state: &mut State, now: u64) -> Option<(u64, Callback)> {
        let (&(deadline, timer), _) = state.armed.first_key_value().filter(|(key, _)| key.0 <= now)?;
        let armed = state.armed.remove(&(deadline, timer))?;
        state.deadlines.remove(&timer);
        let callback = armed.callback.clone();
        if let Some(period) = armed.period {
            let missed = (now - deadline) / period;
            let next = deadline.saturating_add(period.saturating_mul(missed + 1));
            state.deadlines.insert(timer, next);
            state.armed.insert((next, timer), armed);
        }
        self.publish(state);
        Some((deadline.max(now), callback))
    }

    fn serve(weak: &Weak<Self>) {
        /// How long the thread sleeps before it looks whether its clock is still wanted.
        const LONGEST: Duration = Duration::from_millis(500);
        while let Some(clock) = weak.upgrade() {
            let mut state = clock.lock();
            let now = Self::host_time(&state);
            let due = if state.running_since.is_some() { clock.take_due(&mut state, now) } else { None };
            if let Some((at, callback)) = due {
                drop(state);
                callback(at);
                continue;
            }
            let wait = match state.armed.keys().next() {
                Some(key) if state.running_since.is_some() => Duration::from_nanos(key.0 - now).min(LONGEST),
                _ => LONGEST,
            };
            drop(clock.changed.wait_timeout(state, wait));
        }
    }
}

/// A timer on the machine's clock. Dropping it cancels it; a callback that is under way still completes.
pub struct Timer {
    clock: Arc<Clock>,
    id: u64,
    callback: Callback,
}

impl Timer {
    /// Fires once at `deadline`. Replaces an earlier deadline.
    pub fn arm(&self, deadline: u64) {
        self.clock.arm(self.id, deadline, None, self.callback.clone());
    }

    /// Fires at `first` and then every `period` nanoseconds (at least 1). Missed periods are made up for by one call.
    pub fn arm_periodic(&self, first: u64, period: u64) {
        self.clock.arm(self.id, first, Some(period.max(1)), self.callback.clone());
    }

    /// Stops the timer.
    pub fn cancel(&self) {
        self.clock.cancel(self.id);
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.cancel();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noted(clock: &Arc<Clock>) -> (Timer, Arc<Mutex<Vec<u64>>>) {
        let fired = Arc::new(Mutex::new(Vec::new()));
        let note = fired.clone();
        (clock.timer(move |at| note.lock().unwrap().push(at)), fired)
    }

    #[test]
    fn a_virtual_timer_fires_at_its_own_time() {
        let clock = Clock::virtual_time();
        let (once, fired) = noted(&clock);
        once.arm(100);
        assert_eq!(clock.next_deadline(), 100);
        clock.advance_to(99);
        assert!(fired.lock().unwrap().is_empty());
        clock.advance_to(500);
        assert_eq!(*fired.lock().unwrap(), [100]);
        assert_eq!(clock.now(), 500);
    }

    #[test]
    fn a_periodic_timer_fires_each_period_until_cancelled() {
        let clock = Clock::virtual_time();
        let (periodic, fired) = noted(&clock);
        periodic.arm_periodic(10, 10);
        clock.advance_to(35);
        periodic.cancel();
        clock.advance_to(100);
        assert_eq!(*fired.lock().unwrap(), [10, 20, 30]);
    }

    #[test]
    fn arming_again_replaces_the_deadline() {
        let clock = Clock::virtual_time();
        let (timer, fired) = noted(&clock);
        timer.arm(10);
        timer.arm(50);
        clock.advance_to(60);
        assert_eq!(*fired.lock().unwrap(), [50]);
    }

    #[test]
    fn a_real_timer_fires_and_a_paused_clock_stands() {
        let clock = Clock::real().unwrap();
        let (send, receive) = crossbeam_channel::bounded(1);
        let timer = clock.timer(move |at| {
            let _ = send.send(at);
        });
        let deadline = clock.now() + 1_000_000;
        timer.arm(deadline);
        assert!(receive.recv_timeout(Duration::from_secs(10)).unwrap() >= deadline);
        clock.pause();
        let stands = clock.now();
        timer.arm(stands);
        assert!(receive.recv_timeout(Duration::from_millis(20)).is_err());
        assert_eq!(clock.now(), stands);
        clock.resume();
        receive.recv_timeout(Duration::from_secs(10)).unwrap();
    }
}
