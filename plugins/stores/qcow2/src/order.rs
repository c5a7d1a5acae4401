//! What of an image must be durable before what, so that after a power failure all is there that was flushed before.
//!
//! `imago` writes what a table names before it writes the table, which is enough where a process is killed. A disk that loses its power may have kept the later write and not the
//! earlier one. So before an L2 table, an entry of the L1 table or the header is written, the data and the new tables that were written are made durable. Reference counts need no order:
//! `repair` puts them right.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};

use crate::books::{OFFSET, numbers};
use crate::header::Header;

/// The header's cluster has nothing else, and is at least as long.
const HEADER: u64 = 512;

/// Keeps the order of writes to the file of an image.
#[derive(Debug)]
pub(crate) struct Order {
    file: File,
    tables: RwLock<Tables>,
    /// How many writes have ended that a table may rely on.
    written: AtomicU64,
    /// How many of these are durable.
    durable: AtomicU64,
    /// Held by whoever makes more so before a table is written.
    settling: Mutex<()>,
    /// Entries of an index that could not be written, by their offsets: `imago` takes them for written and goes on with what they name.
    unwritten: Mutex<BTreeMap<u64, Vec<u8>>>,
    /// Writes could not be made durable: the kernel tells of that once and forgets.
    lost: AtomicBool,
}

/// A table of offsets, and what they name.
#[derive(Debug)]
struct Index {
    table: Range<u64>,
    /// Some of it may have been something else since.
    named: HashSet<u64>,
}

impl Index {
    fn read(file: &File, offset: u64, entries: u64) -> io::Result<Self> {
        let table = offset..offset.saturating_add(entries * 8);
        let mut index = Self { table, named: HashSet::new() };
        index.add(numbers(file, file.metadata()?.len(), offset, entries)?);
        Ok(index)
    }

    fn add(&mut self, entries: impl IntoIterator<Item = u64>) {
        self.named.extend(entries.into_iter().map(|entry| entry & OFFSET).filter(|offset| *offset != 0));
    }

    /// Takes what was written to a range that meets the table.
    fn written(&mut self, offset: u64, bytes: &[u8]) {
        let first = usize::try_from(self.table.start.saturating_sub(offset)).unwrap_or(usize::MAX);
        let entries = bytes.get(first..).unwrap_or(&[]).as_chunks::<8>().0;
        self.add(entries.iter().map(|entry| u64::from_be_bytes(*entry)));
    }

    fn meets(&self, offset: u64, length: u64) -> bool {
        offset < self.table.end && offset.saturating_add(length) > self.table.start
    }
}

/// Where an image's tables are.
#[derive(Debug)]
struct Tables {
    l1: Index,
    refcounts: Index,
}

impl Tables {
    fn read(file: &File, header: &Header) -> io::Result<Self> {
        let refcounts = (u64::from(header.refcount_clusters) << header.cluster_bits) / 8;
        Ok(Self {
            l1: Index::read(file, header.l1_offset, header.l1_size.into())?,
            refcounts: Index::read(file, header.refcount_offset, refcounts)?,
        })
    }

    fn what(&self, offset: u64, length: u64) -> What {
        if offset < HEADER {
            What::Header
        } else if self.l1.meets(offset, length) {
            What::L1
        } else if self.refcounts.meets(offset, length) {
            What::RefcountTable
        } else if self.l1.named.contains(&offset) {
            What::L2
        } else if self.refcounts.named.contains(&offset) {
            What::RefcountBlock
        } else {
            What::Other
        }
    }
}

/// What is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    Header,
    L1,
    L2,
    RefcountTable,
    RefcountBlock,
    /// What a table may name: data, and tables that nothing names yet.
    Other,
}

impl What {
    /// It names what is written otherwise, which must be there before.
    fn waits(self) -> bool {
        matches!(self, Self::Header | Self::L1 | Self::L2)
    }

    /// What is written to it must be known.
    pub(crate) fn is_index(self) -> bool {
        matches!(self, Self::L1 | Self::RefcountTable)
    }
}

impl Order {
    /// The order of an image of this header, which is in `file` and will be written.
    pub(crate) fn new(file: File, header: &Header) -> io::Result<Self> {
        Ok(Self {
            tables: RwLock::new(Tables::read(&file, header)?),
            file,
            written: AtomicU64::new(0),
            durable: AtomicU64::new(0),
            settling: Mutex::new(()),
            unwritten: Mutex::new(BTreeMap::new()),
            lost: AtomicBool::new(false),
        })
    }

    /// Goes before a write of the image's file: waits for what must be durable before it.
    pub(crate) fn before(&self, offset: u64, length: u64) -> io::Result<What> {
        let what = self.tables.read().unwrap_or_else(PoisonError::into_inner).what(offset, length);
        if what.waits() {
            let _settling = self.settling.lock().unwrap_or_else(PoisonError::into_inner);
            if self.durable.load(Ordering::Acquire) < self.written.load(Ordering::Acquire) {
                self.sync()?;
            }
        }
        Ok(what)
    }

    /// Goes after a write, not to an index, that has succeeded.
    pub(crate) fn after(&self, what: What) -> io::Result<()> {
        match what {
            What::Header => {
                // It may name a new L1 table, and the old one's clusters are used again.
                self.sync()?;
                let header = Header::read(&self.file).map_err(io::Error::other)?;
                let tables = Tables::read(&self.file, &header)?;
                *self.tables.write().unwrap_or_else(PoisonError::into_inner) = tables;
            }
            What::Other => {
                self.written.fetch_add(1, Ordering::Release);
            }
            _ => {}
        }
        Ok(())
    }

    /// Goes after a write to an index. If it failed, the next sync repeats it, for `imago` goes on as if it had not.
    pub(crate) fn after_index(
        &self,
        what: What,
        offset: u64,
        bytes: Vec<u8>,
        outcome: io::Result<()>,
    ) -> io::Result<()> {
        let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
        let index = if what == What::L1 { &mut tables.l1 } else { &mut tables.refcounts };
        index.written(offset, &bytes);
        let mut unwritten = self.unwritten.lock().unwrap_or_else(PoisonError::into_inner);
        unwritten.remove(&offset);
        outcome.inspect_err(|_| {
            unwritten.insert(offset, bytes);
        })
    }

    /// Makes everything durable whose write has ended, beside other reads and writes. Once this fails it does so for good.
    pub(crate) fn sync(&self) -> io::Result<()> {
        if self.lost.load(Ordering::Acquire) {
            return Err(io::Error::other("an earlier flush failed"));
        }
        let mut unwritten = self.unwritten.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(entry) = unwritten.first_entry() {
            self.file.write_all_at(entry.get(), *entry.key())?;
            entry.remove();
        }
        drop(unwritten);
        let written = self.written.load(Ordering::Acquire);
        self.file.sync_data().inspect_err(|_| self.lost.store(true, Ordering::Release))?;
        self.durable.fetch_max(written, Ordering::Release);
        Ok(())
    }
}
