//! Keeps one virtio device alive: calls its instance, and when a call faults makes a new one with the state of the old one and the requests that it held.
//!
//! The device is saved after every call into it, so that a new instance begins where the last call ended. It is given every unfinished request again, in
//! the order in which they came, with what was done for each of them (see [`super::table`]): operations that are under way stay under way and become its own. The call that
//! faulted comes last: a batch of requests with the others of its kind, any other call once more. A call that faults twice is left out.
//!
//! The first restart is immediate; the next wait 10 ms, 20 ms and so on, while requests pile up in the rings. More than [`FAILURES`] faults within a minute, or one if
//! the manifest says `failure = "fail"`, and the device is given up: the driver is told that it needs a reset, and its reset tries the device once more.
//!
//! Long for its one story: a call, the state after it, and the restart that begins there.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tenon_abi::{DeviceError, SavedState, VirtioDescription};

use super::instance::{Entry, VirtioInstance};
use super::services::VirtioServices;
use crate::fault::Fault;
use crate::manifest::FailurePolicy;
use crate::plugin::Plugin;
use crate::supervise::Status;

/// How many faults within [`WINDOW`] are mended.
pub(super) const FAILURES: usize = 5;
const WINDOW: Duration = Duration::from_secs(60);
/// The most requests that one call carries.
pub(super) const BATCH: usize = 256;

/// What a virtio device did, counted since it was attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VirtioUse {
    /// Calls into the plugin.
    pub calls: u64,
    /// Calls that brought requests.
    pub batches: u64,
    /// Requests that they brought, each once.
    pub requests: u64,
    /// Requests that were answered.
    pub answers: u64,
    /// Operations on stores.
    pub operations: u64,
    /// Frames that were dropped since the outside did not take them.
    pub dropped_frames: u64,
    /// Calls that faulted.
    pub faults: u64,
    /// New instances that took the place of a faulted one.
    pub restarts: u64,
    /// Calls that were given up because they faulted twice.
    pub lost_calls: u64,
    /// How often a new instance did something else than the old one.
    pub divergences: u64,
}

/// Counters that are written under the instance's lock or by the worker, and read without.
#[derive(Default)]
pub(super) struct Counters {
    status: AtomicU8,
    pub(super) calls: AtomicU64,
    pub(super) batches: AtomicU64,
    pub(super) requests: AtomicU64,
    pub(super) answers: AtomicU64,
    pub(super) operations: AtomicU64,
    dropped_frames: AtomicU64,
    faults: AtomicU64,
    restarts: AtomicU64,
    lost_calls: AtomicU64,
    divergences: AtomicU64,
    last_fault: Mutex<Option<String>>,
}

impl Counters {
    /// Why a call faulted last.
    pub(super) fn last_fault(&self) -> Option<String> {
        self.last_fault.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn fault(&self, fault: &Fault) {
        add(&self.faults, 1);
        *self.last_fault.lock().unwrap_or_else(PoisonError::into_inner) = Some(fault.to_string());
    }

    pub(super) fn usage(&self) -> VirtioUse {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        VirtioUse {
            calls: get(&self.calls),
            batches: get(&self.batches),
            requests: get(&self.requests),
            answers: get(&self.answers),
            operations: get(&self.operations),
            dropped_frames: get(&self.dropped_frames),
            faults: get(&self.faults),
            restarts: get(&self.restarts),
            lost_calls: get(&self.lost_calls),
            divergences: get(&self.divergences),
        }
    }

    pub(super) fn status(&self) -> Status {
        match self.status.load(Ordering::Acquire) {
            0 => Status::Running,
            1 => Status::BackingOff,
            _ => Status::Failed,
        }
    }

    /// Takes over what the services count.
    pub(super) fn note(&self, services: &VirtioServices) {
        self.dropped_frames.store(services.dropped_frames, Ordering::Relaxed);
    }

    fn set(&self, status: Status) {
        self.status.store(status as u8, Ordering::Release);
    }
}

pub(super) fn add(counter: &AtomicU64, more: usize) {
    counter.fetch_add(more as u64, Ordering::Relaxed);
}

/// What new instances are made of.
pub(super) trait Maker: Send {
    /// An instance without a host side.
    fn instance(&self) -> Result<Box<dyn VirtioInstance>, Fault>;

    /// What its plugin is called, for people.
    fn plugin(&self) -> String;

    /// What the manifest says.
    fn policy(&self) -> FailurePolicy;

    /// The schema of its states.
    fn schema(&self) -> u32;
}

impl Maker for Arc<Plugin> {
    fn instance(&self) -> Result<Box<dyn VirtioInstance>, Fault> {
        self.virtio_instance()
    }

    fn plugin(&self) -> String {
        format!("{} {}", self.manifest.id, self.manifest.version)
    }

    fn policy(&self) -> FailurePolicy {
        self.manifest.failure
    }

    fn schema(&self) -> u32 {
        self.manifest.schema
    }
}

/// An instance that cannot be brought up.
pub(super) enum Refusal {
    Fault(&'static str, Fault),
    Refused(&'static str, DeviceError),
    /// The call that is made once more faulted again.
    Again(Fault),
}

impl Refusal {
    fn into_fault(self) -> Fault {
        match self {
            Self::Fault(what, Fault::Contract(text)) => Fault::Contract(format!("{text} (in `{what}`)")),
            Self::Fault(_, fault) | Self::Again(fault) => fault,
            Self::Refused(what, error) => Fault::Contract(format!("`{what}` refused: {error}")),
        }
    }
}

/// A refusal, with the host side that is left.
type Failure = (Refusal, Option<Box<VirtioServices>>);

/// What a call came to; none if the device has failed or the call was lost.
pub(super) type Outcome = Option<Result<u64, DeviceError>>;

/// A device's instance and what is needed to make another.
pub(super) struct Keeper {
    maker: Box<dyn Maker>,
    name: String,
    settings: Vec<(String, String)>,
    pub(super) description: VirtioDescription,
    pub(super) counters: Arc<Counters>,
    /// None when failed.
    instance: Option<Box<dyn VirtioInstance>>,
    /// The host side of a failed device.
    idle: Option<Box<VirtioServices>>,
    checkpoint: SavedState,
    failures: VecDeque<Instant>,
}

/// Makes an instance and asks it what it needs.
pub(super) fn describe(
    maker: &dyn Maker,
    settings: &[(String, String)],
    services: Box<VirtioServices>,
) -> Result<(Box<dyn VirtioInstance>, VirtioDescription), Failure> {
    let mut instance = match maker.instance() {
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

impl Keeper {
    /// Takes charge of an instance that was described and granted what it asked for; starts it and saves it.
    pub(super) fn start(
        maker: Box<dyn Maker>,
        name: String,
        settings: Vec<(String, String)>,
        description: VirtioDescription,
        mut instance: Box<dyn VirtioInstance>,
        counters: Arc<Counters>,
    ) -> Result<Self, Refusal> {
        match instance.start() {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(Refusal::Refused("start", error)),
            Err(fault) => return Err(Refusal::Fault("start", fault)),
        }
        let checkpoint = save(&mut *instance, maker.schema())?;
        if let Some(services) = instance.services() {
            services.base.forget();
            services.base.rearm_channels();
        }
        Ok(Self {
            maker,
            name,
            settings,
            description,
            counters,
            instance: Some(instance),
            idle: None,
            checkpoint,
            failures: VecDeque::new(),
        })
    }

    /// The host side, of a running and of a failed device.
    pub(super) fn services(&mut self) -> Option<&mut VirtioServices> {
        match &mut self.instance {
            Some(instance) => instance.services(),
            None => self.idle.as_deref_mut(),
        }
    }

    pub(super) fn has_failed(&self) -> bool {
        self.instance.is_none()
    }

    /// What the device last saved.
    pub(super) fn state(&self) -> &SavedState {
        &self.checkpoint
    }

    /// Calls the device. `first` is the sequence number of the first request that the call brings.
    pub(super) fn enter(&mut self, entry: &Entry<'_>, first: u64) -> Outcome {
        let Some(instance) = self.instance.as_deref_mut() else {
            // Programs outside that come to a failed device need not wait for it either.
            if let (Entry::SocketReady(_), Some(services)) = (entry, &self.idle) {
                services.clear_sockets();
            }
            return None;
        };
        add(&self.counters.calls, 1);
        match instance.call(entry) {
            Ok(answer) => {
                // A read of the configuration space changes nothing.
                let is_read = matches!(entry, Entry::ConfigRead { .. });
                let saved = (!is_read).then(|| save(instance, self.maker.schema()));
                let outcome = Some(answer);
                self.adjusted(entry, &outcome);
                match saved {
                    Some(Ok(state)) => self.checkpoint = state,
                    Some(Err(refusal)) => {
                        // The call has had its effects: what is lost is what it changed in the device.
                        self.restart(refusal.into_fault(), None, u64::MAX);
                    }
                    None => {}
                }
                if let Some(services) = self.services() {
                    services.base.forget();
                }
                outcome
            }
            Err(fault) => {
                let outcome = self.restart(fault, Some(entry), first);
                self.adjusted(entry, &outcome);
                outcome
            }
        }
    }

    /// New instances are made with a setting that the device has accepted.
    fn adjusted(&mut self, entry: &Entry<'_>, outcome: &Outcome) {
        let (Entry::Adjust { key, value }, Some(Ok(_))) = (*entry, outcome) else { return };
        self.settings.retain(|(known, _)| known != key);
        let at = self.settings.partition_point(|(known, _)| known.as_str() < key);
        self.settings.insert(at, (key.to_owned(), value.to_owned()));
    }

    /// A new instance takes the place of one that faulted. `retry` is the call in which it did.
    #[cold]
    fn restart(&mut self, fault: Fault, retry: Option<&Entry<'_>>, first: u64) -> Outcome {
        self.renew(Some(fault), retry, first)
    }

    /// Brings up new instances until one stands where the old one did, or the device is given up. Without a fault the old one has done nothing wrong, and the first of them counts for
    /// nothing.
    #[cold]
    fn renew(&mut self, mut fault: Option<Fault>, mut retry: Option<&Entry<'_>>, first: u64) -> Outcome {
        let mut instance = self.instance.take()?;
        let mut services = instance.detach();
        // A device that falls over its reset is made anew, as after power-on.
        let state = (!matches!(retry, Some(Entry::Reset))).then(|| self.checkpoint.clone());
        retry = retry.filter(|_| state.is_some());
        // The old instance goes before the new one comes.
        drop(instance);
        self.counters.set(Status::BackingOff);
        loop {
            if let Some(fault) = &fault {
                self.counters.fault(fault);
                if !self.may_restart() {
                    self.give_up(fault, services);
                    return None;
                }
                tracing::warn!(device = self.name, plugin = self.maker.plugin(), %fault, "restarting the device with its state and its requests");
            }
            let Some(held) = services.take() else {
                self.give_up(&fault.unwrap_or_else(no_host_side), None);
                return None;
            };
            match self.bring_up(held, state.as_ref(), retry, first) {
                Ok((instance, answer, state)) => {
                    add(&self.counters.restarts, usize::from(fault.is_some()));
                    self.switch(instance, state);
                    return answer;
                }
                Err((refusal, left)) => {
                    if matches!(refusal, Refusal::Again(_)) && retry.take().is_some() {
                        add(&self.counters.lost_calls, 1);
                    }
                    fault = Some(refusal.into_fault());
                    services = left;
                }
            }
        }
    }

    /// A new instance with the state `state` (else as after power-on) and every unfinished request; also what the call that is made once more came to, and the state after it.
    fn bring_up(
        &self,
        services: Box<VirtioServices>,
        state: Option<&SavedState>,
        retry: Option<&Entry<'_>>,
        first: u64,
    ) -> Result<(Box<dyn VirtioInstance>, Outcome, SavedState), Failure> {
        let mut instance = self.fresh(services, state)?;
        let mut answer = None;
        match self.lead(&mut *instance, retry, first, &mut answer) {
            Ok(state) => Ok((instance, answer, state)),
            Err(refusal) => Err((refusal, instance.detach())),
        }
    }

    /// Gives a new instance the unfinished requests, and makes the call that faulted once more.
    fn lead(
        &self,
        instance: &mut dyn VirtioInstance,
        retry: Option<&Entry<'_>>,
        first: u64,
        answer: &mut Outcome,
    ) -> Result<SavedState, Refusal> {
        let no_services = || Refusal::Fault("restore", no_host_side());
        let services = instance.services().ok_or_else(no_services)?;
        services.ended.clear();
        let records = services.base.set_aside();
        let all = services.table.again();
        let split = all.partition_point(|(sequence, ..)| *sequence < first);
        self.give_again(instance, &all[..split])?;
        // What the faulted call did outside of its requests is not done twice.
        let services = instance.services().ok_or_else(no_services)?;
        services.base.forget();
        services.base.put_back(records);
        match retry {
            Some(Entry::Requests { .. }) => self.give_again(instance, &all[split..])?,
            Some(Entry::Done(_)) | None => {}
            Some(entry) => {
                if let Entry::Timer(timer, at) = entry {
                    services.base.take_due(*timer, *at);
                }
                *answer = Some(instance.call(entry).map_err(Refusal::Again)?);
            }
        }
        save(instance, self.maker.schema())
    }

    /// Gives requests again: sequence, queue and handle of each.
    fn give_again(
        &self,
        instance: &mut dyn VirtioInstance,
        requests: &[(u64, u16, u32)],
    ) -> Result<(), Refusal> {
        for run in requests.chunk_by(|a, b| a.1 == b.1).flat_map(|run| run.chunks(BATCH)) {
            let queue = run[0].1;
            let head = self.description.queues.get(usize::from(queue)).map_or(0, |queue| queue.head);
            let handles: Vec<u32> = run.iter().map(|(.., handle)| *handle).collect();
            let Some(services) = instance.services() else { return Ok(()) };
            let (records, heads) = services.again(&handles, head);
            if !records.is_empty() {
                add(&self.counters.calls, 1);
                let entry = Entry::Requests { queue, requests: &records, heads: &heads };
                if let Err(fault) = instance.call(&entry) {
                    return Err(Refusal::Fault("requests-ready", fault));
                }
            }
            if let Some(services) = instance.services() {
                services.give_back(records, heads);
            }
        }
        Ok(())
    }

    /// A new instance, started and restored from `state` if there is one; its deadlines are held back.
    fn fresh(
        &self,
        mut services: Box<VirtioServices>,
        state: Option<&SavedState>,
    ) -> Result<Box<dyn VirtioInstance>, Failure> {
        services.base.prepare();
        services.clear_sockets();
        let (mut instance, description) = describe(&*self.maker, &self.settings, services)?;
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

    /// An instance in state `state` takes over.
    fn switch(&mut self, mut instance: Box<dyn VirtioInstance>, state: SavedState) {
        if let Some(services) = instance.services() {
            services.base.forget();
            services.base.settle();
            services.base.rearm_channels();
            services.tell_of_ports();
            let divergences = services.divergences + services.base.divergences;
            self.counters.divergences.store(divergences, Ordering::Relaxed);
        }
        self.checkpoint = state;
        self.instance = Some(instance);
        self.counters.set(Status::Running);
    }

    /// Notes a fault; whether it is to be mended. Waits as long as the back-off says.
    fn may_restart(&mut self) -> bool {
        let now = Instant::now();
        while self.failures.front().is_some_and(|at| now.duration_since(*at) > WINDOW) {
            self.failures.pop_front();
        }
        self.failures.push_back(now);
        if self.maker.policy() == FailurePolicy::Fail || self.failures.len() > FAILURES {
            return false;
        }
        if let Some(doublings) = self.failures.len().checked_sub(2) {
            std::thread::sleep(Duration::from_millis(10 << doublings));
        }
        true
    }

    fn give_up(&mut self, fault: &Fault, services: Option<Box<VirtioServices>>) {
        self.counters.set(Status::Failed);
        self.idle = services;
        if let Some(services) = &mut self.idle {
            services.base.forget();
            services.base.prepare();
            services.base.settle();
            // Programs outside need not wait for it.
            services.clear_sockets();
            services.needs_reset();
        }
        tracing::error!(
            device = self.name,
            plugin = self.maker.plugin(),
            "the device has failed and answers no more requests: {fault}. When the driver resets it, it is tried again; if it fails again, report it to the plugin's \
             author or replace the plugin"
        );
    }

    /// The driver has reset the device, and nothing is under way: its requests are forgotten. A failed one gets a new instance.
    pub(super) fn reset(&mut self) {
        self.failures.clear();
        if let Some(services) = self.services() {
            services.forget_requests();
        }
        if self.instance.is_some() {
            self.enter(&Entry::Reset, u64::MAX);
        } else if let Some(services) = self.idle.take() {
            let revived = self.fresh(services, None).and_then(|mut instance| {
                match save(&mut *instance, self.maker.schema()) {
                    Ok(state) => Ok((instance, state)),
                    Err(refusal) => Err((refusal, instance.detach())),
                }
            });
            match revived {
                Ok((instance, state)) => self.switch(instance, state),
                Err((refusal, services)) => {
                    let fault = refusal.into_fault();
                    self.counters.fault(&fault);
                    self.give_up(&fault, services);
                }
            }
        }
        if let Some(services) = self.services() {
            services.outbox.needs_reset = false;
            services.outbox.config_changed = false;
        }
    }

    /// Takes over a state: a new instance is restored from it and given the requests; the old one goes only then. On an error the device goes on with the state that it had and its requests,
    /// but without the streams of its sockets. What the refused state did counts for nothing, whatever the manifest says about failures.
    pub(super) fn restore(&mut self, state: &SavedState) -> Result<(), String> {
        let services = match &mut self.instance {
            Some(instance) => instance.detach(),
            None => self.idle.take(),
        };
        let Some(services) = services else {
            return Err(format!("the device `{}` has no host side", self.name));
        };
        let levels = services.base.levels();
        let had_streams = services.clear_sockets();
        match self.bring_up(services, Some(state), None, u64::MAX) {
            Ok((instance, _, state)) => {
                self.failures.clear();
                self.switch(instance, state);
                Ok(())
            }
            Err((refusal, services)) => {
                let refused = matches!(refusal, Refusal::Refused(..));
                let what = refusal.into_fault();
                if !refused {
                    self.counters.fault(&what);
                }
                if let Some(mut services) = services {
                    services.base.set_levels(&levels);
                    services.base.settle();
                    match &mut self.instance {
                        Some(instance) => instance.attach(services),
                        None => self.idle = Some(services),
                    }
                }
                // The requests were given to the new instance: the old one's hold on them is gone, and so are its streams. Another one has the same state and is given them again.
                if had_streams || self.services().is_some_and(|services| !services.table.is_empty()) {
                    self.renew(None, None, u64::MAX);
                }
                Err(format!("restoring the device `{}`: {what}", self.name))
            }
        }
    }
}

fn no_host_side() -> Fault {
    Fault::Trap("its host side is gone".into())
}

/// Saves an instance and checks that the schema is the one that the manifest promises.
fn save(instance: &mut dyn VirtioInstance, promised: u32) -> Result<SavedState, Refusal> {
    match instance.save() {
        Ok(Ok(state)) if state.schema == promised => Ok(state),
        Ok(Ok(state)) => Err(Refusal::Fault(
            "save",
            Fault::Contract(format!(
                "it saved a state of schema {}, and its plugin.toml says `state.schema = {promised}`",
                state.schema
            )),
        )),
        Ok(Err(error)) => Err(Refusal::Refused("save", error)),
        Err(fault) => Err(Refusal::Fault("save", fault)),
    }
}

impl From<Refusal> for Fault {
    fn from(refusal: Refusal) -> Self {
        refusal.into_fault()
    }
}
