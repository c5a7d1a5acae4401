//! A store in the hands of `tenon plugin test`: the test kit's memory, behind the table of a native store, so that faults strike and operations wait where a real medium's would.
#![allow(unsafe_code, reason = "data moves between the test kit's memory and the buffers of operations")]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Result;
use tenon_plugins::{Host, Plugin, Store, StoreGrants};
use tenon_sdk::store::{
    Completions, Config, Error, IoVec, MOST, NativeOperation, NativeStore, Operation, OperationKind,
    StoreError, StoreInfo,
};
use tenon_testkit::MemoryStore;

tenon_sdk::export_native_store!(Medium);

const MANIFEST: &str = r#"
id = "trial"
version = "0.1.0"
kind = "store"
api = "0.1.0"
[state]
schema = 1
[config.number]
type = "integer"
"#;

/// The hands of stores that are about to be opened, by the number in their settings.
static HANDS: Mutex<BTreeMap<u64, Arc<Hand>>> = Mutex::new(BTreeMap::new());
static NEXT: AtomicU64 = AtomicU64::new(0);

/// An operation that has begun.
struct Begun {
    token: u64,
    operation: Operation,
    /// Where what is read goes.
    into: Vec<IoVec>,
}

struct State {
    memory: MemoryStore,
    completions: Option<Completions>,
    /// Operations wait until they are let go.
    held: bool,
    waiting: Vec<Begun>,
}

/// The trial's end of a store.
pub(crate) struct Hand(Mutex<State>);

/// The plugin of these stores.
pub(crate) fn plugin(host: &Arc<Host>) -> Result<Arc<Plugin>> {
    Ok(host.builtin(&PLUGIN, MANIFEST)?)
}

impl Hand {
    /// A store of `size` bytes, of the plugin that [`plugin`] gives, and the trial's end of it.
    pub(crate) fn open(
        plugin: &Arc<Plugin>,
        name: &str,
        size: u64,
    ) -> Result<(Arc<Self>, Arc<Store>), String> {
        let state =
            State { memory: MemoryStore::new(size), completions: None, held: false, waiting: Vec::new() };
        let hand = Arc::new(Self(Mutex::new(state)));
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        HANDS.lock().unwrap_or_else(PoisonError::into_inner).insert(number, hand.clone());
        let settings = [("number".to_owned(), number.to_string())];
        let store = plugin.open_store(name, &settings, Vec::new(), &StoreGrants::none());
        Ok((hand, store.map_err(|error| error.to_string())?))
    }

    /// The memory itself.
    pub(crate) fn with(&self, act: &mut dyn FnMut(&mut MemoryStore)) {
        act(&mut self.lock().memory);
    }

    /// Lets operations wait from now on, or lets all go.
    pub(crate) fn hold(&self, held: bool) {
        let mut state = self.lock();
        state.held = held;
        if !held {
            let waiting = std::mem::take(&mut state.waiting);
            Self::end(state, waiting);
        }
    }

    pub(crate) fn is_held(&self) -> bool {
        self.lock().held
    }

    /// How many operations wait.
    pub(crate) fn waiting(&self) -> usize {
        self.lock().waiting.len()
    }

    /// Carries operations out, and says so when nothing is locked any more.
    fn end(mut state: MutexGuard<'_, State>, begun: Vec<Begun>) {
        let ended: Vec<_> =
            begun.into_iter().map(|begun| (begun.token, carry_out(&mut state.memory, &begun))).collect();
        let completions = state.completions.clone();
        drop(state);
        if let Some(completions) = completions {
            ended.into_iter().for_each(|(token, result)| completions.done(token, result));
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Carries out an operation, in pieces if it is longer than the memory takes at once.
fn carry_out(memory: &mut MemoryStore, begun: &Begun) -> Result<(), StoreError> {
    match &begun.operation {
        Operation::Read { position, length } => {
            let mut data = Vec::new();
            for done in (0..*length).step_by(usize::try_from(MOST).unwrap_or(usize::MAX)) {
                let length = (length - done).min(MOST);
                data.extend(memory.submit(&Operation::Read { position: position + done, length })?);
            }
            let mut rest = data.as_slice();
            for vector in &begun.into {
                let (part, left) = rest.split_at(vector.length.min(rest.len()));
                // SAFETY: the operation has not ended, and until then its vectors are good.
                unsafe { std::ptr::copy_nonoverlapping(part.as_ptr(), vector.base, part.len()) };
                rest = left;
            }
            Ok(())
        }
        Operation::Write { position, data } => {
            let pieces = data.chunks(usize::try_from(MOST).unwrap_or(usize::MAX));
            (*position..).step_by(usize::try_from(MOST).unwrap_or(usize::MAX)).zip(pieces).try_for_each(
                |(position, data)| {
                    memory.submit(&Operation::Write { position, data: data.to_vec() }).map(drop)
                },
            )
        }
        other => memory.submit(other).map(drop),
    }
}

/// The store's end.
struct Medium(Arc<Hand>);

impl NativeStore for Medium {
    fn open(config: &Config, completions: Completions) -> Result<(Self, StoreInfo), Error> {
        let number = config.number("number")?;
        let hand = HANDS.lock().unwrap_or_else(PoisonError::into_inner).remove(&number.unwrap_or(u64::MAX));
        let hand = hand.ok_or_else(|| Error::Invalid("`number` is that of no store in hand".into()))?;
        let mut state = hand.lock();
        state.completions = Some(completions);
        let info = state.memory.info().clone();
        drop(state);
        Ok((Self(hand), info))
    }

    fn submit(&self, operations: &[NativeOperation<'_>]) {
        let begun = operations.iter().map(|begins| {
            let NativeOperation { token, kind, position, length, vectors, .. } = *begins;
            let operation = match kind {
                OperationKind::Read => Operation::Read { position, length },
                OperationKind::Write => {
                    // SAFETY: the operation begins, and has not ended.
                    Operation::Write { position, data: unsafe { begins.gather() } }
                }
                OperationKind::Flush => Operation::Flush,
                OperationKind::Discard => Operation::Discard { position, length },
                OperationKind::WriteZeroes { unmap } => Operation::WriteZeroes { position, length, unmap },
            };
            Begun { token, operation, into: vectors.to_vec() }
        });
        let mut state = self.0.lock();
        if state.held {
            state.waiting.extend(begun);
        } else {
            Hand::end(state, begun.collect());
        }
    }

    fn resize(&self, size: u64) -> Result<StoreInfo, Error> {
        let mut state = self.0.lock();
        if size == 0 || !size.is_multiple_of(state.memory.info().block_size.into()) {
            return Err(Error::Invalid(format!("{size} bytes are no whole blocks")));
        }
        state.memory.resize(size);
        Ok(state.memory.info().clone())
    }

    fn close(&self) -> Result<(), Error> {
        Ok(())
    }
}
