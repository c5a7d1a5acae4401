//! An image's books: which clusters are used, by going through everything that names one, and the reference counts that are to agree with that.
//!
//! Reads only. `checker` reports what does not agree, `repair` puts it right.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::ImageError;
use crate::header::Header;

/// The most clusters of an image that are gone through: 512 MiB of counts, of which what is far from any cluster in use takes no memory.
const MOST_CLUSTERS: u64 = 1 << 28;
/// The most entries of an L1 or refcount table (32 MiB).
pub(crate) const MOST_ENTRIES: u64 = 4 << 20;
/// The most refcount blocks that may be there for clusters behind the file's end.
pub(crate) const MOST_OUTSIDE: usize = 64;
/// The most faults that are described.
const MOST_TOLD: usize = 100;

/// The bits of an L1 or L2 entry that are an offset.
pub(crate) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// The cluster is used once, here.
pub(crate) const COPIED: u64 = 1 << 63;
pub(crate) const COMPRESSED: u64 = 1 << 62;
/// Bits of an L1 entry, and of an L2 entry that is not compressed, that must be 0. Bit 0 of the latter is for zeroes, from version 3 on.
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Clusters that hold data of the disk.
    pub data_clusters: u64,
    /// Clusters that are counted and not used: lost space, and no danger.
    pub leaks: u64,
    /// It was not closed in good order: counts may be too low, which the next one that opens it for writing puts right.
    pub unclean: bool,
    /// Faults that endanger data.
    pub errors: u64,
    /// The first faults, in words.
    pub told: Vec<String>,
}

impl Report {
    pub(crate) fn fault(&mut self, what: impl FnOnce() -> String) {
        self.errors += 1;
        if self.told.len() < MOST_TOLD {
            self.told.push(what());
        }
    }
}

/// How a cluster is used: 13 bits of how often, and three of by what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Uses(u16);

impl Uses {
    /// More cannot be told apart.
    pub(crate) const MOST: u16 = (1 << 13) - 1;
    /// One use says that it is the only one.
    const ONLY: u16 = 1 << 13;
    /// One use could say that, and does not.
    const SHARED: u16 = 1 << 14;
    /// One use is as a table, which may have no other.
    const TABLE: u16 = 1 << 15;

    /// A cluster that is a table and nothing else.
    pub(crate) fn table() -> Self {
        Self(Self::TABLE | 1)
    }

    fn add(&mut self, flags: u16) {
        let count = (self.count() + 1).min(Self::MOST);
        self.0 = self.0 & !Self::MOST | flags | count;
    }

    /// How often it is used.
    pub(crate) fn count(self) -> u16 {
        self.0 & Self::MOST
    }

    /// One use says that it is the only one.
    pub(crate) fn only(self) -> bool {
        self.0 & Self::ONLY != 0
    }

    /// One use could say that it is the only one, and does not.
    pub(crate) fn shared(self) -> bool {
        self.0 & Self::SHARED != 0
    }

    /// There are more uses than can be right: writing one of them would change the others.
    pub(crate) fn overlap(self) -> bool {
        self.count() > 1 && self.0 & (Self::ONLY | Self::TABLE) != 0
    }
}

/// What uses the clusters of an image.
pub(crate) struct Books<'a> {
    file: &'a File,
    header: &'a Header,
    /// The file's length in bytes.
    length: u64,
    /// How each cluster is used.
    pub(crate) used: Vec<Uses>,
    /// The refcount table: offsets of blocks, or 0.
    pub(crate) blocks: Vec<u64>,
    /// The data clusters, and what cannot be, apart from counts.
    pub(crate) report: Report,
}

impl<'a> Books<'a> {
    /// Goes through everything that uses clusters. `beyond` the file's end clusters can be used that have a refcount block; what they hold did not reach the disk.
    ///
    /// # Errors
    /// The file cannot be read, or is too large for this.
    pub(crate) fn read(file: &'a File, header: &'a Header, beyond: bool) -> Result<Self, ImageError> {
        let length = file.metadata()?.len();
        let mut clusters = length.div_ceil(header.cluster_size());
        if clusters > MOST_CLUSTERS {
            return Err(ImageError::Unsupported(format!(
                "it has {clusters} clusters, but at most {MOST_CLUSTERS} are checked: `qemu-img check -r all` does"
            )));
        }
        let bytes = u64::from(header.refcount_clusters) << header.cluster_bits;
        let blocks = numbers(file, length, header.refcount_offset, bytes / 8)?;
        if beyond {
            let per_block = header.counts_per_block();
            let first = usize::try_from(clusters / per_block).unwrap_or(usize::MAX);
            let there = blocks.iter().skip(first).take(MOST_OUTSIDE).take_while(|block| **block != 0).count();
            let end = (clusters / per_block + there as u64) * per_block;
            clusters = clusters.max(end.min(MOST_CLUSTERS));
        }
        let used = vec![Uses::default(); usize::try_from(clusters).unwrap_or(0)];
        let mut books = Self { file, header, length, used, blocks, report: Report::default() };
        books.count()?;
        Ok(books)
    }

    fn count(&mut self) -> io::Result<()> {
        let Header { cluster_bits: bits, refcount_offset, l1_offset, l1_size, .. } = *self.header;
        self.uses(0, 1, Uses::TABLE, "the header");
        self.uses(l1_offset, u64::from(l1_size) * 8, Uses::TABLE, "the L1 table");
        let refcounts = u64::from(self.header.refcount_clusters) << bits;
        self.uses(refcount_offset, refcounts, Uses::TABLE, "the refcount table");
        for block in self.blocks.clone() {
            if block != 0 {
                self.uses(block, 1, Uses::TABLE, "a refcount block");
            }
        }
        let entries = self.header.cluster_size() / 8;
        if u64::from(l1_size) < self.header.size.div_ceil(entries << bits) {
            self.report.fault(|| "the L1 table is too short for the disk".into());
        }
        if u64::from(l1_size) > MOST_ENTRIES {
            self.report.fault(|| "the L1 table is longer than it can be".into());
        }
        for l1 in numbers(self.file, self.length, l1_offset, l1_size.into())? {
            if l1 & L1_RESERVED != 0 {
                self.report.fault(|| format!("the L1 entry {l1:#x} has reserved bits"));
            }
            let l2 = l1 & OFFSET;
            let only = if l1 & COPIED != 0 { Uses::ONLY } else { Uses::SHARED };
            if l2 == 0 || !self.uses(l2, 1, Uses::TABLE | only, "an L2 table") {
                continue;
            }
            // A table that many entries name is told of, and gone through once.
            let first = usize::try_from(l2 >> bits).is_ok_and(|cluster| self.used[cluster].count() == 1);
            if first && l2 < self.length {
                for entry in bytes(self.file, self.length, l2, entries * 8)?.as_chunks::<8>().0 {
                    self.entry(u64::from_be_bytes(*entry));
                }
            }
        }
        Ok(())
    }

    /// An L2 entry.
    fn entry(&mut self, entry: u64) {
        if entry == 0 {
            return;
        }
        let bits = self.header.cluster_bits;
        if entry & COMPRESSED != 0 {
            let split = 62 - (bits - 8);
            let offset = entry & ((1 << split) - 1);
            let sectors = (entry & (COMPRESSED - 1)) >> split;
            let length = (sectors + 1) * 512 - (offset & 511);
            self.report.data_clusters += 1;
            let first = offset >> bits << bits;
            self.uses(first, offset + length - first, 0, "a compressed cluster");
            return;
        }
        let zeroes = u64::from(self.header.version < 3);
        if entry & (L2_RESERVED | zeroes) != 0 {
            self.report.fault(|| format!("the L2 entry {entry:#x} has reserved bits"));
        }
        let offset = entry & OFFSET;
        if offset != 0 {
            self.report.data_clusters += 1;
            let only = if entry & COPIED != 0 { Uses::ONLY } else { Uses::SHARED };
            self.uses(offset, 1, only, "a cluster");
        }
    }

    /// Counts the use of a range; `false` if it cannot be.
    fn uses(&mut self, offset: u64, length: u64, flags: u16, what: &str) -> bool {
        let (bits, size) = (self.header.cluster_bits, self.header.cluster_size());
        let end = offset.checked_add(length).map(|end| end.div_ceil(size));
        let range = end
            .filter(|_| offset.is_multiple_of(size))
            .and_then(|end| Some(usize::try_from(offset >> bits).ok()?..usize::try_from(end).ok()?));
        match range.and_then(|range| self.used.get_mut(range)) {
            Some(clusters) => clusters.iter_mut().for_each(|uses| uses.add(flags)),
            None => {
                self.report.fault(|| format!("{what} is said to be at {offset:#x}, where none can be"));
                return false;
            }
        }
        true
    }

    /// The counts of a refcount block, as they are in the file; those of a block that is not there are 0.
    pub(crate) fn counts(&self, block: u64) -> io::Result<Counts> {
        let size = self.header.cluster_size();
        let there = block != 0 && block.is_multiple_of(size);
        let bytes = if there {
            bytes(self.file, self.length, block, size)?
        } else {
            vec![0; usize::try_from(size).unwrap_or(0)]
        };
        Ok(Counts { bytes, order: self.header.refcount_order })
    }
}

/// A table of big-endian numbers of 64 bits in a file of `length` bytes; what lies behind its end is 0.
pub(crate) fn numbers(file: &File, length: u64, offset: u64, entries: u64) -> io::Result<Vec<u64>> {
    let bytes = bytes(file, length, offset, entries.min(MOST_ENTRIES) * 8)?;
    Ok(bytes.as_chunks::<8>().0.iter().map(|entry| u64::from_be_bytes(*entry)).collect())
}

fn bytes(file: &File, length: u64, offset: u64, wanted: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(wanted).unwrap_or(0)];
    let there = length.saturating_sub(offset).min(wanted);
    file.read_exact_at(&mut bytes[..usize::try_from(there).unwrap_or(0)], offset)?;
    Ok(bytes)
}

/// A refcount block: big-endian counts of 2^`order` bits; those of less than a byte begin at the lowest bit.
pub(crate) struct Counts {
    pub(crate) bytes: Vec<u8>,
    order: u32,
}

impl Counts {
    /// The highest count that there can be.
    pub(crate) fn most(&self) -> u64 {
        u64::MAX >> (64 - (1 << self.order))
    }

    /// Where a count is: its bytes, and the shift in them.
    fn place(&self, index: usize) -> (std::ops::Range<usize>, u32) {
        if self.order >= 3 {
            let length = 1 << (self.order - 3);
            return (index * length..(index + 1) * length, 0);
        }
        let bit = index << self.order;
        (bit / 8..bit / 8 + 1, u32::try_from(bit % 8).unwrap_or(0))
    }

    /// A cluster's count, by its place in the block.
    pub(crate) fn get(&self, index: usize) -> u64 {
        let (range, shift) = self.place(index);
        let entry = self.bytes.get(range).unwrap_or(&[]);
        entry.iter().fold(0, |value, byte| value << 8 | u64::from(*byte)) >> shift & self.most()
    }

    /// Sets a cluster's count, which is at most [`Self::most`].
    pub(crate) fn set(&mut self, index: usize, count: u64) {
        let (range, shift) = self.place(index);
        let most = self.most();
        if let Some([byte]) = self.bytes.get_mut(range.clone()) {
            let (mask, count) = ((most << shift) & 0xff, (count << shift) & 0xff);
            *byte = u8::try_from(u64::from(*byte) & !mask | count).unwrap_or(*byte);
        } else if let Some(entry) = self.bytes.get_mut(range) {
            let length = entry.len();
            entry.copy_from_slice(&count.to_be_bytes()[8 - length..]);
        }
    }
}
