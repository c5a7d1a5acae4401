//! `cargo xtask build`: the tenon command, and the bundled plugins where it looks for them: `plugins/ID` beside it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tenon_plugin_tool::{BuildOptions, Built};

use crate::process::{cargo, run};
use crate::{host, tree};

/// Where bundled plugins are kept in the repository.
const SHELVES: [&str; 3] = ["devices", "plugins/personalities", "plugins/stores"];

/// Native stores: they are part of the command, and no components.
const LINKED: [&str; 4] =
    ["plugins/stores/file", "plugins/stores/memory", "plugins/stores/null", "plugins/stores/qcow2"];

/// Builds the command and every bundled plugin; returns the command.
///
/// # Errors
/// Something does not build.
pub(crate) fn build_all() -> Result<PathBuf> {
    host::prepare()?;
    build_command()?;
    for plugin in build_bundled()? {
        println!("{} {}: {}", plugin.id, plugin.version, plugin.directory.display());
    }
    let tenon = tree::release()?.join("tenon");
    println!("{}", tenon.display());
    Ok(tenon)
}

/// Builds the tenon command, and with it all of the workspace: cargo resolves features by what is built together, and tests shall not compile
/// wasmtime again.
///
/// # Errors
/// It does not build.
pub(crate) fn build_command() -> Result<()> {
    run(cargo()
        .args(["build", "--release", "--workspace", "--all-targets", "--target-dir"])
        .arg(tree::target()?))
}

/// Builds every bundled plugin, as a component and as a native library.
///
/// # Errors
/// One does not build.
pub(crate) fn build_bundled() -> Result<Vec<Built>> {
    build_each(&bundled()?, &tree::release()?.join("plugins"), true)
}

/// Builds the plugins that misbehave, for whole-system tests.
///
/// # Errors
/// One does not build.
pub(crate) fn build_misbehaving() -> Result<Vec<Built>> {
    let fixtures = in_folder(&tree::root().join("plugins/host/tests/fixtures"))?;
    build_each(&fixtures, &tree::target()?.join("test-plugins"), false)
}

fn build_each(folders: &[PathBuf], output: &Path, native: bool) -> Result<Vec<Built>> {
    let options = BuildOptions {
        output: Some(output.to_path_buf()),
        target_dir: Some(tree::target()?),
        native,
        archive: false,
        quiet: true,
    };
    folders
        .iter()
        .map(|folder| {
            tenon_plugin_tool::build(folder, &options)
                .with_context(|| format!("cannot build {}", folder.display()))
        })
        .collect()
}

/// The folders of all bundled plugins.
fn bundled() -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for shelf in SHELVES {
        let shelf = tree::root().join(shelf);
        if shelf.is_dir() {
            found.extend(in_folder(&shelf)?);
        }
    }
    found.retain(|folder| !LINKED.iter().any(|linked| folder.ends_with(linked)));
    found.sort();
    Ok(found)
}

/// The folders in `folder` that hold a plugin.
///
/// # Errors
/// The folder cannot be read.
pub(crate) fn in_folder(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let path = entry?.path();
        if path.join("plugin.toml").is_file() {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}
