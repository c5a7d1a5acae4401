//! Small file systems that fill up.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "several tests use it, and none uses all of it"
)]

use std::path::Path;
use std::process::Command;

/// A file system in memory.
pub struct Mounted(tempfile::TempDir);

impl Mounted {
    /// A `tmpfs` of this size, such as `2m`; none, with the reason said, where it cannot be mounted.
    pub fn tmpfs(size: &str) -> Option<Self> {
        Self::mount("tmpfs", &format!("size={size}"))
    }

    pub fn mount(kind: &str, options: &str) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let mut mount = Command::new("mount");
        let why = match mount.args(["-t", kind, "-o", options, "tenon-test"]).arg(folder.path()).output() {
            Ok(output) if output.status.success() => return Some(Self(folder)),
            Ok(output) => String::from_utf8_lossy(&output.stderr).into_owned(),
            Err(error) => error.to_string(),
        };
        println!("not run: mounting a {kind} needs root: {why}");
        None
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.path()).status();
    }
}
