//! The virtio device as a native plugin: the table that calls it.
#![allow(unsafe_code, reason = "the native tables are a foreign-function interface")]

mod remote;

use std::ffi::c_void;

use tenon_abi::{
    Bytes, OperationDone, Plugin, RequestRecord, SavedState, Sink, Status, VirtioHost, VirtioTable, wire,
};

use self::remote::Remote;
use super::{Batch, Config, Error, Result, VirtioDevice, hosted};
use crate::native::{answer, guard, slice};

/// The plugin that [`crate::export_virtio_device!`] exports.
#[must_use]
pub const fn plugin(table: &'static VirtioTable) -> Plugin {
    Plugin { virtio: Some(table), ..Plugin::EMPTY }
}

/// The table of a virtio device.
#[must_use]
pub const fn table<D: VirtioDevice>() -> VirtioTable {
    VirtioTable {
        size: VirtioTable::SIZE,
        create: create::<D>,
        destroy: destroy::<D>,
        describe: describe::<D>,
        start: start::<D>,
        activate: activate::<D>,
        config_read: config_read::<D>,
        config_write: config_write::<D>,
        requests_ready: requests_ready::<D>,
        operations_done: operations_done::<D>,
        port_ready: port_ready::<D>,
        port_changed: port_changed::<D>,
        socket_ready: socket_ready::<D>,
        store_changed: store_changed::<D>,
        channel_readable: channel_readable::<D>,
        channel_writable: channel_writable::<D>,
        timer_fired: timer_fired::<D>,
        adjust: adjust::<D>,
        reset: reset::<D>,
        save: save::<D>,
        restore: restore::<D>,
    }
}

struct Instance<D> {
    host: Remote,
    config: Option<Config>,
    device: Option<D>,
    trapped: bool,
}

unsafe extern "C" fn create<D: VirtioDevice>(host: *const VirtioHost, context: *mut c_void) -> *mut c_void {
    // SAFETY: the host gives a table, or null.
    let table = unsafe { host.as_ref() };
    if table.is_none_or(|table| table.size < VirtioHost::SIZE) {
        return std::ptr::null_mut();
    }
    let host = Remote::new(host, context);
    Box::into_raw(Box::new(Instance::<D> { host, config: None, device: None, trapped: false })).cast()
}

unsafe extern "C" fn destroy<D: VirtioDevice>(instance: *mut c_void) {
    // SAFETY: the instance is one that `create` returned, and this is the last call with it.
    let instance = unsafe { Box::from_raw(instance.cast::<Instance<D>>()) };
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
/// `instance` is one that `create::<D>` returned and `destroy` was not called for; no other call with it is running.
unsafe fn with<D: VirtioDevice>(
    instance: *mut c_void,
    call: impl FnOnce(&mut Instance<D>) -> Status,
) -> Status {
    // SAFETY: promised by the caller.
    let instance = unsafe { &mut *instance.cast::<Instance<D>>() };
    if instance.trapped {
        return Status::TRAPPED;
    }
    let host = instance.host;
    let status = guard(|message| host.panicked(message), || hosted::enter(&host, || call(instance)));
    instance.trapped = status == Status::TRAPPED;
    status
}

/// Calls a device that was started. Otherwise as [`with`].
///
/// # Safety
/// As [`with`].
unsafe fn call<D: VirtioDevice>(instance: *mut c_void, call: impl FnOnce(&mut D)) -> Status {
    // SAFETY: promised by the caller.
    unsafe {
        with::<D>(instance, |instance| {
            call(instance.started());
            Status::OK
        })
    }
}

impl<D> Instance<D> {
    fn started(&mut self) -> &mut D {
        self.device.as_mut().expect("the host starts a device before it calls it")
    }
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

unsafe extern "C" fn describe<D: VirtioDevice>(
    instance: *mut c_void,
    config: Bytes<'_>,
    output: Sink,
) -> Status {
    // SAFETY: see above.
    unsafe {
        with::<D>(instance, |instance| {
            let described = wire::decode_settings(config.as_slice())
                .map_err(|error| Error::Other(error.to_string()))
                .map(Config::new)
                .and_then(|config| {
                    let description = D::describe(&config)?;
                    instance.config = Some(config);
                    Ok(wire::encode_virtio_description(&description))
                });
            finish(output, described)
        })
    }
}

unsafe extern "C" fn start<D: VirtioDevice>(
    instance: *mut c_void,
    timers: u32,
    channels: u32,
    stores: u32,
    ports: u32,
    sockets: u32,
    folders: u32,
    output: Sink,
) -> Status {
    // SAFETY: see above.
    unsafe {
        with::<D>(instance, |instance| {
            let started = instance
                .config
                .take()
                .ok_or_else(|| Error::Other("`start` was called before `describe`".into()))
                .and_then(|config| {
                    D::start(&config, hosted::attachment(timers, channels, stores, ports, sockets, folders))
                })
                .map(|device| {
                    instance.device = Some(device);
                    Vec::new()
                });
            finish(output, started)
        })
    }
}

unsafe extern "C" fn activate<D: VirtioDevice>(instance: *mut c_void, features: u64, output: Sink) -> Status {
    // SAFETY: see above.
    unsafe {
        with::<D>(instance, |instance| {
            finish(output, instance.started().activate(features).map(|()| Vec::new()))
        })
    }
}

unsafe extern "C" fn config_read<D: VirtioDevice>(
    instance: *mut c_void,
    offset: u32,
    size: u32,
    value: *mut u64,
) -> Status {
    let size = u8::try_from(size).unwrap_or(8);
    // SAFETY: see above.
    unsafe { call::<D>(instance, |device| value.write(device.config_read(offset, size))) }
}

unsafe extern "C" fn config_write<D: VirtioDevice>(
    instance: *mut c_void,
    offset: u32,
    size: u32,
    value: u64,
) -> Status {
    let size = u8::try_from(size).unwrap_or(8);
    // SAFETY: see above.
    unsafe { call::<D>(instance, |device| device.config_write(offset, size, value)) }
}

unsafe extern "C" fn requests_ready<D: VirtioDevice>(
    instance: *mut c_void,
    queue: u32,
    requests: *const RequestRecord,
    count: u32,
    heads: Bytes<'_>,
) -> Status {
    let queue = u16::try_from(queue).unwrap_or(u16::MAX);
    // SAFETY: see above.
    unsafe {
        call::<D>(instance, |device| {
            device.requests_ready(queue, &Batch::new(slice(requests, count), heads.as_slice()));
        })
    }
}

unsafe extern "C" fn operations_done<D: VirtioDevice>(
    instance: *mut c_void,
    done: *const OperationDone,
    count: u32,
) -> Status {
    // SAFETY: see above.
    unsafe { call::<D>(instance, |device| device.operations_done(slice(done, count))) }
}

unsafe extern "C" fn port_ready<D: VirtioDevice>(instance: *mut c_void, port: u32) -> Status {
    // SAFETY: see above.
    unsafe { call::<D>(instance, |device| device.port_ready(port)) }
}

unsafe extern "C" fn port_changed<D: VirtioDevice>(instance: *mut c_void, port: u32) -> Status {
    // SAFETY: see above.
    unsafe { call::<D>(instance, |device| device.port_changed(port)) }
}

unsafe extern "C" fn socket_ready<D: VirtioDevice>(instance: *mut c_void, socket: u32) -> Status {
    // SAFETY: see above.
    unsafe { call::<D>(instance, |device| device.socket_ready(socket)) }
}

unsafe extern "C" fn store_changed<D: VirtioDevice>(instance: *mut c_void, store: u32) -> Status {
    // SAFETY: see above.
    unsafe { call::<D>(instance, |device| device.store_changed(store)) }
}

unsafe extern "C" fn channel_readable<D: VirtioDevice>(instance: *mut c_void, channel: u32) -> Status {
    // SAFETY: see above.
    unsafe { call::<D>(instance, |device| device.channel_readable(channel)) }
}

unsafe extern "C" fn channel_writable<D: VirtioDevice>(instance: *mut c_void, channel: u32) -> Status {
    // SAFETY: see above.
    unsafe { call::<D>(instance, |device| device.channel_writable(channel)) }
}

unsafe extern "C" fn timer_fired<D: VirtioDevice>(instance: *mut c_void, timer: u32) -> Status {
    // SAFETY: see above.
    unsafe { call::<D>(instance, |device| device.timer_fired(timer)) }
}

unsafe extern "C" fn adjust<D: VirtioDevice>(
    instance: *mut c_void,
    key: Bytes<'_>,
    value: Bytes<'_>,
    output: Sink,
) -> Status {
    // SAFETY: see above.
    unsafe {
        with::<D>(instance, |instance| {
            let (key, value) =
                (String::from_utf8_lossy(key.as_slice()), String::from_utf8_lossy(value.as_slice()));
            finish(output, instance.started().adjust(&key, &value).map(|()| Vec::new()))
        })
    }
}

unsafe extern "C" fn reset<D: VirtioDevice>(instance: *mut c_void) -> Status {
    // SAFETY: see above.
    unsafe { call::<D>(instance, D::reset) }
}

unsafe extern "C" fn save<D: VirtioDevice>(instance: *mut c_void, schema: *mut u32, output: Sink) -> Status {
    // SAFETY: see above.
    unsafe {
        with::<D>(instance, |instance| {
            let saved = super::save(instance.started());
            let saved = saved.map(|state| {
                schema.write(state.schema);
                state.data
            });
            finish(output, saved)
        })
    }
}

unsafe extern "C" fn restore<D: VirtioDevice>(
    instance: *mut c_void,
    schema: u32,
    data: Bytes<'_>,
    output: Sink,
) -> Status {
    // SAFETY: see above.
    unsafe {
        with::<D>(instance, |instance| {
            let state = SavedState { schema, data: data.as_slice().to_vec() };
            finish(output, super::restore(instance.started(), &state).map(|()| Vec::new()))
        })
    }
}
