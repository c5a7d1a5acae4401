//! What cannot be finished is not left half done. These tests take this process's descriptors away, so they are one test of a process of its own.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::fs::{self, File};

use rustix::process::{Resource, getrlimit, setrlimit};
use support::{READ, Share, WRITE, at, new};
use tenon_abi::{Errno, FolderAction as A, NewFile, Node};

/// Everything by which a device makes a name.
fn makers(share: &mut Share) -> Vec<(&'static str, A)> {
    let made = |uid, gid| NewFile { uid, gid, ..new(Node::ROOT, "made", 0o700) };
    let (good, nobody, no_group) = (made(0, 0), made(u32::MAX, 0), made(0, u32::MAX));
    let file = share.look_up(Node::ROOT, "file").unwrap().node;
    let mut all = vec![("a name", A::Link { node: file, place: at(Node::ROOT, "made") })];
    for new in [good, nobody, no_group] {
        all.push(("a file", A::MakeFile(new.clone())));
        all.push(("a folder", A::MakeFolder(new.clone())));
        all.push(("a link", A::MakeLink { new: new.clone(), target: b"x".to_vec() }));
        all.push(("an open file", A::Create { new, access: WRITE, exclusive: false }));
    }
    all
}

#[test]
fn what_cannot_be_told_to_the_device_is_not_there_afterwards() {
    let mut share = Share::new();
    fs::write(share.path("file"), "").unwrap();
    let names = |share: &Share| fs::read_dir(share.path("")).unwrap().count();
    // Owners that there are not.
    for (what, action) in makers(&mut share).split_off(5) {
        assert_eq!(share.act(action), Err(Errno::INVAL), "{what}");
        assert_eq!(names(&share), 1, "{what}");
    }
    // With no descriptors, and with one, two and so on, until there are enough.
    let limits = getrlimit(Resource::Nofile);
    for (what, action) in makers(&mut share).into_iter().take(5) {
        let mut refused = 0;
        for free in 0.. {
            let low = rustix::process::Rlimit { current: Some(64), ..limits };
            setrlimit(Resource::Nofile, low).unwrap();
            let mut taken: Vec<File> = Vec::new();
            while let Ok(file) = File::open("/dev/null") {
                taken.push(file);
            }
            taken.truncate(taken.len() - free);
            let done = share.act(action.clone());
            drop(taken);
            setrlimit(Resource::Nofile, limits).unwrap();
            if done.is_ok() {
                break;
            }
            refused += 1;
            let no_files = Errno(rustix::io::Errno::MFILE.raw_os_error().cast_unsigned());
            assert_eq!(done, Err(no_files), "{what} with {free} descriptors");
            assert_eq!(names(&share), 1, "{what} with {free} descriptors was left");
        }
        assert!(refused > 0, "{what} needs no descriptor");
        let remove = if what == "a folder" { A::RemoveFolder } else { A::Remove };
        share.act(remove(at(Node::ROOT, "made"))).unwrap();
    }
    let file = share.look_up(Node::ROOT, "file").unwrap().node;
    share.open_file(file, READ).unwrap();
}
