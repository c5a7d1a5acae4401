//! The entropy device, from the driver's side.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use tenon_device_virtio_rng::Rng;
use tenon_testkit::{VirtioBench, VirtioSetup, virtio_conformance};

fn ready() -> VirtioBench<Rng> {
    VirtioBench::ready(&[]).unwrap()
}

#[test]
fn it_does_what_every_host_relies_on() {
    virtio_conformance::<Rng>(&[], &VirtioSetup::new());
}

#[test]
fn a_request_is_filled_whole_up_to_64_kib() {
    let mut bench = ready();
    for (room, filled) in [(1, 1), (17, 17), (65536, 65536), (65537, 65536), (1 << 20, 65536)] {
        let answer = bench.ask(0, &[], room);
        assert_eq!(answer.data.len(), filled);
        // Of random bytes, few are alike; a buffer that was not filled has one byte over and over.
        let first = answer.data.iter().filter(|byte| **byte == answer.data[0]).count();
        assert!(first <= 1 + filled / 64, "{first} of {filled} bytes are the same");
    }
}

#[test]
fn a_batch_is_answered_with_one_entry() {
    let mut bench = ready();
    let requests = bench.submit(0, &[(&[][..], 8); 64]);
    assert_eq!(bench.entries(), 1);
    let mut seen: Vec<Vec<u8>> =
        requests.into_iter().map(|request| bench.answered(request).unwrap().data).collect();
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), 64, "no two have the same bytes");
}

#[test]
fn requests_without_room_come_back_empty() {
    let mut bench = ready();
    assert_eq!(bench.ask(0, &[], 0).written, 0);
    assert_eq!(bench.ask(0, &[1, 2, 3], 0).written, 0);
    assert_eq!(bench.ask(0, &[1, 2, 3], 4).written, 4);
    bench.reset();
    bench.activate(0).unwrap();
    bench.round_trip();
    assert_eq!(bench.ask(0, &[], 4).written, 4);
}
