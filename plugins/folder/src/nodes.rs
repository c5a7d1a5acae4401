//! The nodes that a device knows: which file each is, how often the device was told of it, and the descriptor that holds it.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{FileType, Statx};
use tenon_abi::{Attributes, Errno, FileTime, Node};

use crate::{about, hold};

/// The most nodes that a device may know: as many as tables of 2^20 places take, which with the names come to some 200 MB.
pub const MOST_NODES: usize = 7 << 17;
/// The most nodes of one device that have a descriptor.
pub const MOST_HELD: usize = 4096;
/// How many folders lie between a node and the next one with a descriptor, at most.
const DEEPEST: usize = 4096;
/// The type in a mode.
const TYPE: u16 = 0o170_000;

/// What tells a file from all others of its file system, also from one that later has its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Identity {
    device: (u32, u32),
    inode: u64,
    born: (i64, u32),
    /// The type bits of its mode: where a file system does not say when a file was made, a FIFO may have the number that a regular file had.
    kind: u16,
}

impl Identity {
    pub(crate) fn of(about: &Statx) -> Self {
        Self {
            device: (about.stx_dev_major, about.stx_dev_minor),
            inode: about.stx_ino,
            // Zero where the file system does not say.
            born: (about.stx_btime.tv_sec, about.stx_btime.tv_nsec),
            kind: about.stx_mode & TYPE,
        }
    }

    fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.kind.into())
    }
}

#[derive(Debug)]
struct Known {
    identity: Identity,
    /// How often the device was told of it and has not forgotten it.
    count: u64,
    fd: Option<Arc<OwnedFd>>,
    /// It was used since its descriptor was last thought of closing.
    recent: bool,
    /// Its last name is gone, and its descriptor is kept, without which it would be lost.
    nameless: bool,
    /// Where it was last found.
    folder: Node,
    name: Box<[u8]>,
}

/// All nodes of a device.
#[derive(Debug)]
pub(crate) struct Nodes {
    known: HashMap<Node, Known>,
    by_identity: HashMap<Identity, Node>,
    /// Nodes with a descriptor, in the order in which they are thought of closing.
    held: VecDeque<Node>,
    /// How many are nameless: at most half of those that have a descriptor, so that there is always one to close.
    nameless: usize,
    next: u64,
    root: Arc<OwnedFd>,
    /// The most descriptors.
    most_held: usize,
}

impl Nodes {
    /// The shared folder alone.
    pub(crate) fn new(root: OwnedFd, most_held: usize) -> Self {
        Self {
            known: HashMap::new(),
            by_identity: HashMap::new(),
            held: VecDeque::new(),
            nameless: 0,
            next: Node::ROOT.0 + 1,
            root: Arc::new(root),
            most_held,
        }
    }

    /// Forgets all but the shared folder. Numbers are not given again.
    pub(crate) fn clear(&mut self) {
        self.known.clear();
        self.by_identity.clear();
        self.held.clear();
        self.nameless = 0;
    }

    /// The most that have a descriptor.
    pub(crate) fn most_held(&self) -> usize {
        self.most_held
    }

    /// How many there are, and how many have a descriptor.
    pub(crate) fn counts(&self) -> (usize, usize) {
        (self.known.len(), self.known.values().filter(|node| node.fd.is_some()).count())
    }

    /// The descriptor that holds a node.
    pub(crate) fn fd(&mut self, node: Node) -> Result<Arc<OwnedFd>, Errno> {
        if node == Node::ROOT {
            return Ok(self.root.clone());
        }
        let known = self.known.get_mut(&node).ok_or(Errno::STALE)?;
        known.recent = true;
        match &known.fd {
            Some(fd) => Ok(fd.clone()),
            None => self.find_again(node),
        }
    }

    /// What sort of file a node is.
    pub(crate) fn kind(&self, node: Node) -> Result<FileType, Errno> {
        if node == Node::ROOT {
            return Ok(FileType::Directory);
        }
        self.known.get(&node).map(|known| known.identity.kind()).ok_or(Errno::STALE)
    }

    /// Opens a node again by the names by which it was last found.
    fn find_again(&mut self, node: Node) -> Result<Arc<OwnedFd>, Errno> {
        let mut way = vec![node];
        let mut fd = loop {
            // There is at least the node itself.
            let known = self.known.get(&way[way.len() - 1]).ok_or(Errno::STALE)?;
            let folder = known.folder;
            if folder == Node::ROOT {
                break self.root.clone();
            }
            match self.known.get(&folder) {
                Some(Known { fd: Some(fd), .. }) => break fd.clone(),
                Some(_) if way.len() < DEEPEST => way.push(folder),
                // Forgotten, or moved about by the host until it lies in itself.
                _ => return Err(Errno::STALE),
            }
        };
        for node in way.into_iter().rev() {
            let known = self.known.get(&node).ok_or(Errno::STALE)?;
            let found = hold(&fd, &known.name).map_err(|_| Errno::STALE)?;
            if Identity::of(&about(&found).map_err(errno)?) != known.identity {
                return Err(Errno::STALE);
            }
            fd = Arc::new(found);
            self.keep(node, fd.clone());
        }
        Ok(fd)
    }

    /// Gives a node a descriptor. Others that were not used lately lose theirs when there are too many.
    fn keep(&mut self, node: Node, fd: Arc<OwnedFd>) {
        // Each is looked at twice at most: the first look takes its `recent`.
        for _ in 0..2 * self.held.len() {
            if self.held.len() < self.most_held {
                break;
            }
            let Some(first) = self.held.pop_front() else { break };
            match self.known.get_mut(&first) {
                Some(known) if known.recent || known.nameless => {
                    known.recent = false;
                    self.held.push_back(first);
                }
                Some(known) => known.fd = None,
                None => {}
            }
        }
        if let Some(known) = self.known.get_mut(&node) {
            known.recent = true;
            if known.fd.replace(fd).is_none() {
                self.held.push_back(node);
            }
        }
    }

    /// The device is told of what was found at this name: its node, whose count grows.
    pub(crate) fn tell(
        &mut self,
        fd: OwnedFd,
        about: &Statx,
        folder: Node,
        name: &[u8],
    ) -> Result<Node, Errno> {
        let identity = Identity::of(about);
        if let Some(node) = self.by_identity.get(&identity)
            && let Some(known) = self.known.get_mut(node)
        {
            known.count = known.count.saturating_add(1);
            let (node, is_held) = (*node, known.fd.is_some());
            self.moved(node, folder, name);
            if !is_held {
                self.keep(node, Arc::new(fd));
            }
            return Ok(node);
        }
        if self.known.len() >= MOST_NODES {
            return Err(Errno::NFILE);
        }
        let node = Node(self.next);
        self.next += 1;
        let known =
            Known { identity, count: 1, fd: None, recent: true, nameless: false, folder, name: name.into() };
        self.known.insert(node, known);
        self.by_identity.insert(identity, node);
        self.keep(node, Arc::new(fd));
        Ok(node)
    }

    /// Takes so much from a node's count; at 0 it is gone. What was not told of is passed over.
    pub(crate) fn forget(&mut self, node: Node, count: u64) {
        let Some(known) = self.known.get_mut(&node) else { return };
        known.count = known.count.saturating_sub(count);
        if known.count > 0 {
            return;
        }
        if let Some(known) = self.known.remove(&node) {
            self.by_identity.remove(&known.identity);
            self.nameless -= usize::from(known.nameless);
            if known.fd.is_some() {
                self.drop_from_held(node);
            }
        }
    }

    /// Numbers of nodes that are gone are swept out when there are as many of them as of others.
    fn drop_from_held(&mut self, node: Node) {
        if self.held.back() == Some(&node) {
            self.held.pop_back();
        } else if self.held.len() > 64 && self.held.len() > 2 * self.known.len() {
            let known = &self.known;
            self.held.retain(|node| known.get(node).is_some_and(|known| known.fd.is_some()));
        }
    }

    /// The node of a file, if the device knows it.
    pub(crate) fn of(&self, about: &Statx) -> Option<Node> {
        self.by_identity.get(&Identity::of(about)).copied()
    }

    /// A node has another name.
    pub(crate) fn moved(&mut self, node: Node, folder: Node, name: &[u8]) {
        if let Some(known) = self.known.get_mut(&node) {
            (known.folder, known.name) = (folder, name.into());
            self.nameless -= usize::from(std::mem::take(&mut known.nameless));
        }
    }

    /// A name of this node was taken away. Its descriptor is what is left of it, unless it is found again elsewhere; where too many are left in this way, it goes when others need the
    /// descriptor.
    pub(crate) fn unnamed(&mut self, node: Node, folder: Node, name: &[u8]) {
        let is_room = self.nameless < self.most_held / 2;
        if let Some(known) = self.known.get_mut(&node)
            && known.folder == folder
            && *known.name == *name
            && !known.nameless
        {
            known.nameless = is_room;
            self.nameless += usize::from(is_room);
        }
    }
}

/// What the device is told of a file.
pub(crate) fn attributes(about: &Statx) -> Attributes {
    let time =
        |time: rustix::fs::StatxTimestamp| FileTime { seconds: time.tv_sec, nanoseconds: time.tv_nsec };
    // As Linux encodes it in 32 bits (`new_encode_dev`).
    let (major, minor) = (about.stx_rdev_major, about.stx_rdev_minor);
    let device = minor & 0xff | (major & 0xfff) << 8 | (minor & 0xf_ff00) << 12;
    Attributes {
        inode: about.stx_ino,
        size: about.stx_size,
        blocks: about.stx_blocks,
        block_size: about.stx_blksize,
        mode: about.stx_mode.into(),
        links: about.stx_nlink,
        uid: about.stx_uid,
        gid: about.stx_gid,
        device,
        accessed: time(about.stx_atime),
        modified: time(about.stx_mtime),
        changed: time(about.stx_ctime),
    }
}

/// What a descriptor stands for, as the device is told.
pub(crate) fn attributes_of(fd: impl AsFd) -> Result<Attributes, Errno> {
    Ok(attributes(&about(fd).map_err(errno)?))
}

/// The same number, as the contract has it.
pub(crate) fn errno(error: rustix::io::Errno) -> Errno {
    u32::try_from(error.raw_os_error()).map_or(Errno::IO, Errno)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_another_type_is_another_file_though_it_has_the_number_of_one_that_is_gone() {
        let place = tempfile::tempdir().unwrap();
        let folder: OwnedFd = std::fs::File::open(place.path()).unwrap().into();
        let mut nodes = Nodes::new(folder.try_clone().unwrap(), 16);
        std::fs::write(place.path().join("name"), "").unwrap();
        let fd = hold(&folder, b"name").unwrap();
        let mut told = about(&fd).unwrap();
        // As a file system that does not say when a file was made.
        (told.stx_btime.tv_sec, told.stx_btime.tv_nsec) = (0, 0);
        let file = nodes.tell(fd.try_clone().unwrap(), &told, Node::ROOT, b"name").unwrap();
        assert_eq!(nodes.tell(fd.try_clone().unwrap(), &told, Node::ROOT, b"name"), Ok(file));
        told.stx_mode = told.stx_mode & !TYPE | 0o010_000;
        assert_eq!(nodes.of(&told), None);
        let fifo = nodes.tell(fd, &told, Node::ROOT, b"name").unwrap();
        assert_ne!(fifo, file);
        assert_eq!((nodes.kind(file), nodes.kind(fifo)), (Ok(FileType::RegularFile), Ok(FileType::Fifo)));
    }
}
