//! Folders of the host: the contract's words for what is asked and answered, and those of the SDK.

use super::super::{
    Access, AllocateHow, Attributes, Changes, Errno, FileRange, FileTime, FolderAction, FolderEntry,
    FolderItem, FolderOutcome, FolderStatistics, Handle, NewFile, NewTime, Node, OpenFile, Place, RenameHow,
};
use super::bindings::tenon::device::folders as wit;

pub(in crate::virtio) struct Folder(pub(super) wit::Folder);

impl Folder {
    pub(in crate::virtio) fn act(
        &self,
        request: Handle,
        action: FolderAction,
    ) -> Result<FolderOutcome, Errno> {
        let action = action.into();
        self.0.act(request.0, &action).map(Into::into).map_err(Errno)
    }
}

impl From<FolderAction> for wit::Action {
    fn from(action: FolderAction) -> Self {
        use FolderAction as A;
        match action {
            A::Clear => Self::Clear,
            A::Forget(nodes) => {
                Self::Forget(nodes.into_iter().map(|(node, count)| (node.0, count)).collect())
            }
            A::LookUp(place) => Self::LookUp(place.into()),
            A::Attributes { node, file } => Self::Attributes(subject(node, file)),
            A::Change { node, file, changes } => {
                Self::Change(wit::Change { subject: subject(node, file), changes: changes.into() })
            }
            A::ReadLink(node) => Self::ReadLink(node.0),
            A::MakeFile(new) => Self::MakeFile(new.into()),
            A::MakeFolder(new) => Self::MakeFolder(new.into()),
            A::MakeLink { new, target } => Self::MakeLink(wit::NewLink { new: new.into(), target }),
            A::Link { node, place } => Self::Link(wit::AnotherName { node: node.0, place: place.into() }),
            A::Remove(place) => Self::Remove(place.into()),
            A::RemoveFolder(place) => Self::RemoveFolder(place.into()),
            A::Rename { from, to, how } => Self::Rename(wit::Renaming {
                source: from.into(),
                target: to.into(),
                how: match how {
                    RenameHow::Replace => wit::RenameHow::Replace,
                    RenameHow::Keep => wit::RenameHow::Keep,
                    RenameHow::Exchange => wit::RenameHow::Exchange,
                },
            }),
            A::Open { node, access } => Self::Open(wit::Opening { node: node.0, access: flags(access) }),
            A::Create { new, access, exclusive } => {
                Self::Create(wit::Creation { new: new.into(), access: flags(access), exclusive })
            }
            A::OpenFolder(node) => Self::OpenFolder(node.0),
            A::Names { file, position, room, each, entries } => {
                Self::Names(wit::Listing { file: file.0, position, room, each, entries })
            }
            A::Read(range) => Self::Read(range.into()),
            A::Write(range) => Self::Write(range.into()),
            A::Sync { file, data_only } => Self::Sync(wit::Syncing { file: file.0, data_only }),
            A::Allocate { file, how, position, length } => Self::Allocate(wit::Allocation {
                file: file.0,
                how: match how {
                    AllocateHow::Extend => wit::AllocateHow::Extend,
                    AllocateHow::Keep => wit::AllocateHow::Keep,
                    AllocateHow::Punch => wit::AllocateHow::Punch,
                    AllocateHow::Zero => wit::AllocateHow::Zero,
                    AllocateHow::ZeroKeep => wit::AllocateHow::ZeroKeep,
                },
                position,
                length,
            }),
            A::Seek { file, position, hole } => Self::Seek(wit::Search { file: file.0, position, hole }),
            A::Statistics(node) => Self::Statistics(node.0),
            A::Close(file) => Self::Close(file.0),
        }
    }
}

fn subject(node: Node, file: Option<OpenFile>) -> wit::Subject {
    wit::Subject { node: node.0, file: file.map(|file| file.0) }
}

fn flags(access: Access) -> wit::Access {
    wit::Access::from_bits_truncate(access.to_bits())
}

impl From<Place> for wit::Place {
    fn from(Place { folder, name }: Place) -> Self {
        Self { folder: folder.0, name }
    }
}

impl From<NewFile> for wit::NewFile {
    fn from(NewFile { place, mode, uid, gid }: NewFile) -> Self {
        Self { place: place.into(), mode, uid, gid }
    }
}

impl From<FileRange> for wit::FileRange {
    fn from(FileRange { file, offset, length, position }: FileRange) -> Self {
        Self { file: file.0, offset, length, position }
    }
}

impl From<Changes> for wit::Changes {
    fn from(Changes { mode, uid, gid, size, accessed, modified }: Changes) -> Self {
        let time = |time| match time {
            NewTime::Now => wit::NewTime::Now,
            NewTime::At(FileTime { seconds, nanoseconds }) => {
                wit::NewTime::At(wit::FileTime { seconds, nanoseconds })
            }
        };
        Self { mode, uid, gid, size, accessed: accessed.map(time), modified: modified.map(time) }
    }
}

impl From<wit::Outcome> for FolderOutcome {
    fn from(outcome: wit::Outcome) -> Self {
        match outcome {
            wit::Outcome::Done => Self::Done,
            wit::Outcome::Entry(entry) => Self::Entry(entry.into()),
            wit::Outcome::Attributes(attributes) => Self::Attributes(attributes.into()),
            wit::Outcome::Target(target) => Self::Target(target),
            wit::Outcome::Opened(file) => Self::Opened(OpenFile(file)),
            wit::Outcome::Created((entry, file)) => Self::Created(entry.into(), OpenFile(file)),
            wit::Outcome::Items(items) => Self::Items(items.into_iter().map(Into::into).collect()),
            wit::Outcome::Moved(count) => Self::Moved(count),
            wit::Outcome::Position(position) => Self::Position(position),
            wit::Outcome::Statistics(about) => {
                let wit::Statistics { block_size, name_length, blocks, free, available, files, files_free } =
                    about;
                Self::Statistics(FolderStatistics {
                    block_size,
                    name_length,
                    blocks,
                    free,
                    available,
                    files,
                    files_free,
                })
            }
        }
    }
}

impl From<wit::Entry> for FolderEntry {
    fn from(wit::Entry { node, attributes }: wit::Entry) -> Self {
        Self { node: Node(node), attributes: attributes.into() }
    }
}

impl From<wit::Item> for FolderItem {
    fn from(wit::Item { next, inode, kind, name, entry }: wit::Item) -> Self {
        Self { next, inode, kind, name, entry: entry.map(Into::into) }
    }
}

impl From<wit::Attributes> for Attributes {
    fn from(attributes: wit::Attributes) -> Self {
        let wit::Attributes {
            inode,
            size,
            blocks,
            block_size,
            mode,
            links,
            uid,
            gid,
            device,
            accessed,
            modified,
            changed,
        } = attributes;
        let time = |wit::FileTime { seconds, nanoseconds }| FileTime { seconds, nanoseconds };
        Self {
            inode,
            size,
            blocks,
            block_size,
            mode,
            links,
            uid,
            gid,
            device,
            accessed: time(accessed),
            modified: time(modified),
            changed: time(changed),
        }
    }
}
