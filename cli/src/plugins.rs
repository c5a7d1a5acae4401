//! The plugins of a machine: found, loaded, attached.

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use serde::Serialize;
use tenon_abi::{DeviceError, Machine as MachineDescription, MemoryKind, MemoryRange, PersonalityError};
use tenon_core::{Lifecycle, Ram};
use tenon_platform::{AcpiNode, Resource};
use tenon_plugins::{
    AttachError, Boot, Bundle, BundleError, Catalog, ChannelEnd, Device, Grants, GuestError, Host, Image,
    MachineParts, Plugin,
};

use crate::Usage;
use crate::args::{PluginPlaces, PluginSpec, RunArgs};
use crate::places;
use crate::say::explain;

/// The name of the channel that is the guest's console.
const CONSOLE: &str = "console";
/// The devices that every machine has, unless `--no-default-devices`.
const DEFAULT_DEVICES: [&str; 2] = ["serial", "rtc"];

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

/// What a device did.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Usages {
    status: String,
    calls: u64,
    faults: u64,
    restarts: u64,
    lost_calls: u64,
}

/// Where plugins are taken from.
pub(crate) struct Shelf {
    host: Arc<Host>,
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
        Ok(Self { host: Host::new(cache.as_deref())?, catalog: catalog(at), grants })
    }

    /// Loads a plugin by id or path.
    fn load(&self, plugin: &str) -> Result<Arc<Plugin>> {
        self.load_bundle(find(&self.catalog, plugin)?)
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

    /// Attaches a device. Devices of the same plugin are numbered from the second on.
    pub(crate) fn attach(
        &self,
        spec: &PluginSpec,
        others: &[Attached],
        parts: &MachineParts,
    ) -> Result<Attached> {
        let plugin = self.load(&spec.plugin)?;
        let id = &plugin.manifest().id;
        let same = others.iter().filter(|other| other.plugin.manifest().id == *id).count();
        let name = if same == 0 { id.clone() } else { format!("{id}{same}") };
        let device = plugin.attach(&name, &spec.settings, parts).map_err(|error| match error {
            // The settings are looked at by their types first, and then by the device itself.
            AttachError::Setting(_) | AttachError::Refused { error: DeviceError::Invalid(_), .. } => {
                anyhow::Error::new(Usage(anyhow!(error).context(format!("--device {}", spec.plugin))))
            }
            error => error.into(),
        })?;
        Ok(Attached { name, plugin, device })
    }
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

/// The devices of a machine: those named, after the default ones that are not named.
pub(crate) fn devices(args: &RunArgs) -> Vec<PluginSpec> {
    let defaults = DEFAULT_DEVICES
        .iter()
        .filter(|id| !args.no_default_devices && !args.devices.iter().any(|spec| spec.plugin == **id))
        .map(|id| PluginSpec { plugin: (*id).to_owned(), settings: Vec::new() });
    defaults.chain(args.devices.iter().cloned()).collect()
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

/// A device of this machine.
pub(crate) struct Attached {
    name: String,
    plugin: Arc<Plugin>,
    device: Arc<Device>,
}

impl Attached {
    /// The device's place in the ACPI namespace, if it wants one.
    pub(crate) fn acpi_node(&self) -> Option<AcpiNode> {
        let description = self.device.description();
        let acpi = description.acpi.as_ref()?;
        let regions = description.regions.iter().filter_map(|region| {
            let base = region.base?;
            Some(match region.space {
                tenon_abi::Space::Pio => {
                    Resource::Ports { base: base.try_into().ok()?, size: region.size.try_into().ok()? }
                }
                tenon_abi::Space::Mmio => {
                    Resource::Memory { base: base.try_into().ok()?, size: region.size.try_into().ok()? }
                }
            })
        });
        let lines = description.lines.iter().filter_map(|line| {
            Some(Resource::Line { gsi: line.gsi?, edge: line.trigger == tenon_abi::Trigger::Edge })
        });
        Some(AcpiNode { hid: acpi.hid.clone(), uid: acpi.uid, resources: regions.chain(lines).collect() })
    }

    pub(crate) fn lifecycle(&self) -> Arc<dyn Lifecycle> {
        self.device.clone()
    }

    /// The end of the device's console channel, if it has one.
    pub(crate) fn console(&self) -> Option<ChannelEnd> {
        self.device.channel(CONSOLE).cloned()
    }

    pub(crate) fn summary(&self) -> PluginSummary {
        let usage = self.device.usage();
        let usage = Usages {
            status: format!("{:?}", self.device.status()).to_lowercase(),
            calls: usage.calls,
            faults: usage.faults,
            restarts: usage.restarts,
            lost_calls: usage.lost_calls,
        };
        summary(&self.name, &self.plugin, Some(usage))
    }
}

/// Lets the console's bytes out to `output`, which may block.
pub(crate) fn connect(console: &ChannelEnd, mut output: Box<dyn Write + Send>) -> Result<()> {
    let mut is_open = true;
    console
        .set_sink(move |bytes| {
            if !is_open {
                return;
            }
            if let Err(error) = output.write_all(bytes).and_then(|()| output.flush()) {
                tracing::warn!("what the guest prints is lost from now on, and the guest goes on: {error}");
                is_open = false;
            }
        })
        .context("starting the console's thread")
}

/// Waits until what the guest wrote has come out.
pub(crate) fn drain(console: &ChannelEnd) {
    if !console.flush(Duration::from_secs(5)) {
        tracing::warn!("the reader of the console has not taken all output within 5 s; the rest is lost");
    }
}

fn summary(name: &str, plugin: &Plugin, usage: Option<Usages>) -> PluginSummary {
    PluginSummary {
        name: name.to_owned(),
        plugin: plugin.manifest().id.clone(),
        version: plugin.manifest().version.to_string(),
        form: if plugin.is_native() { "native" } else { "wasm" },
        usage,
    }
}
