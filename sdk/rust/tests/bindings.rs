//! The bindings kept in `src` are those of the WIT: run with `TENON_GENERATE=1` in the environment, this test writes them.
#![allow(clippy::unwrap_used, reason = "a test and its helpers")]

use std::fs;
use std::path::Path;

use wit_bindgen_core::wit_parser::Resolve;
use wit_bindgen_core::{Files, WorldGenerator};
use wit_bindgen_rust::Opts;

fn check(kind: &str) {
    let sdk = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut resolve = Resolve::default();
    let (package, _) = resolve.push_dir(sdk.join("../../wit").join(kind)).unwrap();
    let world = resolve.packages[package].worlds[&format!("{kind}-plugin")];
    let options = Opts {
        format: true,
        pub_export_macro: true,
        runtime_path: Some("::tenon_sdk::wit_bindgen::rt".into()),
        ..Opts::default()
    };
    let mut files = Files::default();
    options.build().generate(&mut resolve, world, &mut files).unwrap();
    let (_, generated) = files.iter().next().unwrap();
    let path = sdk.join("src").join(kind).join("component/bindings.rs");
    if std::env::var_os("TENON_GENERATE").is_some() {
        fs::write(&path, generated).unwrap();
    }
    assert!(
        fs::read(&path).is_ok_and(|kept| kept == generated),
        "src/{kind}/component/bindings.rs is not what the WIT gives; run `TENON_GENERATE=1 cargo test -p tenon-sdk --test bindings`"
    );
}

#[test]
fn the_bindings_of_devices_are_those_of_the_wit() {
    check("device");
}

#[test]
fn the_bindings_of_personalities_are_those_of_the_wit() {
    check("personality");
}
