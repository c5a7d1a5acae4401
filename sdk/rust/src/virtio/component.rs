//! The virtio device as a component: handles are the contract's resources, and the exports call the one device that the component holds.
#![allow(unsafe_code, reason = "generated bindings")]

use std::cell::RefCell;
use std::thread::LocalKey;

mod folder;

use self::bindings::exports::tenon::device::virtio_device as exports;
use self::bindings::tenon::device as imports;
use super::{
    Answer, Batch, Config, Handle, Offloads, OperationDone, PortInfo, RequestOperation, RequestRecord,
    SavedState, Sent, StoreError, StoreInfo, StreamState, VirtioDescription, VirtioDevice,
};
use crate::device::component as device;
pub(super) use folder::Folder;

/// What `wit-bindgen` makes of the contract. It is kept as a file, so that a plugin's build need not make it; a test says when it is out of date.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, clippy::restriction, reason = "generated code")]
#[rustfmt::skip]
pub mod bindings;

pub(super) fn read(request: Handle, offset: u32, length: u32) -> Vec<u8> {
    imports::requests::read(request.0, offset, length)
}

pub(super) fn write(request: Handle, offset: u32, bytes: &[u8]) -> u32 {
    imports::requests::write(request.0, offset, bytes)
}

pub(super) fn complete(answers: &[Answer]) {
    use imports::requests::Answer as Wit;
    let wit = |answer: &Answer| Wit { request: answer.request.0, written: answer.written };
    // One answer is by far the most common number.
    match answers {
        [answer] => imports::requests::complete(&[wit(answer)]),
        _ => imports::requests::complete(&answers.iter().map(wit).collect::<Vec<_>>()),
    }
}

pub(super) fn to_channel(request: Handle, offset: u32, length: u32, channel: &super::Channel) -> u32 {
    imports::requests::to_channel(request.0, offset, length, &channel.0.0)
}

pub(super) fn from_channel(request: Handle, offset: u32, length: u32, channel: &super::Channel) -> u32 {
    imports::requests::from_channel(request.0, offset, length, &channel.0.0)
}

pub(super) fn config_changed() {
    imports::requests::config_changed();
}

pub(super) fn needs_reset() {
    imports::requests::needs_reset();
}

pub(super) fn fill_random(request: Handle, offset: u32, length: u32) -> u32 {
    imports::entropy::fill(request.0, offset, length)
}

pub(super) fn release_numbered(request: Handle) -> u32 {
    imports::guest_pages::release_numbered(request.0)
}

pub(super) fn release_own(request: Handle) -> u32 {
    imports::guest_pages::release_own(request.0)
}

pub(super) fn memory_size() -> u64 {
    imports::guest_pages::memory_size()
}

pub(super) struct Store(imports::stores::Store);

impl Store {
    pub(super) fn info(&self) -> StoreInfo {
        let imports::stores::StoreInfo {
            size,
            block_size,
            optimal_size,
            read_only,
            discard,
            write_zeroes,
            identity,
        } = self.0.info();
        StoreInfo { size, block_size, optimal_size, read_only, discard, write_zeroes, identity }
    }

    pub(super) fn begin(&self, operations: &[RequestOperation]) {
        self.0.begin(&operations.iter().map(operation).collect::<Vec<_>>());
    }
}

fn operation(operation: &RequestOperation) -> imports::stores::Operation {
    use imports::stores::OperationKind as Kind;
    imports::stores::Operation {
        request: operation.request.0,
        kind: match operation.kind {
            RequestOperation::READ => Kind::Read,
            RequestOperation::WRITE => Kind::Write,
            RequestOperation::FLUSH => Kind::Flush,
            RequestOperation::DISCARD => Kind::Discard,
            RequestOperation::WRITE_ZEROES => Kind::WriteZeroes,
            RequestOperation::UNMAP_ZEROES => Kind::UnmapZeroes,
            other => panic!("{other} is no kind of operation"),
        },
        offset: operation.offset,
        length: operation.length,
        position: operation.position,
        success: u64::from_le_bytes(operation.success),
        success_length: u8::try_from(operation.success_length).unwrap_or(u8::MAX),
    }
}

pub(super) struct Port(imports::ports::Port);

impl Port {
    pub(super) fn info(&self) -> PortInfo {
        let imports::ports::PortInfo { mac, mtu, link_up, send, receive } = self.0.info();
        let offloads = |wit: imports::ports::Offloads| Offloads::from_bits(wit.bits().into());
        PortInfo {
            mac: mac.try_into().unwrap_or_default(),
            mtu,
            link_up,
            send: offloads(send),
            receive: offloads(receive),
        }
    }

    pub(super) fn accept(&self, offloads: Offloads) {
        let bits = offloads.to_bits().to_le_bytes()[0];
        self.0.accept(imports::ports::Offloads::from_bits_truncate(bits));
    }

    pub(super) fn send(&self, requests: &[Handle]) {
        self.0.send(&numbers(requests));
    }

    pub(super) fn waiting(&self, max: u32) -> Vec<u32> {
        self.0.waiting(max)
    }

    pub(super) fn receive(&self, counts: &[u16], requests: &[Handle]) {
        self.0.receive(counts, &numbers(requests));
    }
}

pub(super) struct Socket(imports::sockets::Socket);

impl Socket {
    pub(super) fn connect(&self, port: u32) -> Option<u32> {
        self.0.connect(port)
    }

    pub(super) fn news(&self, max: u32) -> Vec<StreamState> {
        use imports::sockets::StreamState as Wit;
        let state = |wit: Wit| {
            let Wit { number, wanted, readable, ended, deaf, unsent } = wit;
            StreamState { number, wanted, readable, ended, deaf, unsent }
        };
        self.0.news(max).into_iter().map(state).collect()
    }

    pub(super) fn accept(&self, number: u32, port: u32) {
        self.0.accept(number, port);
    }

    pub(super) fn send(&self, request: Handle, offset: u32, length: u32, number: u32) -> Sent {
        let imports::sockets::Sent { taken, unsent } = self.0.send(request.0, offset, length, number);
        Sent { taken, unsent }
    }

    pub(super) fn receive(&self, request: Handle, offset: u32, length: u32, number: u32) -> u32 {
        self.0.receive(request.0, offset, length, number)
    }

    pub(super) fn shut(&self, number: u32, receive: bool, send: bool) {
        self.0.shut(number, receive, send);
    }

    pub(super) fn close(&self, number: u32) {
        self.0.close(number);
    }
}

fn numbers(requests: &[Handle]) -> Vec<u32> {
    requests.iter().map(|request| request.0).collect()
}

/// The component's device, and before it the configuration.
pub struct Slot<D> {
    config: Option<Config>,
    device: Option<D>,
}

impl<D> Slot<D> {
    /// No device yet.
    #[must_use]
    pub const fn new() -> RefCell<Self> {
        RefCell::new(Self { config: None, device: None })
    }
}

/// A plugin that exports a virtio device. [`crate::export_virtio_device!`] implements it.
pub trait Exported {
    /// The device.
    type Device: VirtioDevice;
    /// Where it lives.
    fn slot() -> &'static LocalKey<RefCell<Slot<Self::Device>>>;
}

/// Calls the device. The host starts it before it calls anything else.
fn with<E: Exported, R>(call: impl FnOnce(&mut E::Device) -> R) -> R {
    E::slot().with_borrow_mut(|slot| {
        call(slot.device.as_mut().expect("the host starts a device before it calls it"))
    })
}

impl<E: Exported> exports::Guest for E {
    fn describe(config: Vec<exports::Setting>) -> Result<exports::VirtioDescription, exports::ErrorCode> {
        let config = Config::new(config.into_iter().map(|setting| (setting.key, setting.value)));
        let description = E::Device::describe(&config)?;
        E::slot().with_borrow_mut(|slot| slot.config = Some(config));
        Ok(description.into())
    }

    fn start(attachment: exports::VirtioAttachment) -> Result<(), exports::ErrorCode> {
        fn all<W, T>(handles: Vec<W>, make: impl Fn(W) -> T) -> std::vec::IntoIter<T> {
            handles.into_iter().map(make).collect::<Vec<_>>().into_iter()
        }
        let config = E::slot().with_borrow_mut(|slot| slot.config.take());
        let Some(config) = config else {
            return Err(exports::ErrorCode::Other("`start` was called before `describe`".into()));
        };
        let exports::VirtioAttachment { timers, channels, stores, ports, sockets, folders } = attachment;
        let attachment = super::Attachment {
            timers: all(timers, |timer| super::Timer(device::Timer(timer))),
            channels: all(channels, |channel| super::Channel(device::Channel(channel))),
            stores: all(stores, |store| super::Store(Store(store))),
            ports: all(ports, |port| super::Port(Port(port))),
            sockets: all(sockets, |socket| super::Socket(Socket(socket))),
            folders: all(folders, |folder| super::Folder(Folder(folder))),
        };
        let device = E::Device::start(&config, attachment)?;
        E::slot().with_borrow_mut(|slot| slot.device = Some(device));
        Ok(())
    }

    fn activate(features: u64) -> Result<(), exports::ErrorCode> {
        Ok(with::<E, _>(|device| device.activate(features))?)
    }

    fn config_read(offset: u32, size: u8) -> u64 {
        with::<E, _>(|device| device.config_read(offset, size))
    }

    fn config_write(offset: u32, size: u8, value: u64) {
        with::<E, _>(|device| device.config_write(offset, size, value));
    }

    fn requests_ready(queue: u16, requests: Vec<exports::Request>, heads: Vec<u8>) {
        let records: Vec<RequestRecord> = requests
            .into_iter()
            .map(|exports::Request { handle, readable, writable, head }| RequestRecord {
                handle: Handle(handle),
                readable,
                writable,
                head,
            })
            .collect();
        with::<E, _>(|device| device.requests_ready(queue, &Batch::new(&records, &heads)));
    }

    fn operations_done(done: Vec<exports::OperationDone>) {
        let done: Vec<OperationDone> = done
            .into_iter()
            .map(|done| {
                OperationDone::new(Handle(done.request), done.error.map_or(Ok(()), |e| Err(e.into())))
            })
            .collect();
        with::<E, _>(|device| device.operations_done(&done));
    }

    fn port_ready(port: u32) {
        with::<E, _>(|device| device.port_ready(port));
    }

    fn port_changed(port: u32) {
        with::<E, _>(|device| device.port_changed(port));
    }

    fn socket_ready(socket: u32) {
        with::<E, _>(|device| device.socket_ready(socket));
    }

    fn store_changed(store: u32) {
        with::<E, _>(|device| device.store_changed(store));
    }

    fn channel_readable(channel: u32) {
        with::<E, _>(|device| device.channel_readable(channel));
    }

    fn channel_writable(channel: u32) {
        with::<E, _>(|device| device.channel_writable(channel));
    }

    fn timer_fired(timer: u32) {
        with::<E, _>(|device| device.timer_fired(timer));
    }

    fn adjust(setting: exports::Setting) -> Result<(), exports::ErrorCode> {
        Ok(with::<E, _>(|device| device.adjust(&setting.key, &setting.value))?)
    }

    fn reset() {
        with::<E, _>(VirtioDevice::reset);
    }

    fn save() -> Result<exports::SavedState, exports::ErrorCode> {
        let SavedState { schema, data } = with::<E, _>(|device| super::save(device))?;
        Ok(exports::SavedState { schema, data })
    }

    fn restore(state: exports::SavedState) -> Result<(), exports::ErrorCode> {
        let exports::SavedState { schema, data } = state;
        Ok(with::<E, _>(|device| super::restore(device, &SavedState { schema, data }))?)
    }
}

impl From<imports::stores::StoreError> for StoreError {
    fn from(error: imports::stores::StoreError) -> Self {
        use imports::stores::StoreError as Wit;
        match error {
            Wit::OutOfRange => Self::OutOfRange,
            Wit::ReadOnly => Self::ReadOnly,
            Wit::NoSpace => Self::NoSpace,
            Wit::Unsupported => Self::Unsupported,
            Wit::Io => Self::Io,
        }
    }
}

impl From<VirtioDescription> for exports::VirtioDescription {
    fn from(description: VirtioDescription) -> Self {
        let VirtioDescription {
            device_type,
            features,
            queues,
            config_size,
            timers,
            channels,
            stores,
            ports,
            sockets,
            folders,
        } = description;
        let queue = |queue: super::Queue| imports::virtio_types::Queue {
            name: queue.name,
            max_size: queue.max_size,
            head: queue.head,
        };
        Self {
            device_type,
            features,
            queues: queues.into_iter().map(queue).collect(),
            config_size,
            timers,
            channels,
            stores,
            ports,
            sockets,
            folders,
        }
    }
}
