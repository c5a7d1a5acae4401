//! Page faults of each kind, and accessed and dirty bits.

use iced_x86::code_asm::*;

use crate::guest::*;

/// A page of its own for these tests, and its table entry.
const PAGE: u64 = 0x6_0000;
const ENTRY: u64 = TABLE + (PAGE >> 12) * 8;

const NO_EXECUTE: u64 = 1 << 63;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Access {
    Read,
    Write,
    Execute,
}
use Access::*;

/// Accesses [`PAGE`] + 0x123 with this entry, from ring 3 if `user`.
fn access(entry: u64, access: Access, user: bool, control: u64, efer: u64) -> (Guest, Exception) {
    let mut guest = Guest::long();
    guest.put(ENTRY, entry);
    // One byte, so that it is code as well: OUT STOP and a return for the accesses that succeed.
    guest.load(PAGE + 0x123, &[0xcc]);
    guest.program(64, CODE, |a| {
        if user {
            a.push(i32::from(USER_DATA))?;
            a.push(USER_STACK as i32)?;
            a.push(2)?;
            a.push(i32::from(USER_CODE64))?;
            a.push(USER_CODE as i32)?;
            a.iretq()
        } else {
            a.jmp(USER_CODE)
        }
    });
    guest.program(64, USER_CODE, |a| {
        a.mov(rbx, PAGE + 0x123)?;
        match access {
            Read => a.mov(al, byte_ptr(rbx))?,
            Write => a.mov(byte_ptr(rbx), 0xcc)?,
            Execute => a.jmp(rbx)?,
        }
        // Success: #BP, as at the executed byte.
        a.int3()
    });
    guest.gate(3, 0xee00);
    guest.change(|state| {
        state.cr0 = control;
        state.efer = efer;
    });
    let exception = guest.exception();
    (guest, exception)
}

#[test]
fn page_faults_report_their_kind_and_address() {
    const WP: u64 = 0x8001_0011;
    const NO_WP: u64 = 0x8000_0011;
    const NX: u64 = 0xd01;
    const NO_NX: u64 = 0x501;
    // Entry, access, user, CR0, EFER, error code or nothing.
    let cases = [
        (7, Read, true, WP, NX, None),
        (7, Write, true, WP, NX, None),
        (7, Execute, true, WP, NX, None),
        (6, Read, false, WP, NX, Some(0)),
        (6, Write, false, WP, NX, Some(2)),
        (6, Execute, false, WP, NX, Some(0x10)),
        (6, Execute, false, WP, NO_NX, Some(0)),
        (6, Read, true, WP, NX, Some(4)),
        (6, Write, true, WP, NX, Some(6)),
        (6, Execute, true, WP, NX, Some(0x14)),
        (5, Read, true, WP, NX, None),
        (5, Write, true, WP, NX, Some(7)),
        (5, Write, true, NO_WP, NX, Some(7)),
        (5, Write, false, WP, NX, Some(3)),
        (5, Write, false, NO_WP, NX, None),
        (3, Read, true, WP, NX, Some(5)),
        (3, Write, true, WP, NX, Some(7)),
        (3, Execute, true, WP, NX, Some(0x15)),
        (3, Execute, true, WP, NO_NX, Some(5)),
        (3, Write, false, WP, NX, None),
        (7 | NO_EXECUTE, Read, true, WP, NX, None),
        (7 | NO_EXECUTE, Execute, true, WP, NX, Some(0x15)),
        (7 | NO_EXECUTE, Execute, false, WP, NX, Some(0x11)),
        // Without NXE the bit is reserved.
        (7 | NO_EXECUTE, Read, false, WP, NO_NX, Some(9)),
        (7 | NO_EXECUTE, Write, true, WP, NO_NX, Some(0xf)),
        (7 | 1 << 51, Read, false, WP, NX, Some(9)),
        (7 | 1 << 46, Execute, true, WP, NX, Some(0x1d)),
    ];
    for case @ (flags, kind, user, control, efer, expected) in cases {
        let entry = if flags & 1 == 0 { flags } else { flags | PAGE };
        let (guest, exception) = access(entry, kind, user, control, efer);
        match expected {
            None => assert_eq!(exception.vector, 3, "{case:?}"),
            Some(error) => {
                assert_eq!((exception.vector, exception.error), (14, Some(error)), "{case:?}");
                assert_eq!(exception.cr2, PAGE + 0x123, "{case:?}");
                assert_eq!(exception.cs & 3, if user { 3 } else { 0 });
                if kind == Execute {
                    assert_eq!(exception.rip, PAGE + 0x123);
                } else {
                    assert!((USER_CODE..USER_CODE + 0x20).contains(&exception.rip), "{case:?}");
                }
            }
        }
        let after = guest.get::<u64>(ENTRY);
        match expected {
            None if kind == Write => assert_eq!(after, entry | 0x60, "accessed and dirty: {case:?}"),
            None => assert_eq!(after, entry | 0x20, "accessed: {case:?}"),
            Some(_) => assert_eq!(after & 0x40, 0, "not dirty: {case:?}"),
        }
    }
}

#[test]
fn a_store_over_two_pages_faults_at_the_second_and_writes_nothing() {
    let mut guest = Guest::long();
    guest.put(ENTRY + 8, 0u64);
    guest.program(64, CODE, |a| {
        a.mov(rax, 0x1122_3344_5566_7788u64)?;
        a.mov(rbx, PAGE + 0xffc)?;
        a.mov(qword_ptr(rbx), rax)
    });
    let exception = guest.exception();
    assert_eq!((exception.vector, exception.error, exception.cr2), (14, Some(2), PAGE + 0x1000));
    assert_eq!(guest.get::<u32>(PAGE + 0xffc), 0);
}

#[test]
fn a_changed_entry_counts_after_invlpg_and_a_global_one_outlives_cr3() {
    let mut guest = Guest::long();
    guest.load(PAGE, &[1]);
    guest.load(PAGE + 0x1000, &[2]);
    guest.put(ENTRY, PAGE | 0x107);
    let read = |a: &mut CodeAssembler| {
        a.movzx(eax, byte_ptr(PAGE))?;
        a.out(NOTE, eax)
    };
    guest.program(64, CODE, |a| {
        read(a)?;
        a.mov(qword_ptr(ENTRY), (PAGE + 0x1000) as i32 | 0x107)?;
        a.mov(rax, cr3)?;
        a.mov(cr3, rax)?;
        read(a)?;
        a.invlpg(ptr(PAGE))?;
        read(a)?;
        a.mov(qword_ptr(ENTRY), PAGE as i32 | 0x107)?;
        a.mov(rax, cr4)?;
        a.xor(rax, 0x80)?;
        a.mov(cr4, rax)?;
        read(a)?;
        a.out(STOP, al)
    });
    guest.change(|state| state.cr4 |= 0x80);
    guest.run();
    assert_eq!(guest.notes(), [1, 1, 2, 1]);
}

#[test]
fn thirty_two_bit_and_pae_tables_translate_and_fault() {
    for pae in [false, true] {
        let mut guest = Guest::protected();
        const TABLES: u64 = 0x10_0000;
        if pae {
            guest.put(TABLES, TABLES + 0x1000 | 1);
            guest.put(TABLES + 0x1000, 0x83u64);
            guest.put(TABLES + 0x1008, TABLES + 0x2000 | 3);
            guest.put(TABLES + 0x2000, PAGE | 1u64 | NO_EXECUTE);
        } else {
            guest.put(TABLES, 0x83u32);
            guest.put(TABLES + 4, (TABLES + 0x2000) as u32 | 3);
            guest.put(TABLES + 0x2000, PAGE as u32 | 1);
        }
        let mapped = if pae { 0x20_0000 } else { 0x40_0000u32 };
        guest.load(PAGE, &[0x5a]);
        guest.program(32, CODE, |a| {
            a.mov(eax, TABLES as i32)?;
            a.mov(cr3, eax)?;
            a.mov(eax, cr0)?;
            a.or(eax, 0x8001_0000u32)?;
            a.mov(cr0, eax)?;
            a.movzx(eax, byte_ptr(mapped))?;
            a.out(NOTE, eax)?;
            a.mov(byte_ptr(mapped + 4), 1)
        });
        guest.change(|state| {
            state.cr4 = if pae { 0x20 } else { 0x10 };
            state.efer = if pae { 0x800 } else { 0 };
        });
        let exception = guest.exception();
        assert_eq!(guest.notes(), [0x5a]);
        assert_eq!(
            (exception.vector, exception.error, exception.cr2),
            (14, Some(3), u64::from(mapped) + 4),
            "PAE {pae}"
        );
        let entry: u32 = guest.get(TABLES + 0x2000);
        assert_eq!(entry & 0x60, 0x20);
    }
}
