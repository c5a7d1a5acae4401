//! What users, images and plugins get wrong: an error that names the thing, status 1 or 2 (usage), and nothing left behind.

use std::fs;
use std::path::PathBuf;

use tenon_tests::{Outcome, Tenon, bundled, debian, test_plugins};

/// `tenon run` with Debian's kernel, on the software engine.
fn linux() -> Tenon {
    Tenon::run().args(["--engine", "soft", "--kernel"]).arg(debian("vmlinuz"))
}

/// `tenon run` with this file as the kernel.
fn image(bytes: &[u8]) -> Outcome {
    let tenon = Tenon::run().args(["--engine", "soft"]);
    let file = tenon.file("image", bytes);
    tenon.arg("--kernel").arg(file).outcome()
}

#[test]
fn a_missing_image_is_named() {
    let outcome = Tenon::run().args(["--kernel", "/nowhere/vmlinuz"]).outcome();
    outcome.refused(1, &["/nowhere/vmlinuz", "No such file"]);
    let outcome = linux().args(["--initrd", "/nowhere/initrd"]).outcome();
    outcome.refused(1, &["/nowhere/initrd", "No such file"]);
}

#[test]
fn a_folder_is_no_image() {
    Tenon::run().args(["--kernel", "/usr"]).outcome().refused(1, &["/usr"]);
}

#[test]
fn an_empty_image_is_refused() {
    image(b"").refused(1, &["linux"]);
}

#[test]
fn a_truncated_kernel_is_refused() {
    let kernel = fs::read(debian("vmlinuz")).unwrap();
    for length in [600, 4096, kernel.len() / 2] {
        image(&kernel[..length]).refused(1, &["linux"]);
    }
    let elf = fs::read(debian("vmlinux")).unwrap();
    for length in [64, 4096, elf.len() / 2] {
        image(&elf[..length]).refused(1, &["linux"]);
    }
}

#[test]
fn something_else_than_a_kernel_is_refused() {
    image(b"#!/bin/sh\necho hello\n").refused(1, &["linux"]);
    image(&[0xff; 100_000]).refused(1, &["linux"]);
    image(&fs::read("/proc/self/exe").unwrap()).refused(1, &["linux"]);
}

#[test]
fn a_damaged_payload_is_refused() {
    let mut kernel = fs::read(debian("vmlinuz")).unwrap();
    let middle = kernel.len() / 2;
    for byte in &mut kernel[middle..middle + 4096] {
        *byte ^= 0x5a;
    }
    image(&kernel).refused(1, &["linux"]);
}

#[test]
fn an_image_larger_than_memory_is_refused() {
    linux().args(["--memory", "16M"]).outcome().refused(1, &["memory"]);
    let tenon = Tenon::run().args(["--engine", "soft", "--memory", "64M"]);
    let big = tenon.file("big", &vec![0; 80 << 20]);
    tenon.arg("--kernel").arg(debian("vmlinuz")).arg("--initrd").arg(big).outcome().refused(1, &["initrd"]);
}

#[test]
fn memory_of_no_size_is_a_usage_error() {
    for size in ["0", "12X", "-1", "1024T", "99999999999999999999G"] {
        let outcome = linux().arg(format!("--memory={size}")).outcome();
        outcome.refused(2, &["--memory"]);
    }
}

#[test]
fn the_number_of_vcpus_is_1_to_64() {
    for number in ["0", "65", "-1", "many"] {
        linux().arg(format!("--cpus={number}")).outcome().refused(2, &["--cpus", number]);
    }
}

#[test]
fn an_unknown_option_is_a_usage_error() {
    linux().arg("--kernal=x").outcome().refused(2, &["--kernal"]);
    Tenon::run().outcome().refused(2, &["--kernel"]);
}

#[test]
fn kvm_cannot_count_instructions() {
    let outcome = Tenon::run()
        .args(["--engine", "kvm", "--clock", "icount", "--kernel"])
        .arg(debian("vmlinuz"))
        .outcome();
    outcome.refused(2, &["icount", "kvm"]);
}

#[test]
fn kvm_is_named_where_there_is_none() {
    if let Some(tenon) = Tenon::bare("first", "kvm").without_kvm() {
        tenon.outcome().refused(1, &["/dev/kvm", "the device does not exist"]);
    }
}

#[test]
fn an_unknown_plugin_is_named_with_those_that_there_are() {
    linux().args(["--device", "beeper"]).outcome().refused(2, &["beeper", "serial", "rtc"]);
    linux().args(["--personality", "windows"]).outcome().refused(2, &["windows", "linux", "flat"]);
}

#[test]
fn an_unknown_setting_is_named_with_those_that_there_are() {
    linux().args(["--device", "serial,colour=red"]).outcome().refused(2, &["colour", "base"]);
    linux().args(["--device", "serial,base=high"]).outcome().refused(2, &["base", "high"]);
}

#[test]
fn overlapping_claims_name_both_devices() {
    let outcome = linux().args(["--device", "exit,base=0x3fc"]).outcome();
    outcome.refused(1, &["exit", "serial", "0x3f"]);
}

#[test]
fn a_device_is_no_personality_and_the_other_way_round() {
    linux().args(["--personality", "serial"]).outcome().refused(1, &["serial", "device"]);
    linux().args(["--device", "flat"]).outcome().refused(1, &["flat", "personality"]);
}

#[test]
fn a_native_plugin_needs_permission() {
    let tenon = linux();
    let manifest = fs::read(bundled("exit").join("plugin.toml")).unwrap();
    let library = fs::read(bundled("exit").join("plugin.so")).unwrap();
    let folder = tenon.file("only-native/plugin.toml", &manifest);
    let _ = tenon.file("only-native/plugin.so", &library);
    tenon.arg("--device").arg(folder.parent().unwrap()).outcome().refused(1, &["exit", "--allow-native"]);
}

#[test]
fn permission_for_a_plugin_that_is_not_there_is_a_usage_error() {
    linux().args(["--allow-native", "beeper"]).outcome().refused(2, &["beeper"]);
}

/// A copy of the exit device with one of its files changed, given to a machine.
fn broken(file: &str, change: impl Fn(Vec<u8>) -> Vec<u8>) -> Outcome {
    let tenon = linux();
    let mut folder = PathBuf::new();
    for name in ["plugin.toml", "plugin.wasm"] {
        let bytes = fs::read(bundled("exit").join(name)).expect("a bundled plugin");
        let bytes = if name == file { change(bytes) } else { bytes };
        folder = tenon.file(&format!("broken/{name}"), &bytes);
        folder.pop();
    }
    tenon.arg("--device").arg(folder).outcome()
}

#[test]
fn a_corrupt_component_is_refused() {
    broken("plugin.wasm", |bytes| bytes[..bytes.len() / 2].to_vec()).refused(1, &["plugin.wasm", "broken"]);
    broken("plugin.wasm", |_| b"\0asm garbage".to_vec()).refused(1, &["plugin.wasm", "broken"]);
    broken("plugin.wasm", |_| Vec::new()).refused(1, &["plugin.wasm", "broken"]);
}

#[test]
fn a_wrong_contract_version_names_both() {
    let outcome = broken("plugin.toml", |bytes| {
        String::from_utf8(bytes).unwrap().replace("api = \"0.1.0\"", "api = \"7.3.0\"").into_bytes()
    });
    outcome.refused(1, &["7.3.0", "0.1.0"]);
}

#[test]
fn an_import_without_permission_is_named() {
    let outcome = broken("plugin.toml", |bytes| {
        String::from_utf8(bytes).unwrap().replace("\"machine-control\"", "").into_bytes()
    });
    outcome.refused(1, &["machine-control", "exit"]);
}

#[test]
fn a_damaged_manifest_is_refused() {
    broken("plugin.toml", |_| b"id = ".to_vec()).refused(1, &["plugin.toml"]);
    broken("plugin.toml", |_| b"colour = 'red'\n".to_vec()).refused(1, &["plugin.toml"]);
}

/// The misbehaving device in a machine whose guest arms it, uses it, and then checks that the rest of the machine works.
fn misdeed(misdeed: &str, when: &str) -> Outcome {
    let device = format!("misdeed,misdeed={misdeed},when={when}");
    Tenon::bare("misdeed", "soft")
        .arg("--plugin-dir")
        .arg(test_plugins())
        .args(["--device", &device, "--log", "info"])
        .outcome()
}

#[test]
fn a_component_that_spins_or_traps_before_the_guest_runs_is_refused() {
    for what in ["spin", "trap"] {
        for when in ["describe", "start"] {
            misdeed(what, when).refused(1, &["misdeed", when]);
        }
    }
}

#[test]
fn a_component_that_spins_or_traps_in_a_register_read_does_not_end_the_machine() {
    for what in ["spin", "trap"] {
        let outcome = misdeed(what, "read");
        assert_eq!(outcome.status, 0, "{}", outcome.all());
        assert!(outcome.stdout.contains("the machine goes on"), "{}", outcome.all());
        let devices = outcome.summary["devices"].as_array().unwrap();
        let device = devices.iter().find(|device| device["plugin"] == "misdeed").unwrap();
        assert!(device["faults"].as_u64() > Some(0), "the misdeed did not happen: {device}");
    }
}

#[test]
fn a_component_that_spins_or_traps_in_save_does_not_end_the_machine() {
    for what in ["spin", "trap"] {
        let outcome = misdeed(what, "save");
        assert_eq!(outcome.status, 0, "{}", outcome.all());
        assert!(outcome.stdout.contains("the machine goes on"), "{}", outcome.all());
        let devices = outcome.summary["devices"].as_array().unwrap();
        let device = devices.iter().find(|device| device["plugin"] == "misdeed").unwrap();
        assert!(device["faults"].as_u64() > Some(0), "the misdeed did not happen: {device}");
    }
}

#[test]
fn a_triple_fault_says_where() {
    let outcome = Tenon::bare("triple", "soft").outcome();
    outcome.refused(1, &["triple fault", "vCPU 0", "rip", "0f 0b"]);
}

#[test]
fn a_device_without_what_it_works_on_is_refused_with_the_option_that_gives_it() {
    let tenon = linux();
    let disk = format!("file:{}", tenon.file("disk.img", &[0; 4096]).display());
    for (words, named) in [
        (["--device", "virtio-blk"], &["needs a store", "--disk"][..]),
        (["--device", "virtio-net"], &["needs a network port", "--net"]),
        (["--device", "virtio-fs,tag=a"], &["needs a folder", "--share"]),
        (["--disk", &format!("{disk},device=virtio-rng")], &["virtio-rng", "no use for a store"]),
        (["--disk", &format!("{disk},device=serial")], &["--disk", "serial", "no virtio device"]),
        (["--disk", &format!("{disk},device=none-such")], &["none-such"]),
        (["--net", "user,color=red"], &["color", "forward", "queues"]),
        (["--net", "user,queues=70000"], &["queues"]),
        (["--net", "user,forward=0:22"], &["forward", "port 0"]),
    ] {
        linux().args(words).outcome().refused(2, named);
    }
}
