//! Any frames and commands in any buffers, with a link that goes up and down. `cargo fuzz run virtio_net` runs the same target.

use tenon_device_virtio_net::Net;
use tenon_testkit::VirtioSetup;
use tenon_testkit::fuzz::{Input, Seen, virtio};

/// The first byte chooses among settings, the rest are deeds.
pub(crate) fn target(data: &[u8]) -> Seen {
    let mut input = Input::new(data);
    let settings: &[_] = [&[][..], &[("queues", "2")], &[("mergeable", "false")], &[("checksum", "false")]]
        [usize::from(input.u8() % 4)];
    let adjustable = [("link", "down"), ("link", "up"), ("link", "sideways")];
    let deeds = input.take(usize::MAX);
    virtio::<Net>(settings, &VirtioSetup::new(), &adjustable, deeds, |_, exchange| {
        assert!(exchange.answered.written as usize <= exchange.room);
    })
}

#[test]
fn any_frames_and_commands_are_survived() {
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus/virtio_net");
    let report = tenon_testkit::fuzz::run(corpus.as_ref(), 3000, target);
    let received: u64 =
        (4..=17).map(|bits| report.count(&format!("queue 0: an answer of {bits} bits"))).sum();
    let (taken, refused) =
        (report.count("queue 2: an answer of 1 bits, 0"), report.count("queue 2: an answer of 1 bits, 1"));
    assert!(
        received > 100 && taken > 100 && refused > 100,
        "{received} inputs receive, {taken} have commands taken, {refused} refused"
    );
}
