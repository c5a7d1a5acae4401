//! Stores: ones that work, and ones that do what they must not.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::{Arc, OnceLock};

use tenon_plugins::abi::StoreError;
use tenon_plugins::{Bundle, Data, Grants, OpenError, OperationKind, Plugin, Store, StoreGrants};

use crate::machine::{fixture, guest, host, owned};

pub(crate) fn blocks(native: bool) -> &'static Arc<Plugin> {
    static PLUGINS: OnceLock<[Arc<Plugin>; 2]> = OnceLock::new();
    let plugins = PLUGINS.get_or_init(|| {
        let directory = fixture("blocks");
        [Grants::none(), Grants::none().allow_native("blocks")]
            .map(|grants| host().load(Bundle::open(&directory).unwrap(), &grants).unwrap())
    });
    &plugins[usize::from(native)]
}

pub(crate) fn open(plugin: &Arc<Plugin>, settings: &[(&str, &str)], lower: Vec<Arc<Store>>) -> Arc<Store> {
    plugin.open_store("blocks0", &owned(settings), lower, &StoreGrants::none()).unwrap()
}

fn block(text: &[u8]) -> Vec<u8> {
    let mut block = vec![0xb1; 512];
    block[..text.len()].copy_from_slice(text);
    block
}

#[test]
fn what_is_written_is_read_back_also_through_a_store_above() {
    for native in [false, true] {
        let lower = open(blocks(native), &[], Vec::new());
        let upper = open(blocks(!native), &[], vec![lower.clone()]);
        assert_eq!(upper.info(), lower.info());
        upper.write(1024, block(b"hello")).unwrap();
        upper.flush().unwrap();
        for store in [upper, lower] {
            assert_eq!(store.read(1024, 512).unwrap(), block(b"hello"));
            assert_eq!(store.read(0, 512).unwrap(), [0; 512]);
            assert_eq!(store.read(65536, 512), Err(StoreError::OutOfRange));
            store.close().unwrap();
        }
    }
}

#[test]
fn many_operations_are_few_calls() {
    let store = open(blocks(false), &[], Vec::new());
    let read = |n: u64| (OperationKind::Read, n % 6 * 512, 512, Data::Host(vec![0; 512]));
    let outcomes = store.run((0..200).map(read).collect());
    assert!(outcomes.iter().all(|(result, _)| result.is_ok()));
    let usage = store.usage();
    assert_eq!((usage.operations, usage.batches), (200, 1));
}

#[test]
fn a_store_that_falls_over_one_operation_fails_that_one_alone() {
    // A state this small is saved after every batch, so nothing is lost.
    let store = open(blocks(false), &[("size", "4096")], Vec::new());
    store.write(512, block(b"kept")).unwrap();
    let write = |position, text: &[u8]| (OperationKind::Write, position, 512, Data::Host(block(text)));
    let batch = vec![write(1024, b"before"), write(1536, b"trap"), write(2048, b"after")];
    let results: Vec<_> = store.run(batch).into_iter().map(|(result, _)| result).collect();
    assert_eq!(results, [Ok(()), Err(StoreError::Io), Ok(())]);
    assert_eq!(store.read(512, 512).unwrap(), block(b"kept"));
    assert_eq!(store.read(1024, 512).unwrap(), block(b"before"));
    assert_eq!(store.read(2048, 512).unwrap(), block(b"after"));
    store.flush().unwrap();
    let usage = store.usage();
    assert_eq!((usage.faults, usage.restarts), (4, 4), "twice together, twice alone");
}

#[test]
fn a_store_that_spins_misses_its_deadline_and_fails_that_operation() {
    let store = open(blocks(false), &[("size", "4096")], Vec::new());
    assert_eq!(store.write(0, block(b"spin")), Err(StoreError::Io));
    assert_eq!(store.read(0, 512).unwrap(), [0; 512]);
    assert_eq!(store.usage().faults, 2);
}

#[test]
fn operations_that_an_instance_fell_over_are_given_to_the_next() {
    let store = open(blocks(false), &[("size", "4096")], Vec::new());
    let write = |position, text: &[u8]| (OperationKind::Write, position, 512, Data::Host(block(text)));
    let outcomes = store.run(vec![write(0, b"first"), write(512, b"once")]);
    assert!(outcomes.iter().all(|(result, _)| result.is_ok()));
    assert_eq!(store.read(512, 512).unwrap(), block(b"once"));
    assert!(store.usage().restarts > 0);
}

#[test]
fn a_crash_with_unflushed_writes_fails_flushes_until_they_are_written_again() {
    let store = open(blocks(false), &[], Vec::new());
    store.write(0, block(b"durable")).unwrap();
    store.flush().unwrap();
    store.write(512, block(b"not yet")).unwrap();
    assert_eq!(store.write(1024, block(b"trap")), Err(StoreError::Io));
    assert_eq!(store.flush(), Err(StoreError::Io));
    assert_eq!(store.read(0, 512).unwrap(), block(b"durable"));
    store.write(512, block(b"once more")).unwrap();
    store.flush().unwrap();
    assert_eq!(store.read(512, 512).unwrap(), block(b"once more"));
    store.close().unwrap();
}

#[test]
fn a_failed_flush_is_never_followed_by_a_good_one_before_the_data_is_written_again() {
    for native in [false, true] {
        let store = open(blocks(native), &[], Vec::new());
        store.write(0, block(b"fail")).unwrap();
        assert_eq!(store.flush(), Err(StoreError::Io));
        assert_eq!(store.flush(), Err(StoreError::Io));
        store.write(0, block(b"again")).unwrap();
        store.flush().unwrap();
    }
}

#[test]
fn a_store_that_falls_again_and_again_is_given_up_and_the_host_goes_on() {
    let store = open(blocks(false), &[], Vec::new());
    store.write(0, block(b"flushed")).unwrap();
    store.flush().unwrap();
    for _ in 0..3 {
        assert_eq!(store.write(512, block(b"trap")), Err(StoreError::Io));
    }
    assert_eq!(store.read(0, 512), Err(StoreError::Io), "it has failed for good");
    assert_eq!(store.flush(), Err(StoreError::Io));
    assert_eq!(store.usage().faults, 6);
    assert!(store.close().is_err());
}

#[test]
fn a_native_store_that_panics_fails_everything_from_there_on() {
    let store = open(blocks(true), &[], Vec::new());
    store.write(0, block(b"fine")).unwrap();
    assert_eq!(store.write(512, block(b"trap")), Err(StoreError::Io));
    assert_eq!(store.read(0, 512), Err(StoreError::Io));
    assert_eq!(store.flush(), Err(StoreError::Io));
}

#[test]
fn a_store_that_waits_longer_than_its_deadline_is_left_alone() {
    let store = open(blocks(false), &[], Vec::new());
    store.write(0, block(b"wait")).unwrap();
    assert_eq!(store.usage().faults, 0);
}

#[test]
fn a_store_changes_its_length_and_refuses_what_it_cannot() {
    for native in [false, true] {
        let store = open(blocks(native), &[], Vec::new());
        assert_eq!(store.resize(128 << 10).unwrap().size, 128 << 10);
        store.write(127 << 10, block(b"far")).unwrap();
        let error = store.resize(2 << 20).unwrap_err();
        assert!(error.contains("blocks0") && error.contains("1 MiB"), "{error}");
        assert_eq!(store.info().size, 128 << 10);
    }
}

#[test]
fn only_granted_hosts_are_connected_to() {
    for native in [false, true] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let settings = owned(&[("connect", &port.to_string())]);
        let error =
            blocks(native).open_store("b", &settings, Vec::new(), &StoreGrants::none()).err().unwrap();
        assert!(matches!(error, OpenError::Refused { .. }), "{error}");
        assert!(error.to_string().contains("not granted"), "{error}");
        let peer = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut bytes = [0; 18];
            stream.read_exact(&mut bytes).unwrap();
            stream.write_all(&bytes).unwrap();
        });
        let grants = StoreGrants::none().allow_host("127.0.0.1", port);
        let store = blocks(native).open_store("b", &settings, Vec::new(), &grants).unwrap();
        assert!(store.read(0, 512).unwrap().starts_with(b"hello from outside"));
        peer.join().unwrap();
    }
}

#[test]
fn what_is_no_store_is_not_opened() {
    let error = guest().open_store("g", &[], Vec::new(), &StoreGrants::none()).err().unwrap();
    assert_eq!(error.to_string(), "`guest` is a personality, not a store");
    let error = blocks(false)
        .open_store("b", &owned(&[("sise", "1")]), Vec::new(), &StoreGrants::none())
        .err()
        .unwrap();
    assert!(matches!(error, OpenError::Setting(_)), "{error}");
    let error = blocks(false)
        .open_store("b", &owned(&[("size", "1000")]), Vec::new(), &StoreGrants::none())
        .err()
        .unwrap();
    assert!(error.to_string().contains("`open`"), "{error}");
}
