//! FUSE as it travels (Linux, include/uapi/linux/fuse.h, protocol 7.31): what the driver asks, read with care, and what it is answered.

use tenon_sdk::virtio::{Attributes, Errno, FileTime, FolderEntry, FolderItem, FolderStatistics, OpenFile};

/// The protocol that this device speaks.
pub(crate) const MAJOR: u32 = 7;
pub(crate) const MINOR: u32 = 31;
/// The oldest minor number whose INIT and READ look as they do here.
pub(crate) const LEAST_MINOR: u32 = 23;

/// What the driver asks (`enum fuse_opcode`). Those that are not here are answered with `ENOSYS`.
pub(crate) mod op {
    pub(crate) const LOOKUP: u32 = 1;
    pub(crate) const FORGET: u32 = 2;
    pub(crate) const GETATTR: u32 = 3;
    pub(crate) const SETATTR: u32 = 4;
    pub(crate) const READLINK: u32 = 5;
    pub(crate) const SYMLINK: u32 = 6;
    pub(crate) const MKNOD: u32 = 8;
    pub(crate) const MKDIR: u32 = 9;
    pub(crate) const UNLINK: u32 = 10;
    pub(crate) const RMDIR: u32 = 11;
    pub(crate) const RENAME: u32 = 12;
    pub(crate) const LINK: u32 = 13;
    pub(crate) const OPEN: u32 = 14;
    pub(crate) const READ: u32 = 15;
    pub(crate) const WRITE: u32 = 16;
    pub(crate) const STATFS: u32 = 17;
    pub(crate) const RELEASE: u32 = 18;
    pub(crate) const FSYNC: u32 = 20;
    pub(crate) const INIT: u32 = 26;
    pub(crate) const OPENDIR: u32 = 27;
    pub(crate) const READDIR: u32 = 28;
    pub(crate) const RELEASEDIR: u32 = 29;
    pub(crate) const FSYNCDIR: u32 = 30;
    pub(crate) const CREATE: u32 = 35;
    pub(crate) const INTERRUPT: u32 = 36;
    pub(crate) const DESTROY: u32 = 38;
    pub(crate) const BATCH_FORGET: u32 = 42;
    pub(crate) const FALLOCATE: u32 = 43;
    pub(crate) const READDIRPLUS: u32 = 44;
    pub(crate) const RENAME2: u32 = 45;
    pub(crate) const LSEEK: u32 = 46;
}

/// What both sides can do (`FUSE_*` of INIT).
pub(crate) mod flag {
    const ASYNC_READ: u32 = 1 << 0;
    const ATOMIC_O_TRUNC: u32 = 1 << 3;
    const BIG_WRITES: u32 = 1 << 5;
    const AUTO_INVAL_DATA: u32 = 1 << 12;
    const DO_READDIRPLUS: u32 = 1 << 13;
    const READDIRPLUS_AUTO: u32 = 1 << 14;
    const ASYNC_DIO: u32 = 1 << 15;
    const PARALLEL_DIROPS: u32 = 1 << 18;
    pub(crate) const MAX_PAGES: u32 = 1 << 22;

    /// What this device can do.
    pub(crate) const OFFERED: u32 = ASYNC_READ
        | ATOMIC_O_TRUNC
        | BIG_WRITES
        | AUTO_INVAL_DATA
        | DO_READDIRPLUS
        | READDIRPLUS_AUTO
        | ASYNC_DIO
        | PARALLEL_DIROPS
        | MAX_PAGES;
}

/// The length of `fuse_in_header`, and of it with what comes before the data of a WRITE.
pub(crate) const IN_HEADER: u32 = 40;
pub(crate) const WRITE_HEADER: u32 = IN_HEADER + 40;
/// The length of `fuse_out_header`.
pub(crate) const OUT_HEADER: u32 = 16;
/// What a name takes in a list besides its own length, without and with what it names (`fuse_dirent`, `fuse_direntplus`).
pub(crate) const DIRENT: u32 = 24;
pub(crate) const DIRENT_PLUS: u32 = 128 + DIRENT;

/// How long the driver may believe a name and attributes, in seconds: what is changed on the host shows after this time at the latest.
const VALID: u64 = 1;

/// `fuse_in_header`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Header {
    pub(crate) length: u32,
    pub(crate) op: u32,
    pub(crate) unique: u64,
    pub(crate) node: u64,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// What the driver asks, from front to back. Bytes that are not there are an error.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Body<'a>(pub(crate) &'a [u8]);

impl<'a> Body<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], Errno> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(taken)
    }

    pub(crate) fn skip(&mut self, count: usize) -> Result<(), Errno> {
        self.take(count).map(drop)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Errno> {
        let bytes = self.take(4)?.try_into().map_err(|_| Errno::INVAL)?;
        Ok(u32::from_le_bytes(bytes))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Errno> {
        let bytes = self.take(8)?.try_into().map_err(|_| Errno::INVAL)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// A file that the driver opened.
    pub(crate) fn file(&mut self) -> Result<OpenFile, Errno> {
        u32::try_from(self.u64()?).map(OpenFile).map_err(|_| Errno::BADF)
    }

    /// A text that ends with NUL.
    pub(crate) fn text(&mut self) -> Result<Vec<u8>, Errno> {
        let length = self.0.iter().position(|byte| *byte == 0).ok_or(Errno::INVAL)?;
        let text = self.take(length)?.to_vec();
        self.skip(1)?;
        Ok(text)
    }

    pub(crate) fn header(&mut self) -> Result<Header, Errno> {
        let header = Header {
            length: self.u32()?,
            op: self.u32()?,
            unique: self.u64()?,
            node: self.u64()?,
            uid: self.u32()?,
            gid: self.u32()?,
        };
        // The process, and extensions of later versions.
        self.skip(8)?;
        Ok(header)
    }
}

/// An answer in the making, behind room for its header.
#[derive(Debug)]
pub(crate) struct Answer(Vec<u8>);

impl Answer {
    pub(crate) fn new() -> Self {
        Self(vec![0; OUT_HEADER as usize])
    }

    /// The length with the header.
    pub(crate) fn length(&self) -> u32 {
        u32::try_from(self.0.len()).unwrap_or(u32::MAX)
    }

    /// The bytes of an answer of `length` bytes to this request.
    pub(crate) fn finish(mut self, unique: u64, length: u32) -> Vec<u8> {
        self.0[..4].copy_from_slice(&length.to_le_bytes());
        self.0[8..16].copy_from_slice(&unique.to_le_bytes());
        self.0
    }

    /// The bytes of a refusal.
    pub(crate) fn refusal(unique: u64, error: Errno) -> Vec<u8> {
        let mut answer = Self::new();
        // Linux takes no others.
        let number = if matches!(error.0, 1..512) { error.0 } else { Errno::IO.0 };
        answer.0[4..8].copy_from_slice(&number.wrapping_neg().to_le_bytes());
        answer.finish(unique, OUT_HEADER)
    }

    pub(crate) fn u16(&mut self, value: u16) {
        self.0.extend(value.to_le_bytes());
    }

    pub(crate) fn u32(&mut self, value: u32) {
        self.0.extend(value.to_le_bytes());
    }

    pub(crate) fn u64(&mut self, value: u64) {
        self.0.extend(value.to_le_bytes());
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend(bytes);
    }

    pub(crate) fn zeroes(&mut self, count: usize) {
        self.0.resize(self.0.len() + count, 0);
    }

    /// `fuse_attr`.
    fn attributes(&mut self, about: &Attributes) {
        let times = [about.accessed, about.modified, about.changed];
        for number in [about.inode, about.size, about.blocks] {
            self.u64(number);
        }
        for FileTime { seconds, .. } in times {
            self.u64(seconds.cast_unsigned());
        }
        for FileTime { nanoseconds, .. } in times {
            self.u32(nanoseconds);
        }
        for number in [about.mode, about.links, about.uid, about.gid, about.device, about.block_size, 0] {
            self.u32(number);
        }
    }

    /// `fuse_attr_out`.
    pub(crate) fn attributes_for_a_while(&mut self, about: &Attributes) {
        self.u64(VALID);
        self.u64(0);
        self.attributes(about);
    }

    /// `fuse_entry_out`.
    pub(crate) fn entry(&mut self, FolderEntry { node, attributes }: &FolderEntry) {
        // Numbers of nodes are given once, so that all are of generation 0.
        for number in [node.0, 0, VALID, VALID, 0] {
            self.u64(number);
        }
        self.attributes(attributes);
    }

    /// `fuse_open_out`: the driver drops what it has cached of the file.
    pub(crate) fn opened(&mut self, file: OpenFile) {
        self.u64(file.0.into());
        self.u64(0);
    }

    /// `fuse_dirent`, in a `fuse_direntplus` where what is named is told as well.
    pub(crate) fn item(&mut self, item: &FolderItem, plus: bool) {
        if plus {
            match &item.entry {
                Some(entry) => self.entry(entry),
                // A name without a node: the driver looks it up if it wants to.
                None => self.zeroes((DIRENT_PLUS - DIRENT) as usize),
            }
        }
        self.u64(item.inode);
        self.u64(item.next);
        self.u32(u32::try_from(item.name.len()).unwrap_or(u32::MAX));
        self.u32(item.kind.into());
        self.bytes(&item.name);
        self.zeroes(item.name.len().next_multiple_of(8) - item.name.len());
    }

    /// `fuse_statfs_out`.
    pub(crate) fn statistics(&mut self, about: &FolderStatistics) {
        for number in [about.blocks, about.free, about.available, about.files, about.files_free] {
            self.u64(number);
        }
        for number in [about.block_size, about.name_length, about.block_size] {
            self.u32(number);
        }
        self.zeroes(4 + 6 * 4);
    }
}
