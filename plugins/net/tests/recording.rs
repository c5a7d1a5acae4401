//! A recording holds what passed.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test that cannot go on fails")]

mod common;

use std::io::Write;
use std::net::{SocketAddrV4, TcpListener};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use common::{ALL, GATEWAY, Guest, MAC, noise};
use smoltcp::wire::{EthernetFrame, Ipv4Packet, TcpPacket};
use tenon_core::Offloads;
use tenon_net::{open, parse};

struct Record {
    time: Duration,
    length: usize,
    bytes: Vec<u8>,
}

/// Reads a recording as the format says: its snaplen, and its records.
fn read(path: &Path) -> (u32, Vec<Record>) {
    let file = std::fs::read(path).unwrap();
    let word = |at: usize| u32::from_le_bytes(file[at..at + 4].try_into().unwrap());
    assert_eq!(word(0), 0xa1b2_3c4d, "the magic number of nanoseconds");
    assert_eq!(file[4..8], [2, 0, 4, 0], "version 2.4");
    assert_eq!(word(20), 1, "Ethernet");
    let mut records = Vec::new();
    let mut at = 24;
    while at < file.len() {
        let kept = word(at + 8) as usize;
        assert!(word(at + 4) < 1_000_000_000);
        records.push(Record {
            time: Duration::new(u64::from(word(at)), word(at + 4)),
            length: word(at + 12) as usize,
            bytes: file[at + 16..at + 16 + kept].to_vec(),
        });
        at += 16 + kept;
    }
    (word(16), records)
}

/// Downloads through a recorded network and gives the recording.
fn record(options: &str, offloads: Offloads, bytes: usize) -> (u32, Vec<Record>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("recording.pcap");
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = SocketAddrV4::new(GATEWAY, server.local_addr().unwrap().port());
    let host = thread::spawn(move || {
        let (mut stream, _) = server.accept().unwrap();
        stream.write_all(&noise(bytes, 1)).unwrap();
    });
    let text = format!("user,mac=52:54:00:01:02:03,pcap={}{options}", path.display());
    let port = open(&parse(&text).unwrap()).unwrap();
    let mut guest = Guest::new(port, offloads);
    let connection = guest.connect(to);
    assert!(guest.download(connection) == noise(bytes, 1));
    host.join().unwrap();
    // With the last owner of the port the recording ends, and is all on disk.
    drop(guest);
    if let Ok(output) = Command::new("tcpdump").args(["-n", "-r"]).arg(&path).output() {
        assert!(output.status.success());
        assert!(String::from_utf8_lossy(&output.stdout).contains("10.0.2.15"));
    } else {
        println!("not run: tcpdump is not installed; the file was read by this test alone");
    }
    read(&path)
}

#[test]
fn a_recording_holds_all_bytes_of_a_connection_in_order_and_with_times() {
    let before = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let (snaplen, records) = record("", Offloads::default(), 200_000);
    let after = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    assert_eq!(snaplen, 65553);
    let (mut data, mut asked) = (Vec::new(), 0);
    for record in &records {
        assert!((before..=after).contains(&record.time));
        assert_eq!(record.length, record.bytes.len());
        let frame = EthernetFrame::new_checked(&record.bytes[..]).unwrap();
        if frame.src_addr().0 == MAC {
            asked += 1;
            continue;
        }
        assert_eq!(frame.src_addr().0, [0x52, 0x55, 10, 0, 2, 2]);
        if let Ok(ip) = Ipv4Packet::new_checked(frame.payload()) {
            data.extend_from_slice(TcpPacket::new_checked(ip.payload()).unwrap().payload());
        }
    }
    assert!(asked > 3 && data == noise(200_000, 1));
}

#[test]
fn a_short_snaplen_keeps_the_beginning_of_each_frame_and_its_length() {
    let (snaplen, records) = record(",snaplen=96", ALL, 2_000_000);
    assert_eq!(snaplen, 96);
    assert!(records.iter().all(|record| record.bytes.len() == record.length.min(96)));
    assert!(records.iter().any(|record| record.length > 1514), "no large segment was recorded");
}

#[test]
fn a_file_to_which_somebody_records_is_left_to_him() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("recording.pcap");
    let spec = parse(&format!("user,pcap={}", path.display())).unwrap();
    let first = open(&spec).unwrap();
    let error = open(&spec).err().expect("it was opened").to_string();
    assert!(error.contains("recording.pcap") && error.contains("recorded there"), "{error}");
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 24, "the header is still there");
    drop(first);
    open(&spec).unwrap();
}
