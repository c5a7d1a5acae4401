//! The bare guests: a cargo workspace of their own, for a target without an operating system.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::process::{cargo, run};
use crate::tree;

const TARGET: &str = "x86_64-unknown-none";

/// Builds every bare guest, and returns the ELF files.
///
/// # Errors
/// A guest does not build.
pub(crate) fn build() -> Result<Vec<PathBuf>> {
    let source = tree::root().join("tests/guests");
    let target = tree::target()?.join("guests");
    run(cargo()
        .current_dir(&source)
        .args(["build", "--quiet", "--release", "--locked", "--target", TARGET, "--target-dir"])
        .arg(&target))?;
    let built = target.join(TARGET).join("release");
    let mut guests = Vec::new();
    for entry in fs::read_dir(source.join("src/bin"))? {
        let entry = entry?.path();
        let name = entry.file_stem().context("a guest without a name")?;
        guests.push(built.join(name));
    }
    guests.sort();
    Ok(guests)
}
