//! A store that is a part of another one: what lies from `start` on, for `length` bytes. A partition of a disk image, say.

use tenon_sdk::store::{
    Config, Error, Lower, Operation, Result, Store, StoreError, StoreInfo,
};

/// The store.
pub struct {{type}} {
    lower: Lower,
    start: u64,
}

tenon_sdk::export_store!({{type}});

impl Store for {{type}} {
    fn open(config: &Config, lower: Vec<Lower>) -> Result<(Self, StoreInfo)> {
        let Ok([lower]) = <[Lower; 1]>::try_from(lower) else {
            return Err(Error::Invalid("this store stands on one other store, such as `file:disk.img`".into()));
        };
        let whole = lower.info();
        let block = u64::from(whole.block_size);
        let start = config.size("start")?.unwrap_or(0);
        let left = whole.size.checked_sub(start).filter(|_| start % block == 0).ok_or_else(|| {
            Error::Invalid(format!("`start` is {start}, but must be a multiple of {block} up to {}", whole.size))
        })?;
        let size = config.size("length")?.unwrap_or(left);
        if size > left || size % block != 0 {
            return Err(Error::Invalid(format!("`length` is {size}, but must be a multiple of {block} up to {left}")));
        }
        Ok((Self { lower, start }, StoreInfo { size, ..whole }))
    }

    fn read(&mut self, position: u64, into: &mut [u8]) -> Result<(), StoreError> {
        into.copy_from_slice(&self.lower.read(self.start + position, into.len() as u64)?);
        Ok(())
    }

    fn write(&mut self, position: u64, bytes: &[u8]) -> Result<(), StoreError> {
        self.lower.write(self.start + position, bytes)
    }

    fn flush(&mut self) -> Result<(), StoreError> {
        self.lower.flush()
    }

    // Without this method the ones above are called one by one. With it, the lower store gets all operations at once.
    fn submit(&mut self, operations: Vec<Operation>) -> Vec<Result<Vec<u8>, StoreError>> {
        let moved: Vec<Operation> = operations.into_iter().map(|operation| self.moved(operation)).collect();
        self.lower.submit(&moved)
    }
}

impl {{type}} {
    /// An operation on the lower store.
    fn moved(&self, mut operation: Operation) -> Operation {
        match &mut operation {
            Operation::Read { position, .. }
            | Operation::Write { position, .. }
            | Operation::Discard { position, .. }
            | Operation::WriteZeroes { position, .. } => *position += self.start,
            Operation::Flush => {}
        }
        operation
    }
}
