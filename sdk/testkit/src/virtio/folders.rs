//! Folders of a virtio device on the bench: real ones, behind the same walls as in a machine.

use std::cell::RefCell;
use std::io;
use std::path::Path;
use std::rc::Rc;

use tempfile::TempDir;
use tenon_folder::{Folder, Root};
use tenon_sdk::virtio::{AllocateHow, Errno, FileRange, FolderAction, FolderOutcome};

/// The most bytes that are allocated at once: whoever tries any number does not fill the disk of the machine that runs the test.
const MOST_ALLOCATED: u64 = 16 << 20;

/// A folder. Clones are the same.
#[derive(Clone, Debug)]
pub(super) struct FolderEnd {
    folder: Rc<RefCell<Folder>>,
    root: std::sync::Arc<Root>,
    /// It goes with the bench.
    _temporary: Option<Rc<TempDir>>,
}

impl FolderEnd {
    /// A folder of the host.
    pub(super) fn new(path: &Path, read_only: bool) -> Self {
        let opened = Root::open(path, read_only).and_then(|root| Ok((Folder::new(&root)?, root)));
        let (folder, root) =
            opened.unwrap_or_else(|error| panic!("the folder {} cannot be shared: {error}", path.display()));
        Self { folder: Rc::new(RefCell::new(folder)), root, _temporary: None }
    }

    /// A folder with nothing in it.
    pub(super) fn empty() -> Self {
        let temporary = tempfile::tempdir().unwrap_or_else(|error| panic!("no temporary folder: {error}"));
        let end = Self::new(temporary.path(), false);
        Self { _temporary: Some(Rc::new(temporary)), ..end }
    }

    pub(super) fn path(&self) -> &Path {
        self.root.path()
    }

    /// Nodes and open files.
    pub(super) fn counts(&self) -> (usize, usize) {
        let (nodes, _, files) = self.folder.borrow().counts();
        (nodes, files)
    }

    pub(super) fn clear(&self) {
        self.folder.borrow_mut().clear();
    }

    pub(super) fn act(
        &self,
        action: &FolderAction,
        readable: &[u8],
        writable: &mut [u8],
    ) -> Result<FolderOutcome, Errno> {
        let mut folder = self.folder.borrow_mut();
        let moved = match action {
            FolderAction::Read(FileRange { file, offset, length, position }) => {
                let fd = folder.file(*file, None)?;
                let rest = writable.get_mut(*offset as usize..).unwrap_or_default();
                let length = rest.len().min(*length as usize);
                move_all(length, |done| {
                    rustix::io::pread(fd, &mut rest[done..length], position.saturating_add(done as u64))
                })
            }
            FolderAction::Write(FileRange { file, offset, length, position }) => {
                let fd = folder.file(*file, Some((*position, (*length).into())))?;
                let rest = readable.get(*offset as usize..).unwrap_or_default();
                let length = rest.len().min(*length as usize);
                move_all(length, |done| {
                    rustix::io::pwrite(fd, &rest[done..length], position.saturating_add(done as u64))
                })
            }
            FolderAction::Allocate { how, length, .. }
                if *how != AllocateHow::Punch && *length > MOST_ALLOCATED =>
            {
                return Err(Errno::NOSPC);
            }
            other => return folder.act(other),
        };
        let count = moved.map_err(|error| {
            let number = error.raw_os_error().and_then(|number| u32::try_from(number).ok());
            number.map_or(Errno::IO, Errno)
        })?;
        Ok(FolderOutcome::Moved(u32::try_from(count).unwrap_or(u32::MAX)))
    }
}

/// Moves until all is moved or there is no more; an error only where nothing was.
fn move_all(length: usize, mut part: impl FnMut(usize) -> rustix::io::Result<usize>) -> io::Result<usize> {
    let mut done = 0;
    while done < length {
        match part(done) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) if done == 0 => return Err(error.into()),
            Err(_) => break,
        }
    }
    Ok(done)
}
