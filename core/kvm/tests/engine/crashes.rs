//! Guests that cannot go on: what their reports say.

use iced_x86::code_asm::*;
use tenon_core::{CpuModel, DescriptorTable, HIGH_BASE, Ram, Rom};

use crate::fixture::{CODE, Guest, Mode, NOTE_MMIO, RAM, engine, exit};

#[test]
fn a_triple_fault_is_reported() {
    let Some(kvm) = engine() else { return };
    let mut guest = Guest::new(&kvm, 1);
    guest.load(Mode::Long, |a| {
        a.mov(eax, 0x1234u32).unwrap();
        a.ud2().unwrap();
    });
    let mut state = Mode::Long.state(CODE, 0x8_0000);
    state.idt = DescriptorTable { base: 0, limit: 0 };
    guest.vcpus[0].set_state(&state).unwrap();
    let report = guest.run().crash();
    assert!(report.what.contains("triple fault"), "{report}");
    // AMD-V does not keep the registers; then the report says so.
    if report.remedy.is_none() {
        assert_eq!((report.state.rip, report.state.general[0]), (CODE + 5, 0x1234), "{report}");
        assert_eq!(report.instruction[..2], [0x0f, 0x0b], "{report}");
        assert!(report.what.contains("ud2"), "{report}");
    }
}

#[test]
fn a_jump_to_where_there_is_no_memory_is_reported() {
    let Some(kvm) = engine() else { return };
    let mut guest = Guest::new(&kvm, 1);
    let report = guest
        .play(Mode::Long, |a| {
            a.mov(rax, 0xc000_0000u64).unwrap();
            a.jmp(rax).unwrap();
        })
        .crash();
    assert_eq!(report.state.rip, 0xc000_0000, "{report}");
    assert!(report.instruction.is_empty(), "{report}");
    assert!(report.what.contains("0xc0000000"), "{report}");
}

#[test]
fn an_instruction_that_kvm_cannot_emulate_is_named_with_the_remedy() {
    let Some(kvm) = engine() else { return };
    let mut guest = Guest::new(&kvm, 1);
    // On a device register every KVM has to emulate, and none knows x87 stores.
    let report = guest
        .play(Mode::Long, |a| {
            a.mov(rdi, NOTE_MMIO).unwrap();
            a.fstp(qword_ptr(rdi)).unwrap();
            exit(a);
        })
        .crash();
    assert!(report.what.contains("emulation failure") && report.what.contains("fstp"), "{report}");
    assert!(report.remedy.as_ref().unwrap().contains("--engine soft"), "{report}");
    assert_eq!(report.state.rip, CODE + 10, "{report}");
    assert_eq!(report.instruction[..2], [0xdd, 0x1f], "{report}");
}

#[test]
fn an_instruction_in_rom_is_named_too() {
    let Some(kvm) = engine() else { return };
    let mut content = vec![0xf4; 0x1000];
    content[..2].copy_from_slice(&[0xdd, 0x1f]); // fstp qword ptr [rdi]
    let ram = Ram::with_roms(RAM, vec![Rom::new(HIGH_BASE - 0x1000, &content).unwrap()]).unwrap();
    let mut guest = Guest::with_ram(&kvm, 1, CpuModel::Baseline, ram);
    let report = guest
        .play(Mode::Long, |a| {
            a.mov(rdi, NOTE_MMIO).unwrap();
            a.mov(eax, 0xffff_f000u32).unwrap();
            a.jmp(rax).unwrap();
        })
        .crash();
    assert!(report.what.contains("0xfffff000") && report.what.contains("fstp"), "{report}");
    assert_eq!(report.instruction[..3], [0xdd, 0x1f, 0xf4], "{report}");
}
