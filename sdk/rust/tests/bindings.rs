//! The bindings kept in `src` are those of the WIT: run with `TENON_GENERATE=1` in the environment, this test writes them.
#![allow(clippy::unwrap_used, reason = "a test and its helpers")]

use std::fs;
use std::path::Path;

use wit_bindgen_core::wit_parser::Resolve;
use wit_bindgen_core::{Files, WorldGenerator};
use wit_bindgen_rust::{Opts, WithOption};

/// Checks the bindings of the world `KIND-plugin` of a package. Interfaces of `shared` are those that another world of the package has bindings for.
fn check(package: &str, kind: &str, shared: &[&str]) {
    let sdk = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut resolve = Resolve::default();
    let (id, _) = resolve.push_dir(sdk.join("../../wit").join(package)).unwrap();
    let world = resolve.packages[id].worlds[&format!("{kind}-plugin")];
    let version = resolve.packages[id].name.version.clone().unwrap();
    let with = |interface: &&str| {
        let module = interface.replace('-', "_");
        let path = format!("::tenon_sdk::{package}::component::bindings::tenon::{package}::{module}");
        (format!("tenon:{package}/{interface}@{version}"), WithOption::Path(path))
    };
    let options = Opts {
        format: true,
        pub_export_macro: true,
        runtime_path: Some("::tenon_sdk::wit_bindgen::rt".into()),
        with: shared.iter().map(with).collect(),
        generate_all: !shared.is_empty(),
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
    check("device", "device", &[]);
}

#[test]
fn the_bindings_of_virtio_devices_are_those_of_the_wit() {
    check("device", "virtio", &["types", "log", "time", "wall-clock", "channels"]);
}

#[test]
fn the_bindings_of_stores_are_those_of_the_wit() {
    check("store", "store", &[]);
}

#[test]
fn the_bindings_of_personalities_are_those_of_the_wit() {
    check("personality", "personality", &[]);
}
