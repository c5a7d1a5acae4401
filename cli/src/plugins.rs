//! The plugins of a machine: found and loaded; and the personality.

use std::sync::{Arc, OnceLock};

use anyhow::{Result, anyhow};
use serde::Serialize;
use tenon_abi::{Machine as MachineDescription, MemoryKind, MemoryRange, PersonalityError};
use tenon_core::Ram;
use tenon_plugins::{
    Boot, Bundle, BundleError, Catalog, Grants, GuestError, Host, Image, Kind, Manifest, Plugin,
};

use crate::Usage;
use crate::args::{PluginPlaces, PluginSpec};
use crate::devices::Usages;
use crate::places;
use crate::say::explain;

/// The plugins that are part of this program: their ids, code and manifests. A manifest is read when its plugin is asked for.
const BUILT_IN: [(&str, &tenon_abi::Plugin, &str); 4] = [
    ("file", &tenon_store_file::PLUGIN, tenon_store_file::MANIFEST),
    ("memory", &tenon_store_memory::PLUGIN, tenon_store_memory::MANIFEST),
    ("null", &tenon_store_null::PLUGIN, tenon_store_null::MANIFEST),
    ("qcow2", &tenon_store_qcow2::PLUGIN, tenon_store_qcow2::MANIFEST),
];

/// Where a plugin is said to come from that is part of this program, and the form in which it runs.
pub(crate) const BUILT_IN_FORM: &str = "built-in";

/// What the summary says about a plugin.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct PluginSummary {
    pub(crate) name: String,
    pub(crate) plugin: String,
    pub(crate) version: String,
    pub(crate) form: &'static str,
    #[serde(flatten)]
    pub(crate) usage: Option<Usages>,
}

/// Where plugins are taken from.
pub(crate) struct Shelf {
    host: Arc<Host>,
    /// Those of [`BUILT_IN`] that were asked for.
    built_in: [OnceLock<Arc<Plugin>>; BUILT_IN.len()],
    catalog: Catalog,
    grants: Grants,
}

impl Shelf {
    /// Opens the places where plugins are kept.
    pub(crate) fn open(at: &PluginPlaces, native: &[String]) -> Result<Self> {
        let cache = places::cache_dir()
            .inspect_err(|error| tracing::warn!("components are compiled at each start: {}", explain(error)))
            .ok();
        let grants = native.iter().fold(Grants::none(), |grants, id| grants.allow_native(id));
        let host = Host::new(cache.as_deref())?;
        Ok(Self { host, built_in: Default::default(), catalog: catalog(at), grants })
    }

    /// Loads a plugin by id or path. One that is part of this program is found first.
    pub(crate) fn load(&self, plugin: &str) -> Result<Arc<Plugin>> {
        let Some(at) = BUILT_IN.iter().position(|(id, ..)| *id == plugin) else {
            return self.load_bundle(find(&self.catalog, plugin)?);
        };
        if let Some(there) = self.built_in[at].get() {
            return Ok(there.clone());
        }
        let (_, code, manifest) = BUILT_IN[at];
        let loaded = self.host.builtin(code, manifest)?;
        Ok(self.built_in[at].get_or_init(|| loaded).clone())
    }

    /// Loads a store by id or path. The error for one that is not there names those that are.
    pub(crate) fn load_store(&self, plugin: &str) -> Result<Arc<Plugin>> {
        self.load(plugin).map_err(|error| {
            if !error.is::<Usage>() {
                return error;
            }
            let found = self.catalog.list().into_iter();
            let is_store = |bundle: &Bundle| bundle.manifest.kind == Kind::Store;
            let found = found.filter(|(_, bundle)| bundle.as_ref().is_ok_and(is_store)).map(|(id, _)| id);
            let mut stores: Vec<String> =
                BUILT_IN.iter().map(|(id, ..)| (*id).to_owned()).chain(found).collect();
            stores.sort();
            stores.dedup();
            Usage(anyhow!("there is no store `{plugin}`; there are `{}`", stores.join("`, `"))).into()
        })
    }

    /// What loads plugins.
    pub(crate) fn host(&self) -> &Arc<Host> {
        &self.host
    }

    /// Loads a plugin that was found.
    pub(crate) fn load_bundle(&self, bundle: Bundle) -> Result<Arc<Plugin>> {
        Ok(self.host.load(bundle, &self.grants)?)
    }

    /// Loads a personality, and checks its settings.
    pub(crate) fn personality(&self, spec: &PluginSpec) -> Result<Personality> {
        let plugin = self.load(&spec.plugin)?;
        plugin
            .manifest()
            .settings(&spec.settings)
            .map_err(|error| Usage(anyhow!("--personality: {error}")))?;
        Ok(Personality { plugin, options: spec.settings.clone() })
    }
}

/// Whether a plugin of this id is part of this program.
pub(crate) fn is_built_in(plugin: &str) -> bool {
    BUILT_IN.iter().any(|(id, ..)| *id == plugin)
}

/// The ids of the plugins that are part of this program, with what they say about themselves.
pub(crate) fn built_in() -> Result<Vec<(&'static str, Manifest)>> {
    let read = |(id, _, text): &(&'static str, _, &str)| Ok((*id, Manifest::parse(BUILT_IN_FORM, text)?));
    BUILT_IN.iter().map(read).collect()
}

/// The places as a catalogue.
pub(crate) fn catalog(at: &PluginPlaces) -> Catalog {
    let mut catalog = Catalog::new();
    for dir in places::plugin_dirs(at) {
        catalog.add_directory(dir);
    }
    catalog
}

/// Finds a plugin by id or path. An id that nobody knows is the command line's error.
pub(crate) fn find(catalog: &Catalog, plugin: &str) -> Result<Bundle> {
    catalog.find(plugin).map_err(|error| match error {
        BundleError::Unknown { .. } => Usage(error.into()).into(),
        error => error.into(),
    })
}

/// A personality with its options.
pub(crate) struct Personality {
    plugin: Arc<Plugin>,
    options: Vec<(String, String)>,
}

impl Personality {
    /// Gives the personality its command line.
    pub(crate) fn set_cmdline(&mut self, text: &str) -> Result<()> {
        self.options.push(("cmdline".into(), text.into()));
        self.plugin
            .manifest()
            .settings(&self.options)
            .map_err(|error| Usage(anyhow!("--cmdline: {error}")))?;
        Ok(())
    }

    /// Loads the guest into memory.
    pub(crate) fn load(&self, ram: &Arc<Ram>, vcpus: u8, rsdp: u64, images: &[Image]) -> Result<Boot> {
        let memory = tenon_platform::memory_map(ram)
            .into_iter()
            .map(|range| MemoryRange {
                start: range.start,
                size: range.size,
                kind: match range.kind {
                    tenon_platform::MemoryKind::Ram => MemoryKind::Ram,
                    tenon_platform::MemoryKind::Reserved => MemoryKind::Reserved,
                    tenon_platform::MemoryKind::Acpi => MemoryKind::Acpi,
                },
            })
            .collect();
        let machine = MachineDescription { vcpus: vcpus.into(), memory, rsdp: Some(rsdp) };
        self.plugin.load_guest(&machine, ram, images.to_vec(), &self.options).map_err(|error| match error {
            GuestError::Refused { error: PersonalityError::Invalid(_), .. } => Usage(error.into()).into(),
            error => error.into(),
        })
    }

    pub(crate) fn summary(&self) -> PluginSummary {
        summary(&self.plugin.manifest().id, &self.plugin, None)
    }
}

pub(crate) fn summary(name: &str, plugin: &Plugin, usage: Option<Usages>) -> PluginSummary {
    PluginSummary {
        name: name.to_owned(),
        plugin: plugin.manifest().id.clone(),
        version: plugin.manifest().version.to_string(),
        form: form(plugin),
        usage,
    }
}

/// What a plugin runs as.
pub(crate) fn form(plugin: &Plugin) -> &'static str {
    if plugin.is_builtin() {
        BUILT_IN_FORM
    } else if plugin.is_native() {
        "native"
    } else {
        "wasm"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn built_in_plugins_have_the_ids_that_their_manifests_say() {
        for (id, manifest) in built_in().unwrap() {
            assert_eq!(manifest.id, id);
        }
    }
}
