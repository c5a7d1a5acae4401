//! The map of guest-physical memory.

use std::ops::Range;

use tenon_core::Ram;

use crate::pci::{ECAM_BASE, MAX_BUSES};

/// Where the range that PC firmware keeps for itself begins.
pub const EBDA_BASE: u64 = 0x9_fc00;
/// Where the ACPI tables begin; old guests look for the root pointer from here on.
pub const ACPI_BASE: u64 = 0xe_0000;
/// The end of the range that is told to guests as that of the ACPI tables.
pub const ACPI_END: u64 = 0x10_0000;
/// Where real-mode code jumps to reset, F000:FFF0. Tables end before it.
pub const RESET_VECTOR: u64 = 0xf_fff0;

/// Where register ranges are placed that leave their place to the host. Of the hole below 4 GiB, PCI's BARs have what is below, its configuration space what follows, and interrupt
/// controllers the end.
pub const DEVICE_WINDOW: Range<u64> = 0xd000_0000..0xe000_0000;

/// What a range of memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryKind {
    /// Free for the guest.
    Ram,
    /// Kept from the guest.
    Reserved,
    /// Holds the ACPI tables.
    Acpi,
}

/// A range of guest-physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRange {
    /// The first address.
    pub start: u64,
    /// The length in bytes.
    pub size: u64,
    /// What it is.
    pub kind: MemoryKind,
}

/// The map of a machine with this RAM, in ascending order, without overlap.
#[must_use]
pub fn memory_map(ram: &Ram) -> Vec<MemoryRange> {
    let mut map = vec![
        MemoryRange { start: 0, size: EBDA_BASE, kind: MemoryKind::Ram },
        MemoryRange { start: EBDA_BASE, size: ACPI_BASE - EBDA_BASE, kind: MemoryKind::Reserved },
        MemoryRange { start: ACPI_BASE, size: ACPI_END - ACPI_BASE, kind: MemoryKind::Acpi },
    ];
    for (start, size, _) in ram.regions() {
        let (from, end) = (start.max(ACPI_END), start + size);
        if from < end {
            map.push(MemoryRange { start: from, size: end - from, kind: MemoryKind::Ram });
        }
    }
    // PCI's configuration space, which guests use only where it is kept from everything else.
    let ecam = MemoryRange { start: ECAM_BASE, size: u64::from(MAX_BUSES) << 20, kind: MemoryKind::Reserved };
    map.insert(map.partition_point(|range| range.start < ECAM_BASE), ecam);
    map
}
