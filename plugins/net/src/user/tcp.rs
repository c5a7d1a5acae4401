//! One TCP connection of the guest: ended here by a small TCP stack, and carried on by a socket of the host.
//!
//! Each connection has an interface of its own with one socket in it, whose address is whatever the guest connected to. So a packet costs the same with
//! one connection as with hundreds, and any address can be answered. The wire to the guest is memory and loses nothing that finds room, so segments of
//! 64 KiB cross it whole: the sizes that both ends name in their SYN are overwritten here, and the guest's own goes into the header of each frame.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddrV4, TcpStream};
use std::time::Duration;

use smoltcp::iface::{Config, Interface, PollResult, SocketHandle, SocketSet};
use smoltcp::phy::{self, Checksum, Device, DeviceCapabilities, Medium};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Instant;
use smoltcp::wire::{HardwareAddress, IpCidr};

use super::link::Link;
use super::packet::{Packet, SYN, mss_option};

/// The most that a segment without offloads carries if the guest names no other size (RFC 9293 §3.7.1).
const DEFAULT_MSS: u16 = 536;
/// The least that is believed.
const LEAST_MSS: u16 = 64;
/// The data of the longest IPv4 packet with the shortest headers.
const LARGEST_MSS: u16 = 65495;
/// The bytes that one connection buffers in each direction, by how many connections there are: many share what few may spend.
fn buffer(connections: usize) -> usize {
    match connections {
        0..16 => 256 << 10,
        16..128 => 64 << 10,
        _ => 16 << 10,
    }
}

fn ring(connections: usize) -> SocketBuffer<'static> {
    SocketBuffer::new(vec![0; buffer(connections)])
}

/// A connection's two ends as the guest sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) guest: SocketAddrV4,
    pub(super) remote: SocketAddrV4,
}

/// What becomes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It goes on, and wants to be looked at again at this time.
    Lives(Option<Instant>),
    /// It goes on when the guest has taken frames.
    Waits,
    /// It is over.
    Over,
}

/// The host's socket is not connected yet; here is the guest's SYN.
struct Pending(Option<Packet>);

/// A connection.
pub(super) struct Flow {
    pub(super) key: Key,
    pub(super) mac: [u8; 6],
    /// The timer that is set for it.
    pub(super) deadline: Option<Instant>,
    /// When it was last used, by a count of events.
    pub(super) used: u64,
    /// It is among those to look at in this round.
    pub(super) queued: bool,
    stream: TcpStream,
    pending: Option<Pending>,
    interface: Interface,
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    /// The guest's maximum segment size.
    mss: u16,
    readable: bool,
    writable: bool,
    /// The host's end sends no more, and the guest was told.
    host_done: bool,
    /// The guest sends no more.
    guest_ended: bool,
    /// The guest sends no more, and the host has all of it and was told.
    guest_done: bool,
    /// The host's socket failed.
    broken: bool,
}

/// The wire, for one call into the connection's interface.
struct Wire<'a> {
    link: &'a Link,
    mac: [u8; 6],
    mss: u16,
    incoming: Option<&'a [u8]>,
    full: bool,
}

struct Rx<'a>(&'a [u8]);

impl phy::RxToken for Rx<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

struct Tx<'a> {
    link: &'a Link,
    mac: [u8; 6],
    mss: u16,
}

impl phy::TxToken for Tx<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        self.link.tcp(self.mac, self.mss, length, |packet| {
            let result = f(packet);
            if let Some(segment) = packet.get_mut(super::link::IPV4..)
                && segment.get(13).is_some_and(|flags| flags & SYN != 0)
                && let Some(at) = mss_option(segment)
            {
                segment[at..at + 2].copy_from_slice(&(self.link.mtu - 40).to_be_bytes());
            }
            result
        })
    }
}

impl Device for Wire<'_> {
    type RxToken<'t>
        = Rx<'t>
    where
        Self: 't;
    type TxToken<'t>
        = Tx<'t>
    where
        Self: 't;

    fn receive(&mut self, _: Instant) -> Option<(Rx<'_>, Tx<'_>)> {
        let incoming = self.incoming.take()?;
        Some((Rx(incoming), Tx { link: self.link, mac: self.mac, mss: self.mss }))
    }

    fn transmit(&mut self, _: Instant) -> Option<Tx<'_>> {
        if !self.link.inbox.has_room() {
            self.full = true;
            return None;
        }
        Some(Tx { link: self.link, mac: self.mac, mss: self.mss })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = usize::from(u16::MAX);
        // Those of TCP are looked at before, and filled in after.
        capabilities.checksum.tcp = Checksum::None;
        capabilities.checksum.ipv4 = Checksum::Tx;
        capabilities
    }
}

impl Flow {
    fn new(
        link: &Link,
        key: Key,
        mac: [u8; 6],
        stream: TcpStream,
        now: Instant,
        seed: u64,
        flows: usize,
    ) -> Self {
        let mut wire = Wire { link, mac, mss: DEFAULT_MSS, incoming: None, full: false };
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = seed;
        let mut interface = Interface::new(config, &mut wire, now);
        // Every address is a neighbour.
        interface.update_ip_addrs(|addresses| {
            let _ = addresses.push(IpCidr::new((*key.remote.ip()).into(), 0));
        });
        let mut socket = Socket::new(ring(flows), ring(flows));
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        // A guest that is gone without a word, and not only paused, frees its connections in the end.
        socket.set_keep_alive(Some(Duration::from_secs(600).into()));
        socket.set_timeout(Some(Duration::from_secs(7200).into()));
        let mut sockets = SocketSet::new(Vec::new());
        let handle = sockets.add(socket);
        Self {
            key,
            mac,
            deadline: None,
            used: 0,
            queued: false,
            stream,
            pending: None,
            interface,
            sockets,
            handle,
            mss: DEFAULT_MSS,
            readable: false,
            writable: false,
            host_done: false,
            guest_ended: false,
            guest_done: false,
            broken: false,
        }
    }

    /// A connection that the guest asks for with `syn`, while `stream` is still being connected.
    #[allow(clippy::too_many_arguments, reason = "one caller, which has all of these at hand")]
    pub(super) fn outward(
        link: &Link,
        key: Key,
        syn: Packet,
        stream: TcpStream,
        now: Instant,
        seed: u64,
        flows: usize,
    ) -> Self {
        let mut flow = Self::new(link, key, syn.mac, stream, now, seed, flows);
        let listening = flow.socket().listen((*key.remote.ip(), key.remote.port()));
        debug_assert!(listening.is_ok(), "port 0 was refused before");
        flow.pending = Some(Pending(Some(syn)));
        flow
    }

    /// A connection from the host to the guest, over `stream`, which is connected.
    #[allow(clippy::too_many_arguments, reason = "one caller, which has all of these at hand")]
    pub(super) fn inward(
        link: &Link,
        key: Key,
        mac: [u8; 6],
        stream: TcpStream,
        now: Instant,
        seed: u64,
        flows: usize,
    ) -> Option<Self> {
        let mut flow = Self::new(link, key, mac, stream, now, seed, flows);
        let socket = flow.sockets.get_mut::<Socket>(flow.handle);
        let (guest, remote) = (key.guest, key.remote);
        socket
            .connect(flow.interface.context(), (*guest.ip(), guest.port()), (*remote.ip(), remote.port()))
            .ok()?;
        Some(flow)
    }

    fn socket(&mut self) -> &mut Socket<'static> {
        self.sockets.get_mut(self.handle)
    }

    /// The host's socket, to be watched.
    pub(super) fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// The guest asks again for what is being connected.
    pub(super) fn is_pending(&self) -> bool {
        self.pending.is_some()
    }

    /// The host's socket has news.
    pub(super) fn ready(&mut self, readable: bool, writable: bool) {
        self.readable |= readable;
        self.writable |= writable;
    }

    /// The host's socket may be connected now: takes up the guest's SYN.
    ///
    /// # Errors
    /// It could not be connected; the packet is to be refused.
    pub(super) fn connected(&mut self, link: &Link, now: Instant) -> Result<(), Option<Packet>> {
        let Some(Pending(syn)) = &mut self.pending else { return Ok(()) };
        match self.stream.take_error() {
            Ok(None) => {}
            _ => return Err(syn.take()),
        }
        // Not yet connected, and no error: an event that came early.
        if self.stream.peer_addr().is_err() {
            return Ok(());
        }
        let syn = syn.take();
        self.pending = None;
        let _ = self.stream.set_nodelay(true);
        if let Some(syn) = syn {
            self.take(link, now, syn);
        }
        Ok(())
    }

    /// Takes a packet of the guest.
    pub(super) fn take(&mut self, link: &Link, now: Instant, mut packet: Packet) {
        if self.is_pending() {
            return;
        }
        let segment = &mut packet.frame[packet.payload.clone()];
        if segment[13] & SYN != 0
            && let Some(at) = mss_option(segment)
        {
            let named = u16::from_be_bytes([segment[at], segment[at + 1]]);
            self.mss = named.clamp(LEAST_MSS, link.mtu - 40);
            if self.mss >= DEFAULT_MSS && link.inbox.accepted().tso4 {
                segment[at..at + 2].copy_from_slice(&LARGEST_MSS.to_be_bytes());
            } else {
                segment[at..at + 2].copy_from_slice(&self.mss.to_be_bytes());
            }
        }
        self.mac = packet.mac;
        let ip = packet.ip.clone();
        let mut wire =
            Wire { link, mac: self.mac, mss: self.mss, incoming: Some(&packet.frame[ip]), full: false };
        let _ = self.interface.poll_ingress_single(now, &mut wire, &mut self.sockets);
    }

    /// Moves all that can be moved in both directions.
    pub(super) fn pump(&mut self, link: &Link, now: Instant) -> Fate {
        if self.is_pending() {
            return Fate::Lives(None);
        }
        let mut wire = Wire { link, mac: self.mac, mss: self.mss, incoming: None, full: false };
        loop {
            let mut moved = self.carry_out();
            moved |= self.carry_in();
            while self.interface.poll_egress(now, &mut wire, &mut self.sockets) != PollResult::None {}
            if self.over() {
                return Fate::Over;
            }
            if !moved {
                break;
            }
        }
        if wire.full {
            return Fate::Waits;
        }
        Fate::Lives(self.interface.poll_at(now, &self.sockets))
    }

    fn over(&mut self) -> bool {
        let done = self.guest_done && self.host_done;
        match self.socket().state() {
            // The host has not taken all that the guest had said before it left.
            State::Closed if self.guest_ended && !self.guest_done && !self.broken => false,
            State::Closed => {
                if !done {
                    // One end broke off: the host's is told so, and not that all was said.
                    let _ = rustix::net::sockopt::set_socket_linger(&self.stream, Some(Duration::ZERO));
                }
                true
            }
            State::TimeWait => done,
            _ => false,
        }
    }

    fn carry_out(&mut self) -> bool {
        let mut moved = false;
        let socket = self.sockets.get_mut::<Socket>(self.handle);
        while self.writable && socket.can_recv() {
            let stream = &mut self.stream;
            let result = socket.recv(|bytes| match stream.write(bytes) {
                Ok(count) => (count, Ok(count)),
                Err(error) => (0, Err(error)),
            });
            match result {
                Ok(Ok(_)) => moved = true,
                Ok(Err(error)) if error.kind() == ErrorKind::Interrupted => {}
                Ok(Err(error)) if error.kind() == ErrorKind::WouldBlock => self.writable = false,
                _ => {
                    socket.abort();
                    self.broken = true;
                    return true;
                }
            }
        }
        self.guest_ended |=
            matches!(socket.state(), State::CloseWait | State::LastAck | State::Closing | State::TimeWait);
        if self.guest_ended && !socket.can_recv() && !self.guest_done {
            let _ = self.stream.shutdown(Shutdown::Write);
            self.guest_done = true;
        }
        moved
    }

    fn carry_in(&mut self) -> bool {
        let mut moved = false;
        let socket = self.sockets.get_mut::<Socket>(self.handle);
        while self.readable && socket.can_send() {
            let stream = &mut self.stream;
            let result = socket.send(|room| match stream.read(room) {
                Ok(count) => (count, Ok(count)),
                Err(error) => (0, Err(error)),
            });
            match result {
                Ok(Ok(0)) => {
                    self.readable = false;
                    self.host_done = true;
                    socket.close();
                    moved = true;
                }
                Ok(Ok(_)) => moved = true,
                Ok(Err(error)) if error.kind() == ErrorKind::Interrupted => {}
                Ok(Err(error)) if error.kind() == ErrorKind::WouldBlock => self.readable = false,
                _ => {
                    socket.abort();
                    self.broken = true;
                    return true;
                }
            }
        }
        moved
    }

    /// Breaks the connection off at both ends.
    pub(super) fn abort(&mut self, link: &Link, now: Instant) {
        self.socket().abort();
        let mut wire = Wire { link, mac: self.mac, mss: self.mss, incoming: None, full: false };
        let _ = self.interface.poll_egress(now, &mut wire, &mut self.sockets);
        let _ = rustix::net::sockopt::set_socket_linger(&self.stream, Some(Duration::ZERO));
    }
}
