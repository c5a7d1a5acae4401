//! The requests that a device holds, and what was done for each of them.
//!
//! # Repeating
//!
//! A new instance is given every unfinished request again, and does again what the old one did. So each request keeps the effects that were had on its behalf, in order:
//! operations on stores, bytes moved to and from channels, actions in folders. An effect that is had again is answered with what the first one came to, and is not had twice; an
//! operation that is still under way becomes the new instance's. An instance that does something else than the old one drops what is left of the effects; an operation that is then
//! still under way must end before the next one begins, or before the request is answered, since it touches the same memory.

use smallvec::SmallVec;
use tenon_abi::{Errno, FolderAction, FolderOutcome, StoreError};
use tenon_core::{Buffers, GuestRequest};

use crate::fault::Misuse;
use crate::store::OperationKind;

/// The most effects that are kept for one request.
const EFFECTS: usize = 256;
/// The most actions in folders for one request: all of them are kept.
const ACTIONS: usize = 16;

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
    Acted(Box<Acted>),
}

/// What was done in a folder, and what it came to.
pub(crate) struct Acted {
    pub(crate) folder: u32,
    pub(crate) action: FolderAction,
    pub(crate) outcome: Result<FolderOutcome, Errno>,
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
    ) -> Result<Option<Result<FolderOutcome, Errno>>, Misuse> {
        if let Some(Effect::Acted(old)) = self.effects.get(self.cursor)
            && old.folder == folder
            && old.action == *action
        {
            self.cursor += 1;
            return Ok(Some(old.outcome.clone()));
        }
        self.diverge(divergences);
        let actions = self.effects.iter().filter(|effect| matches!(effect, Effect::Acted(_))).count();
        if actions >= ACTIONS {
            return Err(Misuse(format!(
                "it did more than {ACTIONS} things in folders for request {}",
                self.handle
            )));
        }
        Ok(None)
    }

    /// Keeps what an action came to.
    pub(crate) fn acted(&mut self, acted: Acted) {
        self.effects.push(Effect::Acted(Box::new(acted)));
        self.cursor = self.effects.len();
    }

    /// The instance does something new: what is left of the old effects is dropped.
    fn diverge(&mut self, divergences: &mut u64) {
        if self.cursor < self.effects.len() {
            *divergences += 1;
            let under_way =
                |effect: &Effect| matches!(effect, Effect::Store { progress: Progress::UnderWay, .. });
            self.dropped |= self.effects[self.cursor..].iter().any(under_way);
            self.effects.truncate(self.cursor);
        }
    }

    /// The operation that is under way has ended.
    pub(crate) fn end(&mut self, result: Result<(), StoreError>) -> Next {
        if self.dropped {
            self.dropped = false;
            if let Some(written) = self.answered {
                return Next::Answer(written);
            }
            return match self.effects.last_mut() {
                Some(Effect::Store { operation, progress: progress @ Progress::Waiting, .. }) => {
                    *progress = Progress::UnderWay;
                    Next::Submit(*operation)
                }
                _ => Next::Wait,
            };
        }
        let claimed = self.begun && self.cursor == self.effects.len();
        if let Some(Effect::Store { progress: progress @ Progress::UnderWay, .. }) = self.effects.last_mut() {
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
        match self.effects.get(self.cursor.checked_sub(1)?)? {
            Effect::Store { operation, success, .. } if self.begun => Some((*operation, success)),
            _ => None,
        }
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
            |effect: &Effect| matches!(effect, Effect::Store { progress: Progress::UnderWay, .. });
        if self.dropped || self.effects.last().is_some_and(under_way) {
            self.answered = Some(written);
            return Ok(false);
        }
        Ok(true)
    }

    fn again(&mut self) {
        self.cursor = 0;
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
}

impl Table {
    pub(crate) fn new() -> Self {
        Self { places: (0..64).map(|_| None).collect(), held: 0, next_handle: 1, next_sequence: 0 }
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
