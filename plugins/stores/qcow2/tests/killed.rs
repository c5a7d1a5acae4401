//! Writers that are killed: what was flushed is there, the rest is old or new, and the next writer gives no cluster away that is in use.
#![allow(clippy::unwrap_used, reason = "a test")]

#[path = "../../file/tests/support/mod.rs"]
mod support;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use support::{Ask, Bench, Random};
use tenon_store_qcow2::{CreateOptions, PLUGIN, check, create};

const MIB: u64 = 1 << 20;
/// What is told apart: each is written whole, with one number in it.
const UNIT: u64 = 512;
/// Tells a process of this test that it is to be killed: the image, the seed, and whether it can zero.
const VICTIM: &str = "TENON_QCOW2_VICTIM";

fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn open(path: &Path, read_only: bool) -> Bench {
    let read_only = if read_only { "yes" } else { "no" };
    Bench::open(&PLUGIN, &[("path", path.to_str().unwrap()), ("readonly", read_only)]).unwrap()
}

/// A part of what is done at once: units, and the number that is written to them; 0 makes them zero.
struct Step {
    first: u64,
    units: u64,
    number: u64,
    unmap: bool,
}

/// What is done at once, in units that do not meet, and whether it is flushed then.
fn steps(seed: u64, batch: u64, size: u64, zeroes: bool) -> (Vec<Step>, bool) {
    let mut random = Random(((seed << 20) + batch + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let slot = size / UNIT / 8;
    let mut steps = Vec::new();
    for index in 0..8 {
        let most = if random.below(4) == 0 { 1500 } else { 40 };
        let units = 1 + random.below(most);
        let first = index * slot + random.below(slot - units);
        let zero = zeroes && random.below(4) == 0;
        let number = if zero { 0 } else { random.next() | 1 };
        steps.push(Step { first, units, number, unmap: random.below(3) > 0 });
    }
    // Some flush often, and some hardly ever.
    (steps, random.below(if seed.is_multiple_of(3) { 4 } else { 25 }) == 0)
}

/// No test: writes until it is killed, and says when it begins what is done at once, and when a flush has ended.
#[test]
fn victim() {
    let Ok(orders) = std::env::var(VICTIM) else { return };
    let mut orders = orders.split(' ');
    let (path, seed) = (orders.next().unwrap(), orders.next().unwrap().parse().unwrap());
    let zeroes = orders.next() == Some("zeroes");
    let mut bench = open(Path::new(path), false);
    // Each line by one call, so that none is cut off.
    let say =
        |what: &str, batch| std::io::stderr().write_all(format!("{what} {batch}\n").as_bytes()).unwrap();
    for batch in 0.. {
        let (steps, flush) = steps(seed, batch, bench.info.size, zeroes);
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
}

/// What each unit may hold: what it had at the last flush, and all that was begun since.
struct Model(Vec<Vec<u64>>);

impl Model {
    /// Lets a process write an image and kills it.
    fn kill(&mut self, path: &Path, seed: u64, zeroes: bool, random: &mut Random) {
        let orders = format!("{} {seed} {}", path.to_str().unwrap(), if zeroes { "zeroes" } else { "" });
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "victim", "--nocapture"])
            .env(VICTIM, orders)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(child.stderr.take().unwrap());
        let mut lines = String::new();
        for _ in 0..=random.below(12) {
            assert!(said.read_line(&mut lines).unwrap() > 0, "it ended by itself: {lines}");
        }
        // Anywhere within what is done at once.
        let until = Instant::now() + Duration::from_micros(random.below(4000));
        while Instant::now() < until {
            std::hint::spin_loop();
        }
        child.kill().unwrap();
        assert_eq!(
            std::os::unix::process::ExitStatusExt::signal(&child.wait().unwrap()),
            Some(libc::SIGKILL)
        );
        said.read_to_string(&mut lines).unwrap();
        for line in lines.lines() {
            let (what, batch) = line.split_once(' ').unwrap();
            match what {
                "begin" => {
                    let size = self.0.len() as u64 * UNIT;
                    for step in steps(seed, batch.parse().unwrap(), size, zeroes).0 {
                        let first = usize::try_from(step.first).unwrap();
                        let end = first + usize::try_from(step.units).unwrap();
                        self.0[first..end].iter_mut().for_each(|may| may.push(step.number));
                    }
                }
                "flushed" => self.0.iter_mut().for_each(|may| {
                    may.drain(..may.len() - 1);
                }),
                _ => panic!("the victim said: {line}"),
            }
        }
    }

    /// Reads everything; what is there is there from now on.
    fn verify(&mut self, bench: &mut Bench, when: &str) {
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

/// Nothing is wrong with an image but, maybe, lost space.
fn sound(path: &Path, when: &str) {
    let report = check(path).unwrap();
    assert_eq!(report.errors, 0, "{when}: {:?}", report.told);
    if let Ok(output) = Command::new("qemu-img").args(["check", "-q"]).arg(path).output() {
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(matches!(output.status.code(), Some(0 | 3)), "{when}: {:?}: {told}", output.status);
    }
}

/// Kills writers of one image again and again. Gives how often the image was unsound then.
fn torture(path: &Path, mut model: Model, seed: u64, rounds: u64, zeroes: bool) -> u64 {
    let name = path.file_name().unwrap().to_str().unwrap().to_owned();
    // More of them: `TENON_ROUNDS=20`, times as many.
    let times = std::env::var("TENON_ROUNDS").map_or(1, |times| times.parse().unwrap());
    let mut unsound = 0;
    for round in seed..seed + rounds * times {
        let when = format!("{name}, round {round}");
        model.kill(path, round, zeroes && round % 3 != 1, &mut Random(round * 77 + 5));
        unsound += u64::from(check(path).unwrap().errors > 0);
        if round % 4 == 0 {
            // Reading needs no counts.
            let mut bench = open(path, true);
            model.verify(&mut bench, &format!("{when}, read only"));
        }
        let mut bench = open(path, false);
        model.verify(&mut bench, &when);
        bench.close().unwrap();
        sound(path, &when);
    }
    unsound
}

fn empty(size: u64) -> Model {
    Model(vec![vec![0]; usize::try_from(size / UNIT).unwrap()])
}

fn image(folder: &Path, size: u64, cluster_size: u32) -> PathBuf {
    let path = folder.join(format!("of-{cluster_size}.qcow2"));
    create(&path, Some(size), &CreateOptions { cluster_size, ..Default::default() }).unwrap();
    path
}

#[test]
fn a_killed_writer_loses_nothing_that_was_flushed_and_the_next_gives_nothing_away() {
    let folder = folder();
    let mut unsound = 0;
    // New tables are what is written before its counts are: new images, and one of more tables than `imago` keeps in memory.
    for seed in 0..6 {
        let path = image(folder.path(), 64 * MIB, 4096);
        unsound += torture(&path, empty(64 * MIB), seed * 100, 2, true);
        fs::remove_file(path).unwrap();
    }
    for (cluster_size, size, rounds) in [(512, 16 * MIB, 9), (65536, 64 * MIB, 3)] {
        let path = image(folder.path(), size, cluster_size);
        unsound += torture(&path, empty(size), 0, rounds, true);
    }
    println!("{unsound} images were left with counts that were too low");
    assert!(unsound > 2, "only {unsound} images were left with counts that were too low");
}

#[test]
fn so_it_is_with_version_2_and_with_compressed_clusters() {
    let folder = folder();
    let size = 8 * MIB;
    let mut random = Random(9);
    let numbers: Vec<u64> = (0..size / UNIT).map(|_| random.next() | 1).collect();
    let raw: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes().repeat(64)).collect();
    fs::write(folder.path().join("in.raw"), &raw).unwrap();
    for (options, zeroes) in [("compat=0.10,cluster_size=4k", false), ("compat=1.1,cluster_size=4k", true)] {
        let path = folder.path().join(options);
        let made = Command::new("qemu-img")
            .args(["convert", "-c", "-O", "qcow2", "-o", options, "in.raw", options])
            .current_dir(folder.path())
            .status();
        let Ok(made) = made else {
            return println!("not run: there is no qemu-img (package qemu-utils)");
        };
        assert!(made.success());
        let model = Model(numbers.iter().map(|number| vec![*number]).collect());
        torture(&path, model, 0, 10, zeroes);
    }
}

#[test]
fn a_killed_image_is_read_by_qemu_and_repaired_by_it() {
    let folder = folder();
    let path = image(folder.path(), 16 * MIB, 4096);
    let mut model = empty(16 * MIB);
    model.kill(&path, 3, true, &mut Random(8));
    assert_eq!(fs::read(&path).unwrap()[79] & 1, 1, "it is not marked");
    assert!(tenon_store_qcow2::info(&path).unwrap().unusable.is_none());
    model.verify(&mut open(&path, true), "read only");
    let run = |line: &[&str]| Command::new("qemu-img").args(line).arg(&path).output();
    let Ok(about) = run(&["info"]) else {
        return println!("not run: there is no qemu-img (package qemu-utils)");
    };
    assert!(about.status.success());
    let raw = folder.path().join("out.raw");
    let made = Command::new("qemu-img").args(["convert", "-O", "raw"]).args([&path, &raw]).status();
    assert!(made.unwrap().success());
    let content = fs::read(&raw).unwrap();
    let mut bench = open(&path, true);
    for at in 0..16 {
        assert!(
            bench.read(at * MIB, MIB).unwrap() == content[usize::try_from(at * MIB).unwrap()..][..1 << 20]
        );
    }
    drop(bench);
    assert!(run(&["check", "-q", "-r", "all"]).unwrap().status.success());
    assert_eq!(fs::read(&path).unwrap()[79] & 1, 0);
    sound(&path, "repaired by QEMU");
    model.verify(&mut open(&path, false), "repaired by QEMU");
}

#[test]
fn the_mark_is_there_from_the_first_change_to_the_close() {
    let folder = folder();
    let path = image(folder.path(), MIB, 65536);
    let marked = || {
        let mut header = [0; 80];
        File::open(&path).unwrap().read_exact(&mut header).unwrap();
        header[79] & 1 == 1
    };
    let mut bench = open(&path, false);
    bench.read(0, 512).unwrap();
    bench.flush().unwrap();
    assert!(!marked(), "nothing was changed");
    bench.write(0, &[1; 512]).unwrap();
    assert!(marked());
    bench.flush().unwrap();
    assert!(marked(), "more may come");
    bench.close().unwrap();
    assert!(!marked());
    let mut bench = open(&path, false);
    assert_eq!(bench.log(), Vec::<String>::new());
    bench.write_zeroes(0, 65536, true).unwrap();
    assert!(marked());
    drop(bench);
    assert!(!marked());
}
