//! Whose turn it is, when execution is by instruction count: one vCPU at a time, round robin, so that the same run gives the same result.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Instructions in a turn.
pub(crate) const SLICE: u64 = 10_000;

struct State {
    current: usize,
    /// Which vCPUs are inside `run`, or have not come there yet.
    inside: u64,
    /// Which of those take part: they are not halted.
    ready: u64,
}

/// The turns of a VM's vCPUs.
pub(crate) struct Turns {
    count: usize,
    state: Mutex<State>,
    changed: Condvar,
}

impl Turns {
    pub(crate) fn new(count: usize) -> Self {
        Self { count, state: Mutex::new(State { current: 0, inside: 0, ready: 0 }), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The vCPU exists: interrupts that are sent to it before its thread has come count from when they are sent.
    pub(crate) fn expect(&self, index: usize) {
        self.lock().inside |= 1 << index;
    }

    /// The vCPU is inside `run` from now on; it waits for its first turn.
    pub(crate) fn begin(&self, index: usize) {
        self.lock().inside |= 1 << index;
        self.enter(index);
    }

    /// The vCPU leaves `run`.
    pub(crate) fn end(&self, index: usize) {
        self.lock().inside &= !(1 << index);
        self.pass(index, true);
    }

    /// Lets a vCPU take part whose thread will come to [`Turns::enter`].
    pub(crate) fn ready(&self, index: usize) {
        let mut state = self.lock();
        if state.inside >> index & 1 == 0 {
            return;
        }
        if state.ready == 0 {
            state.current = index;
        }
        state.ready |= 1 << index;
        drop(state);
        self.changed.notify_all();
    }

    /// Takes part, and waits for this vCPU's turn.
    pub(crate) fn enter(&self, index: usize) {
        let mut state = self.lock();
        if state.ready == 0 {
            state.current = index;
        }
        state.ready |= 1 << index;
        while state.current != index {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Ends the turn; the next ready vCPU runs. With `leave` this one takes no further part.
    pub(crate) fn pass(&self, index: usize, leave: bool) {
        let mut state = self.lock();
        if leave {
            state.ready &= !(1 << index);
        }
        for step in 1..=self.count {
            let next = (index + step) % self.count;
            if state.ready >> next & 1 != 0 {
                state.current = next;
                break;
            }
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Whether no other vCPU is ready.
    pub(crate) fn alone(&self, index: usize) -> bool {
        self.lock().ready & !(1 << index) == 0
    }
}
