//! UDP between the guest and the host: one socket for each pair of ends of the guest's making, and one for each forward.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::time::{Duration, Instant};

use super::GATEWAY;
use super::gateway::QUOTE;
use super::link::{Link, UDP, short};
use super::tcp::Key;

/// The most datagrams taken from one socket before others have their turn.
const TURN: usize = 64;
/// How long a pair of ends is kept that is not used.
const IDLE: Duration = Duration::from_secs(120);
/// The same for questions to a name server, which come in great numbers.
const IDLE_DNS: Duration = Duration::from_secs(20);
/// The most peers of all forwards together.
const PEERS: usize = 256;
/// The ports that stand for them at the gateway's address.
const FIRST_PORT: u16 = 32768;

/// Writes a datagram for the guest.
fn deliver(link: &Link, mac: [u8; 6], from: SocketAddrV4, to: SocketAddrV4, data: &[u8]) {
    let mut bytes = Vec::with_capacity(8 + data.len());
    bytes.extend_from_slice(&from.port().to_be_bytes());
    bytes.extend_from_slice(&to.port().to_be_bytes());
    bytes.extend_from_slice(&short(8 + data.len()).to_be_bytes());
    bytes.extend_from_slice(&[0, 0]);
    bytes.extend_from_slice(data);
    link.ipv4(mac, (*from.ip(), *to.ip()), UDP, &bytes);
}

/// A pair of ends.
pub(super) struct Pair {
    pub(super) key: Key,
    pub(super) socket: UdpSocket,
    mac: [u8; 6],
    pub(super) used: Instant,
    /// The guest's last datagram, as far as an error message quotes it.
    quote: Vec<u8>,
}

impl Pair {
    /// # Errors
    /// The host has no socket for it, or no way there.
    pub(super) fn new(key: Key, mac: [u8; 6], host: SocketAddr, now: Instant) -> io::Result<Self> {
        let any: IpAddr =
            if host.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let socket = UdpSocket::bind((any, 0))?;
        socket.set_nonblocking(true)?;
        socket.connect(host)?;
        Ok(Self { key, socket, mac, used: now, quote: Vec::new() })
    }

    /// Sends what the guest sent; `ip` is the whole packet.
    pub(super) fn send(&mut self, mac: [u8; 6], ip: &[u8], data: &[u8], now: Instant) -> bool {
        self.mac = mac;
        self.used = now;
        self.quote.clear();
        self.quote.extend_from_slice(&ip[..ip.len().min(QUOTE)]);
        match self.socket.send(data) {
            // That was about the datagram before.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => self.socket.send(data).is_ok(),
            result => result.is_ok(),
        }
    }

    /// Gives the guest what has come. An error says that nobody listens there, with what the guest had sent.
    pub(super) fn receive(&mut self, link: &Link, room: &mut [u8], now: Instant) -> Result<(), Vec<u8>> {
        for _ in 0..TURN {
            match self.socket.recv(room) {
                Ok(length) => deliver(link, self.mac, self.key.remote, self.key.guest, &room[..length]),
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    return Err(std::mem::take(&mut self.quote));
                }
                Err(_) => break,
            }
            self.used = now;
        }
        Ok(())
    }

    pub(super) fn mac(&self) -> [u8; 6] {
        self.mac
    }

    pub(super) fn is_idle(&self, now: Instant) -> bool {
        let limit = if self.key.remote.port() == 53 { IDLE_DNS } else { IDLE };
        now.saturating_duration_since(self.used) > limit
    }
}

struct Peer {
    forward: usize,
    address: SocketAddr,
    used: Instant,
}

/// The forwards, and who uses them.
#[derive(Default)]
pub(super) struct Forwards {
    sockets: Vec<(UdpSocket, SocketAddrV4)>,
    peers: HashMap<u16, Peer>,
    ports: HashMap<(usize, SocketAddr), u16>,
    next: u16,
}

impl Forwards {
    pub(super) fn add(&mut self, socket: UdpSocket, guest: SocketAddrV4) {
        self.sockets.push((socket, guest));
    }

    /// Gives the guest what has come to a forward.
    pub(super) fn receive(
        &mut self,
        link: &Link,
        forward: usize,
        mac: [u8; 6],
        room: &mut [u8],
        now: Instant,
    ) {
        for _ in 0..TURN {
            let Some((socket, guest)) = self.sockets.get(forward) else { return };
            let guest = *guest;
            let Ok((length, address)) = socket.recv_from(room) else { return };
            let port = self.port(forward, address, now);
            deliver(link, mac, SocketAddrV4::new(GATEWAY, port), guest, &room[..length]);
        }
    }

    /// The port that stands for a peer.
    fn port(&mut self, forward: usize, address: SocketAddr, now: Instant) -> u16 {
        if let Some(&port) = self.ports.get(&(forward, address)) {
            if let Some(peer) = self.peers.get_mut(&port) {
                peer.used = now;
            }
            return port;
        }
        if self.peers.len() >= PEERS
            && let Some(oldest) = self.peers.iter().min_by_key(|(_, peer)| peer.used).map(|(port, _)| *port)
        {
            self.forget(oldest);
        }
        let port = loop {
            let port = FIRST_PORT + self.next % 16384;
            self.next = self.next.wrapping_add(1);
            // There are far fewer peers than ports.
            if !self.peers.contains_key(&port) {
                break port;
            }
        };
        self.peers.insert(port, Peer { forward, address, used: now });
        self.ports.insert((forward, address), port);
        port
    }

    fn forget(&mut self, port: u16) {
        if let Some(peer) = self.peers.remove(&port) {
            self.ports.remove(&(peer.forward, peer.address));
        }
    }

    /// Sends an answer of the guest to the peer that `port` stands for. `None` if it stands for none.
    pub(super) fn answer(
        &mut self,
        guest: SocketAddrV4,
        port: u16,
        data: &[u8],
        now: Instant,
    ) -> Option<bool> {
        let peer = self.peers.get_mut(&port)?;
        let (socket, end) = self.sockets.get(peer.forward)?;
        if *end != guest {
            return None;
        }
        peer.used = now;
        Some(socket.send_to(data, peer.address).is_ok())
    }

    pub(super) fn sweep(&mut self, now: Instant) {
        let idle: Vec<u16> = self
            .peers
            .iter()
            .filter(|(_, peer)| now.saturating_duration_since(peer.used) > IDLE)
            .map(|(port, _)| *port)
            .collect();
        for port in idle {
            self.forget(port);
        }
    }

    pub(super) fn is_idle(&self) -> bool {
        self.peers.is_empty()
    }
}
