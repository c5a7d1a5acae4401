//! A process that writes an image, to have it killed, and what its image may hold then.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use tenon_store_qcow2::{CreateOptions, PLUGIN, check, create};

use crate::support::{Ask, Bench, Random};

pub(crate) const MIB: u64 = 1 << 20;
/// What is told apart: each is written whole, with one number in it.
pub(crate) const UNIT: u64 = 512;
/// Tells a process of a test what to write, as [`Orders`].
const ORDERS: &str = "TENON_QCOW2_WRITER";

pub(crate) fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// Opens an image, with the backing file `base.raw` if one is beside it.
pub(crate) fn open(path: &Path, read_only: bool) -> Bench {
    let read_only = if read_only { "yes" } else { "no" };
    let backing = path.with_file_name("base.raw");
    let mut config = vec![("path", path.to_str().unwrap()), ("readonly", read_only)];
    if backing.exists() {
        config.push(("backing", backing.to_str().unwrap()));
    }
    Bench::open(&PLUGIN, &config).unwrap()
}

pub(crate) fn image(folder: &Path, size: u64, cluster_size: u32) -> PathBuf {
    let path = folder.join(format!("of-{cluster_size}.qcow2"));
    create(&path, Some(size), &CreateOptions { cluster_size, ..Default::default() }).unwrap();
    path
}

/// An image of compressed clusters that `qemu-img` makes, and what it holds; `None` if there is no `qemu-img`.
pub(crate) fn compressed(folder: &Path, options: &str) -> Option<(PathBuf, Model)> {
    let (numbers, raw) = content(8 * MIB);
    std::fs::write(folder.join("in.raw"), raw).unwrap();
    let made = Command::new("qemu-img")
        .args(["convert", "-c", "-O", "qcow2", "-o", options, "in.raw", options])
        .current_dir(folder)
        .status();
    let Ok(made) = made else {
        println!("not run: there is no qemu-img (package qemu-utils)");
        return None;
    };
    assert!(made.success());
    Some((folder.join(options), Model::of(&numbers)))
}

/// A number for each unit, and their bytes.
pub(crate) fn content(size: u64) -> (Vec<u64>, Vec<u8>) {
    let mut random = Random(9);
    let numbers: Vec<u64> = (0..size / UNIT).map(|_| random.next() | 1).collect();
    let raw = numbers.iter().flat_map(|number| number.to_le_bytes().repeat(64)).collect();
    (numbers, raw)
}

/// Nothing is wrong with an image but, maybe, lost space.
pub(crate) fn sound(path: &Path, when: &str) {
    let report = check(path).unwrap();
    assert_eq!(report.errors, 0, "{when}: {:?}", report.told);
    if let Ok(output) = Command::new("qemu-img").args(["check", "-q"]).arg(path).output() {
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(matches!(output.status.code(), Some(0 | 3)), "{when}: {:?}: {told}", output.status);
    }
}

/// What a process writes.
#[derive(Clone, Copy)]
pub(crate) struct Orders<'a> {
    pub(crate) path: &'a Path,
    pub(crate) seed: u64,
    /// It also makes ranges zero.
    pub(crate) zeroes: bool,
    /// How often it writes before it closes the image.
    pub(crate) batches: u64,
}

/// A part of what is done at once: units, and the number that is written to them; 0 makes them zero.
struct Step {
    first: u64,
    units: u64,
    number: u64,
    unmap: bool,
}

impl Orders<'_> {
    /// Gives the orders to a process that is one of a test program, which calls [`obey`] in a test of the name `writer`.
    pub(crate) fn give(&self, command: &mut Command) {
        let mut text = String::new();
        let Self { path, seed, zeroes, batches } = self;
        write!(text, "{seed} {zeroes} {batches} {}", path.display()).unwrap();
        command.args(["--exact", "writer", "--nocapture"]).env(ORDERS, text);
    }

    /// What is done at once, in units that do not meet, and whether it is flushed then.
    fn steps(&self, batch: u64, size: u64) -> (Vec<Step>, bool) {
        let mut random = Random(((self.seed << 20) + batch + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let slot = size / UNIT / 8;
        let mut steps = Vec::new();
        for index in 0..8 {
            let most = if random.below(4) == 0 { 1500.min(slot / 4) } else { 40 };
            let units = 1 + random.below(most);
            let first = index * slot + random.below(slot - units);
            let zero = self.zeroes && random.below(4) == 0;
            let number = if zero { 0 } else { random.next() | 1 };
            steps.push(Step { first, units, number, unmap: random.below(3) > 0 });
        }
        // Some flush often, and some hardly ever.
        (steps, random.below(if self.seed.is_multiple_of(3) { 4 } else { 25 }) == 0)
    }
}

/// Writes as ordered, if this process is, and says when it begins what is done at once, and when a flush has ended.
pub(crate) fn obey() {
    let Ok(text) = std::env::var(ORDERS) else { return };
    let parts: Vec<&str> = text.splitn(4, ' ').collect();
    let orders = Orders {
        path: Path::new(parts[3]),
        seed: parts[0].parse().unwrap(),
        zeroes: parts[1].parse().unwrap(),
        batches: parts[2].parse().unwrap(),
    };
    // Each line by one call, so that none is cut off.
    let say =
        |what: &str, batch| std::io::stderr().write_all(format!("{what} {batch}\n").as_bytes()).unwrap();
    let mut bench = open(orders.path, false);
    for batch in 0..orders.batches {
        let (steps, flush) = orders.steps(batch, bench.info.size);
        say("begin", batch);
        let asked: Vec<Ask> = steps
            .iter()
            .map(|step| {
                let (position, length) = (step.first * UNIT, step.units * UNIT);
                if step.number == 0 {
                    return Ask::WriteZeroes { position, length, unmap: step.unmap };
                }
                let count = usize::try_from(length / 8).unwrap();
                Ask::Write { position, data: step.number.to_le_bytes().repeat(count) }
            })
            .collect();
        assert!(bench.run(&asked).iter().all(Result::is_ok));
        if flush {
            bench.flush().unwrap();
            say("flushed", batch);
        }
    }
    bench.close().unwrap();
}

/// What each unit may hold: what it had at the last flush, and all that was begun since.
#[derive(Clone)]
pub(crate) struct Model(Vec<Vec<u64>>);

impl Model {
    pub(crate) fn empty(size: u64) -> Self {
        Self::of(&vec![0; usize::try_from(size / UNIT).unwrap()])
    }

    pub(crate) fn of(numbers: &[u64]) -> Self {
        Self(numbers.iter().map(|number| vec![*number]).collect())
    }

    /// Takes what a writer said.
    pub(crate) fn said(&mut self, orders: &Orders<'_>, line: &str) {
        let (what, batch) = line.split_once(' ').unwrap();
        match what {
            "begin" => {
                let size = self.0.len() as u64 * UNIT;
                for step in orders.steps(batch.parse().unwrap(), size).0 {
                    let first = usize::try_from(step.first).unwrap();
                    let end = first + usize::try_from(step.units).unwrap();
                    self.0[first..end].iter_mut().for_each(|may| may.push(step.number));
                }
            }
            "flushed" => self.0.iter_mut().for_each(|may| {
                may.drain(..may.len() - 1);
            }),
            _ => panic!("the writer said: {line}"),
        }
    }

    /// Reads everything; what is there is there from now on.
    pub(crate) fn verify(&mut self, bench: &mut Bench, when: &str) {
        let each = usize::try_from(MIB / UNIT).unwrap();
        for (at, units) in self.0.chunks_mut(each).enumerate() {
            let data = bench.read(at as u64 * MIB, units.len() as u64 * UNIT).unwrap();
            for (index, (may, unit)) in units.iter_mut().zip(data.chunks(512)).enumerate() {
                let number = u64::from_le_bytes(unit[..8].try_into().unwrap());
                assert!(
                    may.contains(&number) && unit.chunks(8).all(|part| part == number.to_le_bytes()),
                    "{when}: unit {index} of MiB {at} holds {number:#x}, but may hold {may:x?}"
                );
                *may = vec![number];
            }
        }
    }
}
