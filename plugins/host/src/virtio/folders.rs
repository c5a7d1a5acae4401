//! What devices do in folders of the host: each action once, whatever becomes of the instance that asked for it; and data moved straight between guest memory and files.
//!
//! What keeps a device inside its folder is in `tenon-folder`.
#![allow(unsafe_code, reason = "preadv and pwritev on the buffers of requests")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use tenon_abi::{
    Access, AllocateHow, Attributes, Changes, Errno, FileRange, FileTime, FolderAction, FolderEntry,
    FolderItem, FolderOutcome, NewFile, NewTime, Node, OpenFile, Place, RenameHow,
};
use tenon_core::Buffers;

use super::services::VirtioServices;
use super::table::{Acted, Acts};
use crate::bindings::virtio::tenon::device::folders as wit;
use crate::fault::Misuse;

/// The most ranges of memory that one system call takes (`IOV_MAX`).
const MOST_RANGES: usize = 1024;
/// The most bytes of an action's list or names, all of which are kept until the request is answered.
const MOST_GIVEN: usize = 64 << 10;

impl VirtioServices {
    /// Does something in a folder on behalf of a request. What was done before is not done again.
    pub(super) fn folder_act(
        &mut self,
        folder: u32,
        handle: u32,
        action: FolderAction,
    ) -> Result<Acts, Misuse> {
        if self.base.preparing() {
            return Err(Misuse("it worked in a folder before it was given requests".into()));
        }
        let given = given(&action);
        if given > MOST_GIVEN {
            return Err(Misuse(format!(
                "it asked a folder for something with {given} bytes of names or nodes, which may be {MOST_GIVEN}"
            )));
        }
        let total = self.table.total();
        let held = self.table.get(handle)?;
        let Some(within) = self.folders.get_mut(usize::try_from(folder).unwrap_or(usize::MAX)) else {
            return Err(Misuse(format!("it named folder {folder}, which it was not given")));
        };
        if let Some(outcome) = held.acted_before(folder, &action, &mut self.divergences)? {
            return Ok(outcome);
        }
        total.check(given)?;
        let outcome = Arc::new(match &action {
            FolderAction::Read(range) => {
                within.file(range.file, None).and_then(|fd| transfer(fd, range, &held.writable, false))
            }
            FolderAction::Write(range) => within
                .file(range.file, Some((range.position, range.length.into())))
                .and_then(|fd| transfer(fd, range, &held.readable, true)),
            other => within.act(other),
        });
        let share = total.add(given + outcome.as_ref().as_ref().map_or(0, taken));
        held.acted(Acted { folder, action, outcome: outcome.clone(), _share: share });
        Ok(outcome)
    }
}

/// How many bytes an action has besides its own size.
fn given(action: &FolderAction) -> usize {
    use FolderAction as A;
    match action {
        A::Forget(nodes) => size_of_val(nodes.as_slice()),
        A::LookUp(place) | A::Link { place, .. } | A::Remove(place) | A::RemoveFolder(place) => {
            place.name.len()
        }
        A::MakeFile(new) | A::MakeFolder(new) | A::Create { new, .. } => new.place.name.len(),
        A::MakeLink { new, target } => new.place.name.len() + target.len(),
        A::Rename { from, to, .. } => from.name.len() + to.name.len(),
        A::Clear
        | A::Attributes { .. }
        | A::Change { .. }
        | A::ReadLink(_)
        | A::Open { .. }
        | A::OpenFolder(_)
        | A::Names { .. }
        | A::Read(_)
        | A::Write(_)
        | A::Sync { .. }
        | A::Allocate { .. }
        | A::Seek { .. }
        | A::Statistics(_)
        | A::Close(_) => 0,
    }
}

/// How many bytes an outcome has besides its own size.
fn taken(outcome: &FolderOutcome) -> usize {
    match outcome {
        FolderOutcome::Target(target) => target.len(),
        FolderOutcome::Items(items) => {
            size_of_val(items.as_slice()) + items.iter().map(|item| item.name.len()).sum::<usize>()
        }
        _ => 0,
    }
}

/// Moves data until all is moved or there is no more; an error only where nothing was. A read that is given less than it asks for has met the end of the file.
fn transfer(
    fd: BorrowedFd<'_>,
    range: &FileRange,
    row: &Buffers,
    write: bool,
) -> Result<FolderOutcome, Errno> {
    let length = u64::from(range.length).min(row.length().saturating_sub(range.offset.into()));
    let mut done = 0;
    while done < length {
        let at = u64::from(range.offset) + done;
        match step(fd, row, (at, length - done), range.position.saturating_add(done), write) {
            Ok((0, _)) => break,
            Ok((count, asked)) => {
                done += count;
                if !write {
                    row.written(at, count);
                    if count < asked {
                        break;
                    }
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if done == 0 => {
                let number = error.raw_os_error().and_then(|number| u32::try_from(number).ok());
                return Err(number.map_or(Errno::IO, Errno));
            }
            Err(_) => break,
        }
    }
    Ok(FolderOutcome::Moved(u32::try_from(done).unwrap_or(u32::MAX)))
}

/// One system call, which moves `length` bytes or fewer: how many it did, and how many it was asked to.
fn step(
    fd: BorrowedFd<'_>,
    row: &Buffers,
    (at, length): (u64, u64),
    position: u64,
    write: bool,
) -> io::Result<(u64, u64)> {
    let invalid = || io::Error::from_raw_os_error(libc::EINVAL);
    let vectors = row.iovecs(at, length).ok_or_else(invalid)?;
    let position = libc::off_t::try_from(position).map_err(|_| invalid())?;
    let vectors = &vectors[..vectors.len().min(MOST_RANGES)];
    let asked: usize = vectors.iter().map(|vector| vector.iov_len).sum();
    let count = libc::c_int::try_from(vectors.len()).map_err(|_| invalid())?;
    // SAFETY: the ranges are guest memory, which lives as long as `row`, and which others than this process's code may change at any time.
    let moved = unsafe {
        if write {
            libc::pwritev(fd.as_raw_fd(), vectors.as_ptr(), count, position)
        } else {
            libc::preadv(fd.as_raw_fd(), vectors.as_ptr(), count, position)
        }
    };
    u64::try_from(moved).map(|moved| (moved, asked as u64)).map_err(|_| io::Error::last_os_error())
}

/// What a component asks for, in this program's words.
pub(super) fn from_action(action: wit::Action) -> FolderAction {
    use FolderAction as A;
    match action {
        wit::Action::Clear => A::Clear,
        wit::Action::Forget(nodes) => {
            A::Forget(nodes.into_iter().map(|(node, count)| (Node(node), count)).collect())
        }
        wit::Action::LookUp(at) => A::LookUp(place(at)),
        wit::Action::Attributes(wit::Subject { node, file }) => {
            A::Attributes { node: Node(node), file: file.map(OpenFile) }
        }
        wit::Action::Change(wit::Change { subject: wit::Subject { node, file }, changes }) => {
            let wit::Changes { mode, uid, gid, size, accessed, modified } = changes;
            let (accessed, modified) = (accessed.map(new_time), modified.map(new_time));
            let changes = Changes { mode, uid, gid, size, accessed, modified };
            A::Change { node: Node(node), file: file.map(OpenFile), changes }
        }
        wit::Action::ReadLink(node) => A::ReadLink(Node(node)),
        wit::Action::MakeFile(new) => A::MakeFile(new_file(new)),
        wit::Action::MakeFolder(new) => A::MakeFolder(new_file(new)),
        wit::Action::MakeLink(wit::NewLink { new, target }) => A::MakeLink { new: new_file(new), target },
        wit::Action::Link(wit::AnotherName { node, place: at }) => {
            A::Link { node: Node(node), place: place(at) }
        }
        wit::Action::Remove(at) => A::Remove(place(at)),
        wit::Action::RemoveFolder(at) => A::RemoveFolder(place(at)),
        wit::Action::Rename(wit::Renaming { source, target, how }) => A::Rename {
            from: place(source),
            to: place(target),
            how: match how {
                wit::RenameHow::Replace => RenameHow::Replace,
                wit::RenameHow::Keep => RenameHow::Keep,
                wit::RenameHow::Exchange => RenameHow::Exchange,
            },
        },
        wit::Action::Open(wit::Opening { node, access: wanted }) => {
            A::Open { node: Node(node), access: access(wanted) }
        }
        wit::Action::Create(wit::Creation { new, access: wanted, exclusive }) => {
            A::Create { new: new_file(new), access: access(wanted), exclusive }
        }
        wit::Action::OpenFolder(node) => A::OpenFolder(Node(node)),
        wit::Action::Names(wit::Listing { file, position, room, each, entries }) => {
            A::Names { file: OpenFile(file), position, room, each, entries }
        }
        wit::Action::Read(moved) => A::Read(range(moved)),
        wit::Action::Write(moved) => A::Write(range(moved)),
        wit::Action::Sync(wit::Syncing { file, data_only }) => A::Sync { file: OpenFile(file), data_only },
        wit::Action::Allocate(wit::Allocation { file, how, position, length }) => A::Allocate {
            file: OpenFile(file),
            how: match how {
                wit::AllocateHow::Extend => AllocateHow::Extend,
                wit::AllocateHow::Keep => AllocateHow::Keep,
                wit::AllocateHow::Punch => AllocateHow::Punch,
                wit::AllocateHow::Zero => AllocateHow::Zero,
                wit::AllocateHow::ZeroKeep => AllocateHow::ZeroKeep,
            },
            position,
            length,
        },
        wit::Action::Seek(wit::Search { file, position, hole }) => {
            A::Seek { file: OpenFile(file), position, hole }
        }
        wit::Action::Statistics(node) => A::Statistics(Node(node)),
        wit::Action::Close(file) => A::Close(OpenFile(file)),
    }
}

fn place(wit::Place { folder, name }: wit::Place) -> Place {
    Place { folder: Node(folder), name }
}

fn new_file(wit::NewFile { place: at, mode, uid, gid }: wit::NewFile) -> NewFile {
    NewFile { place: place(at), mode, uid, gid }
}

fn range(wit::FileRange { file, offset, length, position }: wit::FileRange) -> FileRange {
    FileRange { file: OpenFile(file), offset, length, position }
}

fn new_time(time: wit::NewTime) -> NewTime {
    match time {
        wit::NewTime::Now => NewTime::Now,
        wit::NewTime::At(wit::FileTime { seconds, nanoseconds }) => {
            NewTime::At(FileTime { seconds, nanoseconds })
        }
    }
}

fn access(flags: wit::Access) -> Access {
    let has = |flag| flags.contains(flag);
    Access {
        read: has(wit::Access::READ),
        write: has(wit::Access::WRITE),
        append: has(wit::Access::APPEND),
        truncate: has(wit::Access::TRUNCATE),
        sync: has(wit::Access::SYNC),
    }
}

/// What an action came to, in the contract's words.
pub(super) fn to_outcome(outcome: &FolderOutcome) -> wit::Outcome {
    match outcome {
        FolderOutcome::Done => wit::Outcome::Done,
        FolderOutcome::Entry(known) => wit::Outcome::Entry(entry(known)),
        FolderOutcome::Attributes(about) => wit::Outcome::Attributes(attributes(about)),
        FolderOutcome::Target(target) => wit::Outcome::Target(target.clone()),
        FolderOutcome::Opened(file) => wit::Outcome::Opened(file.0),
        FolderOutcome::Created(known, file) => wit::Outcome::Created((entry(known), file.0)),
        FolderOutcome::Items(items) => {
            let item = |FolderItem { next, inode, kind, name, entry: known }: &FolderItem| wit::Item {
                next: *next,
                inode: *inode,
                kind: *kind,
                name: name.clone(),
                entry: known.as_ref().map(entry),
            };
            wit::Outcome::Items(items.iter().map(item).collect())
        }
        FolderOutcome::Moved(count) => wit::Outcome::Moved(*count),
        FolderOutcome::Position(position) => wit::Outcome::Position(*position),
        FolderOutcome::Statistics(about) => wit::Outcome::Statistics(wit::Statistics {
            block_size: about.block_size,
            name_length: about.name_length,
            blocks: about.blocks,
            free: about.free,
            available: about.available,
            files: about.files,
            files_free: about.files_free,
        }),
    }
}

fn entry(FolderEntry { node, attributes: about }: &FolderEntry) -> wit::Entry {
    wit::Entry { node: node.0, attributes: attributes(about) }
}

fn attributes(about: &Attributes) -> wit::Attributes {
    let time = |FileTime { seconds, nanoseconds }| wit::FileTime { seconds, nanoseconds };
    wit::Attributes {
        inode: about.inode,
        size: about.size,
        blocks: about.blocks,
        block_size: about.block_size,
        mode: about.mode,
        links: about.links,
        uid: about.uid,
        gid: about.gid,
        device: about.device,
        accessed: time(about.accessed),
        modified: time(about.modified),
        changed: time(about.changed),
    }
}

#[cfg(test)]
mod tests;
