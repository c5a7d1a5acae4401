//! What a device does in its folder is what is in the folder afterwards.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use support::{READ, Share, WRITE, at, entry, new};
use tenon_abi::{
    Access, AllocateHow, Changes, Errno, FileTime, FolderAction as A, FolderOutcome as O, NewTime, Node,
    RenameHow,
};

#[test]
fn files_are_made_written_read_and_removed() {
    let mut share = Share::new();
    let (made, file) = share.create(Node::ROOT, "file", WRITE).unwrap();
    assert_eq!(made.attributes.mode, 0o100_644);
    rustix::io::pwrite(share.folder.file(file, Some((0, 5))).unwrap(), b"hello", 0).unwrap();
    assert_eq!(fs::read(share.path("file")).unwrap(), b"hello");
    let O::Attributes(now) = share.act(A::Attributes { node: made.node, file: Some(file) }).unwrap() else {
        panic!()
    };
    assert_eq!((now.size, now.links, now.inode), (5, 1, fs::metadata(share.path("file")).unwrap().ino()));
    share.act(A::Sync { file, data_only: true }).unwrap();
    share.act(A::Remove(at(Node::ROOT, "file"))).unwrap();
    assert!(!share.path("file").exists());
    // What is open goes on.
    let mut text = [0; 5];
    rustix::io::pread(share.folder.file(file, None).unwrap(), &mut text, 0).unwrap();
    assert_eq!(&text, b"hello");
    assert_eq!(share.act(A::Close(file)), Ok(O::Done));
    assert_eq!(share.act(A::Close(file)), Err(Errno::BADF));
    assert_eq!(share.look_up(Node::ROOT, "file"), Err(Errno::NOENT));
}

#[test]
fn a_mode_is_the_guests_whatever_mask_this_process_has() {
    let mut share = Share::new();
    for (name, mode) in [("open", 0o666), ("closed", 0), ("all", 0o1777)] {
        let file = entry(share.act(A::MakeFile(new(Node::ROOT, name, mode)))).unwrap();
        assert_eq!(file.attributes.mode & 0o7777, mode, "{name}");
        let folder = format!("{name}-folder");
        entry(share.act(A::MakeFolder(new(Node::ROOT, &folder, mode)))).unwrap();
        let is = fs::metadata(share.path(&folder)).unwrap().permissions().mode();
        assert_eq!(is & 0o7777, mode, "{folder}");
    }
}

#[test]
fn a_file_is_opened_for_what_was_asked_and_no_more() {
    let mut share = Share::new();
    fs::write(share.path("file"), "content").unwrap();
    fs::create_dir(share.path("folder")).unwrap();
    let node = share.look_up(Node::ROOT, "file").unwrap().node;
    let reader = share.open_file(node, READ).unwrap();
    assert_eq!(share.folder.file(reader, Some((0, 1))).unwrap_err(), Errno::BADF);
    let writer = share.open_file(node, Access { read: false, ..WRITE }).unwrap();
    assert_eq!(share.folder.file(writer, None).unwrap_err(), Errno::BADF);
    assert_eq!(share.open_file(node, Access::default()), Err(Errno::INVAL));
    let folder = share.look_up(Node::ROOT, "folder").unwrap().node;
    assert_eq!(share.open_file(folder, READ), Err(Errno::ISDIR));
    let O::Opened(listed) = share.act(A::OpenFolder(folder)).unwrap() else { panic!() };
    assert_eq!(share.folder.file(listed, None).unwrap_err(), Errno::ISDIR);
    assert_eq!(
        share.act(A::Names { file: reader, position: 0, room: 4096, each: 24, entries: false }),
        Err(Errno::NOTDIR)
    );
    let emptied = share.open_file(node, Access { truncate: true, ..WRITE }).unwrap();
    assert_eq!(fs::metadata(share.path("file")).unwrap().len(), 0);
    // The end of the file is where an appending file writes, wherever that is.
    let appender = share.open_file(node, Access { append: true, ..WRITE }).unwrap();
    for file in [emptied, appender] {
        rustix::io::pwrite(share.folder.file(file, Some((0, 2))).unwrap(), b"ab", 0).unwrap();
    }
    assert_eq!(fs::read(share.path("file")).unwrap(), b"abab");
    // Who empties a file need not write to it.
    let emptied = share.open_file(node, Access { truncate: true, ..READ }).unwrap();
    assert_eq!(share.folder.file(emptied, Some((0, 1))).unwrap_err(), Errno::BADF);
    assert_eq!(rustix::io::pread(share.folder.file(emptied, None).unwrap(), &mut [0; 4], 0), Ok(0));
    let access = Access { truncate: true, ..READ };
    fs::write(share.path("file"), "content").unwrap();
    share.act(A::Create { new: new(Node::ROOT, "file", 0o644), access, exclusive: false }).unwrap();
    assert_eq!(fs::metadata(share.path("file")).unwrap().len(), 0);
    share.act(A::Create { new: new(Node::ROOT, "another", 0o644), access, exclusive: true }).unwrap();
}

#[test]
fn attributes_change_together_or_alone() {
    let mut share = Share::new();
    fs::write(share.path("file"), "content").unwrap();
    let node = share.look_up(Node::ROOT, "file").unwrap().node;
    let time = |seconds| NewTime::At(FileTime { seconds, nanoseconds: 999_999_999 });
    let changes = Changes {
        mode: Some(0o640),
        size: Some(3),
        accessed: Some(time(-1)),
        modified: Some(time(1_000_000_000)),
        ..Changes::default()
    };
    let O::Attributes(now) = share.act(A::Change { node, file: None, changes }).unwrap() else { panic!() };
    assert_eq!((now.mode, now.size), (0o100_640, 3));
    assert_eq!(now.accessed, FileTime { seconds: -1, nanoseconds: 999_999_999 });
    assert_eq!(now.modified, FileTime { seconds: 1_000_000_000, nanoseconds: 999_999_999 });
    assert_eq!(fs::read(share.path("file")).unwrap(), b"con");
    let changes = Changes { accessed: Some(NewTime::Now), ..Changes::default() };
    let O::Attributes(later) = share.act(A::Change { node, file: None, changes }).unwrap() else { panic!() };
    assert!(later.accessed.seconds > 1_000_000_000);
    assert_eq!(later.modified, now.modified);
    let wrong = NewTime::At(FileTime { seconds: 0, nanoseconds: 1_000_000_000 });
    for wrong in [
        Changes { accessed: Some(wrong), ..Changes::default() },
        Changes { uid: Some(u32::MAX), ..Changes::default() },
    ] {
        let changes = Changes { mode: Some(0o600), size: Some(0), ..wrong };
        assert_eq!(share.act(A::Change { node, file: None, changes }), Err(Errno::INVAL));
        let is = fs::metadata(share.path("file")).unwrap();
        assert_eq!((is.len(), is.mode()), (3, 0o100_640), "nothing of what is refused is done");
    }
    let changes = Changes { size: Some(u64::MAX), ..Changes::default() };
    assert_eq!(share.act(A::Change { node, file: None, changes }), Err(Errno::FBIG));
    let reader = share.open_file(node, READ).unwrap();
    let changes = Changes { size: Some(0), ..Changes::default() };
    assert_eq!(share.act(A::Change { node, file: Some(reader), changes }), Err(Errno::BADF));
    let writer = share.open_file(node, WRITE).unwrap();
    share.act(A::Change { node, file: Some(writer), changes }).unwrap();
    assert_eq!(fs::metadata(share.path("file")).unwrap().len(), 0);
}

#[test]
fn counts_are_exact_and_what_is_forgotten_is_gone() {
    let mut share = Share::new();
    fs::write(share.path("file"), "").unwrap();
    let first = share.look_up(Node::ROOT, "file").unwrap();
    assert_eq!(share.look_up(Node::ROOT, "file").unwrap().node, first.node);
    let linked = entry(share.act(A::Link { node: first.node, place: at(Node::ROOT, "other") })).unwrap();
    assert_eq!(linked.node, first.node, "one file has one node, by whatever name");
    let node = first.node;
    share.act(A::Forget(vec![(node, 2)])).unwrap();
    assert!(share.act(A::Attributes { node, file: None }).is_ok());
    share.act(A::Forget(vec![(node, 1)])).unwrap();
    assert_eq!(share.act(A::Attributes { node, file: None }), Err(Errno::STALE));
    assert_eq!(share.folder.counts(), (0, 0, 0));
    let again = share.look_up(Node::ROOT, "file").unwrap().node;
    assert_ne!(again, node, "a number is given once");
    // The folder itself is never forgotten.
    share.act(A::Forget(vec![(Node::ROOT, u64::MAX)])).unwrap();
    assert!(share.look_up(Node::ROOT, "file").is_ok());
    share.open_file(again, READ).unwrap();
    share.act(A::Clear).unwrap();
    assert_eq!(share.folder.counts(), (0, 0, 0));
}

#[test]
fn names_are_exchanged_kept_and_replaced() {
    let mut share = Share::new();
    fs::write(share.path("a"), "a").unwrap();
    fs::write(share.path("b"), "b").unwrap();
    fs::create_dir(share.path("folder")).unwrap();
    let (from, to) = (at(Node::ROOT, "a"), at(Node::ROOT, "b"));
    let rename = |how| A::Rename { from: from.clone(), to: to.clone(), how };
    assert_eq!(share.act(rename(RenameHow::Keep)), Err(Errno::EXIST));
    share.act(rename(RenameHow::Exchange)).unwrap();
    assert_eq!(fs::read(share.path("a")).unwrap(), b"b");
    share.act(rename(RenameHow::Replace)).unwrap();
    assert_eq!(fs::read(share.path("b")).unwrap(), b"b");
    assert!(!share.path("a").exists());
    let folder = share.look_up(Node::ROOT, "folder").unwrap().node;
    share.act(A::Rename { from: to, to: at(folder, "c"), how: RenameHow::Keep }).unwrap();
    assert_eq!(fs::read(share.path("folder/c")).unwrap(), b"b");
    let busy = share.act(A::RemoveFolder(at(Node::ROOT, "folder")));
    assert_eq!(busy, Err(Errno(rustix::io::Errno::NOTEMPTY.raw_os_error().cast_unsigned())));
    assert_eq!(share.act(A::Remove(at(Node::ROOT, "folder"))), Err(Errno::ISDIR));
    share.act(A::Remove(at(folder, "c"))).unwrap();
    share.act(A::RemoveFolder(at(Node::ROOT, "folder"))).unwrap();
}

#[test]
fn a_long_list_comes_whole_in_pieces_with_what_is_named() {
    let mut share = Share::new();
    let names: BTreeSet<String> = (0..1500).map(|n| format!("{n:04}-{}", "x".repeat(n % 90))).collect();
    for name in &names {
        fs::write(share.path(name), name).unwrap();
    }
    let items = share.list(Node::ROOT, true);
    let found: BTreeSet<String> = items
        .iter()
        .map(|item| String::from_utf8(item.name.clone()).unwrap())
        .filter(|name| !matches!(name.as_str(), "." | ".."))
        .collect();
    assert_eq!(items.len(), names.len() + 2, "a name came twice");
    assert_eq!(found, names);
    for item in items.iter().filter(|item| item.entry.is_some()) {
        let attributes = item.entry.unwrap().attributes;
        assert_eq!((item.kind, attributes.inode), (8, item.inode));
        assert_eq!(attributes.size, item.name.len() as u64);
    }
    assert_eq!(items.iter().filter(|item| item.entry.is_some()).count(), 1500);
    // Without room for one name, and from where nobody is.
    let O::Opened(file) = share.act(A::OpenFolder(Node::ROOT)).unwrap() else { panic!() };
    let list = |position, room| A::Names { file, position, room, each: 24, entries: false };
    assert_eq!(share.act(list(0, 0)), Ok(O::Items(Vec::new())));
    for position in [u64::MAX, 1 << 63] {
        assert_eq!(share.act(list(position, 4096)), Err(Errno::INVAL));
    }
    assert!(matches!(share.act(list(0, u32::MAX)), Ok(O::Items(items)) if items.len() > 1000));
}

#[test]
fn a_list_with_what_is_named_reads_hardly_more_names_than_it_gives() {
    let mut share = Share::new();
    for n in 0..500 {
        fs::write(share.path(format!("name-{n:04}")), "").unwrap();
    }
    let O::Opened(file) = share.act(A::OpenFolder(Node::ROOT)).unwrap() else { panic!() };
    let list = |room, each, entries| A::Names { file, position: 0, room, each, entries };
    let O::Items(all) = share.act(list(64 << 10, 24, false)).unwrap() else { panic!() };
    let O::Items(given) = share.act(list(8192, 152, true)).unwrap() else { panic!() };
    assert_eq!(all.len(), 502);
    assert!(given.len() > 40);
    let position = position_of_what_is_listed(&share.path(""));
    let read = all.iter().position(|item| item.next == position).unwrap() + 1;
    assert!((given.len()..given.len() * 3 / 2).contains(&read), "{read} for {}", given.len());
}

/// How far this process has read in the folder of this path.
fn position_of_what_is_listed(folder: &std::path::Path) -> u64 {
    const O_PATH: u64 = 0o10_000_000;
    let number = |text: &str, name: &str, radix| {
        let value = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        u64::from_str_radix(value.trim(), radix).unwrap()
    };
    let folder = fs::canonicalize(folder).unwrap();
    let found = fs::read_dir("/proc/self/fd").unwrap().find_map(|entry| {
        let entry = entry.unwrap();
        // Others come and go meanwhile.
        let is_it = fs::read_link(entry.path()).is_ok_and(|path| path == folder);
        let info = fs::read_to_string(std::path::Path::new("/proc/self/fdinfo").join(entry.file_name()));
        info.ok().filter(|info| is_it && number(info, "flags:", 8) & O_PATH == 0)
    });
    number(&found.unwrap(), "pos:", 10)
}

#[test]
fn lists_of_the_longest_names_are_whole_in_the_least_room() {
    let mut share = Share::new();
    let name = |n: u32| format!("{n:0255}");
    (0..50).for_each(|n| fs::write(share.path(name(n)), "").unwrap());
    let O::Opened(file) = share.act(A::OpenFolder(Node::ROOT)).unwrap() else { panic!() };
    for (room, each) in [(408, 152), (280, 24), (4096, 152), (20_000, 152)] {
        let (mut found, mut position) = (BTreeSet::new(), 0);
        loop {
            let list = A::Names { file, position, room, each, entries: each == 152 };
            let O::Items(items) = share.act(list).unwrap() else { panic!() };
            let Some(last) = items.last() else { break };
            position = last.next;
            found.extend(items.into_iter().map(|item| item.name));
        }
        assert_eq!(found.len(), 52, "in {room} bytes");
    }
}

#[test]
fn space_holes_and_the_file_system_are_told() {
    let mut share = Share::new();
    let (entry, file) = share.create(Node::ROOT, "file", WRITE).unwrap();
    let allocate = |how, position, length| A::Allocate { file, how, position, length };
    match share.act(allocate(AllocateHow::Extend, 0, 1 << 20)) {
        Err(Errno::OPNOTSUPP) => println!("not run: this file system has no fallocate"),
        other => {
            assert_eq!(other, Ok(O::Done));
            share.act(allocate(AllocateHow::Punch, 0, 1 << 19)).unwrap();
        }
    }
    let changes = Changes { size: Some(1 << 20), ..Changes::default() };
    share.act(A::Change { node: entry.node, file: Some(file), changes }).unwrap();
    assert_eq!(share.act(allocate(AllocateHow::Extend, u64::MAX, 2)), Err(Errno::FBIG));
    assert_eq!(share.act(A::Seek { file, position: 0, hole: true }), Ok(O::Position(0)));
    let past = Errno(rustix::io::Errno::NXIO.raw_os_error().cast_unsigned());
    assert_eq!(share.act(A::Seek { file, position: 1 << 30, hole: false }), Err(past));
    let O::Statistics(about) = share.act(A::Statistics(Node::ROOT)).unwrap() else { panic!() };
    assert!(about.block_size >= 512 && about.blocks >= about.free && about.name_length >= 255, "{about:?}");
}

#[test]
fn more_nodes_than_descriptors_are_found_again_by_name_and_only_as_what_they_were() {
    tenon_folder::raise_open_files();
    let mut share = Share::new();
    let (most_held, _) = share.folder.limits();
    let count = most_held + 500;
    let folder = entry(share.act(A::MakeFolder(new(Node::ROOT, "folder", 0o755)))).unwrap().node;
    let mut nodes = Vec::new();
    for n in 0..count {
        let name = format!("{n}");
        fs::write(share.path("folder").join(&name), &name).unwrap();
        nodes.push(share.look_up(folder, &name).unwrap());
    }
    let (known, held, _) = share.folder.counts();
    assert_eq!((known, held), (count + 1, most_held));
    // The guest renames the folder, and files in it; one is removed, one replaced by the host.
    share
        .act(A::Rename {
            from: at(Node::ROOT, "folder"),
            to: at(Node::ROOT, "moved"),
            how: RenameHow::Replace,
        })
        .unwrap();
    share.act(A::Rename { from: at(folder, "1"), to: at(folder, "one"), how: RenameHow::Replace }).unwrap();
    share.act(A::Remove(at(folder, "2"))).unwrap();
    fs::remove_file(share.path("moved/3")).unwrap();
    fs::write(share.path("moved/3"), "another").unwrap();
    for (n, entry) in nodes.iter().enumerate() {
        let now = share.act(A::Attributes { node: entry.node, file: None });
        match now {
            Ok(O::Attributes(now)) => assert_eq!(now.inode, entry.attributes.inode, "{n}"),
            // Unless it was among those that had a descriptor.
            Err(Errno::STALE) if n == 3 => {}
            other => panic!("{n}: {other:?}"),
        }
    }
    let (_, held, _) = share.folder.counts();
    assert!(held <= most_held);
    let forget = nodes.iter().map(|entry| (entry.node, 1)).collect();
    share.act(A::Forget(forget)).unwrap();
    assert_eq!(share.folder.counts(), (1, 1, 0));
}

#[test]
fn removed_files_that_are_not_forgotten_take_no_more_descriptors_than_others() {
    tenon_folder::raise_open_files();
    let mut share = Share::new();
    let (most_held, _) = share.folder.limits();
    let count = most_held + 500;
    let mut nodes = Vec::new();
    for n in 0..count {
        let name = format!("{n}");
        fs::write(share.path(&name), &name).unwrap();
        nodes.push(share.look_up(Node::ROOT, &name).unwrap().node);
    }
    for n in 0..count {
        share.act(A::Remove(at(Node::ROOT, &format!("{n}")))).unwrap();
    }
    let (known, held, _) = share.folder.counts();
    assert_eq!(known, count);
    assert!(held <= most_held, "{held} descriptors of at most {most_held}");
    // Half of them are still there, and new ones are found as ever.
    let is_there = |share: &mut Share, node: Node| match share.act(A::Attributes { node, file: None }) {
        Ok(_) => true,
        Err(Errno::STALE) => false,
        Err(other) => panic!("{other}"),
    };
    let mut others = Vec::new();
    for n in 0..most_held {
        fs::write(share.path(format!("new-{n}")), "").unwrap();
        others.push(share.look_up(Node::ROOT, &format!("new-{n}")).unwrap().node);
    }
    let there = nodes.iter().filter(|node| is_there(&mut share, **node)).count();
    assert_eq!(there, most_held / 2);
    assert!(others.iter().all(|node| is_there(&mut share, *node)));
    let (_, held, _) = share.folder.counts();
    assert!(held <= most_held, "{held} descriptors of at most {most_held}");
    // When these are forgotten there is room for others.
    share.act(A::Forget(nodes.iter().map(|node| (*node, 1)).collect())).unwrap();
    share.act(A::Remove(at(Node::ROOT, "new-0"))).unwrap();
    for n in 0..most_held {
        fs::write(share.path(format!("more-{n}")), "").unwrap();
        share.look_up(Node::ROOT, &format!("more-{n}")).unwrap();
    }
    assert!(others.iter().all(|node| is_there(&mut share, *node)));
}

#[test]
fn open_files_are_bounded() {
    tenon_folder::raise_open_files();
    let mut share = Share::new();
    fs::write(share.path("file"), "").unwrap();
    let node = share.look_up(Node::ROOT, "file").unwrap().node;
    let (_, most) = share.folder.limits();
    let files: Vec<_> = (0..most).map(|_| share.open_file(node, READ).unwrap()).collect();
    assert_eq!(share.open_file(node, READ), Err(Errno::NFILE));
    let create = A::Create { new: new(Node::ROOT, "new", 0o644), access: WRITE, exclusive: true };
    assert_eq!(share.act(create), Err(Errno::NFILE));
    assert!(!share.path("new").exists(), "made, and then not opened");
    share.act(A::Close(files[7])).unwrap();
    assert!(share.open_file(node, READ).is_ok());
}

#[test]
fn what_is_no_folder_cannot_be_shared() {
    let share = Share::new();
    assert!(tenon_folder::Root::open(&share.outside("secret"), false).is_err());
    assert!(tenon_folder::Root::open(&share.outside("nothing"), false).is_err());
}
