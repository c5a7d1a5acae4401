//! What the threads of the ports have in common: they sleep until a descriptor is ready, or until somebody rings.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};
use rustix::fd::{AsFd, OwnedFd};

/// The token of the bell.
pub(crate) const BELL: u64 = 0;

/// Wakes a port's thread, to work or to end.
pub(crate) struct Bell {
    event: OwnedFd,
    stop: AtomicBool,
}

impl Bell {
    pub(crate) fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { event, stop: AtomicBool::new(false) })
    }

    pub(crate) fn ring(&self) {
        // It can only fail by having rung too often to count, which wakes as well.
        let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
    }

    /// Lets it be silent until it rings again.
    pub(crate) fn silence(&self) {
        let _ = rustix::io::read(&self.event, &mut [0; 8]);
    }

    pub(crate) fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Ends the thread, and waits for that.
    pub(crate) fn stop(&self, thread: Option<JoinHandle<()>>) {
        self.stop.store(true, Ordering::Release);
        self.ring();
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }
}

/// Descriptors that are watched, the bell among them.
pub(crate) struct Poll(OwnedFd);

impl Poll {
    pub(crate) fn new(bell: &Bell) -> io::Result<Self> {
        let poll = Self(epoll::create(epoll::CreateFlags::CLOEXEC)?);
        poll.add(&bell.event, BELL, epoll::EventFlags::IN)?;
        Ok(poll)
    }

    pub(crate) fn add(&self, source: impl AsFd, token: u64, flags: epoll::EventFlags) -> io::Result<()> {
        Ok(epoll::add(&self.0, source, epoll::EventData::new_u64(token), flags)?)
    }

    /// Waits, and puts what has happened in the place of `events`: tokens and what they are ready for.
    pub(crate) fn wait(&self, events: &mut Vec<epoll::Event>, timeout: Option<Timespec>) -> io::Result<()> {
        events.clear();
        events.reserve(64);
        match epoll::wait(&self.0, rustix::buffer::spare_capacity(events), timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}
