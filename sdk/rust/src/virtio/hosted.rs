//! Where there is no component around the device: handles are numbers, and calls go to the host that is entered on this thread.
#![allow(unsafe_code, reason = "the host entered on a thread is remembered without its lifetime")]

use std::cell::Cell;

use super::{
    Answer, Errno, FolderAction, FolderOutcome, Handle, Offloads, PortInfo, RequestOperation, Sent,
    StoreInfo, StreamState,
};
use crate::device::hosted as device;

/// The host of a virtio device that runs in this process: a test bench, or the other side of the native tables. Timers, channels, stores, ports, sockets and folders are named by their
/// index in the device's description. Functions are called during calls into the device, on the thread of that call. What each of them does is
/// written at the function of [`crate::virtio`] that has its name. A virtio device has no lines and asks nothing of the machine.
pub trait Host: device::Host {
    /// Copies a part of the readable part.
    fn read(&self, request: Handle, offset: u32, length: u32) -> Vec<u8>;
    /// Copies bytes into the writable part; returns how many fitted.
    fn write(&self, request: Handle, offset: u32, bytes: &[u8]) -> u32;
    /// Completes requests.
    fn complete(&self, answers: &[Answer]);
    /// Moves bytes to the outside; returns how many were taken.
    fn request_to_channel(&self, request: Handle, offset: u32, length: u32, channel: u32) -> u32;
    /// Moves bytes from the outside; returns how many there were.
    fn request_from_channel(&self, request: Handle, offset: u32, length: u32, channel: u32) -> u32;
    /// Tells the driver that the configuration space has changed.
    fn config_changed(&self);
    /// Tells the driver that the device needs a reset.
    fn needs_reset(&self);
    /// What a store is.
    fn store_info(&self, store: u32) -> StoreInfo;
    /// Begins operations.
    fn store_begin(&self, store: u32, operations: &[RequestOperation]);
    /// What a port is.
    fn port_info(&self, port: u32) -> PortInfo;
    /// What the driver accepts of received frames.
    fn port_accept(&self, port: u32, offloads: Offloads);
    /// Sends frames, and completes their requests.
    fn port_send(&self, port: u32, requests: &[Handle]);
    /// The lengths of the first frames that wait.
    fn port_waiting(&self, port: u32, max: u32) -> Vec<u32>;
    /// Takes frames into requests, and completes these.
    fn port_receive(&self, port: u32, counts: &[u16], requests: &[Handle]);
    /// Begins a stream, if somebody listens.
    fn socket_connect(&self, socket: u32, port: u32) -> Option<u32>;
    /// How streams are that are no longer as they were.
    fn socket_news(&self, socket: u32, max: u32) -> Vec<StreamState>;
    /// Takes a stream that was begun outside.
    fn socket_accept(&self, socket: u32, number: u32, port: u32);
    /// Moves bytes to a stream.
    fn socket_send(&self, socket: u32, request: Handle, offset: u32, length: u32, number: u32) -> Sent;
    /// Moves bytes from a stream; returns how many there were.
    fn socket_receive(&self, socket: u32, request: Handle, offset: u32, length: u32, number: u32) -> u32;
    /// Ends directions of a stream.
    fn socket_shut(&self, socket: u32, number: u32, receive: bool, send: bool);
    /// Gives a stream up.
    fn socket_close(&self, socket: u32, number: u32);
    /// Fills a part of the writable part with random bytes; returns how many.
    fn fill_random(&self, request: Handle, offset: u32, length: u32) -> u32;
    /// Gives back the pages that the request names; returns how many.
    fn release_numbered(&self, request: Handle) -> u32;
    /// Gives back the pages of the request; returns how many.
    fn release_own(&self, request: Handle) -> u32;
    /// The guest's memory in bytes.
    fn memory_size(&self) -> u64;
    /// Does something in a folder of the host on behalf of a request.
    ///
    /// # Errors
    /// It cannot be done.
    fn folder_act(&self, folder: u32, request: Handle, action: &FolderAction)
    -> Result<FolderOutcome, Errno>;
}

thread_local! {
    /// The host of the device that is being called on this thread.
    static ENTERED: Cell<Option<*const dyn Host>> = const { Cell::new(None) };
}

/// Calls a virtio device: for as long as `call` runs, handles and free functions of this module and of [`crate::device`] reach `host`.
pub fn enter<R>(host: &dyn Host, call: impl FnOnce() -> R) -> R {
    struct Leave(Option<*const dyn Host>);
    impl Drop for Leave {
        fn drop(&mut self) {
            ENTERED.set(self.0);
        }
    }
    let pointer: *const (dyn Host + '_) = host;
    // SAFETY: only the lifetime of the trait object changes; the pointer is forgotten by `Leave` before `host` can end, also when `call` unwinds.
    let pointer: *const (dyn Host + 'static) = unsafe { std::mem::transmute(pointer) };
    let _leave = Leave(ENTERED.replace(Some(pointer)));
    device::enter(host, call)
}

fn host<R>(call: impl FnOnce(&dyn Host) -> R) -> R {
    let Some(host) = ENTERED.get() else {
        panic!(
            "a virtio device's handles work during calls from its host only; a test makes these with `tenon_testkit::VirtioBench`"
        );
    };
    // SAFETY: `enter` is still running further up on this thread's stack and borrows the host.
    call(unsafe { &*host })
}

pub(super) fn read(request: Handle, offset: u32, length: u32) -> Vec<u8> {
    host(|host| host.read(request, offset, length))
}

pub(super) fn write(request: Handle, offset: u32, bytes: &[u8]) -> u32 {
    host(|host| host.write(request, offset, bytes))
}

pub(super) fn complete(answers: &[Answer]) {
    host(|host| host.complete(answers));
}

pub(super) fn to_channel(request: Handle, offset: u32, length: u32, channel: &super::Channel) -> u32 {
    host(|host| host.request_to_channel(request, offset, length, channel.0.0))
}

pub(super) fn from_channel(request: Handle, offset: u32, length: u32, channel: &super::Channel) -> u32 {
    host(|host| host.request_from_channel(request, offset, length, channel.0.0))
}

pub(super) fn config_changed() {
    host(|host| host.config_changed());
}

pub(super) fn needs_reset() {
    host(|host| host.needs_reset());
}

pub(super) fn fill_random(request: Handle, offset: u32, length: u32) -> u32 {
    host(|host| host.fill_random(request, offset, length))
}

pub(super) fn release_numbered(request: Handle) -> u32 {
    host(|host| host.release_numbered(request))
}

pub(super) fn release_own(request: Handle) -> u32 {
    host(|host| host.release_own(request))
}

pub(super) fn memory_size() -> u64 {
    host(|host| host.memory_size())
}

pub(super) struct Store(u32);

impl Store {
    pub(super) fn info(&self) -> StoreInfo {
        host(|host| host.store_info(self.0))
    }

    pub(super) fn begin(&self, operations: &[RequestOperation]) {
        host(|host| host.store_begin(self.0, operations));
    }
}

pub(super) struct Port(u32);

impl Port {
    pub(super) fn info(&self) -> PortInfo {
        host(|host| host.port_info(self.0))
    }

    pub(super) fn accept(&self, offloads: Offloads) {
        host(|host| host.port_accept(self.0, offloads));
    }

    pub(super) fn send(&self, requests: &[Handle]) {
        host(|host| host.port_send(self.0, requests));
    }

    pub(super) fn waiting(&self, max: u32) -> Vec<u32> {
        host(|host| host.port_waiting(self.0, max))
    }

    pub(super) fn receive(&self, counts: &[u16], requests: &[Handle]) {
        host(|host| host.port_receive(self.0, counts, requests));
    }
}

pub(super) struct Socket(u32);

impl Socket {
    pub(super) fn connect(&self, port: u32) -> Option<u32> {
        host(|host| host.socket_connect(self.0, port))
    }

    pub(super) fn news(&self, max: u32) -> Vec<StreamState> {
        host(|host| host.socket_news(self.0, max))
    }

    pub(super) fn accept(&self, number: u32, port: u32) {
        host(|host| host.socket_accept(self.0, number, port));
    }

    pub(super) fn send(&self, request: Handle, offset: u32, length: u32, number: u32) -> Sent {
        host(|host| host.socket_send(self.0, request, offset, length, number))
    }

    pub(super) fn receive(&self, request: Handle, offset: u32, length: u32, number: u32) -> u32 {
        host(|host| host.socket_receive(self.0, request, offset, length, number))
    }

    pub(super) fn shut(&self, number: u32, receive: bool, send: bool) {
        host(|host| host.socket_shut(self.0, number, receive, send));
    }

    pub(super) fn close(&self, number: u32) {
        host(|host| host.socket_close(self.0, number));
    }
}

pub(super) struct Folder(u32);

impl Folder {
    pub(super) fn act(&self, request: Handle, action: FolderAction) -> Result<FolderOutcome, Errno> {
        host(|host| host.folder_act(self.0, request, &action))
    }
}

/// The handles of a device that was granted so many timers, channels, stores, ports, sockets and folders.
#[must_use]
pub fn attachment(
    timers: u32,
    channels: u32,
    stores: u32,
    ports: u32,
    sockets: u32,
    folders: u32,
) -> super::Attachment {
    fn all<T>(count: u32, make: impl Fn(u32) -> T) -> std::vec::IntoIter<T> {
        (0..count).map(make).collect::<Vec<_>>().into_iter()
    }
    super::Attachment {
        timers: all(timers, |n| super::Timer(device::Timer(n))),
        channels: all(channels, |n| super::Channel(device::Channel(n))),
        stores: all(stores, |n| super::Store(Store(n))),
        ports: all(ports, |n| super::Port(Port(n))),
        sockets: all(sockets, |n| super::Socket(Socket(n))),
        folders: all(folders, |n| super::Folder(Folder(n))),
    }
}
