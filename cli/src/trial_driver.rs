//! The driver of a virtio device under trial: requests in guest memory, in odd pieces, and what became of them.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Result;
use tenon_core::{
    BrokenQueue, Buffers, FRAME_HEADER, GuestRequest, NetworkPort, Offloads, PortInfo, PortNews,
    QueueTransport, Ram, RequestQueue,
};
use tenon_testkit::{Answered, Random, Ticket};

use crate::trial::SEED;

/// The guest's memory. Only what requests touch is taken from the host.
const MEMORY: u64 = 256 << 20;
/// What a driver leaves in a buffer.
const LEFT: u8 = 0xa5;
/// The most bytes between two pieces of a request.
const GAP: u64 = 64;
/// The most pieces of one part of a request.
const PIECES: u64 = 4;
/// The most frames that wait for the device.
const FRAMES: usize = 64;

/// A request that the driver has made available.
struct Waiting {
    ticket: Ticket,
    readable: Vec<u8>,
    room: usize,
}

/// A request that the device holds.
struct Given {
    ticket: Ticket,
    writable: Buffers,
    /// Where its parts lie.
    places: Vec<u64>,
}

struct State {
    numbers: Random,
    /// Memory in use: from and to.
    used: BTreeMap<u64, u64>,
    /// Where memory is looked for.
    cursor: u64,
    /// By queue.
    waiting: Vec<VecDeque<Waiting>>,
    given: BTreeMap<u32, Given>,
    answers: BTreeMap<Ticket, Answered>,
    next_ticket: u64,
    next_token: u32,
    wrong: Option<String>,
}

/// The driver.
pub(crate) struct Driver {
    ram: Arc<Ram>,
    state: Mutex<State>,
    needs_reset: AtomicBool,
}

impl Driver {
    pub(crate) fn new() -> Result<Arc<Self>> {
        let state = State {
            numbers: Random::new(SEED),
            used: BTreeMap::new(),
            cursor: 0,
            waiting: Vec::new(),
            given: BTreeMap::new(),
            answers: BTreeMap::new(),
            next_ticket: 0,
            next_token: 0,
            wrong: None,
        };
        let (ram, needs_reset) = (Ram::new(MEMORY)?, AtomicBool::new(false));
        Ok(Arc::new(Self { ram, state: Mutex::new(state), needs_reset }))
    }

    pub(crate) fn ram(&self) -> &Arc<Ram> {
        &self.ram
    }

    /// New queues, and nothing in them.
    pub(crate) fn queues(self: &Arc<Self>, count: usize) -> Vec<Option<Box<dyn RequestQueue>>> {
        self.forget();
        self.lock().waiting = (0..count).map(|_| VecDeque::new()).collect();
        let queue = |queue| Queue { driver: self.clone(), queue, done: Vec::new() };
        (0..count).map(|number| Some(Box::new(queue(number)) as Box<dyn RequestQueue>)).collect()
    }

    /// The device was reset: every request has ended.
    pub(crate) fn forget(&self) {
        let mut state = self.lock();
        state.waiting.iter_mut().for_each(VecDeque::clear);
        state.given.clear();
        state.used.clear();
        self.needs_reset.store(false, Ordering::Release);
    }

    /// Whether the device asked to be reset.
    pub(crate) fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    /// Makes requests available: the readable bytes and the room of each.
    pub(crate) fn push(&self, queue: u16, requests: &[(&[u8], usize)]) -> Vec<Ticket> {
        let mut state = self.lock();
        requests
            .iter()
            .map(|(readable, room)| {
                let ticket = Ticket(state.next_ticket);
                state.next_ticket += 1;
                let waiting = Waiting { ticket, readable: readable.to_vec(), room: *room };
                // Without queues the device is not ready, and the request is never taken.
                if let Some(queue) = state.waiting.get_mut(usize::from(queue)) {
                    queue.push_back(waiting);
                }
                ticket
            })
            .collect()
    }

    /// Takes an answer.
    pub(crate) fn answered(&self, ticket: Ticket) -> Option<Answered> {
        self.lock().answers.remove(&ticket)
    }

    /// What was done to the driver that must not be.
    pub(crate) fn wrong(&self) -> Option<String> {
        self.lock().wrong.clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl QueueTransport for Driver {
    fn config_changed(&self) {}

    fn needs_reset(&self) {
        self.needs_reset.store(true, Ordering::Release);
    }
}

impl State {
    /// A free range of memory.
    fn place(&mut self, length: u64) -> Option<u64> {
        let (mut at, mut again) = (self.cursor, false);
        loop {
            let end = at + length;
            if end > MEMORY {
                if again {
                    return None;
                }
                (at, again) = (0, true);
                continue;
            }
            match self.used.range(..end).next_back() {
                Some((_, taken)) if *taken > at => at = *taken,
                _ => {
                    self.used.insert(at, end);
                    self.cursor = end;
                    return Some(at);
                }
            }
        }
    }

    fn free(&mut self, places: &[u64]) {
        for place in places {
            self.used.remove(place);
        }
    }

    /// Memory for one part of a request, in odd pieces, as drivers may lay it out (virtio 1.2 §2.7.4).
    fn part(&mut self, ram: &Arc<Ram>, length: usize, places: &mut Vec<u64>) -> Option<Buffers> {
        let mut buffers = Buffers::new(ram);
        let mut left = length as u64;
        if left == 0 {
            return Some(buffers);
        }
        let place = self.place(left + PIECES * GAP)?;
        places.push(place);
        let mut at = place;
        for piece in 1..=PIECES {
            let all = piece == PIECES || self.numbers.below(2) == 0;
            let size = if all { left } else { self.numbers.below(left) };
            // It lies in RAM, since `place` gives nothing else.
            buffers.push(at, size).ok()?;
            at += size + self.numbers.below(GAP);
            left -= size;
            if left == 0 {
                break;
            }
        }
        Some(buffers)
    }

    fn give(&mut self, ram: &Arc<Ram>, waiting: &Waiting) -> Option<GuestRequest> {
        let mut places = Vec::new();
        let parts = self
            .part(ram, waiting.readable.len(), &mut places)
            .and_then(|readable| Some((readable, self.part(ram, waiting.room, &mut places)?)));
        let Some((readable, writable)) = parts else {
            self.free(&places);
            return None;
        };
        readable.write(0, &waiting.readable);
        writable.write(0, &vec![LEFT; waiting.room]);
        let token = self.next_token;
        self.next_token = token.wrapping_add(1);
        self.given.insert(token, Given { ticket: waiting.ticket, writable: writable.clone(), places });
        Some(GuestRequest { token, readable, writable })
    }

    fn answer(&mut self, token: u32, written: u32) {
        let Some(Given { ticket, writable, places }) = self.given.remove(&token) else {
            self.wrong.get_or_insert(format!("request {token} was answered, which the device does not hold"));
            return;
        };
        let mut buffer = vec![0; usize::try_from(writable.length()).unwrap_or(0)];
        writable.read(0, &mut buffer);
        self.free(&places);
        let count = usize::try_from(written).unwrap_or(usize::MAX);
        let Some(data) = buffer.get(..count) else {
            let room = buffer.len();
            self.wrong
                .get_or_insert(format!("{written} bytes were written, they say, into a room of {room}"));
            return;
        };
        self.answers.insert(ticket, Answered { written, data: data.to_vec(), buffer });
    }
}

/// The device's end of a queue.
struct Queue {
    driver: Arc<Driver>,
    queue: usize,
    done: Vec<(u32, u32)>,
}

impl RequestQueue for Queue {
    fn take(&mut self, most: usize, into: &mut Vec<GuestRequest>) -> Result<(), BrokenQueue> {
        let mut state = self.driver.lock();
        for _ in 0..most {
            let Some(waiting) = state.waiting.get_mut(self.queue).and_then(VecDeque::pop_front) else {
                break;
            };
            match state.give(&self.driver.ram, &waiting) {
                Some(request) => into.push(request),
                None => {
                    state.wrong.get_or_insert(format!("it holds requests of all {MEMORY} bytes of memory"));
                }
            }
        }
        Ok(())
    }

    fn complete(&mut self, token: u32, written: u32) {
        self.done.push((token, written));
    }

    fn publish(&mut self) {
        let mut state = self.driver.lock();
        self.done.drain(..).for_each(|(token, written)| state.answer(token, written));
    }

    fn arm(&mut self) -> bool {
        self.driver.lock().waiting.get(self.queue).is_none_or(VecDeque::is_empty)
    }
}

/// A network whose only other station sends everything back.
#[derive(Default)]
pub(crate) struct Echo {
    frames: Mutex<VecDeque<Vec<u8>>>,
    news: Mutex<Option<Box<dyn Fn(PortNews) + Send + Sync>>>,
}

impl Echo {
    /// A frame comes, with its header. It is dropped if too many wait.
    pub(crate) fn push(&self, frame: Vec<u8>) {
        let mut frames = self.frames.lock().unwrap_or_else(PoisonError::into_inner);
        if frames.len() == FRAMES {
            return;
        }
        frames.push_back(frame);
        drop(frames);
        if let Some(news) = &*self.news.lock().unwrap_or_else(PoisonError::into_inner) {
            news(PortNews::Frames);
        }
    }
}

impl NetworkPort for Echo {
    fn info(&self) -> PortInfo {
        let all = Offloads { checksum: true, tso4: true, tso6: true };
        let mac = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
        PortInfo { mac, mtu: 1500, link_up: true, send: all, receive: all }
    }

    fn accept(&self, _: Offloads) {}

    fn send(&self, frame: &Buffers) -> bool {
        let length = usize::try_from(frame.length()).unwrap_or(usize::MAX);
        if !(FRAME_HEADER + 14..=FRAME_HEADER + 65550).contains(&length) {
            return false;
        }
        let mut bytes = vec![0; length];
        frame.read(0, &mut bytes);
        // It comes back finished: no checksum to fill in, and no segments.
        bytes[..FRAME_HEADER].fill(0);
        bytes.truncate(FRAME_HEADER + 1514);
        self.push(bytes);
        true
    }

    fn waiting(&self, most: usize, into: &mut Vec<u32>) {
        let frames = self.frames.lock().unwrap_or_else(PoisonError::into_inner);
        into.extend(frames.iter().take(most).map(|frame| u32::try_from(frame.len()).unwrap_or(u32::MAX)));
    }

    fn receive(&self) -> Option<Vec<u8>> {
        self.frames.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    fn watch(&self, news: Box<dyn Fn(PortNews) + Send + Sync>) {
        *self.news.lock().unwrap_or_else(PoisonError::into_inner) = Some(news);
    }
}
