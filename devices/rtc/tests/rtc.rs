//! The real-time clock, from the guest's side.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use tenon_device_rtc::Rtc;
use tenon_testkit::{Bench, conformance};

const A: u8 = 0x0a;
const B: u8 = 0x0b;
const C: u8 = 0x0c;
const D: u8 = 0x0d;
const CENTURY: u8 = 0x32;

const UIP: u8 = 0x80;
const SET: u8 = 0x80;
const PERIODIC: u8 = 0x40;
const ALARM: u8 = 0x20;
const UPDATED: u8 = 0x10;
const BINARY: u8 = 0x04;
const HOURS_24: u8 = 0x02;
const INTERRUPT: u8 = 0x80;

const MILLISECOND: u64 = 1_000_000;
const SECOND: u64 = 1_000_000_000;
/// 2026-02-28 23:59:58 UTC, a Saturday.
const EVENING: u64 = 1_772_323_198 * SECOND;

struct Clock(Bench<Rtc>);

impl Clock {
    /// A clock at [`EVENING`].
    fn new() -> Self {
        let mut bench = Bench::new(&[]).unwrap();
        bench.set_wall_clock(EVENING);
        let mut clock = Self(bench);
        // The jump from the bench's own time is behind it.
        clock.read(C);
        clock
    }

    fn read(&mut self, register: u8) -> u8 {
        self.0.write(0, 0, 1, register.into());
        u8::try_from(self.0.read(0, 1, 1)).unwrap()
    }

    fn write(&mut self, register: u8, value: u8) {
        self.0.write(0, 0, 1, register.into());
        self.0.write(0, 1, 1, value.into());
    }

    /// Century, year, month, day, hour, minute, second, as the registers have them.
    fn date(&mut self) -> [u8; 7] {
        [CENTURY, 9, 8, 7, 4, 2, 0].map(|register| self.read(register))
    }

    fn high(&self) -> bool {
        self.0.line(0).high
    }
}

#[test]
fn it_does_what_every_host_relies_on() {
    conformance::<Rtc>(&[]);
}

#[test]
fn it_asks_for_the_ports_line_and_acpi_node_of_a_pc() {
    let bench = Bench::<Rtc>::new(&[]).unwrap();
    let description = bench.description();
    assert_eq!((description.regions[0].base, description.regions[0].size), (Some(0x70), 2));
    assert_eq!(description.lines[0].gsi, Some(8));
    assert_eq!(description.acpi.clone().unwrap().hid, "PNP0B00");
}

#[test]
fn the_time_is_the_hosts_and_goes_on() {
    let mut clock = Clock::new();
    assert_eq!(clock.date(), [0x20, 0x26, 0x02, 0x28, 0x23, 0x59, 0x58]);
    assert_eq!(clock.read(6), 7, "Saturday");
    clock.0.advance(2 * SECOND);
    assert_eq!(clock.date(), [0x20, 0x26, 0x03, 0x01, 0x00, 0x00, 0x00]);
    assert_eq!(clock.read(6), 1, "Sunday");
    assert_eq!(clock.read(D), 0x80, "the battery is good");
}

#[test]
fn the_time_comes_in_bcd_or_binary_and_in_12_or_24_hours() {
    let mut clock = Clock::new();
    clock.write(B, HOURS_24 | BINARY);
    assert_eq!(clock.date(), [20, 26, 2, 28, 23, 59, 58]);
    for (hours, shown, bcd) in
        [(0, 0x80 | 11, 0x91), (1, 12, 0x12), (2, 1, 0x01), (13, 0x80 | 12, 0x92), (14, 0x81, 0x81)]
    {
        let mut clock = Clock::new();
        clock.0.advance(hours * 3600 * SECOND);
        clock.write(B, BINARY);
        assert_eq!(clock.read(4), shown);
        clock.write(B, 0);
        assert_eq!(clock.read(4), bcd);
    }
}

#[test]
fn linux_sets_it_and_it_goes_on_half_a_second_later() {
    let mut clock = Clock::new();
    clock.0.advance(300 * MILLISECOND);
    // drivers/rtc/rtc-mc146818-lib.c: hold, reset the divider, write, release, start the divider.
    clock.write(B, SET | HOURS_24);
    let a = clock.read(A);
    clock.write(A, a | 0x70);
    for (register, value) in
        [(9, 0x99), (8, 0x12), (7, 0x31), (4, 0x23), (2, 0x59), (0, 0x59), (CENTURY, 0x19)]
    {
        clock.write(register, value);
    }
    clock.0.advance(5 * SECOND);
    assert_eq!(clock.date(), [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59], "it is held");
    clock.write(B, HOURS_24);
    clock.write(A, a & 0x7f);
    clock.0.advance(499 * MILLISECOND);
    assert_eq!(clock.read(0), 0x59);
    clock.0.advance(2 * MILLISECOND);
    assert_eq!(clock.date(), [0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00]);
    assert_eq!(clock.read(6), 7, "a Saturday");
    // The offset to the host's time survives.
    clock.0.round_trip();
    clock.0.advance(86_400 * SECOND);
    assert_eq!(clock.date(), [0x20, 0x00, 0x01, 0x02, 0x00, 0x00, 0x00]);
}

#[test]
fn a_field_can_be_set_while_the_clock_runs() {
    let mut clock = Clock::new();
    clock.write(9, 0x31);
    clock.write(4, 0x04);
    clock.0.advance(2 * SECOND);
    assert_eq!(clock.date(), [0x20, 0x31, 0x02, 0x28, 0x05, 0x00, 0x00]);
}

#[test]
fn update_in_progress_shows_shortly_before_each_second_and_never_sticks() {
    let mut clock = Clock::new();
    let mut seen = 0;
    // A sample each millisecond, over three seconds.
    for millisecond in 0..3000 {
        let updating = clock.read(A) & UIP != 0;
        assert_eq!(updating, millisecond % 1000 >= 998, "{millisecond}");
        seen += u32::from(updating);
        clock.0.advance(MILLISECOND);
    }
    assert_eq!(seen, 6);
    clock.write(B, SET | HOURS_24);
    clock.0.advance(999 * MILLISECOND);
    assert_eq!(clock.read(A) & UIP, 0, "not while it is held");
}

#[test]
fn the_update_interrupt_comes_at_each_second_and_is_cleared_by_reading_c() {
    let mut clock = Clock::new();
    clock.0.advance(400 * MILLISECOND);
    clock.write(B, HOURS_24 | UPDATED);
    clock.0.advance(599 * MILLISECOND);
    assert!(!clock.high());
    clock.0.advance(MILLISECOND);
    assert!(clock.high());
    assert_eq!(clock.read(0), 0x59);
    assert_eq!(clock.read(C) & !PERIODIC, INTERRUPT | UPDATED);
    assert!(!clock.high());
    assert_eq!(clock.read(C), 0);
    for _ in 0..10 {
        clock.0.advance(SECOND);
        clock.read(C);
    }
    assert_eq!(clock.0.line(0).edges, 11);
    clock.write(B, SET | HOURS_24 | UPDATED);
    assert_eq!(clock.read(B) & UPDATED, 0, "holding the clock switches it off");
}

#[test]
fn the_periodic_interrupt_keeps_its_rate() {
    for (rate, per_second) in [(1, 256), (2, 128), (3, 8192), (6, 1024), (15, 2)] {
        let mut clock = Clock::new();
        clock.write(A, 0x20 | rate);
        clock.write(B, HOURS_24 | PERIODIC);
        let mut ticks = 0;
        while let Some(deadline) = clock.0.timer(0) {
            let step = deadline - clock.0.now();
            if clock.0.now() + step > 2 * SECOND {
                break;
            }
            clock.0.advance(step);
            assert!(clock.high());
            assert_eq!(clock.read(C) & (INTERRUPT | PERIODIC), INTERRUPT | PERIODIC);
            ticks += 1;
        }
        assert_eq!(ticks, 2 * per_second, "rate {rate}");
    }
    let mut clock = Clock::new();
    clock.write(A, 0x20);
    clock.write(B, HOURS_24 | PERIODIC);
    assert_eq!(clock.0.timer(0), None, "rate 0 is off");
}

#[test]
fn an_interrupt_that_nobody_clears_arms_no_timer() {
    let mut clock = Clock::new();
    clock.write(A, 0x23);
    clock.write(B, HOURS_24 | PERIODIC);
    clock.0.advance(SECOND);
    assert!(clock.high());
    assert_eq!(clock.0.timer(0), None);
    assert_eq!(clock.0.line(0).edges, 1);
}

#[test]
fn the_alarm_comes_at_its_time_and_each_day_again() {
    let mut clock = Clock::new();
    for (register, value) in [(1, 0x30), (3, 0x15), (5, 0x06)] {
        clock.write(register, value);
    }
    clock.write(B, HOURS_24 | ALARM);
    let until = (6 * 3600 + 15 * 60 + 30 + 2) * SECOND;
    clock.0.advance(until - 1);
    assert!(!clock.high());
    clock.0.advance(1);
    assert!(clock.high());
    assert_eq!([4, 2, 0].map(|register| clock.read(register)), [0x06, 0x15, 0x30]);
    assert_eq!(clock.read(C) & !PERIODIC, INTERRUPT | ALARM | UPDATED);
    clock.0.advance(86_400 * SECOND - 1);
    assert!(!clock.high());
    clock.0.advance(1);
    assert!(clock.high());
}

#[test]
fn an_alarm_field_can_match_everything_and_an_impossible_one_nothing() {
    let mut clock = Clock::new();
    for register in [1, 3, 5] {
        clock.write(register, 0xc0);
    }
    clock.write(B, HOURS_24 | ALARM);
    for _ in 0..5 {
        clock.0.advance(SECOND);
        assert_eq!(clock.read(C) & ALARM, ALARM, "each second");
    }
    clock.write(3, 0x60);
    clock.read(C);
    assert_eq!(clock.0.timer(0), None);
    clock.0.advance(3 * 86_400 * SECOND);
    assert_eq!(clock.read(C) & ALARM, 0);
}

#[test]
fn flags_are_set_without_interrupts_too() {
    let mut clock = Clock::new();
    assert_eq!(clock.0.timer(0), None, "polling costs no timer");
    clock.0.advance(SECOND);
    assert_eq!(clock.read(C), PERIODIC | UPDATED);
    assert_eq!(clock.0.line(0).edges, 0);
}

#[test]
fn the_ram_keeps_114_bytes_of_which_one_is_the_century() {
    let mut clock = Clock::new();
    let ram = || (0x0e..0x80).filter(|register| *register != CENTURY);
    for register in ram() {
        clock.write(register, register ^ 0x5a);
    }
    clock.0.round_trip();
    for register in ram() {
        assert_eq!(clock.read(register), register ^ 0x5a);
    }
    assert_eq!(clock.read(CENTURY), 0x20);
    // The top bit of the index masks NMIs and is no part of the number.
    assert_eq!(clock.read(0x80 | 0x40), 0x40 ^ 0x5a);
}

#[test]
fn a_host_clock_that_is_set_back_does_no_harm() {
    let mut clock = Clock::new();
    clock.write(B, HOURS_24 | UPDATED);
    clock.0.set_wall_clock(EVENING - 3600 * SECOND);
    clock.0.advance(10 * SECOND);
    clock.read(C);
    clock.0.advance(SECOND);
    assert!(clock.high());
    assert_eq!(clock.date()[4..6], [0x23, 0x00]);
}
