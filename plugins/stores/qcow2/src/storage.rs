//! The file below `imago`: it does not show the mark that `mark` describes, for `imago` refuses an image that has it, for reading as well, which needs no reference counts; and writes
//! reach the disk in the order that `order` describes.
#![allow(unsafe_code, reason = "the trait's reads and writes are unsafe functions, and are passed on")]

use std::fmt::{self, Display, Formatter};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;
use imago::{Storage, StorageOpenOptions};

use crate::header::Header;
use crate::mark::{BYTE, DIRTY};
use crate::order::Order;

/// A file of an image.
#[derive(Debug)]
pub(crate) struct ImageFile {
    file: imago::file::File,
    /// The file begins with a header of version 3.
    header: bool,
    /// Bytes of a cluster, if the file is an image.
    cluster_size: Option<u64>,
    /// It will be written.
    order: Option<Order>,
}

impl ImageFile {
    /// `header`: that of an image. Only images are written.
    pub(crate) fn new(
        path: &Path,
        file: fs::File,
        writable: bool,
        header: Option<&Header>,
    ) -> io::Result<Self> {
        let written = header.filter(|_| writable);
        let order = written.map(|header| Order::new(file.try_clone()?, header)).transpose()?;
        let options = StorageOpenOptions::new().filename(path).write(writable);
        Ok(Self {
            file: imago::file::File::from_open_file(file, options)?,
            header: header.is_some_and(|header| header.version >= 3),
            cluster_size: header.map(Header::cluster_size),
            order,
        })
    }

    /// Changes a range of the file, in order, to what names no cluster.
    fn change(&self, offset: u64, length: u64, change: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let Some(order) = &self.order else { return change() };
        let what = order.before(offset, length)?;
        change()?;
        order.after(what)
    }
}

impl Display for ImageFile {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        self.file.fmt(f)
    }
}

impl Storage for ImageFile {
    fn mem_align(&self) -> usize {
        self.file.mem_align()
    }

    fn req_align(&self) -> usize {
        self.file.req_align()
    }

    fn zero_align(&self) -> usize {
        self.file.zero_align()
    }

    fn discard_align(&self) -> usize {
        self.file.discard_align()
    }

    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }

    fn resolve_relative_path<P: AsRef<Path>>(&self, relative: P) -> io::Result<PathBuf> {
        self.file.resolve_relative_path(relative)
    }

    fn get_filename(&self) -> Option<PathBuf> {
        self.file.get_filename()
    }

    unsafe fn pure_readv(&self, mut into: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        // A file that is too short was not copied as a whole, and what is missing is not zero.
        if let Some(size) = self.cluster_size
            && offset >= self.file.size()?.next_multiple_of(size)
        {
            return Err(io::Error::other("the image's file ends before it"));
        }
        if !self.header || offset > BYTE || offset + into.len() <= BYTE {
            // SAFETY: as promised to this.
            return unsafe { self.file.pure_readv(into, offset) };
        }
        let mut copy = vec![0; usize::try_from(into.len()).unwrap_or(0)];
        // SAFETY: as promised to this.
        unsafe { self.file.pure_readv((&mut copy).into(), offset)? };
        if let Some(byte) = usize::try_from(BYTE - offset).ok().and_then(|at| copy.get_mut(at)) {
            *byte &= !DIRTY;
        }
        into.copy_from_slice(&copy);
        Ok(())
    }

    unsafe fn pure_writev(&self, from: IoVector<'_>, offset: u64) -> io::Result<()> {
        let Some(order) = &self.order else {
            // SAFETY: as promised to this.
            return unsafe { self.file.pure_writev(from, offset) };
        };
        let what = order.before(offset, from.len())?;
        if what.is_index() {
            let mut bytes = vec![0; usize::try_from(from.len()).unwrap_or(0)];
            from.copy_into_slice(&mut bytes);
            // SAFETY: as promised to this.
            let outcome = unsafe { self.file.pure_writev(from, offset) };
            return order.after_index(what, offset, bytes, outcome);
        }
        // SAFETY: as promised to this.
        unsafe { self.file.pure_writev(from, offset)? };
        order.after(what)
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: as promised to this.
        self.change(offset, length, || unsafe { self.file.pure_write_zeroes(offset, length) })
    }

    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: as promised to this.
        self.change(offset, length, || unsafe { self.file.pure_write_allocated_zeroes(offset, length) })
    }

    unsafe fn pure_discard(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: as promised to this.
        self.change(offset, length, || unsafe { self.file.pure_discard(offset, length) })
    }

    fn flush(&self) -> io::Result<()> {
        self.file.flush()
    }

    fn sync(&self) -> io::Result<()> {
        self.order.as_ref().map_or(Ok(()), Order::sync)
    }

    fn settle_writes(&self) -> io::Result<()> {
        self.file.settle_writes()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        // SAFETY: as promised to this.
        unsafe { self.file.invalidate_cache() }
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        self.file.get_storage_helper()
    }

    fn resize(&self, size: u64, mode: PreallocateMode) -> io::Result<()> {
        self.file.resize(size, mode)
    }
}
