//! An unmodified Debian kernel on the software engine: to its shell, under load, off, and around again.

use tenon_tests::{Outcome, PROMPT, Tenon, debian, has_kvm};

const READY: &str = "TENON-GUEST-READY";

#[track_caller]
fn reaches_its_shell(outcome: &Outcome) {
    assert!(outcome.stdout.contains(READY), "{}", outcome.all());
}

#[test]
fn debian_reaches_its_shell_and_powers_off() {
    let outcome = Tenon::debian("poweroff").outcome();
    assert_eq!(outcome.status, 0, "{}", outcome.all());
    reaches_its_shell(&outcome);
    assert_eq!(outcome.summary["end"], "power-off");
    assert!(outcome.stdout.contains("Linux (none) 6."), "{}", outcome.all());
    assert!(outcome.stdout.contains("cpus: 1\n"), "{}", outcome.all());
}

#[test]
fn the_unpacked_kernel_boots_too() {
    let outcome = Tenon::run()
        .args(["--engine", "soft", "--cmdline"])
        .arg(format!("{} tenon.do=poweroff", tenon_tests::LINUX_COMMAND_LINE))
        .arg("--kernel")
        .arg(debian("vmlinux"))
        .arg("--initrd")
        .arg(debian("initramfs.cpio.gz"))
        .outcome();
    assert_eq!(outcome.status, 0, "{}", outcome.all());
    reaches_its_shell(&outcome);
}

#[track_caller]
fn carries_a_load(vcpus: u32) {
    let outcome = Tenon::debian("load").args(["--cpus", &vcpus.to_string()]).within(300).outcome();
    assert!(outcome.stdout.contains(&format!("cpus: {vcpus}\n")), "{}", outcome.all());
    assert!(outcome.stdout.contains(&format!("TENON-LOAD-OK {vcpus}\n")), "{}", outcome.all());
    assert_eq!(outcome.status, 0, "{}", outcome.all());
}

#[test]
fn one_vcpu_carries_a_load() {
    carries_a_load(1);
}

#[test]
fn two_vcpus_carry_a_load() {
    carries_a_load(2);
}

#[test]
fn four_vcpus_carry_a_load() {
    carries_a_load(4);
}

#[test]
fn sixteen_vcpus_carry_a_load() {
    carries_a_load(16);
}

#[test]
fn a_reboot_ends_with_status_3() {
    let outcome = Tenon::plain_debian().typing(PROMPT, "cat /proc/cmdline; reboot -f\n").outcome();
    assert_eq!(outcome.status, 3, "{}", outcome.all());
    assert!(outcome.stdout.contains("\nconsole=ttyS0\n"), "{}", outcome.all());
    assert_eq!(outcome.summary["end"], "reset");
}

#[test]
fn a_reboot_by_the_reset_register_or_the_keyboard_controller_ends_with_status_3() {
    for way in ["acpi", "kbd"] {
        let outcome = Tenon::debian(&format!("reboot reboot={way}")).outcome();
        reaches_its_shell(&outcome);
        assert_eq!(outcome.status, 3, "{way}: {}", outcome.all());
    }
}

#[test]
fn a_kernel_panic_ends_with_status_3() {
    let outcome = Tenon::debian("shell").typing(PROMPT, "echo c > /proc/sysrq-trigger\n").outcome();
    assert!(outcome.stdout.contains("Kernel panic"), "{}", outcome.all());
    assert_eq!(outcome.status, 3, "{}", outcome.all());
}

#[test]
fn debian_reboots_three_times_and_then_powers_off() {
    let outcome = Tenon::plain_debian()
        .args(["--cpus", "2", "--on-reset", "restart"])
        .typing(PROMPT, "reboot -f\n")
        .typing(PROMPT, "reboot -f\n")
        .typing(PROMPT, "reboot -f\n")
        .typing(PROMPT, "poweroff -f\n")
        .outcome();
    assert_eq!(outcome.status, 0, "{}", outcome.all());
    assert_eq!(outcome.stdout.matches(READY).count(), 4, "{}", outcome.all());
    assert_eq!(outcome.stdout.matches("cpus: 2\n").count(), 4, "{}", outcome.all());
}

#[test]
fn the_shell_answers_what_is_typed() {
    let outcome =
        Tenon::debian("shell quiet").typing("tenon-guest:/# ", "echo $((6 * 7))\npoweroff -f\n").outcome();
    assert_eq!(outcome.status, 0, "{}", outcome.all());
    assert!(outcome.stdout.contains("\n42\n"), "{}", outcome.all());
}

#[test]
fn counting_instructions_gives_the_same_boot_twice() {
    let boot = || Tenon::debian("poweroff").args(["--clock", "icount"]).within(300).outcome();
    let (first, second) = (boot(), boot());
    reaches_its_shell(&first);
    assert_eq!(first.stdout, second.stdout);
    let count = first.summary["instructions"].as_u64();
    assert!(count.is_some_and(|count| count > 100_000_000), "{}", first.summary);
    assert_eq!(count, second.summary["instructions"].as_u64());
}

#[test]
fn the_console_can_be_a_file() {
    let tenon = Tenon::debian("poweroff");
    let file = tenon.file("console.log", b"");
    let outcome = tenon.arg("--console").arg(format!("file:{}", file.display())).outcome();
    assert_eq!(outcome.status, 0, "{}", outcome.all());
    assert_eq!(outcome.stdout, "");
}

#[test]
fn the_automatic_choice_of_an_engine_says_why() {
    if has_kvm() {
        let outcome = Tenon::run()
            .args(["--personality", "flat", "--device", "exit", "--kernel"])
            .arg(tenon_tests::bare("first"))
            .outcome();
        assert_eq!(outcome.status, 0, "{}", outcome.all());
        let why = outcome.summary["engine_reason"].as_str().unwrap_or_default();
        assert!(why.contains("instructions"), "{}", outcome.summary);
    }
}
