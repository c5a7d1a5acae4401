//! Folders of the host behind a plugin that falls: nothing is lost and nothing is done twice.

use std::fs;
use std::sync::Arc;

use tempfile::TempDir;
use tenon_core::{Clock, Lifecycle, QueueDevice};
use tenon_folder::Root;
use tenon_plugins::{AttachError, Bundle, Grants, Plugin, Status, VirtioDevice, VirtioParts};

use crate::machine::{fixture, host};
use crate::rings::Driver;

fn plugin(native: bool) -> Arc<Plugin> {
    let grants = if native { Grants::none().allow_native("folders") } else { Grants::none() };
    host().load(Bundle::open(&fixture("folders")).unwrap(), &grants).unwrap()
}

struct Bench {
    folder: TempDir,
    device: Arc<VirtioDevice>,
    driver: Driver,
}

impl Bench {
    fn new(native: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ram = Driver::memory();
        let parts = VirtioParts {
            clock: Clock::virtual_time(),
            ram: ram.clone(),
            stores: Vec::new(),
            ports: Vec::new(),
            folders: vec![("share".into(), Root::open(folder.path(), false).unwrap())],
            sockets: Vec::new(),
        };
        let device = plugin(native).attach_virtio("folders0", &[], &parts).unwrap();
        let mut driver = Driver::new(&ram);
        driver.start(&*device, 1);
        Self { folder, device, driver }
    }

    /// Makes a file that is open to append; its number.
    fn create(&self, name: &str) -> u64 {
        let made = self.driver.push(0, b'c', 0, name.as_bytes(), 5);
        self.device.notify(0);
        self.driver.answers(0, 1);
        let answer = self.driver.written(made, 5);
        assert_eq!(answer[0], 0);
        u32::from_le_bytes(answer[1..].try_into().unwrap()).into()
    }
}

#[test]
fn a_device_that_falls_in_the_middle_of_a_copy_loses_and_repeats_nothing() {
    for native in [false, true] {
        let bench = Bench::new(native);
        let file = bench.create("copy");
        // The worker is kept away until all have come, so that they are one batch. A large letter is a fall after the deed.
        bench.device.pause();
        let requests: [(u8, u64, &[u8], u64); 7] = [
            (b'w', file, b"a", 1),
            (b'W', file, b"b", 1),
            (b'w', file, b"c", 1),
            (b'D', 0, b"folder", 1),
            (b'w', file, b"d", 1),
            (b'D', 0, b"folder", 1),
            (b'r', file, b"", 6),
        ];
        let tokens = bench.driver.push_all(0, &requests);
        bench.device.notify(0);
        bench.device.resume();
        bench.driver.answers(0, 8);
        let status = |n: usize| bench.driver.written(tokens[n], 1)[0];
        assert_eq!([0, 1, 2, 3, 4].map(status), [0; 5], "the first folder was made once, and that was said");
        assert_eq!(status(5), 17, "the second one found it there");
        // Node and open file are those that the first instance was given.
        assert_eq!(bench.driver.written(tokens[6], 6), b"\0abcd\0");
        assert_eq!(fs::read(bench.folder.path().join("copy")).unwrap(), b"abcd");
        let usage = bench.device.usage();
        assert_eq!((usage.faults, usage.answers, usage.divergences), (3, 8, 0), "{usage:?}");
        assert_eq!(bench.device.status(), Status::Running);
    }
}

#[test]
fn misdeeds_in_folders_end_the_instance_and_a_reset_lets_go_of_everything() {
    for kind in *b"mg" {
        let mut bench = Bench::new(false);
        let file = bench.create("file");
        bench.driver.push(0, kind, 0, &[], 1);
        bench.device.notify(0);
        assert_eq!(bench.driver.heard(), "needs reset", "{}", char::from(kind));
        bench.device.stop();
        let device = bench.device.clone();
        bench.driver.start(&*device, 1);
        let read = bench.driver.push(0, b'r', file, &[], 2);
        bench.device.notify(0);
        bench.driver.answers(0, 1);
        assert_eq!(bench.driver.written(read, 1), [9], "the file is still open");
    }
}

#[test]
fn a_device_without_its_folder_is_not_attached() {
    let parts = VirtioParts {
        clock: Clock::virtual_time(),
        ram: Driver::memory(),
        stores: Vec::new(),
        ports: Vec::new(),
        folders: Vec::new(),
        sockets: Vec::new(),
    };
    let error = plugin(false).attach_virtio("folders1", &[], &parts).err().unwrap();
    assert!(
        matches!(&error, AttachError::Missing { what: "folder", name, .. } if name == "share"),
        "{error}"
    );
}
