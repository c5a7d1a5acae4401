//! The bench of a store: the test in the place of its host, its users, its lower stores and its servers.

use tenon_sdk::store::{
    self, Config, Level, MOST, Operation, Result, SavedState, Store, StoreError, StoreInfo, hosted,
};

use super::outside::{Serve, Server, StoreOutside};
use crate::memory::MemoryStore;

/// The most operations that a store is given at once.
const BATCH: usize = 256;
/// The most data that a store is given, or asked for, at once.
const DATA: u64 = 4 << 20;

/// A store on the bench. Operations are checked as a host checks them, before the store gets them.
pub struct StoreBench<S> {
    config: Config,
    outside: StoreOutside,
    /// None when the store could not be opened again.
    store: Option<S>,
    info: StoreInfo,
    calls: u64,
}

impl<S: Store> StoreBench<S> {
    /// Opens a store with these settings over these lower stores.
    ///
    /// # Errors
    /// The store refuses.
    pub fn new(settings: &[(&str, &str)], lower: Vec<MemoryStore>) -> Result<Self> {
        Self::prepare(settings, lower).opened()
    }

    /// The surroundings of a store that is not open yet, for one that connects to a server when it is opened: [`StoreBench::serve`], then [`StoreBench::opened`].
    #[must_use]
    pub fn prepare(settings: &[(&str, &str)], lower: Vec<MemoryStore>) -> Self {
        let config = Config::new(settings.iter().copied());
        let outside = StoreOutside::new(lower);
        Self { config, outside, store: None, info: StoreInfo::default(), calls: 0 }
    }

    /// Opens the store.
    ///
    /// # Errors
    /// The store refuses.
    pub fn opened(mut self) -> Result<Self> {
        self.open()?;
        Ok(self)
    }

    fn open(&mut self) -> Result<()> {
        let count = u32::try_from(self.outside.lower.borrow().len()).unwrap_or(u32::MAX);
        let (store, info) = hosted::enter(&self.outside, || S::open(&self.config, hosted::lower(count)))?;
        self.info = store::checked(info)?;
        self.store = Some(store);
        Ok(())
    }

    /// What the store is.
    #[must_use]
    pub fn info(&self) -> &StoreInfo {
        &self.info
    }

    /// The store itself.
    ///
    /// # Panics
    /// It is not open.
    pub fn store(&mut self) -> &mut S {
        self.store.as_mut().expect("the store is open")
    }

    /// A lower store.
    ///
    /// # Panics
    /// There is no such.
    pub fn lower(&mut self, number: usize) -> &mut MemoryStore {
        &mut self.outside.lower.get_mut()[number]
    }

    /// How many lower stores there are.
    pub(super) fn lowers(&self) -> usize {
        self.outside.lower.borrow().len()
    }

    /// The administrator has granted this host and port, and `accept` makes what answers on each new connection: it is told what the store sends, and gives
    /// what comes back.
    pub fn serve<F>(&mut self, host: &str, port: u16, mut accept: impl FnMut() -> F + 'static)
    where
        F: FnMut(&[u8]) -> Vec<u8> + 'static,
    {
        let accept = Box::new(move || Box::new(accept()) as Serve);
        let server = Server { host: host.to_owned(), port, accept, down: false };
        self.outside.servers.get_mut().push(server);
    }

    /// All servers go down, or come up again: connections are cut, and new ones find nobody.
    pub fn set_down(&mut self, down: bool) {
        self.outside.servers.get_mut().iter_mut().for_each(|server| server.down = down);
    }

    /// How many connections the store has open.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.outside.connections()
    }

    /// Carries out operations: in as few calls as a host makes, those that leave the store, are not aligned or write a read-only store refused before.
    pub fn submit(&mut self, operations: Vec<Operation>) -> Vec<Result<Vec<u8>, StoreError>> {
        let mut outcomes: Vec<Result<Vec<u8>, StoreError>> = Vec::new();
        let mut batch: Vec<(usize, Operation)> = Vec::new();
        let mut data = 0;
        for operation in operations {
            let moved = moved(&operation);
            if batch.len() == BATCH || data + moved > DATA {
                self.carry_out(&mut batch, &mut outcomes);
                data = 0;
            }
            outcomes.push(refusal(&self.info, &operation).map(|()| Vec::new()));
            if outcomes.last().is_some_and(Result::is_ok) {
                data += moved;
                batch.push((outcomes.len() - 1, operation));
            }
        }
        self.carry_out(&mut batch, &mut outcomes);
        outcomes
    }

    fn carry_out(
        &mut self,
        batch: &mut Vec<(usize, Operation)>,
        outcomes: &mut [Result<Vec<u8>, StoreError>],
    ) {
        if batch.is_empty() {
            return;
        }
        self.calls += 1;
        let (places, operations): (Vec<usize>, Vec<Operation>) = std::mem::take(batch).into_iter().unzip();
        let ended = self.call(|store| store::submit(store, operations));
        for (place, outcome) in places.into_iter().zip(ended) {
            outcomes[place] = outcome;
        }
    }

    /// How many times the store was called with operations.
    #[must_use]
    pub fn calls(&self) -> u64 {
        self.calls
    }

    /// Reads `length` bytes at `position`.
    ///
    /// # Errors
    /// The store's.
    pub fn read(&mut self, position: u64, length: u64) -> Result<Vec<u8>, StoreError> {
        self.one(Operation::Read { position, length })
    }

    /// Writes bytes at `position`.
    ///
    /// # Errors
    /// The store's.
    pub fn write(&mut self, position: u64, bytes: &[u8]) -> Result<(), StoreError> {
        self.one(Operation::Write { position, data: bytes.to_vec() }).map(drop)
    }

    /// Makes durable what was written.
    ///
    /// # Errors
    /// The store's.
    pub fn flush(&mut self) -> Result<(), StoreError> {
        self.one(Operation::Flush).map(drop)
    }

    /// Gives the space of a range back.
    ///
    /// # Errors
    /// The store's.
    pub fn discard(&mut self, position: u64, length: u64) -> Result<(), StoreError> {
        self.one(Operation::Discard { position, length }).map(drop)
    }

    /// Makes a range read as zeroes.
    ///
    /// # Errors
    /// The store's.
    pub fn write_zeroes(&mut self, position: u64, length: u64, unmap: bool) -> Result<(), StoreError> {
        self.one(Operation::WriteZeroes { position, length, unmap }).map(drop)
    }

    fn one(&mut self, operation: Operation) -> Result<Vec<u8>, StoreError> {
        self.submit(vec![operation]).pop().unwrap_or(Err(StoreError::Io))
    }

    /// Changes the length.
    ///
    /// # Errors
    /// The store refuses.
    pub fn resize(&mut self, size: u64) -> Result<&StoreInfo> {
        let info = self.call(|store| store.resize(size)).and_then(store::checked)?;
        self.info = info;
        Ok(&self.info)
    }

    /// Closes the store in good order and opens it again.
    ///
    /// # Errors
    /// The store refuses one or the other.
    pub fn reopen(&mut self) -> Result<()> {
        self.call(Store::close)?;
        self.drop_store();
        self.open()
    }

    /// Power is lost, and the store opened again: of what the lower stores were not told to keep, each block is kept or lost, as numbers from `seed` decide.
    ///
    /// # Errors
    /// The store cannot be opened any more.
    pub fn lose_power(&mut self, seed: u64) -> Result<()> {
        for (number, lower) in (0..).zip(self.outside.lower.get_mut()) {
            lower.lose_power(seed.wrapping_add(number));
        }
        self.drop_store();
        self.open()
    }

    /// Saves the store.
    ///
    /// # Errors
    /// The store refuses.
    pub fn save(&mut self) -> Result<SavedState> {
        self.call(|store| store::save(store))
    }

    /// Puts a new store in the place of this one, opened and with its state: what a host does after a crash, or for a new version.
    ///
    /// # Errors
    /// The store refuses.
    pub fn restart(&mut self) -> Result<()> {
        let state = self.save()?;
        self.restart_with(&state)
    }

    /// Puts a new store in the place of this one that takes over this state.
    ///
    /// # Errors
    /// The store refuses; then there is none, until it is opened with [`StoreBench::restart_with`].
    pub fn restart_with(&mut self, state: &SavedState) -> Result<()> {
        self.drop_store();
        self.open()?;
        self.call(|store| store::restore(store, state))
    }

    /// Nanoseconds of the clock.
    #[must_use]
    pub fn now(&self) -> u64 {
        self.outside.now.get()
    }

    /// Lets time pass, in nanoseconds.
    pub fn advance(&mut self, nanoseconds: u64) {
        self.outside.now.set(self.now().saturating_add(nanoseconds));
    }

    /// Takes the messages logged since the last call.
    pub fn take_log(&mut self) -> Vec<(Level, String)> {
        std::mem::take(self.outside.log.get_mut())
    }

    fn drop_store(&mut self) {
        let store = self.store.take();
        hosted::enter(&self.outside, || drop(store));
    }

    fn call<R>(&mut self, call: impl FnOnce(&mut S) -> R) -> R {
        let Self { outside, store, .. } = self;
        let store = store.as_mut().expect("the store is open");
        hosted::enter(outside, || call(store))
    }
}

impl<S> Drop for StoreBench<S> {
    fn drop(&mut self) {
        let store = self.store.take();
        hosted::enter(&self.outside, || drop(store));
    }
}

/// The bytes that an operation moves.
fn moved(operation: &Operation) -> u64 {
    match operation {
        Operation::Read { length, .. } => *length,
        Operation::Write { data, .. } => data.len() as u64,
        _ => 0,
    }
}

/// Checks an operation as a host does before a store gets it.
pub(super) fn refusal(info: &StoreInfo, operation: &Operation) -> Result<(), StoreError> {
    let (position, length) = match *operation {
        Operation::Read { position, length }
        | Operation::Discard { position, length }
        | Operation::WriteZeroes { position, length, .. } => (position, length),
        Operation::Write { position, ref data } => (position, data.len() as u64),
        Operation::Flush => (0, 0),
    };
    let block = u64::from(info.block_size);
    let inside = position.checked_add(length).is_some_and(|end| end <= info.size);
    let aligned = position.is_multiple_of(block) && length.is_multiple_of(block);
    if !inside || !aligned || moved(operation) > MOST {
        return Err(StoreError::OutOfRange);
    }
    let changes = !matches!(operation, Operation::Read { .. } | Operation::Flush);
    if changes && info.read_only {
        return Err(StoreError::ReadOnly);
    }
    if matches!(operation, Operation::Discard { .. }) && !info.discard {
        return Err(StoreError::Unsupported);
    }
    Ok(())
}
