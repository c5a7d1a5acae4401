//! What a device's imports do, the same for a component and for a native library; and the record of it that makes restarts exact.
//!
//! # Records
//!
//! A device is a function of the calls into it and of what the host answered. The supervisor notes the calls; this module notes the answers that cannot be
//! computed again (the time, bytes read, bytes taken) and the effects that must not happen twice (bytes written, edges, requests, messages). While a new instance is
//! led through the noted calls, the noted answers are given again and the noted effects are left out, so that it arrives where the old one was
//! and the outside sees nothing. When the notes are used up, imports work as always.
//!
//! Levels of lines and deadlines of timers are states, not events: they are kept as the device last set them, and while `holding` they are not passed on.
//! `settle` passes them on. A line that is high before and after a restart never goes low in between.
//!
//! # Locks
//!
//! All of this runs under the instance's lock. It takes the locks of the clock, the interrupt lines, a channel and the request queue, each
//! for a moment; none of those ever waits for an instance.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tenon_abi::{Level, Request};
use tenon_core::{Clock, IrqLine, Requests, Timer};

use crate::channel::Channel;

/// The longest message of the log.
const MAX_MESSAGE: usize = 4096;
/// How many messages may come at once, and how many each second after that.
const LOG_BURST: u32 = 100;
/// The shortest period of a timer.
const MIN_PERIOD: u64 = 10_000;
/// How many records, and how many bytes in them, are kept before the device is to be saved.
const MAX_RECORDS: usize = 8192;
const MAX_RECORD_BYTES: usize = 256 << 10;
/// The most bytes that one call of `channel.read` gives.
const MAX_READ: u32 = 64 << 10;

/// One answer or effect.
#[derive(Debug)]
pub(crate) enum Record {
    Now(u64),
    Wall(u64),
    Read(Box<[u8]>),
    Wrote(u32),
    Pulse,
    Request,
    Log,
}

struct Line {
    line: IrqLine,
    high: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Armed {
    deadline: u64,
    period: Option<u64>,
}

struct TimerSlot {
    timer: Timer,
    armed: Option<Armed>,
}

/// Levels and deadlines, to go back to.
pub(crate) struct Levels(Vec<bool>, Vec<Option<Armed>>);

/// The host's side of one device instance.
pub(crate) struct Services {
    name: String,
    clock: Arc<Clock>,
    requests: Requests,
    lines: Vec<Line>,
    timers: Vec<TimerSlot>,
    channels: Vec<Arc<Channel>>,
    records: Vec<Record>,
    /// The next record to be given again; at the end, imports work as always.
    cursor: usize,
    /// Whether `records` has grown so far that the device ought to be saved.
    crowded: bool,
    record_bytes: usize,
    /// Levels and deadlines are not passed on.
    holding: bool,
    /// A new instance is being started and restored: nothing that it does has an effect outside, and nothing is noted.
    preparing: bool,
    /// How often a led instance did something else than its predecessor.
    pub(crate) divergences: u64,
    log: LogLimit,
}

impl Services {
    pub(crate) fn new(name: &str, clock: Arc<Clock>, requests: Requests) -> Box<Self> {
        Box::new(Self {
            name: name.to_owned(),
            clock,
            requests,
            lines: Vec::new(),
            timers: Vec::new(),
            channels: Vec::new(),
            records: Vec::new(),
            cursor: 0,
            crowded: false,
            record_bytes: 0,
            holding: false,
            preparing: false,
            divergences: 0,
            log: LogLimit::new(),
        })
    }

    /// Hands over what the device asked for.
    pub(crate) fn grant(&mut self, lines: Vec<IrqLine>, timers: Vec<Timer>, channels: Vec<Arc<Channel>>) {
        self.lines = lines.into_iter().map(|line| Line { line, high: false }).collect();
        self.timers = timers.into_iter().map(|timer| TimerSlot { timer, armed: None }).collect();
        self.channels = channels;
    }

    /// How many lines, timers and channels there are.
    pub(crate) fn counts(&self) -> [u32; 3] {
        [self.lines.len(), self.timers.len(), self.channels.len()]
            .map(|n| u32::try_from(n).unwrap_or(u32::MAX))
    }

    // Records.

    /// The place in the records: where the next call begins.
    pub(crate) fn position(&self) -> usize {
        self.cursor
    }

    /// Forgets the records from `mark` on.
    pub(crate) fn truncate(&mut self, mark: usize) {
        self.records.truncate(mark);
        self.cursor = self.cursor.min(mark);
    }

    /// Forgets all records: the device was saved.
    pub(crate) fn forget(&mut self) {
        self.records.clear();
        self.cursor = 0;
        self.record_bytes = 0;
        self.crowded = false;
    }

    /// Whether the device ought to be saved, since its records are many.
    #[inline]
    pub(crate) fn crowded(&self) -> bool {
        self.crowded
    }

    /// A new instance comes: until `settle`, levels and deadlines are not passed on, and begin as after power-on; until `begin_replay`, nothing
    /// else has an effect either.
    pub(crate) fn prepare(&mut self) {
        self.holding = true;
        self.preparing = true;
        self.lines.iter_mut().for_each(|line| line.high = false);
        self.timers.iter_mut().for_each(|slot| slot.armed = None);
    }

    /// From here on, imports are answered from the records, as long as there are any.
    pub(crate) fn begin_replay(&mut self) {
        self.preparing = false;
        self.cursor = 0;
    }

    /// Passes the levels and deadlines on.
    pub(crate) fn settle(&mut self) {
        self.holding = false;
        self.preparing = false;
        for line in &self.lines {
            line.line.set_level(line.high);
        }
        self.rearm_timers();
    }

    /// Arms the timers as the device last armed them.
    pub(crate) fn rearm_timers(&self) {
        for slot in &self.timers {
            match slot.armed {
                Some(Armed { deadline, period: None }) => slot.timer.arm(deadline),
                Some(Armed { deadline, period: Some(period) }) => slot.timer.arm_periodic(deadline, period),
                None => slot.timer.cancel(),
            }
        }
    }

    pub(crate) fn levels(&self) -> Levels {
        Levels(
            self.lines.iter().map(|line| line.high).collect(),
            self.timers.iter().map(|slot| slot.armed).collect(),
        )
    }

    pub(crate) fn set_levels(&mut self, levels: &Levels) {
        self.lines.iter_mut().zip(&levels.0).for_each(|(line, high)| line.high = *high);
        self.timers.iter_mut().zip(&levels.1).for_each(|(slot, armed)| slot.armed = *armed);
    }

    /// Tells a new instance again of bytes that wait.
    pub(crate) fn rearm_channels(&self) {
        self.channels.iter().for_each(|channel| channel.rearm());
    }

    /// The device was not told after all: it is told when more comes.
    pub(crate) fn want_channel(&mut self, channel: u32) {
        if let Some(channel) = at(&mut self.channels, channel) {
            channel.want();
        }
    }

    pub(crate) fn close_channels(&self) {
        self.channels.iter().for_each(|channel| channel.close());
    }

    /// Whether timer `index` is due at `now`; if so, it is stopped or goes on to its next period. A call that comes after the device has cancelled
    /// or moved the timer is not one.
    pub(crate) fn take_due(&mut self, index: u32, now: u64) -> bool {
        let Some(slot) = at(&mut self.timers, index) else { return false };
        match slot.armed {
            Some(Armed { deadline, .. }) if deadline > now => false,
            Some(Armed { deadline, period: Some(period) }) => {
                let periods = (now - deadline) / period + 1;
                let deadline = deadline.saturating_add(period.saturating_mul(periods));
                slot.armed = Some(Armed { deadline, period: Some(period) });
                true
            }
            Some(Armed { period: None, .. }) => {
                slot.armed = None;
                true
            }
            None => false,
        }
    }

    /// The records say what the import with this answer did, if there are records left. A record of another kind ends the replay.
    fn replay<T>(&mut self, take: impl FnOnce(&Record) -> Option<T>) -> Option<T> {
        if self.preparing {
            return None;
        }
        let record = self.records.get(self.cursor)?;
        match take(record) {
            Some(answer) => {
                self.cursor += 1;
                Some(answer)
            }
            None => {
                self.divergences += 1;
                self.records.truncate(self.cursor);
                None
            }
        }
    }

    fn note(&mut self, record: Record) {
        if self.preparing {
            return;
        }
        if let Record::Read(bytes) = &record {
            self.record_bytes += bytes.len();
        }
        self.records.push(record);
        self.cursor = self.records.len();
        self.crowded |= self.cursor >= MAX_RECORDS || self.record_bytes >= MAX_RECORD_BYTES;
    }

    /// An effect that happens once: whether it is to happen now.
    fn once(&mut self, record: Record) -> bool {
        if self.preparing {
            return false;
        }
        let kind = std::mem::discriminant(&record);
        if self.replay(|noted| (std::mem::discriminant(noted) == kind).then_some(())).is_some() {
            return false;
        }
        self.note(record);
        true
    }

    /// Takes the records away: imports work as always until [`Services::put_back`].
    pub(crate) fn set_aside(&mut self) -> Vec<Record> {
        self.preparing = false;
        self.cursor = 0;
        std::mem::take(&mut self.records)
    }

    /// From here on, imports are answered from these records, as long as there are any.
    pub(crate) fn put_back(&mut self, records: Vec<Record>) {
        self.records = records;
        self.cursor = 0;
    }

    /// Whether a new instance is being started and restored.
    pub(crate) fn preparing(&self) -> bool {
        self.preparing
    }

    pub(crate) fn channel(&self, channel: u32) -> Option<&Arc<Channel>> {
        self.channels.get(usize::try_from(channel).ok()?)
    }

    /// The machine's clock.
    pub(crate) fn clock(&self) -> &Clock {
        &self.clock
    }

    // Imports.

    pub(crate) fn log(&mut self, level: Level, message: &str) {
        if !self.once(Record::Log) {
            return;
        }
        self.log.write(&self.name, level, message);
    }

    pub(crate) fn now(&mut self) -> u64 {
        if let Some(time) = self.replay(|r| if let Record::Now(time) = r { Some(*time) } else { None }) {
            return time;
        }
        let time = self.clock.now();
        self.note(Record::Now(time));
        time
    }

    pub(crate) fn wall(&mut self) -> u64 {
        if let Some(time) = self.replay(|r| if let Record::Wall(time) = r { Some(*time) } else { None }) {
            return time;
        }
        let time = self.clock.wall();
        self.note(Record::Wall(time));
        time
    }

    pub(crate) fn arm(&mut self, timer: u32, deadline: u64) {
        let holding = self.holding;
        let Some(slot) = at(&mut self.timers, timer) else { return };
        slot.armed = Some(Armed { deadline, period: None });
        if !holding {
            slot.timer.arm(deadline);
        }
    }

    pub(crate) fn arm_periodic(&mut self, timer: u32, first: u64, period: u64) {
        let holding = self.holding;
        let Some(slot) = at(&mut self.timers, timer) else { return };
        let period = period.max(MIN_PERIOD);
        slot.armed = Some(Armed { deadline: first, period: Some(period) });
        if !holding {
            slot.timer.arm_periodic(first, period);
        }
    }

    pub(crate) fn cancel(&mut self, timer: u32) {
        let holding = self.holding;
        let Some(slot) = at(&mut self.timers, timer) else { return };
        slot.armed = None;
        if !holding {
            slot.timer.cancel();
        }
    }

    pub(crate) fn set_level(&mut self, line: u32, high: bool) {
        let holding = self.holding;
        let Some(line) = at(&mut self.lines, line) else { return };
        if line.high != high {
            line.high = high;
            if !holding {
                line.line.set_level(high);
            }
        }
    }

    pub(crate) fn pulse(&mut self, line: u32) {
        let live = self.once(Record::Pulse);
        let Some(line) = at(&mut self.lines, line) else { return };
        line.high = false;
        if live {
            line.line.pulse();
        }
    }

    pub(crate) fn channel_write(&mut self, channel: u32, bytes: &[u8]) -> u32 {
        if let Some(taken) = self.replay(|r| if let Record::Wrote(taken) = r { Some(*taken) } else { None }) {
            return taken;
        }
        if self.preparing {
            return u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        }
        let Some(channel) = at(&mut self.channels, channel) else { return 0 };
        let taken = channel.device_write(bytes);
        self.note(Record::Wrote(taken));
        taken
    }

    pub(crate) fn channel_read(&mut self, channel: u32, max: u32) -> Vec<u8> {
        if let Some(bytes) =
            self.replay(|r| if let Record::Read(bytes) = r { Some(bytes.to_vec()) } else { None })
        {
            return bytes;
        }
        if self.preparing {
            return Vec::new();
        }
        let Some(channel) = at(&mut self.channels, channel) else { return Vec::new() };
        let bytes = channel.device_read(max.min(MAX_READ));
        self.note(Record::Read(bytes.as_slice().into()));
        bytes
    }

    pub(crate) fn request(&mut self, request: Request) {
        if self.once(Record::Request) {
            self.requests.send(match request {
                Request::PowerOff => tenon_core::Request::PowerOff,
                Request::Reset => tenon_core::Request::Reset,
                Request::Exit(status) => tenon_core::Request::Exit(status),
            });
        }
    }
}

fn at<T>(list: &mut [T], index: u32) -> Option<&mut T> {
    list.get_mut(usize::try_from(index).unwrap_or(usize::MAX))
}

/// Whether messages of a level are shown at all.
fn is_shown(level: Level) -> bool {
    match level {
        Level::Error => tracing::enabled!(target: "tenon::plugin", tracing::Level::ERROR),
        Level::Warn => tracing::enabled!(target: "tenon::plugin", tracing::Level::WARN),
        Level::Info => tracing::enabled!(target: "tenon::plugin", tracing::Level::INFO),
        Level::Debug => tracing::enabled!(target: "tenon::plugin", tracing::Level::DEBUG),
        Level::Trace => tracing::enabled!(target: "tenon::plugin", tracing::Level::TRACE),
    }
}

/// Writes one message of a plugin to the host's log.
fn emit(name: &str, level: Level, message: &str) {
    let message = &message[..message.floor_char_boundary(MAX_MESSAGE)];
    match level {
        Level::Error => tracing::error!(target: "tenon::plugin", device = name, "{message}"),
        Level::Warn => tracing::warn!(target: "tenon::plugin", device = name, "{message}"),
        Level::Info => tracing::info!(target: "tenon::plugin", device = name, "{message}"),
        Level::Debug => tracing::debug!(target: "tenon::plugin", device = name, "{message}"),
        Level::Trace => tracing::trace!(target: "tenon::plugin", device = name, "{message}"),
    }
}

/// The log of one plugin: `LOG_BURST` messages at once, and as many each second.
pub(crate) struct LogLimit {
    since: Instant,
    admitted: u32,
    lost: u64,
}

impl LogLimit {
    pub(crate) fn new() -> Self {
        Self { since: Instant::now(), admitted: 0, lost: 0 }
    }

    /// Writes a message to the host's log, unless nobody would see it or too many came before.
    pub(crate) fn write(&mut self, name: &str, level: Level, message: &str) {
        if !is_shown(level) {
            return;
        }
        if let Some(lost) = self.admit() {
            if lost > 0 {
                emit(name, Level::Warn, &format!("{lost} messages came too fast and were dropped"));
            }
            emit(name, level, message);
        }
    }

    /// Whether a message may be written, and if so how many were dropped before it.
    fn admit(&mut self) -> Option<u64> {
        if self.admitted < LOG_BURST {
            self.admitted += 1;
            return Some(std::mem::take(&mut self.lost));
        }
        if self.since.elapsed() >= Duration::from_secs(1) {
            self.since = Instant::now();
            self.admitted = 1;
            return Some(std::mem::take(&mut self.lost));
        }
        self.lost += 1;
        None
    }
}
