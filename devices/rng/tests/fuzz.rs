//! Any requests for entropy. `cargo fuzz run virtio_rng` runs the same target.

use tenon_device_virtio_rng::Rng;
use tenon_testkit::VirtioSetup;
use tenon_testkit::fuzz::{Seen, virtio};

/// All bytes are deeds.
pub(crate) fn target(data: &[u8]) -> Seen {
    virtio::<Rng>(&[], &VirtioSetup::new(), &[], data, |_, exchange| {
        assert_eq!(exchange.answered.written as usize, exchange.room.min(65536));
    })
}

#[test]
fn any_requests_are_answered() {
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus/virtio_rng");
    let report = tenon_testkit::fuzz::run(corpus.as_ref(), 1000, target);
    assert!(report.count("queue 0: an answer of") > 500);
}
