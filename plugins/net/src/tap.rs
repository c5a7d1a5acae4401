//! A tap interface of the host: frames go from guest memory to the kernel by `writev`, and come back through a thread that reads them.
//!
//! The kernel does the work that the header of virtio-net asks for, and gives what the driver accepts. An interface that an administrator has made for this user needs no
//! rights; one that is not there is made, which needs CAP_NET_ADMIN, and is gone with the port.
#![allow(
    unsafe_code,
    reason = "ioctl and writev have no safe form for these structures and for guest memory"
)]

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use rustix::event::epoll::EventFlags;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use tenon_core::{Buffers, FRAME_HEADER, NetworkPort, Offloads, PortCounters, PortInfo, PortNews};

use crate::frame::{ETHERNET, MAX_FRAME, fit};
use crate::poll::{BELL, Bell, Poll};
use crate::queue::{Counts, Inbox, lock};
use crate::spec::NetworkError;

const DEVICE: &str = "/dev/net/tun";
const FRAMES: u64 = 1;
const NEWS: u64 = 2;
/// The most frames taken before news of the interface have their turn.
const TURN: usize = 256;
/// More pieces than the kernel takes in one call (UIO_MAXIOV).
const MOST_PIECES: usize = 1024;
/// The message group in which the kernel tells of interfaces (RTMGRP_LINK).
const LINKS: u32 = 1;

/// What the interface is now.
#[derive(Clone, Copy, PartialEq, Eq)]
struct State {
    mtu: u16,
    up: bool,
}

struct Shared {
    tap: File,
    /// A socket to ask about the interface through.
    control: OwnedFd,
    name: String,
    inbox: Inbox,
    counts: Counts,
    state: Mutex<State>,
    bell: Bell,
}

/// A tap interface.
pub(crate) struct Tap {
    shared: Arc<Shared>,
    mac: [u8; 6],
    thread: Option<JoinHandle<()>>,
}

/// A request about an interface, all zero but for its name.
fn request(name: &str) -> libc::ifreq {
    // SAFETY: all zero is a valid value of this structure of integers, arrays and pointers that are not followed.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The name was checked to leave room for the zero behind it.
    for (place, byte) in request.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1).zip(name.bytes()) {
        *place = byte.cast_signed();
    }
    request
}

/// Asks about an interface, or tells it something.
fn ask(socket: &impl AsRawFd, what: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: the requests that are passed here take a pointer to such a structure, read and write nothing outside it, and keep no pointer.
    if unsafe { libc::ioctl(socket.as_raw_fd(), what, std::ptr::from_mut(request)) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

impl Shared {
    fn look(&self) -> io::Result<State> {
        let mut mtu = request(&self.name);
        ask(&self.control, libc::SIOCGIFMTU, &mut mtu)?;
        let mut flags = request(&self.name);
        ask(&self.control, libc::SIOCGIFFLAGS, &mut flags)?;
        // SAFETY: the kernel has just written these two fields.
        let (mtu, flags) = unsafe { (mtu.ifr_ifru.ifru_mtu, flags.ifr_ifru.ifru_flags) };
        let up = libc::c_int::from(flags) & libc::IFF_UP != 0;
        Ok(State { mtu: u16::try_from(mtu).unwrap_or(u16::MAX), up })
    }

    /// Reads frames while there are any, and room for them. While there is none they wait in the kernel, which bounds and drops them.
    fn read(&self, room: &mut [u8]) {
        for _ in 0..TURN {
            if !self.inbox.has_room() {
                return;
            }
            let length = match (&self.tap).read(room) {
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return,
            };
            let result = fit(room[..length].to_vec(), self.inbox.accepted(), |frame| {
                if !self.inbox.push(frame) {
                    Counts::add(&self.counts.receive_dropped);
                }
            });
            if result.is_err() {
                Counts::add(&self.counts.receive_dropped);
            }
        }
        // There may be more, of which nobody else would tell.
        self.bell.ring();
    }

    fn run(&self, poll: &Poll, news: &OwnedFd) {
        let mut room = vec![0; MAX_FRAME + 1];
        let mut events = Vec::new();
        while !self.bell.stopped() {
            if let Err(error) = poll.wait(&mut events, None) {
                tracing::error!(%error, name = self.name, "the tap's thread cannot wait, and stops");
                return;
            }
            for event in &events {
                match event.data.u64() {
                    BELL => self.bell.silence(),
                    NEWS => {
                        let _ = rustix::io::read(news, &mut room[..]);
                        self.refresh();
                    }
                    _ => {}
                }
            }
            self.read(&mut room);
        }
    }

    fn refresh(&self) {
        let Ok(now) = self.look() else { return };
        let mut state = lock(&self.state);
        let changed = *state != now;
        *state = now;
        drop(state);
        if changed {
            self.inbox.changed();
        }
    }
}

impl Tap {
    /// Opens the interface `name`, or makes it.
    pub(crate) fn open(name: &str, mac: [u8; 6], mtu: Option<u16>) -> Result<Arc<Self>, NetworkError> {
        let wrong =
            |problem: String, remedy: String| NetworkError::new(format!("tap {name}"), problem, remedy);
        if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.contains(['/', '%', '\0']) {
            return Err(wrong(
                "no interface can be called so".into(),
                "use 1 to 15 letters and digits".into(),
            ));
        }
        let system = |error: io::Error, doing: &str| {
            let user = std::env::var("USER").unwrap_or_else(|_| "$USER".into());
            let remedy = match error.raw_os_error() {
                Some(libc::EPERM | libc::EACCES) => format!(
                    "let an administrator make it for you: `ip tuntap add {name} mode tap user {user} vnet_hdr && ip link set {name} up`"
                ),
                Some(libc::EBUSY) => "another program uses it: end that, or name another interface".into(),
                Some(libc::EINVAL) => "see whether an interface of that name is there that is no tap".into(),
                Some(libc::ENOENT | libc::ENXIO | libc::ENODEV) => {
                    format!("load the kernel's module `tun`, or give this container {DEVICE}")
                }
                _ => "see what the host's kernel says".into(),
            };
            wrong(format!("{doing}: {error}"), remedy)
        };
        let control =
            rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
                .map_err(|error| system(error.into(), "making a socket"))?;
        let there = ask(&control, libc::SIOCGIFINDEX, &mut request(name)).is_ok();
        let tap = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(DEVICE)
            .map_err(|error| system(error, &format!("opening {DEVICE}")))?;
        attach(&tap, name).map_err(|error| system(error, if there { "taking it" } else { "making it" }))?;
        set(&tap, libc::TUNSETVNETHDRSZ, FRAME_HEADER)
            .map_err(|error| system(error, "asking for headers"))?;
        offload(&tap, Offloads::default()).map_err(|error| system(error, "setting its offloads"))?;
        let bell = Bell::new().map_err(|error| system(error, "making an eventfd"))?;
        let shared = Shared {
            tap,
            control,
            name: name.to_owned(),
            inbox: Inbox::default(),
            counts: Counts::default(),
            state: Mutex::new(State { mtu: 1500, up: false }),
            bell,
        };
        if let Some(mtu) = mtu {
            let mut request = request(name);
            request.ifr_ifru.ifru_mtu = libc::c_int::from(mtu);
            ask(&shared.control, libc::SIOCSIFMTU, &mut request)
                .map_err(|error| system(error, "setting its MTU"))?;
        }
        if !there {
            let mut request = request(name);
            ask(&shared.control, libc::SIOCGIFFLAGS, &mut request)
                .and_then(|()| {
                    // SAFETY: the kernel has just written this field.
                    unsafe { request.ifr_ifru.ifru_flags |= UP };
                    ask(&shared.control, libc::SIOCSIFFLAGS, &mut request)
                })
                .map_err(|error| system(error, "bringing it up"))?;
        }
        let (poll, news) = watch(&shared).map_err(|error| system(error, "watching it"))?;
        // After the watch was set, so that no change is missed.
        *lock(&shared.state) = shared.look().map_err(|error| system(error, "looking at it"))?;
        let shared = Arc::new(shared);
        let worker = shared.clone();
        let thread = std::thread::Builder::new()
            .name("net-tap".into())
            .spawn(move || worker.run(&poll, &news))
            .map_err(|error| system(error, "starting its thread"))?;
        Ok(Arc::new(Self { shared, mac, thread: Some(thread) }))
    }
}

const UP: libc::c_short = 1;

fn attach(tap: &File, name: &str) -> io::Result<()> {
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    // An interface that was made for several queues is only given out as such.
    let mut result = Ok(());
    for flags in [flags, flags | libc::IFF_MULTI_QUEUE] {
        let mut request = request(name);
        request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).unwrap_or_default();
        result = ask(tap, libc::TUNSETIFF, &mut request);
        if !result.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::EINVAL)) {
            break;
        }
    }
    result
}

fn set(tap: &File, what: libc::Ioctl, value: usize) -> io::Result<()> {
    let value = libc::c_int::try_from(value).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: this request reads an integer through the pointer, and keeps none.
    if unsafe { libc::ioctl(tap.as_raw_fd(), what, &raw const value) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn offload(tap: &File, offloads: Offloads) -> io::Result<()> {
    let mut flags = 0;
    if offloads.checksum {
        flags |= libc::TUN_F_CSUM;
        flags |= if offloads.tso4 { libc::TUN_F_TSO4 } else { 0 };
        flags |= if offloads.tso6 { libc::TUN_F_TSO6 } else { 0 };
    }
    // SAFETY: this request takes flags and no pointer.
    if unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn watch(shared: &Shared) -> io::Result<(Poll, OwnedFd)> {
    let news = rustix::net::socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        // Protocol 0 is that of routes and links.
        None,
    )?;
    rustix::net::bind(&news, &SocketAddrNetlink::new(0, LINKS))?;
    let poll = Poll::new(&shared.bell)?;
    // By edge: an interface that was deleted is ready for ever.
    poll.add(&shared.tap, FRAMES, EventFlags::IN | EventFlags::ET)?;
    poll.add(&news, NEWS, EventFlags::IN)?;
    Ok((poll, news))
}

impl NetworkPort for Tap {
    fn info(&self) -> PortInfo {
        let state = *lock(&self.shared.state);
        let all = Offloads { checksum: true, tso4: true, tso6: true };
        PortInfo { mac: self.mac, mtu: state.mtu, link_up: state.up, send: all, receive: all }
    }

    fn accept(&self, offloads: Offloads) {
        self.shared.inbox.accept(offloads);
        // What the kernel does not do is done here.
        let _ = offload(&self.shared.tap, offloads);
    }

    fn send(&self, frame: &Buffers) -> bool {
        let length = frame.length();
        let fits = (FRAME_HEADER + ETHERNET) as u64 <= length && length <= MAX_FRAME as u64;
        // The kernel takes the header out of guest memory once and checks its own copy.
        let sent = fits
            && frame.iovecs(0, length).is_some_and(|vectors| {
                let Ok(count) = libc::c_int::try_from(vectors.len().min(MOST_PIECES)) else { return false };
                // SAFETY: the places are in the mapping of guest memory that `frame` keeps, as long as the vectors say.
                let written = unsafe { libc::writev(self.shared.tap.as_raw_fd(), vectors.as_ptr(), count) };
                vectors.len() <= MOST_PIECES && written >= 0
            });
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

impl Drop for Tap {
    fn drop(&mut self) {
        self.shared.bell.stop(self.thread.take());
    }
}
