//! Ring 3 and the ways in and out of it: IRET, interrupts, SYSCALL, SYSENTER, call gates; segment checks.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use crate::guest::*;

const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const SFMASK: u32 = 0xc000_0084;

fn to_ring3(a: &mut CodeAssembler, code: u16, flags: i32) -> Result<(), IcedError> {
    a.push(i32::from(USER_DATA))?;
    a.push(USER_STACK as i32)?;
    a.push(flags)?;
    a.push(i32::from(code))?;
    a.push(USER_CODE as i32)?;
    a.iretq()
}

fn wrmsr(a: &mut CodeAssembler, msr: u32, value: u64) -> Result<(), IcedError> {
    a.mov(ecx, msr)?;
    a.mov(eax, value as u32)?;
    a.mov(edx, (value >> 32) as u32)?;
    a.wrmsr()
}

#[test]
fn syscall_enters_ring_0_and_sysret_leaves_it() {
    const ENTRY: u64 = 0x1_8000;
    let mut guest = Guest::long();
    guest.program(64, CODE, |a| {
        // SYSRET's selectors are 0x20 + 3 (32-bit), + 8 (stack), + 16 (64-bit).
        wrmsr(a, STAR, u64::from(USER_CODE32) << 48 | u64::from(CODE64) << 32)?;
        wrmsr(a, LSTAR, ENTRY)?;
        wrmsr(a, SFMASK, 0x200)?;
        to_ring3(a, USER_CODE64, 0x202)
    });
    guest.program(64, ENTRY, |a| {
        a.mov(eax, cs)?;
        a.out(NOTE, eax)?;
        a.mov(eax, ss)?;
        a.out(NOTE, eax)?;
        a.pushfq()?;
        a.pop(rax)?;
        a.out(NOTE, eax)?;
        a.mov(rax, rcx)?;
        a.out(NOTE, eax)?;
        a.mov(rax, r11)?;
        a.out(NOTE, eax)?;
        a.sysretq()
    });
    guest.program(64, USER_CODE, |a| {
        a.mov(rsp, USER_STACK)?;
        a.syscall()?;
        a.pushfq()?;
        a.pop(rbx)?;
        a.mov(r8d, cs)?;
        a.mov(r9d, ss)?;
        a.cli()
    });
    let exception = guest.exception();
    assert_eq!(guest.notes(), [u64::from(CODE64), u64::from(DATA), 2, USER_CODE + 12, 0x202]);
    assert_eq!((exception.vector, exception.error), (13, Some(0)), "CLI in ring 3");
    assert_eq!((exception.cs, exception.ss, exception.rsp), (USER_CODE64, USER_DATA, USER_STACK));
    assert_eq!(exception.state.general[3], 0x202);
    assert_eq!(
        (exception.state.general[8], exception.state.general[9]),
        (USER_CODE64.into(), USER_DATA.into())
    );
    assert_eq!(exception.state.general[4], RING0_STACK - 48);
}

#[test]
fn a_single_step_over_syscall_traps_when_it_is_back_in_ring_3() {
    const ENTRY: u64 = 0x1_8000;
    let mut guest = Guest::long();
    guest.program(64, CODE, |a| {
        wrmsr(a, STAR, u64::from(USER_CODE32) << 48 | u64::from(CODE64) << 32)?;
        wrmsr(a, LSTAR, ENTRY)?;
        wrmsr(a, SFMASK, 0x300)?;
        // With TF.
        to_ring3(a, USER_CODE64, 0x102)
    });
    guest.program(64, ENTRY, |a| {
        a.nop()?;
        a.sysretq()
    });
    guest.program(64, USER_CODE, |a| {
        a.syscall()?;
        a.nop()
    });
    let exception = guest.exception();
    assert_eq!((exception.vector, exception.rip, exception.cs), (1, USER_CODE + 2, USER_CODE64));
    assert_eq!(exception.state.debug[4] & 0x4000, 0x4000);
}

#[test]
fn a_return_outwards_clears_what_the_outer_level_may_not_use() {
    let mut guest = Guest::long();
    guest.program(64, CODE, |a| {
        a.mov(eax, u32::from(DATA))?;
        a.mov(ds, ax)?;
        a.mov(eax, 3)?;
        a.mov(es, ax)?;
        a.mov(fs, ax)?;
        a.mov(eax, u32::from(USER_DATA))?;
        a.mov(gs, ax)?;
        wrmsr(a, 0xc000_0100, 0x1234_5000)?;
        to_ring3(a, USER_CODE64, 2)
    });
    guest.program(64, USER_CODE, |a| a.ud2());
    let state = guest.exception().state;
    let selectors = [0, 3, 4, 5].map(|n| state.segments[n].selector);
    assert_eq!(selectors, [0, 0, 0, USER_DATA]);
    assert_eq!(state.segments[4].base, 0x1234_5000, "a base set by MSR stays");
}

#[test]
fn sysret_to_an_address_that_is_not_canonical_faults_in_ring_0() {
    let mut guest = Guest::long();
    guest.program(64, CODE, |a| {
        a.mov(rcx, 0x8000_0000_0000u64)?;
        a.sysretq()
    });
    let exception = guest.exception();
    assert_eq!((exception.vector, exception.error, exception.cs), (13, Some(0), CODE64));
}

#[test]
fn sysenter_and_sysexit_use_their_registers() {
    const ENTRY: u64 = 0x1_8000;
    let mut guest = Guest::long();
    // SYSEXIT to 64-bit code uses CS + 32 and + 40: 0x10 + 32 = 0x30, 0x38 as stack.
    guest.put(GDT + 0x38, 0x00cf_f300_0000_ffffu64);
    guest.program(64, CODE, |a| {
        wrmsr(a, 0x174, CODE64.into())?;
        wrmsr(a, 0x175, RING0_STACK)?;
        wrmsr(a, 0x176, ENTRY)?;
        to_ring3(a, USER_CODE64, 0x202)
    });
    guest.program(64, ENTRY, |a| {
        a.mov(rax, rsp)?;
        a.out(NOTE, eax)?;
        a.mov(rdx, USER_CODE + 0x80)?;
        a.mov(rcx, USER_STACK - 8)?;
        a.sysexitq()
    });
    guest.program(64, USER_CODE, |a| a.sysenter());
    guest.program(64, USER_CODE + 0x80, |a| a.hlt());
    let exception = guest.exception();
    assert_eq!(guest.notes(), [RING0_STACK]);
    assert_eq!((exception.vector, exception.rip), (13, USER_CODE + 0x80), "HLT in ring 3");
    assert_eq!((exception.cs, exception.ss, exception.rsp), (0x33, 0x3b, USER_STACK - 8));
}

#[test]
fn compatibility_code_interrupts_into_64_bit_code_and_goes_back() {
    let mut guest = Guest::long();
    guest.gate(0x80, 0xee00);
    guest.handler(0x80, |a| {
        a.mov(eax, cs)?;
        a.out(NOTE, eax)?;
        a.mov(rax, ptr(rsp + 8))?;
        a.out(NOTE, eax)?;
        a.mov(rax, 0x1_0000_0001u64)?;
        a.iretq()
    });
    guest.program(64, CODE, |a| to_ring3(a, USER_CODE32, 0x202));
    guest.program(32, USER_CODE, |a| {
        a.int(0x80)?;
        // In 64-bit code this is REX + INC; here DEC EAX, then LOOP-free arithmetic.
        a.db(&[0x48])?;
        a.mov(ebx, esp)?;
        a.push(0x1234)?;
        a.pop(esi)?;
        a.ud2()
    });
    let exception = guest.exception();
    assert_eq!(guest.notes(), [u64::from(CODE64), USER_CODE32.into()]);
    assert_eq!((exception.vector, exception.cs), (6, USER_CODE32));
    assert_eq!(exception.state.general[0], 0, "DEC EAX, and the upper half is gone");
    assert_eq!((exception.state.general[3], exception.state.general[6]), (USER_STACK, 0x1234));
}

#[test]
fn software_interrupts_obey_the_gate_s_privilege() {
    let mut guest = Guest::long();
    guest.program(64, CODE, |a| to_ring3(a, USER_CODE64, 2));
    guest.program(64, USER_CODE, |a| a.int(0x80));
    let exception = guest.exception();
    assert_eq!((exception.vector, exception.error, exception.rip), (13, Some(0x402), USER_CODE));
}

#[test]
fn ports_are_open_by_iopl_or_by_the_bitmap() {
    for (flags, bitmap, port, vector) in
        [(0x3002, 0xffffu16, NOTE, 6), (2, 0xffff, NOTE, 13), (2, 0x68, NOTE, 6), (2, 0x68, NOTE + 8, 13)]
    {
        let mut guest = Guest::long();
        guest.put(TSS + 0x66, bitmap);
        for n in 0..0x40u64 {
            guest.put(TSS + 0x68 + n, 0u8);
        }
        // Only the ports from NOTE + 8 are closed.
        guest.put(TSS + 0x68 + (NOTE as u64 + 8) / 8, 0xffu8);
        guest.change(|state| state.tr.limit = 0x67 + 0x40);
        guest.program(64, CODE, |a| to_ring3(a, USER_CODE64, flags));
        guest.program(64, USER_CODE, |a| {
            a.out(port, al)?;
            a.ud2()
        });
        let exception = guest.exception();
        assert_eq!(exception.vector, vector, "flags {flags:#x}, bitmap {bitmap:#x}, port {port:#x}");
    }
}

#[test]
fn ring_3_cannot_change_iopl_or_the_interrupt_flag() {
    let mut guest = Guest::long();
    guest.program(64, CODE, |a| to_ring3(a, USER_CODE64, 0x202));
    // All but TF, which would trap.
    guest.program(64, USER_CODE, |a| {
        a.push(0x3cd7)?;
        a.popfq()?;
        a.pushfq()?;
        a.pop(rbx)?;
        a.push(0)?;
        a.popfq()?;
        a.pushfq()?;
        a.pop(rsi)?;
        a.ud2()
    });
    let exception = guest.exception();
    assert_eq!(exception.state.general[3], 0x0ed7);
    assert_eq!(exception.state.general[6], 0x202);
}

#[test]
fn privileged_instructions_fault_in_ring_3() {
    type Case = dyn Fn(&mut CodeAssembler) -> Result<(), IcedError>;
    let cases: [&Case; 12] = [
        &|a| a.hlt(),
        &|a| a.clts(),
        &|a| a.wbinvd(),
        &|a| a.invlpg(ptr(0x1000)),
        &|a| a.lgdt(ptr(0x1000)),
        &|a| a.lidt(ptr(0x1000)),
        &|a| a.ltr(ax),
        &|a| a.lldt(ax),
        &|a| a.mov(rax, cr0),
        &|a| a.mov(dr0, rax),
        &|a| a.rdmsr(),
        &|a| a.swapgs(),
    ];
    for (n, case) in cases.iter().enumerate() {
        let mut guest = Guest::long();
        guest.program(64, CODE, |a| to_ring3(a, USER_CODE64, 2));
        guest.program(64, USER_CODE, case);
        let exception = guest.exception();
        assert_eq!((exception.vector, exception.error, exception.rip), (13, Some(0), USER_CODE), "case {n}");
    }
}

#[test]
fn swapgs_and_the_base_msrs_reach_the_same_bases() {
    let mut guest = Guest::long();
    guest.put(0x6_0008u64, 0x1111u32);
    guest.put(0x6_1008u64, 0x2222u32);
    guest.program(64, CODE, |a| {
        wrmsr(a, 0xc000_0101, 0x6_0000)?;
        wrmsr(a, 0xc000_0102, 0x6_1000)?;
        a.mov(eax, ptr(8).gs())?;
        a.out(NOTE, eax)?;
        a.swapgs()?;
        a.mov(eax, ptr(8).gs())?;
        a.out(NOTE, eax)?;
        a.mov(ecx, 0xc000_0102u32)?;
        a.rdmsr()?;
        a.out(NOTE, eax)?;
        a.out(STOP, al)
    });
    guest.run();
    assert_eq!(guest.notes(), [0x1111, 0x2222, 0x6_0000]);
}

#[test]
fn lar_lsl_verr_and_verw_tell_what_a_selector_may() {
    let mut guest = Guest::long();
    let check = |a: &mut CodeAssembler, selector: u16| {
        a.mov(ebx, u32::from(selector))?;
        a.xor(ecx, ecx)?;
        a.lar(ecx, ebx)?;
        a.mov(eax, ecx)?;
        a.out(NOTE, eax)?;
        a.xor(ecx, ecx)?;
        a.lsl(ecx, ebx)?;
        a.mov(eax, ecx)?;
        a.out(NOTE, eax)?;
        a.verr(bx)?;
        a.setz(al)?;
        a.verw(bx)?;
        a.setz(ah)?;
        a.out(NOTE, ax)
    };
    guest.program(64, CODE, |a| {
        check(a, CODE64)?;
        check(a, DATA)?;
        check(a, TSS_SELECTOR)?;
        check(a, 0)?;
        check(a, 0x1000)?;
        // DPL 0 with RPL 3.
        check(a, DATA | 3)?;
        a.out(STOP, al)
    });
    guest.run();
    let limit = 0xffff_ffff;
    assert_eq!(
        guest.notes(),
        [0xaf9b00, limit, 1, 0xcf9300, limit, 0x101, 0x8900, 0x67, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    );
}

#[test]
fn ltr_marks_its_segment_busy_and_str_shows_it() {
    let mut guest = Guest::long();
    guest.program(64, CODE, |a| {
        a.mov(eax, u32::from(TSS_SELECTOR))?;
        a.ltr(ax)?;
        a.xor(eax, eax)?;
        a.str(eax)?;
        a.out(NOTE, eax)?;
        a.mov(eax, u32::from(TSS_SELECTOR))?;
        a.ltr(ax)
    });
    let exception = guest.exception();
    assert_eq!(guest.notes(), [u64::from(TSS_SELECTOR)]);
    assert_eq!((exception.vector, exception.error), (13, Some(0x40)), "it is busy already");
    assert_eq!(guest.get::<u8>(GDT + 0x45), 0x8b);
}

#[test]
fn a_64_bit_call_gate_switches_stacks_and_a_far_return_comes_back() {
    const TARGET: u64 = 0x1_8000;
    let mut guest = Guest::long();
    // DPL 3, 64-bit gate to CODE64.
    guest.put(
        GDT + u64::from(GATE),
        TARGET & 0xffff | u64::from(CODE64) << 16 | 0xec << 40 | (TARGET >> 16) << 48,
    );
    guest.put(GDT + u64::from(GATE) + 8, 0u64);
    guest.program(64, TARGET, |a| {
        a.mov(rax, rsp)?;
        a.out(NOTE, eax)?;
        a.mov(eax, cs)?;
        a.out(NOTE, eax)?;
        a.db(&[0x48, 0xcb])
    });
    guest.program(64, CODE, |a| to_ring3(a, USER_CODE64, 2));
    guest.put(USER_STACK + 0x10, u64::from(GATE | 3) << 32);
    guest.program(64, USER_CODE, |a| {
        // CALL far [m16:32]
        a.db(&[0xff, 0x1c, 0x25])?;
        a.dd(&[(USER_STACK + 0x10) as u32])?;
        a.ud2()
    });
    let exception = guest.exception();
    assert_eq!(guest.notes(), [RING0_STACK - 32, CODE64.into()]);
    assert_eq!((exception.vector, exception.rip, exception.rsp), (6, USER_CODE + 7, USER_STACK));
    assert_eq!((exception.cs, exception.ss), (USER_CODE64, USER_DATA));
}

#[test]
fn a_32_bit_call_gate_copies_parameters() {
    const TARGET: u64 = 0x1_8000;
    let mut guest = Guest::protected();
    guest.put(
        GDT + u64::from(GATE),
        TARGET & 0xffff | u64::from(CODE32) << 16 | 2 << 32 | 0xec << 40 | (TARGET >> 16) << 48,
    );
    guest.program(32, TARGET, |a| {
        a.mov(eax, ptr(esp + 8))?;
        a.out(NOTE, eax)?;
        a.mov(eax, ptr(esp + 12))?;
        a.out(NOTE, eax)?;
        a.mov(eax, esp)?;
        a.out(NOTE, eax)?;
        a.retf_1(8)
    });
    guest.program(32, CODE, |a| {
        a.mov(eax, u32::from(USER_DATA))?;
        a.mov(ds, ax)?;
        a.mov(eax, u32::from(DATA))?;
        a.mov(es, ax)?;
        a.push(i32::from(USER_DATA))?;
        a.push(USER_STACK as i32)?;
        a.push(i32::from(USER_CODE32))?;
        a.push(USER_CODE as i32)?;
        a.retf()
    });
    guest.program(32, USER_CODE, |a| {
        a.push(0x1111)?;
        a.push(0x2222)?;
        // CALL GATE|3:0
        a.db(&[0x9a, 0, 0, 0, 0, GATE as u8 | 3, 0])?;
        a.ud2()
    });
    let exception = guest.exception();
    assert_eq!(guest.notes(), [0x2222, 0x1111, RING0_STACK - 24]);
    assert_eq!(
        (exception.vector, exception.cs, exception.rsp),
        (6, USER_CODE32, USER_STACK),
        "parameters released on both stacks"
    );
    assert_eq!(exception.state.segments[0].selector, 0, "ES was ring 0's");
    assert_eq!(exception.state.segments[3].selector, USER_DATA);
}

#[test]
fn segment_limits_hold_in_32_bit_code() {
    let mut guest = Guest::protected();
    // Base 0x60000, limit 0xff, writable; then the same read-only.
    guest.put(GDT + u64::from(GATE), 0x0040_9306_0000_00ffu64);
    guest.put(GDT + u64::from(GATE) + 8, 0x0040_9106_0000_00ffu64);
    for (selector, offset, size, faults) in [
        (GATE, 0xfc, 4, false),
        (GATE, 0xfd, 4, true),
        (GATE, 0xff, 1, false),
        (GATE, 0x100, 1, true),
        (GATE + 8, 0, 1, true),
    ] {
        guest.program(32, CODE, |a| {
            a.mov(eax, u32::from(selector))?;
            a.mov(es, ax)?;
            if size == 4 {
                a.mov(dword_ptr(offset).es(), 1)?
            } else {
                a.mov(byte_ptr(offset).es(), 1)?
            }
            a.int3()
        });
        guest.change(|state| {
            state.rip = CODE;
            state.general[4] = STACK;
        });
        let exception = guest.exception();
        assert_eq!(exception.vector, if faults { 13 } else { 3 }, "{selector:#x}:{offset:#x}");
    }
    assert_eq!(guest.get::<u32>(0x6_00fc), 0x0100_0001);
}
