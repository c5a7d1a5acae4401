//! Backing stores: the traits, and the handles and calls that a store has of its host.
//!
//! A store keeps blocks of bytes for whoever asks: a virtual disk in a file, behind a network, encrypted, or made up. There are two ways to write one:
//!
//! - [`Store`] works on copies of the data. It builds as a component and as a native plugin, and stands on its configuration, on [`Lower`] stores that the administrator
//!   named, and on [`connect`]ions to hosts that the administrator granted.
//! - [`NativeStore`] is native only: it begins operations on the very memory that the data is in, and ends them later from any thread.
//!
//! ```
//! use tenon_sdk::store::{Config, Lower, Result, Store, StoreError, StoreInfo};
//!
//! /// Reads as zeroes; what is written is gone.
//! struct Null;
//!
//! impl Store for Null {
//!     fn open(config: &Config, _lower: Vec<Lower>) -> Result<(Self, StoreInfo)> {
//!         Ok((Self, StoreInfo::new(config.size("size")?.unwrap_or(1 << 30))))
//!     }
//!     fn read(&mut self, _position: u64, into: &mut [u8]) -> Result<(), StoreError> {
//!         into.fill(0);
//!         Ok(())
//!     }
//!     fn write(&mut self, _position: u64, _bytes: &[u8]) -> Result<(), StoreError> {
//!         Ok(())
//!     }
//!     fn flush(&mut self) -> Result<(), StoreError> {
//!         Ok(())
//!     }
//! }
//!
//! tenon_sdk::export_store!(Null);
//! # fn main() {}
//! ```
//!
//! Handles and free functions work during a call from the host; each interface that a plugin uses shows in its component as one import, which is
//! one permission:
//!
//! | used | permission |
//! | --- | --- |
//! | [`error!`], [`warn!`], [`info!`], [`debug!`], [`trace!`], [`log`] | `log` |
//! | [`now`], [`wait`] | `time` |
//! | [`random`] | `entropy` |
//! | [`Lower`] | `lower-stores` |
//! | [`connect`], [`Connection`] | `connections` |

use std::fmt;

#[cfg(target_arch = "wasm32")]
#[doc(hidden)]
pub mod component;
#[cfg(not(target_arch = "wasm32"))]
pub mod hosted;
#[cfg(not(target_arch = "wasm32"))]
#[doc(hidden)]
pub mod native;

#[cfg(target_arch = "wasm32")]
use component as sys;
#[cfg(not(target_arch = "wasm32"))]
use hosted as sys;

#[cfg(not(target_arch = "wasm32"))]
pub use native::direct::{Completions, NativeOperation, NativeStore, OperationKind};

pub use tenon_abi::{ConnectionError, DeviceError as Error, IoVec, Level, SavedState, StoreError, StoreInfo};

pub use crate::config::Config;
pub use crate::state::{Decoder, Encoder};
pub use crate::{
    store_debug as debug, store_error as error, store_info as info, store_trace as trace, store_warn as warn,
};

/// What a store's functions return, but for those that carry out operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The most bytes that one read or write moves.
pub const MOST: u64 = 1 << 20;

/// A store that works on copies. The host makes one call at a time, on the instance's own thread; an operation's range is inside the store and aligned to its blocks.
///
/// A panic ends this instance and nothing else: the host makes a new one, opens it, restores the last saved state and gives it the unfinished operations again.
pub trait Store: Sized + Send + 'static {
    /// The schema that [`Store::save`] writes, to be raised whenever the layout of the state changes. It is also `[state] schema` in `plugin.toml`.
    const SCHEMA: u32 = 1;

    /// Opens the store, with the stores that it stands on, in the order in which the administrator named them. The host calls it once, before anything else.
    ///
    /// # Errors
    /// The configuration is not one that the store accepts, there are too many or too few lower stores, or what it finds in them is damaged.
    fn open(config: &Config, lower: Vec<Lower>) -> Result<(Self, StoreInfo)>;

    /// Fills `into` with the bytes at `position`.
    ///
    /// # Errors
    /// They cannot be read. What `into` holds then does not matter.
    fn read(&mut self, position: u64, into: &mut [u8]) -> Result<(), StoreError>;

    /// Writes bytes at `position`. They need not be durable before a [`Store::flush`].
    ///
    /// # Errors
    /// They were not written, or not all of them.
    fn write(&mut self, position: u64, bytes: &[u8]) -> Result<(), StoreError>;

    /// Makes everything durable whose write was reported as done before.
    ///
    /// # Errors
    /// It is not durable. Every later flush fails, too, until what was lost has been written again or the store was opened anew: a failed flush is never
    /// made up for by one that had nothing to do.
    fn flush(&mut self) -> Result<(), StoreError>;

    /// Gives the space of a range back; it then reads as anything. Called only when [`StoreInfo::discard`] says so.
    ///
    /// # Errors
    /// It cannot.
    fn discard(&mut self, position: u64, length: u64) -> Result<(), StoreError> {
        let _ = (position, length);
        Err(StoreError::Unsupported)
    }

    /// Makes a range read as zeroes; with `unmap`, space may be given back. Without this method, zeroes are written.
    ///
    /// # Errors
    /// The range does not read as zeroes, or not all of it.
    fn write_zeroes(&mut self, position: u64, length: u64, unmap: bool) -> Result<(), StoreError> {
        let _ = unmap;
        let zeroes = vec![0; size(length.min(MOST))];
        let mut done = 0;
        while done < length {
            let piece = (length - done).min(MOST);
            self.write(position + done, &zeroes[..size(piece)])?;
            done += piece;
        }
        Ok(())
    }

    /// Carries out many operations, which are independent of each other, but that a flush covers what earlier calls reported as done. The outcomes come in the order of the operations; that of
    /// a read has its bytes, every other an empty vector. At most 256 operations and 4 MiB of data. Without this method, the methods above are called one by one.
    ///
    /// A filter over a lower store passes the whole batch down in one [`Lower::submit`], so that the lower store can work on all of it at the same time.
    fn submit(&mut self, operations: Vec<Operation>) -> Vec<Result<Vec<u8>, StoreError>> {
        operations.into_iter().map(|operation| carry_out(self, operation)).collect()
    }

    /// Changes the length. No operation is under way. Gives the new description.
    ///
    /// # Errors
    /// The store cannot have this length. It is as it was.
    fn resize(&mut self, size: u64) -> Result<StoreInfo> {
        let _ = size;
        Err(Error::Unsupported("this store cannot change its length".into()))
    }

    /// Closes the store in good order: everything is durable when it returns. No call follows.
    ///
    /// # Errors
    /// Something may be lost.
    fn close(&mut self) -> Result<()> {
        Ok(self.flush()?)
    }

    /// Writes the state that is not in the lower stores, from which [`Store::restore`] makes an equal store; changes nothing.
    ///
    /// # Errors
    /// The store cannot be saved now.
    fn save(&self, state: &mut Encoder) -> Result<()> {
        let _ = state;
        Ok(())
    }

    /// Takes over a saved state, after [`Store::open`] and before any operation. `state` may come from an older version ([`Decoder::schema`]); newer ones were refused
    /// before this call, and bytes left over are refused after it.
    ///
    /// # Errors
    /// The state cannot be read. The host then drops the instance.
    fn restore(&mut self, state: &mut Decoder<'_>) -> Result<()> {
        let _ = state;
        Ok(())
    }
}

/// One operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Gives the bytes of a range, of at most 1 MiB.
    Read {
        /// The first byte.
        position: u64,
        /// The length in bytes.
        length: u64,
    },
    /// Writes at most 1 MiB.
    Write {
        /// The first byte in the store.
        position: u64,
        /// The bytes.
        data: Vec<u8>,
    },
    /// Makes everything durable whose write was reported as done before.
    Flush,
    /// Gives the space of a range back; it then reads as anything.
    Discard {
        /// The first byte.
        position: u64,
        /// The length in bytes.
        length: u64,
    },
    /// Makes a range read as zeroes.
    WriteZeroes {
        /// The first byte.
        position: u64,
        /// The length in bytes.
        length: u64,
        /// Space may be given back.
        unmap: bool,
    },
}

/// Carries out one operation by the method that is for it.
fn carry_out<S: Store>(store: &mut S, operation: Operation) -> Result<Vec<u8>, StoreError> {
    match operation {
        Operation::Read { position, length } => {
            let mut data = vec![0; size(length)];
            store.read(position, &mut data)?;
            return Ok(data);
        }
        Operation::Write { position, data } => store.write(position, &data)?,
        Operation::Flush => store.flush()?,
        Operation::Discard { position, length } => store.discard(position, length)?,
        Operation::WriteZeroes { position, length, unmap } => store.write_zeroes(position, length, unmap)?,
    }
    Ok(Vec::new())
}

/// Has a store carry out operations, as the host does: there is an outcome for each, and a read that gave another number of bytes than asked for has failed.
pub fn submit<S: Store>(store: &mut S, operations: Vec<Operation>) -> Vec<Result<Vec<u8>, StoreError>> {
    let lengths: Vec<u64> = operations
        .iter()
        .map(|operation| if let Operation::Read { length, .. } = operation { *length } else { 0 })
        .collect();
    let outcomes = store.submit(operations);
    let missing = std::iter::repeat_with(|| Err(StoreError::Io));
    let right = |(outcome, length): (Result<Vec<u8>, StoreError>, u64)| {
        outcome.and_then(|data| if data.len() as u64 == length { Ok(data) } else { Err(StoreError::Io) })
    };
    outcomes.into_iter().chain(missing).zip(lengths).map(right).collect()
}

/// A length that fits into memory: operations move at most 1 MiB.
fn size(length: u64) -> usize {
    usize::try_from(length.min(4 * MOST)).unwrap_or(usize::MAX)
}

/// A lower store, which the administrator named.
pub struct Lower(sys::Lower);

impl Lower {
    /// What it is.
    #[must_use]
    pub fn info(&self) -> StoreInfo {
        self.0.info()
    }

    /// Carries out operations, as many at the same time as the lower store can, and waits for all of them. Their order is not kept, but a flush covers only writes of earlier calls. The outcomes come in
    /// the order of the operations; that of a read has its bytes, every other an empty vector.
    #[must_use]
    pub fn submit(&self, operations: &[Operation]) -> Vec<Result<Vec<u8>, StoreError>> {
        if operations.is_empty() { Vec::new() } else { self.0.submit(operations) }
    }

    /// Reads `length` bytes at `position`, in pieces if there are more than an operation moves.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn read(&self, position: u64, length: u64) -> Result<Vec<u8>, StoreError> {
        let pieces: Vec<Operation> = pieces(length)
            .map(|(done, length)| Operation::Read { position: position.saturating_add(done), length })
            .collect();
        let mut data = Vec::new();
        for outcome in self.submit(&pieces) {
            data.extend(outcome?);
        }
        Ok(data)
    }

    /// Writes bytes at `position`, in pieces if there are more than an operation moves.
    ///
    /// # Errors
    /// They were not written, or not all of them.
    pub fn write(&self, position: u64, bytes: &[u8]) -> Result<(), StoreError> {
        let pieces: Vec<Operation> = (0u64..)
            .step_by(size(MOST))
            .zip(bytes.chunks(size(MOST)))
            .map(|(done, piece)| Operation::Write {
                position: position.saturating_add(done),
                data: piece.to_vec(),
            })
            .collect();
        self.submit(&pieces).into_iter().try_for_each(|outcome| outcome.map(drop))
    }

    /// Makes everything durable whose write was reported as done.
    ///
    /// # Errors
    /// It is not durable.
    pub fn flush(&self) -> Result<(), StoreError> {
        self.one(Operation::Flush)
    }

    /// Gives the space of a range back; it then reads as anything.
    ///
    /// # Errors
    /// The lower store cannot.
    pub fn discard(&self, position: u64, length: u64) -> Result<(), StoreError> {
        self.one(Operation::Discard { position, length })
    }

    /// Makes a range read as zeroes; with `unmap`, space may be given back.
    ///
    /// # Errors
    /// The range does not read as zeroes, or not all of it.
    pub fn write_zeroes(&self, position: u64, length: u64, unmap: bool) -> Result<(), StoreError> {
        self.one(Operation::WriteZeroes { position, length, unmap })
    }

    /// Changes the length.
    ///
    /// # Errors
    /// The lower store cannot have this length.
    pub fn resize(&self, size: u64) -> Result<(), StoreError> {
        self.0.resize(size)
    }

    fn one(&self, operation: Operation) -> Result<(), StoreError> {
        self.submit(&[operation]).pop().unwrap_or(Err(StoreError::Io)).map(drop)
    }
}

/// The pieces in which `length` bytes are moved: where each begins, and its length.
fn pieces(length: u64) -> impl Iterator<Item = (u64, u64)> {
    (0..length).step_by(size(MOST)).map(move |done| (done, (length - done).min(MOST)))
}

/// A TCP connection. Dropping it closes it.
pub struct Connection(sys::Connection);

impl Connection {
    /// Sends all of the bytes, at most 1 MiB, waiting at most 30 s.
    ///
    /// # Errors
    /// They were not all sent.
    pub fn send(&mut self, bytes: &[u8]) -> Result<(), ConnectionError> {
        self.0.send(bytes)
    }

    /// Waits for bytes, at most 30 s, and gives at most `max` (up to 1 MiB). Empty at the end of the stream.
    ///
    /// # Errors
    /// Nothing came.
    pub fn receive(&mut self, max: u32) -> Result<Vec<u8>, ConnectionError> {
        self.0.receive(max)
    }
}

/// Connects to a host that the administrator granted, waiting at most 10 s. With `tls`, the host of the plugin speaks TLS on the connection and checks the other side's
/// certificate for this name.
///
/// # Errors
/// There is no connection.
pub fn connect(host: &str, port: u16, tls: bool) -> Result<Connection, ConnectionError> {
    sys::connect(host, port, tls).map(Connection)
}

/// Nanoseconds of a clock that never goes back.
#[must_use]
pub fn now() -> u64 {
    sys::now()
}

/// Waits, at most 10 s. The time does not count against the deadline of the call.
pub fn wait(nanoseconds: u64) {
    sys::wait(nanoseconds);
}

/// Gives `length` random bytes of the host, at most 64 KiB.
#[must_use]
pub fn random(length: u32) -> Vec<u8> {
    sys::random(length)
}

/// Logs one message under the store's name. The macros of this module are the usual way.
pub fn log(level: Level, message: fmt::Arguments<'_>) {
    match message.as_str() {
        Some(text) => sys::log(level, text),
        None => sys::log(level, &message.to_string()),
    }
}

/// Saves a store, as the host does.
///
/// # Errors
/// The store refuses.
pub fn save<S: Store>(store: &S) -> Result<SavedState> {
    crate::state::save(S::SCHEMA, |state| store.save(state))
}

/// Restores a store that was just opened, as the host does: newer schemas, and bytes that the store left, are refused.
///
/// # Errors
/// The state is not one of this store, or is damaged.
pub fn restore<S: Store>(store: &mut S, state: &SavedState) -> Result<()> {
    crate::state::restore(S::SCHEMA, state, |state| store.restore(state))
}

/// Checks what a store says of itself when it is opened or resized, as the host does.
///
/// # Errors
/// It cannot be a store.
pub fn checked(info: StoreInfo) -> Result<StoreInfo> {
    match info.check() {
        Ok(()) => Ok(info),
        Err(text) => Err(Error::Other(text)),
    }
}
