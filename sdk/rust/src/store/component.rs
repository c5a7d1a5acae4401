//! The store as a component: handles are the contract's resources, and the exports call the one store that the component holds.
#![allow(unsafe_code, reason = "generated bindings")]

use std::cell::RefCell;
use std::thread::LocalKey;

use tenon_abi::{ConnectionError, Level, SavedState, StoreError, StoreInfo};

use self::bindings::exports::tenon::store::store as exports;
use self::bindings::tenon::store as imports;
use super::{Config, Error, Operation, Store};

/// What `wit-bindgen` makes of the contract. It is kept as a file, so that a plugin's build need not make it; a test says when it is out of date.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, clippy::restriction, reason = "generated code")]
#[rustfmt::skip]
pub mod bindings;

pub(super) struct Lower(imports::lower_stores::Lower);

impl Lower {
    pub(super) fn info(&self) -> StoreInfo {
        self.0.info().into()
    }

    pub(super) fn submit(&self, operations: &[Operation]) -> Vec<Result<Vec<u8>, StoreError>> {
        let operations: Vec<exports::Operation> = operations.iter().cloned().map(Into::into).collect();
        let outcomes = self.0.submit(&operations);
        outcomes.into_iter().map(|outcome| outcome.map_err(Into::into)).collect()
    }

    pub(super) fn resize(&self, size: u64) -> Result<(), StoreError> {
        Ok(self.0.resize(size)?)
    }
}

pub(super) struct Connection(imports::connections::Connection);

impl Connection {
    pub(super) fn send(&self, bytes: &[u8]) -> Result<(), ConnectionError> {
        Ok(self.0.send(bytes)?)
    }

    pub(super) fn receive(&self, max: u32) -> Result<Vec<u8>, ConnectionError> {
        Ok(self.0.receive(max)?)
    }
}

pub(super) fn connect(host: &str, port: u16, tls: bool) -> Result<Connection, ConnectionError> {
    Ok(Connection(imports::connections::connect(host, port, tls)?))
}

pub(super) fn now() -> u64 {
    imports::time::now()
}

pub(super) fn wait(nanoseconds: u64) {
    imports::time::wait(nanoseconds);
}

pub(super) fn random(length: u32) -> Vec<u8> {
    imports::entropy::random(length)
}

pub(super) fn log(level: Level, message: &str) {
    use imports::log::Level as Wit;
    let level = match level {
        Level::Error => Wit::Error,
        Level::Warn => Wit::Warn,
        Level::Info => Wit::Info,
        Level::Debug => Wit::Debug,
        Level::Trace => Wit::Trace,
    };
    imports::log::log(level, message);
}

/// The component's store.
pub struct Slot<S>(Option<S>);

impl<S> Slot<S> {
    /// No store yet.
    #[must_use]
    pub const fn new() -> RefCell<Self> {
        RefCell::new(Self(None))
    }
}

/// A plugin that exports a store. [`crate::export_store!`] implements it.
pub trait Exported {
    /// The store.
    type Store: Store;
    /// Where it lives.
    fn slot() -> &'static LocalKey<RefCell<Slot<Self::Store>>>;
}

/// Calls the store. The host opens it before it calls anything else.
fn with<E: Exported, R>(call: impl FnOnce(&mut E::Store) -> R) -> R {
    E::slot()
        .with_borrow_mut(|slot| call(slot.0.as_mut().expect("the host opens a store before it calls it")))
}

impl<E: Exported> exports::Guest for E {
    fn open(
        config: Vec<exports::Setting>,
        lower: Vec<exports::Lower>,
    ) -> Result<exports::StoreInfo, exports::ErrorCode> {
        let config = Config::new(config.into_iter().map(|setting| (setting.key, setting.value)));
        let lower = lower.into_iter().map(|lower| super::Lower(Lower(lower))).collect();
        let (store, info) = E::Store::open(&config, lower)?;
        let info = super::checked(info)?;
        E::slot().with_borrow_mut(|slot| slot.0 = Some(store));
        Ok(info.into())
    }

    fn submit(operations: Vec<exports::Operation>) -> Vec<Result<Vec<u8>, exports::StoreError>> {
        let operations = operations.into_iter().map(Into::into).collect();
        let outcomes = with::<E, _>(|store| super::submit(store, operations));
        outcomes.into_iter().map(|outcome| outcome.map_err(Into::into)).collect()
    }

    fn resize(size: u64) -> Result<exports::StoreInfo, exports::ErrorCode> {
        Ok(with::<E, _>(|store| store.resize(size)).and_then(super::checked)?.into())
    }

    fn close() -> Result<(), exports::ErrorCode> {
        Ok(with::<E, _>(Store::close)?)
    }

    fn save() -> Result<exports::SavedState, exports::ErrorCode> {
        let SavedState { schema, data } = with::<E, _>(|store| super::save(store))?;
        Ok(exports::SavedState { schema, data })
    }

    fn restore(state: exports::SavedState) -> Result<(), exports::ErrorCode> {
        let exports::SavedState { schema, data } = state;
        Ok(with::<E, _>(|store| super::restore(store, &SavedState { schema, data }))?)
    }
}

impl From<Error> for exports::ErrorCode {
    fn from(error: Error) -> Self {
        match error {
            Error::Invalid(text) => Self::Invalid(text),
            Error::Unsupported(text) => Self::Unsupported(text),
            Error::Schema(text) => Self::Schema(text),
            Error::Other(text) => Self::Other(text),
        }
    }
}

impl From<exports::StoreInfo> for StoreInfo {
    fn from(info: exports::StoreInfo) -> Self {
        let exports::StoreInfo { size, block_size, optimal_size, read_only, discard, write_zeroes, identity } =
            info;
        Self { size, block_size, optimal_size, read_only, discard, write_zeroes, identity }
    }
}

impl From<StoreInfo> for exports::StoreInfo {
    fn from(info: StoreInfo) -> Self {
        let StoreInfo { size, block_size, optimal_size, read_only, discard, write_zeroes, identity } = info;
        Self { size, block_size, optimal_size, read_only, discard, write_zeroes, identity }
    }
}

impl From<exports::StoreError> for StoreError {
    fn from(error: exports::StoreError) -> Self {
        use exports::StoreError as Wit;
        match error {
            Wit::OutOfRange => Self::OutOfRange,
            Wit::ReadOnly => Self::ReadOnly,
            Wit::NoSpace => Self::NoSpace,
            Wit::Unsupported => Self::Unsupported,
            Wit::Io => Self::Io,
        }
    }
}

impl From<StoreError> for exports::StoreError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::OutOfRange => Self::OutOfRange,
            StoreError::ReadOnly => Self::ReadOnly,
            StoreError::NoSpace => Self::NoSpace,
            StoreError::Unsupported => Self::Unsupported,
            StoreError::Io => Self::Io,
        }
    }
}

impl From<imports::connections::ConnectionError> for ConnectionError {
    fn from(error: imports::connections::ConnectionError) -> Self {
        use imports::connections::ConnectionError as Wit;
        match error {
            Wit::NotGranted => Self::NotGranted,
            Wit::Unreachable(text) => Self::Unreachable(text),
            Wit::Closed => Self::Closed,
            Wit::TimedOut => Self::TimedOut,
        }
    }
}

impl From<exports::Operation> for Operation {
    fn from(operation: exports::Operation) -> Self {
        use exports::Operation as Wit;
        match operation {
            Wit::Read(extent) => Self::Read { position: extent.position, length: extent.length },
            Wit::Write(write) => Self::Write { position: write.position, data: write.data },
            Wit::Flush => Self::Flush,
            Wit::Discard(extent) => Self::Discard { position: extent.position, length: extent.length },
            Wit::WriteZeroes(zero) => {
                Self::WriteZeroes { position: zero.position, length: zero.length, unmap: zero.unmap }
            }
        }
    }
}

impl From<Operation> for exports::Operation {
    fn from(operation: Operation) -> Self {
        use imports::types::{Extent, WriteOperation, ZeroOperation};
        match operation {
            Operation::Read { position, length } => Self::Read(Extent { position, length }),
            Operation::Write { position, data } => Self::Write(WriteOperation { position, data }),
            Operation::Flush => Self::Flush,
            Operation::Discard { position, length } => Self::Discard(Extent { position, length }),
            Operation::WriteZeroes { position, length, unmap } => {
                Self::WriteZeroes(ZeroOperation { position, length, unmap })
            }
        }
    }
}
