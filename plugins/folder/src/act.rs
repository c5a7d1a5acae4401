//! What a device asks of its folder, done.
//!
//! Long for the actions of the contract: each is short, and all work on the same nodes and files.

use std::fs::File;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{
    AtFlags, FallocateFlags, FileType, Gid, Mode, OFlags, RawDir, RenameFlags, SeekFrom, Timespec,
    Timestamps, UTIME_NOW, UTIME_OMIT, Uid, chmodat, chownat, fallocate, fchmod, fdatasync, fstatvfs, fsync,
    ftruncate, linkat, mkdirat, openat, openat2, readlinkat, renameat_with, seek, symlinkat, unlinkat,
    utimensat,
};
use tenon_abi::{
    Access, AllocateHow, Attributes, Changes, Errno, FileTime, FolderAction, FolderEntry, FolderItem,
    FolderOutcome, FolderStatistics, NewFile, NewTime, Node, OpenFile, Place, RenameHow,
};

use crate::files::{Files, MOST_FILES, Opened, Purpose};
use crate::nodes::{Identity, MOST_HELD, Nodes, attributes, attributes_of, errno};
use crate::{BENEATH, Root, about, about_name, hold, reopen};

/// The longest name in bytes.
const LONGEST_NAME: usize = 255;
/// The longest target of a link in bytes.
const LONGEST_TARGET: usize = 4095;
/// The most room of one list in bytes.
const MOST_ROOM: u32 = 128 << 10;
/// The least that a name takes in a list.
const LEAST_EACH: u32 = 24;
/// What a name of up to 12 bytes takes in a list of the host's (`linux_dirent64`).
const HOST_EACH: u32 = 32;
/// Room for the longest name in one.
const LEAST_BUFFER: u32 = 512;
/// How often making or opening a file is tried again, when others make and remove it.
const ATTEMPTS: usize = 16;
const PERMISSIONS: u32 = 0o7777;
/// The bits by which a program runs as its owner or group.
const RUN_AS_OWNER: u32 = 0o6000;
/// New files in a folder with this bit have its group.
const SET_GROUP: u32 = 0o2000;

/// A device's view of a shared folder: nodes and open files of its own.
#[derive(Debug)]
pub struct Folder {
    root: Arc<Root>,
    nodes: Nodes,
    files: Files,
    /// What the device makes is given to whom it says.
    gives_away: bool,
}

type Done<T> = Result<T, Errno>;

impl Folder {
    /// Nothing is known or open yet.
    ///
    /// # Errors
    /// This process has too many files open.
    pub fn new(root: &Arc<Root>) -> std::io::Result<Self> {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let limit = limit.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX)) / 8;
        Ok(Self {
            nodes: Nodes::new(root.folder.try_clone()?, MOST_HELD.min(limit)),
            root: root.clone(),
            files: Files::new(MOST_FILES.min(limit)),
            gives_away: rustix::process::geteuid().is_root(),
        })
    }

    /// Lets all nodes and open files go.
    pub fn clear(&mut self) {
        self.nodes.clear();
        self.files.clear();
    }

    /// How many nodes the device knows besides the folder itself, how many of them have a descriptor, and how many files are open.
    #[must_use]
    pub fn counts(&self) -> (usize, usize, usize) {
        let (known, held) = self.nodes.counts();
        (known, held, self.files.count())
    }

    /// How many nodes have a descriptor at most, and how many files are open at most: [`MOST_HELD`] and [`MOST_FILES`], or an eighth of what this process could open when this was made.
    #[must_use]
    pub fn limits(&self) -> (usize, usize) {
        (self.nodes.most_held(), self.files.most())
    }

    /// The descriptor by which data of an open file is read, or written to `position` and `length` bytes on. A file that is to be written loses the bits by which it runs as its owner or
    /// group, so this is asked for each time.
    ///
    /// # Errors
    /// It is not open for that, the file would become too long, or those bits cannot be taken (`EPERM`).
    pub fn file(&self, file: OpenFile, write: Option<(u64, u64)>) -> Result<BorrowedFd<'_>, Errno> {
        let Opened { file, purpose: Purpose::Data(access) } = self.files.get(file)? else {
            return Err(Errno::ISDIR);
        };
        match write {
            Some((position, length)) if access.write => {
                let is = attributes_of(file)?;
                let position = if access.append { is.size } else { position };
                self.check_length(position, length)?;
                self.take_owner_bits(file, &is)?;
            }
            None if access.read => {}
            _ => return Err(Errno::BADF),
        }
        Ok(file.as_fd())
    }

    /// Does what is asked, unless it moves data.
    ///
    /// # Errors
    /// What the host's file system says; `EROFS` for every change in a folder that is shared read-only; `EINVAL` for what moves data.
    pub fn act(&mut self, action: &FolderAction) -> Result<FolderOutcome, Errno> {
        use FolderAction as A;
        if self.root.read_only && changes(action) {
            return Err(Errno::ROFS);
        }
        let done = |()| FolderOutcome::Done;
        match action {
            A::Clear => {
                self.clear();
                Ok(FolderOutcome::Done)
            }
            A::Forget(nodes) => {
                for (node, count) in nodes {
                    self.nodes.forget(*node, *count);
                }
                Ok(FolderOutcome::Done)
            }
            A::LookUp(place) => self.look_up(place).map(FolderOutcome::Entry),
            A::Attributes { node, file } => self.attributes(*node, *file).map(FolderOutcome::Attributes),
            A::Change { node, file, changes } => {
                self.change(*node, *file, changes)?;
                self.attributes(*node, *file).map(FolderOutcome::Attributes)
            }
            A::ReadLink(node) => self.read_link(*node).map(FolderOutcome::Target),
            A::MakeFile(new) => {
                self.make_file(new, OFlags::WRONLY).map(|(entry, _)| FolderOutcome::Entry(entry))
            }
            A::MakeFolder(new) => self.make_folder(new).map(FolderOutcome::Entry),
            A::MakeLink { new, target } => self.make_link(new, target).map(FolderOutcome::Entry),
            A::Link { node, place } => self.link(*node, place).map(FolderOutcome::Entry),
            A::Remove(place) => self.remove(place, AtFlags::empty()).map(done),
            A::RemoveFolder(place) => self.remove(place, AtFlags::REMOVEDIR).map(done),
            A::Rename { from, to, how } => self.rename(from, to, *how).map(done),
            A::Open { node, access } => self.open(*node, *access).map(FolderOutcome::Opened),
            A::Create { new, access, exclusive } => {
                self.create(new, *access, *exclusive).map(|(entry, file)| FolderOutcome::Created(entry, file))
            }
            A::OpenFolder(node) => self.open_folder(*node).map(FolderOutcome::Opened),
            A::Names { file, position, room, each, entries } => {
                self.list(*file, *position, (*room).min(MOST_ROOM), *each, *entries).map(FolderOutcome::Items)
            }
            A::Read(_) | A::Write(_) => Err(Errno::INVAL),
            A::Sync { file, data_only } => {
                let file = &self.files.get(*file)?.file;
                if *data_only { fdatasync(file) } else { fsync(file) }.map(done).map_err(errno)
            }
            A::Allocate { file, how, position, length } => {
                self.allocate(*file, *how, *position, *length).map(done)
            }
            A::Seek { file, position, hole } => {
                let Opened { file, purpose: Purpose::Data(_) } = self.files.get(*file)? else {
                    return Err(Errno::ISDIR);
                };
                let from = if *hole { SeekFrom::Hole(*position) } else { SeekFrom::Data(*position) };
                seek(file, from).map(FolderOutcome::Position).map_err(errno)
            }
            A::Statistics(node) => self.statistics(*node).map(FolderOutcome::Statistics),
            A::Close(file) => self.files.close(*file).map(done),
        }
    }

    /// The folder and the name of a place.
    fn place<'p>(&mut self, place: &'p Place) -> Done<(Arc<OwnedFd>, &'p [u8])> {
        let name = place.name.as_slice();
        if name.len() > LONGEST_NAME {
            return Err(Errno::NAMETOOLONG);
        }
        if matches!(name, b"" | b"." | b"..") || name.iter().any(|byte| matches!(byte, b'/' | 0)) {
            return Err(Errno::INVAL);
        }
        if self.nodes.kind(place.folder)? != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        Ok((self.nodes.fd(place.folder)?, name))
    }

    fn look_up(&mut self, place: &Place) -> Done<FolderEntry> {
        let (folder, name) = self.place(place)?;
        self.found(hold(folder, name).map_err(errno)?, place)
    }

    /// The device is told of what was found.
    fn found(&mut self, fd: OwnedFd, place: &Place) -> Done<FolderEntry> {
        let about = about(&fd).map_err(errno)?;
        let node = self.nodes.tell(fd, &about, place.folder, &place.name)?;
        Ok(FolderEntry { node, attributes: attributes(&about) })
    }

    fn attributes(&mut self, node: Node, file: Option<OpenFile>) -> Done<Attributes> {
        match file {
            Some(file) => attributes_of(&self.files.get(file)?.file),
            None => attributes_of(&*self.nodes.fd(node)?),
        }
    }

    /// The name below `/proc/self/fd` of what a descriptor stands for.
    fn name_of(fd: impl AsFd) -> String {
        fd.as_fd().as_raw_fd().to_string()
    }

    fn change(&mut self, node: Node, file: Option<OpenFile>, changes: &Changes) -> Done<()> {
        let fd = self.nodes.fd(node)?;
        let kind = self.nodes.kind(node)?;
        // What is no owner and no time is refused before anything changes.
        let (uid, gid) = (changes.uid.map(uid).transpose()?, changes.gid.map(gid).transpose()?);
        let times = Timestamps {
            last_access: timespec(changes.accessed)?,
            last_modification: timespec(changes.modified)?,
        };
        if let Some(mode) = changes.mode {
            match kind {
                FileType::Symlink => return Err(Errno::OPNOTSUPP),
                FileType::Directory => {}
                _ => check_mode(mode)?,
            }
            self.set_mode(&*fd, mode)?;
        }
        if uid.is_some() || gid.is_some() {
            chownat(&*fd, "", uid, gid, AtFlags::EMPTY_PATH).map_err(errno)?;
        }
        if let Some(size) = changes.size {
            self.check_length(0, size)?;
            match (file, kind) {
                (_, FileType::Directory) => return Err(Errno::ISDIR),
                (Some(file), FileType::RegularFile) => {
                    ftruncate(self.file(file, Some((0, 0)))?, size).map_err(errno)?;
                }
                (None, FileType::RegularFile) => {
                    let file = reopen(&self.root, &fd, OFlags::WRONLY).map_err(errno)?;
                    self.take_owner_bits(&file, &attributes_of(&file)?)?;
                    ftruncate(file, size).map_err(errno)?;
                }
                _ => return Err(Errno::INVAL),
            }
        }
        if changes.accessed.is_some() || changes.modified.is_some() {
            utimensat(&*fd, "", &times, AtFlags::EMPTY_PATH).map_err(errno)?;
        }
        Ok(())
    }

    /// Sets the permission bits of what is no link.
    fn set_mode(&self, fd: impl AsFd, mode: u32) -> Done<()> {
        let mode = Mode::from_raw_mode(mode & PERMISSIONS);
        chmodat(&self.root.descriptors, Self::name_of(fd), mode, AtFlags::empty()).map_err(errno)
    }

    /// Takes from a file that the guest is about to change the bits by which it runs as its owner or group. Linux does so by itself, but not where this process is root.
    fn take_owner_bits(&self, fd: impl AsFd, is: &Attributes) -> Done<()> {
        if is.mode & RUN_AS_OWNER == 0 { Ok(()) } else { self.set_mode(fd, is.mode & !RUN_AS_OWNER) }
    }

    fn read_link(&mut self, node: Node) -> Done<Vec<u8>> {
        if self.nodes.kind(node)? != FileType::Symlink {
            return Err(Errno::INVAL);
        }
        Ok(readlinkat(&*self.nodes.fd(node)?, "", Vec::new()).map_err(errno)?.into_bytes())
    }

    /// Makes a regular file that was not there, opened; and the device is told of it.
    fn make_file(&mut self, new: &NewFile, access: OFlags) -> Done<(FolderEntry, File)> {
        check_mode(new.mode)?;
        let owner = owner(new)?;
        let (folder, name) = self.place(&new.place)?;
        let flags =
            access | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NOCTTY;
        let mode = Mode::from_raw_mode(new.mode & PERMISSIONS);
        let file: File = openat2(&*folder, name, flags, mode, BENEATH).map_err(errno)?.into();
        let made = about(&file).map(|about| Identity::of(&about));
        let entry = self.settle_file(&file, &folder, owner, new);
        Ok((unless_failed(entry, made, &folder, name, AtFlags::empty())?, file))
    }

    /// Gives a file that was just made its owner and mode, and tells the device of it.
    fn settle_file(
        &mut self,
        file: &File,
        folder: &OwnedFd,
        owner: (Uid, Gid),
        new: &NewFile,
    ) -> Done<FolderEntry> {
        self.give(file, folder, owner)?;
        // This process's mask has nothing to say: the guest's had.
        if attributes_of(file)?.mode & PERMISSIONS != new.mode & PERMISSIONS {
            fchmod(file, Mode::from_raw_mode(new.mode & PERMISSIONS)).map_err(errno)?;
        }
        // By the descriptor, since the name may be another file's by now.
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let fd = openat(&self.root.descriptors, Self::name_of(file), flags, Mode::empty()).map_err(errno)?;
        self.found(fd, &new.place)
    }

    /// Gives something new to its owner, as far as this process may.
    fn give(&self, fd: impl AsFd, folder: impl AsFd, (uid, gid): (Uid, Gid)) -> Done<()> {
        if !self.gives_away {
            return Ok(());
        }
        let is = attributes_of(&fd)?;
        // The group is the folder's where that says so.
        let inherits = attributes_of(folder)?.mode & SET_GROUP != 0;
        let gid = if inherits { Gid::from_raw(is.gid) } else { gid };
        if (is.uid, is.gid) != (uid.as_raw(), gid.as_raw()) {
            // As root of a user namespace this process may not give to all.
            let _ = chownat(fd, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH);
        }
        Ok(())
    }

    fn make_folder(&mut self, new: &NewFile) -> Done<FolderEntry> {
        let owner = owner(new)?;
        let (folder, name) = self.place(&new.place)?;
        let mode = new.mode & PERMISSIONS;
        mkdirat(&*folder, name, Mode::from_raw_mode(mode)).map_err(errno)?;
        let made = identity_at(&folder, name);
        let entry = self.settle_folder(&folder, owner, new);
        unless_failed(entry, made, &folder, name, AtFlags::REMOVEDIR)
    }

    fn settle_folder(&mut self, folder: &OwnedFd, owner: (Uid, Gid), new: &NewFile) -> Done<FolderEntry> {
        let fd = hold(folder, &new.place.name).map_err(errno)?;
        let (made, mode) = (attributes_of(&fd)?, new.mode & PERMISSIONS);
        if FileType::from_raw_mode(made.mode) == FileType::Directory {
            self.give(&fd, folder, owner)?;
            // The group bit comes from the folder above.
            if made.mode & PERMISSIONS & !SET_GROUP != mode & !SET_GROUP {
                self.set_mode(&fd, mode | made.mode & SET_GROUP)?;
            }
        }
        self.found(fd, &new.place)
    }

    fn make_link(&mut self, new: &NewFile, target: &[u8]) -> Done<FolderEntry> {
        if target.is_empty() || target.contains(&0) {
            return Err(Errno::INVAL);
        }
        if target.len() > LONGEST_TARGET {
            return Err(Errno::NAMETOOLONG);
        }
        let owner = owner(new)?;
        let (folder, name) = self.place(&new.place)?;
        symlinkat(target, &*folder, name).map_err(errno)?;
        let made = identity_at(&folder, name);
        let entry = self.settle_link(&folder, owner, &new.place);
        unless_failed(entry, made, &folder, name, AtFlags::empty())
    }

    fn settle_link(&mut self, folder: &OwnedFd, owner: (Uid, Gid), place: &Place) -> Done<FolderEntry> {
        let fd = hold(folder, &place.name).map_err(errno)?;
        if FileType::from_raw_mode(attributes_of(&fd)?.mode) == FileType::Symlink {
            self.give(&fd, folder, owner)?;
        }
        self.found(fd, place)
    }

    fn link(&mut self, node: Node, place: &Place) -> Done<FolderEntry> {
        if self.nodes.kind(node)? == FileType::Directory {
            return Err(Errno::PERM);
        }
        let fd = self.nodes.fd(node)?;
        let (folder, name) = self.place(place)?;
        // Without the right to link any descriptor, its name in procfs is followed: to the file itself, not further.
        let from = Self::name_of(&*fd);
        linkat(&self.root.descriptors, from, &*folder, name, AtFlags::SYMLINK_FOLLOW).map_err(errno)?;
        let made = about(&*fd).map(|about| Identity::of(&about));
        let entry = self.look_up(place);
        unless_failed(entry, made, &folder, name, AtFlags::empty())
    }

    /// The node at a place, if the device knows it; it then has a descriptor.
    fn known_at(&mut self, folder: &OwnedFd, name: &[u8]) -> Option<Node> {
        let found = hold(folder, name).ok()?;
        let node = self.nodes.of(&about(&found).ok()?)?;
        let _ = self.nodes.fd(node);
        Some(node)
    }

    fn remove(&mut self, place: &Place, flags: AtFlags) -> Done<()> {
        let (folder, name) = self.place(place)?;
        let node = self.known_at(&folder, name);
        unlinkat(&*folder, name, flags).map_err(errno)?;
        if let Some(node) = node {
            self.nodes.unnamed(node, place.folder, name);
        }
        Ok(())
    }

    fn rename(&mut self, from: &Place, to: &Place, how: RenameHow) -> Done<()> {
        let (old_folder, old_name) = self.place(from)?;
        let (new_folder, new_name) = self.place(to)?;
        let moved = self.known_at(&old_folder, old_name);
        let other = self.known_at(&new_folder, new_name);
        let flags = match how {
            RenameHow::Replace => RenameFlags::empty(),
            RenameHow::Keep => RenameFlags::NOREPLACE,
            RenameHow::Exchange => RenameFlags::EXCHANGE,
        };
        renameat_with(&*old_folder, old_name, &*new_folder, new_name, flags).map_err(errno)?;
        // Two names of one file: nothing happened.
        if moved.is_some() && moved == other {
            return Ok(());
        }
        if let Some(other) = other {
            match how {
                RenameHow::Exchange => self.nodes.moved(other, from.folder, old_name),
                _ => self.nodes.unnamed(other, to.folder, new_name),
            }
        }
        if let Some(moved) = moved {
            self.nodes.moved(moved, to.folder, new_name);
        }
        Ok(())
    }

    fn open(&mut self, node: Node, access: Access) -> Done<OpenFile> {
        self.files.check_room()?;
        let fd = self.nodes.fd(node)?;
        match self.nodes.kind(node)? {
            FileType::RegularFile => {}
            FileType::Directory => return Err(Errno::ISDIR),
            // A FIFO, a socket or a device of the host is not the guest's to touch.
            _ => return Err(Errno::OPNOTSUPP),
        }
        let mut flags = flags(access)?;
        if access.truncate {
            flags |= OFlags::TRUNC;
            self.take_owner_bits(&*fd, &attributes_of(&*fd)?)?;
        }
        let file = reopen(&self.root, &fd, flags).map_err(errno)?;
        Ok(self.files.add(Opened { file, purpose: Purpose::Data(access) }))
    }

    fn create(&mut self, new: &NewFile, access: Access, exclusive: bool) -> Done<(FolderEntry, OpenFile)> {
        self.files.check_room()?;
        let flags = flags(access)?;
        for _ in 0..ATTEMPTS {
            // Never anything but a new file: what is there may be a FIFO.
            match self.make_file(new, flags) {
                Ok((entry, file)) => {
                    return Ok((entry, self.files.add(Opened { file, purpose: Purpose::Data(access) })));
                }
                Err(Errno::EXIST) if !exclusive => {}
                Err(error) => return Err(error),
            }
            let entry = match self.look_up(&new.place) {
                // Removed in between.
                Err(Errno::NOENT) => continue,
                entry => entry?,
            };
            let opened = self.open(entry.node, access);
            if opened.is_err() {
                self.nodes.forget(entry.node, 1);
            }
            let attributes = self.attributes(entry.node, opened.as_ref().ok().copied());
            return Ok((
                FolderEntry { attributes: attributes.unwrap_or(entry.attributes), ..entry },
                opened?,
            ));
        }
        Err(Errno::EXIST)
    }

    fn open_folder(&mut self, node: Node) -> Done<OpenFile> {
        self.files.check_room()?;
        if self.nodes.kind(node)? != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let file = openat(&*self.nodes.fd(node)?, ".", flags, Mode::empty()).map_err(errno)?.into();
        Ok(self.files.add(Opened { file, purpose: Purpose::List(node) }))
    }

    /// The names from `position` on that fit into `room` bytes, if each takes `each` bytes and its own length, in multiples of 8.
    fn list(
        &mut self,
        file: OpenFile,
        position: u64,
        room: u32,
        each: u32,
        entries: bool,
    ) -> Done<Vec<FolderItem>> {
        let Opened { file, purpose: Purpose::List(node) } = self.files.get(file)? else {
            return Err(Errno::NOTDIR);
        };
        seek(file, SeekFrom::Start(position)).map_err(errno)?;
        let own = attributes_of(file)?.inode;
        let (mut items, mut left, each) = (Vec::new(), room, each.max(LEAST_EACH));
        // As many names as there is room for, if they are of usual length. Others are asked for in several calls, or are read in vain.
        let size = (room / each * HOST_EACH).min(room).max(LEAST_BUFFER);
        let mut names = vec![MaybeUninit::uninit(); size as usize];
        let mut all = RawDir::new(file, &mut names);
        while let Some(item) = all.next() {
            let item = match item {
                Ok(item) => item,
                // The device must hear of the nodes that it was told of. Going on from there brings the error again.
                Err(_) if !items.is_empty() => break,
                Err(error) => return Err(errno(error)),
            };
            let name = item.file_name().to_bytes();
            let length = u32::try_from(name.len()).unwrap_or(u32::MAX);
            let takes = each.saturating_add(length).checked_next_multiple_of(8);
            let Some(rest) = takes.and_then(|takes| left.checked_sub(takes)) else { break };
            left = rest;
            // Above the shared folder there is nothing.
            let above = *node == Node::ROOT && name == b"..";
            let inode = if above { own } else { item.ino() };
            let found = if entries && !matches!(name, b"." | b"..") {
                // What cannot be told of, such as a mount point, is listed all the same.
                hold(file, name).ok().and_then(|fd| {
                    let about = about(&fd).ok()?;
                    let node = self.nodes.tell(fd, &about, *node, name).ok()?;
                    Some(FolderEntry { node, attributes: attributes(&about) })
                })
            } else {
                None
            };
            items.push(FolderItem {
                next: item.next_entry_cookie(),
                inode,
                // The highest four bits of sixteen.
                kind: u8::try_from(item.file_type().as_raw_mode() >> 12 & 15).unwrap_or(0),
                name: name.to_vec(),
                entry: found,
            });
        }
        Ok(items)
    }

    fn allocate(&mut self, file: OpenFile, how: AllocateHow, position: u64, length: u64) -> Done<()> {
        let file = self.file(file, Some((0, 0)))?;
        if matches!(how, AllocateHow::Extend | AllocateHow::Zero) {
            self.check_length(position, length)?;
        }
        let flags = match how {
            AllocateHow::Extend => FallocateFlags::empty(),
            AllocateHow::Keep => FallocateFlags::KEEP_SIZE,
            AllocateHow::Punch => FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            AllocateHow::Zero => FallocateFlags::ZERO_RANGE,
            AllocateHow::ZeroKeep => FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
        };
        fallocate(file, flags, position, length).map_err(errno)
    }

    fn statistics(&mut self, node: Node) -> Done<FolderStatistics> {
        let about = fstatvfs(&*self.nodes.fd(node)?).map_err(errno)?;
        let number = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
        Ok(FolderStatistics {
            block_size: number(about.f_frsize),
            name_length: number(about.f_namemax),
            blocks: about.f_blocks,
            free: about.f_bfree,
            available: about.f_bavail,
            files: about.f_files,
            files_free: about.f_ffree,
        })
    }

    /// Longer files would end this process by a signal, or cannot be.
    fn check_length(&self, position: u64, length: u64) -> Done<()> {
        let most = self.root.longest.min(i64::MAX.cast_unsigned());
        match position.checked_add(length) {
            Some(end) if end <= most => Ok(()),
            _ => Err(Errno::FBIG),
        }
    }
}

/// Whether an action changes something on the host.
fn changes(action: &FolderAction) -> bool {
    use FolderAction as A;
    match action {
        A::Change { .. }
        | A::MakeFile(_)
        | A::MakeFolder(_)
        | A::MakeLink { .. }
        | A::Link { .. }
        | A::Remove(_)
        | A::RemoveFolder(_)
        | A::Rename { .. }
        | A::Create { .. }
        | A::Write(_)
        | A::Allocate { .. } => true,
        A::Open { access, .. } => access.write || access.append || access.truncate,
        A::Clear
        | A::Forget(_)
        | A::LookUp(_)
        | A::Attributes { .. }
        | A::ReadLink(_)
        | A::OpenFolder(_)
        | A::Names { .. }
        | A::Read(_)
        | A::Sync { .. }
        | A::Seek { .. }
        | A::Statistics(_)
        | A::Close(_) => false,
    }
}

fn flags(access: Access) -> Done<OFlags> {
    let Access { read, write, append, truncate: _, sync } = access;
    let mut flags = match (read, write) {
        (true, true) => OFlags::RDWR,
        (true, false) => OFlags::RDONLY,
        (false, true) => OFlags::WRONLY,
        _ => return Err(Errno::INVAL),
    };
    if append {
        flags |= OFlags::APPEND;
    }
    if sync {
        flags |= OFlags::SYNC;
    }
    Ok(flags)
}

/// A file of the guest's must not run as this process's user.
fn check_mode(mode: u32) -> Done<()> {
    if mode & RUN_AS_OWNER == 0 { Ok(()) } else { Err(Errno::PERM) }
}

/// To whom something new belongs.
fn owner(new: &NewFile) -> Done<(Uid, Gid)> {
    Ok((uid(new.uid)?, gid(new.gid)?))
}

/// What a name in a folder stands for now.
fn identity_at(folder: &OwnedFd, name: &[u8]) -> rustix::io::Result<Identity> {
    about_name(folder, name).map(|about| Identity::of(&about))
}

/// What came of telling the device of something that was made: where that failed, it is removed again, unless its name is another file's by now.
fn unless_failed(
    told: Done<FolderEntry>,
    made: rustix::io::Result<Identity>,
    folder: &OwnedFd,
    name: &[u8],
    flags: AtFlags,
) -> Done<FolderEntry> {
    if told.is_err() && made.is_ok_and(|made| identity_at(folder, name) == Ok(made)) {
        let _ = unlinkat(folder, name, flags);
    }
    told
}

/// A user's number; -1 is none.
fn uid(number: u32) -> Done<Uid> {
    if number == u32::MAX { Err(Errno::INVAL) } else { Ok(Uid::from_raw(number)) }
}

/// A group's number; -1 is none.
fn gid(number: u32) -> Done<Gid> {
    if number == u32::MAX { Err(Errno::INVAL) } else { Ok(Gid::from_raw(number)) }
}

fn timespec(time: Option<NewTime>) -> Done<Timespec> {
    Ok(match time {
        None => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        Some(NewTime::Now) => Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
        Some(NewTime::At(FileTime { nanoseconds: 1_000_000_000.., .. })) => return Err(Errno::INVAL),
        Some(NewTime::At(FileTime { seconds, nanoseconds })) => {
            Timespec { tv_sec: seconds, tv_nsec: nanoseconds.into() }
        }
    })
}
