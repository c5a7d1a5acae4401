//! Real, protected, compatibility and long mode, and the ways between them.

use iced_x86::code_asm::*;
use tenon_core::Clock;

use crate::guest::*;

/// As a boot sector starts: real mode, everything flat at 0.
fn real() -> Guest {
    let mut guest = Guest::new(Clock::real().unwrap(), 1);
    guest.change(|state| {
        state.segments[1].selector = 0;
        state.segments[1].base = 0;
        state.rip = 0x7c00;
        state.general[4] = 0x7000;
        state.idt.base = 0;
        state.idt.limit = 0x3ff;
    });
    guest.load(0, &[0; 0x400]);
    guest
}

#[test]
fn a_reset_vcpu_starts_at_the_reset_vector() {
    let mut guest = Guest::new(Clock::real().unwrap(), 1);
    let state = guest.vcpu.state().unwrap();
    assert_eq!((state.segments[1].base, state.rip, state.general[2]), (0xffff_0000, 0xfff0, 0x600));
}

#[test]
fn real_mode_interrupts_go_through_the_vector_table_and_back() {
    let mut guest = real();
    // INT 21h at 0800:0010, division error at 0000:6000.
    guest.put(0x21 * 4, 0x0800_0010u32);
    guest.put(0u64, 0x6000u32);
    guest.program(16, 0x8010, |a| {
        a.add(ax, 1)?;
        a.mov(bx, cs)?;
        a.iret()
    });
    guest.program(16, 0x6000, |a| {
        a.pop(si)?;
        a.push(si)?;
        a.out(STOP, al)?;
        a.jmp(0x6000u64)
    });
    guest.program(16, 0x7c00, |a| {
        a.mov(ax, 0x41)?;
        a.sti()?;
        a.int(0x21)?;
        a.pushf()?;
        a.pop(dx)?;
        a.mov(cx, 0)?;
        a.div(cx)
    });
    let state = guest.run();
    assert_eq!(state.general[0] & 0xffff, 0x42);
    assert_eq!(state.general[3] & 0xffff, 0x800);
    assert_eq!(state.general[2] >> 9 & 1, 1, "IRET gave IF back");
    assert_eq!(state.rflags >> 9 & 1, 0, "the handler runs with IF clear");
    // DIV CX is the last instruction: its own address was pushed.
    assert_eq!(guest.get::<u16>(state.general[6]), 0xf1f7);
}

#[test]
fn real_mode_segments_wrap_nothing_and_check_their_limit() {
    let mut guest = real();
    guest.put(13 * 4, 0x6000u32);
    guest.program(16, 0x6000, |a| {
        a.out(STOP, al)?;
        a.jmp(0x6000u64)
    });
    guest.program(16, 0x7c00, |a| {
        a.mov(ax, 0x1000)?;
        a.mov(ds, ax)?;
        a.mov(bx, 0xffff)?;
        a.mov(byte_ptr(bx), 0x5a)?;
        a.mov(word_ptr(bx), 0x5a5a)
    });
    guest.run();
    assert_eq!(guest.get::<u8>(0x1_ffff), 0x5a);
}

#[test]
fn a_boot_loader_reaches_long_mode_and_comes_back_to_real_mode() {
    let mut guest = real();
    // LGDT's operand.
    guest.put(0x6f00, 0x7fu16);
    guest.put(0x6f02, GDT as u32);
    guest.program(16, 0x7c00, |a| {
        a.lgdt(ptr(0x6f00))?;
        a.mov(eax, cr0)?;
        a.or(eax, 1)?;
        a.mov(cr0, eax)?;
        // JMP CODE32:0x7d00, 16-bit form.
        a.db(&[0xea, 0x00, 0x7d, CODE32 as u8, 0])
    });
    guest.program(32, 0x7d00, |a| {
        a.mov(ax, i32::from(DATA))?;
        a.mov(ds, ax)?;
        a.mov(ss, ax)?;
        a.mov(eax, cr4)?;
        a.or(eax, 0x20)?;
        a.mov(cr4, eax)?;
        a.mov(eax, PML4 as i32)?;
        a.mov(cr3, eax)?;
        a.mov(ecx, 0xc000_0080u32)?;
        a.rdmsr()?;
        a.or(eax, 0x100)?;
        a.wrmsr()?;
        a.mov(eax, cr0)?;
        a.or(eax, 0x8000_0000u32)?;
        a.mov(cr0, eax)?;
        a.rdmsr()?;
        a.out(NOTE, eax)?;
        a.db(&[0xea, 0x00, 0x7e, 0, 0, CODE64 as u8, 0])
    });
    guest.program(64, 0x7e00, |a| {
        a.mov(rax, 0x1122_3344_5566_7788u64)?;
        a.shr(rax, 32)?;
        a.out(NOTE, eax)?;
        // To 16-bit code in compatibility mode, then paging, long mode and protection off.
        a.push(i32::from(CODE16))?;
        a.push(0x7f00)?;
        a.db(&[0x48, 0xcb])
    });
    guest.program(16, 0x7f00, |a| {
        a.mov(eax, cr0)?;
        a.and(eax, 0x7fff_ffff)?;
        a.mov(cr0, eax)?;
        a.mov(ecx, 0xc000_0080u32)?;
        a.rdmsr()?;
        a.out(NOTE, eax)?;
        a.mov(ax, i32::from(DATA16))?;
        a.mov(ds, ax)?;
        a.mov(ss, ax)?;
        a.mov(eax, cr0)?;
        a.and(eax, 0xffff_fffeu32)?;
        a.mov(cr0, eax)?;
        // JMP 0:0x7f80.
        a.db(&[0xea, 0x80, 0x7f, 0, 0])
    });
    guest.program(16, 0x7f80, |a| {
        a.mov(ax, cs)?;
        a.out(NOTE, ax)?;
        a.out(STOP, al)?;
        a.jmp(0x7f80u64)
    });
    let state = guest.run();
    assert_eq!(guest.notes(), [0x500, 0x1122_3344, 0x100, 0]);
    assert_eq!((state.cr0, state.efer), (0x6000_0010, 0x100));
}

#[test]
fn forbidden_control_register_values_are_refused() {
    // Register, value.
    let cases: [(&str, u64); 9] = [
        ("cr0", 0x8000_0010),
        ("cr0", 0x2000_0011),
        ("cr0", 1 << 32 | 0x8001_0011),
        // Out of paging in 64-bit code.
        ("cr0", 0x11),
        ("cr4", 1 << 12),
        ("cr4", 0),
        ("cr3", 1 << 46),
        ("cr8", 16),
        ("efer", 1 << 1),
    ];
    for (register, value) in cases {
        let mut guest = Guest::long();
        guest.program(64, CODE, |a| {
            a.mov(rax, value)?;
            match register {
                "cr0" => a.mov(cr0, rax),
                "cr3" => a.mov(cr3, rax),
                "cr4" => a.mov(cr4, rax),
                "cr8" => a.mov(cr8, rax),
                _ => {
                    a.xor(edx, edx)?;
                    a.mov(ecx, 0xc000_0080u32)?;
                    a.wrmsr()
                }
            }
        });
        let exception = guest.exception();
        assert_eq!((exception.vector, exception.error), (13, Some(0)), "{register} = {value:#x}");
        assert_eq!((exception.state.cr0, exception.state.cr4), (0x8001_0011, 0x6a0));
    }
}

#[test]
fn msrs_that_do_not_exist_and_bases_that_are_not_canonical_are_refused() {
    for (msr, value, write) in [
        (0x1234u32, 0u64, false),
        (0x1234, 0, true),
        (0xc000_0082, 1 << 47, true),
        (0xc000_0101, 1 << 63, true),
    ] {
        let mut guest = Guest::long();
        guest.program(64, CODE, |a| {
            a.mov(ecx, msr)?;
            a.mov(eax, value as u32)?;
            a.mov(edx, (value >> 32) as u32)?;
            if write { a.wrmsr() } else { a.rdmsr() }
        });
        let exception = guest.exception();
        assert_eq!((exception.vector, exception.error), (13, Some(0)), "MSR {msr:#x}");
        // RDMSR and WRMSR are two bytes.
        assert!(matches!(guest.get::<u16>(exception.rip), 0x320f | 0x300f));
    }
}

#[test]
fn cpuid_shows_the_hypervisor_and_its_clock_gives_the_time() {
    const PAGE: u64 = 0x5_0000;
    let mut guest = Guest::long();
    guest.program(64, CODE, |a| {
        a.mov(eax, 0x4000_0000)?;
        a.cpuid()?;
        for register in [ebx, ecx, edx] {
            a.mov(eax, register)?;
            a.out(NOTE, eax)?;
        }
        for (msr, value) in [(0x4b56_4d00u32, PAGE + 0x100), (0x4b56_4d01, PAGE + 1)] {
            a.mov(ecx, msr)?;
            a.mov(eax, value as u32)?;
            a.xor(edx, edx)?;
            a.wrmsr()?;
        }
        a.rdtsc()?;
        a.out(STOP, al)
    });
    let before = guest.clock.now();
    let state = guest.run();
    let after = guest.clock.now();
    let name: Vec<u8> = guest.notes().iter().flat_map(|n| (*n as u32).to_le_bytes()).collect();
    assert_eq!(name, b"KVMKVMKVM\0\0\0");
    let tsc = state.general[2] << 32 | state.general[0] & 0xffff_ffff;
    assert!((before..=after).contains(&(tsc & !0xff)) || (before..=after).contains(&tsc));
    // struct pvclock_vcpu_time_info.
    let version: u32 = guest.get(PAGE);
    assert!(version != 0 && version.is_multiple_of(2));
    let (stamp, system): (u64, u64) = (guest.get(PAGE + 8), guest.get(PAGE + 16));
    let (multiplier, shift): (u32, i8) = (guest.get(PAGE + 24), guest.get(PAGE + 28));
    let time = system + (((u128::from(tsc - stamp)) << shift) * u128::from(multiplier) >> 32) as u64;
    assert_eq!(time, tsc, "a tick is a nanosecond of the machine's clock");
    assert_eq!(guest.get::<u8>(PAGE + 29), 1, "stable");
    let wall =
        u64::from(guest.get::<u32>(PAGE + 0x104)) * 1_000_000_000 + u64::from(guest.get::<u32>(PAGE + 0x108));
    assert!(guest.clock.wall().abs_diff(wall + guest.clock.now()) < 10_000_000_000);
}
