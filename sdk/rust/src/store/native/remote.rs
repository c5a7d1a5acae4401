//! The host behind the host's table.

use std::ffi::c_void;

use tenon_abi::{
    Bytes, ConnectionError, IoVec, Level, Sink, Status, StoreError, StoreHost, StoreInfo, StoreOperation,
    wire,
};

use crate::native::count;
use crate::store::{Operation, hosted};

/// The host's table with its context.
#[derive(Clone, Copy)]
pub(super) struct Remote {
    table: *const StoreHost,
    context: *mut c_void,
}

// SAFETY: what may be called from any thread is offered by `Completions` alone; the rest is reached through the host that is entered on a thread.
unsafe impl Send for Remote {}
// SAFETY: as above.
unsafe impl Sync for Remote {}

impl Remote {
    /// The host of an instance that is being made: `table` is good until `destroy` has returned.
    pub(super) const fn new(table: *const StoreHost, context: *mut c_void) -> Self {
        Self { table, context }
    }

    fn table(&self) -> &StoreHost {
        // SAFETY: the host keeps its table until `destroy` has returned; the instance that holds `self` ends there, and `Completions` looks whether it did.
        unsafe { &*self.table }
    }

    pub(super) fn panicked(&self, message: &str) {
        // SAFETY: called during a call from the host, with the context that it gave.
        unsafe { (self.table().panicked)(self.context, Bytes::new(message.as_bytes())) }
    }

    /// Tells the host that an operation has ended. From any thread, before `destroy` has returned.
    pub(super) fn done(&self, token: u64, result: Result<(), StoreError>) {
        // SAFETY: the host takes this call from any thread.
        unsafe { (self.table().done)(self.context, token, StoreError::number_of(result)) }
    }
}

/// What a call about a connection came to.
fn outcome(status: Status, error: &[u8]) -> Result<(), ConnectionError> {
    if status == Status::OK {
        return Ok(());
    }
    Err(wire::decode_connection_error(error).unwrap_or(ConnectionError::Closed))
}

// In all of these: the host's function is called during a call from the host (handles work at no other time; logging works from any thread), with the context
// that came with the table, and what is lent to it lives for the call.
impl hosted::Host for Remote {
    fn log(&self, level: Level, message: &str) {
        // SAFETY: see above.
        unsafe { (self.table().log_log)(self.context, level as u32, Bytes::new(message.as_bytes())) }
    }

    fn now(&self) -> u64 {
        // SAFETY: see above.
        unsafe { (self.table().time_now)(self.context) }
    }

    fn wait(&self, nanoseconds: u64) {
        // SAFETY: see above.
        unsafe { (self.table().time_wait)(self.context, nanoseconds) }
    }

    fn random(&self, length: u32) -> Vec<u8> {
        let length = length.min(64 << 10);
        let mut bytes = vec![0; length as usize];
        // SAFETY: see above; the buffer has room for `length` bytes.
        unsafe { (self.table().entropy_random)(self.context, bytes.as_mut_ptr(), length) }
        bytes
    }

    fn lower_info(&self, lower: u32) -> StoreInfo {
        let mut output = Vec::new();
        // SAFETY: see above.
        unsafe { (self.table().lower_info)(self.context, lower, Sink::to(&mut output)) };
        wire::decode_store_info(&output).expect("the host describes a lower store that it gave")
    }

    fn lower_submit(&self, lower: u32, operations: &[Operation]) -> Vec<Result<Vec<u8>, StoreError>> {
        let mut data: Vec<Vec<u8>> = operations
            .iter()
            .map(|operation| match operation {
                Operation::Read { length, .. } => vec![0; crate::store::size(*length)],
                _ => Vec::new(),
            })
            .collect();
        let vectors: Vec<IoVec> = operations
            .iter()
            .zip(&mut data)
            .map(|(operation, data)| match operation {
                // The host only reads the bytes of a write.
                Operation::Write { data, .. } => IoVec { base: data.as_ptr().cast_mut(), length: data.len() },
                _ => IoVec { base: data.as_mut_ptr(), length: data.len() },
            })
            .collect();
        let table: Vec<StoreOperation> =
            operations.iter().zip(&vectors).map(|(operation, vector)| record(operation, vector)).collect();
        let mut errors = vec![0; table.len()];
        // SAFETY: see above; the vectors point to buffers that live for the call, and there is room for an error of each operation.
        unsafe {
            let call = self.table().lower_submit;
            call(self.context, lower, table.as_ptr(), count(&table), errors.as_mut_ptr());
        }
        data.into_iter().zip(errors).map(|(data, error)| StoreError::result(error).map(|()| data)).collect()
    }

    fn lower_resize(&self, lower: u32, size: u64) -> Result<(), StoreError> {
        // SAFETY: see above.
        StoreError::result(unsafe { (self.table().lower_resize)(self.context, lower, size) })
    }

    fn connect(&self, host: &str, port: u16, tls: bool) -> Result<u32, ConnectionError> {
        let (mut connection, mut error) = (0, Vec::new());
        let call = self.table().connections_connect;
        let name = Bytes::new(host.as_bytes());
        // SAFETY: see above.
        let status = unsafe {
            let error = Sink::to(&mut error);
            call(self.context, name, port.into(), tls.into(), &raw mut connection, error)
        };
        outcome(status, &error).map(|()| connection)
    }

    fn connection_send(&self, connection: u32, bytes: &[u8]) -> Result<(), ConnectionError> {
        let mut error = Vec::new();
        let call = self.table().connection_send;
        // SAFETY: see above.
        let status = unsafe { call(self.context, connection, Bytes::new(bytes), Sink::to(&mut error)) };
        outcome(status, &error)
    }

    fn connection_receive(&self, connection: u32, max: u32) -> Result<Vec<u8>, ConnectionError> {
        let max = max.min(1 << 20);
        let (mut buffer, mut received, mut error) = (vec![0; max as usize], 0, Vec::new());
        let call = self.table().connection_receive;
        // SAFETY: see above; the buffer has room for `max` bytes.
        let status = unsafe {
            let error = Sink::to(&mut error);
            call(self.context, connection, buffer.as_mut_ptr(), max, &raw mut received, error)
        };
        outcome(status, &error)?;
        buffer.truncate(received as usize);
        Ok(buffer)
    }

    fn connection_close(&self, connection: u32) {
        // SAFETY: see above.
        unsafe { (self.table().connection_close)(self.context, connection) }
    }
}

/// An operation as the table has it; its data is at `vector`.
fn record(operation: &Operation, vector: &IoVec) -> StoreOperation {
    let (kind, position, length, flags) = match *operation {
        Operation::Read { position, .. } => (StoreOperation::READ, position, vector.length as u64, 0),
        Operation::Write { position, .. } => (StoreOperation::WRITE, position, vector.length as u64, 0),
        Operation::Flush => (StoreOperation::FLUSH, 0, 0, 0),
        Operation::Discard { position, length } => (StoreOperation::DISCARD, position, length, 0),
        Operation::WriteZeroes { position, length, unmap } => {
            let flags = if unmap { StoreOperation::UNMAP } else { 0 };
            (StoreOperation::WRITE_ZEROES, position, length, flags)
        }
    };
    let moves = matches!(operation, Operation::Read { .. } | Operation::Write { .. });
    StoreOperation {
        token: 0,
        kind,
        flags,
        position,
        length,
        vectors: vector,
        vector_count: usize::from(moves),
    }
}
