//! Locks against double use: open-file-description locks (fcntl(2), `F_OFD_SETLK`) on a whole file, which also keep QEMU's tools out.
//!
//! Several readers share a file, a writer shares it with nobody. The lock ends with the open file, also when the process is killed.
#![allow(unsafe_code, reason = "fcntl")]

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

/// The most files of other processes that are looked at to find out who holds a lock.
const MOST_LOOKED_AT: usize = 50_000;

/// Locks a file: for writing if `exclusive`, else for reading.
///
/// # Errors
/// Who has it open, or why there is no lock, as the rest of a sentence that begins with the file's name.
pub(crate) fn lock(file: &File, exclusive: bool) -> Result<(), String> {
    let kind = if exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
    match set(file, kind) {
        Ok(()) => Ok(()),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
            let who = holder(file).unwrap_or_else(|| "another process".to_owned());
            let way = if exclusive { "is in use by" } else { "is being written by" };
            Err(format!("{way} {who}"))
        }
        Err(error) => Err(format!("cannot be locked: {error}; `lock=no` goes without")),
    }
}

/// Gives the lock back, before other references to the open file have ended.
pub(crate) fn unlock(file: &File) {
    let _ = set(file, libc::F_UNLCK);
}

fn set(file: &File, kind: libc::c_int) -> io::Result<()> {
    // SAFETY: a structure of numbers; zeroes are the whole file.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::c_short::try_from(kind).unwrap_or_default();
    lock.l_whence = libc::c_short::try_from(libc::SEEK_SET).unwrap_or_default();
    // SAFETY: the descriptor is open, and the structure is good for the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Who has a lock on the file, as far as `/proc` lets us see.
fn holder(file: &File) -> Option<String> {
    let about = file.metadata().ok()?;
    let (major, minor) = (libc::major(about.dev()), libc::minor(about.dev()));
    let name = format!(" {major:02x}:{minor:02x}:{} ", about.ino());
    let holds = |text: &str| text.lines().any(|line| line.starts_with("lock:") && line.contains(&name));
    let mut looked_at = 0;
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let Some(id) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let Ok(files) = fs::read_dir(process.path().join("fdinfo")) else { continue };
        for file in files.flatten() {
            looked_at += 1;
            if looked_at > MOST_LOOKED_AT {
                return None;
            }
            if fs::read_to_string(file.path()).is_ok_and(|text| holds(&text)) {
                let program = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
                return Some(if id == std::process::id() {
                    "this command itself".to_owned()
                } else {
                    format!("process {id} ({})", program.trim_end())
                });
            }
        }
    }
    None
}
