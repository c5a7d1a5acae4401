//! Where things are.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use anyhow::{Context, Result};

/// The repository's root.
pub(crate) fn root() -> &'static Path {
    static XTASK: LazyLock<PathBuf> = LazyLock::new(|| {
        // Cargo names the folder when it runs this; a build folder that several clones share may hold a program that was built in another.
        std::env::var_os("CARGO_MANIFEST_DIR")
            .map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from)
    });
    XTASK.parent().unwrap_or(Path::new("."))
}

/// Cargo's target folder: the one that this program was built in.
///
/// # Errors
/// The program was moved out of a target folder.
pub(crate) fn target() -> Result<PathBuf> {
    let exe = std::env::current_exe().context("cannot find this program's own file")?;
    exe.parent()
        .and_then(Path::parent)
        .map(Path::to_path_buf)
        .with_context(|| format!("{} is not in a target folder", exe.display()))
}

/// Where built programs are: the `release` folder of the target folder.
///
/// # Errors
/// As [`target`].
pub(crate) fn release() -> Result<PathBuf> {
    Ok(target()?.join("release"))
}

/// The user's cache folder for what is expensive to make or to fetch.
///
/// # Errors
/// The environment names no home.
pub(crate) fn cache() -> Result<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME").filter(|value| !value.is_empty()) {
        Some(base) => PathBuf::from(base),
        None => PathBuf::from(std::env::var_os("HOME").context("neither XDG_CACHE_HOME nor HOME is set")?)
            .join(".cache"),
    };
    Ok(base.join("tenon"))
}
