//! From a [`Spec`] to the port that it describes.

use std::io;
use std::sync::Arc;

use tenon_core::NetworkPort;

use crate::pcap::Recorder;
use crate::socket::Cable;
use crate::spec::{Kind, NetworkError, Spec, local_mac};
use crate::tap::Tap;
use crate::user::{UserConfig, UserNetwork};

/// The longest packet if nothing is said.
const MTU: u16 = 1500;

/// Opens the network.
///
/// # Errors
/// The host does not give what it needs.
pub fn open(spec: &Spec) -> Result<Arc<dyn NetworkPort>, NetworkError> {
    let mac = spec.mac.unwrap_or_else(|| local_mac(&spec.name));
    let mtu = spec.mtu.unwrap_or(MTU);
    let port: Arc<dyn NetworkPort> = match &spec.kind {
        Kind::User { forwards, restrict, dns } => {
            let config = UserConfig { mac, mtu, forwards: forwards.clone(), restrict: *restrict, dns: *dns };
            UserNetwork::new(&config).map_err(|(what, error)| {
                let remedy = match error.kind() {
                    io::ErrorKind::AddrInUse => "choose another port, or end who listens there",
                    io::ErrorKind::PermissionDenied => "choose a port from 1024 on",
                    io::ErrorKind::AddrNotAvailable => "name an address that this host has",
                    _ => "see what limits this process",
                };
                NetworkError::new("user", format!("{what}: {error}"), remedy)
            })?
        }
        Kind::Tap { name } => Tap::open(name, mac, spec.mtu)?,
        Kind::Socket { path, listen } => Cable::open(path, *listen, mac, mtu)?,
    };
    let Some(path) = &spec.pcap else { return Ok(port) };
    let recorder = Recorder::new(port, path, spec.snaplen).map_err(|error| {
        NetworkError::new(
            "pcap",
            format!("{}: {error}", path.display()),
            "name a file that this user may write, in a folder that is there",
        )
    })?;
    Ok(recorder)
}
