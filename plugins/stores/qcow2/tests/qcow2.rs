//! qcow2 images as stores: content that QEMU's tools agree with, backing files, locks, errors, and what else is done with images.
#![allow(clippy::unwrap_used, reason = "a test")]

#[path = "../../file/tests/support/mounted.rs"]
mod mounted;
#[path = "../../file/tests/support/mod.rs"]
mod support;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use mounted::Mounted;
use support::{Ask, Bench, everything, open_files, torture};
use tenon_sdk::store::StoreError;
use tenon_store_qcow2::{Backing, CreateOptions, PLUGIN, check, create, info, resize};
use tenon_testkit::{NativeStoreBench, StoreChecks, suite};

const MIB: u64 = 1 << 20;

fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn open(path: &Path, more: &[(&str, &str)]) -> Result<Bench, String> {
    let mut settings = vec![("path", path.to_str().unwrap())];
    settings.extend(more);
    Bench::open(&PLUGIN, &settings).map_err(|error| error.to_string())
}

/// An image that this crate makes.
fn image(folder: &tempfile::TempDir, size: u64) -> PathBuf {
    let path = folder.path().join("disk.qcow2");
    create(&path, Some(size), &CreateOptions::default()).unwrap();
    path
}

/// Runs one of QEMU's tools in a folder; `None` where it is not installed.
fn qemu(folder: &Path, line: &[&str]) -> Option<Result<String, String>> {
    let output = Command::new(line[0]).args(&line[1..]).current_dir(folder).output().ok()?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Some(if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        Err(text(&output.stdout) + &text(&output.stderr))
    })
}

/// Has QEMU check an image, and read all of it.
fn qemu_agrees(path: &Path, content: &[u8]) {
    let (folder, name) = (path.parent().unwrap(), path.to_str().unwrap());
    assert_eq!(check(path).map(|report| (report.errors, report.leaks, report.told)).unwrap(), (0, 0, vec![]));
    let Some(checked) = qemu(folder, &["qemu-img", "check", name]) else {
        return println!("not run: QEMU's opinion: there is no qemu-img (package qemu-utils)");
    };
    checked.unwrap();
    let raw = folder.join("qemus.raw");
    qemu(folder, &["qemu-img", "convert", "-O", "raw", name, "qemus.raw"]).unwrap().unwrap();
    assert!(fs::read(raw).unwrap() == content, "QEMU reads something else");
}

#[test]
fn what_was_written_is_read_back_by_us_and_by_qemu() {
    for (seed, cluster_size) in [(1, 512), (2, 4096), (3, 64 << 10), (4, 2 << 20)] {
        let folder = folder();
        let path = folder.path().join("disk.qcow2");
        create(&path, Some(8 * MIB + 512), &CreateOptions { cluster_size, ..Default::default() }).unwrap();
        let mut model = vec![0; (8 << 20) + 512];
        let mut bench = open(&path, &[]).unwrap();
        assert_eq!((bench.info.size, bench.info.optimal_size), (8 * MIB + 512, cluster_size));
        torture(&mut bench, &mut model, seed, 60, true);
        bench.close().unwrap();
        qemu_agrees(&path, &model);
        let mut bench = open(&path, &[]).unwrap();
        torture(&mut bench, &mut model, seed + 10, 30, true);
        // Not closed in good order: what was reported is there all the same.
        drop(bench);
        qemu_agrees(&path, &model);
    }
}

#[test]
fn zeroing_a_part_of_a_cluster_loses_no_write_to_the_rest_of_it() {
    const CLUSTER: u64 = 64 << 10;
    const HALF: usize = 32 << 10;
    let folder = folder();
    let mut bench = open(&image(&folder, 2 * MIB), &[]).unwrap();
    for round in 0..40 {
        bench.run(&[Ask::WriteZeroes { position: 0, length: 2 * MIB, unmap: true }]);
        let halves: Vec<_> = (0..2 * MIB)
            .step_by(2 * HALF)
            .flat_map(|at| {
                let zeroes = Ask::WriteZeroes { position: at, length: CLUSTER / 2, unmap: false };
                [zeroes, Ask::Write { position: at + CLUSTER / 2, data: vec![1 + round; HALF] }]
            })
            .collect();
        assert!(bench.run(&halves).iter().all(Result::is_ok));
        let all = everything(&mut bench);
        for (at, half) in all.chunks(HALF).enumerate() {
            let expected = if at % 2 == 0 { 0 } else { 1 + round };
            assert!(half.iter().all(|byte| *byte == expected), "round {round}: half {at} of the clusters");
        }
    }
}

#[test]
fn a_cluster_that_is_given_back_and_used_again_at_once_is_not_emptied() {
    let folder = folder();
    let base = folder.path().join("base.raw");
    let mut model = support::Random(2).bytes(MIB);
    fs::write(&base, &model).unwrap();
    let path = folder.path().join("top.qcow2");
    let backing = Some(Backing { path: base.clone(), qcow2: false });
    create(&path, None, &CreateOptions { backing, ..Default::default() }).unwrap();
    let mut bench = open(&path, &[("backing", base.to_str().unwrap())]).unwrap();
    const HALF: u64 = 32 << 10;
    for at in (0..MIB).step_by(256 << 10) {
        // The second cluster is in the image, those around it are not, and half of each is zeroed.
        bench.write(at + 2 * HALF, &[7; 64 << 10]).unwrap();
        bench.write_zeroes(at + HALF, 4 * HALF, true).unwrap();
        let start = usize::try_from(at + HALF).unwrap();
        model[start..start + (128 << 10)].fill(0);
        assert!(everything(&mut bench) == model, "at {at}");
    }
    bench.close().unwrap();
    qemu_agrees(&path, &model);
}

#[test]
fn images_of_qemus_making_are_read_and_written() {
    let folder = folder();
    let data = support::Random(5).bytes(2 * MIB);
    let mut model = data.clone();
    model.resize(4 << 20, 0);
    fs::write(folder.path().join("in.raw"), &model).unwrap();
    for options in [
        "compat=0.10",
        "compat=1.1,refcount_bits=1",
        "compat=1.1,refcount_bits=64,cluster_size=4k",
        "compat=1.1,lazy_refcounts=on",
        "compat=1.1,preallocation=metadata",
    ] {
        for compress in [&[][..], &["-c"]] {
            let mut line = vec!["qemu-img", "convert", "-O", "qcow2", "-o", options];
            line.extend(compress);
            line.extend(["in.raw", "out.qcow2"]);
            match qemu(folder.path(), &line) {
                None => return println!("not run: there is no qemu-img (package qemu-utils)"),
                Some(Err(why)) if why.contains("ompress") => continue,
                Some(done) => done.unwrap(),
            };
            let path = folder.path().join("out.qcow2");
            let mut bench = open(&path, &[]).unwrap_or_else(|why| panic!("{options}: {why}"));
            assert!(everything(&mut bench) == model, "{options}: other content");
            let mut changed = model.clone();
            torture(&mut bench, &mut changed, 6, 30, true);
            bench.close().unwrap();
            qemu_agrees(&path, &changed);
        }
    }
}

#[test]
fn a_backing_file_is_opened_only_if_it_was_granted() {
    let folder = folder();
    let place = |name: &str| folder.path().join(name);
    let data = support::Random(8).bytes(MIB);
    fs::write(place("base.raw"), &data).unwrap();
    let on = |path: &str, base: &str, qcow2| {
        let backing = Some(Backing { path: place(base), qcow2 });
        create(&place(path), None, &CreateOptions { backing, ..Default::default() }).unwrap();
    };
    on("middle.qcow2", "base.raw", false);
    on("top.qcow2", "middle.qcow2", true);
    assert_eq!(info(&place("top.qcow2")).unwrap().backing.as_deref(), Some("middle.qcow2"));
    let (top, middle, base) = (place("top.qcow2"), place("middle.qcow2"), place("base.raw"));
    let names =
        |paths: &[&Path]| paths.iter().map(|path| path.to_str().unwrap()).collect::<Vec<_>>().join(":");

    for (granted, missing) in
        [(vec![], "middle.qcow2"), (vec![&*middle], "base.raw"), (vec![&*base], "middle.qcow2")]
    {
        let error = open(&top, &[("backing", &names(&granted))]).err().unwrap();
        assert!(
            error.contains("top.qcow2") && error.contains(missing) && error.contains("not granted"),
            "{error}"
        );
    }
    let error = open(&middle, &[("backing", &names(&[&base, &top]))]).err().unwrap();
    assert!(error.contains("which no image here stands on"), "{error}");

    let all = names(&[&middle, &base]);
    let mut bench = open(&top, &[("backing", &all)]).unwrap();
    assert_eq!(everything(&mut bench), data);
    // While it is open, nobody writes what is below.
    assert!(open(&middle, &[("backing", &names(&[&base]))]).err().unwrap().contains("middle.qcow2"));
    let mut model = data.clone();
    torture(&mut bench, &mut model, 4, 40, true);
    bench.resize(2 * MIB).unwrap();
    model.resize(2 << 20, 0);
    assert!(everything(&mut bench) == model);
    bench.close().unwrap();
    assert!(fs::read(&base).unwrap() == data, "the backing file was written");
    qemu_agrees(&top, &model);
}

#[test]
fn a_backing_file_of_no_stated_format_or_of_a_wrong_kind_is_refused() {
    let folder = folder();
    fs::write(folder.path().join("base"), vec![0; 1 << 20]).unwrap();
    let made =
        qemu(folder.path(), &["qemu-img", "create", "-u", "-f", "qcow2", "-b", "base", "a.qcow2", "1M"]);
    let Some(made) = made else { return println!("not run: there is no qemu-img (package qemu-utils)") };
    if made.is_ok() {
        let base = folder.path().join("base");
        let error =
            open(&folder.path().join("a.qcow2"), &[("backing", base.to_str().unwrap())]).err().unwrap();
        assert!(error.contains("format") && error.contains("qemu-img rebase"), "{error}");
    }
    for (name, right) in [("nbd://localhost:10809", false), ("/dev/stdin", false), ("/etc/passwd", false)] {
        let path = folder.path().join("b.qcow2");
        let _ = fs::remove_file(&path);
        qemu(
            folder.path(),
            &["qemu-img", "create", "-u", "-f", "qcow2", "-F", "raw", "-b", name, "b.qcow2", "1M"],
        )
        .unwrap()
        .unwrap();
        let error = open(&path, &[]).err().unwrap();
        assert!(error.contains(name) && error.contains("not granted") != right, "{error}");
    }
}

#[test]
fn discarded_space_is_given_back_and_zeroes_take_none() {
    let folder = folder();
    let path = image(&folder, 16 * MIB);
    let mut bench = open(&path, &[]).unwrap();
    assert!(bench.info.discard && bench.info.write_zeroes);
    for n in 0..16 {
        bench.write(n * MIB, &[3; 1 << 20]).unwrap();
    }
    bench.flush().unwrap();
    let full = fs::metadata(&path).unwrap().blocks() * 512;
    bench.discard(0, 8 * MIB).unwrap();
    bench.write_zeroes(8 * MIB, 4 * MIB, true).unwrap();
    bench.write_zeroes(12 * MIB + 512, 1024, false).unwrap();
    bench.flush().unwrap();
    let now = fs::metadata(&path).unwrap().blocks() * 512;
    assert!(now + 10 * MIB < full, "{full} bytes became {now}");
    assert_eq!(bench.read(8 * MIB, 4 * MIB).unwrap(), vec![0; 4 << 20]);
    let content = everything(&mut bench);
    assert_eq!(content[(12 << 20) + 512..(12 << 20) + 1536], [0; 1024]);
    assert!(content[(12 << 20) + 1536..].iter().all(|byte| *byte == 3));
    bench.close().unwrap();
    qemu_agrees(&path, &content);
}

#[test]
fn an_image_grows_and_shrinks_and_holds_nothing_old() {
    let folder = folder();
    let path = image(&folder, 4 * MIB);
    let mut bench = open(&path, &[]).unwrap();
    bench.write(0, &[5; 4 << 20]).unwrap();
    bench.resize(MIB + 512).unwrap();
    assert_eq!(bench.read(2 * MIB, 512), Err(StoreError::OutOfRange));
    bench.resize(6 * MIB).unwrap();
    let mut model = vec![0; 6 << 20];
    model[..(1 << 20) + 512].fill(5);
    assert!(everything(&mut bench) == model, "what was cut off came back");
    assert!(bench.resize(0).is_err() && bench.resize(1000).is_err());
    bench.close().unwrap();
    qemu_agrees(&path, &model);
    resize(&path, 9 * MIB, &[]).unwrap();
    assert_eq!(info(&path).unwrap().size, 9 * MIB);
    model.resize(9 << 20, 0);
    qemu_agrees(&path, &model);
}

#[test]
fn what_cannot_be_used_is_refused_in_words() {
    let folder = folder();
    let path = image(&folder, MIB);
    let whole = fs::read(&path).unwrap();
    let changed = |at: usize, bytes: &[u8]| {
        let mut image = whole.clone();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        fs::write(&path, image).unwrap();
        open(&path, &[]).err().unwrap_or_else(|| panic!("{at} may be {bytes:?}"))
    };
    for (at, bytes, part) in [
        (0, &b"QFI\xfa"[..], "no qcow2 image"),
        (7, &[4], "version 4"),
        (23, &[30], "2^30"),
        (24, &[0xff], "more than there can be"),
        (30, &[1, 1], "multiple of 512"),
        (24, &[0; 8], "not 0"),
        (35, &[2], "encrypted"),
        (63, &[1], "snapshots"),
        (79, &[2], "corrupt"),
        (79, &[4], "another file"),
        (79, &[8], "compression"),
        (79, &[16], "extended"),
        (72, &[1], "not known"),
        (99, &[7], "64 bits"),
        (8, &[0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 4], "outside the header"),
    ] {
        let error = changed(at, bytes);
        assert!(error.contains(part) && error.contains("disk.qcow2"), "{at}: {error}");
    }
    for length in [0, 3, 4, 50, 80, 103] {
        fs::write(&path, &whole[..length]).unwrap();
        assert!(open(&path, &[]).is_err() && info(&path).is_err() && check(&path).is_err());
    }
    assert!(open(folder.path(), &[]).err().unwrap().contains("no regular file"));
    assert!(open(Path::new("/dev/zero"), &[]).err().unwrap().contains("no regular file"));
    assert!(Bench::open(&PLUGIN, &[]).err().unwrap().to_string().contains("`path` is missing"));
}

#[test]
fn a_writer_shares_an_image_with_nobody_and_readers_share_it() {
    let folder = folder();
    let path = image(&folder, MIB);
    let writer = open(&path, &[]).unwrap();
    assert!(open(&path, &[]).err().unwrap().contains("in use by this command itself"));
    assert!(check(&path).unwrap_err().to_string().contains("is being written"));
    if let Some(theirs) = qemu(folder.path(), &["qemu-io", "-c", "write 0 512", "disk.qcow2"]) {
        assert!(theirs.unwrap_err().contains("lock"));
    }
    writer.close().unwrap();
    let mut first = open(&path, &[("readonly", "yes")]).unwrap();
    let second = open(&path, &[("readonly", "yes")]).unwrap();
    assert!(open(&path, &[]).is_err());
    assert_eq!(first.write(0, &[0; 512]), Err(StoreError::ReadOnly));
    assert_eq!(first.discard(0, 512), Err(StoreError::ReadOnly));
    first.flush().unwrap();
    drop((first, second));
    open(&path, &[]).unwrap();
}

#[test]
fn closing_leaves_no_open_file() {
    let folder = folder();
    let path = image(&folder, 16 * MIB);
    let name = folder.path().file_name().unwrap().to_str().unwrap();
    let mut bench = open(&path, &[]).unwrap();
    assert!(open_files(name) > 0);
    let asked: Vec<Ask> =
        (0..200).map(|n| Ask::Write { position: n * 65536, data: vec![1; 65536] }).collect();
    let begun = bench.begin(&asked);
    drop(bench);
    drop(begun);
    assert_eq!(open_files(name), 0);
    assert_eq!(check(&path).unwrap().errors, 0);
}

#[test]
fn a_full_file_system_is_no_space_and_no_flush_that_failed_is_success() {
    let Some(disk) = Mounted::tmpfs("3m") else { return };
    let path = disk.path().join("disk.qcow2");
    create(&path, Some(16 * MIB), &CreateOptions::default()).unwrap();
    let mut bench = open(&path, &[]).unwrap();
    bench.write(0, &[4; 4096]).unwrap();
    bench.flush().unwrap();
    let asked: Vec<Ask> = (1..16).map(|n| Ask::Write { position: n * MIB, data: vec![5; 1 << 20] }).collect();
    let outcomes = bench.run(&asked);
    assert!(outcomes.contains(&Err(StoreError::NoSpace)), "{outcomes:?}");
    let flushed = bench.flush();
    assert_eq!(bench.read(0, 4096).unwrap(), [4; 4096]);
    let written: Vec<u64> =
        (1_u64..16).zip(&outcomes).filter(|(_, outcome)| outcome.is_ok()).map(|(n, _)| n).collect();
    drop(bench);
    assert_eq!(
        fs::read(&path).unwrap()[79] & 1,
        1,
        "a change failed: the next writer goes through the books"
    );
    assert_eq!(check(&path).unwrap().errors, 0, "{:?}", check(&path));
    drop(open(&path, &[]).unwrap());
    // What a flush that succeeded covers is there.
    let mut bench = open(&path, &[("readonly", "yes")]).unwrap();
    if flushed.is_ok() {
        for n in written {
            assert_eq!(bench.read(n * MIB, MIB).unwrap(), vec![5; 1 << 20]);
        }
    }
    drop(bench);
}

#[test]
fn a_table_whose_name_could_not_be_written_at_first_is_not_lost() {
    let Some(disk) = Mounted::tmpfs("1m") else { return };
    let path = disk.path().join("disk.qcow2");
    create(&path, Some(16 * MIB), &CreateOptions { cluster_size: 4096, ..Default::default() }).unwrap();
    let header = fs::read(&path).unwrap();
    let l1 = u64::from_be_bytes(header[40..48].try_into().unwrap());
    // No page of zeroes is there, the L1 table's neither: writing to it takes space.
    let sparse = disk.path().join("sparse.qcow2");
    assert!(Command::new("cp").arg("--sparse=always").args([&path, &sparse]).status().unwrap().success());
    fs::rename(&sparse, &path).unwrap();
    let mut bench = open(&path, &[]).unwrap();
    // There is space for the L2 table, and for nothing else.
    let filler = disk.path().join("filler");
    let _ = fs::write(&filler, vec![1; 2 << 20]);
    let length = fs::metadata(&filler).unwrap().len() / 4096 * 4096;
    fs::File::options().write(true).open(&filler).unwrap().set_len(length - 4096).unwrap();
    assert_eq!(bench.write(0, &[7; 4096]), Err(StoreError::NoSpace));
    let table = &fs::read(&path).unwrap()[usize::try_from(l1).unwrap()..][..8];
    assert_eq!(table, [0; 8], "the L1 entry could be written");
    fs::remove_file(filler).unwrap();
    bench.write(0, &[8; 4096]).unwrap();
    bench.flush().unwrap();
    drop(bench);
    let mut bench = open(&path, &[("readonly", "yes")]).unwrap();
    assert!(bench.read(0, 4096).unwrap() == [8; 4096], "what was flushed is not there");
    drop(bench);
    assert_eq!(check(&path).unwrap().errors, 0);
}

#[test]
fn images_are_made_described_and_checked() {
    let folder = folder();
    let path = image(&folder, 10 * MIB);
    let about = info(&path).unwrap();
    assert_eq!(
        (about.size, about.version, about.cluster_size, about.backing, about.unusable),
        (10 * MIB, 3, 65536, None, None)
    );
    assert!(about.taken < MIB);
    assert_eq!(check(&path).unwrap(), tenon_store_qcow2::Report::default());
    // What is there is not written over.
    assert!(create(&path, Some(MIB), &CreateOptions::default()).is_err());
    assert_eq!(info(&path).unwrap().size, 10 * MIB);

    let other = folder.path().join("other.qcow2");
    for (size, options) in [
        (Some(0), CreateOptions::default()),
        (Some(1000), CreateOptions::default()),
        (None, CreateOptions::default()),
        (Some(u64::MAX - 511), CreateOptions::default()),
        (Some(MIB), CreateOptions { cluster_size: 1000, ..Default::default() }),
        (Some(MIB), CreateOptions { cluster_size: 256, ..Default::default() }),
        (
            Some(MIB),
            CreateOptions {
                backing: Some(Backing { path: "missing".into(), qcow2: true }),
                ..Default::default()
            },
        ),
        // More than 512-byte clusters can address.
        (Some(1 << 60), CreateOptions { cluster_size: 512, ..Default::default() }),
    ] {
        assert!(create(&other, size, &options).is_err(), "{size:?} {options:?}");
        assert!(!other.exists(), "{size:?} {options:?} left a file behind");
    }
    create(&other, Some(4 * MIB), &CreateOptions { preallocate: true, ..Default::default() }).unwrap();
    assert_eq!(check(&other).unwrap().data_clusters, 64);
    qemu_agrees(&other, &vec![0; 4 << 20]);

    // Faults that QEMU's check finds, ours does.
    let mut bench = open(&path, &[]).unwrap();
    bench.write(0, &[1; 1 << 20]).unwrap();
    bench.close().unwrap();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let mut table = [0; 8];
    file.read_exact_at(&mut table, 48).unwrap();
    let offset = u64::from_be_bytes(table);
    file.read_exact_at(&mut table, offset).unwrap();
    let block = u64::from_be_bytes(table);
    let count =
        |cluster: u64, count: u16| file.write_all_at(&count.to_be_bytes(), block + cluster * 2).unwrap();
    count(5, 0);
    let report = check(&path).unwrap();
    assert!(report.errors > 0 && report.told[0].contains("cluster 5"), "{report:?}");
    count(5, 1);
    count(1000, 1);
    assert_eq!(
        check(&path).map(|report| (report.errors, report.leaks)).unwrap(),
        (0, 0),
        "1000 is behind the end"
    );
    let last = file.metadata().unwrap().len() / 65536;
    file.set_len((last + 1) * 65536).unwrap();
    count(last, 1);
    assert_eq!(check(&path).map(|report| (report.errors, report.leaks)).unwrap(), (0, 1));
}

#[test]
fn the_check_finds_reserved_bits_for_which_reads_fail() {
    let folder = folder();
    let path = image(&folder, 2 * MIB);
    let mut bench = open(&path, &[]).unwrap();
    bench.write(0, &[1; 4096]).unwrap();
    bench.close().unwrap();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let number = |at: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    };
    let l1 = number(40);
    let l2 = number(l1) & 0x00ff_ffff_ffff_fe00;
    for (entry, bit) in [(l1, 3), (l2, 60), (l2, 1)] {
        let good = number(entry);
        file.write_all_at(&(good | 1 << bit).to_be_bytes(), entry).unwrap();
        let report = check(&path).unwrap();
        assert!(report.errors > 0 && report.told[0].contains("reserved"), "bit {bit}: {report:?}");
        file.write_all_at(&good.to_be_bytes(), entry).unwrap();
    }
    assert_eq!(check(&path).unwrap().errors, 0);
}

#[test]
fn it_does_what_every_user_of_a_store_relies_on() {
    let folder = folder();
    let path = image(&folder, 8 * MIB);
    let settings = [("path", path.to_str().unwrap())];
    let mut bench = NativeStoreBench::open(&PLUGIN, &settings, vec![]).unwrap();
    suite::store(&mut bench, StoreChecks::default()).unwrap();
    drop(bench);
    let report = check(&path).unwrap();
    assert_eq!((report.errors, report.leaks), (0, 0), "{report:?}");
}
