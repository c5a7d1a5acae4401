//! Backing store: a disk in the host's memory. It takes memory only for what was written, and gives it back on discard.
//!
//! `mapping` is the memory; here is the store over it. Operations end within the call that begins them: copying is all there is to do. What a disk holds is part of a
//! saved machine, page by page, up to [`MOST_SAVED`].
#![allow(
    unsafe_code,
    reason = "data is copied to and from the buffers of operations, which are guest memory"
)]

mod mapping;

use std::sync::{Mutex, MutexGuard, PoisonError};

use tenon_sdk::store::{
    Completions, Config, Decoder, Encoder, Error, NativeOperation, NativeStore, OperationKind, Result,
    StoreError, StoreInfo,
};

use crate::mapping::{Mapping, PAGE};

tenon_sdk::export_native_store!(Memory);

/// The plugin's `plugin.toml`, for whoever links it in.
pub const MANIFEST: &str = include_str!("../plugin.toml");

/// The most bytes of pages that are not zero that are saved with a machine.
pub const MOST_SAVED: usize = 1 << 30;

/// A disk in memory.
pub struct Memory {
    mapping: Mutex<Mapping>,
    completions: Completions,
}

impl NativeStore for Memory {
    fn open(config: &Config, completions: Completions) -> Result<(Self, StoreInfo)> {
        let info = info(config.size("size")?.unwrap_or(64 << 20))?;
        let mapping = Mapping::new(info.size)
            .map_err(|error| Error::Other(format!("taking {} bytes of address space: {error}", info.size)))?;
        Ok((Self { mapping: Mutex::new(mapping), completions }, info))
    }

    fn submit(&self, operations: &[NativeOperation<'_>]) {
        let mut mapping = self.mapping();
        for operation in operations {
            self.completions.done(operation.token, carry_out(&mut mapping, operation));
        }
    }

    fn resize(&self, size: u64) -> Result<StoreInfo> {
        let info = info(size)?;
        self.mapping()
            .resize(size)
            .map_err(|error| Error::Other(format!("taking {size} bytes of address space: {error}")))?;
        Ok(info)
    }

    /// Nothing is durable, as everybody knows.
    fn close(&self) -> Result<()> {
        Ok(())
    }

    fn save(&self, state: &mut Encoder) -> Result<()> {
        let mapping = self.mapping();
        let mut saved = 0;
        state.u64(mapping.size());
        for (index, page) in mapping.pages() {
            if page.iter().any(|byte| *byte != 0) {
                saved += PAGE;
                if saved > MOST_SAVED {
                    return Err(Error::Unsupported(format!(
                        "the disk in memory holds over {MOST_SAVED} bytes, which is the most that is saved with a machine"
                    )));
                }
                state.u64(index).bytes(page);
            }
        }
        state.u64(u64::MAX);
        Ok(())
    }

    fn restore(&self, state: &mut Decoder<'_>) -> Result<()> {
        let mut mapping = self.mapping();
        let size = state.u64()?;
        if size != mapping.size() {
            info(size)?;
            mapping.resize(size).map_err(|error| Error::Other(format!("taking {size} bytes: {error}")))?;
        }
        mapping.clear(0, size);
        loop {
            let index = state.u64()?;
            if index == u64::MAX {
                return Ok(());
            }
            let page = state.bytes(PAGE)?;
            let Some(position) = index.checked_mul(PAGE as u64).filter(|position| *position < size) else {
                return Err(state.invalid("a page lies outside the disk"));
            };
            if page.len() as u64 > size - position {
                return Err(state.invalid("a page reaches over the disk's end"));
            }
            // SAFETY: the page is a slice, and inside the disk.
            unsafe { mapping.write(position, page.as_ptr(), page.len()) };
        }
    }
}

impl Memory {
    fn mapping(&self) -> MutexGuard<'_, Mapping> {
        self.mapping.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn carry_out(mapping: &mut Mapping, operation: &NativeOperation<'_>) -> Result<(), StoreError> {
    let NativeOperation { kind, position, length, vectors, .. } = *operation;
    if position.checked_add(length).is_none_or(|end| end > mapping.size()) {
        return Err(StoreError::OutOfRange);
    }
    match kind {
        OperationKind::Flush => {}
        OperationKind::Discard | OperationKind::WriteZeroes { .. } => mapping.clear(position, length),
        OperationKind::Read | OperationKind::Write => {
            if vectors.iter().map(|vector| vector.length as u64).sum::<u64>() != length {
                return Err(StoreError::OutOfRange);
            }
            let mut position = position;
            for vector in vectors {
                // SAFETY: inside the disk, as was checked; the operation's vectors are good until it has ended.
                unsafe {
                    if kind == OperationKind::Read {
                        mapping.read(position, vector.base, vector.length);
                    } else {
                        mapping.write(position, vector.base, vector.length);
                    }
                }
                position += vector.length as u64;
            }
        }
    }
    Ok(())
}

fn info(size: u64) -> Result<StoreInfo> {
    if size == 0 || !size.is_multiple_of(512) {
        return Err(Error::Invalid(format!(
            "`size` is {size}, but must be a multiple of 512 and not 0, such as 64 MiB"
        )));
    }
    Ok(StoreInfo { discard: true, write_zeroes: true, optimal_size: 4096, ..StoreInfo::new(size) })
}
