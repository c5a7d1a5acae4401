//! Nothing, as a store.
#![allow(clippy::unwrap_used, reason = "a test")]

#[path = "../../file/tests/support/mod.rs"]
mod support;

use support::Bench;
use tenon_sdk::store::StoreError;
use tenon_store_null::PLUGIN;
use tenon_testkit::{NativeStoreBench, StoreChecks, suite};

#[test]
fn everything_reads_as_zeroes_whatever_was_written() {
    let mut bench = Bench::open(&PLUGIN, &[("size", "1 MiB")]).unwrap();
    bench.write(4096, &[1; 8192]).unwrap();
    bench.write_zeroes(0, 512, true).unwrap();
    bench.discard(0, 512).unwrap();
    bench.flush().unwrap();
    assert_eq!(bench.read(4096, 8192).unwrap(), [0; 8192]);
    assert_eq!(bench.read(1 << 20, 512), Err(StoreError::OutOfRange));
    bench.resize(2 << 20).unwrap();
    assert_eq!(bench.read(1 << 20, 512).unwrap(), [0; 512]);
    assert!(bench.resize(700).is_err());
    bench.close().unwrap();
    assert!(Bench::open(&PLUGIN, &[("size", "1000")]).err().unwrap().to_string().contains("512"));
}

#[test]
fn it_does_what_every_user_of_a_store_relies_on_but_to_keep_anything() {
    let mut bench = NativeStoreBench::open(&PLUGIN, &[("size", "8 MiB")], vec![]).unwrap();
    suite::store(&mut bench, StoreChecks { content: false, reopen: false }).unwrap();
}
