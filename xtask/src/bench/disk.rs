//! A whole Debian with systemd from a virtio disk to its login on two vCPUs: the software engine and QEMU's TCG with its own `virtio-blk`, same kernel, initramfs, disk and command line.

use std::io::Read;
use std::process::{ChildStdout, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;

use super::{median, tenon, write};
use crate::guests::{self, Disk};
use crate::host;
use crate::process::{command, shown};

/// What the kernel is told, as in the demo.
const COMMAND_LINE: &str = "console=ttyS0 root=/dev/vda rw mitigations=off tsc=reliable";
/// The console's question when the system is up.
const LOGIN: &[u8] = b"login:";
/// How long either may take.
const LIMIT: Duration = Duration::from_secs(300);

#[derive(Serialize)]
struct Report {
    tenon_seconds: f64,
    qemu_seconds: f64,
    ratio: f64,
}

pub(super) fn run(rounds: u32) -> Result<()> {
    host::prepare_disk()?;
    let disk = guests::disk(false)?;
    let (mut tenons, mut qemus) = (Vec::new(), Vec::new());
    for round in 1..=rounds {
        let tenon = seconds_to_login(&mut tenon_boot(&disk)?)?;
        let qemu = seconds_to_login(&mut qemu_boot(&disk))?;
        eprintln!("bench: round {round}: tenon {tenon:.1} s, QEMU {qemu:.1} s");
        tenons.push(tenon);
        qemus.push(qemu);
    }
    let (ours, theirs) = (median(tenons), median(qemus));
    let report = Report { tenon_seconds: ours, qemu_seconds: theirs, ratio: ours / theirs };
    println!(
        "Debian from a virtio disk to its login, 2 vCPUs, median of {rounds}: tenon (soft) {ours:.1} s, QEMU TCG {theirs:.1} s, ratio {:.2}",
        report.ratio
    );
    write("disk", &report)
}

fn tenon_boot(disk: &Disk) -> Result<Command> {
    let mut tenon = tenon()?;
    tenon.args([
        "--engine",
        "soft",
        "--cpus",
        "2",
        "--memory",
        "1G",
        "--net",
        "user",
        "--cmdline",
        COMMAND_LINE,
    ]);
    tenon.arg("--kernel").arg(&disk.kernel).arg("--initrd").arg(&disk.initramfs);
    tenon.arg("--disk").arg(format!("overlay:file:{}", disk.image.display()));
    Ok(tenon)
}

fn qemu_boot(disk: &Disk) -> Command {
    let mut qemu = command("qemu-system-x86_64");
    qemu.args(["-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max"]);
    qemu.args(["-smp", "2", "-m", "1024", "-display", "none", "-serial", "stdio", "-monitor", "none"]);
    qemu.args(["-nic", "user,model=virtio-net-pci", "-append", COMMAND_LINE]);
    qemu.arg("-kernel").arg(&disk.kernel).arg("-initrd").arg(&disk.initramfs);
    qemu.arg("-drive").arg(format!("if=virtio,format=raw,snapshot=on,file={}", disk.image.display()));
    qemu.stdin(Stdio::null());
    qemu
}

/// From the start of the process until the guest asks who logs in; then it is killed.
fn seconds_to_login(command: &mut Command) -> Result<f64> {
    let started = Instant::now();
    let mut process = command
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot start `{}`", shown(command)))?;
    let console = process.stdout.take().context("no console")?;
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        if has_login(console).unwrap_or(false) {
            // Nobody waits any more after the limit.
            let _ = sender.send(started.elapsed().as_secs_f64());
        }
    });
    let seconds = receiver.recv_timeout(LIMIT);
    process.kill()?;
    process.wait()?;
    seconds.with_context(|| format!("`{}` did not reach the login", shown(command)))
}

/// Reads a console until it asks who logs in, or ends.
fn has_login(mut console: ChildStdout) -> std::io::Result<bool> {
    let (mut said, mut more) = (Vec::new(), [0; 4096]);
    loop {
        let count = console.read(&mut more)?;
        said.extend_from_slice(&more[..count]);
        if count == 0 || said.windows(LOGIN.len()).any(|part| part == LOGIN) {
            return Ok(count != 0);
        }
        said.drain(..said.len().saturating_sub(LOGIN.len()));
    }
}
