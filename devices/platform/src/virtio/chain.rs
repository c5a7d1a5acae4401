//! Descriptors, and how a row of them becomes a request.
//!
//! Each descriptor is copied once and judged by the copy. A row is refused if it has more descriptors than the queue has entries, more than
//! 4 GiB - 1 in all, an empty descriptor, a range outside RAM, a readable one after a writable one, or an indirect table that is
//! empty, of an odd length, longer than the queue, nested, or followed by more.

use std::sync::Arc;

use tenon_core::{Buffers, OutsideRam, Ram};

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;
/// The bytes of a descriptor.
pub(crate) const DESCRIPTOR: usize = 16;

/// What a driver did wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RingError {
    #[error("the available index went from {seen} to {index}, more than the queue's {size} entries")]
    Jump { seen: u16, index: u16, size: u16 },
    #[error("descriptor {index} does not exist; the queue has {size}")]
    Index { index: u16, size: u16 },
    #[error("descriptor {0} was made available again before it was used")]
    Again(u16),
    #[error("a request has more than {0} descriptors")]
    Long(u16),
    #[error("a request has more than 4 GiB")]
    Huge,
    #[error("a descriptor is empty")]
    Empty,
    #[error("a readable descriptor follows a writable one")]
    Order,
    #[error("{0}")]
    Outside(#[from] OutsideRam),
    #[error("an indirect table of {0} bytes")]
    Table(u32),
    #[error("an indirect table where none may be")]
    Nested,
    #[error("descriptors of {0} entries are in flight, more than the ring has")]
    Overrun(u32),
    #[error("the queue was broken before the machine was saved")]
    Before,
}

/// A copy of a descriptor.
#[derive(Clone, Copy)]
pub(crate) struct Descriptor {
    pub(crate) address: u64,
    pub(crate) length: u32,
    /// In a split ring flags and then the next one's index; in a packed ring the buffer id and then flags.
    pub(crate) low: u16,
    pub(crate) high: u16,
}

impl Descriptor {
    /// From its two halves.
    pub(crate) fn new(address: u64, rest: u64) -> Self {
        let [a, b, c, d, e, f, g, h] = rest.to_le_bytes();
        Self {
            address,
            length: u32::from_le_bytes([a, b, c, d]),
            low: u16::from_le_bytes([e, f]),
            high: u16::from_le_bytes([g, h]),
        }
    }
}

/// A request in the making.
pub(crate) struct Chain {
    pub(crate) readable: Buffers,
    pub(crate) writable: Buffers,
    /// How many descriptors have gone in.
    pub(crate) parts: u16,
    limit: u16,
}

impl Chain {
    pub(crate) fn new(ram: &Arc<Ram>, limit: u16) -> Self {
        Self { readable: Buffers::new(ram), writable: Buffers::new(ram), parts: 0, limit }
    }

    /// Adds the range of a descriptor that is not indirect.
    pub(crate) fn add(&mut self, address: u64, length: u32, write: bool) -> Result<(), RingError> {
        if self.parts == self.limit {
            return Err(RingError::Long(self.limit));
        }
        if length == 0 {
            return Err(RingError::Empty);
        }
        if !write && self.writable.length() > 0 {
            return Err(RingError::Order);
        }
        if self.readable.length() + self.writable.length() + u64::from(length) > u64::from(u32::MAX) {
            return Err(RingError::Huge);
        }
        let row = if write { &mut self.writable } else { &mut self.readable };
        row.push(address, length.into())?;
        self.parts += 1;
        Ok(())
    }
}

/// An indirect table in RAM.
pub(crate) struct Table {
    bytes: Buffers,
    pub(crate) entries: u16,
}

impl Table {
    /// The table at this place, if it has 1 to `limit` whole descriptors.
    pub(crate) fn new(ram: &Arc<Ram>, address: u64, length: u32, limit: u16) -> Result<Self, RingError> {
        let entries = u16::try_from(length / 16).ok().filter(|n| (1..=limit).contains(n));
        let entries = entries.filter(|_| length.is_multiple_of(16)).ok_or(RingError::Table(length))?;
        let mut bytes = Buffers::new(ram);
        bytes.push(address, length.into())?;
        Ok(Self { bytes, entries })
    }

    /// A copy of an entry; `index` is below [`Table::entries`].
    pub(crate) fn entry(&self, index: u16) -> Descriptor {
        let mut copy = [0; DESCRIPTOR];
        self.bytes.read(u64::from(index) * DESCRIPTOR as u64, &mut copy);
        let (address, rest) = copy.split_at(8);
        let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
        Descriptor::new(number(address), number(rest))
    }
}
