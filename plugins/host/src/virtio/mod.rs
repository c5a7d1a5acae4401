//! Virtio devices: how a transport, a store's outcomes, the clock and the outside reach a plugin that answers requests.
//!
//! Long for the one thing that a machine attaches: what it is made of, checked, and what is asked of it.
//!
//! # Threads and locks
//!
//! Each device has one thread ([`worker`]), which owns its queues and makes every call but reads and writes of the configuration space; those come on the vCPU's
//! thread. Calls into the instance are made under one lock. It is never held while a store works, while the transport is called, or while the thread sleeps; nothing that
//! the plugin can call waits, but for folders of the host: their file system is waited for on the device's thread, and meanwhile a read of that device's configuration space waits as well.
//!
//! | what | where |
//! | --- | --- |
//! | the thread, its rounds and batches | [`worker`] |
//! | what it is woken by | [`inbox`] |
//! | requests that are held, and what was done for them | [`table`] |
//! | what the plugin's imports do | [`services`], [`sockets`], of folders [`folders`] |
//! | saving, restarts, giving up | [`keeper`] |
//! | the two sorts of instance | [`wasm`], [`native`] |

mod folders;
mod inbox;
mod instance;
mod keeper;
mod native;
mod pages;
mod services;
mod sockets;
mod table;
mod wasm;
mod worker;

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::Sender;
use tenon_abi::{DeviceError, SavedState, VirtioDescription};
use tenon_core::{
    Clock, Lifecycle, NetworkPort, PortNews, QueueDevice, QueueProfile, QueueTransport, Ram, RequestQueue,
    Requests,
};

use self::inbox::{Inbox, News};
use self::instance::{Entry, VirtioInstance};
use self::keeper::{Counters, Keeper, Maker, Outcome, Refusal, describe};
use self::native::NativeVirtio;
use self::services::VirtioServices;
use self::wasm::WasmVirtio;
use self::worker::{Command, Shared, Worker};
use crate::channel::{Channel, ChannelEnd, ChannelNews};
use crate::device::AttachError;
use crate::fault::Fault;
use crate::manifest::Kind;
use crate::plugin::{Code, Plugin};
use crate::services::Services;
use crate::sockets::UnixSocket;
use crate::store::Store;
use crate::supervise::Status;

pub use keeper::VirtioUse;
pub(crate) use wasm::VirtioState;

/// The parts of a machine that a virtio device is attached to, and what it may be given by name.
#[derive(Clone)]
pub struct VirtioParts {
    /// The machine's clock.
    pub clock: Arc<Clock>,
    /// The guest's memory.
    pub ram: Arc<Ram>,
    /// Stores, by the names by which devices ask for them, such as `disk`.
    pub stores: Vec<(String, Arc<Store>)>,
    /// Network ports, by the names by which devices ask for them, such as `net`.
    pub ports: Vec<(String, Arc<dyn NetworkPort>)>,
    /// Sockets, by the names by which devices ask for them, such as `vsock`. Each is one device's.
    pub sockets: Vec<(String, Arc<UnixSocket>)>,
    /// Folders of the host, by the names by which devices ask for them, such as `share`.
    pub folders: Vec<(String, Arc<tenon_folder::Root>)>,
}

/// A plugin's virtio device in a machine. A transport drives it by [`QueueDevice`]. Dropping it ends it as [`QueueDevice::stop`] does.
pub struct VirtioDevice {
    plugin: Option<Arc<Plugin>>,
    description: VirtioDescription,
    profile: QueueProfile,
    channels: Vec<ChannelEnd>,
    shared: Arc<Shared>,
    commands: Sender<Command>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Plugin {
    pub(crate) fn virtio_instance(&self) -> Result<Box<dyn VirtioInstance>, Fault> {
        match &self.code {
            Code::Virtio(pre) => Ok(Box::new(WasmVirtio::new(&self.host, pre, &self.manifest.limits)?)),
            Code::Native(native) => match native.virtio() {
                Some(table) => Ok(Box::new(NativeVirtio::new(native, table)?)),
                None => Err(Fault::Contract("it is no virtio device".into())),
            },
            _ => Err(Fault::Contract("it is no virtio device".into())),
        }
    }

    /// Makes a virtio device of this plugin under `name`: checks the settings, asks the plugin what it needs, grants all of it or refuses, and starts it. A transport then
    /// drives it. Works while the machine runs.
    ///
    /// # Errors
    /// A setting is wrong, the plugin refuses or fails, or something that it needs is not there.
    pub fn attach_virtio(
        self: &Arc<Self>,
        name: &str,
        settings: &[(String, String)],
        parts: &VirtioParts,
    ) -> Result<Arc<VirtioDevice>, AttachError> {
        if self.manifest.kind != Kind::Device {
            return Err(AttachError::NotADevice {
                plugin: self.manifest.id.clone(),
                kind: self.manifest.kind,
            });
        }
        if !self.is_virtio() {
            return Err(AttachError::OtherDevice {
                plugin: self.manifest.id.clone(),
                what: "a device of registers, and has no virtqueues",
            });
        }
        let settings = self.manifest.settings(settings)?;
        VirtioDevice::attach(Box::new(self.clone()), Some(self.clone()), name, settings, parts)
    }
}

impl VirtioDevice {
    fn attach(
        maker: Box<dyn Maker>,
        plugin: Option<Arc<Plugin>>,
        name: &str,
        settings: Vec<(String, String)>,
        parts: &VirtioParts,
    ) -> Result<Arc<Self>, AttachError> {
        let device = || name.to_owned();
        let refused = |refusal| match refusal {
            Refusal::Refused(call, error) => AttachError::Refused { device: device(), call, error },
            Refusal::Fault(call, fault) => AttachError::Fault { device: device(), call, fault },
            Refusal::Again(fault) => AttachError::Fault { device: device(), call: "start", fault },
        };
        let inbox = Arc::new(Inbox::default());
        let base = Services::new(name, parts.clock.clone(), Requests::new());
        let services = VirtioServices::new(base, parts.ram.clone(), inbox.clone());
        let (mut instance, description) =
            describe(&*maker, &settings, services).map_err(|(refusal, _)| refused(refusal))?;
        check(name, &description)?;
        let stores = choose(name, "store", &description.stores, &parts.stores)?;
        let ports = choose(name, "network port", &description.ports, &parts.ports)?;
        let sockets = choose(name, "socket", &description.sockets, &parts.sockets)?;
        let folders = choose(name, "folder", &description.folders, &parts.folders)?;
        let folders = folders
            .iter()
            .map(tenon_folder::Folder::new)
            .collect::<Result<_, _>>()
            .map_err(|error| AttachError::Folder { device: device(), error })?;
        let tell = |news, index: u32| {
            let inbox = Arc::downgrade(&inbox);
            move || {
                if let Some(inbox) = inbox.upgrade() {
                    inbox.tell(news, index);
                }
            }
        };
        let timers = (0..description.timers)
            .map(|index| {
                let due = tell(News::Timer, index);
                parts.clock.timer(move |_| due())
            })
            .collect();
        let channels: Vec<_> = (0..)
            .zip(&description.channels)
            .map(|(index, name)| {
                let (readable, writable) = (tell(News::Readable, index), tell(News::Writable, index));
                let news = move |news| match news {
                    ChannelNews::Readable(_) => readable(),
                    ChannelNews::Writable(_) => writable(),
                };
                Channel::new(name.clone(), index, Box::new(news))
            })
            .collect();
        for (index, store) in (0..).zip(&stores) {
            store.watch(tell(News::Store, index));
        }
        for (index, port) in (0..).zip(&ports) {
            let (frames, changed) = (tell(News::Frames, index), tell(News::Port, index));
            port.watch(Box::new(move |news| match news {
                PortNews::Frames => frames(),
                PortNews::Changed => changed(),
            }));
        }
        for (index, socket) in (0..).zip(&sockets) {
            socket.watch(tell(News::Socket, index));
        }
        if let Some(services) = instance.services() {
            services.base.grant(Vec::new(), timers, channels.clone());
            services.grant(stores.clone(), ports, sockets, folders);
        }
        let profile = QueueProfile {
            device_type: description.device_type,
            features: description.features,
            queues: description.queues.iter().map(|queue| queue.max_size).collect(),
            config_size: description.config_size,
        };
        let counters = Arc::new(Counters::default());
        let shared = Arc::new(Shared {
            name: device(),
            keeper: Mutex::new(None),
            inbox: inbox.clone(),
            counters: counters.clone(),
            stores: stores.clone(),
        });
        let keeper = Keeper::start(maker, device(), settings, description.clone(), instance, counters)
            .map_err(refused)?;
        *shared.lock() = Some(keeper);
        let (commands, receiver) = crossbeam_channel::unbounded();
        let worker = Worker::new(shared.clone(), receiver);
        let thread = std::thread::Builder::new()
            .name(format!("{name}-work"))
            .spawn(move || worker.serve())
            .map_err(|error| AttachError::Thread { device: device(), error })?;
        Ok(Arc::new(Self {
            plugin,
            description,
            profile,
            channels: channels.into_iter().map(ChannelEnd::new).collect(),
            shared,
            commands,
            thread: Mutex::new(Some(thread)),
        }))
    }

    /// The plugin that it was made of.
    #[must_use]
    pub fn plugin(&self) -> Option<&Arc<Plugin>> {
        self.plugin.as_ref()
    }

    /// What it asked for.
    #[must_use]
    pub fn description(&self) -> &VirtioDescription {
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
        self.shared.counters.status()
    }

    /// What it did. Does not wait for the device.
    #[must_use]
    pub fn usage(&self) -> VirtioUse {
        self.shared.counters.usage()
    }

    /// Lets its stores wait for other hosts no more: see [`Store::cut`].
    pub fn cut_stores(&self) {
        self.shared.stores.iter().for_each(|store| store.cut());
    }

    /// Why a call into it faulted last, if one did. Does not wait for the device.
    #[must_use]
    pub fn last_fault(&self) -> Option<String> {
        self.shared.counters.last_fault()
    }

    /// Changes a setting while the device runs.
    ///
    /// # Errors
    /// The device refuses, and is as it was; or it has failed.
    pub fn adjust(&self, key: &str, value: &str) -> Result<(), DeviceError> {
        if let Some(plugin) = &self.plugin {
            let given = [(key.to_owned(), value.to_owned())];
            plugin.manifest.settings(&given).map_err(|error| DeviceError::Invalid(error.to_string()))?;
        }
        match self.enter(&Entry::Adjust { key, value }) {
            Some(answer) => answer.map(drop),
            None => Err(DeviceError::Other("the device has failed; see the log".into())),
        }
    }

    /// Waits until the device's thread has nothing to do: every request, timer and outcome that came before was passed on, and so was what the device did with it. Gives how many
    /// operations on stores are still under way; none if that takes longer than `patience`. For whoever tries a plugin; a machine never waits for this.
    #[must_use]
    pub fn settle(&self, patience: Duration) -> Option<usize> {
        let (sender, receiver) = crossbeam_channel::bounded(1);
        self.commands.send(Command::Settle(sender)).ok()?;
        self.shared.inbox.wake();
        receiver.recv_timeout(patience).ok()
    }

    /// Calls the device on this thread; the worker passes on what it did.
    fn enter(&self, entry: &Entry<'_>) -> Outcome {
        let mut guard = self.shared.lock();
        let keeper = guard.as_mut()?;
        let answer = keeper.enter(entry, u64::MAX);
        let left = keeper
            .services()
            .is_some_and(|services| !services.outbox.is_empty() || !services.ended.is_empty());
        drop(guard);
        if left {
            self.shared.inbox.tell(News::Poke, 0);
        }
        answer
    }

    /// Tells the worker, and waits until it is done.
    fn tell_and_wait(&self, command: impl FnOnce(Sender<()>) -> Command) {
        let (sender, receiver) = crossbeam_channel::bounded(1);
        if self.commands.send(command(sender)).is_ok() {
            self.shared.inbox.wake();
            // The worker drops its end when it is done.
            let _ = receiver.recv();
        }
    }
}

/// Those of the given that are wanted, in the order of the wish.
/// What a device asks for, of what it is given; it must ask for all of that.
fn choose<T: Clone>(
    device: &str,
    what: &'static str,
    wanted: &[String],
    given: &[(String, T)],
) -> Result<Vec<T>, AttachError> {
    let find = |wanted: &String| {
        let found = given.iter().find(|(name, _)| name == wanted).map(|(_, thing)| thing.clone());
        found.ok_or_else(|| AttachError::Missing {
            device: device.to_owned(),
            what,
            name: wanted.clone(),
            given: list(given.iter().map(|(name, _)| name)),
        })
    };
    let chosen = wanted.iter().map(find).collect::<Result<_, _>>()?;
    let Some((name, _)) = given.iter().find(|(name, _)| !wanted.contains(name)) else { return Ok(chosen) };
    let (device, name) = (device.to_owned(), name.clone());
    Err(AttachError::Unused { device, what, name, asked: list(wanted.iter()) })
}

/// Names, or the word for none.
fn list<'n>(names: impl Iterator<Item = &'n String>) -> String {
    let names: Vec<String> = names.map(|name| format!("`{name}`")).collect();
    if names.is_empty() { "none".into() } else { names.join(", ") }
}

fn check(device: &str, description: &VirtioDescription) -> Result<(), AttachError> {
    let wrong = |what: String| Err(AttachError::Description { device: device.to_owned(), what });
    let VirtioDescription {
        features,
        queues,
        config_size,
        timers,
        channels,
        stores,
        ports,
        sockets,
        folders,
        ..
    } = description;
    let timers = usize::try_from(*timers).unwrap_or(usize::MAX);
    let counts = [
        (queues.len(), 256, "queues"),
        (timers, 64, "timers"),
        (channels.len(), 64, "channels"),
        (stores.len(), 16, "stores"),
        (ports.len(), 16, "network ports"),
        (sockets.len(), 16, "sockets"),
        (folders.len(), 16, "folders"),
    ];
    if let Some((count, most, what)) = counts.into_iter().find(|(count, most, _)| count > most) {
        return wrong(format!("it asks for {count} {what}; a device gets at most {most}"));
    }
    if queues.is_empty() {
        return wrong("it has no queue".into());
    }
    if let Some(queue) = queues
        .iter()
        .find(|queue| !queue.max_size.is_power_of_two() || queue.max_size > 32768 || queue.head > 256)
    {
        return wrong(format!(
            "its queue `{}` has {} entries and heads of {} bytes; entries are a power of two up to 32768, and heads at most 256 bytes",
            queue.name.escape_debug(),
            queue.max_size,
            queue.head
        ));
    }
    // Bits 24 to 49 belong to the rings and the transport.
    let reserved = ((1u64 << 50) - 1) & !((1 << 24) - 1);
    if features & reserved != 0 {
        return wrong(format!("it offers the feature bits {:#x}, which are the host's", features & reserved));
    }
    if *config_size > 4096 {
        return wrong(format!("its configuration space has {config_size} bytes; at most 4096 are possible"));
    }
    let names = queues
        .iter()
        .map(|queue| &queue.name)
        .chain(channels)
        .chain(stores)
        .chain(ports)
        .chain(sockets)
        .chain(folders);
    if let Some(name) =
        names.into_iter().find(|name| name.is_empty() || name.len() > 64 || name.contains(char::is_control))
    {
        return wrong(format!(
            "`{}` is no name for a queue, channel, store, port, socket or folder",
            name.escape_debug()
        ));
    }
    Ok(())
}

impl QueueDevice for VirtioDevice {
    fn profile(&self) -> &QueueProfile {
        &self.profile
    }

    fn read_config(&self, offset: u32, size: u8) -> u64 {
        match self.enter(&Entry::ConfigRead { offset, size }) {
            Some(Ok(value)) => value,
            _ => u64::MAX,
        }
    }

    fn write_config(&self, offset: u32, size: u8, value: u64) {
        self.enter(&Entry::ConfigWrite { offset, size, value });
    }

    fn start(
        &self,
        features: u64,
        queues: Vec<Option<Box<dyn RequestQueue>>>,
        transport: Arc<dyn QueueTransport>,
    ) {
        let _ = self.commands.send(Command::Start { features, queues, transport });
        self.shared.inbox.wake();
    }

    fn stop(&self) {
        self.tell_and_wait(Command::Stop);
    }

    fn notify(&self, queue: u16) {
        self.shared.inbox.notify(queue);
    }
}

impl Lifecycle for VirtioDevice {
    fn name(&self) -> &str {
        &self.shared.name
    }

    fn reset(&self) {
        self.stop();
    }

    fn pause(&self) {
        self.tell_and_wait(Command::Pause);
    }

    fn resume(&self) {
        if let Some(services) = self.shared.lock().as_mut().and_then(Keeper::services) {
            // A timer that fired while the machine was being paused fires now.
            services.base.rearm_timers();
        }
        let _ = self.commands.send(Command::Resume);
        self.shared.inbox.wake();
    }

    fn save(&self) -> Result<(u32, Vec<u8>), String> {
        match &*self.shared.lock() {
            Some(keeper) if !keeper.has_failed() => {
                let SavedState { schema, data } = keeper.state().clone();
                Ok((schema, data))
            }
            _ => Err(format!("the device `{}` has failed", self.shared.name)),
        }
    }

    fn restore(&self, schema: u32, data: &[u8]) -> Result<(), String> {
        let state = SavedState { schema, data: data.to_vec() };
        let result = match &mut *self.shared.lock() {
            Some(keeper) => keeper.restore(&state),
            None => Err(format!("the device `{}` is gone", self.shared.name)),
        };
        self.shared.inbox.tell(News::Poke, 0);
        result
    }
}

impl Drop for VirtioDevice {
    fn drop(&mut self) {
        let _ = self.commands.send(Command::Quit);
        self.shared.inbox.wake();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        // The worker itself may drop the last transport, and that the device.
        if let Some(thread) = thread.filter(|thread| thread.thread().id() != std::thread::current().id()) {
            let _ = thread.join();
        }
        // Timers, stores and the instance go with the keeper.
        if let Some(mut keeper) = self.shared.lock().take()
            && let Some(services) = keeper.services()
        {
            services.base.close_channels();
        }
    }
}

#[cfg(test)]
mod tests;
