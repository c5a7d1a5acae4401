//! Descriptor and page tables for entering a guest in protected or long mode; the vCPU's state for it comes from
//! [`CpuState::protected_mode`] and [`CpuState::long_mode`].

use super::Layout;
use crate::personality::{CpuState, Error, Memory, Table};

/// The length of what [`Tables::write`] writes: a page with descriptors, six with page tables.
pub const TABLES_SIZE: u64 = 7 * PAGE;

const PAGE: u64 = 4096;
/// Flat code for ring 0, accessed: 32-bit and 64-bit.
const CODE32: u64 = 0x00cf_9b00_0000_ffff;
const CODE64: u64 = 0x00af_9b00_0000_ffff;
/// Flat data for ring 0, accessed.
const DATA: u64 = 0x00cf_9300_0000_ffff;
/// Present and writable.
const TABLE_ENTRY: u64 = 0b11;
/// Present, writable, a large page.
const LARGE_PAGE: u64 = 0b1000_0011;

/// Tables in guest memory: a descriptor table with selectors 0x08 (32-bit code), 0x10 (code of the mode that is entered), 0x18 (data), and
/// page tables that map the first 4 GiB one to one by 2 MiB pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tables(u64);

impl Tables {
    /// Takes [`TABLES_SIZE`] bytes of RAM, the lowest free from `from` up to `below`, and writes tables there; `long` says for which mode.
    ///
    /// # Errors
    /// There is no room.
    pub fn write(
        layout: &mut Layout,
        memory: &Memory<'_>,
        from: u64,
        below: u64,
        long: bool,
    ) -> Result<Self, Error> {
        let base = layout.take_lowest(TABLES_SIZE, from, below, "the page tables")?;
        let mut words = vec![0, CODE32, if long { CODE64 } else { CODE32 }, DATA];
        words.resize(512, 0);
        words.push((base + 2 * PAGE) | TABLE_ENTRY);
        words.resize(2 * 512, 0);
        words.extend((3..7).map(|page| (base + page * PAGE) | TABLE_ENTRY));
        words.resize(3 * 512, 0);
        words.extend((0..4 * 512).map(|page: u64| (page << 21) | LARGE_PAGE));
        let bytes: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
        memory.write(base, &bytes)?;
        Ok(Self(base))
    }

    /// 64-bit mode at `entry`, with these tables.
    #[must_use]
    pub const fn long_mode(self, entry: u64) -> CpuState {
        self.with_descriptors(CpuState::long_mode(entry, self.0 + PAGE))
    }

    /// 32-bit protected mode without paging at `entry`, with these descriptors.
    #[must_use]
    pub const fn protected_mode(self, entry: u32) -> CpuState {
        self.with_descriptors(CpuState::protected_mode(entry))
    }

    const fn with_descriptors(self, mut state: CpuState) -> CpuState {
        state.gdt = Table { base: self.0, limit: 4 * 8 - 1 };
        state
    }
}
