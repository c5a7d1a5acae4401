//! The cache of compiled plugins.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tenon_plugins::{CacheUse, Grants, Host};

use crate::machine::misdeed_bundle;

fn load(directory: &Path) -> CacheUse {
    let host: Arc<Host> = Host::new(Some(directory)).unwrap();
    host.load(misdeed_bundle(), &Grants::none()).unwrap();
    host.cache_use()
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    let entries = directory.read_dir().unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.extension().is_some_and(|extension| extension == "cwasm")).collect()
}

const COLD: CacheUse = CacheUse { hits: 0, misses: 1, refused: 0 };
const WARM: CacheUse = CacheUse { hits: 1, misses: 0, refused: 0 };
const FORGED: CacheUse = CacheUse { hits: 0, misses: 1, refused: 1 };

#[test]
fn the_second_start_does_not_compile() {
    let directory = tempfile::tempdir().unwrap();
    assert_eq!(load(directory.path()), COLD);
    assert_eq!(load(directory.path()), WARM);
    assert_eq!(entries(directory.path()).len(), 1);
}

#[test]
fn a_forged_or_damaged_entry_is_refused_and_made_anew() {
    let directory = tempfile::tempdir().unwrap();
    load(directory.path());
    let entry = entries(directory.path()).remove(0);
    let good = std::fs::read(&entry).unwrap();
    let mut flipped = good.clone();
    flipped[good.len() / 2] ^= 1;
    // An entry that somebody with another secret wrote, under the right name.
    let other = tempfile::tempdir().unwrap();
    load(other.path());
    let foreign = std::fs::read(entries(other.path()).remove(0)).unwrap();
    assert_eq!(foreign.len(), good.len());
    for forged in [flipped, foreign, good[..good.len() - 1].to_vec(), Vec::new()] {
        std::fs::write(&entry, forged).unwrap();
        assert_eq!(load(directory.path()), FORGED);
        assert_eq!(load(directory.path()), WARM, "it was made anew");
    }
}

#[test]
fn a_secret_that_others_can_read_is_replaced() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    load(directory.path());
    let secret = directory.path().join("secret");
    assert_eq!(std::fs::metadata(&secret).unwrap().permissions().mode() & 0o777, 0o600);
    std::fs::set_permissions(&secret, PermissionsExt::from_mode(0o644)).unwrap();
    assert_eq!(load(directory.path()), FORGED, "what the old secret has tagged is not believed");
    assert_eq!(std::fs::metadata(&secret).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn a_cache_that_cannot_be_used_costs_time_and_nothing_else() {
    let file = tempfile::NamedTempFile::new().unwrap();
    assert_eq!(load(file.path()), CacheUse::default());
}
