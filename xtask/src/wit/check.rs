//! `cargo xtask wit-check`: every plugin that was built for the committed baseline still fits.
//!
//! wit/baseline holds the contract as it was at a release, one folder per version. A change that a plugin built against it would notice is an
//! error; a new function that the host offers, or a new interface, is not.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use wit_parser::{PackageId, Resolve};

use super::PACKAGES;
use crate::tree;

/// Checks the contract against every baseline.
///
/// # Errors
/// The contract is not compatible, or is no valid WIT.
pub(crate) fn run() -> Result<()> {
    let wit = tree::root().join("wit");
    let mut worlds = 0;
    let mut versions = Vec::new();
    for entry in fs::read_dir(wit.join("baseline")).context("the contract has no baseline")? {
        let baseline = entry?.path();
        for package in PACKAGES {
            if baseline.join(package).is_dir() {
                worlds += compare(&text(&baseline.join(package))?, &text(&wit.join(package))?).with_context(|| {
                    format!(
                        "wit/{package} is not compatible with {}: a plugin built for that version would not run; \
                         bring back what it needs, or raise the minor version and keep the old one beside it",
                        baseline.display()
                    )
                })?;
            }
        }
        versions.extend(baseline.file_name().map(|name| name.to_string_lossy().into_owned()));
    }
    if worlds == 0 {
        bail!("the baseline holds no world to compare with");
    }
    println!("wit-check: {worlds} worlds are compatible with {}", versions.join(", "));
    Ok(())
}

/// The text of a package, its files one after the other with one package line for all.
fn text(folder: &Path) -> Result<String> {
    let read = || format!("cannot read {}", folder.display());
    let mut files: Vec<_> = fs::read_dir(folder)
        .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect())
        .with_context(read)?;
    files.retain(|file: &PathBuf| file.extension().is_some_and(|extension| extension == "wit"));
    files.sort();
    let mut texts = Vec::new();
    for file in files {
        texts.push(fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?);
    }
    Ok(joined(&texts))
}

/// Joins the files of a package. A package line may stand in each of them, and a text has one.
fn joined(files: &[String]) -> String {
    let mut text = String::new();
    for line in files.iter().flat_map(|file| file.lines()) {
        if !line.starts_with("package ") || !text.contains("\npackage ") && !text.starts_with("package ") {
            text.push_str(line);
            text.push('\n');
        }
    }
    text
}

/// Compares all worlds of two texts of one package; returns how many.
fn compare(old: &str, new: &str) -> Result<usize> {
    let mut resolve = Resolve::default();
    let old = push(&mut resolve, old, "0.0.1")?;
    let new = push(&mut resolve, new, "0.0.2")?;
    let worlds = resolve.packages[old].worlds.clone();
    for (name, old) in &worlds {
        let new =
            *resolve.packages[new].worlds.get(name).with_context(|| format!("world `{name}` is gone"))?;
        wit_component::semver_check(resolve.clone(), *old, new).with_context(|| format!("world `{name}`"))?;
    }
    Ok(worlds.len())
}

/// Parses a package under another version, so that two of them fit into one `Resolve`. The comparison leaves versions aside.
fn push(resolve: &mut Resolve, text: &str, version: &str) -> Result<PackageId> {
    let line = text.lines().find(|line| line.starts_with("package ")).context("no package line")?;
    let (name, _) = line.split_once('@').context("the package has no version")?;
    resolve.push_str("contract.wit", &text.replacen(line, &format!("{name}@{version};"), 1))
}

#[cfg(test)]
mod tests {
    use super::{compare, joined};

    const OLD: &str = "package a:b@0.1.0;\ninterface host { f: func(x: u32) -> u32; }\ninterface plugin { go: func(); }\nworld w { import host; export plugin; }\n";

    #[test]
    fn a_new_host_function_is_compatible() {
        let new = OLD.replace("f: func", "g: func(); f: func");
        assert_eq!(compare(OLD, &new).unwrap(), 1);
    }

    #[test]
    fn a_changed_parameter_is_not() {
        assert!(compare(OLD, &OLD.replace("x: u32", "x: u64")).is_err());
    }

    #[test]
    fn a_new_duty_of_the_plugin_is_not() {
        assert!(compare(OLD, &OLD.replace("go: func();", "go: func(); stop: func();")).is_err());
    }

    #[test]
    fn a_world_that_is_gone_is_not() {
        assert!(compare(OLD, &OLD.replace("world w", "world v")).is_err());
    }

    #[test]
    fn a_package_of_several_files_is_compared_as_one() {
        let more = "/// More words.\npackage a:b@0.1.0;\ninterface more { use host.{n}; }\n";
        let first = OLD.replace("interface host {", "interface host { type n = u8;");
        let new = joined(&[first, more.to_owned()]);
        assert_eq!(compare(OLD, &new).unwrap(), 1);
    }
}
