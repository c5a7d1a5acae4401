//! Writers that are killed: what was flushed is there, the rest is old or new, and the next writer gives no cluster away that is in use.
#![allow(clippy::unwrap_used, reason = "a test")]

#[path = "../../file/tests/support/mod.rs"]
mod support;
mod writer;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use support::Random;
use tenon_store_qcow2::check;
use writer::{MIB, Model, Orders, compressed, folder, image, open, sound};

/// No test: writes until it is killed.
#[test]
fn writer() {
    writer::obey();
}

/// Lets a process write an image and kills it.
fn kill(model: &mut Model, path: &Path, seed: u64, zeroes: bool, random: &mut Random) {
    let orders = Orders { path, seed, zeroes, batches: u64::MAX };
    let mut command = Command::new(std::env::current_exe().unwrap());
    orders.give(&mut command);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
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
    let status = child.wait().unwrap();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(libc::SIGKILL));
    said.read_to_string(&mut lines).unwrap();
    lines.lines().for_each(|line| model.said(&orders, line));
}

/// Kills writers of one image again and again. Gives how often the image was unsound then.
fn torture(path: &Path, mut model: Model, seed: u64, rounds: u64, zeroes: bool) -> u64 {
    let name = path.file_name().unwrap().to_str().unwrap().to_owned();
    // More of them: `TENON_ROUNDS=20`, times as many.
    let times = std::env::var("TENON_ROUNDS").map_or(1, |times| times.parse().unwrap());
    let mut unsound = 0;
    for round in seed..seed + rounds * times {
        let when = format!("{name}, round {round}");
        kill(&mut model, path, round, zeroes && round % 3 != 1, &mut Random(round * 77 + 5));
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

#[test]
fn a_killed_writer_loses_nothing_that_was_flushed_and_the_next_gives_nothing_away() {
    let folder = folder();
    let mut unsound = 0;
    // New tables are what is written before its counts are: new images, and one of more tables than `imago` keeps in memory.
    for seed in 0..6 {
        let path = image(folder.path(), 64 * MIB, 4096);
        unsound += torture(&path, Model::empty(64 * MIB), seed * 100, 2, true);
        fs::remove_file(path).unwrap();
    }
    for (cluster_size, size, rounds) in [(512, 16 * MIB, 9), (65536, 64 * MIB, 3)] {
        let path = image(folder.path(), size, cluster_size);
        unsound += torture(&path, Model::empty(size), 0, rounds, true);
    }
    println!("{unsound} images were left with counts that were too low");
    assert!(unsound > 2, "only {unsound} images were left with counts that were too low");
}

#[test]
fn so_it_is_with_version_2_and_with_compressed_clusters() {
    let folder = folder();
    for (options, zeroes) in [("compat=0.10,cluster_size=4k", false), ("compat=1.1,cluster_size=4k", true)] {
        let Some((path, model)) = compressed(folder.path(), options) else { return };
        torture(&path, model, 0, 10, zeroes);
    }
}

#[test]
fn a_killed_image_is_read_by_qemu_and_repaired_by_it() {
    let folder = folder();
    let path = image(folder.path(), 16 * MIB, 4096);
    let mut model = Model::empty(16 * MIB);
    kill(&mut model, &path, 3, true, &mut Random(8));
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
