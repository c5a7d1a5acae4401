//! The thread of one virtio device: takes requests out of the queues, gives them to the plugin a batch at a time, and passes on what it did.
//!
//! # A round
//!
//! First the outcomes of operations, then timers, channels, ports and stores, then each queue that has requests: at most [`FIRST`] of each, and when a queue had
//! as many, up to [`BATCH`] the next time. After each call into the plugin its operations are submitted together; at the end of the round every queue that has answers is
//! published once. When there is nothing left to do, the queues are asked to notify, looked at once more by that, and the thread sleeps.
//!
//! The thread alone owns the queues and the transport, and holds the instance's lock for calls only.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crossbeam_channel::{Receiver, Sender};
use tenon_core::{GuestRequest, QueueTransport, RequestQueue};

use super::inbox::{Inbox, Outcome};
use super::instance::Entry;
use super::keeper::{BATCH, Counters, Keeper, add};
use super::services::{Completion, Outbox};
use crate::store::Store;

/// How many requests of a queue are taken at once, as long as they were fewer the last time.
const FIRST: usize = 64;

/// What the worker is told in order.
pub(super) enum Command {
    /// The driver is ready.
    Start {
        features: u64,
        queues: Vec<Option<Box<dyn RequestQueue>>>,
        transport: Arc<dyn QueueTransport>,
    },
    /// Ends everything; the sender is dropped when that is done.
    Stop(Sender<()>),
    Pause(Sender<()>),
    Resume,
    /// Says how many operations on stores are under way, once there is nothing else to do.
    Settle(Sender<usize>),
    Quit,
}

/// What the worker and everybody else share.
pub(super) struct Shared {
    pub(super) name: String,
    /// None until the device has started, and again when it is gone.
    pub(super) keeper: Mutex<Option<Keeper>>,
    pub(super) inbox: Arc<Inbox>,
    pub(super) counters: Arc<Counters>,
    /// Those of the description, in its order.
    pub(super) stores: Vec<Arc<Store>>,
}

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, Option<Keeper>> {
        self.keeper.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One queue in use.
struct Queue {
    queue: Box<dyn RequestQueue>,
    /// The most requests that the device holds of it.
    max: usize,
    held: usize,
    /// How many are taken at once.
    most: usize,
    /// There may be requests.
    pending: bool,
    /// It notifies.
    armed: bool,
    broken: bool,
    /// There are answers that the driver does not see yet.
    unpublished: bool,
}

/// The worker.
pub(super) struct Worker {
    shared: Arc<Shared>,
    commands: Receiver<Command>,
    queues: Vec<Option<Queue>>,
    transport: Option<Arc<dyn QueueTransport>>,
    /// The plugin is given requests.
    active: bool,
    paused: bool,
    /// The queue that comes first in the next round.
    turn: usize,
    /// Operations that were submitted and whose outcome the device does not know.
    under_way: usize,
    /// Outcomes that the device does not know.
    done: Vec<Outcome>,
    /// Who waits until there is nothing to do.
    settling: Vec<Sender<usize>>,
    // Used again each time.
    more: Vec<Outcome>,
    taken: Vec<GuestRequest>,
    outbox: Outbox,
}

impl Worker {
    pub(super) fn new(shared: Arc<Shared>, commands: Receiver<Command>) -> Self {
        Self {
            shared,
            commands,
            queues: Vec::new(),
            transport: None,
            active: false,
            paused: false,
            turn: 0,
            under_way: 0,
            done: Vec::new(),
            settling: Vec::new(),
            more: Vec::new(),
            taken: Vec::new(),
            outbox: Outbox::default(),
        }
    }

    /// Works until it is told to quit.
    pub(super) fn serve(mut self) {
        self.shared.inbox.serve_here();
        loop {
            while let Ok(command) = self.commands.try_recv() {
                match command {
                    Command::Start { features, queues, transport } => self.start(features, queues, transport),
                    Command::Stop(_ended) => self.stop(),
                    Command::Pause(_ended) => self.pause(),
                    Command::Resume => self.paused = false,
                    Command::Settle(told) => self.settling.push(told),
                    Command::Quit => {
                        self.stop();
                        return;
                    }
                }
            }
            if self.paused || (!self.round() && self.arm()) {
                for told in self.settling.drain(..) {
                    // Who has lost patience is not told.
                    let _ = told.send(self.under_way);
                }
                // What comes after the look at the news leaves a token, so that this returns at once.
                std::thread::park();
            }
        }
    }

    fn start(
        &mut self,
        features: u64,
        queues: Vec<Option<Box<dyn RequestQueue>>>,
        transport: Arc<dyn QueueTransport>,
    ) {
        if self.transport.is_some() {
            self.stop();
        }
        let answer = {
            let mut guard = self.shared.lock();
            let Some(keeper) = &mut *guard else { return };
            let sizes = keeper.description.queues.iter().map(|queue| usize::from(queue.max_size));
            self.queues = queues
                .into_iter()
                .zip(sizes)
                .map(|(queue, max)| {
                    Some(Queue {
                        queue: queue?,
                        max,
                        held: 0,
                        most: FIRST,
                        pending: true,
                        armed: false,
                        broken: false,
                        unpublished: false,
                    })
                })
                .collect();
            keeper.enter(&Entry::Activate(features), u64::MAX)
        };
        self.transport = Some(transport);
        self.active = matches!(answer, Some(Ok(_)));
        if !self.active {
            if let Some(Err(error)) = answer {
                tracing::warn!(device = self.shared.name, %error, "the device refuses the features that the driver has chosen");
            }
            if let Some(transport) = &self.transport {
                transport.needs_reset();
            }
        }
        self.pass_on();
    }

    /// Takes outcomes that have come.
    fn collect(&mut self) {
        self.shared.inbox.take_done(&mut self.more);
        self.done.append(&mut self.more);
    }

    /// Waits until no operation touches guest memory. The device hears of their outcomes later, or never.
    fn quiesce(&mut self) {
        self.collect();
        while self.done.len() < self.under_way {
            std::thread::park();
            self.collect();
        }
    }

    /// Ends everything that the driver asked for.
    fn stop(&mut self) {
        self.active = false;
        self.quiesce();
        self.queues.clear();
        self.transport = None;
        self.under_way = 0;
        self.done.clear();
        if let Some(keeper) = &mut *self.shared.lock() {
            keeper.reset();
        }
        self.pass_on();
    }

    fn pause(&mut self) {
        // What was begun before ends before; the driver hears of it when the machine goes on.
        self.pass_on();
        self.quiesce();
        self.paused = true;
    }

    /// Asks every queue to notify. False if there is something to do.
    fn arm(&mut self) -> bool {
        let mut quiet = true;
        for queue in self.queues.iter_mut().flatten() {
            if self.active && !queue.broken && !queue.armed && queue.held < queue.max {
                queue.armed = queue.queue.arm();
                queue.pending |= !queue.armed;
                quiet &= queue.armed;
            }
        }
        quiet
    }

    /// Does what there is to do. Whether there was something.
    fn round(&mut self) -> bool {
        let mut worked = self.outcomes();
        worked |= self.news();
        for queue in self.shared.inbox.notified() {
            if let Some(queue) = self.queues.get_mut(queue).and_then(Option::as_mut) {
                queue.pending = true;
                queue.armed = false;
            }
        }
        if self.active {
            let count = self.queues.len();
            for n in 0..count {
                worked |= self.serve_queue((self.turn + n) % count);
            }
            self.turn = if count == 0 { 0 } else { (self.turn + 1) % count };
        }
        for queue in self.queues.iter_mut().flatten().filter(|queue| queue.unpublished) {
            queue.unpublished = false;
            queue.queue.publish();
        }
        worked
    }

    /// Operations that have ended.
    fn outcomes(&mut self) -> bool {
        self.collect();
        let poked = self.shared.inbox.poked.take().count() > 0;
        if self.done.is_empty() && !poked {
            return false;
        }
        self.under_way -= self.done.len();
        if let Some(services) = self.shared.lock().as_mut().and_then(Keeper::services) {
            services.operations_ended(&self.done);
        }
        self.done.clear();
        self.pass_on();
        true
    }

    /// Timers, channels, ports, stores and sockets.
    fn news(&mut self) -> bool {
        let inbox = self.shared.inbox.clone();
        let mut worked = false;
        for timer in inbox.timers.take() {
            worked = true;
            let mut guard = self.shared.lock();
            let Some(keeper) = &mut *guard else { continue };
            let Some(services) = keeper.services() else { continue };
            let now = services.base.clock().now();
            if services.base.take_due(timer, now) {
                keeper.enter(&Entry::Timer(timer, now), u64::MAX);
            }
            drop(guard);
            self.pass_on();
        }
        let entries = inbox
            .readable
            .take()
            .map(Entry::Readable)
            .chain(inbox.writable.take().map(Entry::Writable))
            .chain(inbox.ports.take().map(Entry::PortChanged))
            .chain(inbox.stores.take().map(Entry::StoreChanged))
            .chain(inbox.frames.take().map(Entry::PortReady))
            .chain(inbox.sockets.take().map(Entry::SocketReady));
        for entry in entries {
            worked = true;
            if let Some(keeper) = &mut *self.shared.lock() {
                keeper.enter(&entry, u64::MAX);
            }
            self.pass_on();
        }
        worked
    }

    /// Gives the plugin what one queue has.
    fn serve_queue(&mut self, index: usize) -> bool {
        let Some(Some(queue)) = self.queues.get_mut(index) else { return false };
        let room = queue.max.saturating_sub(queue.held);
        if !queue.pending || queue.broken || room == 0 || !self.active {
            return false;
        }
        let most = queue.most.min(room);
        let number = u16::try_from(index).unwrap_or(u16::MAX);
        if let Err(error) = queue.queue.take(most, &mut self.taken) {
            tracing::warn!(device = self.shared.name, %error, "the driver broke the rules of a queue, which is no longer served");
            queue.broken = true;
        }
        let count = self.taken.len();
        queue.pending = count == most;
        queue.most = if count == most { BATCH } else { FIRST };
        queue.held += count;
        if count == 0 {
            return false;
        }
        add(&self.shared.counters.requests, count);
        {
            let mut guard = self.shared.lock();
            let Some(keeper) = &mut *guard else { return false };
            let head = keeper.description.queues.get(index).map_or(0, |queue| queue.head);
            let Some(services) = keeper.services() else { return false };
            let first = services.table.next_sequence();
            let (records, heads) = services.take_in(number, head, &mut self.taken);
            if !keeper.has_failed() {
                add(&self.shared.counters.batches, 1);
                keeper.enter(&Entry::Requests { queue: number, requests: &records, heads: &heads }, first);
            }
            if let Some(services) = keeper.services() {
                services.give_back(records, heads);
            }
        }
        self.pass_on();
        true
    }

    /// Passes on what the device did, and tells it of operations that have ended, until there is nothing more.
    fn pass_on(&mut self) {
        loop {
            {
                let mut guard = self.shared.lock();
                let Some(keeper) = &mut *guard else { return };
                let failed = keeper.has_failed();
                let Some(services) = keeper.services() else { return };
                if !services.outbox.is_empty() {
                    self.outbox.operations.resize_with(services.outbox.operations.len(), Vec::new);
                    std::mem::swap(&mut self.outbox, &mut services.outbox);
                    self.shared.counters.note(services);
                } else if !services.ended.is_empty() && !failed {
                    let done = services.take_ended(BATCH);
                    keeper.enter(&Entry::Done(&done), u64::MAX);
                    continue;
                } else {
                    return;
                }
            }
            self.answer();
            self.submit();
            let config_changed = std::mem::take(&mut self.outbox.config_changed);
            let needs_reset = std::mem::take(&mut self.outbox.needs_reset);
            if let Some(transport) = &self.transport {
                if config_changed {
                    transport.config_changed();
                }
                if needs_reset {
                    self.active = false;
                    transport.needs_reset();
                }
            }
        }
    }

    fn answer(&mut self) {
        add(&self.shared.counters.answers, self.outbox.answers.len());
        for Completion { queue, token, written } in self.outbox.answers.drain(..) {
            if let Some(Some(queue)) = self.queues.get_mut(usize::from(queue)) {
                queue.queue.complete(token, written);
                queue.unpublished = true;
                queue.held = queue.held.saturating_sub(1);
            }
        }
    }

    fn submit(&mut self) {
        for (index, operations) in self.outbox.operations.iter_mut().enumerate() {
            if operations.is_empty() {
                continue;
            }
            let Some(store) = self.shared.stores.get(index) else { continue };
            self.under_way += operations.len();
            add(&self.shared.counters.operations, operations.len());
            store.submit(operations);
        }
    }
}
