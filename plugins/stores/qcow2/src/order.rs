//! What of an image must be durable before what, so that after a power failure all is there that was flushed before.
//!
//! `imago` writes what a table names before it writes the table, which is enough where a process is killed. A disk that loses its power may have kept the later write and not the
//! earlier one. So before an L2 table, an entry of the L1 table or the header is written, everything else that was written is made durable. Refcount tables need no order: `repair` puts
//! them right.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};

use crate::ImageError;
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
    /// How many of these are durable. Held by whoever makes more so.
    durable: Mutex<u64>,
    /// They could not be made durable: the kernel tells of that once and forgets.
    lost: AtomicBool,
}

/// Where the tables are that name clusters.
#[derive(Debug)]
struct Tables {
    l1: Range<u64>,
    /// Offsets of L2 tables, some of which may be none any more.
    l2: HashSet<u64>,
}

impl Tables {
    fn read(file: &File) -> Result<Self, ImageError> {
        let header = Header::read(file)?;
        let entries = numbers(file, file.metadata()?.len(), header.l1_offset, header.l1_size.into())?;
        let end = header.l1_offset.saturating_add(u64::from(header.l1_size) * 8);
        let mut tables = Self { l1: header.l1_offset..end, l2: HashSet::new() };
        tables.add(entries);
        Ok(tables)
    }

    fn add(&mut self, l1: impl IntoIterator<Item = u64>) {
        self.l2.extend(l1.into_iter().map(|entry| entry & OFFSET).filter(|offset| *offset != 0));
    }

    fn what(&self, offset: u64, length: u64) -> What {
        if offset < HEADER {
            What::Header
        } else if offset < self.l1.end && offset.saturating_add(length) > self.l1.start {
            What::L1
        } else if self.l2.contains(&offset) {
            What::L2
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
    /// What a table may name: data, and tables that nothing names yet.
    Other,
}

impl Order {
    /// The order of an image that is in `file` and will be written.
    pub(crate) fn new(file: File) -> Result<Self, ImageError> {
        let tables = RwLock::new(Tables::read(&file)?);
        let (written, lost) = (AtomicU64::new(0), AtomicBool::new(false));
        Ok(Self { file, tables, written, durable: Mutex::new(0), lost })
    }

    /// Goes before a write of the image's file: waits for what must be durable before it.
    pub(crate) fn before(&self, offset: u64, length: u64) -> io::Result<What> {
        let what = self.tables.read().unwrap_or_else(PoisonError::into_inner).what(offset, length);
        if what != What::Other {
            let mut durable = self.durable.lock().unwrap_or_else(PoisonError::into_inner);
            let written = self.written.load(Ordering::Acquire);
            if *durable < written {
                self.sync()?;
                *durable = written;
            }
        }
        Ok(what)
    }

    /// Goes after a write that has succeeded. Of a write to the L1 table, `bytes` are what was written.
    pub(crate) fn after(&self, what: What, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let tables = || self.tables.write().unwrap_or_else(PoisonError::into_inner);
        match what {
            What::Header => *tables() = Tables::read(&self.file).map_err(io::Error::other)?,
            What::L1 => {
                let mut tables = tables();
                let first = usize::try_from(tables.l1.start.saturating_sub(offset)).unwrap_or(usize::MAX);
                let entries = bytes.get(first..).unwrap_or(&[]).as_chunks::<8>().0;
                tables.add(entries.iter().map(|entry| u64::from_be_bytes(*entry)));
            }
            What::L2 => {}
            What::Other => {
                self.written.fetch_add(1, Ordering::Release);
            }
        }
        Ok(())
    }

    /// Makes everything durable whose write has ended, beside other reads and writes. Once this fails it does so for good.
    pub(crate) fn sync(&self) -> io::Result<()> {
        if self.lost.load(Ordering::Acquire) {
            return Err(io::Error::other("an earlier flush failed"));
        }
        self.file.sync_data().inspect_err(|_| self.lost.store(true, Ordering::Release))
    }
}
