//! Configuration space, BARs, and where things are.

use tenon_core::Request;
use tenon_platform::{ECAM_BASE, HIGH_WINDOW, PciError, PciSlot};

use crate::device::Echo;
use crate::driver::{ConfigSpace, Driver};
use crate::machine::TestMachine;

const ADDRESS: u64 = 0xcf8;
const DATA: u64 = 0xcfc;

fn by_ports(machine: &TestMachine, slot: PciSlot, at: u32, size: u8) -> u32 {
    let place = 1 << 31 | u32::from(slot.bus) << 16 | u32::from(slot.slot) << 11 | at & 0xfc;
    machine.pio.write(ADDRESS, 4, place.into());
    machine.pio.read(DATA + u64::from(at & 3), size) as u32
}

#[test]
fn both_ways_to_configuration_space_show_the_same() {
    let machine = TestMachine::new(2);
    let slot = PciSlot { bus: 1, slot: 31 };
    machine.pci.attach("echo", Echo::new(&[8]), Some(slot)).unwrap();
    let config = ConfigSpace::new(&machine, slot);
    assert_eq!(config.read(0, 4), 0x1044_1af4);
    for at in 0..256 {
        for size in [1, 2, 4] {
            if at % u32::from(size) == 0 {
                assert_eq!(by_ports(&machine, slot, at, size), config.read(at.into(), size), "{at:#x}");
            }
        }
    }
    machine.pio.write(ADDRESS, 4, 0x8001_f800 | 0x3c);
    machine.pio.write(DATA, 1, 0x5a);
    assert_eq!(config.read(0x3c, 1), 0x5a);
    assert_eq!(machine.pio.read(ADDRESS, 4), 0x8001_f83c);
}

#[test]
fn what_is_not_there_reads_as_all_ones() {
    let machine = TestMachine::new(2);
    let slot = machine.attach("echo", &Echo::new(&[8]));
    assert_eq!(slot, PciSlot { bus: 0, slot: 1 });
    let empty = ConfigSpace::new(&machine, PciSlot { bus: 0, slot: 2 });
    assert_eq!(empty.read(0, 4), u32::MAX);
    empty.write(4, 2, 7);
    assert_eq!(by_ports(&machine, PciSlot { bus: 200, slot: 1 }, 0, 4), u32::MAX);
    // Function 1 of the slot, and what lies past 256 bytes.
    let base = ECAM_BASE + (1 << 15);
    assert_eq!(machine.mmio.read(base + (1 << 12), 4), 0xffff_ffff);
    assert_eq!(machine.mmio.read(base + 0x100, 4), 0xffff_ffff);
    // Without the enable bit, and past the last bus.
    machine.pio.write(ADDRESS, 4, 1 << 11);
    assert_eq!(machine.pio.read(DATA, 4), 0xffff_ffff);
    assert_eq!(machine.mmio.read(ECAM_BASE + (2 << 20), 4), 0xffff_ffff);
    // The host bridge is there.
    assert_eq!(ConfigSpace::new(&machine, PciSlot { bus: 0, slot: 0 }).read(8, 4) >> 8, 0x06_0000);
}

#[test]
fn a_bar_tells_its_size_and_moves() {
    let machine = TestMachine::new(1);
    let slot = machine.attach("echo", &Echo::new(&[8, 8]));
    let driver = Driver::new(&machine, slot);
    let (config, bar) = (driver.config.clone(), driver.config.bar());
    assert!(HIGH_WINDOW.contains(&bar));
    assert_eq!(config.read(0x10, 4) & 0xf, 0xc);
    assert_eq!(driver.read(18, 2), 2);
    // As a driver sizes it: decoding off, all ones.
    config.write(4, 2, 0);
    assert_eq!(machine.mmio.read(bar + 18, 2), 0xffff);
    config.write(0x10, 4, u32::MAX);
    config.write(0x14, 4, u32::MAX);
    let mask = u64::from(config.read(0x10, 4) & !0xf) | u64::from(config.read(0x14, 4)) << 32;
    assert_eq!(!mask + 1, 0x8000);
    config.write(0x10, 4, 0xc123_4567);
    config.write(0x14, 4, 0);
    config.write(4, 2, 6);
    assert_eq!(config.bar(), 0xc123_0000);
    assert_eq!(machine.mmio.read(0xc123_0000 + 18, 2), 2);
    assert_eq!(machine.mmio.read(bar + 18, 2), 0xffff);
    // Over somebody else's registers it is not to be seen, and they are.
    config.write(0x10, 4, ECAM_BASE as u32);
    assert_eq!(machine.mmio.read(0xc123_0000 + 18, 2), 0xffff);
    assert_eq!(config.read(0, 4), 0x1044_1af4);
    config.write(0x10, 4, 0xc200_0000);
    assert_eq!(machine.mmio.read(0xc200_0000 + 18, 2), 2);
}

#[test]
fn the_window_in_configuration_space_reaches_the_registers() {
    let machine = TestMachine::new(1);
    let device = Echo::new(&[8]);
    let slot = machine.attach("echo", &device);
    let driver = Driver::new(&machine, slot);
    let config = &driver.config;
    let at = config.capabilities(9).into_iter().find(|at| config.read(at + 3, 1) == 5).unwrap();
    let set = |offset: u32, length: u32| {
        config.write(at + 4, 1, 0);
        config.write(at + 8, 4, offset);
        config.write(at + 12, 4, length);
    };
    set(20, 1);
    config.write(at + 16, 1, 3);
    assert_eq!(driver.status(), 3);
    assert_eq!(config.read(at + 16, 1), 3);
    set(0x2000, 4);
    assert_eq!(config.read(at + 16, 4), 0x5566_7788);
    // What the window must not show.
    for (offset, length) in [(0x8000, 4), (0x7ffe, 4), (u32::MAX, 1), (0, 3), (2, 4), (0, 8), (0, 0)] {
        set(offset, length);
        config.write(at + 16, 4, 0xffff_ffff);
    }
    assert_eq!(driver.status(), 3);
}

#[test]
fn there_is_room_for_256_devices_and_each_slot_has_one() {
    let machine = TestMachine::new(9);
    for n in 0..287 {
        let slot = machine.attach(&format!("disk{n}"), &Echo::new(&[8]));
        assert_eq!(u16::from(slot.bus) * 32 + u16::from(slot.slot), n + 1);
        let driver = Driver::new(&machine, slot);
        assert_eq!(driver.read(18, 2), 1);
        assert_eq!(
            driver.config.capabilities(0x11).len(),
            usize::from(n < 64),
            "a CPU has not vectors for all"
        );
    }
    let attach = |name: &str, slot| machine.pci.attach(name, Echo::new(&[8]), slot);
    assert!(matches!(attach("more", None), Err(PciError::Full(9))));
    machine.pci.remove(PciSlot { bus: 3, slot: 3 }).unwrap();
    assert!(matches!(attach("disk0", None), Err(PciError::Name(_))));
    assert!(matches!(attach("x", Some(PciSlot { bus: 0, slot: 0 })), Err(PciError::NoSlot(_))));
    assert!(matches!(attach("x", Some(PciSlot { bus: 9, slot: 0 })), Err(PciError::NoSlot(_))));
    assert!(matches!(attach("x", Some(PciSlot { bus: 1, slot: 0 })), Err(PciError::Taken { .. })));
    assert_eq!(attach("x", None).unwrap(), PciSlot { bus: 3, slot: 3 });
}

#[test]
fn a_profile_that_no_virtio_device_has_is_refused() {
    let machine = TestMachine::new(1);
    for queues in [&[][..], &[0], &[3], &[8; 1025]] {
        let error = machine.pci.attach("echo", Echo::new(queues), None).unwrap_err();
        assert!(matches!(error, PciError::Profile { .. }), "{error}");
    }
}

#[test]
fn the_old_reset_register_resets() {
    let machine = TestMachine::new(1);
    machine.pio.write(0xcf9, 1, 2);
    assert!(machine.requests.receiver().try_recv().is_err());
    machine.pio.write(0xcf9, 1, 6);
    assert!(matches!(machine.requests.receiver().try_recv(), Ok(Request::Reset)));
}

#[test]
fn shown_as_a_pc_the_board_is_a_440fx_with_a_piix_and_slot_1_is_taken() {
    let machine = TestMachine::new(1);
    let read = |function: u64, at: u64| machine.mmio.read(ECAM_BASE + (function << 12) + at, 4);
    assert_eq!(read(0, 0), 0x0008_1b36);
    machine.pci.show_as_pc().unwrap();
    let ids = [0, 8, 9, 11].map(|function| read(function, 0));
    assert_eq!(ids, [0x1237_8086, 0x7000_8086, 0xffff_ffff, 0x7113_8086]);
    assert_eq!((read(8, 8) >> 8, read(8, 12) >> 16 & 0xff), (0x06_0100, 0x80));
    machine.mmio.write(ECAM_BASE + (11 << 12) + 0x40, 4, 0);
    assert_eq!((read(11, 0x40), read(11, 0x80)), (0xb001, 1));
    let one = PciSlot { bus: 0, slot: 1 };
    assert!(matches!(machine.pci.attach("echo", Echo::new(&[8]), Some(one)), Err(PciError::NoSlot(_))));
    assert_eq!(machine.attach("echo", &Echo::new(&[8])), PciSlot { bus: 0, slot: 2 });
}

#[test]
fn a_board_is_not_changed_under_a_device() {
    let machine = TestMachine::new(1);
    machine.attach("echo", &Echo::new(&[8]));
    assert!(matches!(machine.pci.show_as_pc(), Err(PciError::Taken { .. })));
}
