//! Read-only memory: what firmware is executed from, in the hole below 4 GiB.
//!
//! A [`Rom`] is read and executed like RAM, without an exit. A guest's write to it goes to the MMIO bus, where a flash chip may claim the range, or
//! nobody does. Devices do not read it: it is no part of [`Ram::map`](crate::Ram::map). A reset leaves it as it is.

use std::fs::File;
use std::io::Write;

use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};
use vm_memory::{FileOffset, VolatileMemory};

use crate::memory::{HIGH_BASE, LOW_END, MemoryError};

/// A range of read-only memory. Its pages cannot be written by this process either.
#[derive(Debug)]
pub struct Rom {
    base: u64,
    size: u64,
    mapping: MmapRegion,
}

impl Rom {
    /// Read-only memory with this content at guest-physical `base`.
    ///
    /// # Errors
    /// The range is empty, not made of whole pages, or not all in the hole from [`LOW_END`] to [`HIGH_BASE`]; or the host refuses.
    pub fn new(base: u64, content: &[u8]) -> Result<Self, MemoryError> {
        let size = content.len() as u64;
        let inside = base >= LOW_END && base.checked_add(size).is_some_and(|end| end <= HIGH_BASE);
        if size == 0 || !base.is_multiple_of(4096) || !size.is_multiple_of(4096) || !inside {
            return Err(MemoryError::Rom { base, size });
        }
        let fd = rustix::fs::memfd_create("tenon-rom", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(std::io::Error::from)?;
        let mut file = File::from(fd);
        file.write_all(content)?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE)
            .map_err(std::io::Error::from)?;
        let mapping = MmapRegionBuilder::new(content.len())
            .with_file_offset(FileOffset::new(file, 0))
            .with_mmap_prot(libc::PROT_READ)
            .with_mmap_flags(libc::MAP_PRIVATE)
            .build()?;
        Ok(Self { base, size, mapping })
    }

    /// The guest-physical address of its first byte.
    #[must_use]
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Its length in bytes, a multiple of 4096.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Where it is mapped in this process, for as long as `self` lives. The mapping is read-only.
    #[must_use]
    pub fn as_ptr(&self) -> *const u8 {
        self.mapping.as_ptr()
    }

    /// Reads from a guest-physical address. Whether all of it lies here; if not, nothing is read.
    pub fn read(&self, address: u64, to: &mut [u8]) -> bool {
        let part = address.checked_sub(self.base).and_then(|offset| usize::try_from(offset).ok());
        let part = part.and_then(|offset| self.mapping.get_slice(offset, to.len()).ok());
        part.is_some_and(|part| part.copy_to(to) == to.len())
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.base < other.base + other.size && other.base < self.base + self.size
    }
}

/// Checks that no two overlap.
pub(crate) fn check(roms: &[Rom]) -> Result<(), MemoryError> {
    for (n, rom) in roms.iter().enumerate() {
        if let Some(other) = roms[..n].iter().find(|other| other.overlaps(rom)) {
            return Err(MemoryError::Layout(format!(
                "the ROMs at {:#x} and {:#x} overlap",
                other.base, rom.base
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{MIN_MEMORY, Ram};

    #[test]
    fn rom_is_whole_pages_of_the_hole() {
        let page = [7u8; 4096];
        for (base, size) in [
            (LOW_END - 4096, 4096),
            (HIGH_BASE, 4096),
            (LOW_END + 1, 4096),
            (LOW_END, 100),
            (LOW_END, 0),
            (u64::MAX - 4095, 4096),
        ] {
            assert!(
                matches!(Rom::new(base, &page[..size]), Err(MemoryError::Rom { .. })),
                "{base:#x} {size}"
            );
        }
        let rom = Rom::new(HIGH_BASE - 4096, &page).unwrap();
        assert_eq!((rom.base(), rom.size()), (HIGH_BASE - 4096, 4096));
        let mut bytes = [0; 4];
        assert!(rom.read(HIGH_BASE - 4, &mut bytes) && bytes == [7; 4]);
        assert!(!rom.read(HIGH_BASE - 3, &mut bytes) && !rom.read(HIGH_BASE - 4097, &mut bytes));
    }

    #[test]
    fn roms_that_overlap_are_refused() {
        let two = |a, b| {
            let roms = vec![Rom::new(a, &[0; 8192]).unwrap(), Rom::new(b, &[0; 4096]).unwrap()];
            Ram::with_roms(MIN_MEMORY, roms)
        };
        assert!(two(LOW_END, LOW_END + 4096).is_err());
        assert_eq!(two(LOW_END, LOW_END + 8192).unwrap().roms().len(), 2);
    }
}
