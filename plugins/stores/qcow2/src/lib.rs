//! Backing store: a qcow2 image.
//!
//! The parts:
//!
//! - here: the store, which carries out each operation on a copy of its data, on one of a few `threads`;
//! - `image`: an open image and its backing files, with the crate `imago` inside, and `there`: what a range of it has;
//! - `header`: what an image says about itself, checked before anything acts on it;
//! - `layers`: opens an image and what it stands on, over `storage`;
//! - `mark`, `books` and `repair`: what a process that was killed leaves, found and put right before anything is written;
//! - `order`: what is durable before what, so that a power failure leaves what was flushed;
//! - [`create`], [`info`], [`resize`], [`check`] and [`repair`](fn@repair): what else is done with images, for the command line.
//!
//! A backing file is opened only when it was granted by name: an image from elsewhere may name any file of this host.
//!
//! `lock` and `threads` are the files of that name of the store `file`: a plugin depends on nothing but the SDK, and these are too small to be copied and too special to be
//! part of it.
#![allow(unsafe_code, reason = "copies to and from the buffers of operations, which are guest memory")]

mod books;
mod checker;
mod header;
mod image;
mod layers;
#[path = "../../file/src/lock.rs"]
mod lock;
mod mark;
mod order;
mod repair;
mod storage;
mod there;
#[path = "../../file/src/threads.rs"]
mod threads;
mod tools;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use tenon_sdk::store::{
    Completions, Config, Error, IoVec, Level, NativeOperation, NativeStore, OperationKind, Result,
    StoreError, StoreInfo,
};

use crate::image::{Image, Mode};
use crate::threads::{Threads, Work};

pub use crate::books::Report;
pub use crate::checker::check;
pub use crate::repair::{Repaired, repair};
pub use crate::tools::{Backing, CreateOptions, Info, create, info, resize};

tenon_sdk::export_native_store!(Qcow2Store);

/// The plugin's `plugin.toml`, for whoever links it in.
pub const MANIFEST: &str = include_str!("../plugin.toml");

/// The most bytes of an operation that are copied at a time.
const MOST_COPIED: u64 = 1 << 20;

/// Why an image cannot be used. The text goes on after the image's name.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It is something else.
    #[error("it is no qcow2 image")]
    NotQcow2,
    /// Its header or tables cannot be.
    #[error("it is damaged: {0}")]
    Damaged(String),
    /// It is, or needs, something that is not supported.
    #[error("{0}")]
    Unsupported(String),
    /// Its backing file is not granted, or cannot be used.
    #[error("{0}")]
    Backing(String),
    /// Another has it open, or locks do not work.
    #[error("it {0}")]
    InUse(String),
    /// Input or output failed.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// A qcow2 image.
pub struct Qcow2Store {
    /// Dropped first: it waits for its operations.
    threads: Threads<Worker>,
    image: Arc<Image>,
}

impl NativeStore for Qcow2Store {
    fn open(config: &Config, completions: Completions) -> Result<(Self, StoreInfo)> {
        let path = config.text("path").ok_or_else(|| Config::missing("path", "a qcow2 image"))?;
        let mode = Mode {
            writable: !config.boolean("readonly")?.unwrap_or(false),
            lock: config.boolean("lock")?.unwrap_or(true),
            backing: config
                .text("backing")
                .map(|paths| paths.split(':').filter(|path| !path.is_empty()).map(Into::into).collect())
                .unwrap_or_default(),
        };
        let image = Image::open(Path::new(path), &mode).map_err(|error| {
            let text = format!("`{path}`: {error}");
            match error {
                ImageError::Unsupported(_) => Error::Unsupported(text),
                ImageError::NotQcow2 | ImageError::Backing(_) => Error::Invalid(text),
                _ => Error::Other(text),
            }
        })?;
        if let Some(repaired) = &image.repaired {
            completions.log(Level::Warn, &format!("`{path}` was not closed in good order: {repaired}"));
        }
        let image = Arc::new(image);
        let info = store_info(&image);
        let worker = Worker { image: image.clone(), completions, path: path.to_owned() };
        Ok((Self { threads: Threads::new(worker), image }, info))
    }

    fn submit(&self, operations: &[NativeOperation<'_>]) {
        self.threads.submit(operations.iter().map(|operation| Task {
            token: operation.token,
            kind: operation.kind,
            position: operation.position,
            length: operation.length,
            vectors: operation.vectors.as_ptr(),
            count: operation.vectors.len(),
        }));
    }

    fn resize(&self, size: u64) -> Result<StoreInfo> {
        self.image.resize(size).map_err(|error| match error {
            ImageError::Unsupported(text) => Error::Invalid(text),
            other => Error::Other(other.to_string()),
        })?;
        Ok(store_info(&self.image))
    }

    fn close(&self) -> Result<()> {
        self.image.close().map_err(|error| Error::Other(format!("flushing: {error}")))
    }
}

fn store_info(image: &Image) -> StoreInfo {
    let can = image.writable && image.header.version >= 3;
    StoreInfo {
        optimal_size: u32::try_from(image.header.cluster_size()).unwrap_or(1 << 16),
        read_only: !image.writable,
        discard: can,
        write_zeroes: can,
        ..StoreInfo::new(image.size())
    }
}

/// What carries out operations.
struct Worker {
    image: Arc<Image>,
    completions: Completions,
    path: String,
}

/// One operation.
struct Task {
    token: u64,
    kind: OperationKind,
    position: u64,
    length: u64,
    /// The host's array; it and what it points to are good until the operation has ended.
    vectors: *const IoVec,
    count: usize,
}

// SAFETY: the pointers are the operation's, which may go on on any thread.
unsafe impl Send for Task {}

impl Work for Worker {
    type Task = Task;

    fn carry_out(&self, task: Task, stop: &AtomicBool) {
        let _ = stop;
        self.completions.done(task.token, self.outcome(&task));
    }
}

impl Worker {
    fn outcome(&self, task: &Task) -> Result<(), StoreError> {
        let Task { kind, position, length, .. } = *task;
        if position.checked_add(length).is_none_or(|end| end > self.image.size()) {
            return Err(StoreError::OutOfRange);
        }
        if !self.image.writable && !matches!(kind, OperationKind::Read | OperationKind::Flush) {
            return Err(StoreError::ReadOnly);
        }
        let done = match kind {
            OperationKind::Read | OperationKind::Write => self.copy(task),
            OperationKind::Flush => self.image.flush(),
            OperationKind::Discard => self.image.discard(position, length),
            OperationKind::WriteZeroes { unmap } => self.image.write_zeroes(position, length, unmap),
        };
        done.map_err(|error| {
            let text = format!("{}: {kind:?} of {length} bytes at {position}: {error}", self.path);
            self.completions.log(Level::Warn, &text);
            match error.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                    StoreError::NoSpace
                }
                io::ErrorKind::Unsupported => StoreError::Unsupported,
                _ => StoreError::Io,
            }
        })
    }

    fn copy(&self, task: &Task) -> io::Result<()> {
        let mut copy = vec![0; usize::try_from(task.length.min(MOST_COPIED)).unwrap_or(0)];
        let mut done = 0;
        while done < task.length {
            let piece = (task.length - done).min(MOST_COPIED);
            let copy = &mut copy[..usize::try_from(piece).unwrap_or(0)];
            if task.kind == OperationKind::Read {
                self.image.read(task.position + done, copy)?;
                let mut from = copy.as_ptr();
                task.each_part(done, piece, |part, length| {
                    // SAFETY: the parts together are no longer than the copy, and are the operation's.
                    unsafe {
                        std::ptr::copy_nonoverlapping(from, part, length);
                        from = from.add(length);
                    }
                });
            } else {
                let mut into = copy.as_mut_ptr();
                task.each_part(done, piece, |part, length| {
                    // SAFETY: as above.
                    unsafe {
                        std::ptr::copy_nonoverlapping(part, into, length);
                        into = into.add(length);
                    }
                });
                self.image.write(task.position + done, copy)?;
            }
            done += piece;
        }
        Ok(())
    }
}

impl Task {
    /// The parts of memory that hold `length` bytes behind the first `skip`.
    fn each_part(&self, mut skip: u64, mut length: u64, mut each: impl FnMut(*mut u8, usize)) {
        for index in 0..self.count {
            // SAFETY: the operation has not ended, so that the array is good.
            let vector = unsafe { self.vectors.add(index).read() };
            let whole = vector.length as u64;
            if skip >= whole {
                skip -= whole;
                continue;
            }
            let part = (whole - skip).min(length);
            if part == 0 {
                return;
            }
            // Both are at most a vector's length.
            let (start, count) = (usize::try_from(skip).unwrap_or(0), usize::try_from(part).unwrap_or(0));
            // SAFETY: inside the vector.
            each(unsafe { vector.base.add(start) }, count);
            skip = 0;
            length -= part;
        }
    }
}
