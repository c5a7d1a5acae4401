//! Requests to a virtio disk: the component, the same source as a native library, and a loop that issues the same operations by io_uring with no machine around it.
//!
//! A bare guest drives the disk from ring 3 and polls, so that no guest kernel is measured. The file is in the host's page cache: what is compared is the work on each
//! request. The time of a run without requests is taken off.
#![allow(unsafe_code, reason = "io_uring takes pointers")]

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use io_uring::{IoUring, opcode, types::Fd};
use serde::Serialize;

use super::{bare, median, summary_of, tenon, write};
use crate::tree;

/// The length of the disk.
const DISK: u64 = 1 << 30;

/// One pattern of requests.
#[derive(Clone, Copy, Serialize)]
struct Pattern {
    write: bool,
    size: u32,
    random: bool,
    depth: u32,
    count: u32,
}

#[derive(Serialize)]
struct Row {
    engine: &'static str,
    #[serde(flatten)]
    pattern: Pattern,
    host_per_second: f64,
    native_per_second: f64,
    wasm_per_second: f64,
    wasm_to_native: f64,
    native_cpu_us: f64,
    wasm_cpu_us: f64,
    /// Requests that one call into the component brought.
    wasm_batch: f64,
}

/// What one run took for each request.
struct Cost {
    seconds: f64,
    cpu_us: f64,
    batch: f64,
}

pub(super) fn run(rounds: u32) -> Result<()> {
    let guest = bare("blk")?;
    let folder = tree::target()?.join("bench");
    fs::create_dir_all(&folder)?;
    let disk = folder.join("blk.img");
    fill(&disk)?;
    let mut rows = Vec::new();
    for engine in ["soft", "kvm"] {
        if engine == "kvm" && !Path::new("/dev/kvm").exists() {
            println!("not run: kvm: there is no /dev/kvm here");
            continue;
        }
        for pattern in patterns() {
            let (mut host, mut native, mut wasm) = (Vec::new(), Vec::new(), Vec::new());
            for _ in 0..rounds {
                host.push(host_loop(&disk, pattern)?);
                native.push(machine(&guest, engine, &disk, pattern, true)?);
                wasm.push(machine(&guest, engine, &disk, pattern, false)?);
            }
            let seconds = |costs: &[Cost]| median(costs.iter().map(|cost| cost.seconds).collect());
            let cpu = |costs: &[Cost]| median(costs.iter().map(|cost| cost.cpu_us).collect());
            let row = Row {
                engine,
                pattern,
                host_per_second: 1.0 / median(host),
                native_per_second: 1.0 / seconds(&native),
                wasm_per_second: 1.0 / seconds(&wasm),
                wasm_to_native: seconds(&native) / seconds(&wasm),
                native_cpu_us: cpu(&native),
                wasm_cpu_us: cpu(&wasm),
                wasm_batch: median(wasm.iter().map(|cost| cost.batch).collect()),
            };
            println!(
                "{engine}: {} {} KiB {}, depth {:2}: host {:.0}/s, native {:.0}/s, wasm {:.0}/s, wasm to native {:.2}; \
                 CPU for each: native {:.1} µs, wasm {:.1} µs; {:.1} requests a call",
                if pattern.write { "write" } else { "read " },
                pattern.size >> 10,
                if pattern.random { "random" } else { "in order" },
                pattern.depth,
                row.host_per_second,
                row.native_per_second,
                row.wasm_per_second,
                row.wasm_to_native,
                row.native_cpu_us,
                row.wasm_cpu_us,
                row.wasm_batch,
            );
            rows.push(row);
        }
    }
    fs::remove_file(&disk)?;
    write("blk", &rows)
}

fn patterns() -> Vec<Pattern> {
    let mut patterns = Vec::new();
    for write in [false, true] {
        for (size, random, depth, count) in [
            (4096, true, 1, 40_000),
            (4096, true, 32, 200_000),
            (1 << 20, false, 1, 4000),
            (1 << 20, false, 32, 4000),
        ] {
            patterns.push(Pattern { write, size, random, depth, count });
        }
    }
    patterns
}

/// A file without holes, in the page cache.
fn fill(disk: &Path) -> Result<()> {
    let make = || -> std::io::Result<()> {
        let mut file = File::create(disk)?;
        std::io::copy(&mut std::io::Read::take(std::io::repeat(0x5a), DISK), &mut file)?;
        file.sync_all()
    };
    make().with_context(|| format!("cannot make {}", disk.display()))
}

/// What one request costs in a machine.
fn machine(guest: &Path, engine: &str, disk: &Path, pattern: Pattern, native: bool) -> Result<Cost> {
    let run = |count: u32| -> Result<(f64, f64, f64)> {
        let mut command = tenon()?;
        command.args([
            "--engine",
            engine,
            "--memory",
            "128M",
            "--device",
            "exit",
            "--console",
            "none",
            "--kernel",
        ]);
        command.arg(guest).arg("--disk").arg(format!("file:{}", disk.display()));
        command.args([
            "--cmdline",
            &format!(
                "count={count} size={} depth={} write={} random={}",
                pattern.size,
                pattern.depth,
                u8::from(pattern.write),
                u8::from(pattern.random)
            ),
        ]);
        if native {
            command.args(["--allow-native", "virtio-blk"]);
        }
        let summary = summary_of(&mut command)?;
        let disk = summary.virtio("virtio-blk").context("the machine has no disk")?;
        if disk.answers < u64::from(count) {
            bail!("the disk answered {} of {count} requests", disk.answers);
        }
        Ok((summary.run_ms, summary.cpu_ms, disk.requests as f64 / disk.batches.max(1) as f64))
    };
    let (nothing, nothing_cpu, _) = run(0)?;
    let (all, all_cpu, batch) = run(pattern.count)?;
    let count = f64::from(pattern.count);
    Ok(Cost { seconds: (all - nothing) / 1e3 / count, cpu_us: (all_cpu - nothing_cpu) * 1e3 / count, batch })
}

/// Seconds for each request, issued by io_uring from here.
fn host_loop(disk: &Path, pattern: Pattern) -> Result<f64> {
    let file = File::options().read(true).write(true).open(disk)?;
    let mut ring = IoUring::new(64).context("this host has no io_uring")?;
    let size = pattern.size as usize;
    let mut buffers: Vec<Vec<u8>> = (0..pattern.depth).map(|_| vec![0; size]).collect();
    let mut free: Vec<u32> = (0..pattern.depth).collect();
    let blocks = DISK / u64::from(pattern.size);
    let mut state = 0x1234_5678_9abc_def1u64;
    let (mut begun, mut done) = (0, 0);
    let started = Instant::now();
    while done < pattern.count {
        while begun < pattern.count {
            let Some(slot) = free.pop() else { break };
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let block = if pattern.random { state % blocks } else { u64::from(begun) % blocks };
            let at = block * u64::from(pattern.size);
            let buffer = &mut buffers[slot as usize];
            let fd = Fd(file.as_raw_fd());
            let entry = if pattern.write {
                opcode::Write::new(fd, buffer.as_ptr(), pattern.size).offset(at).build()
            } else {
                opcode::Read::new(fd, buffer.as_mut_ptr(), pattern.size).offset(at).build()
            };
            // SAFETY: the buffer stays, and is not touched before its operation has ended: the loop below waits for all of them.
            unsafe { ring.submission().push(&entry.user_data(slot.into())) }.context("the ring is full")?;
            begun += 1;
        }
        ring.submit_and_wait(1)?;
        for entry in ring.completion() {
            if entry.result() != i32::try_from(pattern.size).unwrap_or(0) {
                bail!("the host's loop: an operation gave {}", entry.result());
            }
            free.push(u32::try_from(entry.user_data()).unwrap_or(0));
            done += 1;
        }
    }
    Ok(started.elapsed().as_secs_f64() / f64::from(pattern.count))
}
