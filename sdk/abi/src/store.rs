//! `tenon:store`: its records, and the two tables of a native store.
//!
//! A native store begins operations and says later, from any thread, that each has ended; data moves straight between the buffers of an operation
//! (guest memory, most often) and the medium. A store that was written against copies runs behind the same table: its operations have all ended when
//! `submit` returns.

use std::ffi::c_void;
use std::fmt;

use crate::{Bytes, DeviceError, Sink, Status};

/// What a store is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoreInfo {
    /// The length in bytes: a multiple of `block_size`.
    pub size: u64,
    /// The smallest unit of reads and writes in bytes: a power of two from 512 to 64 KiB.
    pub block_size: u32,
    /// The unit in which writes are cheap, in bytes: a multiple of `block_size`.
    pub optimal_size: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// `discard` gives space back.
    pub discard: bool,
    /// `write_zeroes` is cheaper than writing zeroes.
    pub write_zeroes: bool,
    /// Text that identifies the store, such as a serial number: at most 20 ASCII characters, or empty.
    pub identity: String,
}

impl StoreInfo {
    /// A store of `size` bytes in blocks of 512 that can be read and written, and no more.
    #[must_use]
    pub fn new(size: u64) -> Self {
        Self { size, block_size: 512, optimal_size: 512, ..Self::default() }
    }

    /// Whether a store can be what this says; the text tells what is wrong.
    ///
    /// # Errors
    /// It cannot.
    pub fn check(&self) -> Result<(), String> {
        let Self { size, block_size, optimal_size, identity, .. } = self;
        if !block_size.is_power_of_two() || !(512..=65536).contains(block_size) {
            return Err(format!(
                "the block size is {block_size}, but must be a power of two from 512 to 65536"
            ));
        }
        if !size.is_multiple_of(u64::from(*block_size)) {
            return Err(format!(
                "the size is {size}, but must be a multiple of the block size, {block_size}"
            ));
        }
        if *optimal_size == 0 || !optimal_size.is_multiple_of(*block_size) {
            return Err(format!(
                "the optimal size is {optimal_size}, but must be a multiple of the block size, {block_size}"
            ));
        }
        if identity.len() > 20 || !identity.is_ascii() {
            return Err(format!("the identity is `{identity}`, but must be 20 ASCII characters at most"));
        }
        Ok(())
    }
}

/// Why an operation on a store failed.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StoreError {
    /// It leaves the store, or is not aligned to its blocks, or is longer than the request.
    OutOfRange = 1,
    /// The store is read-only.
    ReadOnly = 2,
    /// There is no space.
    NoSpace = 3,
    /// The store cannot do this.
    Unsupported = 4,
    /// The medium, the network, a lower store or the plugin failed. What was written may or may not be there.
    Io = 5,
}

impl StoreError {
    /// The outcome of this number: 0 is success; numbers that are none are [`StoreError::Io`].
    ///
    /// # Errors
    /// The number is not 0.
    pub const fn result(number: u32) -> Result<(), Self> {
        match number {
            0 => Ok(()),
            1 => Err(Self::OutOfRange),
            2 => Err(Self::ReadOnly),
            3 => Err(Self::NoSpace),
            4 => Err(Self::Unsupported),
            _ => Err(Self::Io),
        }
    }

    /// The number of an outcome, as [`StoreError::result`] reads it.
    #[must_use]
    pub const fn number_of(result: Result<(), Self>) -> u32 {
        match result {
            Ok(()) => 0,
            Err(error) => error as u32,
        }
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OutOfRange => "outside the store, or not aligned to its blocks",
            Self::ReadOnly => "the store is read-only",
            Self::NoSpace => "no space left",
            Self::Unsupported => "the store cannot do this",
            Self::Io => "input or output failed",
        })
    }
}

impl std::error::Error for StoreError {}

/// An operation that fails while a store is opened, resized or closed is what that call failed of.
impl From<StoreError> for DeviceError {
    fn from(error: StoreError) -> Self {
        Self::Other(error.to_string())
    }
}

/// Why a connection failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConnectionError {
    /// The administrator has not granted this host and port.
    NotGranted,
    /// Nobody answers, or the name is unknown. The text says more.
    Unreachable(String),
    /// The other side closed it, or it broke.
    Closed,
    /// There was no answer in time.
    TimedOut,
}

impl fmt::Display for ConnectionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotGranted => f.write_str("the administrator has not granted this host and port"),
            Self::Unreachable(text) => write!(f, "unreachable: {text}"),
            Self::Closed => f.write_str("the connection is closed"),
            Self::TimedOut => f.write_str("there was no answer in time"),
        }
    }
}

impl std::error::Error for ConnectionError {}

/// A piece of memory that is not the plugin's own: where an operation's data goes, or comes from. The layout is that of `struct iovec`.
///
/// It may be guest memory, which the guest's processors change at any time, also during the operation: it is read and written through the pointer, and
/// no Rust reference to it is ever made.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct IoVec {
    /// The first byte.
    pub base: *mut u8,
    /// The length in bytes.
    pub length: usize,
}

// SAFETY: an address and a length; who uses it must hold the operation that it belongs to, on whatever thread.
unsafe impl Send for IoVec {}
// SAFETY: as above.
unsafe impl Sync for IoVec {}

/// One operation on a store.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct StoreOperation {
    /// The operation's name, for [`StoreHost::done`]. [`StoreHost::lower_submit`] does not look at it.
    pub token: u64,
    /// One of [`StoreOperation::READ`] to [`StoreOperation::WRITE_ZEROES`].
    pub kind: u32,
    /// [`StoreOperation::UNMAP`], or 0.
    pub flags: u32,
    /// The first byte in the store. 0 for a flush.
    pub position: u64,
    /// The length in bytes: the sum of the vectors' for reads and writes, 0 for a flush.
    pub length: u64,
    /// Where the data is, for reads and writes. The array and what it points to are good until the operation has ended.
    pub vectors: *const IoVec,
    /// How many vectors.
    pub vector_count: usize,
}

impl StoreOperation {
    /// Fills the vectors with the bytes at `position`.
    pub const READ: u32 = 0;
    /// Writes the bytes of the vectors to `position`.
    pub const WRITE: u32 = 1;
    /// Makes everything durable whose write was reported as done before.
    pub const FLUSH: u32 = 2;
    /// Gives the space of a range back.
    pub const DISCARD: u32 = 3;
    /// Makes a range read as zeroes.
    pub const WRITE_ZEROES: u32 = 4;
    /// Flag of [`StoreOperation::WRITE_ZEROES`]: space may be given back.
    pub const UNMAP: u32 = 1;
}

// SAFETY: as for `IoVec`.
unsafe impl Send for StoreOperation {}
// SAFETY: as for `IoVec`.
unsafe impl Sync for StoreOperation {}

table! {
    /// What the host offers a store. Names follow the rule of [`crate::DeviceHost`]; a lower store is its index in the list given to `open`, a connection
    /// the number that `connections_connect` gave. `done` and `log_log` may be called from any thread until `destroy` has returned; everything else during a
    /// call into the instance, on the thread of that call.
    pub struct StoreHost {
        /// Logs one message; `level` is a [`crate::Level`] as number, the message is UTF-8.
        log_log: fn(context: *mut c_void, level: u32, message: Bytes<'_>);
        /// Nanoseconds of a clock that never goes back.
        time_now: fn(context: *mut c_void) -> u64;
        /// Waits.
        time_wait: fn(context: *mut c_void, nanoseconds: u64);
        /// Fills `buffer` with `length` random bytes.
        entropy_random: fn(context: *mut c_void, buffer: *mut u8, length: u32);
        /// The sink gets the encoded [`StoreInfo`] ([`crate::wire::encode_store_info`]).
        lower_info: fn(context: *mut c_void, lower: u32, output: Sink);
        /// Carries out `count` operations and waits for all of them; `errors` has room for as many numbers of [`StoreError::number_of`].
        lower_submit: fn(context: *mut c_void, lower: u32, operations: *const StoreOperation, count: u32, errors: *mut u32);
        /// Changes the length; returns a number of [`StoreError::number_of`].
        lower_resize: fn(context: *mut c_void, lower: u32, size: u64) -> u32;
        /// Sends all of the bytes. The sink gets the encoded error ([`crate::wire::encode_connection_error`]), if any.
        connection_send: fn(context: *mut c_void, connection: u32, bytes: Bytes<'_>, error: Sink) -> Status;
        /// Copies at most `max` bytes that came to `buffer`, which has room for them; how many goes to `received`.
        connection_receive: fn(context: *mut c_void, connection: u32, buffer: *mut u8, max: u32, received: *mut u32, error: Sink) -> Status;
        /// Connects; the name is UTF-8, `tls` 0 or 1. The connection's number goes to `connection`.
        connections_connect: fn(context: *mut c_void, name: Bytes<'_>, port: u32, tls: u32, connection: *mut u32, error: Sink) -> Status;
        /// Not in the WIT, where a connection ends by being dropped: closes a connection.
        connection_close: fn(context: *mut c_void, connection: u32);
        /// Not in the WIT: the operation that was submitted as `token` has ended; `error` is a number of [`StoreError::number_of`]. Its buffers are the
        /// host's again. Called once for each operation, before `submit` returns or later.
        done: fn(context: *mut c_void, token: u64, error: u32);
        /// Not in the WIT: the plugin panicked with this text (UTF-8) in the call that is about to return [`Status::TRAPPED`].
        panicked: fn(context: *mut c_void, message: Bytes<'_>);
    }
}

table! {
    /// What a store does. Each function but `create` takes the instance that `create` returned.
    pub struct StoreTable {
        /// Not in the WIT: makes an instance, or returns null. `host` and `context` are good until `destroy` has returned.
        create: fn(host: *const StoreHost, context: *mut c_void) -> *mut c_void;
        /// Not in the WIT: ends an instance, also one that trapped. When it returns, nothing of the instance touches a buffer or calls the host any more;
        /// operations that were under way may have been carried out or not.
        destroy: fn(instance: *mut c_void);
        /// `config` is encoded settings ([`crate::wire::encode_settings`]), `lower` the number of lower stores; the sink gets the encoded [`StoreInfo`], or the error
        /// ([`crate::wire::encode_device_error`], which stores share).
        open: fn(instance: *mut c_void, config: Bytes<'_>, lower: u32, output: Sink) -> Status;
        /// Begins `count` operations. Each ends by [`StoreHost::done`]; those of an instance that trapped have not all ended.
        submit: fn(instance: *mut c_void, operations: *const StoreOperation, count: u32) -> Status;
        /// The sink gets the encoded [`StoreInfo`], or the error.
        resize: fn(instance: *mut c_void, size: u64, output: Sink) -> Status;
        /// The sink gets the error, if any.
        close: fn(instance: *mut c_void, output: Sink) -> Status;
        /// The schema goes to `schema`, the data to the sink; or the error.
        save: fn(instance: *mut c_void, schema: *mut u32, output: Sink) -> Status;
        /// The sink gets the error, if any.
        restore: fn(instance: *mut c_void, schema: u32, data: Bytes<'_>, output: Sink) -> Status;
    }
}

// Layouts that both sides rely on.
#[cfg(target_pointer_width = "64")]
const _: () = assert!(size_of::<StoreOperation>() == 48 && size_of::<IoVec>() == 16);
