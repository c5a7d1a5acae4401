//! What users write, what they get, and what they are told.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::net::SocketAddrV4;
use std::path::PathBuf;

use tenon_net::{Forward, Kind, Protocol, SNAPLEN, local_mac, open, parse};

fn end(text: &str) -> SocketAddrV4 {
    text.parse().unwrap()
}

#[test]
fn all_that_can_be_said_is_understood() {
    let spec = parse(
        "user,forward=2222:22,forward=udp:0.0.0.0:53-10.0.2.20:5353,forward=tcp::80-:8080,mac=52:54:00:AB:cd:ef,restrict=yes,dns=1.2.3.4,mtu=9000,pcap=/tmp/x.pcap,snaplen=96,id=vm1",
    )
    .unwrap();
    let forward = |protocol, host, guest| Forward { protocol, host: end(host), guest: end(guest) };
    assert_eq!(
        spec.kind,
        Kind::User {
            forwards: vec![
                forward(Protocol::Tcp, "127.0.0.1:2222", "10.0.2.15:22"),
                forward(Protocol::Udp, "0.0.0.0:53", "10.0.2.20:5353"),
                forward(Protocol::Tcp, "127.0.0.1:80", "10.0.2.15:8080"),
            ],
            restrict: true,
            dns: Some("1.2.3.4:53".parse().unwrap()),
        }
    );
    assert_eq!(spec.mac, Some([0x52, 0x54, 0, 0xab, 0xcd, 0xef]));
    assert_eq!((spec.name.as_str(), spec.mtu, spec.snaplen), ("vm1", Some(9000), 96));
    assert_eq!(spec.pcap, Some(PathBuf::from("/tmp/x.pcap")));
    assert_eq!(parse("tap:br-tap0").unwrap().kind, Kind::Tap { name: "br-tap0".into() });
    assert_eq!(parse("tap,name=t").unwrap().kind, Kind::Tap { name: "t".into() });
    assert_eq!(parse("tap:t").unwrap().snaplen, SNAPLEN);
    let socket = |listen| Kind::Socket { path: "/run/a".into(), listen };
    assert_eq!(parse("socket,listen=/run/a").unwrap().kind, socket(true));
    assert_eq!(parse("socket,connect=/run/a").unwrap().kind, socket(false));
}

#[test]
fn what_is_wrong_is_named_with_a_remedy() {
    for (text, key, remedy) in [
        ("", "kind", "user, tap:NAME"),
        ("bridge", "kind", "user, tap:NAME"),
        ("user,restrict", "restrict", "KEY=VALUE"),
        ("user,restrict=maybe", "restrict", "yes or no"),
        ("user,restrict=yes,restrict=no", "restrict", "leave one out"),
        ("user,color=red", "color", "forward, restrict, dns"),
        ("user,name=eth0", "name", "forward, restrict, dns"),
        ("user,forward=22", "forward", "HOST-PORT:GUEST-PORT"),
        ("user,forward=70000:22", "forward", "HOST-PORT:GUEST-PORT"),
        ("user,forward=2222:0", "forward", "HOST-PORT:GUEST-PORT"),
        ("user,forward=:22-8.8.8.8:22", "forward", "HOST-PORT:GUEST-PORT"),
        ("user,forward=:22-10.0.2.2:22", "forward", "HOST-PORT:GUEST-PORT"),
        ("user,mac=52:54:00", "mac", "52:54:00:12:34:56"),
        ("user,mac=01:00:5e:00:00:01", "mac", "52:54:00:12:34:56"),
        ("user,mac=52:54:00:12:34:zz", "mac", "52:54:00:12:34:56"),
        ("user,mac=52:54:00:12:34:56:78", "mac", "52:54:00:12:34:56"),
        ("user,mtu=100", "mtu", "576 to 65535"),
        ("tap:t,mtu=65536", "mtu", "68 to 65535"),
        ("user,dns=example.org", "dns", "ADDRESS:PORT"),
        ("user,snaplen=100", "snaplen", "pcap=FILE"),
        ("user,pcap=f,snaplen=1", "snaplen", "64 to"),
        ("user,pcap=", "pcap", "behind the ="),
        ("tap", "name", "tap:NAME"),
        ("tap:", "name", "tap:NAME"),
        ("socket", "socket", "listen=PATH or connect=PATH"),
        ("socket,listen=a,connect=b", "socket", "listen=PATH or connect=PATH"),
    ] {
        let error = parse(text).expect_err(text);
        assert_eq!(error.key, key, "{text}: {error}");
        assert!(error.remedy.contains(remedy), "{text}: {error}");
        assert!(error.to_string().starts_with(&format!("network: {key}: ")));
    }
}

#[test]
fn what_cannot_be_opened_is_explained() {
    let folder = tempfile::tempdir().unwrap();
    let nowhere = folder.path().join("no/such/folder/file");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    for (text, remedy) in [
        (format!("user,forward={port}:22"), "choose another port"),
        ("user,forward=203.0.113.9:2000-:22".into(), "an address that this host has"),
        (format!("user,pcap={}", nowhere.display()), "a folder that is there"),
        (format!("socket,listen={}", nowhere.display()), "make the folder"),
        (format!("socket,connect={}", nowhere.display()), "start the machine with listen="),
        (format!("socket,connect=/{}", "x".repeat(200)), "less than 108 bytes"),
    ] {
        let error = open(&parse(&text).unwrap()).err().expect(&text);
        assert!(error.remedy.contains(remedy), "{text}: {error}");
    }
}

#[test]
fn mac_addresses_are_local_stable_and_differ_by_name() {
    let names: Vec<String> = (0..1000).map(|number| format!("machine-{number}")).collect();
    let mut macs: Vec<[u8; 6]> = names.iter().map(|name| local_mac(name)).collect();
    assert!(macs.iter().all(|mac| mac[0] & 3 == 2));
    assert_eq!(local_mac("machine-7"), macs[7]);
    macs.sort_unstable();
    macs.dedup();
    assert_eq!(macs.len(), names.len());
    let port = |text| open(&parse(text).unwrap()).unwrap().info().mac;
    assert_eq!(port("user,id=machine-7"), local_mac("machine-7"));
    assert_eq!(port("user,mac=52:54:00:00:00:01"), [0x52, 0x54, 0, 0, 0, 1]);
}
