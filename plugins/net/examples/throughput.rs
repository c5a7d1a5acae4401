//! How fast TCP crosses the user network, in both directions, with large segments and without, beside the same bytes over the host's own loopback.
//!
//! The guest is smoltcp in this process, so its own work is part of the rates; the processor time of the network's thread is not.
#![allow(clippy::unwrap_used, reason = "a measurement that cannot go on has failed")]

#[path = "../tests/common/mod.rs"]
mod common;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use common::{ALL, GATEWAY, Guest, MAC};
use tenon_core::{NetworkPort, Offloads};
use tenon_net::{UserConfig, UserNetwork};

const BYTES: usize = 400 << 20;

/// Takes all that comes, and then sends as much.
fn server() -> (SocketAddr, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let thread = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut room = vec![0; 1 << 18];
        while stream.read(&mut room).unwrap() > 0 {}
        let mut left = BYTES;
        while left > 0 {
            let piece = left.min(room.len());
            stream.write_all(&room[..piece]).unwrap();
            left -= piece;
        }
    });
    (address, thread)
}

/// The processor time that the network's thread has used, in seconds.
fn spent() -> f64 {
    std::fs::read_dir("/proc/self/task")
        .unwrap()
        .map(|task| task.unwrap().path())
        .filter(|task| std::fs::read_to_string(task.join("comm")).is_ok_and(|name| name.trim() == "net-user"))
        .map(|task| std::fs::read_to_string(task.join("schedstat")).unwrap())
        .map(|times| times.split(' ').next().unwrap().parse::<f64>().unwrap() / 1e9)
        .sum()
}

fn rate(began: Instant) -> f64 {
    BYTES as f64 * 8.0 / began.elapsed().as_secs_f64() / 1e9
}

fn guest(offloads: Offloads) -> (f64, f64) {
    let (address, host) = server();
    let config = UserConfig { mac: MAC, mtu: 1500, forwards: Vec::new(), restrict: false, dns: None };
    let network = UserNetwork::new(&config).unwrap();
    let mut guest = Guest::new(network.clone(), offloads);
    let connection = guest.connect(SocketAddrV4::new(GATEWAY, address.port()));
    let began = Instant::now();
    let piece = vec![0; 1 << 18];
    let mut left = BYTES;
    guest.run("the upload", |guest| {
        let socket = guest.tcp(connection);
        if socket.can_send() && left > 0 {
            left -= socket.send_slice(&piece[..left.min(piece.len())]).unwrap();
        }
        (left == 0 && socket.send_queue() == 0).then(|| socket.close())
    });
    let (up, spent_up) = (rate(began), spent());
    let began = Instant::now();
    let mut got = 0;
    guest.run("the download", |guest| {
        let socket = guest.tcp(connection);
        while socket.can_recv() {
            got += socket.recv(|bytes| (bytes.len(), bytes.len())).unwrap();
        }
        (got == BYTES).then_some(())
    });
    let (down, spent_down) = (rate(began), spent() - spent_up);
    drop(guest);
    host.join().unwrap();
    let share = BYTES as f64 / f64::from(1 << 30);
    println!(
        "  the network's thread: {:.2} s a GiB out, {:.2} s in; {:?}",
        spent_up / share,
        spent_down / share,
        network.counters()
    );
    (up, down)
}

fn loopback() -> (f64, f64) {
    let (address, host) = server();
    let mut stream = TcpStream::connect(address).unwrap();
    let mut room = vec![0; 1 << 18];
    let began = Instant::now();
    for _ in 0..BYTES / room.len() {
        stream.write_all(&room).unwrap();
    }
    stream.shutdown(Shutdown::Write).unwrap();
    let up = rate(began);
    let began = Instant::now();
    while stream.read(&mut room).unwrap() > 0 {}
    let down = rate(began);
    host.join().unwrap();
    (up, down)
}

fn main() {
    let (up, down) = loopback();
    for (what, offloads) in [("frames of 1500 bytes", Offloads::default()), ("large segments", ALL)] {
        let (guest_up, guest_down) = guest(offloads);
        println!(
            "{what}: out {guest_up:.2} Gbit/s ({:.2} of loopback), in {guest_down:.2} Gbit/s ({:.2} of loopback)",
            guest_up / up,
            guest_down / down
        );
    }
    println!("loopback: out {up:.2} Gbit/s, in {down:.2} Gbit/s");
}
