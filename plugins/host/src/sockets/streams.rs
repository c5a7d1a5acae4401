//! The streams of a socket: how far each has come, what the host keeps of it, and what the device is told.
//!
//! Each is watched for one event at a time (`EPOLLONESHOT`): a stream that has nothing to be told of costs nothing, also when its program is gone.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown};
use tenon_abi::{Sent, StreamState};
use tenon_core::Buffers;

use crate::fault::Misuse;

/// How many streams there are at most.
pub(super) const STREAMS: usize = 1024;
/// How many programs may be at their greeting: the one that has been for longest makes room for a new one. More than come at once.
pub(super) const GREETERS: usize = 512;
/// How many bytes of a stream are kept at most that its program has not taken.
pub(super) const KEPT: usize = 64 << 10;
/// How many bytes cross at once.
const CHUNK: usize = 16 << 10;
/// What a program says first, but for the number and the line feed.
const GREETING: &str = "CONNECT ";
/// The longest number.
const DIGITS: usize = 10;

/// How far a stream has come.
enum Stage {
    /// The program has said so much of its greeting.
    Greeting(Vec<u8>),
    /// The device has not accepted it: the port.
    Wanted(u32),
    Open,
    /// The device has closed it; what is kept goes out.
    Closing,
}

struct Stream {
    socket: OwnedFd,
    stage: Stage,
    /// The device wants to be told of bytes.
    awaited: bool,
    readable: bool,
    ended: bool,
    deaf: bool,
    /// The program is gone, or both directions have ended: there is nothing more to be watched for but bytes.
    hung_up: bool,
    /// What the program has not taken.
    kept: VecDeque<u8>,
    /// The device sends no more.
    done: bool,
    /// It is among those with news.
    changed: bool,
}

type All = BTreeMap<u32, Stream>;

/// A stream that the device holds.
fn held(all: &mut All, number: u32) -> Result<&mut Stream, Misuse> {
    let held = |stream: &&mut Stream| matches!(stream.stage, Stage::Wanted(_) | Stage::Open);
    let stream = all.get_mut(&number).filter(held);
    stream.ok_or_else(|| Misuse(format!("it named stream {number}, which it does not hold")))
}

/// A stream over which bytes flow.
fn flowing(all: &mut All, number: u32) -> Result<&mut Stream, Misuse> {
    let stream = held(all, number)?;
    match stream.stage {
        Stage::Open => Ok(stream),
        _ => Err(Misuse(format!("it used stream {number} before it had accepted it"))),
    }
}

/// All streams of a socket.
pub(super) struct Streams {
    epoll: Arc<OwnedFd>,
    /// What crosses; as long as [`CHUNK`].
    chunk: Box<[u8]>,
    all: All,
    next: u32,
    /// Streams with news, each once.
    changed: VecDeque<u32>,
    /// The device was told that there is news, and has not asked for all of it yet.
    told: bool,
    tell: Option<Box<dyn Fn() + Send>>,
}

impl Stream {
    fn new(socket: OwnedFd, stage: Stage) -> Self {
        Self {
            socket,
            stage,
            awaited: true,
            readable: false,
            ended: false,
            deaf: false,
            hung_up: false,
            kept: VecDeque::new(),
            done: false,
            changed: false,
        }
    }

    /// What it is to be watched for; none if nothing more can happen.
    fn watched(&self) -> Option<EventFlags> {
        let input = match self.stage {
            Stage::Greeting(_) => true,
            Stage::Open => self.awaited && !self.ended,
            Stage::Wanted(_) | Stage::Closing => false,
        };
        let mut flags = EventFlags::ONESHOT;
        flags.set(EventFlags::IN | EventFlags::RDHUP, input);
        flags.set(EventFlags::OUT, !self.kept.is_empty());
        // That the other end hangs up is always told.
        (!self.hung_up || flags != EventFlags::ONESHOT).then_some(flags)
    }

    /// Gives the program what is kept, as far as it takes it.
    fn flush(&mut self) {
        while !self.kept.is_empty() && !self.deaf {
            let (front, _) = self.kept.as_slices();
            match send(&self.socket, front) {
                Ok(count) => drop(self.kept.drain(..count)),
                Err(Errno::AGAIN) => return,
                Err(_) => self.deafen(),
            }
        }
        if self.done && self.kept.is_empty() {
            let _ = rustix::net::shutdown(&self.socket, Shutdown::Write);
        }
    }

    /// The program takes no more.
    fn deafen(&mut self) {
        self.deaf = true;
        self.kept = VecDeque::new();
    }

    fn state(&mut self, number: u32) -> StreamState {
        let Self { ended, deaf, .. } = *self;
        StreamState {
            number,
            wanted: if let Stage::Wanted(port) = self.stage { Some(port) } else { None },
            readable: std::mem::take(&mut self.readable),
            ended,
            deaf,
            unsent: self.unsent(),
        }
    }

    fn unsent(&self) -> u32 {
        u32::try_from(self.kept.len()).unwrap_or(u32::MAX)
    }
}

/// Sends without waiting, and again when a signal came.
fn send(socket: &OwnedFd, bytes: &[u8]) -> Result<usize, Errno> {
    rustix::io::retry_on_intr(|| rustix::net::send(socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL))
}

/// Receives without waiting, and again when a signal came.
fn receive(socket: &OwnedFd, room: &mut [u8]) -> Result<usize, Errno> {
    let received = rustix::io::retry_on_intr(|| rustix::net::recv(socket, &mut *room, RecvFlags::DONTWAIT));
    received.map(|(count, _)| count)
}

/// The port that a greeting asks for; none if it is none.
fn parse(line: &[u8]) -> Option<u32> {
    let number = line.strip_prefix(GREETING.as_bytes())?;
    let is_number = (1..=DIGITS).contains(&number.len()) && number.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(number).ok()?.parse().ok().filter(|_| is_number)
}

impl Streams {
    pub(super) fn new(epoll: Arc<OwnedFd>) -> Self {
        Self {
            epoll,
            chunk: vec![0; CHUNK].into(),
            all: BTreeMap::new(),
            next: 1,
            changed: VecDeque::new(),
            told: false,
            tell: None,
        }
    }

    pub(super) fn watch(&mut self, tell: Box<dyn Fn() + Send>) {
        self.tell = Some(tell);
        self.told = false;
        self.tell();
    }

    /// A program outside has connected. None, and the stream is closed, if there are too many.
    pub(super) fn greet(&mut self, socket: OwnedFd) -> Option<u32> {
        let greeting =
            |(number, stream): (&u32, &Stream)| matches!(stream.stage, Stage::Greeting(_)).then_some(*number);
        let greeters: Vec<u32> = self.all.iter().filter_map(greeting).collect();
        if greeters.len() >= GREETERS
            // The numbers go up, and round.
            && let Some(oldest) = greeters.iter().min_by_key(|number| number.wrapping_sub(self.next))
        {
            self.remove(*oldest);
        }
        self.add(Stream::new(socket, Stage::Greeting(Vec::new())))
    }

    /// The device has connected.
    pub(super) fn open(&mut self, socket: OwnedFd) -> Option<u32> {
        self.add(Stream::new(socket, Stage::Open))
    }

    fn add(&mut self, stream: Stream) -> Option<u32> {
        if self.all.len() >= STREAMS {
            return None;
        }
        while self.all.contains_key(&self.next) {
            self.next = self.next.wrapping_add(1);
        }
        let number = self.next;
        let (data, flags) = (EventData::new_u64(number.into()), stream.watched()?);
        epoll::add(&*self.epoll, &stream.socket, data, flags).ok()?;
        self.next = number.wrapping_add(1);
        self.all.insert(number, stream);
        Some(number)
    }

    fn remove(&mut self, number: u32) {
        // Nothing else has the descriptor: epoll forgets it when it is closed.
        if self.all.remove(&number).is_some_and(|stream| stream.changed) {
            self.changed.retain(|other| *other != number);
        }
    }

    /// Watches a stream for what comes next, and notes that it has news.
    fn settle(&mut self, number: u32, has_news: bool) {
        let Some(stream) = self.all.get_mut(&number) else { return };
        if let Some(flags) = stream.watched() {
            let data = EventData::new_u64(number.into());
            let _ = epoll::modify(&*self.epoll, &stream.socket, data, flags);
        }
        if has_news && !stream.changed {
            stream.changed = true;
            self.changed.push_back(number);
            self.tell();
        }
    }

    fn tell(&mut self) {
        if let Some(tell) = self.tell.as_ref().filter(|_| !self.told && !self.changed.is_empty()) {
            self.told = true;
            tell();
        }
    }

    /// Something has happened to a stream.
    pub(super) fn happened(&mut self, number: u32, flags: EventFlags) {
        let Some(stream) = self.all.get_mut(&number) else { return };
        let hung_up = flags.intersects(EventFlags::HUP | EventFlags::ERR);
        stream.hung_up |= hung_up;
        let mut has_news = hung_up;
        match &mut stream.stage {
            Stage::Greeting(line) => match hear(&stream.socket, line) {
                Ok(None) if hung_up => return self.remove(number),
                Ok(None) => {}
                Ok(Some(port)) => {
                    stream.stage = Stage::Wanted(port);
                    (stream.ended, stream.deaf) = (hung_up, hung_up);
                    has_news = true;
                }
                Err(()) => return self.remove(number),
            },
            Stage::Wanted(_) => (stream.ended, stream.deaf) = (hung_up, hung_up),
            Stage::Open => {
                if stream.awaited && (hung_up || flags.intersects(EventFlags::IN | EventFlags::RDHUP)) {
                    (stream.awaited, stream.readable) = (false, true);
                    has_news = true;
                }
                if hung_up {
                    stream.deafen();
                } else if flags.contains(EventFlags::OUT) {
                    stream.flush();
                    has_news = true;
                }
            }
            Stage::Closing => {
                stream.flush();
                if hung_up || stream.kept.is_empty() {
                    return self.remove(number);
                }
                has_news = false;
            }
        }
        self.settle(number, has_news);
    }

    pub(super) fn news(&mut self, max: u32) -> Vec<StreamState> {
        let max = usize::try_from(max).unwrap_or(usize::MAX);
        let mut states = Vec::with_capacity(max.min(self.changed.len()));
        while states.len() < max
            && let Some(number) = self.changed.pop_front()
        {
            if let Some(stream) = self.all.get_mut(&number) {
                stream.changed = false;
                states.push(stream.state(number));
            }
        }
        self.told = states.len() >= max;
        states
    }

    pub(super) fn accept(&mut self, number: u32, port: u32) -> Result<(), Misuse> {
        let stream = held(&mut self.all, number)?;
        if !matches!(stream.stage, Stage::Wanted(_)) {
            return Err(Misuse(format!("it accepted stream {number} twice, or one that it has begun")));
        }
        stream.stage = Stage::Open;
        let answer = format!("OK {port}\n");
        // A socket to which nothing was sent has room for a line.
        if send(&stream.socket, answer.as_bytes()) != Ok(answer.len()) {
            stream.deafen();
        }
        stream.ended = false;
        // A program that is gone may have left bytes.
        (stream.readable, stream.awaited) = (stream.hung_up, !stream.hung_up);
        let has_news = stream.deaf || stream.hung_up;
        self.settle(number, has_news);
        Ok(())
    }

    pub(super) fn send(
        &mut self,
        number: u32,
        from: &Buffers,
        offset: u64,
        length: u64,
    ) -> Result<Sent, Misuse> {
        let stream = flowing(&mut self.all, number)?;
        if stream.done {
            return Err(Misuse(format!("it sent to stream {number} after it had said that it is done")));
        }
        let chunk = &mut self.chunk;
        let mut taken = 0;
        let mut deafened = false;
        while taken < length {
            let mut count = usize::try_from(length - taken).unwrap_or(CHUNK).min(CHUNK);
            from.read(offset + taken, &mut chunk[..count]);
            if stream.deaf {
                taken = length;
            } else if stream.kept.is_empty() {
                match send(&stream.socket, &chunk[..count]) {
                    Ok(sent) => taken += sent as u64,
                    Err(Errno::AGAIN) => {
                        stream.kept.extend(&chunk[..count]);
                        taken += count as u64;
                    }
                    Err(_) => {
                        stream.deafen();
                        deafened = true;
                    }
                }
            } else {
                count = count.min(KEPT.saturating_sub(stream.kept.len()));
                if count == 0 {
                    break;
                }
                stream.kept.extend(&chunk[..count]);
                taken += count as u64;
            }
        }
        let unsent = stream.unsent();
        if unsent > 0 || deafened {
            self.settle(number, deafened);
        }
        Ok(Sent { taken: u32::try_from(taken).unwrap_or(u32::MAX), unsent })
    }

    pub(super) fn receive(
        &mut self,
        number: u32,
        into: &Buffers,
        offset: u64,
        length: u64,
    ) -> Result<u32, Misuse> {
        let stream = flowing(&mut self.all, number)?;
        let chunk = &mut self.chunk;
        let mut count = 0;
        let mut has_news = false;
        while count < length && !stream.ended {
            let room = usize::try_from(length - count).unwrap_or(CHUNK).min(CHUNK);
            match receive(&stream.socket, &mut chunk[..room]) {
                Ok(0) => (stream.ended, has_news) = (true, true),
                Ok(bytes) => {
                    into.write(offset + count, &chunk[..bytes]);
                    count += bytes as u64;
                }
                Err(Errno::AGAIN) => {
                    stream.awaited = true;
                    break;
                }
                // It went without having read everything; what it has sent can still be received.
                Err(Errno::CONNRESET) if !stream.deaf => {
                    stream.deafen();
                    has_news = true;
                }
                Err(_) => {
                    (stream.ended, has_news) = (true, true);
                    stream.deafen();
                }
            }
        }
        if count < length {
            self.settle(number, has_news);
        }
        Ok(u32::try_from(count).unwrap_or(u32::MAX))
    }

    pub(super) fn shut(&mut self, number: u32, receive: bool, send: bool) -> Result<(), Misuse> {
        let stream = flowing(&mut self.all, number)?;
        if receive {
            (stream.ended, stream.readable) = (true, false);
            let _ = rustix::net::shutdown(&stream.socket, Shutdown::Read);
        }
        if send {
            stream.done = true;
            stream.flush();
        }
        self.settle(number, false);
        Ok(())
    }

    pub(super) fn close(&mut self, number: u32) -> Result<(), Misuse> {
        held(&mut self.all, number)?;
        self.part(number);
        Ok(())
    }

    /// The device has no more to do with a stream: it goes when what is kept has gone out.
    fn part(&mut self, number: u32) {
        let Some(stream) = self.all.get_mut(&number) else { return };
        if stream.kept.is_empty() {
            return self.remove(number);
        }
        stream.stage = Stage::Closing;
        if stream.changed {
            stream.changed = false;
            self.changed.retain(|other| *other != number);
        }
        self.settle(number, false);
    }

    /// The device is gone. How many streams have bytes that go out still.
    pub(super) fn end(&mut self) -> usize {
        let all: Vec<u32> = self.all.keys().copied().collect();
        all.into_iter().for_each(|number| self.part(number));
        self.count()
    }

    pub(super) fn count(&self) -> usize {
        self.all.len()
    }

    pub(super) fn clear(&mut self) -> bool {
        let held: Vec<u32> = self
            .all
            .iter()
            .filter(|(_, stream)| matches!(stream.stage, Stage::Wanted(_) | Stage::Open))
            .map(|(number, _)| *number)
            .collect();
        held.iter().for_each(|number| self.part(*number));
        self.told = false;
        !held.is_empty()
    }
}

/// Hears what a program says first. The port, once it has said all of it; an error if it says anything else.
fn hear(socket: &OwnedFd, line: &mut Vec<u8>) -> Result<Option<u32>, ()> {
    // One byte at a time: what comes behind the line is the guest's.
    let mut byte = [0];
    loop {
        match receive(socket, &mut byte) {
            Ok(0) => return Err(()),
            Ok(_) if byte == *b"\n" => return parse(line).map(Some).ok_or(()),
            Ok(_) if line.len() < GREETING.len() + DIGITS => line.extend(byte),
            Err(Errno::AGAIN) => return Ok(None),
            Ok(_) | Err(_) => return Err(()),
        }
    }
}
