//! A cable between two machines: a Unix socket over which each Ethernet frame goes with its length in front, four bytes, the most significant first. That is what other
//! hypervisors speak as well over their stream sockets.
//!
//! No header of virtio-net goes with the frames, so nothing is left to the other end: frames that ask for work have it done here. The end that listens takes one
//! peer at a time and waits for the next when it is gone; the end that connects tries again every second. The link is up while there is a peer.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use rustix::event::Timespec;
use rustix::event::epoll::EventFlags;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tenon_core::{Buffers, FRAME_HEADER, NetworkPort, Offloads, PortCounters, PortInfo, PortNews};

use crate::frame::{ETHERNET, Header, MAX_FRAME, fit};
use crate::poll::{BELL, Bell, Poll};
use crate::queue::{Counts, Inbox, Outbox};
use crate::spec::NetworkError;

const PEER: u64 = 1;
const LISTENER: u64 = 2;
/// The length in front of a frame.
const PREFIX: usize = 4;
/// How much is read at once.
const CHUNK: usize = 256 << 10;
/// How long to wait before connecting again.
const AGAIN: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

struct Shared {
    outbox: Outbox,
    inbox: Inbox,
    counts: Counts,
    linked: AtomicBool,
    bell: Bell,
}

/// One end of such a cable.
pub(crate) struct Cable {
    shared: Arc<Shared>,
    mac: [u8; 6],
    mtu: u16,
    /// The socket's file, where this end has made it.
    made: Option<PathBuf>,
    thread: Option<JoinHandle<()>>,
}

struct Peer {
    stream: UnixStream,
    /// What came and is not a whole frame, or found no room.
    incoming: Vec<u8>,
    /// The rest of what could not be written at once.
    outgoing: VecDeque<Vec<u8>>,
    /// How much of the first of those is written.
    written: usize,
}

struct Worker {
    shared: Arc<Shared>,
    poll: Poll,
    listener: Option<UnixListener>,
    path: PathBuf,
    peer: Option<Peer>,
    room: Vec<u8>,
}

impl Worker {
    fn run(mut self) {
        let mut events = Vec::new();
        while !self.shared.bell.stopped() {
            let lonely = self.peer.is_none() && self.listener.is_none();
            if let Err(error) = self.poll.wait(&mut events, lonely.then_some(AGAIN)) {
                tracing::error!(%error, "the cable's thread cannot wait, and stops");
                break;
            }
            for event in &events {
                if event.data.u64() == BELL {
                    self.shared.bell.silence();
                }
            }
            if self.peer.is_none() {
                self.find();
            }
            let lost = self.peer.as_mut().is_some_and(|peer| {
                let result = peer.receive(&self.shared, &mut self.room);
                result.and_then(|()| peer.send(&self.shared)).is_err()
            });
            if lost {
                self.peer = None;
                self.link(false);
                // Who waits to connect is not announced again.
                self.find();
            }
        }
    }

    /// Takes or seeks a peer.
    fn find(&mut self) {
        let found = match &self.listener {
            Some(listener) => listener.accept().map(|(stream, _)| stream),
            None => connect(&self.path),
        };
        if let Ok(stream) = found
            && self.adopt(stream).is_ok()
        {
            self.link(true);
        }
    }

    fn adopt(&mut self, stream: UnixStream) -> io::Result<()> {
        stream.set_nonblocking(true)?;
        self.poll.add(
            &stream,
            PEER,
            EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET,
        )?;
        // What was sent while nobody was there is old.
        drop(self.shared.outbox.take());
        self.peer = Some(Peer { stream, incoming: Vec::new(), outgoing: VecDeque::new(), written: 0 });
        Ok(())
    }

    fn link(&self, up: bool) {
        self.shared.linked.store(up, Ordering::Release);
        self.shared.inbox.changed();
    }
}

impl Peer {
    /// Takes what has come. An error ends the connection.
    fn receive(&mut self, shared: &Shared, room: &mut [u8]) -> io::Result<()> {
        loop {
            self.frames(shared)?;
            // Nothing is read for which there is no room: then the peer has to wait.
            if !shared.inbox.has_room() {
                return Ok(());
            }
            match self.stream.read(room) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(length) => self.incoming.extend_from_slice(&room[..length]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    /// Takes whole frames out of what has come.
    fn frames(&mut self, shared: &Shared) -> io::Result<()> {
        let mut at = 0;
        while let Some(&[a, b, c, d]) = self.incoming.get(at..at + PREFIX) {
            let length = usize::try_from(u32::from_be_bytes([a, b, c, d])).unwrap_or(usize::MAX);
            if length > MAX_FRAME - FRAME_HEADER {
                tracing::warn!(length, "the other end of a cable sends what are no frames, and is cut off");
                return Err(ErrorKind::InvalidData.into());
            }
            let Some(packet) = self.incoming.get(at + PREFIX..at + PREFIX + length) else { break };
            if !shared.inbox.has_room() {
                break;
            }
            let mut frame = vec![0; FRAME_HEADER];
            frame.extend_from_slice(packet);
            Header::default().write(&mut frame);
            if length < ETHERNET || !shared.inbox.push(frame) {
                Counts::add(&shared.counts.receive_dropped);
            }
            at += PREFIX + length;
        }
        self.incoming.drain(..at);
        Ok(())
    }

    /// Sends what can be sent. An error ends the connection.
    fn send(&mut self, shared: &Shared) -> io::Result<()> {
        loop {
            if self.outgoing.is_empty() {
                self.outgoing = shared.outbox.take();
            }
            let Some(frame) = self.outgoing.front() else { return Ok(()) };
            match self.stream.write(&frame[self.written..]) {
                Ok(count) => self.written += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
            if self.written == frame.len() {
                self.written = 0;
                self.outgoing.pop_front();
            }
        }
    }
}

/// Connects to `path`, and does not wait for a listener that takes nobody.
fn connect(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

/// Listens at `path`; a socket there that nobody listens at is replaced.
fn listen(path: &Path) -> io::Result<UnixListener> {
    let result = UnixListener::bind(path);
    if result.as_ref().is_err_and(|error| error.kind() == ErrorKind::AddrInUse)
        && connect(path).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
    {
        std::fs::remove_file(path)?;
        return UnixListener::bind(path);
    }
    result
}

impl Cable {
    pub(crate) fn open(
        path: &Path,
        listening: bool,
        mac: [u8; 6],
        mtu: u16,
    ) -> Result<Arc<Self>, NetworkError> {
        let failed = |doing: &str| {
            let key = format!("socket {}", path.display());
            let doing = doing.to_owned();
            move |error: io::Error| {
                let remedy = match error.kind() {
                    ErrorKind::AddrInUse => {
                        "another program listens there, or it is no socket: choose another path"
                    }
                    ErrorKind::NotFound | ErrorKind::ConnectionRefused if listening => {
                        "make the folder first"
                    }
                    ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
                        "start the machine with listen= and the same path first"
                    }
                    ErrorKind::InvalidInput | ErrorKind::InvalidFilename => {
                        "choose a path of less than 108 bytes"
                    }
                    _ => "see whether this user may do that there",
                };
                NetworkError::new(key, format!("{doing}: {error}"), remedy)
            }
        };
        let bell = Bell::new().map_err(failed("making an eventfd"))?;
        let poll = Poll::new(&bell).map_err(failed("making an epoll"))?;
        let shared = Arc::new(Shared {
            outbox: Outbox::default(),
            inbox: Inbox::default(),
            counts: Counts::default(),
            linked: AtomicBool::new(false),
            bell,
        });
        let mut worker = Worker {
            shared: shared.clone(),
            poll,
            listener: None,
            path: path.to_owned(),
            peer: None,
            room: vec![0; CHUNK],
        };
        if listening {
            let listener = listen(path).map_err(failed("listening"))?;
            listener
                .set_nonblocking(true)
                .and_then(|()| worker.poll.add(&listener, LISTENER, EventFlags::IN | EventFlags::ET))
                .map_err(failed("watching"))?;
            worker.listener = Some(listener);
        } else {
            let stream = connect(path).map_err(failed("connecting"))?;
            worker.adopt(stream).map_err(failed("watching"))?;
            worker.link(true);
        }
        let thread = std::thread::Builder::new()
            .name("net-socket".into())
            .spawn(move || worker.run())
            .map_err(failed("starting its thread"))?;
        let made = listening.then(|| path.to_owned());
        Ok(Arc::new(Self { shared, mac, mtu, made, thread: Some(thread) }))
    }
}

impl NetworkPort for Cable {
    fn info(&self) -> PortInfo {
        let none = Offloads::default();
        let link_up = self.shared.linked.load(Ordering::Acquire);
        PortInfo { mac: self.mac, mtu: self.mtu, link_up, send: none, receive: none }
    }

    fn accept(&self, offloads: Offloads) {
        self.shared.inbox.accept(offloads);
    }

    fn send(&self, frame: &Buffers) -> bool {
        let length = usize::try_from(frame.length()).unwrap_or(usize::MAX);
        let mut sent = false;
        if self.shared.linked.load(Ordering::Acquire) && length <= MAX_FRAME {
            let mut bytes = vec![0; length];
            frame.read(0, &mut bytes);
            let _ = fit(bytes, Offloads::default(), |mut frame| {
                // The length takes the last bytes of the header's place.
                let length = u32::try_from(frame.len() - FRAME_HEADER).unwrap_or(u32::MAX);
                frame.drain(..FRAME_HEADER - PREFIX);
                frame[..PREFIX].copy_from_slice(&length.to_be_bytes());
                if let Some(first) = self.shared.outbox.push(frame) {
                    sent = true;
                    if first {
                        self.shared.bell.ring();
                    }
                }
            });
        }
        let counts = &self.shared.counts;
        Counts::add(if sent { &counts.sent } else { &counts.send_dropped });
        sent
    }

    fn waiting(&self, most: usize, into: &mut Vec<u32>) {
        self.shared.inbox.waiting(most, into);
    }

    fn receive(&self) -> Option<Vec<u8>> {
        let (frame, wake) = self.shared.inbox.receive();
        if wake {
            self.shared.bell.ring();
        }
        if frame.is_some() {
            Counts::add(&self.shared.counts.received);
        }
        frame
    }

    fn watch(&self, news: Box<dyn Fn(PortNews) + Send + Sync>) {
        self.shared.inbox.watch(news);
    }

    fn counters(&self) -> PortCounters {
        self.shared.counts.read()
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        self.shared.bell.stop(self.thread.take());
        if let Some(path) = &self.made {
            let _ = std::fs::remove_file(path);
        }
    }
}
