//! `cargo xtask lint`: formatting and clippy, for the workspace and for the workspaces beside it.

use anyhow::Result;

use crate::process::{cargo, run};
use crate::{host, plugins, tree};

/// Checks all.
///
/// # Errors
/// Something is not as it should be.
pub(crate) fn run_all() -> Result<()> {
    host::prepare()?;
    format()?;
    clippy()
}

/// Checks formatting.
///
/// # Errors
/// A file is not formatted.
pub(crate) fn format() -> Result<()> {
    run(cargo().args(["fmt", "--all", "--check"]))?;
    run(cargo().current_dir(tree::root().join("tests/guests")).args(["fmt", "--check"]))?;
    for example in plugins::in_folder(&tree::root().join("plugin-examples"))? {
        run(cargo().current_dir(example).args(["fmt", "--check"]))?;
    }
    Ok(())
}

/// Runs clippy; every warning is an error.
///
/// # Errors
/// There is a warning.
pub(crate) fn clippy() -> Result<()> {
    run(cargo()
        .args(["clippy", "--quiet", "--release", "--workspace", "--all-targets", "--target-dir"])
        .arg(tree::target()?)
        .args(["--", "--deny", "warnings"]))
}
