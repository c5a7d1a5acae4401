//! The bench of a native store: its table, called as a host calls it, with operations that end on any thread.
#![allow(unsafe_code, reason = "the host's side of the native tables")]

mod host;

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tenon_sdk::abi::{Bytes, Plugin, Sink, Status, StoreOperation, StoreTable, wire};
use tenon_sdk::store::{Error, IoVec, Level, Operation, Result, SavedState, StoreError, StoreInfo};

use self::host::{Host, State, TABLE};
use super::StoreSubject;
use super::bench::refusal;
use crate::memory::MemoryStore;

/// How long an operation may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A native store on the bench, reached through the table that its plugin exports. It may be one of either trait.
///
/// Time is the host's, lower stores are in memory, and no host is granted to connect to.
pub struct NativeStoreBench {
    table: &'static StoreTable,
    instance: *mut c_void,
    host: Box<Host>,
    settings: Vec<(String, String)>,
    info: StoreInfo,
    tokens: u64,
}

impl NativeStoreBench {
    /// Opens the store of a plugin with these settings over these lower stores.
    ///
    /// # Errors
    /// The store refuses.
    ///
    /// # Panics
    /// The plugin has no store.
    pub fn open(plugin: &'static Plugin, settings: &[(&str, &str)], lower: Vec<MemoryStore>) -> Result<Self> {
        let table = plugin.store.expect("the plugin has a store");
        let host =
            Box::new(Host { state: Mutex::new(State { lower, ..State::default() }), ..Host::default() });
        let settings = settings.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let info = StoreInfo::default();
        let mut bench = Self { table, instance: std::ptr::null_mut(), host, settings, info, tokens: 0 };
        bench.create()?;
        Ok(bench)
    }

    /// What the store is.
    #[must_use]
    pub fn info(&self) -> &StoreInfo {
        &self.info
    }

    /// Carries out operations all at once, and waits for all of them; those that no host lets through are refused before. The data of each lies in several pieces.
    ///
    /// # Panics
    /// The store panics, or an operation ends twice, or does not end within a minute.
    pub fn submit(&mut self, operations: Vec<Operation>) -> Vec<Result<Vec<u8>, StoreError>> {
        let mut begun: Vec<(u64, Buffer)> = Vec::new();
        let places: Vec<Result<usize, StoreError>> = operations
            .iter()
            .map(|operation| {
                refusal(&self.info, operation)?;
                self.tokens += 1;
                begun.push((self.tokens, Buffer::of(operation)));
                Ok(begun.len() - 1)
            })
            .collect();
        let records: Vec<StoreOperation> =
            begun.iter().map(|(token, buffer)| StoreOperation { token: *token, ..buffer.record }).collect();
        let tokens: Vec<u64> = begun.iter().map(|(token, _)| *token).collect();
        self.host.state().under_way.clone_from(&tokens);
        if !records.is_empty() {
            let count = u32::try_from(records.len()).unwrap_or(u32::MAX);
            // SAFETY: the instance is ours, and its calls come one at a time; records, vectors and data live until the operations have ended, and nobody looks at the data before.
            let status = unsafe { (self.table.submit)(self.instance, records.as_ptr(), count) };
            self.check("submit", status);
        }
        let mut ended = self.wait(&tokens, &mut begun);
        let mut data: Vec<Option<Vec<u8>>> =
            begun.into_iter().map(|(_, buffer)| Some(buffer.into_data())).collect();
        places
            .into_iter()
            .map(|place| {
                let place = place?;
                ended.remove(&tokens[place]).unwrap_or(Err(StoreError::Io))?;
                Ok(data[place].take().unwrap_or_default())
            })
            .collect()
    }

    /// Waits until all of these operations have ended.
    fn wait(&self, tokens: &[u64], begun: &mut Vec<(u64, Buffer)>) -> HashMap<u64, Result<(), StoreError>> {
        let unfinished = |state: &mut State| {
            state.odd.is_empty() && tokens.iter().any(|token| !state.ended.contains_key(token))
        };
        let waited = self.host.ended.wait_timeout_while(self.host.state(), PATIENCE, unfinished);
        let (mut state, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() || !state.odd.is_empty() {
            let odd = std::mem::take(&mut state.odd);
            drop(state);
            // The store may still work on the buffers, so they are never freed.
            std::mem::forget(std::mem::take(begun));
            panic!(
                "operations {odd:?} ended twice or never began, or others did not end within {PATIENCE:?}"
            );
        }
        std::mem::take(&mut state.ended)
    }

    /// Reads `length` bytes at `position`.
    ///
    /// # Errors
    /// The store's.
    pub fn read(&mut self, position: u64, length: u64) -> Result<Vec<u8>, StoreError> {
        self.one(Operation::Read { position, length })
    }

    /// Writes bytes at `position`.
    ///
    /// # Errors
    /// The store's.
    pub fn write(&mut self, position: u64, bytes: &[u8]) -> Result<(), StoreError> {
        self.one(Operation::Write { position, data: bytes.to_vec() }).map(drop)
    }

    /// Makes durable what was written.
    ///
    /// # Errors
    /// The store's.
    pub fn flush(&mut self) -> Result<(), StoreError> {
        self.one(Operation::Flush).map(drop)
    }

    /// Gives the space of a range back.
    ///
    /// # Errors
    /// The store's.
    pub fn discard(&mut self, position: u64, length: u64) -> Result<(), StoreError> {
        self.one(Operation::Discard { position, length }).map(drop)
    }

    /// Makes a range read as zeroes.
    ///
    /// # Errors
    /// The store's.
    pub fn write_zeroes(&mut self, position: u64, length: u64, unmap: bool) -> Result<(), StoreError> {
        self.one(Operation::WriteZeroes { position, length, unmap }).map(drop)
    }

    fn one(&mut self, operation: Operation) -> Result<Vec<u8>, StoreError> {
        self.submit(vec![operation]).pop().unwrap_or(Err(StoreError::Io))
    }

    /// Changes the length.
    ///
    /// # Errors
    /// The store refuses.
    pub fn resize(&mut self, size: u64) -> Result<&StoreInfo> {
        let output = self.ask("resize", |table, instance, sink| {
            // SAFETY: the instance is ours, and its calls come one at a time.
            unsafe { (table.resize)(instance, size, sink) }
        })?;
        self.info = described(&output)?;
        Ok(&self.info)
    }

    /// Closes the store in good order and opens it again.
    ///
    /// # Errors
    /// The store refuses one or the other.
    pub fn reopen(&mut self) -> Result<()> {
        self.ask("close", |table, instance, sink| {
            // SAFETY: as in `resize`.
            unsafe { (table.close)(instance, sink) }
        })?;
        self.destroy();
        self.create()
    }

    /// Saves the store.
    ///
    /// # Errors
    /// The store refuses.
    pub fn save(&mut self) -> Result<SavedState> {
        let mut schema = 0;
        let data = self.ask("save", |table, instance, sink| {
            // SAFETY: as in `resize`; the schema lives for the call.
            unsafe { (table.save)(instance, &raw mut schema, sink) }
        })?;
        Ok(SavedState { schema, data })
    }

    /// Puts a new store in the place of this one, opened and with its state. The old one is ended without being closed.
    ///
    /// # Errors
    /// The store refuses.
    pub fn restart(&mut self) -> Result<()> {
        let SavedState { schema, data } = self.save()?;
        self.destroy();
        self.create()?;
        self.ask("restore", |table, instance, sink| {
            // SAFETY: as in `resize`; the data lives for the call.
            unsafe { (table.restore)(instance, schema, Bytes::new(&data), sink) }
        })
        .map(drop)
    }

    /// A lower store.
    ///
    /// # Panics
    /// There is no such.
    pub fn lower(&mut self, number: usize) -> &mut MemoryStore {
        let state = self.host.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        &mut state.lower[number]
    }

    /// Takes the messages logged since the last call.
    pub fn take_log(&mut self) -> Vec<(Level, String)> {
        std::mem::take(&mut self.host.state().log)
    }

    fn create(&mut self) -> Result<()> {
        let context: *const Host = &raw const *self.host;
        // SAFETY: the table of the host is static, and the context lives until `destroy` has returned, for both are this bench's.
        self.instance = unsafe { (self.table.create)(&raw const TABLE, context.cast_mut().cast()) };
        assert!(!self.instance.is_null(), "the store makes no instance for this host");
        let config = wire::encode_settings(&self.settings);
        let lower = u32::try_from(self.host.state().lower.len()).unwrap_or(u32::MAX);
        let output = self.ask("open", |table, instance, sink| {
            // SAFETY: as in `resize`; the settings live for the call.
            unsafe { (table.open)(instance, Bytes::new(&config), lower, sink) }
        })?;
        self.info = described(&output)?;
        Ok(())
    }

    fn destroy(&mut self) {
        if !self.instance.is_null() {
            // SAFETY: the instance is ours, and this is the last call with it.
            unsafe { (self.table.destroy)(self.instance) };
            self.instance = std::ptr::null_mut();
        }
    }

    /// Makes a call that puts an output, or an error.
    fn ask(
        &mut self,
        what: &str,
        call: impl FnOnce(&StoreTable, *mut c_void, Sink) -> Status,
    ) -> Result<Vec<u8>> {
        assert!(!self.instance.is_null(), "the store is not open");
        let mut output = Vec::new();
        let status = call(self.table, self.instance, Sink::to(&mut output));
        if status == Status::REFUSED {
            return Err(wire::decode_device_error(&output).unwrap_or_else(|e| Error::Other(e.to_string())));
        }
        self.check(what, status);
        Ok(output)
    }

    fn check(&self, what: &str, status: Status) {
        if status != Status::OK {
            let panics = self.host.state().panics.join("; ");
            panic!("`{what}` ended with status {}: {panics}", status.0);
        }
    }
}

fn described(output: &[u8]) -> Result<StoreInfo> {
    wire::decode_store_info(output).map_err(|error| Error::Other(error.to_string()))
}

impl Drop for NativeStoreBench {
    fn drop(&mut self) {
        self.destroy();
    }
}

impl StoreSubject for NativeStoreBench {
    fn info(&mut self) -> StoreInfo {
        self.info.clone()
    }

    fn submit(&mut self, operations: Vec<Operation>) -> Vec<Result<Vec<u8>, StoreError>> {
        NativeStoreBench::submit(self, operations)
    }

    fn resize(&mut self, size: u64) -> Result<(), String> {
        NativeStoreBench::resize(self, size).map(drop).map_err(|error| error.to_string())
    }

    fn reopen(&mut self) -> Result<(), String> {
        NativeStoreBench::reopen(self).map_err(|error| error.to_string())
    }

    fn restart(&mut self) -> Option<Result<(), String>> {
        Some(NativeStoreBench::restart(self).map_err(|error| error.to_string()))
    }

    fn lower(&mut self, number: usize) -> Option<&mut MemoryStore> {
        let state = self.host.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        state.lower.get_mut(number)
    }

    fn save(&mut self) -> Option<Result<SavedState, String>> {
        Some(NativeStoreBench::save(self).map_err(|error| error.to_string()))
    }

    fn alive(&mut self) -> Result<(), String> {
        Ok(())
    }
}

/// The memory of an operation. It is reached through its pointer alone from when the operation begins until it has ended.
struct Buffer {
    record: StoreOperation,
    /// Made of a boxed slice, and freed as one.
    data: *mut [u8],
    /// Kept for the record's pointer.
    _vectors: Vec<IoVec>,
    reads: bool,
}

impl Buffer {
    fn of(operation: &Operation) -> Self {
        let (kind, position, length, flags, data) = match operation {
            Operation::Read { position, length } => {
                let room = vec![0xa5; usize::try_from(*length).unwrap_or(0)];
                (StoreOperation::READ, *position, *length, 0, room)
            }
            Operation::Write { position, data } => {
                (StoreOperation::WRITE, *position, data.len() as u64, 0, data.clone())
            }
            Operation::Flush => (StoreOperation::FLUSH, 0, 0, 0, vec![]),
            Operation::Discard { position, length } => {
                (StoreOperation::DISCARD, *position, *length, 0, vec![])
            }
            Operation::WriteZeroes { position, length, unmap } => {
                let flags = if *unmap { StoreOperation::UNMAP } else { 0 };
                (StoreOperation::WRITE_ZEROES, *position, *length, flags, vec![])
            }
        };
        let count = data.len();
        let data = Box::into_raw(data.into_boxed_slice());
        // A guest's buffers lie where they like: a short first piece and an odd second one.
        let cuts = [0, count.min(24), count.min(24 + count / 3), count];
        let vectors: Vec<IoVec> = cuts
            .windows(2)
            .filter(|cut| cut[0] < cut[1])
            // SAFETY: the offset is inside the slice.
            .map(|cut| IoVec { base: unsafe { data.cast::<u8>().add(cut[0]) }, length: cut[1] - cut[0] })
            .collect();
        let record = StoreOperation {
            token: 0,
            kind,
            flags,
            position,
            length,
            vectors: vectors.as_ptr(),
            vector_count: vectors.len(),
        };
        Self { record, data, _vectors: vectors, reads: kind == StoreOperation::READ }
    }

    /// The data that was read; for other operations none.
    fn into_data(self) -> Vec<u8> {
        // SAFETY: the operation has ended, so that the memory is this side's again; it came from a box.
        let data = unsafe { Box::from_raw(self.data) }.into_vec();
        if self.reads { data } else { Vec::new() }
    }
}
