//! Backing store: reads as zeroes, and what is written is gone. It measures what everything but a medium costs.
#![allow(unsafe_code, reason = "zeroes go to the buffers of operations, which are guest memory")]

use std::sync::atomic::{AtomicU64, Ordering};

use tenon_sdk::store::{
    Completions, Config, Error, NativeOperation, NativeStore, OperationKind, Result, StoreError, StoreInfo,
};

tenon_sdk::export_native_store!(Null);

/// The plugin's `plugin.toml`, for whoever links it in.
pub const MANIFEST: &str = include_str!("../plugin.toml");

/// Nothing, of a length.
pub struct Null {
    size: AtomicU64,
    completions: Completions,
}

impl NativeStore for Null {
    fn open(config: &Config, completions: Completions) -> Result<(Self, StoreInfo)> {
        let info = info(config.size("size")?.unwrap_or(1 << 30))?;
        Ok((Self { size: AtomicU64::new(info.size), completions }, info))
    }

    fn submit(&self, operations: &[NativeOperation<'_>]) {
        let size = self.size.load(Ordering::Relaxed);
        for operation in operations {
            let end = operation.position.checked_add(operation.length);
            let outcome =
                if end.is_some_and(|end| end <= size) { Ok(()) } else { Err(StoreError::OutOfRange) };
            if outcome.is_ok() && operation.kind == OperationKind::Read {
                for vector in operation.vectors {
                    // SAFETY: the operation's vectors are good until it has ended.
                    unsafe { std::ptr::write_bytes(vector.base, 0, vector.length) };
                }
            }
            self.completions.done(operation.token, outcome);
        }
    }

    fn resize(&self, size: u64) -> Result<StoreInfo> {
        let info = info(size)?;
        self.size.store(size, Ordering::Relaxed);
        Ok(info)
    }

    fn close(&self) -> Result<()> {
        Ok(())
    }
}

fn info(size: u64) -> Result<StoreInfo> {
    if size == 0 || !size.is_multiple_of(512) {
        return Err(Error::Invalid(format!(
            "`size` is {size}, but must be a multiple of 512 and not 0, such as 64 MiB"
        )));
    }
    Ok(StoreInfo { discard: true, write_zeroes: true, optimal_size: 4096, ..StoreInfo::new(size) })
}
