//! Virtio devices of `tenon:device`: their records, and the two tables of a native virtio device.
//!
//! What is called for every batch of requests passes arrays of plain records by pointer and count; nothing is encoded there.

use std::ffi::c_void;

use crate::{Bytes, Sink, Status, StoreError};

/// The name of a request in every call about it, until it is completed. Handles are not reused before 2^32 requests.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Handle(pub u32);

/// One virtqueue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Queue {
    /// The name in listings and errors, such as `requests` or `rx0`.
    pub name: String,
    /// The most entries that the driver may give it: 1 to 32768; a power of two, since a split queue must have one.
    pub max_size: u16,
    /// How many of the first readable bytes come with each request: 0 to 256.
    pub head: u16,
}

/// Everything that a virtio device is and needs. The index of a queue, timer, channel, store, port, socket or folder is the number that later calls name it by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VirtioDescription {
    /// The virtio device type (virtio 1.2 §5), such as 1 for network, 2 for block.
    pub device_type: u16,
    /// The device-specific feature bits that it offers (0 to 23, and 50 to 63). Those of queues and transport are the host's.
    pub features: u64,
    /// The virtqueues, 1 to 256.
    pub queues: Vec<Queue>,
    /// The length of the configuration space in bytes: 0 to 4096.
    pub config_size: u16,
    /// How many one-shot or periodic timers.
    pub timers: u32,
    /// The names of byte channels to the outside.
    pub channels: Vec<String>,
    /// The names of the backing stores that it works on, such as `disk`.
    pub stores: Vec<String>,
    /// The names of its network ports.
    pub ports: Vec<String>,
    /// The names of its sockets.
    pub sockets: Vec<String>,
    /// The names of the folders of the host that it works in, such as `share`.
    pub folders: Vec<String>,
}

impl VirtioDescription {
    /// A device of this type that offers and needs nothing yet.
    #[must_use]
    pub fn new(device_type: u16) -> Self {
        Self { device_type, ..Self::default() }
    }

    /// Offers these feature bits too.
    #[must_use]
    pub fn features(mut self, bits: u64) -> Self {
        self.features |= bits;
        self
    }

    /// Adds a virtqueue of at most `max_size` entries, whose requests come with their first `head` readable bytes.
    #[must_use]
    pub fn queue(mut self, name: &str, max_size: u16, head: u16) -> Self {
        self.queues.push(Queue { name: name.to_owned(), max_size, head });
        self
    }

    /// Has a configuration space of `size` bytes.
    #[must_use]
    pub fn config(mut self, size: u16) -> Self {
        self.config_size = size;
        self
    }

    /// Adds a timer.
    #[must_use]
    pub fn timer(mut self) -> Self {
        self.timers = self.timers.saturating_add(1);
        self
    }

    /// Adds a byte channel to the outside.
    #[must_use]
    pub fn channel(mut self, name: &str) -> Self {
        self.channels.push(name.to_owned());
        self
    }

    /// Adds a backing store.
    #[must_use]
    pub fn store(mut self, name: &str) -> Self {
        self.stores.push(name.to_owned());
        self
    }

    /// Adds a network port.
    #[must_use]
    pub fn port(mut self, name: &str) -> Self {
        self.ports.push(name.to_owned());
        self
    }

    /// Adds a socket.
    #[must_use]
    pub fn socket(mut self, name: &str) -> Self {
        self.sockets.push(name.to_owned());
        self
    }

    /// Adds a folder of the host.
    #[must_use]
    pub fn folder(mut self, name: &str) -> Self {
        self.folders.push(name.to_owned());
        self
    }
}

/// A request that the driver made available: a readable part, and after it a writable part.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestRecord {
    /// The name of the request.
    pub handle: Handle,
    /// The length of the readable part in bytes.
    pub readable: u32,
    /// The length of the writable part in bytes.
    pub writable: u32,
    /// How many of the bytes that came with the batch belong to this request: the queue's `head`, or fewer when the readable part is shorter.
    pub head: u32,
}

/// The end of a request.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The request.
    pub request: Handle,
    /// How many bytes at the start of the writable part now hold the answer.
    pub written: u32,
}

/// An operation on a store for a request, which has at most one under way. When it succeeds and `success_length` is not 0, the host writes that many bytes of `success` into
/// the request's writable part (behind the data that was read; at 0 for other operations) and completes the request; the device hears no more of it. In every
/// other case the host tells the device how it ended.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestOperation {
    /// The request.
    pub request: Handle,
    /// One of [`RequestOperation::READ`] to [`RequestOperation::UNMAP_ZEROES`].
    pub kind: u32,
    /// The first byte in the request's part; 0 where no data moves.
    pub offset: u32,
    /// How many bytes of `success` are meant: 0 to 8.
    pub success_length: u32,
    /// The length in bytes: below 2^32 where data moves, 0 for a flush.
    pub length: u64,
    /// The first byte in the store; 0 for a flush.
    pub position: u64,
    /// What the host writes if it succeeds.
    pub success: [u8; 8],
}

impl RequestOperation {
    /// Reads from the store into the writable part.
    pub const READ: u32 = 0;
    /// Writes a part of the readable part to the store.
    pub const WRITE: u32 = 1;
    /// Makes everything durable whose write has been reported as done.
    pub const FLUSH: u32 = 2;
    /// Gives the space of a range back; it then reads as anything.
    pub const DISCARD: u32 = 3;
    /// Makes a range read as zeroes.
    pub const WRITE_ZEROES: u32 = 4;
    /// The same, and its space may be given back.
    pub const UNMAP_ZEROES: u32 = 5;

    const fn new(request: Handle, kind: u32, offset: u32, length: u64, position: u64) -> Self {
        Self { request, kind, offset, success_length: 0, length, position, success: [0; 8] }
    }

    /// Reads `length` bytes at `position` of the store into the writable part at `offset`.
    #[must_use]
    pub const fn read(request: Handle, offset: u32, length: u32, position: u64) -> Self {
        Self::new(request, Self::READ, offset, length as u64, position)
    }

    /// Writes `length` bytes of the readable part from `offset` to `position` of the store.
    #[must_use]
    pub const fn write(request: Handle, offset: u32, length: u32, position: u64) -> Self {
        Self::new(request, Self::WRITE, offset, length as u64, position)
    }

    /// Makes everything durable whose write has been reported as done.
    #[must_use]
    pub const fn flush(request: Handle) -> Self {
        Self::new(request, Self::FLUSH, 0, 0, 0)
    }

    /// Gives the space of a range back; it then reads as anything.
    #[must_use]
    pub const fn discard(request: Handle, position: u64, length: u64) -> Self {
        Self::new(request, Self::DISCARD, 0, length, position)
    }

    /// Makes a range read as zeroes; with `unmap`, space may be given back.
    #[must_use]
    pub const fn write_zeroes(request: Handle, position: u64, length: u64, unmap: bool) -> Self {
        let kind = if unmap { Self::UNMAP_ZEROES } else { Self::WRITE_ZEROES };
        Self::new(request, kind, 0, length, position)
    }

    /// Has the host answer with these bytes if the operation succeeds.
    ///
    /// # Panics
    /// They are more than 8.
    #[must_use]
    pub fn answering(mut self, success: &[u8]) -> Self {
        self.success[..success.len()].copy_from_slice(success);
        self.success_length = success.len().try_into().unwrap_or(u32::MAX);
        self
    }

    /// The bytes that the host writes if the operation succeeds; none if the operation asks for more than there can be.
    #[must_use]
    pub fn success(&self) -> Option<&[u8]> {
        self.success.get(..usize::try_from(self.success_length).ok()?)
    }
}

/// The outcome of an operation on a store.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OperationDone {
    /// The request that named the operation. It still waits to be completed.
    pub request: Handle,
    /// 0 if the operation succeeded, or the number of a [`StoreError`].
    pub error: u32,
}

impl OperationDone {
    /// The outcome of the operation that `request` named.
    #[must_use]
    pub const fn new(request: Handle, result: Result<(), StoreError>) -> Self {
        Self { request, error: StoreError::number_of(result) }
    }

    /// What the operation came to.
    ///
    /// # Errors
    /// It failed.
    pub const fn result(self) -> Result<(), StoreError> {
        StoreError::result(self.error)
    }
}

/// What a driver on one side of a network port leaves to the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Checksums are left to be filled in.
    pub checksum: bool,
    /// TCP over IPv4 comes in segments of up to 64 KiB.
    pub tso4: bool,
    /// TCP over IPv6 comes in segments of up to 64 KiB.
    pub tso6: bool,
}

impl Offloads {
    /// The offloads as the bits of a number, in the order of the fields.
    #[must_use]
    pub const fn to_bits(self) -> u32 {
        self.checksum as u32 | (self.tso4 as u32) << 1 | (self.tso6 as u32) << 2
    }

    /// The offloads of these bits. Others are passed over.
    #[must_use]
    pub const fn from_bits(bits: u32) -> Self {
        Self { checksum: bits & 1 != 0, tso4: bits & 2 != 0, tso6: bits & 4 != 0 }
    }
}

/// What a network port is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortInfo {
    /// The MAC address of the guest's side.
    pub mac: [u8; 6],
    /// The largest frame payload in bytes: 68 to 65535.
    pub mtu: u16,
    /// Whether the link is up.
    pub link_up: bool,
    /// What the outside can be given.
    pub send: Offloads,
    /// What the outside can give, once the driver accepts it.
    pub receive: Offloads,
}

/// How a stream of a socket is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StreamState {
    /// Its number.
    pub number: u32,
    /// The port in the guest that a program outside asks for, until the stream is accepted. None for a stream that the device has begun.
    pub wanted: Option<u32>,
    /// There may be bytes to receive.
    pub readable: bool,
    /// No bytes will come any more, and everything was received.
    pub ended: bool,
    /// The program outside takes no more bytes.
    pub deaf: bool,
    /// How many bytes that were sent the program outside has not been given yet.
    pub unsent: u32,
}

/// What came of sending.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// How many bytes were taken, from the front.
    pub taken: u32,
    /// How many bytes that were sent the program outside has not been given yet.
    pub unsent: u32,
}

/// A [`StreamState`] as the tables pass it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StreamRecord {
    /// The stream's number.
    pub number: u32,
    /// The port that is wanted; 0 if none is.
    pub wanted: u32,
    /// As in the state.
    pub unsent: u32,
    /// Bit 0: a port is wanted; 1: readable; 2: ended; 3: deaf. The others are 0.
    pub flags: u32,
}

impl From<StreamState> for StreamRecord {
    fn from(state: StreamState) -> Self {
        let StreamState { number, wanted, readable, ended, deaf, unsent } = state;
        let flags = [wanted.is_some(), readable, ended, deaf];
        let flags = flags.iter().rev().fold(0, |bits, flag| bits << 1 | u32::from(*flag));
        Self { number, wanted: wanted.unwrap_or(0), unsent, flags }
    }
}

impl From<StreamRecord> for StreamState {
    fn from(record: StreamRecord) -> Self {
        let StreamRecord { number, wanted, unsent, flags } = record;
        let has = |bit: u32| flags & 1 << bit != 0;
        Self {
            number,
            wanted: has(0).then_some(wanted),
            readable: has(1),
            ended: has(2),
            deaf: has(3),
            unsent,
        }
    }
}

table! {
    /// What the host offers a virtio device. Names follow the rule of [`crate::DeviceHost`]. An index of a timer, channel, store, port or folder that the
    /// device was not given does nothing. A misdeed that ends the instance by the WIT, such as a handle that the device does not hold, changes nothing
    /// and returns 0; the host ends the instance when the call into it has returned.
    pub struct VirtioHost {
        /// Logs one message; `level` is a [`crate::Level`] as number, the message is UTF-8.
        log_log: fn(context: *mut c_void, level: u32, message: Bytes<'_>);
        /// Nanoseconds of the machine's clock.
        time_now: fn(context: *mut c_void) -> u64;
        /// Fires once at `deadline`.
        timer_arm: fn(context: *mut c_void, timer: u32, deadline: u64);
        /// Fires at `first`, then every `period` nanoseconds.
        timer_arm_periodic: fn(context: *mut c_void, timer: u32, first: u64, period: u64);
        /// Stops the timer.
        timer_cancel: fn(context: *mut c_void, timer: u32);
        /// Nanoseconds since 1970-01-01 00:00:00 UTC.
        wall_clock_now: fn(context: *mut c_void) -> u64;
        /// Gives bytes to the outside; returns how many were taken.
        channel_write: fn(context: *mut c_void, channel: u32, bytes: Bytes<'_>) -> u32;
        /// Copies at most `max` bytes that came from the outside to `buffer`, which has room for them; returns how many.
        channel_read: fn(context: *mut c_void, channel: u32, buffer: *mut u8, max: u32) -> u32;
        /// Copies at most `length` bytes of the readable part from `offset` to `buffer`, which has room for them; returns how many.
        requests_read: fn(context: *mut c_void, request: Handle, offset: u32, length: u32, buffer: *mut u8) -> u32;
        /// Copies bytes into the writable part; returns how many fitted.
        requests_write: fn(context: *mut c_void, request: Handle, offset: u32, bytes: Bytes<'_>) -> u32;
        /// Completes `count` requests, in this order.
        requests_complete: fn(context: *mut c_void, answers: *const Answer, count: u32);
        /// Moves bytes of the readable part to the outside; returns how many were taken.
        requests_to_channel: fn(context: *mut c_void, request: Handle, offset: u32, length: u32, channel: u32) -> u32;
        /// Moves bytes from the outside into the writable part; returns how many there were.
        requests_from_channel: fn(context: *mut c_void, request: Handle, offset: u32, length: u32, channel: u32) -> u32;
        /// As in the WIT.
        requests_config_changed: fn(context: *mut c_void);
        /// As in the WIT.
        requests_needs_reset: fn(context: *mut c_void);
        /// The sink gets the encoded [`crate::StoreInfo`] ([`crate::wire::encode_store_info`]).
        store_info: fn(context: *mut c_void, store: u32, output: Sink);
        /// Begins `count` operations, in this order.
        store_begin: fn(context: *mut c_void, store: u32, operations: *const RequestOperation, count: u32);
        /// The sink gets the encoded [`PortInfo`] ([`crate::wire::encode_port_info`]).
        port_info: fn(context: *mut c_void, port: u32, output: Sink);
        /// What the driver accepts, as [`Offloads::to_bits`].
        port_accept: fn(context: *mut c_void, port: u32, offloads: u32);
        /// Sends the readable parts of `count` requests as frames, and completes them.
        port_send: fn(context: *mut c_void, port: u32, requests: *const Handle, count: u32);
        /// The lengths of the first frames that wait go to `lengths`, which has room for `max`; returns how many.
        port_waiting: fn(context: *mut c_void, port: u32, max: u32, lengths: *mut u32) -> u32;
        /// Takes `frames` frames into requests: `counts` has an entry for each frame, `requests` their sum.
        port_receive: fn(context: *mut c_void, port: u32, counts: *const u16, frames: u32, requests: *const Handle, count: u32);
        /// The number of the new stream goes to `number`; returns 1 if there is one, else 0.
        socket_connect: fn(context: *mut c_void, socket: u32, port: u32, number: *mut u32) -> u32;
        /// The states go to `states`, which has room for `max`; returns how many.
        socket_news: fn(context: *mut c_void, socket: u32, max: u32, states: *mut StreamRecord) -> u32;
        /// As in the WIT.
        socket_accept: fn(context: *mut c_void, socket: u32, number: u32, port: u32);
        /// Moves bytes of the readable part to a stream; returns how many were taken. How many are kept goes to `unsent`.
        socket_send: fn(context: *mut c_void, socket: u32, request: Handle, offset: u32, length: u32, number: u32, unsent: *mut u32) -> u32;
        /// Moves bytes of a stream into the writable part; returns how many there were.
        socket_receive: fn(context: *mut c_void, socket: u32, request: Handle, offset: u32, length: u32, number: u32) -> u32;
        /// As in the WIT; `receive` and `send` are 0 or 1.
        socket_shut: fn(context: *mut c_void, socket: u32, number: u32, receive: u32, send: u32);
        /// As in the WIT.
        socket_close: fn(context: *mut c_void, socket: u32, number: u32);
        /// Fills a part of the writable part with random bytes; returns how many.
        entropy_fill: fn(context: *mut c_void, request: Handle, offset: u32, length: u32) -> u32;
        /// As in the WIT.
        guest_pages_release_numbered: fn(context: *mut c_void, request: Handle) -> u32;
        /// As in the WIT.
        guest_pages_release_own: fn(context: *mut c_void, request: Handle) -> u32;
        /// As in the WIT.
        guest_pages_memory_size: fn(context: *mut c_void) -> u64;
        /// `action` is encoded ([`crate::wire::encode_folder_action`]). Returns 0, and the sink gets what it came to ([`crate::wire::encode_folder_outcome`]); or a [`crate::Errno`].
        folder_act: fn(context: *mut c_void, folder: u32, request: Handle, action: Bytes<'_>, output: Sink) -> u32;
        /// Not in the WIT: the plugin panicked with this text (UTF-8) in the call that is about to return [`Status::TRAPPED`].
        panicked: fn(context: *mut c_void, message: Bytes<'_>);
    }
}

table! {
    /// What a virtio device does. Each function but `create` takes the instance that `create` returned.
    pub struct VirtioTable {
        /// Not in the WIT: makes an instance, or returns null. `host` and `context` are good until `destroy` has returned.
        create: fn(host: *const VirtioHost, context: *mut c_void) -> *mut c_void;
        /// Not in the WIT: ends an instance, also one that trapped. It may still call the host.
        destroy: fn(instance: *mut c_void);
        /// `config` is encoded settings ([`crate::wire::encode_settings`]); the sink gets the description
        /// ([`crate::wire::encode_virtio_description`]), or the error.
        describe: fn(instance: *mut c_void, config: Bytes<'_>, output: Sink) -> Status;
        /// How many timers, channels, stores, ports, sockets and folders were granted: all that the description asked for. The sink gets the error, if any.
        start: fn(instance: *mut c_void, timers: u32, channels: u32, stores: u32, ports: u32, sockets: u32, folders: u32, output: Sink) -> Status;
        /// The sink gets the error, if any.
        activate: fn(instance: *mut c_void, features: u64, output: Sink) -> Status;
        /// The value goes to `value`.
        config_read: fn(instance: *mut c_void, offset: u32, size: u32, value: *mut u64) -> Status;
        /// As in the WIT.
        config_write: fn(instance: *mut c_void, offset: u32, size: u32, value: u64) -> Status;
        /// `count` requests of queue number `queue`, and their first readable bytes, one after the other.
        requests_ready: fn(instance: *mut c_void, queue: u32, requests: *const RequestRecord, count: u32, heads: Bytes<'_>) -> Status;
        /// `count` outcomes.
        operations_done: fn(instance: *mut c_void, done: *const OperationDone, count: u32) -> Status;
        /// As in the WIT.
        port_ready: fn(instance: *mut c_void, port: u32) -> Status;
        /// As in the WIT.
        port_changed: fn(instance: *mut c_void, port: u32) -> Status;
        /// As in the WIT.
        socket_ready: fn(instance: *mut c_void, socket: u32) -> Status;
        /// As in the WIT.
        store_changed: fn(instance: *mut c_void, store: u32) -> Status;
        /// As in the WIT.
        channel_readable: fn(instance: *mut c_void, channel: u32) -> Status;
        /// As in the WIT.
        channel_writable: fn(instance: *mut c_void, channel: u32) -> Status;
        /// As in the WIT.
        timer_fired: fn(instance: *mut c_void, timer: u32) -> Status;
        /// Key and value are UTF-8. The sink gets the error, if any.
        adjust: fn(instance: *mut c_void, key: Bytes<'_>, value: Bytes<'_>, output: Sink) -> Status;
        /// As in the WIT.
        reset: fn(instance: *mut c_void) -> Status;
        /// The schema goes to `schema`, the data to the sink; or the error.
        save: fn(instance: *mut c_void, schema: *mut u32, output: Sink) -> Status;
        /// The sink gets the error, if any.
        restore: fn(instance: *mut c_void, schema: u32, data: Bytes<'_>, output: Sink) -> Status;
    }
}

// Layouts that both sides rely on.
const _: () = {
    assert!(size_of::<RequestRecord>() == 16 && align_of::<RequestRecord>() == 4);
    assert!(size_of::<RequestOperation>() == 40 && align_of::<RequestOperation>() == 8);
    assert!(size_of::<StreamRecord>() == 16 && align_of::<StreamRecord>() == 4);
    assert!(size_of::<Answer>() == 8 && size_of::<OperationDone>() == 8 && size_of::<Handle>() == 4);
};
