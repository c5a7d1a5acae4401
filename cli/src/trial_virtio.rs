//! `tenon plugin test` for a virtio device: attached as a machine attaches it, between a driver, stores and a network that are the trial's, and put through the suites that any
//! vendor can run. What the suites cannot know comes after them: the settings that an administrator changes while the machine runs.
//!
//! The device works on its own thread, so that after each step the trial waits until there is nothing left to do ([`VirtioDevice::settle`]).

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use tempfile::TempDir;
use tenon_abi::{SavedState, VirtioDescription};
use tenon_core::{Clock, FRAME_HEADER, Lifecycle, NetworkPort, QueueDevice};
use tenon_plugins::{
    AttachError, Plugin, SettingSchema, SettingType, UnixSocket, VirtioDevice, VirtioParts, VirtioUse,
};
use tenon_testkit::{Answered, MemoryStore, Random, Ticket, VirtioSubject, suite};

use crate::trial::{SEED, Settings};
use crate::trial_driver::{Driver, Echo};
use crate::trial_medium::Hand;

/// How large its stores are.
const STORE: u64 = 16 << 20;
/// How long the device may take for what one step brought. Each call has a deadline of its own, and far fewer calls follow from one step.
const PATIENCE: Duration = Duration::from_secs(60);
/// The most timers that fire in one step of time; more are passed over.
const TIMERS: u32 = 1_000;
/// VIRTIO_F_VERSION_1 (virtio 1.2 §6), which the transport adds to what the driver accepts.
const VERSION_1: u64 = 1 << 32;
/// The virtio device type of a disk.
const BLOCK: u16 = 2;

/// Tries a virtio device. `medium` is the plugin of its stores. Returns what was done, a line each.
pub(crate) fn run(plugin: &Arc<Plugin>, settings: Settings<'_>, medium: &Arc<Plugin>) -> Result<Vec<String>> {
    let subject = || Subject::new(plugin.clone(), settings, medium.clone());
    let mut device = subject()?;
    let mut said = suite::virtio(&mut device).map_err(|error| anyhow!(error))?;
    let VirtioUse { calls, requests, answers, operations, .. } = device.device.usage();
    drop(device);
    said.extend(adjusts(&mut subject()?)?);
    let mut device = subject()?;
    if device.description().device_type == BLOCK {
        said.extend(suite::blk(&mut device).map_err(|error| anyhow!("as a disk: {error}"))?);
    }
    // Native code has neither.
    let limits = if plugin.is_native() { "" } else { "; deadlines and limits kept" };
    said.push(format!(
        "{requests} requests in {calls} calls, {answers} answered, each once; {operations} operations on stores{limits}"
    ));
    Ok(said)
}

/// Changes every setting to right and wrong values while the device works.
fn adjusts(device: &mut Subject) -> Result<Option<String>> {
    let config = device.plugin.manifest().config.clone();
    if config.is_empty() {
        return Ok(None);
    }
    let mut numbers = Random::new(SEED);
    let [mut accepted, mut refused] = [0, 0];
    let features = device.description().features;
    device.activate(features).map_err(|error| anyhow!(error))?;
    for (key, schema) in &config {
        for value in values(schema) {
            let change = format!("changing `{key}` to `{}`", value.chars().take(40).collect::<String>());
            let step = |result: Result<(), String>| result.map_err(|error| anyhow!("{change}: {error}"));
            let before = device.save().map_err(|error| anyhow!(error))?;
            let answer = device.device.adjust(key, &value);
            device.settle();
            step(device.alive())?;
            if answer.is_ok() {
                accepted += 1;
                device.settings.retain(|(known, _)| known != key);
                device.settings.push((key.clone(), value.clone()));
                // An instance that is made later, after a crash for one, begins with the new value.
                step(device.restart())?;
            } else {
                refused += 1;
                let after = device.save().map_err(|error| anyhow!(error))?;
                if after != before {
                    bail!("{change} was refused, and the state is {after:?} all the same, not {before:?}");
                }
            }
            let readable = numbers.next().to_le_bytes();
            let _ = device.submit(0, &[(&readable, 512)]);
            step(device.alive())?;
        }
    }
    Ok(Some(format!(
        "{} changes of settings while it works: {accepted} accepted, {refused} refused, no harm",
        accepted + refused
    )))
}

/// Values for a setting, most of them at the edge of what its type allows.
fn values(schema: &SettingSchema) -> Vec<String> {
    let mut values: Vec<String> = match schema.r#type {
        SettingType::Integer => [
            "0",
            "1",
            "2",
            "-1",
            "255",
            "65536",
            "0xffffffff",
            "18446744073709551615",
            "-9223372036854775808",
        ]
        .map(String::from)
        .into(),
        SettingType::Size => ["0", "1", "4096", "64M", "1G", "18446744073709551615"].map(String::from).into(),
        SettingType::String => vec![String::new(), "x".into(), "\u{e9}\u{1f600}".into(), "long".repeat(1024)],
        SettingType::Boolean => ["no", "yes"].map(String::from).into(),
        SettingType::Choice => schema.choices.clone(),
    };
    // Last, so that it goes on as it began.
    values.extend(schema.default.clone());
    values
}

/// The stores, ports, sockets and folders of a device, by their names.
#[derive(Default)]
struct Around {
    hands: Vec<(String, Arc<Hand>)>,
    parts: Vec<(String, Arc<tenon_plugins::Store>)>,
    ports: Vec<(String, Arc<Echo>)>,
    /// Nobody is at the other end.
    sockets: Vec<(String, Arc<UnixSocket>)>,
    /// Empty ones.
    folders: Vec<(String, Arc<tenon_folder::Root>)>,
    /// Where sockets and folders are. Dropped last.
    places: Vec<TempDir>,
}

impl Around {
    /// A new folder of the host.
    fn place(&mut self) -> Result<PathBuf, String> {
        let place = tempfile::tempdir().map_err(|error| format!("a temporary folder: {error}"))?;
        let path = place.path().to_owned();
        self.places.push(place);
        Ok(path)
    }
}

/// A virtio device behind the plugin host.
struct Subject {
    plugin: Arc<Plugin>,
    settings: Vec<(String, String)>,
    medium: Arc<Plugin>,
    clock: Arc<Clock>,
    driver: Arc<Driver>,
    around: Around,
    device: Arc<VirtioDevice>,
    numbers: Random,
    harm: Option<String>,
}

impl Subject {
    fn new(plugin: Arc<Plugin>, settings: Settings<'_>, medium: Arc<Plugin>) -> Result<Self> {
        let (clock, driver) = (Clock::virtual_time(), Driver::new()?);
        let mut around = Around::default();
        let device = attach(&plugin, settings, &medium, &clock, &driver, &mut around)
            .map_err(|error| anyhow!(error))
            .context("it does not start with these settings")?;
        let (numbers, settings) = (Random::new(SEED), settings.to_vec());
        Ok(Self { plugin, settings, medium, clock, driver, around, device, numbers, harm: None })
    }

    /// Another device with the same settings, between stores and ports of its own.
    fn beside(&self) -> Result<Arc<VirtioDevice>, String> {
        let mut around = Around::default();
        for (name, store) in &self.around.parts {
            let (hand, store) = Hand::open(&self.medium, name, store.info().size)?;
            around.hands.push((name.clone(), hand));
            around.parts.push((name.clone(), store));
        }
        attach(&self.plugin, &self.settings, &self.medium, &self.clock, &self.driver, &mut around)
    }

    /// Waits until the device has done all that it can.
    fn settle(&mut self) {
        while self.harm.is_none() {
            let waiting: usize = self.around.hands.iter().map(|(_, hand)| hand.waiting()).sum();
            match self.device.settle(PATIENCE) {
                // What is still under way waits for the trial.
                Some(under_way) if under_way == waiting => return,
                // A store has it, and ends it by itself.
                Some(_) => std::thread::yield_now(),
                None => {
                    self.harm = Some(format!("it does not come to rest within {} s", PATIENCE.as_secs()));
                }
            }
        }
    }

    fn hand(&self, name: &str) -> Option<&Arc<Hand>> {
        self.around.hands.iter().find(|(known, _)| known == name).map(|(_, hand)| hand)
    }
}

/// Attaches a device, and gives it the stores and ports that it asks for by making them when they are missed.
fn attach(
    plugin: &Arc<Plugin>,
    settings: Settings<'_>,
    medium: &Arc<Plugin>,
    clock: &Arc<Clock>,
    driver: &Arc<Driver>,
    around: &mut Around,
) -> Result<Arc<VirtioDevice>, String> {
    // Each time one of them is missed: no device gets more than 16 stores, ports, sockets and folders each.
    for _ in 0..=4 * 16 {
        let port = |(name, port): &(String, Arc<Echo>)| (name.clone(), port.clone() as Arc<dyn NetworkPort>);
        let parts = VirtioParts {
            clock: clock.clone(),
            ram: driver.ram().clone(),
            stores: around.parts.clone(),
            ports: around.ports.iter().map(port).collect(),
            sockets: around.sockets.clone(),
            folders: around.folders.clone(),
        };
        match plugin.attach_virtio("trial", settings, &parts) {
            Ok(device) => return Ok(device),
            Err(AttachError::Missing { what: "store", name, .. }) => {
                let (hand, store) = Hand::open(medium, &name, STORE)?;
                around.hands.push((name.clone(), hand));
                around.parts.push((name, store));
            }
            Err(AttachError::Missing { what: "network port", name, .. }) => {
                around.ports.push((name, Arc::default()));
            }
            Err(AttachError::Missing { what: "socket", name, .. }) => {
                let socket = UnixSocket::open(&around.place()?.join("socket"));
                around.sockets.push((name, socket.map_err(|error| error.to_string())?));
            }
            Err(AttachError::Missing { what: "folder", name, .. }) => {
                let folder = tenon_folder::Root::open(&around.place()?, false);
                around.folders.push((name, folder.map_err(|error| error.to_string())?));
            }
            Err(error) => return Err(error.to_string()),
        }
    }
    Err("it asks for something else each time".into())
}

fn state((schema, data): (u32, Vec<u8>)) -> SavedState {
    SavedState { schema, data }
}

impl VirtioSubject for Subject {
    fn description(&self) -> VirtioDescription {
        self.device.description().clone()
    }

    fn activate(&mut self, features: u64) -> Result<(), String> {
        let queues = self.driver.queues(self.device.description().queues.len());
        self.device.start(features | VERSION_1, queues, self.driver.clone());
        self.settle();
        if self.driver.needs_reset() {
            return Err("it does not take them; the log above may say why".into());
        }
        Ok(())
    }

    fn submit(&mut self, queue: u16, requests: &[(&[u8], usize)]) -> Vec<Ticket> {
        let tickets = self.driver.push(queue, requests);
        self.device.notify(queue);
        self.settle();
        tickets
    }

    fn answered(&mut self, ticket: Ticket) -> Option<Answered> {
        self.driver.answered(ticket)
    }

    fn config_read(&mut self, offset: u32, size: u8) -> u64 {
        let value = self.device.read_config(offset, size);
        self.settle();
        value
    }

    fn config_write(&mut self, offset: u32, size: u8, value: u64) {
        self.device.write_config(offset, size, value);
        self.settle();
    }

    fn advance(&mut self, nanoseconds: u64) {
        let end = self.clock.now().saturating_add(nanoseconds);
        for _ in 0..TIMERS {
            let next = self.clock.next_deadline();
            if next > end {
                break;
            }
            self.clock.advance_to(next);
            self.settle();
        }
        self.clock.set(end);
        // The outside world goes on, too.
        for (_, port) in &self.around.ports {
            let payload = usize::try_from(14 + self.numbers.below(1500)).unwrap_or(14);
            let mut frame = vec![0; FRAME_HEADER];
            frame.extend((0..payload).map(|_| self.numbers.next().to_le_bytes()[0]));
            port.push(frame);
        }
        for channel in self.device.channels() {
            let _ = channel.take(usize::MAX);
            channel.push(&self.numbers.next().to_le_bytes());
        }
        self.settle();
    }

    fn reset(&mut self) {
        let held: Vec<_> = self.around.hands.iter().filter(|(_, hand)| hand.is_held()).collect();
        if held.is_empty() {
            self.device.stop();
        } else {
            // The reset waits for what is under way, which goes on when the device has been told: nothing says when that is, but it needs no more than this.
            std::thread::scope(|threads| {
                threads.spawn(|| self.device.stop());
                std::thread::sleep(Duration::from_millis(20));
                for (_, hand) in held {
                    hand.hold(false);
                }
            });
        }
        self.driver.forget();
        self.settle();
    }

    fn save(&mut self) -> Result<SavedState, String> {
        Lifecycle::save(&*self.device).map(state)
    }

    fn restart(&mut self) -> Result<(), String> {
        let before = self.save()?;
        let after = self.try_state(&before)?;
        if after != before {
            return Err(format!("the restored device saves another state: {after:?}, not {before:?}"));
        }
        self.device.restore(before.schema, &before.data)?;
        self.settle();
        Ok(())
    }

    fn fresh(&mut self) -> Result<SavedState, String> {
        Lifecycle::save(&*self.beside()?).map(state)
    }

    fn try_state(&mut self, tried: &SavedState) -> Result<SavedState, String> {
        let other = self.beside()?;
        let restored = other.restore(tried.schema, &tried.data);
        if other.usage().faults > 0 {
            self.harm.get_or_insert(format!("an instance fell over a state: {restored:?}"));
        }
        restored?;
        Lifecycle::save(&*other).map(state)
    }

    fn alive(&mut self) -> Result<(), String> {
        if let Some(harm) = self.harm.clone().or_else(|| self.driver.wrong()) {
            return Err(harm);
        }
        match (self.device.usage().faults, self.device.last_fault().unwrap_or_default()) {
            (0, _) => Ok(()),
            (1, why) => Err(format!("the instance fell: {why}")),
            (faults, why) => Err(format!("{faults} instances fell, the last one over this: {why}")),
        }
    }

    fn with_store(&mut self, name: &str, act: &mut dyn FnMut(&mut MemoryStore)) -> bool {
        self.hand(name).map(|hand| hand.with(act)).is_some()
    }

    fn hold(&mut self, name: &str, hold: bool) -> bool {
        let held = self.hand(name).map(|hand| hand.hold(hold)).is_some();
        self.settle();
        held
    }

    fn resize_store(&mut self, name: &str, size: u64) -> bool {
        let store = self.around.parts.iter().find(|(known, _)| known == name);
        let resized = store.is_some_and(|(_, store)| store.resize(size).is_ok());
        self.settle();
        resized
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        // Nothing that still waits keeps a store from being closed.
        self.around.hands.iter().for_each(|(_, hand)| hand.hold(false));
        if self.harm.is_some() {
            // Its thread may never end: nobody waits for it.
            std::mem::forget(self.device.clone());
        }
    }
}
