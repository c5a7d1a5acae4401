//! Plugins are made, built and tested as a vendor would, in folders of their own.

#![allow(clippy::unwrap_used, reason = "a test and its helpers")]
use std::fs;
use std::path::Path;

use tenon_plugin_tool::{BuildOptions, Error, Kind, build, componentize, inspect, new, test};

/// Cargo's target folder of these tests, so that the SDK is compiled once for all of them.
fn options() -> BuildOptions {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("plugins");
    BuildOptions { target_dir: Some(target), quiet: true, ..BuildOptions::default() }
}

fn replace(path: &Path, from: &str, to: &str) {
    let text = fs::read_to_string(path).unwrap();
    assert!(text.contains(from), "{} has no `{from}`", path.display());
    fs::write(path, text.replace(from, to)).unwrap();
}

#[test]
fn a_new_device_passes_its_tests_and_becomes_a_component_without_permissions() {
    let folder = tempfile::tempdir().unwrap();
    new("my-device", Kind::Device, folder.path(), None).unwrap();
    let output = tempfile::tempdir().unwrap();
    let options =
        BuildOptions { output: Some(output.path().into()), native: true, archive: true, ..options() };
    let built = test(folder.path(), &options).unwrap();
    assert_eq!((built.id.as_str(), built.permissions.len(), built.unused.len()), ("my-device", 0, 0));
    let component = inspect(&fs::read(&built.component).unwrap()).unwrap();
    assert_eq!(component.exports, ["tenon:device/device@0.1.0"]);
    assert_eq!(component.foreign, Vec::<String>::new());
    let native = fs::read(built.native.unwrap()).unwrap();
    assert!(native.windows(15).any(|window| window == b"tenon_plugin_v0"));

    let first = fs::read(built.archive.unwrap()).unwrap();
    let mut names: Vec<String> = tar::Archive::new(first.as_slice())
        .entries()
        .unwrap()
        .map(|entry| entry.unwrap().path().unwrap().display().to_string())
        .collect();
    names.sort();
    assert_eq!(names, ["plugin.so", "plugin.toml", "plugin.wasm"]);
    let again = build(folder.path(), &options).unwrap();
    assert_eq!(fs::read(again.archive.unwrap()).unwrap(), first, "the same sources gave another archive");
}

#[test]
fn a_new_personality_passes_its_tests_and_asks_for_images_and_memory() {
    let folder = tempfile::tempdir().unwrap();
    new("my-guest", Kind::Personality, folder.path(), None).unwrap();
    let built = test(folder.path(), &options()).unwrap();
    assert_eq!(built.permissions, ["images", "guest-memory"]);
    assert_eq!(built.unused, Vec::<String>::new());
}

#[test]
fn a_new_virtio_device_passes_its_tests_and_asks_for_requests_and_entropy() {
    let folder = tempfile::tempdir().unwrap();
    new("my-entropy", Kind::Virtio, folder.path(), None).unwrap();
    let built = test(folder.path(), &BuildOptions { native: true, ..options() }).unwrap();
    assert_eq!((built.kind.as_str(), built.unused), ("device", vec![]));
    assert_eq!(built.permissions, ["requests", "entropy"]);
    let component = inspect(&fs::read(&built.component).unwrap()).unwrap();
    assert_eq!(component.exports, ["tenon:device/virtio-device@0.1.0"]);
    assert_eq!(component.foreign, Vec::<String>::new());
    let native = fs::read(built.native.unwrap()).unwrap();
    assert!(native.windows(15).any(|window| window == b"tenon_plugin_v0"));
}

#[test]
fn a_new_store_passes_its_tests_and_asks_for_lower_stores() {
    let folder = tempfile::tempdir().unwrap();
    new("my-part", Kind::Store, folder.path(), None).unwrap();
    let built = test(folder.path(), &BuildOptions { native: true, ..options() }).unwrap();
    assert_eq!((built.kind.as_str(), built.unused), ("store", vec![]));
    assert_eq!(built.permissions, ["lower-stores"]);
    let component = inspect(&fs::read(&built.component).unwrap()).unwrap();
    assert_eq!(component.exports, ["tenon:store/store@0.1.0"]);
    let native = fs::read(built.native.unwrap()).unwrap();
    assert!(native.windows(15).any(|window| window == b"tenon_plugin_v0"));
}

#[test]
fn what_the_code_uses_must_be_in_the_manifest() {
    let folder = tempfile::tempdir().unwrap();
    new("talker", Kind::Device, folder.path(), None).unwrap();
    let (code, manifest) = (folder.path().join("src/lib.rs"), folder.path().join("plugin.toml"));
    replace(
        &code,
        "self.scratch = 0;",
        "tenon_sdk::device::info!(\"reset at {}\", tenon_sdk::device::now());",
    );
    match build(folder.path(), &options()) {
        Err(Error::Permissions { used, .. }) => assert_eq!(used, "\"log\", \"time\""),
        other => panic!("{other:?}"),
    }
    replace(&manifest, "imports = []", "imports = [\"log\", \"time\", \"channels\"]");
    assert_eq!(build(folder.path(), &options()).unwrap().unused, ["channels"]);
    replace(&manifest, "kind = \"device\"", "kind = \"personality\"");
    assert!(matches!(build(folder.path(), &options()), Err(Error::Manifest { .. })));
}

#[test]
fn a_library_without_the_export_macro_is_not_a_plugin() {
    let folder = tempfile::tempdir().unwrap();
    new("silent", Kind::Device, folder.path(), None).unwrap();
    replace(&folder.path().join("src/lib.rs"), "tenon_sdk::export_device!(Silent);", "");
    match build(folder.path(), &options()) {
        Err(Error::Component(text)) => assert!(text.contains("export_device!"), "{text}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn names_and_folders_that_do_not_do_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["", "Upper", "1st", "under_score", "../up", "match", "std", &"a".repeat(65)] {
        assert!(
            matches!(new(name, Kind::Device, &folder.path().join("new"), None), Err(Error::Name(_))),
            "{name}"
        );
    }
    assert!(!folder.path().join("new").exists());
    fs::write(folder.path().join("mine"), "").unwrap();
    assert!(matches!(new("fine", Kind::Device, folder.path(), None), Err(Error::New(_))));
    let sdk = Some(folder.path());
    assert!(matches!(new("fine", Kind::Device, &folder.path().join("new"), sdk), Err(Error::New(_))));
    assert!(matches!(build(folder.path(), &options()), Err(Error::Manifest { .. })));
}

#[test]
fn what_is_no_module_is_no_component() {
    for bytes in [&b""[..], b"\0asm", b"\0asm\x01\0\0\0"] {
        assert!(matches!(componentize(bytes), Err(Error::Component(_))), "{bytes:?}");
    }
}
