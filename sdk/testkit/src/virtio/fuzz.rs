//! Any bytes as the deeds of a driver, an administrator and the outside, against any virtio device.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use tenon_sdk::store::StoreError;
use tenon_sdk::virtio::{VirtioDescription, VirtioDevice};

use super::{Answered, Ticket, VirtioBench, VirtioSetup};
use crate::fuzz::{Input, Seen};
use crate::memory::On;

/// Lengths that requests and their answers often have, or just not.
const LENGTHS: [usize; 16] = [0, 1, 2, 4, 12, 13, 20, 21, 496, 512, 513, 1526, 4096, 4097, 65536, 65562];
/// The most frames, and bytes of a channel, that wait for the device: the outside is held off as well.
const MOST_FRAMES: usize = 64;
const MOST_BYTES: usize = 64 << 10;
/// The most streams of a socket that the device has not closed.
const MOST_STREAMS: usize = 64;
/// The names that are made in a folder from outside. None leads anywhere, since the guest may put a link in the place of each.
const NAMES: [&str; 8] = ["a", "b", "c", "d", "e", "f", "g", "h"];

/// A request that was answered.
#[derive(Clone, Debug)]
pub struct Exchange {
    /// The queue in which it was given.
    pub queue: u16,
    /// What the driver had written.
    pub readable: Vec<u8>,
    /// The length of the writable part.
    pub room: usize,
    /// Nothing else was under way from the request to its answer: no later request, and no operation on a store.
    pub alone: bool,
    /// The answer.
    pub answered: Answered,
}

/// Gives a device any bytes as deeds: a driver negotiates, makes requests of any form available in any queue, reads and writes the configuration space, resets; stores hold
/// operations back, fail and change; frames and input come; programs begin streams, send, stall and go; others work in the folders; time passes; the administrator changes
/// `adjustable` settings; the device is saved and restored, also from
/// states that were damaged. `check` looks at each answer, with the bench.
///
/// Returns what happened: a line for each kind of answer, among others.
///
/// # Panics
/// The device does, or it does a misdeed, is not the same after a restore, or is not as after power-on after a reset.
pub fn virtio<D: VirtioDevice>(
    settings: &[(&str, &str)],
    setup: &VirtioSetup,
    adjustable: &[(&str, &str)],
    data: &[u8],
    check: impl FnMut(&mut VirtioBench<D>, &Exchange),
) -> Seen {
    let bench = match VirtioBench::<D>::with(settings, setup) {
        Ok(bench) => bench,
        Err(error) => panic!("the device does not start with {settings:?}: {error}"),
    };
    let about = bench.description().clone();
    let mut run = Run { bench, about, given: BTreeMap::new(), seen: Seen::new(), forged: false, check };
    let mut input = Input::new(data);
    run.activate(&mut input);
    while !input.is_over() {
        run.step(&mut input, adjustable);
        run.collect();
    }
    run.end()
}

struct Run<D, C> {
    bench: VirtioBench<D>,
    about: VirtioDescription,
    /// The requests that wait for their answers.
    given: BTreeMap<Ticket, Given>,
    seen: Seen,
    /// The device has taken over a state that was changed, settings that were adjusted among it.
    forged: bool,
    check: C,
}

struct Given {
    queue: u16,
    readable: Vec<u8>,
    room: usize,
    alone: bool,
}

impl<D: VirtioDevice, C: FnMut(&mut VirtioBench<D>, &Exchange)> Run<D, C> {
    fn step(&mut self, input: &mut Input<'_>, adjustable: &[(&str, &str)]) {
        let op = input.u8();
        let which = usize::from(op >> 4);
        let name = |names: &[String]| (!names.is_empty()).then(|| names[which % names.len()].clone());
        let (store, port, channel) =
            (name(&self.about.stores), name(&self.about.ports), name(&self.about.channels));
        if let Some(socket) = name(&self.about.sockets).filter(|_| matches!(op % 16, 10..=12)) {
            return self.program(&socket, op % 16, which, input);
        }
        if let Some(folder) = name(&self.about.folders).filter(|_| matches!(op % 16, 10..=12)) {
            // What cannot be done is not done.
            let _ = neighbour(&self.bench.folder(&folder), op % 16, which, input);
            return;
        }
        match (op % 16, store, port, channel) {
            (0..=4, ..) => self.submit(which, input),
            (5, ..) => self.config(input),
            (6, ..) if which < 8 => self.bench.round_trip(),
            (6, ..) => self.damage(input),
            (7, ..) => {
                self.reset();
                self.activate(input);
            }
            (8, ..) => self.bench.advance(1 << (input.u8() % 40)),
            (9, ..) if !adjustable.is_empty() => {
                let (key, value) = adjustable[which % adjustable.len()];
                let done = self.bench.adjust(key, value);
                self.seen.insert(format!("adjust {}", if done.is_ok() { "done" } else { "refused" }));
            }
            (10, Some(store), ..) => match input.u8() {
                0..64 => self.bench.hold(&store),
                64..128 => self.bench.release_all(&store),
                count => self.bench.release(&store, (count % 8).into()),
            },
            (11, Some(store), ..) => self.fault(&store, input.u8()),
            (12, Some(store), ..) => {
                let size = (u64::from(input.u16()) + 1) * 4096;
                self.bench.resize_store(&store, size);
            }
            (10 | 11, _, Some(port), _) => {
                let mut port = self.bench.port(&port);
                if port.pending() < MOST_FRAMES {
                    let mut frame = input.take(usize::from(op & 0x80 | 12)).to_vec();
                    frame.resize(12 + LENGTHS[which], 0x5a);
                    port.push_with_header(&frame);
                }
                drop(port.take_sent());
            }
            (12, _, Some(port), _) => {
                let (up, mtu) = (op & 0x80 == 0, input.u16());
                self.bench.port(&port).change(|info| (info.link_up, info.mtu) = (up, mtu));
            }
            (10, .., Some(channel)) => {
                let mut channel = self.bench.channel(&channel);
                if channel.pending() < MOST_BYTES {
                    let count = input.u8().into();
                    channel.push(input.take(count));
                }
            }
            (11, .., Some(channel)) => drop(self.bench.channel(&channel).take_output()),
            (12, .., Some(channel)) => self.bench.channel(&channel).set_capacity(input.u8().into()),
            _ => self.submit(which, input),
        }
    }

    /// A program outside listens, begins a stream, or does something with one that the device holds.
    fn program(&mut self, socket: &str, op: u8, which: usize, input: &mut Input<'_>) {
        let mut socket = self.bench.socket(socket);
        let (form, streams) = (input.u8(), socket.streams());
        let (port, length) = (u32::try_from(which).unwrap_or(0), LENGTHS[usize::from(form >> 4)]);
        let stream = (!streams.is_empty()).then(|| streams[which % streams.len()]);
        match (op, form % 4, stream) {
            (10, 0 | 1, _) => socket.listen(port),
            (10, ..) if streams.len() < MOST_STREAMS => drop(socket.begin(port)),
            (11, _, Some(stream)) if socket.pending(stream) < MOST_BYTES => {
                let mut bytes = input.take(usize::from(form % 16)).to_vec();
                bytes.resize(bytes.len() + length, 0x5a);
                socket.push(stream, &bytes);
            }
            (12, 0, Some(stream)) => socket.finish(stream),
            (12, 1, Some(stream)) => socket.hang_up(stream),
            (12, 2, Some(stream)) => socket.hold(stream),
            (12, _, Some(stream)) => {
                socket.release(stream, length);
                drop(socket.take(stream));
            }
            _ => {}
        }
    }

    /// The driver negotiates: everything, or what eight bytes say.
    fn activate(&mut self, input: &mut Input<'_>) {
        if self.bench.is_active() {
            return;
        }
        let chosen = if input.u8().is_multiple_of(4) { input.u64() } else { u64::MAX };
        let done = self.bench.activate(self.about.features & chosen);
        self.seen.insert(format!("features {}", if done.is_ok() { "taken" } else { "refused" }));
    }

    /// Some requests: their first readable bytes, how many more of them, and how much room.
    fn submit(&mut self, queue: usize, input: &mut Input<'_>) {
        let queue = queue % self.about.queues.len();
        let depth = usize::from(self.about.queues[queue].max_size);
        let queue = u16::try_from(queue).unwrap_or(0);
        let waiting = self.given.values().filter(|given| given.queue == queue).count();
        let lengths = input.u8();
        let count = usize::from(lengths & 3) + 1;
        if !self.bench.is_active() || waiting + count > depth {
            return;
        }
        let requests: Vec<(Vec<u8>, usize)> = (0..count)
            .map(|_| {
                let (first, lengths) = (usize::from(input.u8()), input.u8());
                let mut readable = input.take(first).to_vec();
                readable.resize(readable.len() + LENGTHS[usize::from(lengths >> 4)], lengths);
                (readable, LENGTHS[usize::from(lengths & 15)])
            })
            .collect();
        let under_way: usize = self.about.stores.iter().map(|store| self.bench.under_way(store)).sum();
        let alone = count == 1 && under_way == 0;
        self.given.values_mut().for_each(|given| given.alone = false);
        let asked: Vec<(&[u8], usize)> = requests.iter().map(|(bytes, room)| (&bytes[..], *room)).collect();
        let tickets = self.bench.submit(queue, &asked);
        for (ticket, (readable, room)) in tickets.into_iter().zip(requests) {
            self.given.insert(ticket, Given { queue, readable, room, alone });
        }
    }

    /// Looks at the answers that have come.
    fn collect(&mut self) {
        let tickets: Vec<Ticket> = self.given.keys().copied().collect();
        for ticket in tickets {
            let Some(answered) = self.bench.answered(ticket) else { continue };
            let Some(Given { queue, readable, room, alone }) = self.given.remove(&ticket) else { continue };
            let size = answered.written.checked_ilog2().map_or(0, |bits| bits + 1);
            let last = answered.buffer.last().filter(|_| answered.written > 0).map_or(0, |byte| *byte % 4);
            self.seen.insert(format!("queue {queue}: an answer of {size} bits, {last}"));
            let exchange = Exchange { queue, readable, room, alone, answered };
            (self.check)(&mut self.bench, &exchange);
        }
    }

    fn config(&mut self, input: &mut Input<'_>) {
        let (form, at) = (input.u8(), u32::from(input.u8()));
        let size = 1 << (form & 3);
        let space = u32::from(self.about.config_size);
        if u32::from(size) > space {
            return;
        }
        let at = at % (space - u32::from(size) + 1);
        if form & 4 == 0 {
            let _ = self.bench.config_read(at, size);
        } else {
            self.bench.config_write(at, size, input.u64());
        }
    }

    fn fault(&mut self, store: &str, which: u8) {
        const ON: [On; 6] = [On::Any, On::Read, On::Write, On::Flush, On::Discard, On::WriteZeroes];
        const ERRORS: [StoreError; 4] =
            [StoreError::Io, StoreError::NoSpace, StoreError::Unsupported, StoreError::ReadOnly];
        let (on, error) = (ON[usize::from(which) % ON.len()], ERRORS[usize::from(which >> 6)]);
        self.bench.store(store).fail_next(on, error);
    }

    /// Has the device restored from its own state with some bytes changed, which it may refuse.
    fn damage(&mut self, input: &mut Input<'_>) {
        let mut state = self.bench.save();
        let (at, xor) = (usize::from(input.u8()), input.u8());
        if let Some(length) = state.data.len().checked_sub(1) {
            let at = at % (length + 1);
            state.data[at] ^= xor;
        }
        if self.bench.restart(&state).is_ok() {
            self.forged = true;
            self.seen.insert("a damaged state is taken".into());
        } else {
            self.seen.insert("a damaged state is refused".into());
            self.reset();
        }
    }

    fn reset(&mut self) {
        self.bench.reset();
        self.collect();
        self.given.clear();
    }

    fn end(mut self) -> Seen {
        for store in &self.about.stores {
            self.bench.store(store).clear_faults();
        }
        for store in self.about.stores.clone() {
            self.bench.release_all(&store);
        }
        self.collect();
        self.bench.round_trip();
        self.collect();
        if self.bench.is_active() && !self.given.is_empty() {
            self.seen.insert("requests wait at the end".into());
        }
        self.reset();
        let fresh = self.bench.beside(|_| Ok(()));
        let (fresh, now) = (fresh.map_err(|error| error.to_string()), self.bench.save());
        assert!(
            self.forged || fresh.as_ref() == Ok(&now),
            "after a reset the state is {now:?}, not {fresh:?}"
        );
        self.seen
    }
}

/// Somebody on the host works in a folder as well: makes a file of 0x5a (some of them run as their owner), a folder, a link or a FIFO; removes something; renames something.
fn neighbour(folder: &Path, op: u8, which: usize, input: &mut Input<'_>) -> std::io::Result<()> {
    let path = |which: usize| folder.join(NAMES[which % NAMES.len()]);
    let (place, form) = (path(which), input.u8());
    match (op, form % 8) {
        (10, 0..=3) => {
            let mode = if form % 4 == 3 { 0o4755 } else { 0o644 };
            let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(place)?;
            file.write_all(&vec![0x5a; LENGTHS[usize::from(form >> 4)]])
        }
        (10, 4 | 5) => std::fs::create_dir(place),
        (10, 6) => {
            let target = if form < 0x80 { "..".into() } else { path(form.into()) };
            std::os::unix::fs::symlink(target, place)
        }
        (10, _) => {
            use rustix::fs::{CWD, FileType, Mode};
            Ok(rustix::fs::mknodat(CWD, place, FileType::Fifo, Mode::from_raw_mode(0o644), 0)?)
        }
        (11, _) => std::fs::remove_file(&place).or_else(|_| std::fs::remove_dir(&place)),
        _ => std::fs::rename(place, path(form.into())),
    }
}
