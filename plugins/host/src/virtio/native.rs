//! A virtio device that is native code, behind the tables of `tenon-abi`.
//!
//! Long, for it is one boundary: each function of the table, with what makes the call sound.
#![allow(unsafe_code, reason = "calls through the tables of a native library")]

use std::ffi::c_void;
use std::sync::Arc;

use tenon_abi as abi;
use tenon_abi::{
    Answer as Ended, Bytes, Handle, RequestOperation, SavedState, Sink, Status, VirtioDescription,
    VirtioHost, VirtioTable, wire,
};

use super::instance::{Entry, VirtioInstance, checked};
use super::services::VirtioServices;
use crate::fault::{Fault, Misuse};
use crate::instance::Answer;
use crate::native::Native;

/// What a device's host functions find behind their context.
struct Context {
    services: Option<Box<VirtioServices>>,
    panic: Option<String>,
}

/// An instance.
pub(crate) struct NativeVirtio {
    table: &'static VirtioTable,
    instance: *mut c_void,
    context: *mut Context,
    output: Vec<u8>,
    /// The table lives in it.
    _native: Arc<Native>,
}

// SAFETY: the ABI lets calls come from different threads, one at a time, which `&mut self` ensures; the context is ours alone between calls.
unsafe impl Send for NativeVirtio {}

impl NativeVirtio {
    pub(crate) fn new(native: &Arc<Native>, table: &'static VirtioTable) -> Result<Self, Fault> {
        let context = Box::into_raw(Box::new(Context { services: None, panic: None }));
        // SAFETY: the table was checked when it was loaded; host table and context are good until `destroy`, in `drop`.
        let instance = unsafe { (table.create)(&raw const VIRTIO_HOST, context.cast()) };
        let device = Self { table, instance, context, output: Vec::new(), _native: native.clone() };
        if instance.is_null() { Err(Fault::Trap("it could not make an instance".into())) } else { Ok(device) }
    }

    fn context(&mut self) -> &mut Context {
        // SAFETY: made in `new`, freed in `drop`; the plugin uses it during its calls only, and none is running while we hold `&mut self`.
        unsafe { &mut *self.context }
    }

    fn done(&mut self, status: Status) -> Result<(), Fault> {
        match status {
            Status::OK => checked(self.services(), ()),
            Status::TRAPPED => {
                Err(Fault::Trap(self.context().panic.take().unwrap_or_else(|| "it panicked".into())))
            }
            Status(number) => Err(Fault::Contract(format!("it returned the status {number}"))),
        }
    }

    /// Reads what a call that may refuse has put into `output`.
    fn answer<T>(
        &mut self,
        status: Status,
        decode: impl FnOnce(&[u8]) -> Result<T, wire::WireError>,
    ) -> Answer<T> {
        let contract = |error: wire::WireError| Fault::Contract(error.to_string());
        if status == Status::REFUSED {
            return Ok(Err(wire::decode_device_error(&self.output).map_err(contract)?));
        }
        self.done(status)?;
        Ok(Ok(decode(&self.output).map_err(contract)?))
    }

    fn sink(&mut self) -> Sink {
        self.output.clear();
        Sink::to(&mut self.output)
    }
}

fn length<T>(list: &[T]) -> u32 {
    u32::try_from(list.len()).unwrap_or(u32::MAX)
}

impl VirtioInstance for NativeVirtio {
    fn attach(&mut self, services: Box<VirtioServices>) {
        self.context().services = Some(services);
    }

    fn detach(&mut self) -> Option<Box<VirtioServices>> {
        self.context().services.take()
    }

    fn services(&mut self) -> Option<&mut VirtioServices> {
        self.context().services.as_deref_mut()
    }

    fn describe(&mut self, settings: &[(String, String)]) -> Answer<VirtioDescription> {
        let config = wire::encode_settings(settings);
        let sink = self.sink();
        // SAFETY: the table was checked, the instance lives, what is lent lives past the call.
        let status = unsafe { (self.table.describe)(self.instance, Bytes::new(&config), sink) };
        self.answer(status, wire::decode_virtio_description)
    }

    fn start(&mut self) -> Answer<()> {
        let [timers, channels, stores, ports, sockets, folders] =
            self.services().map_or([0; 6], |services| services.counts());
        let sink = self.sink();
        // SAFETY: as in `describe`.
        let status = unsafe {
            (self.table.start)(self.instance, timers, channels, stores, ports, sockets, folders, sink)
        };
        self.answer(status, |_| Ok(()))
    }

    fn call(&mut self, entry: &Entry<'_>) -> Answer<u64> {
        let (table, instance) = (self.table, self.instance);
        let mut result = 0;
        // SAFETY: as in `describe`.
        let status = unsafe {
            match *entry {
                Entry::Activate(features) => {
                    let sink = self.sink();
                    let status = (table.activate)(instance, features, sink);
                    return self.answer(status, |_| Ok(0));
                }
                Entry::Adjust { key, value } => {
                    let sink = self.sink();
                    let (key, value) = (Bytes::new(key.as_bytes()), Bytes::new(value.as_bytes()));
                    let status = (table.adjust)(instance, key, value, sink);
                    return self.answer(status, |_| Ok(0));
                }
                Entry::ConfigRead { offset, size } => {
                    (table.config_read)(instance, offset, size.into(), &raw mut result)
                }
                Entry::ConfigWrite { offset, size, value } => {
                    (table.config_write)(instance, offset, size.into(), value)
                }
                Entry::Requests { queue, requests, heads } => (table.requests_ready)(
                    instance,
                    queue.into(),
                    requests.as_ptr(),
                    length(requests),
                    Bytes::new(heads),
                ),
                Entry::Done(done) => (table.operations_done)(instance, done.as_ptr(), length(done)),
                Entry::PortReady(port) => (table.port_ready)(instance, port),
                Entry::PortChanged(port) => (table.port_changed)(instance, port),
                Entry::SocketReady(socket) => (table.socket_ready)(instance, socket),
                Entry::StoreChanged(store) => (table.store_changed)(instance, store),
                Entry::Readable(channel) => (table.channel_readable)(instance, channel),
                Entry::Writable(channel) => (table.channel_writable)(instance, channel),
                Entry::Timer(timer, _) => (table.timer_fired)(instance, timer),
                Entry::Reset => (table.reset)(instance),
            }
        };
        self.done(status)?;
        Ok(Ok(result))
    }

    fn save(&mut self) -> Answer<SavedState> {
        let mut schema = 0;
        let sink = self.sink();
        // SAFETY: as in `describe`.
        let status = unsafe { (self.table.save)(self.instance, &raw mut schema, sink) };
        Ok(self.answer(status, |data| Ok(data.to_vec()))?.map(|data| SavedState { schema, data }))
    }

    fn restore(&mut self, state: &SavedState) -> Answer<()> {
        let sink = self.sink();
        // SAFETY: as in `describe`.
        let status =
            unsafe { (self.table.restore)(self.instance, state.schema, Bytes::new(&state.data), sink) };
        self.answer(status, |_| Ok(()))
    }
}

impl Drop for NativeVirtio {
    fn drop(&mut self) {
        if !self.instance.is_null() {
            // SAFETY: the instance came from `create` and is used no more.
            unsafe { (self.table.destroy)(self.instance) };
        }
        // SAFETY: made by `Box::into_raw` in `new`; the plugin is gone.
        drop(unsafe { Box::from_raw(self.context) });
    }
}

/// Runs a host function of a device. A misdeed is kept until the call into the plugin has returned.
///
/// # Safety
/// `context` is that of a live [`NativeVirtio`] during a call into it.
unsafe fn with<T: Default>(
    context: *mut c_void,
    act: impl FnOnce(&mut VirtioServices) -> Result<T, Misuse>,
) -> T {
    // SAFETY: promised by the caller; the call into the plugin borrows nothing of the context.
    let context = unsafe { &mut *context.cast::<Context>() };
    let Some(services) = context.services.as_deref_mut() else { return T::default() };
    act(services).unwrap_or_else(|misuse| {
        services.misused(misuse);
        T::default()
    })
}

/// A list that a plugin lends.
///
/// # Safety
/// `count` elements at `list` are readable, or `count` is 0.
unsafe fn slice<'a, T>(list: *const T, count: u32) -> &'a [T] {
    if count == 0 {
        return &[];
    }
    // SAFETY: promised by the caller.
    unsafe { std::slice::from_raw_parts(list, count as usize) }
}

/// A buffer that a plugin lends.
///
/// # Safety
/// There is room for `count` elements at `list`, or `count` is 0.
unsafe fn room<'a, T>(list: *mut T, count: u32) -> &'a mut [T] {
    if count == 0 {
        return &mut [];
    }
    // SAFETY: promised by the caller.
    unsafe { std::slice::from_raw_parts_mut(list, count as usize) }
}

/// The device's host functions.
static VIRTIO_HOST: VirtioHost = VirtioHost {
    size: VirtioHost::SIZE,
    log_log: {
        unsafe extern "C" fn log(context: *mut c_void, level: u32, message: Bytes<'_>) {
            // SAFETY: called by the plugin during a call into it.
            unsafe {
                with(context, |services| {
                    let message = String::from_utf8_lossy(message.as_slice());
                    services.base.log(abi::Level::from_number(level), &message);
                    Ok(())
                });
            }
        }
        log
    },
    time_now: {
        unsafe extern "C" fn now(context: *mut c_void) -> u64 {
            // SAFETY: as in `log_log`.
            unsafe { with(context, |services| Ok(services.base.now())) }
        }
        now
    },
    timer_arm: {
        unsafe extern "C" fn arm(context: *mut c_void, timer: u32, deadline: u64) {
            // SAFETY: as in `log_log`.
            unsafe {
                with(context, |services| {
                    services.base.arm(timer, deadline);
                    Ok(())
                });
            }
        }
        arm
    },
    timer_arm_periodic: {
        unsafe extern "C" fn arm(context: *mut c_void, timer: u32, first: u64, period: u64) {
            // SAFETY: as in `log_log`.
            unsafe {
                with(context, |services| {
                    services.base.arm_periodic(timer, first, period);
                    Ok(())
                });
            }
        }
        arm
    },
    timer_cancel: {
        unsafe extern "C" fn cancel(context: *mut c_void, timer: u32) {
            // SAFETY: as in `log_log`.
            unsafe {
                with(context, |services| {
                    services.base.cancel(timer);
                    Ok(())
                });
            }
        }
        cancel
    },
    wall_clock_now: {
        unsafe extern "C" fn now(context: *mut c_void) -> u64 {
            // SAFETY: as in `log_log`.
            unsafe { with(context, |services| Ok(services.base.wall())) }
        }
        now
    },
    channel_write: {
        unsafe extern "C" fn write(context: *mut c_void, channel: u32, bytes: Bytes<'_>) -> u32 {
            // SAFETY: as in `log_log`.
            unsafe { with(context, |services| Ok(services.base.channel_write(channel, bytes.as_slice()))) }
        }
        write
    },
    channel_read: {
        unsafe extern "C" fn read(context: *mut c_void, channel: u32, buffer: *mut u8, max: u32) -> u32 {
            // SAFETY: as in `log_log`; the plugin gives room for `max` bytes.
            unsafe {
                with(context, |services| {
                    let bytes = services.base.channel_read(channel, max);
                    // An answer that is given again may be to another question.
                    let count = bytes.len().min(max as usize);
                    room(buffer, max)[..count].copy_from_slice(&bytes[..count]);
                    Ok(length(&bytes[..count]))
                })
            }
        }
        read
    },
    requests_read: {
        unsafe extern "C" fn read(
            context: *mut c_void,
            request: Handle,
            offset: u32,
            length: u32,
            buffer: *mut u8,
        ) -> u32 {
            // SAFETY: as in `log_log`; the plugin gives room for `length` bytes.
            unsafe { with(context, |services| services.read_into(request.0, offset, room(buffer, length))) }
        }
        read
    },
    requests_write: {
        unsafe extern "C" fn write(
            context: *mut c_void,
            request: Handle,
            offset: u32,
            bytes: Bytes<'_>,
        ) -> u32 {
            // SAFETY: as in `log_log`.
            unsafe { with(context, |services| services.write(request.0, offset, bytes.as_slice())) }
        }
        write
    },
    requests_complete: {
        unsafe extern "C" fn complete(context: *mut c_void, answers: *const Ended, count: u32) {
            // SAFETY: as in `log_log`; the plugin gives `count` answers.
            unsafe {
                with(context, |services| {
                    let answers = slice(answers, count);
                    answers.iter().try_for_each(|a| services.complete(a.request.0, a.written))
                });
            }
        }
        complete
    },
    requests_to_channel: {
        unsafe extern "C" fn go(
            context: *mut c_void,
            request: Handle,
            offset: u32,
            length: u32,
            channel: u32,
        ) -> u32 {
            // SAFETY: as in `log_log`.
            unsafe { with(context, |services| services.move_to_channel(request.0, offset, length, channel)) }
        }
        go
    },
    requests_from_channel: {
        unsafe extern "C" fn go(
            context: *mut c_void,
            request: Handle,
            offset: u32,
            length: u32,
            channel: u32,
        ) -> u32 {
            // SAFETY: as in `log_log`.
            unsafe {
                with(context, |services| services.move_from_channel(request.0, offset, length, channel))
            }
        }
        go
    },
    requests_config_changed: {
        unsafe extern "C" fn changed(context: *mut c_void) {
            // SAFETY: as in `log_log`.
            unsafe {
                with(context, |services| {
                    services.config_changed();
                    Ok(())
                });
            }
        }
        changed
    },
    requests_needs_reset: {
        unsafe extern "C" fn needs_reset(context: *mut c_void) {
            // SAFETY: as in `log_log`.
            unsafe {
                with(context, |services| {
                    services.needs_reset();
                    Ok(())
                });
            }
        }
        needs_reset
    },
    store_info: {
        unsafe extern "C" fn info(context: *mut c_void, store: u32, output: Sink) {
            // SAFETY: as in `log_log`; the sink came in this call.
            unsafe {
                with(context, |services| {
                    output.put(&wire::encode_store_info(&services.store_info(store)));
                    Ok(())
                });
            }
        }
        info
    },
    store_begin: {
        unsafe extern "C" fn begin(
            context: *mut c_void,
            store: u32,
            operations: *const RequestOperation,
            count: u32,
        ) {
            // SAFETY: as in `log_log`; the operations came in this call.
            unsafe {
                let operations = slice(operations, count);
                with(context, |services| {
                    operations.iter().try_for_each(|operation| services.begin(store, operation))
                });
            }
        }
        begin
    },
    port_info: {
        unsafe extern "C" fn info(context: *mut c_void, port: u32, output: Sink) {
            // SAFETY: as in `log_log`; the sink came in this call.
            unsafe {
                with(context, |services| {
                    let info = services.port_info(port);
                    let offloads = |offloads: tenon_core::Offloads| abi::Offloads {
                        checksum: offloads.checksum,
                        tso4: offloads.tso4,
                        tso6: offloads.tso6,
                    };
                    output.put(&wire::encode_port_info(&abi::PortInfo {
                        mac: info.mac,
                        mtu: info.mtu,
                        link_up: info.link_up,
                        send: offloads(info.send),
                        receive: offloads(info.receive),
                    }));
                    Ok(())
                });
            }
        }
        info
    },
    port_accept: {
        unsafe extern "C" fn accept(context: *mut c_void, port: u32, offloads: u32) {
            let abi::Offloads { checksum, tso4, tso6 } = abi::Offloads::from_bits(offloads);
            // SAFETY: as in `log_log`.
            unsafe {
                with(context, |services| {
                    services.accept(port, tenon_core::Offloads { checksum, tso4, tso6 });
                    Ok(())
                });
            }
        }
        accept
    },
    port_send: {
        unsafe extern "C" fn send(context: *mut c_void, port: u32, requests: *const Handle, count: u32) {
            // SAFETY: as in `log_log`; the plugin gives `count` handles, which are numbers in another dress.
            unsafe { with(context, |services| services.send(port, slice(requests.cast(), count))) }
        }
        send
    },
    port_waiting: {
        unsafe extern "C" fn waiting(context: *mut c_void, port: u32, max: u32, lengths: *mut u32) -> u32 {
            // SAFETY: as in `log_log`; the plugin gives room for `max` lengths.
            unsafe {
                with(context, |services| {
                    let waiting = services.waiting(port, max);
                    let count = waiting.len().min(max as usize);
                    room(lengths, max)[..count].copy_from_slice(&waiting[..count]);
                    Ok(length(&waiting[..count]))
                })
            }
        }
        waiting
    },
    port_receive: {
        unsafe extern "C" fn receive(
            context: *mut c_void,
            port: u32,
            counts: *const u16,
            frames: u32,
            requests: *const Handle,
            count: u32,
        ) {
            // SAFETY: as in `port_send`.
            unsafe {
                with(context, |services| {
                    services.receive(port, slice(counts, frames), slice(requests.cast(), count))
                });
            }
        }
        receive
    },
    socket_connect: {
        unsafe extern "C" fn connect(context: *mut c_void, socket: u32, port: u32, number: *mut u32) -> u32 {
            // SAFETY: as in `log_log`; the plugin gives room for a number.
            unsafe {
                with(context, |services| {
                    let stream = services.socket(socket)?.connect(port);
                    if let Some(stream) = stream {
                        number.write(stream);
                    }
                    Ok(stream.is_some().into())
                })
            }
        }
        connect
    },
    socket_news: {
        unsafe extern "C" fn news(
            context: *mut c_void,
            socket: u32,
            max: u32,
            states: *mut abi::StreamRecord,
        ) -> u32 {
            // SAFETY: as in `log_log`; the plugin gives room for `max` states.
            unsafe {
                with(context, |services| {
                    let news = services.socket_news(socket, max)?;
                    let room = room(states, max);
                    room.iter_mut().zip(&news).for_each(|(to, state)| *to = (*state).into());
                    Ok(length(&news))
                })
            }
        }
        news
    },
    socket_accept: {
        unsafe extern "C" fn accept(context: *mut c_void, socket: u32, number: u32, port: u32) {
            // SAFETY: as in `log_log`.
            unsafe { with(context, |services| services.socket(socket)?.accept(number, port)) }
        }
        accept
    },
    socket_send: {
        unsafe extern "C" fn send(
            context: *mut c_void,
            socket: u32,
            request: Handle,
            offset: u32,
            length: u32,
            number: u32,
            unsent: *mut u32,
        ) -> u32 {
            // SAFETY: as in `log_log`; the plugin gives room for a number.
            unsafe {
                with(context, |services| {
                    let sent = services.socket_send(socket, request.0, offset, length, number)?;
                    unsent.write(sent.unsent);
                    Ok(sent.taken)
                })
            }
        }
        send
    },
    socket_receive: {
        unsafe extern "C" fn receive(
            context: *mut c_void,
            socket: u32,
            request: Handle,
            offset: u32,
            length: u32,
            number: u32,
        ) -> u32 {
            // SAFETY: as in `log_log`.
            unsafe {
                with(context, |services| services.socket_receive(socket, request.0, offset, length, number))
            }
        }
        receive
    },
    socket_shut: {
        unsafe extern "C" fn shut(context: *mut c_void, socket: u32, number: u32, receive: u32, send: u32) {
            // SAFETY: as in `log_log`.
            unsafe {
                with(context, |services| services.socket(socket)?.shut(number, receive != 0, send != 0))
            }
        }
        shut
    },
    socket_close: {
        unsafe extern "C" fn close(context: *mut c_void, socket: u32, number: u32) {
            // SAFETY: as in `log_log`.
            unsafe { with(context, |services| services.socket(socket)?.close(number)) }
        }
        close
    },
    entropy_fill: {
        unsafe extern "C" fn fill(context: *mut c_void, request: Handle, offset: u32, length: u32) -> u32 {
            // SAFETY: as in `log_log`.
            unsafe { with(context, |services| services.fill(request.0, offset, length)) }
        }
        fill
    },
    guest_pages_release_numbered: {
        unsafe extern "C" fn release(context: *mut c_void, request: Handle) -> u32 {
            // SAFETY: as in `log_log`.
            unsafe { with(context, |services| services.release_numbered(request.0)) }
        }
        release
    },
    guest_pages_release_own: {
        unsafe extern "C" fn release(context: *mut c_void, request: Handle) -> u32 {
            // SAFETY: as in `log_log`.
            unsafe { with(context, |services| services.release_own(request.0)) }
        }
        release
    },
    guest_pages_memory_size: {
        unsafe extern "C" fn size(context: *mut c_void) -> u64 {
            // SAFETY: as in `log_log`.
            unsafe { with(context, |services| Ok(services.memory_size())) }
        }
        size
    },
    folder_act: {
        unsafe extern "C" fn act(
            context: *mut c_void,
            folder: u32,
            request: Handle,
            action: Bytes<'_>,
            output: Sink,
        ) -> u32 {
            // SAFETY: as in `log_log`; the sink came in this call.
            unsafe {
                with(context, |services| {
                    let action = wire::decode_folder_action(action.as_slice())
                        .map_err(|error| Misuse(error.to_string()))?;
                    Ok(match services.folder_act(folder, request.0, action)?.as_ref() {
                        Ok(outcome) => {
                            output.put(&wire::encode_folder_outcome(outcome));
                            0
                        }
                        Err(error) => error.0,
                    })
                })
            }
        }
        act
    },
    panicked: {
        unsafe extern "C" fn panicked(context: *mut c_void, message: Bytes<'_>) {
            // SAFETY: as in `log_log`.
            unsafe {
                let text = String::from_utf8_lossy(message.as_slice()).into_owned();
                (*context.cast::<Context>()).panic = Some(text);
            }
        }
        panicked
    },
};
