//! What an image says about itself: the header, read before anything acts on it. The format is described in QEMU's `docs/interop/qcow2.rst`.

use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::ImageError;
use crate::mark::DIRTY;

const MAGIC: &[u8; 4] = b"QFI\xfb";
/// The extension that names the backing file's format.
const BACKING_FORMAT: u32 = 0xe279_2aca;
/// The extension that tells of bitmaps.
const BITMAPS: u32 = 0x2385_2875;
/// The longest name of a backing file.
const MOST_NAME: u32 = 1023;
/// The most bytes of a header with its extensions that are looked at.
const MOST_HEADER: u64 = 64 << 10;

/// The fields that matter here.
#[derive(Clone, Debug)]
pub(crate) struct Header {
    pub(crate) version: u32,
    pub(crate) cluster_bits: u32,
    pub(crate) size: u64,
    pub(crate) l1_size: u32,
    pub(crate) l1_offset: u64,
    pub(crate) refcount_offset: u64,
    pub(crate) refcount_clusters: u32,
    pub(crate) refcount_order: u32,
    pub(crate) snapshots: u32,
    pub(crate) bitmaps: bool,
    pub(crate) backing: Option<String>,
    pub(crate) backing_format: Option<String>,
    crypt: u32,
    incompatible: u64,
}

impl Header {
    pub(crate) fn read(file: &File) -> Result<Self, ImageError> {
        let damaged = |what: &str| ImageError::Damaged(what.to_owned());
        let length = file.metadata()?.len();
        let mut bytes = vec![0; usize::try_from(length.min(MOST_HEADER)).unwrap_or(0)];
        file.read_exact_at(&mut bytes, 0)?;
        if bytes.len() < 4 || &bytes[..4] != MAGIC {
            return Err(ImageError::NotQcow2);
        }
        let field = |offset: usize| -> Result<u32, ImageError> {
            let end = || damaged("it ends within its header");
            let field = bytes.get(offset..offset + 4).ok_or_else(end)?;
            Ok(field.iter().fold(0, |value, byte| value << 8 | u32::from(*byte)))
        };
        let wide =
            |offset| Ok::<_, ImageError>(u64::from(field(offset)?) << 32 | u64::from(field(offset + 4)?));
        let version = field(4)?;
        if !(2..=3).contains(&version) {
            return Err(ImageError::Unsupported(format!(
                "it has version {version}, but 2 and 3 are supported"
            )));
        }
        let mut header = Self {
            version,
            cluster_bits: field(20)?,
            size: wide(24)?,
            crypt: field(32)?,
            l1_size: field(36)?,
            l1_offset: wide(40)?,
            refcount_offset: wide(48)?,
            refcount_clusters: field(56)?,
            snapshots: field(60)?,
            incompatible: 0,
            refcount_order: 4,
            bitmaps: false,
            backing: None,
            backing_format: None,
        };
        if !(9..=21).contains(&header.cluster_bits) {
            return Err(damaged(&format!(
                "a cluster has 2^{} bytes, but 2^9 to 2^21 are possible",
                header.cluster_bits
            )));
        }
        if header.size > i64::MAX as u64 {
            return Err(damaged(&format!(
                "its length is {} bytes, which is more than there can be",
                header.size
            )));
        }
        let (name_offset, name_length) = (wide(8)?, field(16)?);
        if name_offset != 0 {
            let start = usize::try_from(name_offset).ok().filter(|_| name_length <= MOST_NAME);
            let name = start
                .and_then(|start| bytes.get(start..start.checked_add(name_length as usize)?))
                .ok_or_else(|| damaged("the backing file's name lies outside the header"))?;
            let name =
                std::str::from_utf8(name).map_err(|_| damaged("the backing file's name is no UTF-8"))?;
            header.backing = Some(name.to_owned());
        }
        if version == 3 {
            header.incompatible = wide(72)?;
            header.refcount_order = field(96)?;
            if header.refcount_order > 6 {
                return Err(damaged("a reference count has more than 64 bits"));
            }
            let mut at = field(100)? as usize;
            // An image without extensions may end here.
            while let (Ok(kind), Ok(length)) = (field(at), field(at + 4)) {
                let Some(data) = bytes.get(at + 8..(at + 8).saturating_add(length as usize)) else {
                    return Err(damaged("a header extension lies outside the header"));
                };
                match kind {
                    0 => break,
                    BACKING_FORMAT => {
                        header.backing_format = Some(String::from_utf8_lossy(data).into_owned())
                    }
                    BITMAPS => header.bitmaps = true,
                    _ => {}
                }
                at += 8 + data.len().next_multiple_of(8);
            }
        }
        Ok(header)
    }

    /// Whether the image can be used.
    pub(crate) fn check(&self, writable: bool) -> Result<(), ImageError> {
        const INCOMPATIBLE: [(u64, &str); 4] = [
            (2, "it is marked as corrupt: `qemu-img check -r all` may repair it"),
            (4, "it keeps its data in another file, which is not supported"),
            (
                8,
                "its compression is not zlib, which is the one supported: `qemu-img convert` makes one that is",
            ),
            (
                16,
                "it has extended L2 entries, which are not supported: `qemu-img convert` makes one that has none",
            ),
        ];
        if self.crypt != 0 {
            return Err(ImageError::Unsupported(
                "it is encrypted by itself: the store `crypt` is the way here".into(),
            ));
        }
        if let Some((_, why)) = INCOMPATIBLE.iter().find(|(bit, _)| self.incompatible & bit != 0) {
            return Err(ImageError::Unsupported((*why).to_owned()));
        }
        if self.incompatible & !u64::from(DIRTY) != 0 {
            return Err(ImageError::Unsupported(format!(
                "it needs features that are not known here ({:#x})",
                self.incompatible
            )));
        }
        if self.size == 0 || !self.size.is_multiple_of(512) {
            return Err(ImageError::Unsupported(format!(
                "its length is {} bytes, but must be a multiple of 512 and not 0",
                self.size
            )));
        }
        if writable && self.bitmaps {
            return Err(ImageError::Unsupported(
                "it has bitmaps, with which it can only be read: `readonly`, or `qemu-img bitmap --remove`"
                    .into(),
            ));
        }
        if writable && self.snapshots > 0 {
            return Err(ImageError::Unsupported(
                "it has internal snapshots, with which it can only be read: `readonly`, or `qemu-img snapshot -d`".into(),
            ));
        }
        Ok(())
    }

    pub(crate) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The clusters that a refcount block counts.
    pub(crate) fn counts_per_block(&self) -> u64 {
        (self.cluster_size() * 8) >> self.refcount_order
    }

    /// It is being written, or was not closed in good order: counts may be too low.
    pub(crate) fn dirty(&self) -> bool {
        self.incompatible & u64::from(DIRTY) != 0
    }
}
