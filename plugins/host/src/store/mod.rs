//! Backing stores, as devices and other stores see them.
//!
//! A [`Store`] is the same for everybody who uses it, whatever it is made of: a component on a thread of its own, which gets copies, or native code, which moves data
//! straight between the medium and guest memory. Operations are submitted many at a time and end one by one, on any thread.
//!
//! # What the host sees to, for every store
//!
//! - An operation that leaves the store, is not aligned to its blocks, or writes to a read-only store never reaches it.
//! - A flush that failed is never followed by one that succeeds, until all that was written and not yet durable has been written again. The same holds when an instance
//!   fell over something that it had not saved. What was written since the last good flush is noted for this ([`ranges`]).
//! - Operations that are too long for a component are given in pieces.
//!
//! # Locks
//!
//! One lock for the notes of what is under way, never held while the store works or while anybody is told of an outcome.
//!
//! Long for its one story: how an operation is checked, noted, and ended.

mod component;
mod connections;
mod native;
mod open;
mod ranges;
mod services;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use tenon_abi::{StoreError, StoreInfo};
use tenon_core::Buffers;

use ranges::Ranges;

pub(crate) use component::StoreState;
pub use open::{OpenError, StoreGrants};
pub(crate) use services::fill_random;

/// The most bytes of host memory that one operation moves, and the longest piece that a component gets.
pub const MAX_TRANSFER: u64 = 1 << 20;
/// The longest range of zeroes that a component is asked for at once.
const MAX_ZEROES: u64 = 16 << 20;

/// What an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OperationKind {
    /// Fills the data from the store.
    Read,
    /// Writes the data to the store.
    Write,
    /// Makes everything durable whose write was reported as done.
    Flush,
    /// Gives the space of a range back.
    Discard,
    /// Makes a range read as zeroes.
    WriteZeroes {
        /// Space may be given back.
        unmap: bool,
    },
}

impl OperationKind {
    fn moves_data(self) -> bool {
        matches!(self, Self::Read | Self::Write)
    }

    fn changes(self) -> bool {
        !matches!(self, Self::Read | Self::Flush)
    }
}

/// Where an operation's data is.
pub enum Data {
    /// Nowhere: the operation moves none.
    None,
    /// In guest memory, from this byte of the row on. Nobody may count on guest memory being left alone before the operation has ended.
    Guest(Buffers, u64),
    /// In the host's memory: as long as the operation, and at most [`MAX_TRANSFER`]. It comes back with the outcome.
    Host(Vec<u8>),
}

/// Who hears of the end of an operation.
pub trait Completed: Send + Sync {
    /// The operation that was submitted with `token` has ended; `bytes` are the [`Data::Host`] that it was given, else empty. Called on any thread, also during
    /// [`Store::submit`]. It must not block and not submit.
    fn completed(&self, token: u64, result: Result<(), StoreError>, bytes: Vec<u8>);
}

/// One operation.
pub struct Operation {
    /// What it does.
    pub kind: OperationKind,
    /// The first byte in the store; 0 for a flush.
    pub position: u64,
    /// The length in bytes; 0 for a flush.
    pub length: u64,
    /// Where the data is, for reads and writes.
    pub data: Data,
    /// Who hears of its end.
    pub done: Arc<dyn Completed>,
    /// What that one calls it.
    pub token: u64,
}

/// What a store did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreUse {
    /// Operations that were submitted.
    pub operations: u64,
    /// Calls into the plugin that carried operations.
    pub batches: u64,
    /// Operations that failed.
    pub errors: u64,
    /// Instances that fell.
    pub faults: u64,
    /// New instances that took the place of a fallen one.
    pub restarts: u64,
}

/// Counters, read without a lock.
#[derive(Default)]
pub(crate) struct Counters {
    operations: AtomicU64,
    pub(crate) batches: AtomicU64,
    errors: AtomicU64,
    pub(crate) faults: AtomicU64,
    pub(crate) restarts: AtomicU64,
}

pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// A part of an operation, as its medium gets it.
pub(crate) struct Piece {
    pub(crate) token: u64,
    pub(crate) kind: OperationKind,
    pub(crate) position: u64,
    pub(crate) length: u64,
    pub(crate) data: Data,
}

/// What a store is made of.
pub(crate) trait Medium: Send + Sync {
    /// Begins operations. Each ends by [`Shared::ended`].
    fn submit(&self, pieces: Vec<Piece>);

    /// Whether it wants long operations in pieces.
    fn in_pieces(&self) -> bool;

    /// Changes the length. Nothing is under way.
    fn resize(&self, size: u64) -> Result<StoreInfo, String>;

    /// Makes everything durable and ends. Nothing is under way.
    fn close(&self) -> Result<(), String>;
}

/// An operation that has not ended.
struct UnderWay {
    kind: OperationKind,
    position: u64,
    length: u64,
    pieces: u32,
    result: Result<(), StoreError>,
    bytes: Vec<u8>,
    /// Of a flush: what it makes durable.
    covers: Ranges,
    done: Arc<dyn Completed>,
    token: u64,
}

#[derive(Default)]
struct Slot {
    generation: u32,
    operation: Option<UnderWay>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Open,
    /// Operations wait until the length was changed.
    Resizing,
    Closed,
}

struct State {
    info: StoreInfo,
    phase: Phase,
    slots: Vec<Slot>,
    free: Vec<u32>,
    under_way: usize,
    /// What came while the length was being changed.
    held: Vec<Operation>,
    /// Written and reported, and not covered by a flush.
    dirty: Ranges,
    /// Written and reported, and perhaps gone.
    lost: Ranges,
    watchers: Vec<Box<dyn Fn() + Send + Sync>>,
}

/// What a store and its medium share.
pub(crate) struct Shared {
    pub(crate) name: String,
    state: Mutex<State>,
    /// Nothing outside the host is waited for any more.
    pub(super) cut: Arc<AtomicBool>,
    /// Nothing is under way any more.
    idle: Condvar,
    pub(crate) counters: Counters,
}

/// How an operation ended, with the host memory that it was given.
pub type Outcome = (Result<(), StoreError>, Vec<u8>);

/// Outcomes that are told once no lock is held.
type Told = Vec<(Arc<dyn Completed>, u64, Result<(), StoreError>, Vec<u8>)>;

fn tell(told: Told) {
    for (done, token, result, bytes) in told {
        done.completed(token, result, bytes);
    }
}

impl Shared {
    pub(crate) fn new(name: &str) -> Arc<Self> {
        Arc::new(Self {
            name: name.to_owned(),
            cut: Arc::default(),
            state: Mutex::new(State {
                info: StoreInfo::new(0),
                phase: Phase::Open,
                slots: Vec::new(),
                free: Vec::new(),
                under_way: 0,
                held: Vec::new(),
                dirty: Ranges::default(),
                lost: Ranges::default(),
                watchers: Vec::new(),
            }),
            idle: Condvar::new(),
            counters: Counters::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A piece has ended, with the host memory that it was given. Tokens that nothing stands behind are passed over.
    pub(crate) fn ended(&self, token: u64, result: Result<(), StoreError>, bytes: Vec<u8>) {
        let finished = self.lock().end(token, result, bytes);
        if let Some((operation, idle)) = finished {
            if operation.result.is_err() {
                count(&self.counters.errors);
            }
            operation.done.completed(operation.token, operation.result, operation.bytes);
            if idle {
                self.idle.notify_all();
            }
        }
    }

    /// The instance is gone with what it had not saved: everything that was written since the last good flush may be lost.
    pub(crate) fn crashed(&self) {
        let state = &mut *self.lock();
        state.lost.absorb(&mut state.dirty);
        for operation in state.slots.iter_mut().filter_map(|slot| slot.operation.as_mut()) {
            state.lost.absorb(&mut operation.covers);
        }
    }
}

impl State {
    /// Checks an operation and notes it. Gives its outcome if it has ended with that.
    fn admit(
        &mut self,
        mut operation: Operation,
        in_pieces: bool,
        pieces: &mut Vec<Piece>,
    ) -> Option<(Operation, Result<(), StoreError>)> {
        if let Err(error) = self.check(&operation) {
            return Some((operation, Err(error)));
        }
        let Operation { kind, position, length, .. } = operation;
        if length == 0 && kind != OperationKind::Flush {
            return Some((operation, Ok(())));
        }
        let covers =
            if kind == OperationKind::Flush { std::mem::take(&mut self.dirty) } else { Ranges::default() };
        let longest = match kind {
            OperationKind::Read | OperationKind::Write if in_pieces => MAX_TRANSFER,
            OperationKind::WriteZeroes { .. } if in_pieces => MAX_ZEROES,
            _ => u64::MAX,
        };
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            u32::try_from(self.slots.len() - 1).unwrap_or(u32::MAX)
        });
        let slot = &mut self.slots[index as usize];
        let token = u64::from(slot.generation) << 32 | u64::from(index);
        let count = length.div_ceil(longest).max(1);
        if count == 1 {
            let data = std::mem::replace(&mut operation.data, Data::None);
            pieces.push(Piece { token, kind, position, length, data });
        } else {
            for n in 0..count {
                let at = n * longest;
                let data = match &operation.data {
                    Data::Guest(buffers, offset) => Data::Guest(buffers.clone(), offset + at),
                    Data::Host(_) | Data::None => Data::None,
                };
                pieces.push(Piece {
                    token,
                    kind,
                    position: position + at,
                    length: longest.min(length - at),
                    data,
                });
            }
        }
        slot.operation = Some(UnderWay {
            kind,
            position,
            length,
            pieces: u32::try_from(count).unwrap_or(u32::MAX),
            result: Ok(()),
            bytes: Vec::new(),
            covers,
            done: operation.done,
            token: operation.token,
        });
        self.under_way += 1;
        None
    }

    fn check(&self, operation: &Operation) -> Result<(), StoreError> {
        let Operation { kind, position, length, ref data, .. } = *operation;
        let info = &self.info;
        if self.phase == Phase::Closed {
            return Err(StoreError::Io);
        }
        if kind == OperationKind::Flush {
            return if self.lost.is_empty() { Ok(()) } else { Err(StoreError::Io) };
        }
        if kind.changes() && info.read_only {
            return Err(StoreError::ReadOnly);
        }
        if kind == OperationKind::Discard && !info.discard {
            return Err(StoreError::Unsupported);
        }
        let block = u64::from(info.block_size) - 1;
        let inside = position.checked_add(length).is_some_and(|end| end <= info.size);
        if !inside || (position | length) & block != 0 {
            return Err(StoreError::OutOfRange);
        }
        let there = match data {
            Data::None => !kind.moves_data(),
            Data::Guest(buffers, offset) => {
                offset.checked_add(length).is_some_and(|end| end <= buffers.length())
            }
            Data::Host(bytes) => bytes.len() as u64 == length && length <= MAX_TRANSFER,
        };
        if there || !kind.moves_data() { Ok(()) } else { Err(StoreError::OutOfRange) }
    }

    /// The operation, if this was its last piece, and whether nothing is under way any more.
    fn end(
        &mut self,
        token: u64,
        result: Result<(), StoreError>,
        bytes: Vec<u8>,
    ) -> Option<(UnderWay, bool)> {
        let (index, generation) = (usize::try_from(token & 0xffff_ffff).ok()?, token >> 32);
        let slot = self.slots.get_mut(index).filter(|slot| u64::from(slot.generation) == generation)?;
        let operation = slot.operation.as_mut()?;
        operation.result = operation.result.and(result);
        operation.bytes = bytes;
        operation.pieces -= 1;
        if operation.pieces > 0 {
            return None;
        }
        let mut operation = slot.operation.take()?;
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(u32::try_from(index).unwrap_or(u32::MAX));
        self.under_way -= 1;
        match operation.kind {
            OperationKind::Flush => {
                if operation.result.is_err() {
                    self.lost.absorb(&mut operation.covers);
                } else if !self.lost.is_empty() {
                    operation.result = Err(StoreError::Io);
                }
            }
            OperationKind::Write | OperationKind::WriteZeroes { .. } if operation.result.is_ok() => {
                let UnderWay { position, length, .. } = operation;
                if !self.lost.is_empty() {
                    self.lost.remove(position, length, self.info.size);
                }
                self.dirty.add(position, length);
            }
            _ => {}
        }
        Some((operation, self.under_way == 0))
    }
}

/// A backing store. Dropping it closes it.
pub struct Store {
    shared: Arc<Shared>,
    medium: Box<dyn Medium>,
    /// Those that it stands on.
    lowers: Vec<Arc<Store>>,
}

impl Store {
    /// A store on this medium, which has been opened.
    pub(crate) fn on(
        shared: Arc<Shared>,
        info: StoreInfo,
        medium: Box<dyn Medium>,
        lowers: Vec<Arc<Self>>,
    ) -> Arc<Self> {
        shared.lock().info = info;
        Arc::new(Self { shared, medium, lowers })
    }

    /// Waits for other hosts no more, here and in the stores below: what is waited for fails. For the end of a machine.
    pub fn cut(&self) {
        self.shared.cut.store(true, Ordering::Relaxed);
        self.lowers.iter().for_each(|store| store.cut());
    }

    /// Its name in this machine.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// What it is now.
    #[must_use]
    pub fn info(&self) -> StoreInfo {
        self.shared.lock().info.clone()
    }

    /// What it did.
    #[must_use]
    pub fn usage(&self) -> StoreUse {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.shared.counters;
        StoreUse {
            operations: get(&counters.operations),
            batches: get(&counters.batches),
            errors: get(&counters.errors),
            faults: get(&counters.faults),
            restarts: get(&counters.restarts),
        }
    }

    /// Begins operations, and leaves none in `operations`. They are independent of each other: a flush covers only what was reported as done before. Each ends once.
    pub fn submit(&self, operations: &mut Vec<Operation>) {
        let in_pieces = self.medium.in_pieces();
        self.shared.counters.operations.fetch_add(operations.len() as u64, Ordering::Relaxed);
        let mut pieces = Vec::with_capacity(operations.len());
        let mut told = Told::new();
        {
            let mut state = self.shared.lock();
            if state.phase == Phase::Resizing {
                state.held.append(operations);
                return;
            }
            for operation in operations.drain(..) {
                if let Some((operation, result)) = state.admit(operation, in_pieces, &mut pieces) {
                    let bytes = if let Data::Host(bytes) = operation.data { bytes } else { Vec::new() };
                    told.push((operation.done, operation.token, result, bytes));
                }
            }
        }
        if !pieces.is_empty() {
            self.medium.submit(pieces);
        }
        for (_, _, result, _) in &told {
            if result.is_err() {
                count(&self.shared.counters.errors);
            }
        }
        tell(told);
    }

    /// Carries out operations and waits for all of them; each is a kind, a position, a length and data. Gives the outcomes in order, with the data of each.
    pub fn run(&self, operations: Vec<(OperationKind, u64, u64, Data)>) -> Vec<Outcome> {
        let gather = Arc::new(Gather {
            outcomes: Mutex::new((
                operations.len(),
                operations.iter().map(|_| (Ok(()), Vec::new())).collect(),
            )),
            all: Condvar::new(),
        });
        let mut batch: Vec<Operation> = (0..)
            .zip(operations)
            .map(|(token, (kind, position, length, data))| {
                let done: Arc<dyn Completed> = gather.clone();
                Operation { kind, position, length, data, done, token }
            })
            .collect();
        self.submit(&mut batch);
        let mut outcomes = gather.outcomes.lock().unwrap_or_else(PoisonError::into_inner);
        while outcomes.0 > 0 {
            outcomes = gather.all.wait(outcomes).unwrap_or_else(PoisonError::into_inner);
        }
        std::mem::take(&mut outcomes.1)
    }

    /// Reads `length` bytes (at most [`MAX_TRANSFER`]), waiting for them.
    ///
    /// # Errors
    /// As the store says.
    pub fn read(&self, position: u64, length: u64) -> Result<Vec<u8>, StoreError> {
        let room = usize::try_from(length.min(MAX_TRANSFER)).unwrap_or(0);
        let data = Data::Host(vec![0; room]);
        let mut outcomes = self.run(vec![(OperationKind::Read, position, length, data)]);
        outcomes.pop().map_or(Err(StoreError::Io), |(result, bytes)| result.map(|()| bytes))
    }

    /// Writes bytes (at most [`MAX_TRANSFER`]), waiting for it.
    ///
    /// # Errors
    /// As the store says.
    pub fn write(&self, position: u64, bytes: Vec<u8>) -> Result<(), StoreError> {
        let length = bytes.len() as u64;
        self.run(vec![(OperationKind::Write, position, length, Data::Host(bytes))])
            .pop()
            .map_or(Err(StoreError::Io), |(result, _)| result)
    }

    /// Makes everything durable that was written, waiting for it.
    ///
    /// # Errors
    /// As the store says.
    pub fn flush(&self) -> Result<(), StoreError> {
        self.run(vec![(OperationKind::Flush, 0, 0, Data::None)])
            .pop()
            .map_or(Err(StoreError::Io), |(result, _)| result)
    }

    /// Waits until nothing is under way and operations that come wait, in this phase.
    fn quiesce(&self, phase: Phase) -> bool {
        let mut state = self.shared.lock();
        if state.phase != Phase::Open {
            return false;
        }
        state.phase = phase;
        while state.under_way > 0 {
            state = self.shared.idle.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        true
    }

    /// Changes the length. Operations that come meanwhile wait.
    ///
    /// # Errors
    /// The store cannot, or is closed, or is being resized.
    pub fn resize(&self, size: u64) -> Result<StoreInfo, String> {
        if !self.quiesce(Phase::Resizing) {
            return Err(format!("the store `{}` is closed or is being resized", self.name()));
        }
        let result = self.medium.resize(size).and_then(|info| {
            info.check().map_err(|wrong| format!("after resizing, {wrong}"))?;
            Ok(info)
        });
        let mut held = {
            let mut state = self.shared.lock();
            if let Ok(info) = &result {
                state.info = info.clone();
            }
            state.phase = Phase::Open;
            if result.is_ok() {
                state.watchers.iter().for_each(|watcher| watcher());
            }
            std::mem::take(&mut state.held)
        };
        self.submit(&mut held);
        result.map_err(|error| format!("resizing the store `{}`: {error}", self.name()))
    }

    /// Has `news` called whenever [`Store::info`] has changed. It must not block, and not call the store.
    pub fn watch(&self, news: impl Fn() + Send + Sync + 'static) {
        self.shared.lock().watchers.push(Box::new(news));
    }

    /// Closes the store in good order: waits for what is under way, makes everything durable. Operations that come later fail. Does nothing the second time.
    ///
    /// # Errors
    /// Not everything is durable.
    pub fn close(&self) -> Result<(), String> {
        if !self.quiesce(Phase::Closed) {
            return Ok(());
        }
        let result = self.medium.close();
        let lost = !self.shared.lock().lost.is_empty();
        match result {
            Ok(()) if lost => Err(format!("the store `{}` has lost what was written to it", self.name())),
            Ok(()) => Ok(()),
            Err(error) => Err(format!("closing the store `{}`: {error}", self.name())),
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            tracing::error!("{error}");
        }
    }
}

/// Collects the outcomes of a batch.
struct Gather {
    /// How many are still to come, and what has come.
    outcomes: Mutex<(usize, Vec<Outcome>)>,
    all: Condvar,
}

impl Completed for Gather {
    fn completed(&self, token: u64, result: Result<(), StoreError>, bytes: Vec<u8>) {
        let mut outcomes = self.outcomes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(outcome) = usize::try_from(token).ok().and_then(|index| outcomes.1.get_mut(index)) {
            *outcome = (result, bytes);
        }
        outcomes.0 = outcomes.0.saturating_sub(1);
        if outcomes.0 == 0 {
            self.all.notify_all();
        }
    }
}

#[cfg(test)]
mod tests;
