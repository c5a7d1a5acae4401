//! Kernel modules for an initramfs: those wanted and all that they depend on, in an order in which they load.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// What a guest with virtio devices loads.
pub(super) const VIRTIO: [&str; 8] = [
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio-rng",
    "virtio_balloon",
    "virtiofs",
    "vmw_vsock_virtio_transport",
];

/// A module's name and its file.
pub(super) type Module = (String, Vec<u8>);

/// The modules and what they depend on, each after everything that it needs. What is built into the kernel is left out.
///
/// # Errors
/// There is no such module under `folder`, or a file is none.
pub(super) fn with_dependencies(folder: &Path, wanted: &[&str]) -> Result<Vec<Module>> {
    let mut files = BTreeMap::new();
    find(folder, &mut files)?;
    let mut modules = Vec::new();
    for name in wanted {
        add(name, &files, &mut modules)?;
    }
    Ok(modules)
}

/// A kernel takes `-` and `_` in a module's name for the same.
fn key(name: &str) -> String {
    name.replace('-', "_")
}

fn find(folder: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            find(&path, files)?;
        } else if let Some(name) = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".ko")) {
            files.insert(key(name), path);
        }
    }
    Ok(())
}

fn add(name: &str, files: &BTreeMap<String, PathBuf>, modules: &mut Vec<Module>) -> Result<()> {
    let name = key(name);
    if modules.iter().any(|(loaded, _)| *loaded == name) {
        return Ok(());
    }
    let file = files.get(&name).with_context(|| format!("the kernel's package has no module {name}"))?;
    let bytes = fs::read(file)?;
    for needed in depends(&bytes).with_context(|| format!("{} is no kernel module", file.display()))? {
        add(&needed, files, modules)?;
    }
    modules.push((name, bytes));
    Ok(())
}

/// The names in the module's `depends=` entry.
fn depends(module: &[u8]) -> Result<Vec<String>> {
    const ENTRY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(ENTRY.len()).position(|window| window == ENTRY) else {
        bail!("it has no `depends=` entry");
    };
    let names = module[at + ENTRY.len()..].split(|byte| *byte == 0).next().unwrap_or_default();
    let names = std::str::from_utf8(names).context("its `depends=` entry is no text")?;
    Ok(names.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_comes_after_those_that_it_needs() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("net")).unwrap();
        for (file, depends) in [("net/a-b.ko", "c,d"), ("c.ko", "d"), ("d.ko", "")] {
            let bytes = format!("ELF\0license=GPL\0depends={depends}\0name=x\0");
            fs::write(folder.path().join(file), bytes).unwrap();
        }
        let order: Vec<_> =
            with_dependencies(folder.path(), &["a-b"]).unwrap().into_iter().map(|(name, _)| name).collect();
        assert_eq!(order, ["d", "c", "a_b"]);
        assert!(with_dependencies(folder.path(), &["e"]).is_err());
    }
}
