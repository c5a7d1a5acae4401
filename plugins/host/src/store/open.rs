//! Opens a store of a plugin.

use std::collections::BTreeSet;
use std::sync::Arc;

use tenon_abi::DeviceError;

use super::component::{Component, OpenFailure, Recipe};
use super::connections::Connections;
use super::native::NativeStore;
use super::services::StoreServices;
use super::{Medium, Shared, Store};
use crate::fault::Fault;
use crate::manifest::SettingError;
use crate::plugin::{Code, Plugin};
use crate::services::LogLimit;

/// What an administrator lets a store reach.
#[derive(Clone, Debug, Default)]
pub struct StoreGrants {
    hosts: BTreeSet<(String, u16)>,
}

impl StoreGrants {
    /// Nothing.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }

    /// Lets it connect to this host, by this name only, at this port.
    #[must_use]
    pub fn allow_host(mut self, host: &str, port: u16) -> Self {
        self.hosts.insert((host.to_ascii_lowercase(), port));
        self
    }
}

/// A store that cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The plugin is something else.
    #[error("`{plugin}` is a {kind}, not a store")]
    NotAStore {
        /// The plugin's id.
        plugin: String,
        /// What it is.
        kind: crate::Kind,
    },
    /// A setting.
    #[error(transparent)]
    Setting(#[from] SettingError),
    /// The plugin refused.
    #[error("store `{store}`: `{call}` refused: {error}")]
    Refused {
        /// The store's name.
        store: String,
        /// The call.
        call: &'static str,
        /// The plugin's words.
        error: DeviceError,
    },
    /// The plugin did not return, or gave what it must not.
    #[error("store `{store}`: `{call}` failed: {fault}")]
    Fault {
        /// The store's name.
        store: String,
        /// The call.
        call: &'static str,
        /// What it did.
        fault: Fault,
    },
    /// The host gives no thread.
    #[error("store `{store}`: starting its thread: {error}")]
    Thread {
        /// The store's name.
        store: String,
        /// Why.
        error: std::io::Error,
    },
}

impl Plugin {
    /// Opens a store of this plugin under `name`, standing on the stores `lower`.
    ///
    /// # Errors
    /// The plugin is no store, a setting is wrong, or the plugin refuses or fails.
    pub fn open_store(
        self: &Arc<Self>,
        name: &str,
        settings: &[(String, String)],
        lower: Vec<Arc<Store>>,
        grants: &StoreGrants,
    ) -> Result<Arc<Store>, OpenError> {
        let kind = self.manifest.kind;
        let no_store = || OpenError::NotAStore { plugin: self.manifest.id.clone(), kind };
        let shared = Shared::new(name);
        let (service_name, hosts) = (name.to_owned(), grants.hosts.clone());
        let (lowers, cut) = (lower.clone(), shared.cut.clone());
        let services = move || StoreServices {
            name: service_name.clone(),
            lowers: lower.clone(),
            connections: Connections::new(hosts.clone(), cut.clone()),
            cut: cut.clone(),
            log: LogLimit::new(),
        };
        let opened: Result<(Box<dyn Medium>, _), OpenFailure> = match &self.code {
            Code::Store(pre) => {
                let settings = self.manifest.settings(settings)?;
                let recipe = Recipe { plugin: self.clone(), settings, services: Box::new(services) };
                Component::open(recipe, pre.clone(), &shared)
                    .map(|(medium, info)| (Box::new(medium) as _, info))
            }
            Code::Native(native) => {
                let table = native.store().ok_or_else(no_store)?;
                let settings = self.manifest.settings(settings)?;
                NativeStore::open(native, table, &settings, services(), &shared)
                    .map(|(medium, info)| (Box::new(medium) as _, info))
            }
            _ => return Err(no_store()),
        };
        let store = || name.to_owned();
        let (medium, info) = opened.map_err(|failure| match failure {
            OpenFailure::Refused(call, error) => OpenError::Refused { store: store(), call, error },
            OpenFailure::Fault(call, fault) => OpenError::Fault { store: store(), call, fault },
            OpenFailure::Thread(error) => OpenError::Thread { store: store(), error },
        })?;
        Ok(Store::on(shared, info, medium, lowers))
    }
}
