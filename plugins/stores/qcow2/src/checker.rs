//! Checks an image: whether every cluster that is used is counted as often as it is used.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::ImageError;
use crate::header::Header;
use crate::image::open_file;

/// The most clusters of an image that can be checked: 256 MiB of counts.
const MOST_CLUSTERS: u64 = 1 << 26;
/// The most entries of an L1 or refcount table (32 MiB).
const MOST_ENTRIES: u64 = 4 << 20;
/// The most faults that are described.
const MOST_TOLD: usize = 100;

/// The bits of an L1 or L2 entry that are an offset.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// The cluster is used once, here.
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
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
    /// Faults that endanger data.
    pub errors: u64,
    /// The first faults, in words.
    pub told: Vec<String>,
}

impl Report {
    fn fault(&mut self, what: impl FnOnce() -> String) {
        self.errors += 1;
        if self.told.len() < MOST_TOLD {
            self.told.push(what());
        }
    }
}

/// Checks an image that nobody is writing.
///
/// # Errors
/// It is no qcow2 image, has what is not supported, is in use, or cannot be read.
pub fn check(path: &Path) -> Result<Report, ImageError> {
    let mut held = Vec::new();
    let file = open_file(path, false, true, &mut held)?;
    let header = Header::read(&file)?;
    header.check(false)?;
    if header.snapshots > 0 || header.bitmaps {
        return Err(ImageError::Unsupported(
            "it has internal snapshots or bitmaps, which are not checked: `qemu-img check` does".into(),
        ));
    }
    let clusters = file.metadata()?.len().div_ceil(header.cluster_size());
    if clusters > MOST_CLUSTERS {
        return Err(ImageError::Unsupported(format!(
            "it has {clusters} clusters, but at most {MOST_CLUSTERS} are checked"
        )));
    }
    let used = vec![0; usize::try_from(clusters).unwrap_or(0)];
    let mut check =
        Check { file: &file, header: &header, used, copied: Vec::new(), report: Report::default() };
    check.count()?;
    check.compare()?;
    for file in &held {
        crate::lock::unlock(file);
    }
    Ok(check.report)
}

/// The most refcount blocks that may be there for clusters behind the file's end.
const MOST_OUTSIDE: usize = 64;

/// Looks whether the refcount table of an image that will be written is one that a program could have made. Allocating clusters goes by it: in a table that is damaged, or
/// made to harm, that could take forever, or a stack without bounds: `imago` makes a refcount block that is missing by allocating, from the first free cluster on, and must never
/// come back to the same block by that. With none missing, all clusters before the first free one have theirs.
pub(crate) fn trust_refcounts(file: &File, header: &Header) -> Result<(), ImageError> {
    let damaged = |what: &str| {
        Err(ImageError::Damaged(format!(
            "{what}; `readonly` opens it, and `qemu-img check -r all` may repair it"
        )))
    };
    let (size, length) = (header.cluster_size(), file.metadata()?.len());
    let bytes = u64::from(header.refcount_clusters) << header.cluster_bits;
    let inside = |offset: u64, count: u64| {
        offset.is_multiple_of(size)
            && offset.checked_add(count).is_some_and(|end| end <= length.next_multiple_of(size))
    };
    if bytes / 8 > MOST_ENTRIES || !inside(header.refcount_offset, bytes) || header.refcount_offset == 0 {
        return damaged("its refcount table lies outside the file");
    }
    let table = numbers(file, header.refcount_offset, bytes / 8)?;
    let needed = length.div_ceil(size).div_ceil((size * 8) >> header.refcount_order);
    let covered = usize::try_from(needed).unwrap_or(usize::MAX).min(table.len());
    let (inner, outer) = table.split_at(covered);
    if inner.contains(&0) || covered as u64 != needed {
        return damaged("its refcount table has holes");
    }
    if outer.iter().filter(|block| **block != 0).count() > MOST_OUTSIDE {
        return damaged("its refcount table goes far beyond the file's end");
    }
    let mut blocks: Vec<u64> = table.into_iter().filter(|block| *block != 0).collect();
    if !blocks.iter().all(|block| inside(*block, size)) {
        return damaged("a refcount block lies outside the file");
    }
    blocks.sort_unstable();
    if blocks.windows(2).any(|pair| pair[0] == pair[1]) {
        return damaged("a refcount block is used twice");
    }
    Ok(())
}

/// A table of big-endian numbers of 64 bits; what lies behind the file's end is 0.
fn numbers(file: &File, offset: u64, entries: u64) -> io::Result<Vec<u64>> {
    let bytes = bytes(file, offset, entries.min(MOST_ENTRIES) * 8)?;
    Ok(bytes.as_chunks::<8>().0.iter().map(|entry| u64::from_be_bytes(*entry)).collect())
}

fn bytes(file: &File, offset: u64, length: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
    let there = file.metadata()?.len().saturating_sub(offset).min(length);
    file.read_exact_at(&mut bytes[..usize::try_from(there).unwrap_or(0)], offset)?;
    Ok(bytes)
}

struct Check<'a> {
    file: &'a File,
    header: &'a Header,
    /// How often each cluster is used.
    used: Vec<u32>,
    /// The clusters whose use says that it is the only one.
    copied: Vec<u64>,
    report: Report,
}

impl Check<'_> {
    /// Goes through everything that uses clusters.
    fn count(&mut self) -> io::Result<()> {
        let bits = self.header.cluster_bits;
        self.uses(0, 1, "the header");
        self.uses(self.header.l1_offset, u64::from(self.header.l1_size) * 8, "the L1 table");
        let refcounts = u64::from(self.header.refcount_clusters) << bits;
        self.uses(self.header.refcount_offset, refcounts, "the refcount table");
        for block in numbers(self.file, self.header.refcount_offset, refcounts / 8)? {
            if block != 0 {
                self.uses(block, 1, "a refcount block");
            }
        }
        let needed = (self.header.size >> bits).div_ceil(self.header.cluster_size() / 8);
        if u64::from(self.header.l1_size) < needed {
            self.report.fault(|| "the L1 table is too short for the disk".into());
        }
        for l1 in numbers(self.file, self.header.l1_offset, self.header.l1_size.into())? {
            if l1 & L1_RESERVED != 0 {
                self.report.fault(|| format!("the L1 entry {l1:#x} has reserved bits"));
            }
            let l2 = l1 & OFFSET;
            if l2 == 0 || !self.uses(l2, 1, "an L2 table") {
                continue;
            }
            if l1 & COPIED != 0 {
                self.copied.push(l2 >> bits);
            }
            for entry in numbers(self.file, l2, self.header.cluster_size() / 8)? {
                self.entry(entry);
            }
        }
        Ok(())
    }

    /// An L2 entry.
    fn entry(&mut self, entry: u64) {
        let bits = self.header.cluster_bits;
        if entry & COMPRESSED != 0 {
            let split = 62 - (bits - 8);
            let offset = entry & ((1 << split) - 1);
            let sectors = (entry & (COMPRESSED - 1)) >> split;
            let length = (sectors + 1) * 512 - (offset & 511);
            self.report.data_clusters += 1;
            let first = offset >> bits << bits;
            self.uses(first, offset + length - first, "a compressed cluster");
            return;
        }
        let zeroes = u64::from(self.header.version < 3);
        if entry & (L2_RESERVED | zeroes) != 0 {
            self.report.fault(|| format!("the L2 entry {entry:#x} has reserved bits"));
        }
        let offset = entry & OFFSET;
        if offset != 0 {
            self.report.data_clusters += 1;
            if self.uses(offset, 1, "a cluster") && entry & COPIED != 0 {
                self.copied.push(offset >> bits);
            }
        }
    }

    /// Counts the use of a range; `false` if it cannot be.
    fn uses(&mut self, offset: u64, length: u64, what: &str) -> bool {
        let size = self.header.cluster_size();
        let end = offset.checked_add(length).map(|end| end.div_ceil(size));
        let range = end
            .filter(|_| offset.is_multiple_of(size))
            .and_then(|end| Some(usize::try_from(offset / size).ok()?..usize::try_from(end).ok()?));
        match range.and_then(|range| self.used.get_mut(range)) {
            Some(clusters) => clusters.iter_mut().for_each(|count| *count = count.saturating_add(1)),
            None => {
                self.report.fault(|| format!("{what} is said to be at {offset:#x}, where none can be"));
                return false;
            }
        }
        true
    }

    /// Compares uses with refcounts.
    fn compare(&mut self) -> io::Result<()> {
        let (size, order) = (self.header.cluster_size(), self.header.refcount_order);
        let per_block = (size * 8) >> order;
        let blocks = numbers(
            self.file,
            self.header.refcount_offset,
            u64::from(self.header.refcount_clusters) << self.header.cluster_bits >> 3,
        )?;
        self.copied.sort_unstable();
        let used = std::mem::take(&mut self.used);
        let mut counts = Vec::new();
        for (cluster, used) in (0_u64..).zip(&used) {
            if cluster.is_multiple_of(per_block) {
                let block = usize::try_from(cluster / per_block).ok().and_then(|block| blocks.get(block));
                counts = match block {
                    Some(offset) if *offset != 0 && offset.is_multiple_of(size) => {
                        bytes(self.file, *offset, size)?
                    }
                    _ => Vec::new(),
                };
            }
            let counted = refcount(&counts, cluster % per_block, order);
            let used = u64::from(*used);
            if counted > used {
                self.report.leaks += 1;
            } else if counted < used {
                self.report
                    .fault(|| format!("cluster {cluster} is used {used} times and counted {counted} times"));
            }
            if counted != 1 && self.copied.binary_search(&cluster).is_ok() {
                self.report.fault(|| {
                    format!("cluster {cluster} is said to be used once, but is counted {counted} times")
                });
            }
        }
        Ok(())
    }
}

/// The count of a cluster in a refcount block; counts of less than a byte begin at the lowest bit.
fn refcount(block: &[u8], index: u64, order: u32) -> u64 {
    let index = usize::try_from(index).unwrap_or(usize::MAX);
    if order < 3 {
        let per_byte = 8 >> order;
        let byte = block.get(index / per_byte).copied().unwrap_or(0);
        let bits = 1_u32 << order;
        return u64::from(byte) >> ((index % per_byte) << order) & ((1 << bits) - 1);
    }
    let bytes = 1_usize << (order - 3);
    let entry = block.get(index * bytes..(index + 1) * bytes).unwrap_or(&[]);
    entry.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}
