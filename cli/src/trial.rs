//! `tenon plugin test`: a built component, tried as a machine would use it, with a hostile guest.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use crossbeam_channel::RecvTimeoutError;
use tenon_abi::{Machine as MachineDescription, MemoryKind, MemoryRange};
use tenon_core::{Bus, Clock, InterruptController, Interrupts, Lifecycle, Msi, Ram, Requests, Space};
use tenon_plugins::{GuestError, Image, Kind, MachineParts, Plugin, Status};
use tenon_testkit::Random;

use crate::Usage;
use crate::args::KeepsChoice;
use crate::disks::with_files;
use crate::plugins::Shelf;

/// How many random accesses a device is given in each round.
const ACCESSES: u32 = 20_000;
/// How many garbage images a personality is given.
const IMAGES: u32 = 200;

/// Interrupts that go nowhere.
struct Nowhere;

impl InterruptController for Nowhere {
    fn set_line(&self, _: u32, _: bool) {}
    fn signal_msi(&self, _: Msi) {}
}

/// The numbers of every trial begin here.
pub(crate) const SEED: u64 = 0x7e17;

/// Settings as the command line has them; the manifest's defaults are added to them.
pub(crate) type Settings<'a> = &'a [(String, String)];

/// How long a trial may take: native code has no deadline of its own.
const PATIENCE: Duration = Duration::from_secs(600);

/// Tries a plugin. Returns what was done, a line each.
pub(crate) fn run(
    plugin: &Arc<Plugin>,
    settings: Settings<'_>,
    keeps: Option<KeepsChoice>,
    shelf: &Shelf,
) -> Result<Vec<String>> {
    let settings = with_files(plugin, settings)?;
    plugin.manifest().settings(&settings).map_err(|error| Usage(anyhow!("--set: {error}")))?;
    if keeps.is_some() && plugin.manifest().kind != Kind::Store {
        bail!(Usage(anyhow!("--keeps: `{}` is no store", plugin.manifest().id)));
    }
    let (memory, medium) = (shelf.load("memory")?, crate::trial_medium::plugin(shelf.host())?);
    let plugin = plugin.clone();
    let (sender, receiver) = crossbeam_channel::bounded(1);
    // On a thread of its own, which is left behind when it does not come back.
    std::thread::Builder::new()
        .name("trial".into())
        .spawn(move || sender.send(by_kind(&plugin, &settings, keeps, &memory, &medium)))
        .context("starting a thread")?;
    match receiver.recv_timeout(PATIENCE) {
        Ok(result) => result,
        Err(RecvTimeoutError::Timeout) => {
            bail!("it has not come back within {} minutes", PATIENCE.as_secs() / 60)
        }
        Err(RecvTimeoutError::Disconnected) => bail!("the trial itself has failed; see the log above"),
    }
}

fn by_kind(
    plugin: &Arc<Plugin>,
    settings: Settings<'_>,
    keeps: Option<KeepsChoice>,
    memory: &Arc<Plugin>,
    medium: &Arc<Plugin>,
) -> Result<Vec<String>> {
    match plugin.manifest().kind {
        Kind::Device if plugin.is_virtio() => crate::trial_virtio::run(plugin, settings, medium),
        Kind::Device => device(plugin, settings),
        Kind::Store => crate::trial_store::run(plugin, settings, keeps, memory),
        Kind::Personality => personality(plugin, settings),
    }
}

/// A machine with nothing in it.
fn machine(clock: &Arc<Clock>) -> MachineParts {
    MachineParts {
        pio: Bus::new(Space::Pio),
        mmio: Bus::new(Space::Mmio),
        interrupts: Interrupts::new(Arc::new(Nowhere)),
        clock: clock.clone(),
        requests: Requests::new(),
        mmio_window: 0xd000_0000..0xe000_0000,
    }
}

fn device(plugin: &Arc<Plugin>, settings: Settings<'_>) -> Result<Vec<String>> {
    let clock = Clock::virtual_time();
    let parts = machine(&clock);
    let device = plugin.attach("trial", settings, &parts)?;
    let life: &dyn Lifecycle = &*device;
    let description = device.description();
    let mut said = vec![format!(
        "attached with {} register ranges and {} lines",
        description.regions.len(),
        description.lines.len()
    )];
    life.save().map_err(|text| anyhow!("save after start: {text}"))?;
    let mut numbers = Random::new(SEED);
    for round in 0..3 {
        for _ in 0..ACCESSES {
            access(&device, &parts, &mut numbers);
        }
        ensure!(
            device.status() == Status::Running && device.usage().faults == 0,
            "random accesses made the device fault {} times (see the log above)",
            device.usage().faults
        );
        let (schema, state) = life.save().map_err(|text| anyhow!("save in round {round}: {text}"))?;
        life.restore(schema, &state).map_err(|text| anyhow!("its own state is refused: {text}"))?;
        let again = life.save().map_err(|text| anyhow!("save after restore: {text}"))?;
        ensure!(again == (schema, state), "a state that was saved, restored and saved again is not the same");
    }
    said.push(format!("{} random accesses, no fault; states restore to the same", 3 * ACCESSES));
    // A device may count from when it was started, so a reset is compared with one that starts at the same time.
    life.reset();
    let fresh = plugin.attach("fresh", settings, &machine(&clock))?;
    let power_on = fresh.save().map_err(|text| anyhow!("save after start: {text}"))?;
    let after = life.save().map_err(|text| anyhow!("save after reset: {text}"))?;
    ensure!(after == power_on, "the state after a reset is not the state after power-on");
    said.push("a reset gives the state after power-on".into());
    let (schema, state) = power_on;
    let mut refused = 0;
    for length in 0..state.len() {
        refused += u32::from(life.restore(schema, &state[..length]).is_err());
    }
    ensure!(
        usize::try_from(refused)? == state.len(),
        "{} of {} truncated states were accepted",
        state.len() - usize::try_from(refused)?,
        state.len()
    );
    ensure!(
        life.restore(schema + 1, &state).is_err(),
        "a state of schema {} was accepted by schema {schema}",
        schema + 1
    );
    ensure!(device.usage().faults == 0, "a damaged state made the device fault");
    said.push(format!("{refused} truncated states and one of a newer schema refused"));
    Ok(said)
}

fn access(device: &tenon_plugins::Device, parts: &MachineParts, numbers: &mut Random) {
    let regions = &device.description().regions;
    if numbers.below(16) == 0 {
        parts.clock.advance_to(parts.clock.now() + numbers.below(50_000_000));
    }
    if numbers.below(16) == 0
        && let Some(channel) = device.channels().first()
    {
        channel.push(&numbers.next().to_le_bytes());
    }
    if regions.is_empty() {
        return;
    }
    let region = &regions[usize::try_from(numbers.below(regions.len() as u64)).unwrap_or(0)];
    let (bus, widest) = match region.space {
        tenon_abi::Space::Pio => (&parts.pio, 3),
        tenon_abi::Space::Mmio => (&parts.mmio, 4),
    };
    let size = 1u8 << numbers.below(widest);
    let address = region.base.unwrap_or_default() + numbers.below(region.size);
    if numbers.below(2) == 0 {
        let _ = bus.read(address, size);
    } else {
        let value = match numbers.below(4) {
            0 => 0,
            1 => u64::MAX,
            _ => numbers.next(),
        };
        bus.write(address, size, value);
    }
}

fn personality(plugin: &Arc<Plugin>, settings: Settings<'_>) -> Result<Vec<String>> {
    let size = 64 << 20;
    let memory = vec![MemoryRange { start: 0, size, kind: MemoryKind::Ram }];
    let machine = MachineDescription { vcpus: 1, memory, rsdp: None };
    let ram = Ram::new(size)?;
    let mut numbers = Random::new(SEED);
    let (mut refused, mut taken) = (0, 0);
    for number in 0..IMAGES {
        let length = usize::try_from(numbers.below(1 << (number % 17)))?;
        let mut bytes: Vec<u8> = (0..length).map(|_| numbers.next().to_le_bytes()[0]).collect();
        // Half of them begin as an ELF file does, so that more than the first check is reached.
        if number % 2 == 0 {
            bytes.splice(0..length.min(20), *b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0");
        }
        match plugin.load_guest(&machine, &ram, vec![Image::from_bytes("kernel", bytes)], settings) {
            Ok(_) => taken += 1,
            Err(GuestError::Refused { .. }) => refused += 1,
            Err(error) => bail!("a damaged image of {length} bytes made the personality fail: {error}"),
        }
    }
    match plugin.load_guest(&machine, &ram, Vec::new(), settings) {
        Ok(_) => bail!("it loads a guest without any image"),
        Err(GuestError::Refused { .. }) => {}
        Err(error) => bail!("without images the personality fails instead of refusing: {error}"),
    }
    Ok(vec![format!(
        "{IMAGES} damaged images: {refused} refused, {taken} loaded, no fault; no image: refused"
    )])
}
