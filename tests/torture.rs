//! Disks under load with a real Debian: fio, discards, zeroes and a file system over every kind of store, a second attach, and disks that fail by rule.
//!
//! What runs in the guest is `guests/linux/torture`, in the place of systemd, on the Debian disk (`cargo xtask guests --disk`). The software engine runs it.

use std::path::Path;
use std::process::Command;

use tempfile::TempDir;
use tenon_tests::{Outcome, Tenon, debian, program};

/// The disks that fio works on: their names, and what they stand on, in the test's folder.
const FIO: [(&str, &str); 4] = [
    ("file", "file:fio.img"),
    ("qcow2", "qcow2:fio.qcow2"),
    ("crypt", "crypt:qcow2:fio-crypt.qcow2,key-file=key,discard=yes"),
    ("overlay", "overlay:file:fio-base.img,top=file:fio-top.img"),
];
/// The same for those with a file system. `fault` delays and holds writes back until a flush, as a disk with a cache does.
const EXT4: [(&str, &str); 4] = [
    ("ext4-file", "fault:file:ext4.img,rules=any:every=50:delay=1ms;write:drop"),
    ("ext4-qcow2", "qcow2:ext4.qcow2"),
    ("ext4-crypt", "crypt:qcow2:ext4-crypt.qcow2,key-file=key"),
    ("ext4-overlay", "overlay:file:ext4-base.img,top=qcow2:ext4-top.qcow2"),
];
/// What the disks that fail do: `guests/linux/torture` knows their order.
const FAULTS: [&str; 5] = [
    "fault:memory:32M,rules=read:every=60:error=io;write:every=45:error=io;any:every=100:delay=2ms",
    "fault:memory:4M,rules=flush:times=1:error=io",
    "fault:memory:32M,rules=read:nth=300:flip=1",
    "fault:memory:32M,rules=write:after=300:chance=1/150:error=io",
    "memory:16M",
];

/// The test's own folder, with the disk that brings the guest its programs; nothing where there is no Debian disk.
fn folder() -> Option<TempDir> {
    if !debian("disk/root.img").is_file() {
        println!("not run: there is no Debian disk; `cargo xtask guests --disk` makes it");
        return None;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("guests/linux");
    run(Command::new("rustc")
        .args([
            "--edition",
            "2024",
            "--target",
            "x86_64-unknown-linux-musl",
            "-Copt-level=s",
            "-Cpanic=abort",
        ])
        .arg("-o")
        .arg(folder.path().join("fsx"))
        .arg(source.join("fsx.rs")));
    run(Command::new("tar")
        .arg("-cf")
        .arg(folder.path().join("tools.tar"))
        .arg("-C")
        .arg(folder.path())
        .arg("fsx")
        .arg("-C")
        .arg(source)
        .arg("torture"));
    Some(folder)
}

#[track_caller]
fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?} does not start: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{command:?}: {}\n{text}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

/// `tenon disk`, in this folder.
fn disk(folder: &TempDir, words: &[&str]) -> String {
    run(Command::new(program()).arg("disk").args(words).current_dir(folder.path()))
}

/// A disk as `--disk` takes it from anywhere.
fn placed(folder: &TempDir, disk: &str) -> String {
    let place = folder.path().display();
    let disk = disk.replace("key-file=", &format!("key-file={place}/"));
    ["file:", "qcow2:"].iter().fold(disk, |disk, store| {
        // The last store of a chain has the place.
        disk.replace(store, &format!("{store}{place}/")).replace(&format!("{place}/qcow2:"), "qcow2:")
    })
}

/// Boots Debian with these disks behind the root's and the tools', and lets the guest do its part.
fn guest(folder: &TempDir, doing: &str, disks: impl IntoIterator<Item = String>) -> Outcome {
    let at = |file: &str| debian("disk").join(file);
    let command_line = format!(
        "console=ttyS0 root=/dev/vda rw mitigations=off tsc=reliable panic=-1 quiet init=/bin/sh -- \
         -c \"mount -t tmpfs tmpfs /mnt; tar -xf /dev/vdb -C /mnt; exec sh /mnt/torture {doing}\""
    );
    let tenon = Tenon::run()
        .within(400)
        .args(["--engine", "soft", "--cpus", "2", "--memory", "512M", "--log", "info", "--kernel"])
        .arg(at("vmlinuz"))
        .arg("--initrd")
        .arg(at("initrd.img"))
        .args(["--cmdline", &command_line, "--disk"])
        .arg(format!("overlay:file:{}", at("root.img").display()))
        .arg("--disk")
        .arg(format!("file:{}/tools.tar", folder.path().display()));
    let outcome = disks.into_iter().fold(tenon, |tenon, disk| tenon.args(["--disk", &disk])).outcome();
    assert_eq!((outcome.status, &outcome.summary["end"]), (0, &"power-off".into()), "{}", outcome.all());
    for device in outcome.summary["devices"].as_array().expect("devices") {
        assert_eq!(device["faults"], 0, "{}", outcome.all());
    }
    outcome
}

/// The words behind `TORTURE STEP DISK`, which the guest says once.
#[track_caller]
fn said<'o>(outcome: &'o Outcome, what: &str) -> &'o str {
    let mut found =
        outcome.stdout.lines().filter_map(|line| line.strip_prefix("TORTURE ")?.strip_prefix(what));
    match (found.next(), found.next()) {
        (Some(words), None) => words.trim(),
        _ => panic!("`{what}` is not said once\n{}", outcome.all()),
    }
}

/// How often a rule fired, as the store says when it is closed.
#[track_caller]
fn fired(outcome: &Outcome, disk: usize, rule: &str) -> u64 {
    let name = format!("disk{disk}.fault");
    let line =
        outcome.stderr.lines().find(|line| line.contains(&name) && line.contains(&format!("rule `{rule}`")));
    let times = line.and_then(|line| line.split("fired ").nth(1)?.split(' ').next()?.parse().ok());
    times.unwrap_or_else(|| panic!("nothing is said of `{rule}`\n{}", outcome.all()))
}

#[track_caller]
fn all_is_well(outcome: &Outcome) {
    for (name, _) in FIO {
        let fio = said(outcome, &format!("fio {name}"));
        assert!(fio.starts_with("status 0 errors  first 0 written 2"), "{name}: {fio}\n{}", outcome.all());
    }
    for (name, _) in EXT4 {
        assert_eq!(said(outcome, &format!("fsx {name}")), "status 0", "{}", outcome.all());
    }
    assert!(!outcome.stdout.contains("WRONG") && !outcome.stdout.contains("failed"), "{}", outcome.all());
}

#[test]
fn what_is_written_to_any_store_is_there_after_a_second_attach() {
    let Some(folder) = folder() else { return };
    std::fs::write(folder.path().join("key"), "5a0f".repeat(32)).expect("a key");
    for base in ["fio-base.img", "ext4-base.img"] {
        disk(&folder, &["create", &format!("file:{base}"), "--size", "34M"]);
    }
    for (_, place) in FIO.iter().chain(&EXT4) {
        // A store that fails is laid over what is there.
        let made = place.split_once(",rules").map_or(*place, |(made, _)| made).trim_start_matches("fault:");
        disk(&folder, &["create", made, "--size", "34M"]);
    }
    let names = |disks: &[(&str, &str)]| disks.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(",");
    let disks = || FIO.iter().chain(&EXT4).map(|(_, place)| placed(&folder, place));
    let parts = format!("{} {}", names(&FIO), names(&EXT4));

    let written = guest(&folder, &format!("write {parts}"), disks());
    all_is_well(&written);
    for (name, _) in FIO {
        for step in ["discard", "zero"] {
            assert_eq!(said(&written, &format!("{step} {name}")), "ok", "{}", written.all());
        }
    }
    assert!(fired(&written, 6, "write:drop") > 0 && fired(&written, 6, "any:every=50:delay=1ms") > 0);

    let has_qemu = Command::new("qemu-img").arg("--version").output().is_ok();
    for (name, place) in FIO.iter().chain(&EXT4) {
        let words = disk(&folder, &["check", place]);
        assert!(words.contains("can be read"), "{name}: {words}");
        let image = place.split([':', ',', '=']).find(|word| word.ends_with(".qcow2"));
        if let Some(image) = image.filter(|_| has_qemu) {
            run(Command::new("qemu-img").args(["check", image]).current_dir(folder.path()));
        }
    }

    let verified = guest(&folder, &format!("verify {parts}"), disks());
    all_is_well(&verified);
    for (name, _) in FIO {
        let what = format!("sum {name}");
        assert_eq!(said(&verified, &what), said(&written, &what), "{name}");
    }
}

#[test]
fn a_disk_that_fails_gives_errors_and_no_wrong_data() {
    let Some(folder) = folder() else { return };
    let outcome = guest(&folder, "faults", FAULTS.map(str::to_owned));
    // fio says EIO (5) for exactly those operations that failed, and finds what it wrote in all others.
    let (reads, writes) =
        (fired(&outcome, 2, "read:every=60:error=io"), fired(&outcome, 2, "write:every=45:error=io"));
    assert!(reads > 5 && writes > 5, "{reads} reads and {writes} writes fail");
    let errors = said(&outcome, "fio errors");
    assert_eq!(errors, format!("status 0 errors {} first 5 written 2", reads + writes), "{}", outcome.all());
    // A flush that failed is told to whoever asked for it; the next one, after all was written again, is good.
    assert_eq!(fired(&outcome, 3, "flush:times=1:error=io"), 1);
    assert_eq!(said(&outcome, "dd flush status"), "1", "{}", outcome.all());
    assert_eq!(said(&outcome, "dd flush-again"), "status 0", "{}", outcome.all());
    // fio would find wrong data, if there were any: one flipped bit is found.
    assert_eq!(fired(&outcome, 4, "read:nth=300:flip=1"), 1);
    assert!(said(&outcome, "fio flip").starts_with("status 1 errors  first 84"), "{}", outcome.all());
    // A file system passes the error on, and shows nothing wrong before.
    assert!(fired(&outcome, 5, "write:after=300:chance=1/150:error=io") > 0);
    assert_eq!(said(&outcome, "fsx failing"), "status 5", "{}", outcome.all());
    // fio is told that its disk is gone; the same one that comes back is as good as new.
    let away = said(&outcome, "unplug fio");
    assert!(away.starts_with("status 1 ") && !away.ends_with(" 0"), "{away}\n{}", outcome.all());
    assert_eq!(said(&outcome, "unplug disk"), "gone", "{}", outcome.all());
    let again = said(&outcome, "fio again");
    assert!(again.starts_with("status 0 errors  first 0 written 2"), "{again}\n{}", outcome.all());
    assert!(
        !outcome.stdout.contains("WRONG") && !outcome.stdout.contains("failing failed"),
        "{}",
        outcome.all()
    );
}
