//! What is done with images besides opening them as stores.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use imago::FormatCreateBuilder;
use imago::file::File;
use imago::format::PreallocateMode;
use imago::qcow2::Qcow2;

use crate::ImageError;
use crate::header::Header;
use crate::image::{Image, Mode, open_file};

/// How an image is made.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Bytes of a cluster, the unit in which space is taken: a power of two from 512 to 2 MiB.
    pub cluster_size: u32,
    /// What the image stands on.
    pub backing: Option<Backing>,
    /// Lays out all clusters at once, without writing them: the image does not grow any more.
    pub preallocate: bool,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self { cluster_size: 64 << 10, backing: None, preallocate: false }
    }
}

/// A backing file.
#[derive(Clone, Debug)]
pub struct Backing {
    /// Where it is. The image names it by its file name if it is in the same folder, else by its absolute path.
    pub path: PathBuf,
    /// Whether it is a qcow2 image; else it is raw.
    pub qcow2: bool,
}

/// What an image is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// The length of the disk in bytes.
    pub size: u64,
    /// Bytes that the image takes on the host.
    pub taken: u64,
    /// The format's version: 2 or 3.
    pub version: u32,
    /// Bytes of a cluster.
    pub cluster_size: u64,
    /// The backing file, as the image names it.
    pub backing: Option<String>,
    /// The backing file's format, as the image gives it.
    pub backing_format: Option<String>,
    /// How many internal snapshots it has.
    pub snapshots: u32,
    /// Why it cannot be opened as a store, if so.
    pub unusable: Option<String>,
}

/// Makes an image of `size` bytes; without, it is as long as its backing file. The file must not exist.
///
/// # Errors
/// The file exists or cannot be made, or an option is none that an image can have. Nothing is left behind.
pub fn create(path: &Path, size: Option<u64>, options: &CreateOptions) -> Result<(), ImageError> {
    if !options.cluster_size.is_power_of_two() || !(512..=2 << 20).contains(&options.cluster_size) {
        return Err(ImageError::Unsupported(format!(
            "a cluster of {} bytes cannot be; a power of two from 512 to 2 MiB can",
            options.cluster_size
        )));
    }
    let backing = options.backing.as_ref().map(|backing| describe(path, backing)).transpose()?;
    let Some(size) = size.or(backing.as_ref().map(|(_, size)| *size)) else {
        return Err(ImageError::Unsupported("it needs a size, or a backing file to take it from".into()));
    };
    if size == 0 || !size.is_multiple_of(512) || size > i64::MAX as u64 {
        return Err(ImageError::Unsupported(format!(
            "its length is {size} bytes, but must be a multiple of 512 and not 0"
        )));
    }
    if backing.is_some() && options.preallocate {
        return Err(ImageError::Unsupported(
            "an image that stands on a backing file cannot be preallocated".into(),
        ));
    }
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
    let made = (|| {
        let storage =
            File::from_open_file(file, imago::StorageOpenOptions::new().filename(path).write(true))?;
        let mut builder = Qcow2::<File>::create_builder(storage)
            .size(size)
            .cluster_size(options.cluster_size as usize)
            .preallocate(if options.preallocate {
                PreallocateMode::FormatAllocate
            } else {
                PreallocateMode::None
            });
        if let (Some((name, _)), Some(backing)) = (backing, &options.backing) {
            builder = builder.backing(name, if backing.qcow2 { "qcow2" } else { "raw" }.to_owned());
        }
        builder.create()
    })();
    made.map_err(|error: io::Error| {
        let _ = fs::remove_file(path);
        error.into()
    })
}

/// A backing file's name in an image's header, and its length as a disk.
fn describe(image: &Path, backing: &Backing) -> Result<(String, u64), ImageError> {
    let wrong = |error: ImageError| {
        ImageError::Backing(format!("the backing file `{}`: {error}", backing.path.display()))
    };
    let found = fs::canonicalize(&backing.path).map_err(|error| wrong(error.into()))?;
    let file = open_file(&found, false, false, &mut Vec::new()).map_err(wrong)?;
    let size = if backing.qcow2 {
        let header = Header::read(&file).map_err(wrong)?;
        header.check(false).map_err(wrong)?;
        header.size
    } else {
        file.metadata()?.len().next_multiple_of(512)
    };
    let folder = image.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let beside = fs::canonicalize(folder).ok().as_deref() == found.parent();
    let name = if beside { found.file_name().map(Path::new) } else { None }.unwrap_or(&found);
    match name.to_str() {
        Some(name) if name.len() <= 1023 => Ok((name.to_owned(), size)),
        _ => Err(wrong(ImageError::Unsupported("its name is over 1023 bytes, or no UTF-8".into()))),
    }
}

/// What an image is. Looks at the header only, also of an image that is in use.
///
/// # Errors
/// It is no qcow2 image, or cannot be read.
pub fn info(path: &Path) -> Result<Info, ImageError> {
    let file = open_file(path, false, false, &mut Vec::new())?;
    let header = Header::read(&file)?;
    Ok(Info {
        size: header.size,
        taken: file.metadata()?.blocks() * 512,
        version: header.version,
        cluster_size: header.cluster_size(),
        unusable: header.check(false).err().map(|why| why.to_string()),
        snapshots: header.snapshots,
        backing: header.backing,
        backing_format: header.backing_format,
    })
}

/// Changes the length of an image that nobody has open. Its backing files must be granted, as for a store.
///
/// # Errors
/// It cannot be opened, or cannot have this length.
pub fn resize(path: &Path, size: u64, backing: &[PathBuf]) -> Result<(), ImageError> {
    Image::open(path, &Mode { writable: true, lock: true, backing: backing.to_vec() })?.resize(size)
}
