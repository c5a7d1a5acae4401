//! A driver without rings: requests go in, and answers come out when they are published.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::time::Duration;

use tenon_core::{
    BrokenQueue, Buffers, GuestRequest, MIN_MEMORY, NetworkPort, Offloads, PortInfo, PortNews, QueueDevice,
    QueueTransport, Ram, RequestQueue,
};

pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Default)]
struct Ring {
    waiting: Mutex<VecDeque<GuestRequest>>,
    answers: Mutex<Vec<(u32, u32)>>,
    published: Condvar,
}

struct Queue(Arc<Ring>, Vec<(u32, u32)>);

impl RequestQueue for Queue {
    fn take(&mut self, most: usize, into: &mut Vec<GuestRequest>) -> Result<(), BrokenQueue> {
        let mut waiting = self.0.waiting.lock().unwrap();
        let count = most.min(waiting.len());
        into.extend(waiting.drain(..count));
        Ok(())
    }

    fn complete(&mut self, token: u32, written: u32) {
        self.1.push((token, written));
    }

    fn publish(&mut self) {
        self.0.answers.lock().unwrap().append(&mut self.1);
        self.0.published.notify_all();
    }

    fn arm(&mut self) -> bool {
        self.0.waiting.lock().unwrap().is_empty()
    }
}

struct Transport(Mutex<mpsc::Sender<&'static str>>);

impl QueueTransport for Transport {
    fn config_changed(&self) {
        let _ = self.0.lock().unwrap().send("config changed");
    }

    fn needs_reset(&self) {
        let _ = self.0.lock().unwrap().send("needs reset");
    }
}

/// The driver of a device.
pub(crate) struct Driver {
    pub(crate) ram: Arc<Ram>,
    rings: Vec<Arc<Ring>>,
    next: Mutex<u32>,
    heard: mpsc::Receiver<&'static str>,
}

/// Each request has this much memory.
const STRIDE: u64 = 8192;

impl Driver {
    pub(crate) fn new(ram: &Arc<Ram>) -> Self {
        Self { ram: ram.clone(), rings: Vec::new(), next: Mutex::new(0), heard: mpsc::channel().1 }
    }

    pub(crate) fn memory() -> Arc<Ram> {
        Ram::new(4 * MIN_MEMORY).unwrap()
    }

    /// Sets DRIVER_OK, with `queues` new queues.
    pub(crate) fn start(&mut self, device: &dyn QueueDevice, queues: usize) {
        self.rings = (0..queues).map(|_| Arc::default()).collect();
        let (sender, heard) = mpsc::channel();
        self.heard = heard;
        let queues = self
            .rings
            .iter()
            .map(|ring| Some(Box::new(Queue(ring.clone(), Vec::new())) as Box<dyn RequestQueue>))
            .collect();
        device.start(0, queues, Arc::new(Transport(Mutex::new(sender))));
    }

    /// The parts of request `token` in memory.
    fn parts(&self, token: u32, readable: u64, writable: u64) -> (Buffers, Buffers) {
        let (mut r, mut w) = (Buffers::new(&self.ram), Buffers::new(&self.ram));
        let base = u64::from(token % 256) * STRIDE;
        // In two pieces, as drivers like to have them.
        r.push(base, readable.min(16)).unwrap();
        r.push(base + 32, readable.saturating_sub(16)).unwrap();
        w.push(base + 4200, writable).unwrap();
        (r, w)
    }

    /// Makes a request available: its kind, position, what is written, and how long the writable part is. Its token.
    pub(crate) fn push(&self, queue: usize, kind: u8, position: u64, bytes: &[u8], writable: u64) -> u32 {
        self.push_all(queue, &[(kind, position, bytes, writable)])[0]
    }

    /// Makes requests available at once.
    pub(crate) fn push_all(&self, queue: usize, requests: &[(u8, u64, &[u8], u64)]) -> Vec<u32> {
        let mut waiting = self.rings[queue].waiting.lock().unwrap();
        let mut next = self.next.lock().unwrap();
        let mut tokens = Vec::new();
        for (kind, position, bytes, writable) in requests {
            let token = *next;
            *next += 1;
            let head = [*kind, 0, 0, 0, 0, 0, 0, 0];
            let bytes =
                if queue == 0 { [&head[..], &position.to_le_bytes(), bytes].concat() } else { Vec::new() };
            let (readable, writable) = self.parts(token, bytes.len() as u64, *writable);
            assert_eq!(readable.write(0, &bytes), bytes.len());
            waiting.push_back(GuestRequest { token, readable, writable });
            tokens.push(token);
        }
        tokens
    }

    /// Waits for `count` answers in all; token and length.
    pub(crate) fn answers(&self, queue: usize, count: usize) -> Vec<(u32, u32)> {
        let ring = &self.rings[queue];
        let answers = ring.answers.lock().unwrap();
        let (answers, late) =
            ring.published.wait_timeout_while(answers, PATIENCE, |answers| answers.len() < count).unwrap();
        assert!(!late.timed_out(), "{} answers came, and not {count}", answers.len());
        answers.clone()
    }

    /// What was written into the request's writable part.
    pub(crate) fn written(&self, token: u32, length: usize) -> Vec<u8> {
        let (_, row) = self.parts(token, 0, length as u64);
        let mut bytes = vec![0; length];
        row.read(0, &mut bytes);
        bytes
    }

    /// Waits for what the transport is told next.
    pub(crate) fn heard(&self) -> &'static str {
        self.heard.recv_timeout(PATIENCE).unwrap()
    }
}

/// A port whose outside is the test.
#[derive(Default)]
pub(crate) struct Port {
    pub(crate) sent: Mutex<Vec<Vec<u8>>>,
    frames: Mutex<VecDeque<Vec<u8>>>,
    news: Mutex<Option<Box<dyn Fn(PortNews) + Send + Sync>>>,
}

impl Port {
    pub(crate) fn frame(&self, frame: Vec<u8>) {
        self.frames.lock().unwrap().push_back(frame);
        if let Some(news) = &*self.news.lock().unwrap() {
            news(PortNews::Frames);
        }
    }
}

impl NetworkPort for Port {
    fn info(&self) -> PortInfo {
        let none = Offloads::default();
        PortInfo { mac: [2, 0, 0, 0, 0, 1], mtu: 1500, link_up: true, send: none, receive: none }
    }

    fn accept(&self, _: Offloads) {}

    fn send(&self, frame: &Buffers) -> bool {
        let mut bytes = vec![0; usize::try_from(frame.length()).unwrap()];
        frame.read(0, &mut bytes);
        self.sent.lock().unwrap().push(bytes);
        true
    }

    fn waiting(&self, most: usize, into: &mut Vec<u32>) {
        into.extend(self.frames.lock().unwrap().iter().take(most).map(|f| u32::try_from(f.len()).unwrap()));
    }

    fn receive(&self) -> Option<Vec<u8>> {
        self.frames.lock().unwrap().pop_front()
    }

    fn watch(&self, news: Box<dyn Fn(PortNews) + Send + Sync>) {
        *self.news.lock().unwrap() = Some(news);
    }
}
