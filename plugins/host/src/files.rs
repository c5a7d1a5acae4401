//! Files that somebody named: opened without waiting, and read only if they are files. And texts that somebody gave, shortened for messages.
//!
//! Opening a FIFO waits for its other end, and reading a device may wait for ever or never end. So what is opened is looked at first, by its descriptor:
//! it cannot be exchanged in between.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;

/// The most characters of a text that a message repeats.
const QUOTED: usize = 80;

/// Opens a regular file for reading. It does not wait.
pub(crate) fn open_regular(path: &Path) -> io::Result<File> {
    let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed();
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let kind = file.metadata()?.file_type();
    let is = if kind.is_file() {
        return Ok(file);
    } else if kind.is_dir() {
        "a folder"
    } else if kind.is_fifo() {
        "a FIFO"
    } else if kind.is_block_device() || kind.is_char_device() {
        "a device"
    } else {
        "something else"
    };
    Err(io::Error::other(format!("this is {is}, not a regular file")))
}

/// Reads a regular file of at most `most` bytes, without waiting for anybody.
///
/// # Errors
/// It is not a regular file, is larger, or cannot be read.
pub fn read_bounded(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open_regular(path)?.take(most.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > most {
        return Err(io::Error::other(format!("larger than {most} bytes")));
    }
    Ok(bytes)
}

/// A text for a message: in one line, without what a terminal would obey, and cut if it is long.
pub(crate) fn quoted(text: &str) -> String {
    let plain = |c: char| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c };
    let mut quoted: String = text.chars().take(QUOTED).map(plain).collect();
    if text.chars().nth(QUOTED).is_some() {
        quoted.push_str(&format!("… ({} bytes)", text.len()));
    }
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fifo_is_refused_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        for path in [&*fifo, Path::new("/dev/zero"), folder.path()] {
            let error = read_bounded(path, 10).unwrap_err().to_string();
            assert!(error.contains("not a regular file"), "{}: {error}", path.display());
        }
    }

    #[test]
    fn a_file_is_read_up_to_its_bound() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, "12345").unwrap();
        assert_eq!(read_bounded(&file, 5).unwrap(), b"12345");
        assert!(read_bounded(&file, 4).unwrap_err().to_string().contains("larger than 4"));
    }

    #[test]
    fn a_quoted_text_is_short_and_harmless() {
        assert_eq!(quoted("0x3f8"), "0x3f8");
        assert_eq!(quoted(&"é".repeat(80)), "é".repeat(80));
        let long = quoted(&"a".repeat(130_000));
        assert!(long.starts_with("aaaa") && long.ends_with("(130000 bytes)") && long.len() < 110, "{long}");
        assert!(!quoted("\x1b[2J\r\n").contains(char::is_control));
    }
}
