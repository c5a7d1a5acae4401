//! What a range of the disk has in the image, and so what a change to it frees.

use std::io;

use imago::ShallowMapping;

use crate::image::Access;

/// What a range has in the image.
#[derive(Clone, Copy, Default)]
pub(crate) struct There {
    /// Clusters that a write frees: compressed ones, and ones that are used elsewhere as well.
    pub(crate) shared: bool,
    /// Zero clusters, which may have a cluster of the file or not.
    pub(crate) zeroes: bool,
    /// Others.
    pub(crate) data: bool,
}

impl There {
    /// A discard frees them all.
    pub(crate) fn any(self) -> bool {
        self.shared || self.zeroes || self.data
    }
}

pub(crate) fn there(access: &Access, position: u64, length: u64) -> io::Result<There> {
    let end = position + length;
    let (mut at, mut there) = (position, There::default());
    while at < end {
        let (mapping, length) = access.get_shallow_mapping(at, end - at)?;
        match mapping {
            ShallowMapping::Special { .. } | ShallowMapping::Raw { writable: false, .. } => {
                there.shared = true
            }
            ShallowMapping::Raw { .. } => there.data = true,
            ShallowMapping::Zero { explicit: true, .. } => there.zeroes = true,
            _ => {}
        }
        if length == 0 {
            break;
        }
        at += length;
    }
    Ok(there)
}
