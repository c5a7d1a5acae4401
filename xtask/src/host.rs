//! What a chore needs of the host, and how it gets it.
//!
//! Programs come from Debian packages, installed by apt-get when this runs as root; otherwise the message says what to type.
//! Rust targets and components come from rustup. Nothing is installed silently.

use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::process::{capture, command, run};

/// A program and the Debian package that has it.
struct Tool {
    program: &'static str,
    package: &'static str,
}

/// What building and testing needs.
const TOOLS: [Tool; 3] = [
    Tool { program: "cc", package: "gcc" },
    Tool { program: "apt-get", package: "apt" },
    Tool { program: "dpkg-deb", package: "dpkg" },
];
/// What `bench` compares with.
const PEER: Tool = Tool { program: "qemu-system-x86_64", package: "qemu-system-x86" };
/// What some tests have look at images, recordings and system calls.
const WITNESSES: [Tool; 3] = [
    Tool { program: "qemu-img", package: "qemu-utils" },
    Tool { program: "strace", package: "strace" },
    Tool { program: "tcpdump", package: "tcpdump" },
];
/// What makes the Debian disk.
const DISK_TOOLS: [Tool; 4] = [
    Tool { program: "mmdebstrap", package: "mmdebstrap" },
    Tool { program: "fakeroot", package: "fakeroot" },
    Tool { program: "mke2fs", package: "e2fsprogs" },
    Tool { program: "ssh-keygen", package: "openssh-client" },
];
/// What puts a boot loader before it.
const BOOT_DISK_TOOLS: [Tool; 2] =
    [Tool { program: "mformat", package: "mtools" }, Tool { program: "sfdisk", package: "fdisk" }];
/// A C library's headers and start files have no program by which to find them.
const LIBC: (&str, &str) = ("/usr/include/stdio.h", "libc6-dev");
/// What plugins, bare guests, and programs of the Debian guest are compiled for.
const TARGETS: [&str; 3] = ["wasm32-unknown-unknown", "x86_64-unknown-none", "x86_64-unknown-linux-musl"];
const COMPONENTS: [&str; 2] = ["clippy", "rustfmt"];

/// Installs what building and testing lacks.
///
/// # Errors
/// Something is missing and cannot be installed.
pub(crate) fn prepare() -> Result<()> {
    let mut missing = lacking(&TOOLS);
    if !Path::new(LIBC.0).exists() {
        missing.push(LIBC.1);
    }
    install(&missing)?;
    rustup("target", &TARGETS)?;
    rustup("component", &COMPONENTS)
}

/// Installs the program that benchmarks compare with.
///
/// # Errors
/// As [`prepare`].
pub(crate) fn prepare_peer() -> Result<()> {
    install(&lacking(&[PEER]))
}

/// Installs the programs of others that some tests ask for their opinion.
///
/// # Errors
/// As [`prepare`].
pub(crate) fn prepare_tests() -> Result<()> {
    prepare()?;
    install(&lacking(&WITNESSES))
}

/// Installs what making the Debian disk lacks.
///
/// # Errors
/// As [`prepare`].
pub(crate) fn prepare_disk() -> Result<()> {
    install(&lacking(&DISK_TOOLS))
}

/// Installs what making the Debian disk that boots by itself lacks.
///
/// # Errors
/// As [`prepare`].
pub(crate) fn prepare_boot_disk() -> Result<()> {
    install(&lacking(&BOOT_DISK_TOOLS))
}

/// Makes sure that apt knows which packages exist.
///
/// # Errors
/// It does not, and this user may not change that.
pub(crate) fn package_lists() -> Result<()> {
    let known = capture(command("apt-cache").args(["policy", "busybox-static"])).unwrap_or_default();
    if known.contains("Candidate:") && !known.contains("Candidate: (none)") {
        return Ok(());
    }
    if !is_root() {
        bail!("apt knows no packages yet; run `sudo apt-get update` and try again");
    }
    eprintln!("host: apt-get update");
    run(command("apt-get").args(["-qq", "update"]))
}

/// Whether a program is on the search path.
pub(crate) fn has_program(name: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(name).is_file()))
}

fn is_root() -> bool {
    capture(command("id").arg("-u")).is_ok_and(|id| id.trim() == "0")
}

/// The packages of those that are not there.
fn lacking(tools: &[Tool]) -> Vec<&'static str> {
    tools.iter().filter(|tool| !has_program(tool.program)).map(|tool| tool.package).collect()
}

fn install(packages: &[&str]) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    let list = packages.join(" ");
    if !has_program("apt-get") {
        bail!("missing on this host: {list} (names of Debian packages); install them and try again");
    }
    if !is_root() {
        bail!("missing on this host; run `sudo apt-get install {list}` and try again");
    }
    package_lists()?;
    eprintln!("host: apt-get install {list}");
    run(command("apt-get")
        .env("DEBIAN_FRONTEND", "noninteractive")
        .args(["-qq", "-y", "--no-install-recommends", "install"])
        .args(packages))
}

/// Adds what is missing of `wanted`, each a target or a component.
fn rustup(kind: &str, wanted: &[&str]) -> Result<()> {
    if !has_program("rustup") {
        eprintln!("host: no rustup here; Rust's {kind}s {} are taken for granted", wanted.join(", "));
        return Ok(());
    }
    let there = capture(command("rustup").args([kind, "list", "--installed"]))
        .with_context(|| format!("cannot list rustup's {kind}s"))?;
    // Components are listed with the host's triple behind their name.
    let missing: Vec<&&str> =
        wanted.iter().filter(|name| !there.lines().any(|line| line.starts_with(**name))).collect();
    for name in missing {
        eprintln!("host: rustup {kind} add {name}");
        run(command("rustup").args([kind, "add", name]))?;
    }
    Ok(())
}
