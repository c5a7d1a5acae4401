//! Device plugin: a virtio socket device (virtio 1.2 §5.10) with stream sockets, whose far end is the socket `vsock`.
//!
//! Bytes do not pass through the plugin: it reads the headers of packets, and moves what follows them between requests and streams.
//!
//! - **Nothing grows.** A connection is a stream, of which there are at most 1024; what it has still to say is kept in it. Resets that belong to no connection wait in a
//!   list of `RESETS`; when it is full, the guest's packets and the news from outside wait where they are.
//! - **A connection holds up none but itself**: bytes for a program that does not read are kept by the host, up to `connection::KEPT`, which is the credit that the guest gets. A guest
//!   that sends more loses the connection.
//! - **Connections do not outlive the instance.** A restored device has none: the guest is told so by the event of a transport reset (§5.10.6.7), and by a reset for each packet that
//!   it sends for one. Programs outside see their streams end.

mod connection;
mod packet;

use std::collections::{BTreeMap, VecDeque};

use tenon_sdk::virtio::{
    self, Answer, Attachment, Batch, Config, Decoder, Encoder, Handle, Result, Socket, StreamState,
    VirtioDescription, VirtioDevice, debug,
};

use crate::connection::{Connection, Said, Stage};
use crate::packet::{HEADER, Header, Op, STREAM};

const DEVICE_TYPE: u16 = 19;
const F_STREAM: u64 = 1 << 0;
const CONFIG_SIZE: u16 = 8;

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// The most entries of the queues of packets, and of that of events.
const QUEUE_SIZE: u16 = 256;
const EVENTS_SIZE: u16 = 16;

/// The host's context id.
const HOST: u64 = 2;
/// Every connection is broken, and the guest's context id may be another.
const TRANSPORT_RESET: u32 = 0;

/// How many resets without a connection wait for the guest's buffers.
const RESETS: usize = 256;
/// How many news are asked for at once. Each may bring a reset.
const NEWS: u32 = 64;
/// The ports of programs outside that connect to the guest: numbers that nobody chooses.
const PORTS: std::ops::Range<u32> = 1 << 30..1 << 31;

/// The guest's port, and the port outside.
type Key = (u32, u32);

/// A reset that belongs to no connection, as its header says it.
#[derive(Clone, Copy, Debug)]
struct Reset {
    cid: u64,
    key: Key,
    kind: u16,
}

/// The device.
pub struct Vsock {
    socket: Socket,
    cid: u64,
    /// What the driver accepted, once it is ready.
    features: Option<u64>,
    /// Where the search for a free port begins.
    next_port: u32,
    connections: BTreeMap<Key, Connection>,
    /// The connection of each stream.
    streams: BTreeMap<u32, Key>,
    /// Connections that have something to say, in turn; each once.
    turns: VecDeque<Key>,
    resets: VecDeque<Reset>,
    /// There may be news of streams.
    news: bool,
    /// Buffers for packets, with their lengths.
    room: VecDeque<(Handle, u32)>,
    /// Packets of the guest that wait, with their lengths.
    packets: VecDeque<(Handle, u32, Option<Header>)>,
    /// Buffers for events, with their lengths.
    events: VecDeque<(Handle, u32)>,
    /// The guest is to be told that its connections are gone.
    lost: bool,
}

tenon_sdk::export_virtio_device!(Vsock);

fn cid(config: &Config) -> Result<u64> {
    Ok(config.number_in("cid", 3..=0xffff_fffe_u32)?.unwrap_or(3).into())
}

impl VirtioDevice for Vsock {
    fn describe(config: &Config) -> Result<VirtioDescription> {
        cid(config)?;
        Ok(VirtioDescription::new(DEVICE_TYPE)
            .features(F_STREAM)
            .queue("receive", QUEUE_SIZE, 0)
            .queue("transmit", QUEUE_SIZE, HEADER)
            .queue("events", EVENTS_SIZE, 0)
            .config(CONFIG_SIZE)
            .socket("vsock"))
    }

    fn start(config: &Config, mut attachment: Attachment) -> Result<Self> {
        Ok(Self {
            socket: attachment.socket()?,
            cid: cid(config)?,
            features: None,
            next_port: PORTS.start,
            connections: BTreeMap::new(),
            streams: BTreeMap::new(),
            turns: VecDeque::new(),
            resets: VecDeque::new(),
            news: true,
            room: VecDeque::new(),
            packets: VecDeque::new(),
            events: VecDeque::new(),
            lost: false,
        })
    }

    fn activate(&mut self, features: u64) -> Result<()> {
        self.features = Some(features);
        Ok(())
    }

    fn config_read(&mut self, offset: u32, size: u8) -> u64 {
        virtio::field(&self.cid.to_le_bytes(), offset, size)
    }

    fn requests_ready(&mut self, queue: u16, batch: &Batch<'_>) {
        let mut answers = Vec::with_capacity(batch.len());
        match queue {
            RECEIVE => self.room.extend(batch.iter().map(|request| (request.handle, request.writable))),
            TRANSMIT => {
                let packets = batch.iter();
                self.packets.extend(packets.map(|r| (r.handle, r.readable, Header::parse(r.head))));
            }
            _ => self.events.extend(batch.iter().map(|request| (request.handle, request.writable))),
        }
        self.work(&mut answers);
        virtio::complete_all(&answers);
    }

    fn socket_ready(&mut self, _socket: u32) {
        self.news = true;
        let mut answers = Vec::new();
        self.work(&mut answers);
        virtio::complete_all(&answers);
    }

    fn reset(&mut self) {
        for stream in std::mem::take(&mut self.streams).into_keys() {
            self.socket.close(stream);
        }
        self.features = None;
        self.next_port = PORTS.start;
        self.connections.clear();
        self.turns.clear();
        self.resets.clear();
        self.room.clear();
        self.packets.clear();
        self.events.clear();
        self.lost = false;
    }

    fn save(&self, state: &mut Encoder) -> Result<()> {
        // No port is used twice: the guest may not have heard yet that the connection with it is gone.
        state.option(self.features).u32(self.next_port);
        Ok(())
    }

    fn restore(&mut self, state: &mut Decoder<'_>) -> Result<()> {
        self.features = state.option()?;
        self.next_port = state.u32()?;
        if !PORTS.contains(&self.next_port) {
            return Err(state.invalid("the next port is not one that a device gives"));
        }
        self.lost = self.features.is_some();
        Ok(())
    }
}

impl Vsock {
    /// Hears the guest and the outside, and says what there is to say, as far as there is room.
    fn work(&mut self, answers: &mut Vec<Answer>) {
        self.tell_of_loss(answers);
        loop {
            self.hear_guest(answers);
            self.hear_outside();
            self.speak(answers);
            let waits = self.news || !self.packets.is_empty();
            if !waits || self.resets.len() + NEWS as usize > RESETS {
                return;
            }
        }
    }

    fn tell_of_loss(&mut self, answers: &mut Vec<Answer>) {
        while self.lost
            && let Some((request, room)) = self.events.pop_front()
        {
            let event = TRANSPORT_RESET.to_le_bytes();
            let fits = usize::try_from(room).is_ok_and(|room| room >= event.len());
            let written = if fits { virtio::write(request, 0, &event) } else { 0 };
            self.lost = !fits;
            answers.push(Answer { request, written });
        }
    }

    fn hear_guest(&mut self, answers: &mut Vec<Answer>) {
        while self.resets.len() < RESETS
            && let Some((request, length, header)) = self.packets.pop_front()
        {
            if let Some(header) = header {
                self.take(request, length.saturating_sub(HEADER.into()), &header);
            }
            answers.push(Answer { request, written: 0 });
        }
    }

    /// Does what a packet asks for, behind whose header there are `there` bytes.
    fn take(&mut self, request: Handle, there: u32, header: &Header) {
        if header.source_cid != self.cid {
            debug!("a packet of CID {} is passed over; this guest is {}", header.source_cid, self.cid);
            return;
        }
        let key = (header.source_port, header.destination_port);
        let reset = Reset { cid: header.destination_cid, key, kind: header.kind };
        if header.destination_cid != HOST || header.kind != STREAM {
            if header.op != Some(Op::Reset) {
                self.resets.push_back(reset);
            }
            return;
        }
        let known = self.connections.get_mut(&key);
        let keep = match (known, header.op) {
            (None, Some(Op::Reset)) => return,
            (None, Some(Op::Request)) => {
                if let Some(stream) = self.socket.connect(key.1) {
                    self.add(key, Connection::new(stream, Stage::Granted));
                }
                self.connections.contains_key(&key)
            }
            (None, _) | (Some(_), None) => false,
            (Some(_), Some(Op::Reset)) => {
                self.remove(key);
                return;
            }
            (Some(connection), Some(op)) => match (connection.stage, op) {
                (Stage::Asked, Op::Response) => {
                    connection.stage = Stage::Open;
                    self.socket.accept(connection.stream, key.1);
                    true
                }
                (Stage::Granted | Stage::Open, Op::Data) => {
                    header.length <= there && connection.send(request, header.length, &self.socket)
                }
                (Stage::Granted | Stage::Open, Op::Shutdown) => !connection.shut(header.flags, &self.socket),
                (Stage::Granted | Stage::Open, Op::CreditRequest) => {
                    connection.want_update();
                    true
                }
                (Stage::Granted | Stage::Open, Op::CreditUpdate) => true,
                _ => false,
            },
        };
        if keep {
            if let Some(connection) = self.connections.get_mut(&key) {
                connection.note_credit(header);
            }
            self.list(key);
        } else {
            self.remove(key);
            self.resets.push_back(reset);
        }
    }

    fn hear_outside(&mut self) {
        while self.news && self.resets.len() + NEWS as usize <= RESETS {
            let states = self.socket.news(NEWS);
            self.news = states.len() >= NEWS as usize;
            for state in states {
                match self.streams.get(&state.number) {
                    Some(key) => self.note(*key, &state),
                    None => self.want(&state),
                }
            }
        }
    }

    /// A stream of which nothing is known: a program outside has begun it.
    fn want(&mut self, state: &StreamState) {
        let port = state.wanted.filter(|_| self.features.is_some() && !(state.ended && state.deaf));
        let key = port.and_then(|port| Some((port, self.free_port(port)?)));
        match key {
            Some(key) => {
                self.add(key, Connection::new(state.number, Stage::Wanted));
                self.list(key);
            }
            None => self.socket.close(state.number),
        }
    }

    /// A port outside that no connection with this port of the guest has.
    fn free_port(&mut self, guest: u32) -> Option<u32> {
        // There are not as many connections as ports that are tried.
        for _ in 0..=self.connections.len() {
            let port = self.next_port;
            self.next_port = if port + 1 < PORTS.end { port + 1 } else { PORTS.start };
            if !self.connections.contains_key(&(guest, port)) {
                return Some(port);
            }
        }
        None
    }

    /// How a connection's stream is.
    fn note(&mut self, key: Key, state: &StreamState) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        let gone = connection.note_stream(state);
        match connection.stage {
            // The program has not waited for the guest's answer.
            Stage::Wanted if gone => self.remove(key),
            Stage::Asked if gone => {
                self.remove(key);
                self.resets.push_back(Reset { cid: HOST, key, kind: STREAM });
            }
            _ => self.list(key),
        }
    }

    /// Says what there is to say, as far as the guest has given buffers. One in which a header and a byte have no room comes back empty.
    fn speak(&mut self, answers: &mut Vec<Answer>) {
        while let Some(&(request, room)) = self.room.front() {
            let room = room.saturating_sub(HEADER.into());
            if room == 0 {
                self.room.pop_front();
                answers.push(Answer { request, written: 0 });
                continue;
            }
            let Some((header, length)) = self.next(request, room) else { return };
            virtio::write(request, 0, &header.to_bytes());
            self.room.pop_front();
            answers.push(Answer { request, written: u32::from(HEADER) + length });
        }
    }

    /// The next packet for the guest. Its bytes are in the request, in which there is room for `room` of them.
    fn next(&mut self, request: Handle, room: u32) -> Option<(Header, u32)> {
        let header = |(guest, port): Key, cid, kind, op| Header {
            source_cid: cid,
            destination_cid: self.cid,
            source_port: port,
            destination_port: guest,
            length: 0,
            kind,
            op: Some(op),
            flags: 0,
            room: 0,
            forwarded: 0,
        };
        if let Some(Reset { cid, key, kind }) = self.resets.pop_front() {
            return Some((header(key, cid, kind, Op::Reset), 0));
        }
        while let Some(key) = self.turns.pop_front() {
            let Some(connection) = self.connections.get_mut(&key) else { continue };
            let Some(Said { op, flags, length }) = connection.speak(&self.socket, request, room) else {
                connection.listed = false;
                continue;
            };
            // Its turn comes again: there may be more.
            self.turns.push_back(key);
            let (room, forwarded) = connection.report();
            return Some((
                Header { length, flags, room, forwarded, ..header(key, HOST, STREAM, op) },
                length,
            ));
        }
        None
    }

    fn list(&mut self, key: Key) {
        if let Some(connection) = self.connections.get_mut(&key).filter(|connection| !connection.listed) {
            connection.listed = true;
            self.turns.push_back(key);
        }
    }

    fn add(&mut self, key: Key, connection: Connection) {
        self.streams.insert(connection.stream, key);
        self.connections.insert(key, connection);
    }

    /// Ends a connection, if there is one.
    fn remove(&mut self, key: Key) {
        let Some(connection) = self.connections.remove(&key) else { return };
        self.streams.remove(&connection.stream);
        self.socket.close(connection.stream);
        if connection.listed {
            self.turns.retain(|turn| *turn != key);
        }
    }
}
