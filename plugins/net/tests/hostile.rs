//! A guest that sends what no driver sends.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test that cannot go on fails")]

mod common;

use std::net::{SocketAddrV4, TcpListener};
use std::sync::{Arc, Mutex};

use common::{ALL, GATEWAY, Guest, MAC, Random, noise};
use smoltcp::socket::{dhcpv4, tcp};
use tenon_core::{Buffers, NetworkPort, Offloads, PortInfo, PortNews};
use tenon_net::{UserConfig, UserNetwork, fuzz_frame};

/// A port that keeps a copy of what is sent through it.
struct Tee {
    port: Arc<UserNetwork>,
    seen: Mutex<Vec<Vec<u8>>>,
}

impl NetworkPort for Tee {
    fn info(&self) -> PortInfo {
        self.port.info()
    }

    fn accept(&self, offloads: Offloads) {
        self.port.accept(offloads);
    }

    fn send(&self, frame: &Buffers) -> bool {
        let mut bytes = vec![0; frame.length() as usize];
        frame.read(0, &mut bytes);
        self.seen.lock().unwrap().push(bytes);
        self.port.send(frame)
    }

    fn waiting(&self, most: usize, into: &mut Vec<u32>) {
        self.port.waiting(most, into);
    }

    fn receive(&self) -> Option<Vec<u8>> {
        self.port.receive()
    }

    fn watch(&self, news: Box<dyn Fn(PortNews) + Send + Sync>) {
        self.port.watch(news);
    }
}

fn network(restrict: bool) -> Arc<UserNetwork> {
    let config = UserConfig { mac: MAC, mtu: 1500, forwards: Vec::new(), restrict, dns: None };
    UserNetwork::new(&config).unwrap()
}

/// What an honest guest sends when it gets an address and uses a connection.
fn honest() -> Vec<Vec<u8>> {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = SocketAddrV4::new(GATEWAY, server.local_addr().unwrap().port());
    let tee = Arc::new(Tee { port: network(false), seen: Mutex::new(Vec::new()) });
    let mut guest = Guest::new(tee.clone(), ALL);
    let dhcp = guest.sockets.add(dhcpv4::Socket::new());
    guest.run("a lease", |guest| {
        matches!(guest.sockets.get_mut::<dhcpv4::Socket>(dhcp).poll(), Some(dhcpv4::Event::Configured(_)))
            .then_some(())
    });
    let connection = guest.connect(to);
    guest.run("the connection", |guest| guest.tcp(connection).may_send().then_some(()));
    guest.tcp(connection).send_slice(&noise(20_000, 1)).unwrap();
    guest.run("the bytes", |guest| (guest.tcp(connection).send_queue() == 0).then_some(()));
    let frames = tee.seen.lock().unwrap().clone();
    assert!(frames.len() >= 6 && frames.iter().any(|frame| frame[1] == 1), "no large segment among them");
    frames
}

fn mutate(random: &mut Random, frame: &[u8]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    for _ in 0..=random.below(4) {
        if frame.is_empty() {
            break;
        }
        let at =
            if random.below(2) == 0 { random.below(frame.len()) } else { random.below(frame.len().min(80)) };
        match random.below(7) {
            0 => frame[at] = random.next() as u8,
            1 => frame[at] ^= 1 << random.below(8),
            2 => frame.truncate(at),
            3 => frame[at] = [0, 1, 0x7f, 0x80, 0xff][random.below(5)],
            4 => frame.extend_from_slice(&noise(random.below(2000), random.next())),
            5 => {
                let piece = frame[at..].to_vec();
                frame.splice(at..at, piece.into_iter().take(20));
            }
            _ => drop(frame.drain(at..(at + 1 + random.below(8)).min(frame.len()))),
        }
    }
    frame
}

/// Makes the sums of a frame right again, so that what lies behind them is reached.
fn mend(frame: &mut [u8]) {
    let Some(header) = frame.get_mut(12 + 14..12 + 34) else { return };
    header[10..12].fill(0);
    let mut sum = header.chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(w[1])).sum::<u32>();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    header[10..12].copy_from_slice(&(!(sum as u16)).to_be_bytes());
}

#[test]
fn frames_changed_at_random_are_survived() {
    let seeds = honest();
    let mut random = Random(2026);
    for _ in 0..6000 {
        let seed = random.below(seeds.len());
        let mut frame = mutate(&mut random, &seeds[seed]);
        if random.below(2) == 0 {
            mend(&mut frame);
        }
        fuzz_frame(&frame);
    }
}

#[test]
fn a_network_works_after_a_storm_of_frames_changed_at_random() {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = SocketAddrV4::new(GATEWAY, server.local_addr().unwrap().port());
    let seeds = honest();
    // Restricted, so that no such frame leaves this machine.
    let network = network(true);
    let mut guest = Guest::new(network.clone(), ALL);
    let mut random = Random(7);
    for _ in 0..30_000 {
        let seed = random.below(seeds.len());
        let mut frame = mutate(&mut random, &seeds[seed]);
        mend(&mut frame);
        guest.nic.send(&frame);
        while guest.nic.port.receive().is_some() {}
    }
    let counters = network.counters();
    assert!(counters.send_dropped > 1000 && counters.sent > 1000, "{counters:?}");
    let connection = guest.connect(to);
    guest.run("the refusal", |guest| (guest.tcp(connection).state() == tcp::State::Closed).then_some(()));
}
