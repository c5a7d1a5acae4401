//! Puts reference counts right: those that are too low, before an image is written.
//!
//! `imago` keeps new counts in memory and may write the tables that name the clusters sooner. A process that is killed leaves clusters that are used and counted as free, which the
//! next one would give away again. Here everything that uses a cluster is gone through, and counts are raised to what is used. A refcount block is durable before the refcount table
//! names it, so that being killed in here is as good as not having begun.
//!
//! Counts that are too high are lost space; they stay, unless [`repair`] is asked for.

use std::collections::HashSet;
use std::fmt::{self, Display, Formatter};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::ImageError;
use crate::books::{Books, COMPRESSED, COPIED, MOST_ENTRIES, MOST_OUTSIDE, OFFSET, Uses, numbers};
use crate::header::Header;
use crate::image::{Locks, open_file};
use crate::mark::Mark;

/// The most L2 tables with which an image is gone through although nothing asks for it.
const FEW_TABLES: usize = 256;
/// The most clusters of such an image.
const FEW_CLUSTERS: u64 = 4 << 20;

/// What was repaired.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Repaired {
    /// Clusters whose counts were too low.
    pub clusters: u64,
    /// The first of them.
    pub first: u64,
    /// Clusters whose counts were too high.
    pub lost: u64,
    /// Entries that did not say that theirs is the only use of a cluster.
    pub entries: u64,
    /// Refcount blocks that were missing.
    pub blocks: u64,
    /// Clusters in use that lay behind the end of the file, and read as zeroes.
    pub behind: u64,
}

impl Display for Repaired {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { clusters, first, lost, entries, blocks, behind } = self;
        let parts = [
            (
                clusters,
                format!("{clusters} clusters in use, the first of them {first}, were counted too low"),
            ),
            (lost, format!("{lost} clusters were counted too high")),
            (
                entries,
                format!("{entries} entries did not say that they are the only ones with their clusters"),
            ),
            (blocks, format!("{blocks} refcount blocks were missing")),
            (behind, format!("{behind} clusters in use lay behind the end of the file and read as zeroes")),
        ];
        let parts: Vec<String> =
            parts.into_iter().filter(|(count, _)| **count > 0).map(|(_, part)| part).collect();
        if parts.is_empty() {
            return f.write_str("its books are right");
        }
        write!(f, "{}; this was put right", parts.join("; "))
    }
}

fn damaged<T>(what: &str) -> Result<T, ImageError> {
    Err(ImageError::Damaged(format!(
        "{what}; `readonly` opens it, and `qemu-img check -r all` may repair it"
    )))
}

/// Whether the books of an image that will be written must be gone through first: it was not closed in good order, or is of version 2, which cannot say so, or is so small that
/// it costs nothing to do without trust in whoever wrote it last.
pub(crate) fn needed(file: &File, header: &Header) -> Result<bool, ImageError> {
    if header.dirty() || header.version < 3 {
        return Ok(true);
    }
    let length = file.metadata()?.len();
    let few = |entries: Vec<u64>| entries.iter().filter(|entry| **entry != 0).count() <= FEW_TABLES;
    Ok(length.div_ceil(header.cluster_size()) <= FEW_CLUSTERS
        && few(numbers(file, length, header.l1_offset, header.l1_size.into())?))
}

/// Goes through the books of an image that nobody else has open, and puts right, durably, what is counted too low, and if `all`, too high.
///
/// # Errors
/// There is more wrong than counts that are too low: nothing was changed. Or the file cannot be read or written.
pub(crate) fn put_right(file: &File, header: &Header, all: bool) -> Result<Repaired, ImageError> {
    refcount_table(file, header)?;
    // What was closed in good order names nothing behind the file's end, unless a part of the file is missing.
    let mut books = Books::read(file, header, header.dirty())?;
    if let Some(fault) = books.report.told.first() {
        return damaged(fault);
    }
    if let Some(cluster) = books.used.iter().position(|uses| uses.overlap()) {
        let times = books.used[cluster].count();
        return damaged(&format!("cluster {cluster} is used {times} times, but can be once"));
    }
    let (size, per_block) = (header.cluster_size(), header.counts_per_block());
    let length = file.metadata()?.len();
    let last = books.used.iter().rposition(|uses| uses.count() > 0).map_or(0, |last| last as u64 + 1);
    let mut end = last.max(length.div_ceil(size));
    books.used.truncate(usize::try_from(end).unwrap_or(usize::MAX));
    let mut repaired = Repaired::default();
    let inside = usize::try_from(length.div_ceil(size)).unwrap_or(usize::MAX);
    repaired.behind = books.used.iter().skip(inside).filter(|uses| uses.count() > 0).count() as u64;

    // Blocks that are missing go behind the end.
    let mut new = Vec::new();
    let mut index = 0;
    while (index as u64) < end.div_ceil(per_block) {
        match books.blocks.get_mut(index) {
            None => return damaged("its refcount table is too short for the file"),
            Some(block) if *block == 0 => {
                *block = end * size;
                new.push((index, *block));
                books.used.push(Uses::table());
                end += 1;
            }
            Some(_) => {}
        }
        index += 1;
    }

    // Everything is looked at before anything is written.
    let mut changed = Vec::new();
    let mut alone = HashSet::new();
    let chunk = usize::try_from(per_block).unwrap_or(usize::MAX);
    for (index, used) in books.used.chunks(chunk).enumerate() {
        let block = books.blocks[index];
        let fresh = new.iter().any(|(_, offset)| *offset == block);
        let mut counts = books.counts(if fresh { 0 } else { block })?;
        let mut change = fresh;
        for (place, uses) in used.iter().enumerate() {
            let (count, counted) = (u64::from(uses.count()), counts.get(place));
            let cluster = index as u64 * per_block + place as u64;
            let right = if all { count } else { count.max(counted) };
            if right == 1 && uses.shared() {
                alone.insert(cluster);
            }
            if counted == right {
                continue;
            }
            if count > counts.most() || uses.count() == Uses::MOST {
                return damaged(&format!("cluster {cluster} is used more often than can be counted"));
            }
            counts.set(place, count);
            change = true;
            if counted > count {
                repaired.lost += 1;
                continue;
            }
            if repaired.clusters == 0 {
                repaired.first = cluster;
            }
            repaired.clusters += 1;
        }
        if change {
            changed.push((block, counts.bytes));
        }
    }

    repaired.blocks = new.len() as u64;
    if end * size > length.next_multiple_of(size) {
        file.set_len(end * size)?;
    }
    for (block, bytes) in &changed {
        file.write_all_at(bytes, *block)?;
    }
    if !changed.is_empty() {
        file.sync_all()?;
    }
    for (index, block) in &new {
        file.write_all_at(&block.to_be_bytes(), header.refcount_offset + *index as u64 * 8)?;
    }
    repaired.entries = say_only(file, header, &alone)?;
    // What its last user wrote and did not flush counts from here on, as do the tables that were read above.
    file.sync_all()?;
    Ok(repaired)
}

/// Has the entries of these clusters, which are used and counted once, say so. Gives how many did not.
fn say_only(file: &File, header: &Header, alone: &HashSet<u64>) -> io::Result<u64> {
    if alone.is_empty() {
        return Ok(0);
    }
    let (bits, length) = (header.cluster_bits, file.metadata()?.len());
    let changed = |entry: u64, is_l1: bool| {
        let told = entry & COPIED != 0 || !is_l1 && entry & COMPRESSED != 0;
        !told && alone.contains(&((entry & OFFSET) >> bits))
    };
    let mut found = 0;
    let mut set = |at: u64, entry: u64| {
        found += 1;
        file.write_all_at(&(entry | COPIED).to_be_bytes(), at)
    };
    for (l1_at, l1) in
        (header.l1_offset..).step_by(8).zip(numbers(file, length, header.l1_offset, header.l1_size.into())?)
    {
        if l1 & OFFSET == 0 {
            continue;
        }
        if changed(l1, true) {
            set(l1_at, l1)?;
        }
        let l2 = l1 & OFFSET;
        for (at, entry) in (l2..).step_by(8).zip(numbers(file, length, l2, header.cluster_size() / 8)?) {
            if changed(entry, false) {
                set(at, entry)?;
            }
        }
    }
    Ok(found)
}

/// Puts the reference counts of an image right that nobody has open: those that are too low, which endanger data, and those that are too high, which are lost space.
///
/// # Errors
/// There is more wrong than counts, or it has what is not supported: nothing was changed. Or it is no qcow2 image, is in use, or cannot be read or written.
pub fn repair(path: &Path) -> Result<Repaired, ImageError> {
    let mut locks = Locks::default();
    let file = open_file(path, true, true, &mut locks)?;
    let header = Header::read(&file)?;
    header.check(true)?;
    let repaired = put_right(&file, &header, true)?;
    Mark::new(file, &header).clear()?;
    Ok(repaired)
}

/// Looks whether the refcount table can be one.
fn refcount_table(file: &File, header: &Header) -> Result<(), ImageError> {
    let (size, length) = (header.cluster_size(), file.metadata()?.len());
    let bytes = u64::from(header.refcount_clusters) << header.cluster_bits;
    let end = header.refcount_offset.checked_add(bytes);
    if bytes / 8 > MOST_ENTRIES
        || header.refcount_offset == 0
        || !header.refcount_offset.is_multiple_of(size)
        || end.is_none_or(|end| end > length.next_multiple_of(size))
    {
        return damaged("its refcount table lies outside the file");
    }
    Ok(())
}

/// Looks whether the refcount table of an image that will be written is one that a program could have made. Allocating clusters goes by it: in a table that is damaged, or
/// made to harm, that could take forever, or a stack without bounds: `imago` makes a refcount block that is missing by allocating, from the first free cluster on, and must never
/// come back to the same block by that. With none missing, all clusters before the first free one have theirs.
pub(crate) fn trust_refcounts(file: &File, header: &Header) -> Result<(), ImageError> {
    refcount_table(file, header)?;
    let (size, length) = (header.cluster_size(), file.metadata()?.len());
    let entries = (u64::from(header.refcount_clusters) << header.cluster_bits) / 8;
    let table = numbers(file, length, header.refcount_offset, entries)?;
    let needed = length.div_ceil(size).div_ceil(header.counts_per_block());
    let covered = usize::try_from(needed).unwrap_or(usize::MAX).min(table.len());
    let (inner, outer) = table.split_at(covered);
    if inner.contains(&0) || covered as u64 != needed {
        return damaged("its refcount table has holes");
    }
    if outer.iter().filter(|block| **block != 0).count() > MOST_OUTSIDE {
        return damaged("its refcount table goes far beyond the file's end");
    }
    let mut blocks: Vec<u64> = table.into_iter().filter(|block| *block != 0).collect();
    if !blocks.iter().all(|block| block.is_multiple_of(size) && *block < length) {
        return damaged("a refcount block lies outside the file");
    }
    blocks.sort_unstable();
    if blocks.windows(2).any(|pair| pair[0] == pair[1]) {
        return damaged("a refcount block is used twice");
    }
    Ok(())
}
