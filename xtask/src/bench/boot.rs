//! Debian's kernel to its shell on one vCPU, with the software engine and with QEMU's TCG: same kernel, initramfs and command line.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde::Serialize;

use super::{median, summary_of, tenon, write};
use crate::demo::{COMMAND_LINE, READY};
use crate::guests::{self, Debian};
use crate::process::{command, shown};

/// How many seconds the peer may take.
const LIMIT: &str = "60";

#[derive(Serialize)]
struct Report {
    kernel: String,
    tenon_seconds: f64,
    qemu_seconds: f64,
    ratio: f64,
    million_instructions: f64,
    million_instructions_per_second: f64,
}

pub(super) fn run(rounds: u32) -> Result<()> {
    let debian = guests::debian(false)?;
    let (mut tenons, mut qemus) = (Vec::new(), Vec::new());
    for round in 1..=rounds {
        let tenon = seconds_to_shell(&mut tenon_boot(&debian)?)?;
        tenons.push(tenon);
        match seconds_to_shell(&mut qemu_boot(&debian)) {
            Ok(qemu) => {
                qemus.push(qemu);
                eprintln!("bench: round {round}: tenon {tenon:.2} s, QEMU {qemu:.2} s");
            }
            // QEMU 7.2's microvm now and then does not start this kernel.
            Err(error) => {
                eprintln!("bench: round {round}: tenon {tenon:.2} s; QEMU is not counted: {error:#}")
            }
        }
    }
    if qemus.is_empty() {
        bail!("QEMU never reached the guest's shell");
    }
    let summary = summary_of(&mut tenon_boot(&debian)?)?;
    let million = summary.instructions.unwrap_or(0) as f64 / 1e6;
    let (ours, theirs) = (median(tenons), median(qemus));
    let report = Report {
        kernel: debian.release,
        tenon_seconds: ours,
        qemu_seconds: theirs,
        ratio: ours / theirs,
        million_instructions: million,
        million_instructions_per_second: million / (summary.run_ms / 1e3),
    };
    println!(
        "Debian {} to its shell, 1 vCPU, median of {rounds}: tenon (soft) {ours:.2} s, QEMU TCG {theirs:.2} s, ratio {:.2}; \
         {million:.0} M instructions at {:.0} MIPS",
        report.kernel, report.ratio, report.million_instructions_per_second
    );
    write("boot", &report)
}

fn tenon_boot(debian: &Debian) -> Result<Command> {
    let mut command = tenon()?;
    command
        .args([
            "--engine",
            "soft",
            "--memory",
            "512M",
            "--cmdline",
            &format!("{COMMAND_LINE} tenon.do=poweroff"),
        ])
        .arg("--kernel")
        .arg(&debian.vmlinuz)
        .arg("--initrd")
        .arg(&debian.initramfs);
    Ok(command)
}

fn qemu_boot(debian: &Debian) -> Command {
    let mut command = command("timeout");
    command
        .args([
            LIMIT,
            "qemu-system-x86_64",
            "-M",
            "microvm",
            "-accel",
            "tcg",
            "-cpu",
            "max",
            "-m",
            "512",
            "-nographic",
            "-no-reboot",
            "-append",
        ])
        .arg(format!("{COMMAND_LINE} tenon.do=poweroff"))
        .arg("-kernel")
        .arg(&debian.vmlinuz)
        .arg("-initrd")
        .arg(&debian.initramfs)
        .stdin(Stdio::null());
    command
}

/// From the start of the process until the guest says that its shell runs. Waits for the power-off.
fn seconds_to_shell(command: &mut Command) -> Result<f64> {
    let started = Instant::now();
    let mut process = command
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot start `{}`", shown(command)))?;
    let console = process.stdout.take().context("no console")?;
    let mut seconds = None;
    for line in BufReader::new(console).split(b'\n') {
        if seconds.is_none() && line?.windows(READY.len()).any(|part| part == READY.as_bytes()) {
            seconds = Some(started.elapsed().as_secs_f64());
        }
    }
    process.wait()?;
    match seconds {
        Some(seconds) => Ok(seconds),
        None => bail!("`{}` did not reach the guest's shell", shown(command)),
    }
}
