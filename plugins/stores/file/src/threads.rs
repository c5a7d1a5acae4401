//! Operations by system calls on a few threads: where there is no io_uring, and on every host what io_uring does no better.
#![allow(unsafe_code, reason = "preadv and pwritev on the buffers of operations")]

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use tenon_sdk::store::{Completions, OperationKind, StoreError};

use crate::medium::Medium;
use crate::transfer::{Next, Task};

/// The most threads of a store.
const MOST: usize = 8;

/// Threads that are made when there is something to do, and end with this.
pub(crate) struct Threads(Arc<Shared>);

struct Shared {
    medium: Arc<Medium>,
    completions: Completions,
    queue: Mutex<Queue>,
    work: Condvar,
    stop: AtomicBool,
}

#[derive(Default)]
struct Queue {
    tasks: VecDeque<Task>,
    threads: Vec<JoinHandle<()>>,
    /// Threads that wait for work.
    idle: usize,
}

impl Threads {
    pub(crate) fn new(medium: Arc<Medium>, completions: Completions) -> Self {
        let (queue, work, stop) = Default::default();
        Self(Arc::new(Shared { medium, completions, queue, work, stop }))
    }

    /// Begins operations that were admitted.
    pub(crate) fn submit(&self, tasks: impl IntoIterator<Item = Task>) {
        let mut queue = self.0.lock();
        queue.tasks.extend(tasks);
        while queue.idle < queue.tasks.len() && queue.threads.len() < MOST {
            let shared = self.0.clone();
            match std::thread::Builder::new().name("file-io".into()).spawn(move || shared.work()) {
                Ok(thread) => queue.threads.push(thread),
                Err(_) => break,
            }
            // It takes one task at least.
            queue.idle += 1;
        }
        if queue.threads.is_empty() {
            // The host gives no thread at all: slow is better than never.
            let tasks = std::mem::take(&mut queue.tasks);
            drop(queue);
            tasks.into_iter().for_each(|task| self.0.carry_out(task));
            return;
        }
        drop(queue);
        self.0.work.notify_all();
    }
}

impl Drop for Threads {
    /// What has not begun never begins; what has is waited for.
    fn drop(&mut self) {
        self.0.stop.store(true, Ordering::Relaxed);
        let mut queue = self.0.lock();
        queue.tasks.clear();
        let threads = std::mem::take(&mut queue.threads);
        drop(queue);
        self.0.work.notify_all();
        for thread in threads {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A thread: counted as idle from before it starts.
    fn work(&self) {
        let mut queue = self.lock();
        loop {
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            let Some(task) = queue.tasks.pop_front() else {
                queue = self.work.wait(queue).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            queue.idle -= 1;
            drop(queue);
            self.carry_out(task);
            queue = self.lock();
            queue.idle += 1;
        }
    }

    fn carry_out(&self, mut task: Task) {
        let Task { token, kind, position, length, .. } = task;
        let medium = &self.medium;
        let slow =
            |outcome: io::Result<()>| outcome.map_err(|error| medium.failed(kind, position, length, &error));
        let outcome = match kind {
            OperationKind::Read | OperationKind::Write => self.transfer(&mut task),
            OperationKind::Flush => medium.flush(),
            OperationKind::Discard => slow(medium.discard(position, length)),
            OperationKind::WriteZeroes { unmap } => {
                slow(medium.write_zeroes(position, length, unmap, &self.stop))
            }
        };
        self.completions.done(token, outcome);
    }

    fn transfer(&self, task: &mut Task) -> Result<(), StoreError> {
        loop {
            let transfer = task.transfer(&self.medium);
            let (count, position) =
                (libc::c_int::try_from(transfer.count), libc::off_t::try_from(transfer.position));
            let (Ok(count), Ok(position)) = (count, position) else { return Err(StoreError::OutOfRange) };
            // SAFETY: the vectors and what they point to are good until the operation has ended.
            let moved = unsafe {
                if task.kind == OperationKind::Read {
                    libc::preadv(transfer.fd, transfer.vectors, count, position)
                } else {
                    libc::pwritev(transfer.fd, transfer.vectors, count, position)
                }
            };
            let moved = usize::try_from(moved).map_err(|_| io::Error::last_os_error());
            if let Next::End(outcome) = task.advance(&self.medium, moved) {
                return outcome;
            }
        }
    }
}
