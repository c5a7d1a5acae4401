//! Guest memory: one sealed memfd, mapped in at most two regions around the 4 GiB hole.
//!
//! Guest-physical layout: RAM from 0 up to [`LOW_END`], then the hole for memory-mapped I/O up to [`HIGH_BASE`], then the rest of RAM.
//! The memory is taken from the host page by page when it is first touched.
//!
//! Firmware's read-only memory ([`Rom`]) lies in the hole.
//!
//! Whoever writes guest memory while a machine runs, and is not a vCPU, must say so: [`Ram::written`].

use std::fs::File;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

use crate::rom::{self, Rom};
use crate::written::{CodePages, DirtyLog, RegionWrites, Writes};

/// The end of RAM below 4 GiB; the addresses from here to [`HIGH_BASE`] are for memory-mapped I/O.
pub const LOW_END: u64 = 3 << 30;
/// Where RAM goes on above 4 GiB.
pub const HIGH_BASE: u64 = 4 << 30;
/// The least memory that a machine has: 1 MiB.
pub const MIN_MEMORY: u64 = 1 << 20;
/// The most memory that a machine has: 256 GiB.
pub const MAX_MEMORY: u64 = 256 << 30;

/// Guest memory cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size is out of range, or not a whole number of pages.
    #[error("{0} bytes of guest memory: the size must be a multiple of 4 KiB from 1 MiB to 256 GiB")]
    Size(u64),
    /// The host has no memory file for us.
    #[error("making the memory file: {0}")]
    File(#[from] std::io::Error),
    /// The host does not map it.
    #[error("mapping guest memory: {0}")]
    Map(#[from] MmapRegionError),
    /// Read-only memory at an impossible place.
    #[error("a ROM of {size:#x} bytes at {base:#x}: it must be whole 4 KiB pages between 3 GiB and 4 GiB")]
    Rom {
        /// The guest-physical address.
        base: u64,
        /// The length in bytes.
        size: u64,
    },
    /// The regions do not fit together.
    #[error("laying out guest memory: {0}")]
    Layout(String),
}

/// A machine's RAM.
pub struct Ram {
    map: GuestMemoryMmap<RegionWrites>,
    file: Arc<File>,
    size: u64,
    writes: Arc<Writes>,
    roms: Vec<Rom>,
}

/// A new file in memory, of this size for ever.
#[cfg(not(miri))]
fn memory_file(size: u64) -> std::io::Result<File> {
    let fd = rustix::fs::memfd_create("tenon-ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&fd, size)?;
    // A file that shrinks under a mapping would kill the process on its next access.
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW)?;
    Ok(File::from(fd))
}

#[cfg(miri)]
fn memory_file(_: u64) -> std::io::Result<File> {
    File::open("/dev/null")
}

impl Ram {
    /// Makes `size` bytes of RAM, all zero.
    ///
    /// # Errors
    /// The size is out of range, or the host refuses.
    pub fn new(size: u64) -> Result<Arc<Self>, MemoryError> {
        Self::with_roms(size, Vec::new())
    }

    /// Makes `size` bytes of RAM, all zero, in a machine that has these ROMs.
    ///
    /// # Errors
    /// The size is out of range, ROMs overlap, or the host refuses.
    pub fn with_roms(size: u64, roms: Vec<Rom>) -> Result<Arc<Self>, MemoryError> {
        rom::check(&roms)?;
        if !(MIN_MEMORY..=MAX_MEMORY).contains(&size) || !size.is_multiple_of(4096) {
            return Err(MemoryError::Size(size));
        }
        let file = Arc::new(memory_file(size)?);
        let low = size.min(LOW_END);
        let writes = Writes::new(size);
        let mut regions = vec![Self::region(&file, &writes, 0, 0, low)?];
        if size > low {
            regions.push(Self::region(&file, &writes, low, HIGH_BASE, size - low)?);
        }
        let map = GuestMemoryMmap::from_regions(regions).map_err(|e| MemoryError::Layout(e.to_string()))?;
        Ok(Arc::new(Self { map, file, size, writes, roms }))
    }

    fn region(
        file: &Arc<File>,
        writes: &Arc<Writes>,
        offset: u64,
        base: u64,
        size: u64,
    ) -> Result<GuestRegionMmap<RegionWrites>, MemoryError> {
        let length = usize::try_from(size).map_err(|_| MemoryError::Size(size))?;
        let builder = MmapRegionBuilder::new_with_bitmap(length, RegionWrites::new(writes, offset))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
        #[cfg(not(miri))]
        let builder = builder
            .with_file_offset(FileOffset::from_arc(file.clone(), offset))
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE);
        // Miri watches every access to memory, and knows no files in it.
        #[cfg(miri)]
        let builder = builder.with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let mapping = builder.build()?;
        GuestRegionMmap::new(mapping, GuestAddress(base))
            .ok_or_else(|| MemoryError::Layout("a region wraps".into()))
    }

    /// The memory as `vm-memory` sees it: checked reads and writes by guest-physical address ([`vm_memory::Bytes`]). What is written by its
    /// methods counts as [`Ram::written`]; what is written by pointers that it gives does not.
    #[must_use]
    pub fn map(&self) -> &GuestMemoryMmap<RegionWrites> {
        &self.map
    }

    /// The memory file. RAM below the hole comes first, then that above it.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The regions: guest-physical start, length, and where they are mapped in this process.
    /// The pointers are good for as long as `self` lives; the guest changes what they point to at any time. Who writes by them calls
    /// [`Ram::written`].
    pub fn regions(&self) -> impl Iterator<Item = (u64, u64, *mut u8)> + '_ {
        self.map.iter().map(|region| (region.start_addr().0, region.len(), region.as_ptr()))
    }

    /// The read-only memory, which is no part of [`Ram::map`] and [`Ram::regions`].
    #[must_use]
    pub fn roms(&self) -> &[Rom] {
        &self.roms
    }

    /// Says that `length` bytes at guest-physical `start` were written by someone else than a vCPU: a device, or the host's kernel on its
    /// behalf. To be called after the bytes are in memory and before the guest can learn of them (a used ring, a register, an interrupt);
    /// for a request in many parts, after each or after all. Without it a dirty log lacks the pages, and a guest may go on executing what
    /// was there before.
    ///
    /// Called on any thread; it does not wait. What of the range is not RAM is passed over.
    #[inline]
    pub fn written(&self, start: u64, length: u64) {
        let end = start.saturating_add(length);
        let low = self.size.min(LOW_END);
        if start < low {
            self.writes.note(start, end.min(low) - start);
        }
        let high = HIGH_BASE + (self.size - low);
        if end > HIGH_BASE && start < high {
            let from = start.max(HIGH_BASE);
            self.writes.note(from - HIGH_BASE + low, end.min(high) - from);
        }
    }

    /// Which pages have been written, by index ([`Ram::page_address`]). Devices' writes come here by [`Ram::written`], those of vCPUs where
    /// their engine puts them here.
    #[must_use]
    pub fn dirty_log(&self) -> &DirtyLog {
        &self.writes.log
    }

    /// For an engine that decodes code: where it notes what it has decoded. The first call makes the table.
    #[must_use]
    pub fn code_pages(&self) -> &Arc<CodePages> {
        self.writes.code()
    }

    /// The guest-physical address of the page with this index, its place in the memory file in units of 4 KiB.
    #[must_use]
    pub fn page_address(&self, index: usize) -> u64 {
        let offset = index as u64 * 4096;
        let low = self.size.min(LOW_END);
        if offset < low { offset } else { HIGH_BASE + (offset - low) }
    }

    /// Gives every page back to the host and so makes all of RAM zero. No vCPU is running.
    ///
    /// # Errors
    /// The host refuses.
    pub fn clear(&self) -> Result<(), MemoryError> {
        use rustix::fs::FallocateFlags;
        rustix::fs::fallocate(
            &*self.file,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            0,
            self.size,
        )
        .map_err(std::io::Error::from)?;
        if self.writes.log.is_on() {
            self.written(0, u64::MAX);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn memory_above_the_hole_continues_at_four_gib() {
        let ram = Ram::new(LOW_END + 0x2000).unwrap();
        let regions: Vec<_> = ram.regions().map(|(start, size, _)| (start, size)).collect();
        assert_eq!(regions, [(0, LOW_END), (HIGH_BASE, 0x2000)]);
        ram.map().write_obj(7u64, GuestAddress(HIGH_BASE + 0x1ff8)).unwrap();
        assert!(ram.map().write_obj(7u64, GuestAddress(LOW_END)).is_err());
    }

    #[test]
    fn the_largest_machine_costs_nothing_until_touched() {
        let ram = Ram::new(MAX_MEMORY).unwrap();
        ram.map().write_obj(1u8, GuestAddress(HIGH_BASE + (200 << 30))).unwrap();
        let blocks = std::os::unix::fs::MetadataExt::blocks(&ram.file().metadata().unwrap());
        assert!(blocks * 512 <= 4 << 20, "{blocks} blocks are held");
    }

    #[test]
    fn sizes_out_of_range_are_refused() {
        for size in [0, 4096, MIN_MEMORY + 1, MAX_MEMORY + 4096] {
            assert!(matches!(Ram::new(size), Err(MemoryError::Size(_))));
        }
    }

    #[test]
    fn clearing_zeroes_memory() {
        let ram = Ram::new(MIN_MEMORY).unwrap();
        ram.map().write_obj(7u64, GuestAddress(0x1000)).unwrap();
        ram.clear().unwrap();
        assert_eq!(ram.map().read_obj::<u64>(GuestAddress(0x1000)).unwrap(), 0);
    }
}
