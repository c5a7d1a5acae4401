//! Two machines on a cable, and what its other end sees of frames that ask for work.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test that cannot go on fails")]

mod common;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::thread;

use common::{Bell, Guest, LONG, Nic, Random, noise};
use smoltcp::socket::tcp;
use smoltcp::wire::{Ipv4Packet, TcpPacket};
use tenon_core::{FRAME_HEADER, NetworkPort, Offloads, PortNews};
use tenon_net::{open, parse};

fn port(text: &str, path: &Path) -> Arc<dyn NetworkPort> {
    open(&parse(&format!("socket,{text}={}", path.display())).unwrap()).unwrap()
}

/// A port, and a plain socket at its other end.
fn raw() -> (Arc<dyn NetworkPort>, UnixStream, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cable");
    let port = port("listen", &path);
    let (told, news) = mpsc::channel();
    port.watch(Box::new(move |what| told.send(what).unwrap_or(())));
    let peer = UnixStream::connect(&path).unwrap();
    peer.set_read_timeout(Some(LONG)).unwrap();
    assert_eq!(news.recv_timeout(LONG), Ok(PortNews::Changed));
    assert!(port.info().link_up);
    (port, peer, folder)
}

fn read_frame(peer: &mut UnixStream) -> Vec<u8> {
    let mut length = [0; 4];
    peer.read_exact(&mut length).unwrap();
    let mut frame = vec![0; u32::from_be_bytes(length) as usize];
    peer.read_exact(&mut frame).unwrap();
    frame
}

#[test]
fn two_machines_exchange_megabytes_over_a_cable() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cable");
    let (one, other) = (Ipv4Addr::new(192, 168, 7, 1), Ipv4Addr::new(192, 168, 7, 2));
    let listening = port("id=one,listen", &path);
    let connecting = port("id=other,connect", &path);
    assert_ne!(listening.info().mac, connecting.info().mac);
    let server = thread::spawn(move || {
        let mut guest = Guest::bare(listening, Offloads::default());
        guest.configure(one, other);
        let listening = guest.listen(80);
        let got = guest.download(listening);
        guest.upload(listening, &noise(1_500_000, 2));
        guest.run("the end", |guest| (guest.tcp(listening).state() == tcp::State::Closed).then_some(()));
        got
    });
    let mut guest = Guest::bare(connecting, Offloads::default());
    guest.configure(other, one);
    let connection = guest.connect(SocketAddrV4::new(one, 80));
    guest.upload(connection, &noise(2_000_000, 1));
    assert!(guest.download(connection) == noise(1_500_000, 2));
    guest.run("the end", |guest| (guest.tcp(connection).state() == tcp::State::TimeWait).then_some(()));
    assert!(server.join().unwrap() == noise(2_000_000, 1));
}

#[test]
fn the_link_is_up_while_there_is_a_peer_and_a_new_one_is_taken() {
    let (port, peer, folder) = raw();
    let (told, news) = mpsc::channel();
    port.watch(Box::new(move |what| told.send(what).unwrap_or(())));
    drop(peer);
    assert_eq!(news.recv_timeout(LONG), Ok(PortNews::Changed));
    assert!(!port.info().link_up);
    let nic = Nic::new(port.clone(), Offloads::default());
    assert!(!nic.send_plain(&[1; 60]), "a frame is taken that has nowhere to go");
    let bell = mpsc::channel();
    port.watch(Box::new(move |what| bell.0.send(what).unwrap_or(())));
    let mut peer = UnixStream::connect(folder.path().join("cable")).unwrap();
    assert_eq!(bell.1.recv_timeout(LONG), Ok(PortNews::Changed));
    assert!(nic.send_plain(&[1; 60]));
    assert_eq!(read_frame(&mut peer), [1; 60]);
}

#[test]
fn a_peer_that_sends_no_frames_is_cut_off() {
    let (port, mut peer, _folder) = raw();
    peer.write_all(&70_000_u32.to_be_bytes()).unwrap();
    assert_eq!(peer.read(&mut [0; 1]).unwrap(), 0);
    drop(port);
}

#[test]
fn frames_that_come_in_pieces_come_whole_and_short_ones_not_at_all() {
    let (port, mut peer, _folder) = raw();
    let bell = Bell::on(&*port);
    let mut nothing = Vec::new();
    port.waiting(1, &mut nothing);
    assert!(nothing.is_empty());
    let mut stream = Vec::new();
    for length in [13_u32, 14, 1514, 65549] {
        stream.extend_from_slice(&length.to_be_bytes());
        stream.extend_from_slice(&noise(length as usize, u64::from(length)));
    }
    for piece in stream.chunks(777) {
        peer.write_all(piece).unwrap();
    }
    for length in [14, 1514, 65549] {
        let frame = loop {
            let heard = bell.heard();
            let mut lengths = Vec::new();
            port.waiting(1, &mut lengths);
            if let Some(length) = lengths.first() {
                let frame = port.receive().unwrap();
                assert_eq!(frame.len(), *length as usize);
                break frame;
            }
            bell.wait(heard, LONG);
        };
        assert!(frame[FRAME_HEADER..] == noise(length, length as u64));
        assert_eq!(frame[..FRAME_HEADER], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    }
    assert_eq!(port.counters().receive_dropped, 1);
}

#[test]
fn a_peer_that_takes_nothing_costs_a_bounded_number_of_frames() {
    let (port, peer, _folder) = raw();
    let nic = Nic::new(port.clone(), Offloads::default());
    let mut sent = 0_u64;
    // Until the row is full, with nobody to empty it.
    while port.counters().send_dropped < 1000 {
        sent += u64::from(nic.send_plain(&[2; 1514]));
    }
    assert!((100..20_000).contains(&sent), "{sent} frames wait");
    drop(peer);
}

/// A large segment as a driver makes one.
struct Large {
    v6: bool,
    vlan: bool,
    ip_options: usize,
    tcp_options: usize,
    flags: u8,
    sequence: u32,
    mss: usize,
    data: Vec<u8>,
}

impl Large {
    fn random(random: &mut Random) -> Self {
        let v6 = random.below(2) == 1;
        let size = 1 + if random.below(4) == 0 { random.below(60_000) } else { random.below(5000) };
        Self {
            v6,
            vlan: random.below(4) == 0,
            ip_options: if v6 { 0 } else { random.below(11) * 4 },
            tcp_options: random.below(11) * 4,
            flags: random.next() as u8 & !6,
            sequence: random.next() as u32,
            mss: 48 + random.below(1500),
            data: noise(size, random.next()),
        }
    }

    fn network(&self) -> usize {
        14 + usize::from(self.vlan) * 4
    }

    fn transport(&self) -> usize {
        self.network() + if self.v6 { 40 } else { 20 + self.ip_options }
    }

    fn frame(&self) -> Vec<u8> {
        let mut packet = vec![0xee; 12];
        if self.vlan {
            packet.extend_from_slice(&[0x81, 0, 0, 5]);
        }
        packet.extend_from_slice(if self.v6 { &[0x86, 0xdd] } else { &[8, 0] });
        let mut tcp = vec![0; 20];
        tcp[..4].copy_from_slice(&[0x12, 0x34, 0, 80]);
        tcp[4..8].copy_from_slice(&self.sequence.to_be_bytes());
        tcp[12] = ((5 + self.tcp_options / 4) << 4) as u8;
        tcp[13] = self.flags;
        tcp.resize(20 + self.tcp_options, 1);
        tcp.extend_from_slice(&self.data);
        let (source, destination) =
            (noise(if self.v6 { 16 } else { 4 }, 8), noise(if self.v6 { 16 } else { 4 }, 9));
        let mut sum = 6 + tcp.len() as u32;
        for word in source.chunks(2).chain(destination.chunks(2)) {
            sum += u32::from(word[0]) << 8 | u32::from(word[1]);
        }
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        tcp[16..18].copy_from_slice(&(sum as u16).to_be_bytes());
        if self.v6 {
            packet.extend_from_slice(&[0x60, 0, 0, 0]);
            packet.extend_from_slice(&(tcp.len() as u16).to_be_bytes());
            packet.extend_from_slice(&[6, 64]);
        } else {
            let length = 20 + self.ip_options;
            packet.extend_from_slice(&[0x40 | (length / 4) as u8, 0]);
            packet.extend_from_slice(&((length + tcp.len()) as u16).to_be_bytes());
            packet.extend_from_slice(&[0xff, 0xfe, 0x40, 0, 64, 6, 0, 0]);
        }
        packet.extend_from_slice(&source);
        packet.extend_from_slice(&destination);
        packet.resize(packet.len() + self.ip_options, 1);
        packet.extend_from_slice(&tcp);
        let mut frame = vec![0; FRAME_HEADER];
        frame[0] = 1;
        frame[1] = if self.v6 { 4 } else { 1 };
        // A hint that nobody may believe.
        frame[2..4].copy_from_slice(&0xffff_u16.to_le_bytes());
        frame[4..6].copy_from_slice(&(self.mss as u16).to_le_bytes());
        frame[6..8].copy_from_slice(&(self.transport() as u16).to_le_bytes());
        frame[8] = 16;
        frame.extend_from_slice(&packet);
        frame
    }

    fn check(&self, parts: &[Vec<u8>]) {
        let mut data = Vec::new();
        for (number, part) in parts.iter().enumerate() {
            assert_eq!(part[..self.network()], self.frame()[FRAME_HEADER..][..self.network()]);
            let (ip, transport) = (&part[self.network()..], &part[self.transport()..]);
            let tcp = TcpPacket::new_checked(transport).unwrap();
            if self.v6 {
                let ip = smoltcp::wire::Ipv6Packet::new_checked(ip).unwrap();
                assert_eq!(ip.total_len(), part.len() - self.network());
                assert!(tcp.verify_checksum(&ip.src_addr().into(), &ip.dst_addr().into()));
            } else {
                let ip = Ipv4Packet::new_checked(ip).unwrap();
                assert_eq!(usize::from(ip.total_len()), part.len() - self.network());
                assert!(ip.verify_checksum(), "the IPv4 header's checksum");
                assert_eq!(ip.ident(), 0xfffe_u16.wrapping_add(number as u16));
                assert!(tcp.verify_checksum(&ip.src_addr().into(), &ip.dst_addr().into()));
            }
            let sequence = self.sequence.wrapping_add(data.len() as u32);
            assert_eq!(tcp.seq_number().0.cast_unsigned(), sequence);
            let last = number + 1 == parts.len();
            assert!(tcp.payload().len() == self.mss || last, "a short part in the middle");
            assert!((1..=self.mss).contains(&tcp.payload().len()));
            let keep = if last { 0xff } else { !0x09 } & if number == 0 { 0xff } else { !0x80 };
            assert_eq!(transport[13], self.flags & keep);
            data.extend_from_slice(tcp.payload());
        }
        assert!(data == self.data);
    }
}

#[test]
fn large_segments_reach_a_receiver_without_offloads_in_parts_that_are_right() {
    let (port, mut peer, _folder) = raw();
    let nic = Nic::new(port, Offloads::default());
    let mut random = Random(11);
    for _ in 0..1500 {
        let mut large = Large::random(&mut random);
        // The parts must find room in the row.
        large.mss = large.mss.max(large.data.len().div_ceil(900));
        assert!(nic.send(&large.frame()));
        let parts: Vec<_> =
            (0..large.data.len().div_ceil(large.mss)).map(|_| read_frame(&mut peer)).collect();
        large.check(&parts);
    }
}

#[test]
fn checksums_are_filled_in_for_a_receiver_that_takes_none() {
    let (port, mut peer, _folder) = raw();
    let nic = Nic::new(port, Offloads::default());
    let mut random = Random(12);
    for _ in 0..1000 {
        let large = Large::random(&mut random);
        let mut frame = large.frame();
        frame[1] = 0;
        assert!(nic.send(&frame));
        let part = read_frame(&mut peer);
        let sum = |start: usize| {
            let mut sum = 0_u32;
            for word in part[start..].chunks(2) {
                sum += u32::from(word[0]) << 8 | u32::from(word.get(1).copied().unwrap_or(0));
            }
            while sum > 0xffff {
                sum = (sum & 0xffff) + (sum >> 16);
            }
            sum
        };
        // With the complement of the pseudo-header in it, what remains is that of the pseudo-header alone.
        let partial =
            u16::from_be_bytes([frame[12 + large.transport() + 16], frame[12 + large.transport() + 17]]);
        assert_eq!((sum(large.transport()) + u32::from(partial)) % 0xffff, 0);
    }
}

#[test]
fn headers_that_lie_about_their_frame_are_refused() {
    let (port, mut peer, _folder) = raw();
    let nic = Nic::new(port.clone(), Offloads::default());
    let large = Large {
        v6: false,
        vlan: false,
        ip_options: 0,
        tcp_options: 0,
        flags: 0x10,
        sequence: 1,
        mss: 1000,
        data: noise(3000, 1),
    };
    let good = large.frame();
    let mut lies: Vec<(&str, Vec<u8>)> = Vec::new();
    let mut lie = |what, change: &dyn Fn(&mut Vec<u8>)| {
        let mut frame = good.clone();
        change(&mut frame);
        lies.push((what, frame));
    };
    lie("no header", &|f| f.truncate(5));
    lie("no Ethernet header", &|f| f.truncate(25));
    lie("longer than any packet", &|f| f.resize(12 + 18 + 65536, 0));
    lie("no checksum left out", &|f| f[0] = 0);
    lie("checksum in the Ethernet header", &|f| f[6] = 13);
    lie("checksum outside", &|f| f[6..8].copy_from_slice(&60000_u16.to_le_bytes()));
    lie("checksum to be put outside", &|f| f[8..10].copy_from_slice(&0xffff_u16.to_le_bytes()));
    lie("checksum not where TCP has it", &|f| f[8] = 6);
    lie("segments of nothing", &|f| f[4..6].fill(0));
    lie("segments of a byte", &|f| f[4..6].copy_from_slice(&1_u16.to_le_bytes()));
    lie("UDP to be cut up", &|f| f[1] = 3);
    lie("a kind that is not there", &|f| f[1] = 0x7f);
    lie("IPv6 that is IPv4", &|f| f[1] = 4);
    lie("not TCP", &|f| f[12 + 14 + 9] = 17);
    lie("a fragment", &|f| f[12 + 14 + 6] = 0x20);
    lie("IPv4 header of another length", &|f| f[12 + 14] = 0x46);
    lie("TCP header of another length", &|f| f[12 + 34 + 12] = 0x40);
    lie("TCP header only", &|f| f.truncate(12 + 54));
    for (number, (what, frame)) in lies.iter().enumerate() {
        assert!(!nic.send(frame), "{what}");
        assert_eq!(port.counters().send_dropped, number as u64 + 1);
    }
    assert!(nic.send(&good), "and the truth is not");
    let parts: Vec<_> = (0..3).map(|_| read_frame(&mut peer)).collect();
    large.check(&parts);
}
