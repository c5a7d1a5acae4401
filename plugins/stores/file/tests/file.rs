//! Files as stores: content, batches, errors, locks, and what is left when they are closed.
#![allow(unsafe_code, clippy::unwrap_used, reason = "limits, pipes and loop devices by system calls")]

#[path = "support/mounted.rs"]
mod mounted;
mod support;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use mounted::Mounted;
use support::{Ask, Bench, Layout, open_files, torture};
use tenon_sdk::store::StoreError;
use tenon_store_file::PLUGIN;
use tenon_testkit::{NativeStoreBench, StoreChecks, suite};

const MIB: u64 = 1 << 20;

/// A folder on a disk, where O_DIRECT is to be had; and a file in it of so many bytes.
fn file(length: u64) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = folder.path().join("disk.img");
    File::create(&path).unwrap().set_len(length).unwrap();
    (folder, path)
}

/// A byte that is another for neighbours.
fn fill(n: u64) -> u8 {
    n.to_le_bytes()[0] ^ n.to_le_bytes()[1]
}

fn open(path: &Path, more: &[(&str, &str)]) -> Result<Bench, String> {
    let mut settings = vec![("path", path.to_str().unwrap())];
    settings.extend(more);
    Bench::open(&PLUGIN, &settings).map_err(|error| error.to_string())
}

#[test]
fn what_was_written_is_read_back_by_either_engine_with_and_without_the_page_cache() {
    for engine in ["io_uring", "threads"] {
        for direct in ["no", "yes"] {
            let (_folder, path) = file(8 * MIB);
            let mut bench = open(&path, &[("engine", engine), ("direct", direct)]).unwrap();
            let mut model = vec![0; 8 << 20];
            torture(&mut bench, &mut model, 77, 60, true);
            bench.close().unwrap();
            assert!(
                fs::read(&path).unwrap() == model,
                "{engine}, direct={direct}: the file is something else"
            );
        }
    }
}

#[test]
fn more_operations_than_the_ring_holds_all_end() {
    let (_folder, path) = file(8 * MIB);
    for engine in ["io_uring", "threads"] {
        let mut bench = open(&path, &[("engine", engine), ("direct", "yes")]).unwrap();
        let asked: Vec<Ask> =
            (0..2000).map(|n| Ask::Write { position: n * 4096, data: vec![fill(n); 4096] }).collect();
        assert!(bench.run(&asked).iter().all(Result::is_ok));
        let asked: Vec<Ask> = (0..2000).map(|n| Ask::Read { position: n * 4096, length: 4096 }).collect();
        for (n, data) in (0..).zip(bench.run(&asked)) {
            assert_eq!(data.unwrap(), vec![fill(n); 4096]);
        }
    }
}

#[test]
fn more_vectors_than_a_system_call_takes_are_moved() {
    let (_folder, path) = file(4 * MIB);
    for settings in [[("engine", "io_uring"), ("direct", "no")], [("engine", "threads"), ("direct", "yes")]] {
        let mut bench = open(&path, &settings).unwrap();
        bench.layout = Layout { piece: 512, shift: 0 };
        let data = support::Random(5).bytes(2 * MIB);
        bench.write(512, &data).unwrap();
        assert!(bench.read(512, 2 * MIB).unwrap() == data);
    }
}

#[test]
fn the_last_block_of_an_odd_file_is_filled_up_with_zeroes() {
    for settings in [[("engine", "io_uring"), ("direct", "no")], [("engine", "threads"), ("direct", "yes")]] {
        let (_folder, path) = file(0);
        fs::write(&path, vec![7; 1300]).unwrap();
        let mut bench = open(&path, &settings).unwrap();
        assert_eq!(bench.info.size, 1536);
        let mut expected = vec![7; 1300];
        expected.resize(1536, 0);
        assert_eq!(bench.read(0, 1536).unwrap(), expected);
        bench.write(1024, &[9; 512]).unwrap();
        assert_eq!(bench.read(1024, 512).unwrap(), [9; 512]);
    }
}

#[test]
fn a_file_that_becomes_shorter_gives_errors_and_not_a_signal() {
    for engine in ["io_uring", "threads"] {
        let (_folder, path) = file(MIB);
        let mut bench = open(&path, &[("engine", engine)]).unwrap();
        bench.write(0, &[1; 4096]).unwrap();
        File::options().write(true).open(&path).unwrap().set_len(4096).unwrap();
        assert_eq!(bench.read(0, 4096).unwrap(), [1; 4096]);
        assert_eq!(bench.read(8192, 4096), Err(StoreError::Io));
        assert!(bench.log().iter().any(|line| line.contains("shorter")), "{:?}", bench.log());
    }
}

#[test]
fn operations_outside_and_writes_to_a_read_only_store_are_refused() {
    let (_folder, path) = file(MIB);
    let mut bench = open(&path, &[("readonly", "yes")]).unwrap();
    assert!(bench.info.read_only);
    assert_eq!(bench.read(MIB - 512, 1024), Err(StoreError::OutOfRange));
    assert_eq!(bench.read(u64::MAX - 511, 1024), Err(StoreError::OutOfRange));
    assert_eq!(bench.write(0, &[0; 512]), Err(StoreError::ReadOnly));
    assert_eq!(bench.discard(0, 512), Err(StoreError::ReadOnly));
    assert_eq!(bench.write_zeroes(0, 512, false), Err(StoreError::ReadOnly));
    bench.flush().unwrap();
    bench.close().unwrap();
}

#[test]
fn discarded_space_is_given_back_and_zeroes_are_read_as_such() {
    let (_folder, path) = file(4 * MIB);
    let mut bench = open(&path, &[]).unwrap();
    assert!(bench.info.discard && bench.info.write_zeroes);
    for position in 0..4 {
        bench.write(position * MIB, &[3; 1 << 20]).unwrap();
    }
    bench.flush().unwrap();
    let before = fs::metadata(&path).unwrap().blocks();
    bench.discard(0, 2 * MIB).unwrap();
    bench.write_zeroes(2 * MIB, MIB, true).unwrap();
    bench.write_zeroes(3 * MIB + 512, 1024, false).unwrap();
    bench.flush().unwrap();
    let after = fs::metadata(&path).unwrap();
    assert!(
        after.blocks() < before / 2 && after.len() == 4 * MIB,
        "{before} blocks became {}",
        after.blocks()
    );
    assert_eq!(bench.read(2 * MIB, MIB).unwrap(), vec![0; 1 << 20]);
    let mut expected = vec![3; 2048];
    expected[512..1536].fill(0);
    assert_eq!(bench.read(3 * MIB, 2048).unwrap(), expected);
}

#[test]
fn a_file_to_which_nothing_is_written_keeps_its_times() {
    let (_folder, path) = file(MIB);
    File::options().write(true).open(&path).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
    let times = || {
        let about = fs::metadata(&path).unwrap();
        (about.mtime(), about.ctime(), about.ctime_nsec())
    };
    let before = times();
    for engine in ["io_uring", "threads"] {
        let mut bench = open(&path, &[("engine", engine)]).unwrap();
        bench.read(0, 4096).unwrap();
        bench.flush().unwrap();
        bench.close().unwrap();
        assert_eq!(times(), before, "{engine}");
    }
}

#[test]
fn where_no_space_can_be_given_back_a_discard_says_so_and_zeroes_are_written() {
    let Some(disk) = Mounted::mount("ramfs", "mode=700") else { return };
    let path = disk.path().join("disk.img");
    File::create(&path).unwrap().set_len(4 * MIB).unwrap();
    let mut bench = open(&path, &[]).unwrap();
    assert!(!bench.info.write_zeroes, "it is not cheaper here");
    bench.write(0, &[7; 8192]).unwrap();
    for _ in 0..2 {
        assert_eq!(bench.discard(0, 4096), Err(StoreError::Unsupported));
    }
    assert_eq!(bench.read(0, 4096).unwrap(), [7; 4096]);
    bench.write_zeroes(4096, MIB, true).unwrap();
    assert_eq!(bench.read(0, 8192).unwrap(), [[7; 4096], [0; 4096]].concat());
    bench.close().unwrap();
}

#[test]
fn preallocated_space_is_taken_at_once_and_kept() {
    let (_folder, path) = file(4 * MIB);
    assert_eq!(fs::metadata(&path).unwrap().blocks(), 0);
    let mut bench = open(&path, &[("preallocate", "yes")]).unwrap();
    assert!(!bench.info.discard);
    bench.write_zeroes(0, 4 * MIB, true).unwrap();
    assert!(fs::metadata(&path).unwrap().blocks() * 512 >= 4 * MIB);
    bench.resize(6 * MIB).unwrap();
    assert!(fs::metadata(&path).unwrap().blocks() * 512 >= 6 * MIB);
}

#[test]
fn a_file_grows_and_shrinks() {
    let (_folder, path) = file(MIB);
    let mut bench = open(&path, &[]).unwrap();
    bench.write(0, &[1; 512]).unwrap();
    bench.resize(3 * MIB).unwrap();
    assert_eq!((bench.info.size, fs::metadata(&path).unwrap().len()), (3 * MIB, 3 * MIB));
    bench.write(2 * MIB, &[2; 512]).unwrap();
    bench.resize(MIB).unwrap();
    assert_eq!(bench.read(2 * MIB, 512), Err(StoreError::OutOfRange));
    assert_eq!(bench.read(0, 512).unwrap(), [1; 512]);
    for wrong in [0, 1000] {
        assert!(bench.resize(wrong).unwrap_err().to_string().contains("multiple of 512"));
    }
}

#[test]
fn what_cannot_be_a_disk_is_refused_by_name_and_without_waiting() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("pipe");
    let name = std::ffi::CString::new(pipe.to_str().unwrap()).unwrap();
    // SAFETY: the name is good for the call.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    let empty = folder.path().join("empty");
    File::create(&empty).unwrap();
    let _listener = std::os::unix::net::UnixListener::bind(folder.path().join("socket")).unwrap();
    for (path, part) in [
        (pipe, "is a pipe"),
        (empty, "is empty"),
        (folder.path().join("socket"), "is a socket"),
        (folder.path().to_owned(), "is a directory"),
        (folder.path().join("missing"), "does not exist"),
        (PathBuf::from("/dev/zero"), "is a character device"),
    ] {
        let error = open(&path, &[]).err().unwrap();
        assert!(error.contains(part) && error.contains(path.to_str().unwrap()), "{error}");
    }
    let error = Bench::open(&PLUGIN, &[]).err().unwrap().to_string();
    assert!(error.contains("`path` is missing"), "{error}");
}

#[test]
fn a_writer_shares_a_file_with_nobody_and_readers_share_it() {
    let (_folder, path) = file(MIB);
    let writer = open(&path, &[]).unwrap();
    for settings in [&[][..], &[("readonly", "yes")]] {
        let error = open(&path, settings).err().unwrap();
        assert!(error.contains("disk.img") && error.contains("this command itself"), "{error}");
    }
    open(&path, &[("lock", "no")]).unwrap();
    writer.close().unwrap();
    let first = open(&path, &[("readonly", "yes")]).unwrap();
    let second = open(&path, &[("readonly", "yes")]).unwrap();
    assert!(open(&path, &[]).is_err());
    drop((first, second));
    open(&path, &[]).unwrap();
}

#[test]
fn qemus_tools_and_this_store_keep_each_other_out_and_the_holder_is_named() {
    let (_folder, path) = file(MIB);
    let qemu_io = || {
        let mut command = Command::new("qemu-io");
        command
            .args(["-f", "raw"])
            .arg(&path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command.spawn()
    };
    let Ok(mut child) = qemu_io() else {
        return println!("not run: there is no qemu-io (package qemu-utils)");
    };
    let mut prompt = [0; 9];
    child.stdout.as_mut().unwrap().read_exact(&mut prompt).unwrap();
    assert_eq!(&prompt, b"qemu-io> ");
    let error = open(&path, &[]).err().unwrap();
    assert!(error.contains(&format!("process {} (qemu-io)", child.id())), "{error}");
    child.stdin.as_mut().unwrap().write_all(b"quit\n").unwrap();
    child.wait().unwrap();

    let _writer = open(&path, &[]).unwrap();
    let refused = qemu_io().unwrap().wait_with_output().unwrap();
    assert!(String::from_utf8_lossy(&refused.stderr).contains("lock"), "{refused:?}");
}

#[test]
fn closing_leaves_no_open_file_and_no_thread() {
    let (folder, path) = file(MIB);
    let name = folder.path().file_name().unwrap().to_str().unwrap();
    for engine in ["io_uring", "threads"] {
        let mut bench = open(&path, &[("engine", engine), ("direct", "yes")]).unwrap();
        bench.write(0, &[1; 4096]).unwrap();
        bench.discard(0, 4096).unwrap();
        assert_eq!(open_files(name), 2);
        // Dropped with operations under way: it waits for them.
        let asked: Vec<Ask> =
            (0..200).map(|n| Ask::Write { position: n * 4096, data: vec![1; 4096] }).collect();
        let begun = bench.begin(&asked);
        drop(bench);
        drop(begun);
        assert_eq!(open_files(name), 0);
        // The lock has ended, too.
        open(&path, &[]).unwrap();
    }
}

#[test]
fn a_full_file_system_is_no_space_and_what_was_there_stays() {
    let Some(disk) = Mounted::tmpfs("2m") else { return };
    for engine in ["io_uring", "threads"] {
        let path = disk.path().join(engine);
        File::create(&path).unwrap().set_len(16 * MIB).unwrap();
        let mut bench = open(&path, &[("engine", engine)]).unwrap();
        bench.write(0, &[4; 4096]).unwrap();
        let asked: Vec<Ask> =
            (1..16).map(|n| Ask::Write { position: n * MIB, data: vec![5; 1 << 20] }).collect();
        let outcomes = bench.run(&asked);
        assert!(outcomes.contains(&Err(StoreError::NoSpace)), "{outcomes:?}");
        assert!(outcomes.iter().all(|outcome| matches!(outcome, Ok(_) | Err(StoreError::NoSpace))));
        assert_eq!(bench.read(0, 4096).unwrap(), [4; 4096]);
        // Space that is given back can be used.
        bench.discard(MIB, 15 * MIB).unwrap();
        bench.write(MIB, &[6; 4096]).unwrap();
        bench.close().unwrap();
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn a_failed_flush_is_never_followed_by_a_good_one() {
    // A loop device on a file that loses its space: writes go to the page cache and are lost when they are written back.
    let Some(disk) = Mounted::tmpfs("2m") else { return };
    for engine in ["io_uring", "threads"] {
        let image = disk.path().join("image");
        File::create(&image).unwrap().set_len(8 * MIB).unwrap();
        let device = match Loop::attach(&image) {
            Ok(device) => device,
            Err(why) => return println!("not run: no loop device: {why}"),
        };
        let mut bench = open(&device.0, &[("engine", engine)]).unwrap();
        assert_eq!(bench.info.size, 8 * MIB);
        bench.write(0, &[1; 4096]).unwrap();
        bench.flush().unwrap();
        for n in 1..8 {
            bench.write(n * MIB, &[2; 1 << 20]).unwrap();
        }
        assert!(bench.flush().is_err(), "8 MiB were made durable in 2 MiB");
        assert!(bench.flush().is_err(), "a flush that failed was made up for by one that had nothing to do");
        assert!(bench.close().is_err());
    }
}

/// A loop device.
struct Loop(PathBuf);

impl Loop {
    fn attach(image: &Path) -> Result<Self, String> {
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(image)
            .output()
            .map_err(|error| error.to_string())?;
        if output.status.success() {
            Ok(Self(String::from_utf8(output.stdout).unwrap().trim().into()))
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into())
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

#[test]
fn a_block_device_is_measured_discarded_and_zeroed() {
    let (_folder, image) = file(8 * MIB);
    let device = match Loop::attach(&image) {
        Ok(device) => device,
        Err(why) => return println!("not run: no loop device: {why}"),
    };
    for settings in [[("engine", "io_uring"), ("direct", "no")], [("engine", "threads"), ("direct", "yes")]] {
        let mut bench = open(&device.0, &settings).unwrap();
        assert_eq!(bench.info.size, 8 * MIB);
        assert!(bench.info.discard && bench.info.write_zeroes);
        let mut model = support::everything(&mut bench);
        torture(&mut bench, &mut model, 9, 30, true);
        bench.write(MIB, &[1; 1 << 20]).unwrap();
        bench.flush().unwrap();
        let before = fs::metadata(&image).unwrap().blocks();
        bench.discard(MIB, MIB).unwrap();
        bench.write_zeroes(2 * MIB, MIB, true).unwrap();
        bench.flush().unwrap();
        assert!(fs::metadata(&image).unwrap().blocks() < before);
        assert!(bench.resize(4 * MIB).unwrap_err().to_string().contains("has the length that it has"));
        bench.resize(8 * MIB).unwrap();
        bench.close().unwrap();
    }
    let mut byte = [0; 512];
    File::open(&image).unwrap().read_exact_at(&mut byte, 2 * MIB).unwrap();
    assert_eq!(byte, [0; 512]);
}

#[test]
fn it_does_what_every_user_of_a_store_relies_on() {
    let (_folder, path) = file(8 * MIB);
    let path = path.to_str().unwrap();
    for engine in ["io_uring", "threads"] {
        for direct in ["no", "yes"] {
            let settings = [("path", path), ("engine", engine), ("direct", direct)];
            let mut bench = NativeStoreBench::open(&PLUGIN, &settings, vec![]).unwrap();
            suite::store(&mut bench, StoreChecks::default()).unwrap();
        }
    }
}
