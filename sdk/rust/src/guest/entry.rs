//! The usual ways to enter an x86 guest: 16-bit real mode, 32-bit protected mode without paging, 64-bit long mode with the first
//! 4 GiB mapped one to one.
//!
//! Each function gives a whole [`CpuState`] with general registers 0 and interrupts off; set the entry point and what the guest is to find
//! in its registers. The selectors of protected and long mode are those that Linux's boot protocols name: 0x10 code, 0x18 data.

use super::Layout;
use crate::personality::{CpuState, ErrorCode, Memory, Segment, Table};

/// The selector of the code segment in protected and long mode.
pub const CODE: u16 = 0x10;
/// The selector of the data segments in protected and long mode.
pub const DATA: u16 = 0x18;
/// The length of [`write_tables`]' tables.
pub const TABLES_SIZE: u64 = 7 * PAGE;

const PAGE: u64 = 4096;
const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Present and writable.
const TABLE_ENTRY: u64 = 0b11;
/// Present, writable, a large page.
const LARGE_PAGE: u64 = 0b1000_0011;

/// The descriptors behind [`CODE`] and [`DATA`] in protected mode: flat, 4 GiB, ring 0.
const CODE32: u64 = 0x00cf_9b00_0000_ffff;
/// The same for long mode.
const CODE64: u64 = 0x00af_9b00_0000_ffff;
const DATA32: u64 = 0x00cf_9300_0000_ffff;

/// Real mode at `selector:offset`, with all data segments like the code segment and the stack pointer 0.
#[must_use]
pub fn real_mode(selector: u16, offset: u16) -> CpuState {
    let segment = |rights| Segment { selector, base: u64::from(selector) << 4, limit: 0xffff, rights };
    CpuState { rip: offset.into(), cr0: CR0_ET, ..flat(segment(0x9b), segment(0x93), Table { base: 0, limit: 0 }, 0xffff) }
}

/// Protected mode without paging: flat segments that are loaded but have no descriptor table behind them, as the
/// PVH start of day and Multiboot have it. A guest loads a table of its own before it loads a segment register.
#[must_use]
pub fn protected_mode(entry: u32) -> CpuState {
    let (code, data) = flat_segments(0xc09b);
    CpuState { rip: entry.into(), cr0: CR0_PE | CR0_ET, ..flat(code, data, Table { base: 0, limit: 0 }, 0) }
}

/// Like [`protected_mode`], with the descriptor table that [`write_tables`] put at `tables`.
#[must_use]
pub fn protected_mode_with_tables(entry: u32, tables: u64) -> CpuState {
    CpuState { gdt: Table { base: tables, limit: 31 }, ..protected_mode(entry) }
}

/// Long mode with the page tables and the descriptor table that [`write_tables`] put at `tables`.
#[must_use]
pub fn long_mode(entry: u64, tables: u64) -> CpuState {
    let (code, data) = flat_segments(0xa09b);
    CpuState {
        rip: entry,
        cr0: CR0_PE | CR0_ET | CR0_PG,
        cr3: tables + PAGE,
        cr4: CR4_PAE,
        efer: EFER_LME | EFER_LMA,
        ..flat(code, data, Table { base: tables, limit: 31 }, 0)
    }
}

/// Takes [`TABLES_SIZE`] bytes of RAM, the lowest free from `from` up to `below`, and writes there a descriptor table (first page) and
/// page tables (six pages) that map the first 4 GiB one to one by 2 MiB pages. Returns their address.
///
/// # Errors
/// There is no room.
pub fn write_tables(
    layout: &mut Layout,
    memory: &Memory,
    from: u64,
    below: u64,
    long_mode: bool,
) -> Result<u64, ErrorCode> {
    let base = layout.take_lowest(TABLES_SIZE, from, below, "the page tables")?;
    let mut words = Vec::with_capacity(7 * 512);
    words.extend([0, 0, if long_mode { CODE64 } else { CODE32 }, DATA32]);
    words.resize(512, 0);
    words.push((base + 2 * PAGE) | TABLE_ENTRY);
    words.resize(2 * 512, 0);
    words.extend((3..7).map(|page| (base + page * PAGE) | TABLE_ENTRY));
    words.resize(3 * 512, 0);
    words.extend((0..4 * 512).map(|page: u64| (page << 21) | LARGE_PAGE));
    let bytes: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
    memory.write(base, &bytes)?;
    Ok(base)
}

fn flat_segments(code_rights: u16) -> (Segment, Segment) {
    let segment = |selector, rights| Segment { selector, base: 0, limit: u32::MAX, rights };
    (segment(CODE, code_rights), segment(DATA, 0xc093))
}

/// What all entries share. The task register holds an empty busy TSS and the LDT register nothing, as every engine wants it.
fn flat(code: Segment, data: Segment, gdt: Table, idt_limit: u16) -> CpuState {
    CpuState {
        general: vec![0; 16],
        rip: 0,
        rflags: 2,
        cs: code,
        ds: data.clone(),
        es: data.clone(),
        fs: data.clone(),
        gs: data.clone(),
        ss: data,
        tr: Segment { selector: 0, base: 0, limit: 0x67, rights: 0x8b },
        ldt: Segment { selector: 0, base: 0, limit: 0xffff, rights: 0x82 },
        gdt,
        idt: Table { base: 0, limit: idt_limit },
        cr0: 0,
        cr3: 0,
        cr4: 0,
        efer: 0,
    }
}
