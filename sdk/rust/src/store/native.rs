//! The store as a native plugin: the table that calls it, and the host behind the host's table. Both ways to write a store come to the same table; what sets them apart
//! is `Backend`.
#![allow(unsafe_code, reason = "the native tables are a foreign-function interface")]

mod copies;
pub(super) mod direct;
mod remote;

use std::ffi::c_void;

use tenon_abi::{
    Bytes, Plugin, SavedState, Sink, Status, StoreHost, StoreInfo, StoreOperation, StoreTable, wire,
};

use self::remote::Remote;
use super::{Config, Error, NativeStore, Result, Store, hosted};
use crate::native::{answer, guard, slice};

/// The plugin that [`crate::export_store!`] exports.
#[must_use]
pub const fn plugin(table: &'static StoreTable) -> Plugin {
    Plugin { store: Some(table), ..Plugin::EMPTY }
}

/// The table of a store that works on copies.
#[must_use]
pub const fn table<S: Store>() -> StoreTable {
    table_of::<copies::Copies<S>>()
}

/// The table of a store that works on the data itself.
#[must_use]
pub const fn direct_table<S: NativeStore>() -> StoreTable {
    table_of::<direct::Direct<S>>()
}

/// A store behind the table.
trait Backend: Sized {
    fn open(config: &Config, lower: u32, remote: Remote) -> Result<(Self, StoreInfo)>;
    /// Begins operations.
    ///
    /// # Safety
    /// Each operation's vectors are good until [`StoreHost::done`] was called for it, and nobody makes Rust references to what they point to.
    unsafe fn submit(&mut self, operations: &[StoreOperation]);
    fn resize(&mut self, size: u64) -> Result<StoreInfo>;
    fn close(&mut self) -> Result<()>;
    fn save(&self) -> Result<SavedState>;
    fn restore(&mut self, state: &SavedState) -> Result<()>;
}

const fn table_of<B: Backend>() -> StoreTable {
    StoreTable {
        size: StoreTable::SIZE,
        create: create::<B>,
        destroy: destroy::<B>,
        open: open::<B>,
        submit: submit::<B>,
        resize: resize::<B>,
        close: close::<B>,
        save: save::<B>,
        restore: restore::<B>,
    }
}

struct Instance<B> {
    host: Remote,
    store: Option<B>,
    trapped: bool,
}

impl<B> Instance<B> {
    fn opened(&mut self) -> &mut B {
        self.store.as_mut().expect("the host opens a store before it calls it")
    }
}

unsafe extern "C" fn create<B: Backend>(host: *const StoreHost, context: *mut c_void) -> *mut c_void {
    // SAFETY: the host gives a table, or null.
    let table = unsafe { host.as_ref() };
    if table.is_none_or(|table| table.size < StoreHost::SIZE) {
        return std::ptr::null_mut();
    }
    let host = Remote::new(host, context);
    Box::into_raw(Box::new(Instance::<B> { host, store: None, trapped: false })).cast()
}

unsafe extern "C" fn destroy<B: Backend>(instance: *mut c_void) {
    // SAFETY: the instance is one that `create` returned, and this is the last call with it.
    let instance = unsafe { Box::from_raw(instance.cast::<Instance<B>>()) };
    let host = instance.host;
    let _ = guard(
        |message| host.panicked(message),
        move || {
            hosted::enter(&host, || drop(instance));
            Status::OK
        },
    );
}

/// Calls into an instance, with its host entered.
///
/// # Safety
/// `instance` is one that `create::<B>` returned and `destroy` was not called for; no other call with it is running.
unsafe fn with<B: Backend>(instance: *mut c_void, call: impl FnOnce(&mut Instance<B>) -> Status) -> Status {
    // SAFETY: promised by the caller.
    let instance = unsafe { &mut *instance.cast::<Instance<B>>() };
    if instance.trapped {
        return Status::TRAPPED;
    }
    let host = instance.host;
    let status = guard(|message| host.panicked(message), || hosted::enter(&host, || call(instance)));
    instance.trapped = status == Status::TRAPPED;
    status
}

/// Puts the output, or the error.
///
/// # Safety
/// The sink came in the call that is still running.
unsafe fn finish(sink: Sink, result: Result<Vec<u8>>) -> Status {
    // SAFETY: promised by the caller.
    unsafe { answer(sink, result.map_err(|error| wire::encode_device_error(&error))) }
}

// In all of these: the host keeps to the convention of `tenon_abi`, so that the instance is one of ours and called once at a time,
// and pointers, arrays, bytes and sinks are good for the call.

unsafe extern "C" fn open<B: Backend>(
    instance: *mut c_void,
    config: Bytes<'_>,
    lower: u32,
    output: Sink,
) -> Status {
    // SAFETY: see above.
    unsafe {
        with::<B>(instance, |instance| {
            let opened = wire::decode_settings(config.as_slice())
                .map_err(|error| Error::Other(error.to_string()))
                .and_then(|config| B::open(&Config::new(config), lower, instance.host))
                .and_then(|(store, info)| {
                    let info = super::checked(info)?;
                    instance.store = Some(store);
                    Ok(wire::encode_store_info(&info))
                });
            finish(output, opened)
        })
    }
}

unsafe extern "C" fn submit<B: Backend>(
    instance: *mut c_void,
    operations: *const StoreOperation,
    count: u32,
) -> Status {
    // SAFETY: see above; the host keeps the vectors until the operations have ended.
    unsafe {
        with::<B>(instance, |instance| {
            instance.opened().submit(slice(operations, count));
            Status::OK
        })
    }
}

unsafe extern "C" fn resize<B: Backend>(instance: *mut c_void, size: u64, output: Sink) -> Status {
    // SAFETY: see above.
    unsafe {
        with::<B>(instance, |instance| {
            let info = instance.opened().resize(size).and_then(super::checked);
            finish(output, info.map(|info| wire::encode_store_info(&info)))
        })
    }
}

unsafe extern "C" fn close<B: Backend>(instance: *mut c_void, output: Sink) -> Status {
    // SAFETY: see above.
    unsafe { with::<B>(instance, |instance| finish(output, instance.opened().close().map(|()| Vec::new()))) }
}

unsafe extern "C" fn save<B: Backend>(instance: *mut c_void, schema: *mut u32, output: Sink) -> Status {
    // SAFETY: see above.
    unsafe {
        with::<B>(instance, |instance| {
            let saved = instance.opened().save().map(|state| {
                schema.write(state.schema);
                state.data
            });
            finish(output, saved)
        })
    }
}

unsafe extern "C" fn restore<B: Backend>(
    instance: *mut c_void,
    schema: u32,
    data: Bytes<'_>,
    output: Sink,
) -> Status {
    // SAFETY: see above.
    unsafe {
        with::<B>(instance, |instance| {
            let state = SavedState { schema, data: data.as_slice().to_vec() };
            finish(output, instance.opened().restore(&state).map(|()| Vec::new()))
        })
    }
}
