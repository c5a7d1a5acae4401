//! The web server that has the images of some tests: Debian's nginx, from its package. It is not installed, which would start it.

use std::fs::{self, File};
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::boot_disk::unpack;
use crate::{host, tree};

const NGINX: &str = "nginx";
/// Where the package has it.
const PLACE: &str = "usr/sbin/nginx";

/// Fetches the program, or takes it from the cache, and returns it.
///
/// # Errors
/// The package cannot be fetched.
pub(super) fn make(refresh: bool) -> Result<PathBuf> {
    let folder = tree::cache()?.join("guests/web");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let lock = File::create(folder.join(".lock"))?;
    lock.lock().context("cannot lock the web server's cache")?;
    let program = folder.join(NGINX);
    if refresh || !program.exists() {
        host::package_lists()?;
        eprintln!("guests: fetching {NGINX}");
        let scratch = tempfile::tempdir_in(&folder).context("cannot make a folder in the cache")?;
        fs::rename(unpack(scratch.path(), NGINX)?.join(PLACE), &program)
            .with_context(|| format!("cannot make {}", program.display()))?;
    }
    Ok(program)
}
