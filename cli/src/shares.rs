//! `--share DIR[,tag=NAME][,ro]`: a folder of the host that the guest mounts by its tag.

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use tenon_folder::Root;

use crate::Usage;
use crate::disks::split_commas;

/// The plugin that shows a folder to the guest.
pub(crate) const FOLDER: &str = "virtio-fs";
/// The name by which it asks for the folder.
pub(crate) const FOLDER_NAME: &str = "share";

/// A folder as written on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ShareSpec {
    path: PathBuf,
    tag: Option<String>,
    read_only: bool,
}

impl FromStr for ShareSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = split_commas(text).into_iter();
        let path = parts.next().unwrap_or_default();
        if path.is_empty() {
            return Err("the folder is missing; write DIR, DIR,ro or DIR,tag=NAME".into());
        }
        let mut spec = Self { path: path.into(), tag: None, read_only: false };
        for part in parts {
            match part.split_once('=') {
                Some(("tag", tag)) if spec.tag.is_none() => spec.tag = Some(tag.to_owned()),
                None if part == "ro" => spec.read_only = true,
                _ => return Err(format!("`{part}` is neither `tag=NAME`, once, nor `ro`")),
            }
        }
        Ok(spec)
    }
}

impl ShareSpec {
    /// Takes the folder.
    ///
    /// # Errors
    /// It is not there, or cannot be shared.
    pub(crate) fn open(&self) -> Result<Arc<Root>> {
        tenon_folder::raise_open_files();
        Root::open(&self.path, self.read_only)
            .with_context(|| format!("--share {}: the folder cannot be shared", self.path.display()))
    }
}

/// The shares with the tags by which the guest mounts them: those that were named, else `share`, `share1` and so on by their place on the command line.
///
/// # Errors
/// Two have the same.
pub(crate) fn tags(specs: &[ShareSpec]) -> Result<Vec<(&ShareSpec, String)>> {
    let mut all: Vec<(&ShareSpec, String)> = Vec::new();
    for (n, spec) in specs.iter().enumerate() {
        let usual = || if n == 0 { "share".to_owned() } else { format!("share{n}") };
        let tag = spec.tag.clone().unwrap_or_else(usual);
        if let Some((other, _)) = all.iter().find(|(_, taken)| *taken == tag) {
            bail!(Usage(anyhow!(
                "--share {}: the tag `{tag}` is that of {}; name another by tag=NAME",
                spec.path.display(),
                other.path.display()
            )));
        }
        all.push((spec, tag));
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tagged(texts: &[&str]) -> Result<Vec<String>> {
        let specs: Vec<ShareSpec> = texts.iter().map(|text| text.parse().unwrap()).collect();
        Ok(tags(&specs)?.into_iter().map(|(_, tag)| tag).collect())
    }

    #[test]
    fn a_share_is_a_folder_with_a_tag() {
        let spec: ShareSpec = "/a,,b,ro,tag=x".parse().unwrap();
        assert_eq!(spec, ShareSpec { path: "/a,b".into(), tag: Some("x".into()), read_only: true });
        for text in ["", ",ro", "/a,rw", "/a,ro=1", "/a,tag=x,tag=y", "/a,"] {
            assert!(text.parse::<ShareSpec>().is_err(), "{text} was accepted");
        }
    }

    #[test]
    fn tags_are_made_up_and_never_twice_the_same() {
        assert_eq!(tagged(&["/a", "/b", "/c,tag=home"]).unwrap(), ["share", "share1", "home"]);
        let twice = tagged(&["/a", "/b,tag=share"]).unwrap_err().to_string();
        assert!(twice.contains("`share`") && twice.contains("/a"), "{twice}");
    }
}
