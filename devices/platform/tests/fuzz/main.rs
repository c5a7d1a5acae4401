//! The fuzz targets on a stable compiler: every input of the committed corpus, then mutations of them by seeded random numbers. What reaches something new is mutated further.
//!
//! `TENON_FUZZ_RUNS=1000000` runs longer; `TENON_FUZZ_SAVE=1` adds what reaches something new to the corpus.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]
#![allow(dead_code, reason = "the machine and the device are shared with other tests")]

#[path = "../virtio/device.rs"]
mod device;
#[path = "../virtio/machine.rs"]
mod machine;
#[path = "../virtio/random.rs"]
mod random;
mod targets;

use std::path::Path;

use random::Random;
use targets::Seen;

fn mutate(random: &mut Random, input: &mut Vec<u8>, pool: &[Vec<u8>]) {
    for _ in 0..=random.below(4) {
        let at = random.below(input.len() as u64 + 1) as usize;
        match random.below(5) {
            0 => input.insert(at, random.next() as u8),
            1 => drop(input.drain(at..input.len().min(at + random.below(8) as usize))),
            2 => {
                let other = &pool[random.below(pool.len() as u64) as usize];
                let from = random.below(other.len() as u64 + 1) as usize;
                let to = other.len().min(from + random.below(32) as usize);
                input.splice(at..at, other[from..to].iter().copied());
            }
            3 => input.extend((0..random.below(16)).map(|_| random.next() as u8)),
            _ => {
                if let Some(byte) = input.get_mut(at) {
                    *byte ^= 1 << random.below(8);
                }
            }
        }
    }
    input.truncate(4096);
}

fn fuzz(name: &str, target: impl Fn(&[u8]) -> Seen) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(name);
    let mut files: Vec<_> = std::fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("no corpus in {}: {error}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    let mut pool: Vec<Vec<u8>> = files.iter().map(|path| std::fs::read(path).unwrap()).collect();
    let mut seen: Seen = pool.iter().flat_map(|input| target(input)).collect();
    let known = seen.len();
    let number = |variable| std::env::var(variable).ok().and_then(|text| text.parse().ok());
    let (runs, save) =
        (number("TENON_FUZZ_RUNS").unwrap_or(4000u64), std::env::var("TENON_FUZZ_SAVE").is_ok());
    let mut random = Random::new(name.len() as u64);
    for _ in 0..runs {
        let mut input = pool[random.below(pool.len() as u64) as usize].clone();
        mutate(&mut random, &mut input, &pool);
        let found = target(&input);
        if !found.is_subset(&seen) {
            seen.extend(found);
            if save {
                let sum = input.iter().fold(0xcbf2_9ce4_8422_2325u64, |sum, byte| {
                    (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
                });
                std::fs::write(folder.join(format!("{sum:016x}")), &input).unwrap();
            }
            pool.push(input);
        }
    }
    println!("{name}: {} inputs known, {known} outcomes; {} after {runs} runs", files.len(), seen.len());
    assert!(known > 5, "the corpus reaches only {known} outcomes");
}

#[test]
fn virtqueues_survive_any_rings() {
    fuzz("virtqueue", targets::virtqueue);
}

#[test]
fn configuration_space_survives_any_accesses() {
    fuzz("pci_config", targets::pci_config);
}

#[test]
fn virtio_registers_survive_any_accesses() {
    fuzz("virtio_registers", targets::virtio_registers);
}
