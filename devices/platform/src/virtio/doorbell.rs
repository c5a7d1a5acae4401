//! Doorbells that need no exit: the engine turns a driver's write into an event, and one thread for all devices passes it on.
//!
//! Where the engine has no such thing, and for queues past the bound, doorbells are answered on the bus by the vCPU's thread. The thread is started with the first
//! doorbell and ends with the last owner of [`Doorbells`].

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;

use rustix::buffer::spare_capacity;
use rustix::event::{EventfdFlags, epoll, eventfd};
use tenon_core::{EngineError, Vm};

/// The most doorbells of a machine that have an event: each is a descriptor of this process, and kernels have bounds of their own.
const MAX_BELLS: usize = 512;
/// The number that ends the thread.
const STOP: u64 = u64::MAX;

/// Who is rung.
pub(crate) trait Ring: Send + Sync {
    /// The driver wrote to this queue's doorbell. Called on the thread of doorbells.
    fn ring(&self, queue: u16);
}

struct Bell {
    event: Arc<OwnedFd>,
    who: Weak<dyn Ring>,
    queue: u16,
}

#[derive(Default)]
struct Bells {
    next: u64,
    all: HashMap<u64, Bell>,
}

struct Shared {
    epoll: OwnedFd,
    bells: Mutex<Bells>,
}

/// See the module.
pub(crate) struct Doorbells {
    vm: Arc<dyn Vm>,
    shared: Arc<Shared>,
    stop: OwnedFd,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Shared {
    fn bells(&self) -> MutexGuard<'_, Bells> {
        self.bells.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Passes on what rings until told to stop.
    fn serve(&self) {
        let mut events = Vec::with_capacity(32);
        loop {
            events.clear();
            match epoll::wait(&self.epoll, spare_capacity(&mut events), None) {
                Ok(_) => {}
                Err(error) if error == rustix::io::Errno::INTR => continue,
                Err(error) => {
                    tracing::error!("waiting for doorbells: {error}");
                    return;
                }
            }
            for event in &events {
                let number = event.data.u64();
                if number == STOP {
                    return;
                }
                let rung = self.bells().all.get(&number).map(|bell| {
                    let mut count = [0; 8];
                    // What was rung often is one ring; what was taken already is none.
                    (rustix::io::read(&*bell.event, &mut count).is_ok(), bell.who.clone(), bell.queue)
                });
                if let Some((true, who, queue)) = rung
                    && let Some(who) = who.upgrade()
                {
                    who.ring(queue);
                }
            }
        }
    }
}

impl Doorbells {
    pub(crate) fn new(vm: Arc<dyn Vm>) -> io::Result<Arc<Self>> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        epoll::add(&epoll, &stop, epoll::EventData::new_u64(STOP), epoll::EventFlags::IN)?;
        let shared = Arc::new(Shared { epoll, bells: Mutex::default() });
        Ok(Arc::new(Self { vm, shared, stop, thread: Mutex::new(None) }))
    }

    /// Hangs a doorbell at this address, if there is one to be had. It is taken down when the returned value is dropped.
    pub(crate) fn hang(self: &Arc<Self>, address: u64, queue: u16, who: Weak<dyn Ring>) -> Option<Hung> {
        match self.try_hang(address, queue, who) {
            Ok(hung) => hung,
            Err(error) => {
                if !matches!(error, EngineError::Unsupported(_)) {
                    tracing::debug!(queue, "a doorbell at {address:#x} is answered on the bus: {error}");
                }
                None
            }
        }
    }

    fn try_hang(
        self: &Arc<Self>,
        address: u64,
        queue: u16,
        who: Weak<dyn Ring>,
    ) -> Result<Option<Hung>, EngineError> {
        let failed = |call| move |error: rustix::io::Errno| EngineError::Host { call, source: error.into() };
        if self.shared.bells().all.len() >= MAX_BELLS {
            return Ok(None);
        }
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(failed("eventfd"))?;
        let event = Arc::new(event);
        self.vm.register_ioeventfd(event.as_fd(), address, 0)?;
        let number = {
            let mut bells = self.shared.bells();
            let number = bells.next;
            bells.next += 1;
            bells.all.insert(number, Bell { event: event.clone(), who, queue });
            number
        };
        let hung = Hung { bells: self.clone(), event, address, number };
        self.start()?;
        let data = epoll::EventData::new_u64(number);
        epoll::add(&self.shared.epoll, &*hung.event, data, epoll::EventFlags::IN)
            .map_err(failed("epoll_ctl"))?;
        Ok(Some(hung))
    }

    fn start(&self) -> Result<(), EngineError> {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if thread.is_none() {
            let shared = self.shared.clone();
            let new = std::thread::Builder::new().name("doorbells".into()).spawn(move || shared.serve());
            *thread = Some(new.map_err(|source| EngineError::Host { call: "clone", source })?);
        }
        Ok(())
    }
}

impl Drop for Doorbells {
    fn drop(&mut self) {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread
            && rustix::io::write(&self.stop, &1u64.to_ne_bytes()).is_ok()
            // The last owner may be a device that was rung.
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

/// A doorbell in its place.
pub(crate) struct Hung {
    bells: Arc<Doorbells>,
    event: Arc<OwnedFd>,
    address: u64,
    number: u64,
}

impl Drop for Hung {
    fn drop(&mut self) {
        if let Err(error) = self.bells.vm.unregister_ioeventfd(self.event.as_fd(), self.address, 0) {
            tracing::warn!("the doorbell at {:#x} stays: {error}", self.address);
        }
        let _ = epoll::delete(&self.bells.shared.epoll, &*self.event);
        self.bells.shared.bells().all.remove(&self.number);
    }
}
