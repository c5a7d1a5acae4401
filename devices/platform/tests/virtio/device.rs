//! A device that answers a request by its own bytes, plus one each. It works when the test says so.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use tenon_core::{
    BrokenQueue, GuestRequest, Lifecycle, QueueDevice, QueueProfile, QueueTransport, RequestQueue,
};

#[derive(Default)]
pub(crate) struct Started {
    pub(crate) features: u64,
    pub(crate) queues: Vec<Option<Box<dyn RequestQueue>>>,
    pub(crate) transport: Option<Arc<dyn QueueTransport>>,
}

pub(crate) struct Echo {
    profile: QueueProfile,
    pub(crate) started: Mutex<Option<Started>>,
    pub(crate) notified: AtomicUsize,
    pub(crate) stops: AtomicUsize,
    pub(crate) config: AtomicU64,
}

impl Echo {
    pub(crate) fn new(queues: &[u16]) -> Arc<Self> {
        Arc::new(Self {
            profile: QueueProfile { device_type: 4, features: 5, queues: queues.to_vec(), config_size: 8 },
            started: Mutex::new(None),
            notified: AtomicUsize::new(0),
            stops: AtomicUsize::new(0),
            config: AtomicU64::new(0x1122_3344_5566_7788),
        })
    }

    pub(crate) fn with<R>(&self, queue: usize, act: impl FnOnce(&mut dyn RequestQueue) -> R) -> R {
        let mut started = self.started.lock().unwrap();
        act(started.as_mut().unwrap().queues[queue].as_deref_mut().unwrap())
    }

    pub(crate) fn take(&self, queue: usize, most: usize) -> Result<Vec<GuestRequest>, BrokenQueue> {
        let mut requests = Vec::new();
        self.with(queue, |queue| queue.take(most, &mut requests)).map(|()| requests)
    }

    pub(crate) fn answer(&self, queue: usize, requests: Vec<GuestRequest>) {
        self.with(queue, |queue| {
            for request in requests {
                let mut bytes = vec![0; request.readable.length() as usize];
                request.readable.read(0, &mut bytes);
                bytes.iter_mut().for_each(|byte| *byte = byte.wrapping_add(1));
                let written = request.writable.write(0, &bytes);
                queue.complete(request.token, written as u32);
            }
            queue.publish();
        });
    }

    /// Answers all that there is, and then wants to be notified.
    pub(crate) fn work(&self, queue: usize) -> usize {
        let mut count = 0;
        loop {
            let requests = self.take(queue, 64).unwrap();
            count += requests.len();
            if requests.is_empty() {
                if self.with(queue, |queue| queue.arm()) {
                    return count;
                }
                continue;
            }
            self.answer(queue, requests);
        }
    }

    pub(crate) fn transport(&self) -> Arc<dyn QueueTransport> {
        self.started.lock().unwrap().as_ref().unwrap().transport.clone().unwrap()
    }
}

impl Lifecycle for Echo {
    fn name(&self) -> &'static str {
        "echo"
    }

    fn reset(&self) {}

    fn save(&self) -> Result<(u32, Vec<u8>), String> {
        Ok((1, Vec::new()))
    }

    fn restore(&self, _: u32, _: &[u8]) -> Result<(), String> {
        Ok(())
    }
}

impl QueueDevice for Echo {
    fn profile(&self) -> &QueueProfile {
        &self.profile
    }

    fn read_config(&self, offset: u32, size: u8) -> u64 {
        let ones = u64::MAX >> (64 - 8 * u32::from(size));
        self.config.load(Ordering::SeqCst) >> (8 * offset) & ones
    }

    fn write_config(&self, offset: u32, size: u8, value: u64) {
        let ones = u64::MAX >> (64 - 8 * u32::from(size));
        let old = self.config.load(Ordering::SeqCst);
        self.config.store(old & !(ones << (8 * offset)) | value << (8 * offset), Ordering::SeqCst);
    }

    fn start(
        &self,
        features: u64,
        queues: Vec<Option<Box<dyn RequestQueue>>>,
        transport: Arc<dyn QueueTransport>,
    ) {
        *self.started.lock().unwrap() = Some(Started { features, queues, transport: Some(transport) });
    }

    fn stop(&self) {
        self.stops.fetch_add(1, Ordering::SeqCst);
        *self.started.lock().unwrap() = None;
    }

    fn notify(&self, _: u16) {
        self.notified.fetch_add(1, Ordering::SeqCst);
    }
}
