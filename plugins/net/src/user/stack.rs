//! The user network's thread: takes the guest's frames apart, watches the host's sockets, and keeps time.
//!
//! It is longer than most files here because what it holds is one thing: the tables of connections and datagram pairs, which every frame, event and timer changes.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{Timespec, epoll};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use smoltcp::time::Instant as Tick;

use super::link::{ICMP, Link, PACKET, TCP, UDP, short};
use super::packet::{ACK, FIN, Packet, RST, SYN, Segment};
use super::tcp::{Fate, Flow, Key};
use super::udp::{Forwards, Pair};
use super::{DNS, GATEWAY, GUEST, MASK, Shared, UserConfig, gateway};
use crate::checksum;
use crate::poll::{BELL, Poll};
use crate::queue::Counts;

/// The most connections.
const FLOWS: usize = 512;
/// The most datagram pairs.
const PAIRS: usize = 256;
/// How often idle datagram pairs are looked for.
const SWEEP: Duration = Duration::from_secs(5);
/// The shortest time between two looks at a connection for the time's sake.
const SOON: smoltcp::time::Duration = smoltcp::time::Duration::from_millis(1);
/// The first port at the gateway's address that stands for a connection from outside.
const FIRST_PORT: u16 = 49152;

/// Where each kind of watched thing begins to count.
const LISTENERS: u64 = 1 << 32;
const FORWARDS: u64 = 2 << 32;
const OTHERS: u64 = 3 << 32;

pub(crate) struct Stack {
    shared: Arc<Shared>,
    link: Link,
    /// The guest's MAC address, until it names another.
    mac: [u8; 6],
    restrict: bool,
    dns: Option<SocketAddr>,
    poll: Poll,
    start: Instant,
    now: Instant,
    next: u64,
    seed: u64,
    events: u64,
    listeners: Vec<(TcpListener, SocketAddrV4)>,
    flows: HashMap<u64, Flow>,
    keys: HashMap<Key, u64>,
    /// Connections to look at in this round.
    dirty: VecDeque<u64>,
    /// Connections that wait for the guest to take frames.
    blocked: VecDeque<u64>,
    timers: BTreeSet<(Tick, u64)>,
    pairs: HashMap<u64, Pair>,
    pair_keys: HashMap<Key, u64>,
    forwards: Forwards,
    swept: Instant,
    port: u16,
    room: Vec<u8>,
}

impl Stack {
    pub(crate) fn new(
        shared: Arc<Shared>,
        config: &UserConfig,
        listeners: Vec<(TcpListener, SocketAddrV4)>,
        sockets: Vec<(UdpSocket, SocketAddrV4)>,
    ) -> io::Result<Self> {
        let poll = Poll::new(&shared.bell)?;
        for (number, (listener, _)) in (0_u64..).zip(&listeners) {
            // By edge: a connection that cannot be taken must not keep the thread awake.
            poll.add(listener, LISTENERS + number, epoll::EventFlags::IN | epoll::EventFlags::ET)?;
        }
        let mut forwards = Forwards::default();
        for (number, (socket, guest)) in (0_u64..).zip(sockets) {
            poll.add(&socket, FORWARDS + number, epoll::EventFlags::IN)?;
            forwards.add(socket, guest);
        }
        let mut seed = [0; 8];
        let read = rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty())?;
        debug_assert_eq!(read, seed.len());
        let link = Link { inbox: shared.inbox.clone(), counts: shared.counts.clone(), mtu: config.mtu };
        let now = Instant::now();
        Ok(Self {
            shared,
            link,
            mac: config.mac,
            restrict: config.restrict,
            dns: config.dns,
            poll,
            start: now,
            now,
            next: OTHERS,
            seed: u64::from_ne_bytes(seed),
            events: 0,
            listeners,
            flows: HashMap::new(),
            keys: HashMap::new(),
            dirty: VecDeque::new(),
            blocked: VecDeque::new(),
            timers: BTreeSet::new(),
            pairs: HashMap::new(),
            pair_keys: HashMap::new(),
            forwards,
            swept: now,
            port: 0,
            room: vec![0; 65536],
        })
    }

    /// Takes one frame beside a connection to port 22 of the guest, and does what follows from it, without waiting for anything.
    pub(crate) fn try_frame(&mut self, stream: TcpStream, frame: Vec<u8>) {
        self.adopt(SocketAddrV4::new(GUEST, 22), stream);
        self.work();
        let _ = self.frame(frame);
        self.work();
    }

    fn work(&mut self) {
        while let Some(id) = self.dirty.pop_front() {
            self.pump(id);
        }
    }

    /// Runs until the port is dropped.
    pub(super) fn run(mut self) {
        let mut events = Vec::new();
        while !self.shared.bell.stopped() {
            if let Err(error) = self.poll.wait(&mut events, self.timeout()) {
                tracing::error!(%error, "the user network cannot wait for its sockets, and stops");
                return;
            }
            self.now = Instant::now();
            for event in &events {
                let (token, flags) = (event.data.u64(), event.flags);
                self.event(token, flags);
            }
            for frame in self.shared.outbox.take() {
                if self.frame(frame).is_none() {
                    Counts::add(&self.shared.counts.send_dropped);
                }
            }
            self.expire();
            if !self.blocked.is_empty() && self.link.inbox.has_room() {
                for id in std::mem::take(&mut self.blocked) {
                    if let Some(flow) = self.flows.get_mut(&id)
                        && !std::mem::replace(&mut flow.queued, true)
                    {
                        self.dirty.push_back(id);
                    }
                }
            }
            self.work();
        }
    }

    fn tick(&self) -> Tick {
        let micros = self.now.saturating_duration_since(self.start).as_micros();
        Tick::from_micros(i64::try_from(micros).unwrap_or(i64::MAX))
    }

    fn timeout(&self) -> Option<Timespec> {
        let sweep = (!self.pairs.is_empty() || !self.forwards.is_idle())
            .then(|| (self.swept + SWEEP).saturating_duration_since(Instant::now()));
        let timer = self.timers.first().map(|(at, _)| {
            let at = Duration::from_micros(u64::try_from(at.total_micros()).unwrap_or(0));
            // The timers of TCP are coarse; a microsecond more keeps a rounded one from coming early.
            (self.start + at + Duration::from_micros(1)).saturating_duration_since(Instant::now())
        });
        let least = match (sweep, timer) {
            (Some(sweep), Some(timer)) => sweep.min(timer),
            (sweep, timer) => sweep.or(timer)?,
        };
        Timespec::try_from(least).ok()
    }

    fn event(&mut self, token: u64, flags: epoll::EventFlags) {
        use epoll::EventFlags as Flags;
        if token == BELL {
            self.shared.bell.silence();
        } else if token < FORWARDS {
            self.take_connections(usize::try_from(token - LISTENERS).unwrap_or(0));
        } else if token < OTHERS {
            let forward = usize::try_from(token - FORWARDS).unwrap_or(0);
            self.forwards.receive(&self.link, forward, self.mac, &mut self.room, self.now);
        } else if self.flows.contains_key(&token) {
            let broken = flags.intersects(Flags::ERR | Flags::HUP);
            let readable = broken || flags.intersects(Flags::IN | Flags::RDHUP);
            self.flow_ready(token, readable, broken || flags.contains(Flags::OUT));
        } else if let Some(pair) = self.pairs.get_mut(&token)
            && let Err(quote) = pair.receive(&self.link, &mut self.room, self.now)
        {
            let (mac, key) = (pair.mac(), pair.key);
            gateway::unreachable(&self.link, mac, *key.remote.ip(), *key.guest.ip(), 3, &quote);
        }
    }

    fn flow_ready(&mut self, id: u64, readable: bool, writable: bool) {
        let tick = self.tick();
        let Some(flow) = self.flows.get_mut(&id) else { return };
        flow.ready(readable, writable);
        match flow.connected(&self.link, tick) {
            Ok(()) => self.touch(id),
            Err(syn) => {
                if let Some(segment) = syn.as_ref().and_then(Packet::tcp) {
                    self.refuse(flow_mac(syn.as_ref()), &segment);
                }
                self.remove(id);
            }
        }
    }

    /// Notes that a connection is to be looked at.
    fn touch(&mut self, id: u64) {
        self.events += 1;
        if let Some(flow) = self.flows.get_mut(&id) {
            flow.used = self.events;
            if !std::mem::replace(&mut flow.queued, true) {
                self.dirty.push_back(id);
            }
        }
    }

    fn pump(&mut self, id: u64) {
        let tick = self.tick();
        let Some(flow) = self.flows.get_mut(&id) else { return };
        flow.queued = false;
        let fate = flow.pump(&self.link, tick);
        let deadline = match fate {
            // However early the stack wants to be asked again: not before all else had its turn.
            Fate::Lives(deadline) => deadline.map(|at| at.max(tick + SOON)),
            Fate::Waits => {
                if !self.blocked.contains(&id) {
                    self.blocked.push_back(id);
                }
                None
            }
            Fate::Over => {
                self.remove(id);
                return;
            }
        };
        if flow.deadline != deadline {
            if let Some(before) = flow.deadline {
                self.timers.remove(&(before, id));
            }
            if let Some(at) = deadline {
                self.timers.insert((at, id));
            }
            flow.deadline = deadline;
        }
    }

    fn expire(&mut self) {
        let tick = self.tick();
        while let Some(&(at, id)) = self.timers.first() {
            if at > tick {
                break;
            }
            self.timers.pop_first();
            if let Some(flow) = self.flows.get_mut(&id) {
                flow.deadline = None;
                if !std::mem::replace(&mut flow.queued, true) {
                    self.dirty.push_back(id);
                }
            }
        }
        if self.now.saturating_duration_since(self.swept) >= SWEEP {
            self.swept = self.now;
            self.forwards.sweep(self.now);
            let now = self.now;
            let idle: Vec<u64> =
                self.pairs.iter().filter(|(_, pair)| pair.is_idle(now)).map(|(id, _)| *id).collect();
            for id in idle {
                self.remove_pair(id);
            }
        }
    }

    fn remove(&mut self, id: u64) {
        if let Some(flow) = self.flows.remove(&id) {
            self.keys.remove(&flow.key);
            if let Some(at) = flow.deadline {
                self.timers.remove(&(at, id));
            }
        }
        self.blocked.retain(|blocked| *blocked != id);
    }

    fn remove_pair(&mut self, id: u64) {
        if let Some(pair) = self.pairs.remove(&id) {
            self.pair_keys.remove(&pair.key);
        }
    }

    /// Makes room for one more connection.
    fn make_room(&mut self) {
        if self.flows.len() < FLOWS {
            return;
        }
        if let Some(id) = self.flows.iter().min_by_key(|(_, flow)| flow.used).map(|(id, _)| *id) {
            let tick = self.tick();
            if let Some(flow) = self.flows.get_mut(&id) {
                flow.abort(&self.link, tick);
            }
            self.remove(id);
        }
    }

    /// Takes a frame of the guest. `None` if it has nowhere to go.
    fn frame(&mut self, frame: Vec<u8>) -> Option<()> {
        let ethertype = frame.get(PACKET - 2..PACKET)?;
        match [ethertype[0], ethertype[1]] {
            [0x08, 0x06] => {
                let (address, mac) = gateway::arp(&self.link, &frame[PACKET..])?;
                self.learn(address, mac);
                Some(())
            }
            [0x08, 0x00] => self.packet(Packet::parse(frame)?),
            _ => None,
        }
    }

    /// Remembers the guest's MAC address, for what comes from outside.
    fn learn(&mut self, address: Ipv4Addr, mac: [u8; 6]) {
        if address == GUEST && mac[0] & 1 == 0 {
            self.mac = mac;
        }
    }

    fn packet(&mut self, packet: Packet) -> Option<()> {
        if packet.protocol == UDP
            && (packet.to == Ipv4Addr::BROADCAST || packet.to == GATEWAY)
            && let Some((_, to, data)) = packet.udp()
            && to.port() == 67
        {
            return gateway::dhcp(&self.link, data);
        }
        let inside = |address: Ipv4Addr| address & MASK == GUEST & MASK;
        // Only what lives in this network speaks in it.
        if !inside(packet.source) || [GATEWAY, DNS].contains(&packet.source) {
            return None;
        }
        self.learn(packet.source, packet.mac);
        let own = [GATEWAY, DNS].contains(&packet.to);
        match packet.protocol {
            ICMP if own => gateway::icmp(&self.link, packet.mac, packet.source, packet.to, packet.bytes()),
            TCP => self.tcp(packet),
            UDP => self.udp(&packet),
            _ => None,
        }
    }

    /// Where in the host's world the guest's packet goes. `None` if it may not or cannot.
    fn outside(&self, to: SocketAddrV4) -> Option<SocketAddr> {
        let address = *to.ip();
        if self.restrict {
            return None;
        }
        if address == GATEWAY {
            return Some(SocketAddr::from((Ipv4Addr::LOCALHOST, to.port())));
        }
        if address == DNS {
            let dns = self.dns.or_else(name_server)?;
            return (to.port() == 53).then_some(dns);
        }
        // To connect to 0.0.0.0 would be to connect to the host itself.
        let nowhere = address.octets()[0] == 0
            || address.is_loopback()
            || address.is_multicast()
            || address.octets()[0] >= 240
            || address & MASK == GUEST & MASK;
        (!nowhere).then_some(SocketAddr::from(to))
    }

    fn tcp(&mut self, packet: Packet) -> Option<()> {
        let segment = packet.tcp()?;
        let key = Key { guest: segment.guest, remote: segment.remote };
        if let Some(&id) = self.keys.get(&key) {
            let tick = self.tick();
            let flow = self.flows.get_mut(&id)?;
            if flow.is_pending() && segment.flags & RST != 0 {
                self.remove(id);
                return Some(());
            }
            flow.take(&self.link, tick, packet);
            self.touch(id);
            return Some(());
        }
        if segment.flags & (SYN | ACK | RST | FIN) != SYN {
            // Of a connection that is no more.
            self.refuse(packet.mac, &segment);
            return Some(());
        }
        let Some(host) = self.outside(segment.remote) else {
            self.refuse(packet.mac, &segment);
            return None;
        };
        self.make_room();
        let Ok(stream) = connect(host) else {
            self.refuse(packet.mac, &segment);
            return None;
        };
        let (tick, seed, flows) = (self.tick(), self.random(), self.flows.len());
        let flow = Flow::outward(&self.link, key, packet, stream, tick, seed, flows);
        let id = self.insert(flow)?;
        // It may be connected already, or refused.
        self.touch(id);
        Some(())
    }

    fn random(&mut self) -> u64 {
        // SplitMix64: every connection begins its sequence numbers elsewhere.
        self.seed = self.seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.seed ^ (self.seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn insert(&mut self, flow: Flow) -> Option<u64> {
        use epoll::EventFlags as Flags;
        let id = self.next;
        self.next += 1;
        let flags = Flags::IN | Flags::OUT | Flags::RDHUP | Flags::ET;
        self.poll.add(flow.stream(), id, flags).ok()?;
        self.keys.insert(flow.key, id);
        self.flows.insert(id, flow);
        Some(id)
    }

    /// Answers a segment with a reset (RFC 9293 §3.10.7.1).
    fn refuse(&self, mac: [u8; 6], segment: &Segment) {
        if segment.flags & RST != 0 {
            return;
        }
        let mut bytes = [0; 20];
        bytes[..2].copy_from_slice(&segment.remote.port().to_be_bytes());
        bytes[2..4].copy_from_slice(&segment.guest.port().to_be_bytes());
        bytes[12] = 5 << 4;
        if segment.flags & ACK != 0 {
            bytes[4..8].copy_from_slice(&segment.acknowledgement.to_be_bytes());
            bytes[13] = RST;
        } else {
            let counted = u32::from(short(segment.length))
                + u32::from(segment.flags & SYN != 0)
                + u32::from(segment.flags & FIN != 0);
            bytes[8..12].copy_from_slice(&segment.sequence.wrapping_add(counted).to_be_bytes());
            bytes[13] = RST | ACK;
        }
        let addresses = (*segment.remote.ip(), *segment.guest.ip());
        let pseudo = [addresses.0.octets(), addresses.1.octets()].concat();
        let sum = checksum::pseudo_header(&pseudo, TCP, bytes.len()) + checksum::sum(&bytes);
        bytes[16..18].copy_from_slice(&checksum::finish(sum).to_be_bytes());
        self.link.ipv4(mac, addresses, TCP, &bytes);
    }

    /// Takes what is waiting at a listener.
    fn take_connections(&mut self, number: usize) {
        loop {
            let Some((listener, guest)) = self.listeners.get(number) else { return };
            let guest = *guest;
            let stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
                Err(error) => {
                    tracing::warn!(%error, "cannot take a forwarded connection");
                    return;
                }
            };
            if stream.set_nonblocking(true).is_ok() {
                self.adopt(guest, stream);
            }
        }
    }

    /// Carries a connection from outside on to the guest.
    fn adopt(&mut self, guest: SocketAddrV4, stream: TcpStream) {
        let _ = stream.set_nodelay(true);
        self.make_room();
        let key = loop {
            let remote = SocketAddrV4::new(GATEWAY, FIRST_PORT + self.port % 16384);
            self.port = self.port.wrapping_add(1);
            let key = Key { guest, remote };
            // There are far fewer connections than ports.
            if !self.keys.contains_key(&key) {
                break key;
            }
        };
        let (tick, seed, flows) = (self.tick(), self.random(), self.flows.len());
        let flow = Flow::inward(&self.link, key, self.mac, stream, tick, seed, flows);
        if let Some(id) = flow.and_then(|flow| self.insert(flow)) {
            self.touch(id);
        }
    }

    fn udp(&mut self, packet: &Packet) -> Option<()> {
        let (guest, remote, data) = packet.udp()?;
        let ip = &packet.frame[packet.ip.clone()];
        if *remote.ip() == GATEWAY
            && let Some(sent) = self.forwards.answer(guest, remote.port(), data, self.now)
        {
            return sent.then_some(());
        }
        let key = Key { guest, remote };
        if let Some(pair) = self.pair_keys.get(&key).and_then(|id| self.pairs.get_mut(id)) {
            return pair.send(packet.mac, ip, data, self.now).then_some(());
        }
        let host = self.outside(remote)?;
        if self.pairs.len() >= PAIRS
            && let Some(id) = self.pairs.iter().min_by_key(|(_, pair)| pair.used).map(|(id, _)| *id)
        {
            self.remove_pair(id);
        }
        let Ok(mut pair) = Pair::new(key, packet.mac, host, self.now) else {
            gateway::unreachable(&self.link, packet.mac, GATEWAY, packet.source, 1, ip);
            return None;
        };
        let id = self.next;
        self.next += 1;
        self.poll.add(&pair.socket, id, epoll::EventFlags::IN).ok()?;
        let sent = pair.send(packet.mac, ip, data, self.now);
        self.pair_keys.insert(key, id);
        self.pairs.insert(id, pair);
        sent.then_some(())
    }
}

fn flow_mac(syn: Option<&Packet>) -> [u8; 6] {
    syn.map_or([0xff; 6], |packet| packet.mac)
}

/// Begins to connect to `host`.
fn connect(host: SocketAddr) -> io::Result<TcpStream> {
    let family = if host.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&socket, &host) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => Ok(socket.into()),
        Err(error) => Err(error.into()),
    }
}

/// The first name server that the host uses itself. It is read again for each question: hosts move between networks.
fn name_server() -> Option<SocketAddr> {
    let text = std::fs::read_to_string("/etc/resolv.conf").ok()?;
    text.lines().find_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let address: IpAddr = (words.next()? == "nameserver").then(|| words.next())??.parse().ok()?;
        Some(SocketAddr::new(address, 53))
    })
}
