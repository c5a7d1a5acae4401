//! What is asked of a folder and what that came to, as bytes.

use super::{Reader, WireError, Writer};
use crate::{
    Access, AllocateHow, Attributes, Changes, FileRange, FileTime, FolderAction, FolderEntry, FolderItem,
    FolderOutcome, FolderStatistics, NewFile, NewTime, Node, OpenFile, Place, RenameHow,
};

const RENAMES: [RenameHow; 3] = [RenameHow::Replace, RenameHow::Keep, RenameHow::Exchange];
const ALLOCATES: [AllocateHow; 5] =
    [AllocateHow::Extend, AllocateHow::Keep, AllocateHow::Punch, AllocateHow::Zero, AllocateHow::ZeroKeep];

/// Encodes what is asked of a folder.
#[must_use]
pub fn encode_folder_action(action: &FolderAction) -> Vec<u8> {
    let mut out = Writer::default();
    match action {
        FolderAction::Clear => out.u8(0),
        FolderAction::Forget(nodes) => {
            out.u8(1);
            out.list(nodes, |out, (node, count)| {
                out.u64(node.0);
                out.u64(*count);
            });
        }
        FolderAction::LookUp(place) => {
            out.u8(2);
            out.place(place);
        }
        FolderAction::Attributes { node, file } => {
            out.u8(3);
            out.u64(node.0);
            out.option(file.as_ref(), |out, file| out.u32(file.0));
        }
        FolderAction::Change { node, file, changes } => {
            out.u8(4);
            out.u64(node.0);
            out.option(file.as_ref(), |out, file| out.u32(file.0));
            out.changes(changes);
        }
        FolderAction::ReadLink(node) => {
            out.u8(5);
            out.u64(node.0);
        }
        FolderAction::MakeFile(new) => {
            out.u8(6);
            out.new_file(new);
        }
        FolderAction::MakeFolder(new) => {
            out.u8(7);
            out.new_file(new);
        }
        FolderAction::MakeLink { new, target } => {
            out.u8(8);
            out.new_file(new);
            out.bytes(target);
        }
        FolderAction::Link { node, place } => {
            out.u8(9);
            out.u64(node.0);
            out.place(place);
        }
        FolderAction::Remove(place) => {
            out.u8(10);
            out.place(place);
        }
        FolderAction::RemoveFolder(place) => {
            out.u8(11);
            out.place(place);
        }
        FolderAction::Rename { from, to, how } => {
            out.u8(12);
            out.place(from);
            out.place(to);
            out.number_of(*how, &RENAMES);
        }
        FolderAction::Open { node, access } => {
            out.u8(13);
            out.u64(node.0);
            out.u8(access.to_bits());
        }
        FolderAction::Create { new, access, exclusive } => {
            out.u8(14);
            out.new_file(new);
            out.u8(access.to_bits());
            out.u8((*exclusive).into());
        }
        FolderAction::OpenFolder(node) => {
            out.u8(15);
            out.u64(node.0);
        }
        FolderAction::Names { file, position, room, each, entries } => {
            out.u8(16);
            out.u32(file.0);
            out.u64(*position);
            out.u32(*room);
            out.u32(*each);
            out.u8((*entries).into());
        }
        FolderAction::Read(range) => {
            out.u8(17);
            out.range(range);
        }
        FolderAction::Write(range) => {
            out.u8(18);
            out.range(range);
        }
        FolderAction::Sync { file, data_only } => {
            out.u8(19);
            out.u32(file.0);
            out.u8((*data_only).into());
        }
        FolderAction::Allocate { file, how, position, length } => {
            out.u8(20);
            out.u32(file.0);
            out.number_of(*how, &ALLOCATES);
            out.u64(*position);
            out.u64(*length);
        }
        FolderAction::Seek { file, position, hole } => {
            out.u8(21);
            out.u32(file.0);
            out.u64(*position);
            out.u8((*hole).into());
        }
        FolderAction::Statistics(node) => {
            out.u8(22);
            out.u64(node.0);
        }
        FolderAction::Close(file) => {
            out.u8(23);
            out.u32(file.0);
        }
    }
    out.0
}

/// Decodes what is asked of a folder.
///
/// # Errors
/// The bytes are none.
pub fn decode_folder_action(bytes: &[u8]) -> Result<FolderAction, WireError> {
    Reader::whole("folder action", bytes, |r| {
        Ok(match r.u8()? {
            0 => FolderAction::Clear,
            1 => FolderAction::Forget(r.list(|r| Ok((r.node()?, r.u64()?)))?),
            2 => FolderAction::LookUp(r.place()?),
            3 => FolderAction::Attributes { node: r.node()?, file: r.option(Reader::open_file)? },
            4 => FolderAction::Change {
                node: r.node()?,
                file: r.option(Reader::open_file)?,
                changes: r.changes()?,
            },
            5 => FolderAction::ReadLink(r.node()?),
            6 => FolderAction::MakeFile(r.new_file()?),
            7 => FolderAction::MakeFolder(r.new_file()?),
            8 => FolderAction::MakeLink { new: r.new_file()?, target: r.bytes()?.to_vec() },
            9 => FolderAction::Link { node: r.node()?, place: r.place()? },
            10 => FolderAction::Remove(r.place()?),
            11 => FolderAction::RemoveFolder(r.place()?),
            12 => FolderAction::Rename { from: r.place()?, to: r.place()?, how: r.one_of(&RENAMES)? },
            13 => FolderAction::Open { node: r.node()?, access: Access::from_bits(r.u8()?) },
            14 => FolderAction::Create {
                new: r.new_file()?,
                access: Access::from_bits(r.u8()?),
                exclusive: r.bool()?,
            },
            15 => FolderAction::OpenFolder(r.node()?),
            16 => FolderAction::Names {
                file: r.open_file()?,
                position: r.u64()?,
                room: r.u32()?,
                each: r.u32()?,
                entries: r.bool()?,
            },
            17 => FolderAction::Read(r.range()?),
            18 => FolderAction::Write(r.range()?),
            19 => FolderAction::Sync { file: r.open_file()?, data_only: r.bool()? },
            20 => FolderAction::Allocate {
                file: r.open_file()?,
                how: r.one_of(&ALLOCATES)?,
                position: r.u64()?,
                length: r.u64()?,
            },
            21 => FolderAction::Seek { file: r.open_file()?, position: r.u64()?, hole: r.bool()? },
            22 => FolderAction::Statistics(r.node()?),
            23 => FolderAction::Close(r.open_file()?),
            _ => return Err(r.wrong()),
        })
    })
}

/// Encodes what an action came to.
#[must_use]
pub fn encode_folder_outcome(outcome: &FolderOutcome) -> Vec<u8> {
    let mut out = Writer::default();
    match outcome {
        FolderOutcome::Done => out.u8(0),
        FolderOutcome::Entry(entry) => {
            out.u8(1);
            out.entry(entry);
        }
        FolderOutcome::Attributes(attributes) => {
            out.u8(2);
            out.attributes(attributes);
        }
        FolderOutcome::Target(target) => {
            out.u8(3);
            out.bytes(target);
        }
        FolderOutcome::Opened(file) => {
            out.u8(4);
            out.u32(file.0);
        }
        FolderOutcome::Created(entry, file) => {
            out.u8(5);
            out.entry(entry);
            out.u32(file.0);
        }
        FolderOutcome::Items(items) => {
            out.u8(6);
            out.list(items, |out, FolderItem { next, inode, kind, name, entry }| {
                out.u64(*next);
                out.u64(*inode);
                out.u8(*kind);
                out.bytes(name);
                out.option(entry.as_ref(), Writer::entry);
            });
        }
        FolderOutcome::Moved(count) => {
            out.u8(7);
            out.u32(*count);
        }
        FolderOutcome::Position(position) => {
            out.u8(8);
            out.u64(*position);
        }
        FolderOutcome::Statistics(about) => {
            let FolderStatistics { block_size, name_length, blocks, free, available, files, files_free } =
                about;
            out.u8(9);
            out.u32(*block_size);
            out.u32(*name_length);
            for number in [blocks, free, available, files, files_free] {
                out.u64(*number);
            }
        }
    }
    out.0
}

/// Decodes what an action came to.
///
/// # Errors
/// The bytes are none.
pub fn decode_folder_outcome(bytes: &[u8]) -> Result<FolderOutcome, WireError> {
    Reader::whole("outcome of a folder action", bytes, |r| {
        Ok(match r.u8()? {
            0 => FolderOutcome::Done,
            1 => FolderOutcome::Entry(r.entry()?),
            2 => FolderOutcome::Attributes(r.attributes()?),
            3 => FolderOutcome::Target(r.bytes()?.to_vec()),
            4 => FolderOutcome::Opened(r.open_file()?),
            5 => FolderOutcome::Created(r.entry()?, r.open_file()?),
            6 => FolderOutcome::Items(r.list(|r| {
                Ok(FolderItem {
                    next: r.u64()?,
                    inode: r.u64()?,
                    kind: r.u8()?,
                    name: r.bytes()?.to_vec(),
                    entry: r.option(Reader::entry)?,
                })
            })?),
            7 => FolderOutcome::Moved(r.u32()?),
            8 => FolderOutcome::Position(r.u64()?),
            9 => FolderOutcome::Statistics(FolderStatistics {
                block_size: r.u32()?,
                name_length: r.u32()?,
                blocks: r.u64()?,
                free: r.u64()?,
                available: r.u64()?,
                files: r.u64()?,
                files_free: r.u64()?,
            }),
            _ => return Err(r.wrong()),
        })
    })
}

impl Writer {
    fn number_of<T: PartialEq>(&mut self, value: T, all: &[T]) {
        let number = all.iter().position(|known| *known == value).and_then(|n| u8::try_from(n).ok());
        self.u8(number.unwrap_or(u8::MAX));
    }

    fn place(&mut self, Place { folder, name }: &Place) {
        self.u64(folder.0);
        self.bytes(name);
    }

    fn new_file(&mut self, NewFile { place, mode, uid, gid }: &NewFile) {
        self.place(place);
        for number in [mode, uid, gid] {
            self.u32(*number);
        }
    }

    fn time(&mut self, FileTime { seconds, nanoseconds }: &FileTime) {
        self.u64(seconds.cast_unsigned());
        self.u32(*nanoseconds);
    }

    fn new_time(&mut self, time: &NewTime) {
        let at = match time {
            NewTime::Now => None,
            NewTime::At(time) => Some(time),
        };
        self.option(at, Self::time);
    }

    fn changes(&mut self, Changes { mode, uid, gid, size, accessed, modified }: &Changes) {
        for number in [mode, uid, gid] {
            self.option(number.as_ref(), |out, number| out.u32(*number));
        }
        self.option(size.as_ref(), |out, size| out.u64(*size));
        for time in [accessed, modified] {
            self.option(time.as_ref(), Self::new_time);
        }
    }

    fn range(&mut self, FileRange { file, offset, length, position }: &FileRange) {
        for number in [&file.0, offset, length] {
            self.u32(*number);
        }
        self.u64(*position);
    }

    fn attributes(&mut self, attributes: &Attributes) {
        let Attributes {
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
        for number in [inode, size, blocks] {
            self.u64(*number);
        }
        for number in [block_size, mode, links, uid, gid, device] {
            self.u32(*number);
        }
        for time in [accessed, modified, changed] {
            self.time(time);
        }
    }

    fn entry(&mut self, FolderEntry { node, attributes }: &FolderEntry) {
        self.u64(node.0);
        self.attributes(attributes);
    }
}

impl Reader<'_> {
    fn node(&mut self) -> Result<Node, WireError> {
        self.u64().map(Node)
    }

    fn open_file(&mut self) -> Result<OpenFile, WireError> {
        self.u32().map(OpenFile)
    }

    fn place(&mut self) -> Result<Place, WireError> {
        Ok(Place { folder: self.node()?, name: self.bytes()?.to_vec() })
    }

    fn new_file(&mut self) -> Result<NewFile, WireError> {
        Ok(NewFile { place: self.place()?, mode: self.u32()?, uid: self.u32()?, gid: self.u32()? })
    }

    fn time(&mut self) -> Result<FileTime, WireError> {
        Ok(FileTime { seconds: self.u64()?.cast_signed(), nanoseconds: self.u32()? })
    }

    fn new_time(&mut self) -> Result<NewTime, WireError> {
        Ok(self.option(Self::time)?.map_or(NewTime::Now, NewTime::At))
    }

    fn changes(&mut self) -> Result<Changes, WireError> {
        Ok(Changes {
            mode: self.option(Self::u32)?,
            uid: self.option(Self::u32)?,
            gid: self.option(Self::u32)?,
            size: self.option(Self::u64)?,
            accessed: self.option(Self::new_time)?,
            modified: self.option(Self::new_time)?,
        })
    }

    fn range(&mut self) -> Result<FileRange, WireError> {
        Ok(FileRange {
            file: self.open_file()?,
            offset: self.u32()?,
            length: self.u32()?,
            position: self.u64()?,
        })
    }

    fn attributes(&mut self) -> Result<Attributes, WireError> {
        Ok(Attributes {
            inode: self.u64()?,
            size: self.u64()?,
            blocks: self.u64()?,
            block_size: self.u32()?,
            mode: self.u32()?,
            links: self.u32()?,
            uid: self.u32()?,
            gid: self.u32()?,
            device: self.u32()?,
            accessed: self.time()?,
            modified: self.time()?,
            changed: self.time()?,
        })
    }

    fn entry(&mut self) -> Result<FolderEntry, WireError> {
        Ok(FolderEntry { node: self.node()?, attributes: self.attributes()? })
    }
}
