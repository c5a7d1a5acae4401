//! Where things are kept: plugins and the cache.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use crate::args::PluginPlaces;

/// The folder for what can be made again, made if it is not there.
pub(crate) fn cache_dir() -> Result<PathBuf> {
    let base = match (non_empty("XDG_CACHE_HOME"), non_empty("HOME")) {
        (Some(cache), _) => cache,
        (None, Some(home)) => home.join(".cache"),
        (None, None) => bail!("neither XDG_CACHE_HOME nor HOME is set"),
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
    if let Some(data) = non_empty("XDG_DATA_HOME").or_else(|| Some(non_empty("HOME")?.join(".local/share"))) {
        dirs.push(data.join("tenon/plugins"));
    }
    dirs
}

fn non_empty(variable: &str) -> Option<PathBuf> {
    std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from)
}
