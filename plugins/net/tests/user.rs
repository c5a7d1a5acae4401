//! The user network, as a guest and the host's programs see it.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test that cannot go on fails")]

mod common;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::thread;

use common::{ALL, GATEWAY, GUEST, Guest, LONG, MAC, noise};
use smoltcp::socket::{dhcpv4, icmp, tcp, udp};
use smoltcp::wire::{Icmpv4Packet, Icmpv4Repr, IpAddress};
use tenon_core::Offloads;
use tenon_net::{Forward, Protocol, UserConfig, UserNetwork};

fn config() -> UserConfig {
    UserConfig { mac: MAC, mtu: 1500, forwards: Vec::new(), restrict: false, dns: None }
}

fn network(config: &UserConfig) -> Arc<UserNetwork> {
    UserNetwork::new(config).unwrap()
}

fn at_gateway(address: SocketAddr) -> SocketAddrV4 {
    SocketAddrV4::new(GATEWAY, address.port())
}

fn udp_socket(port: u16) -> udp::Socket<'static> {
    let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 16], vec![0; 65536]);
    let mut socket = udp::Socket::new(buffer(), buffer());
    socket.bind(port).unwrap();
    socket
}

#[test]
fn a_guest_gets_its_address_by_dhcp_and_the_gateway_answers_its_pings() {
    let mut guest = Guest::bare(network(&config()), Offloads::default());
    let dhcp = guest.sockets.add(dhcpv4::Socket::new());
    let lease = guest.run("a lease", |guest| match guest.sockets.get_mut::<dhcpv4::Socket>(dhcp).poll() {
        Some(dhcpv4::Event::Configured(lease)) => {
            Some((lease.address, lease.router, lease.dns_servers.to_vec()))
        }
        _ => None,
    });
    assert_eq!((lease.0.address(), lease.0.prefix_len()), (GUEST, 24));
    assert_eq!(lease.1, Some(GATEWAY));
    assert_eq!(lease.2, [Ipv4Addr::new(10, 0, 2, 3)]);

    guest.configure(GUEST, GATEWAY);
    let buffer = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 4], vec![0; 4096]);
    let mut socket = icmp::Socket::new(buffer(), buffer());
    socket.bind(icmp::Endpoint::Ident(9)).unwrap();
    let ping = guest.sockets.add(socket);
    let question = Icmpv4Repr::EchoRequest { ident: 9, seq_no: 5, data: b"are you there" };
    let socket = guest.sockets.get_mut::<icmp::Socket>(ping);
    let room = socket.send(question.buffer_len(), IpAddress::Ipv4(GATEWAY)).unwrap();
    question.emit(&mut Icmpv4Packet::new_unchecked(room), &Default::default());
    guest.run("the answer to a ping", |guest| {
        let (bytes, from) = guest.sockets.get_mut::<icmp::Socket>(ping).recv().ok()?;
        let packet = Icmpv4Packet::new_checked(bytes).unwrap();
        let answer = Icmpv4Repr::parse(&packet, &Default::default()).unwrap();
        assert_eq!(from, IpAddress::Ipv4(GATEWAY));
        assert_eq!(answer, Icmpv4Repr::EchoReply { ident: 9, seq_no: 5, data: b"are you there" });
        Some(())
    });
}

fn upload_and_download(offloads: Offloads, large: bool) {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = server.local_addr().unwrap();
    let (up, down) = (noise(5_000_003, 1), noise(7_000_001, 2));
    let answer = down.clone();
    let host = thread::spawn(move || {
        let (mut stream, _) = server.accept().unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        stream.write_all(&answer).unwrap();
        all
    });
    let mut guest = Guest::new(network(&config()), offloads);
    let connection = guest.connect(at_gateway(address));
    guest.upload(connection, &up);
    assert!(guest.download(connection) == down, "what came down is not what was sent");
    assert!(host.join().unwrap() == up, "what went up is not what was sent");
    assert_eq!(guest.nic.large_in > 10, large, "{} large frames came", guest.nic.large_in);
    assert_eq!(guest.nic.large_out > 10, large, "{} large frames left", guest.nic.large_out);
}

#[test]
fn tcp_carries_megabytes_both_ways_without_offloads() {
    upload_and_download(Offloads::default(), false);
}

#[test]
fn tcp_carries_megabytes_both_ways_in_large_segments() {
    upload_and_download(ALL, true);
}

#[test]
fn tcp_carries_megabytes_with_only_checksums_left_out() {
    upload_and_download(Offloads { checksum: true, ..Offloads::default() }, false);
}

#[test]
fn a_host_that_ends_first_can_still_be_written_to() {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = server.local_addr().unwrap();
    let host = thread::spawn(move || {
        let (mut stream, _) = server.accept().unwrap();
        stream.write_all(b"that is all from me").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        all
    });
    let mut guest = Guest::new(network(&config()), ALL);
    let connection = guest.connect(at_gateway(address));
    assert_eq!(guest.download(connection), b"that is all from me");
    guest.upload(connection, b"and from me");
    guest.run("the end", |guest| (guest.tcp(connection).state() != tcp::State::LastAck).then_some(()));
    assert_eq!(host.join().unwrap(), b"and from me");
}

#[test]
fn a_port_where_nobody_listens_refuses_the_guest() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut guest = Guest::new(network(&config()), ALL);
    let connection = guest.connect(at_gateway(free));
    guest.run("the refusal", |guest| (guest.tcp(connection).state() == tcp::State::Closed).then_some(()));
}

#[test]
fn a_connection_that_one_end_breaks_off_breaks_at_the_other() {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = server.local_addr().unwrap();
    let mut guest = Guest::new(network(&config()), ALL);
    let connection = guest.connect(at_gateway(address));
    guest.run("the connection", |guest| guest.tcp(connection).may_send().then_some(()));
    let (mut stream, _) = server.accept().unwrap();
    stream.set_read_timeout(Some(LONG)).unwrap();
    guest.tcp(connection).abort();
    guest.run("the break", |guest| (!guest.tcp(connection).is_open()).then_some(()));
    let error = stream.read(&mut [0; 1]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);

    let connection = guest.connect(at_gateway(address));
    guest.run("the second connection", |guest| guest.tcp(connection).may_send().then_some(()));
    let (stream, _) = server.accept().unwrap();
    // What was not read when a socket is closed breaks its connection.
    guest.tcp(connection).send_slice(b"unread").unwrap();
    guest.run("the bytes' departure", |guest| (guest.tcp(connection).send_queue() == 0).then_some(()));
    let mut byte = [0; 1];
    assert_eq!(stream.peek(&mut byte).unwrap(), 1);
    drop(stream);
    guest
        .run("the second break", |guest| (guest.tcp(connection).state() == tcp::State::Closed).then_some(()));
}

#[test]
fn a_forward_leads_from_the_host_to_the_guest() {
    let host = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0);
    let guest_end = SocketAddrV4::new(GUEST, 22);
    let tcp = Forward { protocol: Protocol::Tcp, host, guest: guest_end };
    let network = network(&UserConfig { forwards: vec![tcp], restrict: true, ..config() });
    let address = network.forwards()[0].1;
    let mut guest = Guest::new(network.clone(), ALL);
    let listening = guest.listen(22);
    let client = thread::spawn(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(&noise(300_000, 3)).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        all
    });
    assert!(guest.download(listening) == noise(300_000, 3));
    guest.upload(listening, b"welcome");
    guest.run("the end", |guest| (guest.tcp(listening).state() == tcp::State::Closed).then_some(()));
    assert_eq!(client.join().unwrap(), b"welcome");
}

#[test]
fn a_udp_forward_tells_its_peers_apart() {
    let host = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0);
    let guest_end = SocketAddrV4::new(GUEST, 514);
    let udp = Forward { protocol: Protocol::Udp, host, guest: guest_end };
    let network = network(&UserConfig { forwards: vec![udp], ..config() });
    let address = network.forwards()[0].1;
    let mut guest = Guest::new(network.clone(), ALL);
    let socket = guest.sockets.add(udp_socket(514));
    let peers: Vec<UdpSocket> = (0..3).map(|_| UdpSocket::bind("127.0.0.1:0").unwrap()).collect();
    for (number, peer) in peers.iter().enumerate() {
        peer.set_read_timeout(Some(LONG)).unwrap();
        peer.send_to(format!("from {number}").as_bytes(), address).unwrap();
    }
    let mut answered = 0;
    guest.run("three datagrams", |guest| {
        let socket = guest.sockets.get_mut::<udp::Socket>(socket);
        while socket.can_recv() {
            let (bytes, from) = socket.recv().map(|(bytes, from)| (bytes.to_vec(), from.endpoint)).unwrap();
            socket.send_slice(&[b"to", &bytes[4..]].concat(), from).unwrap();
            answered += 1;
        }
        (answered == 3 && socket.send_queue() == 0).then_some(())
    });
    for (number, peer) in peers.iter().enumerate() {
        let mut room = [0; 32];
        let length = peer.recv(&mut room).unwrap();
        assert_eq!(&room[..length], format!("to {number}").as_bytes());
    }
}

#[test]
fn datagrams_reach_the_host_and_its_answers_the_guest_in_fragments_if_they_are_long() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = server.local_addr().unwrap();
    server.set_read_timeout(Some(LONG)).unwrap();
    let mut guest = Guest::new(network(&config()), ALL);
    let socket = guest.sockets.add(udp_socket(700));
    let long = noise(4000, 4);
    guest.sockets.get_mut::<udp::Socket>(socket).send_slice(b"short", at_gateway(address)).unwrap();
    guest.run("the departure", |guest| {
        (guest.sockets.get_mut::<udp::Socket>(socket).send_queue() == 0).then_some(())
    });
    let mut room = [0; 100];
    let (length, from) = server.recv_from(&mut room).unwrap();
    assert_eq!(&room[..length], b"short");
    server.send_to(b"short too", from).unwrap();
    guest.run("the answer", |guest| {
        let (bytes, meta) = guest.sockets.get_mut::<udp::Socket>(socket).recv().ok()?;
        assert_eq!((bytes, meta.endpoint), (&b"short too"[..], at_gateway(address).into()));
        Some(())
    });
    server.send_to(&long, from).unwrap();
    // The stack of this guest does not put fragments together: do it here.
    let mut whole = Vec::new();
    while whole.len() < 8 + long.len() {
        let heard = guest.nic.bell.heard();
        let Some(ethernet) = guest.nic.take() else {
            guest.nic.bell.wait(heard, LONG);
            continue;
        };
        assert!(ethernet.len() <= 1514);
        let ip = &ethernet[14..];
        let place = u16::from_be_bytes([ip[6], ip[7]]);
        assert_eq!(usize::from(place & 0x1fff) * 8, whole.len());
        whole.extend_from_slice(&ip[20..]);
        assert_eq!(place & 0x2000 != 0, whole.len() < 8 + long.len());
    }
    assert!(whole[8..] == long);
}

#[test]
fn names_are_asked_of_the_hosts_name_server() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    server.set_read_timeout(Some(LONG)).unwrap();
    let dns = Some(server.local_addr().unwrap());
    let mut guest = Guest::new(network(&UserConfig { dns, ..config() }), ALL);
    let socket = guest.sockets.add(udp_socket(701));
    let to = SocketAddrV4::new(Ipv4Addr::new(10, 0, 2, 3), 53);
    guest.sockets.get_mut::<udp::Socket>(socket).send_slice(b"where is it?", to).unwrap();
    guest.run("the departure", |guest| {
        (guest.sockets.get_mut::<udp::Socket>(socket).send_queue() == 0).then_some(())
    });
    let mut room = [0; 100];
    let (length, from) = server.recv_from(&mut room).unwrap();
    assert_eq!(&room[..length], b"where is it?");
    server.send_to(b"there", from).unwrap();
    guest.run("the answer", |guest| {
        let (bytes, meta) = guest.sockets.get_mut::<udp::Socket>(socket).recv().ok()?;
        assert_eq!((bytes, meta.endpoint), (&b"there"[..], to.into()));
        Some(())
    });
}

#[test]
fn many_connections_at_once_each_carry_their_own() {
    const MANY: usize = 300;
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = server.local_addr().unwrap();
    let host = thread::spawn(move || {
        let echoes: Vec<_> = (0..MANY)
            .map(|_| {
                let (mut stream, _) = server.accept().unwrap();
                thread::spawn(move || {
                    let mut all = Vec::new();
                    stream.read_to_end(&mut all).unwrap();
                    stream.write_all(&all).unwrap();
                })
            })
            .collect();
        echoes.into_iter().for_each(|echo| echo.join().unwrap());
    });
    let mut guest = Guest::new(network(&config()), ALL);
    let connections: Vec<_> = (0..MANY).map(|_| guest.connect(at_gateway(address))).collect();
    guest.run("all connections", |guest| connections.iter().all(|&c| guest.tcp(c).may_send()).then_some(()));
    for (number, &connection) in connections.iter().enumerate() {
        assert_eq!(guest.tcp(connection).send_slice(&noise(2000, number as u64)).unwrap(), 2000);
        guest.tcp(connection).close();
    }
    for (number, &connection) in connections.iter().enumerate() {
        assert!(guest.download(connection) == noise(2000, number as u64), "connection {number}");
    }
    host.join().unwrap();
}

#[test]
fn a_datagram_to_where_nobody_listens_is_answered_by_an_error() {
    let free = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut guest = Guest::new(network(&config()), ALL);
    let buffer = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 4], vec![0; 4096]);
    let mut errors = icmp::Socket::new(buffer(), buffer());
    errors.bind(icmp::Endpoint::Udp(703.into())).unwrap();
    let errors = guest.sockets.add(errors);
    let socket = guest.sockets.add(udp_socket(703));
    guest.sockets.get_mut::<udp::Socket>(socket).send_slice(b"hello", at_gateway(free)).unwrap();
    guest.run("the error", |guest| {
        let (bytes, _) = guest.sockets.get_mut::<icmp::Socket>(errors).recv().ok()?;
        let packet = Icmpv4Packet::new_checked(bytes).unwrap();
        assert!(packet.verify_checksum());
        assert_eq!((u8::from(packet.msg_type()), packet.msg_code()), (3, 3));
        Some(())
    });
}

#[test]
fn a_guest_with_too_many_connections_loses_those_it_used_least() {
    const LIMIT: usize = 512;
    const MORE: usize = 20;
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    if limit.maximum.is_some_and(|most| most < 2000) {
        println!("not run: this process may open {:?} files, and the test needs 2000", limit.maximum);
        return;
    }
    let wanted = rustix::process::Rlimit {
        current: Some(limit.current.map_or(4096, |now| now.max(2000))),
        maximum: limit.maximum,
    };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, wanted).unwrap();
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = server.local_addr().unwrap();
    let mut guest = Guest::new(network(&config()), ALL);
    let (mut connections, mut streams) = (Vec::new(), Vec::new());
    for _ in 0..LIMIT + MORE {
        let connection = guest.connect(at_gateway(address));
        guest.run("one more connection", |guest| guest.tcp(connection).may_send().then_some(()));
        connections.push(connection);
        streams.push(server.accept().unwrap().0);
        // The first of all is used again and again.
        guest.tcp(connections[0]).send_slice(b".").unwrap();
    }
    guest.run("the loss of some", |guest| {
        connections[1..=MORE].iter().all(|&c| guest.tcp(c).state() == tcp::State::Closed).then_some(())
    });
    let open = |guest: &mut Guest, c| guest.tcp(c).state() == tcp::State::Established;
    assert!(open(&mut guest, connections[0]));
    assert!(connections[MORE + 1..].iter().all(|&c| open(&mut guest, c)));
    streams[1].set_read_timeout(Some(LONG)).unwrap();
    assert_eq!(streams[1].read(&mut [0; 1]).unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
}

#[test]
fn a_restricted_guest_gets_nothing_out() {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    udp.set_nonblocking(true).unwrap();
    server.set_nonblocking(true).unwrap();
    let network = network(&UserConfig { restrict: true, dns: udp.local_addr().ok(), ..config() });
    let mut guest = Guest::new(network.clone(), ALL);
    let socket = guest.sockets.add(udp_socket(702));
    let dns = SocketAddrV4::new(Ipv4Addr::new(10, 0, 2, 3), 53);
    for to in [at_gateway(udp.local_addr().unwrap()), dns] {
        guest.sockets.get_mut::<udp::Socket>(socket).send_slice(b"let me out", to).unwrap();
    }
    let connection = guest.connect(at_gateway(server.local_addr().unwrap()));
    guest.run("the refusal", |guest| (guest.tcp(connection).state() == tcp::State::Closed).then_some(()));
    // The refusal came after the datagrams were looked at: nothing of all that has arrived.
    guest.run("the datagrams", |guest| {
        (guest.sockets.get_mut::<udp::Socket>(socket).send_queue() == 0).then_some(())
    });
    let last = guest.connect(at_gateway(server.local_addr().unwrap()));
    guest.run("the last refusal", |guest| (guest.tcp(last).state() == tcp::State::Closed).then_some(()));
    assert!(server.accept().is_err() && udp.recv(&mut [0; 8]).is_err());
}

#[test]
fn the_hosts_loopback_is_reached_by_the_gateways_address_only() {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    server.set_nonblocking(true).unwrap();
    let port = server.local_addr().unwrap().port();
    let mut guest = Guest::new(network(&config()), ALL);
    for address in [[0, 0, 0, 1], [240, 0, 0, 1]] {
        let connection = guest.connect(SocketAddrV4::new(address.into(), port));
        guest.run("the refusal", |guest| (guest.tcp(connection).state() == tcp::State::Closed).then_some(()));
    }
    assert!(server.accept().is_err());
}

#[test]
fn a_guest_that_takes_no_frames_holds_up_only_itself() {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = server.local_addr().unwrap();
    let all = noise(20_000_000, 6);
    let sent = all.clone();
    let host = thread::spawn(move || {
        let (mut stream, _) = server.accept().unwrap();
        stream.write_all(&sent).unwrap();
    });
    let network = network(&config());
    let mut guest = Guest::new(network.clone(), Offloads::default());
    let connection = guest.connect(at_gateway(address));
    guest.run("the connection", |guest| guest.tcp(connection).may_recv().then_some(()));
    // It goes on asking, and reads no answer, until there is no room for more answers.
    let mut question = vec![0xff; 6];
    question.extend_from_slice(&MAC);
    question.extend_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    question.extend_from_slice(&MAC);
    question.extend_from_slice(&[10, 0, 2, 15, 0, 0, 0, 0, 0, 0, 10, 0, 2, 2]);
    while tenon_core::NetworkPort::counters(&*network).receive_dropped < 100 {
        guest.nic.send_plain(&question);
        thread::yield_now();
    }
    let mut lengths = Vec::new();
    guest.nic.port.waiting(100_000, &mut lengths);
    assert!(lengths.len() <= 1024 && lengths.iter().sum::<u32>() <= 5 << 20);
    // Then it takes them after all, and nothing of the connection is missing.
    assert!(guest.download(connection) == all);
    host.join().unwrap();
}
