//! `--vsock PATH[,cid=N]`: streams between programs of the guest and of this host.

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context, Result};
use tenon_plugins::UnixSocket;

use crate::args::PluginSpec;
use crate::disks::split_commas;

/// The plugin that shows a socket to the guest.
pub(crate) const VSOCK: &str = "virtio-vsock";
/// The name by which it asks for what is behind it.
pub(crate) const SOCKET: &str = "vsock";

/// A socket device as written on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct VsockSpec {
    path: PathBuf,
    /// The guest's context id: its default is the plugin's.
    cid: Option<u32>,
}

impl FromStr for VsockSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = split_commas(text).into_iter();
        let path = parts.next().filter(|path| !path.is_empty());
        let path = path.ok_or("the path of a Unix socket is missing; write PATH or PATH,cid=N")?.into();
        let mut cid = None;
        for part in parts {
            let Some(number) = part.strip_prefix("cid=").filter(|_| cid.is_none()) else {
                return Err(format!("`{part}` is not cid=N, or there are two of them"));
            };
            let right = number.parse().ok().filter(|cid| (3..u32::MAX).contains(cid));
            cid = Some(right.ok_or_else(|| format!("`{number}` is no guest's CID; write 3 to 4294967294"))?);
        }
        Ok(Self { path, cid })
    }
}

impl VsockSpec {
    /// The device.
    pub(crate) fn device(&self) -> PluginSpec {
        let cid = self.cid.map(|cid| ("cid".to_owned(), cid.to_string()));
        PluginSpec { plugin: VSOCK.into(), settings: cid.into_iter().collect() }
    }

    /// Listens at the path.
    pub(crate) fn open(&self) -> Result<Arc<UnixSocket>> {
        UnixSocket::open(&self.path).context("--vsock")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_may_be_followed_by_a_cid() {
        let spec = |text: &str| text.parse::<VsockSpec>();
        assert_eq!(spec("/run/vm.sock"), Ok(VsockSpec { path: "/run/vm.sock".into(), cid: None }));
        assert_eq!(spec("a,,b,cid=77"), Ok(VsockSpec { path: "a,b".into(), cid: Some(77) }));
        for text in ["", ",cid=3", "a,cid=2", "a,cid=4294967295", "a,cid=x", "a,cid=3,cid=4", "a,port=3"] {
            assert!(spec(text).is_err(), "{text} was accepted");
        }
    }
}
