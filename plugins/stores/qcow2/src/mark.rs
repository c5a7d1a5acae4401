//! The mark of an image that is being written: bit 0 of the incompatible features of a header of version 3, "dirty".
//!
//! While it is set, reference counts may be too low. It is set, durably, before the first change, and taken back once everything is durable. QEMU repairs an image with it before
//! writing it, as `repair` does. An image of version 2 has no place for it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::header::Header;

/// The byte of the header that has the bit.
pub(crate) const BYTE: u64 = 79;
/// The bit in that byte.
pub(crate) const DIRTY: u8 = 1;

/// Sets the mark and takes it back.
#[derive(Debug)]
pub(crate) struct Mark {
    file: File,
    /// The version has it.
    can: bool,
    /// It is in the file, durably.
    set: AtomicBool,
    change: Mutex<()>,
}

impl Mark {
    /// The mark of an image of this header, which is in `file`.
    pub(crate) fn new(file: File, header: &Header) -> Self {
        let (can, set) = (header.version >= 3, header.dirty());
        Self { file, can, set: AtomicBool::new(set), change: Mutex::new(()) }
    }

    pub(crate) fn is_set(&self) -> bool {
        self.set.load(Ordering::Acquire)
    }

    /// Sets it. When this returns it is durable.
    pub(crate) fn set(&self) -> io::Result<()> {
        if self.can && !self.is_set() { self.write(true) } else { Ok(()) }
    }

    /// Takes it back. Everything else is durable.
    pub(crate) fn clear(&self) -> io::Result<()> {
        if self.can && self.is_set() { self.write(false) } else { Ok(()) }
    }

    fn write(&self, set: bool) -> io::Result<()> {
        let _alone = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_set() == set {
            return Ok(());
        }
        let mut byte = [0];
        self.file.read_exact_at(&mut byte, BYTE)?;
        byte[0] = if set { byte[0] | DIRTY } else { byte[0] & !DIRTY };
        self.file.write_all_at(&byte, BYTE)?;
        self.file.sync_data()?;
        self.set.store(set, Ordering::Release);
        Ok(())
    }
}
