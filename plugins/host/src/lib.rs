//! The plugin host: load, permit, limit, watch and restart plugins.
//!
//! ```no_run
//! use std::path::Path;
//! use tenon_plugins::{Catalog, Grants, Host};
//! # fn machine() -> tenon_plugins::MachineParts { unimplemented!() }
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let parts = machine();
//! let host = Host::new(Some(Path::new("/home/me/.cache/tenon")))?; // One for the process.
//! let mut catalog = Catalog::new();
//! catalog.add_directory("/usr/lib/tenon/plugins");
//! let plugin = host.load(catalog.find("serial")?, &Grants::none())?;
//! let serial = plugin.attach("serial0", &[("base".into(), "0x3f8".into())], &parts)?;
//! if let Some(console) = serial.channel("console") {
//!     console.set_sink(|bytes| print!("{}", String::from_utf8_lossy(bytes)))?;
//!     console.push(b"root\n");
//! }
//! # Ok(())
//! # }
//! ```
//!
//! | what | where |
//! | --- | --- |
//! | a plugin's files, and the places that are searched | [`Bundle`], [`Catalog`] |
//! | what a plugin says about itself, and its settings | [`Manifest`] |
//! | the engine, the compiler and its cache | [`Host`] |
//! | the check against the contract and the permissions | [`Host::load`], [`Misfit`] |
//! | a device in a machine, and how it is kept alive | [`Plugin::attach`], [`Device`] |
//! | a virtio device, for a transport to drive | [`Plugin::attach_virtio`], [`VirtioDevice`] |
//! | a backing store | [`Plugin::open_store`], [`Store`] |
//! | programs of the host that a device exchanges streams with | [`UnixSocket`] |
//! | native code that is part of the program | [`Host::builtin`] |
//! | its console and other byte streams | [`ChannelEnd`] |
//! | a guest's images put into memory | [`Plugin::load_guest`] |
//!
//! A component runs in a sandbox: its own memory, a deadline for each call, limits of memory, handles and host calls, and no import that its
//! manifest does not name. Native code runs only where [`Grants::allow_native`] names it. Whatever a plugin does, the machine goes on.
//!
//! The contract's records come from `tenon-abi`, reexported as [`abi`].

mod bindings;
mod bundle;
mod cache;
mod channel;
mod contract;
mod device;
mod fault;
mod files;
mod guest;
mod host;
mod instance;
mod manifest;
mod native;
mod plugin;
mod services;
mod sockets;
mod store;
mod supervise;
mod virtio;
mod wasm;

pub use bundle::{Bundle, BundleError, Catalog};
pub use cache::CacheUse;
pub use channel::{CHANNEL_CAPACITY, ChannelEnd};
pub use contract::{Import, Misfit};
pub use device::{AttachError, Device, MachineParts};
pub use fault::Fault;
pub use files::read_bounded;
pub use guest::{Boot, GuestError, Image};
pub use host::{Host, HostError};
pub use manifest::{
    FailurePolicy, HOST_API, Kind, Limits, Manifest, ManifestError, SettingError, SettingSchema, SettingType,
    Version,
};
pub use native::NativeError;
pub use plugin::{Grants, LoadError, LoadProblem, Plugin};
pub use sockets::{SocketError, UnixSocket};
pub use store::{
    Completed, Data, MAX_TRANSFER, OpenError, Operation, OperationKind, Outcome, Store, StoreGrants, StoreUse,
};
pub use supervise::{DeviceUse, Status};
pub use tenon_abi as abi;
pub use virtio::{VirtioDevice, VirtioParts, VirtioUse};
