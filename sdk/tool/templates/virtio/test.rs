//! The device, driven without a VM.

use tenon_testkit::{VirtioBench, VirtioSetup, virtio_conformance};
use {{crate}}::{{type}};

#[test]
fn does_what_every_host_relies_on() {
    virtio_conformance::<{{type}}>(&[], &VirtioSetup::new());
}

#[test]
fn fills_what_the_driver_gives_and_no_more_than_it_may() {
    let mut bench = VirtioBench::<{{type}}>::ready(&[("most", "16")]).unwrap();
    assert_eq!(bench.ask(0, &[], 8).data.len(), 8);
    assert_eq!(bench.ask(0, &[], 100).data.len(), 16);
    assert_ne!(bench.ask(0, &[], 16).data, bench.ask(0, &[], 16).data);
}

#[test]
fn answers_a_batch_in_one_call() {
    let mut bench = VirtioBench::<{{type}}>::ready(&[]).unwrap();
    let tickets = bench.submit(0, &[(&[][..], 32); 64]);
    assert_eq!(bench.entries(), 1);
    assert!(tickets.into_iter().all(|ticket| bench.answered(ticket).is_some_and(|answer| answer.written == 32)));
}

#[test]
fn the_administrator_changes_the_limit_while_it_runs() {
    let mut bench = VirtioBench::<{{type}}>::ready(&[]).unwrap();
    bench.adjust("most", "4").unwrap();
    assert_eq!(bench.ask(0, &[], 100).written, 4);
    assert!(bench.adjust("most", "0").unwrap_err().to_string().contains("`most`"));
    bench.round_trip();
    assert_eq!(bench.ask(0, &[], 100).written, 4);
}
