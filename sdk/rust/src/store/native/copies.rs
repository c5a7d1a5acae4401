//! A [`Store`] behind the native table: data is copied out of and into the vectors, and every operation has ended when `submit` returns.

use tenon_abi::{SavedState, StoreError, StoreInfo, StoreOperation};

use super::direct::NativeOperation;
use super::{Backend, Remote};
use crate::store::{Config, MOST, Operation, OperationKind, Result, Store, hosted};

pub(super) struct Copies<S> {
    store: S,
    remote: Remote,
}

impl<S: Store> Backend for Copies<S> {
    fn open(config: &Config, lower: u32, remote: Remote) -> Result<(Self, StoreInfo)> {
        let (store, info) = S::open(config, hosted::lower(lower))?;
        Ok((Self { store, remote }, info))
    }

    unsafe fn submit(&mut self, operations: &[StoreOperation]) {
        // SAFETY: promised by the caller.
        let operations = unsafe { NativeOperation::all(operations) };
        // An operation that a store of copies cannot have is one that the host must not give.
        let (good, bad): (Vec<_>, Vec<_>) = operations.into_iter().partition(|operation| {
            let moves = matches!(operation.kind, OperationKind::Read | OperationKind::Write);
            !moves || operation.length <= 4 * MOST
        });
        for operation in bad {
            self.remote.done(operation.token, Err(StoreError::OutOfRange));
        }
        let copies = good
            .iter()
            .map(|operation| {
                let NativeOperation { position, length, .. } = *operation;
                match operation.kind {
                    OperationKind::Read => Operation::Read { position, length },
                    OperationKind::Write => {
                        // SAFETY: the operation has not ended.
                        Operation::Write { position, data: unsafe { operation.gather() } }
                    }
                    OperationKind::Flush => Operation::Flush,
                    OperationKind::Discard => Operation::Discard { position, length },
                    OperationKind::WriteZeroes { unmap } => {
                        Operation::WriteZeroes { position, length, unmap }
                    }
                }
            })
            .collect();
        let outcomes = crate::store::submit(&mut self.store, copies);
        for (operation, outcome) in good.iter().zip(outcomes) {
            let result = outcome.map(|data| {
                if operation.kind == OperationKind::Read {
                    // SAFETY: the operation has not ended.
                    unsafe { operation.scatter(&data) };
                }
            });
            self.remote.done(operation.token, result);
        }
    }

    fn resize(&mut self, size: u64) -> Result<StoreInfo> {
        self.store.resize(size)
    }

    fn close(&mut self) -> Result<()> {
        self.store.close()
    }

    fn save(&self) -> Result<SavedState> {
        crate::store::save(&self.store)
    }

    fn restore(&mut self, state: &SavedState) -> Result<()> {
        crate::store::restore(&mut self.store, state)
    }
}
