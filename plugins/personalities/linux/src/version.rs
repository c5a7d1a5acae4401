//! What an image says about itself, for people: the version inside an ELF kernel, and a guess at what a file is that is no kernel.

use tenon_sdk::guest::Source;
use tenon_sdk::personality::Result;

/// Begins the banner that a kernel prints first.
const BANNER: &[u8] = b"Linux version ";
/// The banner is looked for in pieces of this size.
const PIECE: u64 = 4 << 20;
/// A version is not longer than this (`__NEW_UTS_LEN`).
const LONGEST: usize = 64;

/// The version in the first banner of an unpacked kernel, such as `6.1.0-49-cloud-amd64`.
///
/// # Errors
/// The image cannot be read.
pub(crate) fn find(image: &(impl Source + ?Sized)) -> Result<Option<String>> {
    let size = image.size();
    let mut at = 0;
    while at < size {
        // Pieces overlap, so that a banner on a border is in one of them whole.
        let overlap = (BANNER.len() + LONGEST) as u64;
        let piece = image.read_exact(at, (PIECE + overlap).min(size - at))?;
        let mut from = 0;
        while let Some(index) = position(&piece[from..]) {
            let text = &piece[from + index + BANNER.len()..];
            let word: Vec<u8> = text.iter().copied().take(LONGEST).take_while(u8::is_ascii_graphic).collect();
            // The format string of the same message is somewhere as well.
            if word.first().is_some_and(u8::is_ascii_digit) {
                return Ok(String::from_utf8(word).ok());
            }
            from += index + BANNER.len();
        }
        at += PIECE;
    }
    Ok(None)
}

/// Horspool's search: most of the bytes are skipped, which matters for some 50 MiB.
fn position(bytes: &[u8]) -> Option<usize> {
    let last = BANNER.len() - 1;
    let mut skip = [BANNER.len(); 256];
    for (index, byte) in BANNER[..last].iter().enumerate() {
        skip[usize::from(*byte)] = last - index;
    }
    let mut at = 0;
    while let Some(window) = bytes.get(at..at + BANNER.len()) {
        if window == BANNER {
            return Some(at);
        }
        at += skip[usize::from(window[last])];
    }
    None
}

/// What a file that is no kernel seems to be.
pub(crate) fn describe(head: &[u8]) -> String {
    let at = |offset: usize, magic: &[u8]| head.get(offset..).is_some_and(|rest| rest.starts_with(magic));
    let known = [
        (0x38, &b"ARM\x64"[..], "a Linux kernel for ARM64"),
        (0x38, b"RSC\x05", "a Linux kernel for RISC-V"),
        (0, b"\x1f\x8b", "gzip data: an initrd, or something to unpack first"),
        (0, b"\xfd7zXZ", "xz data: an initrd, or something to unpack first"),
        (0, b"\x28\xb5\x2f\xfd", "zstd data: an initrd, or something to unpack first"),
        (0, b"07070", "a cpio archive: an initrd"),
        (0, b"MZ", "an EFI or DOS program without a Linux setup header"),
        (0, b"QFI\xfb", "a qcow2 disk image"),
        (0, b"!<arch>\n", "an archive, such as a Debian package"),
        (0, b"#!", "a script"),
        (0x8001, b"CD001", "an ISO 9660 image"),
        (0x1fe, b"\x55\xaa", "a boot sector or disk image"),
    ];
    if let Some((.., what)) = known.iter().find(|(offset, magic, _)| at(*offset, magic)) {
        return (*what).into();
    }
    match head {
        [] => "an empty file".into(),
        _ if head.iter().all(|byte| *byte == 0) => "zeros".into(),
        _ => format!("the bytes {:02x?}", &head[..head.len().min(8)]),
    }
}
