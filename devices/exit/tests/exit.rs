//! The debug exit port, from the guest's side.

use tenon_device_exit::Exit;
use tenon_sdk::device::Request;
use tenon_testkit::{Bench, conformance};

#[test]
fn it_does_what_every_host_relies_on() {
    conformance::<Exit>(&[]);
    conformance::<Exit>(&[("base", "0x501")]);
}

#[test]
fn a_write_ends_the_machine_with_its_low_byte_as_status() {
    for (port, size, value, status) in
        [(0, 1, 0, 0), (0, 1, 0x2a, 0x2a), (3, 1, 255, 255), (0, 4, 0x1234_5607, 7)]
    {
        let mut bench = Bench::<Exit>::new(&[]).unwrap();
        bench.write(0, port, size, value);
        assert_eq!(bench.request(), Some(Request::Exit(status)));
    }
}

#[test]
fn a_read_gives_all_ones_and_ends_nothing() {
    let mut bench = Bench::<Exit>::new(&[]).unwrap();
    assert_eq!(bench.read(0, 0, 4), 0xffff_ffff);
    assert_eq!(bench.request(), None);
}

#[test]
fn it_lies_where_it_is_configured_and_nowhere_else() {
    assert_eq!(Bench::<Exit>::new(&[]).unwrap().description().regions[0].base, Some(0xf4));
    assert_eq!(Bench::<Exit>::new(&[("base", "0x501")]).unwrap().description().regions[0].base, Some(0x501));
    let error = Bench::<Exit>::new(&[("base", "0xfffd")]).err().unwrap();
    assert!(error.to_string().contains("base"), "{error}");
}
