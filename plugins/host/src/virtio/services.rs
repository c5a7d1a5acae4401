//! What a virtio device's imports do, the same for a component and for native code.
//!
//! All of it runs under the instance's lock, and nothing here waits or reaches the transport: operations, answers and news for the driver are collected, and
//! the worker passes them on when the call into the plugin has returned and the lock is free.
//!
//! Long for the imports: each is short, and all work on the same requests.

use std::sync::Arc;

use tenon_abi::{OperationDone, RequestOperation, RequestRecord, StoreInfo};
use tenon_core::{Buffers, FRAME_HEADER, GuestRequest, NetworkPort, Offloads, PortInfo, Ram};
use tenon_folder::Folder;

use super::inbox::{Inbox, News, Outcome};
use super::pages;
use super::table::{Held, Next, StoreOperation, Table, Transfer};
use crate::fault::Misuse;
use crate::services::Services;
use crate::sockets::UnixSocket;
use crate::store::{Completed, Data, Operation, OperationKind, Store, fill_random};

/// The most bytes of one `requests.read`, and of one `entropy.fill`.
const MAX_READ: u32 = 1 << 20;
/// The most frames that one `port.waiting` tells of.
const MAX_FRAMES: u32 = 1024;
/// How many bytes go through a channel at once.
const CHUNK: usize = 4096;

/// An answer for the driver.
pub(super) struct Completion {
    pub(super) queue: u16,
    pub(super) token: u32,
    pub(super) written: u32,
}

/// What the worker has to pass on.
#[derive(Default)]
pub(super) struct Outbox {
    /// For each store.
    pub(super) operations: Vec<Vec<Operation>>,
    pub(super) answers: Vec<Completion>,
    pub(super) config_changed: bool,
    pub(super) needs_reset: bool,
}

impl Outbox {
    pub(super) fn is_empty(&self) -> bool {
        self.answers.is_empty()
            && !self.config_changed
            && !self.needs_reset
            && self.operations.iter().all(Vec::is_empty)
    }
}

/// The host's side of one virtio device instance.
pub(crate) struct VirtioServices {
    /// Time, channels, log, and their records.
    pub(super) base: Box<Services>,
    pub(super) table: Table,
    stores: Vec<Arc<Store>>,
    ports: Vec<Arc<dyn NetworkPort>>,
    pub(super) sockets: Vec<Arc<UnixSocket>>,
    pub(super) folders: Vec<Folder>,
    ram: Arc<Ram>,
    inbox: Arc<Inbox>,
    completed: Arc<dyn Completed>,
    pub(super) outbox: Outbox,
    /// Outcomes of which the device is to hear.
    pub(super) ended: Vec<OperationDone>,
    /// The first bytes of the requests that are given, one after the other.
    heads: Vec<u8>,
    records: Vec<RequestRecord>,
    lengths: Vec<u32>,
    /// Frames that were dropped since they found no room outside, or had a wrong header.
    pub(super) dropped_frames: u64,
    /// How often a new instance did something else for a request than the old one.
    pub(super) divergences: u64,
    /// A misdeed of native code, which goes on after it.
    misuse: Option<Misuse>,
}

impl VirtioServices {
    pub(super) fn new(base: Box<Services>, ram: Arc<Ram>, inbox: Arc<Inbox>) -> Box<Self> {
        Box::new(Self {
            base,
            table: Table::new(),
            stores: Vec::new(),
            ports: Vec::new(),
            sockets: Vec::new(),
            folders: Vec::new(),
            ram,
            completed: inbox.clone(),
            inbox,
            outbox: Outbox::default(),
            ended: Vec::new(),
            heads: Vec::new(),
            records: Vec::new(),
            lengths: Vec::new(),
            dropped_frames: 0,
            divergences: 0,
            misuse: None,
        })
    }

    /// Grants what the description names.
    pub(super) fn grant(
        &mut self,
        stores: Vec<Arc<Store>>,
        ports: Vec<Arc<dyn NetworkPort>>,
        sockets: Vec<Arc<UnixSocket>>,
        folders: Vec<Folder>,
    ) {
        self.outbox.operations = stores.iter().map(|_| Vec::new()).collect();
        (self.stores, self.ports, self.sockets, self.folders) = (stores, ports, sockets, folders);
    }

    /// How many timers, channels, stores, ports, sockets and folders there are.
    pub(super) fn counts(&self) -> [u32; 6] {
        let [_, timers, channels] = self.base.counts();
        let count = |n| u32::try_from(n).unwrap_or(u32::MAX);
        [
            timers,
            channels,
            count(self.stores.len()),
            count(self.ports.len()),
            count(self.sockets.len()),
            count(self.folders.len()),
        ]
    }

    /// Keeps a misdeed of native code until its call has returned.
    pub(super) fn misused(&mut self, misuse: Misuse) {
        self.misuse.get_or_insert(misuse);
    }

    pub(super) fn take_misuse(&mut self) -> Option<Misuse> {
        self.misuse.take()
    }

    // Requests come and go.

    /// Takes requests of one queue in, and gives what the device is told of them.
    pub(super) fn take_in(
        &mut self,
        queue: u16,
        head: u16,
        requests: &mut Vec<GuestRequest>,
    ) -> (Vec<RequestRecord>, Vec<u8>) {
        let (mut records, mut heads) = self.lists();
        for request in requests.drain(..) {
            let handle = self.table.insert(queue, request);
            if let Ok(held) = self.table.get(handle) {
                describe(held, head, &mut records, &mut heads);
            }
        }
        (records, heads)
    }

    /// What the device is told again of requests; those that it no longer holds are passed over.
    pub(super) fn again(&mut self, handles: &[u32], head: u16) -> (Vec<RequestRecord>, Vec<u8>) {
        let (mut records, mut heads) = self.lists();
        for handle in handles {
            if let Ok(held) = self.table.get(*handle) {
                describe(held, head, &mut records, &mut heads);
            }
        }
        (records, heads)
    }

    fn lists(&mut self) -> (Vec<RequestRecord>, Vec<u8>) {
        let (mut records, mut heads) = (std::mem::take(&mut self.records), std::mem::take(&mut self.heads));
        records.clear();
        heads.clear();
        (records, heads)
    }

    /// The lists that [`VirtioServices::take_in`] gave, to be used again.
    pub(super) fn give_back(&mut self, records: Vec<RequestRecord>, heads: Vec<u8>) {
        (self.records, self.heads) = (records, heads);
    }

    /// Operations have ended.
    pub(super) fn operations_ended(&mut self, done: &[Outcome]) {
        for (handle, result) in done {
            if let Some(held) = self.table.any(*handle) {
                let next = held.end(*result);
                self.go_on(*handle, next);
            }
        }
    }

    fn go_on(&mut self, handle: u32, next: Next) {
        match next {
            Next::Wait => {}
            Next::Submit(operation) => self.submit(handle, operation),
            Next::Answer(written) => self.finish(handle, written),
            Next::Ended(result) => {
                let Some(held) = self.table.any(handle) else { return };
                let mut written = None;
                if let (Ok(()), Some((operation, success))) = (result, held.began())
                    && !success.is_empty()
                {
                    let at = match operation.kind {
                        OperationKind::Read => u64::from(operation.offset) + operation.length,
                        _ => 0,
                    };
                    let count = held.writable.write(at, success) as u64;
                    written = Some(u32::try_from(at + count).unwrap_or(u32::MAX));
                }
                match written {
                    Some(written) => self.finish(handle, written),
                    None => self.ended.push(OperationDone::new(tenon_abi::Handle(handle), result)),
                }
            }
        }
    }

    fn submit(&mut self, handle: u32, operation: StoreOperation) {
        let Some(held) = self.table.any(handle) else { return };
        let index = usize::try_from(operation.store).unwrap_or(usize::MAX);
        let Some(list) = self.outbox.operations.get_mut(index) else { return };
        let data = match operation.kind {
            OperationKind::Read => Data::Guest(held.writable.clone(), operation.offset.into()),
            OperationKind::Write => Data::Guest(held.readable.clone(), operation.offset.into()),
            _ => Data::None,
        };
        list.push(Operation {
            kind: operation.kind,
            position: operation.position,
            length: operation.length,
            data,
            done: self.completed.clone(),
            token: handle.into(),
        });
    }

    /// Answers a request.
    fn finish(&mut self, handle: u32, written: u32) {
        if let Some(held) = self.table.remove(handle) {
            let room = u32::try_from(held.writable.length()).unwrap_or(u32::MAX);
            self.outbox.answers.push(Completion {
                queue: held.queue,
                token: held.token,
                written: written.min(room),
            });
        }
    }

    /// What the device is to hear of operations; it then counts as told.
    pub(super) fn take_ended(&mut self, most: usize) -> Vec<OperationDone> {
        let rest = self.ended.split_off(self.ended.len().min(most));
        let batch = std::mem::replace(&mut self.ended, rest);
        for done in &batch {
            if let Some(held) = self.table.any(done.request.0) {
                held.told();
            }
        }
        batch
    }

    /// The driver has reset the device: every request has ended. No operation is under way.
    pub(super) fn forget_requests(&mut self) {
        self.table.clear();
        self.ended.clear();
        self.outbox.answers.clear();
        self.outbox.operations.iter_mut().for_each(Vec::clear);
        self.folders.iter_mut().for_each(Folder::clear);
    }

    // Imports: requests.

    /// Copies from the readable part.
    pub(super) fn read(&mut self, handle: u32, offset: u32, length: u32) -> Result<Vec<u8>, Misuse> {
        let held = self.table.get(handle)?;
        let rest = held.readable.length().saturating_sub(offset.into());
        let mut bytes = vec![0; usize::try_from(rest.min(length.min(MAX_READ).into())).unwrap_or(0)];
        held.readable.read(offset.into(), &mut bytes);
        Ok(bytes)
    }

    /// Copies from the readable part into a buffer; how many bytes.
    pub(super) fn read_into(&mut self, handle: u32, offset: u32, into: &mut [u8]) -> Result<u32, Misuse> {
        let count = self.table.get(handle)?.readable.read(offset.into(), into);
        Ok(u32::try_from(count).unwrap_or(u32::MAX))
    }

    pub(super) fn write(&mut self, handle: u32, offset: u32, bytes: &[u8]) -> Result<u32, Misuse> {
        let count = self.table.get(handle)?.writable.write(offset.into(), bytes);
        Ok(u32::try_from(count).unwrap_or(u32::MAX))
    }

    pub(super) fn complete(&mut self, handle: u32, written: u32) -> Result<(), Misuse> {
        if self.table.get(handle)?.answer(written)? {
            self.finish(handle, written);
        }
        Ok(())
    }

    pub(super) fn move_to_channel(
        &mut self,
        handle: u32,
        offset: u32,
        length: u32,
        channel: u32,
    ) -> Result<u32, Misuse> {
        let held = self.table.get(handle)?;
        let transfer = Transfer { out: true, channel, offset, length };
        let Some(end) = self.base.channel(channel) else { return Ok(0) };
        let length = u64::from(length).min(held.readable.length().saturating_sub(offset.into()));
        if let Some(moved) = held.moved_before(transfer, &mut self.divergences) {
            if u64::from(moved) < length {
                end.want_room();
            }
            return Ok(moved);
        }
        let mut bytes = [0; CHUNK];
        let mut moved = 0;
        while moved < length {
            let chunk = usize::try_from(length - moved).unwrap_or(CHUNK).min(CHUNK);
            held.readable.read(u64::from(offset) + moved, &mut bytes[..chunk]);
            let taken = u64::from(end.device_write(&bytes[..chunk]));
            moved += taken;
            if taken < chunk as u64 {
                break;
            }
        }
        let moved = u32::try_from(moved).unwrap_or(u32::MAX);
        if moved > 0 {
            held.moved(transfer, moved);
        }
        Ok(moved)
    }

    pub(super) fn move_from_channel(
        &mut self,
        handle: u32,
        offset: u32,
        length: u32,
        channel: u32,
    ) -> Result<u32, Misuse> {
        let held = self.table.get(handle)?;
        let transfer = Transfer { out: false, channel, offset, length };
        let Some(end) = self.base.channel(channel) else { return Ok(0) };
        if let Some(moved) = held.moved_before(transfer, &mut self.divergences) {
            return Ok(moved);
        }
        let room = u64::from(length).min(held.writable.length().saturating_sub(offset.into()));
        if room == 0 {
            return Ok(0);
        }
        let bytes = end.device_read(u32::try_from(room).unwrap_or(u32::MAX));
        held.writable.write(offset.into(), &bytes);
        let moved = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        if moved > 0 {
            held.moved(transfer, moved);
        }
        Ok(moved)
    }

    pub(super) fn config_changed(&mut self) {
        self.outbox.config_changed |= !self.base.preparing();
    }

    pub(super) fn needs_reset(&mut self) {
        self.outbox.needs_reset |= !self.base.preparing();
    }

    // Imports: stores.

    pub(super) fn store_info(&self, store: u32) -> StoreInfo {
        let store = self.stores.get(usize::try_from(store).unwrap_or(usize::MAX));
        store.map_or_else(|| StoreInfo::new(0), |store| store.info())
    }

    /// Begins an operation on a store.
    pub(super) fn begin(&mut self, store: u32, asked: &RequestOperation) -> Result<(), Misuse> {
        let handle = asked.request.0;
        let kind = match asked.kind {
            RequestOperation::READ => OperationKind::Read,
            RequestOperation::WRITE => OperationKind::Write,
            RequestOperation::FLUSH => OperationKind::Flush,
            RequestOperation::DISCARD => OperationKind::Discard,
            RequestOperation::WRITE_ZEROES => OperationKind::WriteZeroes { unmap: false },
            RequestOperation::UNMAP_ZEROES => OperationKind::WriteZeroes { unmap: true },
            other => {
                return Err(Misuse(format!("it began an operation of kind {other}, which there is not")));
            }
        };
        let Some(success) = asked.success() else {
            return Err(Misuse(format!(
                "it began an operation that is to be answered with {} bytes, which can be 8",
                asked.success_length
            )));
        };
        let (offset, length, position) = match kind {
            OperationKind::Read | OperationKind::Write => (asked.offset, asked.length, asked.position),
            OperationKind::Flush => (0, 0, 0),
            _ => (0, asked.length, asked.position),
        };
        let index = usize::try_from(store).unwrap_or(usize::MAX);
        let held = self.table.get(handle)?;
        if index >= self.stores.len() {
            return Err(Misuse(format!("it named store {index}, which it was not given")));
        }
        let operation = StoreOperation { store, kind, offset, length, position };
        let next = held.begin(operation, success, &mut self.divergences)?;
        self.go_on(handle, next);
        Ok(())
    }

    // Imports: ports.

    pub(super) fn port(&self, port: u32) -> Option<&Arc<dyn NetworkPort>> {
        self.ports.get(usize::try_from(port).ok()?)
    }

    pub(super) fn port_info(&self, port: u32) -> PortInfo {
        self.port(port).map_or(
            PortInfo {
                mac: [0; 6],
                mtu: 1500,
                link_up: false,
                send: Offloads::default(),
                receive: Offloads::default(),
            },
            |port| port.info(),
        )
    }

    pub(super) fn accept(&mut self, port: u32, offloads: Offloads) {
        if let Some(port) = self.port(port) {
            port.accept(offloads);
        }
    }

    pub(super) fn send(&mut self, port: u32, handles: &[u32]) -> Result<(), Misuse> {
        for handle in handles {
            let held = self.table.get(*handle)?;
            let now = held.answer(0)?;
            let sent = self
                .ports
                .get(usize::try_from(port).unwrap_or(usize::MAX))
                .is_some_and(|port| port.send(&held.readable));
            self.dropped_frames += u64::from(!sent);
            if now {
                self.finish(*handle, 0);
            }
        }
        Ok(())
    }

    pub(super) fn waiting(&mut self, port: u32, max: u32) -> Vec<u32> {
        let mut lengths = std::mem::take(&mut self.lengths);
        lengths.clear();
        if let Some(port) = self.port(port) {
            port.waiting(usize::try_from(max.min(MAX_FRAMES)).unwrap_or(0), &mut lengths);
        }
        lengths
    }

    pub(super) fn receive(&mut self, port: u32, counts: &[u16], handles: &[u32]) -> Result<(), Misuse> {
        let sum: usize = counts.iter().map(|count| usize::from(*count)).sum();
        if sum != handles.len() {
            return Err(Misuse(format!(
                "it gave `receive` {} requests for frames that take {sum}",
                handles.len()
            )));
        }
        let Some(port) = self.port(port).cloned() else {
            return Err(Misuse(format!("it named port {port}, which it was not given")));
        };
        let mut handles = handles;
        for count in counts {
            let (mine, rest) = handles.split_at(usize::from(*count));
            handles = rest;
            // Before the frame is taken: one that is taken goes into requests that are there.
            for (index, handle) in mine.iter().enumerate() {
                self.table.get(*handle)?;
                if mine[..index].contains(handle) {
                    return Err(Misuse(format!("it named request {handle} twice for one frame")));
                }
            }
            let Some(mut frame) = port.receive() else {
                return Err(Misuse("it took a frame where none waits".into()));
            };
            if let Some(number) = frame.get_mut(FRAME_HEADER - 2..FRAME_HEADER) {
                number.copy_from_slice(&count.to_le_bytes());
            }
            let mut rest = frame.as_slice();
            for handle in mine {
                let held = self.table.get(*handle)?;
                let taken = held.writable.write(0, rest);
                rest = &rest[taken..];
                let written = u32::try_from(taken).unwrap_or(u32::MAX);
                if held.answer(written)? {
                    self.finish(*handle, written);
                }
            }
        }
        Ok(())
    }

    // Imports: entropy and pages.

    pub(super) fn fill(&mut self, handle: u32, offset: u32, length: u32) -> Result<u32, Misuse> {
        let held = self.table.get(handle)?;
        let mut bytes = [0; CHUNK];
        let mut done = 0;
        let length = length.min(MAX_READ);
        while done < length {
            let chunk = usize::try_from(length - done).unwrap_or(CHUNK).min(CHUNK);
            let at = u64::from(offset) + u64::from(done);
            let room = usize::try_from(held.writable.length().saturating_sub(at)).unwrap_or(CHUNK);
            let chunk = chunk.min(room);
            if chunk == 0 {
                break;
            }
            fill_random(&mut bytes[..chunk]);
            held.writable.write(at, &bytes[..chunk]);
            done += u32::try_from(chunk).unwrap_or(0);
        }
        Ok(done)
    }

    pub(super) fn release_numbered(&mut self, handle: u32) -> Result<u32, Misuse> {
        Ok(pages::numbered(&self.table.get(handle)?.readable))
    }

    pub(super) fn release_own(&mut self, handle: u32) -> Result<u32, Misuse> {
        Ok(pages::own(&self.table.get(handle)?.writable))
    }

    pub(super) fn memory_size(&self) -> u64 {
        self.ram.size()
    }

    /// A new instance knows nothing of what was said before: it is told of frames again.
    pub(super) fn tell_of_ports(&self) {
        for (index, _) in (0..).zip(&self.ports) {
            self.inbox.tell(News::Frames, index);
        }
    }
}

/// Adds what the device is told of a request.
fn describe(held: &Held, head: u16, records: &mut Vec<RequestRecord>, heads: &mut Vec<u8>) {
    let length = |row: &Buffers| u32::try_from(row.length()).unwrap_or(u32::MAX);
    let start = heads.len();
    let head = usize::try_from(held.readable.length()).unwrap_or(usize::MAX).min(usize::from(head));
    heads.resize(start + head, 0);
    held.readable.read(0, &mut heads[start..]);
    records.push(RequestRecord {
        handle: tenon_abi::Handle(held.handle),
        readable: length(&held.readable),
        writable: length(&held.writable),
        head: u32::try_from(head).unwrap_or(0),
    });
}
