//! A disk in memory.
#![allow(clippy::unwrap_used, reason = "a test")]

#[path = "../../file/tests/support/mod.rs"]
mod support;

use std::fs;

use support::{Bench, everything, torture};
use tenon_sdk::store::StoreError;
use tenon_store_memory::PLUGIN;
use tenon_testkit::{NativeStoreBench, StoreChecks, suite};

const MIB: u64 = 1 << 20;

fn open(size: &str) -> Bench {
    Bench::open(&PLUGIN, &[("size", size)]).unwrap()
}

/// This process's memory in use, in bytes.
fn resident() -> u64 {
    let text = fs::read_to_string("/proc/self/smaps_rollup").unwrap();
    let line = text.lines().find(|line| line.starts_with("Anonymous:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

#[test]
fn what_was_written_is_read_back() {
    let mut bench = open("5000704");
    torture(&mut bench, &mut vec![0; 5_000_704], 31, 200, true);
    assert_eq!(bench.read(5_000_704, 512), Err(StoreError::OutOfRange));
    assert_eq!(bench.read(u64::MAX - 511, 512), Err(StoreError::OutOfRange));
    bench.close().unwrap();
}

/// The bounds leave room for what other tests take meanwhile.
#[test]
fn memory_is_taken_for_what_was_written_and_given_back_on_discard() {
    let before = resident();
    let mut bench = open("1024 GiB");
    assert!(resident() < before + 64 * MIB);
    for n in 0..256 {
        bench.write((n << 32) + 512, &[1; 1 << 20]).unwrap();
    }
    let full = resident();
    assert!(full > before + 192 * MIB, "{before} became {full}");
    bench.discard(0, 1 << 40).unwrap();
    assert!(resident() + 128 * MIB < full, "{full} became {}", resident());
    assert_eq!(bench.read(512, 512).unwrap(), [0; 512]);
    // Saving looks at what was written only.
    bench.write((1 << 40) - 512, &[1; 512]).unwrap();
    assert!(bench.save().unwrap().1.len() < 10_000);
}

#[test]
fn a_saved_disk_is_restored_and_a_damaged_state_refused() {
    let mut bench = open("1 MiB");
    bench.resize(2 * MIB + 512).unwrap();
    let mut model = vec![0; (2 << 20) + 512];
    torture(&mut bench, &mut model, 8, 10, true);
    bench.write(2 * MIB, &[7; 512]).unwrap();
    let saved_content = everything(&mut bench);
    let (schema, state) = bench.save().unwrap();
    let mut other = open("1 MiB");
    other.write(0, &[9; 4096]).unwrap();
    other.restore(schema, &state).unwrap();
    assert_eq!(other.info.size, MIB);
    other.resize(2 * MIB + 512).unwrap();
    assert!(everything(&mut other) == saved_content);

    for cut in [0, 7, 8, 20, state.len() - 1] {
        assert!(open("1 MiB").restore(schema, &state[..cut]).is_err());
    }
    let mut outside = 4096_u64.to_le_bytes().to_vec();
    outside.extend(1_u64.to_le_bytes());
    outside.extend(0_u32.to_le_bytes());
    let error = open("4096").restore(schema, &outside).unwrap_err().to_string();
    assert!(error.contains("outside"), "{error}");
}

#[test]
fn a_disk_that_shrank_and_grew_again_holds_nothing_old() {
    let mut bench = open("1 MiB");
    bench.write(0, &[5; 1 << 20]).unwrap();
    bench.resize(4096 + 512).unwrap();
    bench.resize(MIB).unwrap();
    assert_eq!(bench.read(4096, 1024).unwrap(), [[5; 512], [0; 512]].concat());
    assert!(bench.resize(0).is_err() && bench.resize(513).is_err());
}

#[test]
fn a_size_that_cannot_be_is_refused() {
    for size in ["0", "1000", "8388608 GiB", "17179869183 GiB"] {
        assert!(Bench::open(&PLUGIN, &[("size", size)]).is_err(), "{size}");
    }
}

#[test]
fn it_does_what_every_user_of_a_store_relies_on() {
    let mut bench = NativeStoreBench::open(&PLUGIN, &[("size", "8 MiB")], vec![]).unwrap();
    suite::store(&mut bench, StoreChecks { reopen: false, ..Default::default() }).unwrap();
}
