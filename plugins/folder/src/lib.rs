//! Folders of the host that virtio devices work in: what is behind the contract's interface `folders`.
//!
//! An administrator names a folder ([`Root::open`]); each device that is given it has a [`Folder`] on it, with nodes and open files of its own. A device asks by
//! [`Folder::act`]; what moves data ([`FolderAction::Read`], [`FolderAction::Write`]) is for who knows where the data is, with the descriptor that [`Folder::file`] gives.
//!
//! # Why nothing outside can be reached
//!
//! - A device names a node by a number and at most one name below it, never a path. A name has no `/`, and is neither `.` nor `..`.
//! - A node is held by a descriptor that stands for the file itself (`O_PATH | O_NOFOLLOW`). Names are looked up beneath it by openat2(2), with every symbolic link, magic link and mount point
//!   refused. A link on the way is thus never followed, whoever puts it there and whenever: the guest is told what its target says, and looks that up itself.
//! - A descriptor of `O_PATH` opens nothing: a FIFO does not block and a device is not touched. Only what this descriptor says to be a regular file or a folder is then opened, by that
//!   descriptor and not by its name, so that nobody can put something else in its place.
//! - What is mounted below is not shared: its mount point answers `EXDEV`. So a share of `/` does not give /proc/self/mem.
//!
//! What the host itself moves out of the folder while the guest has a hold on it stays in the guest's hands, as it does for any process that has it open.
//!
//! # What is bounded
//!
//! A device has at most [`MOST_NODES`] nodes and [`MOST_FILES`] open files; past that it is told `ENFILE`. Of the nodes at most [`MOST_HELD`] have a descriptor: one that is not used for a while
//! is closed, and opened again by its last name when it is wanted; if that is another file by now, the device is told `ESTALE`. So it is of removed files that it has not forgotten, where
//! those are more than half of that. Neither takes more than an eighth of the files that this process may open ([`raise_open_files`]).
//!
//! # Owners
//!
//! What a device makes belongs to the user whose process this is. Only where that is root, it is given to whom the device says. Bits that let a program run as its
//! owner or group are refused on files (`EPERM`), and a file of the host's that has them loses them when the guest changes what is in it: what a guest writes must not run as this process's
//! user on the host.
//!
//! All calls are made on the caller's thread and take as long as the host's file system takes.

mod act;
mod files;
mod nodes;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, StatxFlags, fstatfs, openat, openat2, statx};
use rustix::io::Errno;

pub use act::Folder;
pub use files::MOST_FILES;
pub use nodes::{MOST_HELD, MOST_NODES};
pub use tenon_abi::FolderAction;

/// The number by which fstatfs(2) tells procfs.
const PROC_SUPER_MAGIC: i64 = 0x9fa0;

/// A folder that an administrator shares.
#[derive(Debug)]
pub struct Root {
    folder: OwnedFd,
    /// `/proc/self/fd`: where what a descriptor stands for is opened again.
    descriptors: OwnedFd,
    path: PathBuf,
    read_only: bool,
    /// The longest file that this process may make (`RLIMIT_FSIZE`), past which it would be ended by a signal.
    longest: u64,
}

impl Root {
    /// Takes the folder at `path`, a link to it being followed once, now. With `read_only`, nothing in it can be changed through this.
    ///
    /// # Errors
    /// It is not there, is no folder, or this host lacks what keeps devices inside: openat2(2) of Linux 5.6, and /proc.
    pub fn open(path: &Path, read_only: bool) -> io::Result<Arc<Self>> {
        let folder = openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        openat2(&folder, ".", flags, Mode::empty(), ResolveFlags::BENEATH).map_err(|error| {
            if error == Errno::NOSYS {
                io::Error::new(
                    io::ErrorKind::Unsupported,
                    "sharing a folder needs openat2(2), which came with Linux 5.6",
                )
            } else {
                error.into()
            }
        })?;
        let descriptors =
            openat(CWD, "/proc/self/fd", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        if fstatfs(&descriptors)?.f_type != PROC_SUPER_MAGIC {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "sharing a folder needs procfs at /proc"));
        }
        let longest = rustix::process::getrlimit(rustix::process::Resource::Fsize).current;
        Ok(Arc::new(Self {
            folder,
            descriptors,
            path: path.to_owned(),
            read_only,
            longest: longest.unwrap_or(u64::MAX),
        }))
    }

    /// Where it is, as the administrator wrote it.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether nothing can be changed through it.
    #[must_use]
    pub fn read_only(&self) -> bool {
        self.read_only
    }
}

/// Lets this process open as many files as its hard limit says: a shared folder may take some thousand.
pub fn raise_open_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    // What is not granted is found out by `EMFILE`.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}

/// What statx(2) tells of what a descriptor stands for.
fn about(fd: impl AsFd) -> Result<rustix::fs::Statx, Errno> {
    statx(fd, "", AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW, ABOUT)
}

/// The same of what a name in a folder stands for, without a descriptor for it.
fn about_name(folder: impl AsFd, name: &[u8]) -> Result<rustix::fs::Statx, Errno> {
    statx(folder, name, AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT, ABOUT)
}

const ABOUT: StatxFlags = StatxFlags::BASIC_STATS.union(StatxFlags::BTIME);

/// Opens a name beneath a folder without opening what it names.
fn hold(folder: impl AsFd, name: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat2(folder, name, flags, Mode::empty(), BENEATH)
}

/// No link is followed, no mount point crossed.
const BENEATH: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_XDEV);

/// Opens what a descriptor stands for, which is known to be a regular file.
fn reopen(root: &Root, fd: &OwnedFd, flags: OFlags) -> Result<File, Errno> {
    let name = fd.as_raw_fd().to_string();
    // A file that somebody has a lease on is refused, and not waited for.
    let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
    Ok(openat(&root.descriptors, name, flags, Mode::empty())?.into())
}
