//! The counter, driven without a VM. Time is the test's.

use counter::Counter;
use tenon_testkit::{Bench, conformance};

const COUNT: u64 = 0x00;
const LIMIT: u64 = 0x04;
const PERIOD: u64 = 0x08;
const STATUS: u64 = 0x0c;
const MICROSECOND: u64 = 1_000;

fn running(limit: u64, period: u64) -> Bench<Counter> {
    let mut bench = Bench::new(&[]).unwrap();
    bench.write(0, LIMIT, 4, limit);
    bench.write(0, PERIOD, 4, period);
    bench
}

#[test]
fn does_what_every_host_relies_on() {
    conformance::<Counter>(&[("base", "0xd0001000")]);
}

#[test]
fn interrupts_at_the_limit_until_the_guest_answers() {
    let mut bench = running(3, 100);
    bench.advance(299 * MICROSECOND);
    assert_eq!((bench.read(0, COUNT, 4), bench.line(0).level()), (2, false));
    bench.advance(MICROSECOND);
    assert_eq!((bench.read(0, COUNT, 4), bench.read(0, STATUS, 4), bench.line(0).level()), (0, 1, true));
    bench.write(0, STATUS, 4, 1);
    assert_eq!((bench.read(0, STATUS, 4), bench.line(0).level(), bench.line(0).edges), (0, false, 1));
}

#[test]
fn the_next_count_comes_in_time_after_a_restart() {
    let mut bench = running(0, 100);
    bench.advance(150 * MICROSECOND);
    bench.round_trip();
    bench.advance(49 * MICROSECOND);
    assert_eq!(bench.read(0, COUNT, 4), 1);
    bench.advance(MICROSECOND);
    assert_eq!(bench.read(0, COUNT, 4), 2);
}

#[test]
fn a_period_of_zero_stops_it() {
    let mut bench = running(0, 100);
    bench.write(0, PERIOD, 4, 0);
    bench.advance(1_000_000_000);
    assert_eq!((bench.read(0, COUNT, 4), bench.timer(0)), (0, None));
}
