//! What every host relies on, checked for any virtio device: on the bench, or as it was loaded.

use tenon_sdk::virtio::{SavedState, VirtioDescription, VirtioDevice};

use super::{Answered, Ticket, VirtioBench, VirtioSetup};
use crate::MemoryStore;
use crate::random::Random;

/// How many random steps a device has to stand.
const STEPS: u32 = 3_000;
/// How many damaged states a device has to stand, at most.
const DAMAGES: usize = 1_000;

/// A virtio device under check, in some host. A fault of the device, such as a trap, a panic or a misdeed, panics or shows in [`VirtioSubject::alive`].
pub trait VirtioSubject {
    /// What the device is and asked for.
    fn description(&self) -> VirtioDescription;
    /// The driver accepts these feature bits and sets DRIVER_OK.
    ///
    /// # Errors
    /// The device refuses.
    fn activate(&mut self, features: u64) -> Result<(), String>;
    /// The driver makes requests available: readable bytes and room of each. Returns when the device has worked on them as far as it can.
    fn submit(&mut self, queue: u16, requests: &[(&[u8], usize)]) -> Vec<Ticket>;
    /// Takes the answer of a request; none if it waits.
    fn answered(&mut self, ticket: Ticket) -> Option<Answered>;
    /// The driver reads the configuration space.
    fn config_read(&mut self, offset: u32, size: u8) -> u64;
    /// The driver writes the configuration space.
    fn config_write(&mut self, offset: u32, size: u8, value: u64);
    /// Lets time pass, in nanoseconds.
    fn advance(&mut self, nanoseconds: u64);
    /// The driver resets the device.
    fn reset(&mut self);
    /// Saves the device.
    ///
    /// # Errors
    /// The device refuses.
    fn save(&mut self) -> Result<SavedState, String>;
    /// Saves the device and puts a new instance in its place, with the state and every unfinished request.
    ///
    /// # Errors
    /// The device refuses its own state.
    fn restart(&mut self) -> Result<(), String>;
    /// The state of another device with the same settings that starts now.
    ///
    /// # Errors
    /// It does not start.
    fn fresh(&mut self) -> Result<SavedState, String>;
    /// Gives this state to another device with the same settings, and saves that one again.
    ///
    /// # Errors
    /// The device refuses the state, as it may.
    fn try_state(&mut self, state: &SavedState) -> Result<SavedState, String>;
    /// Says whether the device has come to harm.
    ///
    /// # Errors
    /// It has, and how.
    fn alive(&mut self) -> Result<(), String>;
    /// Has `act` look at a store of the device, or prepare its faults. Returns whether this host can.
    fn with_store(&mut self, name: &str, act: &mut dyn FnMut(&mut MemoryStore)) -> bool {
        let _ = (name, act);
        false
    }
    /// Holds the operations on a store back, or lets them all end. Returns whether this host can.
    fn hold(&mut self, name: &str, hold: bool) -> bool {
        let _ = (name, hold);
        false
    }
    /// The administrator changes the length of a store. Returns whether this host can.
    fn resize_store(&mut self, name: &str, size: u64) -> bool {
        let _ = (name, size);
        false
    }
}

impl<D: VirtioDevice> VirtioSubject for VirtioBench<D> {
    fn description(&self) -> VirtioDescription {
        self.description().clone()
    }

    fn activate(&mut self, features: u64) -> Result<(), String> {
        VirtioBench::activate(self, features).map_err(|error| error.to_string())
    }

    fn submit(&mut self, queue: u16, requests: &[(&[u8], usize)]) -> Vec<Ticket> {
        VirtioBench::submit(self, queue, requests)
    }

    fn answered(&mut self, ticket: Ticket) -> Option<Answered> {
        VirtioBench::answered(self, ticket)
    }

    fn config_read(&mut self, offset: u32, size: u8) -> u64 {
        VirtioBench::config_read(self, offset, size)
    }

    fn config_write(&mut self, offset: u32, size: u8, value: u64) {
        VirtioBench::config_write(self, offset, size, value);
    }

    fn advance(&mut self, nanoseconds: u64) {
        VirtioBench::advance(self, nanoseconds);
    }

    fn reset(&mut self) {
        VirtioBench::reset(self);
    }

    fn save(&mut self) -> Result<SavedState, String> {
        Ok(VirtioBench::save(self))
    }

    fn restart(&mut self) -> Result<(), String> {
        self.round_trip();
        Ok(())
    }

    fn fresh(&mut self) -> Result<SavedState, String> {
        self.beside(|_| Ok(())).map_err(|error| error.to_string())
    }

    fn try_state(&mut self, state: &SavedState) -> Result<SavedState, String> {
        self.beside(|device| tenon_sdk::virtio::restore(device, state)).map_err(|error| error.to_string())
    }

    fn alive(&mut self) -> Result<(), String> {
        Ok(())
    }

    fn with_store(&mut self, name: &str, act: &mut dyn FnMut(&mut MemoryStore)) -> bool {
        act(VirtioBench::store(self, name));
        true
    }

    fn hold(&mut self, name: &str, hold: bool) -> bool {
        if hold {
            VirtioBench::hold(self, name);
        } else {
            self.release_all(name);
        }
        true
    }

    fn resize_store(&mut self, name: &str, size: u64) -> bool {
        VirtioBench::resize_store(self, name, size);
        true
    }
}

/// Checks with these settings, between the stores and ports of `setup`, that the device does what every host relies on; see [`virtio`]. The random steps are the same in every run.
///
/// # Panics
/// The device fails a check. The panic says which.
pub fn virtio_conformance<D: VirtioDevice>(settings: &[(&str, &str)], setup: &VirtioSetup) {
    let mut bench = match VirtioBench::<D>::with(settings, setup) {
        Ok(bench) => bench,
        Err(error) => panic!("the device does not start with {settings:?}: {error}"),
    };
    if let Err(text) = virtio(&mut bench) {
        panic!("{text}");
    }
}

/// Checks that a virtio device that was just started
///
/// - describes what a host can give;
/// - answers reads of its whole configuration space;
/// - works with no feature, with each one, and with all;
/// - stands requests of any shape: empty, with short or odd heads, with far too much room or none; and time, and writes of its configuration space;
/// - is not changed by `save`; comes back from it in the same state with requests unfinished, also again and again;
/// - is, after `reset` with requests unfinished, as after power-on;
/// - refuses a state of a newer schema or of schema 0, and a truncated one; refuses or stands one with a flipped bit.
///
/// Returns what was done, a line each.
///
/// # Errors
/// The device fails a check. The text says which.
pub fn virtio(device: &mut dyn VirtioSubject) -> Result<Vec<String>, String> {
    let about = device.description();
    describes(&about)?;
    let mut said = vec![format!(
        "type {} with {} queues, features {:#x} and {} bytes of configuration",
        about.device_type,
        about.queues.len(),
        about.features,
        about.config_size
    )];
    said.push(format!("{} reads of the configuration space", reads(device, &about)?));
    said.push(format!("works with {} sets of features", features(device, &about)?));
    let mut random = Random::new(0x7e17);
    said.push(shapes(device, &about, &mut random)?);
    said.push(steps(device, &about, &mut random)?);
    resets(device, &about, &mut random)?;
    said.push("a reset with requests unfinished gives the state after power-on".into());
    said.push(hostile(device, &about, &mut random)?);
    Ok(said)
}

fn describes(about: &VirtioDescription) -> Result<(), String> {
    let outside = about.features & !(0xff_ffff | 0x3fff << 50);
    if outside != 0 {
        return Err(format!("the feature bits {outside:#x} are not the device's to offer"));
    }
    if !(1..=256).contains(&about.queues.len()) {
        return Err(format!("{} queues; 1 to 256 are right", about.queues.len()));
    }
    if about.config_size > 4096 {
        return Err(format!("a configuration space of {} bytes; 4096 at most", about.config_size));
    }
    for queue in &about.queues {
        let (name, size, head) = (&queue.name, queue.max_size, queue.head);
        if !size.is_power_of_two() || size > 32768 {
            return Err(format!("queue `{name}` has {size} entries; a power of two up to 32768 is right"));
        }
        if head > 256 {
            return Err(format!("queue `{name}` asks for heads of {head} bytes; 256 at most"));
        }
    }
    let names: [(&str, Vec<&String>); 6] = [
        ("queue", about.queues.iter().map(|queue| &queue.name).collect()),
        ("channel", about.channels.iter().collect()),
        ("store", about.stores.iter().collect()),
        ("port", about.ports.iter().collect()),
        ("socket", about.sockets.iter().collect()),
        ("folder", about.folders.iter().collect()),
    ];
    for (what, mut names) in names {
        names.sort();
        let count = names.len();
        names.dedup();
        if names.len() < count || names.iter().any(|name| name.is_empty()) {
            return Err(format!("two {what}s of one name, or one without a name: {names:?}"));
        }
    }
    Ok(())
}

/// Reads the configuration space with every size at every place.
fn reads(device: &mut dyn VirtioSubject, about: &VirtioDescription) -> Result<u32, String> {
    let mut count = 0;
    for size in [1u8, 2, 4, 8] {
        for offset in 0..u32::from(about.config_size) {
            if offset + u32::from(size) <= u32::from(about.config_size) {
                let _ = device.config_read(offset, size);
                count += 1;
            }
        }
    }
    device.alive()?;
    Ok(count)
}

fn features(device: &mut dyn VirtioSubject, about: &VirtioDescription) -> Result<usize, String> {
    let mut sets = vec![0];
    sets.extend((0..64).map(|bit| 1 << bit).filter(|bit| about.features & bit != 0));
    sets.push(about.features);
    for set in &sets {
        // Some features need others; a device may refuse a set without them, but not the one that it offers.
        if let Err(text) = device.activate(*set)
            && *set == about.features
        {
            return Err(format!("the device refuses the features that it offers: {text}"));
        }
        device.reset();
        device.alive()?;
    }
    Ok(sets.len())
}

fn ready(device: &mut dyn VirtioSubject, about: &VirtioDescription) -> Result<(), String> {
    device
        .activate(about.features)
        .map_err(|text| format!("the device refuses the features that it offers: {text}"))
}

/// The readable bytes of an odd request.
fn odd(random: &mut Random) -> Vec<u8> {
    let length = match random.below(8) {
        0 => 0,
        1 => 1,
        2..=4 => random.index(40),
        5 => random.index(600),
        6 => 512 * (1 + random.index(16)) + 16,
        _ => random.index(70_000),
    };
    match random.below(4) {
        0 => vec![0; length],
        1 => vec![0xff; length],
        2 => random.bytes(length),
        // Small numbers, as most fields of most headers have.
        _ => (0..length).map(|at| if at % 4 == 0 { random.below(16).to_le_bytes()[0] } else { 0 }).collect(),
    }
}

fn room(random: &mut Random) -> usize {
    [0, 1, 2, 4, 12, 13, 20, 512, 513, 1526, 4096, 4097, 65536, 65562][random.index(14)]
}

/// Gives every queue requests of every shape.
fn shapes(
    device: &mut dyn VirtioSubject,
    about: &VirtioDescription,
    random: &mut Random,
) -> Result<String, String> {
    let (mut given, mut answered) = (0, 0);
    ready(device, about)?;
    for queue in 0..u16::try_from(about.queues.len()).unwrap_or(u16::MAX) {
        for round in 0..40 {
            let count = 1 + random.index(usize::from(about.queues[usize::from(queue)].max_size).min(64));
            let readable: Vec<Vec<u8>> = (0..count).map(|_| odd(random)).collect();
            let mut requests: Vec<(&[u8], usize)> =
                readable.iter().map(|readable| (readable.as_slice(), room(random))).collect();
            if round == 0 {
                requests.push((&[], 0));
            }
            if round == 1 {
                requests = vec![(&[], 1 << 20), (&readable[0], 1 << 20)];
            }
            given += requests.len();
            let tickets = device.submit(queue, &requests);
            device.alive().map_err(|text| format!("odd requests in queue {queue}: {text}"))?;
            answered += tickets.into_iter().filter(|ticket| device.answered(*ticket).is_some()).count();
            // Queues that wait for something keep what they are given.
            if round % 10 == 9 {
                device.reset();
                ready(device, about)?;
            }
        }
    }
    device.reset();
    Ok(format!("{given} requests of odd shapes, {answered} of them answered at once, no harm"))
}

/// Random steps of everything, with restarts in between.
fn steps(
    device: &mut dyn VirtioSubject,
    about: &VirtioDescription,
    random: &mut Random,
) -> Result<String, String> {
    let (mut requests, mut restarts) = (0, 0);
    ready(device, about)?;
    for step in 0..STEPS {
        match random.below(16) {
            0 => device.advance(1 << random.below(34)),
            1 if about.config_size > 0 => {
                let offset = u32::try_from(random.below(about.config_size.into())).unwrap_or(0);
                device.config_write(offset, 1, random.below(256));
            }
            2 if about.config_size > 0 => {
                let offset = u32::try_from(random.below(about.config_size.into())).unwrap_or(0);
                let _ = device.config_read(offset, 1);
            }
            3 if step % 4 == 0 => {
                device.reset();
                ready(device, about)?;
            }
            4 => {
                let before = device.save()?;
                let again = device.save()?;
                if before != again {
                    return Err(format!("two saves in a row differ: {again:?}, not {before:?}"));
                }
                device.restart()?;
                restarts += 1;
                let after = device.save()?;
                if before.schema != after.schema {
                    return Err(format!(
                        "a restart changes the schema from {} to {}",
                        before.schema, after.schema
                    ));
                }
            }
            _ => {
                let queue = random.index(about.queues.len());
                let readable = odd(random);
                let _ = device.submit(u16::try_from(queue).unwrap_or(0), &[(&readable, room(random))]);
                requests += 1;
            }
        }
        device.alive().map_err(|text| format!("in random step {step}: {text}"))?;
    }
    device.reset();
    Ok(format!("{STEPS} random steps with {requests} requests and {restarts} restarts, no harm"))
}

fn resets(
    device: &mut dyn VirtioSubject,
    about: &VirtioDescription,
    random: &mut Random,
) -> Result<(), String> {
    ready(device, about)?;
    for queue in 0..about.queues.len() {
        let readable = odd(random);
        let _ = device.submit(u16::try_from(queue).unwrap_or(0), &[(&readable, 64), (&[], 4096)]);
    }
    device.reset();
    device.alive()?;
    let power_on = device.fresh()?;
    let reset = device.save()?;
    if reset != power_on {
        return Err(format!("after `reset` the state is not as after power-on: {reset:?}, not {power_on:?}"));
    }
    Ok(())
}

fn hostile(
    device: &mut dyn VirtioSubject,
    about: &VirtioDescription,
    random: &mut Random,
) -> Result<String, String> {
    ready(device, about)?;
    let readable = odd(random);
    let _ = device.submit(0, &[(&readable, 4096)]);
    let state = device.save()?;
    for schema in [0, state.schema + 1] {
        if device.try_state(&SavedState { schema, ..state.clone() }).is_ok() {
            return Err(format!("the device accepts a state of schema {schema}; it writes {}", state.schema));
        }
    }
    let length = state.data.len();
    let mut refused = 0;
    for shorter in (0..length).step_by((length / DAMAGES).max(1)) {
        let truncated = SavedState { schema: state.schema, data: state.data[..shorter].to_vec() };
        if device.try_state(&truncated).is_ok() {
            return Err(format!("the device accepts {shorter} of the {length} bytes of its state"));
        }
        refused += 1;
    }
    let longer = SavedState { schema: state.schema, data: [&state.data[..], &[0]].concat() };
    if device.try_state(&longer).is_ok() {
        return Err("the device accepts a byte behind the end of its state".into());
    }
    for bit in (0..length * 8).step_by((length * 8 / DAMAGES).max(1)) {
        let mut damaged = state.clone();
        damaged.data[bit / 8] ^= 1 << (bit % 8);
        let _ = device.try_state(&damaged);
    }
    device.alive().map_err(|text| format!("a damaged state: {text}"))?;
    Ok(format!("{refused} truncated states and those of other schemas refused, flipped bits stood"))
}
