//! Images that were damaged at random, in every table: errors, and no panic, hang or memory without bounds.
#![allow(clippy::unwrap_used, reason = "a test")]

#[path = "../../file/tests/support/mod.rs"]
mod support;

use std::fs;
use std::path::Path;

use support::{Ask, Bench, Random};
use tenon_store_qcow2::{CreateOptions, PLUGIN, check, create, info};

const MIB: u64 = 1 << 20;

/// The most memory that this process ever had, in bytes.
fn peak() -> u64 {
    let text = fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// Uses an image in every way; what comes of it does not matter, but that it ends.
fn use_it(path: &Path, read_only: bool, random: &mut Random) -> bool {
    let settings = [("path", path.to_str().unwrap()), ("readonly", if read_only { "yes" } else { "no" })];
    let Ok(mut bench) = Bench::open(&PLUGIN, &settings) else { return false };
    let blocks = (bench.info.size / 512).min(1 << 40);
    for _ in 0..3 {
        let asked: Vec<Ask> = (0..12)
            .map(|_| {
                let start = random.below(blocks);
                let (position, length) = (start * 512, (1 + random.below(300)).min(blocks - start) * 512);
                match random.below(6) {
                    0 | 1 => Ask::Read { position, length },
                    2 | 3 => Ask::Write { position, data: random.bytes(length) },
                    4 => Ask::WriteZeroes { position, length, unmap: random.below(2) == 0 },
                    _ => Ask::Discard { position, length },
                }
            })
            .collect();
        bench.run(&asked);
        let _ = bench.flush();
    }
    let size = bench.info.size;
    let _ = bench.resize(size.saturating_add(MIB));
    let _ = bench.resize(size / 1024 * 512);
    true
}

#[test]
fn damaged_images_give_errors_and_nothing_worse() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.qcow2");
    // More of them: `TENON_SEEDS=101..2000`.
    let seeds = std::env::var("TENON_SEEDS").unwrap_or_else(|_| "1..101".to_owned());
    let (first, end) = seeds.split_once("..").map(|(a, b)| (a.parse().unwrap(), b.parse().unwrap())).unwrap();
    let (mut opened, mut refused) = (0, 0);
    for cluster_size in [512, 4096, 65536] {
        let _ = fs::remove_file(&path);
        create(&path, Some(2 * MIB), &CreateOptions { cluster_size, ..Default::default() }).unwrap();
        let mut bench = Bench::open(&PLUGIN, &[("path", path.to_str().unwrap())]).unwrap();
        bench.write(0, &[1; 1 << 19]).unwrap();
        bench.write_zeroes(MIB, 65536, false).unwrap();
        bench.close().unwrap();
        let whole = fs::read(&path).unwrap();
        let tables = tables(&whole, u64::from(cluster_size));
        for seed in first..end {
            let mut random = Random(u64::wrapping_mul(seed, 0x9e37_79b9) + u64::from(cluster_size));
            let mut image = whole.clone();
            for _ in 0..=random.below(4) {
                let (start, length) = tables[usize::try_from(random.below(tables.len() as u64)).unwrap()];
                let at = usize::try_from(start + random.below(length / 8) * 8).unwrap();
                if at + 8 > image.len() {
                    continue;
                }
                let old = u64::from_be_bytes(image[at..at + 8].try_into().unwrap());
                let new = match random.below(6) {
                    0 => random.next(),
                    1 => old ^ (1 << random.below(64)),
                    2 => u64::MAX,
                    // Another table, or itself: tables that are used twice.
                    3 | 4 => {
                        tables[usize::try_from(random.below(tables.len() as u64)).unwrap()].0
                            | old & (3 << 62)
                    }
                    _ => old.wrapping_add(u64::from(cluster_size)),
                };
                image[at..at + 8].copy_from_slice(&new.to_be_bytes());
            }
            if random.below(10) == 0 {
                image.truncate(usize::try_from(random.below(image.len() as u64)).unwrap());
            }
            for read_only in [true, false] {
                fs::write(&path, &image).unwrap();
                if use_it(&path, read_only, &mut random) {
                    opened += 1
                } else {
                    refused += 1
                }
                // What happens to be written is none of our business; that these end is.
                let _ = info(&path);
                let _ = check(&path);
            }
        }
    }
    println!("{opened} were opened, {refused} refused");
    assert!(
        opened > 100 && refused > 20,
        "{opened} were opened, {refused} refused: the damage is not where it matters"
    );
    assert!(peak() < 1 << 30, "{} bytes of memory were used", peak());
}

/// The header and the tables of an image: where each begins, and its length.
fn tables(image: &[u8], cluster: u64) -> Vec<(u64, u64)> {
    let wide = |at: u64| {
        let at = usize::try_from(at).unwrap();
        u64::from_be_bytes(image[at..at + 8].try_into().unwrap())
    };
    let (l1, refcounts) = (wide(40), wide(48));
    let mut tables = vec![(0, 104), (l1, 64), (refcounts, 64)];
    let offset = 0x00ff_ffff_ffff_fe00;
    for table in [l1, refcounts] {
        tables.extend(
            (0..8).map(|n| wide(table + n * 8) & offset).filter(|at| *at != 0).map(|at| (at, cluster)),
        );
    }
    tables.retain(|(start, length)| start + length <= image.len() as u64);
    tables
}
