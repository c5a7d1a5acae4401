//! Folders of the host that a virtio device works in: what it asks for, and what it is told.
//!
//! The words are those of the WIT interface `folders`, where each is explained; here are the shapes.

use std::fmt;

/// Why something could not be done: a number of Linux (errno(3)).
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Errno(pub u32);

impl Errno {
    /// Operation not permitted (`EPERM`).
    pub const PERM: Self = Self(1);
    /// There is no such file (`ENOENT`).
    pub const NOENT: Self = Self(2);
    /// Something failed that has no other number (`EIO`).
    pub const IO: Self = Self(5);
    /// There is no such open file, or it was not opened for this (`EBADF`).
    pub const BADF: Self = Self(9);
    /// The name is taken (`EEXIST`).
    pub const EXIST: Self = Self(17);
    /// It is no folder (`ENOTDIR`).
    pub const NOTDIR: Self = Self(20);
    /// It is a folder (`EISDIR`).
    pub const ISDIR: Self = Self(21);
    /// The request makes no sense (`EINVAL`).
    pub const INVAL: Self = Self(22);
    /// There are too many nodes or open files (`ENFILE`).
    pub const NFILE: Self = Self(23);
    /// The file would become too long (`EFBIG`).
    pub const FBIG: Self = Self(27);
    /// There is no space (`ENOSPC`).
    pub const NOSPC: Self = Self(28);
    /// The folder is shared read-only (`EROFS`).
    pub const ROFS: Self = Self(30);
    /// The name is too long (`ENAMETOOLONG`).
    pub const NAMETOOLONG: Self = Self(36);
    /// Nobody knows this operation (`ENOSYS`).
    pub const NOSYS: Self = Self(38);
    /// The protocol is another (`EPROTO`).
    pub const PROTO: Self = Self(71);
    /// It cannot be done with this sort of file (`EOPNOTSUPP`).
    pub const OPNOTSUPP: Self = Self(95);
    /// There is no such node any more (`ESTALE`).
    pub const STALE: Self = Self(116);
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error {}", self.0)
    }
}

impl std::error::Error for Errno {}

/// A file, folder or link of which the device was told.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Node(pub u64);

impl Node {
    /// The shared folder itself.
    pub const ROOT: Self = Self(1);
}

/// A file or folder that the device has opened.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OpenFile(pub u32);

/// A time since 1970-01-01 00:00:00 UTC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileTime {
    /// Whole seconds.
    pub seconds: i64,
    /// Nanoseconds after it, under 1 000 000 000.
    pub nanoseconds: u32,
}

/// What a file is (stat(2)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// The number of the file in its file system.
    pub inode: u64,
    /// The length in bytes.
    pub size: u64,
    /// The space that it takes, in 512 bytes.
    pub blocks: u64,
    /// The size in which reads and writes are cheap, in bytes.
    pub block_size: u32,
    /// The type and the permission bits.
    pub mode: u32,
    /// How many names it has.
    pub links: u32,
    /// The owner.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// Of a device node: its number, as Linux encodes it in 32 bits.
    pub device: u32,
    /// When it was last read.
    pub accessed: FileTime,
    /// When its content last changed.
    pub modified: FileTime,
    /// When it last changed.
    pub changed: FileTime,
}

/// A node of which the device is told. Its count has grown by one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FolderEntry {
    /// The node.
    pub node: Node,
    /// What it is.
    pub attributes: Attributes,
}

/// One name in a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FolderItem {
    /// Where a list goes on behind it.
    pub next: u64,
    /// The number of the file in its file system.
    pub inode: u64,
    /// The type, as in the highest four of the sixteen bits of a mode; 0 if the file system does not say.
    pub kind: u8,
    /// The name.
    pub name: Vec<u8>,
    /// What it names, where that was asked for and could be told.
    pub entry: Option<FolderEntry>,
}

/// A name in a folder: one component.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The folder.
    pub folder: Node,
    /// The name: 1 to 255 bytes without `/` and NUL, and neither `.` nor `..`.
    pub name: Vec<u8>,
}

/// Something new: where, for whom, and with which permission bits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewFile {
    /// Where.
    pub place: Place,
    /// The permission bits.
    pub mode: u32,
    /// Its owner, where the host's process may give it to others.
    pub uid: u32,
    /// Its group, likewise.
    pub gid: u32,
}

/// What a file is opened for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// Reads.
    pub read: bool,
    /// Writes.
    pub write: bool,
    /// Writes go to the end of the file, wherever they say.
    pub append: bool,
    /// The file is made empty.
    pub truncate: bool,
    /// A write has ended when it is durable.
    pub sync: bool,
}

impl Access {
    /// The bits of a number, in the order of the fields.
    #[must_use]
    pub const fn to_bits(self) -> u8 {
        self.read as u8
            | (self.write as u8) << 1
            | (self.append as u8) << 2
            | (self.truncate as u8) << 3
            | (self.sync as u8) << 4
    }

    /// What these bits say. Others are passed over.
    #[must_use]
    pub const fn from_bits(bits: u8) -> Self {
        Self {
            read: bits & 1 != 0,
            write: bits & 2 != 0,
            append: bits & 4 != 0,
            truncate: bits & 8 != 0,
            sync: bits & 16 != 0,
        }
    }
}

/// What a time becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewTime {
    /// The host's time.
    Now,
    /// This time.
    At(FileTime),
}

/// What is to change. Nothing where there is no value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// The permission bits.
    pub mode: Option<u32>,
    /// The owner.
    pub uid: Option<u32>,
    /// The group.
    pub gid: Option<u32>,
    /// The length in bytes.
    pub size: Option<u64>,
    /// When it was last read.
    pub accessed: Option<NewTime>,
    /// When its content last changed.
    pub modified: Option<NewTime>,
}

/// What happens to what has the new name already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RenameHow {
    /// It is replaced.
    Replace,
    /// It stays, and nothing is renamed.
    Keep,
    /// It gets the old name.
    Exchange,
}

/// What is done with a range of a file (fallocate(2)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AllocateHow {
    /// Gets space; the file becomes longer if it ends before.
    Extend,
    /// Gets space; the length stays.
    Keep,
    /// Gives the space back: it reads as zeroes, and the length stays.
    Punch,
    /// Becomes zeroes; the file becomes longer if it ends before.
    Zero,
    /// Becomes zeroes; the length stays.
    ZeroKeep,
}

/// Data that moves between a request and a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileRange {
    /// The open file.
    pub file: OpenFile,
    /// The first byte in the request's part.
    pub offset: u32,
    /// The length in bytes.
    pub length: u32,
    /// The first byte in the file.
    pub position: u64,
}

/// What is asked of a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the fields have the words of the WIT")]
pub enum FolderAction {
    /// Lets all nodes and open files go.
    Clear,
    /// Takes so much from the counts of nodes.
    Forget(Vec<(Node, u64)>),
    /// The node of a name.
    LookUp(Place),
    /// What a node is.
    Attributes { node: Node, file: Option<OpenFile> },
    /// Changes what a node is.
    Change { node: Node, file: Option<OpenFile>, changes: Changes },
    /// The target of a link.
    ReadLink(Node),
    /// A new regular file.
    MakeFile(NewFile),
    /// A new folder.
    MakeFolder(NewFile),
    /// A new symbolic link.
    MakeLink { new: NewFile, target: Vec<u8> },
    /// Another name for a node.
    Link { node: Node, place: Place },
    /// Takes a name away that is no folder's.
    Remove(Place),
    /// Takes an empty folder away.
    RemoveFolder(Place),
    /// Another name.
    Rename { from: Place, to: Place, how: RenameHow },
    /// Opens a regular file.
    Open { node: Node, access: Access },
    /// Opens a regular file, which is made if it is not there.
    Create { new: NewFile, access: Access, exclusive: bool },
    /// Opens a folder.
    OpenFolder(Node),
    /// The next names of an open folder.
    Names { file: OpenFile, position: u64, room: u32, each: u32, entries: bool },
    /// Reads into the request's writable part.
    Read(FileRange),
    /// Writes from the request's readable part.
    Write(FileRange),
    /// Makes what was written durable.
    Sync { file: OpenFile, data_only: bool },
    /// Space of a range.
    Allocate { file: OpenFile, how: AllocateHow, position: u64, length: u64 },
    /// The next data or hole.
    Seek { file: OpenFile, position: u64, hole: bool },
    /// The file system.
    Statistics(Node),
    /// Closes a file or folder.
    Close(OpenFile),
}

/// What a file system is (statvfs(3)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FolderStatistics {
    /// The unit of the numbers of blocks, in bytes.
    pub block_size: u32,
    /// The longest name in bytes.
    pub name_length: u32,
    /// All blocks.
    pub blocks: u64,
    /// Free blocks.
    pub free: u64,
    /// Free blocks that the host's process may use.
    pub available: u64,
    /// How many files there can be.
    pub files: u64,
    /// How many more there can be.
    pub files_free: u64,
}

/// What an action came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FolderOutcome {
    /// It is done.
    Done,
    /// A node.
    Entry(FolderEntry),
    /// What a node is.
    Attributes(Attributes),
    /// The target of a link.
    Target(Vec<u8>),
    /// An open file.
    Opened(OpenFile),
    /// A node, and the file that it was opened as.
    Created(FolderEntry, OpenFile),
    /// Names.
    Items(Vec<FolderItem>),
    /// How many bytes were moved.
    Moved(u32),
    /// A place in a file.
    Position(u64),
    /// The file system.
    Statistics(FolderStatistics),
}
