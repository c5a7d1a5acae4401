//! The requests that a device holds, and what was done for each of them.
//!
//! # Repeating
//!
//! A new instance is given every unfinished request again, and does again what the old one did. So each request keeps the effects that were had on its behalf, in order:
//! operations on stores, bytes moved to and from channels, actions in folders. An effect that is had again is answered with what the first one came to, and is not had twice; an
//! operation that is still under way becomes the new instance's. An instance that does something else than the old one drops what is left of the effects; an operation that is then
//! still under way must end before the next one begins, or before the request is answered, since it touches the same memory.
//!
//! Actions in folders are kept apart, all of them: a write or a new file must not be had twice, also where operations and transfers were too many to be kept, or are others. They are dropped
//! when another action is asked for than the old instance did.
//!
//! This file is longer than most for the tests of what is repeated and what is not.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use smallvec::SmallVec;
use tenon_abi::{Errno, FolderAction, FolderOutcome, StoreError};
use tenon_core::{Buffers, GuestRequest};

use crate::fault::Misuse;
use crate::store::OperationKind;

/// The most operations and transfers that are kept for one request.
const EFFECTS: usize = 256;
/// The most actions in folders for one request: all of them are kept.
const ACTIONS: usize = 16;
/// How many bytes are kept at most of the actions of all requests, and of what they came to, before another one is done.
const KEPT: usize = 16 << 20;

/// An operation on a store, for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StoreOperation {
    pub(crate) store: u32,
    pub(crate) kind: OperationKind,
    /// Of the data in the request.
    pub(crate) offset: u32,
    pub(crate) length: u64,
    pub(crate) position: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    /// It waits for a dropped one to end.
    Waiting,
    UnderWay,
    Ended(Result<(), StoreError>),
}

/// Which way bytes of a channel went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Transfer {
    pub(crate) out: bool,
    pub(crate) channel: u32,
    pub(crate) offset: u32,
    pub(crate) length: u32,
}

enum Effect {
    Store { operation: StoreOperation, success: SmallVec<[u8; 8]>, progress: Progress },
    Moved { transfer: Transfer, count: u32 },
}

/// What an action in a folder came to.
pub(crate) type Acts = Arc<Result<FolderOutcome, Errno>>;

/// What was done in a folder, and what it came to.
pub(crate) struct Acted {
    pub(crate) folder: u32,
    pub(crate) action: FolderAction,
    pub(crate) outcome: Acts,
    /// Held until the action is forgotten.
    pub(crate) _share: Share,
}

/// How many bytes are kept of the actions of all requests.
#[derive(Clone, Default)]
pub(crate) struct Total(Arc<AtomicUsize>);

impl Total {
    /// Whether there is room for an action with `bytes` of its own.
    pub(crate) fn check(&self, bytes: usize) -> Result<(), Misuse> {
        let kept = self.0.load(Ordering::Relaxed);
        if kept + bytes > KEPT {
            return Err(Misuse(format!(
                "what it did in folders for requests that it has not answered takes {kept} bytes, which may be {KEPT}"
            )));
        }
        Ok(())
    }

    /// Adds what is kept of one action, until the share is dropped.
    pub(crate) fn add(self, bytes: usize) -> Share {
        let bytes = bytes + size_of::<Acted>();
        self.0.fetch_add(bytes, Ordering::Relaxed);
        Share { total: self, bytes }
    }
}

/// The part of a [`Total`] that one action takes.
pub(crate) struct Share {
    total: Total,
    bytes: usize,
}

impl Drop for Share {
    fn drop(&mut self) {
        self.total.0.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// What is to be done about an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Nothing now.
    Wait,
    /// Submit it.
    Submit(StoreOperation),
    /// It has ended so: the device, or the driver, is to hear of it.
    Ended(Result<(), StoreError>),
    /// The request is answered with so many bytes.
    Answer(u32),
}

/// A request that the device holds.
pub(crate) struct Held {
    pub(crate) handle: u32,
    /// Counts the requests as they come.
    pub(crate) sequence: u64,
    pub(crate) queue: u16,
    pub(crate) token: u32,
    pub(crate) readable: Buffers,
    pub(crate) writable: Buffers,
    effects: SmallVec<[Effect; 1]>,
    /// The next effect that the instance may repeat.
    cursor: usize,
    actions: Vec<Acted>,
    /// The next action that the instance may repeat.
    next_action: usize,
    /// The instance has begun an operation and was not told of its end.
    begun: bool,
    /// An operation that no effect stands for is under way.
    dropped: bool,
    /// The device has answered, and a dropped operation still touches the request's memory.
    answered: Option<u32>,
}

impl Held {
    /// Begins an operation.
    pub(crate) fn begin(
        &mut self,
        operation: StoreOperation,
        success: &[u8],
        divergences: &mut u64,
    ) -> Result<Next, Misuse> {
        if self.begun {
            return Err(Misuse(format!(
                "it began an operation for request {} that has one under way",
                self.handle
            )));
        }
        self.begun = true;
        if let Some(Effect::Store { operation: old, success: kept, progress }) =
            self.effects.get_mut(self.cursor)
            && *old == operation
        {
            *kept = SmallVec::from_slice(success);
            let progress = *progress;
            self.cursor += 1;
            return Ok(match progress {
                Progress::Ended(result) => Next::Ended(result),
                Progress::UnderWay | Progress::Waiting => Next::Wait,
            });
        }
        self.diverge(divergences);
        if self.effects.len() >= EFFECTS {
            // Old ones have ended; what is kept of them is given up.
            self.effects.clear();
        }
        let progress = if self.dropped { Progress::Waiting } else { Progress::UnderWay };
        self.effects.push(Effect::Store { operation, success: SmallVec::from_slice(success), progress });
        self.cursor = self.effects.len();
        Ok(if self.dropped { Next::Wait } else { Next::Submit(operation) })
    }

    /// What a transfer came to when it was made before, if it was.
    pub(crate) fn moved_before(&mut self, transfer: Transfer, divergences: &mut u64) -> Option<u32> {
        if let Some(Effect::Moved { transfer: old, count }) = self.effects.get(self.cursor)
            && *old == transfer
        {
            self.cursor += 1;
            return Some(*count);
        }
        self.diverge(divergences);
        None
    }

    /// Keeps what a transfer came to.
    pub(crate) fn moved(&mut self, transfer: Transfer, count: u32) {
        if self.effects.len() < EFFECTS {
            self.effects.push(Effect::Moved { transfer, count });
            self.cursor = self.effects.len();
        }
    }

    /// What an action came to when it was done before, if it was.
    pub(crate) fn acted_before(
        &mut self,
        folder: u32,
        action: &FolderAction,
        divergences: &mut u64,
    ) -> Result<Option<Acts>, Misuse> {
        match self.actions.get(self.next_action) {
            Some(old) if old.folder == folder && old.action == *action => {
                self.next_action += 1;
                return Ok(Some(old.outcome.clone()));
            }
            Some(_) => {
                *divergences += 1;
                self.actions.truncate(self.next_action);
                self.drop_rest();
            }
            None => self.diverge(divergences),
        }
        if self.actions.len() >= ACTIONS {
            return Err(Misuse(format!(
                "it did more than {ACTIONS} things in folders for request {}",
                self.handle
            )));
        }
        Ok(None)
    }

    /// Keeps what an action came to.
    pub(crate) fn acted(&mut self, acted: Acted) {
        self.actions.push(acted);
        self.next_action = self.actions.len();
    }

    /// The instance does something new: what is left of the old effects is dropped.
    fn diverge(&mut self, divergences: &mut u64) {
        if self.cursor < self.effects.len() {
            *divergences += 1;
            self.drop_rest();
        }
    }

    fn drop_rest(&mut self) {
        let under_way =
            |effect: &Effect| matches!(effect, Effect::Store { progress: Progress::UnderWay, .. });
        self.dropped |= self.effects[self.cursor..].iter().any(under_way);
        self.effects.truncate(self.cursor);
    }

    /// The operation that is under way has ended.
    pub(crate) fn end(&mut self, result: Result<(), StoreError>) -> Next {
        if self.dropped {
            self.dropped = false;
            if let Some(written) = self.answered {
                return Next::Answer(written);
            }
            let last = self.last_operation();
            return match last.map(|last| &mut self.effects[last]) {
                Some(Effect::Store { operation, progress: progress @ Progress::Waiting, .. }) => {
                    *progress = Progress::UnderWay;
                    Next::Submit(*operation)
                }
                _ => Next::Wait,
            };
        }
        // The device may have moved bytes after it began the operation.
        let Some(last) = self.last_operation() else { return Next::Wait };
        let claimed = self.begun && last < self.cursor;
        if let Effect::Store { progress: progress @ Progress::UnderWay, .. } = &mut self.effects[last] {
            *progress = Progress::Ended(result);
            if let Some(written) = self.answered {
                return Next::Answer(written);
            }
            if claimed {
                return Next::Ended(result);
            }
        }
        Next::Wait
    }

    /// The operation that the instance began last, and what is written when it succeeds.
    pub(crate) fn began(&self) -> Option<(StoreOperation, &[u8])> {
        self.effects[..self.cursor].iter().rev().filter(|_| self.begun).find_map(|effect| match effect {
            Effect::Store { operation, success, .. } => Some((*operation, success.as_slice())),
            Effect::Moved { .. } => None,
        })
    }

    fn last_operation(&self) -> Option<usize> {
        self.effects.iter().rposition(|effect| matches!(effect, Effect::Store { .. }))
    }

    /// The instance is told of the end of its operation.
    pub(crate) fn told(&mut self) {
        self.begun = false;
    }

    /// The device answers. Whether that is to happen now; otherwise it happens when what is still under way has ended.
    pub(crate) fn answer(&mut self, written: u32) -> Result<bool, Misuse> {
        if self.begun {
            return Err(Misuse(format!(
                "it completed request {} that has an operation under way",
                self.handle
            )));
        }
        let under_way =
            |last: usize| matches!(self.effects[last], Effect::Store { progress: Progress::UnderWay, .. });
        if self.dropped || self.last_operation().is_some_and(under_way) {
            self.answered = Some(written);
            return Ok(false);
        }
        Ok(true)
    }

    fn again(&mut self) {
        (self.cursor, self.next_action) = (0, 0);
        self.begun = false;
    }
}

/// Every request that a device holds, by handle.
///
/// A handle's place is its lowest bits: no hashing, and a place that is still taken is passed over, so that handles are not reused before all 2^32 were.
pub(crate) struct Table {
    /// A power of two of places.
    places: Vec<Option<Held>>,
    held: usize,
    next_handle: u32,
    next_sequence: u64,
    /// What is kept of actions in folders.
    total: Total,
}

impl Table {
    pub(crate) fn new() -> Self {
        let places = (0..64).map(|_| None).collect();
        Self { places, held: 0, next_handle: 1, next_sequence: 0, total: Total::default() }
    }

    /// What is kept of actions in folders.
    pub(crate) fn total(&self) -> Total {
        self.total.clone()
    }

    fn place(&self, handle: u32) -> usize {
        handle as usize & (self.places.len() - 1)
    }

    /// The number that the next request gets.
    pub(crate) fn next_sequence(&self) -> u64 {
        self.next_sequence
    }

    /// Whether there are none.
    pub(crate) fn is_empty(&self) -> bool {
        self.held == 0
    }

    /// Takes a request in; its handle.
    pub(crate) fn insert(&mut self, queue: u16, request: GuestRequest) -> u32 {
        if self.held * 2 >= self.places.len() {
            self.grow();
        }
        while self.places[self.place(self.next_handle)].is_some() {
            self.next_handle = self.next_handle.wrapping_add(1);
        }
        let (handle, sequence) = (self.next_handle, self.next_sequence);
        self.next_handle = handle.wrapping_add(1);
        self.next_sequence += 1;
        let place = self.place(handle);
        self.places[place] = Some(Held {
            handle,
            sequence,
            queue,
            token: request.token,
            readable: request.readable,
            writable: request.writable,
            effects: SmallVec::new(),
            cursor: 0,
            actions: Vec::new(),
            next_action: 0,
            begun: false,
            dropped: false,
            answered: None,
        });
        self.held += 1;
        handle
    }

    fn grow(&mut self) {
        let old = std::mem::take(&mut self.places);
        self.places = (0..old.len() * 2).map(|_| None).collect();
        for held in old.into_iter().flatten() {
            // Two handles whose lowest bits differ still do with one bit more.
            let place = self.place(held.handle);
            self.places[place] = Some(held);
        }
    }

    /// The request of this handle, if the device holds it.
    pub(crate) fn get(&mut self, handle: u32) -> Result<&mut Held, Misuse> {
        self.any(handle)
            .filter(|held| held.answered.is_none())
            .ok_or_else(|| Misuse(format!("it named request {handle}, which it does not hold")))
    }

    /// The request of this handle, also if the device has answered it.
    pub(crate) fn any(&mut self, handle: u32) -> Option<&mut Held> {
        let place = self.place(handle);
        self.places[place].as_mut().filter(|held| held.handle == handle)
    }

    /// Ends a request.
    pub(crate) fn remove(&mut self, handle: u32) -> Option<Held> {
        let place = self.place(handle);
        if self.places[place].as_ref().is_none_or(|held| held.handle != handle) {
            return None;
        }
        self.held -= 1;
        self.places[place].take()
    }

    /// Ends all of them.
    pub(crate) fn clear(&mut self) {
        self.places.iter_mut().for_each(|place| *place = None);
        self.held = 0;
    }

    /// A new instance comes: every effect may be repeated. Gives the unanswered requests in the order in which they came, as sequence, queue and handle.
    pub(crate) fn again(&mut self) -> Vec<(u64, u16, u32)> {
        let mut all: Vec<_> = self
            .places
            .iter_mut()
            .flatten()
            .filter(|held| held.answered.is_none())
            .map(|held| {
                held.again();
                (held.sequence, held.queue, held.handle)
            })
            .collect();
        all.sort_unstable();
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tenon_abi::Node;
    use tenon_core::{MIN_MEMORY, Ram};

    fn table() -> (Table, u32) {
        let ram = Ram::new(MIN_MEMORY).unwrap();
        let mut table = Table::new();
        let request = GuestRequest { token: 7, readable: Buffers::new(&ram), writable: Buffers::new(&ram) };
        let handle = table.insert(0, request);
        (table, handle)
    }

    fn operation(position: u64) -> StoreOperation {
        StoreOperation { store: 0, kind: OperationKind::Read, offset: 0, length: 512, position }
    }

    #[test]
    fn an_operation_that_is_begun_again_is_not_had_twice() {
        let (mut table, handle) = table();
        let mut diverged = 0;
        let held = table.get(handle).unwrap();
        assert_eq!(held.begin(operation(0), b"", &mut diverged).unwrap(), Next::Submit(operation(0)));
        assert_eq!(table.again().len(), 1);
        let held = table.get(handle).unwrap();
        assert_eq!(held.begin(operation(0), b"", &mut diverged).unwrap(), Next::Wait);
        assert_eq!(held.end(Ok(())), Next::Ended(Ok(())));
        held.told();
        table.again();
        let held = table.get(handle).unwrap();
        assert_eq!(held.begin(operation(0), b"", &mut diverged).unwrap(), Next::Ended(Ok(())));
        assert_eq!(diverged, 0);
    }

    #[test]
    fn an_operation_that_ends_before_it_is_begun_again_is_told_then() {
        let (mut table, handle) = table();
        let mut diverged = 0;
        table.get(handle).unwrap().begin(operation(0), b"", &mut diverged).unwrap();
        table.again();
        let held = table.get(handle).unwrap();
        assert_eq!(held.end(Err(StoreError::Io)), Next::Wait);
        assert_eq!(held.begin(operation(0), b"", &mut diverged).unwrap(), Next::Ended(Err(StoreError::Io)));
    }

    #[test]
    fn another_operation_waits_for_the_dropped_one_to_end() {
        let (mut table, handle) = table();
        let mut diverged = 0;
        table.get(handle).unwrap().begin(operation(0), b"", &mut diverged).unwrap();
        table.again();
        let held = table.get(handle).unwrap();
        assert_eq!(held.begin(operation(512), b"", &mut diverged).unwrap(), Next::Wait);
        assert_eq!(diverged, 1);
        assert_eq!(held.end(Ok(())), Next::Submit(operation(512)));
        assert_eq!(held.end(Ok(())), Next::Ended(Ok(())));
    }

    #[test]
    fn an_answer_waits_for_what_still_touches_the_request() {
        let (mut table, handle) = table();
        table.get(handle).unwrap().begin(operation(0), b"", &mut 0).unwrap();
        table.again();
        assert!(!table.get(handle).unwrap().answer(3).unwrap());
        assert!(table.get(handle).is_err(), "it was answered");
        assert!(table.again().is_empty());
        assert_eq!(table.any(handle).unwrap().end(Ok(())), Next::Answer(3));
    }

    /// Asks for a folder's attributes; whether it was done before.
    fn act(table: &mut Table, handle: u32, node: u64, diverged: &mut u64) -> Result<bool, Misuse> {
        let action = FolderAction::Attributes { node: Node(node), file: None };
        let share = table.total().add(0);
        let held = table.get(handle)?;
        let before = held.acted_before(0, &action, diverged)?.is_some();
        if !before {
            held.acted(Acted {
                folder: 0,
                action,
                outcome: Arc::new(Ok(FolderOutcome::Done)),
                _share: share,
            });
        }
        Ok(before)
    }

    #[test]
    fn actions_are_not_done_twice_however_many_operations_lie_between() {
        let (mut table, handle) = table();
        let mut diverged = 0;
        let mut do_all = |table: &mut Table| -> Vec<bool> {
            (0..4)
                .map(|n| {
                    let before = act(table, handle, n, &mut diverged).unwrap();
                    for position in 0..100 {
                        let held = table.get(handle).unwrap();
                        if let Next::Submit(_) = held.begin(operation(position), b"", &mut 0).unwrap() {
                            assert_eq!(held.end(Ok(())), Next::Ended(Ok(())));
                        }
                        held.told();
                    }
                    before
                })
                .collect()
        };
        assert_eq!(do_all(&mut table), [false; 4]);
        table.again();
        assert_eq!(do_all(&mut table), [true; 4], "400 operations, of which not all are kept");
        assert_eq!(diverged, 0);
    }

    #[test]
    fn another_action_drops_what_the_old_instance_did_after_it() {
        let (mut table, handle) = table();
        let mut diverged = 0;
        for node in [1, 2, 3] {
            assert!(!act(&mut table, handle, node, &mut diverged).unwrap());
        }
        table.get(handle).unwrap().begin(operation(0), b"", &mut diverged).unwrap();
        table.again();
        let did = [1, 7, 3].map(|node| act(&mut table, handle, node, &mut diverged).unwrap());
        assert_eq!((did, diverged), ([true, false, false], 1));
        let held = table.get(handle).unwrap();
        assert_eq!(
            held.begin(operation(0), b"", &mut diverged).unwrap(),
            Next::Wait,
            "the old one ends first"
        );
        assert_eq!(held.end(Ok(())), Next::Submit(operation(0)));
    }

    #[test]
    fn the_end_of_an_operation_is_told_also_when_the_device_did_more_meanwhile() {
        let transfer = Transfer { out: true, channel: 0, offset: 0, length: 1 };
        let (mut table, handle) = table();
        let mut diverged = 0;
        for again in [false, true] {
            let held = table.get(handle).unwrap();
            let begun = held.begin(operation(0), b"", &mut diverged).unwrap();
            assert_eq!(begun, if again { Next::Wait } else { Next::Submit(operation(0)) });
            if held.moved_before(transfer, &mut diverged).is_none() {
                held.moved(transfer, 1);
            }
            assert_eq!(held.began().map(|(operation, _)| operation), Some(operation(0)));
            assert_eq!(act(&mut table, handle, 1, &mut diverged).unwrap(), again);
            if !again {
                table.again();
            }
        }
        let held = table.get(handle).unwrap();
        assert_eq!(held.end(Ok(())), Next::Ended(Ok(())));
        held.told();
        assert!(held.answer(0).unwrap());
        assert_eq!(diverged, 0);
    }

    #[test]
    fn what_is_kept_of_actions_goes_with_the_request() {
        let (mut table, handle) = table();
        assert!(!act(&mut table, handle, 1, &mut 0).unwrap());
        table.total().check(KEPT - size_of::<Acted>()).unwrap();
        assert!(table.total().check(KEPT - size_of::<Acted>() + 1).is_err());
        table.remove(handle);
        table.total().check(KEPT).unwrap();
    }

    #[test]
    fn two_operations_at_once_and_an_answer_in_between_are_misuse() {
        let (mut table, handle) = table();
        let held = table.get(handle).unwrap();
        held.begin(operation(0), b"", &mut 0).unwrap();
        assert!(held.begin(operation(512), b"", &mut 0).is_err());
        assert!(held.answer(0).is_err());
    }

    #[test]
    fn handles_are_not_reused_and_places_that_are_taken_are_passed_over() {
        let (mut table, first) = table();
        let ram = Ram::new(MIN_MEMORY).unwrap();
        let request =
            || GuestRequest { token: 0, readable: Buffers::new(&ram), writable: Buffers::new(&ram) };
        for _ in 0..1000 {
            let handle = table.insert(0, request());
            assert_ne!(handle, first);
            assert!(table.remove(handle).is_some());
            assert!(table.get(handle).is_err());
        }
        assert!(table.get(first).is_ok());
        let many: Vec<_> = (0..1000).map(|_| table.insert(1, request())).collect();
        assert_eq!(table.held, 1001);
        assert!(many.iter().all(|handle| table.get(*handle).is_ok()));
    }
}
