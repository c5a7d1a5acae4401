//! Manifests and settings.

use tenon_plugins::Manifest;

const GOOD: &str = r#"
id = "serial"
version = "0.1.0"
kind = "device"
api = "0.1.0"
[permissions]
imports = ["log"]
[limits]
memory = "900 GiB"
[state]
schema = 1
[config.base]
type = "integer"
default = "0x3f8"
[config.size]
type = "size"
[config.fifo]
type = "boolean"
default = true
[config.speed]
type = "choice"
choices = ["slow", "fast"]
"#;

fn settings(given: &[(&str, &str)]) -> Result<Vec<(String, String)>, String> {
    let manifest = Manifest::parse("plugin.toml", GOOD).unwrap();
    manifest.settings(&crate::machine::owned(given)).map_err(|error| error.to_string())
}

#[test]
fn defaults_are_filled_in_and_values_are_passed_as_written() {
    let all = settings(&[("size", "64 KiB"), ("speed", "fast")]).unwrap();
    let wanted = [("base", "0x3f8"), ("fifo", "true"), ("size", "64 KiB"), ("speed", "fast")];
    assert_eq!(all, crate::machine::owned(&wanted));
}

#[test]
fn a_wrong_setting_names_the_key_the_fault_and_the_keys_there_are() {
    let cases = [
        ("bas", "1", "no setting `bas`"),
        ("base", "0x", "not a number"),
        ("base", "ten", "0x3f8"),
        ("base", "0x1ffffffffffffffff", "64 bits"),
        ("size", "64 KB", "64 KiB"),
        ("size", "99999999999G", "not a size"),
        ("fifo", "perhaps", "`true`"),
        ("speed", "warp", "`slow`, `fast`"),
    ];
    for (key, value, says) in cases {
        let error = settings(&[(key, value)]).unwrap_err();
        assert!(
            error.contains(says) && error.contains("`base`, `fifo`, `size`, `speed`"),
            "{key}={value}: {error}"
        );
    }
    assert!(settings(&[("base", "1"), ("base", "2")]).unwrap_err().contains("twice"));
}

#[test]
fn a_limit_past_the_hosts_is_cut() {
    assert_eq!(Manifest::parse("plugin.toml", GOOD).unwrap().limits.memory, 256 << 20);
}

#[test]
fn a_wrong_manifest_names_the_place() {
    let cases = [
        ("kind = \"device\"", "kind = \"gadget\"", "gadget"),
        ("\"log\"", "\"network\"", "`network`"),
        ("schema = 1", "", "schema"),
        ("[state]\nschema = 1", "", "[state]"),
        ("version = \"0.1.0\"", "version = \"1\"", "`1` is not a version"),
        ("id = \"serial\"", "id = \"../serial\"", "../serial"),
        ("default = \"0x3f8\"", "default = \"x\"", "config.base.default"),
        ("[limits]", "[limit]", "limit"),
        ("choices = [\"slow\", \"fast\"]", "", "choices"),
    ];
    for (from, to, says) in cases {
        assert!(GOOD.contains(from));
        let error = Manifest::parse("some/plugin.toml", &GOOD.replace(from, to)).unwrap_err().to_string();
        assert!(error.contains(says) && error.contains("some/plugin.toml"), "{from} -> {to}: {error}");
    }
}
