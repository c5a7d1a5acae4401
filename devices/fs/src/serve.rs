//! One request of the driver: what it asks is asked of the folder, and what that says is its answer.

use std::borrow::Cow;

use tenon_sdk::virtio::{
    self, Access, AllocateHow, Changes, Errno, FileRange, FileTime, Folder, Handle, NewFile, NewTime, Node,
    OpenFile, Place, RenameHow, Request,
};

use crate::protocol::{
    Answer, Body, DIRENT, DIRENT_PLUS, Header, IN_HEADER, LEAST_MINOR, MAJOR, MINOR, OUT_HEADER,
    WRITE_HEADER, flag, op,
};

/// The most bytes of one READ or WRITE, and the most pages.
const MAX_DATA: u32 = 1 << 20;
const MAX_PAGES: u16 = 256;
/// The same for a driver that does not ask for more pages.
const FEW_DATA: u32 = 128 << 10;
/// How many requests the driver has under way in the background, and from how many on it holds back.
const BACKGROUND: (u16, u16) = (64, 48);
/// The longest request but for WRITE: some thousand nodes that are forgotten at once.
const LONGEST: u32 = 64 << 10;

// How files are opened (Linux, include/uapi/asm-generic/fcntl.h).
const ACCESS_MODE: u32 = 3;
const O_EXCL: u32 = 0o200;
const O_TRUNC: u32 = 0o1000;
const O_APPEND: u32 = 0o2000;
const O_DSYNC: u32 = 0o10000;
/// The type in a mode, and that of a regular file.
const TYPE: u32 = 0o170_000;
const REGULAR: u32 = 0o100_000;
/// The driver's own copy of the permission bits.
const PERMISSIONS: u32 = 0o7777;

/// What is answered.
enum Reply {
    /// This.
    Bytes(Answer),
    /// The folder has put so many bytes behind the header's place.
    Moved(u32),
    /// Nothing: the driver does not wait.
    Silence,
}

impl From<Answer> for Reply {
    fn from(answer: Answer) -> Self {
        Self::Bytes(answer)
    }
}

/// Does what a request asks; how many bytes of its writable part are the answer.
pub(crate) fn serve(folder: &Folder, request: &Request<'_>) -> u32 {
    let Request { handle, readable, writable, head } = *request;
    let Ok(header) = Body(head).header() else {
        return refuse(request, 0, Errno::IO);
    };
    let is_silent = matches!(header.op, op::FORGET | op::BATCH_FORGET | op::INTERRUPT);
    if !is_silent && writable < OUT_HEADER {
        // There is no room to say anything, so nothing is done.
        return 0;
    }
    let mut bytes = Cow::Borrowed(head);
    let from = u32::try_from(head.len()).unwrap_or(u32::MAX);
    if header.op != op::WRITE && readable > from {
        bytes.to_mut().extend(virtio::read(handle, from, readable.min(LONGEST).saturating_sub(from)));
    }
    let reply = if header.length > readable {
        Err(Errno::INVAL)
    } else {
        let end = bytes.len().min(usize::try_from(header.length).unwrap_or(usize::MAX));
        let body = bytes.get(IN_HEADER as usize..end).unwrap_or_default();
        Caller { folder, handle, header, writable }.answer(Body(body))
    };
    match reply {
        _ if is_silent => 0,
        Ok(Reply::Silence) => 0,
        Ok(Reply::Moved(count)) => {
            let length = OUT_HEADER + count;
            virtio::write(handle, 0, &Answer::new().finish(header.unique, length));
            length
        }
        Ok(Reply::Bytes(answer)) => {
            let length = answer.length();
            if length > writable {
                return refuse(request, header.unique, Errno::INVAL);
            }
            virtio::write(handle, 0, &answer.finish(header.unique, length))
        }
        Err(error) => refuse(request, header.unique, error),
    }
}

fn refuse(request: &Request<'_>, unique: u64, error: Errno) -> u32 {
    if request.writable < OUT_HEADER {
        return 0;
    }
    virtio::write(request.handle, 0, &Answer::refusal(unique, error))
}

/// Who asks, and what for.
struct Caller<'f> {
    folder: &'f Folder,
    handle: Handle,
    header: Header,
    writable: u32,
}

impl Caller<'_> {
    /// The node that the request is about.
    fn node(&self) -> Node {
        Node(self.header.node)
    }

    /// A name in the folder that the request is about.
    fn place(&self, body: &mut Body<'_>) -> Result<Place, Errno> {
        Ok(Place { folder: self.node(), name: body.text()? })
    }

    /// Something new there.
    fn new_file(&self, body: &mut Body<'_>, mode: u32) -> Result<NewFile, Errno> {
        let Header { uid, gid, .. } = self.header;
        Ok(NewFile { place: self.place(body)?, mode: mode & PERMISSIONS, uid, gid })
    }

    fn answer(&self, mut body: Body<'_>) -> Result<Reply, Errno> {
        let Self { folder, handle, .. } = *self;
        let body = &mut body;
        let mut answer = Answer::new();
        match self.header.op {
            op::INIT => return self.init(body),
            op::DESTROY => folder.clear(handle)?,
            op::LOOKUP => answer.entry(&folder.look_up(handle, self.place(body)?)?),
            op::FORGET => folder.forget(handle, vec![(self.node(), body.u64()?)])?,
            op::BATCH_FORGET => folder.forget(handle, forgotten(body)?)?,
            op::INTERRUPT => return Ok(Reply::Silence),
            op::GETATTR => {
                let with_file = body.u32()? & 1 != 0;
                body.skip(4)?;
                let file = if with_file { Some(body.file()?) } else { None };
                answer.attributes_for_a_while(&folder.attributes(handle, self.node(), file)?);
            }
            op::SETATTR => {
                let (file, changes) = changes(body)?;
                answer.attributes_for_a_while(&folder.change(handle, self.node(), file, changes)?);
            }
            op::READLINK => answer.bytes(&folder.read_link(handle, self.node())?),
            op::SYMLINK => {
                let new = self.new_file(body, 0)?;
                answer.entry(&folder.make_link(handle, new, body.text()?)?);
            }
            op::MKNOD => {
                let mode = body.u32()?;
                body.skip(12)?;
                if !matches!(mode & TYPE, 0 | REGULAR) {
                    return Err(Errno::PERM);
                }
                answer.entry(&folder.make_file(handle, self.new_file(body, mode)?)?);
            }
            op::MKDIR => {
                let mode = body.u32()?;
                body.skip(4)?;
                answer.entry(&folder.make_folder(handle, self.new_file(body, mode)?)?);
            }
            op::UNLINK => folder.remove(handle, self.place(body)?)?,
            op::RMDIR => folder.remove_folder(handle, self.place(body)?)?,
            op::RENAME => {
                let to = Node(body.u64()?);
                self.rename(body, to, RenameHow::Replace)?;
            }
            op::RENAME2 => {
                let to = Node(body.u64()?);
                let how = match body.u32()? {
                    0 => RenameHow::Replace,
                    1 => RenameHow::Keep,
                    2 => RenameHow::Exchange,
                    _ => return Err(Errno::INVAL),
                };
                body.skip(4)?;
                self.rename(body, to, how)?;
            }
            op::LINK => {
                let node = Node(body.u64()?);
                answer.entry(&folder.link(handle, node, self.place(body)?)?);
            }
            op::OPEN => answer.opened(folder.open(handle, self.node(), access(body.u32()?)?)?),
            op::OPENDIR => answer.opened(folder.open_folder(handle, self.node())?),
            op::CREATE => {
                let (flags, mode) = (body.u32()?, body.u32()?);
                body.skip(8)?;
                let new = self.new_file(body, mode)?;
                let (entry, file) = folder.create(handle, new, access(flags)?, flags & O_EXCL != 0)?;
                answer.entry(&entry);
                answer.opened(file);
            }
            op::READ => {
                let (file, position, size) = (body.file()?, body.u64()?, body.u32()?);
                let length = size.min(MAX_DATA).min(self.writable - OUT_HEADER);
                let range = FileRange { file, offset: OUT_HEADER, length, position };
                return folder.read(handle, range).map(Reply::Moved);
            }
            op::WRITE => {
                let (file, position, length) = (body.file()?, body.u64()?, body.u32()?);
                if length > MAX_DATA || self.header.length.checked_sub(WRITE_HEADER) != Some(length) {
                    return Err(Errno::INVAL);
                }
                let range = FileRange { file, offset: WRITE_HEADER, length, position };
                answer.u32(folder.write(handle, range)?);
                answer.u32(0);
            }
            op::READDIR => return self.names(body, false),
            op::READDIRPLUS => return self.names(body, true),
            op::RELEASE | op::RELEASEDIR => folder.close(handle, body.file()?)?,
            op::FSYNC | op::FSYNCDIR => {
                let file = body.file()?;
                folder.sync(handle, file, body.u32()? & 1 != 0)?;
            }
            op::STATFS => answer.statistics(&folder.statistics(handle, self.node())?),
            op::FALLOCATE => {
                let (file, position, length) = (body.file()?, body.u64()?, body.u64()?);
                let how = match body.u32()? {
                    0 => AllocateHow::Extend,
                    1 => AllocateHow::Keep,
                    3 => AllocateHow::Punch,
                    0x10 => AllocateHow::Zero,
                    0x11 => AllocateHow::ZeroKeep,
                    _ => return Err(Errno::OPNOTSUPP),
                };
                folder.allocate(handle, file, how, position, length)?;
            }
            op::LSEEK => {
                let (file, position) = (body.file()?, body.u64()?);
                let hole = match body.u32()? {
                    3 => false,
                    4 => true,
                    _ => return Err(Errno::INVAL),
                };
                answer.u64(folder.seek(handle, file, position, hole)?);
            }
            // Linux does by itself what needs doing, and asks no more: ACCESS and locks among its own processes, FLUSH since nothing is kept back here; extended attributes it does not have then.
            _ => return Err(Errno::NOSYS),
        }
        Ok(answer.into())
    }

    /// Says what both sides can do. Whoever mounts begins anew.
    fn init(&self, body: &mut Body<'_>) -> Result<Reply, Errno> {
        let (major, minor, readahead, flags) = (body.u32()?, body.u32()?, body.u32()?, body.u32()?);
        let mut answer = Answer::new();
        if major > MAJOR {
            // The driver comes again with this version.
            answer.u32(MAJOR);
            answer.u32(MINOR);
            answer.zeroes(64 - 8);
            return Ok(answer.into());
        }
        if major < MAJOR || minor < LEAST_MINOR {
            return Err(Errno::PROTO);
        }
        self.folder.clear(self.handle)?;
        let flags = flags & flag::OFFERED;
        let (data, pages) = if flags & flag::MAX_PAGES != 0 { (MAX_DATA, MAX_PAGES) } else { (FEW_DATA, 0) };
        for number in [MAJOR, MINOR.min(minor), readahead, flags] {
            answer.u32(number);
        }
        answer.u16(BACKGROUND.0);
        answer.u16(BACKGROUND.1);
        answer.u32(data);
        // Times are exact to the nanosecond.
        answer.u32(1);
        answer.u16(pages);
        answer.u16(0);
        answer.zeroes(8 * 4);
        Ok(answer.into())
    }

    fn rename(&self, body: &mut Body<'_>, to: Node, how: RenameHow) -> Result<(), Errno> {
        let from = self.place(body)?;
        let to = Place { folder: to, name: body.text()? };
        self.folder.rename(self.handle, from, to, how)
    }

    /// The next names of a folder.
    fn names(&self, body: &mut Body<'_>, plus: bool) -> Result<Reply, Errno> {
        let (file, position, size) = (body.file()?, body.u64()?, body.u32()?);
        let room = size.min(self.writable - OUT_HEADER);
        let each = if plus { DIRENT_PLUS } else { DIRENT };
        let mut answer = Answer::new();
        for item in self.folder.names(self.handle, file, position, (room, each), plus)? {
            answer.item(&item, plus);
        }
        Ok(answer.into())
    }
}

/// The nodes of `fuse_batch_forget_in`.
fn forgotten(body: &mut Body<'_>) -> Result<Vec<(Node, u64)>, Errno> {
    let count = body.u32()?;
    body.skip(4)?;
    // No more than there are bytes for.
    let mut nodes = Vec::new();
    for _ in 0..count {
        nodes.push((Node(body.u64()?), body.u64()?));
    }
    Ok(nodes)
}

/// What a file is opened for.
fn access(flags: u32) -> Result<Access, Errno> {
    let (read, write) = match flags & ACCESS_MODE {
        0 => (true, false),
        1 => (false, true),
        2 => (true, true),
        _ => return Err(Errno::INVAL),
    };
    let has = |bit| flags & bit != 0;
    Ok(Access { read, write, append: write && has(O_APPEND), truncate: has(O_TRUNC), sync: has(O_DSYNC) })
}

/// `fuse_setattr_in`: the open file, if there is one, and what changes.
fn changes(body: &mut Body<'_>) -> Result<(Option<OpenFile>, Changes), Errno> {
    let valid = body.u32()?;
    body.skip(4)?;
    let has = |bit: u32| valid & 1 << bit != 0;
    let (file, size) = (body.u64()?, body.u64()?);
    body.skip(8)?;
    let (accessed, modified) = (body.u64()?, body.u64()?);
    body.skip(8)?;
    let (accessed_ns, modified_ns) = (body.u32()?, body.u32()?);
    body.skip(4)?;
    let mode = body.u32()?;
    body.skip(4)?;
    let (uid, gid) = (body.u32()?, body.u32()?);
    body.skip(4)?;
    let time = |set: bool, now: bool, seconds: u64, nanoseconds: u32| match (set, now) {
        (_, true) => Some(NewTime::Now),
        (true, false) => Some(NewTime::At(FileTime { seconds: seconds.cast_signed(), nanoseconds })),
        (false, false) => None,
    };
    let file = has(6).then(|| u32::try_from(file).map(OpenFile).map_err(|_| Errno::BADF)).transpose()?;
    let changes = Changes {
        mode: has(0).then_some(mode & PERMISSIONS),
        uid: has(1).then_some(uid),
        gid: has(2).then_some(gid),
        size: has(3).then_some(size),
        accessed: time(has(4), has(7), accessed, accessed_ns),
        modified: time(has(5), has(8), modified, modified_ns),
    };
    Ok((file, changes))
}
