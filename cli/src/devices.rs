//! The devices of a machine: attached to its buses or to PCI, and what they say of themselves.

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde::Serialize;
use tenon_abi::DeviceError;
use tenon_core::{Lifecycle, NetworkPort, Ram};
use tenon_platform::{AcpiNode, Pci, Resource};
use tenon_plugins::{
    AttachError, ChannelEnd, Device, MachineParts, Plugin, Status, Store, UnixSocket, VirtioDevice,
    VirtioParts,
};

use crate::Usage;
use crate::args::{PluginSpec, RunArgs};
use crate::disks::DISK;
use crate::plugins::{PluginSummary, Shelf, summary};
use crate::shares::{self, FOLDER, FOLDER_NAME};
use crate::vsock::{SOCKET, VSOCK};

/// The name of the channel that is the guest's console.
const CONSOLE: &str = "console";
/// The devices that every machine has, unless `--no-default-devices`.
const DEFAULT_DEVICES: [&str; 2] = ["serial", "rtc"];
/// The device that a machine with a disk or a network also has: a whole system waits for entropy.
const ENTROPY: &str = "virtio-rng";
/// The names by which a disk and a network card ask for what is behind them.
const DISK_STORE: &str = "disk";
const NETWORK_PORT: &str = "net";

/// What a device did.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Usages {
    status: String,
    calls: u64,
    faults: u64,
    restarts: u64,
    lost_calls: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    virtio: Option<VirtioUsages>,
}

/// What a virtio device did besides.
#[derive(Clone, Debug, Serialize)]
struct VirtioUsages {
    slot: String,
    batches: u64,
    requests: u64,
    answers: u64,
    operations: u64,
    dropped_frames: u64,
}

/// What devices are attached to.
pub(crate) struct Sockets {
    pub(crate) parts: MachineParts,
    pub(crate) pci: Arc<Pci>,
    pub(crate) ram: Arc<Ram>,
}

/// What is behind a virtio device, by the names by which it asks for it.
#[derive(Default)]
struct Behind {
    stores: Vec<(String, Arc<Store>)>,
    ports: Vec<(String, Arc<dyn NetworkPort>)>,
    sockets: Vec<(String, Arc<UnixSocket>)>,
    folders: Vec<(String, Arc<tenon_folder::Root>)>,
}

/// The devices of a machine, as they are attached.
pub(crate) struct Devices<'a> {
    shelf: &'a Shelf,
    sockets: Sockets,
    pub(crate) all: Vec<Attached>,
}

/// The devices of registers, and virtio devices without store or port: those named, after the default ones that are not named.
pub(crate) fn named(args: &RunArgs) -> Vec<PluginSpec> {
    let is_whole_system = !(args.disks.is_empty() && args.cdroms.is_empty() && args.networks.is_empty());
    let defaults = DEFAULT_DEVICES
        .into_iter()
        .chain(is_whole_system.then_some(ENTROPY))
        .filter(|id| !args.no_default_devices && !args.devices.iter().any(|spec| spec.plugin == **id))
        .map(|id| PluginSpec { plugin: id.to_owned(), settings: Vec::new() });
    defaults.chain(args.devices.iter().cloned()).collect()
}

/// Whether the command line names this plugin as a device or store, or names something that takes it.
pub(crate) fn names_plugin(args: &RunArgs, id: &str) -> bool {
    named(args).iter().any(|spec| spec.plugin == id)
        || args.disks.iter().any(|disk| disk.stores().any(|store| store == id))
        || args.disks.iter().any(|disk| disk.device() == id)
        || id == DISK && !args.cdroms.is_empty()
        || args.networks.iter().any(|network| network.card.plugin == id)
        || id == VSOCK && args.vsock.is_some()
        || id == FOLDER && !args.shares.is_empty()
}

/// How many devices may want a PCI slot.
pub(crate) fn most_slots(args: &RunArgs) -> usize {
    named(args).len()
        + args.disks.len()
        + args.cdroms.len()
        + args.networks.len()
        + usize::from(args.vsock.is_some())
        + args.shares.len()
}

impl<'a> Devices<'a> {
    pub(crate) fn new(shelf: &'a Shelf, sockets: Sockets) -> Self {
        Self { shelf, sockets, all: Vec::new() }
    }

    /// Attaches everything that the command line names.
    pub(crate) fn attach_all(&mut self, args: &RunArgs) -> Result<()> {
        for spec in named(args) {
            self.attach(&spec, "--device", Behind::default())?;
        }
        let cdroms = args.cdroms.iter().map(|path| crate::disks::cdrom(path)).collect::<Result<Vec<_>>>()?;
        for (n, spec) in args.disks.iter().chain(&cdroms).enumerate() {
            let disk = spec.open(self.shelf, &format!("disk{n}"))?;
            let behind = Behind { stores: vec![(DISK_STORE.into(), disk.store)], ..Behind::default() };
            self.attach(&disk.device, "--disk", behind)?;
        }
        for (n, spec) in args.networks.iter().enumerate() {
            // Two cards of one machine have two addresses.
            let network = &spec.network;
            let network = tenon_net::Spec { name: format!("{}-{n}", network.name), ..network.clone() };
            spec.check(&*self.shelf.load(&spec.card.plugin)?)?;
            let port = tenon_net::open(&network)?;
            let behind = Behind { ports: vec![(NETWORK_PORT.into(), port)], ..Behind::default() };
            self.attach(&spec.card, "--net", behind)?;
        }
        if let Some(spec) = &args.vsock {
            let behind = Behind { sockets: vec![(SOCKET.into(), spec.open()?)], ..Behind::default() };
            self.attach(&spec.device(), "--vsock", behind)?;
        }
        for (spec, tag) in shares::tags(&args.shares)? {
            let device = PluginSpec { plugin: FOLDER.into(), settings: vec![("tag".into(), tag)] };
            let behind = Behind { folders: vec![(FOLDER_NAME.into(), spec.open()?)], ..Behind::default() };
            self.attach(&device, "--share", behind)?;
        }
        Ok(())
    }

    /// Attaches a device. Devices of the same plugin are numbered from the second on.
    fn attach(&mut self, spec: &PluginSpec, option: &str, behind: Behind) -> Result<()> {
        let plugin = self.shelf.load(&spec.plugin)?;
        let id = &plugin.manifest().id;
        let same = self.all.iter().filter(|other| other.plugin.manifest().id == *id).count();
        let name = if same == 0 { id.clone() } else { format!("{id}{same}") };
        let wrong = |error: AttachError| match error {
            // The settings are looked at by their types first, and then by the device itself.
            AttachError::Setting(_) | AttachError::Refused { error: DeviceError::Invalid(_), .. } => {
                anyhow::Error::new(Usage(anyhow!(error).context(format!("{option} {}", spec.plugin))))
            }
            AttachError::Unused { .. } => Usage(anyhow!(error).context(option.to_owned())).into(),
            AttachError::Missing { what, .. } if option == "--device" => {
                let id = &spec.plugin;
                let remedy = match what {
                    "store" => format!("`--disk STORE:PLACE,device={id}` gives it one"),
                    "network port" => format!("`--net KIND,device={id}` gives it one"),
                    "socket" => "`--vsock PATH` is for sockets".into(),
                    _ => "`--share DIR` is for folders".into(),
                };
                Usage(anyhow!("{error}; {remedy}")).into()
            }
            error => error.into(),
        };
        if !plugin.is_virtio() && option != "--device" {
            bail!(Usage(anyhow!("{option}: `{id}` is no virtio device")));
        }
        let Sockets { parts, pci, ram } = &self.sockets;
        let model = if plugin.is_virtio() {
            let Behind { stores, ports, sockets, folders } = behind;
            let parts =
                VirtioParts { clock: parts.clock.clone(), ram: ram.clone(), stores, ports, sockets, folders };
            let device = plugin.attach_virtio(&name, &spec.settings, &parts).map_err(wrong)?;
            let slot = pci.attach(&name, device.clone(), None)?.to_string();
            Model::Virtio { device, slot }
        } else {
            Model::Registers(plugin.attach(&name, &spec.settings, parts).map_err(wrong)?)
        };
        self.all.push(Attached { name, plugin, model });
        Ok(())
    }
}

enum Model {
    Registers(Arc<Device>),
    Virtio { device: Arc<VirtioDevice>, slot: String },
}

/// A device of this machine.
pub(crate) struct Attached {
    name: String,
    plugin: Arc<Plugin>,
    model: Model,
}

impl Attached {
    /// The device's place in the ACPI namespace, if it wants one.
    pub(crate) fn acpi_node(&self) -> Option<AcpiNode> {
        let Model::Registers(device) = &self.model else { return None };
        let description = device.description();
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

    /// Lets nobody wait for other hosts: the machine ends.
    pub(crate) fn cut(&self) {
        if let Model::Virtio { device, .. } = &self.model {
            device.cut_stores();
        }
    }

    pub(crate) fn lifecycle(&self) -> Arc<dyn Lifecycle> {
        match &self.model {
            Model::Registers(device) => device.clone(),
            Model::Virtio { device, .. } => device.clone(),
        }
    }

    /// The end of the device's console channel, if it has one.
    pub(crate) fn console(&self) -> Option<ChannelEnd> {
        match &self.model {
            Model::Registers(device) => device.channel(CONSOLE).cloned(),
            Model::Virtio { device, .. } => device.channel(CONSOLE).cloned(),
        }
    }

    pub(crate) fn summary(&self) -> PluginSummary {
        let status = |status: Status| format!("{status:?}").to_lowercase();
        let usage = match &self.model {
            Model::Registers(device) => {
                let usage = device.usage();
                Usages {
                    status: status(device.status()),
                    calls: usage.calls,
                    faults: usage.faults,
                    restarts: usage.restarts,
                    lost_calls: usage.lost_calls,
                    virtio: None,
                }
            }
            Model::Virtio { device, slot } => {
                let usage = device.usage();
                Usages {
                    status: status(device.status()),
                    calls: usage.calls,
                    faults: usage.faults,
                    restarts: usage.restarts,
                    lost_calls: usage.lost_calls,
                    virtio: Some(VirtioUsages {
                        slot: slot.clone(),
                        batches: usage.batches,
                        requests: usage.requests,
                        answers: usage.answers,
                        operations: usage.operations,
                        dropped_frames: usage.dropped_frames,
                    }),
                }
            }
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
