//! Interrupts from the local APIC's timer, lines, messages and other places, and what holds them back.

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use tenon_core::Clock;

use crate::guest::*;

/// The local APIC in xAPIC mode and the I/O APIC, mapped by [`map_apics`].
const APIC: u64 = 0x20_0000;
const IOAPIC: u64 = 0x40_0000;

fn map_apics(guest: &mut Guest) {
    guest.put(DIRECTORY + 8, 0xfee0_0000u64 | 0x93);
    guest.put(DIRECTORY + 16, 0xfec0_0000u64 | 0x93);
}

fn apic_on(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(dword_ptr(APIC + 0xf0), 0x1ff)
}

/// Notes its vector and ends the interrupt.
fn note_and_end(guest: &mut Guest, vector: u8) {
    guest.handler(vector, |a| {
        a.push(rax)?;
        a.mov(eax, u32::from(vector))?;
        a.out(NOTE, eax)?;
        a.mov(dword_ptr(APIC + 0xb0), 0)?;
        a.pop(rax)?;
        a.iretq()
    });
}

#[test]
fn the_deadline_timer_wakes_a_halted_vcpu() {
    for clock in [Clock::real().unwrap(), Clock::virtual_time()] {
        let mut guest = Guest::long_with(clock, 1);
        map_apics(&mut guest);
        note_and_end(&mut guest, 0x40);
        guest.program(64, CODE, |a| {
            apic_on(a)?;
            a.mov(dword_ptr(APIC + 0x320), 0x4_0040)?;
            a.rdtsc()?;
            a.shl(rdx, 32)?;
            a.or(rax, rdx)?;
            a.add(rax, 5_000_000)?;
            a.mov(rbx, rax)?;
            a.mov(rdx, rax)?;
            a.shr(rdx, 32)?;
            a.mov(ecx, 0x6e0)?;
            a.wrmsr()?;
            a.sti()?;
            a.hlt()?;
            a.rdtsc()?;
            a.out(STOP, al)
        });
        let state = guest.run();
        assert_eq!(guest.notes(), [0x40]);
        assert!(
            state.general[2] << 32 | state.general[0] & 0xffff_ffff >= state.general[3],
            "not before its time"
        );
    }
}

#[test]
fn the_periodic_timer_interrupts_running_code() {
    let mut guest = Guest::long();
    map_apics(&mut guest);
    guest.handler(0x40, |a| {
        a.inc(r15)?;
        a.mov(dword_ptr(APIC + 0xb0), 0)?;
        a.iretq()
    });
    guest.program(64, CODE, |a| {
        let mut again = a.create_label();
        apic_on(a)?;
        a.mov(dword_ptr(APIC + 0x3e0), 0xb)?;
        a.mov(dword_ptr(APIC + 0x320), 0x2_0040)?;
        a.mov(dword_ptr(APIC + 0x380), 1_000_000)?;
        a.sti()?;
        a.set_label(&mut again)?;
        a.cmp(r15, 5)?;
        a.jb(again)?;
        a.out(STOP, al)
    });
    let start = guest.clock.now();
    assert_eq!(guest.run().general[15], 5);
    assert!(guest.clock.now() - start >= 5_000_000);
}

fn redirect(a: &mut CodeAssembler, pin: i32, low: i32) -> Result<(), IcedError> {
    for (select, value) in [(0x11 + 2 * pin, 0), (0x10 + 2 * pin, low)] {
        a.mov(dword_ptr(IOAPIC), select)?;
        a.mov(dword_ptr(IOAPIC + 0x10), value)?;
    }
    Ok(())
}

#[test]
fn lines_and_messages_arrive_in_the_order_of_their_priority() {
    let mut guest = Guest::long();
    map_apics(&mut guest);
    for vector in [0x41, 0x51, 0x61, 0x71] {
        note_and_end(&mut guest, vector);
    }
    guest.program(64, CODE, |a| {
        apic_on(a)?;
        redirect(a, 4, 0x41)?;
        redirect(a, 9, 0x8051)?;
        redirect(a, 10, 0x1_0061)?;
        for gsi in [4, 9, 10] {
            a.mov(eax, 0x100 | gsi)?;
            a.out(LINE, eax)?;
        }
        a.mov(eax, 0x71)?;
        a.out(MSI, eax)?;
        // The level line goes low before its interrupt is ended; so it comes once.
        a.mov(eax, 9)?;
        a.out(LINE, eax)?;
        a.out(NOTE, eax)?;
        a.sti()?;
        a.nop()?;
        a.nop()?;
        a.out(STOP, al)
    });
    guest.run();
    assert_eq!(guest.notes(), [9, 0x71, 0x51, 0x41]);
}

#[test]
fn an_interrupt_waits_for_the_instruction_after_sti_and_mov_ss() {
    let mut guest = Guest::long();
    map_apics(&mut guest);
    guest.handler(0x41, |a| {
        a.mov(rax, ptr(rsp))?;
        a.out(NOTE, eax)?;
        a.mov(dword_ptr(APIC + 0xb0), 0)?;
        a.iretq()
    });
    guest.program(64, CODE, |a| {
        apic_on(a)?;
        a.mov(ebx, u32::from(DATA))?;
        a.mov(eax, 0x41)?;
        a.out(MSI, eax)?;
        a.jmp(CODE + 0x100)
    });
    // STI; MOV SS; NOP: the shadow of MOV SS goes on.
    guest.load(CODE + 0x100, &[0xfb, 0x8e, 0xd3, 0x90, 0x90, 0xe6, STOP as u8, 0xeb, 0xfe]);
    guest.run();
    // Whether STI's shadow ends after MOV SS or MOV SS adds its own: after the first NOP at the latest, never before MOV SS ran.
    let notes = guest.notes();
    assert_eq!(notes.len(), 1);
    assert!([CODE + 0x103, CODE + 0x104].contains(&notes[0]), "{notes:x?}");
}

#[test]
fn sti_cli_lets_nothing_in() {
    let mut guest = Guest::long();
    map_apics(&mut guest);
    note_and_end(&mut guest, 0x41);
    guest.program(64, CODE, |a| {
        apic_on(a)?;
        a.mov(eax, 0x41)?;
        a.out(MSI, eax)?;
        a.sti()?;
        a.cli()?;
        a.nop()?;
        a.mov(eax, 1)?;
        a.out(NOTE, eax)?;
        a.sti()?;
        a.nop()?;
        a.nop()?;
        a.out(STOP, al)
    });
    guest.run();
    assert_eq!(guest.notes(), [1, 0x41]);
}

#[test]
fn cr8_holds_interrupts_back_until_it_falls() {
    let mut guest = Guest::long();
    map_apics(&mut guest);
    note_and_end(&mut guest, 0x41);
    guest.program(64, CODE, |a| {
        apic_on(a)?;
        a.mov(ebx, 5)?;
        a.mov(cr8, rbx)?;
        a.sti()?;
        a.mov(eax, 0x41)?;
        a.out(MSI, eax)?;
        a.mov(rax, cr8)?;
        a.out(NOTE, eax)?;
        a.mov(ebx, 3)?;
        a.mov(cr8, rbx)?;
        a.nop()?;
        a.out(STOP, al)
    });
    guest.run();
    assert_eq!(guest.notes(), [5, 0x41]);
}

#[test]
fn a_second_nmi_waits_for_iret() {
    let mut guest = Guest::long();
    map_apics(&mut guest);
    // An interrupt comes at the latest with the next branch.
    let nmi_to_self = |a: &mut CodeAssembler| {
        let mut next = a.create_label();
        a.mov(dword_ptr(APIC + 0x310), 0)?;
        a.mov(dword_ptr(APIC + 0x300), 0x4400)?;
        a.jmp(next)?;
        a.set_label(&mut next)?;
        a.nop()
    };
    guest.handler(2, |a| {
        let mut second = a.create_label();
        a.inc(r15)?;
        a.cmp(r15, 1)?;
        a.jne(second)?;
        nmi_to_self(a)?;
        a.nop()?;
        a.mov(rax, r15)?;
        a.out(NOTE, eax)?;
        a.set_label(&mut second)?;
        a.iretq()
    });
    guest.program(64, CODE, |a| {
        apic_on(a)?;
        nmi_to_self(a)?;
        a.nop()?;
        a.nop()?;
        a.mov(rax, r15)?;
        a.out(NOTE, eax)?;
        a.out(STOP, al)
    });
    guest.run();
    assert_eq!(guest.notes(), [1, 2], "not nested, and not lost");
}

#[test]
fn x2apic_registers_work_by_msr_and_the_page_is_gone() {
    let mut guest = Guest::long();
    map_apics(&mut guest);
    guest.handler(0x41, |a| {
        a.mov(eax, 0x41)?;
        a.out(NOTE, eax)?;
        a.mov(ecx, 0x80b)?;
        a.xor(eax, eax)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.iretq()
    });
    guest.program(64, CODE, |a| {
        a.mov(eax, dword_ptr(APIC + 0x30))?;
        a.out(NOTE, eax)?;
        a.mov(ecx, 0x1b)?;
        a.rdmsr()?;
        a.or(eax, 0x400)?;
        a.wrmsr()?;
        a.mov(eax, dword_ptr(APIC + 0x30))?;
        a.out(NOTE, eax)?;
        a.xor(edx, edx)?;
        a.mov(ecx, 0x80f)?;
        a.mov(eax, 0x1ff)?;
        a.wrmsr()?;
        a.sti()?;
        // Self-IPI.
        a.mov(ecx, 0x83f)?;
        a.mov(eax, 0x41)?;
        a.wrmsr()?;
        a.nop()?;
        a.mov(ecx, 0x80d)?;
        a.rdmsr()?;
        a.out(NOTE, eax)?;
        // The destination format register does not exist here.
        a.mov(ecx, 0x80e)?;
        a.rdmsr()
    });
    let exception = guest.exception();
    assert_eq!(guest.notes(), [0x5_0014, 0xffff_ffff, 0x41, 1]);
    assert_eq!((exception.vector, exception.error), (13, Some(0)));
}

#[test]
fn a_saved_machine_goes_on_in_another_vm() {
    let mut guest = Guest::long_with(Clock::virtual_time(), 1);
    map_apics(&mut guest);
    note_and_end(&mut guest, 0x40);
    let program = |a: &mut CodeAssembler| {
        apic_on(a)?;
        redirect(a, 9, 0x8051)?;
        a.mov(dword_ptr(APIC + 0x320), 0x4_0040)?;
        a.mov(eax, 5_000_000)?;
        a.xor(edx, edx)?;
        a.mov(ecx, 0x6e0)?;
        a.wrmsr()?;
        a.out(STOP, al)?;
        a.sti()?;
        a.hlt()?;
        a.out(STOP, al)
    };
    guest.program(64, CODE, program);
    let state = guest.run();
    let shared = guest.vm.save().unwrap();

    let mut other = Guest::long_with(Clock::virtual_time(), 1);
    map_apics(&mut other);
    note_and_end(&mut other, 0x40);
    other.program(64, CODE, program);
    other.clock.set(guest.clock.now());
    other.vm.restore(&shared).unwrap();
    other.vcpu.set_state(&state).unwrap();
    assert_eq!(other.vcpu.state().unwrap(), state);
    assert_eq!(other.vm.save().unwrap(), shared);
    other.run();
    assert_eq!(other.notes(), [0x40]);
    assert!(other.clock.now() >= 5_000_000);
}
