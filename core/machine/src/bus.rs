//! An address space of registers: non-overlapping claims, looked up without a lock, added and removed while the machine runs.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;

/// Which address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Space {
    /// Port I/O: addresses 0 to 0xffff.
    Pio,
    /// Memory-mapped I/O: guest-physical addresses.
    Mmio,
}

impl fmt::Display for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Space::Pio => "port",
            Space::Mmio => "MMIO",
        })
    }
}

/// Answers register accesses. Called on the vCPU's thread; vCPUs call at the same time.
pub trait Region: Send + Sync {
    /// A read of `size` bytes (1, 2, 4 or 8) at `offset` from the claim's start. Bits above the size are ignored.
    /// The bus has checked that the access lies inside the claim.
    fn read(&self, offset: u64, size: u8) -> u64;

    /// A write of `size` bytes; bits of `value` above them are zero.
    fn write(&self, offset: u64, size: u8, value: u64);
}

/// A claim that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum BusError {
    /// The range is empty, wraps or leaves the address space.
    #[error("`{owner}` claims {space} {start:#x} of length {size:#x}, which does not fit the address space")]
    Range {
        /// Who asks.
        owner: String,
        /// The address space.
        space: Space,
        /// The start asked for.
        start: u64,
        /// The length asked for.
        size: u64,
    },
    /// Another device has a part of it.
    #[error("`{owner}` claims {space} {start:#x}-{end:#x}, but `{other}` has {other_start:#x}-{other_end:#x}; give one of them another base", end = start + size - 1)]
    Overlap {
        /// Who asks.
        owner: String,
        /// The address space.
        space: Space,
        /// The start asked for.
        start: u64,
        /// The length asked for.
        size: u64,
        /// Who has it.
        other: String,
        /// The first address of the other's claim.
        other_start: u64,
        /// The last address of the other's claim.
        other_end: u64,
    },
}

struct Entry {
    range: Range<u64>,
    owner: String,
    region: Arc<dyn Region>,
}

/// One address space.
pub struct Bus {
    space: Space,
    /// Sorted by start. Replaced whole, so that readers take no lock.
    entries: ArcSwap<Vec<Arc<Entry>>>,
    /// Held while `entries` is replaced.
    change: Mutex<()>,
    misses: AtomicU64,
    /// Addresses whose first miss was logged; bounded.
    logged: Mutex<Vec<u64>>,
}

/// How many distinct unclaimed addresses are logged; the rest is only counted.
const LOGGED_MISSES: usize = 64;

impl Bus {
    /// An address space without claims.
    #[must_use]
    pub fn new(space: Space) -> Arc<Self> {
        Arc::new(Self {
            space,
            entries: ArcSwap::from_pointee(Vec::new()),
            change: Mutex::new(()),
            misses: AtomicU64::new(0),
            logged: Mutex::new(Vec::new()),
        })
    }

    /// Claims `size` addresses from `start` for `owner`. The claim ends when the returned value is dropped. Works while the machine runs.
    ///
    /// # Errors
    /// The range does not fit the address space, or meets another claim.
    pub fn claim(
        self: &Arc<Self>,
        owner: &str,
        start: u64,
        size: u64,
        region: Arc<dyn Region>,
    ) -> Result<Claim, BusError> {
        let limit = match self.space {
            Space::Pio => 0x1_0000,
            Space::Mmio => 1 << 52,
        };
        let end = match start.checked_add(size) {
            Some(end) if size > 0 && end <= limit => end,
            _ => return Err(BusError::Range { owner: owner.to_owned(), space: self.space, start, size }),
        };
        let _change = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        let mut entries = Vec::clone(&self.entries.load());
        let at = entries.partition_point(|entry| entry.range.end <= start);
        if let Some(other) = entries.get(at)
            && other.range.start < end
        {
            return Err(BusError::Overlap {
                owner: owner.to_owned(),
                space: self.space,
                start,
                size,
                other: other.owner.clone(),
                other_start: other.range.start,
                other_end: other.range.end - 1,
            });
        }
        let entry = Arc::new(Entry { range: start..end, owner: owner.to_owned(), region });
        entries.insert(at, entry.clone());
        self.entries.store(Arc::new(entries));
        Ok(Claim { bus: self.clone(), entry })
    }

    /// The claims in ascending order: range and owner.
    #[must_use]
    pub fn claims(&self) -> Vec<(Range<u64>, String)> {
        self.entries.load().iter().map(|entry| (entry.range.clone(), entry.owner.clone())).collect()
    }

    /// How many accesses met no claim since the machine was made.
    #[must_use]
    pub fn misses(&self) -> u64 {
        self.misses.load(Ordering::Relaxed)
    }

    /// A guest's read of `size` bytes (1, 2, 4 or 8). What nobody claims reads as all ones.
    #[must_use]
    pub fn read(&self, address: u64, size: u8) -> u64 {
        let ones = u64::MAX >> (64 - 8 * u32::from(size));
        let entries = self.entries.load();
        match Self::find(&entries, address) {
            Some(entry) if address + u64::from(size) <= entry.range.end => {
                entry.region.read(address - entry.range.start, size) & ones
            }
            None if size == 1 || !Self::meets(&entries, address, size) => {
                self.miss("read", address, size);
                ones
            }
            // The access straddles the edge of a claim: byte by byte.
            _ => {
                (0..size).fold(0, |value, n| value | self.read(address.wrapping_add(n.into()), 1) << (8 * n))
            }
        }
    }

    /// A guest's write of `size` bytes (1, 2, 4 or 8). What nobody claims takes no notice.
    pub fn write(&self, address: u64, size: u8, value: u64) {
        let value = value & (u64::MAX >> (64 - 8 * u32::from(size)));
        let entries = self.entries.load();
        match Self::find(&entries, address) {
            Some(entry) if address + u64::from(size) <= entry.range.end => {
                entry.region.write(address - entry.range.start, size, value);
            }
            None if size == 1 || !Self::meets(&entries, address, size) => self.miss("write", address, size),
            _ => {
                (0..size).for_each(|n| self.write(address.wrapping_add(n.into()), 1, value >> (8 * n) & 0xff))
            }
        }
    }

    fn find(entries: &[Arc<Entry>], address: u64) -> Option<&Entry> {
        let at = entries.partition_point(|entry| entry.range.end <= address);
        entries.get(at).map(|entry| &**entry).filter(|entry| entry.range.contains(&address))
    }

    fn meets(entries: &[Arc<Entry>], address: u64, size: u8) -> bool {
        (1..u64::from(size)).any(|n| Self::find(entries, address.wrapping_add(n)).is_some())
    }

    #[cold]
    fn miss(&self, what: &str, address: u64, size: u8) {
        self.misses.fetch_add(1, Ordering::Relaxed);
        let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
        if logged.len() < LOGGED_MISSES && !logged.contains(&address) {
            logged.push(address);
            tracing::debug!(space = %self.space, size, "the guest {what}s {address:#x}, which nobody claims");
        }
    }
}

/// A claimed range. Dropping it ends the claim; an access that is under way still completes.
pub struct Claim {
    bus: Arc<Bus>,
    entry: Arc<Entry>,
}

impl Claim {
    /// The addresses.
    #[must_use]
    pub fn range(&self) -> Range<u64> {
        self.entry.range.clone()
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let _change = self.bus.change.lock().unwrap_or_else(PoisonError::into_inner);
        let mut entries = Vec::clone(&self.bus.entries.load());
        entries.retain(|entry| !Arc::ptr_eq(entry, &self.entry));
        self.bus.entries.store(Arc::new(entries));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads as the offset, and notes writes.
    #[derive(Default)]
    struct Note(Mutex<Vec<(u64, u8, u64)>>);

    impl Region for Note {
        fn read(&self, offset: u64, size: u8) -> u64 {
            (0..size).fold(0, |v, n| v | (offset + u64::from(n)) << (8 * n))
        }
        fn write(&self, offset: u64, size: u8, value: u64) {
            self.0.lock().unwrap().push((offset, size, value));
        }
    }

    #[test]
    fn unclaimed_addresses_read_as_all_ones_and_are_counted() {
        let bus = Bus::new(Space::Mmio);
        assert_eq!(bus.read(0x1000, 4), 0xffff_ffff);
        assert_eq!(bus.read(u64::MAX, 8), u64::MAX);
        bus.write(0x1000, 8, 1);
        assert_eq!(bus.misses(), 3);
    }

    #[test]
    fn overlapping_claims_are_refused_and_both_are_named() {
        let bus = Bus::new(Space::Pio);
        let _serial = bus.claim("serial", 0x3f8, 8, Arc::new(Note::default())).unwrap();
        for (start, size) in [(0x3f8, 8), (0x3f0, 9), (0x3ff, 1), (0x300, 0x200)] {
            let error = bus.claim("other", start, size, Arc::new(Note::default())).err().unwrap().to_string();
            assert!(error.contains("`other`") && error.contains("`serial`"), "{error}");
        }
        assert!(bus.claim("below", 0x3f0, 8, Arc::new(Note::default())).is_ok());
        assert!(bus.claim("outside", 0xffff, 2, Arc::new(Note::default())).is_err());
        assert!(bus.claim("empty", 0x10, 0, Arc::new(Note::default())).is_err());
    }

    #[test]
    fn a_dropped_claim_is_free_again() {
        let bus = Bus::new(Space::Pio);
        let claim = bus.claim("one", 0x80, 1, Arc::new(Note::default())).unwrap();
        assert_eq!(bus.read(0x80, 1), 0);
        drop(claim);
        assert_eq!(bus.read(0x80, 1), 0xff);
        bus.claim("two", 0x80, 1, Arc::new(Note::default())).unwrap();
    }

    #[test]
    fn an_access_across_an_edge_is_split_into_bytes() {
        let bus = Bus::new(Space::Mmio);
        let note = Arc::new(Note::default());
        let _claim = bus.claim("note", 0x1002, 4, note.clone()).unwrap();
        assert_eq!(bus.read(0x1000, 4), 0x0100_ffff);
        assert_eq!(bus.read(0x1004, 4), 0xffff_0302);
        bus.write(0x1001, 2, 0xaabb);
        assert_eq!(*note.0.lock().unwrap(), [(0, 1, 0xaa)]);
    }
}
