//! The handle of a folder of the host.

use super::{
    Access, AllocateHow, Attributes, Changes, Errno, FileRange, FolderAction, FolderEntry, FolderItem,
    FolderOutcome, FolderStatistics, Handle, NewFile, Node, OpenFile, Place, RenameHow, sys,
};

/// A folder of the host that an administrator shares. Nothing outside of it can be reached, and what is shared read-only is refused by the host (`EROFS`).
///
/// Files are [`Node`]s and single names below them. Everything is done on behalf of a request that the device holds, at most 16 times for one, and has been done when the call returns. A new instance that asks for
/// the same again for the same request is given the same answer, and nothing is done twice; nodes and open files stay what they were. They end when the driver resets the device.
pub struct Folder(pub(super) sys::Folder);

type Outcome<T> = std::result::Result<T, Errno>;

impl Folder {
    /// Does what is asked.
    ///
    /// # Errors
    /// What the host's file system says, as for every function here.
    pub fn act(&self, request: Handle, action: FolderAction) -> Outcome<FolderOutcome> {
        self.0.act(request, action)
    }

    fn done(&self, request: Handle, action: FolderAction) -> Outcome<()> {
        self.act(request, action).map(drop)
    }

    fn entry(&self, request: Handle, action: FolderAction) -> Outcome<FolderEntry> {
        match self.act(request, action)? {
            FolderOutcome::Entry(entry) => Ok(entry),
            _ => Err(Errno::IO),
        }
    }

    fn opened(&self, request: Handle, action: FolderAction) -> Outcome<OpenFile> {
        match self.act(request, action)? {
            FolderOutcome::Opened(file) => Ok(file),
            _ => Err(Errno::IO),
        }
    }

    fn moved(&self, request: Handle, action: FolderAction) -> Outcome<u32> {
        match self.act(request, action)? {
            FolderOutcome::Moved(count) => Ok(count),
            _ => Err(Errno::IO),
        }
    }

    fn told(&self, request: Handle, action: FolderAction) -> Outcome<Attributes> {
        match self.act(request, action)? {
            FolderOutcome::Attributes(attributes) => Ok(attributes),
            _ => Err(Errno::IO),
        }
    }

    /// Lets all nodes and open files go.
    ///
    /// # Errors
    /// None is expected.
    pub fn clear(&self, request: Handle) -> Outcome<()> {
        self.done(request, FolderAction::Clear)
    }

    /// Takes so much from the count of each node.
    ///
    /// # Errors
    /// None is expected.
    pub fn forget(&self, request: Handle, nodes: Vec<(Node, u64)>) -> Outcome<()> {
        self.done(request, FolderAction::Forget(nodes))
    }

    /// The node of a name. Its count grows, as it does with every entry.
    ///
    /// # Errors
    /// There is none.
    pub fn look_up(&self, request: Handle, place: Place) -> Outcome<FolderEntry> {
        self.entry(request, FolderAction::LookUp(place))
    }

    /// What a node is.
    ///
    /// # Errors
    /// It cannot be told.
    pub fn attributes(&self, request: Handle, node: Node, file: Option<OpenFile>) -> Outcome<Attributes> {
        self.told(request, FolderAction::Attributes { node, file })
    }

    /// Changes what a node is.
    ///
    /// # Errors
    /// Something cannot be changed; what comes before it has been.
    pub fn change(
        &self,
        request: Handle,
        node: Node,
        file: Option<OpenFile>,
        changes: Changes,
    ) -> Outcome<Attributes> {
        self.told(request, FolderAction::Change { node, file, changes })
    }

    /// The target of a symbolic link.
    ///
    /// # Errors
    /// It is none.
    pub fn read_link(&self, request: Handle, node: Node) -> Outcome<Vec<u8>> {
        match self.act(request, FolderAction::ReadLink(node))? {
            FolderOutcome::Target(target) => Ok(target),
            _ => Err(Errno::IO),
        }
    }

    /// Makes a regular file.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn make_file(&self, request: Handle, new: NewFile) -> Outcome<FolderEntry> {
        self.entry(request, FolderAction::MakeFile(new))
    }

    /// Makes a folder.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn make_folder(&self, request: Handle, new: NewFile) -> Outcome<FolderEntry> {
        self.entry(request, FolderAction::MakeFolder(new))
    }

    /// Makes a symbolic link.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn make_link(&self, request: Handle, new: NewFile, target: Vec<u8>) -> Outcome<FolderEntry> {
        self.entry(request, FolderAction::MakeLink { new, target })
    }

    /// Gives a node another name.
    ///
    /// # Errors
    /// It cannot have it.
    pub fn link(&self, request: Handle, node: Node, place: Place) -> Outcome<FolderEntry> {
        self.entry(request, FolderAction::Link { node, place })
    }

    /// Takes a name away that is no folder's.
    ///
    /// # Errors
    /// It stays.
    pub fn remove(&self, request: Handle, place: Place) -> Outcome<()> {
        self.done(request, FolderAction::Remove(place))
    }

    /// Takes an empty folder away.
    ///
    /// # Errors
    /// It stays.
    pub fn remove_folder(&self, request: Handle, place: Place) -> Outcome<()> {
        self.done(request, FolderAction::RemoveFolder(place))
    }

    /// Gives what a name means another name.
    ///
    /// # Errors
    /// Both names stay.
    pub fn rename(&self, request: Handle, from: Place, to: Place, how: RenameHow) -> Outcome<()> {
        self.done(request, FolderAction::Rename { from, to, how })
    }

    /// Opens a regular file.
    ///
    /// # Errors
    /// It cannot be opened, or is none.
    pub fn open(&self, request: Handle, node: Node, access: Access) -> Outcome<OpenFile> {
        self.opened(request, FolderAction::Open { node, access })
    }

    /// Opens a regular file, which is made if it is not there.
    ///
    /// # Errors
    /// It can be neither made nor opened, or was to be new.
    pub fn create(
        &self,
        request: Handle,
        new: NewFile,
        access: Access,
        exclusive: bool,
    ) -> Outcome<(FolderEntry, OpenFile)> {
        match self.act(request, FolderAction::Create { new, access, exclusive })? {
            FolderOutcome::Created(entry, file) => Ok((entry, file)),
            _ => Err(Errno::IO),
        }
    }

    /// Opens a folder.
    ///
    /// # Errors
    /// It cannot be opened, or is none.
    pub fn open_folder(&self, request: Handle, node: Node) -> Outcome<OpenFile> {
        self.opened(request, FolderAction::OpenFolder(node))
    }

    /// The next names of an open folder: as many as fit into `room` bytes (at most 128 KiB), if a name takes `each` bytes (at least 24) and its own length, rounded up to a multiple of 8. With `entries`, each is
    /// looked up.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn names(
        &self,
        request: Handle,
        file: OpenFile,
        position: u64,
        (room, each): (u32, u32),
        entries: bool,
    ) -> Outcome<Vec<FolderItem>> {
        match self.act(request, FolderAction::Names { file, position, room, each, entries })? {
            FolderOutcome::Items(items) => Ok(items),
            _ => Err(Errno::IO),
        }
    }

    /// Reads into the request's writable part; how many bytes.
    ///
    /// # Errors
    /// Nothing could be read.
    pub fn read(&self, request: Handle, range: FileRange) -> Outcome<u32> {
        self.moved(request, FolderAction::Read(range))
    }

    /// Writes from the request's readable part; how many bytes.
    ///
    /// # Errors
    /// Nothing could be written.
    pub fn write(&self, request: Handle, range: FileRange) -> Outcome<u32> {
        self.moved(request, FolderAction::Write(range))
    }

    /// Makes durable what was written.
    ///
    /// # Errors
    /// It may not be.
    pub fn sync(&self, request: Handle, file: OpenFile, data_only: bool) -> Outcome<()> {
        self.done(request, FolderAction::Sync { file, data_only })
    }

    /// Does something with a range of a file.
    ///
    /// # Errors
    /// The file system cannot.
    pub fn allocate(
        &self,
        request: Handle,
        file: OpenFile,
        how: AllocateHow,
        position: u64,
        length: u64,
    ) -> Outcome<()> {
        self.done(request, FolderAction::Allocate { file, how, position, length })
    }

    /// The next data, or hole, from a position on.
    ///
    /// # Errors
    /// There is none (`ENXIO`).
    pub fn seek(&self, request: Handle, file: OpenFile, position: u64, hole: bool) -> Outcome<u64> {
        match self.act(request, FolderAction::Seek { file, position, hole })? {
            FolderOutcome::Position(position) => Ok(position),
            _ => Err(Errno::IO),
        }
    }

    /// What the file system is.
    ///
    /// # Errors
    /// It cannot be told.
    pub fn statistics(&self, request: Handle, node: Node) -> Outcome<FolderStatistics> {
        match self.act(request, FolderAction::Statistics(node))? {
            FolderOutcome::Statistics(statistics) => Ok(statistics),
            _ => Err(Errno::IO),
        }
    }

    /// Closes a file or folder.
    ///
    /// # Errors
    /// It is not open.
    pub fn close(&self, request: Handle, file: OpenFile) -> Outcome<()> {
        self.done(request, FolderAction::Close(file))
    }
}
