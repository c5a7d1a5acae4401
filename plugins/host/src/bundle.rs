//! Where plugins come from: a directory, a `.tenon` archive, or bytes that the program carries; and the places that are searched for them.
//!
//! A `.tenon` archive is a tar file with `plugin.toml` and `plugin.wasm` or `plugin.so`, or both, at its top. It is read into memory and never unpacked
//! to the disk. Its entries are regular files and directories with paths inside the archive; links and devices are refused, and
//! everything is bounded.

use std::borrow::Cow;
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};

use crate::files::{open_regular, quoted, read_bounded};
use crate::manifest::{Manifest, ManifestError, Version};

/// The largest `plugin.toml`.
const MAX_MANIFEST: u64 = 64 << 10;
/// The largest component or native library.
pub(crate) const MAX_CODE: u64 = 64 << 20;
/// The most entries in an archive.
const MAX_ENTRIES: usize = 1024;

/// A plugin's files, read but not yet loaded.
#[derive(Debug)]
pub struct Bundle {
    /// Where it came from, for messages.
    pub origin: String,
    /// What it says about itself.
    pub manifest: Manifest,
    /// The component.
    pub(crate) wasm: Option<Cow<'static, [u8]>>,
    /// The native library.
    pub(crate) native: Option<NativeFile>,
}

/// A native library, not yet loaded.
#[derive(Debug)]
pub(crate) enum NativeFile {
    /// A file of a plugin directory.
    Path(PathBuf),
    /// From an archive.
    Bytes(Vec<u8>),
}

/// A plugin that cannot be found or read.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// The manifest.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// A file cannot be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// The host's answer.
        source: std::io::Error,
    },
    /// The archive is not one that is accepted.
    #[error("{origin}: {what}")]
    Archive {
        /// The archive.
        origin: String,
        /// What is wrong with it.
        what: String,
    },
    /// The directory is no plugin's.
    #[error("{0}: there is no `plugin.toml` in this folder, so it is no plugin")]
    NoManifest(String),
    /// There is neither a component nor a library.
    #[error("{0}: there is neither `plugin.wasm` nor `plugin.so` beside `plugin.toml`")]
    Empty(String),
    /// No place has it.
    #[error("there is no plugin `{id}`; {known} (searched: {searched})")]
    Unknown {
        /// The id asked for, cut if it is long.
        id: String,
        /// The ids there are, or how to say that a path is meant, for people.
        known: String,
        /// The places.
        searched: String,
    },
}

impl Bundle {
    /// Reads a plugin directory or a `.tenon` archive.
    ///
    /// # Errors
    /// It cannot be read, or is not a plugin.
    pub fn open(path: &Path) -> Result<Self, BundleError> {
        if path.is_dir() { Self::directory(path) } else { Self::archive_file(path) }
    }

    /// A plugin that the program carries: the text of its `plugin.toml` and its component.
    ///
    /// # Errors
    /// The manifest is wrong.
    pub fn embedded(manifest: &str, wasm: impl Into<Cow<'static, [u8]>>) -> Result<Self, BundleError> {
        let manifest = Manifest::parse("embedded plugin.toml", manifest)?;
        let origin = format!("embedded plugin `{}`", manifest.id);
        Ok(Self { origin, manifest, wasm: Some(wasm.into()), native: None })
    }

    /// Whether there is a component, and whether there is a native library.
    #[must_use]
    pub fn forms(&self) -> (bool, bool) {
        (self.wasm.is_some(), self.native.is_some())
    }

    /// The component's bytes.
    #[must_use]
    pub fn component(&self) -> Option<&[u8]> {
        self.wasm.as_deref()
    }

    fn directory(path: &Path) -> Result<Self, BundleError> {
        let toml = path.join("plugin.toml");
        if !toml.exists() {
            return Err(BundleError::NoManifest(path.display().to_string()));
        }
        let text = read(&toml, MAX_MANIFEST)?;
        let manifest = parse_manifest(&toml.display().to_string(), text)?;
        let wasm = path.join("plugin.wasm");
        let wasm = if wasm.exists() { Some(read(&wasm, MAX_CODE)?.into()) } else { None };
        let native = Some(path.join("plugin.so")).filter(|path| path.exists()).map(NativeFile::Path);
        let origin = path.display().to_string();
        if wasm.is_none() && native.is_none() {
            return Err(BundleError::Empty(origin));
        }
        Ok(Self { origin, manifest, wasm, native })
    }

    fn archive_file(path: &Path) -> Result<Self, BundleError> {
        let origin = path.display().to_string();
        let file = open_regular(path).map_err(|source| BundleError::Io { path: origin.clone(), source })?;
        Self::archive(&origin, file)
    }

    /// Reads a `.tenon` archive from anything. `origin` names it in errors.
    ///
    /// # Errors
    /// It cannot be read, is not a plugin, or tries to reach outside itself.
    pub fn archive(origin: &str, input: impl Read) -> Result<Self, BundleError> {
        let wrong = |what: String| BundleError::Archive { origin: origin.to_owned(), what };
        // The reader's own words would repeat what is in the file, which may be any file.
        let no_archive = |error: io::Error| {
            wrong(match error.kind() {
                io::ErrorKind::UnexpectedEof => "this archive ends in the middle".into(),
                _ => "this is not a `.tenon` archive: a tar file with `plugin.toml` at its top".into(),
            })
        };
        // The whole input is bounded as well: a header may promise any size.
        let mut archive = tar::Archive::new(input.take(3 * MAX_CODE));
        let (mut manifest, mut wasm, mut native) = (None, None, None);
        let entries = archive.entries().map_err(no_archive)?;
        for (count, entry) in entries.enumerate() {
            let mut entry = entry.map_err(no_archive)?;
            if count >= MAX_ENTRIES {
                return Err(wrong(format!("there are more than {MAX_ENTRIES} entries")));
            }
            let path = entry.path().map_err(no_archive)?.into_owned();
            let shown = quoted(&path.to_string_lossy());
            if path.components().any(|part| !matches!(part, Component::Normal(_) | Component::CurDir)) {
                return Err(wrong(format!("the path `{shown}` leads outside the archive")));
            }
            match entry.header().entry_type() {
                tar::EntryType::Directory => continue,
                tar::EntryType::Regular => {}
                other => {
                    return Err(wrong(format!(
                        "`{shown}` is a {other:?}; only files and directories are accepted"
                    )));
                }
            }
            let name: PathBuf = path.components().filter(|part| *part != Component::CurDir).collect();
            let (slot, most) = match name.to_str() {
                Some("plugin.toml") => (&mut manifest, MAX_MANIFEST),
                Some("plugin.wasm") => (&mut wasm, MAX_CODE),
                Some("plugin.so") => (&mut native, MAX_CODE),
                _ => continue,
            };
            if slot.is_some() {
                return Err(wrong(format!("`{shown}` is there twice")));
            }
            let size = entry.size();
            if size > most {
                return Err(wrong(format!("`{shown}` has {size} bytes; at most {most} are accepted")));
            }
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).map_err(|e| wrong(format!("reading `{shown}`: {e}")))?;
            if bytes.len() as u64 != size {
                return Err(wrong(format!("`{shown}` ends in the middle")));
            }
            *slot = Some(bytes);
        }
        let Some(manifest) = manifest else {
            return Err(wrong("there is no `plugin.toml` in it".into()));
        };
        let manifest = parse_manifest(&format!("{origin}: plugin.toml"), manifest)?;
        if wasm.is_none() && native.is_none() {
            return Err(BundleError::Empty(origin.to_owned()));
        }
        Ok(Self {
            origin: origin.to_owned(),
            manifest,
            wasm: wasm.map(Cow::Owned),
            native: native.map(NativeFile::Bytes),
        })
    }
}

fn parse_manifest(origin: &str, bytes: Vec<u8>) -> Result<Manifest, BundleError> {
    let text = String::from_utf8(bytes)
        .map_err(|_| ManifestError { origin: origin.to_owned(), what: "this is not UTF-8 text".into() })?;
    Ok(Manifest::parse(origin, &text)?)
}

fn read(path: &Path, most: u64) -> Result<Vec<u8>, BundleError> {
    read_bounded(path, most).map_err(|source| BundleError::Io { path: path.display().to_string(), source })
}

/// What is in a directory: names and paths. Nothing, if it cannot be read.
fn files(directory: &Path) -> impl Iterator<Item = (String, PathBuf)> {
    let entries = directory.read_dir().into_iter().flatten().flatten();
    entries.map(|entry| (entry.file_name().to_string_lossy().into_owned(), entry.path()))
}

/// The id, and the version if there is one, of an archive's name: `ID.tenon` or `ID-VERSION.tenon`.
fn archive_id(name: &str) -> Option<(&str, Option<Version>)> {
    let name = name.strip_suffix(".tenon")?;
    let versioned = name.rsplit_once('-').and_then(|(id, version)| Some((id, Some(version.parse().ok()?))));
    Some(versioned.unwrap_or((name, None)))
}

/// The places where plugins are looked for: directories in their order, then what the program carries.
#[derive(Default)]
pub struct Catalog {
    directories: Vec<PathBuf>,
    carried: Vec<Carried>,
}

struct Carried {
    id: String,
    manifest: Cow<'static, str>,
    wasm: Cow<'static, [u8]>,
}

impl Catalog {
    /// No place.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a directory whose subdirectories and `.tenon` files are plugins: `ID`, `ID.tenon` or `ID-VERSION.tenon`. One that does not exist is no error.
    pub fn add_directory(&mut self, path: impl Into<PathBuf>) {
        self.directories.push(path.into());
    }

    /// Adds a plugin that the program carries.
    ///
    /// # Errors
    /// The manifest is wrong.
    pub fn add_embedded(
        &mut self,
        manifest: impl Into<Cow<'static, str>>,
        wasm: impl Into<Cow<'static, [u8]>>,
    ) -> Result<(), BundleError> {
        let (manifest, wasm) = (manifest.into(), wasm.into());
        let id = Manifest::parse("embedded plugin.toml", &manifest)?.id;
        self.carried.push(Carried { id, manifest, wasm });
        Ok(())
    }

    /// Finds a plugin by its id; what contains a `/` or ends in `.tenon` is a path instead.
    ///
    /// # Errors
    /// There is none, and the error lists those there are; or it cannot be read.
    pub fn find(&self, id: &str) -> Result<Bundle, BundleError> {
        if id.contains('/') || id.ends_with(".tenon") {
            return Bundle::open(Path::new(id));
        }
        // A name of a plugin and not of a folder's parent or of the folder itself.
        let directories = if matches!(id, "" | "." | "..") { &[] } else { &*self.directories };
        for directory in directories {
            if directory.join(id).join("plugin.toml").exists() {
                return Bundle::open(&directory.join(id));
            }
            let archives =
                files(directory).filter(|(name, _)| archive_id(name).is_some_and(|(found, _)| found == id));
            if let Some((_, path)) =
                archives.max_by_key(|(name, _)| archive_id(name).and_then(|(_, version)| version))
            {
                return Bundle::open(&path);
            }
        }
        if let Some(carried) = self.carried.iter().find(|carried| carried.id == id) {
            return Bundle::embedded(&carried.manifest, carried.wasm.clone());
        }
        let known = self.ids();
        let known = if !id.is_empty() && Path::new(id).exists() {
            format!("if you mean the one in this folder, write `./{id}`")
        } else if known.is_empty() {
            "there are none".into()
        } else {
            format!("there are `{}`", known.join("`, `"))
        };
        Err(BundleError::Unknown {
            id: quoted(id),
            known,
            searched: self
                .directories
                .iter()
                .map(|path| path.display().to_string())
                .chain((!self.carried.is_empty()).then(|| "the bundled plugins".to_owned()))
                .collect::<Vec<_>>()
                .join(", "),
        })
    }

    /// The ids of all plugins that can be found, sorted.
    #[must_use]
    pub fn ids(&self) -> Vec<String> {
        let mut ids: Vec<String> = self.carried.iter().map(|carried| carried.id.clone()).collect();
        for (name, path) in self.directories.iter().flat_map(|directory| files(directory)) {
            if path.join("plugin.toml").exists() {
                ids.push(name);
            } else if let Some((id, _)) = archive_id(&name) {
                ids.push(id.to_owned());
            }
        }
        ids.sort();
        ids.dedup();
        ids
    }

    /// Every plugin that can be found, in the order of the ids; or why it cannot be read.
    #[must_use]
    pub fn list(&self) -> Vec<(String, Result<Bundle, BundleError>)> {
        self.ids()
            .into_iter()
            .map(|id| {
                let bundle = self.find(&id);
                (id, bundle)
            })
            .collect()
    }
}
