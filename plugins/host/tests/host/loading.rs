//! What loads and what is refused.

use std::io::Write;

use tenon_plugins::{Bundle, BundleError, Catalog, Grants, LoadProblem, Misfit};

use crate::machine::{fixture, host, misdeed, misdeed_bundle};

const MANIFEST: &str = r#"
id = "tiny"
version = "0.1.0"
kind = "device"
api = "0.1.0"
[permissions]
imports = ["log"]
[state]
schema = 1
"#;

fn load(manifest: &str, wasm: Vec<u8>) -> LoadProblem {
    let bundle = Bundle::embedded(manifest, wasm).unwrap();
    host().load(bundle, &Grants::none()).err().expect("it must be refused").error
}

fn misfit(wat: &str) -> (Misfit, String) {
    match load(MANIFEST, wat::parse_str(wat).unwrap()) {
        LoadProblem::Misfit(misfit) => {
            let text = misfit.to_string();
            (misfit, text)
        }
        other => panic!("{other}"),
    }
}

#[test]
fn the_fixture_loads_and_says_what_it_calls() {
    let calls: Vec<_> = misdeed().imports().iter().filter(|import| !import.functions.is_empty()).collect();
    assert_eq!(calls.len(), 5, "{calls:?}");
    assert_eq!(misdeed().digest().len(), 64);
}

#[test]
fn an_import_that_no_plugin_gets_is_refused() {
    let (misfit, text) = misfit(r#"(component (import "wasi:cli/environment@0.2.0" (instance)))"#);
    assert!(matches!(misfit, Misfit::UnknownImport { .. }));
    assert!(text.contains("wasi:cli/environment@0.2.0") && text.contains("tenon:device/log"), "{text}");
}

#[test]
fn an_import_of_another_version_is_refused_and_both_are_named() {
    let wat =
        r#"(component (import "tenon:device/time@0.2.0" (instance (export "now" (func (result u64))))))"#;
    let (misfit, text) = misfit(wat);
    assert!(matches!(misfit, Misfit::ImportVersion { .. }));
    assert!(text.contains("0.2.0") && text.contains("0.1.0"), "{text}");
}

#[test]
fn a_function_that_the_interface_does_not_have_is_refused() {
    let wat = r#"(component (import "tenon:device/time@0.1.7" (instance (export "sleep" (func (param "ns" u64))))))"#;
    let (misfit, text) = misfit(wat);
    assert!(matches!(misfit, Misfit::UnknownFunction { .. }));
    assert!(text.contains("`sleep`") && text.contains("`now`"), "{text}");
}

#[test]
fn an_interface_without_permission_is_refused() {
    let wat =
        r#"(component (import "tenon:device/time@0.1.0" (instance (export "now" (func (result u64))))))"#;
    let (misfit, text) = misfit(wat);
    assert_eq!(misfit, Misfit::NotPermitted { interface: "time".into(), permitted: "`log`".into() });
    assert!(text.contains("plugin.toml"), "{text}");
}

#[test]
fn a_component_that_is_no_device_is_refused() {
    assert!(matches!(misfit("(component)").0, Misfit::NoExport { .. }));
    let empty = r#"(component (instance $i) (export "tenon:device/device@0.1.0" (instance $i)))"#;
    assert!(matches!(misfit(empty).0, Misfit::Types(_)));
}

#[test]
fn another_api_is_refused_and_both_are_named() {
    for (api, remedy) in [("0.2.0", "newer Tenon"), ("1.0.0", "newer Tenon"), ("0.0.9", "newer SDK")] {
        let error =
            load(&MANIFEST.replace("api = \"0.1.0\"", &format!("api = \"{api}\"")), b"\0asm".to_vec());
        let text = error.to_string();
        assert!(text.contains(api) && text.contains("0.1.0") && text.contains(remedy), "{text}");
    }
}

#[test]
fn damaged_components_are_refused_whatever_is_damaged() {
    let bundle = misdeed_bundle();
    let good = bundle.component().unwrap();
    for bytes in [&[][..], b"not wasm", &good[..7], &good[..good.len() / 2], b"\0asm\x01\0\0\0"] {
        let error = load(MANIFEST, bytes.to_vec());
        assert!(matches!(error, LoadProblem::Component(_)), "{error}");
    }
}

#[test]
fn a_plugin_that_is_nowhere_is_refused_with_those_there_are() {
    let mut catalog = Catalog::new();
    catalog.add_directory(fixture("misdeed").parent().unwrap());
    catalog.add_embedded(MANIFEST, &b"\0asm"[..]).unwrap();
    assert_eq!(catalog.find("misdeed").unwrap().manifest.id, "misdeed");
    assert_eq!(catalog.find("tiny").unwrap().manifest.id, "tiny");
    let error = catalog.find("missing").unwrap_err().to_string();
    assert!(
        error.contains("`missing`") && error.contains("`misdeed`") && error.contains("`tiny`"),
        "{error}"
    );
}

fn archive(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, bytes) in entries {
        let mut header = tar::Header::new_gnu();
        // The builder refuses such names itself, so they are put there by hand.
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        header.set_cksum();
        builder.append(&header, *bytes).unwrap();
    }
    builder.into_inner().unwrap()
}

#[test]
fn an_archive_loads_as_a_directory_does() {
    let from = misdeed_bundle();
    let toml = std::fs::read(fixture("misdeed").join("plugin.toml")).unwrap();
    let bytes = archive(&[
        ("./plugin.toml", &toml),
        ("plugin.wasm", from.component().unwrap()),
        ("README.md", b"hi"),
    ]);
    let mut file = tempfile::Builder::new().suffix(".tenon").tempfile().unwrap();
    file.write_all(&bytes).unwrap();
    let bundle = Bundle::open(file.path()).unwrap();
    assert_eq!(bundle.manifest.id, "misdeed");
    let plugin = host().load(bundle, &Grants::none()).unwrap();
    assert_eq!(plugin.digest(), misdeed().digest());
}

#[test]
fn an_archive_that_reaches_outside_itself_is_refused() {
    let toml = MANIFEST.as_bytes();
    for path in ["../plugin.wasm", "/etc/plugin.wasm", "a/../../plugin.wasm"] {
        let bytes = archive(&[("plugin.toml", toml), (path, b"\0asm")]);
        let error = Bundle::archive("bad.tenon", &bytes[..]).unwrap_err();
        assert!(matches!(error, BundleError::Archive { .. }), "{error}");
        assert!(error.to_string().contains(path), "{error}");
    }
    for kind in [tar::EntryType::Symlink, tar::EntryType::Link, tar::EntryType::Char] {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(0);
        builder.append_link(&mut header, "plugin.wasm", "/etc/passwd").unwrap();
        let bytes = builder.into_inner().unwrap();
        let error = Bundle::archive("bad.tenon", &bytes[..]).unwrap_err().to_string();
        assert!(error.contains("only files and directories"), "{error}");
    }
}

#[test]
fn damaged_archives_are_refused() {
    let good = archive(&[("plugin.toml", MANIFEST.as_bytes()), ("plugin.wasm", b"\0asm")]);
    for length in [1, 100, 513, 700] {
        Bundle::archive("cut.tenon", &good[..length]).unwrap_err();
    }
    let twice = archive(&[("plugin.toml", MANIFEST.as_bytes()), ("./plugin.toml", MANIFEST.as_bytes())]);
    assert!(Bundle::archive("twice.tenon", &twice[..]).unwrap_err().to_string().contains("twice"));
    let empty = archive(&[("plugin.toml", MANIFEST.as_bytes())]);
    assert!(matches!(Bundle::archive("empty.tenon", &empty[..]), Err(BundleError::Empty(_))));
    // A header that promises far more than there is costs nothing.
    let mut header = tar::Header::new_gnu();
    header.set_path("plugin.wasm").unwrap();
    header.set_size(1 << 40);
    header.set_cksum();
    let error = Bundle::archive("huge.tenon", header.as_bytes().as_slice()).unwrap_err().to_string();
    assert!(error.contains("at most"), "{error}");
}
