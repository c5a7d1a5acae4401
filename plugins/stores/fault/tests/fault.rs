//! Each effect and each condition, counted operation by operation.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use tenon_sdk::store::{Operation, StoreError, StoreInfo};
use tenon_store_fault::Fault;
use tenon_testkit::{MemoryStore, On, StoreBench, StoreChecks, store_conformance};

const MIB: u64 = 1 << 20;

fn bench(rules: &str) -> StoreBench<Fault> {
    over(rules, MemoryStore::new(4 * MIB))
}

fn over(rules: &str, lower: MemoryStore) -> StoreBench<Fault> {
    StoreBench::new(&[("rules", rules), ("seed", "7")], vec![lower]).unwrap()
}

/// Which of the first `count` reads of block 0 fail.
fn failing_reads(bench: &mut StoreBench<Fault>, count: usize) -> Vec<usize> {
    (1..=count).filter(|_| bench.read(0, 512).is_err()).collect()
}

fn refusal(rules: &str) -> String {
    match StoreBench::<Fault>::new(&[("rules", rules)], vec![MemoryStore::new(MIB)]) {
        Ok(_) => panic!("`{rules}` was accepted"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn without_rules_it_is_the_lower_store() {
    for block_size in [512, 4096] {
        let info = StoreInfo {
            block_size,
            optimal_size: 65536,
            discard: true,
            write_zeroes: true,
            ..StoreInfo::new(4 * MIB)
        };
        store_conformance::<Fault>(&[], vec![MemoryStore::with(info)], StoreChecks::default());
    }
}

#[test]
fn a_volatile_cache_keeps_the_contract_of_a_store() {
    store_conformance::<Fault>(
        &[("rules", "write:every=3:drop;any:delay=1us")],
        vec![MemoryStore::new(4 * MIB)],
        StoreChecks::default(),
    );
}

#[test]
fn conditions_choose_the_operations_that_they_name() {
    let failing = |rule: &str| failing_reads(&mut bench(rule), 10);
    assert_eq!(failing("read:error=io"), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
    assert_eq!(failing("read:nth=3:error=io"), [3]);
    assert_eq!(failing("any:every=4:error=io"), [4, 8]);
    assert_eq!(failing("read:after=7:error=io"), [8, 9, 10]);
    assert_eq!(failing("read:times=2:error=io"), [1, 2]);
    assert_eq!(failing("read:after=2:every=2:times=2:error=io"), [4, 6]);
    assert_eq!(failing("write+flush:error=io"), [] as [usize; 0]);
    assert_eq!(failing("read:at=512+512:error=io"), [] as [usize; 0]);
    assert_eq!(failing(" read : range=511-1K : error=io ; "), failing("read:error=io"));
    assert_eq!(failing("read:nth=2:error=io;read:nth=5:error=io"), [2, 5]);
}

#[test]
fn ranges_count_only_what_touches_them() {
    let mut bench = bench("read+write:at=1M+4K:nth=3:error=io");
    for (position, length) in [(0, MIB), (MIB + 4096, 512), (MIB, 512), (2 * MIB, 512), (MIB - 512, 1024)] {
        bench.read(position, length).unwrap();
    }
    assert_eq!(bench.write(MIB + 3584, &[0; 1024]), Err(StoreError::Io));
    bench.read(MIB, 512).unwrap();
}

#[test]
fn chances_are_the_same_in_every_run_and_about_as_many_as_asked_for() {
    let run = |seed: &str, rules: &str| {
        let settings = [("rules", rules), ("seed", seed)];
        let mut bench = StoreBench::<Fault>::new(&settings, vec![MemoryStore::new(MIB)]).unwrap();
        failing_reads(&mut bench, 2000)
    };
    let first = run("1", "read:chance=10%:error=io");
    assert!((140..260).contains(&first.len()), "{}", first.len());
    assert_eq!(first, run("1", "read:chance=10/100:error=io"));
    assert_ne!(first, run("2", "read:chance=10%:error=io"));
    // Another rule behind it changes nothing.
    assert_eq!(first, run("1", "read:chance=10%:error=io;read:chance=50%:delay=1us"));
    assert_eq!(run("1", "read:chance=0%:error=io").len(), 0);
    assert_eq!(run("1", "read:chance=7/7:error=io").len(), 2000);
}

#[test]
fn errors_are_the_ones_asked_for_and_reach_nothing_below() {
    let errors = [
        ("io", StoreError::Io),
        ("no-space", StoreError::NoSpace),
        ("read-only", StoreError::ReadOnly),
        ("unsupported", StoreError::Unsupported),
        ("out-of-range", StoreError::OutOfRange),
    ];
    for (name, error) in errors {
        let mut bench = bench(&format!("any:error={name}"));
        assert_eq!(bench.read(0, 512), Err(error));
        assert_eq!(bench.write(0, &[1; 512]), Err(error));
        assert_eq!(bench.flush(), Err(error));
        assert_eq!(bench.discard(0, 512), Err(error));
        assert_eq!(bench.write_zeroes(0, 512, false), Err(error));
        let counts = bench.lower(0).counts();
        assert_eq!(
            (counts.reads, counts.writes, counts.flushes, counts.discards, counts.zeroes),
            (0, 0, 0, 0, 0)
        );
    }
}

#[test]
fn delays_add_up_for_an_operation_and_overlap_in_a_batch() {
    let mut bench = bench("write:at=0+512:delay=50ms;write:delay=2us;read:delay=25s");
    bench.write(0, &[0; 512]).unwrap();
    assert_eq!(bench.now(), 50_002_000);
    let write = |position| Operation::Write { position, data: vec![0; 512] };
    bench.submit(vec![write(0), write(512), write(1024)]);
    assert_eq!(bench.now(), 2 * 50_002_000);
    // The host waits 10 s at once at most.
    bench.read(0, 512).unwrap();
    assert_eq!(bench.now(), 2 * 50_002_000 + 25_000_000_000);
}

#[test]
fn as_many_bits_flip_as_asked_for_and_only_where() {
    let flipped = |data: &[u8]| data.iter().map(|byte| byte.count_ones()).sum::<u32>();
    let mut bench = bench("read:flip=1");
    for _ in 0..100 {
        assert_eq!(flipped(&bench.read(0, 4096).unwrap()), 1);
    }
    assert_eq!(bench.lower(0).content(0, 4096), [0; 4096]);

    let mut bench = over("read:range=1K-1536:flip=9", MemoryStore::new(MIB));
    let mut hit = vec![0; 4096];
    for _ in 0..200 {
        hit.iter_mut().zip(bench.read(0, 4096).unwrap()).for_each(|(all, byte)| *all |= byte);
    }
    assert_eq!((flipped(&hit[..1024]), flipped(&hit[1536..])), (0, 0));
    assert!(flipped(&hit[1024..1536]) > 1000);
    assert_eq!(flipped(&bench.read(1536, 4096).unwrap()), 0);

    let mut bench = over("write:nth=2:flip=1", MemoryStore::new(MIB));
    bench.write(0, &[0xff; 512]).unwrap();
    bench.write(512, &[0xff; 512]).unwrap();
    assert_eq!(bench.read(0, 512).unwrap(), [0xff; 512]);
    assert_eq!(flipped(&bench.read(512, 512).unwrap()), 4095);
}

#[test]
fn dropped_writes_are_read_and_lost_with_the_power_but_for_a_flush() {
    let mut bench = bench("write:drop;read:nth=4:cut");
    bench.write(0, &[1; 1024]).unwrap();
    bench.flush().unwrap();
    assert_eq!(bench.lower(0).durable(0, 1024), [1; 1024]);
    bench.write(512, &[2; 1024]).unwrap();
    let now = [[1; 512], [2; 512], [2; 512], [0; 512]].concat();
    assert_eq!(bench.read(0, 2048).unwrap(), now);
    assert_eq!(bench.lower(0).content(512, 1024), [[1; 512], [0; 512]].concat());
    // A new instance has what the old one held.
    bench.restart().unwrap();
    assert_eq!(bench.read(0, 2048).unwrap(), now);
    // What is zeroed or discarded is held no more.
    bench.write_zeroes(512, 512, false).unwrap();
    assert_eq!(bench.read(512, 512).unwrap(), [0; 512]);
    assert_eq!(bench.read(0, 512), Err(StoreError::Io));
    for _ in 0..2 {
        assert_eq!(bench.read(0, 512), Err(StoreError::Io));
        assert_eq!(bench.write(0, &[3; 512]), Err(StoreError::Io));
        assert_eq!(bench.flush(), Err(StoreError::Io));
    }
    assert_eq!(bench.lower(0).content(0, 1536), [[1; 512], [0; 512], [0; 512]].concat());
    bench.reopen().unwrap();
    assert_eq!(bench.read(0, 512).unwrap(), [1; 512]);
}

#[test]
fn a_power_cut_may_leave_some_of_what_was_held() {
    let mut bench = bench("write:drop;flush:cut=some");
    for block in 0..200 {
        bench.write(block * 512, &[9; 512]).unwrap();
    }
    assert_eq!(bench.flush(), Err(StoreError::Io));
    let below = bench.lower(0).content(0, 200 * 512);
    let kept = below.chunks(512).filter(|block| **block == [9; 512]).count();
    let gone = below.chunks(512).filter(|block| **block == [0; 512]).count();
    assert_eq!(kept + gone, 200);
    assert!((60..140).contains(&kept), "{kept}");
}

#[test]
fn closing_in_good_order_keeps_what_is_held() {
    let mut bench = bench("write:drop");
    bench.write(0, &[1; 512]).unwrap();
    bench.reopen().unwrap();
    assert_eq!(bench.lower(0).durable(0, 512), [1; 512]);
}

#[test]
fn more_than_the_cache_holds_goes_down_without_a_flush() {
    let mut bench = over("write:drop", MemoryStore::new(70 * MIB));
    for n in 0..65 {
        bench.write(n * MIB, &vec![1; 1 << 20]).unwrap();
        assert_eq!(bench.lower(0).content(0, 1)[0], u8::from(n == 64));
    }
    assert_eq!(bench.lower(0).counts().flushes, 0);
    assert_eq!(bench.read(64 * MIB, 512).unwrap(), [1; 512]);
}

#[test]
fn a_failed_flush_stays_failed_until_what_was_lost_is_written_again() {
    let mut bench = bench("write:times=1:drop;flush:nth=1:error=io");
    bench.write(512, &[1; 1024]).unwrap();
    assert_eq!(bench.flush(), Err(StoreError::Io));
    assert_eq!(bench.flush(), Err(StoreError::Io));
    bench.write(512, &[2; 512]).unwrap();
    assert_eq!(bench.flush(), Err(StoreError::Io));
    bench.restart().unwrap();
    assert_eq!(bench.flush(), Err(StoreError::Io));
    bench.write(1024, &[3; 512]).unwrap();
    bench.flush().unwrap();
    assert_eq!(bench.lower(0).durable(512, 1024), [[2; 512], [3; 512]].concat());
}

#[test]
fn what_is_held_and_cannot_be_written_fails_the_flush() {
    let mut bench = bench("write:times=2:drop");
    bench.write(0, &[1; 512]).unwrap();
    bench.write(4096, &[1; 512]).unwrap();
    bench.lower(0).fail_next(On::Write, StoreError::NoSpace);
    assert_eq!(bench.flush(), Err(StoreError::NoSpace));
    assert_eq!(bench.flush(), Err(StoreError::Io));
    bench.write(0, &[1; 512]).unwrap();
    bench.flush().unwrap();
    assert_eq!(bench.lower(0).durable(4096, 512), [1; 512]);
}

#[test]
fn lost_operations_are_reported_as_done() {
    let mut bench = bench("write:nth=2:lose;flush:times=1:lose;zero:lose");
    bench.write(0, &[1; 512]).unwrap();
    bench.write(0, &[2; 512]).unwrap();
    bench.write_zeroes(0, 512, false).unwrap();
    bench.flush().unwrap();
    assert_eq!(bench.read(0, 512).unwrap(), [1; 512]);
    assert_eq!(bench.lower(0).durable(0, 512), [0; 512]);
    bench.flush().unwrap();
    assert_eq!(bench.lower(0).durable(0, 512), [1; 512]);
}

#[test]
fn torn_writes_end_at_a_block() {
    let mut bench = bench("write:nth=1:torn=1500;write:nth=2:torn=512:error=io;write:nth=3:torn=511");
    bench.write(0, &[1; 2048]).unwrap();
    assert_eq!(bench.write(4096, &[2; 1024]), Err(StoreError::Io));
    bench.write(8192, &[3; 512]).unwrap();
    assert_eq!(bench.read(0, 2048).unwrap(), [[1; 1024], [0; 1024]].concat());
    assert_eq!(bench.read(4096, 1024).unwrap(), [[2; 512], [0; 512]].concat());
    assert_eq!(bench.read(8192, 512).unwrap(), [0; 512]);
}

#[test]
fn only_the_struck_operations_of_a_batch_fail() {
    let mut bench = bench("write:every=3:error=io");
    let operations =
        (0..9_u8).map(|n| Operation::Write { position: u64::from(n) * 512, data: vec![n + 1; 512] });
    let outcomes = bench.submit(operations.collect());
    let failed: Vec<usize> = (0..9).filter(|n| outcomes[*n].is_err()).collect();
    assert_eq!(failed, [2, 5, 8]);
    assert_eq!(bench.lower(0).counts().writes, 6);
    assert_eq!(bench.read(3 * 512, 512).unwrap(), [4; 512]);
    assert_eq!(bench.read(2 * 512, 512).unwrap(), [0; 512]);
}

#[test]
fn counts_go_on_after_a_restart_and_are_in_the_log() {
    let settings = [("rules", "read:every=3:error=io;write:drop"), ("report", "2")];
    let mut bench = StoreBench::<Fault>::new(&settings, vec![MemoryStore::new(MIB)]).unwrap();
    let mut failing = Vec::new();
    for n in 1..=10 {
        bench.restart().unwrap();
        if bench.read(0, 512).is_err() {
            failing.push(n);
        }
    }
    assert_eq!(failing, [3, 6, 9]);
    let said: Vec<String> = bench.take_log().into_iter().map(|(_, text)| text).collect();
    assert_eq!(
        said,
        [
            "rule `read:every=3:error=io` has fired 2 times in 6 operations",
            "rule `write:drop` has fired 0 times in 0 operations"
        ]
    );
    bench.reopen().unwrap();
    let said: Vec<String> = bench.take_log().into_iter().map(|(_, text)| text).collect();
    assert_eq!(said[0], "rule `read:every=3:error=io` fired 3 times in 10 operations");
}

#[test]
fn a_damaged_state_is_refused() {
    let mut bench = bench("write:drop;flush:nth=1:error=io");
    bench.write(0, &[1; 512]).unwrap();
    assert!(bench.flush().is_err());
    bench.write(8192, &[1; 1024]).unwrap();
    let whole = bench.save().unwrap();
    for length in 0..whole.data.len() {
        let mut short = whole.clone();
        short.data.truncate(length);
        assert!(bench.restart_with(&short).is_err(), "{length} of {} bytes were taken", whole.data.len());
    }
    let mut other = whole.clone();
    other.data[0] ^= 1;
    assert!(bench.restart_with(&other).is_err());
    bench.restart_with(&whole).unwrap();
    assert_eq!(bench.save().unwrap(), whole);
}

#[test]
fn rules_that_make_no_sense_are_refused_with_what_would() {
    for (rules, says) in [
        ("reed:error=io", "`reed` is no kind of operation; there are read"),
        ("read", "no effect"),
        ("read:nth=2", "no effect"),
        ("read:error=ouch", "one of io, no-space"),
        ("read:nth=0:error=io", "1 to"),
        ("read:every=x:error=io", "1 to"),
        ("read:at=5:error=io", "FIRST+LENGTH"),
        ("read:at=1M+0:error=io", "not empty"),
        ("read:at=5+18446744073709551615:error=io", "fewer bytes"),
        ("read:range=5-5:error=io", "not empty"),
        ("read:range=x-5:error=io", "`range` is `x`"),
        ("read:delay=5", "50ms"),
        ("read:delay=0s", "50ms"),
        ("read:delay=99999999999999999s", "50ms"),
        ("read:chance=2:error=io", "1/1000"),
        ("read:chance=101%:error=io", "1/1000"),
        ("read:chance=1/0:error=io", "1/1000"),
        ("read:flip=0", "1 to"),
        ("read:drop", "fit its kinds"),
        ("any:lose", "fit its kinds"),
        ("flush:flip=1", "fit its kinds"),
        ("write:drop:lose", "only one of"),
        ("write:drop=5", "`drop` with `5`"),
        ("write:cut=all", "`cut` with `all`"),
        ("write:error=io;read:wobble", "rule 2 (`read:wobble`)"),
    ] {
        let text = refusal(rules);
        assert!(text.contains(says), "`{rules}`: {text}");
        assert!(text.contains("`rules`, rule "), "{text}");
    }
}

#[test]
fn random_rules_are_taken_or_refused_and_hold_no_surprises() {
    let words: Vec<&str> = "read write any flush read+write at=0+4K at=1K+ range=0-512 range=9-3 nth=1 every=2 nth= after=1 times=1 \
        chance=50% chance=2/1 error=io error= flip=3 flip=0 torn=600 torn=18446744073709551615 drop lose cut cut=some cut=1 delay=1us + = ;"
        .split(' ')
        .collect();
    let mut state = 0xfa17_u64;
    let mut next = |limit: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(state >> 33).unwrap() % limit
    };
    let mut taken = 0;
    for _ in 0..20_000 {
        let rules: Vec<&str> =
            (0..2 + next(4)).map(|at| words[next(if at == 0 { 5 } else { words.len() })]).collect();
        let rules = rules.join(":").replace(":;:", ";");
        let Ok(mut bench) = StoreBench::<Fault>::new(&[("rules", &rules)], vec![MemoryStore::new(MIB)])
        else {
            continue;
        };
        taken += 1;
        let _ = bench.write(next(64) as u64 * 512, &[1; 2048]);
        let _ = bench.read(next(64) as u64 * 512, 2048);
        let _ = bench.flush();
    }
    assert!(taken > 500, "{taken} were taken");
}
