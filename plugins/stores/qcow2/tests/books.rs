//! Images whose books are wrong: counts that are too low are put right when the image is opened for writing, and what cannot be put right is refused.
#![allow(clippy::unwrap_used, reason = "a test")]

#[path = "../../file/tests/support/mod.rs"]
mod support;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use support::{Bench, Random, everything};
use tenon_store_qcow2::{CreateOptions, PLUGIN, check, create, repair};

const MIB: u64 = 1 << 20;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn open(path: &Path, read_only: bool) -> Result<Bench, String> {
    let read_only = if read_only { "yes" } else { "no" };
    let settings = [("path", path.to_str().unwrap()), ("readonly", read_only)];
    Bench::open(&PLUGIN, &settings).map_err(|error| error.to_string())
}

/// An image, and its tables.
struct Image {
    path: PathBuf,
    file: File,
    cluster: u64,
    model: Vec<u8>,
}

impl Image {
    /// A MiB at the begin of the disk is data, and one in its middle.
    fn new(folder: &Path, cluster_size: u32) -> Self {
        let path = folder.join("disk.qcow2");
        let _ = fs::remove_file(&path);
        create(&path, Some(8 * MIB), &CreateOptions { cluster_size, ..Default::default() }).unwrap();
        let mut image = Self {
            file: File::options().read(true).write(true).open(&path).unwrap(),
            path,
            cluster: cluster_size.into(),
            model: vec![0; 8 << 20],
        };
        let mut bench = open(&image.path, false).unwrap();
        image.write(&mut bench, 0);
        image.write(&mut bench, 4 * MIB);
        bench.close().unwrap();
        image
    }

    fn write(&mut self, bench: &mut Bench, position: u64) {
        let data = Random(position + 3).bytes(MIB);
        bench.write(position, &data).unwrap();
        self.model[usize::try_from(position).unwrap()..][..1 << 20].copy_from_slice(&data);
    }

    fn get(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        self.file.read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    }

    fn set(&self, at: u64, number: u64) {
        self.file.write_all_at(&number.to_be_bytes(), at).unwrap();
    }

    fn l1(&self) -> u64 {
        self.get(40)
    }

    fn l2(&self) -> u64 {
        self.get(self.l1()) & OFFSET
    }

    fn refcounts(&self) -> u64 {
        self.get(48)
    }

    /// Counts the cluster at an offset as free.
    fn free(&self, offset: u64) {
        let (cluster, per_block) = (offset / self.cluster, self.cluster / 2);
        let block = self.get(self.refcounts() + cluster / per_block * 8);
        self.file.write_all_at(&[0; 2], block + cluster % per_block * 2).unwrap();
    }

    fn mark(&self) {
        self.file.write_all_at(&[1], 79).unwrap();
    }

    /// It is repaired when it is opened, and good for writing then.
    fn opens_repaired(mut self, what: &str) {
        assert!(check(&self.path).unwrap().errors > 0, "{what}: the check finds nothing");
        let before = fs::read(&self.path).unwrap();
        let mut bench = open(&self.path, true).unwrap();
        assert!(everything(&mut bench) == self.model, "{what}: read only");
        drop(bench);
        assert!(fs::read(&self.path).unwrap() == before, "{what}: reading changed it");

        let mut bench = open(&self.path, false).unwrap_or_else(|why| panic!("{what}: {why}"));
        let log = bench.log();
        assert!(
            log.len() == 1 && log[0].contains("counted too low") && log[0].contains("disk.qcow2"),
            "{log:?}"
        );
        assert_ne!(qemus(&self.path), Some(false), "{what}: not repaired before the first write");
        for position in [2 * MIB, 6 * MIB, 0] {
            self.write(&mut bench, position);
        }
        assert!(everything(&mut bench) == self.model, "{what}");
        bench.close().unwrap();
        assert_eq!(
            check(&self.path).map(|report| (report.errors, report.told)).unwrap(),
            (0, vec![]),
            "{what}"
        );
        assert_ne!(qemus(&self.path), Some(false), "{what}: QEMU finds errors");
        let mut bench = open(&self.path, false).unwrap();
        assert!(everything(&mut bench) == self.model && bench.log().is_empty(), "{what}: opened again");
    }

    /// It is refused for writing, unchanged, and can be read.
    fn is_refused(&self, what: &str) {
        let before = fs::read(&self.path).unwrap();
        let error = open(&self.path, false).err().unwrap_or_else(|| panic!("{what} was not refused"));
        for part in ["disk.qcow2", "readonly", "qemu-img check -r all"] {
            assert!(error.contains(part), "{what}: {error}");
        }
        println!("{what}: {error}");
        assert!(fs::read(&self.path).unwrap() == before, "{what}: changed");
        assert!(check(&self.path).unwrap().errors > 0, "{what}: the check finds nothing");
        open(&self.path, true).unwrap();
    }
}

/// QEMU's opinion of a copy of an image, with lost space or without; `None` where it is not installed.
fn qemus(path: &Path) -> Option<bool> {
    let copy = path.with_extension("copy");
    fs::copy(path, &copy).unwrap();
    let output = Command::new("qemu-img").args(["check", "-q"]).arg(&copy).output().ok()?;
    Some(matches!(output.status.code(), Some(0 | 3)))
}

type Damage = fn(&Image);

#[test]
fn counts_that_are_too_low_are_put_right() {
    let folder = folder();
    let damages: [(&str, Damage); 8] = [
        ("the L1 table", |image| image.free(image.l1())),
        ("an L2 table", |image| image.free(image.l2())),
        ("the refcount table", |image| image.free(image.refcounts())),
        ("a refcount block", |image| image.free(image.get(image.refcounts()))),
        ("data", |image| image.free(image.get(image.l2()) & OFFSET)),
        ("the header", |image| image.free(0)),
        ("all", |image| {
            let block = image.get(image.refcounts());
            image.file.write_all_at(&vec![0; usize::try_from(image.cluster).unwrap()], block).unwrap();
        }),
        ("a refcount block that is missing", |image| image.set(image.refcounts() + 8, 0)),
    ];
    for (cluster_size, marked) in [(512, true), (4096, false), (65536, true)] {
        for (what, damage) in damages {
            if cluster_size != 4096
                && !["all", "an L2 table", "a refcount block that is missing"].contains(&what)
            {
                continue;
            }
            let image = Image::new(folder.path(), cluster_size);
            if what.ends_with("missing") && image.get(image.refcounts() + 8) == 0 {
                continue;
            }
            damage(&image);
            if marked {
                image.mark();
            }
            image.opens_repaired(&format!("{what}, clusters of {cluster_size}"));
        }
    }
}

#[test]
fn a_repair_finds_lost_space_as_well() {
    let folder = folder();
    for cluster_size in [512, 65536] {
        let mut image = Image::new(folder.path(), cluster_size);
        // One cluster is named no more, the next one is counted as free.
        let gone = usize::try_from(cluster_size).unwrap();
        image.free(image.get(image.l2() + 8) & OFFSET);
        image.set(image.l2(), 0);
        image.model[..gone].fill(0);
        image.mark();
        let report = check(&image.path).unwrap();
        assert!(report.unclean && report.errors > 0 && report.leaks == 1, "{report:?}");
        let held = open(&image.path, true).unwrap();
        assert!(repair(&image.path).unwrap_err().to_string().contains("in use"));
        drop(held);
        let repaired = repair(&image.path).unwrap();
        assert_eq!((repaired.clusters, repaired.lost, repaired.blocks), (1, 1, 0));
        let report = check(&image.path).unwrap();
        assert!(!report.unclean && (report.errors, report.leaks) == (0, 0), "{report:?}");
        let mut bench = open(&image.path, false).unwrap();
        assert!(bench.log().is_empty() && everything(&mut bench) == image.model);
        image.write(&mut bench, 0);
        assert!(everything(&mut bench) == image.model);
        bench.close().unwrap();
        assert_eq!(check(&image.path).unwrap().leaks, 0);
        assert_ne!(qemus(&image.path), Some(false));
    }
}

#[test]
fn an_image_whose_end_is_missing_is_not_made_whole_with_zeroes() {
    let folder = folder();
    let image = Image::new(folder.path(), 4096);
    let length = image.file.metadata().unwrap().len();
    // The last cluster only, and much.
    for missing in [4096, MIB + 512] {
        image.file.set_len(length - missing).unwrap();
        image.is_refused(&format!("{missing} bytes are missing"));
        assert!(repair(&image.path).unwrap_err().to_string().contains("where none can be"));
        let mut bench = open(&image.path, true).unwrap();
        bench.read(0, MIB).unwrap();
        if missing > MIB {
            assert!(bench.read(4 * MIB, MIB).is_err(), "zeroes in the place of data");
        }
    }
    // One that was not closed may have lost what was not flushed, which is told.
    image.mark();
    let repaired = repair(&image.path).unwrap();
    assert!(repaired.behind > 255 && repaired.to_string().contains("behind the end"), "{repaired}");
    assert_eq!(check(&image.path).unwrap().errors, 0);
}

#[test]
fn space_of_a_snapshot_that_is_gone_is_found_and_entries_say_that_they_are_alone() {
    let folder = folder();
    let image = Image::new(folder.path(), 65536);
    let qemu = |words: &[&str]| Command::new("qemu-img").args(words).arg(&image.path).status();
    let Ok(made) = qemu(&["snapshot", "-c", "before"]) else {
        return println!("not run: there is no qemu-img (package qemu-utils)");
    };
    assert!(made.success());
    assert!(repair(&image.path).unwrap_err().to_string().contains("snapshots"));
    // As if deleting it had been cut short.
    image.file.write_all_at(&[0; 12], 60).unwrap();
    let report = check(&image.path).unwrap();
    assert!(report.errors == 0 && report.leaks > 0, "{report:?}");
    let repaired = repair(&image.path).unwrap();
    assert!(repaired.lost > 32 && repaired.entries > 32, "{repaired:?}");
    let report = check(&image.path).unwrap();
    assert_eq!((report.errors, report.leaks), (0, 0), "{report:?}");
    assert!(qemu(&["check", "-q"]).unwrap().success());
    // An entry that does not say so is told of, as by QEMU.
    let first = image.get(image.l2());
    image.set(image.l2(), first & !(1 << 63));
    assert_eq!(check(&image.path).unwrap().errors, 1);
    assert_eq!(repair(&image.path).unwrap().entries, 1);
    let mut bench = open(&image.path, false).unwrap();
    assert!(everything(&mut bench) == image.model);
}

#[test]
fn counts_of_every_width_are_put_right() {
    let folder = folder();
    fs::write(folder.path().join("in.raw"), Random(4).bytes(MIB)).unwrap();
    for bits in [1, 2, 4, 8, 16, 32, 64] {
        let options = format!("refcount_bits={bits},cluster_size=4k");
        let made = Command::new("qemu-img")
            .args(["convert", "-O", "qcow2", "-o", &options, "in.raw", "disk.qcow2"])
            .current_dir(folder.path())
            .status();
        let Ok(made) = made else {
            return println!("not run: there is no qemu-img (package qemu-utils)");
        };
        assert!(made.success());
        let path = folder.path().join("disk.qcow2");
        let mut image = fs::read(&path).unwrap();
        let wide =
            |at: usize| usize::try_from(u64::from_be_bytes(image[at..at + 8].try_into().unwrap())).unwrap();
        let block = wide(wide(48));
        image[block + 3 * bits / 8..][..16].fill(0);
        fs::write(&path, image).unwrap();
        assert!(check(&path).unwrap().errors > 0);
        let mut bench = open(&path, false).unwrap();
        assert!(bench.log()[0].contains("counted too low"));
        assert!(everything(&mut bench) == fs::read(folder.path().join("in.raw")).unwrap());
        bench.close().unwrap();
        assert_eq!(check(&path).map(|report| (report.errors, report.leaks)).unwrap(), (0, 0), "{bits} bits");
        assert_eq!(qemus(&path), Some(true));
    }
}

#[test]
fn what_cannot_be_put_right_is_refused_and_can_be_read() {
    let folder = folder();
    let damages: [(&str, Damage); 9] = [
        ("data that is an L2 table as well", |image| image.set(image.l2() + 8, image.l2() | 1 << 63)),
        ("data that is the refcount table as well", |image| image.set(image.l2() + 8, image.refcounts())),
        ("an L2 table that is the L1 table", |image| {
            image.set(image.l1() + 8, image.l1() | 1 << 63);
        }),
        ("two entries for data that is said to be used once", |image| {
            image.set(image.l2() + 8, image.get(image.l2()));
        }),
        ("one that says so, and one that does not", |image| {
            image.set(image.l2() + 8, image.get(image.l2()) & OFFSET);
        }),
        ("an L2 table for two parts of the disk", |image| {
            image.set(image.l1() + 8, image.get(image.l1()));
        }),
        ("data far outside the file", |image| image.set(image.l2(), 1 << 50 | 1 << 63)),
        ("an L2 table far outside the file", |image| image.set(image.l1(), 1 << 50 | 1 << 63)),
        ("a refcount block that is an L2 table", |image| image.set(image.refcounts(), image.l2())),
    ];
    for marked in [true, false] {
        for (what, damage) in damages {
            let image = Image::new(folder.path(), 4096);
            damage(&image);
            if marked {
                image.mark();
            }
            image.is_refused(what);
        }
    }
}

#[test]
fn data_of_which_the_power_failed_before_the_file_grew_is_zero_and_not_given_away() {
    let folder = folder();
    let mut image = Image::new(folder.path(), 4096);
    // The last of what was written is cut off: its L2 entries are there.
    let length = image.file.metadata().unwrap().len();
    image.file.set_len(length - 40 * 4096).unwrap();
    image.mark();
    let mut bench = open(&image.path, false).unwrap();
    let now = everything(&mut bench);
    assert!(now.chunks(4096).zip(image.model.chunks(4096)).all(|(now, was)| now == was || *now == [0; 4096]));
    image.model = now;
    for position in [2 * MIB, 6 * MIB] {
        image.write(&mut bench, position);
    }
    assert!(everything(&mut bench) == image.model);
    bench.close().unwrap();
    assert_eq!(check(&image.path).map(|report| (report.errors, report.told)).unwrap(), (0, vec![]));
    assert_ne!(qemus(&image.path), Some(false));
}
