//! Drivers that break every rule, by random numbers with known seeds, and one that rewrites its rings while they are read.
//!
//! Whatever they do, the device sees only what lies in RAM, is bounded, and can be reset and used again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_memory::{Bytes, GuestAddress};

use crate::device::Echo;
use crate::driver::{Driver, F_INDIRECT, F_NEXT, F_WRITE, INDIRECT, PACKED, Part, Ring, VERSION_1};
use crate::machine::{RAM, TestMachine};
use crate::queues::{FORMATS, running};
use crate::random::Random;

/// The driver can reset what it broke, and the queue works again.
fn works_after_reset(machine: &TestMachine, device: &Echo, driver: &mut Driver, format: u64) {
    assert!(driver.negotiate(VERSION_1 | format));
    let mut ring = driver.queue(0, 8, 1);
    driver.set_driver_ok();
    assert_eq!(driver.status(), 0xf);
    let to = driver.allocate(16);
    ring.add(&[(to, 16, F_WRITE)]);
    assert_eq!(device.work(0), 1);
    assert!(ring.poll().is_some());
    machine.controller.take_msis();
}

/// What comes of a request with these descriptors in a queue of 8: its lengths, or why the queue is broken.
fn verdict(format: u64, parts: &[Part]) -> Result<(u64, u64), String> {
    let machine = TestMachine::new(1);
    let (device, mut driver, mut ring) = running(&machine, format, 8);
    driver.write(16, 2, 0);
    ring.add(parts);
    let mut requests = Vec::new();
    let result = device.with(0, |queue| queue.take(9, &mut requests));
    let lengths = requests.first().map(|r| (r.readable.length(), r.writable.length()));
    drop(requests);
    match result {
        Ok(()) => {
            assert_eq!(driver.status(), 0xf);
            Ok(lengths.unwrap())
        }
        Err(broken) => {
            assert!(lengths.is_none());
            assert_eq!(driver.status(), 0x4f, "{broken}");
            assert_eq!(machine.controller.take_msis(), [0x40], "the driver is told once");
            assert!(device.take(0, 1).is_err(), "a broken queue stays broken");
            works_after_reset(&machine, &device, &mut driver, format);
            Err(broken.what)
        }
    }
}

#[test]
fn a_request_that_breaks_the_rules_breaks_its_queue_until_the_next_reset() {
    for format in FORMATS {
        let good = [(0x20_0000, 16, 0), (0x30_0000, 16, F_WRITE)];
        assert_eq!(verdict(format, &good), Ok((16, 16)));
        assert_eq!(verdict(format, &[(RAM - 16, 16, F_WRITE)]), Ok((0, 16)));
        let broken: [&[Part]; 12] = [
            &[(RAM - 16, 17, 0)],
            &[(RAM, 1, F_WRITE)],
            &[(0xd000_0000, 16, 0)],
            &[(0xe000_0000, 16, F_WRITE)],
            &[(u64::MAX, 1, 0)],
            &[(u64::MAX - 15, 16, 0)],
            &[(1 << 63, 16, 0)],
            &[(0x20_0000, u32::MAX, 0)],
            &[(0x20_0000, 0, 0)],
            &[(0x20_0000, 16, F_WRITE), (0x20_0000, 16, 0)],
            &[(0x20_0000, 16, 0), (0x20_0000, 0, F_WRITE)],
            &[(0x20_0000, 16, 0), (0x20_0000, 16, F_WRITE), (RAM, 16, F_WRITE)],
        ];
        for parts in broken {
            assert!(verdict(format, parts).is_err(), "format {format:#x}: {parts:x?}");
        }
        // 16 MiB each: RAM is that large, and 256 of them are 4 GiB; but a queue of 8 has no more than 8.
        let all: Vec<_> = (0..8).map(|_| (0, RAM as u32, 0)).collect();
        assert_eq!(verdict(format, &all), Ok((8 * RAM, 0)));
    }
}

#[test]
fn indirect_tables_are_bounded_flat_and_at_the_end() {
    for format in FORMATS {
        let table = 0x40_0000;
        let flag_at = if format & PACKED != 0 { 14 } else { 12 };
        let with_table = |length: u32, entries: u64, flags: u16, more: &[Part]| {
            let machine = TestMachine::new(1);
            let (device, driver, mut ring) = running(&machine, format, 8);
            for n in 0..entries {
                let at = table + 16 * n;
                driver.poke(at, 0x20_0000u64);
                driver.poke(at + 8, 4u32);
                driver.poke(at + flag_at, flags);
                if format & PACKED == 0 {
                    driver.poke(at + 14, (n + 1) as u16);
                    if n + 1 < entries {
                        driver.poke(at + 12, flags | F_NEXT);
                    }
                }
            }
            let mut parts = vec![(table, length, F_INDIRECT)];
            parts.extend(more);
            ring.add(&parts);
            let taken = device.take(0, 9);
            taken.map(|requests| requests[0].readable.length() + requests[0].writable.length()).ok()
        };
        let may = format & INDIRECT != 0;
        assert_eq!(with_table(128, 8, 0, &[]), may.then_some(32), "format {format:#x}");
        assert_eq!(with_table(16, 1, F_WRITE, &[]), may.then_some(4));
        for length in [0, 1, 15, 17, 127, 144, 1 << 20, u32::MAX, u32::MAX - 15] {
            assert_eq!(with_table(length, 9, 0, &[]), None, "format {format:#x}, {length} bytes");
        }
        assert_eq!(with_table(32, 2, F_INDIRECT, &[]), None);
        assert_eq!(with_table(32, 2, 0, &[(0x20_0000, 4, 0)]), None);
        // The table itself outside RAM.
        assert!(verdict(format, &[(RAM - 16, 32, F_INDIRECT)]).is_err());
        assert!(verdict(format, &[(u64::MAX - 15, 16, F_INDIRECT)]).is_err());
    }
}

#[test]
fn circles_end_after_as_many_steps_as_the_queue_has() {
    for format in [0, INDIRECT] {
        for indirect in [false, true] {
            let machine = TestMachine::new(1);
            let (device, driver, mut ring) = running(&machine, format, 8);
            let table = if indirect { 0x40_0000 } else { ring.places[0] };
            for n in 0..8u64 {
                driver.poke(table + 16 * n, 0x20_0000u64);
                driver.poke(table + 16 * n + 8, 1u32);
                driver.poke(table + 16 * n + 12, F_NEXT);
                driver.poke(table + 16 * n + 14, ((n + 1) % 8) as u16);
            }
            if indirect {
                ring.add(&[(table, 128, F_INDIRECT)]);
            } else {
                ring.offer(3);
            }
            assert!(device.take(0, 1).is_err());
            assert_eq!(driver.status(), 0x4f);
        }
    }
    // To itself, and past the end.
    for next in [0u16, 8, 0xffff] {
        let machine = TestMachine::new(1);
        let (device, driver, mut ring) = running(&machine, 0, 8);
        driver.poke(ring.places[0], 0x20_0000u64);
        driver.poke(ring.places[0] + 8, 1u32);
        driver.poke(ring.places[0] + 12, F_NEXT);
        driver.poke(ring.places[0] + 14, next);
        ring.offer(0);
        assert!(device.take(0, 1).is_err());
        assert_eq!(driver.status(), 0x4f);
    }
}

#[test]
fn an_available_index_that_jumps_breaks_the_queue() {
    for jump in [9u16, 0x7fff, 0x8000, 0xffff] {
        let machine = TestMachine::new(1);
        let (device, driver, ring) = running(&machine, 0, 8);
        driver.poke(ring.places[1] + 2, jump);
        assert!(device.take(0, 1).is_err());
        assert_eq!(driver.status(), 0x4f);
    }
    for head in [8u16, 0xffff] {
        let machine = TestMachine::new(1);
        let (device, driver, mut ring) = running(&machine, 0, 8);
        ring.offer(head);
        assert!(device.take(0, 1).is_err());
        assert_eq!(driver.status(), 0x4f);
    }
    // The same head twice.
    let machine = TestMachine::new(1);
    let (device, driver, mut ring) = running(&machine, 0, 8);
    let head = ring.add(&[(0x20_0000, 4, F_WRITE)]);
    ring.offer(head);
    let mut requests = Vec::new();
    assert!(device.with(0, |queue| queue.take(9, &mut requests)).is_err());
    assert_eq!((requests.len(), driver.status()), (1, 0x4f));
    device.answer(0, requests);
    assert!(ring.poll().is_some(), "what was taken before is good");
}

#[test]
fn a_packed_ring_gives_no_more_than_it_has() {
    let machine = TestMachine::new(1);
    let (device, driver, ring) = running(&machine, PACKED, 8);
    // Everything is available for ever: both wrap counters' worth of flags are written again behind the device's back.
    let mut taken = Vec::new();
    let mut wrap = true;
    let broken = loop {
        for n in 0..8 {
            let at = ring.places[0] + 16 * n;
            driver.poke(at, 0x20_0000u64);
            driver.poke(at + 8, 4u32);
            driver.poke(at + 14, if wrap { 1u16 << 7 } else { 1 << 15 });
        }
        wrap = !wrap;
        let result = device.with(0, |queue| queue.take(8, &mut taken));
        assert!(taken.len() <= 8);
        if let Err(broken) = result {
            break broken;
        }
    };
    assert!(broken.what.contains("in flight") && driver.status() == 0x4f, "{broken}");
}

#[test]
fn descriptors_in_flight_are_bounded_and_the_rest_comes_when_some_are_back() {
    let machine = TestMachine::new(1);
    let (device, driver, mut ring) = running(&machine, INDIRECT, 1024);
    // One table of 1,024 descriptors for every request: a million in flight.
    let table = 0x40_0000u64;
    for n in 0..1024u64 {
        driver.poke(table + 16 * n, 0x20_0000u64);
        driver.poke(table + 16 * n + 8, 1u32);
        driver.poke(table + 16 * n + 12, F_NEXT * u16::from(n < 1023));
        driver.poke(table + 16 * n + 14, (n + 1) as u16);
    }
    for _ in 0..1024 {
        ring.add(&[(table, 16 * 1024, F_INDIRECT)]);
    }
    let requests = device.take(0, usize::MAX).unwrap();
    assert_eq!(requests.len(), 64);
    assert!(device.take(0, usize::MAX).unwrap().is_empty());
    assert!(device.with(0, |queue| queue.arm()), "there is nothing to do but to wait");
    assert_eq!(device.notified.load(Ordering::SeqCst), 0);
    device.answer(0, requests);
    assert_eq!(device.notified.load(Ordering::SeqCst), 1);
    let mut count = 64;
    while count < 1024 {
        let requests = device.take(0, usize::MAX).unwrap();
        assert_eq!(requests.len(), 64);
        count += requests.len();
        device.answer(0, requests);
    }
    assert_eq!(std::iter::from_fn(|| ring.poll()).count(), 1024);
}

/// Fills the rings with numbers that are often nearly right.
fn scribble(random: &mut Random, driver: &Driver, ring: &Ring) {
    for _ in 0..random.below(40) {
        let place = ring.places[random.below(3) as usize];
        let at = place + 2 * random.below(100);
        let value = match random.below(6) {
            0 => random.below(16),
            1 => 1 << random.below(16),
            2 => 0xffff,
            3 => 0x80 * random.below(0x200),
            _ => random.next(),
        };
        driver.poke(at, value as u16);
    }
}

fn random_parts(random: &mut Random) -> Vec<Part> {
    let mut parts: Vec<Part> = (0..=random.below(4))
        .map(|_| (random.below(RAM - 5000), 1 + random.below(4999) as u32, F_WRITE * random.below(2) as u16))
        .collect();
    parts.sort_by_key(|part| part.2);
    if random.below(8) == 0 {
        let count = parts.len() as u64;
        let part = &mut parts[random.below(count) as usize];
        match random.below(5) {
            0 => part.0 = random.next(),
            1 => part.0 = RAM - random.below(64),
            2 => part.1 = random.next() as u32,
            3 => part.1 = 0,
            _ => part.2 = random.below(8) as u16 & !F_NEXT,
        }
    }
    parts
}

#[test]
fn random_rings_never_reach_outside_ram_nor_stop_the_device_for_good() {
    let mut broken = 0;
    let mut answered = 0;
    // Miri is a thousand times as slow.
    const RINGS: usize = if cfg!(miri) { 8 } else { 400 };
    for seed in 0..RINGS as u64 {
        let mut random = Random::new(seed);
        let format = FORMATS[random.below(8) as usize];
        let size = 1 << random.below(8);
        let machine = TestMachine::new(1);
        let (device, mut driver, mut ring) = running(&machine, format, size);
        for _ in 0..60 {
            if random.below(16) == 0 {
                scribble(&mut random, &driver, &ring);
            }
            for _ in 0..random.below(3) {
                let mut parts = random_parts(&mut random);
                parts.truncate(size.into());
                ring.add(&parts);
            }
            let mut requests = Vec::new();
            let most = random.below(20) as usize;
            let result = device.with(0, |queue| queue.take(most, &mut requests));
            assert!(requests.len() <= most.min(size.into()));
            for request in &requests {
                for (address, length) in request.readable.ranges().chain(request.writable.ranges()) {
                    assert!(address < RAM && length <= RAM - address);
                }
                assert!(request.readable.length() + request.writable.length() < 1 << 32);
                assert!(request.readable.ranges().count() + request.writable.ranges().count() <= size.into());
            }
            answered += requests.len();
            device.with(0, |queue| {
                requests.iter().for_each(|request| queue.complete(request.token, 4));
                queue.publish();
                queue.arm();
            });
            if result.is_err() {
                assert_eq!(driver.status(), 0x4f);
                broken += 1;
                break;
            }
        }
        works_after_reset(&machine, &device, &mut driver, format);
    }
    assert!(broken > RINGS / 4 && answered > RINGS / 4, "{broken} broken, {answered} answered");
}

#[test]
#[cfg_attr(miri, ignore = "two threads of the guest write the same place, one of them by plain stores")]
fn a_descriptor_that_is_rewritten_while_it_is_read_is_judged_by_one_copy() {
    for format in [0, INDIRECT, PACKED, PACKED | INDIRECT] {
        let machine = TestMachine::new(1);
        let (device, driver, mut ring) = running(&machine, format, 8);
        let (good, bad) = ((0x20_0000u64, 16u32), (0x1234_5678_0000u64, 0x4321_8765u32));
        let indirect = format & INDIRECT != 0;
        let table = 0x40_0000;
        let place = if indirect { table } else { ring.places[0] };
        driver.poke(place, good.0);
        driver.poke(place + 8, good.1);
        let over = Arc::new(AtomicBool::new(false));
        let writer = {
            let (ram, over) = (machine.ram.clone(), over.clone());
            std::thread::spawn(move || {
                let mut rounds = 0u64;
                while !over.load(Ordering::Relaxed) {
                    for (address, length) in [bad, good] {
                        ram.map().store(address, GuestAddress(place), Ordering::Relaxed).unwrap();
                        ram.map().store(length, GuestAddress(place + 8), Ordering::Relaxed).unwrap();
                    }
                    rounds += 1;
                }
                rounds
            })
        };
        let (mut taken, mut refused) = (0, 0);
        let mut driver = driver;
        while taken < 200 || refused < 20 {
            // The head is descriptor 0 or the table each time, for the driver starts anew.
            let part = if indirect { (table, 16, F_INDIRECT) } else { (good.0, good.1, 0) };
            ring.add(&[part]);
            match device.take(0, 1) {
                Ok(requests) => {
                    let ranges: Vec<_> = requests[0].readable.ranges().collect();
                    let [(address, length)] = ranges[..] else { panic!("{ranges:?}") };
                    assert_eq!(address, good.0);
                    assert!(length == 16 || length <= RAM - address, "{length:#x}");
                    taken += 1;
                }
                Err(_) => {
                    assert_eq!(driver.status(), 0x4f);
                    refused += 1;
                }
            }
            assert!(driver.negotiate(VERSION_1 | format));
            for place in ring.places {
                machine.ram.map().write_slice(&[0; 128], GuestAddress(place)).unwrap();
            }
            ring = driver.queue_at(0, 8, 1, ring.places);
            driver.set_driver_ok();
        }
        over.store(true, Ordering::Relaxed);
        assert!(writer.join().unwrap() > 0);
    }
}

#[test]
fn random_register_accesses_do_nothing_that_a_reset_does_not_undo() {
    let machine = TestMachine::new(1);
    let device = Echo::new(&[8, 16]);
    let slot = machine.attach("echo", &device);
    for seed in 0..if cfg!(miri) { 10 } else { 300 } {
        let mut random = Random::new(seed);
        let driver = Driver::new(&machine, slot);
        let bar = driver.config.bar();
        for _ in 0..200 {
            let size = 1 << random.below(4);
            let offset = match random.below(4) {
                0 => random.below(64),
                1 => 0x4000 + random.below(64),
                2 => 0x1000 * random.below(8) + random.below(8),
                _ => random.below(0x8000),
            };
            let value = if random.below(2) == 0 { random.below(32) } else { random.next() };
            match random.below(8) {
                0 => {
                    machine.mmio.write(tenon_platform::ECAM_BASE + (1 << 15) + random.below(256), size, value)
                }
                1 => machine.pio.write(0xcf8 + random.below(8), size, value),
                2 => machine.pio.write(0xcf8, 4, 0x8000_0800 | value & 0xff),
                3 => drop(machine.mmio.read(bar + offset, size)),
                4 => driver.set_status(value & 0xf),
                _ => machine.mmio.write(bar + offset, size, value),
            }
        }
        tenon_core::Lifecycle::reset(&*machine.pci);
        machine.controller.take_msis();
        let mut driver = Driver::new(&machine, slot);
        assert!(driver.negotiate(VERSION_1));
        driver.enable_msix(3);
        let mut ring = driver.queue(0, 8, 1);
        driver.set_driver_ok();
        ring.add(&[(0x20_0000, 16, F_WRITE)]);
        assert_eq!(device.work(0), 1);
        assert!(ring.poll().is_some());
        assert_eq!(machine.controller.take_msis(), [0x41]);
    }
}
