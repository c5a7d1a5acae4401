//! A folder of the host, with the test in the place of the device.

use std::fs::{self, File};
use std::os::fd::AsFd;

use tempfile::TempDir;
use tenon_core::{Clock, GuestRequest, MIN_MEMORY, Ram, Requests};

use super::*;
use crate::services::Services;
use crate::virtio::inbox::Inbox;

struct Bench {
    folder: TempDir,
    services: Box<VirtioServices>,
    ram: Arc<Ram>,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ram = Ram::new(MIN_MEMORY).unwrap();
        let base = Services::new("folders0", Clock::virtual_time(), Requests::new());
        let mut services = VirtioServices::new(base, ram.clone(), Arc::new(Inbox::default()));
        let root = tenon_folder::Root::open(folder.path(), false).unwrap();
        let share = tenon_folder::Folder::new(&root).unwrap();
        services.grant(Vec::new(), Vec::new(), Vec::new(), vec![share]);
        Self { folder, services, ram }
    }

    fn request(&mut self) -> u32 {
        let (readable, writable) = (Buffers::new(&self.ram), Buffers::new(&self.ram));
        self.services.table.insert(0, GuestRequest { token: 0, readable, writable })
    }

    fn act(&mut self, handle: u32, action: FolderAction) -> Result<Acts, Misuse> {
        self.services.folder_act(0, handle, action)
    }
}

fn place(name: Vec<u8>) -> Place {
    Place { folder: Node::ROOT, name }
}

#[test]
fn an_action_with_more_than_64_kib_of_its_own_is_misuse() {
    let mut bench = Bench::new();
    let request = bench.request();
    let most = MOST_GIVEN / 16;
    let forget = |count| FolderAction::Forget(vec![(Node(7), 1); count]);
    assert_eq!(*bench.act(request, forget(most)).unwrap(), Ok(FolderOutcome::Done));
    let long = || vec![b'x'; MOST_GIVEN + 1];
    let new = |name| NewFile { place: place(name), mode: 0o644, uid: 0, gid: 0 };
    let half = || vec![b'x'; MOST_GIVEN / 2 + 1];
    let access = Access::default();
    for action in [
        forget(most + 1),
        FolderAction::LookUp(place(long())),
        FolderAction::Remove(place(long())),
        FolderAction::RemoveFolder(place(long())),
        FolderAction::Link { node: Node::ROOT, place: place(long()) },
        FolderAction::MakeFile(new(long())),
        FolderAction::MakeFolder(new(long())),
        FolderAction::Create { new: new(long()), access, exclusive: true },
        FolderAction::MakeLink { new: new(half()), target: half() },
        FolderAction::Rename { from: place(half()), to: place(half()), how: RenameHow::Keep },
    ] {
        let misuse = bench.act(request, action.clone()).unwrap_err();
        assert!(misuse.0.contains("which may be 65536"), "{}", misuse.0);
    }
    assert_eq!(*bench.act(request, FolderAction::LookUp(place(half()))).unwrap(), Err(Errno::NAMETOOLONG));
}

#[test]
fn no_more_than_16_mib_are_kept_of_what_was_done_for_unfinished_requests() {
    let mut bench = Bench::new();
    let forget = || FolderAction::Forget(vec![(Node(7), 1); MOST_GIVEN / 16]);
    let fill = |bench: &mut Bench| -> Vec<u32> {
        let mut requests = Vec::new();
        loop {
            let request = bench.request();
            requests.push(request);
            if let Err(misuse) = bench.act(request, forget()) {
                assert!(misuse.0.contains("which may be 16777216"), "{}", misuse.0);
                return requests;
            }
            assert!(requests.len() < 257, "they are more than 16 MiB");
        }
    };
    let requests = fill(&mut bench);
    assert!(requests.len() > 250, "what each has of its own is little: {}", requests.len());
    // What was done before is answered nevertheless.
    bench.services.table.again();
    assert_eq!(*bench.act(requests[0], forget()).unwrap(), Ok(FolderOutcome::Done));
    for request in requests {
        bench.services.complete(request, 0).unwrap();
    }
    assert!(fill(&mut bench).len() > 250, "answered requests take nothing");
}

#[test]
fn names_that_were_listed_count_as_kept() {
    let mut bench = Bench::new();
    for n in 0..1000 {
        fs::write(bench.folder.path().join(format!("{n:0>200}")), b"").unwrap();
    }
    let request = bench.request();
    let opened = bench.act(request, FolderAction::OpenFolder(Node::ROOT)).unwrap();
    let Ok(FolderOutcome::Opened(file)) = *opened else { panic!("{opened:?}") };
    let mut done = 0;
    loop {
        let request = bench.request();
        let names = FolderAction::Names { file, position: 0, room: 128 << 10, each: 24, entries: false };
        match bench.act(request, names) {
            Ok(outcome) => assert!(matches!(&*outcome, Ok(FolderOutcome::Items(items)) if items.len() > 500)),
            Err(_) => break,
        }
        done += 1;
        assert!(done < 200, "{done} lists of more than 100 KiB");
    }
    assert!(done > 10, "{done}");
}

/// How many reads this thread has made (proc_pid_io(5)); none if the kernel does not count them.
fn reads() -> Option<u64> {
    let text = fs::read_to_string("/proc/thread-self/io").ok()?;
    text.lines().find_map(|line| line.strip_prefix("syscr: "))?.parse().ok()
}

#[test]
fn a_read_that_meets_the_end_of_the_file_is_one_system_call() {
    let bench = Bench::new();
    let path = bench.folder.path().join("file");
    fs::write(&path, [7; 5000]).unwrap();
    let file = File::open(path).unwrap();
    let mut row = Buffers::new(&bench.ram);
    row.push(0x1000, 3000).unwrap();
    row.push(0x3000, 4000).unwrap();
    let range = FileRange { file: OpenFile(0), offset: 0, length: 7000, position: 0 };
    let (Some(before), Some(between)) = (reads(), reads()) else {
        println!("not run: /proc/thread-self/io does not say how many reads there were");
        return;
    };
    let outcome = transfer(file.as_fd(), &range, &row, false);
    let after = reads().unwrap();
    assert_eq!(outcome, Ok(FolderOutcome::Moved(5000)));
    assert_eq!((after - between) - (between - before), 1);
}

#[test]
fn a_row_of_more_ranges_than_a_system_call_takes_is_filled_whole() {
    let bench = Bench::new();
    let path = bench.folder.path().join("file");
    let bytes: Vec<u8> = (0..5000_u32).map(|n| (n * 7).to_le_bytes()[0]).collect();
    fs::write(&path, &bytes).unwrap();
    let file = File::open(path).unwrap();
    let mut row = Buffers::new(&bench.ram);
    for n in 0..MOST_RANGES as u64 + 10 {
        row.push(0x1000 + n * 8, 4).unwrap();
    }
    let range = FileRange { file: OpenFile(0), offset: 0, length: u32::MAX, position: 100 };
    let moved = transfer(file.as_fd(), &range, &row, false);
    assert_eq!(moved, Ok(FolderOutcome::Moved(4136)));
    let mut got = [0; 4136];
    row.read(0, &mut got);
    assert!(got == bytes[100..4236]);
}
