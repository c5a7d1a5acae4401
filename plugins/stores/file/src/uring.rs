//! Reads, writes and flushes by io_uring.
//!
//! Whoever submits enters the kernel once for a whole batch, and reports at once what had ended when it came back: reads from the page cache mostly have. Only for what is
//! left, the reaper is woken, a thread that waits in the kernel for as long as something is under way. A lock holds the two off each other's ends of the ring;
//! it is not held while the reaper waits, nor while the host is told.
#![allow(unsafe_code, reason = "the kernel reads and writes the buffers of operations")]

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, Probe, opcode, squeue};
use tenon_sdk::store::{Completions, OperationKind, StoreError};

use crate::medium::Medium;
use crate::transfer::{Next, Task};

/// Operations in the kernel at once; the others wait for their turn.
const DEPTH: u32 = 256;
/// The name of the entry that wakes the reaper to end.
const WAKE: u64 = u64::MAX;

/// A ring and its reaper.
pub(crate) struct Uring {
    shared: Arc<Shared>,
    reaper: Option<JoinHandle<()>>,
}

struct Shared {
    ring: IoUring,
    medium: Arc<Medium>,
    completions: Completions,
    state: Mutex<State>,
    work: Condvar,
}

#[derive(Default)]
struct State {
    /// Operations in the kernel, by the name of their entry.
    tasks: Vec<Option<Task>>,
    /// Names that are free.
    free: Vec<usize>,
    under_way: u32,
    waiting: VecDeque<Task>,
    /// The reaper waits to be told that something is under way.
    parked: bool,
    stop: bool,
}

/// Operations that have ended, to be reported without the lock.
type Ended = Vec<(u64, Result<(), StoreError>)>;

impl Uring {
    /// Makes a ring, if this host has what is needed and allows it; else says why not.
    pub(crate) fn new(medium: &Arc<Medium>, completions: &Completions) -> Result<Self, String> {
        let ring: IoUring = IoUring::builder()
            .setup_clamp()
            .setup_cqsize(DEPTH * 2)
            .build(DEPTH)
            .map_err(|error| error.to_string())?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe).map_err(|error| error.to_string())?;
        let needed = [
            opcode::Nop::CODE,
            opcode::Read::CODE,
            opcode::Write::CODE,
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
        ];
        if !needed.iter().all(|code| probe.is_supported(*code)) {
            return Err("the kernel's io_uring is too old: 5.6 has what is needed".into());
        }
        let shared = Arc::new(Shared {
            ring,
            medium: medium.clone(),
            completions: completions.clone(),
            state: Mutex::default(),
            work: Condvar::new(),
        });
        let reaper = std::thread::Builder::new().name("file-reaper".into()).spawn({
            let shared = shared.clone();
            move || shared.reap_until_stopped()
        });
        Ok(Self { shared, reaper: Some(reaper.map_err(|error| error.to_string())?) })
    }

    /// Begins operations that were admitted.
    pub(crate) fn submit(&self, tasks: Vec<Task>) {
        let mut ended = Ended::new();
        let mut state = self.shared.lock();
        state.waiting.extend(tasks);
        self.shared.pump(&mut state, &mut ended);
        let wake = state.parked && state.under_way > 0;
        if wake {
            state.parked = false;
        }
        drop(state);
        if wake {
            self.shared.work.notify_one();
        }
        self.shared.report(ended);
    }
}

impl Drop for Uring {
    /// What has not begun never begins; what has is waited for.
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.stop = true;
        state.waiting.clear();
        while !state.parked {
            // It may wait for something that ended and was reported by another.
            let entry = opcode::Nop::new().build().user_data(WAKE);
            // SAFETY: the entry refers to no memory; the lock is held.
            let pushed = unsafe { self.shared.ring.submission_shared().push(&entry) }.is_ok();
            if self.shared.ring.submit().is_ok() && pushed {
                break;
            }
            drop(state);
            std::thread::sleep(Duration::from_millis(1));
            state = self.shared.lock();
        }
        drop(state);
        self.shared.work.notify_one();
        if let Some(reaper) = self.reaper.take() {
            let _ = reaper.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn report(&self, ended: Ended) {
        for (token, outcome) in ended {
            self.completions.done(token, outcome);
        }
    }

    fn reap_until_stopped(&self) {
        let mut state = self.lock();
        loop {
            if state.under_way == 0 && state.waiting.is_empty() {
                if state.stop {
                    return;
                }
                state.parked = true;
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                state.parked = false;
                continue;
            }
            drop(state);
            let waited = self.ring.submitter().submit_and_wait(1);
            let mut ended = Ended::new();
            state = self.lock();
            self.pump(&mut state, &mut ended);
            let idle = ended.is_empty();
            drop(state);
            self.report(ended);
            if idle && waited.is_err_and(|error| error.raw_os_error() != Some(libc::EINTR)) {
                // The kernel is short of memory, and nothing of ours can end to give it some.
                std::thread::sleep(Duration::from_millis(1));
            }
            state = self.lock();
        }
    }

    /// Begins what waits and takes what has ended, until neither is to be had.
    fn pump(&self, state: &mut State, ended: &mut Ended) {
        loop {
            while state.under_way < DEPTH
                && let Some(task) = state.waiting.pop_front()
            {
                if task.kind == OperationKind::Flush && self.medium.is_lost() {
                    ended.push((task.token, Err(StoreError::Io)));
                    continue;
                }
                let name = state.free.pop().unwrap_or_else(|| {
                    state.tasks.push(None);
                    state.tasks.len() - 1
                });
                state.tasks[name] = Some(task);
                state.under_way += 1;
                self.push(state, name);
            }
            // An entry that the kernel does not take now stays in the ring, and the reaper comes back to it.
            let _ = self.ring.submit();
            if !self.take(state, ended) {
                return;
            }
        }
    }

    /// Puts what a task does next into the ring.
    fn push(&self, state: &mut State, name: usize) {
        let Some(task) = &mut state.tasks[name] else { return };
        let entry = self.entry(task).user_data(name as u64);
        // SAFETY: the lock is held. What the entry refers to is good until the operation has ended: the task stays in its place until then, and what is in its
        // vectors stays where it is when the list of tasks grows.
        if unsafe { self.ring.submission_shared().push(&entry) }.is_err() {
            // There is an entry for every operation, so that this is an entry of an operation that was to be made again, or the one that wakes the reaper.
            let _ = self.ring.submit();
            // SAFETY: as above.
            if unsafe { self.ring.submission_shared().push(&entry) }.is_err() {
                state.waiting.extend(state.tasks[name].take());
                state.free.push(name);
                state.under_way -= 1;
            }
        }
    }

    fn entry(&self, task: &mut Task) -> squeue::Entry {
        if task.kind == OperationKind::Flush {
            return opcode::Fsync::new(Fd(self.medium.descriptor())).flags(FsyncFlags::DATASYNC).build();
        }
        let transfer = task.transfer(&self.medium);
        let (fd, offset) = (Fd(transfer.fd), transfer.position);
        // SAFETY: the vectors are good.
        let first = if transfer.count == 1 { Some(unsafe { transfer.vectors.read() }) } else { None };
        let only = first
            .and_then(|vector| Some((vector.iov_base.cast::<u8>(), u32::try_from(vector.iov_len).ok()?)));
        let count = u32::try_from(transfer.count).unwrap_or(0);
        match (task.kind, only) {
            (OperationKind::Read, Some((base, length))) => {
                opcode::Read::new(fd, base, length).offset(offset).build()
            }
            (OperationKind::Read, None) => {
                opcode::Readv::new(fd, transfer.vectors, count).offset(offset).build()
            }
            (_, Some((base, length))) => opcode::Write::new(fd, base, length).offset(offset).build(),
            (_, None) => opcode::Writev::new(fd, transfer.vectors, count).offset(offset).build(),
        }
    }

    /// Takes what has ended; `false` if nothing had.
    fn take(&self, state: &mut State, ended: &mut Ended) -> bool {
        let mut any = false;
        // SAFETY: the lock is held.
        for entry in unsafe { self.ring.completion_shared() } {
            let Some((name, task)) = usize::try_from(entry.user_data())
                .ok()
                .and_then(|name| Some((name, state.tasks.get_mut(name)?.as_mut()?)))
            else {
                continue;
            };
            any = true;
            let outcome =
                usize::try_from(entry.result()).map_err(|_| io::Error::from_raw_os_error(-entry.result()));
            let next = match (task.kind, outcome) {
                (OperationKind::Flush, Err(error)) if is_put_off(&error) => Next::Again,
                (OperationKind::Flush, outcome) => Next::End(self.medium.flushed(outcome.map(drop))),
                (_, outcome) => task.advance(&self.medium, outcome),
            };
            match next {
                Next::Again => self.push(state, name),
                Next::End(outcome) => {
                    ended.push((task.token, outcome));
                    state.tasks[name] = None;
                    state.free.push(name);
                    state.under_way -= 1;
                }
            }
        }
        any
    }
}

/// Whether a call was not made, rather than failed.
fn is_put_off(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::ECANCELED))
}
