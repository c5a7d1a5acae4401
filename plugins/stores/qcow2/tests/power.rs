//! Power failures: of what was written and not made durable before, any part can be there or missing.
//!
//! A process writes an image, and `strace` records what it asks of the kernel. From the record the file is made as a disk can have kept it when the power failed at a given
//! moment: what ended before a sync began that has ended is there; of the rest, any sectors, and any changes of length and holes.
#![allow(clippy::unwrap_used, reason = "a test")]

#[path = "../../file/tests/support/mod.rs"]
mod support;
mod writer;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use support::Random;
use tenon_store_qcow2::{Backing, CreateOptions, create};
use writer::{MIB, Model, Orders, compressed, content, folder, image, open, sound};

/// Calls that change a file or make it durable, and say something.
const CALLS: &str = "trace=write,pwrite64,pwritev,pwritev2,ftruncate,fallocate,fsync,fdatasync";
/// What a disk keeps whole.
const SECTOR: usize = 512;

/// No test: writes while it is recorded.
#[test]
fn writer() {
    writer::obey();
}

#[derive(Debug)]
enum Deed {
    Write {
        offset: u64,
        data: Vec<u8>,
    },
    Length(u64),
    /// The range reads as zeroes; the length stays.
    Hole {
        offset: u64,
        length: u64,
    },
    Sync,
    Said(String),
}

/// What was asked of the kernel, between two lines of the record.
#[derive(Debug)]
struct Call {
    begun: usize,
    ended: usize,
    deed: Deed,
}

/// Has a writer recorded; `None` if this cannot be here.
fn record(orders: &Orders<'_>) -> Option<Vec<Call>> {
    let log = orders.path.with_extension("strace");
    let mut command = Command::new("strace");
    command.args(["-f", "-y", "-xx", "-s", "16777216", "-e", CALLS, "-o"]).arg(&log);
    command.arg(std::env::current_exe().unwrap());
    orders.give(&mut command);
    let Ok(status) = command.stdout(Stdio::null()).stderr(Stdio::null()).status() else {
        println!("not run: there is no strace (package strace)");
        return None;
    };
    let text = fs::read_to_string(&log).unwrap();
    if text.is_empty() {
        println!("not run: strace may trace nothing here");
        return None;
    }
    assert!(status.success(), "{status}");
    Some(parse(&text, orders.path))
}

/// Bytes as `strace` shows them.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("\\x{byte:02x}")).collect()
}

/// The bytes of all quoted strings.
fn unquote(text: &str) -> Vec<u8> {
    let quoted = text.split('"').skip(1).step_by(2);
    quoted
        .flat_map(|part| part.split("\\x").skip(1))
        .map(|byte| u8::from_str_radix(byte, 16).unwrap())
        .collect()
}

fn parse(text: &str, path: &Path) -> Vec<Call> {
    let path = format!("<{}>", hex(path.to_str().unwrap().as_bytes()));
    let mut calls: Vec<Call> = Vec::new();
    // What a thread has begun and not ended.
    let mut open = std::collections::HashMap::new();
    for (line, text) in text.lines().enumerate() {
        let (thread, text) = text.split_once(' ').unwrap();
        let text = text.trim_start();
        if text.starts_with("<... ") {
            if let Some(call) = open.remove(thread) {
                assert!(!text.contains("= -1"), "{text}");
                let call: &mut Call = &mut calls[call];
                call.ended = line;
            }
            continue;
        }
        let Some((name, rest)) = text.split_once('(') else { continue };
        let Some((file, rest)) = rest.split_once('>') else { continue };
        let stderr = name == "write" && file.starts_with("2<");
        if !stderr && !format!("{file}>").ends_with(&path) {
            continue;
        }
        // What follows the data, if there is some.
        let tail = rest.rsplit_once('"').map_or(rest, |(_, tail)| tail);
        let tail = tail.split([')', '<']).next().unwrap();
        let numbers: Vec<&str> = tail.split(',').map(str::trim).collect();
        let number = |at: usize| numbers[numbers.len() - at].parse::<u64>().unwrap();
        let deed = match name {
            "write" if stderr => Deed::Said(String::from_utf8(unquote(rest)).unwrap()),
            "pwrite64" | "pwritev" => Deed::Write { offset: number(1), data: unquote(rest) },
            "ftruncate" => Deed::Length(number(1)),
            "fallocate" => {
                let keeps = tail.contains("FALLOC_FL_KEEP_SIZE");
                assert!(keeps && (tail.contains("PUNCH_HOLE") || tail.contains("ZERO_RANGE")), "{text}");
                Deed::Hole { offset: number(2), length: number(1) }
            }
            "fsync" | "fdatasync" => Deed::Sync,
            _ => panic!("unknown: {}", &text[..200.min(text.len())]),
        };
        let unfinished = text.ends_with("<unfinished ...>");
        if unfinished {
            open.insert(thread.to_owned(), calls.len());
        } else if text.contains(") = -1") {
            // A hole that the file system cannot make is none.
            assert!(matches!(deed, Deed::Hole { .. }), "{}", &text[..200.min(text.len())]);
            continue;
        }
        calls.push(Call { begun: line, ended: if unfinished { usize::MAX } else { line }, deed });
    }
    calls
}

/// Puts `odds` in 4 parts of what the power left of the calls at the line `cut` into a file that has what was there before. Gives how many of them were not durable.
fn fail_at(calls: &[Call], cut: usize, file: &File, odds: u64, random: &mut Random) -> usize {
    let before = calls.iter().filter(|call| call.begun < cut);
    let synced = before
        .clone()
        .filter(|call| matches!(call.deed, Deed::Sync) && call.ended < cut)
        .map(|sync| sync.begun)
        .max()
        .unwrap_or(0);
    let mut pending = 0;
    for call in before {
        let durable = call.ended < synced;
        pending += usize::from(!durable);
        let mut kept = || durable || random.below(4) < odds;
        match &call.deed {
            Deed::Write { offset, data } => {
                for (index, sector) in data.chunks(SECTOR).enumerate() {
                    if kept() {
                        file.write_all_at(sector, offset + (index * SECTOR) as u64).unwrap();
                    }
                }
            }
            Deed::Length(length) if kept() => file.set_len(*length).unwrap(),
            Deed::Hole { offset, length } if kept() => {
                let end = (offset + length).min(file.metadata().unwrap().len());
                let zeroes = vec![0; usize::try_from(end.saturating_sub(*offset)).unwrap()];
                file.write_all_at(&zeroes, *offset).unwrap();
            }
            _ => {}
        }
    }
    pending
}

/// Lets the power fail again and again while a writer is at work.
fn torture(path: &Path, model: &Model, seed: u64, zeroes: bool) {
    let times: u64 = std::env::var("TENON_ROUNDS").map_or(1, |times| times.parse().unwrap());
    let first = path.with_extension("first");
    fs::copy(path, &first).unwrap();
    for seed in seed..seed + times {
        fs::copy(&first, path).unwrap();
        let orders = Orders { path, seed, zeroes, batches: 12 };
        let Some(calls) = record(&orders) else { return };
        let end = calls.last().unwrap().begun + 1;
        let mut random = Random(seed * 99 + 1);
        let mut most = 0;
        for round in 0..10 {
            let cut = usize::try_from(random.below(end as u64)).unwrap() + 1;
            let odds = round % 5;
            let when = format!("{}, seed {seed}, cut {cut} of {end}, odds {odds}", path.display());
            fs::copy(&first, path).unwrap();
            let file = File::options().read(true).write(true).open(path).unwrap();
            most = most.max(fail_at(&calls, cut, &file, odds, &mut random));
            drop(file);
            let mut model = model.clone();
            for call in calls.iter().filter(|call| call.begun < cut) {
                if let Deed::Said(text) = &call.deed {
                    model.said(&orders, text.trim_end());
                }
            }
            model.verify(&mut open(path, true), &format!("{when}, read only"));
            let mut bench = open(path, false);
            model.verify(&mut bench, &when);
            bench.close().unwrap();
            sound(path, &when);
        }
        assert!(most > 1, "every call was durable at once");
    }
    fs::rename(first, path).unwrap();
}

#[test]
fn what_was_flushed_survives_a_power_failure() {
    for (cluster_size, size) in [(512, 4 * MIB), (4096, 8 * MIB), (65536, 32 * MIB)] {
        let folder = folder();
        let path = image(folder.path(), size, cluster_size);
        for seed in [1, 3] {
            torture(&path, &Model::empty(size), seed * 100, true);
        }
    }
}

#[test]
fn so_does_what_is_copied_from_a_backing_file_or_a_compressed_cluster() {
    let folder = folder();
    for options in ["compat=0.10,cluster_size=4k", "compat=1.1,cluster_size=64k"] {
        let Some((path, model)) = compressed(folder.path(), options) else { break };
        torture(&path, &model, 3, options.contains("1.1"));
    }
    let (numbers, raw) = content(8 * MIB);
    let base = folder.path().join("base.raw");
    fs::write(&base, raw).unwrap();
    let path = folder.path().join("top.qcow2");
    let backing = Some(Backing { path: base, qcow2: false });
    create(&path, None, &CreateOptions { backing, ..Default::default() }).unwrap();
    for seed in [2, 3] {
        torture(&path, &Model::of(&numbers), seed * 100, true);
    }
}
