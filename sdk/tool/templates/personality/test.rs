//! The personality, driven without a VM.

use tenon_testkit::LoadBench;
use {{crate}}::{COMMAND_LINE, IMAGE, {{type}}};

#[test]
fn the_image_is_loaded_and_entered() {
    let bench = LoadBench::new(16 << 20).image("kernel", [0xf4]).option("cmdline", "quiet");
    let loaded = bench.load::<{{type}}>().unwrap();
    assert_eq!(loaded.memory(IMAGE.into(), 1), [0xf4]);
    assert_eq!(loaded.text(COMMAND_LINE.into()), "quiet");
    assert_eq!(loaded.boot.vcpu.rip, IMAGE.into());
}

#[test]
fn a_missing_image_is_named() {
    let error = LoadBench::new(16 << 20).load::<{{type}}>().err().unwrap();
    assert!(error.to_string().contains("`kernel`"), "{error}");
}

#[test]
fn an_image_larger_than_memory_is_refused() {
    assert!(LoadBench::new(2 << 20).image("kernel", vec![0; 2 << 20]).load::<{{type}}>().is_err());
}
