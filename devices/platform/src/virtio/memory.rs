//! A part of a ring in guest memory: its place is checked once, when the driver enables the queue; its content never is, for the driver
//! writes it at the same time. So every access is one atomic load or store of a whole field.
//!
//! Fields are little-endian, as virtio 1 demands.
#![allow(unsafe_code, reason = "atomic accesses to guest memory, which others write at the same time")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use tenon_core::Ram;

/// A range of guest memory that lies in RAM and is aligned.
pub(crate) struct RingMemory {
    ram: Arc<Ram>,
    address: u64,
    pointer: *mut u8,
    length: usize,
}

// SAFETY: the pointer is into the mapping that `ram` keeps, which any thread may use; all accesses are atomic.
unsafe impl Send for RingMemory {}

macro_rules! field {
    ($load:ident, $store:ident, $int:ty, $atomic:ty) => {
        /// Loads the field at this offset.
        #[inline]
        pub(crate) fn $load(&self, offset: usize, order: Ordering) -> $int {
            let pointer = self.at(offset, size_of::<$int>());
            // SAFETY: `at` checked bounds and alignment; the mapping lives as long as `self`.
            <$int>::from_le(unsafe { <$atomic>::from_ptr(pointer.cast()) }.load(order))
        }

        /// Stores the field at this offset.
        #[inline]
        pub(crate) fn $store(&self, offset: usize, value: $int, order: Ordering) {
            let pointer = self.at(offset, size_of::<$int>());
            // SAFETY: as for the load.
            unsafe { <$atomic>::from_ptr(pointer.cast()) }.store(value.to_le(), order);
        }
    };
}

impl RingMemory {
    /// The range, if all of it is in one region of RAM and it begins at a multiple of `align`, which is a power of two up to 4096.
    pub(crate) fn new(ram: &Arc<Ram>, address: u64, length: usize, align: u64) -> Option<Self> {
        let end = address.checked_add(length as u64)?;
        if !address.is_multiple_of(align) {
            return None;
        }
        let (start, _, base) =
            ram.regions().find(|&(start, size, _)| start <= address && end <= start + size)?;
        let offset = usize::try_from(address - start).ok()?;
        // SAFETY: the offset lies in the region's mapping.
        let pointer = unsafe { base.add(offset) };
        Some(Self { ram: ram.clone(), address, pointer, length })
    }

    #[inline]
    fn at(&self, offset: usize, size: usize) -> *mut u8 {
        // Offsets are made from indices that were reduced before: not the guest's but this crate's error, if ever.
        assert!(offset + size <= self.length && offset.is_multiple_of(size), "a ring access out of bounds");
        // SAFETY: just checked.
        unsafe { self.pointer.add(offset) }
    }

    field!(load16, store16, u16, AtomicU16);
    field!(load32, store32, u32, AtomicU32);
    field!(load64, store64, u64, AtomicU64);

    /// Says that these bytes were written.
    #[inline]
    pub(crate) fn written(&self, offset: usize, length: usize) {
        self.ram.written(self.address + offset as u64, length as u64);
    }
}
