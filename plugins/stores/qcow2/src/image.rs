//! An image that is open, with the backing files that it was granted.
//!
//! The crate `imago` does the format. What a damaged image makes of it stays here: a panic becomes an error, and the image is then not touched any more.
//!
//! # What a process that is killed leaves
//!
//! `imago` writes data at once, and tables when it must or at a flush: L1 entries and refcount table entries at once, L2 tables before a cluster that was freed is used for
//! data again, refcount blocks at no time that can be relied on. So a file of which nothing was flushed has all that was flushed before, and counts that may be too low, which
//! `repair` puts right. One order is missing in `imago`, and made here: a cluster that was freed is also used again for an L2 table, without the L2 table that named it being written
//! first. So whatever frees clusters is carried out alone, within one L2 table, and the tables are written before anyone else goes on. For the power to fail as well, they are made
//! durable before the next write; `order` does the rest for that.
//!
//! Of a change that failed nobody knows what reached the file: the mark then stays after the close, and the next one to open the image for writing goes through its books.
#![allow(unsafe_code, reason = "fallocate")]

use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};

use imago::format::PreallocateMode;
use imago::{FormatAccess, Mapping};

use crate::header::Header;
use crate::layers::open_layer;
use crate::mark::Mark;
use crate::repair::{self, Repaired};
use crate::storage::ImageFile;
use crate::there::there;
use crate::{ImageError, lock};

/// The most bytes that are discarded at a time, while nobody else can use the image.
const MOST_DISCARDED: u64 = 1 << 30;

pub(crate) type Access = FormatAccess<ImageFile>;

/// How an image is opened.
#[derive(Debug, Default)]
pub(crate) struct Mode {
    pub(crate) writable: bool,
    pub(crate) lock: bool,
    /// The backing files that may be opened.
    pub(crate) backing: Vec<PathBuf>,
}

/// An open image. Its methods may be called from several threads at once.
pub(crate) struct Image {
    pub(crate) header: Header,
    pub(crate) writable: bool,
    /// What was repaired when it was opened: also that nothing was to be, although it was not closed in good order.
    pub(crate) repaired: Option<Repaired>,
    /// Set before the first change.
    mark: Mark,
    /// Held for writing by what zeroes, or changes where data is: nobody may read or write meanwhile. `None` while it is dropped.
    access: RwLock<Option<Access>>,
    /// Something panicked.
    broken: AtomicBool,
    /// A change failed: the tables may not be what `imago` takes them for, and the mark stays.
    failed: AtomicBool,
    /// Clusters were freed by tables that are written, and not durable.
    freed: AtomicBool,
    /// Held by who makes them so.
    settling: Mutex<()>,
    /// The image's file again, to give space of it back.
    holes: File,
    /// The open files again, for their locks.
    locked: Locks,
}

impl Image {
    pub(crate) fn open(path: &Path, mode: &Mode) -> Result<Self, ImageError> {
        let mut locked = Locks::default();
        let mut grants = Vec::new();
        for granted in &mode.backing {
            let found = fs::canonicalize(granted).map_err(|error| {
                ImageError::Backing(format!("the backing file `{}`: {error}", granted.display()))
            })?;
            grants.push((granted.clone(), found));
        }
        let file = open_file(path, mode.writable, mode.lock, &mut locked)?;
        let header = Header::read(&file)?;
        header.check(mode.writable)?;
        let mark = Mark::new(file.try_clone()?, &header);
        let mut repaired = None;
        if mode.writable {
            if repair::needed(&file, &header)? {
                let found = repair::put_right(&file, &header, false)?;
                repaired = (header.dirty() || found != Repaired::default()).then_some(found);
            }
            repair::trust_refcounts(&file, &header)?;
            mark.clear()?;
        }
        let holes = file.try_clone()?;
        let access = contained(|| open_layer(path, file, &header, mode, &mut grants, &mut locked))??;
        if let Some((unused, _)) = grants.first() {
            return Err(ImageError::Backing(format!(
                "`backing` grants `{}`, which no image here stands on",
                unused.display()
            )));
        }
        Ok(Self {
            header,
            writable: mode.writable,
            repaired,
            mark,
            access: RwLock::new(Some(access)),
            broken: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            freed: AtomicBool::new(false),
            settling: Mutex::new(()),
            holes,
            locked,
        })
    }

    /// The length in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.with(|access| Ok(access.size())).unwrap_or(0)
    }

    pub(crate) fn read(&self, position: u64, into: &mut [u8]) -> io::Result<()> {
        self.with(|access| access.read(into, position))
    }

    pub(crate) fn write(&self, position: u64, bytes: &[u8]) -> io::Result<()> {
        let length = bytes.len() as u64;
        let all = position..position + length;
        let part = |piece: &Range<u64>| &bytes[range(piece.start - position, piece.end - piece.start)];
        let size = self.header.cluster_size();
        let clusters = || {
            (position / size..all.end.div_ceil(size))
                .map(|cluster| position.max(cluster * size)..all.end.min((cluster + 1) * size))
        };
        let written = self.with(|access| {
            self.begin(access)?;
            let there = there(access, position, length)?;
            if there.shared {
                return Ok(false);
            }
            // Several clusters at once `imago` likes to have in a row, and gives those away for that which zero clusters have.
            let done = if there.zeroes {
                clusters().try_for_each(|cluster| access.write(part(&cluster), cluster.start))
            } else {
                access.write(bytes, position)
            };
            done.inspect_err(|_| self.fail()).map(|()| true)
        })?;
        if written {
            return Ok(());
        }
        // One cluster after the other: `imago` would free and use again within one call.
        clusters().try_for_each(|cluster| {
            self.alone(cluster.start, cluster.end - cluster.start, |access, at, piece| {
                self.begin(access)?;
                let frees = there(access, at, piece)?.shared;
                access.write(part(&(at..at + piece)), at)?;
                Ok(frees)
            })
        })
    }

    /// Makes everything durable whose write has ended.
    pub(crate) fn flush(&self) -> io::Result<()> {
        if !self.writable {
            return Ok(());
        }
        // What the first leaves unwritten, it knows and writes again.
        self.with(|access| access.flush().and_then(|()| access.sync())).inspect_err(|_| self.fail())
    }

    /// Makes everything durable, and takes the mark back if nothing failed. Nothing else is under way.
    pub(crate) fn close(&self) -> io::Result<()> {
        self.flush()?;
        if !self.writable || self.failed.load(Ordering::Acquire) {
            return Ok(());
        }
        self.with_all(|_| self.mark.clear())
    }

    fn fail(&self) {
        self.failed.store(true, Ordering::Release);
    }

    /// Goes before every change.
    fn begin(&self, access: &Access) -> io::Result<()> {
        self.mark.set()?;
        if self.freed.load(Ordering::Acquire) {
            let _settling = self.settling.lock().unwrap_or_else(PoisonError::into_inner);
            if self.freed.load(Ordering::Acquire) {
                access.sync().inspect_err(|_| self.fail())?;
                // Whoever sets it does so alone, and not now.
                self.freed.store(false, Ordering::Release);
            }
        }
        Ok(())
    }

    /// Changes a range alone, one L2 table after the other, and writes the tables before anyone can use the clusters again that a change freed, which is what it returns. A
    /// change that may need clusters begins with [`Self::begin`].
    fn alone(
        &self,
        position: u64,
        length: u64,
        change: impl Fn(&mut Access, u64, u64) -> io::Result<bool>,
    ) -> io::Result<()> {
        let table = self.header.cluster_size() / 8 * self.header.cluster_size();
        let end = position + length;
        let mut at = position;
        while at < end {
            let piece = (end - at).min(MOST_DISCARDED).min((at / table + 1) * table - at);
            self.with_all(|access| {
                self.mark.set()?;
                let done = change(access, at, piece).and_then(|freed| {
                    if freed {
                        self.freed.store(true, Ordering::Release);
                        access.flush()?;
                    }
                    Ok(())
                });
                done.inspect_err(|error| {
                    if error.kind() != io::ErrorKind::Unsupported {
                        self.fail();
                    }
                })
            })?;
            at += piece;
        }
        Ok(())
    }

    /// Makes a range read as zeroes.
    pub(crate) fn write_zeroes(&self, position: u64, length: u64, unmap: bool) -> io::Result<()> {
        let done = if unmap {
            self.give_back(position, length, Access::discard_to_zero)
        } else {
            // Alone: of a cluster that is zeroed in part, `imago` looks whether the rest reads as zeroes, and then maps all of it to
            // zeroes; what was written to the rest in between would be lost.
            self.parts(position, length).into_iter().try_for_each(|part| {
                self.alone(part.start, part.end - part.start, |access, at, piece| {
                    self.begin(access)?;
                    let frees = there(access, at, piece)?.shared;
                    access.write_zeroes(at, piece)?;
                    Ok(frees)
                })
            })
        };
        match done {
            // Version 2 has no clusters of zeroes.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                let zeroes = [0; 64 << 10];
                let mut at = position;
                while at < position + length {
                    let piece = (position + length - at).min(zeroes.len() as u64);
                    self.write(at, &zeroes[range(0, piece)])?;
                    at += piece;
                }
                Ok(())
            }
            done => done,
        }
    }

    /// Gives the whole clusters of a range back.
    pub(crate) fn discard(&self, position: u64, length: u64) -> io::Result<()> {
        self.give_back(position, length, Access::discard_to_any)
    }

    /// Discards a range in the image, and then, in the image's file, the clusters that held it: `imago` leaves these to be used again.
    fn give_back(
        &self,
        position: u64,
        length: u64,
        discard: impl Fn(&mut Access, u64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let [head, tail, whole] = self.parts(position, length);
        // The parts of clusters first: they may need a cluster, which must not be one that is punched here.
        for part in [head, tail] {
            self.alone(part.start, part.end - part.start, |access, at, piece| {
                self.begin(access)?;
                let frees = there(access, at, piece)?.any();
                discard(access, at, piece)?;
                Ok(frees)
            })?;
        }
        self.alone(whole.start, whole.end - whole.start, |access, at, piece| {
            let frees = there(access, at, piece)?.any();
            if !frees {
                // A table may be needed, to say so.
                self.begin(access)?;
            }
            let before = self.clusters(access, at, at + piece)?;
            discard(access, at, piece)?;
            let after = self.clusters(access, at, at + piece)?;
            for (cluster, count) in before {
                // What is still mapped was not discarded after all.
                if !after.iter().any(|(at, length)| cluster < at + length && *at < cluster + count) {
                    self.punch(cluster, count);
                }
            }
            Ok(frees)
        })
    }

    /// The parts of a range: those of a cluster at its begin and its end, and the whole clusters between these.
    fn parts(&self, position: u64, length: u64) -> [Range<u64>; 3] {
        let (size, end) = (self.header.cluster_size(), position + length);
        let first = position.next_multiple_of(size).min(end);
        let last = if end == self.size() { end } else { (end / size * size).max(first) };
        [position..first, last..end, first..last]
    }

    /// Where the clusters of a range are in the image's file: offsets and lengths. Only the disk's last one may be there in part.
    fn clusters(&self, access: &Access, from: u64, to: u64) -> io::Result<Vec<(u64, u64)>> {
        let size = self.header.cluster_size();
        let mut found = Vec::new();
        let (mut at, to) = (from, to.next_multiple_of(size));
        while at < to {
            let (mapping, length) = access.get_mapping(at, to - at)?;
            if let Mapping::Raw { offset, writable: true, .. } = mapping
                && offset.is_multiple_of(size)
            {
                found.push((offset, length.next_multiple_of(size)));
            }
            if length == 0 {
                break;
            }
            at = (at + length).next_multiple_of(size);
        }
        Ok(found)
    }

    /// Gives space of the image's file back, where its file system can.
    fn punch(&self, offset: u64, length: u64) {
        if let (Ok(offset), Ok(length)) = (offset.try_into(), length.try_into()) {
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            // SAFETY: the descriptor is open. That it fails costs space, and no data.
            let _ = unsafe { libc::fallocate(self.holes.as_raw_fd(), mode, offset, length) };
        }
    }

    /// Changes the length; durable when it returns.
    pub(crate) fn resize(&self, size: u64) -> Result<(), ImageError> {
        let before = self.size();
        if size == 0 || !size.is_multiple_of(512) {
            return Err(ImageError::Unsupported(format!(
                "the length is {size}, but must be a multiple of 512 and not 0"
            )));
        }
        if size < before {
            // What is left of the last cluster shall not come back when the image grows again.
            let end = size.next_multiple_of(self.header.cluster_size()).min(before);
            self.write_zeroes(size, end - size, false)?;
            // `imago` would free and use again within one call.
            self.alone(end, before - end, |access, at, piece| {
                let frees = there(access, at, piece)?.any();
                if frees {
                    access.discard_to_backing(at, piece)?;
                }
                Ok(frees)
            })?;
        }
        // A longer backing file shall not show behind the old end.
        let mode = if self.header.backing.is_some() { PreallocateMode::Zero } else { PreallocateMode::None };
        self.with_all(|access| {
            self.begin(access)?;
            // An L1 table that is too short is replaced.
            self.freed.store(true, Ordering::Release);
            access.resize(size, mode).inspect_err(|_| self.fail())
        })?;
        Ok(self.flush()?)
    }

    /// Calls with the image, beside others.
    fn with<T>(&self, call: impl FnOnce(&Access) -> io::Result<T>) -> io::Result<T> {
        self.whole()?;
        let guard = self.access.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        let access = guard.as_ref().ok_or_else(broken)?;
        self.note(contained(|| call(access)))
    }

    /// Calls with the image alone.
    fn with_all<T>(&self, call: impl FnOnce(&mut Access) -> io::Result<T>) -> io::Result<T> {
        self.whole()?;
        let mut guard = self.access.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        let access = guard.as_mut().ok_or_else(broken)?;
        self.note(contained(|| call(access)))
    }

    fn whole(&self) -> io::Result<()> {
        if self.broken.load(Ordering::Acquire) { Err(broken()) } else { Ok(()) }
    }

    fn note<T>(&self, outcome: Result<io::Result<T>, ImageError>) -> io::Result<T> {
        outcome.unwrap_or_else(|_| {
            self.broken.store(true, Ordering::Release);
            Err(broken())
        })
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        if self.mark.is_set() && self.writable && self.whole().is_ok() {
            // What was not closed is closed; if that fails, the next one to open the image repairs it.
            let _ = self.close();
        }
        let access = self.access.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        if self.broken.load(Ordering::Acquire) {
            // Dropping it would write what it keeps, which nobody can vouch for.
            std::mem::forget(access);
        } else {
            let _ = contained(|| drop(access));
        }
        self.locked.end();
    }
}

/// Open files that are locked.
#[derive(Default)]
pub(crate) struct Locks(Vec<File>);

impl Locks {
    fn end(&mut self) {
        self.0.drain(..).for_each(|file| lock::unlock(&file));
    }
}

impl Drop for Locks {
    fn drop(&mut self) {
        self.end();
    }
}

/// A range within a slice that was looked at to be as long.
fn range(start: u64, length: u64) -> Range<usize> {
    let start = usize::try_from(start).unwrap_or(usize::MAX);
    start..start.saturating_add(usize::try_from(length).unwrap_or(usize::MAX))
}

fn broken() -> io::Error {
    io::Error::other("the image is damaged in a way that made its reader fail")
}

/// Calls what a damaged image may make panic.
fn contained<T>(call: impl FnOnce() -> T) -> Result<T, ImageError> {
    catch_unwind(AssertUnwindSafe(call)).map_err(|payload| {
        // A payload may panic when it is dropped.
        std::mem::forget(payload);
        ImageError::Damaged("its reader failed".into())
    })
}

/// Opens a regular file, without ever waiting for one that is something else.
pub(crate) fn open_file(
    path: &Path,
    writable: bool,
    lock: bool,
    locked: &mut impl Extend<File>,
) -> Result<File, ImageError> {
    if !fs::metadata(path)?.is_file() {
        return Err(ImageError::Unsupported("it is no regular file".into()));
    }
    let file = OpenOptions::new()
        .read(true)
        .write(writable)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(ImageError::Unsupported("it is no regular file".into()));
    }
    if lock {
        lock::lock(&file, writable).map_err(ImageError::InUse)?;
        locked.extend([file.try_clone()?]);
    }
    Ok(file)
}

impl Extend<File> for Locks {
    fn extend<T: IntoIterator<Item = File>>(&mut self, files: T) {
        self.0.extend(files);
    }
}
