//! Copies on the bench: what they hold, what is left when power goes, and what they make of damage.
//!
//! Long for the number of things that a crash may cut short.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use tenon_sdk::store::{Error, Operation, StoreError, StoreInfo};
use tenon_store_overlay::Overlay;
use tenon_store_overlay::header::{CLUSTER, Header, SIZE};
use tenon_testkit::{MemoryStore, On, StoreBench, StoreChecks, store_conformance};

const MIB: u64 = 1 << 20;
const KIB: u64 = 1 << 10;

/// Numbers that are the same in every run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }

    fn bytes(&mut self, length: u64) -> Vec<u8> {
        let seed = self.below(251);
        (0..length).map(|n| u8::try_from((n * 7 + n / 512 * 13 + seed) % 251).unwrap() + 1).collect()
    }
}

fn at(position: u64) -> usize {
    usize::try_from(position).unwrap()
}

/// A base that has something everywhere, and cannot be written.
fn base(size: u64, block_size: u32) -> MemoryStore {
    let info = StoreInfo { block_size, optimal_size: block_size, read_only: true, ..StoreInfo::new(size) };
    let mut store = MemoryStore::with(info);
    store.fill(0, &pattern(size));
    store
}

fn pattern(size: u64) -> Vec<u8> {
    (0..size).map(|n| u8::try_from(n / 512 % 250).unwrap() + 1).collect()
}

/// A store of no length that can grow.
fn empty(block_size: u32) -> MemoryStore {
    let info = StoreInfo {
        block_size,
        optimal_size: block_size,
        discard: true,
        write_zeroes: true,
        ..StoreInfo::new(0)
    };
    MemoryStore::with(info)
}

fn open(settings: &[(&str, &str)], lower: Vec<MemoryStore>) -> Result<StoreBench<Overlay>, Error> {
    StoreBench::new(settings, lower)
}

fn refusal(settings: &[(&str, &str)], lower: Vec<MemoryStore>) -> String {
    match open(settings, lower) {
        Ok(_) => panic!("{settings:?} opened the store"),
        Err(error) => error.to_string(),
    }
}

fn cloned(size: u64) -> StoreBench<Overlay> {
    open(&[("format", "yes")], vec![base(size, 512), empty(512)]).unwrap()
}

/// The lower stores as they are.
fn lower(bench: &mut StoreBench<Overlay>) -> Vec<MemoryStore> {
    vec![bench.lower(0).clone(), bench.lower(1).clone()]
}

#[test]
fn it_is_a_store_in_memory() {
    let checks = StoreChecks { reopen: false, ..StoreChecks::default() };
    for (size, block_size) in [(9 * MIB, 512), (5 * MIB + 1536, 512), (3 * MIB, 4096), (3 * MIB, 65536)] {
        store_conformance::<Overlay>(&[], vec![base(size, block_size)], checks);
        store_conformance::<Overlay>(&[("size", "16MiB")], vec![base(size, block_size)], checks);
    }
}

#[test]
fn it_is_a_store_over_a_second_one() {
    for (below, above) in [(512, 512), (512, 4096), (4096, 512), (65536, 512), (512, 65536)] {
        let settings = [("format", "yes"), ("size", "9MiB")];
        store_conformance::<Overlay>(
            &settings,
            vec![base(5 * MIB, below), empty(above)],
            StoreChecks::default(),
        );
    }
}

#[test]
fn at_first_it_is_the_base_and_zeroes_behind_that() {
    for top in [Vec::new(), vec![empty(512)]] {
        let lower = [vec![base(MIB + 1536, 512)], top].concat();
        let mut bench = open(&[("format", "yes"), ("size", "2MiB")], lower).unwrap();
        assert_eq!(bench.info().size, 2 * MIB);
        assert_eq!(bench.read(0, MIB).unwrap(), pattern(MIB));
        let mut behind = pattern(MIB + 1536).split_off(at(MIB));
        behind.resize(at(MIB), 0);
        assert_eq!(bench.read(MIB, MIB).unwrap(), behind);
        // A grain of which the base has a part.
        bench.write(MIB + 2048, &[9; 512]).unwrap();
        behind[2048..2560].fill(9);
        assert_eq!(bench.read(MIB, MIB).unwrap(), behind);
        assert_eq!(bench.lower(0).counts().writes, 0);
    }
}

#[test]
fn a_clone_takes_little_and_reads_nothing_of_the_base() {
    let mut bench = open(&[("format", "yes")], vec![base(64 * MIB, 512), empty(512)]).unwrap();
    assert_eq!(bench.lower(0).counts().reads, 0);
    // Two copies of the header and a table of 8 bytes for each 64 KiB.
    assert_eq!(bench.lower(1).info().size, 3 * CLUSTER);
    bench.write(5 * MIB, &[1; 4096]).unwrap();
    assert_eq!(bench.lower(0).counts().reads, 0);
    bench.write(6 * MIB, &[1; 512]).unwrap();
    assert_eq!(bench.lower(0).counts().reads, 1);
}

#[test]
fn changes_in_memory_end_with_the_store_and_those_in_a_store_do_not() {
    let mut bench = open(&[], vec![base(MIB, 512)]).unwrap();
    bench.write(4096, &[9; 1024]).unwrap();
    bench.restart().unwrap();
    assert_eq!(bench.read(4096, 1024).unwrap(), [9; 1024]);
    bench.reopen().unwrap();
    assert_eq!(bench.read(0, MIB).unwrap(), pattern(MIB));

    let mut bench = cloned(MIB);
    bench.write(4096, &[9; 1024]).unwrap();
    bench.reopen().unwrap();
    let mut right = pattern(MIB);
    right[4096..5120].fill(9);
    assert_eq!(bench.read(0, MIB).unwrap(), right);
    // Another copy of the same base knows nothing of it.
    let mut other = open(&[("format", "yes")], vec![bench.lower(0).clone(), empty(512)]).unwrap();
    assert_eq!(other.read(0, MIB).unwrap(), pattern(MIB));
}

#[test]
fn memory_for_changes_has_an_end() {
    let mut bench = open(&[("limit", "64KiB")], vec![base(MIB, 512)]).unwrap();
    for grain in 0..16 {
        bench.write(grain * 64 * KIB, &[9; 512]).unwrap();
    }
    assert_eq!(bench.write(512 * KIB + 4096, &[9; 512]), Err(StoreError::NoSpace));
    // What was changed can be changed again, and nothing else has come to harm.
    bench.write(512 * KIB + 512, &[8; 512]).unwrap();
    assert_eq!(bench.read(512 * KIB + 4096, 512).unwrap(), pattern(MIB)[at(516 * KIB)..at(516 * KIB) + 512]);
    // Zeroes give memory back.
    bench.write_zeroes(0, 64 * KIB, true).unwrap();
    bench.write(512 * KIB + 4096, &[7; 512]).unwrap();
    assert_eq!(bench.read(0, 64 * KIB).unwrap(), vec![0; at(64 * KIB)]);
    assert!(refusal(&[("limit", "1GiB")], vec![base(MIB, 512)]).contains("at most"));
}

#[test]
fn operations_of_one_batch_may_write_parts_of_one_grain() {
    for top in [Vec::new(), vec![empty(512)]] {
        let mut bench = open(&[("format", "yes")], [vec![base(MIB, 512)], top].concat()).unwrap();
        let write = |sector: u64| Operation::Write { position: sector * 512, data: vec![0xee; 512] };
        let mut operations: Vec<Operation> = (0..64).step_by(2).map(write).collect();
        operations.push(Operation::WriteZeroes { position: 4 * KIB + 512, length: 512, unmap: true });
        assert!(bench.submit(operations).iter().all(Result::is_ok));
        let mut right = pattern(MIB);
        for sector in (0..64).step_by(2) {
            right[sector * 512..][..512].fill(0xee);
        }
        right[4608..5120].fill(0);
        assert_eq!(bench.read(0, MIB).unwrap(), right);
        bench.restart().unwrap();
        assert_eq!(bench.read(0, MIB).unwrap(), right);
    }
}

/// A random operation, and what it makes of the content.
fn some_operation(numbers: &mut Numbers, size: u64, right: &mut [u8]) -> Operation {
    let blocks = size / 512;
    let position = numbers.below(blocks);
    let longest = if numbers.below(4) == 0 { 400 } else { 12 };
    let length = (1 + numbers.below(longest)).min(blocks - position) * 512;
    let position = position * 512;
    let range = at(position)..at(position + length);
    match numbers.below(8) {
        0 | 1 => Operation::Read { position, length },
        2 => {
            right[range].fill(0);
            Operation::WriteZeroes { position, length, unmap: true }
        }
        3 => {
            // Whole clusters, so that some come free.
            let position = position / CLUSTER * CLUSTER;
            let length = CLUSTER.min(size - position);
            right[at(position)..at(position + length)].fill(0);
            Operation::WriteZeroes { position, length, unmap: true }
        }
        _ => {
            let data = numbers.bytes(length);
            right[range].copy_from_slice(&data);
            Operation::Write { position, data }
        }
    }
}

#[test]
fn over_thousands_of_operations_it_holds_what_was_written() {
    for (seed, top) in [(1, Vec::new()), (2, vec![empty(512)])] {
        let size = 3 * MIB + 1536;
        let mut bench = open(
            &[("format", "yes"), ("size", &size.to_string())],
            [vec![base(2 * MIB + 512, 512)], top].concat(),
        )
        .unwrap();
        let mut right = pattern(2 * MIB + 512);
        right.resize(at(size), 0);
        let mut numbers = Numbers(seed);
        for round in 0..3000 {
            let before = right.clone();
            match some_operation(&mut numbers, size, &mut right) {
                Operation::Read { position, length } => {
                    let data = bench.read(position, length).unwrap();
                    assert_eq!(data, before[at(position)..at(position + length)], "round {round}");
                }
                operation => assert_eq!(bench.submit(vec![operation]), [Ok(Vec::new())]),
            }
            match numbers.below(60) {
                0 => bench.restart().unwrap(),
                1 if seed == 2 => bench.reopen().unwrap(),
                2..6 => bench.flush().unwrap(),
                _ => {}
            }
        }
        let read: Vec<u8> =
            (0..4).flat_map(|n| bench.read(n * MIB, MIB.min(size - n * MIB)).unwrap()).collect();
        assert!(read == right);
    }
}

#[test]
fn zeroed_clusters_are_used_again_after_flushes() {
    let mut bench = cloned(MIB);
    for round in 0..200_u64 {
        bench.write(0, &vec![1; at(CLUSTER)]).unwrap();
        bench.flush().unwrap();
        bench.write_zeroes(0, CLUSTER, true).unwrap();
        bench.flush().unwrap();
        assert_eq!(bench.read(0, CLUSTER).unwrap(), vec![0; at(CLUSTER)], "round {round}");
    }
    let header = Header::decode(&bench.lower(1).content(0, SIZE)).unwrap().unwrap();
    assert!(header.next <= header.first_data() + 4, "{header:?}");
}

#[test]
fn every_step_of_a_flush_may_be_the_last_before_power_goes() {
    let mut cut_off = 0;
    for seed in 0..120 {
        let mut numbers = Numbers(seed);
        let size = 512 * KIB;
        let mut bench = cloned(size);
        let mut right = pattern(size);
        for _ in 0..20 {
            let operation = some_operation(&mut numbers, size, &mut right);
            assert!(bench.submit(vec![operation])[0].is_ok());
            if numbers.below(4) == 0 {
                bench.flush().unwrap();
            }
        }
        bench.flush().unwrap();
        let durable = right.clone();
        // From here on each block is as it was, or as one of these operations made it.
        let mut may = vec![vec![]; at(size / 512)];
        for _ in 0..8 {
            let operation = some_operation(&mut numbers, size, &mut right);
            assert!(bench.submit(vec![operation])[0].is_ok());
            for (block, may) in right.chunks(512).zip(&mut may) {
                may.push(block.to_vec());
            }
        }
        // The flush gets so far and no further.
        let on = if numbers.below(2) == 0 { On::Write } else { On::Flush };
        let far = numbers.below(3);
        bench.lower(1).fail_after(on, far, u64::MAX, StoreError::Io);
        let flushed = bench.flush();
        cut_off += u32::from(flushed.is_err());
        bench.lower(1).clear_faults();
        bench.lose_power(seed).unwrap();
        let now = bench.read(0, size).unwrap();
        for (number, ((now, old), may)) in now.chunks(512).zip(durable.chunks(512)).zip(&may).enumerate() {
            assert!(
                now == old || may.iter().any(|block| block == now),
                "seed {seed}: block {number} is neither what it was nor what it became"
            );
            if flushed.is_ok() {
                assert!(
                    Some(now) == may.last().map(Vec::as_slice),
                    "seed {seed}: block {number} was flushed"
                );
            }
        }
        // And it goes on.
        let mut right = now;
        for _ in 0..20 {
            let operation = some_operation(&mut numbers, size, &mut right);
            assert!(bench.submit(vec![operation])[0].is_ok());
        }
        bench.reopen().unwrap();
        assert!(bench.read(0, size).unwrap() == right, "seed {seed}");
    }
    assert!(cut_off > 40, "{cut_off} flushes were cut off");
}

#[test]
fn an_older_saved_state_never_gives_two_clusters_one_place() {
    for seed in 0..100 {
        let mut numbers = Numbers(seed);
        let size = 512 * KIB;
        let mut bench = cloned(size);
        let mut right = pattern(size);
        for _ in 0..30 {
            let operation = some_operation(&mut numbers, size, &mut right);
            assert!(bench.submit(vec![operation])[0].is_ok());
            if numbers.below(4) == 0 {
                bench.flush().unwrap();
            }
        }
        // A host saves the store after each batch, or at least after each flush.
        let state = bench.save().unwrap();
        let saved = right.clone();
        // The store falls in the middle of a flush: the host gives the new one the older state.
        let on = if numbers.below(2) == 0 { On::Write } else { On::Flush };
        let far = numbers.below(4);
        bench.lower(1).fail_after(on, far, u64::MAX, StoreError::Io);
        let _ = bench.flush();
        bench.lower(1).clear_faults();
        bench.restart_with(&state).unwrap();
        assert!(bench.read(0, size).unwrap() == saved, "seed {seed}");
        let mut right = saved;
        for _ in 0..30 {
            let operation = some_operation(&mut numbers, size, &mut right);
            assert!(bench.submit(vec![operation])[0].is_ok());
        }
        assert!(bench.read(0, size).unwrap() == right, "seed {seed}");
        bench.reopen().unwrap();
        assert!(bench.read(0, size).unwrap() == right, "seed {seed}, after opening again");
    }
}

#[test]
fn operations_that_no_saved_state_knows_are_kept_or_lost_with_their_instance() {
    for seed in 0..200 {
        let mut numbers = Numbers(seed);
        let size = 512 * KIB;
        let mut bench = cloned(size);
        let mut right = pattern(size);
        for _ in 0..30 {
            let operation = some_operation(&mut numbers, size, &mut right);
            assert!(bench.submit(vec![operation])[0].is_ok());
            if numbers.below(3) == 0 {
                bench.flush().unwrap();
            }
        }
        if seed % 2 == 0 {
            bench.flush().unwrap();
        }
        let (state, saved) = (bench.save().unwrap(), right.clone());
        // What is large is saved at flushes only: the host does not save these.
        let mut may = vec![vec![]; saved.len() / 512];
        for _ in 0..12 {
            let operation = some_operation(&mut numbers, size, &mut right);
            assert!(bench.submit(vec![operation])[0].is_ok());
            for (block, may) in right.chunks(512).zip(&mut may) {
                may.push(block.to_vec());
            }
        }
        bench.lower(1).fail_after(On::Flush, numbers.below(4), u64::MAX, StoreError::Io);
        // The instance falls after a flush that came in one batch with a write.
        let operation = some_operation(&mut numbers, size, &mut right);
        let _ = bench.submit(vec![Operation::Flush, operation]);
        for (block, may) in right.chunks(512).zip(&mut may) {
            may.push(block.to_vec());
        }
        bench.lower(1).clear_faults();
        bench.restart_with(&state).unwrap();
        for _ in 0..12 {
            let now = bench.read(0, size).unwrap();
            for (number, ((now, old), may)) in now.chunks(512).zip(saved.chunks(512)).zip(&may).enumerate() {
                let known = now == old || may.iter().any(|block| block == now);
                assert!(known, "seed {seed}: block {number} is neither what it was nor what it became");
            }
            // What is written now must not come out anywhere else.
            let mut right = now;
            let operation = some_operation(&mut numbers, size, &mut right);
            assert!(bench.submit(vec![operation])[0].is_ok());
            assert!(bench.read(0, size).unwrap() == right, "seed {seed}");
            for (block, may) in right.chunks(512).zip(&mut may) {
                may.push(block.to_vec());
            }
        }
    }
}

#[test]
fn a_cluster_that_a_saved_state_names_is_given_to_nobody_else() {
    let mut bench = cloned(MIB);
    bench.write(0, &vec![0xaa; at(CLUSTER)]).unwrap();
    let state = bench.save().unwrap();
    bench.write_zeroes(0, CLUSTER, true).unwrap();
    let write = Operation::Write { position: 4 * CLUSTER, data: vec![0xbb; at(CLUSTER)] };
    assert!(bench.submit(vec![Operation::Flush, write]).iter().all(Result::is_ok));
    bench.restart_with(&state).unwrap();
    assert!(bench.read(0, CLUSTER).unwrap() == vec![0xaa; at(CLUSTER)]);
}

#[test]
fn failures_below_are_failures_above_and_nothing_else_changes() {
    let mut struck = 0;
    for seed in 0..200 {
        let mut numbers = Numbers(seed);
        let size = 512 * KIB;
        let mut bench = cloned(size);
        let mut right = pattern(size);
        for _ in 0..10 {
            let operation = some_operation(&mut numbers, size, &mut right);
            assert!(bench.submit(vec![operation])[0].is_ok());
        }
        let before = right.clone();
        let operation = some_operation(&mut numbers, size, &mut right);
        let (store, on) = ([0, 1], [On::Read, On::Write, On::WriteZeroes, On::Any]);
        let (store, on) = (store[at(numbers.below(2))], on[at(numbers.below(4))]);
        bench.lower(store).fail_always(on, StoreError::Io);
        let range = match &operation {
            Operation::Read { .. } | Operation::Flush => 0..0,
            Operation::Discard { position, length } | Operation::WriteZeroes { position, length, .. } => {
                at(*position)..at(position + length)
            }
            Operation::Write { position, data } => at(*position)..at(*position) + data.len(),
        };
        let outcome = bench.submit(vec![operation]).remove(0);
        bench.lower(store).clear_faults();
        let now = bench.read(0, size).unwrap();
        if outcome.is_ok() {
            assert!(now == right, "seed {seed}");
            continue;
        }
        struck += 1;
        for (number, now) in now.chunks(512).enumerate() {
            let block = number * 512..number * 512 + 512;
            let (old, new) = (&before[block.clone()], &right[block.clone()]);
            let hit = block.start < range.end && range.start < block.end;
            assert!(now == old || (hit && now == new), "seed {seed}: block {number}");
        }
    }
    assert!(struck > 40, "{struck} operations failed");
}

#[test]
fn a_store_for_changes_whose_end_is_missing_is_refused() {
    let mut bench = cloned(MIB);
    bench.write(0, &[1; 512]).unwrap();
    bench.reopen().unwrap();
    let mut stores = lower(&mut bench);
    stores[1].resize(3 * CLUSTER);
    let text = refusal(&[], stores);
    assert!(text.contains("end is missing"), "{text}");
}

#[test]
fn only_a_blank_store_is_made_one_for_changes_and_only_on_demand() {
    let text = refusal(&[], vec![base(MIB, 512), empty(512)]);
    assert!(text.contains("format=yes"), "{text}");
    let mut full = MemoryStore::new(MIB);
    full.fill(CLUSTER, &[1]);
    let text = refusal(&[("format", "yes")], vec![base(MIB, 512), full]);
    assert!(text.contains("not blank"), "{text}");
    let read_only = MemoryStore::with(StoreInfo { read_only: true, ..StoreInfo::new(MIB) });
    let text = refusal(&[("format", "yes")], vec![base(MIB, 512), read_only]);
    assert!(text.contains("read-only"), "{text}");
    for size in ["1023KiB", "1048577", "5000GiB"] {
        let text = refusal(&[("format", "yes"), ("size", size)], vec![base(MIB, 512), empty(512)]);
        assert!(text.contains("`size` is"), "{text}");
    }
    assert!(refusal(&[], vec![base(MIB, 512), empty(512), empty(512)]).contains("two"));
    assert!(refusal(&[], Vec::new()).contains("two"));
}

#[test]
fn what_is_not_of_this_base_is_refused() {
    let mut bench = cloned(MIB);
    bench.write(0, &[1; 512]).unwrap();
    bench.reopen().unwrap();
    let top = bench.lower(1).clone();
    let text = refusal(&[], vec![base(2 * MIB, 512), top.clone()]);
    assert!(text.contains("a base of 1048576 bytes, and this one has 2097152"), "{text}");
    let text = refusal(&[], vec![base(MIB, 65536), top.clone()]);
    assert!(text.contains("blocks of 512"), "{text}");
    let text = refusal(&[("size", "2MiB")], vec![base(MIB, 512), top.clone()]);
    assert!(text.contains("made with 1048576"), "{text}");
    // Blocks of 4096 do no harm.
    let mut bench = open(&[], vec![base(MIB, 4096), top]).unwrap();
    assert_eq!(bench.read(0, 4096).unwrap()[..1024], [[1; 512], [2; 512]].concat());
}

#[test]
fn damaged_headers_and_tables_are_refused_or_read_as_failures() {
    let mut whole = cloned(2 * MIB);
    let mut numbers = Numbers(77);
    let mut right = pattern(2 * MIB);
    for _ in 0..60 {
        let operation = some_operation(&mut numbers, 2 * MIB, &mut right);
        assert!(whole.submit(vec![operation])[0].is_ok());
    }
    whole.reopen().unwrap();
    let stores = lower(&mut whole);
    let (mut refused, mut failed, mut read) = (0, 0, 0);
    for _ in 0..500 {
        let mut top = stores[1].clone();
        let header = numbers.below(2) == 0;
        for _ in 0..1 + numbers.below(3) {
            let place = if header {
                numbers.below(2) * CLUSTER + numbers.below(48)
            } else {
                2 * CLUSTER + numbers.below(512)
            };
            let byte = [0, 0xff, u8::try_from(numbers.below(256)).unwrap()][at(numbers.below(3))];
            top.fill(place, &[byte]);
        }
        if header {
            for copy in [0, CLUSTER] {
                let mut bytes = top.content(copy, SIZE);
                let crc = crc32fast::hash(&bytes[..508]);
                bytes[508..].copy_from_slice(&crc.to_le_bytes());
                top.fill(copy, &bytes);
            }
        }
        let Ok(mut bench) = open(&[("format", "yes")], vec![stores[0].clone(), top]) else {
            refused += 1;
            continue;
        };
        match bench.read(0, MIB) {
            Ok(_) => read += 1,
            Err(error) => {
                failed += 1;
                assert_eq!(error, StoreError::Io);
                assert!(bench.take_log().iter().any(|(_, text)| text.contains("the table is damaged")));
            }
        }
        let _ = bench.write(MIB, &[1; 512]);
        let _ = bench.write_zeroes(0, MIB, true);
        let _ = bench.flush();
    }
    assert!(refused > 20 && failed > 50 && read > 50, "{refused} refused, {failed} failed, {read} read");
}

#[test]
fn a_damaged_state_is_refused() {
    for top in [Vec::new(), vec![empty(512)]] {
        let mut bench = open(&[("format", "yes")], [vec![base(MIB, 512)], top].concat()).unwrap();
        let mut numbers = Numbers(5);
        let mut right = pattern(MIB);
        for _ in 0..12 {
            let operation = some_operation(&mut numbers, MIB, &mut right);
            assert!(bench.submit(vec![operation])[0].is_ok());
        }
        let whole = bench.save().unwrap();
        for cut in 1..=200.min(whole.data.len()) {
            let mut short = whole.clone();
            short.data.truncate(whole.data.len() - cut);
            assert!(bench.restart_with(&short).is_err(), "{cut} bytes are missing");
        }
        let mut taken = 0;
        for _ in 0..500 {
            let mut other = whole.clone();
            let length = other.data.len().min(400) as u64;
            other.data[at(numbers.below(length))] = u8::try_from(numbers.below(256)).unwrap();
            if bench.restart_with(&other).is_ok() {
                taken += 1;
                let _ = bench.read(0, MIB);
                let _ = bench.write(0, &[1; 512]);
            }
        }
        assert!(taken < 500);
        bench.restart_with(&whole).unwrap();
    }
}
