//! The device, driven without a VM.

use tenon_testkit::{Bench, conformance};
use {{crate}}::{IDENTITY, {{type}}};

#[test]
fn does_what_every_host_relies_on() {
    conformance::<{{type}}>(&[]);
}

#[test]
fn keeps_what_was_written_over_a_restart_and_not_over_a_reset() {
    let mut bench = Bench::<{{type}}>::new(&[("base", "0x520")]).unwrap();
    assert_eq!(bench.read(0, 0, 1), IDENTITY.into());
    bench.write(0, 1, 1, 0xa5);
    bench.round_trip();
    assert_eq!(bench.read(0, 1, 1), 0xa5);
    bench.reset();
    assert_eq!(bench.read(0, 1, 1), 0);
}
