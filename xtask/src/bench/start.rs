//! What a machine costs before it does anything: time from the start of the process to the guest's first instruction, and memory beyond the guest's.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result};
use serde::Serialize;

use super::{bare, median, summary_of, tenon, write};
use crate::process::{command, shown};

/// The guest's memory, in KiB as /proc has it.
const GUEST_KIB: u64 = 512 * 1024;

/// With these it has eight.
const MORE_DEVICES: [&str; 10] = [
    "--disk",
    "memory:16M",
    "--net",
    "user",
    "--device",
    "virtio-console",
    "--device",
    "virtio-rng",
    "--device",
    "virtio-balloon",
];

#[derive(Serialize)]
struct Report {
    engine: &'static str,
    tenon_first_instruction_ms: f64,
    tenon_process_ms: f64,
    qemu_process_ms: f64,
    tenon_beyond_guest_mib: f64,
    tenon_with_eight_devices_beyond_guest_mib: f64,
    qemu_beyond_guest_mib: f64,
}

pub(super) fn run(rounds: u32) -> Result<()> {
    let (first, spin) = (bare("first")?, bare("spin")?);
    let engines: &[&str] = if Path::new("/dev/kvm").exists() { &["kvm", "soft"] } else { &["soft"] };
    if engines.len() == 1 {
        println!("not run: kvm: there is no /dev/kvm here");
    }
    let mut reports = Vec::new();
    for engine in engines {
        // The compiled-code cache is warm from the second run on.
        summary_of(&mut tenon_with(engine, &first)?)?;
        let (mut starts, mut ours, mut theirs) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..rounds * 3 {
            let started = Instant::now();
            starts.push(summary_of(&mut tenon_with(engine, &first)?)?.start_ms);
            ours.push(started.elapsed().as_secs_f64() * 1e3);
            let started = Instant::now();
            let mut peer = qemu_with(engine, &first);
            peer.output().with_context(|| format!("cannot start `{}`", shown(&peer)))?;
            theirs.push(started.elapsed().as_secs_f64() * 1e3);
        }
        let report = Report {
            engine,
            tenon_first_instruction_ms: median(starts),
            tenon_process_ms: median(ours),
            qemu_process_ms: median(theirs),
            tenon_beyond_guest_mib: beyond_guest(&mut tenon_with(engine, &spin)?)?,
            tenon_with_eight_devices_beyond_guest_mib: beyond_guest(
                tenon_with(engine, &spin)?.args(MORE_DEVICES),
            )?,
            qemu_beyond_guest_mib: beyond_guest(&mut qemu_with(engine, &spin))?,
        };
        println!(
            "{engine}: first guest instruction after {:.1} ms; whole process {:.1} ms, QEMU microvm {:.1} ms, ratio {:.2}; \
             memory beyond the guest's {:.1} MiB (with eight devices {:.1} MiB), QEMU {:.1} MiB, ratio {:.2}",
            report.tenon_first_instruction_ms,
            report.tenon_process_ms,
            report.qemu_process_ms,
            report.tenon_process_ms / report.qemu_process_ms,
            report.tenon_beyond_guest_mib,
            report.tenon_with_eight_devices_beyond_guest_mib,
            report.qemu_beyond_guest_mib,
            report.tenon_beyond_guest_mib / report.qemu_beyond_guest_mib,
        );
        reports.push(report);
    }
    write("start", &reports)
}

/// A machine with three component devices.
fn tenon_with(engine: &str, guest: &Path) -> Result<Command> {
    let mut command = tenon()?;
    command.args([
        "--engine",
        engine,
        "--memory",
        "512M",
        "--device",
        "exit",
        "--personality",
        "flat",
        "--kernel",
    ]);
    command.arg(guest);
    Ok(command)
}

fn qemu_with(engine: &str, guest: &Path) -> Command {
    let accelerator = if engine == "kvm" { "kvm" } else { "tcg" };
    let mut command = command("qemu-system-x86_64");
    command
        .args(["-M", "microvm,rtc=on", "-accel", accelerator, "-m", "512", "-nographic", "-no-reboot"])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=1", "-kernel"])
        .arg(guest)
        .stdin(Stdio::null());
    command
}

/// MiB of resident memory but for the guest's, while the guest spins.
fn beyond_guest(command: &mut Command) -> Result<f64> {
    let mut process = command
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot start `{}`", shown(command)))?;
    let mut said = String::new();
    BufReader::new(process.stdout.take().context("no console")?).read_line(&mut said)?;
    let maps = fs::read_to_string(format!("/proc/{}/smaps", process.id()));
    process.kill()?;
    process.wait()?;
    Ok(resident_kib(&maps?) as f64 / 1024.0)
}

/// The resident KiB of all mappings but the guest's memory, which is the one of exactly its size.
fn resident_kib(maps: &str) -> u64 {
    let field = |line: &str, name: &str| -> Option<u64> {
        line.strip_prefix(name)?.trim().split(' ').next()?.parse().ok()
    };
    let (mut sum, mut size) = (0, 0);
    for line in maps.lines() {
        if let Some(kib) = field(line, "Size:") {
            size = kib;
        } else if let Some(kib) = field(line, "Rss:")
            && size != GUEST_KIB
        {
            sum += kib;
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::resident_kib;

    #[test]
    fn the_guests_own_memory_does_not_count() {
        let maps = "7f0-7f1 rw-s\nSize:             524288 kB\nRss:                9000 kB\n\
                    55a-55b r-xp\nSize:                 64 kB\nRss:                  32 kB\n";
        assert_eq!(resident_kib(maps), 32);
    }
}
