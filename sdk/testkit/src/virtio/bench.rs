//! The bench of a virtio device: the test in the place of its host, its driver and the outside.
//!
//! Longer than most files, since it is one type whose methods are what a test can do.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use tenon_sdk::virtio::{
    self, Batch, Config, Level, Offloads, PortInfo, Result, SavedState, VirtioDescription, VirtioDevice,
    hosted,
};

use super::ends::{PortEnd, VirtioChannelEnd};
use super::folders::FolderEnd;
use super::outside::{Answered, Held, Ticket, VirtioOutside};
use super::sockets::SocketEnd;
use crate::bench::ones;
use crate::memory::MemoryStore;

/// The most requests that a device is given at once.
pub(super) const BATCH: usize = 256;

/// What a virtio device finds outside, where that is not what every bench has: stores of 16 MiB, ports whose link is up with all offloads, empty folders that are there as long as the
/// bench, and 256 MiB of guest memory.
#[derive(Clone, Debug, Default)]
pub struct VirtioSetup {
    stores: BTreeMap<String, MemoryStore>,
    ports: BTreeMap<String, PortInfo>,
    folders: BTreeMap<String, (PathBuf, bool)>,
    memory: Option<u64>,
}

impl VirtioSetup {
    /// What every bench has.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The store of this name.
    #[must_use]
    pub fn store(mut self, name: &str, store: MemoryStore) -> Self {
        self.stores.insert(name.to_owned(), store);
        self
    }

    /// The port of this name.
    #[must_use]
    pub fn port(mut self, name: &str, info: PortInfo) -> Self {
        self.ports.insert(name.to_owned(), info);
        self
    }

    /// The folder of this name: one of the host that runs the test, read-only or not. No more than 16 MiB of it are allocated at once.
    #[must_use]
    pub fn folder(mut self, name: &str, path: &Path, read_only: bool) -> Self {
        self.folders.insert(name.to_owned(), (path.to_owned(), read_only));
        self
    }

    /// The guest's memory in bytes.
    #[must_use]
    pub fn memory(mut self, bytes: u64) -> Self {
        self.memory = Some(bytes);
        self
    }

    fn outside(&self, description: &VirtioDescription) -> VirtioOutside {
        let store =
            |name: &String| self.stores.get(name).cloned().unwrap_or_else(|| MemoryStore::new(16 << 20));
        let all = Offloads { checksum: true, tso4: true, tso6: true };
        let mac = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
        let usual = PortInfo { mac, mtu: 1500, link_up: true, send: all, receive: all };
        let port = |name: &String| self.ports.get(name).copied().unwrap_or(usual);
        let stores = description.stores.iter().map(store).collect();
        let ports = description.ports.iter().map(port).collect();
        let folder = |name: &String| match self.folders.get(name) {
            Some((path, read_only)) => FolderEnd::new(path, *read_only),
            None => FolderEnd::empty(),
        };
        let folders = description.folders.iter().map(folder).collect();
        VirtioOutside::new(description, stores, ports, folders, self.memory.unwrap_or(256 << 20))
    }
}

/// A virtio device on the bench.
///
/// Everything that the device began comes to its end before a call of the bench returns: operations on stores end (but where [`VirtioBench::hold`] keeps them), and the device
/// hears of frames, input and room. Time stands still but for [`VirtioBench::advance`].
///
/// A misdeed that would end the instance in a host, such as completing a request twice, panics.
pub struct VirtioBench<D> {
    config: Config,
    description: VirtioDescription,
    pub(super) outside: VirtioOutside,
    device: D,
    /// What the driver has accepted, once it is ready.
    active: Option<u64>,
    tickets: u64,
    entries: u64,
}

impl<D: VirtioDevice> VirtioBench<D> {
    /// Describes and starts a device with these settings, at time 0, between the stores and ports that every bench has. The driver is not ready yet.
    ///
    /// # Errors
    /// The device refuses.
    pub fn new(settings: &[(&str, &str)]) -> Result<Self> {
        Self::with(settings, &VirtioSetup::new())
    }

    /// As [`VirtioBench::new`], between these stores and ports.
    ///
    /// # Errors
    /// The device refuses.
    pub fn with(settings: &[(&str, &str)], setup: &VirtioSetup) -> Result<Self> {
        let config = Config::new(settings.iter().copied());
        let description = D::describe(&config)?;
        let outside = setup.outside(&description);
        let device = start(&config, &description, &outside)?;
        Ok(Self { config, description, outside, device, active: None, tickets: 0, entries: 0 })
    }

    /// As [`VirtioBench::new`], with a driver that is ready and accepts everything.
    ///
    /// # Errors
    /// The device refuses.
    pub fn ready(settings: &[(&str, &str)]) -> Result<Self> {
        let mut bench = Self::new(settings)?;
        bench.activate(bench.description.features)?;
        Ok(bench)
    }

    /// What the device is and asked for.
    #[must_use]
    pub fn description(&self) -> &VirtioDescription {
        &self.description
    }

    /// The device itself.
    #[must_use]
    pub fn device(&self) -> &D {
        &self.device
    }

    /// The driver accepts these of the device's feature bits and sets DRIVER_OK. `VIRTIO_F_VERSION_1` (bit 32) is accepted, too.
    ///
    /// # Errors
    /// The device refuses.
    ///
    /// # Panics
    /// The device does not offer them.
    pub fn activate(&mut self, features: u64) -> Result<()> {
        let foreign = features & !self.description.features;
        assert!(foreign == 0, "the device does not offer the feature bits {foreign:#x}");
        let features = features | 1 << 32;
        self.call(|device| device.activate(features))?;
        self.active = Some(features);
        self.rest();
        Ok(())
    }

    /// Whether the driver is ready: requests may be given.
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.active.is_some()
    }

    /// The driver makes requests available in a queue: the readable bytes and the room of each. The device gets them in as few calls as a host makes.
    ///
    /// # Panics
    /// The driver is not ready, or there is no such queue.
    pub fn submit(&mut self, queue: u16, requests: &[(&[u8], usize)]) -> Vec<Ticket> {
        assert!(self.is_active(), "the driver gives requests before it is ready; call `activate`");
        let held: Vec<Held> = requests
            .iter()
            .map(|(readable, room)| {
                self.tickets += 1;
                // What a driver leaves in a buffer is anything; the tests know this.
                Held {
                    ticket: Ticket(self.tickets),
                    queue,
                    readable: readable.to_vec(),
                    writable: vec![0xa5; *room],
                    busy: false,
                }
            })
            .collect();
        let tickets = held.iter().map(|held| held.ticket).collect();
        self.give(held);
        self.rest();
        tickets
    }

    /// The driver makes one request available.
    ///
    /// # Panics
    /// As [`VirtioBench::submit`].
    pub fn request(&mut self, queue: u16, readable: &[u8], room: usize) -> Ticket {
        self.submit(queue, &[(readable, room)])[0]
    }

    /// The driver makes one request available, which the device answers before anything else happens.
    ///
    /// # Panics
    /// As [`VirtioBench::submit`], or the device does not answer.
    pub fn ask(&mut self, queue: u16, readable: &[u8], room: usize) -> Answered {
        let ticket = self.request(queue, readable, room);
        let answered = self.answered(ticket);
        answered
            .unwrap_or_else(|| panic!("the device does not answer {readable:?} with room for {room} bytes"))
    }

    /// Takes the answer of a request; none if it waits.
    pub fn answered(&mut self, ticket: Ticket) -> Option<Answered> {
        self.outside.answers.get_mut().remove(&ticket)
    }

    /// The requests that the device has not answered, in the order in which they came.
    #[must_use]
    pub fn unanswered(&self) -> Vec<Ticket> {
        let mut tickets: Vec<Ticket> = self.outside.held.borrow().values().map(|held| held.ticket).collect();
        tickets.sort();
        tickets
    }

    /// How many times the device was called with requests.
    #[must_use]
    pub fn entries(&self) -> u64 {
        self.entries
    }

    /// The driver reads `size` bytes of the configuration space.
    ///
    /// # Panics
    /// The range is not in it.
    pub fn config_read(&mut self, offset: u32, size: u8) -> u64 {
        self.check(offset, size);
        let value = self.call(|device| device.config_read(offset, size)) & ones(size);
        self.rest();
        value
    }

    /// The driver writes `size` bytes of the configuration space.
    ///
    /// # Panics
    /// The range is not in it.
    pub fn config_write(&mut self, offset: u32, size: u8, value: u64) {
        self.check(offset, size);
        self.call(|device| device.config_write(offset, size, value & ones(size)));
        self.rest();
    }

    /// How many times the device said that its configuration space has changed.
    #[must_use]
    pub fn config_changes(&self) -> u64 {
        self.outside.config_changes.get()
    }

    /// Whether the device asked to be reset since it was last reset.
    #[must_use]
    pub fn needs_reset(&self) -> bool {
        self.outside.needs_reset.get()
    }

    /// The administrator changes a setting.
    ///
    /// # Errors
    /// The device refuses.
    pub fn adjust(&mut self, key: &str, value: &str) -> Result<()> {
        let adjusted = self.call(|device| device.adjust(key, value));
        if adjusted.is_ok() {
            let settings = self.config.settings().filter(|(known, _)| *known != key);
            let settings: Vec<(&str, &str)> = settings.chain([(key, value)]).collect();
            self.config = Config::new(settings);
        }
        self.rest();
        adjusted
    }

    /// The store of this name.
    ///
    /// # Panics
    /// The device has none.
    pub fn store(&mut self, name: &str) -> &mut MemoryStore {
        let index = self.store_index(name);
        &mut self.outside.stores.get_mut()[index].store
    }

    /// From now on, operations on this store end only when the test releases them.
    ///
    /// # Panics
    /// The device has no store of this name.
    pub fn hold(&mut self, name: &str) {
        let index = self.store_index(name);
        self.outside.stores.get_mut()[index].allowed = Some(0);
    }

    /// How many operations on this store are under way.
    ///
    /// # Panics
    /// The device has no store of this name.
    #[must_use]
    pub fn under_way(&self, name: &str) -> usize {
        self.outside.stores.borrow()[self.store_index(name)].begun.len()
    }

    /// Lets the next `count` operations on this store end, in the order in which they began.
    ///
    /// # Panics
    /// The device has no store of this name.
    pub fn release(&mut self, name: &str, count: u64) {
        let index = self.store_index(name);
        self.outside.stores.get_mut()[index].allowed = Some(count);
        self.rest();
    }

    /// Lets all operations on this store end, now and from now on.
    ///
    /// # Panics
    /// The device has no store of this name.
    pub fn release_all(&mut self, name: &str) {
        let index = self.store_index(name);
        self.outside.stores.get_mut()[index].allowed = None;
        self.rest();
    }

    /// The administrator changes the length of a store, and the device hears of it.
    ///
    /// # Panics
    /// The device has no store of this name, or the size is no multiple of its blocks.
    pub fn resize_store(&mut self, name: &str, size: u64) {
        let index = self.store_index(name);
        self.outside.stores.get_mut()[index].store.resize(size);
        let number = number(index);
        self.call(|device| device.store_changed(number));
        self.rest();
    }

    /// The far end of a network port.
    ///
    /// # Panics
    /// The device has no port of this name.
    pub fn port(&mut self, name: &str) -> PortEnd<'_, D> {
        let index = index(&self.description.ports, name, "port");
        PortEnd::new(self, index)
    }

    /// Where a folder of the device is.
    ///
    /// # Panics
    /// The device has no folder of this name.
    #[must_use]
    pub fn folder(&self, name: &str) -> PathBuf {
        self.outside.folders[index(&self.description.folders, name, "folder")].path().to_owned()
    }

    /// How many nodes the device knows in a folder, and how many files it has open.
    ///
    /// # Panics
    /// The device has no folder of this name.
    #[must_use]
    pub fn folder_counts(&self, name: &str) -> (usize, usize) {
        self.outside.folders[index(&self.description.folders, name, "folder")].counts()
    }

    /// The far end of a channel.
    ///
    /// # Panics
    /// The device has no channel of this name.
    pub fn channel(&mut self, name: &str) -> VirtioChannelEnd<'_, D> {
        let index = index(&self.description.channels, name, "channel");
        VirtioChannelEnd::new(self, index)
    }

    /// The programs outside a socket.
    ///
    /// # Panics
    /// The device has no socket of this name.
    pub fn socket(&mut self, name: &str) -> SocketEnd<'_, D> {
        let index = index(&self.description.sockets, name, "socket");
        SocketEnd::new(self, index)
    }

    /// The numbers of the 4 KiB pages that the device gave back by their number, in the order in which it did.
    #[must_use]
    pub fn released_pages(&self) -> Vec<u32> {
        self.outside.released.borrow().clone()
    }

    /// How many pages of requests' own writable parts the device gave back.
    #[must_use]
    pub fn released_own(&self) -> u64 {
        self.outside.released_own.get()
    }

    /// Nanoseconds of the machine's clock.
    #[must_use]
    pub fn now(&self) -> u64 {
        self.outside.base.now.get()
    }

    /// Lets time pass, in nanoseconds. Timers fire on the way.
    pub fn advance(&mut self, nanoseconds: u64) {
        let end = self.now().saturating_add(nanoseconds);
        while let Some(timer) = self.outside.base.fire_next(end) {
            self.call(|device| device.timer_fired(timer));
            self.rest();
        }
    }

    /// When a timer fires next, if it is armed.
    ///
    /// # Panics
    /// The device has no such timer.
    #[must_use]
    pub fn timer(&self, timer: usize) -> Option<u64> {
        self.outside.base.timers.borrow()[timer].map(|armed| armed.deadline)
    }

    /// Sets the time of day, in nanoseconds since 1970. It goes on with the machine's clock.
    pub fn set_wall_clock(&mut self, nanoseconds: u64) {
        self.outside.base.epoch.set(nanoseconds.saturating_sub(self.now()));
    }

    /// Takes the messages logged since the last call.
    pub fn take_log(&mut self) -> Vec<(Level, String)> {
        std::mem::take(self.outside.base.log.get_mut())
    }

    /// The driver resets the device: every request has ended, answered or not, and the driver is not ready.
    pub fn reset(&mut self) {
        self.outside.held.get_mut().clear();
        for store in self.outside.stores.get_mut() {
            store.begun.clear();
        }
        self.outside.folders.iter().for_each(FolderEnd::clear);
        self.outside.needs_reset.set(false);
        self.active = None;
        self.call(VirtioDevice::reset);
        self.rest();
    }

    /// Saves the device.
    ///
    /// # Panics
    /// The device refuses.
    #[must_use]
    pub fn save(&self) -> SavedState {
        match hosted::enter(&self.outside, || virtio::save(&self.device)) {
            Ok(state) => state,
            Err(error) => panic!("the device cannot be saved: {error}"),
        }
    }

    /// Puts a new device in the place of this one, and gives it the state of this one and then every unfinished request, under new handles: what a host does after a crash, or
    /// for a new version. Operations that were under way may have been carried out or not; here they were not.
    ///
    /// # Panics
    /// The new device is not equal to the old one: it saves another state, has other timers armed, or accepts other offloads.
    pub fn round_trip(&mut self) {
        let state = self.save();
        let timers = self.outside.base.timers.borrow().clone();
        let accepted = self.accepted();
        if let Err(error) = self.replace(&state) {
            panic!("the device does not restore what it saved: {error}");
        }
        let again = self.save();
        assert!(again == state, "the restored device saves another state: {again:?}, not {state:?}");
        {
            let now = self.outside.base.timers.borrow();
            assert!(*now == timers, "the restored device has timers {now:?}, not {timers:?}");
        }
        let now = self.accepted();
        assert!(now == accepted, "the restored device accepts {now:?} of received frames, not {accepted:?}");
        let held = self.outside.detach_requests();
        self.give(held);
        self.rest();
    }

    /// Puts a new device in the place of this one that takes over an earlier state, and gives it every unfinished request: what a host does after a crash.
    ///
    /// # Errors
    /// The device refuses. The old one stays, but its unfinished requests are gone.
    pub fn restart(&mut self, state: &SavedState) -> Result<()> {
        self.replace(state)?;
        let held = self.outside.detach_requests();
        self.give(held);
        self.rest();
        Ok(())
    }

    /// What another device with the same settings saves, in surroundings of its own, after `prepare`.
    pub(super) fn beside(&self, prepare: impl FnOnce(&mut D) -> Result<()>) -> Result<SavedState> {
        let outside = self.outside.clone();
        outside.detach();
        let mut device = start(&self.config, &self.description, &outside)?;
        hosted::enter(&outside, || {
            let saved = prepare(&mut device).and_then(|()| virtio::save(&device));
            drop(device);
            saved
        })
    }

    /// A new device in the place of the old one, with a state. Requests wait.
    fn replace(&mut self, state: &SavedState) -> Result<()> {
        let streams = self.outside.sockets.borrow().clone();
        self.outside.detach();
        let device = start(&self.config, &self.description, &self.outside).and_then(|mut device| {
            hosted::enter(&self.outside, || virtio::restore(&mut device, state))?;
            Ok(device)
        });
        let device = device.inspect_err(|_| {
            // The old one stays, and still holds them.
            self.outside.sockets.replace(streams);
        })?;
        hosted::enter(&self.outside, || drop(std::mem::replace(&mut self.device, device)));
        Ok(())
    }

    fn accepted(&self) -> Vec<Offloads> {
        self.outside.ports.borrow().iter().map(|port| port.accepted).collect()
    }

    fn store_index(&self, name: &str) -> usize {
        index(&self.description.stores, name, "store")
    }

    /// Gives requests in batches, each of one queue and in their order.
    fn give(&mut self, held: Vec<Held>) {
        let mut held = held.into_iter().peekable();
        while let Some(first) = held.next() {
            let queue = first.queue;
            let Some(about) = self.description.queues.get(usize::from(queue)) else {
                panic!("the device has no queue number {queue}; it has {}", self.description.queues.len());
            };
            let size = about.head;
            let mut batch = vec![first];
            while batch.len() < BATCH {
                let Some(next) = held.next_if(|next| next.queue == queue) else { break };
                batch.push(next);
            }
            let (mut records, mut heads) = (Vec::new(), Vec::new());
            for held in batch {
                let (record, head) = self.outside.hold(held, size);
                records.push(record);
                heads.extend(head);
            }
            self.entries += 1;
            self.call(|device| device.requests_ready(queue, &Batch::new(&records, &heads)));
        }
    }

    /// Lets everything that was begun come to its end.
    pub(super) fn rest(&mut self) {
        // A device that always begins something new never comes to rest.
        for _ in 0..1_000_000 {
            let (heard, ended) = self.outside.end_operations();
            if !heard.is_empty() {
                self.call(|device| device.operations_done(&heard));
            }
            if ended == 0 && !self.tell() {
                return;
            }
        }
        panic!(
            "the device does not come to rest: it goes on beginning operations or reading what is not there"
        );
    }

    /// Tells the device of frames, input and room. Returns whether there was anything to tell.
    fn tell(&mut self) -> bool {
        let mut told = false;
        for index in 0..self.description.ports.len() {
            let port = &mut self.outside.ports.get_mut()[index];
            if port.notify && !port.waiting.is_empty() {
                port.notify = false;
                told = true;
                self.call(|device| device.port_ready(number(index)));
            }
        }
        for index in 0..self.description.sockets.len() {
            if self.outside.sockets.get_mut()[index].tell() {
                told = true;
                self.call(|device| device.socket_ready(number(index)));
            }
        }
        for index in 0..self.description.channels.len() {
            let channel = &mut self.outside.base.channels.get_mut()[index];
            let readable = channel.notify && !channel.input.is_empty();
            let writable = channel.blocked && channel.output.len() < channel.capacity;
            channel.notify &= !readable;
            channel.blocked &= !writable;
            told |= readable | writable;
            if readable {
                self.call(|device| device.channel_readable(number(index)));
            }
            if writable {
                self.call(|device| device.channel_writable(number(index)));
            }
        }
        told
    }

    pub(super) fn call<R>(&mut self, call: impl FnOnce(&mut D) -> R) -> R {
        let Self { outside, device, .. } = self;
        hosted::enter(outside, || call(device))
    }

    fn check(&self, offset: u32, size: u8) {
        assert!(matches!(size, 1 | 2 | 4 | 8), "an access has 1, 2, 4 or 8 bytes, not {size}");
        let inside =
            offset.checked_add(size.into()).is_some_and(|end| end <= self.description.config_size.into());
        assert!(
            inside,
            "{size} bytes at {offset} are not inside the configuration space of {} bytes",
            self.description.config_size
        );
    }
}

fn start<D: VirtioDevice>(
    config: &Config,
    description: &VirtioDescription,
    outside: &VirtioOutside,
) -> Result<D> {
    let count = |names: &[String]| number(names.len());
    let VirtioDescription { timers, channels, stores, ports, sockets, folders, .. } = description;
    let attachment = hosted::attachment(
        *timers,
        count(channels),
        count(stores),
        count(ports),
        count(sockets),
        count(folders),
    );
    hosted::enter(outside, || D::start(config, attachment))
}

pub(super) fn number(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}

fn index(names: &[String], name: &str, what: &str) -> usize {
    let found = names.iter().position(|known| known == name);
    found.unwrap_or_else(|| panic!("the device has no {what} `{name}`; it has {names:?}"))
}
