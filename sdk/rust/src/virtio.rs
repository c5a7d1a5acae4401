//! Virtio devices: the trait, and the handles and calls that a device has of its host.
//!
//! The host owns the transport and the rings. A device says what it is, sees its configuration space, and gets requests in batches: each is a [`Handle`]
//! with the lengths of its readable and its writable part, and with its first readable bytes. The device answers now or later, in any order. Data that it need not look
//! at does not pass through it: [`Store::begin`] moves bytes between a backing store and requests, [`Port::send`] a request to the network.
//!
//! ```
//! use tenon_sdk::virtio::{self, Attachment, Batch, Config, Decoder, Encoder, Result, VirtioDescription, VirtioDevice};
//!
//! /// An entropy device (virtio 1.2 §5.4): fills what the driver gives it.
//! struct Entropy;
//!
//! impl VirtioDevice for Entropy {
//!     fn describe(_config: &Config) -> Result<VirtioDescription> {
//!         Ok(VirtioDescription::new(4).queue("requests", 64, 0))
//!     }
//!     fn start(_config: &Config, _attachment: Attachment) -> Result<Self> {
//!         Ok(Self)
//!     }
//!     fn requests_ready(&mut self, _queue: u16, batch: &Batch<'_>) {
//!         for request in batch.iter() {
//!             virtio::complete(request.handle, virtio::fill_random(request.handle, 0, request.writable));
//!         }
//!     }
//!     fn reset(&mut self) {}
//!     fn save(&self, _state: &mut Encoder) -> Result<()> {
//!         Ok(())
//!     }
//!     fn restore(&mut self, _state: &mut Decoder<'_>) -> Result<()> {
//!         Ok(())
//!     }
//! }
//!
//! tenon_sdk::export_virtio_device!(Entropy);
//! # fn main() {}
//! ```
//!
//! Handles and free functions work during a call from the host; each interface that a plugin uses shows in its component as one import, which is
//! one permission:
//!
//! | used | permission |
//! | --- | --- |
//! | [`error!`], [`warn!`], [`info!`], [`debug!`], [`trace!`], [`log`] | `log` |
//! | [`now`], [`Timer`] | `time` |
//! | [`wall_clock`] | `wall-clock` |
//! | [`Channel`] | `channels` |
//! | [`read`], [`write`](write()), [`complete`], [`complete_all`], [`to_channel`], [`from_channel`], [`config_changed`], [`needs_reset`] | `requests` |
//! | [`Store`] | `stores` |
//! | [`Port`] | `ports` |
//! | [`Socket`] | `sockets` |
//! | [`fill_random`] | `entropy` |
//! | [`release_numbered`], [`release_own`], [`memory_size`] | `guest-pages` |
//! | [`Folder`] | `folders` |
//!
//! A misdeed, such as a handle that the device does not hold, ends the instance, as a panic does: the host makes a new one from the last saved state and gives it the unfinished
//! requests again.
//!
//! Long for the documentation of what a device does and has.

#[cfg(target_arch = "wasm32")]
#[doc(hidden)]
pub mod component;
mod folder;
#[cfg(not(target_arch = "wasm32"))]
pub mod hosted;
#[cfg(not(target_arch = "wasm32"))]
#[doc(hidden)]
pub mod native;

#[cfg(target_arch = "wasm32")]
use component as sys;
#[cfg(not(target_arch = "wasm32"))]
use hosted as sys;

pub use folder::Folder;
pub use tenon_abi::{
    Access, AllocateHow, Attributes, Changes, Errno, FileRange, FileTime, FolderAction, FolderEntry,
    FolderItem, FolderOutcome, FolderStatistics, NewFile, NewTime, Node, OpenFile, Place, RenameHow,
};
pub use tenon_abi::{
    Answer, Handle, Offloads, OperationDone, PortInfo, Queue, RequestOperation, RequestRecord, Sent,
    StoreError, StoreInfo, StreamState, VirtioDescription,
};

pub use crate::device::{
    Channel, Config, Decoder, Encoder, Error, Level, Result, SavedState, Timer, debug, error, info, log, now,
    trace, wall_clock, warn,
};

/// A virtio device. The host makes one call at a time; calls come from different threads.
///
/// A panic ends this instance and nothing else: the host makes a new one from the last saved state, and gives it every unfinished request again.
pub trait VirtioDevice: Sized + Send + 'static {
    /// The schema that [`VirtioDevice::save`] writes, to be raised whenever the layout of the state changes. It is also `[state] schema` in `plugin.toml`.
    const SCHEMA: u32 = 1;

    /// Says what the device is and needs, given its configuration. The host calls it once, before anything else, on the thread that assembles
    /// the machine, and grants all or refuses the device. There are no handles yet.
    ///
    /// # Errors
    /// The configuration is not one that the device accepts.
    fn describe(config: &Config) -> Result<VirtioDescription>;

    /// Makes the device, as after power-on, with the handles of everything that the description asked for. The device keeps those
    /// that it needs. The host calls it once, after `describe` with the same configuration.
    ///
    /// # Errors
    /// The device cannot start.
    fn start(config: &Config, attachment: Attachment) -> Result<Self>;

    /// The driver has set DRIVER_OK, having accepted these feature bits: a subset of those offered, and those of the host (virtio 1.2 §6). Requests follow.
    ///
    /// # Errors
    /// The device cannot work with these; the driver is told so.
    fn activate(&mut self, features: u64) -> Result<()> {
        let _ = features;
        Ok(())
    }

    /// The driver reads `size` bytes (1, 2, 4 or 8) at `offset` of the configuration space; the host has checked the range. Bits above the size are ignored.
    /// Called on the vCPU's thread, which waits for the answer.
    fn config_read(&mut self, offset: u32, size: u8) -> u64 {
        let _ = offset;
        u64::MAX >> (64 - 8 * u32::from(size.clamp(1, 8)))
    }

    /// The driver writes `size` bytes. Fields that the driver may not write take no notice. Otherwise as [`VirtioDevice::config_read`].
    fn config_write(&mut self, offset: u32, size: u8, value: u64) {
        let _ = (offset, size, value);
    }

    /// Requests have come in queue number `queue`: as many as were ready, at most 256. The device answers them now or later, in any order; it
    /// keeps no more of them than their handles and lengths. Called on the instance's worker thread, as all that follow.
    ///
    /// A driver is hostile: parts may have any length, also 0, and hold anything; bytes that were not read yet may change.
    fn requests_ready(&mut self, queue: u16, batch: &Batch<'_>);

    /// Operations on stores have ended of which the device is to hear: those that failed, and those that were begun without `success` bytes. Their requests wait to
    /// be completed.
    fn operations_done(&mut self, done: &[OperationDone]) {
        let _ = done;
    }

    /// Port number `port` has frames that wait. Called again only after [`Port::waiting`] has given fewer than it was asked for.
    fn port_ready(&mut self, port: u32) {
        let _ = port;
    }

    /// Port number `port` has another [`PortInfo`].
    fn port_changed(&mut self, port: u32) {
        let _ = port;
    }

    /// Socket number `socket` has news of its streams. Called again only after [`Socket::news`] has given fewer than it was asked for.
    fn socket_ready(&mut self, socket: u32) {
        let _ = socket;
    }

    /// Store number `store` has another [`StoreInfo`].
    fn store_changed(&mut self, store: u32) {
        let _ = store;
    }

    /// Channel number `channel` has bytes to read. Called again only after a read that gave fewer bytes than it was asked for.
    fn channel_readable(&mut self, channel: u32) {
        let _ = channel;
    }

    /// Channel number `channel` takes bytes again. Called only after a write of which fewer were taken than offered.
    fn channel_writable(&mut self, channel: u32) {
        let _ = channel;
    }

    /// Timer number `timer` reached its deadline. A call may still arrive shortly after the timer was cancelled.
    fn timer_fired(&mut self, timer: u32) {
        let _ = timer;
    }

    /// The administrator changes a setting while the machine runs.
    ///
    /// # Errors
    /// The setting cannot be changed, or not to this value. The device is as it was.
    fn adjust(&mut self, key: &str, value: &str) -> Result<()> {
        let _ = value;
        Err(Error::Unsupported(format!("`{key}` cannot be changed while the machine runs")))
    }

    /// Puts the device into its state after power-on: the driver has reset it. Every request has ended, timers are to be cancelled, handles from `start` stay valid.
    /// Settings stay as adjusted.
    fn reset(&mut self);

    /// Writes the whole state without requests, from which [`VirtioDevice::restore`] makes an equal device. The host calls it between other calls, and
    /// often: it must be quick and change nothing.
    ///
    /// # Errors
    /// The device cannot be saved now.
    fn save(&self, state: &mut Encoder) -> Result<()>;

    /// Takes over a saved state, after [`VirtioDevice::start`] and before anything else. Unfinished requests follow by [`VirtioDevice::requests_ready`], in the order in which
    /// they came. The device arms its timers, and tells its ports what the driver accepts, as the state says. `state` may come from an older version
    /// ([`Decoder::schema`]); newer ones were refused before this call, and bytes left over are refused after it.
    ///
    /// # Errors
    /// The state cannot be read. The host then drops the instance.
    fn restore(&mut self, state: &mut Decoder<'_>) -> Result<()>;
}

/// Requests that have come in one queue, in their order.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    records: &'a [RequestRecord],
    heads: &'a [u8],
}

impl<'a> Batch<'a> {
    /// These requests, with their first readable bytes one after the other.
    #[must_use]
    pub const fn new(records: &'a [RequestRecord], heads: &'a [u8]) -> Self {
        Self { records, heads }
    }

    /// The requests.
    pub fn iter(&self) -> impl Iterator<Item = Request<'a>> + use<'a> {
        let mut heads = self.heads;
        self.records.iter().map(move |record| {
            let (head, rest) = heads.split_at_checked(record.head as usize).unwrap_or((heads, &[]));
            heads = rest;
            let RequestRecord { handle, readable, writable, .. } = *record;
            Request { handle, readable, writable, head }
        })
    }

    /// How many there are.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.records.len()
    }

    /// Whether there is none. The host gives no such batch.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.records.is_empty()
    }
}

/// A request: a readable part, and after it a writable part, each a row of bytes whose places in guest memory only the host knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request<'a> {
    /// Its name in every later call.
    pub handle: Handle,
    /// The length of the readable part in bytes.
    pub readable: u32,
    /// The length of the writable part in bytes.
    pub writable: u32,
    /// The first readable bytes: as many as the description asked for, or all that there are. They do not change any more.
    pub head: &'a [u8],
}

/// The handles of everything that the description asked for, in its order.
pub struct Attachment {
    timers: std::vec::IntoIter<Timer>,
    channels: std::vec::IntoIter<Channel>,
    stores: std::vec::IntoIter<Store>,
    ports: std::vec::IntoIter<Port>,
    sockets: std::vec::IntoIter<Socket>,
    folders: std::vec::IntoIter<Folder>,
}

impl Attachment {
    /// The next timer: the first call gives timer 0.
    ///
    /// # Errors
    /// The description asked for no more.
    pub fn timer(&mut self) -> Result<Timer> {
        self.timers.next().ok_or_else(|| missing("timer"))
    }

    /// The next channel: the first call gives channel 0.
    ///
    /// # Errors
    /// The description asked for no more.
    pub fn channel(&mut self) -> Result<Channel> {
        self.channels.next().ok_or_else(|| missing("channel"))
    }

    /// The next backing store: the first call gives store 0.
    ///
    /// # Errors
    /// The description asked for no more.
    pub fn store(&mut self) -> Result<Store> {
        self.stores.next().ok_or_else(|| missing("store"))
    }

    /// The next network port: the first call gives port 0.
    ///
    /// # Errors
    /// The description asked for no more.
    pub fn port(&mut self) -> Result<Port> {
        self.ports.next().ok_or_else(|| missing("port"))
    }

    /// The next socket: the first call gives socket 0.
    ///
    /// # Errors
    /// The description asked for no more.
    pub fn socket(&mut self) -> Result<Socket> {
        self.sockets.next().ok_or_else(|| missing("socket"))
    }

    /// The next folder of the host: the first call gives folder 0.
    ///
    /// # Errors
    /// The description asked for no more.
    pub fn folder(&mut self) -> Result<Folder> {
        self.folders.next().ok_or_else(|| missing("folder"))
    }
}

fn missing(what: &str) -> Error {
    Error::Other(format!("the device takes one more {what} than its description asks for"))
}

/// The field of `size` bytes at `offset` of a configuration space, as [`VirtioDevice::config_read`] gives it. What lies past its end is zero.
///
/// ```
/// let capacity = 2048_u64.to_le_bytes();
/// assert_eq!(tenon_sdk::virtio::field(&capacity, 0, 8), 2048);
/// assert_eq!(tenon_sdk::virtio::field(&capacity, 1, 2), 8);
/// ```
#[must_use]
pub fn field(space: &[u8], offset: u32, size: u8) -> u64 {
    let mut value = [0; 8];
    let bytes = space.iter().skip(usize::try_from(offset).unwrap_or(usize::MAX)).take(size.into());
    value.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    u64::from_le_bytes(value)
}

/// Copies `length` bytes (at most 1 MiB) of the readable part from `offset`; fewer where the part ends. The driver may change what has not been read yet, so what
/// was checked must not be read twice.
#[must_use]
pub fn read(request: Handle, offset: u32, length: u32) -> Vec<u8> {
    sys::read(request, offset, length)
}

/// Copies bytes into the writable part at `offset`. Returns how many fitted.
pub fn write(request: Handle, offset: u32, bytes: &[u8]) -> u32 {
    sys::write(request, offset, bytes)
}

/// Completes a request: `written` bytes at the start of its writable part now hold the answer. Its handle ends. A request with an operation on a store
/// under way cannot be completed.
pub fn complete(request: Handle, written: u32) {
    complete_all(&[Answer { request, written }]);
}

/// Completes requests, in this order: one call to the host for all of them.
pub fn complete_all(answers: &[Answer]) {
    if !answers.is_empty() {
        sys::complete(answers);
    }
}

/// Moves at most `length` bytes of the readable part from `offset` to the outside. Returns how many were taken, from the front. When that is fewer,
/// the host calls [`VirtioDevice::channel_writable`] once there is room again.
#[must_use]
pub fn to_channel(request: Handle, offset: u32, length: u32, channel: &Channel) -> u32 {
    sys::to_channel(request, offset, length, channel)
}

/// Moves at most `length` bytes that came from the outside into the writable part at `offset`. Returns how many there were. When that is fewer, the host
/// calls [`VirtioDevice::channel_readable`] when there are more.
#[must_use]
pub fn from_channel(request: Handle, offset: u32, length: u32, channel: &Channel) -> u32 {
    sys::from_channel(request, offset, length, channel)
}

/// Tells the driver that the configuration space has changed. The host reads it again.
pub fn config_changed() {
    sys::config_changed();
}

/// Tells the driver that the device needs a reset (DEVICE_NEEDS_RESET), because it broke the protocol in a way from which there is no way on. No further request is
/// given until then. A request that is merely wrong is answered with an error instead.
pub fn needs_reset() {
    sys::needs_reset();
}

/// Fills `length` bytes of the writable part from `offset` with random bytes of the host. Returns how many, which is fewer where the part ends.
pub fn fill_random(request: Handle, offset: u32, length: u32) -> u32 {
    sys::fill_random(request, offset, length)
}

/// The readable part is a list of 32-bit little-endian numbers of 4 KiB pages (virtio 1.2 §5.5.6): gives these pages of guest memory back to the host. Numbers outside RAM are passed
/// over. Returns how many pages were given back.
pub fn release_numbered(request: Handle) -> u32 {
    sys::release_numbered(request)
}

/// Gives back the pages of the request's own writable part, as far as they are whole. Returns how many.
pub fn release_own(request: Handle) -> u32 {
    sys::release_own(request)
}

/// The guest's memory in bytes.
#[must_use]
pub fn memory_size() -> u64 {
    sys::memory_size()
}

/// A backing store. Data moves between it and a request without passing through the device.
pub struct Store(sys::Store);

impl Store {
    /// What it is now. The host calls [`VirtioDevice::store_changed`] when that changes.
    #[must_use]
    pub fn info(&self) -> StoreInfo {
        self.0.info()
    }

    /// Begins operations, in this order; they may end in any other. A request has at most one under way. What is begun together costs one call.
    pub fn begin(&self, operations: &[RequestOperation]) {
        if !operations.is_empty() {
            self.0.begin(operations);
        }
    }
}

/// A network port. Every frame begins with the 12-byte header `virtio_net_hdr_v1` (virtio 1.2 §5.1.6), in both directions.
pub struct Port(sys::Port);

impl Port {
    /// What it is now. The host calls [`VirtioDevice::port_changed`] when that changes.
    #[must_use]
    pub fn info(&self) -> PortInfo {
        self.0.info()
    }

    /// What the driver accepts of received frames. None until set.
    pub fn accept(&self, offloads: Offloads) {
        self.0.accept(offloads);
    }

    /// Sends the readable part of each request as one frame, in order, and completes the requests. A frame that the outside cannot take, or whose header is wrong,
    /// is dropped and counted.
    pub fn send(&self, requests: &[Handle]) {
        if !requests.is_empty() {
            self.0.send(requests);
        }
    }

    /// The lengths of the first frames that wait (at most `max`), each with its header. When there are fewer, the host calls [`VirtioDevice::port_ready`] when there
    /// are more.
    #[must_use]
    pub fn waiting(&self, max: u32) -> Vec<u32> {
        self.0.waiting(max)
    }

    /// Takes frames from the front: frame `i` goes into the writable parts of the next `counts[i]` of the requests, each filled whole but the last, and the header's
    /// `num_buffers` is set to that count. With a count of 0 the frame is dropped; what finds no room is cut. The requests that took part are completed, in order. There are
    /// as many requests as the sum of the counts, and no more counts than frames that wait.
    pub fn receive(&self, counts: &[u16], requests: &[Handle]) {
        if !counts.is_empty() {
            self.0.receive(counts, requests);
        }
    }
}

/// A place outside where programs listen and connect. Streams of bytes go to and from them; each is named by a number, and is the device's until it closes it.
///
/// A number that the device does not hold ends the instance. A new instance has no streams: the host closes those of the old one.
pub struct Socket(sys::Socket);

impl Socket {
    /// Begins a stream to the program that listens outside as `port`. None if there is none, or there are too many streams (1024 of a socket).
    #[must_use]
    pub fn connect(&self, port: u32) -> Option<u32> {
        self.0.connect(port)
    }

    /// How those streams are, at most `max`, that are no longer as the device was last told, and those that programs outside have begun. When there are fewer, the
    /// host calls [`VirtioDevice::socket_ready`] when there are more.
    #[must_use]
    pub fn news(&self, max: u32) -> Vec<StreamState> {
        self.0.news(max)
    }

    /// Takes a stream that a program outside has begun. The program is told so, and `port` as the number of its own end. Bytes flow from then on.
    pub fn accept(&self, number: u32, port: u32) {
        self.0.accept(number, port);
    }

    /// Moves at most `length` bytes (and 1 MiB) of the readable part from `offset` to the outside. All are taken but those that would make the host keep more than 64 KiB of a
    /// stream. [`Socket::news`] tells when the program outside was given some of those that are kept.
    #[must_use]
    pub fn send(&self, request: Handle, offset: u32, length: u32, number: u32) -> Sent {
        self.0.send(request, offset, length, number)
    }

    /// Moves at most `length` bytes (and 1 MiB) that came from the outside into the writable part at `offset`. Returns how many there were. When that is fewer,
    /// [`Socket::news`] tells of the stream when there are more, or when there will be none.
    #[must_use]
    pub fn receive(&self, request: Handle, offset: u32, length: u32, number: u32) -> u32 {
        self.0.receive(request, offset, length, number)
    }

    /// Ends the stream's directions: with `receive` nothing more is taken from the outside, with `send` nothing more is sent, and the program is told so once it has
    /// been given what was sent before.
    pub fn shut(&self, number: u32, receive: bool, send: bool) {
        self.0.shut(number, receive, send);
    }

    /// Gives the stream up. What was sent before still goes out, if it was accepted.
    pub fn close(&self, number: u32) {
        self.0.close(number);
    }
}

/// Saves a device, as the host does.
///
/// # Errors
/// The device refuses.
pub fn save<D: VirtioDevice>(device: &D) -> Result<SavedState> {
    crate::state::save(D::SCHEMA, |state| device.save(state))
}

/// Restores a device that was just started, as the host does: newer schemas, and bytes that the device left, are refused.
///
/// # Errors
/// The state is not one of this device, or is damaged.
pub fn restore<D: VirtioDevice>(device: &mut D, state: &SavedState) -> Result<()> {
    crate::state::restore(D::SCHEMA, state, |state| device.restore(state))
}
