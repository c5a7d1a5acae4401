//! The device as a native plugin: the table that calls it, and the host behind the host's table.
#![allow(unsafe_code, reason = "the native tables are a foreign-function interface")]

use std::ffi::c_void;

use tenon_abi::{Bytes, DeviceHost, DeviceTable, Level, Plugin, Request, SavedState, Sink, Status, wire};

use super::{Config, Device, Error, Result, hosted};
use crate::native::{answer, guard};

/// The plugin that [`crate::export_device!`] exports.
#[must_use]
pub const fn plugin(table: &'static DeviceTable) -> Plugin {
    Plugin { device: Some(table), ..Plugin::EMPTY }
}

/// The table of a device.
#[must_use]
pub const fn table<D: Device>() -> DeviceTable {
    DeviceTable {
        size: DeviceTable::SIZE,
        create: create::<D>,
        destroy: destroy::<D>,
        describe: describe::<D>,
        start: start::<D>,
        read: read::<D>,
        write: write::<D>,
        timer_fired: timer_fired::<D>,
        channel_readable: channel_readable::<D>,
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

/// The host's table with its context.
#[derive(Clone, Copy)]
struct Remote {
    table: *const DeviceHost,
    context: *mut c_void,
}

impl Remote {
    fn table(&self) -> &DeviceHost {
        // SAFETY: the host keeps its table until `destroy` has returned, and the instance that holds `self` ends there.
        unsafe { &*self.table }
    }

    fn panicked(&self, message: &str) {
        // SAFETY: called during a call from the host, with the context that it gave.
        unsafe { (self.table().panicked)(self.context, Bytes::new(message.as_bytes())) }
    }
}

// In all of these: the host's function is called during a call from the host (handles work at no other time), with the context that
// came with the table, and what is lent to it lives for the call.
impl hosted::Host for Remote {
    fn log(&self, level: Level, message: &str) {
        // SAFETY: see above.
        unsafe { (self.table().log_log)(self.context, level as u32, Bytes::new(message.as_bytes())) }
    }

    fn now(&self) -> u64 {
        // SAFETY: see above.
        unsafe { (self.table().time_now)(self.context) }
    }

    fn timer_arm(&self, timer: u32, deadline: u64) {
        // SAFETY: see above.
        unsafe { (self.table().timer_arm)(self.context, timer, deadline) }
    }

    fn timer_arm_periodic(&self, timer: u32, first: u64, period: u64) {
        // SAFETY: see above.
        unsafe { (self.table().timer_arm_periodic)(self.context, timer, first, period) }
    }

    fn timer_cancel(&self, timer: u32) {
        // SAFETY: see above.
        unsafe { (self.table().timer_cancel)(self.context, timer) }
    }

    fn wall_clock(&self) -> u64 {
        // SAFETY: see above.
        unsafe { (self.table().wall_clock_now)(self.context) }
    }

    fn line_set_level(&self, line: u32, high: bool) {
        // SAFETY: see above.
        unsafe { (self.table().line_set_level)(self.context, line, high.into()) }
    }

    fn line_pulse(&self, line: u32) {
        // SAFETY: see above.
        unsafe { (self.table().line_pulse)(self.context, line) }
    }

    fn channel_write(&self, channel: u32, bytes: &[u8]) -> u32 {
        // SAFETY: see above.
        unsafe { (self.table().channel_write)(self.context, channel, Bytes::new(bytes)) }
    }

    fn channel_read(&self, channel: u32, max: u32) -> Vec<u8> {
        // The host holds no more than 64 KiB.
        let max = max.min(64 << 10);
        let mut buffer = vec![0; max as usize];
        // SAFETY: see above; the buffer has room for `max` bytes.
        let count = unsafe { (self.table().channel_read)(self.context, channel, buffer.as_mut_ptr(), max) };
        buffer.truncate(count as usize);
        buffer
    }

    fn request(&self, request: Request) {
        let (kind, status) = request.to_numbers();
        // SAFETY: see above.
        unsafe { (self.table().machine_control_ask)(self.context, kind, status.into()) }
    }
}

unsafe extern "C" fn create<D: Device>(host: *const DeviceHost, context: *mut c_void) -> *mut c_void {
    // SAFETY: the host gives a table, or null.
    let table = unsafe { host.as_ref() };
    if table.is_none_or(|table| table.size < DeviceHost::SIZE) {
        return std::ptr::null_mut();
    }
    let host = Remote { table: host, context };
    Box::into_raw(Box::new(Instance::<D> { host, config: None, device: None, trapped: false })).cast()
}

unsafe extern "C" fn destroy<D: Device>(instance: *mut c_void) {
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
unsafe fn with<D: Device>(instance: *mut c_void, call: impl FnOnce(&mut Instance<D>) -> Status) -> Status {
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
unsafe fn call<D: Device>(instance: *mut c_void, call: impl FnOnce(&mut D)) -> Status {
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
// and pointers, bytes and sinks are good for the call.

unsafe extern "C" fn describe<D: Device>(instance: *mut c_void, config: Bytes<'_>, output: Sink) -> Status {
    // SAFETY: see above.
    unsafe {
        with::<D>(instance, |instance| {
            let described = wire::decode_settings(config.as_slice())
                .map_err(|error| Error::Other(error.to_string()))
                .map(Config::new)
                .and_then(|config| {
                    let description = D::describe(&config)?;
                    instance.config = Some(config);
                    Ok(wire::encode_description(&description))
                });
            finish(output, described)
        })
    }
}

unsafe extern "C" fn start<D: Device>(
    instance: *mut c_void,
    lines: u32,
    timers: u32,
    channels: u32,
    output: Sink,
) -> Status {
    // SAFETY: see above.
    unsafe {
        with::<D>(instance, |instance| {
            let started = instance
                .config
                .take()
                .ok_or_else(|| Error::Other("`start` was called before `describe`".into()))
                .and_then(|config| D::start(&config, hosted::attachment(lines, timers, channels)))
                .map(|device| {
                    instance.device = Some(device);
                    Vec::new()
                });
            finish(output, started)
        })
    }
}

unsafe extern "C" fn read<D: Device>(
    instance: *mut c_void,
    region: u32,
    offset: u64,
    size: u32,
    value: *mut u64,
) -> Status {
    let size = u8::try_from(size).unwrap_or(8);
    // SAFETY: see above.
    unsafe { call::<D>(instance, |device| value.write(device.read(region, offset, size))) }
}

unsafe extern "C" fn write<D: Device>(
    instance: *mut c_void,
    region: u32,
    offset: u64,
    size: u32,
    value: u64,
) -> Status {
    let size = u8::try_from(size).unwrap_or(8);
    // SAFETY: see above.
    unsafe { call::<D>(instance, |device| device.write(region, offset, size, value)) }
}

unsafe extern "C" fn timer_fired<D: Device>(instance: *mut c_void, timer: u32) -> Status {
    // SAFETY: see above.
    unsafe { call::<D>(instance, |device| device.timer_fired(timer)) }
}

unsafe extern "C" fn channel_readable<D: Device>(instance: *mut c_void, channel: u32) -> Status {
    // SAFETY: see above.
    unsafe { call::<D>(instance, |device| device.channel_readable(channel)) }
}

unsafe extern "C" fn reset<D: Device>(instance: *mut c_void) -> Status {
    // SAFETY: see above.
    unsafe { call::<D>(instance, D::reset) }
}

unsafe extern "C" fn save<D: Device>(instance: *mut c_void, schema: *mut u32, output: Sink) -> Status {
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

unsafe extern "C" fn restore<D: Device>(
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
