//! The balloon, from the driver's side and from the administrator's.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use tenon_device_virtio_balloon::Balloon;
use tenon_sdk::virtio::Result;
use tenon_testkit::{Random, Ticket, VirtioBench, VirtioSetup, virtio_conformance};

const STATS: u64 = 1 << 1;
const DEFLATE_ON_OOM: u64 = 1 << 2;
const REPORTING: u64 = 1 << 5;

const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const STATS_QUEUE: u16 = 2;

const SECOND: u64 = 1_000_000_000;
/// The guest's memory on the bench.
const GIB: u64 = 1 << 30;

struct Guest(VirtioBench<Balloon>);

impl Guest {
    /// Before its driver is ready.
    fn started(settings: &[(&str, &str)]) -> Result<Self> {
        Ok(Self(VirtioBench::with(settings, &VirtioSetup::new().memory(GIB))?))
    }

    /// Ready, with a driver that accepted these features.
    fn with(settings: &[(&str, &str)], features: u64) -> Self {
        let mut guest = Self::started(settings).unwrap();
        guest.0.activate(features).unwrap();
        guest
    }

    fn target(&mut self) -> u64 {
        self.0.config_read(0, 4)
    }

    fn stats(&mut self, free: u64) -> Ticket {
        let bytes = [&[4, 0][..], &free.to_le_bytes(), &[5, 0], &GIB.to_le_bytes()].concat();
        self.0.request(STATS_QUEUE, &bytes, 0)
    }

    /// Whether the driver has been asked for new statistics: its last ones came back.
    fn is_asked(&mut self, last: Ticket) -> bool {
        self.0.answered(last).is_some()
    }

    fn logged(&mut self, text: &str) -> bool {
        self.0.take_log().iter().any(|(_, line)| line.contains(text))
    }
}

#[test]
fn it_does_what_every_host_relies_on() {
    virtio_conformance::<Balloon>(&[], &VirtioSetup::new());
    virtio_conformance::<Balloon>(
        &[("target", "128MiB"), ("stats-interval", "5"), ("deflate-on-oom", "false")],
        &VirtioSetup::new(),
    );
}

#[test]
fn settings_that_cannot_be_are_refused_and_say_what_would_be_right() {
    let refusal = |key, value| Guest::started(&[(key, value)]).err().unwrap().to_string();
    assert!(refusal("target", "2GiB").contains("no more than 1073741824"));
    assert!(refusal("target", "much").contains("MiB"));
    assert!(refusal("stats-interval", "3601").contains("0 to 3600"));
    let features = |value| Guest::started(&[("deflate-on-oom", value)]).unwrap().0.description().features;
    assert_eq!(features("true") & DEFLATE_ON_OOM, DEFLATE_ON_OOM);
    assert_eq!(features("false"), STATS | REPORTING);
}

#[test]
fn the_target_is_what_the_guest_keeps() {
    assert_eq!(Guest::with(&[], 0).target(), 0);
    assert_eq!(Guest::with(&[("target", "1GiB")], 0).target(), 0);
    let mut guest = Guest::with(&[("target", "512MiB")], 0);
    assert_eq!(guest.target(), 131_072);
    for _ in 0..2 {
        guest.0.adjust("target", "768 MiB").unwrap();
        assert_eq!((guest.target(), guest.0.config_changes()), (65_536, 1), "the second changes nothing");
    }
    for (key, value) in
        [("target", "2GiB"), ("target", ""), ("stats-interval", "-1"), ("deflate-on-oom", "true")]
    {
        assert!(guest.0.adjust(key, value).is_err(), "{key}={value}");
    }
    guest.0.round_trip();
    assert_eq!(guest.target(), 65_536);
    guest.0.reset();
    assert_eq!(guest.target(), 65_536, "settings stay as adjusted");
}

#[test]
fn inflated_pages_go_back_to_the_host_and_deflating_needs_nothing() {
    let mut guest = Guest::with(&[], 0);
    guest.0.ask(INFLATE, &[1, 0, 0, 0, 2, 0, 0, 0], 0);
    guest.0.ask(INFLATE, &[], 0);
    guest.0.ask(INFLATE, &[1, 2, 3], 7);
    guest.0.ask(DEFLATE, &[1, 0, 0, 0], 0);
    assert_eq!(guest.0.released_pages(), [1, 2]);
    guest.0.config_write(4, 4, 2);
    guest.0.config_write(0, 4, 9);
    assert_eq!((guest.0.config_read(4, 4), guest.target()), (2, 0), "the driver writes only what is its own");
}

#[test]
fn reported_pages_are_given_back_whichever_number_the_driver_gives_the_queue() {
    for (features, queues) in [(STATS | REPORTING, &[3, 4][..]), (REPORTING, &[2, 3, 4])] {
        for queue in queues {
            let mut guest = Guest::with(&[], features);
            assert_eq!(guest.0.ask(*queue, &[], 8192).written, 0);
            guest.0.ask(*queue, &[], 100);
            assert_eq!(guest.0.released_own(), 2);
        }
    }
}

#[test]
fn statistics_are_kept_until_the_next_are_asked_for() {
    let mut guest = Guest::with(&[("stats-interval", "10")], STATS);
    let first = guest.stats(100 << 20);
    assert!(guest.logged("100 MiB free, 1024 MiB in all"));
    guest.0.advance(9 * SECOND);
    assert!(!guest.is_asked(first));
    guest.0.advance(SECOND);
    assert!(guest.is_asked(first));
    let second = guest.stats(50 << 20);
    assert!(guest.logged("50 MiB free"));
    guest.0.advance(5 * SECOND);
    guest.0.round_trip();
    guest.0.advance(4 * SECOND);
    assert!(!guest.is_asked(second));
    guest.0.advance(SECOND);
    assert!(guest.is_asked(second), "the deadline is part of the state");
    guest.0.advance(100 * SECOND);
    assert!(guest.0.unanswered().is_empty());
}

#[test]
fn statistics_can_be_switched_on_and_off() {
    let mut guest = Guest::with(&[], STATS);
    let first = guest.stats(1);
    guest.0.advance(10_000 * SECOND);
    assert!(!guest.is_asked(first));
    guest.0.adjust("stats-interval", "1").unwrap();
    guest.0.advance(SECOND);
    assert!(guest.is_asked(first));
    let second = guest.stats(1);
    guest.0.adjust("stats-interval", "0").unwrap();
    guest.0.advance(10 * SECOND);
    assert!(!guest.is_asked(second));
    assert_eq!(guest.0.timer(0), None);
}

#[test]
fn statistics_of_any_shape_are_stood() {
    let mut guest = Guest::with(&[], STATS);
    let known = [&[4, 0][..], &(7_u64 << 20).to_le_bytes()].concat();
    let unknown = [0xff; 10];
    for (bytes, told) in [
        (vec![], "nothing"),
        (vec![4], "nothing"),
        (unknown.to_vec(), "nothing"),
        ([&unknown[..], &known, &[4, 0, 1]].concat(), "7 MiB free"),
        (known.repeat(500), "7 MiB free"),
    ] {
        guest.0.request(STATS_QUEUE, &bytes, 3);
        assert!(guest.logged(told));
        assert_eq!(guest.0.unanswered().len(), 1, "of several requests, the last is kept");
    }
}

#[test]
fn a_reset_forgets_what_the_driver_said() {
    let settings = [("stats-interval", "1")];
    let mut guest = Guest::with(&settings, STATS);
    let new = Guest::started(&settings).unwrap().0.save();
    guest.stats(5);
    guest.0.config_write(4, 4, 77);
    guest.0.reset();
    assert_eq!((guest.0.save(), guest.0.timer(0)), (new, None));
    // Nothing of the request that was held is touched any more: that would panic here.
    guest.0.advance(10 * SECOND);
    guest.0.activate(STATS).unwrap();
    guest.0.advance(10 * SECOND);
}

#[test]
fn whatever_a_driver_writes_only_one_request_waits() {
    let mut random = Random::new(0x6261_6c00_0000_0001);
    let mut guest = Guest::with(&[("stats-interval", "1")], STATS | REPORTING);
    for round in 0..20_000 {
        let bytes = random.some_bytes(200);
        guest.0.request(u16::try_from(random.below32(5)).unwrap(), &bytes, random.index(10_000));
        match round % 100 {
            0 => guest.0.round_trip(),
            25 => guest.0.config_write(4, 4, random.next()),
            50 => guest.0.advance(random.next() % (2 * SECOND)),
            75 => {
                let _ = guest.0.adjust("stats-interval", &random.below32(4).to_string());
            }
            _ => {}
        }
        assert!(guest.0.unanswered().len() <= 1);
    }
}
