//! The bare guests of tests/guests: each checks one corner of the machine, and must find the same on both engines.

use tenon_tests::{Outcome, Tenon, bare, has_kvm};

/// Runs a guest that makes checks.
#[track_caller]
fn checks(guest: &str, engine: &str, vcpus: u32) -> Outcome {
    let outcome = Tenon::bare(guest, engine).args(["--cpus", &vcpus.to_string()]).outcome();
    let bad: Vec<&str> = outcome.stdout.lines().filter(|line| line.starts_with("FAIL")).collect();
    assert!(bad.is_empty(), "{guest} on {engine}:\n{}\n{}", bad.join("\n"), outcome.stderr);
    assert_eq!(outcome.status, 0, "{guest} on {engine}: {}", outcome.all());
    let end = outcome.stdout.lines().last().unwrap_or_default();
    assert!(end.ends_with("checks, 0 failed"), "{guest} on {engine}: {}", outcome.all());
    outcome
}

macro_rules! guests {
    ($($name:ident: $guest:literal, $vcpus:literal;)+) => {
        mod soft {
            $(#[test] fn $name() { super::checks($guest, "soft", $vcpus); })+
        }
        mod kvm_agrees_with_soft {
            $(#[test] fn $name() {
                if super::has_kvm() {
                    let kvm = super::checks($guest, "kvm", $vcpus);
                    assert_eq!(kvm.stdout, super::checks($guest, "soft", $vcpus).stdout);
                }
            })+
        }
    };
}

guests! {
    exceptions: "exceptions", 1;
    page_faults: "paging", 1;
    real_protected_and_long_mode: "modes", 1;
    interrupts_and_timers: "interrupts", 1;
    registers_and_unclaimed_addresses: "ports", 1;
    self_modifying_code: "selfmodify", 1;
    code_modified_by_another_vcpu: "selfmodify", 2;
    one_vcpu: "smp", 1;
    two_vcpus: "smp", 2;
    four_vcpus: "smp", 4;
    sixteen_vcpus: "smp", 16;
}

#[test]
fn gates_and_system_calls_on_the_software_engine() {
    checks("gates", "soft", 1);
}

#[test]
fn gates_and_system_calls_on_kvm() {
    // A host that runs guest kernels at hardware speed runs these as hardware does; others do not.
    if has_kvm() && runs_kernels_on_kvm() {
        checks("gates", "kvm", 1);
    }
}

/// Whether `--engine auto` takes KVM here; if not, says that the test is not run.
fn runs_kernels_on_kvm() -> bool {
    let outcome = Tenon::bare("first", "auto").outcome();
    assert_eq!(outcome.status, 0, "{}", outcome.all());
    let is_fast = outcome.summary["engine"] == "kvm";
    if !is_fast {
        println!("not run: {}", outcome.summary["engine_reason"]);
    }
    is_fast
}

#[test]
fn sixty_four_vcpus_start_on_the_software_engine() {
    checks("smp", "soft", 64);
}

#[test]
fn bare_guests_find_the_same_when_time_is_counted_in_instructions() {
    for (guest, vcpus) in [("exceptions", "1"), ("interrupts", "1"), ("smp", "3")] {
        let run = || {
            let run = Tenon::bare(guest, "soft").args(["--clock", "icount", "--cpus", vcpus]).outcome();
            assert_eq!(run.status, 0, "{guest}: {}", run.all());
            run
        };
        let (first, second) = (run(), run());
        assert_eq!(first.stdout, second.stdout, "{guest}");
        let count = first.summary["instructions"].as_u64();
        assert!(count.is_some_and(|count| count > 1000), "{guest}: {}", first.summary);
        assert_eq!(count, second.summary["instructions"].as_u64(), "{guest}");
    }
}

#[test]
fn the_guests_exit_status_is_that_of_tenon() {
    let outcome = Tenon::bare("first", "soft").outcome();
    assert_eq!(outcome.status, 0, "{}", outcome.all());
    assert_eq!(outcome.summary["status"], 0);
}

#[test]
fn a_reset_ends_with_status_3() {
    let outcome = Tenon::bare("reset", "soft").outcome();
    assert_eq!(outcome.status, 3, "{}", outcome.all());
    assert_eq!(outcome.stdout, "resetting\n");
    assert_eq!(outcome.summary["end"], "reset");
}

#[test]
fn a_reset_starts_the_guest_again_where_that_is_wanted() {
    let outcome =
        Tenon::bare("reset", "soft").args(["--on-reset", "restart"]).until("resetting\n", 3).outcome();
    assert_eq!(outcome.status, 143, "{}", outcome.all());
    assert!(outcome.stdout.starts_with("resetting\nresetting\nresetting\n"), "{}", outcome.all());
}

/// Runs a raw image on both engines.
#[track_caller]
fn raw_image_ends_with(image: &[u8], mode: &str, status: i32) {
    for engine in ["soft", "kvm"] {
        if engine == "soft" || has_kvm() {
            let outcome = Tenon::raw(image, mode, engine).outcome();
            assert_eq!(outcome.status, status, "{engine}: {}", outcome.all());
        }
    }
}

#[test]
fn a_raw_image_runs_in_real_mode() {
    #[rustfmt::skip]
    let image = [
        0xb8, 0xc0, 0x07,       // mov ax, 0x7c0
        0x8e, 0xc0,             // mov es, ax
        0x0f, 0x01, 0xe1,       // smsw cx
        0x83, 0xe1, 0x01,       // and cx, 1: 0 in real mode
        0x26, 0xa0, 0x16, 0x00, // mov al, es:[0x16]: the last byte
        0x00, 0xc8,             // add al, cl
        0xe6, 0xf4,             // out 0xf4, al
        0xf4,                   // hlt
        0xeb, 0xfd,             // jmp to hlt
        42,
    ];
    raw_image_ends_with(&image, "real", 42);
}

#[test]
fn a_raw_image_runs_in_protected_mode() {
    #[rustfmt::skip]
    let image = [
        0x0f, 0x01, 0xe1,                   // smsw ecx
        0x83, 0xe1, 0x01,                   // and ecx, 1: 1 in protected mode
        0xa0, 0x12, 0x00, 0x10, 0x00,       // mov al, [0x100012]: the last byte
        0x00, 0xc8,                         // add al, cl
        0xe6, 0xf4,                         // out 0xf4, al
        0xf4,                               // hlt
        0xeb, 0xfd,                         // jmp to hlt
        42,
    ];
    raw_image_ends_with(&image, "protected", 43);
}

#[test]
fn the_ways_of_a_pc_to_reset_end_with_status_3() {
    // jmp 0xf000:0xfff0
    raw_image_ends_with(&[0xea, 0xf0, 0xff, 0x00, 0xf0], "real", 3);
    // mov al, 0xfe; out 0x64, al; hlt; jmp to hlt
    raw_image_ends_with(&[0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd], "real", 3);
}

#[test]
fn a_signal_ends_a_guest_that_never_would() {
    let outcome = Tenon::bare("spin", "soft").args(["--cpus", "2"]).until("spinning\n", 1).outcome();
    assert_eq!(outcome.status, 143, "{}", outcome.all());
    assert_eq!(outcome.summary["end"]["stopped"], "SIGTERM", "{}", outcome.summary);
}

#[test]
fn unclaimed_addresses_are_counted_and_logged_once() {
    let outcome = Tenon::bare("ports", "soft").args(["--log", "debug"]).outcome();
    assert_eq!(outcome.status, 0, "{}", outcome.all());
    let count = outcome.summary["unclaimed_accesses"].as_u64();
    assert!(count.is_some_and(|count| count >= 13), "{}", outcome.summary);
    let lines = outcome.stderr.lines().filter(|line| line.contains("0x5000")).count();
    assert_eq!(lines, 1, "{}", outcome.all());
}

#[test]
fn a_native_library_of_the_same_source_behaves_the_same() {
    let component = checks("ports", "soft", 1);
    let native =
        Tenon::bare("ports", "soft").args(["--allow-native", "serial", "--allow-native", "rtc"]).outcome();
    assert_eq!(native.status, 0, "{}", native.all());
    assert_eq!(component.stdout, native.stdout);
    assert_eq!(native.summary["devices"][0]["form"], "native", "{}", native.summary);
    assert_eq!(component.summary["devices"][0]["form"], "wasm", "{}", component.summary);
}

/// Random accesses by a guest with one of every device.
#[track_caller]
fn survives_random_accesses(engine: &str, seed: u32, steps: u32) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let place = folder.path().display();
    let outcome = Tenon::run()
        .args([
            "--engine",
            engine,
            "--memory",
            "128M",
            "--device",
            "exit",
            "--device",
            "virtio-console,ports=a",
        ])
        .args([
            "--device",
            "virtio-rng",
            "--device",
            "virtio-balloon",
            "--disk",
            "memory:1M",
            "--net",
            "user",
            "--vsock",
            &format!("{place}/socket"),
            "--share",
            &format!("{place}"),
        ])
        .args(["--cmdline", &format!("seed={seed} steps={steps}"), "--kernel"])
        .arg(bare("random"))
        .outcome();
    assert_eq!(outcome.status, 0, "{engine}, seed {seed}: {}", outcome.all());
    assert!(outcome.stdout.ends_with("2 checks, 0 failed\n"), "{engine}, seed {seed}: {}", outcome.all());
    assert!(!outcome.stderr.contains("panicked"), "{engine}, seed {seed}: {}", outcome.all());
    // Every plugin that has registers was reached, and none broke.
    for device in outcome.summary["devices"].as_array().expect("devices") {
        let (calls, faults) = (device["calls"].as_u64(), device["faults"].as_u64());
        let reached = calls > Some(0) || device["plugin"] == "virtio-rng" || engine == "kvm";
        assert!(reached && faults == Some(0), "{engine}, seed {seed}: {}", outcome.all());
    }
}

#[test]
fn random_accesses_to_ports_device_memory_and_registers_harm_nobody() {
    for seed in 1..=6 {
        survives_random_accesses("soft", seed, 100_000);
    }
    if has_kvm() {
        survives_random_accesses("kvm", 7, 20_000);
    }
}
