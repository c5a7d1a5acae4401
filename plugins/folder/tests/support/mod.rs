//! A shared folder in a temporary one, beside things that are not shared.
#![allow(clippy::unwrap_used, dead_code, reason = "a test's tools")]

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use tenon_abi::{
    Access, Errno, FolderAction as A, FolderEntry, FolderItem, FolderOutcome as O, NewFile, Node, OpenFile,
    Place,
};
use tenon_folder::{Folder, Root};

pub(crate) const READ: Access =
    Access { read: true, write: false, append: false, truncate: false, sync: false };
pub(crate) const WRITE: Access = Access { write: true, ..READ };

pub(crate) struct Share {
    /// Holds `shared`, and `outside` with the file `secret`.
    pub(crate) place: TempDir,
    pub(crate) folder: Folder,
}

impl Share {
    pub(crate) fn new() -> Self {
        Self::open(false)
    }

    pub(crate) fn open(read_only: bool) -> Self {
        let place = tempfile::tempdir().unwrap();
        fs::create_dir(place.path().join("shared")).unwrap();
        fs::create_dir(place.path().join("outside")).unwrap();
        fs::write(place.path().join("outside/secret"), "secret").unwrap();
        let root = Root::open(&place.path().join("shared"), read_only).unwrap();
        Self { folder: Folder::new(&root).unwrap(), place }
    }

    /// A path below the shared folder.
    pub(crate) fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.place.path().join("shared").join(name)
    }

    pub(crate) fn outside(&self, name: &str) -> PathBuf {
        self.place.path().join("outside").join(name)
    }

    pub(crate) fn act(&mut self, action: A) -> Result<O, Errno> {
        self.folder.act(&action)
    }

    pub(crate) fn look_up(&mut self, folder: Node, name: &str) -> Result<FolderEntry, Errno> {
        entry(self.act(A::LookUp(at(folder, name))))
    }

    pub(crate) fn open_file(&mut self, node: Node, access: Access) -> Result<OpenFile, Errno> {
        match self.act(A::Open { node, access })? {
            O::Opened(file) => Ok(file),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn create(
        &mut self,
        folder: Node,
        name: &str,
        access: Access,
    ) -> Result<(FolderEntry, OpenFile), Errno> {
        match self.act(A::Create { new: new(folder, name, 0o644), access, exclusive: false })? {
            O::Created(entry, file) => Ok((entry, file)),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn list(&mut self, folder: Node, entries: bool) -> Vec<FolderItem> {
        let O::Opened(file) = self.act(A::OpenFolder(folder)).unwrap() else { panic!() };
        let (mut all, mut position) = (Vec::new(), 0);
        loop {
            let O::Items(items) =
                self.act(A::Names { file, position, room: 4096, each: 24, entries }).unwrap()
            else {
                panic!()
            };
            let Some(last) = items.last() else { break };
            position = last.next;
            all.extend(items);
        }
        self.act(A::Close(file)).unwrap();
        all
    }
}

pub(crate) fn at(folder: Node, name: &str) -> Place {
    Place { folder, name: name.into() }
}

pub(crate) fn new(folder: Node, name: &str, mode: u32) -> NewFile {
    let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    NewFile { place: at(folder, name), mode, uid, gid }
}

pub(crate) fn entry(outcome: Result<O, Errno>) -> Result<FolderEntry, Errno> {
    match outcome? {
        O::Entry(entry) => Ok(entry),
        other => panic!("{other:?}"),
    }
}
