//! Guest memory as a device is handed it: rows of bytes whose places were checked when they were named.
//!
//! Holding [`Buffers`] proves that every byte lies in RAM. It proves nothing about the content: the guest may change it at any time, so what must
//! not change between a check and its use is copied first.
#![allow(
    unsafe_code,
    reason = "copies between guest memory, which others write at the same time, and slices"
)]

use std::sync::Arc;

use smallvec::SmallVec;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::Ram;

/// A range that is not RAM from its first byte to its last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{length:#x} bytes at {address:#x} are not all in RAM")]
pub struct OutsideRam {
    /// Where it begins.
    pub address: u64,
    /// How long it is.
    pub length: u64,
}

#[derive(Clone, Copy)]
struct Part {
    address: u64,
    pointer: *mut u8,
    length: usize,
}

/// A row of bytes in guest memory, made of any number of ranges.
#[derive(Clone)]
pub struct Buffers {
    ram: Arc<Ram>,
    parts: SmallVec<[Part; 2]>,
    length: u64,
}

// SAFETY: the pointers are into the mapping that `ram` keeps, which any thread may use.
unsafe impl Send for Buffers {}
// SAFETY: as above; all access goes through raw copies, as for any memory that a guest writes at the same time.
unsafe impl Sync for Buffers {}

impl Buffers {
    /// No bytes yet.
    #[must_use]
    pub fn new(ram: &Arc<Ram>) -> Self {
        Self { ram: ram.clone(), parts: SmallVec::new(), length: 0 }
    }

    /// Adds a range at the end.
    ///
    /// # Errors
    /// It is not RAM from its first byte to its last.
    pub fn push(&mut self, address: u64, length: u64) -> Result<(), OutsideRam> {
        let outside = OutsideRam { address, length };
        if length == 0 {
            return Ok(());
        }
        let (region, offset) = self.ram.map().to_region_addr(GuestAddress(address)).ok_or(outside)?;
        if region.len().checked_sub(offset.0).is_none_or(|room| room < length) {
            return Err(outside);
        }
        let (Ok(offset), Ok(size)) = (usize::try_from(offset.0), usize::try_from(length)) else {
            return Err(outside);
        };
        // SAFETY: the offset was just checked to lie in the region's mapping.
        let pointer = unsafe { region.as_ptr().add(offset) };
        self.parts.push(Part { address, pointer, length: size });
        self.length += length;
        Ok(())
    }

    /// The number of bytes.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Calls `visit` with the guest-physical address, the place in this process and the length of each piece of `length` bytes from `offset`; of fewer where the row ends.
    /// Returns how many bytes that were.
    fn pieces(&self, offset: u64, length: u64, mut visit: impl FnMut(u64, *mut u8, usize)) -> u64 {
        let (mut skip, mut left) = (offset, length);
        for part in &self.parts {
            let size = part.length as u64;
            if left == 0 {
                break;
            }
            if skip >= size {
                skip -= size;
                continue;
            }
            let here = left.min(size - skip);
            // Both are at most the part's length, which is a `usize`.
            let (at, count) = (usize::try_from(skip).unwrap_or(0), usize::try_from(here).unwrap_or(0));
            // SAFETY: `at` is less than the part's length.
            visit(part.address + skip, unsafe { part.pointer.add(at) }, count);
            skip = 0;
            left -= here;
        }
        length - left
    }

    /// Copies bytes from `offset` out of guest memory; returns how many, which is fewer than asked for where the row ends.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> usize {
        let mut done = 0;
        self.pieces(offset, into.len() as u64, |_, pointer, count| {
            // SAFETY: `count` bytes at `pointer` are mapped for as long as `ram` lives, and the pieces together are at most `into.len()` bytes.
            // The guest may write them at the same time: then the copy holds a mixture, which is what a device sees on real hardware.
            unsafe {
                std::ptr::copy_nonoverlapping(pointer.cast_const(), into.as_mut_ptr().add(done), count)
            };
            done += count;
        });
        done
    }

    /// Copies bytes into guest memory at `offset`; returns how many, which is fewer than given where the row ends.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> usize {
        let mut done = 0;
        self.pieces(offset, bytes.len() as u64, |_, pointer, count| {
            // SAFETY: as in `read`, in the other direction.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr().add(done), pointer, count) };
            done += count;
        });
        self.written(offset, done as u64);
        done
    }

    /// The places of `length` bytes from `offset` in this process, for the kernel to read or to fill; `None` where the row is shorter. Whoever has them filled calls [`Buffers::written`] after it. They are good for as long as `self` lives.
    #[must_use]
    pub fn iovecs(&self, offset: u64, length: u64) -> Option<SmallVec<[libc::iovec; 8]>> {
        let mut vectors = SmallVec::new();
        let found = self.pieces(offset, length, |_, pointer, count| {
            vectors.push(libc::iovec { iov_base: pointer.cast(), iov_len: count });
        });
        (found == length).then_some(vectors)
    }

    /// The guest-physical ranges, in order: address and length.
    pub fn ranges(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.parts.iter().map(|part| (part.address, part.length as u64))
    }

    /// `length` bytes from `offset` were written by someone else than the guest's CPUs. [`Buffers::write`] says so itself.
    pub fn written(&self, offset: u64, length: u64) {
        self.pieces(offset, length, |address, _, count| self.ram.written(address, count as u64));
    }

    /// The memory.
    #[must_use]
    pub fn ram(&self) -> &Arc<Ram> {
        &self.ram
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MIN_MEMORY;

    #[test]
    fn a_row_of_several_ranges_reads_and_writes_as_one() {
        let ram = Ram::new(MIN_MEMORY).unwrap();
        let mut row = Buffers::new(&ram);
        for (address, length) in [(0x1000, 3), (0x9000, 0), (0x5001, 4), (0x2000, 1)] {
            row.push(address, length).unwrap();
        }
        assert_eq!(row.length(), 8);
        assert_eq!(row.write(1, &[1, 2, 3, 4, 5, 6, 7, 8]), 7);
        let mut bytes = [0; 5];
        assert_eq!((row.read(2, &mut bytes), bytes), (5, [2, 3, 4, 5, 6]));
        assert_eq!(row.read(8, &mut bytes), 0);
        let lengths: Vec<_> = row.iovecs(2, 6).unwrap().iter().map(|v| v.iov_len).collect();
        assert_eq!(lengths, [1, 4, 1]);
        assert!(row.iovecs(2, 7).is_none());
    }

    #[test]
    fn a_range_that_leaves_ram_is_refused() {
        let ram = Ram::new(MIN_MEMORY).unwrap();
        for (address, length) in
            [(MIN_MEMORY, 1), (MIN_MEMORY - 1, 2), (0, u64::MAX), (u64::MAX, 1), (u64::MAX, 2)]
        {
            assert_eq!(Buffers::new(&ram).push(address, length), Err(OutsideRam { address, length }));
        }
    }
}
