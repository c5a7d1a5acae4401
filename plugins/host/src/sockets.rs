//! The programs of this host with which a device exchanges streams: a Unix socket at a path, and Unix sockets beside it.
//!
//! A program connects to the path and writes `CONNECT PORT` and a line feed, PORT being a decimal number: that is a stream to the guest's port. When the device has accepted it, the program
//! is given `OK PORT` and a line feed, with the number of its own end; bytes follow in both directions. Where a device connects to a port, the host connects to the path with `_PORT` behind it. That
//! is what Firecracker and Cloud Hypervisor do, too.
//!
//! One thread sleeps in epoll for all streams. Calls of the device come on its own thread, and move bytes between request and socket at once: what the host keeps is what a program
//! did not take, at most [`streams::KEPT`] of each stream, of which there are at most [`streams::STREAMS`]. What a device has not received stays in the kernel's buffer. Nothing here waits.

mod streams;

use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, Event, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::fd::OwnedFd;
use rustix::fs::Mode;
use rustix::net::{AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType};
use tenon_abi::{Sent, StreamState};
use tenon_core::Buffers;

use self::streams::Streams;
use crate::fault::Misuse;

/// The longest path: one of 107 bytes (unix(7)) with a port behind it.
const LONGEST: usize = 107 - "_4294967295".len();
/// The most bytes that one call moves.
const MOST: u32 = 1 << 20;
/// Tokens of what is watched besides streams, whose tokens are their numbers.
const BELL: u64 = u64::MAX;
const LISTENER: u64 = u64::MAX - 1;
/// How many may wait to be let in.
const BACKLOG: u16 = 128;
/// How long nobody is let in after this process could not.
const REST: Duration = Duration::from_secs(1);
/// How long programs are waited for that have not taken what was sent, when the socket goes.
const LINGER: Duration = Duration::from_secs(2);

/// Why there is no such socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The path is too long for a socket.
    #[error(
        "`{0}` is longer than {LONGEST} bytes, which leave room for a port behind it; choose a shorter path"
    )]
    TooLong(PathBuf),
    /// Somebody listens there.
    #[error("`{0}`: a program listens there already; choose another path, or end that program")]
    InUse(PathBuf),
    /// It cannot be made.
    #[error("`{path}` cannot be made a socket: {error}")]
    Io {
        /// The path.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
}

/// Such a socket. Its file is made when it is opened, for its owner alone, and removed when it is dropped. That ends its streams, and waits up to two seconds for programs to take what
/// was sent to them.
pub struct UnixSocket {
    shared: Arc<Shared>,
    /// The file's device and number.
    identity: (u64, u64),
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    path: PathBuf,
    listener: OwnedFd,
    bell: OwnedFd,
    streams: Mutex<Streams>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Streams> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets some in who wait. False if this process has no room for them now.
    fn let_in(&self) -> bool {
        for _ in 0..BACKLOG {
            match rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                // One too many finds its stream closed.
                Ok(stream) => drop(self.lock().greet(stream)),
                Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
                Err(rustix::io::Errno::AGAIN) => return true,
                Err(error) => {
                    tracing::warn!(path = %self.path.display(), %error, "nobody is let in for a second");
                    return false;
                }
            }
        }
        true
    }

    /// Waits for events, for no longer than `most`. False if that cannot be done.
    fn wait(&self, epoll: &OwnedFd, events: &mut Vec<Event>, most: Option<Duration>) -> bool {
        events.clear();
        let most = most.and_then(|most| Timespec::try_from(most).ok());
        match epoll::wait(epoll, rustix::buffer::spare_capacity(events), most.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => true,
            Err(error) => {
                tracing::error!(path = %self.path.display(), %error, "the thread of the socket cannot wait, and stops");
                false
            }
        }
    }

    /// Works until the bell.
    fn serve(&self, epoll: &OwnedFd) {
        let mut events = Vec::with_capacity(64);
        let mut resting: Option<Instant> = None;
        while self.wait(epoll, &mut events, resting.map(|_| REST)) {
            let mut may_let_in = resting.is_some_and(|since| since.elapsed() >= REST);
            for event in &events {
                let (token, flags) = (event.data.u64(), event.flags);
                match token {
                    BELL => return,
                    LISTENER => may_let_in = true,
                    _ => self.lock().happened(u32::try_from(token).unwrap_or(0), flags),
                }
            }
            if may_let_in {
                resting = (!self.let_in()).then(Instant::now);
                if resting.is_none() {
                    let flags = EventFlags::IN | EventFlags::ONESHOT;
                    let _ = epoll::modify(epoll, &self.listener, EventData::new_u64(LISTENER), flags);
                }
            }
        }
    }

    /// Lets nobody in any more, and gives programs what was sent to them.
    fn drain(&self, epoll: &OwnedFd) {
        // Who connects now is refused, and who waits to be let in is let go.
        let _ = rustix::net::shutdown(&self.listener, Shutdown::Both);
        while rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC).is_ok() {}
        let _ = epoll::delete(epoll, &self.listener);
        let _ = epoll::delete(epoll, &self.bell);
        let mut events = Vec::with_capacity(64);
        let until = Instant::now() + LINGER;
        let mut waiting = self.lock().end();
        while waiting > 0 {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                tracing::warn!(path = %self.path.display(), "{waiting} programs have not taken all that was sent to them, and will not get it");
                return;
            }
            if !self.wait(epoll, &mut events, Some(left)) {
                return;
            }
            let mut streams = self.lock();
            for event in &events {
                streams.happened(u32::try_from(event.data.u64()).unwrap_or(0), event.flags);
            }
            waiting = streams.count();
        }
    }
}

impl UnixSocket {
    /// Listens at a path. A socket's file that is there is replaced if nobody listens there.
    ///
    /// # Errors
    /// The path cannot be a socket's, or somebody listens there.
    pub fn open(path: &Path) -> Result<Arc<Self>, SocketError> {
        if path.as_os_str().len() > LONGEST {
            return Err(SocketError::TooLong(path.to_owned()));
        }
        let failed = |error: io::Error| SocketError::Io { path: path.to_owned(), error };
        let listener = listen(path).map_err(|error| match error.kind() {
            ErrorKind::AddrInUse => SocketError::InUse(path.to_owned()),
            _ => failed(error),
        })?;
        let start = || {
            let about = std::fs::symlink_metadata(path)?;
            let epoll = Arc::new(epoll::create(epoll::CreateFlags::CLOEXEC)?);
            let bell = eventfd(0, EventfdFlags::CLOEXEC)?;
            epoll::add(&*epoll, &bell, EventData::new_u64(BELL), EventFlags::IN)?;
            let flags = EventFlags::IN | EventFlags::ONESHOT;
            epoll::add(&*epoll, &listener, EventData::new_u64(LISTENER), flags)?;
            let streams = Mutex::new(Streams::new(epoll.clone()));
            let shared = Arc::new(Shared { path: path.to_owned(), listener, bell, streams });
            let served = shared.clone();
            let work = move || {
                served.serve(&epoll);
                served.drain(&epoll);
            };
            let thread = std::thread::Builder::new().name("sockets".into()).spawn(work)?;
            Ok(Arc::new(Self { shared, identity: (about.dev(), about.ino()), thread: Some(thread) }))
        };
        start().map_err(failed)
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.shared.path
    }

    /// Sets what is called, on any thread, when there is news that the device was not told of. It must not call back.
    pub(crate) fn watch(&self, tell: impl Fn() + Send + 'static) {
        self.shared.lock().watch(Box::new(tell));
    }

    /// Begins a stream to the program that listens as `port`.
    pub(crate) fn connect(&self, port: u32) -> Option<u32> {
        let mut name = self.shared.path.as_os_str().to_owned();
        name.push(format!("_{port}"));
        // Who has more callers than it takes in is as good as away.
        let stream = connect(Path::new(&name)).ok()?;
        self.shared.lock().open(stream)
    }

    /// See the WIT, as for all that follow.
    pub(crate) fn news(&self, max: u32) -> Vec<StreamState> {
        self.shared.lock().news(max)
    }

    pub(crate) fn accept(&self, number: u32, port: u32) -> Result<(), Misuse> {
        self.shared.lock().accept(number, port)
    }

    /// Sends at most `length` bytes of a row from `offset`.
    pub(crate) fn send(&self, number: u32, from: &Buffers, offset: u32, length: u32) -> Result<Sent, Misuse> {
        let length = u64::from(length.min(MOST)).min(from.length().saturating_sub(offset.into()));
        self.shared.lock().send(number, from, offset.into(), length)
    }

    /// Receives at most `length` bytes into a row at `offset`.
    pub(crate) fn receive(
        &self,
        number: u32,
        into: &Buffers,
        offset: u32,
        length: u32,
    ) -> Result<u32, Misuse> {
        let length = u64::from(length.min(MOST)).min(into.length().saturating_sub(offset.into()));
        self.shared.lock().receive(number, into, offset.into(), length)
    }

    pub(crate) fn shut(&self, number: u32, receive: bool, send: bool) -> Result<(), Misuse> {
        self.shared.lock().shut(number, receive, send)
    }

    pub(crate) fn close(&self, number: u32) -> Result<(), Misuse> {
        self.shared.lock().close(number)
    }

    /// A new instance comes, which has no streams. Whether the old one had any.
    pub(crate) fn clear(&self) -> bool {
        self.shared.lock().clear()
    }
}

impl Drop for UnixSocket {
    fn drop(&mut self) {
        let _ = rustix::io::write(&self.shared.bell, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let path = &self.shared.path;
        // Another may have come in its place.
        let is_ours = |about: std::fs::Metadata| (about.dev(), about.ino()) == self.identity;
        if std::fs::symlink_metadata(path).is_ok_and(is_ours) {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn socket() -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

/// Connects without waiting: `AGAIN` from a program that has more callers than it takes in.
fn connect(path: &Path) -> rustix::io::Result<OwnedFd> {
    let stream = socket()?;
    rustix::net::connect(&stream, &SocketAddrUnix::new(path)?)?;
    Ok(stream)
}

/// Listens at a path, where a socket that nobody listens at is replaced.
fn listen(path: &Path) -> io::Result<OwnedFd> {
    let bind = || -> io::Result<OwnedFd> {
        let socket = socket()?;
        // The file has the mode of the socket from the start.
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
        rustix::net::listen(&socket, BACKLOG.into())?;
        Ok(socket)
    };
    match bind() {
        Err(error) if error.kind() == ErrorKind::AddrInUse => {
            if !std::fs::symlink_metadata(path)?.file_type().is_socket() {
                return Err(io::Error::new(ErrorKind::AlreadyExists, "there is a file that is no socket"));
            }
            match connect(path) {
                Err(rustix::io::Errno::CONNREFUSED) => {
                    std::fs::remove_file(path)?;
                    bind()
                }
                _ => Err(error),
            }
        }
        done => done,
    }
}

#[cfg(test)]
mod tests;
