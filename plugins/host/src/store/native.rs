//! A store that is native code: its operations point straight at guest memory, many are under way at once, and it says from any thread which has ended.
//!
//! It is trusted, and its mistakes are made good as far as that is possible: an outcome that was told already changes nothing. One that panics is not
//! opened anew, since nobody knows what it had in memory: every operation fails from there on.
//!
//! Long, for it is one boundary: each function of the table, with what makes the call sound.
#![allow(unsafe_code, reason = "calls through the tables of a native library")]

use std::ffi::c_void;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tenon_abi as abi;
use tenon_abi::{
    Bytes, ConnectionError, IoVec, Sink, Status, StoreError, StoreHost, StoreInfo, StoreOperation,
    StoreTable, wire,
};

use super::component::OpenFailure;
use super::services::{self, SharedLog, StoreServices};
use super::{Data, Medium, OperationKind, Piece, Shared, count};
use crate::fault::Fault;
use crate::native::Native;

/// An operation that the plugin has, and the vectors that it was given.
#[derive(Default)]
struct Slot {
    generation: u32,
    piece: Option<Piece>,
    vectors: Vec<IoVec>,
}

#[derive(Default)]
struct Slots {
    list: Vec<Slot>,
    free: Vec<u32>,
}

/// What the store's host functions find behind their context.
struct Context {
    shared: Arc<Shared>,
    slots: Mutex<Slots>,
    services: Mutex<StoreServices>,
    log: SharedLog,
    panic: Mutex<Option<String>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Context {
    fn slots(&self) -> MutexGuard<'_, Slots> {
        lock(&self.slots)
    }

    /// The operation of this token has ended.
    fn done(&self, token: u64, result: Result<(), StoreError>) {
        let piece = {
            let mut slots = self.slots();
            let (Ok(index), generation) = (u32::try_from(token & 0xffff_ffff), token >> 32) else { return };
            let Some(slot) = slots.list.get_mut(index as usize) else { return };
            if u64::from(slot.generation) != generation {
                return;
            }
            let Some(piece) = slot.piece.take() else { return };
            slot.generation = slot.generation.wrapping_add(1);
            slots.free.push(index);
            piece
        };
        self.end(piece, result);
    }

    fn end(&self, piece: Piece, result: Result<(), StoreError>) {
        let bytes = match piece.data {
            Data::Guest(buffers, offset) => {
                if piece.kind == OperationKind::Read {
                    buffers.written(offset, piece.length);
                }
                Vec::new()
            }
            Data::Host(bytes) => bytes,
            Data::None => Vec::new(),
        };
        self.shared.ended(piece.token, result, bytes);
    }

    fn fail_all(&self) {
        let pieces: Vec<Piece> = {
            let mut slots = self.slots();
            let Slots { list, free } = &mut *slots;
            let taken = (0..).zip(list.iter_mut()).filter_map(|(index, slot)| {
                let piece = slot.piece.take()?;
                slot.generation = slot.generation.wrapping_add(1);
                free.push(index);
                Some(piece)
            });
            taken.collect()
        };
        pieces.into_iter().for_each(|piece| self.end(piece, Err(StoreError::Io)));
    }
}

/// The plugin's instance; null when it was given up.
struct Instance(*mut c_void);

// SAFETY: the ABI lets calls come from different threads, one at a time, which the lock around it ensures.
unsafe impl Send for Instance {}

/// The store as the host sees it.
pub(super) struct NativeStore {
    table: &'static StoreTable,
    instance: Mutex<Instance>,
    /// Freed after the instance.
    context: Arc<Context>,
    /// The table lives in it.
    _native: Arc<Native>,
}

impl NativeStore {
    pub(super) fn open(
        native: &Arc<Native>,
        table: &'static StoreTable,
        settings: &[(String, String)],
        services: StoreServices,
        shared: &Arc<Shared>,
    ) -> Result<(Self, StoreInfo), OpenFailure> {
        let lowers = u32::try_from(services.lowers.len()).unwrap_or(u32::MAX);
        let context = Arc::new(Context {
            shared: shared.clone(),
            slots: Mutex::default(),
            services: Mutex::new(services),
            log: SharedLog::new(),
            panic: Mutex::new(None),
        });
        // SAFETY: the table was checked when it was loaded; the host's table is static, and the context lives until the instance is destroyed, in `drop`.
        let instance =
            unsafe { (table.create)(&raw const STORE_HOST, Arc::as_ptr(&context).cast_mut().cast()) };
        let store =
            Self { table, instance: Mutex::new(Instance(instance)), context, _native: native.clone() };
        if instance.is_null() {
            return Err(OpenFailure::Fault("open", Fault::Trap("it could not make an instance".into())));
        }
        let (config, mut output) = (wire::encode_settings(settings), Vec::new());
        // SAFETY: the instance lives, and what is lent lives past the call.
        let status = unsafe { (table.open)(instance, Bytes::new(&config), lowers, Sink::to(&mut output)) };
        let info = store.info("open", status, &output)?;
        Ok((store, info))
    }

    fn trapped(&self) -> Fault {
        Fault::Trap(lock(&self.context.panic).take().unwrap_or_else(|| "it panicked".into()))
    }

    fn info(&self, call: &'static str, status: Status, output: &[u8]) -> Result<StoreInfo, OpenFailure> {
        self.answer(call, status, output)?;
        let contract = |what| OpenFailure::Fault(call, Fault::Contract(what));
        let info = wire::decode_store_info(output).map_err(|error| contract(error.to_string()))?;
        info.check().map_err(contract)?;
        Ok(info)
    }

    fn answer(&self, call: &'static str, status: Status, output: &[u8]) -> Result<(), OpenFailure> {
        match status {
            Status::OK => Ok(()),
            Status::REFUSED => Err(match wire::decode_device_error(output) {
                Ok(error) => OpenFailure::Refused(call, error),
                Err(error) => OpenFailure::Fault(call, Fault::Contract(error.to_string())),
            }),
            _ => Err(OpenFailure::Fault(call, self.trapped())),
        }
    }

    /// The instance panicked: it goes, and with it everything that was under way.
    fn give_up(&self, instance: &mut Instance) {
        let fault = self.trapped();
        tracing::error!(
            store = self.context.shared.name,
            "the native store has failed and every operation on it fails from here on: {fault}"
        );
        count(&self.context.shared.counters.faults);
        self.destroy(instance);
        self.context.shared.crashed();
        self.context.fail_all();
    }

    fn destroy(&self, instance: &mut Instance) {
        if !instance.0.is_null() {
            // SAFETY: the instance came from `create` and is used no more.
            unsafe { (self.table.destroy)(instance.0) };
            instance.0 = std::ptr::null_mut();
        }
    }
}

impl Medium for NativeStore {
    fn submit(&self, pieces: Vec<Piece>) {
        let mut operations = Vec::with_capacity(pieces.len());
        {
            let mut slots = self.context.slots();
            for mut piece in pieces {
                let index = slots.free.pop().unwrap_or_else(|| {
                    slots.list.push(Slot::default());
                    u32::try_from(slots.list.len() - 1).unwrap_or(u32::MAX)
                });
                let slot = &mut slots.list[index as usize];
                slot.vectors.clear();
                match &mut piece.data {
                    Data::Guest(buffers, offset) => {
                        let vectors = buffers.iovecs(*offset, piece.length).unwrap_or_default();
                        slot.vectors.extend(
                            vectors.iter().map(|v| IoVec { base: v.iov_base.cast(), length: v.iov_len }),
                        );
                    }
                    Data::Host(bytes) => {
                        slot.vectors.push(IoVec { base: bytes.as_mut_ptr(), length: bytes.len() });
                    }
                    Data::None => {}
                }
                operations.push(StoreOperation {
                    token: u64::from(slot.generation) << 32 | u64::from(index),
                    kind: match piece.kind {
                        OperationKind::Read => StoreOperation::READ,
                        OperationKind::Write => StoreOperation::WRITE,
                        OperationKind::Flush => StoreOperation::FLUSH,
                        OperationKind::Discard => StoreOperation::DISCARD,
                        OperationKind::WriteZeroes { .. } => StoreOperation::WRITE_ZEROES,
                    },
                    flags: match piece.kind {
                        OperationKind::WriteZeroes { unmap: true } => StoreOperation::UNMAP,
                        _ => 0,
                    },
                    position: piece.position,
                    length: piece.length,
                    vectors: slot.vectors.as_ptr(),
                    vector_count: slot.vectors.len(),
                });
                slot.piece = Some(piece);
            }
        }
        let mut instance = lock(&self.instance);
        if instance.0.is_null() {
            drop(instance);
            for operation in operations {
                self.context.done(operation.token, Err(StoreError::Io));
            }
            return;
        }
        self.context.shared.counters.batches.fetch_add(1, Ordering::Relaxed);
        let count = u32::try_from(operations.len()).unwrap_or(u32::MAX);
        // SAFETY: the instance lives. The operations live past the call; their vectors and data live in the slots until `done`, and a slot's heap memory stays where it
        // is when the list of slots grows.
        let status = unsafe { (self.table.submit)(instance.0, operations.as_ptr(), count) };
        if status != Status::OK {
            self.give_up(&mut instance);
        }
    }

    fn in_pieces(&self) -> bool {
        false
    }

    fn resize(&self, size: u64) -> Result<StoreInfo, String> {
        let instance = lock(&self.instance);
        if instance.0.is_null() {
            return Err("the store has failed".into());
        }
        let mut output = Vec::new();
        // SAFETY: the instance lives, and the sink lives past the call.
        let status = unsafe { (self.table.resize)(instance.0, size, Sink::to(&mut output)) };
        self.info("resize", status, &output).map_err(OpenFailure::reason)
    }

    fn close(&self) -> Result<(), String> {
        let mut instance = lock(&self.instance);
        if instance.0.is_null() {
            return Err("the store has failed".into());
        }
        let mut output = Vec::new();
        // SAFETY: as in `resize`.
        let status = unsafe { (self.table.close)(instance.0, Sink::to(&mut output)) };
        let result = self.answer("close", status, &output);
        self.destroy(&mut instance);
        result.map_err(|failure| failure.into_fault().to_string())
    }
}

impl Drop for NativeStore {
    fn drop(&mut self) {
        self.destroy(&mut lock(&self.instance));
        self.context.fail_all();
    }
}

/// # Safety
/// `context` is that of a [`NativeStore`] whose instance was not yet destroyed.
unsafe fn context<'a>(context: *mut c_void) -> &'a Context {
    // SAFETY: promised by the caller; only shared references are ever made of it.
    unsafe { &*context.cast::<Context>() }
}

/// # Safety
/// The bytes came in the call that is still running.
unsafe fn text<'a>(bytes: Bytes<'a>) -> std::borrow::Cow<'a, str> {
    // SAFETY: promised by the caller.
    String::from_utf8_lossy(unsafe { bytes.as_slice() })
}

/// # Safety
/// The sink came in the call that is still running.
unsafe fn answer<T>(result: Result<T, ConnectionError>, sink: Sink, take: impl FnOnce(T)) -> Status {
    match result {
        Ok(value) => {
            take(value);
            Status::OK
        }
        Err(error) => {
            // SAFETY: promised by the caller.
            unsafe { sink.put(&wire::encode_connection_error(&error)) };
            Status::REFUSED
        }
    }
}

/// What the vectors of an operation on a lower store point to, as one row.
///
/// # Safety
/// The operation and its vectors came in the call that is still running.
unsafe fn gather(operation: &StoreOperation) -> Vec<u8> {
    let mut bytes = Vec::new();
    for index in 0..operation.vector_count {
        // SAFETY: promised by the caller; `index` is inside the array. The bytes may be guest memory that changes: they are copied by pointer.
        unsafe {
            let vector = *operation.vectors.add(index);
            let start = bytes.len();
            bytes.resize(start + vector.length, 0);
            std::ptr::copy_nonoverlapping(
                vector.base.cast_const(),
                bytes.as_mut_ptr().add(start),
                vector.length,
            );
        }
    }
    bytes
}

/// # Safety
/// As for [`gather`].
unsafe fn scatter(operation: &StoreOperation, mut bytes: &[u8]) {
    for index in 0..operation.vector_count {
        // SAFETY: as in `gather`, in the other direction; no more is copied than there is.
        unsafe {
            let vector = *operation.vectors.add(index);
            let count = vector.length.min(bytes.len());
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), vector.base, count);
            bytes = &bytes[count..];
        }
    }
}

/// The store's host functions.
static STORE_HOST: StoreHost = StoreHost {
    size: StoreHost::SIZE,
    log_log: {
        unsafe extern "C" fn log(at: *mut c_void, level: u32, message: Bytes<'_>) {
            // SAFETY: called by the plugin before `destroy` has returned.
            let (at, message) = unsafe { (context(at), text(message)) };
            at.log.log(&at.shared.name, abi::Level::from_number(level), &message);
        }
        log
    },
    time_now: {
        unsafe extern "C" fn now(_: *mut c_void) -> u64 {
            services::now()
        }
        now
    },
    time_wait: {
        unsafe extern "C" fn wait(at: *mut c_void, nanoseconds: u64) {
            // SAFETY: the plugin passes the context that it was given.
            let cut = lock(&unsafe { context(at) }.services).cut.clone();
            services::wait(nanoseconds, &cut);
        }
        wait
    },
    entropy_random: {
        unsafe extern "C" fn random(_: *mut c_void, buffer: *mut u8, length: u32) {
            let mut done = 0;
            while done < length {
                let bytes = services::random(length - done);
                // SAFETY: the plugin gives room for `length` bytes.
                unsafe {
                    std::ptr::copy_nonoverlapping(bytes.as_ptr(), buffer.add(done as usize), bytes.len())
                };
                done += u32::try_from(bytes.len()).unwrap_or(0);
            }
        }
        random
    },
    lower_info: {
        unsafe extern "C" fn info(at: *mut c_void, lower: u32, output: Sink) {
            // SAFETY: as in `log_log`; the sink came in this call.
            unsafe {
                let info = lock(&context(at).services).info(lower);
                output.put(&wire::encode_store_info(&info));
            }
        }
        info
    },
    lower_submit: {
        unsafe extern "C" fn submit(
            at: *mut c_void,
            lower: u32,
            operations: *const StoreOperation,
            count: u32,
            errors: *mut u32,
        ) {
            if count == 0 {
                return;
            }
            // SAFETY: as in `log_log`; the plugin gives `count` operations and as much room for errors.
            let (at, operations, errors) = unsafe {
                (
                    context(at),
                    std::slice::from_raw_parts(operations, count as usize),
                    std::slice::from_raw_parts_mut(errors, count as usize),
                )
            };
            let list = operations
                .iter()
                .map(|operation| {
                    let kind = match operation.kind {
                        StoreOperation::READ => OperationKind::Read,
                        StoreOperation::WRITE => OperationKind::Write,
                        StoreOperation::DISCARD => OperationKind::Discard,
                        StoreOperation::WRITE_ZEROES => {
                            OperationKind::WriteZeroes { unmap: operation.flags & StoreOperation::UNMAP != 0 }
                        }
                        _ => OperationKind::Flush,
                    };
                    let data = match kind {
                        OperationKind::Read | OperationKind::Write
                            if operation.length > super::MAX_TRANSFER =>
                        {
                            Data::Host(Vec::new())
                        }
                        // SAFETY: the operation came in this call.
                        OperationKind::Write => Data::Host(unsafe { gather(operation) }),
                        OperationKind::Read => {
                            Data::Host(vec![0; usize::try_from(operation.length).unwrap_or(0)])
                        }
                        _ => Data::None,
                    };
                    (kind, operation.position, operation.length, data)
                })
                .collect();
            let outcomes = lock(&at.services).submit(lower, list);
            for ((operation, error), (result, bytes)) in operations.iter().zip(errors).zip(outcomes) {
                if operation.kind == StoreOperation::READ && result.is_ok() {
                    // SAFETY: the operation came in this call.
                    unsafe { scatter(operation, &bytes) };
                }
                *error = StoreError::number_of(result);
            }
        }
        submit
    },
    lower_resize: {
        unsafe extern "C" fn resize(at: *mut c_void, lower: u32, size: u64) -> u32 {
            // SAFETY: as in `log_log`.
            StoreError::number_of(lock(&unsafe { context(at) }.services).resize(lower, size))
        }
        resize
    },
    connection_send: {
        unsafe extern "C" fn send(at: *mut c_void, connection: u32, bytes: Bytes<'_>, error: Sink) -> Status {
            // SAFETY: as in `log_log`; bytes and sink came in this call.
            unsafe {
                let result = lock(&context(at).services).connections.send(connection, bytes.as_slice());
                answer(result, error, drop)
            }
        }
        send
    },
    connection_receive: {
        unsafe extern "C" fn receive(
            at: *mut c_void,
            connection: u32,
            buffer: *mut u8,
            max: u32,
            received: *mut u32,
            error: Sink,
        ) -> Status {
            // SAFETY: as in `log_log`; the plugin gives room for `max` bytes and for the count.
            unsafe {
                let result = lock(&context(at).services).connections.receive(connection, max);
                answer(result, error, |bytes| {
                    std::ptr::copy_nonoverlapping(bytes.as_ptr(), buffer, bytes.len());
                    *received = u32::try_from(bytes.len()).unwrap_or(0);
                })
            }
        }
        receive
    },
    connections_connect: {
        unsafe extern "C" fn connect(
            at: *mut c_void,
            name: Bytes<'_>,
            port: u32,
            tls: u32,
            connection: *mut u32,
            error: Sink,
        ) -> Status {
            // SAFETY: as in `log_log`; the plugin gives room for the number.
            unsafe {
                let port = u16::try_from(port).unwrap_or(0);
                let result = lock(&context(at).services).connections.connect(&text(name), port, tls != 0);
                answer(result, error, |number| *connection = number)
            }
        }
        connect
    },
    connection_close: {
        unsafe extern "C" fn close(at: *mut c_void, connection: u32) {
            // SAFETY: as in `log_log`.
            lock(&unsafe { context(at) }.services).connections.close(connection);
        }
        close
    },
    done: {
        unsafe extern "C" fn done(at: *mut c_void, token: u64, error: u32) {
            // SAFETY: as in `log_log`.
            unsafe { context(at) }.done(token, StoreError::result(error));
        }
        done
    },
    panicked: {
        unsafe extern "C" fn panicked(at: *mut c_void, message: Bytes<'_>) {
            // SAFETY: as in `log_log`.
            unsafe { *lock(&context(at).panic) = Some(text(message).into_owned()) };
        }
        panicked
    },
};
