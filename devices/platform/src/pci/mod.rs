//! The PCI host bridge: configuration access by ECAM and by ports 0xcf8 and 0xcfc, slots, and which device is in which.
//!
//! There are 1 to [`MAX_BUSES`] root buses of 32 slots in one segment, without bridges below them. Slot 0 of bus 0 is the host bridge itself. All
//! functions are virtio devices with one BAR; those of a bus lie in windows of its own ([`MEMORY_WINDOW`], [`HIGH_WINDOW`]).
//!
//! For PC firmware the board can have the ids of one that it knows: [`Pci::show_as_pc`].
//!
//! A device comes and goes with or without a running guest. [`Pci::attach`] and [`Pci::detach`] tell the guest, which then scans the slot or ejects the
//! device; [`Pci::remove`] asks nobody.

pub(crate) mod access;
mod board;
pub(crate) mod config;
pub(crate) mod hotplug;
pub(crate) mod msix;

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tenon_core::{
    Bus, BusError, Claim, Interrupts, IrqLine, Lifecycle, LineError, QueueDevice, Ram, Requests, Trigger, Vm,
};

use crate::encode::{Reader, Writer};
use crate::power::PowerRegisters;
use crate::virtio::doorbell::Doorbells;
use crate::virtio::function::{BAR_SIZE, Function, Wiring};
use access::{Ecam, Ports};
use config::Config;
use hotplug::HotPlug;

/// The most root buses: room for 287 devices.
pub const MAX_BUSES: u8 = 9;
/// The slots of a bus.
pub const SLOTS: u8 = 32;
/// Where configuration space is mapped: 1 MiB for each bus.
pub const ECAM_BASE: u64 = 0xe000_0000;
/// The ports of a host bridge.
pub const CONFIG_PORTS: Range<u16> = 0xcf8..0xd00;
/// Where BARs may go below 4 GiB: [`MEMORY_WINDOW_OF_BUS`] for each bus. The host places none here.
pub const MEMORY_WINDOW: Range<u64> = 0xc000_0000..0xd000_0000;
/// A bus's part of [`MEMORY_WINDOW`].
pub const MEMORY_WINDOW_OF_BUS: u64 = 16 << 20;
/// Where BARs are placed: above the most RAM that a machine can have, [`HIGH_WINDOW_OF_BUS`] for each bus.
pub const HIGH_WINDOW: Range<u64> = 320 << 30..336 << 30;
/// A bus's part of [`HIGH_WINDOW`].
pub const HIGH_WINDOW_OF_BUS: u64 = 1 << 30;
/// The lines of INTA to INTD, level-triggered. The slots of a bus take turns.
pub const PCI_GSIS: Range<u32> = 20..24;

/// How many devices have MSI-X; those attached after them interrupt by their line. An x86 CPU has about 200 vectors, and Linux keeps
/// two or three for each device with MSI-X on a machine of one vCPU (on a larger one it is more than one on *every* CPU). Where it has none left not even a
/// line can be used, and the device is lost.
pub const MSIX_DEVICES: usize = 64;

/// The schema of the saved state.
const SCHEMA: u32 = 1;

/// A place for a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciSlot {
    /// The bus, below [`MAX_BUSES`].
    pub bus: u8,
    /// The slot, below [`SLOTS`].
    pub slot: u8,
}

impl fmt::Display for PciSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}:{:02x}", self.bus, self.slot)
    }
}

impl PciSlot {
    /// The line of its interrupt pin.
    #[must_use]
    pub fn gsi(self) -> u32 {
        PCI_GSIS.start + (u32::from(self.bus) + u32::from(self.slot)) % 4
    }

    fn base(self) -> u64 {
        HIGH_WINDOW.start + HIGH_WINDOW_OF_BUS * u64::from(self.bus) + BAR_SIZE * u64::from(self.slot)
    }
}

/// What cannot be done with PCI.
#[derive(Debug, thiserror::Error)]
pub enum PciError {
    /// The number of buses.
    #[error("{0} PCI buses: there are 1 to {MAX_BUSES}")]
    Buses(u8),
    /// A range is taken.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// A line is taken.
    #[error("PCI interrupts: {0}")]
    Line(#[from] LineError),
    /// The slot does not exist, or is the board's.
    #[error("there is no PCI slot {0} for a device")]
    NoSlot(PciSlot),
    /// The slot has a device.
    #[error("PCI slot {slot} is taken by `{name}`")]
    Taken {
        /// The slot.
        slot: PciSlot,
        /// Who is there.
        name: String,
    },
    /// A device of this name is there.
    #[error("there is a PCI device `{0}` already")]
    Name(String),
    /// No slot is free.
    #[error("every PCI slot is taken: {0} buses have {n} slots for devices", n = usize::from(*.0) * 32 - 1)]
    Full(u8),
    /// The slot has no device.
    #[error("PCI slot {0} is empty")]
    Empty(PciSlot),
    /// The device is not one that this transport can carry.
    #[error("`{name}` cannot be a virtio PCI device: {what}")]
    Profile {
        /// Its name.
        name: String,
        /// What is wrong.
        what: String,
    },
}

/// What PCI needs of a machine.
#[derive(Clone)]
pub struct PciParts {
    /// Guest memory.
    pub ram: Arc<Ram>,
    /// Port I/O.
    pub pio: Arc<Bus>,
    /// Memory-mapped I/O.
    pub mmio: Arc<Bus>,
    /// The lines, and the way for MSIs.
    pub interrupts: Arc<Interrupts>,
    /// For the reset register at port 0xcf9.
    pub requests: Requests,
    /// Where events of slots are told to the guest.
    pub power: Arc<PowerRegisters>,
    /// The engine's VM, for doorbells that need no exit to this process; without it they are answered on the bus.
    pub vm: Option<Arc<dyn Vm>>,
}

pub(crate) struct Slots {
    pub(crate) functions: BTreeMap<PciSlot, Arc<Function>>,
    /// The functions of bus 0 that are configuration space alone, by slot and function number; the host bridge first.
    board: BTreeMap<u8, Config>,
    pub(crate) buses: u8,
}

/// The buses with their devices.
pub struct Pci {
    parts: PciParts,
    slots: Arc<Mutex<Slots>>,
    hotplug: Arc<HotPlug>,
    doorbells: Option<Arc<Doorbells>>,
    _claims: Vec<Claim>,
    /// Held so that nobody takes the lines for himself while no device has them.
    _lines: Vec<IrqLine>,
}

impl Slots {
    pub(crate) fn at(&self, slot: PciSlot) -> Option<Arc<Function>> {
        self.functions.get(&slot).cloned()
    }

    /// Whether a part of the board is in this slot.
    fn has_board(&self, slot: PciSlot) -> bool {
        slot.bus == 0 && self.board.keys().any(|number| number >> 3 == slot.slot)
    }
}

pub(crate) fn lock(slots: &Mutex<Slots>) -> MutexGuard<'_, Slots> {
    slots.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pci {
    /// Makes `buses` empty buses and claims their configuration space. The lines of [`PCI_GSIS`] are level-triggered from now on.
    ///
    /// # Errors
    /// The number is out of range, or a range or line is taken.
    pub fn new(parts: PciParts, buses: u8) -> Result<Arc<Self>, PciError> {
        if !(1..=MAX_BUSES).contains(&buses) {
            return Err(PciError::Buses(buses));
        }
        let slots = Arc::new(Mutex::new(Slots { functions: BTreeMap::new(), board: board::plain(), buses }));
        let hotplug = HotPlug::new(slots.clone(), parts.power.clone());
        let ecam =
            parts.mmio.claim("pci", ECAM_BASE, u64::from(buses) << 20, Arc::new(Ecam(slots.clone())))?;
        let ports = Arc::new(Ports::new(slots.clone(), parts.requests.clone()));
        let size = u64::from(CONFIG_PORTS.end - CONFIG_PORTS.start);
        let ports = parts.pio.claim("pci", CONFIG_PORTS.start.into(), size, ports)?;
        let events = parts.pio.claim("pci", hotplug::PORT.into(), hotplug::PORTS.into(), hotplug.clone())?;
        let lines = PCI_GSIS
            .map(|gsi| parts.interrupts.line("pci", Some(gsi), Trigger::Level))
            .collect::<Result<_, _>>()?;
        let doorbells = parts.vm.clone().and_then(|vm| {
            Doorbells::new(vm)
                .inspect_err(|error| tracing::warn!("doorbells are answered on the bus: {error}"))
                .ok()
        });
        Ok(Arc::new(Self {
            parts,
            slots,
            hotplug,
            doorbells,
            _claims: vec![ecam, ports, events],
            _lines: lines,
        }))
    }

    /// Gives the host bridge the id of a 440FX, and slot 1 of bus 0 a PIIX3 and a PIIX4's power management: by these OVMF knows which board it is on.
    /// Their registers cannot be changed. To be called before a device is attached.
    ///
    /// # Errors
    /// A device is in slot 1 of bus 0.
    pub fn show_as_pc(&self) -> Result<(), PciError> {
        let mut slots = lock(&self.slots);
        let slot = PciSlot { bus: 0, slot: board::PIIX_SLOT };
        if let Some(there) = slots.functions.get(&slot) {
            return Err(PciError::Taken { slot, name: there.name().to_owned() });
        }
        slots.board = board::pc();
        Ok(())
    }

    /// The number of buses.
    #[must_use]
    pub fn buses(&self) -> u8 {
        lock(&self.slots).buses
    }

    /// Puts a device into `slot`, or into the first free one, under a name of its own. A running guest is told. The device's own [`Lifecycle`] stays the
    /// caller's to drive: at a reset and at a restore it comes before that of `Pci`.
    ///
    /// # Errors
    /// The slot or the name is taken, or the device's profile is not one of a virtio device.
    pub fn attach(
        &self,
        name: &str,
        device: Arc<dyn QueueDevice>,
        slot: Option<PciSlot>,
    ) -> Result<PciSlot, PciError> {
        let mut slots = lock(&self.slots);
        if slots.functions.values().any(|function| function.name() == name) {
            return Err(PciError::Name(name.to_owned()));
        }
        let slot = match slot {
            Some(slot) => slot,
            None => all(slots.buses)
                .find(|slot| !slots.functions.contains_key(slot) && !slots.has_board(*slot))
                .ok_or(PciError::Full(slots.buses))?,
        };
        if !all(slots.buses).any(|exists| exists == slot) || slots.has_board(slot) {
            return Err(PciError::NoSlot(slot));
        }
        if let Some(there) = slots.functions.get(&slot) {
            return Err(PciError::Taken { slot, name: there.name().to_owned() });
        }
        let wiring = Wiring {
            ram: &self.parts.ram,
            mmio: &self.parts.mmio,
            controller: self.parts.interrupts.controller(),
            line: self.parts.interrupts.line(name, Some(slot.gsi()), Trigger::Level)?,
            doorbells: self.doorbells.clone(),
            has_msix: slots.functions.values().filter(|function| function.has_msix()).count() < MSIX_DEVICES,
            base: slot.base(),
        };
        slots.functions.insert(slot, Function::new(name, device, wiring)?);
        drop(slots);
        self.hotplug.tell(slot, hotplug::Event::Check);
        Ok(slot)
    }

    /// Asks the guest to give up the device in this slot. When it has, the device is stopped and taken out, and [`Pci::on_ejected`] hears of it.
    ///
    /// # Errors
    /// The slot is empty.
    pub fn detach(&self, slot: PciSlot) -> Result<(), PciError> {
        lock(&self.slots).at(slot).ok_or(PciError::Empty(slot))?;
        self.hotplug.tell(slot, hotplug::Event::Eject);
        Ok(())
    }

    /// Takes the device out without asking, as if it were pulled. When this returns it is stopped; the guest is told.
    ///
    /// # Errors
    /// The slot is empty.
    pub fn remove(&self, slot: PciSlot) -> Result<(), PciError> {
        let function = lock(&self.slots).functions.remove(&slot).ok_or(PciError::Empty(slot))?;
        function.remove();
        self.hotplug.tell(slot, hotplug::Event::Check);
        Ok(())
    }

    /// Calls `hear` with slot and name when the guest has ejected a device: on the vCPU's thread, the device is stopped, no lock is held. Replaces who heard
    /// before.
    pub fn on_ejected(&self, hear: impl Fn(PciSlot, &str) + Send + Sync + 'static) {
        self.hotplug.set_hearer(Arc::new(hear));
    }

    /// The devices, in order of their slots.
    #[must_use]
    pub fn devices(&self) -> Vec<(PciSlot, String)> {
        lock(&self.slots)
            .functions
            .iter()
            .map(|(slot, function)| (*slot, function.name().to_owned()))
            .collect()
    }

    fn functions(&self) -> Vec<(PciSlot, Arc<Function>)> {
        lock(&self.slots).functions.iter().map(|(slot, function)| (*slot, function.clone())).collect()
    }
}

/// The slots for devices.
fn all(buses: u8) -> impl Iterator<Item = PciSlot> {
    (0..buses).flat_map(|bus| (u8::from(bus == 0)..SLOTS).map(move |slot| PciSlot { bus, slot }))
}

impl Drop for Pci {
    fn drop(&mut self) {
        for (_, function) in self.functions() {
            function.remove();
        }
    }
}

impl Lifecycle for Pci {
    fn name(&self) -> &'static str {
        "pci"
    }

    fn reset(&self) {
        self.hotplug.reset();
        self.functions().iter().for_each(|(_, function)| function.reset());
    }

    fn resume(&self) {
        self.hotplug.resume();
        self.functions().iter().for_each(|(_, function)| function.resume());
    }

    fn save(&self) -> Result<(u32, Vec<u8>), String> {
        let mut out = Writer::default();
        self.hotplug.save(&mut out);
        let functions = self.functions();
        out.count(functions.len());
        for (slot, function) in functions {
            out.u8(slot.bus);
            out.u8(slot.slot);
            out.bytes(function.name().as_bytes());
            let mut state = Writer::default();
            function.save(&mut state);
            out.bytes(&state.0);
        }
        Ok((SCHEMA, out.0))
    }

    fn restore(&self, schema: u32, data: &[u8]) -> Result<(), String> {
        if schema != SCHEMA {
            return Err(format!("PCI state of schema {schema}; this version reads schema {SCHEMA}"));
        }
        let mut from = Reader(data);
        self.hotplug.restore(&mut from)?;
        let functions = self.functions();
        let count = from.count()?;
        if count != functions.len() {
            return Err(format!("{count} PCI devices were saved; the machine has {}", functions.len()));
        }
        for (slot, function) in functions {
            let saved = (PciSlot { bus: from.u8()?, slot: from.u8()? }, from.text()?);
            if saved != (slot, function.name()) {
                return Err(format!(
                    "slot {} with `{}` was saved; the machine has slot {slot} with `{}`",
                    saved.0,
                    saved.1,
                    function.name()
                ));
            }
            let mut state = Reader(from.bytes()?);
            function
                .restore(&mut state)
                .and_then(|()| state.end())
                .map_err(|error| format!("`{}`: {error}", function.name()))?;
        }
        from.end()
    }
}
