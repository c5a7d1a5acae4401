//! Device plugin: a virtio block device (virtio 1.2 §5.2), whose content is the store `disk`.
//!
//! Data never passes through the plugin: it reads the 16 bytes of a request's header, checks them, and asks the host to move the data between the request and the store and
//! to answer. For a batch of reads, writes and flushes it is entered once. It hears again of
//!
//! - operations that failed, which become the status `IOERR` (a flush that failed is never anything else);
//! - requests of several steps: ranges to discard or to zero, one after the other, and writes through the cache.
//!
//! What differs from other virtio block devices, on purpose:
//!
//! - **Features are settings**, since they are offered before the store is at hand: `read-only` must be set where the store is read-only, and a discard on a store that
//!   cannot is answered as not supported.
//! - **Ranges of parts of blocks are refused**: a store of 4 KiB blocks is offered as such (`blk_size`) and not emulated in sectors of 512 bytes.
//! - **The cache** is write-back while the driver has accepted FLUSH, or says so in `writeback`; otherwise each write is made durable before it is answered.

mod request;
mod space;

use std::collections::HashMap;

use tenon_sdk::virtio::{
    self, Answer, Attachment, Batch, Config, Decoder, Encoder, Error, Handle, OperationDone, Request,
    RequestOperation, Result, Store, StoreError, VirtioDescription, VirtioDevice, info,
};

use crate::request::{Command, Disk, HEADER, IDENTITY, Range, RangeKind, Status};

const DEVICE_TYPE: u16 = 2;

const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_TOPOLOGY: u64 = 1 << 10;
const F_CONFIG_WCE: u64 = 1 << 11;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// The most entries of a queue.
const QUEUE_SIZE: u16 = 256;
/// Tells the host to answer by itself.
const DONE: [u8; 1] = [Status::Ok as u8];

/// The disk.
pub struct Block {
    store: Store,
    disk: Disk,
    /// The setting; the store may be read-only besides.
    read_only: bool,
    serial: Option<String>,
    queues: u16,
    /// What the driver accepted; none before it is ready.
    features: u64,
    /// The driver's field of the configuration space.
    writeback: bool,
    /// Requests of which this device is to hear again.
    pending: HashMap<Handle, Pending>,
    /// Operations that are begun together, when everything that the host brought has been looked at.
    operations: Vec<RequestOperation>,
}

/// A request with steps to come.
struct Pending {
    writable: u32,
    /// The next is the last.
    steps: Vec<Step>,
}

/// One operation on the store.
#[derive(Clone, Copy)]
enum Step {
    Write { length: u32, position: u64 },
    Flush,
    Range(RangeKind, Range),
}

tenon_sdk::export_virtio_device!(Block);

struct Settings {
    queues: u16,
    read_only: bool,
    discard: bool,
    serial: Option<String>,
}

fn settings(config: &Config) -> Result<Settings> {
    let serial = config.text("serial").filter(|serial| !serial.is_empty());
    if let Some(serial) = serial
        && (serial.len() > IDENTITY || !serial.bytes().all(|byte| (b' '..=b'~').contains(&byte)))
    {
        return Err(Error::Invalid(format!(
            "`serial` is `{serial}`, but must be at most {IDENTITY} printable ASCII characters"
        )));
    }
    Ok(Settings {
        queues: config.number_in("queues", 1..=64_u16)?.unwrap_or(1),
        read_only: config.boolean("read-only")?.unwrap_or(false),
        discard: config.boolean("discard")?.unwrap_or(true),
        serial: serial.map(str::to_owned),
    })
}

impl VirtioDevice for Block {
    fn describe(config: &Config) -> Result<VirtioDescription> {
        let settings = settings(config)?;
        let mut features = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | F_CONFIG_WCE;
        if settings.queues > 1 {
            features |= F_MQ;
        }
        if settings.read_only {
            features |= F_RO;
        } else {
            features |= F_WRITE_ZEROES | if settings.discard { F_DISCARD } else { 0 };
        }
        let description =
            VirtioDescription::new(DEVICE_TYPE).features(features).config(space::SIZE).store("disk");
        Ok((0..settings.queues).fold(description, |description, queue| {
            description.queue(&format!("requests{queue}"), QUEUE_SIZE, HEADER)
        }))
    }

    fn start(config: &Config, mut attachment: Attachment) -> Result<Self> {
        let settings = settings(config)?;
        let store = attachment.store()?;
        let info = store.info();
        if info.read_only && !settings.read_only {
            return Err(Error::Invalid(
                "the store is read-only, and the guest would be told that it can write: set `read-only=true`"
                    .to_owned(),
            ));
        }
        let mut block = Self {
            disk: Disk { info, read_only: true },
            store,
            read_only: settings.read_only,
            serial: settings.serial,
            queues: settings.queues,
            features: 0,
            writeback: true,
            pending: HashMap::new(),
            operations: Vec::new(),
        };
        block.look_at_store();
        Ok(block)
    }

    fn activate(&mut self, features: u64) -> Result<()> {
        self.features = features;
        Ok(())
    }

    fn config_read(&mut self, offset: u32, size: u8) -> u64 {
        virtio::field(&space::bytes(&self.disk, self.queues, QUEUE_SIZE, self.writeback), offset, size)
    }

    fn config_write(&mut self, offset: u32, size: u8, value: u64) {
        if (offset, size) == (space::WRITEBACK, 1) {
            self.writeback = value & 1 != 0;
        }
    }

    fn requests_ready(&mut self, _queue: u16, batch: &Batch<'_>) {
        let answers: Vec<Answer> = batch.iter().filter_map(|request| self.begin(&request)).collect();
        self.end(&answers);
    }

    fn operations_done(&mut self, done: &[OperationDone]) {
        let answers: Vec<Answer> = done.iter().filter_map(|done| self.go_on(*done)).collect();
        self.end(&answers);
    }

    fn store_changed(&mut self, _store: u32) {
        self.look_at_store();
        info!("the disk has {} bytes now", self.disk.info.size);
        virtio::config_changed();
    }

    fn reset(&mut self) {
        self.features = 0;
        self.writeback = true;
        self.pending.clear();
    }

    fn save(&self, state: &mut Encoder) -> Result<()> {
        state.u64(self.features).bool(self.writeback);
        Ok(())
    }

    fn restore(&mut self, state: &mut Decoder<'_>) -> Result<()> {
        self.features = state.u64()?;
        self.writeback = state.bool()?;
        Ok(())
    }
}

impl Block {
    fn look_at_store(&mut self) {
        self.disk.info = self.store.info();
        self.disk.read_only = self.read_only || self.disk.info.read_only;
    }

    /// Whether writes must be durable when they are answered (virtio 1.2 §5.2.6.2).
    fn writes_through(&self) -> bool {
        if self.features & F_CONFIG_WCE != 0 { !self.writeback } else { self.features & F_FLUSH == 0 }
    }

    /// Ends a call: begins what it came to, and answers what is answered already.
    fn end(&mut self, answers: &[Answer]) {
        self.store.begin(&self.operations);
        self.operations.clear();
        virtio::complete_all(answers);
    }

    /// Begins a request. The answer, if there is one already.
    fn begin(&mut self, request: &Request<'_>) -> Option<Answer> {
        let (handle, writable) = (request.handle, request.writable);
        if writable == 0 {
            // There is no room for a status, and without one nothing is to be done.
            return Some(Answer { request: handle, written: 0 });
        }
        let command = match self.disk.parse(request.head, request.readable, writable) {
            Ok(command) => command,
            Err(status) => return Some(answer(handle, writable, status)),
        };
        match command {
            Command::Read { length: 0, .. } | Command::Write { length: 0, .. } => {
                Some(answer(handle, writable, Status::Ok))
            }
            Command::Read { length, position } => {
                self.operations.push(RequestOperation::read(handle, 0, length, position).answering(&DONE));
                None
            }
            Command::Write { length, position } => {
                let after = if self.writes_through() { vec![Step::Flush] } else { Vec::new() };
                self.step(handle, writable, Step::Write { length, position }, after);
                None
            }
            Command::Flush => {
                self.step(handle, writable, Step::Flush, Vec::new());
                None
            }
            Command::Identity { room } => {
                let identity = self.identity();
                let length = identity.len().min(usize::try_from(room).unwrap_or(usize::MAX));
                virtio::write(handle, 0, &identity[..length]);
                Some(answer(handle, writable, Status::Ok))
            }
            Command::Ranges { kind, length } => {
                let payload = virtio::read(handle, HEADER.into(), length);
                match self.disk.parse_ranges(kind, &payload) {
                    Err(status) => Some(answer(handle, writable, status)),
                    Ok(ranges) => {
                        let steps = ranges.into_iter().rev().map(|range| Step::Range(kind, range)).collect();
                        self.next(handle, Pending { writable, steps })
                    }
                }
            }
        }
    }

    /// Goes on with a request of which an operation has ended. The answer, if that was the last.
    fn go_on(&mut self, done: OperationDone) -> Option<Answer> {
        let handle = done.request;
        match (self.pending.remove(&handle), done.result()) {
            (Some(pending), Ok(())) => self.next(handle, pending),
            (Some(Pending { writable, .. }), Err(StoreError::Unsupported)) => {
                Some(answer(handle, writable, Status::Unsupported))
            }
            (Some(Pending { writable, .. }), Err(_)) => Some(answer(handle, writable, Status::IoError)),
            (None, _) => Some(failed(handle)),
        }
    }

    /// Starts the next step of a request, or gives its answer when there is none.
    fn next(&mut self, handle: Handle, mut pending: Pending) -> Option<Answer> {
        let Some(step) = pending.steps.pop() else {
            return Some(answer(handle, pending.writable, Status::Ok));
        };
        self.step(handle, pending.writable, step, pending.steps);
        None
    }

    /// Starts a step. The host answers by itself if it was the last, unless it would put the status in a wrong place (there is room for more), or its failure may
    /// have to be told as something else than an I/O error.
    fn step(&mut self, handle: Handle, writable: u32, step: Step, after: Vec<Step>) {
        let ends = after.is_empty() && writable == 1 && !matches!(step, Step::Range(..));
        let operation = match step {
            Step::Write { length, position } => {
                RequestOperation::write(handle, HEADER.into(), length, position)
            }
            Step::Flush => RequestOperation::flush(handle),
            Step::Range(RangeKind::Discard, Range { position, length, .. }) => {
                RequestOperation::discard(handle, position, length)
            }
            Step::Range(RangeKind::WriteZeroes, Range { position, length, unmap }) => {
                RequestOperation::write_zeroes(handle, position, length, unmap)
            }
        };
        self.operations.push(if ends { operation.answering(&DONE) } else { operation });
        if !ends {
            self.pending.insert(handle, Pending { writable, steps: after });
        }
    }

    /// What GET_ID gives: the serial number, filled up with zeroes.
    fn identity(&self) -> [u8; IDENTITY] {
        let text = self.serial.as_deref().unwrap_or(&self.disk.info.identity);
        let mut identity = [0; IDENTITY];
        identity.iter_mut().zip(text.bytes()).for_each(|(to, from)| *to = from);
        identity
    }
}

/// The answer of this status, which goes into the last writable byte; there is at least one.
fn answer(handle: Handle, writable: u32, status: Status) -> Answer {
    virtio::write(handle, writable - 1, &[status as u8]);
    Answer { request: handle, written: writable }
}

/// The answer to a read, write or flush that failed. How long its writable part is was not kept: requests that succeed end without this device, so that what it keeps of them
/// would never be dropped. The end is found by trying; what that overwrites is the data of a read that failed.
fn failed(handle: Handle) -> Answer {
    let status = [Status::IoError as u8];
    let fits = |offset| virtio::write(handle, offset, &status) == 1;
    let (mut last, mut outside) = (0, 1);
    while fits(outside) {
        last = outside;
        // No part is so long that there is a byte at `u32::MAX`.
        outside = outside.saturating_mul(2);
    }
    while outside - last > 1 {
        let middle = last + (outside - last) / 2;
        if fits(middle) {
            last = middle;
        } else {
            outside = middle;
        }
    }
    answer(handle, last + 1, Status::IoError)
}
