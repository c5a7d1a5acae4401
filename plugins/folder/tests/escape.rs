//! Nothing outside the shared folder is reached, whatever the guest asks and whatever others do on the host at the same time.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use support::{READ, Share, WRITE, at, entry, new};
use tenon_abi::{Changes, Errno, FolderAction as A, FolderOutcome as O, Node, RenameHow};
use tenon_folder::Root;

#[test]
fn names_that_are_paths_are_refused_wherever_a_name_is_asked_for() {
    let mut share = Share::new();
    fs::write(share.path("file"), "").unwrap();
    let file = share.look_up(Node::ROOT, "file").unwrap().node;
    let names =
        ["", ".", "..", "/", "../outside/secret", "a/b", "/etc/passwd", "..\0", "a\0b", "./file", "file/"];
    for name in names {
        let place = at(Node::ROOT, name);
        let good = at(Node::ROOT, "good");
        let made = new(Node::ROOT, name, 0o644);
        let actions = [
            A::LookUp(place.clone()),
            A::MakeFile(made.clone()),
            A::MakeFolder(made.clone()),
            A::MakeLink { new: made.clone(), target: b"x".to_vec() },
            A::Create { new: made, access: WRITE, exclusive: false },
            A::Link { node: file, place: place.clone() },
            A::Remove(place.clone()),
            A::RemoveFolder(place.clone()),
            A::Rename { from: place.clone(), to: good.clone(), how: RenameHow::Replace },
            A::Rename { from: at(Node::ROOT, "file"), to: place, how: RenameHow::Replace },
        ];
        for action in actions {
            assert_eq!(share.act(action.clone()), Err(Errno::INVAL), "{action:?}");
        }
    }
    assert_eq!(share.look_up(Node::ROOT, &"n".repeat(256)), Err(Errno::NAMETOOLONG));
    assert!(share.path("file").exists());
}

#[test]
fn numbers_that_were_not_given_name_nothing() {
    let mut share = Share::new();
    for number in [0, 2, 3, u64::MAX] {
        let node = Node(number);
        assert_eq!(share.look_up(node, "x"), Err(Errno::STALE));
        assert_eq!(share.act(A::Attributes { node, file: None }), Err(Errno::STALE));
        assert_eq!(share.act(A::OpenFolder(node)), Err(Errno::STALE));
        assert_eq!(share.open_file(node, READ), Err(Errno::STALE));
        assert_eq!(share.act(A::Link { node, place: at(Node::ROOT, "x") }), Err(Errno::STALE));
        assert_eq!(share.act(A::Forget(vec![(node, u64::MAX)])), Ok(O::Done));
    }
    for file in [0, 7, u32::MAX].map(tenon_abi::OpenFile) {
        assert_eq!(share.act(A::Close(file)), Err(Errno::BADF));
        assert_eq!(share.act(A::Sync { file, data_only: false }), Err(Errno::BADF));
        assert!(share.folder.file(file, None).is_err());
    }
}

#[test]
fn links_are_told_and_never_followed() {
    let mut share = Share::new();
    symlink(share.outside("secret"), share.path("absolute")).unwrap();
    symlink("../outside/secret", share.path("relative")).unwrap();
    symlink("../outside", share.path("folder")).unwrap();
    symlink("/proc/self/root", share.path("magic")).unwrap();
    for name in ["absolute", "relative", "folder", "magic"] {
        let link = share.look_up(Node::ROOT, name).unwrap();
        assert_eq!(link.attributes.mode & 0o170_000, 0o120_000, "{name}");
        assert_eq!(share.look_up(link.node, "secret"), Err(Errno::NOTDIR), "{name}");
        assert_eq!(share.open_file(link.node, READ), Err(Errno::OPNOTSUPP), "{name}");
        assert_eq!(share.open_file(link.node, WRITE), Err(Errno::OPNOTSUPP), "{name}");
        assert_eq!(share.act(A::OpenFolder(link.node)), Err(Errno::NOTDIR), "{name}");
        let create = A::Create { new: new(Node::ROOT, name, 0o644), access: WRITE, exclusive: false };
        assert_eq!(share.act(create), Err(Errno::OPNOTSUPP), "{name}");
        assert_eq!(share.act(A::MakeFolder(new(link.node, "x", 0o755))), Err(Errno::NOTDIR), "{name}");
        let size = Changes { size: Some(0), ..Changes::default() };
        assert_eq!(
            share.act(A::Change { node: link.node, file: None, changes: size }),
            Err(Errno::INVAL),
            "{name}"
        );
        let mode = Changes { mode: Some(0o777), ..Changes::default() };
        assert_eq!(
            share.act(A::Change { node: link.node, file: None, changes: mode }),
            Err(Errno::OPNOTSUPP),
            "{name}"
        );
    }
    let relative = share.look_up(Node::ROOT, "relative").unwrap().node;
    assert_eq!(share.act(A::ReadLink(relative)), Ok(O::Target(b"../outside/secret".to_vec())));
    // Times, owners and further names are the link's own.
    let before = fs::metadata(share.outside("secret")).unwrap();
    let past = tenon_abi::FileTime { seconds: 5, nanoseconds: 7 };
    let changes = Changes {
        modified: Some(tenon_abi::NewTime::At(past)),
        uid: Some(before.uid()),
        ..Changes::default()
    };
    let O::Attributes(now) = share.act(A::Change { node: relative, file: None, changes }).unwrap() else {
        panic!()
    };
    assert_eq!(now.modified, past);
    let second = entry(share.act(A::Link { node: relative, place: at(Node::ROOT, "second") })).unwrap();
    assert_eq!((second.node, second.attributes.links), (relative, 2));
    assert!(fs::symlink_metadata(share.path("second")).unwrap().is_symlink());
    let after = fs::metadata(share.outside("secret")).unwrap();
    assert_eq!((after.mtime(), after.nlink()), (before.mtime(), 1));
    assert_eq!(fs::read(share.outside("secret")).unwrap(), b"secret");
}

#[test]
fn fifos_sockets_and_devices_are_seen_and_not_opened() {
    let mut share = Share::new();
    let mode = rustix::fs::Mode::from_raw_mode(0o666);
    rustix::fs::mknodat(rustix::fs::CWD, share.path("fifo"), rustix::fs::FileType::Fifo, mode, 0).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(share.path("socket")).unwrap();
    let null = rustix::fs::makedev(1, 3);
    let mut names = vec!["fifo", "socket"];
    let device = rustix::fs::FileType::CharacterDevice;
    match rustix::fs::mknodat(rustix::fs::CWD, share.path("device"), device, mode, null) {
        Ok(()) => names.push("device"),
        Err(error) => println!("not run: a device node cannot be made: {error}"),
    }
    for name in names {
        let node = share.look_up(Node::ROOT, name).unwrap().node;
        for access in [READ, WRITE, tenon_abi::Access { truncate: true, ..WRITE }] {
            assert_eq!(share.open_file(node, access), Err(Errno::OPNOTSUPP), "{name}");
            let create = A::Create { new: new(Node::ROOT, name, 0o644), access, exclusive: false };
            assert_eq!(share.act(create), Err(Errno::OPNOTSUPP), "{name}");
        }
        let size = Changes { size: Some(0), ..Changes::default() };
        assert_eq!(share.act(A::Change { node, file: None, changes: size }), Err(Errno::INVAL), "{name}");
    }
    // A writer that waits on the host for a reader still waits: nobody has opened the other end.
    let flags = rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::NONBLOCK;
    let writer = rustix::fs::open(share.path("fifo"), flags, rustix::fs::Mode::empty());
    assert_eq!(writer.unwrap_err(), rustix::io::Errno::NXIO);
}

#[test]
fn only_regular_files_folders_and_links_can_be_made() {
    let mut share = Share::new();
    for mode in [0o010_644, 0o020_644, 0o060_644, 0o140_644] {
        let made = entry(share.act(A::MakeFile(new(Node::ROOT, "made", mode)))).unwrap();
        assert_eq!(made.attributes.mode, 0o100_644);
        share.act(A::Remove(at(Node::ROOT, "made"))).unwrap();
    }
}

#[test]
fn no_file_gets_a_bit_by_which_it_runs_as_its_owner() {
    let mut share = Share::new();
    fs::write(share.path("program"), "").unwrap();
    let node = share.look_up(Node::ROOT, "program").unwrap().node;
    for mode in [0o4755, 0o2755, 0o6755] {
        let changes = Changes { mode: Some(mode), ..Changes::default() };
        assert_eq!(share.act(A::Change { node, file: None, changes }), Err(Errno::PERM));
        assert_eq!(share.act(A::MakeFile(new(Node::ROOT, "other", mode))), Err(Errno::PERM));
        let create = A::Create { new: new(Node::ROOT, "other", mode), access: WRITE, exclusive: true };
        assert_eq!(share.act(create), Err(Errno::PERM));
    }
    assert!(!share.path("other").exists());
    // For folders the group's bit means something else.
    let folder = entry(share.act(A::MakeFolder(new(Node::ROOT, "folder", 0o2775)))).unwrap();
    assert_eq!(folder.attributes.mode & 0o7777, 0o2775);
}

#[test]
fn a_program_that_the_guest_changes_no_longer_runs_as_its_owner() {
    type Way = fn(&mut Share, Node, Changes);
    fn write(share: &Share, file: tenon_abi::OpenFile) {
        rustix::io::pwrite(share.folder.file(file, Some((0, 1))).unwrap(), b"x", 0).unwrap();
    }
    let mut share = Share::new();
    let size = Changes { size: Some(1), ..Changes::default() };
    let mode = |share: &Share| fs::metadata(share.path("program")).unwrap().mode() & 0o7777;
    let set_mode = |share: &Share| {
        fs::set_permissions(share.path("program"), fs::Permissions::from_mode(0o6755)).unwrap();
    };
    let ways: [(&str, Way); 7] = [
        ("written", |share, node, _| {
            let file = share.open_file(node, WRITE).unwrap();
            write(share, file);
        }),
        ("written to its end", |share, node, _| {
            let file = share.open_file(node, tenon_abi::Access { append: true, ..WRITE }).unwrap();
            write(share, file);
        }),
        ("emptied", |share, node, _| {
            share.open_file(node, tenon_abi::Access { truncate: true, ..WRITE }).unwrap();
        }),
        ("emptied to be read", |share, node, _| {
            share.open_file(node, tenon_abi::Access { truncate: true, ..READ }).unwrap();
        }),
        ("shortened", |share, node, changes| {
            share.act(A::Change { node, file: None, changes }).unwrap();
        }),
        ("shortened by a file that is open", |share, node, changes| {
            let file = share.open_file(node, WRITE).unwrap();
            share.act(A::Change { node, file: Some(file), changes }).unwrap();
        }),
        ("punched", |share, node, _| {
            let file = share.open_file(node, WRITE).unwrap();
            let how = tenon_abi::AllocateHow::Punch;
            let punched = share.act(A::Allocate { file, how, position: 0, length: 1 });
            assert!(matches!(punched, Ok(O::Done) | Err(Errno::OPNOTSUPP)), "{punched:?}");
        }),
    ];
    for (what, way) in ways {
        fs::write(share.path("program"), "content").unwrap();
        set_mode(&share);
        let node = share.look_up(Node::ROOT, "program").unwrap().node;
        share.open_file(node, READ).unwrap();
        assert_eq!(mode(&share), 0o6755, "read");
        way(&mut share, node, size);
        assert_eq!(mode(&share), 0o755, "{what}");
        fs::remove_file(share.path("program")).unwrap();
    }
    // Also one that gets the bits while the guest has it open.
    fs::write(share.path("program"), "content").unwrap();
    let node = share.look_up(Node::ROOT, "program").unwrap().node;
    let file = share.open_file(node, WRITE).unwrap();
    set_mode(&share);
    write(&share, file);
    assert_eq!(mode(&share), 0o755);
}

#[test]
fn the_parent_of_the_shared_folder_does_not_show() {
    let mut share = Share::new();
    let own = fs::metadata(share.path("")).unwrap().ino();
    for item in share.list(Node::ROOT, true) {
        assert!(item.entry.is_none());
        assert_eq!(item.inode, own, "{}", String::from_utf8_lossy(&item.name));
    }
}

#[test]
fn what_is_mounted_below_is_not_shared() {
    // /proc is mounted in / wherever this runs.
    let mut folder = tenon_folder::Folder::new(&Root::open("/".as_ref(), true).unwrap()).unwrap();
    let crossed = folder.act(&A::LookUp(at(Node::ROOT, "proc")));
    assert_eq!(crossed, Err(Errno(rustix::io::Errno::XDEV.raw_os_error().cast_unsigned())));
}

#[test]
fn read_only_refuses_every_change() {
    let mut share = Share::open(true);
    fs::write(share.path("file"), "content").unwrap();
    fs::create_dir(share.path("folder")).unwrap();
    let node = share.look_up(Node::ROOT, "file").unwrap().node;
    let file = share.open_file(node, READ).unwrap();
    let made = new(Node::ROOT, "made", 0o644);
    let (place, range) =
        (at(Node::ROOT, "file"), tenon_abi::FileRange { file, offset: 0, length: 1, position: 0 });
    let access = |write, append, truncate| tenon_abi::Access { write, append, truncate, ..READ };
    let all = |change: fn(&mut Changes)| {
        let mut changes = Changes::default();
        change(&mut changes);
        A::Change { node, file: None, changes }
    };
    let changes = [
        A::MakeFile(made.clone()),
        A::MakeFolder(made.clone()),
        A::MakeLink { new: made.clone(), target: b"x".to_vec() },
        A::Create { new: made, access: READ, exclusive: false },
        A::Create { new: new(Node::ROOT, "file", 0o644), access: READ, exclusive: false },
        A::Link { node, place: at(Node::ROOT, "made") },
        A::Remove(place.clone()),
        A::RemoveFolder(at(Node::ROOT, "folder")),
        A::Rename { from: place, to: at(Node::ROOT, "made"), how: RenameHow::Replace },
        A::Open { node, access: access(true, false, false) },
        A::Open { node, access: access(false, true, false) },
        A::Open { node, access: access(false, false, true) },
        A::Write(range),
        A::Allocate { file, how: tenon_abi::AllocateHow::Punch, position: 0, length: 1 },
        all(|changes| changes.mode = Some(0o600)),
        all(|changes| changes.size = Some(0)),
        all(|changes| changes.uid = Some(1)),
        all(|changes| changes.modified = Some(tenon_abi::NewTime::Now)),
        all(|_| {}),
    ];
    for change in changes {
        assert_eq!(share.act(change.clone()), Err(Errno::ROFS), "{change:?}");
    }
    assert!(share.folder.file(file, Some((0, 1))).is_err());
    assert_eq!(fs::read(share.path("file")).unwrap(), b"content");
    assert_eq!(fs::read_dir(share.path("")).unwrap().count(), 2);
}

/// Somebody on the host swaps a folder and a link out of the share, again and again, while the device walks through the name.
#[test]
fn a_name_that_becomes_a_link_while_it_is_walked_leads_nowhere() {
    let mut share = Share::new();
    fs::create_dir(share.path("here")).unwrap();
    fs::write(share.path("here/secret"), "inside").unwrap();
    symlink(share.outside(""), share.path("away")).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let swaps = Arc::new(AtomicU64::new(0));
    let swapper = std::thread::spawn({
        let (here, away) = (share.path("here"), share.path("away"));
        let (stop, swaps) = (stop.clone(), swaps.clone());
        move || {
            while !stop.load(Ordering::Relaxed) {
                let exchange = rustix::fs::RenameFlags::EXCHANGE;
                let cwd = rustix::fs::CWD;
                rustix::fs::renameat_with(cwd, &here, cwd, &away, exchange).unwrap();
                swaps.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    let outside = fs::metadata(share.outside("secret")).unwrap().ino();
    let (mut folders, mut links) = (0, 0);
    // Until both faces of the name were met, often.
    while folders < 200 || links < 200 || swaps.load(Ordering::Relaxed) < 200 {
        assert!(!swapper.is_finished(), "nobody swaps any more");
        let Ok(found) = share.look_up(Node::ROOT, "here") else { continue };
        match share.look_up(found.node, "secret") {
            Ok(secret) => {
                folders += 1;
                assert_ne!(secret.attributes.inode, outside, "the secret was reached");
                let (made, file) = share.create(found.node, "new", WRITE).unwrap();
                share.act(A::Close(file)).unwrap();
                share.act(A::Remove(at(found.node, "new"))).unwrap();
                share.act(A::Forget(vec![(secret.node, 1), (made.node, 1)])).unwrap();
            }
            Err(Errno::NOTDIR) => links += 1,
            Err(other) => panic!("{other}"),
        }
        share.act(A::Forget(vec![(found.node, 1)])).unwrap();
    }
    stop.store(true, Ordering::Relaxed);
    swapper.join().unwrap();
    let names: Vec<_> =
        fs::read_dir(share.outside("")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["secret"], "something was made outside");
}

/// The same with a file whose place a FIFO and a link take.
#[test]
fn a_file_that_becomes_something_else_while_it_is_opened_is_still_that_file() {
    let mut share = Share::new();
    fs::write(share.path("name"), "inside").unwrap();
    let node = share.look_up(Node::ROOT, "name").unwrap().node;
    fs::remove_file(share.path("name")).unwrap();
    symlink(share.outside("secret"), share.path("name")).unwrap();
    let file = share.open_file(node, READ).unwrap();
    let mut text = [0; 16];
    let count = rustix::io::pread(share.folder.file(file, None).unwrap(), &mut text, 0).unwrap();
    assert_eq!(&text[..count], b"inside");
    let O::Attributes(attributes) = share.act(A::Attributes { node, file: None }).unwrap() else { panic!() };
    assert_eq!((attributes.links, attributes.size), (0, 6));
}
