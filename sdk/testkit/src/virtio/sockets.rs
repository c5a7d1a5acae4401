//! The sockets of a virtio device: the programs outside, in the hands of the test.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use tenon_sdk::virtio::{Sent, StreamState, VirtioDevice};

use super::bench::VirtioBench;

/// How many streams a socket has at most, as in a host.
const STREAMS: usize = 1024;
/// How much of a stream the host keeps for a program that does not read.
const KEPT: usize = 64 << 10;

/// A socket with its programs and streams.
#[derive(Clone, Debug, Default)]
pub(super) struct SocketState {
    listening: BTreeSet<u32>,
    streams: BTreeMap<u32, Stream>,
    /// Streams with news, each once.
    changed: VecDeque<u32>,
    /// The device was told that there is news, and has not asked for all of it yet.
    told: bool,
    last: u32,
}

/// A stream, kept for the test when the device has closed it.
#[derive(Clone, Debug, Default)]
struct Stream {
    /// The device has not closed it.
    open: bool,
    /// The port that the program asks for, until the stream is accepted.
    wanted: Option<u32>,
    /// What the program was told when it was accepted, or the port at which the device has found it.
    port: Option<u32>,
    input: VecDeque<u8>,
    /// The program has sent everything.
    finished: bool,
    /// The program reads no more.
    deaf: bool,
    /// The program does not read now.
    held: bool,
    /// Sent, and not read yet.
    kept: Vec<u8>,
    output: Vec<u8>,
    /// Directions that the device has ended: what it receives, what it sends.
    shut: (bool, bool),
}

impl SocketState {
    fn change(&mut self, number: u32) {
        if !self.changed.contains(&number) {
            self.changed.push_back(number);
        }
    }

    fn add(&mut self, stream: Stream) -> u32 {
        self.last += 1;
        self.streams.insert(self.last, Stream { open: true, ..stream });
        self.last
    }

    fn held(&mut self, number: u32) -> &mut Stream {
        let stream = self.streams.get_mut(&number).filter(|stream| stream.open);
        stream.unwrap_or_else(|| panic!("the device uses stream {number}, which it does not hold"))
    }

    /// A new instance has no streams.
    pub(super) fn detach(&mut self) {
        self.streams.values_mut().for_each(|stream| stream.open = false);
        self.changed.clear();
        self.told = false;
    }

    /// Whether the device is to be told of news; it then counts as told.
    pub(super) fn tell(&mut self) -> bool {
        let tell = !self.told && !self.changed.is_empty();
        self.told |= tell;
        tell
    }

    pub(super) fn connect(&mut self, port: u32) -> Option<u32> {
        let open = self.streams.values().filter(|stream| stream.open).count();
        let there = self.listening.contains(&port) && open < STREAMS;
        there.then(|| self.add(Stream { port: Some(port), ..Stream::default() }))
    }

    pub(super) fn news(&mut self, max: u32) -> Vec<StreamState> {
        let mut states = Vec::new();
        while states.len() < max as usize
            && let Some(number) = self.changed.pop_front()
        {
            let Some(stream) = self.streams.get(&number).filter(|stream| stream.open) else { continue };
            let ended = stream.finished && stream.input.is_empty();
            states.push(StreamState {
                number,
                wanted: stream.wanted,
                readable: !stream.input.is_empty(),
                ended: ended || stream.shut.0,
                deaf: stream.deaf,
                unsent: u32::try_from(stream.kept.len()).unwrap_or(u32::MAX),
            });
        }
        self.told = states.len() == max as usize;
        states
    }

    pub(super) fn accept(&mut self, number: u32, port: u32) {
        let stream = self.held(number);
        assert!(stream.wanted.take().is_some(), "the device accepts stream {number}, which nobody offers");
        stream.port = Some(port);
        if !stream.input.is_empty() || stream.finished {
            self.change(number);
        }
    }

    /// Takes bytes of a request.
    pub(super) fn send(&mut self, number: u32, bytes: &[u8]) -> Sent {
        let stream = self.held(number);
        assert!(stream.wanted.is_none(), "the device sends to stream {number} before it has accepted it");
        assert!(!stream.shut.1, "the device sends to stream {number} after it said that it is done");
        let mut taken = bytes.len();
        if stream.held && !stream.deaf {
            taken = taken.min(KEPT - stream.kept.len());
            stream.kept.extend(&bytes[..taken]);
        } else if !stream.deaf {
            stream.output.extend(bytes);
        }
        let number = |count| u32::try_from(count).unwrap_or(u32::MAX);
        Sent { taken: number(taken), unsent: number(stream.kept.len()) }
    }

    /// Gives at most so many bytes of a stream.
    pub(super) fn receive(&mut self, number: u32, room: usize) -> Vec<u8> {
        let stream = self.held(number);
        assert!(stream.wanted.is_none(), "the device reads stream {number} before it has accepted it");
        let count = room.min(stream.input.len());
        let bytes: Vec<u8> = stream.input.drain(..count).collect();
        if count < room && stream.finished {
            self.change(number);
        }
        bytes
    }

    pub(super) fn shut(&mut self, number: u32, receive: bool, send: bool) {
        let stream = self.held(number);
        stream.shut.0 |= receive;
        stream.shut.1 |= send;
        if receive {
            stream.input.clear();
        }
    }

    pub(super) fn close(&mut self, number: u32) {
        self.held(number).open = false;
    }
}

/// The programs outside a device's socket. Streams go by their numbers.
pub struct SocketEnd<'a, D> {
    bench: &'a mut VirtioBench<D>,
    index: usize,
}

impl<'a, D: VirtioDevice> SocketEnd<'a, D> {
    pub(super) fn new(bench: &'a mut VirtioBench<D>, index: usize) -> Self {
        Self { bench, index }
    }

    /// From now on a program listens as `port`.
    pub fn listen(&mut self, port: u32) {
        self.state().listening.insert(port);
    }

    /// A program connects and asks for this port of the guest. The stream's number.
    pub fn begin(&mut self, port: u32) -> u32 {
        let state = self.state();
        let number = state.add(Stream { wanted: Some(port), ..Stream::default() });
        state.change(number);
        self.bench.rest();
        number
    }

    /// The program at the other end of a stream sends bytes.
    ///
    /// # Panics
    /// There was never such a stream; as all that follow.
    pub fn push(&mut self, number: u32, bytes: &[u8]) {
        self.alter(number, |stream| stream.input.extend(bytes));
    }

    /// The program has sent everything; it goes on reading.
    pub fn finish(&mut self, number: u32) {
        self.alter(number, |stream| stream.finished = true);
    }

    /// The program is gone.
    pub fn hang_up(&mut self, number: u32) {
        self.alter(number, |stream| {
            (stream.finished, stream.deaf) = (true, true);
            stream.kept.clear();
        });
    }

    /// The program stops reading.
    pub fn hold(&mut self, number: u32) {
        self.alter(number, |stream| stream.held = true);
    }

    /// The program, which has stopped reading, reads so many of the bytes that wait.
    pub fn release(&mut self, number: u32, count: usize) {
        self.alter(number, |stream| {
            let count = count.min(stream.kept.len());
            stream.output.extend(stream.kept.drain(..count));
        });
    }

    /// Takes the bytes that the program has read since the last call.
    #[must_use]
    pub fn take(&mut self, number: u32) -> Vec<u8> {
        std::mem::take(&mut self.stream(number).output)
    }

    /// What the program that began the stream was told as the number of its own end, once the stream was accepted; or the port at which the device has found the program.
    #[must_use]
    pub fn port(&mut self, number: u32) -> Option<u32> {
        self.stream(number).port
    }

    /// Whether the device has not closed the stream.
    #[must_use]
    pub fn is_open(&mut self, number: u32) -> bool {
        self.stream(number).open
    }

    /// Whether the device has said that it receives no more, and that it sends no more.
    #[must_use]
    pub fn is_shut(&mut self, number: u32) -> (bool, bool) {
        self.stream(number).shut
    }

    /// How many bytes the device has not received yet.
    #[must_use]
    pub fn pending(&mut self, number: u32) -> usize {
        self.stream(number).input.len()
    }

    /// The streams that the device holds, in the order in which they began.
    #[must_use]
    pub fn streams(&mut self) -> Vec<u32> {
        self.state().streams.iter().filter(|(_, stream)| stream.open).map(|(number, _)| *number).collect()
    }

    fn alter(&mut self, number: u32, alter: impl FnOnce(&mut Stream)) {
        alter(self.stream(number));
        self.state().change(number);
        self.bench.rest();
    }

    fn stream(&mut self, number: u32) -> &mut Stream {
        let stream = self.state().streams.get_mut(&number);
        stream.unwrap_or_else(|| panic!("there was never a stream {number}"))
    }

    fn state(&mut self) -> &mut SocketState {
        &mut self.bench.outside.sockets.get_mut()[self.index]
    }
}
