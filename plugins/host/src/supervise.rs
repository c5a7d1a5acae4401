//! Keeps one device alive: calls its instance, and when a call faults makes a new instance with the state of the old one.
//!
//! # What is kept
//!
//! The supervisor holds a checkpoint (what the device last saved) and a journal: every call since then, in order, and beside it, in
//! [`Services`], what the host answered. A new instance is described, started, restored from the checkpoint and led through the journal; it then is
//! where the old one was before the call that faulted, and nothing that the guest or the outside has seen was lost or repeated. When the journal is
//! full a new checkpoint is taken, so that a restart replays at most [`JOURNAL`] calls (well under a millisecond for ordinary devices), and a device
//! pays one `save` for as many accesses.
//!
//! The call that faulted is made once more: what it did before the fault is in the records and is not done again. If it faults again, the device is restarted
//! once more without it: a read gives all ones, a write is lost. That is all that can be lost.
//!
//! # When it ends
//!
//! The first restart is immediate; the next wait 10 ms, 20 ms and so on, on the thread of the call, whose guest notices nothing but time. More than [`FAILURES`]
//! faults within a minute, or one if the manifest says `failure = "fail"`, mark the device failed: its lines are lowered and its timers stopped, reads give all ones,
//! writes are ignored, and the machine goes on. A reset of the machine gives it another chance.
//!
//! Long for its one story: a call, its journal, the checkpoint, and the restart that replays them.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tenon_abi::{Description, SavedState};

use crate::fault::Fault;
use crate::instance::{Call, DeviceInstance};
use crate::manifest::FailurePolicy;
use crate::plugin::Plugin;
use crate::services::Services;

/// How many calls are noted before the device is saved.
pub(crate) const JOURNAL: usize = 1024;
/// How many faults within [`WINDOW`] are mended.
const FAILURES: usize = 5;
const WINDOW: Duration = Duration::from_secs(60);

/// How a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// It answers.
    Running,
    /// It is being restarted, and whoever called it waits.
    BackingOff,
    /// It was given up: reads give all ones, writes are ignored.
    Failed,
}

/// What a device did, counted since it was attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceUse {
    /// Calls into the plugin by the guest, the clock and the outside.
    pub calls: u64,
    /// Calls that faulted.
    pub faults: u64,
    /// New instances that took the place of a faulted one.
    pub restarts: u64,
    /// Calls that were given up because they faulted twice.
    pub lost_calls: u64,
    /// Checkpoints taken.
    pub checkpoints: u64,
    /// Restarts after which the new instance did not do what the old one had done.
    pub divergences: u64,
}

/// Counters that are written under the instance's lock and read without it.
#[derive(Default)]
pub(crate) struct Counters {
    status: AtomicU8,
    calls: AtomicU64,
    faults: AtomicU64,
    restarts: AtomicU64,
    lost_calls: AtomicU64,
    checkpoints: AtomicU64,
    divergences: AtomicU64,
}

impl Counters {
    pub(crate) fn usage(&self) -> DeviceUse {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        DeviceUse {
            calls: get(&self.calls),
            faults: get(&self.faults),
            restarts: get(&self.restarts),
            lost_calls: get(&self.lost_calls),
            checkpoints: get(&self.checkpoints),
            divergences: get(&self.divergences),
        }
    }

    pub(crate) fn status(&self) -> Status {
        match self.status.load(Ordering::Relaxed) {
            0 => Status::Running,
            1 => Status::BackingOff,
            _ => Status::Failed,
        }
    }

    fn set(&self, status: Status) {
        self.status.store(status as u8, Ordering::Relaxed);
    }
}

/// One more; there is one writer at a time, so no atomic addition is needed.
fn count(counter: &AtomicU64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
}

/// What happened to a device.
#[derive(Clone, Copy)]
enum Step {
    /// It was called.
    Call(Call),
    /// Its timer came due: it is no longer armed, or for the next period.
    Due { timer: u32, at: u64 },
}

/// A device's instance and what is needed to make another.
pub(crate) struct Supervisor {
    plugin: Arc<Plugin>,
    name: String,
    settings: Vec<(String, String)>,
    description: Description,
    pub(crate) counters: Arc<Counters>,
    /// None when failed.
    instance: Option<Box<dyn DeviceInstance>>,
    /// The host side of a failed device.
    idle: Option<Box<Services>>,
    checkpoint: SavedState,
    journal: Vec<Step>,
    failures: VecDeque<Instant>,
    pub(crate) paused: bool,
}

/// A first instance that cannot be brought up.
pub(crate) enum Refusal {
    Fault(&'static str, Fault),
    Refused(&'static str, tenon_abi::DeviceError),
}

impl Refusal {
    fn into_fault(self) -> Fault {
        match self {
            Self::Fault(what, fault) => match fault {
                Fault::Contract(text) => Fault::Contract(format!("{text} (in `{what}`)")),
                fault => fault,
            },
            Self::Refused(what, error) => Fault::Contract(format!("`{what}` refused: {error}")),
        }
    }
}

/// Makes an instance and asks it what it needs.
pub(crate) fn describe(
    plugin: &Plugin,
    settings: &[(String, String)],
    services: Box<Services>,
) -> Result<(Box<dyn DeviceInstance>, Description), (Refusal, Option<Box<Services>>)> {
    let mut instance = match plugin.instantiate() {
        Ok(instance) => instance,
        Err(fault) => return Err((Refusal::Fault("instantiate", fault), Some(services))),
    };
    instance.attach(services);
    match instance.describe(settings) {
        Ok(Ok(description)) => Ok((instance, description)),
        Ok(Err(error)) => Err((Refusal::Refused("describe", error), instance.detach())),
        Err(fault) => Err((Refusal::Fault("describe", fault), instance.detach())),
    }
}

impl Supervisor {
    /// Takes charge of an instance that was described and granted what it asked for; starts it and takes the first checkpoint.
    pub(crate) fn start(
        plugin: Arc<Plugin>,
        name: String,
        settings: Vec<(String, String)>,
        description: Description,
        mut instance: Box<dyn DeviceInstance>,
        counters: Arc<Counters>,
    ) -> Result<Self, Refusal> {
        match instance.start() {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(Refusal::Refused("start", error)),
            Err(fault) => return Err(Refusal::Fault("start", fault)),
        }
        let checkpoint = save(&mut *instance, &plugin)?;
        if let Some(services) = instance.services() {
            services.forget();
            services.rearm_channels();
        }
        Ok(Self {
            plugin,
            name,
            settings,
            description,
            counters,
            instance: Some(instance),
            idle: None,
            checkpoint,
            journal: Vec::with_capacity(JOURNAL),
            failures: VecDeque::new(),
            paused: false,
        })
    }

    /// The host side, of a running and of a failed device.
    pub(crate) fn services(&mut self) -> Option<&mut Services> {
        match &mut self.instance {
            Some(instance) => instance.services(),
            None => self.idle.as_deref_mut(),
        }
    }

    /// Calls the device. None if it has failed, or if the call was lost.
    #[inline]
    pub(crate) fn call(&mut self, call: Call) -> Option<u64> {
        let instance = self.instance.as_deref_mut()?;
        count(&self.counters.calls);
        match instance.call(call) {
            Ok(value) => {
                self.journal.push(Step::Call(call));
                if self.journal.len() >= JOURNAL || instance.crowded() {
                    self.checkpoint();
                }
                Some(value)
            }
            Err(fault) => self.recover(call, fault),
        }
    }

    /// Timer `index` fired at `now`. A call that is late or was cancelled is dropped; one that comes while the machine is paused is made when it goes on.
    pub(crate) fn timer(&mut self, index: u32, now: u64) {
        if self.paused {
            return;
        }
        if self.services().is_some_and(|services| services.take_due(index, now)) {
            self.journal.push(Step::Due { timer: index, at: now });
            self.call(Call::Timer(index));
        }
    }

    /// Saves the device and forgets the journal. A device that cannot be saved is restarted, so that its journal does not grow for ever.
    fn checkpoint(&mut self) {
        let Some(instance) = self.instance.as_deref_mut() else { return };
        match save(instance, &self.plugin) {
            Ok(state) => {
                if let Some(services) = instance.services() {
                    services.forget();
                }
                self.adopt(state);
            }
            Err(refusal) => self.restart(refusal.into_fault(), None),
        }
    }

    fn adopt(&mut self, state: SavedState) {
        count(&self.counters.checkpoints);
        self.checkpoint = state;
        self.journal.clear();
    }

    /// `call` has faulted: makes a new instance, and the call once more.
    #[cold]
    fn recover(&mut self, call: Call, fault: Fault) -> Option<u64> {
        tracing::debug!(device = self.name, ?call, "the call that faulted");
        let mut value = None;
        self.restart(fault, Some((call, &mut value)));
        value
    }

    /// Brings up new instances until one stands where the old one did, or the device is given up. `retry` is the call that faulted, and where its
    /// value goes if it succeeds the second time.
    #[cold]
    fn restart(&mut self, mut fault: Fault, mut retry: Option<(Call, &mut Option<u64>)>) {
        let Some(mut instance) = self.instance.take() else { return };
        let mut services = instance.detach();
        // The old instance's store goes before the new one's comes.
        drop(instance);
        self.counters.set(Status::BackingOff);
        loop {
            count(&self.counters.faults);
            if !self.may_restart() {
                return self.give_up(&fault, services);
            }
            tracing::warn!(device = self.name, plugin = self.plugin.manifest.id, %fault, "restarting the device with its state");
            let Some(held) = services.take() else {
                return self.give_up(&fault, None);
            };
            match self.bring_up(held) {
                Ok((mut instance, diverged)) => {
                    // The records of the faulted call begin where those of the journal end.
                    let mark = instance.services().map_or(0, |services| services.position());
                    if let Some((call, value)) = retry.take() {
                        match instance.call(call) {
                            Ok(answer) => {
                                *value = Some(answer);
                                self.journal.push(Step::Call(call));
                            }
                            Err(again) => {
                                count(&self.counters.lost_calls);
                                fault = again;
                                services = instance.detach();
                                if let Some(services) = &mut services {
                                    services.truncate(mark);
                                    if let Call::Readable(channel) = call {
                                        services.want_channel(channel);
                                    }
                                }
                                continue;
                            }
                        }
                    } else if let Some(services) = instance.services() {
                        services.truncate(mark);
                    }
                    if diverged {
                        count(&self.counters.divergences);
                    }
                    count(&self.counters.restarts);
                    if let Some(services) = instance.services() {
                        services.settle();
                    }
                    self.instance = Some(instance);
                    self.counters.set(Status::Running);
                    return;
                }
                Err((refusal, left)) => {
                    fault = refusal.into_fault();
                    services = left;
                }
            }
        }
    }

    /// A new instance with the state of the old one; its levels and deadlines are still held back. Also whether it did something else on the way.
    fn bring_up(
        &self,
        services: Box<Services>,
    ) -> Result<(Box<dyn DeviceInstance>, bool), (Refusal, Option<Box<Services>>)> {
        let before = services.divergences;
        let mut instance = self.fresh(services, Some(&self.checkpoint))?;
        if let Some(services) = instance.services() {
            services.begin_replay();
        }
        for step in &self.journal {
            match *step {
                Step::Call(call) => {
                    if let Err(fault) = instance.call(call) {
                        return Err((Refusal::Fault("replay", fault), instance.detach()));
                    }
                }
                Step::Due { timer, at } => {
                    instance.services().map(|services| services.take_due(timer, at));
                }
            }
        }
        let diverged = instance.services().is_some_and(|services| services.divergences != before);
        Ok((instance, diverged))
    }

    /// A new instance, started and restored from `state` if there is one; its levels and deadlines are held back.
    fn fresh(
        &self,
        mut services: Box<Services>,
        state: Option<&SavedState>,
    ) -> Result<Box<dyn DeviceInstance>, (Refusal, Option<Box<Services>>)> {
        services.prepare();
        let (mut instance, description) = describe(&self.plugin, &self.settings, services)?;
        if description != self.description {
            let fault = Fault::Contract("`describe` gives another description than the first time".into());
            return Err((Refusal::Fault("describe", fault), instance.detach()));
        }
        let started = match instance.start() {
            Ok(Ok(())) => match state.map_or(Ok(Ok(())), |state| instance.restore(state)) {
                Ok(Ok(())) => return Ok(instance),
                Ok(Err(error)) => Refusal::Refused("restore", error),
                Err(fault) => Refusal::Fault("restore", fault),
            },
            Ok(Err(error)) => Refusal::Refused("start", error),
            Err(fault) => Refusal::Fault("start", fault),
        };
        Err((started, instance.detach()))
    }

    /// Notes a fault; whether it is to be mended. Waits as long as the back-off says.
    fn may_restart(&mut self) -> bool {
        let now = Instant::now();
        while self.failures.front().is_some_and(|at| now.duration_since(*at) > WINDOW) {
            self.failures.pop_front();
        }
        self.failures.push_back(now);
        if self.plugin.manifest.failure == FailurePolicy::Fail || self.failures.len() > FAILURES {
            return false;
        }
        if let Some(doublings) = self.failures.len().checked_sub(2) {
            std::thread::sleep(Duration::from_millis(10 << doublings));
        }
        true
    }

    fn give_up(&mut self, fault: &Fault, services: Option<Box<Services>>) {
        self.counters.set(Status::Failed);
        self.idle = services;
        if let Some(services) = &mut self.idle {
            services.forget();
            services.prepare();
            services.settle();
        }
        self.journal.clear();
        tracing::error!(
            device = self.name,
            plugin = self.plugin.manifest.id,
            "the device has failed and is switched off: {fault}. Its registers read as all ones from here on. A reset of the machine tries it again; if it \
             fails again, report it to the plugin's author or replace the plugin (version {})",
            self.plugin.manifest.version
        );
    }

    /// Puts the device into its state after power-on; a failed one gets a new instance.
    pub(crate) fn reset(&mut self) {
        self.failures.clear();
        if self.instance.is_some() {
            self.call(Call::Reset);
            if self.counters.status() == Status::Running {
                self.checkpoint();
            }
        } else if let Some(services) = self.idle.take() {
            self.revive(services);
        }
    }

    fn revive(&mut self, services: Box<Services>) {
        let started =
            self.fresh(services, None).and_then(|mut instance| match save(&mut *instance, &self.plugin) {
                Ok(state) => Ok((instance, state)),
                Err(refusal) => Err((refusal, instance.detach())),
            });
        match started {
            Ok((instance, state)) => self.switch(instance, state),
            Err((refusal, services)) => {
                count(&self.counters.faults);
                self.give_up(&refusal.into_fault(), services);
            }
        }
    }

    /// An instance in state `state` takes over.
    fn switch(&mut self, mut instance: Box<dyn DeviceInstance>, state: SavedState) {
        if let Some(services) = instance.services() {
            services.forget();
            services.settle();
            services.rearm_channels();
        }
        self.adopt(state);
        self.instance = Some(instance);
        self.counters.set(Status::Running);
    }

    /// The device's whole state.
    pub(crate) fn save(&mut self) -> Result<SavedState, String> {
        let Some(_) = &self.instance else { return Err(format!("the device `{}` has failed", self.name)) };
        let before = self.counters.checkpoints.load(Ordering::Relaxed);
        // A fault in `save` restarts the device; the state is then tried once more.
        for _ in 0..2 {
            self.checkpoint();
            if self.counters.checkpoints.load(Ordering::Relaxed) != before {
                return Ok(self.checkpoint.clone());
            }
        }
        Err(format!("the device `{}` cannot be saved; see the log", self.name))
    }

    /// Takes over a state: a new instance is restored from it, and the old one goes only then. On an error the old one stays as it was.
    pub(crate) fn restore(&mut self, state: SavedState) -> Result<(), String> {
        let Some(services) = self.instance.as_mut().and_then(|i| i.detach()).or_else(|| self.idle.take())
        else {
            return Err(format!("the device `{}` has no host side", self.name));
        };
        let levels = services.levels();
        match self.fresh(services, Some(&state)) {
            Ok(instance) => {
                self.failures.clear();
                self.switch(instance, state);
                Ok(())
            }
            Err((refusal, services)) => {
                let what = refusal.into_fault();
                if let Some(mut services) = services {
                    services.set_levels(&levels);
                    services.settle();
                    match &mut self.instance {
                        Some(instance) => instance.attach(services),
                        None => self.idle = Some(services),
                    }
                }
                Err(format!("restoring the device `{}`: {what}", self.name))
            }
        }
    }
}

/// Saves an instance and checks that the schema is the one that the manifest promises.
fn save(instance: &mut dyn DeviceInstance, plugin: &Plugin) -> Result<SavedState, Refusal> {
    match instance.save() {
        Ok(Ok(state)) if state.schema == plugin.manifest.schema => Ok(state),
        Ok(Ok(state)) => Err(Refusal::Fault(
            "save",
            Fault::Contract(format!(
                "it saved a state of schema {}, and its plugin.toml says `state.schema = {}`",
                state.schema, plugin.manifest.schema
            )),
        )),
        Ok(Err(error)) => Err(Refusal::Refused("save", error)),
        Err(fault) => Err(Refusal::Fault("save", fault)),
    }
}
