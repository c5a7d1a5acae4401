//! Any messages and bytes in any buffers, with ends that stall. `cargo fuzz run virtio_console` runs the same target.

use tenon_device_virtio_console::Console;
use tenon_testkit::VirtioSetup;
use tenon_testkit::fuzz::{Input, Seen, virtio};

/// The first byte chooses among settings, the rest are deeds.
pub(crate) fn target(data: &[u8]) -> Seen {
    let mut input = Input::new(data);
    let settings: &[_] = [&[][..], &[("ports", "a,b")], &[("size", "1x65535")]][usize::from(input.u8() % 3)];
    let adjustable = [("size", "100x40"), ("size", "0x0"), ("ports", "c")];
    let deeds = input.take(usize::MAX);
    virtio::<Console>(settings, &VirtioSetup::new(), &adjustable, deeds, |_, exchange| {
        assert!(exchange.answered.written as usize <= exchange.room);
    })
}

#[test]
fn any_messages_and_bytes_are_survived() {
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus/virtio_console");
    let report = tenon_testkit::fuzz::run(corpus.as_ref(), 3000, target);
    let sum = |queue: u8, from: u8| -> u64 {
        (from..=17).map(|bits| report.count(&format!("queue {queue}: an answer of {bits} bits"))).sum()
    };
    let (typed, printed, told, heard) = (sum(0, 1), sum(1, 0), sum(2, 4), sum(3, 0));
    assert!(
        [typed, printed, told, heard].iter().all(|count| *count > 100),
        "{typed} inputs are typed at, {printed} print, {told} are told of ports, {heard} are heard"
    );
}
