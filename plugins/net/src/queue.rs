//! A bounded row of frames between two threads, with someone to wake.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tenon_core::{Offloads, PortCounters, PortNews};

/// The most frames that wait.
const FRAMES: usize = 1024;
/// The most bytes that wait.
const BYTES: usize = 4 << 20;

type Watch = Arc<dyn Fn(PortNews) + Send + Sync>;

/// A lock whose holder never leaves it half changed.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Default)]
struct Row {
    frames: VecDeque<Vec<u8>>,
    bytes: usize,
}

impl Row {
    fn full(&self) -> bool {
        self.frames.len() >= FRAMES || self.bytes >= BYTES
    }

    fn push(&mut self, frame: Vec<u8>) -> bool {
        if self.full() {
            return false;
        }
        self.bytes += frame.len();
        self.frames.push_back(frame);
        true
    }

    fn pop(&mut self) -> Option<Vec<u8>> {
        let frame = self.frames.pop_front()?;
        self.bytes -= frame.len();
        Some(frame)
    }
}

/// Frames from the guest to the port's thread.
#[derive(Default)]
pub(crate) struct Outbox(Mutex<Row>);

impl Outbox {
    /// Adds a frame. `None` if there is no room; else whether it is the only one, so that the thread may be asleep.
    pub(crate) fn push(&self, frame: Vec<u8>) -> Option<bool> {
        let mut row = lock(&self.0);
        let first = row.frames.is_empty();
        row.push(frame).then_some(first)
    }

    /// Takes all frames.
    pub(crate) fn take(&self) -> VecDeque<Vec<u8>> {
        let mut row = lock(&self.0);
        row.bytes = 0;
        std::mem::take(&mut row.frames)
    }
}

#[derive(Default)]
struct Waiting {
    row: Row,
    accepted: Offloads,
    /// The reader has seen all there is, and wants to hear of more.
    armed: bool,
    /// The writer has found no room, and wants to hear of some.
    starved: bool,
    watch: Option<Watch>,
}

/// Frames to the guest, and who hears of them.
#[derive(Default)]
pub(crate) struct Inbox {
    waiting: Mutex<Waiting>,
}

impl Inbox {
    pub(crate) fn accept(&self, offloads: Offloads) {
        let mut waiting = lock(&self.waiting);
        let before = waiting.accepted;
        waiting.accepted = offloads;
        // Frames that use what is no longer accepted were for a driver that is gone.
        if before.checksum && !offloads.checksum
            || before.tso4 && !offloads.tso4
            || before.tso6 && !offloads.tso6
        {
            waiting.row = Row::default();
        }
    }

    /// What the driver accepts.
    pub(crate) fn accepted(&self) -> Offloads {
        lock(&self.waiting).accepted
    }

    pub(crate) fn watch(&self, news: Box<dyn Fn(PortNews) + Send + Sync>) {
        lock(&self.waiting).watch = Some(news.into());
    }

    /// Says that the port's description has changed.
    pub(crate) fn changed(&self) {
        let watch = lock(&self.waiting).watch.clone();
        if let Some(watch) = watch {
            watch(PortNews::Changed);
        }
    }

    /// Whether a frame would find room. If not, [`Inbox::receive`] says when there is.
    pub(crate) fn has_room(&self) -> bool {
        let mut waiting = lock(&self.waiting);
        waiting.starved |= waiting.row.full();
        !waiting.row.full()
    }

    /// Adds a frame; false if there is no room.
    pub(crate) fn push(&self, frame: Vec<u8>) -> bool {
        let mut waiting = lock(&self.waiting);
        if !waiting.row.push(frame) {
            waiting.starved = true;
            return false;
        }
        let watch = if std::mem::take(&mut waiting.armed) { waiting.watch.clone() } else { None };
        drop(waiting);
        if let Some(watch) = watch {
            watch(PortNews::Frames);
        }
        true
    }

    pub(crate) fn waiting(&self, most: usize, into: &mut Vec<u32>) {
        let mut waiting = lock(&self.waiting);
        let there = waiting.row.frames.len().min(most);
        waiting.armed = there < most;
        into.extend(
            waiting.row.frames.iter().take(there).map(|f| u32::try_from(f.len()).unwrap_or(u32::MAX)),
        );
    }

    /// Takes a frame, and says whether the writer, who had found no room, should hear that half of it is free now.
    pub(crate) fn receive(&self) -> (Option<Vec<u8>>, bool) {
        let mut waiting = lock(&self.waiting);
        let frame = waiting.row.pop();
        let roomy = waiting.row.frames.len() <= FRAMES / 2 && waiting.row.bytes <= BYTES / 2;
        let wake = waiting.starved && roomy;
        waiting.starved &= !wake;
        (frame, wake)
    }
}

/// What a port counts.
#[derive(Default)]
pub(crate) struct Counts {
    pub(crate) sent: AtomicU64,
    pub(crate) received: AtomicU64,
    pub(crate) send_dropped: AtomicU64,
    pub(crate) receive_dropped: AtomicU64,
}

impl Counts {
    pub(crate) fn add(counter: &AtomicU64) {
        counter.fetch_add(1, Relaxed);
    }

    pub(crate) fn read(&self) -> PortCounters {
        PortCounters {
            sent: self.sent.load(Relaxed),
            received: self.received.load(Relaxed),
            send_dropped: self.send_dropped.load(Relaxed),
            receive_dropped: self.receive_dropped.load(Relaxed),
        }
    }
}
