//! The store on the bench, and its header in the hands of others.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::cell::{Cell, RefCell};

use tenon_sdk::store::{
    Config, ConnectionError, Error, Level, Operation, Store, StoreError, StoreInfo, hosted, submit,
};
use tenon_store_crypt::Crypt;
use tenon_store_crypt::header::{COPIES, DATA, Header, Key, SIZE, parse_key};
use tenon_store_crypt::xts::Xts;
use tenon_testkit::{MemoryStore, On, StoreBench, StoreChecks, store_conformance};

const MIB: u64 = 1 << 20;

fn key(n: u8) -> String {
    format!("{n:02x}").repeat(64)
}

fn blank() -> MemoryStore {
    MemoryStore::new(3 * MIB)
}

fn open(settings: &[(&str, &str)], lower: MemoryStore) -> Result<StoreBench<Crypt>, Error> {
    StoreBench::new(settings, vec![lower])
}

/// A lower store that was initialised under `key(1)`, with some data.
fn initialised() -> MemoryStore {
    let mut bench = open(&[("key", &key(1)), ("format", "yes")], blank()).unwrap();
    bench.write(1024, &[0x5a; 512]).unwrap();
    bench.flush().unwrap();
    bench.lower(0).clone()
}

/// What opening says.
fn refusal(settings: &[(&str, &str)], lower: MemoryStore) -> String {
    match open(settings, lower) {
        Ok(_) => panic!("{settings:?} opened the store"),
        Err(error) => {
            let text = error.to_string().trim_start_matches("invalid: ").to_owned();
            assert!(settings.iter().all(|(_, value)| value.len() < 10 || !text.contains(value)), "{text}");
            text
        }
    }
}

#[test]
fn it_is_a_store_over_any_block_size() {
    for block_size in [512, 4096, 65536] {
        let info =
            StoreInfo { block_size, optimal_size: block_size, discard: true, ..StoreInfo::new(9 * MIB) };
        let settings = [("key", &key(1)[..]), ("format", "yes"), ("discard", "yes")];
        store_conformance::<Crypt>(&settings, vec![MemoryStore::with(info)], StoreChecks::default());
    }
}

#[test]
fn what_is_below_is_the_data_in_units_numbered_from_its_beginning() {
    let lower = initialised();
    let sealed = match tenon_store_crypt::header::Copy::look(&lower.durable(0, SIZE)) {
        tenon_store_crypt::header::Copy::Whole(sealed) => sealed,
        _ => panic!("there is no header"),
    };
    let header = sealed.open(&parse_key("key", &key(1)).unwrap()).unwrap().unwrap();
    assert_eq!((header.unit, header.data), (512, DATA));
    let mut bytes = lower.durable(DATA + 1024, 512);
    assert_ne!(bytes, [0x5a; 512]);
    Xts::new(&header.volume).decrypt(512, 2, &mut bytes);
    assert_eq!(bytes, [0x5a; 512]);
    assert_eq!(lower.durable(0, SIZE), lower.durable(COPIES[1], SIZE));
}

#[test]
fn two_stores_under_one_key_have_nothing_in_common() {
    let settings = [("key", &key(1)[..]), ("format", "yes")];
    let mut bench = open(&settings, blank()).unwrap();
    bench.write(0, &[0; 4096]).unwrap();
    let below = bench.lower(0).content(DATA, 4096);
    let mut units: Vec<&[u8]> = below.chunks(16).collect();
    units.sort_unstable();
    units.dedup();
    assert_eq!(units.len(), 256, "two blocks of zeroes look alike");
}

#[test]
fn only_a_blank_store_is_initialised_and_only_on_demand() {
    let text = refusal(&[("key", &key(1))], blank());
    assert!(text.contains("format=yes"), "{text}");

    let mut full = blank();
    full.fill(700_160, &[1]);
    let text = refusal(&[("key", &key(1)), ("format", "yes")], full.clone());
    assert!(text.contains("not blank: byte 700160"), "{text}");
    assert_eq!(full.counts().writes, 0);

    let text = refusal(&[("key", &key(1)), ("format", "yes")], MemoryStore::new(MIB));
    assert!(text.contains("needs more than 1048576"), "{text}");
    let read_only = StoreInfo { read_only: true, ..StoreInfo::new(3 * MIB) };
    let text = refusal(&[("key", &key(1)), ("format", "yes")], MemoryStore::with(read_only));
    assert!(text.contains("read-only"), "{text}");

    // An encrypted one stays as it is.
    let mut bench = open(&[("key", &key(1)), ("format", "yes")], initialised()).unwrap();
    assert_eq!(bench.read(1024, 512).unwrap(), [0x5a; 512]);
}

#[test]
fn a_wrong_key_is_refused_and_repeated_nowhere() {
    let text = refusal(&[("key", &key(2))], initialised());
    assert_eq!(text, "`key` is not the key of this store");
    let text = refusal(&[("key", &key(2)), ("new-key", &key(3))], initialised());
    assert_eq!(text, "neither `key` nor `new-key` is the key of this store");
    let text = refusal(&[], initialised());
    assert!(text.contains("`key` is missing"), "{text}");
    let bad = [
        key(1)[..126].to_owned(),
        format!("{}zz", &key(1)[..126]),
        format!("+{}", &key(1)[1..]),
        "é".repeat(64),
    ];
    for bad in bad {
        assert!(refusal(&[("key", &bad)], initialised()).contains("128 hexadecimal digits"));
    }
    // Either half is needed.
    for half in [0, 64] {
        let mut other = key(1);
        other.replace_range(half..half + 2, "ff");
        assert!(refusal(&[("key", &other)], initialised()).contains("not the key"));
    }
    let mut bench = open(&[("key", &key(1)), ("format", "yes")], blank()).unwrap();
    let log: String = bench.take_log().into_iter().map(|(_, text)| text).collect();
    assert!(!log.contains("0101"), "{log}");
}

#[test]
fn a_changed_key_opens_the_same_data_and_the_old_one_no_more() {
    let mut bench = open(&[("key", &key(1)), ("new-key", &key(2))], initialised()).unwrap();
    assert_eq!(bench.read(1024, 512).unwrap(), [0x5a; 512]);
    // A host that restarts the store gives the same settings.
    bench.restart().unwrap();
    assert_eq!(bench.read(1024, 512).unwrap(), [0x5a; 512]);
    let lower = bench.lower(0).clone();
    assert_eq!(refusal(&[("key", &key(1))], lower.clone()), "`key` is not the key of this store");
    let mut bench = open(&[("key", &key(2))], lower).unwrap();
    assert_eq!(bench.read(1024, 512).unwrap(), [0x5a; 512]);
}

#[test]
fn a_change_of_the_key_that_is_cut_off_leaves_the_old_or_the_new_one() {
    for (cut, on) in (0..2).flat_map(|cut| [(cut, On::Write), (cut, On::Flush)]) {
        for seed in 0..8 {
            let mut lower = initialised();
            lower.fail_after(on, cut, u64::MAX, StoreError::Io);
            // The bench does not give a lower store back when opening fails.
            let host = Host::new(lower);
            let config = Config::new([("key", key(1)), ("new-key", key(2))]);
            assert!(hosted::enter(&host, || Crypt::open(&config, hosted::lower(1))).is_err());
            let mut lower = host.lower.into_inner();
            assert_eq!(lower.counts().faults, 1, "the fault has fired");
            lower.clear_faults();
            lower.lose_power(seed);
            let opened = [1, 2].into_iter().filter_map(|n| open(&[("key", &key(n))], lower.clone()).ok());
            let contents: Vec<Vec<u8>> = opened.map(|mut bench| bench.read(1024, 512).unwrap()).collect();
            assert_eq!(contents, [[0x5a; 512]], "one key opens the store");
        }
    }
}

#[test]
fn one_copy_of_the_header_is_enough_and_is_copied_again() {
    for place in COPIES {
        for byte in [0, 8, 13, 24, 50, 121, 300, 511] {
            let mut lower = initialised();
            let mut block = lower.durable(place, SIZE);
            block[byte] ^= 0x10;
            lower.fill(place, &block);
            let mut bench = open(&[("key", &key(1))], lower).unwrap();
            assert_eq!(bench.read(1024, 512).unwrap(), [0x5a; 512]);
            assert!(bench.take_log().iter().any(|(level, _)| *level == Level::Warn));
            assert_eq!(bench.lower(0).content(0, SIZE), bench.lower(0).content(COPIES[1], SIZE));
        }
    }
}

#[test]
fn without_any_whole_header_it_says_what_is_wrong() {
    let both = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut lower = initialised();
        for place in COPIES {
            let mut block = lower.durable(place, SIZE);
            change(&mut block);
            lower.fill(place, &block);
        }
        refusal(&[("key", &key(1)), ("format", "yes")], lower)
    };
    assert!(both(&|block| block[200] = 1).contains("damaged"));
    assert!(both(&|block| block[0] = 0).contains("not blank"));
    let newer = both(&|block| {
        block[8] = 9;
        let crc = crc32fast::hash(&block[..508]);
        block[508..].copy_from_slice(&crc.to_le_bytes());
    });
    assert!(newer.contains("version 9") && newer.contains("version 1"), "{newer}");
    // Who changes what is sealed without the key gets no further than who has a wrong one.
    let forged = both(&|block| {
        block[13] = 0x20;
        let crc = crc32fast::hash(&block[..508]);
        block[508..].copy_from_slice(&crc.to_le_bytes());
    });
    assert_eq!(forged, "`key` is not the key of this store");
}

#[test]
fn a_sealed_header_that_cannot_be_is_refused() {
    let owner = parse_key("key", &key(1)).unwrap();
    for (unit, data) in [
        (0, DATA),
        (256, DATA),
        (768, DATA),
        (131_072, DATA),
        (512, 0),
        (512, 65536),
        (4096, DATA + 512),
        (512, u64::MAX - 511),
        (512, 4 * MIB),
        (65536, DATA + 32768),
    ] {
        let header = Header { unit, data, sequence: 9, identity: [1; 16], volume: Key::new([3; 64]) };
        let mut lower = initialised();
        for place in COPIES {
            lower.fill(place, header.seal(&owner).unwrap().bytes());
        }
        let text = refusal(&[("key", &key(1))], lower);
        assert!(text.contains("cannot be") || text.contains("the data begins at"), "{text}");
    }
}

#[test]
fn random_damage_to_the_header_never_opens_another_store() {
    let mut state = 0x5eed_u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 33
    };
    let whole = initialised();
    let (mut opened, mut refused) = (0, 0);
    for _ in 0..4000 {
        let mut lower = whole.clone();
        for place in COPIES {
            let mut block = lower.durable(place, SIZE);
            for _ in 0..next() % 4 {
                let at = usize::try_from(next() % 512).unwrap();
                block[at] = u8::try_from(next() & 0xff).unwrap();
            }
            // Half of them have a checksum that is right.
            if next() % 2 == 0 {
                let crc = crc32fast::hash(&block[..508]);
                block[508..].copy_from_slice(&crc.to_le_bytes());
            }
            lower.fill(place, &block);
        }
        match open(&[("key", &key(1))], lower) {
            Ok(mut bench) => {
                opened += 1;
                assert_eq!(bench.read(1024, 512).unwrap(), [0x5a; 512]);
            }
            Err(_) => refused += 1,
        }
    }
    assert!(opened > 100 && refused > 100, "{opened} opened, {refused} refused");
}

#[test]
fn discards_stay_above_unless_they_are_wanted() {
    let mut bench = open(&[("key", &key(1))], initialised()).unwrap();
    assert!(!bench.info().discard);
    assert_eq!(bench.discard(0, 512), Err(StoreError::Unsupported));
    bench.write_zeroes(0, MIB, true).unwrap();
    assert_eq!(bench.read(0, MIB).unwrap(), vec![0; 1 << 20]);
    assert_eq!((bench.lower(0).counts().discards, bench.lower(0).counts().zeroes), (0, 0));
    assert_ne!(bench.lower(0).content(DATA, 512), [0; 512]);

    let mut bench = open(&[("key", &key(1)), ("discard", "yes")], initialised()).unwrap();
    assert!(bench.info().discard);
    bench.discard(1024, 512).unwrap();
    assert_eq!(bench.lower(0).counts().discards, 1);
    assert_ne!(bench.read(1024, 512).unwrap(), [0x5a; 512]);
    let cannot = StoreInfo { discard: false, ..blank().info().clone() };
    let bench = open(&[("key", &key(1)), ("format", "yes"), ("discard", "yes")], MemoryStore::with(cannot));
    assert!(!bench.unwrap().info().discard);
}

#[test]
fn it_grows_and_shrinks_with_the_lower_store() {
    let mut bench = open(&[("key", &key(1))], initialised()).unwrap();
    assert_eq!(bench.info().size, 2 * MIB);
    bench.resize(5 * MIB).unwrap();
    assert_eq!((bench.info().size, bench.lower(0).info().size), (5 * MIB, 6 * MIB));
    assert!(bench.resize(u64::MAX - 511).is_err());
    assert_eq!(bench.read(1024, 512).unwrap(), [0x5a; 512]);
}

#[test]
fn a_batch_stays_one_batch_for_the_lower_store() {
    let host = Host::new(initialised());
    let config = Config::new([("key", key(1))]);
    let (mut store, _) = hosted::enter(&host, || Crypt::open(&config, hosted::lower(1))).unwrap();
    let opening = host.submits.get();
    let operations: Vec<Operation> = (0..64)
        .map(|n| match n % 4 {
            0 => Operation::Read { position: 1024, length: 512 },
            1 => Operation::Write { position: 8192 + n * 4096, data: vec![1; 4096] },
            2 => Operation::WriteZeroes { position: 8192 + n * 4096, length: 4096, unmap: true },
            _ => Operation::Flush,
        })
        .collect();
    let outcomes = hosted::enter(&host, || submit(&mut store, operations));
    assert_eq!(host.submits.get() - opening, 1);
    assert_eq!(outcomes.len(), 64);
    for (n, outcome) in outcomes.into_iter().enumerate() {
        assert_eq!(outcome.unwrap(), if n % 4 == 0 { vec![0x5a; 512] } else { Vec::new() });
    }
}

/// A host that counts the calls to the lower store.
struct Host {
    lower: RefCell<MemoryStore>,
    submits: Cell<u32>,
}

impl Host {
    fn new(lower: MemoryStore) -> Self {
        Self { lower: RefCell::new(lower), submits: Cell::new(0) }
    }
}

impl hosted::Host for Host {
    fn log(&self, _: Level, _: &str) {}
    fn now(&self) -> u64 {
        0
    }
    fn wait(&self, _: u64) {}
    fn random(&self, length: u32) -> Vec<u8> {
        vec![7; length as usize]
    }
    fn lower_info(&self, _: u32) -> StoreInfo {
        self.lower.borrow().info().clone()
    }
    fn lower_submit(&self, _: u32, operations: &[Operation]) -> Vec<Result<Vec<u8>, StoreError>> {
        self.submits.set(self.submits.get() + 1);
        operations.iter().map(|operation| self.lower.borrow_mut().submit(operation)).collect()
    }
    fn lower_resize(&self, _: u32, size: u64) -> Result<(), StoreError> {
        self.lower.borrow_mut().resize(size);
        Ok(())
    }
    fn connect(&self, _: &str, _: u16, _: bool) -> Result<u32, ConnectionError> {
        Err(ConnectionError::NotGranted)
    }
    fn connection_send(&self, _: u32, _: &[u8]) -> Result<(), ConnectionError> {
        Err(ConnectionError::Closed)
    }
    fn connection_receive(&self, _: u32, _: u32) -> Result<Vec<u8>, ConnectionError> {
        Err(ConnectionError::Closed)
    }
    fn connection_close(&self, _: u32) {}
}
