//! Checks an image: whether every cluster that is used is counted as often as it is used.

use std::io;
use std::path::Path;

use crate::ImageError;
use crate::books::{Books, Report};
use crate::header::Header;
use crate::image::{Locks, open_file};

/// Checks an image that nobody is writing, and writes nothing. What opening the image for writing would put right is an error here.
///
/// # Errors
/// It is no qcow2 image, has what is not supported, is in use, or cannot be read.
pub fn check(path: &Path) -> Result<Report, ImageError> {
    let mut held = Locks::default();
    let file = open_file(path, false, true, &mut held)?;
    let header = Header::read(&file)?;
    header.check(false)?;
    if header.snapshots > 0 || header.bitmaps {
        return Err(ImageError::Unsupported(
            "it has internal snapshots or bitmaps, which are not checked: `qemu-img check` does".into(),
        ));
    }
    let mut books = Books::read(&file, &header, false)?;
    books.report.unclean = header.dirty();
    compare(&mut books, &header)?;
    Ok(books.report)
}

/// Compares uses with refcounts.
fn compare(books: &mut Books<'_>, header: &Header) -> io::Result<()> {
    let per_block = usize::try_from(header.counts_per_block()).unwrap_or(usize::MAX);
    let used = std::mem::take(&mut books.used);
    let mut cluster = 0_u64;
    for (block, used) in used.chunks(per_block).enumerate() {
        let counts = books.counts(books.blocks.get(block).copied().unwrap_or(0))?;
        for (index, uses) in used.iter().enumerate() {
            let (counted, count) = (counts.get(index), u64::from(uses.count()));
            if uses.overlap() {
                books.report.fault(|| format!("cluster {cluster} is used {count} times, but can be once"));
            }
            if counted > count {
                books.report.leaks += 1;
            }
            if counted < count {
                let what = || format!("cluster {cluster} is used {count} times and counted {counted} times");
                books.report.fault(what);
            } else if counted != 1 && uses.only() {
                books.report.fault(|| {
                    format!("cluster {cluster} is said to be used once, but is counted {counted} times")
                });
            } else if counted == 1 && uses.shared() {
                books.report.fault(|| {
                    format!("cluster {cluster} is used and counted once, but its entry does not say so")
                });
            }
            cluster += 1;
        }
    }
    Ok(())
}
