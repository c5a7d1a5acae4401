//! The vendor's commands: what `tenon plugin new` makes builds, passes its trial and runs in a machine; and the trial finds what is wrong.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;
use tenon_tests::{PROMPT, Tenon, program, test_plugins};

/// `tenon plugin` with these words, in this folder. Whatever is built is shared by these tests.
fn plugin(folder: &Path, words: &[&str]) -> Output {
    let mut command = Command::new("timeout");
    command.args(["--signal=KILL", "600"]).arg(program()).arg("plugin").args(words).current_dir(folder);
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("vendor");
    command.env("CARGO_TARGET_DIR", target).stdin(Stdio::null()).output().expect("tenon starts")
}

/// What a command printed that must succeed.
#[track_caller]
fn succeeds(folder: &Path, words: &[&str]) -> String {
    let output = plugin(folder, words);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{words:?}: {text}\n{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// Makes, tries and builds a plugin of this kind under this name, without touching it; its folder.
#[track_caller]
fn vendor(name: &str, kind: &str) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    succeeds(folder.path(), &["new", name, "--kind", kind]);
    let own = folder.path().join(name);
    let text = succeeds(&own, &["test"]);
    assert!(text.ends_with(&format!("{name}: passed\n")), "{text}");
    let out = folder.path().join("built");
    let text = succeeds(&own, &["build", "--out", out.to_str().expect("UTF-8")]);
    let place = out.join(name);
    let place = place.to_str().expect("UTF-8");
    let option = match kind {
        "store" => format!("--plugin-dir {} --disk {name}:STORE:PLACE", out.display()),
        "personality" => format!("--personality {place}"),
        _ => format!("--device {place}"),
    };
    assert!(text.ends_with(&format!("Use it with: tenon run … {option}\n")), "{text}");
    (folder, out.join(name))
}

#[test]
fn a_new_device_answers_a_guest() {
    let (_folder, plugin) = vendor("blinker", "device");
    let outcome = Tenon::virtio_debian()
        .arg("--device")
        .arg(plugin)
        .typing(PROMPT, "port 0x510; port 0x511 0x41; port 0x511\n")
        .typing(PROMPT, "poweroff -f\n")
        .outcome();
    assert_eq!(outcome.status, 0, "{}", outcome.all());
    assert!(outcome.stdout.contains("\n0x54\n0x41\n"), "{}", outcome.all());
}

#[test]
fn a_new_virtio_device_is_taken_by_linux() {
    let (_folder, plugin) = vendor("dice", "virtio-device");
    let outcome = Tenon::virtio_debian()
        .arg("--device")
        .arg(plugin)
        .typing(PROMPT, "cat /sys/class/misc/hw_random/rng_current; head -c 1000 /dev/hwrng | wc -c\n")
        .typing(PROMPT, "poweroff -f\n")
        .outcome();
    assert_eq!(outcome.status, 0, "{}", outcome.all());
    assert!(outcome.stdout.contains("virtio_rng.0\n1000\n"), "{}", outcome.all());
    let devices = outcome.summary["devices"].as_array().expect("devices");
    let dice = devices.iter().find(|device| device["plugin"] == "dice").expect("the device");
    assert_eq!((&dice["form"], &dice["faults"]), (&Value::from("wasm"), &Value::from(0)));
}

#[test]
fn a_new_store_is_read_by_linux() {
    let (_folder, plugin) = vendor("part", "store");
    let mut image = vec![0; 4 << 20];
    image[1 << 20..][..24].copy_from_slice(b"hello from the second MB");
    let tenon = Tenon::virtio_debian();
    let disk = tenon.file("disk.img", &image);
    let outcome = tenon
        .arg("--plugin-dir")
        .arg(plugin.parent().expect("a folder of plugins"))
        .arg("--disk")
        .arg(format!("part:file:{},start=1MiB", disk.display()))
        .typing(PROMPT, "head -c 24 /dev/vda; echo\n")
        .typing(PROMPT, "poweroff -f\n")
        .outcome();
    assert_eq!(outcome.status, 0, "{}", outcome.all());
    assert!(outcome.stdout.contains("hello from the second MB"), "{}", outcome.all());
}

#[test]
fn a_new_personality_loads_a_guest() {
    let (_folder, plugin) = vendor("loader", "personality");
    // mov al, [ebx]; out 0xf4, al; hlt: the first byte of the command line is the exit status.
    let tenon = Tenon::run();
    let image = tenon.file("image", &[0x8a, 0x03, 0xe6, 0xf4, 0xf4]);
    let outcome = tenon
        .args(["--engine", "soft", "--device", "exit", "--cmdline", "*", "--personality"])
        .arg(plugin)
        .arg("--kernel")
        .arg(image)
        .outcome();
    assert_eq!(outcome.status, i32::from(b'*'), "{}", outcome.all());
}

/// Tries the device of many mistakes with this one, and gives how the command ended and what it found.
fn trial(mistake: &str) -> (Option<i32>, Value) {
    let faulty = test_plugins().join("faulty");
    let faulty = faulty.to_str().expect("UTF-8");
    let setting = format!("mistake={mistake}");
    let output = plugin(Path::new("/"), &["test", faulty, "--json", "--set", &setting]);
    let report = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
    assert!(report.is_object(), "{mistake}: {}", String::from_utf8_lossy(&output.stderr));
    (output.status.code(), report)
}

#[test]
fn a_virtio_device_that_is_right_passes_its_trial() {
    let (status, report) = trial("none");
    assert_eq!((status, &report["passed"]), (Some(0), &Value::Bool(true)), "{report}");
    let checks = report["checks"].as_array().expect("checks");
    for done in
        ["requests of odd shapes", "restarts", "truncated states", "changes of settings", "survive a restart"]
    {
        assert!(
            checks.iter().any(|check| check.as_str().expect("a line").contains(done)),
            "{done}: {report}"
        );
    }
}

#[test]
fn the_trial_of_a_virtio_device_finds_each_mistake() {
    for (mistake, found) in [
        ("odd-queue", "has 100 entries"),
        ("config-panics", "unreachable"),
        ("features-refused", "refuses the features that it offers"),
        ("header-trusted", "odd requests in queue 0: 6 instances fell"),
        ("spins", "deadline"),
        ("hoards", "memory"),
        ("answers-twice", "which it does not hold"),
        ("uses-answered", "which it does not hold"),
        ("reset-keeps", "after `reset` the state is not as after power-on"),
        ("restore-forgets", "the restored device saves another state"),
        ("short-state-taken", "bytes of its state"),
        ("damaged-state-panics", "an instance fell over a state"),
        ("adjust-panics", "changing `label`"),
        ("adjust-halfway", "was refused, and the state is"),
        ("adjust-forgotten", "the restored device saves another state"),
        ("drops-a-request", "a request of type 0 is not answered"),
        ("flush-lies", "Flush while the store fails gives status 0"),
        ("failure-ignored", "while the store fails gives status 0"),
        ("end-ignored", "reading behind the end gives status 0"),
        ("deaf-to-resize", "the store has grown"),
        ("answers-early", "do not read the same"),
        ("zeroes-too-much", "did not do just that"),
    ] {
        let (status, report) = trial(mistake);
        assert_eq!((status, &report["passed"]), (Some(1), &Value::Bool(false)), "{mistake}: {report}");
        let failed = report["failed"].as_str().expect("what failed");
        assert!(failed.contains(found), "{mistake} was found as: {failed}");
    }
}

#[test]
fn a_trial_that_fails_says_so_in_words() {
    let faulty = test_plugins().join("faulty");
    let output = plugin(&faulty, &["test", "--set", "mistake=flush-lies"]);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("faulty fails") && error.contains("Flush"), "{error}");
    let output = plugin(&faulty, &["test", "--set", "mistake=unheard-of"]);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.contains("flush-lies"), "the choices are named: {error}");
    let output = plugin(&faulty, &["test", "--allow-native"]);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.contains("no native library"), "{error}");
}

#[test]
fn every_bundled_virtio_device_passes_its_trial_in_both_forms() {
    let listed: Value = serde_json::from_str(&succeeds(Path::new("/"), &["list", "--json"])).expect("a list");
    let ids = listed.as_array().expect("a list").iter().map(|line| line["id"].as_str().expect("an id"));
    let virtio: Vec<&str> = ids.filter(|id| id.starts_with("virtio-")).collect();
    assert_eq!(virtio.len(), 7, "{virtio:?}");
    for id in virtio {
        for (form, more) in [("wasm", &[][..]), ("native", &["--allow-native"])] {
            let text = succeeds(Path::new("/"), &[&["test", id, "--json"], more].concat());
            let report: Value = serde_json::from_str(&text).expect("a report");
            assert_eq!(report["form"], form, "{text}");
        }
    }
}

#[test]
fn plugins_that_are_part_of_the_program_are_listed_inspected_and_tried() {
    let listed: Value = serde_json::from_str(&succeeds(Path::new("/"), &["list", "--json"])).expect("a list");
    let ids: Vec<&str> =
        listed.as_array().expect("a list").iter().map(|line| line["id"].as_str().expect("an id")).collect();
    assert!(ids.is_sorted(), "{ids:?}");
    for id in ["file", "memory", "null", "qcow2"] {
        let line =
            listed.as_array().expect("a list").iter().find(|line| line["id"] == id).expect("it is listed");
        assert_eq!((&line["forms"], &line["kind"]), (&Value::from(vec!["built-in"]), &Value::from("store")));
        let text = succeeds(Path::new("/"), &["inspect", id, "--json"]);
        let about: Value = serde_json::from_str(&text).expect("a report");
        assert!(!about["settings"].as_array().expect("settings").is_empty(), "{about}");
        assert_eq!((&about["origin"], &about["limits"]), (&Value::from("built-in"), &Value::Null));
        assert!(succeeds(Path::new("/"), &["inspect", id]).contains("without a sandbox"));
    }
    succeeds(Path::new("/"), &["test", "null", "--set", "size=10M", "--keeps", "never"]);
    succeeds(Path::new("/"), &["test", "overlay", "--keeps", "open"]);
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(folder.path().join("key"), "0123456789abcdef".repeat(8)).expect("a key");
    succeeds(folder.path(), &["test", "crypt", "--set", "format=yes", "--set", "key-file=key"]);
    let text = succeeds(Path::new("/"), &["test", "memory"]);
    assert!(text.contains("part of this program") && text.ends_with("memory: passed\n"), "{text}");
}
