//! Interrupts through the whole controller, on a virtual clock.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use tenon_core::{Clock, InterruptController, Msi};

use super::*;
use crate::apic::*;

struct Count(AtomicU32);

impl Notify for Count {
    fn notify(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// A controller whose local APICs are switched on by software.
fn chip(vcpus: u32) -> (Arc<Clock>, Arc<IrqChip>) {
    let clock = Clock::virtual_time();
    let chip = IrqChip::new(&clock, vcpus);
    for n in 0..vcpus {
        write(&chip, n, 0xf0, 0x1ff);
    }
    (clock, chip)
}

fn write(chip: &IrqChip, apic: u32, offset: u64, value: u32) {
    chip.apply(chip.apic(apic).mmio_write(offset, value));
}

fn redirect(chip: &IrqChip, pin: u32, entry: u64) {
    for (select, value) in [(0x11 + 2 * pin, entry >> 32), (0x10 + 2 * pin, entry & 0xffff_ffff)] {
        chip.ioapic_write(0, select);
        chip.ioapic_write(0x10, u32::try_from(value).unwrap());
    }
}

fn x2apic(chip: &IrqChip, apic: u32) {
    let base = chip.apic(apic).base();
    chip.apic(apic).set_base(base | BASE_X2APIC).unwrap();
}

fn takers(chip: &IrqChip, vcpus: u32) -> Vec<u32> {
    (0..vcpus).filter(|n| chip.apic(*n).acknowledge().is_some()).collect()
}

#[test]
fn a_higher_class_interrupts_a_lower_one_and_not_the_other_way() {
    let (_, chip) = chip(1);
    let apic = chip.apic(0);
    chip.signal_msi(Msi { address: 0xfee0_0000, data: 0x41 });
    assert_eq!(apic.acknowledge(), Some(0x41));
    chip.signal_msi(Msi { address: 0xfee0_0000, data: 0x4f });
    assert_eq!((apic.pending(), apic.acknowledge()), (0, None));
    chip.signal_msi(Msi { address: 0xfee0_0000, data: 0x51 });
    assert_eq!((apic.pending(), apic.acknowledge()), (PENDING_INTERRUPT, Some(0x51)));
    assert_eq!(apic.mmio_read(0xa0), 0x50);
    write(&chip, 0, 0xb0, 0);
    assert_eq!(apic.acknowledge(), None);
    write(&chip, 0, 0xb0, 0);
    assert_eq!(apic.acknowledge(), Some(0x4f));
}

#[test]
fn the_task_priority_holds_interrupts_back_until_lowered() {
    let (_, chip) = chip(1);
    let apic = chip.apic(0);
    let count = Arc::new(Count(AtomicU32::new(0)));
    apic.set_notify(count.clone());
    apic.set_cr8(4);
    chip.signal_msi(Msi { address: 0xfee0_0000, data: 0x41 });
    assert_eq!((apic.pending(), count.0.load(Ordering::SeqCst)), (0, 0));
    assert_eq!(apic.mmio_read(0x80), 0x40);
    apic.set_cr8(3);
    assert_eq!((apic.pending(), count.0.load(Ordering::SeqCst)), (PENDING_INTERRUPT, 1));
}

#[test]
fn a_level_line_comes_again_after_its_end_while_it_is_high() {
    let (_, chip) = chip(1);
    let apic = chip.apic(0);
    redirect(&chip, 9, 0x8051);
    chip.set_line(9, true);
    assert_eq!(apic.acknowledge(), Some(0x51));
    chip.ioapic_write(0, 0x10 + 18);
    assert_eq!(chip.ioapic_read(0x10) >> 14 & 1, 1, "remote IRR");
    assert_eq!(apic.acknowledge(), None);
    write(&chip, 0, 0xb0, 0);
    assert_eq!(apic.acknowledge(), Some(0x51));
    chip.set_line(9, false);
    write(&chip, 0, 0xb0, 0);
    assert_eq!(apic.acknowledge(), None);
}

#[test]
fn a_masked_level_line_is_delivered_when_unmasked_and_a_masked_edge_is_lost() {
    let (_, chip) = chip(1);
    redirect(&chip, 9, 0x1_8051);
    redirect(&chip, 4, 0x1_0041);
    chip.set_line(9, true);
    chip.set_line(4, true);
    assert_eq!(chip.apic(0).acknowledge(), None);
    redirect(&chip, 9, 0x8051);
    redirect(&chip, 4, 0x0041);
    assert_eq!(chip.apic(0).acknowledge(), Some(0x51));
    chip.set_line(9, false);
    write(&chip, 0, 0xb0, 0);
    assert_eq!(chip.apic(0).acknowledge(), None);
    chip.set_line(4, false);
    chip.set_line(4, true);
    assert_eq!(chip.apic(0).acknowledge(), Some(0x41));
    chip.set_line(99, true);
}

#[test]
fn destinations_reach_whom_they_name_in_each_mode() {
    let (_, chip) = chip(4);
    for n in 0..4 {
        write(&chip, n, 0xd0, 1 << (24 + n));
    }
    let msi = |chip: &IrqChip, address: u64| {
        chip.signal_msi(Msi { address, data: 0x41 });
        let takers = takers(chip, 4);
        takers.iter().for_each(|n| write(chip, *n, 0xb0, 0));
        takers
    };
    assert_eq!(msi(&chip, 0xfee0_2000), [2], "physical");
    assert_eq!(msi(&chip, 0xfeef_f000), [0, 1, 2, 3], "broadcast");
    assert_eq!(msi(&chip, 0xfee0_a004), [1, 3], "logical flat");
    for n in 0..4 {
        write(&chip, n, 0xe0, 0x0fff_ffff);
        write(&chip, n, 0xd0, (n / 2) << 28 | 1 << (24 + n % 2));
    }
    assert_eq!(msi(&chip, 0xfee1_3004), [2, 3], "logical cluster");
    (0..4).for_each(|n| x2apic(&chip, n));
    assert_eq!(chip.apic(3).msr_read(0x0d), Ok(8));
    assert_eq!(msi(&chip, 0xfee0_a004), [1, 3], "logical x2APIC");
}

#[test]
fn lowest_priority_goes_to_the_least_busy_one() {
    let (_, chip) = chip(3);
    chip.apic(0).set_cr8(5);
    chip.apic(1).set_cr8(2);
    chip.apic(2).set_cr8(3);
    chip.signal_msi(Msi { address: 0xfeef_f000, data: 0x161 });
    assert_eq!(takers(&chip, 3), [1]);
}

#[test]
fn shorthands_reach_self_all_or_the_others() {
    let (_, chip) = chip(3);
    for (icr, expected) in [(0x4_4041, vec![1]), (0x8_4041, vec![0, 1, 2]), (0xc_4041, vec![0, 2])] {
        write(&chip, 1, 0x300, icr);
        assert_eq!(takers(&chip, 3), expected, "{icr:#x}");
        (0..3).for_each(|n| write(&chip, n, 0xb0, 0));
    }
}

#[test]
fn x2apic_ipis_reach_ids_and_clusters_above_fifteen() {
    let (_, chip) = chip(64);
    (0..64).for_each(|n| x2apic(&chip, n));
    let send = |icr: u64| {
        chip.apply(chip.apic(0).msr_write(0x30, icr).unwrap());
        let takers = takers(&chip, 64);
        takers.iter().for_each(|n| chip.apply(chip.apic(*n).msr_write(0x0b, 0).unwrap()));
        takers
    };
    assert_eq!(send(37 << 32 | 0x41), [37]);
    assert_eq!(send(0x0002_0021 << 32 | 0x841), [32, 37]);
    assert_eq!(send(0xffff_ffff << 32 | 0x41).len(), 64);
    chip.apply(chip.apic(9).msr_write(0x3f, 0x55).unwrap());
    assert_eq!(chip.apic(9).acknowledge(), Some(0x55));
}

#[test]
fn init_and_start_up_reach_the_other_processor_in_that_order() {
    let (_, chip) = chip(2);
    write(&chip, 0, 0x310, 1 << 24);
    write(&chip, 0, 0x300, 0xc500);
    write(&chip, 0, 0x300, 0x8500);
    write(&chip, 0, 0x300, 0x4699);
    assert_eq!(chip.apic(1).pending(), PENDING_INIT | PENDING_SIPI);
    assert!(chip.apic(1).take_init());
    assert_eq!(chip.apic(1).take_sipi(), Some(0x99));
    assert_eq!(chip.apic(1).pending(), 0);
    assert!(!chip.apic(0).take_init() && chip.apic(0).take_sipi().is_none());
    write(&chip, 0, 0x300, 0x4400);
    assert_eq!(chip.apic(1).pending(), PENDING_NMI);
    assert!(chip.apic(1).take_nmi() && !chip.apic(1).take_nmi());
}

#[test]
fn the_timer_fires_once_or_periodically_by_its_divisor() {
    let (clock, chip) = chip(1);
    let apic = chip.apic(0);
    write(&chip, 0, 0x3e0, 3);
    write(&chip, 0, 0x320, 0xec);
    write(&chip, 0, 0x380, 10_000);
    clock.advance_to(80_000);
    assert_eq!(apic.mmio_read(0x390), 5_000);
    clock.advance_to(159_999);
    assert_eq!(apic.acknowledge(), None);
    clock.advance_to(160_000);
    assert_eq!((apic.acknowledge(), apic.mmio_read(0x390)), (Some(0xec), 0));
    write(&chip, 0, 0xb0, 0);
    clock.advance_to(1_000_000);
    assert_eq!(apic.acknowledge(), None);
    write(&chip, 0, 0x320, 0x2_00ec);
    write(&chip, 0, 0x380, 10_000);
    for n in 1..=3 {
        clock.advance_to(1_000_000 + n * 160_000 - 1);
        assert_eq!(apic.acknowledge(), None);
        clock.advance_to(1_000_000 + n * 160_000);
        assert_eq!(apic.acknowledge(), Some(0xec));
        write(&chip, 0, 0xb0, 0);
    }
    write(&chip, 0, 0x320, 0x3_00ec);
    clock.advance_to(2_000_000);
    assert_eq!(apic.acknowledge(), None, "masked");
    write(&chip, 0, 0x380, 0);
    assert_eq!(clock.next_deadline(), u64::MAX);
}

#[test]
fn the_tsc_deadline_fires_at_its_time_or_at_once_when_past() {
    let (clock, chip) = chip(1);
    let apic = chip.apic(0);
    apic.set_tsc_deadline(500, 500);
    assert_eq!(apic.tsc_deadline(), 0, "ignored in one-shot mode");
    write(&chip, 0, 0x320, 0x4_00ec);
    apic.set_tsc_deadline(7_500, 500);
    assert_eq!(apic.tsc_deadline(), 7_500);
    clock.advance_to(499);
    assert_eq!(apic.acknowledge(), None);
    clock.advance_to(500);
    assert_eq!((apic.acknowledge(), apic.tsc_deadline()), (Some(0xec), 0));
    write(&chip, 0, 0xb0, 0);
    apic.set_tsc_deadline(100, 100);
    assert_eq!(apic.acknowledge(), Some(0xec));
    apic.set_tsc_deadline(1_000, 1_000);
    apic.set_tsc_deadline(0, 0);
    assert_eq!(clock.next_deadline(), u64::MAX);
}

#[test]
fn an_apic_that_software_left_off_takes_no_vectors() {
    let (_, chip) = chip(1);
    write(&chip, 0, 0x350, 0x700);
    write(&chip, 0, 0xf0, 0xff);
    assert_eq!(chip.apic(0).mmio_read(0x350), 0x1_0700);
    chip.signal_msi(Msi { address: 0xfee0_0000, data: 0x41 });
    assert_eq!(chip.apic(0).pending(), 0);
}

#[test]
fn illegal_vectors_and_addresses_show_in_the_error_status() {
    let (_, chip) = chip(1);
    write(&chip, 0, 0x370, 0xfe);
    write(&chip, 0, 0x300, 0x4_4005);
    chip.signal_msi(Msi { address: 0xfee0_0000, data: 0x05 });
    write(&chip, 0, 0x3f0, 0);
    assert_eq!(chip.apic(0).mmio_read(0x280), 0);
    write(&chip, 0, 0x280, 0);
    assert_eq!(chip.apic(0).mmio_read(0x280), 0xe0);
    assert_eq!(chip.apic(0).acknowledge(), Some(0xfe));
}

#[test]
fn x2apic_refuses_what_is_reserved_and_mode_changes_follow_the_manual() {
    let (_, chip) = chip(2);
    let apic = chip.apic(1);
    assert!(apic.msr_read(2).is_err(), "still xAPIC");
    assert!(apic.set_base(APIC_BASE | BASE_X2APIC).is_err());
    assert!(apic.set_base((APIC_BASE + 0x1000) | BASE_ENABLE).is_err());
    x2apic(&chip, 1);
    assert!(!apic.is_mapped());
    assert_eq!(apic.msr_read(2), Ok(1));
    assert!(apic.msr_write(0x0b, 1).is_err());
    assert!(apic.msr_write(0x02, 0).is_err());
    assert!(apic.msr_write(0x0e, 0).is_err());
    assert!(apic.msr_write(0x08, 0x100).is_err());
    assert!(apic.set_base(APIC_BASE | BASE_ENABLE).is_err(), "back to xAPIC only through off");
    apic.set_base(APIC_BASE).unwrap();
    assert!(apic.set_base(APIC_BASE | BASE_ENABLE | BASE_X2APIC).is_err());
    apic.set_base(APIC_BASE | BASE_ENABLE).unwrap();
}

#[test]
fn a_saved_apic_goes_on_where_it_was() {
    let (clock, before) = chip(1);
    write(&before, 0, 0x3e0, 0xb);
    write(&before, 0, 0x320, 0xec);
    write(&before, 0, 0x380, 1000);
    before.signal_msi(Msi { address: 0xfee0_0000, data: 0x41 });
    before.apic(0).acknowledge();
    before.signal_msi(Msi { address: 0xfee0_0000, data: 0x42 });
    redirect(&before, 9, 0x8051);
    before.set_line(9, true);
    clock.advance_to(400);
    let (registers, io) = (before.apic(0).save(), before.save());

    let (clock, after) = chip(1);
    after.apic(0).restore(&registers);
    after.restore(&io).unwrap();
    assert_eq!(after.apic(0).save(), registers);
    assert_eq!(after.save(), io);
    clock.advance_to(599);
    assert_eq!(after.apic(0).acknowledge(), Some(0x51));
    clock.advance_to(600);
    assert_eq!(after.apic(0).acknowledge(), Some(0xec));
}

#[test]
fn a_state_of_another_version_or_length_is_refused_by_name() {
    let (_, chip) = chip(1);
    let mut saved = chip.save();
    saved.pop();
    assert!(chip.restore(&saved).unwrap_err().contains("bytes instead of"));
    saved[0] = 9;
    assert!(chip.restore(&saved).unwrap_err().contains("version 9"));
    assert!(chip.restore(&[]).is_err());
}

#[test]
fn interrupts_from_many_threads_are_all_seen() {
    let clock = Clock::virtual_time();
    let chip = IrqChip::new(&clock, 1);
    write(&chip, 0, 0xf0, 0x1ff);
    let mut seen = [0u32; 256];
    std::thread::scope(|scope| {
        for thread in 0..4u32 {
            let chip = &chip;
            scope.spawn(move || {
                for n in 0..48 {
                    chip.signal_msi(Msi { address: 0xfee0_0000, data: 0x20 + thread * 48 + n });
                }
            });
        }
        while seen[0x20..0xe0].contains(&0) {
            if let Some(vector) = chip.apic(0).acknowledge() {
                seen[usize::from(vector)] += 1;
                write(&chip, 0, 0xb0, 0);
            } else {
                std::thread::yield_now();
            }
        }
    });
    assert!(seen[0x20..0xe0].iter().all(|n| *n == 1));
}
