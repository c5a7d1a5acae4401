//! What is around a virtio device on the bench: requests in ordinary memory, stores, ports, and what every device has.
//!
//! A misdeed that would end the instance in a host panics here, with what the device did. Longer than most files, since it answers every call that a virtio device can make.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};

use tenon_sdk::device;
use tenon_sdk::store::Operation;
use tenon_sdk::virtio::hosted::Host;
use tenon_sdk::virtio::{
    Answer, Errno, FolderAction, FolderOutcome, Handle, Level, Offloads, OperationDone, PortInfo,
    RequestOperation, RequestRecord, Sent, StoreError, StoreInfo, StreamState, VirtioDescription,
};

use super::folders::FolderEnd;
use super::sockets::SocketState;
use crate::memory::MemoryStore;
use crate::outside::Outside;
use crate::random::Random;

/// The length of the header before each frame (virtio 1.2 §5.1.6).
pub(super) const HEADER: usize = 12;
/// The shortest frame: an Ethernet header.
const LEAST_FRAME: usize = 14;

/// A request, by the name that the test has for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// What a device answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answered {
    /// How many bytes at the start of the writable part the device says that it wrote.
    pub written: u32,
    /// These bytes.
    pub data: Vec<u8>,
    /// The whole writable part, as the driver finds it. What the device did not write is 0xa5.
    pub buffer: Vec<u8>,
}

/// A request that was not answered yet.
#[derive(Clone, Debug)]
pub(super) struct Held {
    pub(super) ticket: Ticket,
    pub(super) queue: u16,
    pub(super) readable: Vec<u8>,
    pub(super) writable: Vec<u8>,
    /// An operation on a store is under way.
    pub(super) busy: bool,
}

/// An operation on a store that has begun.
#[derive(Clone, Debug)]
pub(super) struct Begun {
    request: Handle,
    /// Where data that was read goes.
    offset: u32,
    /// The operation, or why it cannot be one.
    operation: Result<Operation, StoreError>,
    success: Vec<u8>,
}

/// A store of the device.
#[derive(Clone, Debug)]
pub(super) struct StoreEnd {
    pub(super) store: MemoryStore,
    pub(super) begun: VecDeque<Begun>,
    /// How many operations may end; without a number, all.
    pub(super) allowed: Option<u64>,
}

/// A network port of the device.
#[derive(Clone, Debug)]
pub(super) struct PortState {
    pub(super) info: PortInfo,
    pub(super) accepted: Offloads,
    pub(super) waiting: VecDeque<Vec<u8>>,
    pub(super) sent: Vec<Vec<u8>>,
    pub(super) dropped: u64,
    /// The device wants to be told of frames.
    pub(super) notify: bool,
}

/// Everything outside a virtio device.
#[derive(Clone, Debug)]
pub(super) struct VirtioOutside {
    pub(super) base: Outside,
    pub(super) held: RefCell<BTreeMap<Handle, Held>>,
    pub(super) answers: RefCell<BTreeMap<Ticket, Answered>>,
    pub(super) stores: RefCell<Vec<StoreEnd>>,
    pub(super) ports: RefCell<Vec<PortState>>,
    pub(super) sockets: RefCell<Vec<SocketState>>,
    pub(super) folders: Vec<FolderEnd>,
    random: RefCell<Random>,
    pub(super) config_changes: Cell<u64>,
    pub(super) needs_reset: Cell<bool>,
    pub(super) released: RefCell<Vec<u32>>,
    pub(super) released_own: Cell<u64>,
    pub(super) memory: u64,
    next: Cell<u32>,
}

impl VirtioOutside {
    pub(super) fn new(
        description: &VirtioDescription,
        stores: Vec<MemoryStore>,
        ports: Vec<PortInfo>,
        folders: Vec<FolderEnd>,
        memory: u64,
    ) -> Self {
        let base = device::Description {
            timers: description.timers,
            channels: description.channels.clone(),
            ..device::Description::new()
        };
        let store = |store| StoreEnd { store, begun: VecDeque::new(), allowed: None };
        let port = |info| PortState {
            info,
            accepted: Offloads::default(),
            waiting: VecDeque::new(),
            sent: Vec::new(),
            dropped: 0,
            notify: true,
        };
        Self {
            base: Outside::new(&base),
            held: RefCell::default(),
            answers: RefCell::default(),
            stores: RefCell::new(stores.into_iter().map(store).collect()),
            ports: RefCell::new(ports.into_iter().map(port).collect()),
            sockets: RefCell::new(vec![SocketState::default(); description.sockets.len()]),
            folders,
            random: RefCell::new(Random::new(0x7e17)),
            config_changes: Cell::new(0),
            needs_reset: Cell::new(false),
            released: RefCell::default(),
            released_own: Cell::new(0),
            memory,
            next: Cell::new(1),
        }
    }

    /// Takes a request in; returns its record and head as the device gets them.
    pub(super) fn hold(&self, held: Held, head: u16) -> (RequestRecord, Vec<u8>) {
        let handle = Handle(self.next.get());
        self.next.set(self.next.get().wrapping_add(1));
        let head = held.readable[..held.readable.len().min(head.into())].to_vec();
        let record = RequestRecord {
            handle,
            readable: length(&held.readable),
            writable: length(&held.writable),
            head: length(&head),
        };
        self.held.borrow_mut().insert(handle, held);
        (record, head)
    }

    /// Makes the handles' side as a new instance finds it. Requests wait.
    pub(super) fn detach(&self) {
        self.base.detach();
        for store in self.stores.borrow_mut().iter_mut() {
            // Operations of the old instance end or not; nobody hears of them.
            store.begun.clear();
        }
        for port in self.ports.borrow_mut().iter_mut() {
            port.notify = true;
            port.accepted = Offloads::default();
        }
        self.sockets.borrow_mut().iter_mut().for_each(SocketState::detach);
    }

    /// Takes the unfinished requests back, in the order in which they came.
    pub(super) fn detach_requests(&self) -> Vec<Held> {
        let held = std::mem::take(&mut *self.held.borrow_mut());
        let mut held: Vec<Held> = held.into_values().map(|held| Held { busy: false, ..held }).collect();
        held.sort_by_key(|held| held.ticket);
        held
    }

    /// Ends operations that may end. Returns those of which the device is to hear; the number says whether any ended.
    pub(super) fn end_operations(&self) -> (Vec<OperationDone>, u64) {
        let (mut heard, mut ended) = (Vec::new(), 0);
        for store in self.stores.borrow_mut().iter_mut() {
            while store.allowed != Some(0) {
                let Some(begun) = store.begun.pop_front() else { break };
                store.allowed = store.allowed.map(|allowed| allowed - 1);
                ended += 1;
                let result = begun.operation.and_then(|operation| store.store.submit(&operation));
                heard.extend(self.end(begun.request, begun.offset, result, &begun.success));
            }
        }
        (heard, ended)
    }

    fn end(
        &self,
        request: Handle,
        offset: u32,
        result: Result<Vec<u8>, StoreError>,
        success: &[u8],
    ) -> Option<OperationDone> {
        let mut all = self.held.borrow_mut();
        // A reset has ended it.
        let held = all.get_mut(&request)?;
        held.busy = false;
        let data = match result {
            Ok(data) => data,
            Err(error) => return Some(OperationDone::new(request, Err(error))),
        };
        let offset = offset as usize;
        held.writable[offset..offset + data.len()].copy_from_slice(&data);
        if success.is_empty() {
            return Some(OperationDone::new(request, Ok(())));
        }
        let end = offset + data.len();
        let fits = success.len().min(held.writable.len() - end);
        held.writable[end..end + fits].copy_from_slice(&success[..fits]);
        drop(all);
        self.finish(Answer { request, written: u32::try_from(end + fits).unwrap_or(u32::MAX) });
        None
    }

    fn finish(&self, Answer { request, written }: Answer) {
        let held = self.held.borrow_mut().remove(&request);
        let Some(held) = held else {
            panic!("the device completes {request:?}, which it does not hold");
        };
        assert!(!held.busy, "the device completes {request:?}, which has an operation on a store under way");
        let room = held.writable.len();
        assert!(
            written as usize <= room,
            "the device says that it wrote {written} bytes to {request:?}, whose writable part has {room}"
        );
        let data = held.writable[..written as usize].to_vec();
        self.answers.borrow_mut().insert(held.ticket, Answered { written, data, buffer: held.writable });
    }

    fn with<R>(&self, request: Handle, what: &str, call: impl FnOnce(&mut Held) -> R) -> R {
        let mut held = self.held.borrow_mut();
        let Some(held) = held.get_mut(&request) else {
            panic!("the device {what} {request:?}, which it does not hold");
        };
        call(held)
    }

    fn begin(&self, store: u32, asked: &RequestOperation) {
        let RequestOperation { request, kind, offset, length, position, .. } = *asked;
        let Some(success) = asked.success() else {
            panic!("the device has the host answer {request:?} with {} bytes", asked.success_length);
        };
        let moved = |bytes: &[u8]| {
            let wanted = u32::try_from(length).map_err(|_| StoreError::OutOfRange)?;
            let part = part(bytes, offset, wanted);
            if part.len() == wanted as usize { Ok(part.to_vec()) } else { Err(StoreError::OutOfRange) }
        };
        let operation = self.with(request, "begins an operation with", |held| {
            assert!(!held.busy, "the device begins a second operation with {request:?}");
            held.busy = true;
            match kind {
                RequestOperation::READ => moved(&held.writable).map(|_| Operation::Read { position, length }),
                RequestOperation::WRITE => {
                    moved(&held.readable).map(|data| Operation::Write { position, data })
                }
                RequestOperation::FLUSH => Ok(Operation::Flush),
                RequestOperation::DISCARD => Ok(Operation::Discard { position, length }),
                RequestOperation::WRITE_ZEROES => {
                    Ok(Operation::WriteZeroes { position, length, unmap: false })
                }
                RequestOperation::UNMAP_ZEROES => {
                    Ok(Operation::WriteZeroes { position, length, unmap: true })
                }
                other => panic!("the device begins an operation of kind {other}, which there is not"),
            }
        });
        let mut stores = self.stores.borrow_mut();
        let Some(store) = stores.get_mut(store as usize) else {
            panic!("the device uses store number {store}, which it did not ask for");
        };
        let offset = if kind == RequestOperation::READ { offset } else { 0 };
        store.begun.push_back(Begun { request, offset, operation, success: success.to_vec() });
    }

    fn port<R>(&self, port: u32, call: impl FnOnce(&mut PortState) -> R) -> R {
        let mut ports = self.ports.borrow_mut();
        let Some(state) = ports.get_mut(port as usize) else {
            panic!("the device uses port number {port}, which it did not ask for");
        };
        call(state)
    }

    fn socket<R>(&self, socket: u32, call: impl FnOnce(&mut SocketState) -> R) -> R {
        let mut sockets = self.sockets.borrow_mut();
        let Some(state) = sockets.get_mut(socket as usize) else {
            panic!("the device uses socket number {socket}, which it did not ask for");
        };
        call(state)
    }
}

fn length(bytes: &[u8]) -> u32 {
    length_of(bytes.len())
}

fn length_of(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// The part of `bytes` at `offset`, at most `length` of it.
fn part(bytes: &[u8], offset: u32, length: u32) -> &[u8] {
    let rest = bytes.get(offset as usize..).unwrap_or_default();
    &rest[..rest.len().min(length as usize)]
}

fn part_mut(bytes: &mut [u8], offset: u32, length: u32) -> &mut [u8] {
    let rest = bytes.get_mut(offset as usize..).unwrap_or_default();
    let length = rest.len().min(length as usize);
    &mut rest[..length]
}

impl device::hosted::Host for VirtioOutside {
    fn log(&self, level: Level, message: &str) {
        self.base.log(level, message);
    }

    fn now(&self) -> u64 {
        self.base.now()
    }

    fn timer_arm(&self, timer: u32, deadline: u64) {
        self.base.timer_arm(timer, deadline);
    }

    fn timer_arm_periodic(&self, timer: u32, first: u64, period: u64) {
        self.base.timer_arm_periodic(timer, first, period);
    }

    fn timer_cancel(&self, timer: u32) {
        self.base.timer_cancel(timer);
    }

    fn wall_clock(&self) -> u64 {
        self.base.wall_clock()
    }

    fn line_set_level(&self, _line: u32, _high: bool) {}

    fn line_pulse(&self, _line: u32) {}

    fn channel_write(&self, channel: u32, bytes: &[u8]) -> u32 {
        self.base.channel_write(channel, bytes)
    }

    fn channel_read(&self, channel: u32, max: u32) -> Vec<u8> {
        self.base.channel_read(channel, max)
    }

    fn request(&self, _request: device::Request) {}
}

impl Host for VirtioOutside {
    fn read(&self, request: Handle, offset: u32, length: u32) -> Vec<u8> {
        self.with(request, "reads", |held| part(&held.readable, offset, length.min(1 << 20)).to_vec())
    }

    fn write(&self, request: Handle, offset: u32, bytes: &[u8]) -> u32 {
        self.with(request, "writes to", |held| {
            let room = part_mut(&mut held.writable, offset, length(bytes));
            room.copy_from_slice(&bytes[..room.len()]);
            length(room)
        })
    }

    fn complete(&self, answers: &[Answer]) {
        for answer in answers {
            self.finish(*answer);
        }
    }

    fn request_to_channel(&self, request: Handle, offset: u32, length: u32, channel: u32) -> u32 {
        let bytes = Host::read(self, request, offset, length);
        device::hosted::Host::channel_write(self, channel, &bytes)
    }

    fn request_from_channel(&self, request: Handle, offset: u32, length: u32, channel: u32) -> u32 {
        let room = self.with(request, "fills", |held| part(&held.writable, offset, length).len());
        let bytes = device::hosted::Host::channel_read(self, channel, length_of(room));
        self.write(request, offset, &bytes)
    }

    fn config_changed(&self) {
        self.config_changes.set(self.config_changes.get() + 1);
    }

    fn needs_reset(&self) {
        self.needs_reset.set(true);
    }

    fn store_info(&self, store: u32) -> StoreInfo {
        let stores = self.stores.borrow();
        let Some(end) = stores.get(store as usize) else {
            panic!("the device uses store number {store}, which it did not ask for");
        };
        end.store.info().clone()
    }

    fn store_begin(&self, store: u32, operations: &[RequestOperation]) {
        operations.iter().for_each(|operation| self.begin(store, operation));
    }

    fn port_info(&self, port: u32) -> PortInfo {
        self.port(port, |port| port.info)
    }

    fn port_accept(&self, port: u32, offloads: Offloads) {
        self.port(port, |port| port.accepted = offloads);
    }

    fn port_send(&self, port: u32, requests: &[Handle]) {
        for request in requests {
            let frame = self.with(*request, "sends", |held| held.readable.clone());
            self.finish(Answer { request: *request, written: 0 });
            self.port(port, |port| {
                if port.info.link_up && frame.len() >= HEADER + LEAST_FRAME {
                    port.sent.push(frame);
                } else {
                    port.dropped += 1;
                }
            });
        }
    }

    fn port_waiting(&self, port: u32, max: u32) -> Vec<u32> {
        self.port(port, |port| {
            let lengths: Vec<u32> =
                port.waiting.iter().take(max as usize).map(|frame| length(frame)).collect();
            port.notify = lengths.len() < max as usize;
            lengths
        })
    }

    fn port_receive(&self, port: u32, counts: &[u16], requests: &[Handle]) {
        let sum: usize = counts.iter().map(|count| usize::from(*count)).sum();
        assert!(
            sum == requests.len(),
            "the device receives into {} requests with counts of {sum}",
            requests.len()
        );
        let mut requests = requests.iter();
        for count in counts {
            let frame = self.port(port, |port| port.waiting.pop_front());
            let Some(mut frame) = frame else {
                panic!("the device receives more frames than wait");
            };
            if *count == 0 {
                self.port(port, |port| port.dropped += 1);
            }
            if let Some(buffers) = frame.get_mut(HEADER - 2..HEADER) {
                buffers.copy_from_slice(&count.to_le_bytes());
            }
            let mut rest = frame.as_slice();
            for request in requests.by_ref().take((*count).into()) {
                let written = self.write(*request, 0, rest);
                rest = &rest[written as usize..];
                self.finish(Answer { request: *request, written });
            }
        }
    }

    fn socket_connect(&self, socket: u32, port: u32) -> Option<u32> {
        self.socket(socket, |socket| socket.connect(port))
    }

    fn socket_news(&self, socket: u32, max: u32) -> Vec<StreamState> {
        self.socket(socket, |socket| socket.news(max))
    }

    fn socket_accept(&self, socket: u32, number: u32, port: u32) {
        self.socket(socket, |socket| socket.accept(number, port));
    }

    fn socket_send(&self, socket: u32, request: Handle, offset: u32, length: u32, number: u32) -> Sent {
        let bytes = self.with(request, "sends", |held| part(&held.readable, offset, length).to_vec());
        self.socket(socket, |socket| socket.send(number, &bytes))
    }

    fn socket_receive(&self, socket: u32, request: Handle, offset: u32, length: u32, number: u32) -> u32 {
        let room = self.with(request, "fills", |held| part(&held.writable, offset, length).len());
        let bytes = self.socket(socket, |socket| socket.receive(number, room));
        self.write(request, offset, &bytes)
    }

    fn socket_shut(&self, socket: u32, number: u32, receive: bool, send: bool) {
        self.socket(socket, |socket| socket.shut(number, receive, send));
    }

    fn socket_close(&self, socket: u32, number: u32) {
        self.socket(socket, |socket| socket.close(number));
    }

    fn fill_random(&self, request: Handle, offset: u32, length: u32) -> u32 {
        let room = self.with(request, "fills", |held| part(&held.writable, offset, length).len());
        let bytes = self.random.borrow_mut().bytes(room);
        self.write(request, offset, &bytes)
    }

    fn release_numbered(&self, request: Handle) -> u32 {
        let pages = self.memory / 4096;
        self.with(request, "releases pages by", |held| {
            let numbers = held
                .readable
                .chunks_exact(4)
                .map(|bytes| u32::from_le_bytes(bytes.try_into().unwrap_or_default()));
            let released: Vec<u32> = numbers.filter(|number| u64::from(*number) < pages).collect();
            self.released.borrow_mut().extend(&released);
            u32::try_from(released.len()).unwrap_or(u32::MAX)
        })
    }

    fn release_own(&self, request: Handle) -> u32 {
        self.with(request, "releases the pages of", |held| {
            let pages = held.writable.len() / 4096;
            held.writable[..pages * 4096].fill(0);
            self.released_own.set(self.released_own.get() + pages as u64);
            u32::try_from(pages).unwrap_or(u32::MAX)
        })
    }

    fn memory_size(&self) -> u64 {
        self.memory
    }

    fn folder_act(
        &self,
        folder: u32,
        request: Handle,
        action: &FolderAction,
    ) -> Result<FolderOutcome, Errno> {
        let Some(end) = self.folders.get(folder as usize) else {
            panic!("the device uses folder number {folder}, which it did not ask for");
        };
        self.with(request, "works in a folder for", |held| {
            end.act(action, &held.readable, &mut held.writable)
        })
    }
}
