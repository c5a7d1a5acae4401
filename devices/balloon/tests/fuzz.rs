//! Any pages and statistics in any queue, with a target that moves. `cargo fuzz run virtio_balloon` runs the same target.

use tenon_device_virtio_balloon::Balloon;
use tenon_testkit::VirtioSetup;
use tenon_testkit::fuzz::{Input, Seen, virtio};

/// The first byte chooses among settings, the rest are deeds.
pub(crate) fn target(data: &[u8]) -> Seen {
    let mut input = Input::new(data);
    let settings: &[_] =
        [&[][..], &[("stats-interval", "1")], &[("target", "16M")]][usize::from(input.u8() % 3)];
    let adjustable = [
        ("target", "64M"),
        ("target", "1T"),
        ("stats-interval", "0"),
        ("stats-interval", "3600"),
        ("x", "y"),
    ];
    let deeds = input.take(usize::MAX);
    virtio::<Balloon>(
        settings,
        &VirtioSetup::new().memory(64 << 20),
        &adjustable,
        deeds,
        |bench, exchange| {
            assert_eq!(exchange.answered.written, 0, "a balloon writes nothing");
            assert!(bench.released_pages().iter().all(|page| *page < (64 << 20) / 4096));
        },
    )
}

#[test]
fn any_pages_and_statistics_are_survived() {
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus/virtio_balloon");
    let report = tenon_testkit::fuzz::run(corpus.as_ref(), 3000, target);
    for queue in 0..5 {
        assert!(report.count(&format!("queue {queue}: an answer of")) > 50, "queue {queue} hardly answers");
    }
}
