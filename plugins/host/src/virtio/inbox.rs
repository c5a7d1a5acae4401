//! What a device's worker is told of, by any thread, without waiting: bits that coalesce, the outcomes of operations, and a poke.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread::Thread;

use tenon_abi::StoreError;

use crate::store::Completed;

/// A set of numbers below 64 that any thread adds to.
#[derive(Default)]
pub(super) struct Bits(AtomicU64);

impl Bits {
    fn set(&self, index: u32) {
        self.0.fetch_or(1u64.checked_shl(index).unwrap_or(0), Ordering::Release);
    }

    /// Takes all of them.
    pub(super) fn take(&self) -> impl Iterator<Item = u32> + use<> {
        let mut bits =
            if self.0.load(Ordering::Relaxed) == 0 { 0 } else { self.0.swap(0, Ordering::Acquire) };
        std::iter::from_fn(move || {
            let index = (bits != 0).then(|| bits.trailing_zeros())?;
            bits &= bits - 1;
            Some(index)
        })
    }
}

/// How an operation of a request ended.
pub(super) type Outcome = (u32, Result<(), StoreError>);

/// A worker's news.
#[derive(Default)]
pub(super) struct Inbox {
    thread: OnceLock<Thread>,
    queues: [Bits; 4],
    pub(super) timers: Bits,
    pub(super) readable: Bits,
    pub(super) writable: Bits,
    pub(super) frames: Bits,
    pub(super) ports: Bits,
    pub(super) stores: Bits,
    pub(super) sockets: Bits,
    /// Bit 0: something was left to be done by a call on another thread.
    pub(super) poked: Bits,
    done: Mutex<Vec<Outcome>>,
}

/// Sorts of news that are a bit each.
#[derive(Clone, Copy)]
pub(super) enum News {
    Timer,
    Readable,
    Writable,
    Frames,
    Port,
    Store,
    Socket,
    Poke,
}

impl Inbox {
    /// This thread is the worker.
    pub(super) fn serve_here(&self) {
        let _ = self.thread.set(std::thread::current());
    }

    pub(super) fn wake(&self) {
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }

    pub(super) fn tell(&self, news: News, index: u32) {
        let bits = match news {
            News::Timer => &self.timers,
            News::Readable => &self.readable,
            News::Writable => &self.writable,
            News::Frames => &self.frames,
            News::Port => &self.ports,
            News::Store => &self.stores,
            News::Socket => &self.sockets,
            News::Poke => &self.poked,
        };
        bits.set(index);
        self.wake();
    }

    pub(super) fn notify(&self, queue: u16) {
        if let Some(bits) = self.queues.get(usize::from(queue / 64)) {
            bits.set(u32::from(queue % 64));
            self.wake();
        }
    }

    /// Queues that were notified.
    pub(super) fn notified(&self) -> impl Iterator<Item = usize> + '_ {
        (0..)
            .zip(&self.queues)
            .flat_map(|(base, bits): (usize, _)| bits.take().map(move |bit| base * 64 + bit as usize))
    }

    /// Takes the outcomes into a list, which must be empty.
    pub(super) fn take_done(&self, into: &mut Vec<Outcome>) {
        std::mem::swap(&mut *self.done.lock().unwrap_or_else(PoisonError::into_inner), into);
    }
}

impl Completed for Inbox {
    fn completed(&self, token: u64, result: Result<(), StoreError>, _: Vec<u8>) {
        let handle = u32::try_from(token).unwrap_or(0);
        let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        done.push((handle, result));
        let first = done.len() == 1;
        drop(done);
        // Whoever made the list not empty has woken the worker, which takes all of it.
        if first {
            self.wake();
        }
    }
}
