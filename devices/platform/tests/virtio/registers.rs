//! Negotiation, the status byte, interrupts, and what is frozen when.

use std::sync::atomic::Ordering;

use crate::device::Echo;
use crate::driver::{Driver, EVENT_INDEX, F_WRITE, INDIRECT, PACKED, VERSION_1};
use crate::machine::TestMachine;
use crate::queues::running;

#[test]
fn features_that_were_not_offered_are_refused() {
    let machine = TestMachine::new(1);
    let device = Echo::new(&[8]);
    let slot = machine.attach("echo", &device);
    let mut driver = Driver::new(&machine, slot);
    let offered = driver.offered();
    assert_eq!(offered, 5 | INDIRECT | EVENT_INDEX | VERSION_1 | PACKED);
    for features in [0, 5, VERSION_1 | 2, VERSION_1 | 1 << 33, VERSION_1 | 1 << 63, offered | 1 << 30] {
        assert!(!driver.negotiate(features), "{features:#x}");
        // Not even DRIVER_OK gets around it.
        driver.set_driver_ok();
        assert_eq!(driver.status(), 3);
        assert!(device.started.lock().unwrap().is_none());
    }
    assert!(driver.negotiate(offered));
    // Too late.
    driver.write(8, 4, 0);
    driver.write(12, 4, 0);
    driver.set_driver_ok();
    assert_eq!(device.started.lock().unwrap().as_ref().unwrap().features, offered);
}

#[test]
fn a_started_queue_cannot_be_changed() {
    for enabled in [false, true] {
        let machine = TestMachine::new(1);
        let (device, driver, ring) = running(&machine, 0, 8);
        driver.write(22, 2, u64::from(!enabled));
        let before: Vec<_> = (24..56).step_by(2).map(|at| driver.read(at, 2)).collect();
        for at in (24..56).step_by(4) {
            if at != 24 {
                driver.write(at, 4, 0xdead_bee0);
            }
            driver.write(at, 2, 4);
        }
        driver.write(28, 2, 1);
        let after: Vec<_> = (24..56).step_by(2).map(|at| driver.read(at, 2)).collect();
        assert_eq!(before, after);
        assert_eq!(driver.status(), 0xf);
        let mut ring = ring;
        let mut driver = driver;
        let to = driver.allocate(16);
        ring.add(&[(to, 16, F_WRITE)]);
        assert_eq!(device.work(0), 1);
        assert!(device.started.lock().unwrap().as_ref().unwrap().queues[1].is_none());
    }
}

#[test]
fn a_ring_that_is_misplaced_fails_the_device_until_it_is_reset() {
    let machine = TestMachine::new(1);
    let device = Echo::new(&[8]);
    let slot = machine.attach("echo", &device);
    let mut driver = Driver::new(&machine, slot);
    let good = [0x10_0000, 0x10_1000, 0x10_2000u64];
    let bad = [
        (0, 0x10_0008),
        (0, crate::machine::RAM - 16),
        (0, 0xd000_0000),
        (0, !15),
        (1, 0x10_1001),
        (1, crate::machine::RAM - 4),
        (2, 0x10_2002),
        (2, 1 << 63),
    ];
    for (which, address) in bad {
        assert!(driver.negotiate(VERSION_1));
        let mut places = good;
        places[which] = address;
        for (n, place) in (0..).zip(places) {
            driver.write(32 + 8 * n, 8, place);
        }
        driver.write(28, 2, 1);
        assert_eq!((driver.status(), driver.read(28, 2)), (0x4b, 0), "{which} at {address:#x}");
        driver.set_driver_ok();
        assert!(device.started.lock().unwrap().is_none());
    }
    // A size that a split ring cannot have.
    assert!(driver.negotiate(VERSION_1));
    driver.write(24, 2, 9);
    assert_eq!(driver.read(24, 2), 8);
    driver.write(24, 2, 5);
    driver.write(28, 2, 1);
    assert_eq!(driver.status(), 0x4b);
    driver.set_status(0);
    assert_eq!((driver.status(), driver.read(24, 2)), (0, 8));
}

#[test]
fn a_masked_vector_is_pending_until_it_is_unmasked() {
    let machine = TestMachine::new(1);
    let (device, mut driver, mut ring) = running(&machine, 0, 8);
    let to = driver.allocate(16);
    let msix = driver.config.capabilities(0x11)[0];
    let entry = driver.table + 16;
    let mut interrupt = || {
        ring.add(&[(to, 16, F_WRITE)]);
        device.work(0);
        (machine.controller.take_msis(), machine.mmio.read(driver.pending, 8))
    };
    machine.mmio.write(entry + 12, 4, 1);
    assert_eq!(interrupt(), (vec![], 2));
    machine.mmio.write(entry + 12, 4, 0);
    assert_eq!((machine.controller.take_msis(), machine.mmio.read(driver.pending, 8)), (vec![0x41], 0));
    // All at once, by the capability.
    driver.config.write(msix + 2, 2, 0xc000);
    assert_eq!(interrupt(), (vec![], 2));
    assert_eq!(interrupt(), (vec![], 2));
    driver.config.write(msix + 2, 2, 0x8000);
    assert_eq!(machine.controller.take_msis(), [0x41]);
    assert_eq!(interrupt(), (vec![0x41], 0));
    // A vector that does not exist is none.
    driver.write(22, 2, 0);
    driver.write(26, 2, 3);
    assert_eq!(driver.read(26, 2), 0xffff);
    assert_eq!(interrupt(), (vec![], 0));
}

#[test]
fn without_msix_the_line_is_high_until_the_status_is_read() {
    let machine = TestMachine::new(1);
    let device = Echo::new(&[8]);
    let slot = machine.attach("echo", &device);
    let other = Echo::new(&[8]);
    let other_slot =
        machine.pci.attach("other", other.clone(), Some(tenon_platform::PciSlot { bus: 0, slot: 5 }));
    assert_eq!(slot.gsi(), other_slot.unwrap().gsi());
    let mut driver = Driver::new(&machine, slot);
    let is_high = || machine.controller.is_high(slot.gsi());
    assert!(driver.negotiate(VERSION_1));
    let mut ring = driver.queue(0, 8, 0);
    driver.set_driver_ok();
    let to = driver.allocate(16);
    let mut interrupt = || {
        ring.add(&[(to, 16, F_WRITE)]);
        device.work(0);
    };
    interrupt();
    assert!(is_high() && machine.controller.take_msis().is_empty());
    assert_eq!(driver.config.read(6, 2) & 8, 8);
    assert_eq!(machine.mmio.read(driver.isr, 1), 1);
    assert!(!is_high());
    assert_eq!((machine.mmio.read(driver.isr, 1), driver.config.read(6, 2) & 8), (0, 0));
    device.transport().config_changed();
    interrupt();
    assert!(is_high());
    assert_eq!(machine.mmio.read(driver.isr, 1), 3);
    // Disabled in the command register.
    driver.config.write(4, 2, 0x406);
    interrupt();
    assert!(!is_high());
    driver.config.write(4, 2, 6);
    assert!(is_high());
    // A reset lowers it.
    driver.set_status(0);
    assert!(!is_high());
}

#[test]
fn a_device_without_msix_interrupts_by_its_line() {
    let machine = TestMachine::new(3);
    for n in 0..tenon_platform::MSIX_DEVICES {
        machine.attach(&format!("disk{n}"), &Echo::new(&[8]));
    }
    let device = Echo::new(&[8]);
    let slot = machine.attach("echo", &device);
    let mut driver = Driver::new(&machine, slot);
    assert!(driver.negotiate(VERSION_1));
    let mut ring = driver.queue(0, 8, 0);
    assert_eq!(driver.read(26, 2), 0xffff);
    driver.set_driver_ok();
    let to = driver.allocate(16);
    ring.add(&[(to, 16, F_WRITE)]);
    device.work(0);
    assert!(machine.controller.is_high(slot.gsi()) && machine.controller.take_msis().is_empty());
}

#[test]
fn the_driver_hears_of_changed_configuration_and_of_failure() {
    let machine = TestMachine::new(1);
    let (device, driver, _ring) = running(&machine, 0, 8);
    driver.write(16, 2, 0);
    let generation = driver.read(21, 1);
    device.config.store(7, Ordering::SeqCst);
    device.transport().config_changed();
    assert_eq!(machine.controller.take_msis(), [0x40]);
    assert_eq!(driver.read(21, 1), generation + 1);
    assert_eq!(machine.mmio.read(driver.device, 8), 7);
    machine.mmio.write(driver.device + 4, 2, 0xabcd);
    assert_eq!(device.config.load(Ordering::SeqCst), 0xabcd_0000_0007);
    // Outside of it.
    assert_eq!(machine.mmio.read(driver.device + 8, 4), 0);
    assert_eq!(machine.mmio.read(driver.device + 6, 4), 0);
    let old = device.transport();
    old.needs_reset();
    assert_eq!(driver.status(), 0x4f);
    assert_eq!(machine.controller.take_msis(), [0x40]);
    // After a reset what was handed out before is not heard.
    driver.set_status(0);
    old.needs_reset();
    old.config_changed();
    assert_eq!(driver.status(), 0);
}
