//! The bench of virtio devices does what a host does, and the suites find the mistakes that they are there for.
#![allow(clippy::unwrap_used, reason = "a test and its helpers")]

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use tenon_sdk::virtio::{
    Answer, Attachment, Batch, Channel, Config, Decoder, Encoder, Handle, OperationDone, Port, Request,
    RequestOperation, Result, Store, StoreError, StoreInfo, Timer, VirtioDescription, VirtioDevice, complete,
    complete_all, config_changed, fill_random, from_channel, memory_size, needs_reset, now, read,
    release_numbered, release_own, to_channel, write,
};
use tenon_testkit::{MemoryStore, On, VirtioBench, VirtioSetup, blk_conformance, virtio_conformance};

/// What a block device under check does wrong.
const FINE: u8 = 0;
const COMPLETES_TWICE: u8 = 1;
const RESET_KEEPS_COUNT: u8 = 2;
const TRUSTS_HEADER: u8 = 3;
const FLUSH_ALWAYS_OK: u8 = 4;
const IGNORES_FAILURE: u8 = 5;
const FORGETS_COUNT: u8 = 6;
const ACCEPTS_SHORT_STATE: u8 = 7;
const READS_BEHIND_THE_END: u8 = 8;
const DEAF_TO_RESIZE: u8 = 9;
const ANSWERS_EARLY: u8 = 10;
const ZEROES_TOO_MUCH: u8 = 11;

const SECTOR: u64 = 512;

/// A small block device; `MISTAKE` says what is wrong with it.
struct Disk<const MISTAKE: u8> {
    store: Store,
    info: StoreInfo,
    /// How many requests came. It is in the state so that there is one.
    count: u64,
    /// The room of each request.
    rooms: HashMap<Handle, u32>,
}

/// Answers a request with a status, which is the last byte of its room.
fn end(request: Handle, room: u32, status: u8) {
    write(request, room - 1, &[status]);
    complete(request, room);
}

impl<const MISTAKE: u8> Disk<MISTAKE> {
    fn ask(&self, operation: RequestOperation) {
        self.store.begin(&[operation.answering(&[0])]);
    }

    fn inside(&self, sector: u64, bytes: u64) -> bool {
        let start = sector.checked_mul(SECTOR);
        start.and_then(|start| start.checked_add(bytes)).is_some_and(|end| end <= self.info.size)
    }

    fn fail(request: &Request<'_>, status: u8) {
        end(request.handle, request.writable, status);
    }

    fn begin(&mut self, request: &Request<'_>) {
        if request.writable == 0 {
            return complete(request.handle, 0);
        }
        let header: [u8; 16] = match request.head.try_into() {
            Ok(header) => header,
            Err(_) if MISTAKE == TRUSTS_HEADER => panic!("as it should for this test"),
            Err(_) => return Self::fail(request, 1),
        };
        let kind = u32::from_le_bytes(header[..4].try_into().unwrap());
        let sector = u64::from_le_bytes(header[8..].try_into().unwrap());
        let data = request.readable - 16;
        let room = request.writable - 1;
        let handle = request.handle;
        self.rooms.insert(handle, request.writable);
        match kind {
            0 if u64::from(room) % SECTOR == 0 && self.inside(sector, room.into()) => {
                self.ask(RequestOperation::read(handle, 0, room, sector * SECTOR));
            }
            1 if u64::from(data) % SECTOR == 0 && self.inside(sector, data.into()) => {
                if MISTAKE == ANSWERS_EARLY {
                    return Self::fail(request, 0);
                }
                self.ask(RequestOperation::write(handle, 16, data, sector * SECTOR));
            }
            0 if MISTAKE == READS_BEHIND_THE_END => Self::fail(request, 0),
            0 | 1 => Self::fail(request, 1),
            4 if MISTAKE == FLUSH_ALWAYS_OK => Self::fail(request, 0),
            4 => self.ask(RequestOperation::flush(handle)),
            8 => {
                let text = [self.info.identity.as_bytes(), &[0; 20]].concat();
                let fits = write(handle, 0, &text[..20.min(room as usize)]);
                let status = write(handle, fits, &[0]);
                complete(handle, fits + status);
            }
            13 => {
                let segment = read(handle, 16, 16);
                let Ok(segment) = <[u8; 16]>::try_from(segment) else { return Self::fail(request, 1) };
                let first = u64::from_le_bytes(segment[..8].try_into().unwrap());
                let count = u32::from_le_bytes(segment[8..12].try_into().unwrap());
                let count = u64::from(count) + u64::from(MISTAKE == ZEROES_TOO_MUCH);
                let flags = u32::from_le_bytes(segment[12..].try_into().unwrap());
                if flags > 1 {
                    Self::fail(request, 2);
                } else if data == 16 && self.inside(first, count * SECTOR) {
                    let (position, length) = (first * SECTOR, count * SECTOR);
                    self.ask(RequestOperation::write_zeroes(handle, position, length, flags == 1));
                } else {
                    Self::fail(request, 1);
                }
            }
            _ => Self::fail(request, 2),
        }
    }
}

impl<const MISTAKE: u8> VirtioDevice for Disk<MISTAKE> {
    fn describe(_config: &Config) -> Result<VirtioDescription> {
        // FLUSH, WRITE_ZEROES.
        let features = 1 << 9 | 1 << 14;
        Ok(VirtioDescription::new(2).features(features).queue("requests", 128, 16).config(60).store("disk"))
    }

    fn start(_config: &Config, mut attachment: Attachment) -> Result<Self> {
        let store = attachment.store()?;
        let info = store.info();
        Ok(Self { store, info, count: 0, rooms: HashMap::new() })
    }

    fn config_read(&mut self, offset: u32, size: u8) -> u64 {
        let mut space = [0; 72];
        space[..8].copy_from_slice(&(self.info.size / SECTOR).to_le_bytes());
        let at = offset as usize;
        u64::from_le_bytes(space[at..at + 8].try_into().unwrap()) & (u64::MAX >> (64 - 8 * u32::from(size)))
    }

    fn requests_ready(&mut self, _queue: u16, batch: &Batch<'_>) {
        for request in batch.iter() {
            self.count += 1;
            self.begin(&request);
            if MISTAKE == COMPLETES_TWICE && self.count == 5 {
                complete(request.handle, 0);
                complete(request.handle, 0);
            }
        }
    }

    fn operations_done(&mut self, done: &[OperationDone]) {
        let status = u8::from(MISTAKE != IGNORES_FAILURE);
        for done in done {
            assert!(done.result().is_err(), "a success was to be completed by the host");
            end(done.request, self.rooms[&done.request], status);
        }
    }

    fn store_changed(&mut self, _store: u32) {
        if MISTAKE != DEAF_TO_RESIZE {
            self.info = self.store.info();
            config_changed();
        }
    }

    fn reset(&mut self) {
        if MISTAKE != RESET_KEEPS_COUNT {
            self.count = 0;
        }
        self.rooms.clear();
    }

    fn save(&self, state: &mut Encoder) -> Result<()> {
        state.u64(self.count);
        Ok(())
    }

    fn restore(&mut self, state: &mut Decoder<'_>) -> Result<()> {
        let count = if MISTAKE == ACCEPTS_SHORT_STATE { state.u64().unwrap_or(0) } else { state.u64()? };
        if MISTAKE != FORGETS_COUNT {
            self.count = count;
        }
        Ok(())
    }
}

fn setup() -> VirtioSetup {
    VirtioSetup::new().store("disk", MemoryStore::new(4 << 20))
}

fn finds<const MISTAKE: u8>(what: &str) {
    let payload = catch_unwind(AssertUnwindSafe(|| {
        virtio_conformance::<Disk<MISTAKE>>(&[], &setup());
        blk_conformance::<Disk<MISTAKE>>(&[], &setup());
    }))
    .unwrap_err();
    let text = payload
        .downcast_ref::<String>()
        .map_or_else(|| *payload.downcast_ref::<&str>().unwrap(), String::as_str);
    assert!(text.contains(what), "mistake {MISTAKE} was found as: {text}");
}

#[test]
fn the_suites_pass_a_device_that_is_right() {
    virtio_conformance::<Disk<FINE>>(&[], &setup());
    blk_conformance::<Disk<FINE>>(&[], &setup());
}

#[test]
fn the_suites_find_each_mistake() {
    finds::<COMPLETES_TWICE>("which it does not hold");
    finds::<RESET_KEEPS_COUNT>("after `reset` the state is not as after power-on");
    finds::<TRUSTS_HEADER>("as it should for this test");
    finds::<FLUSH_ALWAYS_OK>("Flush while the store fails gives status 0");
    finds::<IGNORES_FAILURE>("while the store fails gives status 0");
    finds::<FORGETS_COUNT>("saves another state");
    finds::<ACCEPTS_SHORT_STATE>("bytes of its state");
    finds::<READS_BEHIND_THE_END>("reading behind the end gives status 0");
    finds::<DEAF_TO_RESIZE>("has grown");
    finds::<ANSWERS_EARLY>("do not read the same");
    finds::<ZEROES_TOO_MUCH>("did not do just that");
}

fn request(kind: u32, sector: u64, data: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes(), data].concat()
}

#[test]
fn operations_end_when_the_test_says_so_and_are_given_again_after_a_restart() {
    let mut bench = VirtioBench::<Disk<FINE>>::with(&[], &setup()).unwrap();
    bench.activate(0).unwrap();
    bench.hold("disk");
    let first = bench.request(0, &request(1, 0, &[1; 512]), 1);
    let second = bench.request(0, &request(1, 1, &[2; 512]), 1);
    assert_eq!((bench.under_way("disk"), bench.unanswered()), (2, vec![first, second]));
    bench.release("disk", 1);
    assert_eq!(bench.answered(first).unwrap().data, [0]);
    assert_eq!(bench.answered(second), None);
    bench.round_trip();
    assert_eq!((bench.under_way("disk"), bench.unanswered()), (1, vec![second]));
    bench.release_all("disk");
    assert_eq!(bench.answered(second).unwrap().data, [0]);
    assert_eq!(bench.store("disk").content(0, 1024), [[1; 512], [2; 512]].concat());
    assert_eq!(bench.store("disk").durable(0, 1024), [0; 1024]);
    bench.hold("disk");
    let third = bench.request(0, &request(4, 0, &[]), 1);
    bench.reset();
    bench.release_all("disk");
    assert_eq!((bench.answered(third), bench.unanswered()), (None, vec![]));
}

#[test]
fn faults_strike_the_operations_that_they_are_for() {
    let mut bench = VirtioBench::<Disk<FINE>>::with(&[], &setup()).unwrap();
    bench.activate(0).unwrap();
    bench.store("disk").fail_after(On::Write, 1, 2, StoreError::NoSpace);
    let statuses: Vec<u8> =
        (0..4).map(|sector| bench.ask(0, &request(1, sector, &[9; 512]), 1).data[0]).collect();
    assert_eq!(statuses, [0, 1, 1, 0]);
    assert_eq!(bench.ask(0, &request(0, 0, &[]), 513).data[512], 0);
    assert_eq!(bench.store("disk").counts().faults, 2);
}

#[test]
fn power_loss_keeps_what_was_flushed_and_some_of_the_rest() {
    let mut bench = VirtioBench::<Disk<FINE>>::with(&[], &setup()).unwrap();
    bench.activate(0).unwrap();
    bench.ask(0, &request(1, 0, &[1; 64 * 512]), 1);
    bench.ask(0, &request(4, 0, &[]), 1);
    bench.ask(0, &request(1, 64, &[2; 64 * 512]), 1);
    bench.store("disk").lose_power(1);
    let content = bench.store("disk").content(0, 128 * 512);
    assert_eq!(content[..64 * 512], [1; 64 * 512]);
    let kept = content[64 * 512..].chunks(512).filter(|block| **block == [2; 512]).count();
    let lost = content[64 * 512..].chunks(512).filter(|block| **block == [0; 512]).count();
    assert!(kept > 0 && lost > 0 && kept + lost == 64, "{kept} kept, {lost} lost");
}

/// Uses everything that is not a store. Queue 0 does what the first byte says; queue 1 waits for frames.
struct Everything {
    channel: Channel,
    timer: Timer,
    port: Port,
    room: Vec<Handle>,
    stuck: Option<(Handle, u32, u32)>,
    waits: Option<Handle>,
    seen: Vec<String>,
}

impl Everything {
    fn one(&mut self, request: &Request<'_>) {
        let (handle, size) = (request.handle, request.readable);
        let written = match request.head.first() {
            Some(b'o') => {
                let taken = to_channel(handle, 1, size - 1, &self.channel);
                if taken < size - 1 {
                    self.stuck = Some((handle, 1 + taken, size));
                    return;
                }
                0
            }
            Some(b'i') => match from_channel(handle, 0, request.writable, &self.channel) {
                0 => {
                    self.waits = Some(handle);
                    return;
                }
                count => count,
            },
            Some(b'r') => fill_random(handle, 0, request.writable),
            Some(b't') => {
                self.timer.arm(now() + 5);
                0
            }
            Some(b'n') => {
                needs_reset();
                0
            }
            Some(b'p') => release_numbered(handle),
            Some(b'b') => release_own(handle),
            Some(b'm') => write(handle, 0, &memory_size().to_le_bytes()),
            _ => {
                self.port.send(&[handle]);
                return;
            }
        };
        complete(handle, written.min(request.writable));
    }

    fn frames(&mut self) {
        let waiting = self.port.waiting(8);
        for length in waiting {
            let count = (length.div_ceil(64)).min(u32::try_from(self.room.len()).unwrap());
            let requests: Vec<Handle> = self.room.drain(..count as usize).collect();
            self.port.receive(&[u16::try_from(count).unwrap()], &requests);
        }
    }
}

impl VirtioDevice for Everything {
    fn describe(_config: &Config) -> Result<VirtioDescription> {
        let description = VirtioDescription::new(1).queue("all", 64, 1).queue("rx", 64, 0);
        Ok(description.timer().channel("console").port("net"))
    }

    fn start(_config: &Config, mut attachment: Attachment) -> Result<Self> {
        let (channel, timer, port) = (attachment.channel()?, attachment.timer()?, attachment.port()?);
        assert!(attachment.store().is_err());
        Ok(Self { channel, timer, port, room: vec![], stuck: None, waits: None, seen: vec![] })
    }

    fn requests_ready(&mut self, queue: u16, batch: &Batch<'_>) {
        assert!(!batch.is_empty());
        for request in batch.iter() {
            if queue == 1 {
                self.room.push(request.handle);
            } else {
                self.one(&request);
            }
        }
    }

    fn channel_writable(&mut self, _channel: u32) {
        let Some((handle, from, size)) = self.stuck.take() else { return };
        let taken = to_channel(handle, from, size - from, &self.channel);
        assert_eq!(taken, size - from, "the test makes room for all");
        complete_all(&[Answer { request: handle, written: 0 }]);
    }

    fn channel_readable(&mut self, _channel: u32) {
        if let Some(handle) = self.waits.take() {
            complete(handle, from_channel(handle, 0, 100, &self.channel));
        }
    }

    fn port_ready(&mut self, _port: u32) {
        self.frames();
    }

    fn port_changed(&mut self, _port: u32) {
        self.seen.push(format!("link {}", self.port.info().link_up));
    }

    fn timer_fired(&mut self, _timer: u32) {
        self.seen.push(format!("timer at {}", now()));
    }

    fn reset(&mut self) {
        self.room.clear();
    }

    fn save(&self, _state: &mut Encoder) -> Result<()> {
        Ok(())
    }

    fn restore(&mut self, _state: &mut Decoder<'_>) -> Result<()> {
        Ok(())
    }
}

#[test]
fn channels_take_what_they_have_room_for_and_tell_when_there_is_more() {
    let mut bench = VirtioBench::<Everything>::ready(&[]).unwrap();
    bench.channel("console").set_capacity(3);
    let ticket = bench.request(0, b"ohello", 0);
    assert_eq!(bench.answered(ticket), None);
    assert_eq!(bench.channel("console").take_output(), b"hel");
    assert!(bench.answered(ticket).is_some());
    assert_eq!(bench.channel("console").take_output(), b"lo");
    let ticket = bench.request(0, b"i", 100);
    assert_eq!(bench.answered(ticket), None);
    bench.channel("console").push(b"input");
    assert_eq!(bench.answered(ticket).unwrap().data, b"input");
}

#[test]
fn ports_carry_frames_both_ways_over_as_many_requests_as_the_device_says() {
    let mut bench = VirtioBench::<Everything>::ready(&[]).unwrap();
    bench.ask(0, &[&[0; 12][..], &[0xee; 60]].concat(), 0);
    bench.ask(0, &[0; 20], 0);
    assert_eq!(bench.port("net").take_sent(), [[&[0; 12][..], &[0xee; 60]].concat()]);
    assert_eq!(bench.port("net").dropped(), 1, "a frame shorter than a header was sent");
    let room = bench.submit(1, &[(&[], 64), (&[], 64), (&[], 64)]);
    bench.port("net").push(&[7; 100]);
    let parts: Vec<Vec<u8>> =
        room.iter().filter_map(|ticket| bench.answered(*ticket)).map(|answer| answer.data).collect();
    assert_eq!((parts.len(), parts[0].len(), parts[1].len()), (2, 64, 48));
    assert_eq!(parts[0][10..13], [2, 0, 7]);
    bench.port("net").change(|info| info.link_up = false);
    bench.request(0, b"t", 0);
    bench.advance(10);
    assert_eq!(bench.device().seen, ["link false", "timer at 5"]);
}

#[test]
fn random_bytes_pages_and_pleas_reach_the_test() {
    let setup = VirtioSetup::new().memory(1 << 20);
    let mut bench = VirtioBench::<Everything>::with(&[], &setup).unwrap();
    bench.activate(0).unwrap();
    let random = bench.ask(0, b"r", 32).data;
    assert!(random.len() == 32 && random != bench.ask(0, b"r", 32).data);
    let pages: Vec<u8> = [0x70u32, 3, 255, 256].iter().flat_map(|page| page.to_le_bytes()).collect();
    assert_eq!(bench.ask(0, &pages, 4).written, 3);
    assert_eq!(bench.released_pages(), [0x70, 3, 255]);
    assert_eq!((bench.ask(0, b"b", 8200).written, bench.released_own()), (2, 2));
    assert_eq!(bench.ask(0, b"m", 8).data, (1u64 << 20).to_le_bytes());
    bench.ask(0, b"n", 0);
    assert!(bench.needs_reset());
    bench.reset();
    assert!(!bench.needs_reset() && !bench.is_active());
}

#[test]
fn more_than_a_batch_comes_in_several_calls_in_order() {
    let mut bench = VirtioBench::<Everything>::ready(&[]).unwrap();
    let tickets = bench.submit(1, &[(&[][..], 16); 600]);
    assert_eq!((bench.entries(), bench.unanswered()), (3, tickets));
}
