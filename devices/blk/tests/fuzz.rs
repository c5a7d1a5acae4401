//! Any requests, in any order, with stores that fail, wait and change. `cargo fuzz run virtio_blk` runs the same target.
#![allow(clippy::unwrap_used, reason = "a test")]

use tenon_device_virtio_blk::Block;
use tenon_testkit::fuzz::{Exchange, Input, Seen, virtio};
use tenon_testkit::{VirtioBench, VirtioSetup};

const READ: u32 = 0;
const OK: u8 = 0;

/// The first byte chooses among settings, the rest are deeds.
pub(crate) fn target(data: &[u8]) -> Seen {
    let mut input = Input::new(data);
    let settings: &[_] = [&[][..], &[("queues", "3")], &[("read-only", "true")], &[("discard", "false")]]
        [usize::from(input.u8() % 4)];
    let deeds = input.take(usize::MAX);
    virtio::<Block>(settings, &VirtioSetup::new(), &[], deeds, look)
}

/// Every answer ends with a status, and a read that succeeds gives what the store holds.
fn look(bench: &mut VirtioBench<Block>, exchange: &Exchange) {
    let Exchange { readable, room, answered, alone, .. } = exchange;
    if *room == 0 {
        return assert_eq!(answered.written, 0);
    }
    let (data, status) = answered.buffer.split_at(room - 1);
    assert!(status[0] <= 2, "the status is {status:?}");
    assert!(status[0] != OK || readable.len() >= 16, "a request without a header succeeds");
    if *alone && status[0] == OK && readable[..4] == READ.to_le_bytes() {
        let sector = u64::from_le_bytes(readable[8..16].try_into().unwrap());
        assert!(bench.store("disk").content(sector * 512, data.len()) == data, "a read gives something else");
    }
}

#[test]
fn any_requests_are_survived() {
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus/virtio_blk");
    let report = tenon_testkit::fuzz::run(corpus.as_ref(), 3000, target);
    // Reads and writes that succeed, ones that fail, and what is not supported.
    for status in 0..3 {
        let reached =
            (1..=17).map(|bits| report.count(&format!("queue 0: an answer of {bits} bits, {status}")));
        assert!(reached.sum::<u64>() > 100, "status {status} is hardly ever reached");
    }
}
