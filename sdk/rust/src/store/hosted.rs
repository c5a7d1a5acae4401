//! Where there is no component around the store: handles are numbers, and calls go to the host that is entered on this thread.
#![allow(unsafe_code, reason = "the host entered on a thread is remembered without its lifetime")]

use std::cell::Cell;

use tenon_abi::{ConnectionError, Level, StoreError, StoreInfo};

use super::Operation;

/// The host of a store that runs in this process: a test bench, or the other side of the native tables. A lower store is its index in the list given to `open`, a connection
/// the number that [`Host::connect`] gave. Functions are called during calls into the store, on the thread of that call. What each of them does
/// is written at [`super::Lower`], [`super::Connection`] and the functions of [`crate::store`].
pub trait Host {
    /// Logs one message.
    fn log(&self, level: Level, message: &str);
    /// Nanoseconds of a clock that never goes back.
    fn now(&self) -> u64;
    /// Waits.
    fn wait(&self, nanoseconds: u64);
    /// Gives random bytes.
    fn random(&self, length: u32) -> Vec<u8>;
    /// What a lower store is.
    fn lower_info(&self, lower: u32) -> StoreInfo;
    /// Carries out operations.
    fn lower_submit(&self, lower: u32, operations: &[Operation]) -> Vec<Result<Vec<u8>, StoreError>>;
    /// Changes a lower store's length.
    fn lower_resize(&self, lower: u32, size: u64) -> Result<(), StoreError>;
    /// Connects.
    fn connect(&self, host: &str, port: u16, tls: bool) -> Result<u32, ConnectionError>;
    /// Sends all of the bytes.
    fn connection_send(&self, connection: u32, bytes: &[u8]) -> Result<(), ConnectionError>;
    /// Gives bytes that came.
    fn connection_receive(&self, connection: u32, max: u32) -> Result<Vec<u8>, ConnectionError>;
    /// Closes a connection.
    fn connection_close(&self, connection: u32);
}

thread_local! {
    /// The host of the store that is being called on this thread.
    static ENTERED: Cell<Option<*const dyn Host>> = const { Cell::new(None) };
}

/// Calls a store: for as long as `call` runs, handles and free functions of this module reach `host`.
pub fn enter<R>(host: &dyn Host, call: impl FnOnce() -> R) -> R {
    struct Leave(Option<*const dyn Host>);
    impl Drop for Leave {
        fn drop(&mut self) {
            ENTERED.set(self.0);
        }
    }
    let host: *const (dyn Host + '_) = host;
    // SAFETY: only the lifetime of the trait object changes; the pointer is forgotten by `Leave` before `host` can end, also when `call` unwinds.
    let host: *const (dyn Host + 'static) = unsafe { std::mem::transmute(host) };
    let _leave = Leave(ENTERED.replace(Some(host)));
    call()
}

fn entered<R>(call: impl FnOnce(&dyn Host) -> R) -> Option<R> {
    // SAFETY: `enter` is still running further up on this thread's stack and borrows the host.
    ENTERED.get().map(|host| call(unsafe { &*host }))
}

fn host<R>(call: impl FnOnce(&dyn Host) -> R) -> R {
    entered(call).unwrap_or_else(|| {
        panic!(
            "a store's handles work during calls from its host only; a test makes these with `tenon_testkit::StoreBench`"
        )
    })
}

pub(super) struct Lower(u32);

impl Lower {
    pub(super) fn info(&self) -> StoreInfo {
        host(|host| host.lower_info(self.0))
    }

    pub(super) fn submit(&self, operations: &[Operation]) -> Vec<Result<Vec<u8>, StoreError>> {
        host(|host| host.lower_submit(self.0, operations))
    }

    pub(super) fn resize(&self, size: u64) -> Result<(), StoreError> {
        host(|host| host.lower_resize(self.0, size))
    }
}

pub(super) struct Connection(u32);

impl Connection {
    pub(super) fn send(&self, bytes: &[u8]) -> Result<(), ConnectionError> {
        host(|host| host.connection_send(self.0, bytes))
    }

    pub(super) fn receive(&self, max: u32) -> Result<Vec<u8>, ConnectionError> {
        host(|host| host.connection_receive(self.0, max))
    }
}

impl Drop for Connection {
    /// A connection that outlives its store is closed by the host.
    fn drop(&mut self) {
        let _ = entered(|host| host.connection_close(self.0));
    }
}

pub(super) fn connect(name: &str, port: u16, tls: bool) -> Result<Connection, ConnectionError> {
    host(|host| host.connect(name, port, tls)).map(Connection)
}

pub(super) fn now() -> u64 {
    host(|host| host.now())
}

pub(super) fn wait(nanoseconds: u64) {
    host(|host| host.wait(nanoseconds));
}

pub(super) fn random(length: u32) -> Vec<u8> {
    host(|host| host.random(length))
}

pub(super) fn log(level: Level, message: &str) {
    host(|host| host.log(level, message));
}

/// The handles of so many lower stores.
#[must_use]
pub fn lower(count: u32) -> Vec<super::Lower> {
    (0..count).map(|n| super::Lower(Lower(n))).collect()
}
