//! An image that is open, with the backing files that it was granted.
//!
//! The crate `imago` does the format. What a damaged image makes of it stays here: a panic becomes an error, and the image is then not touched any more.
#![allow(unsafe_code, reason = "fallocate")]

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::RwLock;
use std::sync::atomic::{AtomicBool, Ordering};

use imago::format::PreallocateMode;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, Mapping, StorageOpenOptions};

use crate::header::Header;
use crate::{ImageError, checker, lock};

/// The most bytes that are discarded at a time, while nobody else can use the image.
const MOST_DISCARDED: u64 = 1 << 30;

type Access = FormatAccess<imago::file::File>;

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
    /// Held for writing by what zeroes, or changes where data is: nobody may read or write meanwhile. `None` while it is dropped.
    access: RwLock<Option<Access>>,
    /// Something panicked.
    broken: AtomicBool,
    /// A flush did not reach the disk: the kernel tells of that once and forgets.
    lost: AtomicBool,
    /// The image's file again, to give space of it back.
    holes: File,
    /// The open files again, for their locks.
    locked: Locks,
}

impl Image {
    pub(crate) fn open(path: &Path, mode: &Mode) -> Result<Self, ImageError> {
        let mut locked = Locks(Vec::new());
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
        if mode.writable {
            checker::trust_refcounts(&file, &header)?;
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
            access: RwLock::new(Some(access)),
            broken: AtomicBool::new(false),
            lost: AtomicBool::new(false),
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
        self.with(|access| access.write(bytes, position))
    }

    /// Makes everything durable whose write has ended.
    pub(crate) fn flush(&self) -> io::Result<()> {
        if !self.writable {
            return Ok(());
        }
        if self.lost.load(Ordering::Acquire) {
            return Err(io::Error::other("an earlier flush failed"));
        }
        // What this leaves unwritten, it knows and writes again.
        self.with(Access::flush)?;
        self.with(Access::sync).inspect_err(|_| self.lost.store(true, Ordering::Release))
    }

    /// Makes a range read as zeroes.
    pub(crate) fn write_zeroes(&self, position: u64, length: u64, unmap: bool) -> io::Result<()> {
        let done = if unmap {
            self.give_back(position, length, Access::discard_to_zero)
        } else {
            // Alone: of a cluster that is zeroed in part, `imago` looks whether the rest reads as zeroes, and then maps all of it to
            // zeroes; what was written to the rest in between would be lost.
            self.with_all(|access| access.write_zeroes(position, length))
        };
        match done {
            // Version 2 has no clusters of zeroes.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                let zeroes = [0; 64 << 10];
                let mut at = position;
                while at < position + length {
                    let piece = (position + length - at).min(zeroes.len() as u64);
                    self.write(at, &zeroes[..usize::try_from(piece).unwrap_or(0)])?;
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
        let end = position + length;
        let mut at = position;
        while at < end {
            let piece = (end - at).min(MOST_DISCARDED);
            self.with_all(|access| {
                let before = self.clusters(access, at, at + piece)?;
                discard(access, at, piece)?;
                let after = self.clusters(access, at, at + piece)?;
                for (cluster, count) in before {
                    // What is still mapped was not discarded after all.
                    if !after
                        .iter()
                        .any(|(start, length)| cluster < start + length && *start < cluster + count)
                    {
                        self.punch(cluster, count);
                    }
                }
                Ok(())
            })?;
            at += piece;
        }
        Ok(())
    }

    /// Where the whole clusters of a range are in the image's file: offsets and lengths.
    fn clusters(&self, access: &Access, from: u64, to: u64) -> io::Result<Vec<(u64, u64)>> {
        let size = self.header.cluster_size();
        let mut found = Vec::new();
        let mut at = from.next_multiple_of(size);
        let to = if to == access.size() { to.next_multiple_of(size) } else { to / size * size };
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
        }
        // A longer backing file shall not show behind the old end.
        let mode = if self.header.backing.is_some() { PreallocateMode::Zero } else { PreallocateMode::None };
        self.with_all(|access| access.resize(size, mode))?;
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
struct Locks(Vec<File>);

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

fn storage(path: &Path, file: File, writable: bool) -> io::Result<imago::file::File> {
    imago::file::File::from_open_file(file, StorageOpenOptions::new().filename(path).write(writable))
}

/// Opens an image whose header was checked, and what it stands on: each backing file takes its grant.
fn open_layer(
    path: &Path,
    file: File,
    header: &Header,
    mode: &Mode,
    grants: &mut Vec<(PathBuf, PathBuf)>,
    locked: &mut Locks,
) -> Result<Access, ImageError> {
    let backing = match &header.backing {
        None => None,
        Some(name) => Some(open_backing(path, name, header, mode, grants, locked)?),
    };
    let writable = mode.writable;
    let image = Qcow2::<imago::file::File>::builder(storage(path, file, writable)?)
        .write(writable)
        .backing(backing)
        .data_file(None)
        .open(DenyImplicitOpenGate::default())?;
    Ok(FormatAccess::new(image))
}

fn open_backing(
    path: &Path,
    name: &str,
    header: &Header,
    mode: &Mode,
    grants: &mut Vec<(PathBuf, PathBuf)>,
    locked: &mut Locks,
) -> Result<Access, ImageError> {
    let image = path.display();
    let named = path.parent().unwrap_or(Path::new("")).join(name);
    let grant = fs::canonicalize(&named)
        .ok()
        .and_then(|named| grants.iter().position(|(_, granted)| *granted == named));
    let Some(grant) = grant else {
        return Err(ImageError::Backing(format!(
            "`{image}` stands on the backing file `{name}`, which is not granted; `backing={}` grants it",
            named.display()
        )));
    };
    let (_, path) = grants.remove(grant);
    let of =
        |error: ImageError| ImageError::Backing(format!("the backing file `{}`: {error}", path.display()));
    let mode = Mode { writable: false, lock: mode.lock, backing: Vec::new() };
    let file = open_file(&path, false, mode.lock, locked).map_err(of)?;
    match header.backing_format.as_deref() {
        Some("raw") => {
            let raw = storage(&path, file, false)
                .and_then(|storage| Raw::builder(storage).open(DenyImplicitOpenGate::default()));
            Ok(FormatAccess::new(raw.map_err(|error| of(error.into()))?))
        }
        Some("qcow2") => {
            let header = Header::read(&file).and_then(|header| header.check(false).map(|()| header));
            open_layer(&path, file, &header.map_err(of)?, &mode, grants, locked)
        }
        // Guessing would let whoever writes a raw image name any file as its backing file.
        other => Err(ImageError::Backing(format!(
            "`{image}` stands on the backing file `{name}`, whose format it gives as `{}`, but must give as `raw` or `qcow2`: \
             `qemu-img rebase -u -F FORMAT -b {name} {image}` does",
            other.unwrap_or_default()
        ))),
    }
}
