//! A guest for tests: a network card over a port, and smoltcp as its kernel.
#![allow(dead_code, unreachable_pub, reason = "each test program uses a part of it")]
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{self, Device, DeviceCapabilities, Medium};
use smoltcp::socket::tcp;
use smoltcp::time::Instant as Tick;
use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, HardwareAddress, IpAddress, IpCidr, IpProtocol,
    Ipv4Packet, TcpPacket,
};
use tenon_core::{Buffers, FRAME_HEADER, NetworkPort, Offloads, PortNews, Ram};

pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
pub const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
/// Nothing in these tests takes so long unless it has failed.
pub const LONG: Duration = Duration::from_secs(20);

pub const ALL: Offloads = Offloads { checksum: true, tso4: true, tso6: false };

/// Counts what a port's watch says, and waits for it.
#[derive(Default)]
pub struct Bell {
    rings: Mutex<u64>,
    rung: Condvar,
}

impl Bell {
    pub fn on(port: &dyn NetworkPort) -> Arc<Self> {
        let bell = Arc::new(Self::default());
        let rings = bell.clone();
        port.watch(Box::new(move |news| {
            if news == PortNews::Frames {
                rings.ring();
            }
        }));
        bell
    }

    fn ring(&self) {
        *self.rings.lock().unwrap() += 1;
        self.rung.notify_all();
    }

    pub fn heard(&self) -> u64 {
        *self.rings.lock().unwrap()
    }

    /// Waits until it has rung more than `before` times, or the time is over.
    pub fn wait(&self, before: u64, most: Duration) {
        let rings = self.rings.lock().unwrap();
        drop(self.rung.wait_timeout_while(rings, most, |rings| *rings <= before).unwrap());
    }
}

/// Puts bytes into guest memory, in several parts as drivers do.
pub fn buffers(ram: &Arc<Ram>, bytes: &[u8]) -> Buffers {
    let mut row = Buffers::new(ram);
    let (mut left, mut address) = (bytes.len() as u64, 0x1000_u64);
    for most in [12, 14, 4096, u64::MAX] {
        let part = left.min(most);
        row.push(address, part).unwrap();
        address += part + 64;
        left -= part;
    }
    assert_eq!(row.write(0, bytes), bytes.len());
    row
}

/// The guest's network card.
pub struct Nic {
    pub port: Arc<dyn NetworkPort>,
    pub ram: Arc<Ram>,
    pub offloads: Offloads,
    pub bell: Arc<Bell>,
    held: VecDeque<Vec<u8>>,
    /// Frames that came larger than the MTU, and that left so.
    pub large_in: usize,
    pub large_out: usize,
    mtu: usize,
}

pub struct RxToken(Vec<u8>);

impl phy::RxToken for RxToken {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

pub struct TxToken<'a> {
    nic: &'a mut Nic,
}

/// The TCP segment of an Ethernet frame, for whoever changes its options.
fn mss_place(ethernet: &[u8]) -> Option<usize> {
    let frame = EthernetFrame::new_checked(ethernet).ok()?;
    if frame.ethertype() != EthernetProtocol::Ipv4 {
        return None;
    }
    let ip = Ipv4Packet::new_checked(frame.payload()).ok()?;
    let tcp = TcpPacket::new_checked(ip.payload()).ok().filter(|_| ip.next_header() == IpProtocol::Tcp)?;
    // Both stacks put it first.
    let at = 14 + usize::from(ip.header_len()) + 20;
    (tcp.syn() && ethernet[at] == 2).then_some(at + 2)
}

impl Nic {
    pub fn new(port: Arc<dyn NetworkPort>, offloads: Offloads) -> Self {
        port.accept(offloads);
        let bell = Bell::on(&*port);
        let mtu = usize::from(port.info().mtu);
        Self {
            port,
            ram: Ram::new(1 << 20).unwrap(),
            offloads,
            bell,
            held: VecDeque::new(),
            large_in: 0,
            large_out: 0,
            mtu,
        }
    }

    /// Sends a frame that begins with the header of virtio-net.
    pub fn send(&self, frame: &[u8]) -> bool {
        self.port.send(&buffers(&self.ram, frame))
    }

    /// Sends an Ethernet frame with nothing left to the device.
    pub fn send_plain(&self, ethernet: &[u8]) -> bool {
        self.send(&[&[0; FRAME_HEADER][..], ethernet].concat())
    }

    /// Takes a frame as a driver does: in the length that was announced. Gives the Ethernet frame with its checksums.
    pub fn take(&mut self) -> Option<Vec<u8>> {
        let mut lengths = Vec::new();
        self.port.waiting(2, &mut lengths);
        let length = *lengths.first()?;
        let frame = self.port.receive().unwrap();
        assert_eq!(frame.len(), length as usize);
        let (header, ethernet) = frame.split_at(FRAME_HEADER);
        let mut ethernet = ethernet.to_vec();
        let large = ethernet.len() > self.mtu + 14;
        assert!(!large || self.offloads.tso4 && header[1] == 1, "a large frame that nobody accepts");
        self.large_in += usize::from(large);
        if header[0] & 1 != 0 {
            assert!(self.offloads.checksum, "a checksum is left out, which nobody accepts");
            assert_eq!((header[6], header[8]), (34, 16), "the checksum of TCP behind a short IPv4 header");
            let mut frame = EthernetFrame::new_checked(&mut ethernet).unwrap();
            let mut ip = Ipv4Packet::new_checked(frame.payload_mut()).unwrap();
            let (from, to) = (ip.src_addr(), ip.dst_addr());
            let mut tcp = TcpPacket::new_checked(ip.payload_mut()).unwrap();
            tcp.fill_checksum(&from.into(), &to.into());
        }
        Some(ethernet)
    }

    fn transmit(&mut self, mut ethernet: Vec<u8>) {
        let mut header = [0; FRAME_HEADER];
        if self.offloads.checksum {
            let mut frame = EthernetFrame::new_checked(&mut ethernet).unwrap();
            if frame.ethertype() == EthernetProtocol::Ipv4 {
                let mut ip = Ipv4Packet::new_checked(frame.payload_mut()).unwrap();
                if ip.next_header() == IpProtocol::Tcp {
                    let addresses = [ip.src_addr().octets(), ip.dst_addr().octets()].concat();
                    let length = ip.payload_mut().len() as u32;
                    let sum =
                        addresses.chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(w[1])).sum::<u32>()
                            + 6
                            + length;
                    let sum = (sum & 0xffff) + (sum >> 16);
                    let sum = ((sum & 0xffff) + (sum >> 16)) as u16;
                    ip.payload_mut()[16..18].copy_from_slice(&sum.to_be_bytes());
                    header[0] = 1;
                    header[6] = 34;
                    header[8] = 16;
                }
            }
        }
        if ethernet.len() > self.mtu + 14 {
            assert!(self.offloads.tso4);
            header[1] = 1;
            header[2] = 54;
            header[4..6].copy_from_slice(&((self.mtu - 40) as u16).to_le_bytes());
            self.large_out += 1;
        }
        // What finds no room is lost, as on a wire.
        let _ = self.send(&[&header[..], &ethernet].concat());
    }
}

impl phy::TxToken for TxToken<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut ethernet = vec![0; length];
        let result = f(&mut ethernet);
        self.nic.transmit(ethernet);
        result
    }
}

impl Device for Nic {
    type RxToken<'a> = RxToken;
    type TxToken<'a> = TxToken<'a>;

    fn receive(&mut self, _: Tick) -> Option<(RxToken, TxToken<'_>)> {
        let mut ethernet = self.held.pop_front().or_else(|| self.take())?;
        if self.offloads.tso4
            && let Some(at) = mss_place(&ethernet)
        {
            // As a kernel would: the size in the SYN is for the wire, the card takes more at once.
            ethernet[at..at + 2].copy_from_slice(&60000_u16.to_be_bytes());
            let mut frame = EthernetFrame::new_checked(&mut ethernet).unwrap();
            let mut ip = Ipv4Packet::new_checked(frame.payload_mut()).unwrap();
            let (from, to) = (ip.src_addr(), ip.dst_addr());
            TcpPacket::new_checked(ip.payload_mut()).unwrap().fill_checksum(&from.into(), &to.into());
        }
        Some((RxToken(ethernet), TxToken { nic: self }))
    }

    fn transmit(&mut self, _: Tick) -> Option<TxToken<'_>> {
        Some(TxToken { nic: self })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = if self.offloads.tso4 { 60014 } else { self.mtu + 14 };
        capabilities
    }
}

/// The guest.
pub struct Guest {
    pub nic: Nic,
    pub interface: Interface,
    pub sockets: SocketSet<'static>,
    start: Instant,
    next_port: u16,
}

impl Guest {
    /// A guest with a fixed address.
    pub fn new(port: Arc<dyn NetworkPort>, offloads: Offloads) -> Self {
        let mut guest = Self::bare(port, offloads);
        guest.configure(GUEST, GATEWAY);
        guest
    }

    /// A guest without an address.
    pub fn bare(port: Arc<dyn NetworkPort>, offloads: Offloads) -> Self {
        let mac = port.info().mac;
        let mut nic = Nic::new(port, offloads);
        let mut config = Config::new(HardwareAddress::Ethernet(EthernetAddress(mac)));
        config.random_seed = 7;
        let interface = Interface::new(config, &mut nic, Tick::ZERO);
        let sockets = SocketSet::new(Vec::new());
        Self { nic, interface, sockets, start: Instant::now(), next_port: 40000 }
    }

    pub fn configure(&mut self, address: Ipv4Addr, gateway: Ipv4Addr) {
        self.interface.update_ip_addrs(|addresses| {
            addresses.clear();
            addresses.push(IpCidr::new(IpAddress::Ipv4(address), 24)).unwrap();
        });
        self.interface.routes_mut().add_default_ipv4_route(gateway).unwrap();
    }

    fn tick(&self) -> Tick {
        Tick::from_micros(self.start.elapsed().as_micros() as i64)
    }

    /// Lets the guest run until `done` gives something.
    pub fn run<T>(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> Option<T>) -> T {
        let began = Instant::now();
        loop {
            let heard = self.nic.bell.heard();
            self.interface.poll(self.tick(), &mut self.nic, &mut self.sockets);
            if let Some(result) = done(self) {
                return result;
            }
            self.interface.poll(self.tick(), &mut self.nic, &mut self.sockets);
            assert!(began.elapsed() < LONG, "{what} has not come to pass");
            let delay = self.interface.poll_delay(self.tick(), &self.sockets);
            let delay = delay.map_or(Duration::from_millis(100), |d| Duration::from_micros(d.total_micros()));
            let mut lengths = Vec::new();
            self.nic.port.waiting(1, &mut lengths);
            if lengths.is_empty() {
                self.nic.bell.wait(heard, delay.min(Duration::from_millis(100)));
            }
        }
    }

    pub fn tcp_socket() -> tcp::Socket<'static> {
        let buffer = || tcp::SocketBuffer::new(vec![0; 256 << 10]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        socket
    }

    pub fn connect(&mut self, to: SocketAddrV4) -> SocketHandle {
        let handle = self.sockets.add(Self::tcp_socket());
        self.next_port += 1;
        let socket = self.sockets.get_mut::<tcp::Socket>(handle);
        socket.connect(self.interface.context(), (*to.ip(), to.port()), self.next_port).unwrap();
        handle
    }

    pub fn listen(&mut self, port: u16) -> SocketHandle {
        let handle = self.sockets.add(Self::tcp_socket());
        self.sockets.get_mut::<tcp::Socket>(handle).listen(port).unwrap();
        handle
    }

    pub fn tcp(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// Sends all of `bytes`, and then says that that was all.
    pub fn upload(&mut self, handle: SocketHandle, bytes: &[u8]) {
        let mut sent = 0;
        self.run("the upload", |guest| {
            let socket = guest.tcp(handle);
            if socket.can_send() {
                sent += socket.send_slice(&bytes[sent..]).unwrap();
            }
            (sent == bytes.len()).then(|| socket.close())
        });
    }

    /// Reads until the other end says that that was all.
    pub fn download(&mut self, handle: SocketHandle) -> Vec<u8> {
        let mut all = Vec::new();
        self.run("the download", |guest| {
            let socket = guest.tcp(handle);
            while socket.can_recv() {
                socket
                    .recv(|bytes| {
                        all.extend_from_slice(bytes);
                        (bytes.len(), ())
                    })
                    .unwrap();
            }
            let opened =
                !matches!(socket.state(), tcp::State::SynSent | tcp::State::Listen | tcp::State::SynReceived);
            (opened && !socket.may_recv()).then_some(())
        });
        all
    }
}

/// Bytes that repeat nowhere soon.
pub fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = Random(seed);
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        bytes.extend_from_slice(&state.next().to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}
