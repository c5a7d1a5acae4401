//! Exceptions: frames, error codes, interrupt stacks, double and triple faults, single steps.

use iced_x86::code_asm::*;

use crate::guest::*;

#[test]
fn faults_push_the_instruction_and_traps_the_next_one() {
    let mut guest = Guest::long();
    guest.program(64, CODE, |a| a.ud2());
    let exception = guest.exception();
    assert_eq!(
        (exception.vector, exception.rip, exception.cs, exception.ss, exception.rsp),
        (6, CODE, CODE64, DATA, STACK)
    );
    assert_eq!(exception.rflags, 0x1_0002, "RF is set in the frame of a fault");
    let mut guest = Guest::long();
    guest.program(64, CODE, |a| a.int3());
    let exception = guest.exception();
    assert_eq!((exception.vector, exception.rip, exception.rflags), (3, CODE + 1, 2));
    let mut guest = Guest::long();
    guest.program(64, CODE, |a| a.int(0x80));
    assert_eq!(guest.exception().rip, CODE + 2);
}

#[test]
fn the_frame_is_aligned_and_interrupt_gates_clear_the_interrupt_flag() {
    for (gate, expected) in [(0x8e00, 0), (0x8f00, 0x200)] {
        let mut guest = Guest::long();
        guest.gate(0x80, gate);
        guest.program(64, CODE, |a| {
            a.sub(rsp, 3)?;
            a.sti()?;
            a.int(0x80)
        });
        let exception = guest.exception();
        assert_eq!(exception.state.general[4], ((STACK - 3) & !0xf) - 40);
        assert_eq!(exception.rsp, STACK - 3);
        assert_eq!((exception.rflags & 0x200, exception.state.rflags & 0x200), (0x200, expected));
    }
}

#[test]
fn selectors_show_in_the_error_codes() {
    // What is loaded, where, and what comes of it.
    let cases: [(u16, &str, u8, u64); 8] = [
        (ABSENT, "ds", 11, 0x38),
        (ABSENT, "ss", 12, 0x38),
        (0x78, "ds", 13, 0x78),
        (0x4c, "ds", 13, 0x4c),
        (TSS_SELECTOR, "es", 13, 0x40),
        (USER_DATA, "ss", 13, 0x28),
        (CODE64, "ss", 13, 0x10),
        (3, "ss", 13, 0),
    ];
    for (selector, register, vector, error) in cases {
        let mut guest = Guest::long();
        guest.program(64, CODE, |a| {
            a.mov(eax, u32::from(selector))?;
            match register {
                "ds" => a.mov(ds, ax),
                "es" => a.mov(es, ax),
                _ => a.mov(ss, ax),
            }
        });
        let exception = guest.exception();
        assert_eq!((exception.vector, exception.error), (vector, Some(error)), "{register} = {selector:#x}");
        assert_eq!(exception.rip, CODE + 5, "the load itself");
    }
}

#[test]
fn a_gate_that_cannot_be_used_names_itself() {
    // Gate flags, vector and error of what comes instead: bit 1 of the error says IDT; INT n is no external event.
    for (flags, vector, error) in [(0x0e00, 11, 0x80 * 8 + 2), (0x8c00, 13, 0x80 * 8 + 2)] {
        let mut guest = Guest::long();
        guest.gate(0x80, flags);
        guest.program(64, CODE, |a| a.int(0x80));
        let exception = guest.exception();
        assert_eq!((exception.vector, exception.error, exception.rip), (vector, Some(error), CODE));
    }
    // For an exception the external bit is set as well.
    let mut guest = Guest::long();
    guest.gate(6, 0x0e00);
    guest.program(64, CODE, |a| a.ud2());
    let exception = guest.exception();
    assert_eq!((exception.vector, exception.error), (11, Some(6 * 8 + 3)));
}

#[test]
fn a_double_fault_arrives_on_its_own_stack() {
    let mut guest = Guest::long();
    guest.gate(8, 0x8e01);
    guest.program(64, CODE, |a| {
        a.mov(rsp, 0x8000_0000_0000u64)?;
        a.push(rax)
    });
    let exception = guest.exception();
    // #SS on the push, #SS again on pushing its frame.
    assert_eq!((exception.vector, exception.error), (8, Some(0)));
    assert_eq!(exception.state.general[4], IST1 - 48);
    assert_eq!(exception.rsp, 0x8000_0000_0000);
}

#[test]
fn a_page_fault_without_a_stack_becomes_a_double_fault() {
    let mut guest = Guest::long();
    guest.gate(8, 0x8e01);
    guest.put(TABLE + (STACK - 0x1000 >> 12) * 8, 0u64);
    guest.program(64, CODE, |a| a.push(rax));
    let exception = guest.exception();
    assert_eq!((exception.vector, exception.error), (8, Some(0)));
    assert_eq!(exception.cr2 & !0xfff, STACK - 0x1000);
}

#[test]
fn a_page_fault_while_delivering_an_interrupt_is_just_a_page_fault() {
    let mut guest = Guest::long();
    guest.put(TABLE + (STACK - 0x1000 >> 12) * 8, 0u64);
    guest.gate(14, 0x8e01);
    guest.program(64, CODE, |a| a.int(0x80));
    let exception = guest.exception();
    assert_eq!((exception.vector, exception.error, exception.rip), (14, Some(2), CODE));
}

#[test]
fn a_triple_fault_ends_in_a_report_that_tells_the_story() {
    let mut guest = Guest::long();
    guest.gate(14, 0x0e00);
    guest.gate(11, 0x0e00);
    guest.gate(8, 0x0e00);
    guest.program(64, CODE, |a| {
        a.mov(rbx, 0x1234_5678_9000u64)?;
        a.mov(al, byte_ptr(rbx))
    });
    let report = guest.crash();
    assert!(
        report.what.starts_with("triple fault: #NP(0x43) while delivering #DF after #NP(0x73) while delivering #PF(0x0) at 0x123456789000"),
        "{}",
        report.what
    );
    assert_eq!(report.state.rip, CODE + 10);
    assert_eq!(&report.instruction[..2], [0x8a, 0x03]);
    assert_eq!(report.state.general[3], 0x1234_5678_9000);
}

#[test]
fn an_empty_idt_is_a_triple_fault_in_every_mode() {
    for mut guest in [Guest::long(), Guest::protected()] {
        guest.load(CODE, &[0x0f, 0x0b]);
        guest.change(|state| state.idt.limit = 0);
        assert!(guest.crash().what.starts_with("triple fault: #GP"));
    }
}

#[test]
fn single_steps_trap_after_each_instruction() {
    let mut guest = Guest::long();
    guest.handler(1, |a| {
        a.mov(rax, ptr(rsp))?;
        a.out(NOTE, eax)?;
        a.mov(rax, dr6)?;
        a.and(eax, 0x4000)?;
        a.out(NOTE, eax)?;
        a.xor(eax, eax)?;
        a.mov(dr6, rax)?;
        a.iretq()
    });
    guest.program(64, CODE, |a| {
        a.pushfq()?;
        a.or(qword_ptr(rsp), 0x100)?;
        a.popfq()?;
        a.nop()?;
        a.nop()?;
        a.and(qword_ptr(rsp - 8), 0)?;
        a.pushfq()?;
        a.and(qword_ptr(rsp), !0x100)?;
        a.popfq()?;
        a.out(STOP, al)
    });
    guest.run();
    let notes = guest.notes();
    let addresses: Vec<u64> = notes.iter().step_by(2).map(|n| n - CODE).collect();
    let start = 1 + 8 + 1;
    assert_eq!(addresses[..2], [start + 1, start + 2]);
    assert_eq!(addresses.len(), 6, "each instruction from the one after POPF to the POPF that ends it");
    assert!(notes.iter().skip(1).step_by(2).all(|n| *n == 0x4000));
}

#[test]
fn debug_registers_can_be_guarded() {
    let mut guest = Guest::long();
    guest.program(64, CODE, |a| {
        a.mov(eax, 0x2400)?;
        a.mov(dr7, rax)?;
        a.mov(rbx, dr0)
    });
    let exception = guest.exception();
    assert_eq!((exception.vector, exception.rip), (1, CODE + 8));
    assert_eq!(exception.state.debug[4] & 0x2000, 0x2000);
    assert_eq!(exception.state.debug[5] & 0x2000, 0, "the handler may look");
}

#[test]
fn a_lock_prefix_where_none_may_be_is_undefined() {
    let mut guest = Guest::long();
    // LOCK NOP.
    guest.load(CODE, &[0xf0, 0x90]);
    assert_eq!(guest.exception().vector, 6);
}

#[test]
fn what_cpuid_does_not_show_is_undefined() {
    // RDTSCP, XSETBV, MONITOR, MWAIT, VMCALL, RDPID, RDPKRU.
    for bytes in [
        [0x0f, 0x01, 0xf9, 0x90],
        [0x0f, 0x01, 0xd1, 0x90],
        [0x0f, 0x01, 0xc8, 0x90],
        [0x0f, 0x01, 0xc9, 0x90],
        [0x0f, 0x01, 0xc1, 0x90],
        [0xf3, 0x0f, 0xc7, 0xf8],
        [0x0f, 0x01, 0xee, 0x90],
    ] {
        let mut guest = Guest::long();
        guest.load(CODE, &bytes);
        assert_eq!(guest.exception().vector, 6, "{bytes:02x?}");
    }
}
