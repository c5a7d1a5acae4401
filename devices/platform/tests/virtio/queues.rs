//! Queues: round trips in every format, notifications, interrupts.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::device::Echo;
use crate::driver::{Driver, EVENT_INDEX, F_INDIRECT, F_WRITE, INDIRECT, PACKED, Ring, VERSION_1};
use crate::machine::TestMachine;

/// Every combination of ring formats.
pub(crate) const FORMATS: [u64; 8] = [
    0,
    INDIRECT,
    EVENT_INDEX,
    INDIRECT | EVENT_INDEX,
    PACKED,
    PACKED | INDIRECT,
    PACKED | EVENT_INDEX,
    PACKED | INDIRECT | EVENT_INDEX,
];

pub(crate) fn running(machine: &TestMachine, format: u64, size: u16) -> (Arc<Echo>, Driver, Ring) {
    let device = Echo::new(&[size.next_power_of_two(), 8]);
    let slot = machine.attach("echo", &device);
    let mut driver = Driver::new(machine, slot);
    assert!(driver.negotiate(VERSION_1 | format));
    driver.enable_msix(3);
    let ring = driver.queue(0, size, 1);
    driver.set_driver_ok();
    assert_eq!(driver.status(), 0xf);
    (device, driver, ring)
}

#[test]
fn requests_come_back_answered_in_every_format() {
    for format in FORMATS {
        let machine = TestMachine::new(1);
        let (device, mut driver, mut ring) = running(&machine, format, 8);
        let (from, to) = (driver.allocate(4096), driver.allocate(4096));
        // Three times around the ring, and more.
        for round in 0..40u8 {
            driver.poke(from, [round; 16]);
            driver.poke(to, [0u8; 16]);
            let parts = [(from, 10, 0), (from + 10, 6, 0), (to, 4, F_WRITE), (to + 4, 100, F_WRITE)];
            let id = if format & INDIRECT != 0 && round % 2 == 0 {
                let table = driver.allocate(64);
                for (n, (address, length, flags)) in (0u16..).zip(parts) {
                    let at = table + 16 * u64::from(n);
                    driver.poke(at, address);
                    driver.poke(at + 8, length);
                    if format & PACKED != 0 {
                        driver.poke(at + 14, flags);
                    } else {
                        driver.poke(at + 12, flags | u16::from(n < 3));
                        driver.poke(at + 14, n + 1);
                    }
                }
                ring.add(&[(table, 64, F_INDIRECT)])
            } else {
                ring.add(&parts)
            };
            assert!(ring.poll().is_none());
            assert_eq!(device.work(0), 1);
            assert_eq!(ring.poll(), Some((id, 16)), "format {format:#x}, round {round}");
            assert!(ring.poll().is_none());
            assert_eq!(driver.peek::<[u8; 16]>(to), [round + 1; 16]);
        }
        assert_eq!(device.started.lock().unwrap().as_ref().unwrap().features, VERSION_1 | format);
        assert_eq!(driver.status(), 0xf);
    }
}

#[test]
fn the_device_is_notified_only_where_it_asked_to_be() {
    for format in FORMATS {
        let machine = TestMachine::new(1);
        let (device, mut driver, mut ring) = running(&machine, format, 8);
        let to = driver.allocate(16);
        assert_eq!(device.work(0), 0);
        for _ in 0..20 {
            ring.add(&[(to, 16, F_WRITE)]);
            assert!(ring.wants_notification(1), "format {format:#x}");
            let before = device.notified.load(Ordering::SeqCst);
            ring.notify();
            assert_eq!(device.notified.load(Ordering::SeqCst), before + 1);
            let requests = device.take(0, 1).unwrap();
            // It has not said that it wants more.
            ring.add(&[(to, 16, F_WRITE)]);
            assert!(!ring.wants_notification(1), "format {format:#x}");
            device.answer(0, requests);
            assert_eq!(device.work(0), 1);
            assert!(ring.poll().is_some() && ring.poll().is_some());
        }
    }
}

#[test]
fn the_driver_is_interrupted_only_where_it_asked_to_be() {
    for format in FORMATS {
        let machine = TestMachine::new(1);
        let (device, mut driver, mut ring) = running(&machine, format, 8);
        let to = driver.allocate(16);
        let round = |ring: &mut Ring, wanted: bool| {
            ring.add(&[(to, 16, F_WRITE)]);
            device.work(0);
            let expected: &[u32] = if wanted { &[0x41] } else { &[] };
            assert_eq!(machine.controller.take_msis(), expected, "format {format:#x}");
        };
        if format & EVENT_INDEX == 0 {
            round(&mut ring, true);
            ring.want_no_interrupt();
            round(&mut ring, false);
            continue;
        }
        for _ in 0..20 {
            // After the third from here.
            ring.want_interrupt(2);
            for wanted in [false, false, true, false] {
                round(&mut ring, wanted);
            }
            while ring.poll().is_some() {}
        }
    }
}

#[test]
fn requests_come_back_in_any_order() {
    for format in FORMATS {
        let machine = TestMachine::new(1);
        let (device, mut driver, mut ring) = running(&machine, format, 8);
        let to = driver.allocate(16);
        for _ in 0..10 {
            let ids: Vec<_> = (0..4).map(|n| ring.add(&[(to, 1 + n, F_WRITE), (to, 1, F_WRITE)])).collect();
            let mut requests = device.take(0, 64).unwrap();
            requests.reverse();
            device.answer(0, requests);
            let back: Vec<_> = std::iter::from_fn(|| ring.poll()).map(|(id, _)| id).collect();
            assert_eq!(back, ids.into_iter().rev().collect::<Vec<_>>());
        }
    }
}

#[test]
fn what_is_not_published_is_not_seen() {
    for format in FORMATS {
        let machine = TestMachine::new(1);
        let (device, mut driver, mut ring) = running(&machine, format, 8);
        let to = driver.allocate(16);
        ring.add(&[(to, 16, F_WRITE)]);
        let token = device.take(0, 1).unwrap()[0].token;
        device.with(0, |queue| queue.complete(token, 99));
        assert!(ring.poll().is_none() && machine.controller.take_msis().is_empty());
        device.with(0, |queue| queue.publish());
        // No more than was there to be written.
        assert_eq!(ring.poll().unwrap().1, 16);
    }
}
