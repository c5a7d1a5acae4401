//! The store, driven without a VM.

use tenon_testkit::{MemoryStore, StoreBench, StoreChecks, store_conformance};
use {{crate}}::{{type}};

#[test]
fn does_what_every_user_of_a_store_relies_on() {
    let lower = vec![MemoryStore::new(16 << 20)];
    store_conformance::<{{type}}>(&[("start", "1MiB"), ("length", "8MiB")], lower, StoreChecks::default());
}

#[test]
fn is_the_part_that_it_is_told_to_be() {
    let mut lower = MemoryStore::new(1 << 20);
    lower.fill(8192, &[7; 512]);
    let mut bench = StoreBench::<{{type}}>::new(&[("start", "8192"), ("length", "4096")], vec![lower]).unwrap();
    assert_eq!(bench.info().size, 4096);
    assert_eq!(bench.read(0, 1024).unwrap(), [[7; 512], [0; 512]].concat());
    bench.write(512, &[9; 512]).unwrap();
    assert_eq!(bench.lower(0).content(8192 + 512, 1024), [[9; 512], [0; 512]].concat());
}

#[test]
fn a_part_that_does_not_fit_is_refused() {
    for settings in [("start", "2MiB"), ("start", "100"), ("length", "2MiB"), ("length", "100")] {
        let error = StoreBench::<{{type}}>::new(&[settings], vec![MemoryStore::new(1 << 20)]).err().unwrap();
        assert!(error.to_string().contains(settings.0), "{error}");
    }
    assert!(StoreBench::<{{type}}>::new(&[], vec![]).is_err());
}
