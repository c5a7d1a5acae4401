//! The dirty log, and memory above the hole.

use iced_x86::code_asm::*;
use tenon_core::{CpuModel, HIGH_BASE, LOW_END, Ram, Rom};
use vm_memory::{Bytes, GuestAddress};

use crate::fixture::{Guest, Mode, PAGE_TABLES, RAM, engine, exit};

#[test]
fn the_dirty_log_names_the_pages_that_were_written() {
    let Some(kvm) = engine() else { return };
    let mut guest = Guest::new(&kvm, 1);
    assert!(guest.vm.take_dirty_log().is_err(), "it is off");
    guest.vm.set_dirty_log(true).unwrap();
    let ended = guest.play(Mode::Long, |a| {
        for page in [0x10_0000u32, 0x10_5ff8, 0x1f_f000] {
            a.mov(edi, page).unwrap();
            a.mov(qword_ptr(rdi), 1i32).unwrap();
        }
        a.mov(edi, 0x10_9000u32).unwrap();
        a.mov(eax, dword_ptr(rdi)).unwrap();
        exit(a);
    });
    ended.value();
    guest.ram.written(0x13_0ffe, 3); // As a device says it.
    let pages = guest.vm.take_dirty_log().unwrap();
    assert!(pages.is_sorted(), "{pages:x?}");
    for page in [0x10_0000, 0x10_5000, 0x13_0000, 0x13_1000, 0x1f_f000] {
        assert!(pages.contains(&page), "{page:x} is not in {pages:x?}");
    }
    // A page that was only read may be there: the kernel notes it when it maps it for writing.
    assert!(!pages.contains(&0x15_0000), "{pages:x?}");
    assert!(guest.vm.take_dirty_log().unwrap().is_empty(), "taken");
    guest.vm.set_dirty_log(false).unwrap();
    guest.play(Mode::Long, exit).value();
    assert!(guest.vm.take_dirty_log().is_err(), "it is off");
}

#[test]
fn memory_above_the_hole_is_the_guests() {
    let Some(kvm) = engine() else { return };
    let mut guest = Guest::with(&kvm, 1, CpuModel::Baseline, LOW_END + RAM);
    guest.vm.set_dirty_log(true).unwrap();
    // One more page directory: 4 GiB and up.
    let directory = PAGE_TABLES + 0x6000;
    guest.put(PAGE_TABLES + 0x1000 + 4 * 8, &(directory | 7).to_le_bytes());
    guest.put(directory, &(HIGH_BASE | 0x80 | 7).to_le_bytes());
    let ended = guest.play(Mode::Long, |a| {
        a.mov(rdi, HIGH_BASE + 0x1000).unwrap();
        a.mov(rax, 0x1122_3344u64).unwrap();
        a.mov(qword_ptr(rdi), rax).unwrap();
        a.mov(eax, dword_ptr(rdi)).unwrap();
        exit(a);
    });
    assert_eq!(ended.value(), 0x1122_3344);
    assert_eq!(guest.ram.map().read_obj::<u32>(GuestAddress(HIGH_BASE + 0x1000)).unwrap(), 0x1122_3344);
    assert_eq!(guest.vm.take_dirty_log().unwrap().last(), Some(&(HIGH_BASE + 0x1000)));
}

#[test]
fn rom_is_read_and_a_write_to_it_changes_nothing() {
    let Some(kvm) = engine() else { return };
    let mut content = vec![0; 0x2000];
    content[0x1008..0x100c].copy_from_slice(&0x0bad_cafe_u32.to_le_bytes());
    let rom = Rom::new(HIGH_BASE - 0x2000, &content).unwrap();
    let ram = Ram::with_roms(RAM, vec![rom]).unwrap();
    let mut guest = Guest::with_ram(&kvm, 1, CpuModel::Baseline, ram);
    let ended = guest.play(Mode::Long, |a| {
        a.mov(edi, 0xffff_f008u32).unwrap();
        a.mov(eax, dword_ptr(rdi)).unwrap();
        a.not(eax).unwrap();
        a.mov(dword_ptr(rdi), eax).unwrap();
        a.mov(eax, dword_ptr(rdi)).unwrap();
        exit(a);
    });
    assert_eq!(ended.value(), 0x0bad_cafe);
}
