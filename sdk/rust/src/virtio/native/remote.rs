//! The host behind the host's table.

use std::ffi::c_void;

use tenon_abi::{
    Answer, Bytes, Errno, FolderAction, FolderOutcome, Handle, Level, Offloads, PortInfo, Request,
    RequestOperation, Sent, Sink, StoreInfo, StreamRecord, StreamState, VirtioHost, wire,
};

use crate::device::hosted as device;
use crate::native::count;
use crate::virtio::hosted;

/// The host's table with its context.
#[derive(Clone, Copy)]
pub(super) struct Remote {
    table: *const VirtioHost,
    context: *mut c_void,
}

impl Remote {
    /// The host of an instance that is being made: `table` is good until `destroy` has returned.
    pub(super) const fn new(table: *const VirtioHost, context: *mut c_void) -> Self {
        Self { table, context }
    }

    fn table(&self) -> &VirtioHost {
        // SAFETY: the host keeps its table until `destroy` has returned, and the instance that holds `self` ends there.
        unsafe { &*self.table }
    }

    pub(super) fn panicked(&self, message: &str) {
        // SAFETY: called during a call from the host, with the context that it gave.
        unsafe { (self.table().panicked)(self.context, Bytes::new(message.as_bytes())) }
    }
}

/// What a read of a request or channel may bring at once.
const MOST: u32 = 1 << 20;

// In both of these: the host's function is called during a call from the host (handles work at no other time), with the context that
// came with the table, and what is lent to it lives for the call.
impl device::Host for Remote {
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

    fn line_set_level(&self, _line: u32, _high: bool) {}

    fn line_pulse(&self, _line: u32) {}

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

    fn request(&self, _request: Request) {}
}

impl hosted::Host for Remote {
    fn read(&self, request: Handle, offset: u32, length: u32) -> Vec<u8> {
        let length = length.min(MOST);
        let mut buffer = vec![0; length as usize];
        // SAFETY: see above; the buffer has room for `length` bytes.
        let count = unsafe {
            (self.table().requests_read)(self.context, request, offset, length, buffer.as_mut_ptr())
        };
        buffer.truncate(count as usize);
        buffer
    }

    fn write(&self, request: Handle, offset: u32, bytes: &[u8]) -> u32 {
        // SAFETY: see above.
        unsafe { (self.table().requests_write)(self.context, request, offset, Bytes::new(bytes)) }
    }

    fn complete(&self, answers: &[Answer]) {
        // SAFETY: see above.
        unsafe { (self.table().requests_complete)(self.context, answers.as_ptr(), count(answers)) }
    }

    fn request_to_channel(&self, request: Handle, offset: u32, length: u32, channel: u32) -> u32 {
        // SAFETY: see above.
        unsafe { (self.table().requests_to_channel)(self.context, request, offset, length, channel) }
    }

    fn request_from_channel(&self, request: Handle, offset: u32, length: u32, channel: u32) -> u32 {
        // SAFETY: see above.
        unsafe { (self.table().requests_from_channel)(self.context, request, offset, length, channel) }
    }

    fn config_changed(&self) {
        // SAFETY: see above.
        unsafe { (self.table().requests_config_changed)(self.context) }
    }

    fn needs_reset(&self) {
        // SAFETY: see above.
        unsafe { (self.table().requests_needs_reset)(self.context) }
    }

    fn store_info(&self, store: u32) -> StoreInfo {
        let mut output = Vec::new();
        // SAFETY: see above.
        unsafe { (self.table().store_info)(self.context, store, Sink::to(&mut output)) };
        wire::decode_store_info(&output).expect("the host describes a store that it gave")
    }

    fn store_begin(&self, store: u32, operations: &[RequestOperation]) {
        // SAFETY: see above.
        unsafe { (self.table().store_begin)(self.context, store, operations.as_ptr(), count(operations)) }
    }

    fn port_info(&self, port: u32) -> PortInfo {
        let mut output = Vec::new();
        // SAFETY: see above.
        unsafe { (self.table().port_info)(self.context, port, Sink::to(&mut output)) };
        wire::decode_port_info(&output).expect("the host describes a port that it gave")
    }

    fn port_accept(&self, port: u32, offloads: Offloads) {
        // SAFETY: see above.
        unsafe { (self.table().port_accept)(self.context, port, offloads.to_bits()) }
    }

    fn port_send(&self, port: u32, requests: &[Handle]) {
        // SAFETY: see above.
        unsafe { (self.table().port_send)(self.context, port, requests.as_ptr(), count(requests)) }
    }

    fn port_waiting(&self, port: u32, max: u32) -> Vec<u32> {
        // No port keeps more.
        let max = max.min(64 << 10);
        let mut lengths = vec![0; max as usize];
        // SAFETY: see above; there is room for `max` numbers.
        let count = unsafe { (self.table().port_waiting)(self.context, port, max, lengths.as_mut_ptr()) };
        lengths.truncate(count as usize);
        lengths
    }

    fn port_receive(&self, port: u32, counts: &[u16], requests: &[Handle]) {
        let (frames, handles) = (count(counts), count(requests));
        // SAFETY: see above.
        unsafe {
            (self.table().port_receive)(
                self.context,
                port,
                counts.as_ptr(),
                frames,
                requests.as_ptr(),
                handles,
            )
        }
    }

    fn socket_connect(&self, socket: u32, port: u32) -> Option<u32> {
        let mut number = 0;
        // SAFETY: see above.
        let is_there = unsafe { (self.table().socket_connect)(self.context, socket, port, &raw mut number) };
        (is_there != 0).then_some(number)
    }

    fn socket_news(&self, socket: u32, max: u32) -> Vec<StreamState> {
        // No socket has more streams at once.
        let max = max.min(4096);
        let mut states = vec![StreamRecord::default(); max as usize];
        // SAFETY: see above; there is room for `max` states.
        let count = unsafe { (self.table().socket_news)(self.context, socket, max, states.as_mut_ptr()) };
        states.truncate(count as usize);
        states.into_iter().map(StreamState::from).collect()
    }

    fn socket_accept(&self, socket: u32, number: u32, port: u32) {
        // SAFETY: see above.
        unsafe { (self.table().socket_accept)(self.context, socket, number, port) }
    }

    fn socket_send(&self, socket: u32, request: Handle, offset: u32, length: u32, number: u32) -> Sent {
        let mut unsent = 0;
        let call = self.table().socket_send;
        // SAFETY: see above.
        let taken = unsafe { call(self.context, socket, request, offset, length, number, &raw mut unsent) };
        Sent { taken, unsent }
    }

    fn socket_receive(&self, socket: u32, request: Handle, offset: u32, length: u32, number: u32) -> u32 {
        // SAFETY: see above.
        unsafe { (self.table().socket_receive)(self.context, socket, request, offset, length, number) }
    }

    fn socket_shut(&self, socket: u32, number: u32, receive: bool, send: bool) {
        // SAFETY: see above.
        unsafe { (self.table().socket_shut)(self.context, socket, number, receive.into(), send.into()) }
    }

    fn socket_close(&self, socket: u32, number: u32) {
        // SAFETY: see above.
        unsafe { (self.table().socket_close)(self.context, socket, number) }
    }

    fn fill_random(&self, request: Handle, offset: u32, length: u32) -> u32 {
        // SAFETY: see above.
        unsafe { (self.table().entropy_fill)(self.context, request, offset, length) }
    }

    fn release_numbered(&self, request: Handle) -> u32 {
        // SAFETY: see above.
        unsafe { (self.table().guest_pages_release_numbered)(self.context, request) }
    }

    fn release_own(&self, request: Handle) -> u32 {
        // SAFETY: see above.
        unsafe { (self.table().guest_pages_release_own)(self.context, request) }
    }

    fn memory_size(&self) -> u64 {
        // SAFETY: see above.
        unsafe { (self.table().guest_pages_memory_size)(self.context) }
    }

    fn folder_act(
        &self,
        folder: u32,
        request: Handle,
        action: &FolderAction,
    ) -> Result<FolderOutcome, Errno> {
        let (action, mut output) = (wire::encode_folder_action(action), Vec::new());
        let (action, sink) = (Bytes::new(&action), Sink::to(&mut output));
        // SAFETY: see above.
        match unsafe { (self.table().folder_act)(self.context, folder, request, action, sink) } {
            // Nothing, after a misdeed: the host ends the instance when this call has returned.
            0 => wire::decode_folder_outcome(&output).map_err(|_| Errno::IO),
            error => Err(Errno(error)),
        }
    }
}
