//! What a host offers a native store, on the bench.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tenon_sdk::abi::{Bytes, Sink, Status, StoreHost, StoreOperation, wire};
use tenon_sdk::store::{ConnectionError, Level, Operation, StoreError};

use crate::memory::MemoryStore;
use crate::random::Random;

/// What the host's functions work on. Operations end on any thread.
#[derive(Default)]
pub(super) struct Host {
    pub(super) state: Mutex<State>,
    pub(super) ended: Condvar,
}

#[derive(Default)]
pub(super) struct State {
    pub(super) ended: HashMap<u64, Result<(), StoreError>>,
    /// Operations that ended twice, or never began.
    pub(super) odd: Vec<u64>,
    pub(super) under_way: Vec<u64>,
    pub(super) lower: Vec<MemoryStore>,
    pub(super) log: Vec<(Level, String)>,
    pub(super) panics: Vec<String>,
}

impl Host {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The host's side of the tables.
pub(super) static TABLE: StoreHost = StoreHost {
    size: StoreHost::SIZE,
    log_log,
    time_now,
    time_wait,
    entropy_random,
    lower_info,
    lower_submit,
    lower_resize,
    connection_send,
    connection_receive,
    connections_connect,
    connection_close,
    done,
    panicked,
};

/// The host of a call.
///
/// # Safety
/// `context` is the one of a bench whose instance makes this call.
unsafe fn host<'a>(context: *mut c_void) -> &'a Host {
    // SAFETY: promised by the caller; the host lives as long as the instance.
    unsafe { &*context.cast::<Host>() }
}

// In all of these: the store calls with the context that it was made with, and what it lends lives for the call.

unsafe extern "C" fn log_log(context: *mut c_void, level: u32, message: Bytes<'_>) {
    // SAFETY: see above.
    let (host, message) = unsafe { (host(context), message.as_slice()) };
    host.state().log.push((Level::from_number(level), String::from_utf8_lossy(message).into_owned()));
}

unsafe extern "C" fn time_now(_: *mut c_void) -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    u64::try_from(START.get_or_init(Instant::now).elapsed().as_nanos()).unwrap_or(u64::MAX)
}

unsafe extern "C" fn time_wait(_: *mut c_void, nanoseconds: u64) {
    std::thread::sleep(Duration::from_nanos(nanoseconds.min(10_000_000_000)));
}

unsafe extern "C" fn entropy_random(context: *mut c_void, buffer: *mut u8, length: u32) {
    let bytes = Random::new(context as u64).bytes(length as usize);
    // SAFETY: the buffer has room for `length` bytes.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), buffer, bytes.len()) }
}

unsafe extern "C" fn lower_info(context: *mut c_void, lower: u32, output: Sink) {
    // SAFETY: see above.
    let info = unsafe { host(context) }.state().lower.get(lower as usize).map(|store| store.info().clone());
    if let Some(info) = info {
        // SAFETY: the sink came in this call.
        unsafe { output.put(&wire::encode_store_info(&info)) }
    }
}

unsafe extern "C" fn lower_submit(
    context: *mut c_void,
    lower: u32,
    operations: *const StoreOperation,
    count: u32,
    errors: *mut u32,
) {
    // SAFETY: see above; there are `count` operations, and room for as many numbers.
    let (host, operations, errors) = unsafe {
        let count = count as usize;
        (
            host(context),
            std::slice::from_raw_parts(operations, count),
            std::slice::from_raw_parts_mut(errors, count),
        )
    };
    let mut state = host.state();
    let Some(store) = state.lower.get_mut(lower as usize) else { return errors.fill(StoreError::Io as u32) };
    // SAFETY: the operations live for this call, which ends them all.
    let operations = unsafe { tenon_sdk::store::NativeOperation::all(operations) };
    for (operation, error) in operations.iter().zip(errors) {
        use tenon_sdk::store::OperationKind as Kind;
        let (position, length) = (operation.position, operation.length);
        let copy = match operation.kind {
            Kind::Read => Operation::Read { position, length },
            // SAFETY: the operation has not ended.
            Kind::Write => Operation::Write { position, data: unsafe { operation.gather() } },
            Kind::Flush => Operation::Flush,
            Kind::Discard => Operation::Discard { position, length },
            Kind::WriteZeroes { unmap } => Operation::WriteZeroes { position, length, unmap },
        };
        *error = StoreError::number_of(store.submit(&copy).map(|data| {
            // SAFETY: the operation has not ended.
            unsafe { operation.scatter(&data) }
        }));
    }
}

unsafe extern "C" fn lower_resize(context: *mut c_void, lower: u32, size: u64) -> u32 {
    // SAFETY: see above.
    let mut state = unsafe { host(context) }.state();
    let Some(store) = state.lower.get_mut(lower as usize) else { return StoreError::Io as u32 };
    if !size.is_multiple_of(store.info().block_size.into()) {
        return StoreError::OutOfRange as u32;
    }
    store.resize(size);
    0
}

/// Puts a connection's error.
///
/// # Safety
/// The sink came in the call that is running.
unsafe fn refuse(sink: Sink, error: &ConnectionError) -> Status {
    // SAFETY: promised by the caller.
    unsafe { sink.put(&wire::encode_connection_error(error)) };
    Status::REFUSED
}

unsafe extern "C" fn connection_send(_: *mut c_void, _: u32, _: Bytes<'_>, error: Sink) -> Status {
    // SAFETY: the sink came in this call.
    unsafe { refuse(error, &ConnectionError::Closed) }
}

unsafe extern "C" fn connection_receive(
    _: *mut c_void,
    _: u32,
    _: *mut u8,
    _: u32,
    _: *mut u32,
    error: Sink,
) -> Status {
    // SAFETY: the sink came in this call.
    unsafe { refuse(error, &ConnectionError::Closed) }
}

unsafe extern "C" fn connections_connect(
    _: *mut c_void,
    _: Bytes<'_>,
    _: u32,
    _: u32,
    _: *mut u32,
    error: Sink,
) -> Status {
    // SAFETY: the sink came in this call.
    unsafe { refuse(error, &ConnectionError::NotGranted) }
}

unsafe extern "C" fn connection_close(_: *mut c_void, _: u32) {}

unsafe extern "C" fn done(context: *mut c_void, token: u64, error: u32) {
    // SAFETY: see above; this one may come from any thread.
    let host = unsafe { host(context) };
    let mut state = host.state();
    match state.under_way.iter().position(|begun| *begun == token) {
        Some(place) => {
            state.under_way.swap_remove(place);
            state.ended.insert(token, StoreError::result(error));
        }
        None => state.odd.push(token),
    }
    host.ended.notify_all();
}

unsafe extern "C" fn panicked(context: *mut c_void, message: Bytes<'_>) {
    // SAFETY: see above.
    let (host, message) = unsafe { (host(context), message.as_slice()) };
    host.state().panics.push(String::from_utf8_lossy(message).into_owned());
}
