//! The block device, from the driver's side and from its store.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use tenon_device_virtio_blk::Block;
use tenon_sdk::virtio::{Result, StoreError, StoreInfo};
use tenon_testkit::{
    MemoryStore, On, Random, Ticket, VirtioBench, VirtioSetup, blk_conformance, virtio_conformance,
};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

const RO: u64 = 1 << 5;
const F_FLUSH: u64 = 1 << 9;
const WCE: u64 = 1 << 11;
const MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

const MIB: u64 = 1 << 20;

fn info() -> StoreInfo {
    StoreInfo { discard: true, write_zeroes: true, identity: "store-1".to_owned(), ..StoreInfo::new(MIB) }
}

struct Disk(VirtioBench<Block>);

impl Disk {
    /// Before its driver is ready.
    fn started(settings: &[(&str, &str)], info: StoreInfo) -> Result<Self> {
        let setup = VirtioSetup::new().store("disk", MemoryStore::with(info));
        Ok(Self(VirtioBench::with(settings, &setup)?))
    }

    /// Ready, with a driver that accepted these features.
    fn with(settings: &[(&str, &str)], info: StoreInfo, features: u64) -> Self {
        let mut disk = Self::started(settings, info).unwrap();
        disk.0.activate(features).unwrap();
        disk
    }

    fn new() -> Self {
        Self::with(&[], info(), F_FLUSH | F_DISCARD | F_WRITE_ZEROES)
    }

    fn submit(&mut self, kind: u32, sector: u64, payload: &[u8], room: usize) -> Ticket {
        self.0.request(0, &request(kind, sector, payload), room)
    }

    /// The status of a request and the bytes before it.
    fn done(&mut self, kind: u32, sector: u64, payload: &[u8], room: usize) -> (u8, Vec<u8>) {
        let mut data = self.0.ask(0, &request(kind, sector, payload), room).data;
        assert_eq!(data.len(), room, "the status is in the last byte");
        (data.pop().unwrap(), data)
    }

    fn status(&mut self, kind: u32, sector: u64, payload: &[u8], room: usize) -> u8 {
        self.done(kind, sector, payload, room).0
    }

    /// The status of a request that was submitted, if it has ended.
    fn ended(&mut self, request: Ticket) -> Option<u8> {
        self.0.answered(request).map(|answer| *answer.data.last().unwrap())
    }

    /// How many operations the store has seen.
    fn operations(&mut self) -> u64 {
        let counts = self.0.store("disk").counts();
        counts.reads + counts.writes + counts.flushes + counts.discards + counts.zeroes
    }
}

fn request(kind: u32, sector: u64, payload: &[u8]) -> Vec<u8> {
    let mut request = kind.to_le_bytes().to_vec();
    request.extend([0; 4]);
    request.extend(sector.to_le_bytes());
    request.extend(payload);
    request
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut range = sector.to_le_bytes().to_vec();
    range.extend(sectors.to_le_bytes());
    range.extend(flags.to_le_bytes());
    range
}

#[test]
fn it_does_what_every_host_and_every_guest_relies_on() {
    let over =
        |info| VirtioSetup::new().store("disk", MemoryStore::with(StoreInfo { size: 4 * MIB, ..info }));
    let large = StoreInfo { block_size: 4096, optimal_size: 65536, ..info() };
    let plain = StoreInfo::new(4 * MIB);
    for (settings, setup) in [
        (&[][..], over(info())),
        (&[("queues", "4")], over(large.clone())),
        (&[("discard", "false"), ("serial", "a b c")], over(plain.clone())),
        (&[("read-only", "true")], over(StoreInfo { read_only: true, ..plain })),
    ] {
        virtio_conformance::<Block>(settings, &setup);
        blk_conformance::<Block>(settings, &setup);
    }
}

#[test]
fn it_offers_what_its_settings_say() {
    let features =
        |settings: &[(&str, &str)]| Disk::started(settings, info()).unwrap().0.description().features;
    let (changes, cache) = (F_DISCARD | F_WRITE_ZEROES, F_FLUSH | WCE);
    assert_eq!(features(&[]) & (RO | MQ | changes | cache), changes | cache);
    assert_eq!(features(&[("read-only", "true")]) & (RO | changes), RO);
    assert_eq!(features(&[("discard", "false")]) & changes, F_WRITE_ZEROES);
    let mut several = Disk::started(&[("queues", "4")], info()).unwrap().0;
    assert_eq!((several.description().features & MQ, several.description().queues.len()), (MQ, 4));
    assert_eq!(several.config_read(34, 2), 4);
}

#[test]
fn settings_that_cannot_be_are_refused_and_say_what_would_be_right() {
    let refusal = |settings: &[(&str, &str)], info| Disk::started(settings, info).err().unwrap().to_string();
    let read_only = StoreInfo { read_only: true, ..info() };
    assert!(refusal(&[], read_only.clone()).contains("read-only=true"));
    assert!(Disk::started(&[("read-only", "true")], read_only).is_ok());
    assert!(refusal(&[("queues", "65")], info()).contains("1 to 64"));
    assert!(refusal(&[("serial", "123456789012345678901")], info()).contains("20"));
    assert!(refusal(&[("serial", "a\u{e9}")], info()).contains("ASCII"));
}

#[test]
fn the_configuration_space_describes_the_store() {
    let mut disk = Disk::with(&[], StoreInfo { optimal_size: 65536, ..info() }, 0).0;
    assert_eq!(disk.config_read(0, 8), MIB / 512);
    assert_eq!(disk.config_read(0, 4), MIB / 512, "half of a field");
    assert_eq!(disk.config_read(12, 4), 254, "segments");
    assert_eq!(disk.config_read(20, 4), 512);
    let topology = (disk.config_read(24, 1), disk.config_read(26, 2), disk.config_read(28, 4));
    assert_eq!(topology, (3, 8, 128), "4 KiB physical, 64 KiB optimal");
    assert_eq!(disk.config_read(32, 1), 1, "write-back");
    assert_ne!(disk.config_read(36, 4), 0);
    assert_eq!(disk.config_read(44, 4), 128, "discards are aligned to 64 KiB");
    let mut disk = Disk::with(&[], StoreInfo { block_size: 4096, optimal_size: 4096, ..info() }, 0).0;
    assert_eq!((disk.config_read(20, 4), disk.config_read(24, 1), disk.config_read(26, 2)), (4096, 0, 1));
}

#[test]
fn what_is_written_is_read_back() {
    let mut disk = Disk::new();
    let text: Vec<u8> = (0..4096_u32).map(|n| n.to_le_bytes()[0]).collect();
    assert_eq!(disk.status(OUT, 8, &text, 1), OK);
    assert_eq!(disk.done(IN, 8, &[], 4097), (OK, text.clone()));
    assert_eq!(disk.done(IN, 9, &[], 513), (OK, text[512..1024].to_vec()));
    assert_eq!(disk.done(IN, 0, &[], 513), (OK, vec![0; 512]));
}

#[test]
fn a_batch_of_64_enters_the_device_once_and_its_end_not_at_all() {
    let mut disk = Disk::new();
    let write: Vec<u8> = request(OUT, 1, &[7; 512]);
    let read = request(IN, 0, &[]);
    let batch: Vec<(&[u8], usize)> =
        (0..64).map(|n| if n % 2 == 0 { (read.as_slice(), 513) } else { (write.as_slice(), 1) }).collect();
    disk.0.hold("disk");
    let requests = disk.0.submit(0, &batch);
    assert_eq!((disk.0.entries(), disk.0.under_way("disk")), (1, 64));
    disk.0.release_all("disk");
    assert!(requests.into_iter().all(|request| disk.ended(request) == Some(OK)));
    assert_eq!(disk.0.entries(), 1);
}

#[test]
fn the_serial_number_is_the_setting_or_that_of_the_store() {
    let (status, bytes) = Disk::new().done(GET_ID, 0, &[], 21);
    assert_eq!((status, bytes.as_slice()), (OK, b"store-1\0\0\0\0\0\0\0\0\0\0\0\0\0".as_slice()));
    let mut disk = Disk::with(&[("serial", "12345678901234567890")], info(), 0);
    assert_eq!(disk.done(GET_ID, 0, &[], 21).1, b"12345678901234567890");
    assert_eq!(disk.done(GET_ID, 0, &[], 6), (OK, b"12345".to_vec()), "a short buffer gets what fits");
    assert_eq!(disk.done(GET_ID, 0, &[], 1), (OK, vec![]));
}

#[test]
fn requests_that_are_wrong_fail_and_touch_nothing() {
    let last = MIB / 512;
    let mut disk = Disk::new();
    for (kind, sector, payload, room, status) in [
        (IN, last, 0, 513, IOERR),
        (IN, last - 1, 0, 1025, IOERR),
        (IN, u64::MAX, 0, 513, IOERR),
        (IN, 1 << 55, 0, 513, IOERR),
        (IN, 0, 0, 512, IOERR),
        (OUT, last, 512, 1, IOERR),
        (OUT, u64::MAX / 512, 512, 1, IOERR),
        (OUT, 0, 511, 1, IOERR),
        (2, 0, 512, 1, UNSUPP),
        (u32::MAX, 0, 0, 1, UNSUPP),
        (14, 0, 16, 1, UNSUPP),
    ] {
        assert_eq!(disk.status(kind, sector, &vec![0; payload], room), status, "{kind} {sector:#x}");
    }
    for short in 0..16 {
        let answer = disk.0.ask(0, &request(IN, 0, &[])[..short], 513);
        assert_eq!(answer.data.last(), Some(&IOERR), "{short} bytes of a header");
    }
    assert_eq!(disk.status(IN, 0, &[], 1), OK, "nothing is read");
    assert_eq!(disk.status(OUT, last, &[], 1), OK, "nothing is written");
    assert_eq!(disk.operations(), 0);
}

#[test]
fn a_request_without_room_for_a_status_comes_back_and_does_nothing() {
    let mut disk = Disk::new();
    assert_eq!(disk.0.ask(0, &request(OUT, 0, &[1; 512]), 0).written, 0);
    assert_eq!(disk.operations(), 0);
}

#[test]
fn parts_of_blocks_are_refused() {
    let info = StoreInfo { block_size: 4096, optimal_size: 4096, ..info() };
    let mut disk = Disk::with(&[], info, F_DISCARD);
    assert_eq!(disk.status(IN, 1, &[], 4097), IOERR);
    assert_eq!(disk.status(IN, 8, &[], 513), IOERR);
    assert_eq!(disk.status(DISCARD, 0, &range(8, 1, 0), 1), IOERR);
    assert_eq!(disk.operations(), 0);
    assert_eq!(disk.status(IN, 8, &[], 4097), OK);
}

#[test]
fn a_failed_read_write_or_flush_is_an_io_error_in_the_last_byte() {
    let errors = [
        StoreError::OutOfRange,
        StoreError::ReadOnly,
        StoreError::NoSpace,
        StoreError::Unsupported,
        StoreError::Io,
    ];
    for error in errors {
        for (kind, payload, room) in [(IN, 0, 513), (IN, 0, 65537), (OUT, 512, 1), (FLUSH, 0, 1)] {
            let mut disk = Disk::new();
            disk.0.store("disk").fail_next(On::Any, error);
            assert_eq!(disk.status(kind, 0, &vec![0; payload], room), IOERR, "{kind} {error}");
            assert_eq!(disk.0.store("disk").counts().faults, 1);
        }
    }
}

#[test]
fn the_status_is_the_last_byte_even_where_there_is_more_room() {
    for room in [2, 3, 100, 4096] {
        for (kind, payload) in [(OUT, &[9; 512][..]), (FLUSH, &[])] {
            let mut disk = Disk::new();
            assert_eq!(disk.status(kind, 0, payload, room), OK);
            disk.0.store("disk").fail_next(On::Any, StoreError::Io);
            assert_eq!(disk.status(kind, 0, payload, room), IOERR);
        }
    }
}

#[test]
fn ranges_are_worked_on_one_after_the_other() {
    let mut disk = Disk::new();
    assert_eq!(disk.status(OUT, 0, &[1; 8192], 1), OK);
    disk.0.hold("disk");
    let ranges = [range(0, 1, 1), range(3, 0, 0), range(4, 2, 0)].concat();
    let request = disk.submit(WRITE_ZEROES, 0, &ranges, 1);
    for done in [1, 2] {
        assert_eq!((disk.0.under_way("disk"), disk.ended(request)), (1, None));
        disk.0.release("disk", 1);
        assert_eq!(disk.0.store("disk").counts().zeroes, done);
    }
    assert_eq!(disk.ended(request), Some(OK));
    disk.0.release_all("disk");
    let (_, bytes) = disk.done(IN, 0, &[], 8193);
    let zeroes: Vec<usize> = (0..16).filter(|sector| bytes[sector * 512] == 0).collect();
    assert_eq!(zeroes, [0, 4, 5]);
    assert_eq!(disk.status(DISCARD, 0, &range(8, 4, 0), 1), OK);
    let (_, after) = disk.done(IN, 0, &[], 8193);
    let changed: Vec<usize> = (0..16).filter(|sector| after[sector * 512] != bytes[sector * 512]).collect();
    assert_eq!(changed, [8, 9, 10, 11]);
}

#[test]
fn the_first_range_that_fails_ends_the_request() {
    for (error, status) in [(StoreError::Io, IOERR), (StoreError::Unsupported, UNSUPP)] {
        let mut disk = Disk::new();
        disk.0.store("disk").fail_next(On::Discard, error);
        assert_eq!(disk.status(DISCARD, 0, &[range(0, 1, 0), range(8, 1, 0)].concat(), 1), status);
        assert_eq!(disk.operations(), 1);
    }
}

#[test]
fn ranges_that_are_wrong_fail_before_any_is_worked_on() {
    let good = range(0, 1, 0);
    let end = u32::try_from(MIB / 512).unwrap();
    let mut disk = Disk::new();
    for (kind, payload, status) in [
        (DISCARD, vec![], IOERR),
        (DISCARD, good[..15].to_vec(), IOERR),
        (DISCARD, [&good[..], &[0]].concat(), IOERR),
        (DISCARD, good.repeat(33), IOERR),
        (DISCARD, [good.clone(), range(u64::from(end), 1, 0)].concat(), IOERR),
        (DISCARD, [good.clone(), range(u64::MAX, u32::MAX, 0)].concat(), IOERR),
        (DISCARD, range(0, end + 1, 0), IOERR),
        (DISCARD, range(0, 1, 1), UNSUPP),
        (WRITE_ZEROES, [good.clone(), range(0, 1, 2)].concat(), UNSUPP),
        (WRITE_ZEROES, range(0, 1, u32::MAX), UNSUPP),
    ] {
        assert_eq!(disk.status(kind, 0, &payload, 1), status, "{kind} {payload:?}");
    }
    assert_eq!(disk.operations(), 0);
}

#[test]
fn a_store_that_cannot_discard_says_so() {
    let mut disk = Disk::with(&[], StoreInfo::new(MIB), F_DISCARD | F_WRITE_ZEROES);
    assert_eq!(disk.status(DISCARD, 0, &range(0, 1, 0), 1), UNSUPP);
    assert_eq!(disk.status(WRITE_ZEROES, 0, &range(0, 1, 0), 1), OK, "a store can always write zeroes");
}

#[test]
fn nothing_changes_a_disk_that_is_read_only() {
    let mut disk = Disk::with(&[("read-only", "true")], info(), RO | F_FLUSH);
    for kind in [OUT, DISCARD, WRITE_ZEROES] {
        assert_eq!(disk.status(kind, 0, &[0; 512], 1), IOERR);
    }
    assert_eq!(disk.operations(), 0);
    assert_eq!(disk.status(IN, 0, &[], 513), OK);
    assert_eq!(disk.status(FLUSH, 0, &[], 1), OK);
}

#[test]
fn a_driver_that_cannot_flush_has_its_writes_made_durable() {
    let is_durable = |disk: &mut Disk, byte| {
        assert_eq!(disk.status(OUT, 0, &[byte; 512], 1), OK);
        disk.0.store("disk").durable(0, 512) == [byte; 512]
    };
    assert!(is_durable(&mut Disk::with(&[], info(), 0), 1));
    assert!(!is_durable(&mut Disk::with(&[], info(), F_FLUSH), 1));
    let mut disk = Disk::with(&[], info(), F_FLUSH | WCE);
    assert!(!is_durable(&mut disk, 1));
    disk.0.config_write(32, 1, 0);
    assert_eq!(disk.0.config_read(32, 1), 0);
    assert!(is_durable(&mut disk, 2));
    disk.0.store("disk").fail_next(On::Flush, StoreError::Io);
    assert_eq!(disk.status(OUT, 0, &[3; 512], 1), IOERR, "the write was done, its flush was not");
    disk.0.config_write(32, 1, 1);
    assert!(!is_durable(&mut disk, 4));
}

#[test]
fn what_a_flush_has_covered_survives_the_loss_of_power() {
    let mut disk = Disk::new();
    for (sector, byte) in [(0, 1), (1, 2)] {
        assert_eq!(disk.status(OUT, sector, &[byte; 512], 1), OK);
    }
    assert_eq!(disk.status(FLUSH, 0, &[], 1), OK);
    disk.0.store("disk").lose_power(1);
    assert_eq!(disk.done(IN, 0, &[], 1025).1, [[1; 512], [2; 512]].concat());
}

#[test]
fn a_store_that_grows_is_announced() {
    let mut disk = Disk::new();
    assert_eq!(disk.status(IN, MIB / 512, &[], 513), IOERR);
    disk.0.resize_store("disk", 2 * MIB);
    assert_eq!((disk.0.config_changes(), disk.0.config_read(0, 8)), (1, 2 * MIB / 512));
    assert_eq!(disk.status(IN, MIB / 512, &[], 513), OK);
}

#[test]
fn unfinished_requests_are_done_after_a_restore() {
    let mut disk = Disk::with(&[], info(), F_DISCARD | F_WRITE_ZEROES);
    disk.0.hold("disk");
    let requests = [
        disk.submit(OUT, 4, &[5; 512], 1),
        disk.submit(WRITE_ZEROES, 0, &[range(0, 1, 0), range(1, 1, 0)].concat(), 1),
        disk.submit(IN, 4, &[], 513),
    ];
    // The write waits for its flush, the others for their first operations.
    disk.0.release("disk", 1);
    disk.0.round_trip();
    disk.0.release_all("disk");
    assert!(requests.into_iter().all(|request| disk.ended(request) == Some(OK)));
}

#[test]
fn a_reset_forgets_requests_and_what_the_driver_set() {
    let mut disk = Disk::with(&[], info(), WCE | F_WRITE_ZEROES);
    let new = Disk::started(&[], info()).unwrap().0.save();
    disk.0.config_write(32, 1, 0);
    disk.0.hold("disk");
    disk.submit(WRITE_ZEROES, 0, &[range(0, 1, 0), range(1, 1, 0)].concat(), 1);
    disk.0.reset();
    disk.0.release_all("disk");
    assert_eq!(disk.0.save(), new);
    disk.0.activate(F_FLUSH).unwrap();
    assert_eq!(disk.status(OUT, 0, &[1; 512], 1), OK);
}

#[test]
fn whatever_a_driver_writes_every_request_ends_with_a_status() {
    let mut random = Random::new(0x626c_6b00_0000_0001);
    let mut disk = Disk::new();
    let mut waiting: Vec<(Ticket, usize)> = Vec::new();
    let mut statuses = [0; 3];
    for round in 0..20_000 {
        let kind = [IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, random.below32(u32::MAX)][random.index(7)];
        let sector = if random.below32(4) == 0 { random.next() } else { random.next() % 2100 };
        let payload = match random.below32(4) {
            0 => random.some_bytes(600),
            1 => (0..random.below32(40))
                .flat_map(|_| range(random.next() % 2100, random.below32(64), random.below32(3)))
                .collect(),
            2 => vec![0; 512 * random.index(9)],
            _ => vec![],
        };
        let mut bytes = request(kind, sector, &payload);
        if random.below32(8) == 0 {
            bytes.truncate(random.index(17));
        }
        let room = [0, 1, 2, 21, 513, 4097, random.index(9000)][random.index(7)];
        match random.below32(4) {
            0 => disk.0.hold("disk"),
            1 => disk.0.release("disk", random.next() % 4),
            2 => disk.0.release_all("disk"),
            _ => disk.0.store("disk").fail_next(On::Any, StoreError::Io),
        }
        waiting.push((disk.0.request(0, &bytes, room), room));
        waiting.retain(|(request, room)| {
            let Some(answer) = disk.0.answered(*request) else { return true };
            assert_eq!(answer.data.len(), *room);
            if let Some(status) = answer.data.last() {
                statuses[usize::from(*status)] += 1;
            }
            false
        });
        match round % 1000 {
            500 => disk.0.round_trip(),
            999 => {
                waiting.clear();
                disk.0.reset();
                let features = disk.0.description().features;
                disk.0.activate(random.next() & features).unwrap();
            }
            _ => {}
        }
    }
    disk.0.release_all("disk");
    assert!(waiting.into_iter().all(|(request, _)| disk.0.answered(request).is_some()));
    assert!(disk.0.unanswered().is_empty());
    assert!(statuses.iter().all(|count| *count > 500), "{statuses:?}");
}
