//! The file system, from the side of a driver that speaks FUSE, on a real folder.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::PathBuf;

use tenon_device_virtio_fs::FileSystem;
use tenon_testkit::{VirtioBench, VirtioSetup, virtio_conformance};

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const READLINK: u32 = 5;
const SYMLINK: u32 = 6;
const MKNOD: u32 = 8;
const MKDIR: u32 = 9;
const UNLINK: u32 = 10;
const RMDIR: u32 = 11;
const RENAME: u32 = 12;
const LINK: u32 = 13;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const STATFS: u32 = 17;
const RELEASE: u32 = 18;
const FSYNC: u32 = 20;
const GETXATTR: u32 = 22;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const RELEASEDIR: u32 = 29;
const FSYNCDIR: u32 = 30;
const ACCESS: u32 = 34;
const CREATE: u32 = 35;
const INTERRUPT: u32 = 36;
const DESTROY: u32 = 38;
const BATCH_FORGET: u32 = 42;
const FALLOCATE: u32 = 43;
const READDIRPLUS: u32 = 44;
const RENAME2: u32 = 45;
const LSEEK: u32 = 46;

const HIPRIO: u16 = 0;
const REQUESTS: u16 = 1;
const ROOT: u64 = 1;

const ENOENT: u32 = 2;
const EPERM: u32 = 1;
const EBADF: u32 = 9;
const EINVAL: u32 = 22;
const EROFS: u32 = 30;
const ENOSYS: u32 = 38;
const EPROTO: u32 = 71;
const ESTALE: u32 = 116;

/// Little-endian fields, one after the other.
macro_rules! bytes {
    ($($value:expr),* $(,)?) => { [$(&$value.to_le_bytes()[..]),*].concat() };
}

fn text(name: &str) -> Vec<u8> {
    [name.as_bytes(), &[0]].concat()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

struct Driver {
    bench: VirtioBench<FileSystem>,
    unique: u64,
}

impl Driver {
    fn with(setup: &VirtioSetup) -> Self {
        let mut bench = VirtioBench::with(&[], setup).unwrap();
        bench.activate(0).unwrap();
        Self { bench, unique: 0 }
    }

    fn new() -> Self {
        let mut driver = Self::with(&VirtioSetup::new());
        driver.ask(INIT, 0, &bytes![7u32, 38u32, 4096u32, u32::MAX]).unwrap();
        driver
    }

    fn path(&self, name: &str) -> PathBuf {
        self.bench.folder("share").join(name)
    }

    fn request(&mut self, op: u32, node: u64, body: &[u8]) -> Vec<u8> {
        self.unique += 1;
        let length = u32::try_from(40 + body.len()).unwrap();
        // As root, whose files stay those of whoever runs the test if that is another.
        let header = bytes![length, op, self.unique, node, 0u32, 0u32, 1u32, 0u32];
        [header, body.to_vec()].concat()
    }

    /// Asks, with room for `room` bytes behind the header of the answer; the error's number if it is refused.
    fn ask_for(&mut self, op: u32, node: u64, body: &[u8], room: usize) -> Result<Vec<u8>, u32> {
        let request = self.request(op, node, body);
        let answer = self.bench.ask(REQUESTS, &request, 16 + room).data;
        assert_eq!(u32_at(&answer, 0) as usize, answer.len(), "the length of the answer to {op}");
        assert_eq!(u64_at(&answer, 8), self.unique, "what it is an answer to");
        match u32_at(&answer, 4) {
            0 => Ok(answer[16..].to_vec()),
            error => {
                assert_eq!(answer.len(), 16);
                Err(error.wrapping_neg())
            }
        }
    }

    fn ask(&mut self, op: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, u32> {
        self.ask_for(op, node, body, 4096)
    }

    /// Asks what has no answer.
    fn tell(&mut self, op: u32, node: u64, body: &[u8]) {
        let request = self.request(op, node, body);
        assert_eq!(self.bench.ask(HIPRIO, &request, 0).written, 0);
    }

    fn look_up(&mut self, name: &str) -> Result<u64, u32> {
        self.ask(LOOKUP, ROOT, &text(name)).map(|entry| u64_at(&entry, 0))
    }

    /// Makes a file, open to read and write: its node and number.
    fn create(&mut self, name: &str, flags: u32) -> (u64, u64) {
        let body = [bytes![flags, 0o644u32, 0o22u32, 0u32], text(name)].concat();
        let made = self.ask(CREATE, ROOT, &body).unwrap();
        assert_eq!(made.len(), 128 + 16);
        (u64_at(&made, 0), u64_at(&made, 128))
    }

    fn write(&mut self, file: u64, position: u64, data: &[u8]) -> Result<u32, u32> {
        let length = u32::try_from(data.len()).unwrap();
        let body = [bytes![file, position, length, 0u32, 0u64, 0u32, 0u32], data.to_vec()].concat();
        self.ask(WRITE, 0, &body).map(|answer| u32_at(&answer, 0))
    }

    fn read(&mut self, file: u64, position: u64, size: u32) -> Result<Vec<u8>, u32> {
        let body = bytes![file, position, size, 0u32, 0u64, 0u32, 0u32];
        self.ask_for(READ, 0, &body, size as usize)
    }

    /// The names in a folder, with type and node, as the driver puts them together from pieces of `room` bytes.
    fn list(&mut self, node: u64, plus: bool, room: u32) -> BTreeMap<String, (u32, u64)> {
        let file = u64_at(&self.ask(OPENDIR, node, &bytes![0u32, 0u32]).unwrap(), 0);
        let (mut all, mut position) = (BTreeMap::new(), 0u64);
        loop {
            let op = if plus { READDIRPLUS } else { READDIR };
            let body = bytes![file, position, room, 0u32, 0u64, 0u32, 0u32];
            let part = self.ask_for(op, node, &body, room as usize).unwrap();
            assert!(part.len() <= room as usize);
            let mut rest = part.as_slice();
            if rest.is_empty() {
                break;
            }
            while !rest.is_empty() {
                let known = if plus { u64_at(rest, 0) } else { 0 };
                let item = &rest[if plus { 128 } else { 0 }..];
                let length = u32_at(item, 16) as usize;
                let name = String::from_utf8(item[24..24 + length].to_vec()).unwrap();
                position = u64_at(item, 8);
                assert!(all.insert(name, (u32_at(item, 20), known)).is_none(), "a name comes twice");
                rest = &item[(24 + length).next_multiple_of(8)..];
            }
        }
        self.ask(RELEASEDIR, node, &bytes![file, 0u32, 0u32, 0u64]).unwrap();
        all
    }
}

#[test]
fn it_does_what_every_host_relies_on() {
    virtio_conformance::<FileSystem>(&[("tag", "home")], &VirtioSetup::new());
}

#[test]
fn the_tag_is_what_the_driver_reads() {
    let mut bench = VirtioBench::<FileSystem>::new(&[("tag", "home")]).unwrap();
    let space: Vec<u8> = (0..40).map(|at| bench.config_read(at, 1).to_le_bytes()[0]).collect();
    assert_eq!(space, [&b"home"[..], &[0; 32], &[1, 0, 0, 0]].concat());
    assert!(VirtioBench::<FileSystem>::new(&[("tag", &"x".repeat(36))]).is_ok());
    for tag in ["", "a\tb", &"x".repeat(37)] {
        let error = VirtioBench::<FileSystem>::new(&[("tag", tag)]).err().unwrap().to_string();
        assert!(error.contains("1 to 36 bytes"), "{error}");
    }
}

#[test]
fn both_sides_agree_on_the_older_protocol() {
    let mut driver = Driver::with(&VirtioSetup::new());
    let answer = driver.ask(INIT, 0, &bytes![7u32, 31u32, 65536u32, u32::MAX]).unwrap();
    assert_eq!(answer.len(), 64);
    assert_eq!((u32_at(&answer, 0), u32_at(&answer, 4), u32_at(&answer, 8)), (7, 31, 65536));
    assert_eq!((u32_at(&answer, 20), answer[28..30].to_vec()), (1 << 20, vec![0, 1]));
    let (flags, max_pages) = (u32_at(&answer, 12), 1u32 << 22);
    assert!(flags & max_pages != 0);
    // No locks, no attributes of a writer's cache, no links of another sort: only what is there.
    assert_eq!(flags & (1 << 1 | 1 << 10 | 1 << 16 | 1 << 20 | 1 << 30), 0);
    let answer = driver.ask(INIT, 0, &bytes![7u32, 45u32, 0u32, !max_pages, 0u64, 0u64]).unwrap();
    assert_eq!((u32_at(&answer, 4), u32_at(&answer, 12) & !flags), (31, 0));
    assert_eq!(u32_at(&answer, 20), 128 << 10);
    let answer = driver.ask(INIT, 0, &bytes![8u32, 0u32, 0u32, 0u32]).unwrap();
    assert_eq!(u32_at(&answer, 0), 7);
    assert_eq!(driver.ask(INIT, 0, &bytes![6u32, 0u32, 0u32, 0u32]), Err(EPROTO));
    assert_eq!(driver.ask(INIT, 0, &bytes![7u32, 8u32, 0u32, 0u32]), Err(EPROTO));
}

#[test]
fn a_file_is_made_written_read_shortened_and_removed() {
    let mut driver = Driver::new();
    let (node, file) = driver.create("file", 2);
    let data: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
    assert_eq!(driver.write(file, 5, &data), Ok(400_000));
    assert_eq!(driver.read(file, 5, 400_000).unwrap(), data);
    assert_eq!(driver.read(file, 400_000, 4096).unwrap(), data[399_995..]);
    assert_eq!(driver.read(file, 500_000, 10).unwrap(), b"");
    assert_eq!(fs::read(driver.path("file")).unwrap()[5..], data);
    let about = driver.ask(GETATTR, node, &bytes![0u32, 0u32, 0u64]).unwrap();
    assert_eq!((about.len(), u64_at(&about, 0), u64_at(&about, 24)), (104, 1, 400_005));
    // Valid: mode, size, both times; 2001-09-09 and a nanosecond.
    let time = 1_000_000_000u64;
    let body = bytes![
        0x39u32,
        0u32,
        0u64,
        3u64,
        0u64,
        time,
        time,
        0u64,
        1u32,
        1u32,
        0u32,
        0o100_600u32,
        0u32,
        0u32,
        0u32,
        0u32
    ];
    let about = driver.ask(SETATTR, node, &body).unwrap();
    assert_eq!((u64_at(&about, 24), u64_at(&about, 48), u32_at(&about, 68)), (3, time, 1));
    assert_eq!(u32_at(&about, 76), 0o100_600);
    assert_eq!(fs::metadata(driver.path("file")).unwrap().mtime(), 1_000_000_000);
    driver.ask(FSYNC, node, &bytes![file, 1u32, 0u32]).unwrap();
    driver.ask(FALLOCATE, node, &bytes![file, 0u64, 4096u64, 0x40u32, 0u32]).unwrap_err();
    assert_eq!(driver.ask(LSEEK, node, &bytes![file, 0u64, 4u32, 0u32]).unwrap(), bytes![3u64]);
    driver.ask(UNLINK, ROOT, &text("file")).unwrap();
    assert_eq!(driver.read(file, 5, 10).unwrap(), b"", "it is shorter, and still open");
    driver.ask(RELEASE, node, &bytes![file, 0u32, 0u32, 0u64]).unwrap();
    assert_eq!(driver.read(file, 0, 10), Err(EBADF));
    driver.tell(FORGET, node, &bytes![1u64]);
    assert_eq!(driver.bench.folder_counts("share"), (0, 0));
}

#[test]
fn appending_goes_to_the_end_wherever_the_driver_thinks_that_is() {
    let mut driver = Driver::new();
    let (node, _) = driver.create("log", 2);
    let append = u64_at(&driver.ask(OPEN, node, &bytes![0o2001u32, 0u32]).unwrap(), 0);
    driver.write(append, 0, b"one").unwrap();
    fs::write(driver.path("log"), "someone else's").unwrap();
    driver.write(append, 3, b"two").unwrap();
    assert_eq!(fs::read(driver.path("log")).unwrap(), b"someone else'stwo");
    let empty = u64_at(&driver.ask(OPEN, node, &bytes![0o1001u32, 0u32]).unwrap(), 0);
    assert_eq!(driver.write(empty, 0, b"x"), Ok(1));
    assert_eq!(fs::read(driver.path("log")).unwrap(), b"x");
}

#[test]
fn folders_links_and_names_come_and_go() {
    let mut driver = Driver::new();
    let made = driver.ask(MKDIR, ROOT, &[bytes![0o755u32, 0u32], text("folder")].concat()).unwrap();
    let folder = u64_at(&made, 0);
    let body = [bytes![0o100_644u32, 0u32, 0u32, 0u32], text("node")].concat();
    let node = u64_at(&driver.ask(MKNOD, ROOT, &body).unwrap(), 0);
    let fifo = [bytes![0o010_644u32, 0u32, 0u32, 0u32], text("fifo")].concat();
    assert_eq!(driver.ask(MKNOD, ROOT, &fifo), Err(EPERM));
    let link = driver.ask(SYMLINK, folder, &[text("link"), text("../node")].concat()).unwrap();
    assert_eq!(driver.ask(READLINK, u64_at(&link, 0), &[]).unwrap(), b"../node");
    let hard = driver.ask(LINK, folder, &[bytes![node], text("hard")].concat()).unwrap();
    assert_eq!((u64_at(&hard, 0), u32_at(&hard, 40 + 64)), (node, 2));
    let names = |old: &str, new: &str| [text(old), text(new)].concat();
    driver.ask(RENAME, ROOT, &[bytes![folder], names("node", "moved")].concat()).unwrap();
    assert!(driver.path("folder/moved").is_file());
    let rename2 = |flags: u32, old: &str, new: &str| [bytes![folder, flags, 0u32], names(old, new)].concat();
    assert_eq!(driver.ask(RENAME2, folder, &rename2(1, "moved", "hard")), Err(17));
    driver.ask(RENAME2, folder, &rename2(2, "moved", "link")).unwrap();
    assert!(driver.path("folder/moved").is_symlink());
    assert_eq!(driver.ask(RENAME2, folder, &rename2(4, "moved", "link")), Err(EINVAL));
    assert_eq!(driver.ask(RMDIR, ROOT, &text("folder")), Err(39));
    for name in ["moved", "link", "hard"] {
        driver.ask(UNLINK, folder, &text(name)).unwrap();
    }
    driver.ask(RMDIR, ROOT, &text("folder")).unwrap();
    assert_eq!(driver.look_up("folder"), Err(ENOENT));
    let about = driver.ask(STATFS, ROOT, &[]).unwrap();
    assert_eq!(about.len(), 80);
    assert!(u64_at(&about, 0) >= u64_at(&about, 8) && u32_at(&about, 44) >= 255);
}

#[test]
fn lists_are_whole_however_small_the_pieces() {
    let mut driver = Driver::new();
    for n in 0..300 {
        fs::write(driver.path(&format!("{n}-{}", "x".repeat(n % 200))), "").unwrap();
    }
    fs::create_dir(driver.path("folder")).unwrap();
    symlink("nowhere", driver.path("link")).unwrap();
    let plain = driver.list(ROOT, false, 512);
    let plus = driver.list(ROOT, true, 4096);
    assert_eq!(plain.len(), 304);
    assert!(plain.keys().eq(plus.keys()));
    assert_eq!((plain["folder"].0, plain["link"].0, plain["."].0, plain["7-xxxxxxx"].0), (4, 10, 4, 8));
    assert_eq!((plus["."].1, plus[".."].1), (0, 0));
    assert_eq!(driver.bench.folder_counts("share"), (302, 0), "each was told of once");
    assert_eq!(driver.look_up("folder").unwrap(), plus["folder"].1);
    // All are forgotten at once, `folder` a time too few.
    let nodes: Vec<u8> =
        plus.values().filter(|known| known.1 != 0).flat_map(|(_, n)| bytes![*n, 1u64]).collect();
    driver.tell(BATCH_FORGET, 0, &[bytes![302u32, 0u32], nodes].concat());
    assert_eq!(driver.bench.folder_counts("share"), (1, 0));
    let file = u64_at(&driver.ask(OPENDIR, ROOT, &bytes![0u32, 0u32]).unwrap(), 0);
    driver.ask(FSYNCDIR, ROOT, &bytes![file, 0u32, 0u32]).unwrap();
    driver.ask(DESTROY, 0, &[]).unwrap();
    assert_eq!(driver.bench.folder_counts("share"), (0, 0));
}

#[test]
fn a_reset_lets_everything_go_and_a_restart_nothing() {
    let mut driver = Driver::new();
    let (node, file) = driver.create("file", 2);
    driver.write(file, 0, b"before").unwrap();
    driver.bench.round_trip();
    assert_eq!(driver.read(file, 0, 6).unwrap(), b"before");
    driver.ask(GETATTR, node, &bytes![0u32, 0u32, 0u64]).unwrap();
    driver.bench.reset();
    driver.bench.activate(0).unwrap();
    assert_eq!(driver.ask(GETATTR, node, &bytes![0u32, 0u32, 0u64]), Err(ESTALE));
    assert_eq!(driver.read(file, 0, 6), Err(EBADF));
}

#[test]
fn read_only_is_the_hosts_to_refuse() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("file"), "content").unwrap();
    let mut driver = Driver::with(&VirtioSetup::new().folder("share", folder.path(), true));
    let node = driver.look_up("file").unwrap();
    let file = u64_at(&driver.ask(OPEN, node, &bytes![0u32, 0u32]).unwrap(), 0);
    assert_eq!(driver.read(file, 0, 100).unwrap(), b"content");
    assert_eq!(driver.ask(OPEN, node, &bytes![2u32, 0u32]), Err(EROFS));
    assert_eq!(driver.write(file, 0, b"x"), Err(EBADF));
    assert_eq!(driver.ask(UNLINK, ROOT, &text("file")), Err(EROFS));
    assert_eq!(driver.ask(MKDIR, ROOT, &[bytes![0o755u32, 0u32], text("new")].concat()), Err(EROFS));
    assert_eq!(driver.ask(SETATTR, node, &[0; 88]), Err(EROFS));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn what_is_not_there_is_said_not_to_be() {
    let mut driver = Driver::new();
    for op in [ACCESS, FLUSH, GETXATTR, 21, 23, 24, 31, 32, 33, 37, 39, 40, 47, 50, 51, 52, 4096, u32::MAX] {
        assert_eq!(driver.ask(op, ROOT, &[0; 64]), Err(ENOSYS), "{op}");
    }
    driver.tell(INTERRUPT, 0, &bytes![1u64]);
}

#[test]
fn names_as_long_as_can_be_come_whole() {
    let mut driver = Driver::new();
    let (old, new) = ("a".repeat(255), "b".repeat(255));
    driver.create(&old, 2);
    driver.ask(RENAME, ROOT, &[bytes![ROOT], text(&old), text(&new)].concat()).unwrap();
    assert!(driver.path(&new).is_file());
    assert_eq!(driver.look_up(&"c".repeat(256)), Err(36));
    let target = "t".repeat(4095);
    let link = driver.ask(SYMLINK, ROOT, &[text(&"l".repeat(255)), text(&target)].concat()).unwrap();
    assert_eq!(driver.ask(READLINK, u64_at(&link, 0), &[]).unwrap(), target.as_bytes());
}

#[test]
fn a_request_that_is_cut_short_or_lies_about_its_length_is_refused() {
    let mut driver = Driver::new();
    let (node, file) = driver.create("file", 2);
    let name = text("file");
    let bodies: [(u32, Vec<u8>); 8] = [
        (LOOKUP, name[..4].to_vec()),
        (SETATTR, vec![0; 87]),
        (GETATTR, vec![0; 4]),
        (RENAME, [bytes![ROOT], name.clone()].concat()),
        (CREATE, bytes![2u32, 0o644u32, 0u32, 0u32]),
        (READ, vec![0; 16]),
        (WRITE, [bytes![file, 0u64, 100u32, 0u32, 0u64, 0u64], vec![1; 99]].concat()),
        (SYMLINK, name),
    ];
    for (op, body) in bodies {
        assert_eq!(driver.ask(op, node, &body), Err(EINVAL), "{op}");
    }
    assert_eq!(fs::metadata(driver.path("file")).unwrap().len(), 0);
    let lie = bytes![1000u32, LOOKUP, 7u64, ROOT, 0u32, 0u32, 0u32, 0u32];
    let answer = driver.bench.ask(REQUESTS, &lie, 200).data;
    assert_eq!((u32_at(&answer, 4).wrapping_neg(), u64_at(&answer, 8)), (EINVAL, 7));
    // Too short for a header; and no room for one.
    assert_eq!(u32_at(&driver.bench.ask(REQUESTS, &lie[..39], 200).data, 4).wrapping_neg(), 5);
    let make = driver.request(MKDIR, ROOT, &[bytes![0o755u32, 0u32], text("folder")].concat());
    assert_eq!(driver.bench.ask(REQUESTS, &make, 15).written, 0);
    assert!(!driver.path("folder").exists(), "it was done, and nobody could be told");
    // A count of nodes that are not there.
    driver.tell(BATCH_FORGET, 0, &bytes![u32::MAX, 0u32, node, 1u64]);
    driver.ask(GETATTR, node, &bytes![0u32, 0u32, 0u64]).unwrap();
}

/// Requests with a good header and anything behind it: an answer each time, and nothing outside is touched.
#[test]
fn any_request_is_answered() {
    let place = tempfile::tempdir().unwrap();
    fs::create_dir(place.path().join("shared")).unwrap();
    fs::write(place.path().join("secret"), "secret").unwrap();
    let mut driver = Driver::with(&VirtioSetup::new().folder("share", &place.path().join("shared"), false));
    fs::create_dir(driver.path("folder")).unwrap();
    let (node, file) = driver.create("file", 2);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    let names = ["file", "folder", "..", "a/b", "", "new", "/etc"];
    let (mut done, mut refused) = (0, 0);
    for _ in 0..20_000 {
        let mut body = Vec::new();
        for _ in 0..random(12) {
            match random(4) {
                0 => body.extend(text(names[usize::try_from(random(7)).unwrap()])),
                1 => body.extend(random(8).to_le_bytes()),
                2 => {
                    body.extend([node, file, 0, u64::MAX][usize::try_from(random(4)).unwrap()].to_le_bytes())
                }
                _ => body.extend(u32::try_from(random(1 << 12)).unwrap().to_le_bytes()),
            }
        }
        let op = u32::try_from(random(54)).unwrap();
        let on = [ROOT, node, 3, 0, 77][usize::try_from(random(5)).unwrap()];
        if matches!(op, FORGET | BATCH_FORGET | INTERRUPT) {
            driver.tell(op, on, &body);
            continue;
        }
        let room = usize::try_from(random(300)).unwrap();
        match driver.ask_for(op, on, &body, room) {
            Ok(_) => done += 1,
            Err(_) => refused += 1,
        }
    }
    assert!(done > 100 && refused > 100, "{done} done, {refused} refused");
    assert_eq!(fs::read_dir(place.path()).unwrap().count(), 2, "something was made or removed outside");
    assert_eq!(fs::read(place.path().join("secret")).unwrap(), b"secret");
}
