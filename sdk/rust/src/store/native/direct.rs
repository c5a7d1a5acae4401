//! Stores that work on the data itself: operations begin in one call and end later, from any thread.

use std::sync::{Arc, RwLock};

use tenon_abi::{IoVec, Level, SavedState, StoreError, StoreInfo, StoreOperation};

use super::{Backend, Remote};
use crate::native::slice;
use crate::store::hosted::Host;
use crate::store::{Config, Decoder, Encoder, Error, Result};

/// A native store: data moves straight between the buffers of an operation, which are guest memory most often, and the medium.
///
/// `open`, `submit`, `resize`, `close`, `save` and `restore` are called from one thread at a time, with several operations under way at once. When the store is dropped, operations may be
/// under way, too: it waits for them, or cancels them, so that none touches its buffers any more when `drop` returns. A panic ends the instance.
pub trait NativeStore: Send + Sync + Sized + 'static {
    /// The schema that [`NativeStore::save`] writes, to be raised whenever the layout of the state changes.
    const SCHEMA: u32 = 1;

    /// Opens the store. The host calls it once, before anything else.
    ///
    /// # Errors
    /// The configuration is not one that the store accepts, or its medium cannot be used.
    fn open(config: &Config, completions: Completions) -> Result<(Self, StoreInfo)>;

    /// Begins operations, which are independent of each other, but that a flush covers what was reported as done before. [`Completions::done`] is called once for each when it has ended, from
    /// any thread, also from within this call. The host has checked that an operation's range is inside the store and aligned to its blocks.
    fn submit(&self, operations: &[NativeOperation<'_>]);

    /// Changes the length. No operation is under way. Gives the new description.
    ///
    /// # Errors
    /// The store cannot have this length. It is as it was.
    fn resize(&self, size: u64) -> Result<StoreInfo> {
        let _ = size;
        Err(Error::Unsupported("this store cannot change its length".into()))
    }

    /// Closes the store in good order: everything is durable when it returns. No operation is under way, and no call follows.
    ///
    /// # Errors
    /// Something may be lost.
    fn close(&self) -> Result<()>;

    /// Writes the state that is not on the medium; changes nothing.
    ///
    /// # Errors
    /// The store cannot be saved now.
    fn save(&self, state: &mut Encoder) -> Result<()> {
        let _ = state;
        Ok(())
    }

    /// Takes over a saved state, after [`NativeStore::open`].
    ///
    /// # Errors
    /// The state cannot be read. The host then drops the instance.
    fn restore(&self, state: &mut Decoder<'_>) -> Result<()> {
        let _ = state;
        Ok(())
    }
}

/// Where a store says that operations have ended. Clones say it to the same host; what is said after the store was dropped goes nowhere.
#[derive(Clone)]
pub struct Completions(Arc<Line>);

struct Line {
    remote: Remote,
    /// The host listens. Held for reading while it is spoken to.
    open: RwLock<bool>,
}

impl Completions {
    fn new(remote: Remote) -> Self {
        Self(Arc::new(Line { remote, open: RwLock::new(true) }))
    }

    /// The operation of this token has ended. Its buffers are the host's again. From any thread, once for each operation.
    pub fn done(&self, token: u64, result: Result<(), StoreError>) {
        self.speak(|remote| remote.done(token, result));
    }

    /// Logs one message under the store's name. From any thread; during a call from the host, the macros of [`crate::store`] are the usual way.
    pub fn log(&self, level: Level, message: &str) {
        self.speak(|remote| remote.log(level, message));
    }

    fn speak(&self, say: impl FnOnce(&Remote)) {
        // The lock holds no data that a panic could leave half done.
        let open = self.0.open.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        if *open {
            say(&self.0.remote);
        }
    }

    /// Waits until nobody speaks, and lets nobody speak any more.
    fn hang_up(&self) {
        *self.0.open.write().unwrap_or_else(std::sync::PoisonError::into_inner) = false;
    }
}

/// What an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OperationKind {
    /// Fills the vectors with the bytes at the position.
    Read,
    /// Writes the bytes of the vectors to the position.
    Write,
    /// Makes everything durable whose write was reported as done before.
    Flush,
    /// Gives the space of the range back; it then reads as anything.
    Discard,
    /// Makes the range read as zeroes.
    WriteZeroes {
        /// Space may be given back.
        unmap: bool,
    },
}

/// An operation that begins. Only hosts make operations, by [`NativeOperation::all`]: the safety of the methods below stands on what they promise there.
#[derive(Debug)]
#[non_exhaustive]
pub struct NativeOperation<'a> {
    /// The operation's name, for [`Completions::done`].
    pub token: u64,
    /// What it does.
    pub kind: OperationKind,
    /// The first byte in the store; 0 for a flush.
    pub position: u64,
    /// The length in bytes: the sum of the vectors' for reads and writes, 0 for a flush.
    pub length: u64,
    /// Where the data is, for reads and writes. The vectors, and what they point to, are good until the operation has ended, which may be long after `'a`: a store that goes on later keeps
    /// copies, or the pointer. Guest memory changes at any time; no Rust reference to it may be made.
    pub vectors: &'a [IoVec],
}

impl<'a> NativeOperation<'a> {
    /// The operations of a table call.
    ///
    /// # Safety
    /// The vectors are good until the operations have ended, and nobody makes Rust references to what they point to.
    #[must_use]
    pub unsafe fn all(operations: &'a [StoreOperation]) -> Vec<Self> {
        operations
            .iter()
            .map(|operation| NativeOperation {
                token: operation.token,
                kind: match operation.kind {
                    StoreOperation::READ => OperationKind::Read,
                    StoreOperation::WRITE => OperationKind::Write,
                    StoreOperation::DISCARD => OperationKind::Discard,
                    StoreOperation::WRITE_ZEROES => {
                        OperationKind::WriteZeroes { unmap: operation.flags & StoreOperation::UNMAP != 0 }
                    }
                    // The tables know no others; a flush does no harm.
                    _ => OperationKind::Flush,
                },
                position: operation.position,
                length: operation.length,
                // SAFETY: promised by the caller; operations have far fewer vectors than a `u32` counts.
                vectors: unsafe {
                    slice(operation.vectors, u32::try_from(operation.vector_count).unwrap_or(0))
                },
            })
            .collect()
    }

    /// Copies the bytes of the vectors, one vector after the other.
    ///
    /// # Safety
    /// The operation has not ended: [`Completions::done`] was not called with its token.
    #[must_use]
    pub unsafe fn gather(&self) -> Vec<u8> {
        let mut data: Vec<u8> = Vec::with_capacity(self.vectors.iter().map(|vector| vector.length).sum());
        for vector in self.vectors {
            let start = data.len();
            // SAFETY: the operation's vectors are good until it has ended; the new part of `data` has room, and was written when it becomes part of the vector.
            // What is copied may change meanwhile, which makes the copy any mixture of old and new bytes, and nothing else.
            unsafe {
                std::ptr::copy_nonoverlapping(vector.base, data.as_mut_ptr().add(start), vector.length);
                data.set_len(start + vector.length);
            }
        }
        data
    }

    /// Copies `data` into the vectors, one vector after the other, as far as there is room.
    ///
    /// # Safety
    /// As [`NativeOperation::gather`].
    pub unsafe fn scatter(&self, mut data: &[u8]) {
        for vector in self.vectors {
            let (part, rest) = data.split_at(vector.length.min(data.len()));
            // SAFETY: the operation's vectors are good until it has ended.
            unsafe { std::ptr::copy_nonoverlapping(part.as_ptr(), vector.base, part.len()) };
            data = rest;
        }
    }
}

pub(super) struct Direct<S> {
    /// Dropped by hand, before the line to the host is cut.
    store: Option<S>,
    completions: Completions,
}

impl<S: NativeStore> Direct<S> {
    fn store(&self) -> &S {
        self.store.as_ref().expect("the store is there until it is dropped")
    }
}

impl<S> Drop for Direct<S> {
    fn drop(&mut self) {
        drop(self.store.take());
        self.completions.hang_up();
    }
}

impl<S: NativeStore> Backend for Direct<S> {
    fn open(config: &Config, _lower: u32, remote: Remote) -> Result<(Self, StoreInfo)> {
        let completions = Completions::new(remote);
        // The line is cut also when the store is refused, but has left clones.
        let mut direct = Self { store: None, completions: completions.clone() };
        let (store, info) = S::open(config, completions)?;
        direct.store = Some(store);
        Ok((direct, info))
    }

    unsafe fn submit(&mut self, operations: &[StoreOperation]) {
        // SAFETY: promised by the caller.
        self.store().submit(&unsafe { NativeOperation::all(operations) });
    }

    fn resize(&mut self, size: u64) -> Result<StoreInfo> {
        self.store().resize(size)
    }

    fn close(&mut self) -> Result<()> {
        self.store().close()
    }

    fn save(&self) -> Result<SavedState> {
        crate::state::save(S::SCHEMA, |state| self.store().save(state))
    }

    fn restore(&mut self, state: &SavedState) -> Result<()> {
        crate::state::restore(S::SCHEMA, state, |state| self.store().restore(state))
    }
}
