//! A device in a machine: what it claims, how the guest, the clock and the outside reach it.
//!
//! # Threads and locks
//!
//! Register accesses run on the vCPU's thread, timers on the clock's (or the vCPU's, under a virtual clock), and news of channels on the device's worker. Each takes the
//! instance's lock for its call. No other lock of the host is held while the plugin runs, and nothing that a plugin can call waits for an instance: so there is no cycle.

use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};

use crossbeam_channel::Receiver;
use tenon_abi::{Description, DeviceError, SavedState, Space, Trigger};
use tenon_core::{Bus, BusError, Claim, Clock, Interrupts, Lifecycle, LineError, Region, Requests};

use crate::channel::{Channel, ChannelEnd, ChannelNews};
use crate::fault::Fault;
use crate::instance::Call;
use crate::manifest::{Kind, SettingError};
use crate::plugin::Plugin;
use crate::services::Services;
use crate::supervise::{Counters, DeviceUse, Refusal, Status, Supervisor, describe};

/// The most regions, lines, timers and channels that a device may ask for.
const MOST: [usize; 4] = [64, 24, 64, 16];

/// The parts of a machine that a device is attached to.
#[derive(Clone)]
pub struct MachineParts {
    /// Port I/O.
    pub pio: Arc<Bus>,
    /// Memory-mapped I/O.
    pub mmio: Arc<Bus>,
    /// Guest-physical addresses from which a region gets its place when the device leaves the choice to the host.
    pub mmio_window: Range<u64>,
    /// Interrupt lines.
    pub interrupts: Arc<Interrupts>,
    /// The machine's clock.
    pub clock: Arc<Clock>,
    /// The way to ask for power-off, reset or exit.
    pub requests: Requests,
}

/// A device that cannot be attached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The plugin is no device.
    #[error("`{plugin}` is a {kind}, not a device")]
    NotADevice {
        /// The plugin's id.
        plugin: String,
        /// What it is.
        kind: Kind,
    },
    /// The plugin is a device of the other sort.
    #[error("`{plugin}` is {what}")]
    OtherDevice {
        /// The plugin's id.
        plugin: String,
        /// What it is.
        what: &'static str,
    },
    /// It needs something that it was not given.
    #[error("device `{device}` needs a {what} named `{name}`; it was given {given}")]
    Missing {
        /// The device's name.
        device: String,
        /// `store` or `network port`.
        what: &'static str,
        /// The name that it asks for.
        name: String,
        /// The names that there are.
        given: String,
    },
    /// It does not ask for something that it was given.
    #[error("device `{device}` has no use for a {what} named `{name}`; it asks for {asked}")]
    Unused {
        /// The device's name.
        device: String,
        /// `store` or `network port`.
        what: &'static str,
        /// The name under which it was given.
        name: String,
        /// The names that it asks for.
        asked: String,
    },
    /// A setting.
    #[error(transparent)]
    Setting(#[from] SettingError),
    /// The plugin refused.
    #[error("device `{device}`: `{call}` refused: {error}")]
    Refused {
        /// The device's name.
        device: String,
        /// The call.
        call: &'static str,
        /// The plugin's words.
        error: DeviceError,
    },
    /// The plugin did not return.
    #[error("device `{device}`: `{call}` failed: {fault}")]
    Fault {
        /// The device's name.
        device: String,
        /// The call.
        call: &'static str,
        /// What it did.
        fault: Fault,
    },
    /// It asks for something that cannot be.
    #[error("device `{device}`: {what}")]
    Description {
        /// The device's name.
        device: String,
        /// What is wrong.
        what: String,
    },
    /// A range of registers cannot be had.
    #[error(transparent)]
    Claim(#[from] BusError),
    /// An interrupt line cannot be had.
    #[error("device `{device}`: {error}")]
    Line {
        /// The device's name.
        device: String,
        /// Why.
        error: LineError,
    },
    /// A folder of the host cannot be given.
    #[error("device `{device}`: giving it a folder: {error}")]
    Folder {
        /// The device's name.
        device: String,
        /// Why.
        error: std::io::Error,
    },
    /// The host gives no thread.
    #[error("device `{device}`: starting its worker: {error}")]
    Thread {
        /// The device's name.
        device: String,
        /// Why.
        error: std::io::Error,
    },
}

/// What the device's regions, timers and worker share.
struct Shared {
    /// None until the device has started, and again when it is gone.
    supervisor: Mutex<Option<Supervisor>>,
    /// The machine goes on.
    resumed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Option<Supervisor>> {
        self.supervisor.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn call(&self, call: Call) -> Option<u64> {
        self.lock().as_mut()?.call(call)
    }

    /// Tells the device of bytes, after a pause if there is one.
    fn readable(&self, channel: u32) {
        let mut guard = self.lock();
        while guard.as_ref().is_some_and(|supervisor| supervisor.paused) {
            guard = self.resumed.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        if let Some(supervisor) = &mut *guard {
            supervisor.call(Call::Readable(channel));
        }
    }
}

/// One region on a bus.
struct DeviceRegion {
    shared: Arc<Shared>,
    index: u32,
}

impl Region for DeviceRegion {
    fn read(&self, offset: u64, size: u8) -> u64 {
        self.shared.call(Call::Read { region: self.index, offset, size }).unwrap_or(u64::MAX)
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        self.shared.call(Call::Write { region: self.index, offset, size, value });
    }
}

/// A plugin's device in a machine. Dropping it gives back everything that it claimed; an access that is under way still completes.
pub struct Device {
    name: String,
    plugin: Arc<Plugin>,
    description: Description,
    channels: Vec<ChannelEnd>,
    counters: Arc<Counters>,
    claims: Vec<Claim>,
    shared: Arc<Shared>,
}

impl Plugin {
    /// Makes a device of this plugin and attaches it to a machine under `name`: checks the settings, asks the plugin what it needs, claims all of it
    /// or refuses, and starts it. Works while the machine runs. Add the device to the machine ([`tenon_core::Machine::add_device`]) so that it is paused, reset and saved with it.
    ///
    /// # Errors
    /// A setting is wrong, the plugin refuses or fails, or something that it needs is taken; the error names both owners.
    pub fn attach(
        self: &Arc<Self>,
        name: &str,
        settings: &[(String, String)],
        parts: &MachineParts,
    ) -> Result<Arc<Device>, AttachError> {
        if self.manifest.kind != Kind::Device {
            return Err(AttachError::NotADevice {
                plugin: self.manifest.id.clone(),
                kind: self.manifest.kind,
            });
        }
        if self.is_virtio() {
            return Err(AttachError::OtherDevice {
                plugin: self.manifest.id.clone(),
                what: "fed by virtqueues, and has no registers",
            });
        }
        let settings = self.manifest.settings(settings)?;
        let refused = |refusal| match refusal {
            Refusal::Refused(call, error) => AttachError::Refused { device: name.to_owned(), call, error },
            Refusal::Fault(call, fault) => AttachError::Fault { device: name.to_owned(), call, fault },
        };
        let services = Services::new(name, parts.clock.clone(), parts.requests.clone());
        let (mut instance, asked) =
            describe(self, &settings, services).map_err(|(refusal, _)| refused(refusal))?;
        let mut description = asked.clone();
        check(name, &description)?;
        for region in &mut description.regions {
            region.base = Some(place(name, region, parts)?);
        }

        let mut lines = Vec::new();
        for line in &mut description.lines {
            let trigger = match line.trigger {
                Trigger::Edge => tenon_core::Trigger::Edge,
                Trigger::Level => tenon_core::Trigger::Level,
            };
            let granted = parts
                .interrupts
                .line(name, line.gsi, trigger)
                .map_err(|error| AttachError::Line { device: name.to_owned(), error })?;
            line.gsi = Some(granted.gsi());
            lines.push(granted);
        }
        let shared = Arc::new(Shared { supervisor: Mutex::new(None), resumed: Condvar::new() });
        // Whoever comes before the device has started waits for this lock.
        let mut guard = shared.lock();
        let mut claims = Vec::new();
        for (index, region) in (0..).zip(&description.regions) {
            let bus = match region.space {
                Space::Pio => &parts.pio,
                Space::Mmio => &parts.mmio,
            };
            let handler = Arc::new(DeviceRegion { shared: shared.clone(), index });
            claims.push(bus.claim(name, region.base.unwrap_or(0), region.size, handler)?);
        }
        let timers = (0..description.timers)
            .map(|index| {
                let shared = Arc::downgrade(&shared);
                parts.clock.timer(move |now| {
                    if let Some(shared) = shared.upgrade()
                        && let Some(supervisor) = &mut *shared.lock()
                    {
                        supervisor.timer(index, now);
                    }
                })
            })
            .collect();
        let (sender, receiver) = crossbeam_channel::bounded(MOST[3]);
        let channels: Vec<_> = (0..)
            .zip(&description.channels)
            .map(|(index, name)| {
                let sender = sender.clone();
                let tell = move |news| {
                    if let ChannelNews::Readable(channel) = news {
                        let _ = sender.try_send(channel);
                    }
                };
                Channel::new(name.clone(), index, Box::new(tell))
            })
            .collect();
        if !channels.is_empty() {
            serve(name, Arc::downgrade(&shared), receiver)
                .map_err(|error| AttachError::Thread { device: name.to_owned(), error })?;
        }
        if let Some(services) = instance.services() {
            services.grant(lines, timers, channels.clone());
        }
        let counters = Arc::new(Counters::default());
        let supervisor =
            Supervisor::start(self.clone(), name.to_owned(), settings, asked, instance, counters.clone())
                .map_err(refused)?;
        *guard = Some(supervisor);
        drop(guard);
        Ok(Arc::new(Device {
            name: name.to_owned(),
            plugin: self.clone(),
            description,
            channels: channels.into_iter().map(ChannelEnd::new).collect(),
            counters,
            claims,
            shared,
        }))
    }
}

/// The worker: tells the device of bytes in its channels. It ends when the device closes them.
fn serve(name: &str, shared: Weak<Shared>, news: Receiver<u32>) -> std::io::Result<()> {
    let work = move || {
        for channel in news {
            let Some(shared) = shared.upgrade() else { return };
            shared.readable(channel);
        }
    };
    std::thread::Builder::new().name(format!("{name}-work")).spawn(work)?;
    Ok(())
}

fn check(device: &str, description: &Description) -> Result<(), AttachError> {
    let wrong = |what: String| Err(AttachError::Description { device: device.to_owned(), what });
    let Description { regions, lines, timers, channels, acpi } = description;
    let counts = [regions.len(), lines.len(), usize::try_from(*timers).unwrap_or(usize::MAX), channels.len()];
    for ((count, most), what) in
        counts.into_iter().zip(MOST).zip(["regions", "interrupt lines", "timers", "channels"])
    {
        if count > most {
            return wrong(format!("it asks for {count} {what}; a device gets at most {most}"));
        }
    }
    let names = regions.iter().map(|region| &region.name).chain(channels);
    if let Some(name) =
        names.into_iter().find(|name| name.is_empty() || name.len() > 64 || name.contains(char::is_control))
    {
        return wrong(format!("`{}` is no name for a region or channel", name.escape_debug()));
    }
    if let Some(node) = acpi
        && !((7..=8).contains(&node.hid.len())
            && node.hid.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit()))
    {
        return wrong(format!("`{}` is no ACPI hardware id", node.hid.escape_debug()));
    }
    Ok(())
}

/// Where a region goes: where the device wants it, or the first free place in the window, aligned to its size or at least to a page.
fn place(device: &str, region: &tenon_abi::Region, parts: &MachineParts) -> Result<u64, AttachError> {
    if let Some(base) = region.base {
        return Ok(base);
    }
    let wrong = |what: String| AttachError::Description { device: device.to_owned(), what };
    if region.space == Space::Pio {
        return Err(wrong(format!(
            "its port range `{}` has no base; the host chooses for MMIO only",
            region.name
        )));
    }
    let full = || {
        let Range { start, end } = parts.mmio_window;
        wrong(format!(
            "there is no room for its region `{}` of {:#x} bytes in {start:#x}-{end:#x}",
            region.name, region.size
        ))
    };
    let align = region.size.checked_next_power_of_two().ok_or_else(full)?.max(4096);
    let up = |address: u64| address.checked_next_multiple_of(align);
    let mut at = up(parts.mmio_window.start).ok_or_else(full)?;
    for (taken, _) in parts.mmio.claims() {
        if taken.start < at.saturating_add(region.size) && at < taken.end {
            at = up(taken.end).ok_or_else(full)?;
        }
    }
    if at.checked_add(region.size).is_none_or(|end| end > parts.mmio_window.end) {
        return Err(full());
    }
    Ok(at)
}

impl Device {
    /// The plugin that it was made of.
    #[must_use]
    pub fn plugin(&self) -> &Arc<Plugin> {
        &self.plugin
    }

    /// What it asked for, with the addresses and lines that it got in place of those that it left to the host.
    #[must_use]
    pub fn description(&self) -> &Description {
        &self.description
    }

    /// The outside's ends of its channels, in the order of the description.
    #[must_use]
    pub fn channels(&self) -> &[ChannelEnd] {
        &self.channels
    }

    /// The outside's end of the channel of this name.
    #[must_use]
    pub fn channel(&self, name: &str) -> Option<&ChannelEnd> {
        self.channels.iter().find(|channel| channel.name() == name)
    }

    /// How it is. Does not wait for the device.
    #[must_use]
    pub fn status(&self) -> Status {
        self.counters.status()
    }

    /// What it did. Does not wait for the device.
    #[must_use]
    pub fn usage(&self) -> DeviceUse {
        self.counters.usage()
    }

    fn with<T>(&self, act: impl FnOnce(&mut Supervisor) -> T) -> Option<T> {
        self.shared.lock().as_mut().map(act)
    }
}

impl Lifecycle for Device {
    fn name(&self) -> &str {
        &self.name
    }

    fn reset(&self) {
        self.with(Supervisor::reset);
    }

    fn pause(&self) {
        self.with(|supervisor| supervisor.paused = true);
    }

    fn resume(&self) {
        self.with(|supervisor| {
            supervisor.paused = false;
            // A timer that fired while the machine was being paused fires now.
            if let Some(services) = supervisor.services() {
                services.rearm_timers();
            }
        });
        self.shared.resumed.notify_all();
    }

    fn save(&self) -> Result<(u32, Vec<u8>), String> {
        let gone = || Err(format!("the device `{}` is gone", self.name));
        self.with(Supervisor::save).unwrap_or_else(gone).map(|state| (state.schema, state.data))
    }

    fn restore(&self, schema: u32, data: &[u8]) -> Result<(), String> {
        let state = SavedState { schema, data: data.to_vec() };
        let gone = || Err(format!("the device `{}` is gone", self.name));
        self.with(|supervisor| supervisor.restore(state)).unwrap_or_else(gone)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.claims.clear();
        // Timers, lines and the instance go with the supervisor; the worker ends with the channels.
        let supervisor = self.shared.lock().take();
        self.shared.resumed.notify_all();
        if let Some(mut supervisor) = supervisor
            && let Some(services) = supervisor.services()
        {
            services.close_channels();
        }
    }
}
