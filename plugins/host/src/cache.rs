//! Compiled components on the disk, so that a warm start does not compile.
//!
//! A compiled component is machine code that this process will run, so a file is believed only when this user's earlier run can have written it:
//! each carries a keyed BLAKE3 tag over its key and its content, made with a random secret that only this user can read. A file whose tag does not match
//! is compiled again and replaced; it never reaches the deserializer. The check is on the bytes in memory that are then used, not on a file that may change.
//!
//! The key names the component (BLAKE3 of its bytes) and the engine (version, settings and CPU features, as wasmtime hashes them).

use std::fs::{DirBuilder, File, OpenOptions};
use std::hash::{Hash, Hasher};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

const TAG: usize = 32;
/// Entries beyond this number are removed, the oldest first.
const MAX_ENTRIES: usize = 256;
/// Larger files are not read.
const MAX_ENTRY: u64 = 1 << 30;

/// A directory of compiled components.
pub(crate) struct Cache {
    directory: PathBuf,
    secret: [u8; 32],
    engine: [u8; 32],
    counters: Counters,
}

#[derive(Default)]
struct Counters {
    hits: AtomicU64,
    misses: AtomicU64,
    refused: AtomicU64,
}

/// How the cache was used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheUse {
    /// Compiled code that was there.
    pub hits: u64,
    /// Components that had to be compiled.
    pub misses: u64,
    /// Files that were there but not ours, or damaged; each is a miss as well.
    pub refused: u64,
}

/// Feeds a `Hash` value to BLAKE3.
struct Digester(blake3::Hasher);

impl Hasher for Digester {
    fn write(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }
    fn finish(&self) -> u64 {
        0
    }
}

impl Cache {
    /// Opens the cache in `directory`, making it and its secret where they are missing.
    pub(crate) fn open(directory: &Path, engine: impl Hash) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        let secret = secret(&directory.join("secret"))?;
        let mut digester = Digester(blake3::Hasher::new());
        engine.hash(&mut digester);
        Ok(Self {
            directory: directory.to_owned(),
            secret,
            engine: *digester.0.finalize().as_bytes(),
            counters: Counters::default(),
        })
    }

    pub(crate) fn usage(&self) -> CacheUse {
        CacheUse {
            hits: self.counters.hits.load(Ordering::Relaxed),
            misses: self.counters.misses.load(Ordering::Relaxed),
            refused: self.counters.refused.load(Ordering::Relaxed),
        }
    }

    /// The key of the component with this digest.
    pub(crate) fn key(&self, digest: &[u8; 32]) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"tenon compiled component 1").update(digest).update(&self.engine);
        hasher.finalize()
    }

    fn path(&self, key: &blake3::Hash) -> PathBuf {
        self.directory.join(format!("{}.cwasm", key.to_hex()))
    }

    fn tag(&self, key: &blake3::Hash, code: &[u8]) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.secret);
        hasher.update(key.as_bytes()).update(code);
        hasher.finalize()
    }

    /// The compiled code under `key`, if there is any that was written with our secret.
    pub(crate) fn get(&self, key: &blake3::Hash) -> Option<Vec<u8>> {
        let path = self.path(key);
        let Ok(file) = File::open(&path) else {
            self.counters.misses.fetch_add(1, Ordering::Relaxed);
            return None;
        };
        let mut bytes = Vec::new();
        let size = file.metadata().map_or(0, |meta| meta.len()).min(MAX_ENTRY);
        bytes.reserve_exact(usize::try_from(size).unwrap_or(0));
        let read = file.take(MAX_ENTRY).read_to_end(&mut bytes);
        let authentic = read.is_ok() && bytes.len() > TAG && {
            let (code, tag) = bytes.split_at(bytes.len() - TAG);
            // `blake3::Hash` compares in constant time.
            tag.try_into().is_ok_and(|tag: [u8; TAG]| self.tag(key, code) == blake3::Hash::from(tag))
        };
        if !authentic {
            tracing::warn!(path = %path.display(), "a cached compiled plugin is damaged or not ours; compiling again");
            self.counters.refused.fetch_add(1, Ordering::Relaxed);
            self.counters.misses.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        self.counters.hits.fetch_add(1, Ordering::Relaxed);
        bytes.truncate(bytes.len() - TAG);
        Some(bytes)
    }

    /// Stores compiled code. A cache that cannot be written costs time and nothing else.
    pub(crate) fn put(&self, key: &blake3::Hash, code: &[u8]) {
        let write = || -> io::Result<()> {
            let mut file = tempfile::Builder::new().prefix("new-").tempfile_in(&self.directory)?;
            file.write_all(code)?;
            file.write_all(self.tag(key, code).as_bytes())?;
            file.persist(self.path(key))?;
            self.prune()
        };
        if let Err(error) = write() {
            tracing::warn!(directory = %self.directory.display(), %error, "a compiled plugin cannot be cached");
        }
    }

    fn prune(&self) -> io::Result<()> {
        let mut entries = Vec::new();
        for entry in self.directory.read_dir()?.flatten() {
            if entry.path().extension().is_some_and(|extension| extension == "cwasm") {
                entries.push((entry.metadata()?.modified()?, entry.path()));
            }
        }
        entries.sort();
        let surplus = entries.len().saturating_sub(MAX_ENTRIES);
        entries.iter().take(surplus).try_for_each(|(_, path)| std::fs::remove_file(path))
    }
}

/// The secret of this user: 32 random bytes in a file that only this user can read. A file that others can reach is not believed and is replaced.
fn secret(path: &Path) -> io::Result<[u8; 32]> {
    let no_follow = rustix::fs::OFlags::NOFOLLOW.bits().cast_signed();
    for _ in 0..4 {
        match OpenOptions::new().read(true).custom_flags(no_follow).open(path) {
            Ok(mut file) => {
                let meta = file.metadata()?;
                let ours = meta.uid() == rustix::process::geteuid().as_raw() && meta.mode() & 0o077 == 0;
                let mut secret = [0; 32];
                if ours && meta.len() == 32 {
                    file.read_exact(&mut secret)?;
                    return Ok(secret);
                }
                tracing::warn!(path = %path.display(), "the cache's secret can be reached by others or is damaged; making a new one");
                std::fs::remove_file(path)?;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let mut secret = [0; 32];
                File::open("/dev/urandom")?.read_exact(&mut secret)?;
                let directory = path.parent().unwrap_or(Path::new("."));
                // The file appears whole or not at all, and the first of several processes wins.
                let mut file = tempfile::Builder::new().prefix("new-").tempfile_in(directory)?;
                file.write_all(&secret)?;
                match file.persist_noclobber(path) {
                    Ok(_) => return Ok(secret),
                    Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => {}
                    Err(error) => return Err(error.error),
                }
            }
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::other("the cache's secret keeps changing"))
}
