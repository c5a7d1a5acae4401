//! A tap interface, in a network namespace of the test's own.
#![allow(
    unsafe_code,
    reason = "a thread enters a namespace of its own, which is unsafe only where memory or files are unshared"
)]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::process::Command;
use std::sync::mpsc;
use std::thread;

use common::{Guest, LONG, noise};
use smoltcp::socket::tcp;
use tenon_core::{Offloads, PortNews};
use tenon_net::{open, parse};

const HOST: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);

/// Runs `test` in a network namespace of its own, where this machine permits.
fn alone(test: impl FnOnce() + Send + 'static) {
    let thread = thread::spawn(move || {
        // SAFETY: a network namespace is no part of the memory or of the open files of this process.
        let entered = unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) };
        match entered {
            Err(error) => println!("not run: no network namespace can be made here: {error}"),
            Ok(()) if std::fs::File::open("/dev/net/tun").is_err() => {
                println!("not run: /dev/net/tun cannot be opened here");
            }
            Ok(()) => test(),
        }
    });
    thread.join().unwrap();
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().unwrap();
    assert!(status.success(), "ip {arguments}");
}

fn upload_and_download(offloads: Offloads, large: bool) {
    let port = open(&parse("tap:test0").unwrap()).unwrap();
    ip("address add 10.9.0.1/24 dev test0");
    let server = TcpListener::bind((HOST, 0)).unwrap();
    let to = SocketAddrV4::new(HOST, server.local_addr().unwrap().port());
    let host = thread::spawn(move || {
        let (mut stream, _) = server.accept().unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        stream.write_all(&noise(3_000_000, 2)).unwrap();
        all
    });
    let mut guest = Guest::bare(port, offloads);
    guest.configure(GUEST, HOST);
    let connection = guest.connect(to);
    guest.upload(connection, &noise(3_000_000, 1));
    assert!(guest.download(connection) == noise(3_000_000, 2));
    assert!(host.join().unwrap() == noise(3_000_000, 1));
    assert_eq!(guest.nic.large_out > 10, large, "{} large frames left", guest.nic.large_out);
    guest.run("the end", |guest| (guest.tcp(connection).state() == tcp::State::TimeWait).then_some(()));
}

#[test]
fn tcp_carries_megabytes_over_a_tap_without_offloads() {
    alone(|| upload_and_download(Offloads::default(), false));
}

#[test]
fn tcp_carries_megabytes_over_a_tap_in_large_segments() {
    alone(|| upload_and_download(common::ALL, true));
}

#[test]
fn the_interface_decides_about_link_and_mtu_and_its_changes_are_told() {
    alone(|| {
        let port = open(&parse("tap:test1,mtu=9000").unwrap()).unwrap();
        assert_eq!((port.info().mtu, port.info().link_up), (9000, true));
        let (told, news) = mpsc::channel();
        port.watch(Box::new(move |what| {
            if what == PortNews::Changed {
                told.send(()).unwrap_or(());
            }
        }));
        for (change, expected) in [
            ("link set test1 down", (9000, false)),
            ("link set test1 mtu 1400", (1400, false)),
            ("link set test1 up", (1400, true)),
        ] {
            ip(change);
            while (port.info().mtu, port.info().link_up) != expected {
                news.recv_timeout(LONG).unwrap();
            }
        }
    });
}

#[test]
fn an_interface_that_is_there_is_taken_and_left() {
    alone(|| {
        ip("tuntap add test2 mode tap vnet_hdr multi_queue");
        let port = open(&parse("tap:test2").unwrap()).unwrap();
        assert!(!port.info().link_up, "who made it brings it up");
        drop(port);
        ip("link show test2");
    });
}

#[test]
fn what_cannot_be_had_is_explained() {
    alone(|| {
        let refused = |name: &str| {
            open(&parse(&format!("tap:{name}")).unwrap()).err().expect("it was opened").to_string()
        };
        assert!(refused("lo").contains("no tap"), "{}", refused("lo"));
        assert!(refused("a-name-that-is-too-long").contains("1 to 15"));
        let kept = open(&parse("tap:test3").unwrap()).unwrap();
        assert!(refused("test3").contains("another program uses it"), "{}", refused("test3"));
        drop(kept);
        let nothing = rustix::thread::CapabilitySet::empty();
        let none =
            rustix::thread::CapabilitySets { effective: nothing, permitted: nothing, inheritable: nothing };
        rustix::thread::set_capabilities(None, none).unwrap();
        let text = refused("test4");
        assert!(text.contains("ip tuntap add test4 mode tap"), "{text}");
    });
}
