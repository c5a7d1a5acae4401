//! A few threads that carry out operations, made when there is something to do.
//!
//! Not bound to files: the other native stores whose operations wait share this module.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// The most threads.
const THREADS: usize = 8;

/// What the threads do.
pub(crate) trait Work: Send + Sync + 'static {
    /// One piece of it.
    type Task: Send + 'static;
    /// Does it, to its end; sooner if it takes long and `stop` becomes true.
    fn carry_out(&self, task: Self::Task, stop: &AtomicBool);
}

/// Threads that end with this.
pub(crate) struct Threads<W: Work>(Arc<Shared<W>>);

struct Shared<W: Work> {
    work: W,
    queue: Mutex<Queue<W::Task>>,
    wake: Condvar,
    stop: AtomicBool,
}

struct Queue<T> {
    tasks: VecDeque<T>,
    threads: Vec<JoinHandle<()>>,
    /// Threads that wait for work.
    idle: usize,
}

impl<W: Work> Threads<W> {
    pub(crate) fn new(work: W) -> Self {
        let queue = Queue { tasks: VecDeque::new(), threads: Vec::new(), idle: 0 };
        Self(Arc::new(Shared {
            work,
            queue: Mutex::new(queue),
            wake: Condvar::new(),
            stop: AtomicBool::new(false),
        }))
    }

    /// Begins tasks.
    pub(crate) fn submit(&self, tasks: impl IntoIterator<Item = W::Task>) {
        let mut queue = self.0.lock();
        queue.tasks.extend(tasks);
        while queue.idle < queue.tasks.len() && queue.threads.len() < THREADS {
            let shared = self.0.clone();
            match std::thread::Builder::new().name("store-io".into()).spawn(move || shared.run()) {
                Ok(thread) => queue.threads.push(thread),
                Err(_) => break,
            }
            // Until it has a task.
            queue.idle += 1;
        }
        if queue.threads.is_empty() {
            // The host gives no thread at all: slow is better than never.
            let tasks = std::mem::take(&mut queue.tasks);
            drop(queue);
            tasks.into_iter().for_each(|task| self.0.work.carry_out(task, &self.0.stop));
            return;
        }
        let tasks = queue.tasks.len();
        drop(queue);
        if tasks == 1 { self.0.wake.notify_one() } else { self.0.wake.notify_all() }
    }
}

impl<W: Work> Drop for Threads<W> {
    /// What has not begun never begins; what has is waited for.
    fn drop(&mut self) {
        let mut queue = self.0.lock();
        self.0.stop.store(true, Ordering::Relaxed);
        queue.tasks.clear();
        let threads = std::mem::take(&mut queue.threads);
        drop(queue);
        self.0.wake.notify_all();
        for thread in threads {
            let _ = thread.join();
        }
    }
}

impl<W: Work> Shared<W> {
    fn lock(&self) -> MutexGuard<'_, Queue<W::Task>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A thread: counted as idle from before it starts.
    fn run(&self) {
        let mut queue = self.lock();
        loop {
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            let Some(task) = queue.tasks.pop_front() else {
                queue = self.wake.wait(queue).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            queue.idle -= 1;
            drop(queue);
            self.work.carry_out(task, &self.stop);
            queue = self.lock();
            queue.idle += 1;
        }
    }
}
