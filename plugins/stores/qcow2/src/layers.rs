//! Opens an image and the backing files that it was granted.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder};

use crate::ImageError;
use crate::header::Header;
use crate::image::{Access, Locks, Mode, open_file};
use crate::storage::ImageFile;

/// Opens an image whose header was checked, and what it stands on: each backing file takes its grant.
pub(crate) fn open_layer(
    path: &Path,
    file: File,
    header: &Header,
    mode: &Mode,
    grants: &mut Vec<(PathBuf, PathBuf)>,
    locked: &mut Locks,
) -> Result<Access, ImageError> {
    let backing = match &header.backing {
        None => None,
        Some(name) => Some(open_backing(path, name, header, mode, grants, locked)?),
    };
    let writable = mode.writable;
    let image = Qcow2::<ImageFile>::builder(ImageFile::new(path, file, writable, Some(header))?)
        .write(writable)
        .backing(backing)
        .data_file(None)
        .open(DenyImplicitOpenGate::default())?;
    Ok(FormatAccess::new(image))
}

fn open_backing(
    path: &Path,
    name: &str,
    header: &Header,
    mode: &Mode,
    grants: &mut Vec<(PathBuf, PathBuf)>,
    locked: &mut Locks,
) -> Result<Access, ImageError> {
    let image = path.display();
    let named = path.parent().unwrap_or(Path::new("")).join(name);
    let grant = fs::canonicalize(&named)
        .ok()
        .and_then(|named| grants.iter().position(|(_, granted)| *granted == named));
    let Some(grant) = grant else {
        return Err(ImageError::Backing(format!(
            "`{image}` stands on the backing file `{name}`, which is not granted; `backing={}` grants it, behind a `:` if another is granted",
            named.display()
        )));
    };
    let (_, path) = grants.remove(grant);
    let of =
        |error: ImageError| ImageError::Backing(format!("the backing file `{}`: {error}", path.display()));
    let mode = Mode { writable: false, lock: mode.lock, backing: Vec::new() };
    let file = open_file(&path, false, mode.lock, locked).map_err(of)?;
    match header.backing_format.as_deref() {
        Some("raw") => {
            let raw = ImageFile::new(&path, file, false, None)
                .and_then(|storage| Raw::builder(storage).open(DenyImplicitOpenGate::default()));
            Ok(FormatAccess::new(raw.map_err(|error| of(error.into()))?))
        }
        Some("qcow2") => {
            let header = Header::read(&file).and_then(|header| header.check(false).map(|()| header));
            open_layer(&path, file, &header.map_err(of)?, &mode, grants, locked)
        }
        // Guessing would let whoever writes a raw image name any file as its backing file.
        other => Err(ImageError::Backing(format!(
            "`{image}` stands on the backing file `{name}`, whose format it gives as `{}`, but must give as `raw` or `qcow2`: \
             `qemu-img rebase -u -F FORMAT -b {name} {image}` does",
            other.unwrap_or_default()
        ))),
    }
}
