//! The kernel of Debian's `linux-image-cloud-amd64`, as `cargo xtask guests` puts it into the cache.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::path::PathBuf;

use support::{Look, MIB};
use tenon_personality_linux::Linux;
use tenon_sdk::personality::CpuState;
use tenon_testkit::{LoadBench, Loaded};

/// A file among the guests of `$TENON_GUESTS` or `~/.cache/tenon/guests`.
fn guest(name: &str) -> Option<Vec<u8>> {
    let folder = std::env::var_os("TENON_GUESTS").map(PathBuf::from).or_else(|| {
        let home = std::env::var_os("HOME")?;
        Some(PathBuf::from(home).join(".cache/tenon/guests"))
    });
    let file = folder?.join(name);
    let found = std::fs::read(&file).ok();
    if found.is_none() {
        println!("not run: {} is not there; `cargo xtask guests` makes it", file.display());
    }
    found
}

/// What both images of the same kernel must lead to.
fn check(kernel: Vec<u8>, summary_end: &str) -> Loaded {
    let bench = LoadBench::new(256 * MIB)
        .image("kernel", kernel)
        .image("initrd", vec![7; 12_345])
        .option("cmdline", "console=ttyS0");
    let before = std::time::Instant::now();
    let guest = bench.load::<Linux>().unwrap();
    let boot = &guest.boot;
    println!("{} in {:?}", boot.summary, before.elapsed());
    assert!(boot.summary.starts_with("Linux 6."), "{}", boot.summary);
    assert!(boot.summary.ends_with(summary_end), "{}", boot.summary);
    let start = boot.vcpu.general[CpuState::RBX];
    assert_eq!(guest.u32(start), 0x336e_c578);
    assert_eq!(guest.text(guest.u64(start + 24)), "console=ttyS0");
    guest
}

#[test]
fn debians_bzimage_boots_by_pvh_and_equals_its_elf_image() {
    let (Some(packed), Some(plain)) = (guest("vmlinuz"), guest("vmlinux")) else {
        return;
    };
    let packed = check(packed, "-cloud-amd64 (bzImage, lz4, PVH)");
    let plain = check(plain, "-cloud-amd64 (ELF, PVH)");
    let (from, to) = (16 * MIB, 64 * MIB);
    let length = usize::try_from(to - from).unwrap();
    assert!(packed.memory(from, length) == plain.memory(from, length), "the same kernel in memory");
}

#[test]
fn debians_bzimage_boots_by_its_own_entries_when_told_to() {
    let Some(packed) = guest("vmlinuz") else {
        return;
    };
    let bench = LoadBench::new(256 * MIB).image("kernel", packed).option("protocol", "linux64");
    let guest = bench.load::<Linux>().unwrap();
    let boot = &guest.boot;
    assert!(boot.summary.ends_with("(bzImage, lz4, 64-bit entry)"), "{}", boot.summary);
    assert_eq!(boot.vcpu.rip, 16 * MIB);
    assert_eq!(guest.memory(boot.vcpu.general[CpuState::RSI] + 0x202, 4), b"HdrS");
}
