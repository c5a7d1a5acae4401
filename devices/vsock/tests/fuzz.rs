//! Any packets in any buffers, with programs outside that come, stall and go. `cargo fuzz run virtio_vsock` runs the same target.
#![allow(clippy::unwrap_used, reason = "a test")]

use tenon_device_virtio_vsock::Vsock;
use tenon_testkit::VirtioSetup;
use tenon_testkit::fuzz::{Exchange, Seen, virtio};

const RECEIVE: u16 = 0;
const EVENTS: u16 = 2;
const HEADER: usize = 44;
const HOST: u64 = 2;
const GUEST: u64 = 3;
const RESET: u16 = 3;
const DATA: u16 = 5;

/// All bytes are deeds.
pub(crate) fn target(data: &[u8]) -> Seen {
    let mut packets = Seen::new();
    let mut seen = virtio::<Vsock>(&[], &VirtioSetup::new(), &[], data, |_, exchange| {
        packets.extend(look(exchange));
    });
    seen.append(&mut packets);
    seen
}

/// What the guest receives is one whole packet for it, from the host, or an event; what it sends comes back without an answer. What the packet says.
fn look(Exchange { queue, room, answered, .. }: &Exchange) -> Option<String> {
    let packet = &answered.data;
    assert!(packet.len() <= *room);
    match *queue {
        EVENTS => assert!(packet.is_empty() || *packet == [0; 4], "the event is {packet:?}"),
        RECEIVE => {}
        _ => assert!(packet.is_empty()),
    }
    if *queue != RECEIVE || packet.is_empty() {
        return None;
    }
    let u64_at = |at: usize| u64::from_le_bytes(packet[at..at + 8].try_into().unwrap());
    let u16_at = |at: usize| u16::from_le_bytes(packet[at..at + 2].try_into().unwrap());
    let length = u32::from_le_bytes(packet[24..28].try_into().unwrap()) as usize;
    let op = u16_at(30);
    assert!((1..=7).contains(&op), "the op is {op}");
    assert_eq!(length, packet.len() - HEADER, "the length is that of what follows");
    assert_eq!(length > 0, op == DATA, "op {op} has {length} bytes");
    assert_eq!(u64_at(8), GUEST);
    assert!(op == RESET || u64_at(0) == HOST, "op {op} comes from {}", u64_at(0));
    assert!(op == RESET || u16_at(28) == 1, "op {op} is of a connection of type {}", u16_at(28));
    Some(format!("told of op {op}"))
}

#[test]
fn any_packets_are_survived() {
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus/virtio_vsock");
    let report = tenon_testkit::fuzz::run(corpus.as_ref(), 3000, target);
    for op in 1..=7 {
        let told = report.count(&format!("told of op {op}"));
        assert!(told > 50, "{told} inputs are told of op {op}");
    }
    assert!(
        report.count("queue 2: an answer of 3 bits") > 50,
        "hardly any is told that its connections are lost"
    );
}
