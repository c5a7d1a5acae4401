//! Native plugins.

use tenon_plugins::{Bundle, Grants, LoadProblem, Status};

use crate::machine::{Machine, fixture, host, misdeed_bundle, owned};

/// A copy of the fixture with the files named.
fn copy(files: &[&str]) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for file in files {
        std::fs::copy(fixture("misdeed").join(file), directory.path().join(file)).unwrap();
    }
    directory
}

#[test]
fn native_code_needs_permission() {
    let directory = copy(&["plugin.toml", "plugin.so"]);
    let bundle = || Bundle::open(directory.path()).unwrap();
    let error = host().load(bundle(), &Grants::none().allow_native("another")).err().unwrap();
    assert!(matches!(error.error, LoadProblem::NativeNotAllowed(_)));
    assert!(error.to_string().contains("--allow-native misdeed"), "{error}");
    assert!(host().load(bundle(), &Grants::none().allow_native("misdeed")).unwrap().is_native());
}

#[test]
fn a_plugin_with_both_forms_is_sandboxed_unless_allowed() {
    assert!(!host().load(misdeed_bundle(), &Grants::none()).unwrap().is_native());
    assert!(host().load(misdeed_bundle(), &Grants::none().allow_native("misdeed")).unwrap().is_native());
}

#[test]
fn a_native_device_does_what_the_component_does() {
    let plugin = host().load(misdeed_bundle(), &Grants::none().allow_native("misdeed")).unwrap();
    let machine = Machine::still();
    let device =
        plugin.attach("native", &owned(&[("misdeed", "once"), ("when", "write")]), &machine.parts).unwrap();
    let console = device.channel("console").unwrap();
    let _ = console.take(0);
    machine.write(0, 0x5a);
    machine.write(10, 1);
    machine.write(4, 100);
    machine.parts.clock.advance_to(100);
    machine.write(1, 1);
    // It panics the first time; the second time it does not, so that nothing is lost.
    machine.write(2, 0);
    let usage = device.usage();
    assert_eq!((usage.faults, usage.restarts, usage.lost_calls), (1, 1, 0), "{usage:?}");
    assert_eq!((machine.read(0), machine.read(4)), (0x5a, 1));
    assert_eq!(machine.levels(), [(5, true)]);
    assert_eq!(console.take(10), b"w", "what was written before the panic is not written again");
    assert_eq!(device.status(), Status::Running);
}

#[test]
fn a_library_that_is_no_plugin_is_refused() {
    let directory = copy(&["plugin.toml"]);
    let load = |bytes: &[u8]| {
        std::fs::write(directory.path().join("plugin.so"), bytes).unwrap();
        let bundle = Bundle::open(directory.path()).unwrap();
        let error = host().load(bundle, &Grants::none().allow_native("misdeed")).err().unwrap();
        assert!(matches!(error.error, LoadProblem::Native(_)), "{error}");
        error.to_string()
    };
    assert!(load(b"not a library").contains("cannot be loaded"));
    let mut library = std::fs::read(fixture("misdeed").join("plugin.so")).unwrap();
    let magic = library.windows(8).position(|bytes| bytes == b"TENONPLG").unwrap();
    library[magic + 8] = 9;
    let text = load(&library);
    let host_version = format!("version {}", tenon_plugins::abi::ABI_VERSION);
    assert!(text.contains("version 9") && text.contains(&host_version), "{text}");
    library[magic] = b'X';
    assert!(load(&library).contains("not a Tenon plugin"));
}
