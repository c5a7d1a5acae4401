//! Where things are kept: plugins, the cache, and files that are written.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::OFlags;

use crate::args::PluginPlaces;

/// The folder for what can be made again, made if it is not there.
pub(crate) fn cache_dir() -> Result<PathBuf> {
    let base = match (absolute("XDG_CACHE_HOME"), non_empty("HOME")) {
        (Some(cache), _) => cache,
        (None, Some(home)) => home.join(".cache"),
        (None, None) => bail!("neither HOME nor XDG_CACHE_HOME, as an absolute path, is set"),
    };
    let dir = base.join("tenon");
    std::fs::create_dir_all(&dir).with_context(|| format!("`{}` cannot be made", dir.display()))?;
    Ok(dir)
}

/// The folders in which plugins are looked for, in order.
pub(crate) fn plugin_dirs(places: &PluginPlaces) -> Vec<PathBuf> {
    let mut dirs = places.dirs.clone();
    if let Some(path) = std::env::var_os("TENON_PLUGIN_PATH") {
        dirs.extend(std::env::split_paths(&path).filter(|dir| !dir.as_os_str().is_empty()));
    }
    if let Some(dir) = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join("plugins"))) {
        dirs.push(dir);
    }
    if let Some(data) = absolute("XDG_DATA_HOME").or_else(|| Some(non_empty("HOME")?.join(".local/share"))) {
        dirs.push(data.join("tenon/plugins"));
    }
    dirs
}

/// Makes a file, or empties it, to write to it. It does not wait, as it would for the reader of a FIFO.
pub(crate) fn create(path: &Path) -> io::Result<File> {
    let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed();
    let opened = OpenOptions::new().write(true).create(true).truncate(true).custom_flags(flags).open(path);
    let file = opened.map_err(|error| match error.raw_os_error() {
        Some(libc::ENXIO) => io::Error::other("nobody is at its other end; a FIFO needs its reader first"),
        _ => error,
    })?;
    rustix::io::ioctl_fionbio(&file, false)?;
    Ok(file)
}

/// A folder of the XDG base directory specification, which says that relative ones are to be ignored.
fn absolute(variable: &str) -> Option<PathBuf> {
    non_empty(variable).filter(|path| path.is_absolute())
}

fn non_empty(variable: &str) -> Option<PathBuf> {
    std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from)
}
