//! What was opened: a regular file or a block device, checked, locked and measured; and what the two do differently.
//!
//! Long for the kinds of files and of transfers that it tells apart.
#![allow(unsafe_code, reason = "system calls that the standard library does not have")]

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tenon_sdk::store::{
    Completions, Config, Error, Level, NativeOperation, OperationKind, Result, StoreError, StoreInfo,
};

use crate::lock;

/// The smallest unit of a regular file's reads and writes.
const BLOCK: u32 = 512;
/// The most zeroes that are written at once where the medium has no better way.
const ZEROES: usize = 256 << 10;

// linux/fs.h; in `libc` not for every platform.
const BLKDISCARD: libc::Ioctl = 0x1277;
const BLKZEROOUT: libc::Ioctl = 0x127f;
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272;

// linux/magic.h.
const EXT4: i64 = 0xef53;
const XFS: i64 = 0x5846_5342;
const BTRFS: i64 = 0x9123_683e;
const F2FS: i64 = 0xf2f5_2010;
const TMPFS: i64 = 0x0102_1994;

/// What the administrator asked for.
pub(crate) struct Settings {
    path: String,
    read_only: bool,
    direct: bool,
    preallocate: bool,
    lock: bool,
}

impl Settings {
    pub(crate) fn read(config: &Config) -> Result<Self> {
        let yes = |key| Ok::<_, Error>(config.boolean(key)?.unwrap_or(false));
        let path = config.text("path").ok_or_else(|| Config::missing("path", "a file or a block device"))?;
        let settings = Self {
            path: path.to_owned(),
            read_only: yes("readonly")?,
            direct: yes("direct")?,
            preallocate: yes("preallocate")?,
            lock: config.boolean("lock")?.unwrap_or(true),
        };
        if settings.read_only && settings.preallocate {
            return Err(Error::Invalid(
                "`preallocate` takes space for writes, but `readonly` refuses them: give one of them".into(),
            ));
        }
        Ok(settings)
    }
}

/// How buffers and ranges must lie for O_DIRECT, in bytes: powers of two.
#[derive(Clone, Copy)]
pub(crate) struct Alignment {
    /// Of addresses.
    pub(crate) memory: usize,
    /// Of positions and lengths.
    pub(crate) offset: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    File,
    Device,
}

/// A regular file or a block device.
pub(crate) struct Medium {
    pub(crate) path: String,
    /// Opened with O_DIRECT if `direct` is there.
    file: File,
    /// With O_DIRECT: how it must be used, and the same file without, for what does not fit.
    direct: Option<(Alignment, File)>,
    kind: Kind,
    read_only: bool,
    preallocate: bool,
    block_size: u32,
    optimal_size: u32,
    discard: bool,
    zero: bool,
    /// The bytes that are there; in the block after them, the rest reads as zeroes.
    length: AtomicU64,
    writes_wait: bool,
    /// A flush has failed: what was lost cannot be told, and so none succeeds any more.
    lost: AtomicBool,
    completions: Completions,
}

impl Medium {
    pub(crate) fn open(settings: &Settings, completions: Completions) -> Result<Self> {
        let path = settings.path.as_str();
        let wrong = |what: &str| Error::Invalid(format!("`path` is `{path}`, which {what}"));
        let failed = |what: &str, error: &io::Error| Error::Other(format!("{what} `{path}`: {error}"));

        // Looked at before it is opened: opening a tape rewinds it.
        let about = fs::metadata(path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound if settings.read_only => wrong("does not exist"),
            io::ErrorKind::NotFound => wrong("does not exist; `tenon disk create` makes one"),
            _ => failed("looking at", &error),
        })?;
        let kind = kind(&about.file_type())
            .map_err(|other| wrong(&format!("is a {other}, but must be a regular file or a block device")))?;
        let open = |flags: libc::c_int| {
            // Nothing that could wait, should it have become something else meanwhile.
            let flags = flags | libc::O_NONBLOCK | libc::O_NOCTTY;
            let file =
                OpenOptions::new().read(true).write(!settings.read_only).custom_flags(flags).open(path)?;
            let now = file.metadata()?;
            if (now.dev(), now.ino(), now.rdev()) != (about.dev(), about.ino(), about.rdev()) {
                return Err(io::Error::other("another file took its name meanwhile"));
            }
            block_again(&file)?;
            Ok(file)
        };
        // A device that is mounted, or has partitions that are, is not given away for writing.
        let exclusive =
            if kind == Kind::Device && !settings.read_only && settings.lock { libc::O_EXCL } else { 0 };
        let direct = if settings.direct { libc::O_DIRECT } else { 0 };
        let file = open(exclusive | direct).map_err(|error| match error.raw_os_error() {
            Some(libc::EBUSY) => wrong("is in use by this host, such as mounted"),
            Some(libc::EINVAL) if settings.direct => {
                wrong("is on a file system that has no direct access; leave out `direct`")
            }
            Some(libc::EACCES | libc::EROFS | libc::EPERM) if !settings.read_only => {
                wrong(&format!("cannot be opened for writing ({error}); `readonly` opens it for reading"))
            }
            _ => failed("opening", &error),
        })?;
        if settings.lock {
            lock::lock(&file, !settings.read_only).map_err(|why| Error::Other(format!("`{path}` {why}")))?;
        }

        let (length, block_size) = match kind {
            // Measured again: it is ours now.
            Kind::File => (file.metadata().map_err(|error| failed("measuring", &error))?.len(), BLOCK),
            Kind::Device => measure(&file).map_err(|error| failed("measuring", &error))?,
        };
        if length == 0 {
            return Err(wrong("is empty; a disk has at least one block"));
        }
        let direct = if settings.direct {
            // O_EXCL is held once; the descriptor beside it is the same device's.
            Some((alignment(&file, block_size), open(0).map_err(|error| failed("opening", &error))?))
        } else {
            None
        };
        let optimal = u32::try_from(about.blksize()).unwrap_or(4096).clamp(4096, 1 << 20);
        let mut medium = Self {
            path: path.to_owned(),
            file,
            direct,
            kind,
            read_only: settings.read_only,
            preallocate: settings.preallocate,
            block_size,
            optimal_size: optimal.next_multiple_of(block_size),
            discard: false,
            zero: false,
            length: AtomicU64::new(length),
            writes_wait: false,
            lost: AtomicBool::new(false),
            completions,
        };
        if settings.preallocate {
            medium.take_space(length)?;
        }
        medium.writes_wait =
            medium.direct.is_none() && kind == Kind::File && !medium.has_asynchronous_writes();
        medium.probe();
        Ok(medium)
    }

    pub(crate) fn info(&self) -> StoreInfo {
        StoreInfo {
            block_size: self.block_size,
            optimal_size: self.optimal_size,
            read_only: self.read_only,
            discard: self.discard,
            write_zeroes: self.zero,
            ..StoreInfo::new(self.size())
        }
    }

    /// The bytes that were there when the file was opened or resized.
    pub(crate) fn length(&self) -> u64 {
        self.length.load(Ordering::Relaxed)
    }

    fn size(&self) -> u64 {
        self.length().next_multiple_of(self.block_size.into())
    }

    /// What an operation comes to that needs no input or output, or cannot be.
    pub(crate) fn admit(&self, operation: &NativeOperation<'_>) -> Option<Result<(), StoreError>> {
        let NativeOperation { kind, position, length, .. } = *operation;
        if kind == OperationKind::Flush {
            // What was never written is durable; what may be lost is not.
            return (self.read_only || self.is_lost()).then(|| self.flush());
        }
        let held: u64 = operation.vectors.iter().map(|vector| vector.length as u64).sum();
        let moves = matches!(kind, OperationKind::Read | OperationKind::Write);
        if position.checked_add(length).is_none_or(|end| end > self.size()) || (moves && held != length) {
            return Some(Err(StoreError::OutOfRange));
        }
        if kind != OperationKind::Read && self.read_only {
            return Some(Err(StoreError::ReadOnly));
        }
        (length == 0).then_some(Ok(()))
    }

    /// Where a range goes; with an alignment if that is by O_DIRECT.
    pub(crate) fn route(&self, position: u64, length: u64) -> (RawFd, Option<Alignment>) {
        match &self.direct {
            None => (self.file.as_raw_fd(), None),
            // The kernel keeps the two coherent.
            Some((alignment, buffered)) if !(position | length).is_multiple_of(alignment.offset as u64) => {
                (buffered.as_raw_fd(), None)
            }
            Some((alignment, _)) => (self.file.as_raw_fd(), Some(*alignment)),
        }
    }

    /// Whether writing waits in the kernel's page cache: io_uring then gives each write to a worker of its own, one after the other for one file, and does a quarter of what
    /// threads do (`benches/ring.rs`).
    pub(crate) fn writes_wait(&self) -> bool {
        self.writes_wait
    }

    /// The descriptor to be flushed.
    pub(crate) fn descriptor(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Says in the log that an operation failed, and gives its error.
    pub(crate) fn failed(
        &self,
        kind: OperationKind,
        position: u64,
        length: u64,
        error: &io::Error,
    ) -> StoreError {
        let what = match kind {
            OperationKind::Read => "reading",
            OperationKind::Write => "writing",
            OperationKind::Flush => "flushing",
            OperationKind::Discard => "discarding",
            OperationKind::WriteZeroes { .. } => "zeroing",
        };
        if kind == OperationKind::Discard && error.raw_os_error() == Some(libc::EOPNOTSUPP) {
            // Nothing is wrong, and whoever asks goes on asking.
            return StoreError::Unsupported;
        }
        let text = format!("{}: {what} {length} bytes at {position}: {error}", self.path);
        self.completions.log(Level::Warn, &text);
        match error.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => StoreError::NoSpace,
            Some(libc::EROFS) => StoreError::ReadOnly,
            Some(libc::EOPNOTSUPP) => StoreError::Unsupported,
            _ => StoreError::Io,
        }
    }

    /// Whether a flush has failed.
    pub(crate) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// Makes everything durable that was written.
    pub(crate) fn flush(&self) -> Result<(), StoreError> {
        if self.read_only {
            return Ok(());
        }
        if self.is_lost() {
            return Err(StoreError::Io);
        }
        loop {
            // SAFETY: the descriptor is open.
            let outcome = os(unsafe { libc::fdatasync(self.file.as_raw_fd()) });
            if !matches!(&outcome, Err(error) if error.raw_os_error() == Some(libc::EINTR)) {
                return self.flushed(outcome);
            }
        }
    }

    /// Takes the outcome of a flush. The kernel tells of lost writes once and forgets them, so that after one failure no flush can be believed.
    pub(crate) fn flushed(&self, outcome: io::Result<()>) -> Result<(), StoreError> {
        outcome.map_err(|error| {
            self.lost.store(true, Ordering::Release);
            match self.failed(OperationKind::Flush, 0, 0, &error) {
                StoreError::NoSpace => StoreError::NoSpace,
                _ => StoreError::Io,
            }
        })
    }

    /// Gives space back.
    pub(crate) fn discard(&self, position: u64, length: u64) -> io::Result<()> {
        match self.kind {
            Kind::File => self.punch(position, length),
            Kind::Device => self.range(BLKDISCARD, position, length),
        }
    }

    /// Makes a range read as zeroes. `stop` ends what would take long.
    pub(crate) fn write_zeroes(
        &self,
        position: u64,
        length: u64,
        unmap: bool,
        stop: &AtomicBool,
    ) -> io::Result<()> {
        let unmap = unmap && !self.preallocate;
        if unmap && unless_unsupported(self.punch(position, length))? {
            return Ok(());
        }
        let done = match self.kind {
            Kind::File => self.allocate(libc::FALLOC_FL_ZERO_RANGE, position, length),
            Kind::Device => self.range(BLKZEROOUT, position, length),
        };
        if unless_unsupported(done)? {
            return Ok(());
        }
        let zeroes = vec![0; ZEROES];
        let file = self.direct.as_ref().map_or(&self.file, |(_, buffered)| buffered);
        let mut done = 0;
        while done < length {
            if stop.load(Ordering::Relaxed) {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let piece = usize::try_from(length - done).unwrap_or(ZEROES).min(ZEROES);
            file.write_all_at(&zeroes[..piece], position + done)?;
            done += piece as u64;
        }
        Ok(())
    }

    pub(crate) fn resize(&self, size: u64) -> Result<()> {
        let invalid = |what: String| Err(Error::Invalid(format!("`{}`: {what}", self.path)));
        if self.kind == Kind::Device {
            // The device's length is not ours to change, but may have been changed.
            let (length, _) =
                measure(&self.file).map_err(|error| Error::Other(format!("measuring: {error}")))?;
            if length != size {
                return invalid(format!(
                    "a block device has the length that it has, {length} bytes; {size} were asked for"
                ));
            }
            self.length.store(length, Ordering::Relaxed);
            return Ok(());
        }
        if self.read_only {
            return invalid("it is open for reading only".into());
        }
        if size == 0 || !size.is_multiple_of(self.block_size.into()) {
            return invalid(format!(
                "the length is {size}, but must be a multiple of {} and not 0",
                self.block_size
            ));
        }
        let failed = |error: io::Error| Error::Other(format!("resizing `{}` to {size}: {error}", self.path));
        let before = self.length();
        self.file.set_len(size).map_err(failed)?;
        if self.preallocate
            && size > before
            && let Err(error) = self.take_space(size)
        {
            let _ = self.file.set_len(before);
            return Err(error);
        }
        self.length.store(size, Ordering::Relaxed);
        Ok(())
    }

    /// Finds out what the medium has.
    fn probe(&mut self) {
        if self.read_only {
            return;
        }
        match self.kind {
            // No call asks a file system whether it gives space back without a trace on the file: it even sets the time of the last write when there is nothing to give. So the
            // first discard is the trial, and whoever asked for it hears that there is no such thing.
            Kind::File => {
                self.discard = !self.preallocate;
                self.zero = self.is_on(&[EXT4, XFS, BTRFS, F2FS, TMPFS]);
            }
            Kind::Device => {
                self.discard = self.limit("discard_max_bytes") > 0;
                self.zero = self.limit("write_zeroes_max_bytes") > 0;
            }
        }
    }

    /// Whether the file system takes writes to its page cache without waiting (`FMODE_NOWAIT`), which nothing but its name tells.
    fn has_asynchronous_writes(&self) -> bool {
        self.is_on(&[XFS, BTRFS])
    }

    /// Whether the file lies on one of these file systems.
    fn is_on(&self, magics: &[i64]) -> bool {
        // SAFETY: a structure of numbers.
        let mut about: libc::statfs = unsafe { std::mem::zeroed() };
        // SAFETY: the descriptor is open, the structure is good for the call.
        let known = unsafe { libc::fstatfs(self.file.as_raw_fd(), &raw mut about) } == 0;
        known && magics.contains(&about.f_type)
    }

    /// A limit of a block device's queue, from sysfs; a partition has its disk's.
    fn limit(&self, name: &str) -> u64 {
        let Ok(about) = self.file.metadata() else { return 0 };
        let device = format!("/sys/dev/block/{}:{}", libc::major(about.rdev()), libc::minor(about.rdev()));
        ["queue", "../queue"]
            .iter()
            .find_map(|queue| fs::read_to_string(format!("{device}/{queue}/{name}")).ok())
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(0)
    }

    fn take_space(&self, length: u64) -> Result<()> {
        if self.kind == Kind::Device {
            return Ok(());
        }
        self.allocate(0, 0, length).map_err(|error| match error.raw_os_error() {
            Some(libc::EOPNOTSUPP) => Error::Unsupported(format!(
                "`{}` is on a file system that cannot preallocate; leave out `preallocate`",
                self.path
            )),
            _ => Error::Other(format!("taking {length} bytes of space for `{}`: {error}", self.path)),
        })
    }

    fn punch(&self, position: u64, length: u64) -> io::Result<()> {
        self.allocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, position, length)
    }

    fn allocate(&self, mode: libc::c_int, position: u64, length: u64) -> io::Result<()> {
        let (Ok(position), Ok(length)) = (i64::try_from(position), i64::try_from(length)) else {
            return Err(io::Error::from_raw_os_error(libc::EFBIG));
        };
        loop {
            // SAFETY: the descriptor is open.
            let done = os(unsafe { libc::fallocate(self.file.as_raw_fd(), mode, position, length) });
            if !matches!(&done, Err(error) if error.kind() == io::ErrorKind::Interrupted) {
                return done;
            }
        }
    }

    /// A block device's ioctl on a range.
    fn range(&self, request: libc::Ioctl, position: u64, length: u64) -> io::Result<()> {
        let range = [position, length];
        // SAFETY: these requests read two numbers of 64 bits.
        os(unsafe { libc::ioctl(self.file.as_raw_fd(), request, range.as_ptr()) })
    }
}

impl Drop for Medium {
    fn drop(&mut self) {
        lock::unlock(&self.file);
    }
}

/// What can be a store, or the name of what cannot.
fn kind(file: &fs::FileType) -> Result<Kind, &'static str> {
    match file {
        _ if file.is_file() => Ok(Kind::File),
        _ if file.is_block_device() => Ok(Kind::Device),
        _ if file.is_dir() => Err("directory"),
        _ if file.is_fifo() => Err("pipe"),
        _ if file.is_socket() => Err("socket"),
        _ if file.is_char_device() => Err("character device"),
        _ => Err("file of an unknown kind"),
    }
}

/// Lets a file that was opened without waiting wait again: io_uring would give EAGAIN instead.
fn block_again(file: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open.
    os(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags & !libc::O_NONBLOCK) })
}

/// A block device's length and logical block size.
fn measure(file: &File) -> io::Result<(u64, u32)> {
    let (mut length, mut block) = (0u64, 0 as libc::c_int);
    // SAFETY: the request writes a number of 64 bits.
    os(unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &raw mut length) })?;
    // SAFETY: the request writes an int.
    os(unsafe { libc::ioctl(file.as_raw_fd(), libc::BLKSSZGET, &raw mut block) })?;
    let block = u32::try_from(block).unwrap_or(BLOCK).max(BLOCK);
    Ok((length / u64::from(block) * u64::from(block), block))
}

/// What O_DIRECT wants of a file: what the kernel says, else what fits every disk.
fn alignment(file: &File, block_size: u32) -> Alignment {
    // SAFETY: a structure of numbers.
    let mut about: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is an empty string, the structure is good for the call.
    let known = unsafe {
        libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, &raw mut about)
    } == 0
        && about.stx_mask & libc::STATX_DIOALIGN != 0;
    let power = |bytes: u32, default: u32| {
        (if known && bytes.is_power_of_two() { bytes } else { default }).max(block_size) as usize
    };
    Alignment {
        memory: power(about.stx_dio_mem_align, 4096),
        offset: power(about.stx_dio_offset_align, 4096),
    }
}

/// `false` where the medium does not have what was asked for.
fn unless_unsupported(outcome: io::Result<()>) -> io::Result<bool> {
    match outcome {
        Ok(()) => Ok(true),
        Err(error)
            if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOTTY | libc::EINVAL)) =>
        {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

fn os(outcome: libc::c_int) -> io::Result<()> {
    if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
