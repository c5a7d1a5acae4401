//! A store that is a component: an instance on a thread of its own, which is given all operations that are ready in one call, and what happens when it falls.
//!
//! # Restarts
//!
//! The host saves an instance after every batch that changed the store, as long as its state is small; otherwise when a flush succeeds, before that is reported. A new
//! instance is opened and restored from there, and given the batch that the old one fell over once more. What was written after the last save is then taken for lost
//! ([`Shared::crashed`]). When it falls again, it is given the operations of the batch one by one, and the one that it falls over alone fails.
//! More than [`FAILURES`] falls within a minute and the store is given up: every operation fails.
//!
//! Long, for half of it is the boundary: each import, and the types of both sides.

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};
use tenon_abi as abi;
use tenon_abi::{StoreError, StoreInfo};
use wasmtime::component::Resource;

use super::services::{self, StoreServices};
use super::{Data, Medium, OperationKind, Piece, Shared, count};
use crate::bindings::store::tenon::store as import;
use crate::bindings::store::{StorePlugin, StorePluginPre};
use crate::fault::{Fault, TooManyHostCalls};
use crate::host::{Allowance, Limiter};
use crate::manifest::FailurePolicy;
use crate::plugin::Plugin;

/// How often one call may call the host, and how often more for each operation of its batch.
const HOST_CALLS: u32 = 10_000;
const HOST_CALLS_EACH: u32 = 256;
/// How many handles an instance may hold.
const HANDLES: usize = 1024;
/// The most operations and bytes of one call.
const BATCH: usize = 256;
const BATCH_BYTES: u64 = 4 << 20;
/// The most bytes that one call of `lower.submit` reads.
const MAX_READS: u64 = 16 << 20;
/// Up to this size the state is saved after every batch that changed the store.
const SMALL_STATE: usize = 4096;
/// How many falls within [`WINDOW`] are mended.
const FAILURES: usize = 5;
const WINDOW: Duration = Duration::from_secs(60);

/// What is behind a store's imports.
pub(crate) struct StoreState {
    services: StoreServices,
    limiter: Limiter,
    calls_left: u32,
    allowance: Allowance,
}

impl StoreState {
    /// Counts one host call.
    fn services(&mut self) -> wasmtime::Result<&mut StoreServices> {
        self.calls_left = self.calls_left.checked_sub(1).ok_or(TooManyHostCalls)?;
        Ok(&mut self.services)
    }

    /// Counts one host call, whose time does not count.
    fn outside<T>(&mut self, act: impl FnOnce(&mut StoreServices) -> T) -> wasmtime::Result<T> {
        let left = self.allowance.leave();
        let result = act(self.services()?);
        self.allowance.back(left);
        Ok(result)
    }
}

struct Instance {
    store: wasmtime::Store<StoreState>,
    bindings: StorePlugin,
    ticks: u64,
}

/// A call's answer or refusal, or a fault after which the instance is dropped.
type Answer<T> = Result<Result<T, abi::DeviceError>, Fault>;

/// What every new instance is made of.
pub(super) struct Recipe {
    pub(super) plugin: Arc<Plugin>,
    pub(super) settings: Vec<(String, String)>,
    pub(super) services: Box<dyn Fn() -> StoreServices + Send>,
}

impl Recipe {
    fn fault(&self, error: &wasmtime::Error) -> Fault {
        crate::wasm::fault(error, self.plugin.manifest.limits.deadline)
    }

    fn instance(&self, pre: &StorePluginPre<StoreState>) -> Result<Instance, Fault> {
        let (host, limits) = (&self.plugin.host, &self.plugin.manifest.limits);
        let mut allowance = Allowance::new(&host.ticker, limits.deadline);
        allowance.begin();
        let ticks = allowance.ticks;
        let state = StoreState {
            services: (self.services)(),
            limiter: Limiter::new(limits.memory),
            calls_left: HOST_CALLS,
            allowance,
        };
        let mut store = wasmtime::Store::new(&host.engine, state);
        store.limiter(|state| &mut state.limiter);
        store.set_hostcall_fuel(usize::try_from(limits.memory).unwrap_or(usize::MAX));
        store.set_max_component_handles(HANDLES);
        store.epoch_deadline_callback(|mut store| store.data_mut().allowance.expire());
        store.set_epoch_deadline(ticks);
        let bindings = pre.instantiate(&mut store).map_err(|error| self.fault(&error))?;
        Ok(Instance { store, bindings, ticks })
    }
}

impl Instance {
    fn begin(&mut self, operations: usize) {
        self.store.set_epoch_deadline(self.ticks);
        let state = self.store.data_mut();
        let more = u32::try_from(operations).unwrap_or(u32::MAX).saturating_mul(HOST_CALLS_EACH);
        state.calls_left = HOST_CALLS.saturating_add(more);
        state.allowance.begin();
    }

    fn open(&mut self, recipe: &Recipe) -> Answer<StoreInfo> {
        self.begin(0);
        let config: Vec<_> = recipe
            .settings
            .iter()
            .map(|(key, value)| import::types::Setting { key: key.clone(), value: value.clone() })
            .collect();
        let lowers = u32::try_from(self.store.data().services.lowers.len()).unwrap_or(u32::MAX);
        let lowers: Vec<_> = (0..lowers).map(Resource::new_own).collect();
        let result = self.bindings.tenon_store_store().call_open(&mut self.store, &config, &lowers);
        answer(recipe, result.map(|answer| answer.map(from_info)))
    }

    fn save(&mut self, recipe: &Recipe) -> Answer<abi::SavedState> {
        self.begin(0);
        let result = self.bindings.tenon_store_store().call_save(&mut self.store);
        answer(
            recipe,
            result.map(|answer| answer.map(|s| abi::SavedState { schema: s.schema, data: s.data })),
        )
    }

    fn restore(&mut self, recipe: &Recipe, state: &abi::SavedState) -> Answer<()> {
        self.begin(0);
        let state = import::types::SavedState { schema: state.schema, data: state.data.clone() };
        answer(recipe, self.bindings.tenon_store_store().call_restore(&mut self.store, &state))
    }

    fn resize(&mut self, recipe: &Recipe, size: u64) -> Answer<StoreInfo> {
        self.begin(0);
        let result = self.bindings.tenon_store_store().call_resize(&mut self.store, size);
        answer(recipe, result.map(|answer| answer.map(from_info)))
    }

    fn close(&mut self, recipe: &Recipe) -> Answer<()> {
        self.begin(0);
        answer(recipe, self.bindings.tenon_store_store().call_close(&mut self.store))
    }

    fn submit(
        &mut self,
        recipe: &Recipe,
        operations: &[import::types::Operation],
    ) -> Result<Vec<Result<Vec<u8>, StoreError>>, Fault> {
        self.begin(operations.len());
        let outcomes = self
            .bindings
            .tenon_store_store()
            .call_submit(&mut self.store, operations)
            .map_err(|error| recipe.fault(&error))?;
        if outcomes.len() != operations.len() {
            return Err(Fault::Contract(format!(
                "`submit` gave {} outcomes for {} operations",
                outcomes.len(),
                operations.len()
            )));
        }
        let mut checked = Vec::with_capacity(outcomes.len());
        for (outcome, operation) in outcomes.into_iter().zip(operations) {
            let expected = match operation {
                import::types::Operation::Read(extent) => extent.length,
                _ => 0,
            };
            checked.push(match outcome {
                Ok(bytes) if bytes.len() as u64 != expected => {
                    return Err(Fault::Contract(format!(
                        "`submit` gave {} bytes for an operation that gives {expected}",
                        bytes.len()
                    )));
                }
                Ok(bytes) => Ok(bytes),
                Err(error) => Err(from_error(error)),
            });
        }
        Ok(checked)
    }
}

fn answer<T>(recipe: &Recipe, result: wasmtime::Result<Result<T, import::types::ErrorCode>>) -> Answer<T> {
    use import::types::ErrorCode;
    let error = |error| match error {
        ErrorCode::Invalid(text) => abi::DeviceError::Invalid(text),
        ErrorCode::Unsupported(text) => abi::DeviceError::Unsupported(text),
        ErrorCode::Schema(text) => abi::DeviceError::Schema(text),
        ErrorCode::Other(text) => abi::DeviceError::Other(text),
    };
    match result {
        Ok(answer) => Ok(answer.map_err(error)),
        Err(wrong) => Err(recipe.fault(&wrong)),
    }
}

/// What the store's thread is told.
enum Command {
    Work(Vec<Piece>),
    Resize(u64, Sender<Result<StoreInfo, String>>),
    Close(Sender<Result<(), String>>),
}

/// The store as the host's other threads see it.
pub(super) struct Component {
    commands: Sender<Command>,
    thread: Option<JoinHandle<()>>,
    shared: Arc<Shared>,
}

impl Component {
    /// Starts the thread and opens the store on it.
    pub(super) fn open(
        recipe: Recipe,
        pre: StorePluginPre<StoreState>,
        shared: &Arc<Shared>,
    ) -> Result<(Self, StoreInfo), OpenFailure> {
        let (commands, receiver) = crossbeam_channel::unbounded();
        let (opened, result) = crossbeam_channel::bounded(1);
        let name = shared.name.clone();
        let thread_shared = shared.clone();
        let work = move || match Keeper::open(recipe, pre, thread_shared) {
            Ok((mut keeper, info)) => {
                let _ = opened.send(Ok(info));
                drop(opened);
                keeper.serve(&receiver);
            }
            Err(failure) => drop(opened.send(Err(failure))),
        };
        let thread = std::thread::Builder::new()
            .name(format!("{name}-store"))
            .stack_size(2 << 20)
            .spawn(work)
            .map_err(OpenFailure::Thread)?;
        let info = result.recv().unwrap_or_else(|_| {
            Err(OpenFailure::Fault("open", Fault::Trap("its thread has ended".into())))
        })?;
        Ok((Self { commands, thread: Some(thread), shared: shared.clone() }, info))
    }

    fn ask<T>(&self, command: impl FnOnce(Sender<Result<T, String>>) -> Command) -> Result<T, String> {
        let (sender, receiver) = crossbeam_channel::bounded(1);
        let gone = || Err("its thread has ended".into());
        if self.commands.send(command(sender)).is_err() {
            return gone();
        }
        receiver.recv().unwrap_or_else(|_| gone())
    }
}

impl Drop for Component {
    fn drop(&mut self) {
        // Without a sender the thread ends, and with it what it holds of the lower stores: whoever opens them next finds them free.
        self.commands = crossbeam_channel::unbounded().0;
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

impl Medium for Component {
    fn submit(&self, pieces: Vec<Piece>) {
        if let Err(error) = self.commands.send(Command::Work(pieces))
            && let Command::Work(pieces) = error.0
        {
            for piece in pieces {
                end(&self.shared, piece, Err(StoreError::Io));
            }
        }
    }

    fn in_pieces(&self) -> bool {
        true
    }

    fn resize(&self, size: u64) -> Result<StoreInfo, String> {
        self.ask(|reply| Command::Resize(size, reply))
    }

    fn close(&self) -> Result<(), String> {
        self.ask(Command::Close)
    }
}

/// Ends a piece; a read's bytes are where they belong already.
fn end(shared: &Shared, piece: Piece, result: Result<(), StoreError>) {
    let bytes = if let Data::Host(bytes) = piece.data { bytes } else { Vec::new() };
    shared.ended(piece.token, result, bytes);
}

/// Why a store could not be opened.
pub(super) enum OpenFailure {
    Refused(&'static str, abi::DeviceError),
    Fault(&'static str, Fault),
    Thread(std::io::Error),
}

impl OpenFailure {
    pub(super) fn into_fault(self) -> Fault {
        match self {
            Self::Fault(_, fault) => fault,
            Self::Refused(call, error) => Fault::Contract(format!("`{call}` refused: {error}")),
            Self::Thread(error) => Fault::Trap(error.to_string()),
        }
    }

    /// What is told of a call that the store may refuse.
    pub(super) fn reason(self) -> String {
        match self {
            Self::Refused(_, error) => error.to_string(),
            other => other.into_fault().to_string(),
        }
    }
}

/// Keeps one store alive, on its thread.
struct Keeper {
    recipe: Recipe,
    pre: StorePluginPre<StoreState>,
    shared: Arc<Shared>,
    /// None when given up.
    instance: Option<Instance>,
    block_size: u32,
    checkpoint: abi::SavedState,
    /// Something was changed since the checkpoint.
    unsaved: bool,
    failures: VecDeque<Instant>,
}

impl Keeper {
    fn open(
        recipe: Recipe,
        pre: StorePluginPre<StoreState>,
        shared: Arc<Shared>,
    ) -> Result<(Self, StoreInfo), OpenFailure> {
        let (mut instance, info) = bring_up(&recipe, &pre)?;
        let checkpoint = save(&mut instance, &recipe)?;
        let keeper = Self {
            recipe,
            pre,
            shared,
            instance: Some(instance),
            block_size: info.block_size,
            checkpoint,
            unsaved: false,
            failures: VecDeque::new(),
        };
        Ok((keeper, info))
    }

    fn serve(&mut self, commands: &Receiver<Command>) {
        let mut waiting: VecDeque<Piece> = VecDeque::new();
        loop {
            let command = if waiting.is_empty() {
                match commands.recv() {
                    Ok(command) => Some(command),
                    Err(_) => return,
                }
            } else {
                commands.try_recv().ok()
            };
            match command {
                Some(Command::Work(pieces)) => {
                    waiting.extend(pieces);
                    // What came meanwhile goes along.
                    if waiting.len() < BATCH && !commands.is_empty() {
                        continue;
                    }
                }
                Some(Command::Resize(size, reply)) => drop(reply.send(self.resize(size))),
                Some(Command::Close(reply)) => {
                    drop(reply.send(self.close()));
                    return;
                }
                None => {}
            }
            let (mut batch, mut bytes) = (Vec::with_capacity(waiting.len().min(BATCH)), 0);
            while let Some(piece) = waiting.front() {
                let size = if piece.kind.moves_data() { piece.length } else { 0 };
                if batch.len() >= BATCH || (!batch.is_empty() && bytes + size > BATCH_BYTES) {
                    break;
                }
                bytes += size;
                batch.extend(waiting.pop_front());
            }
            if !batch.is_empty() {
                self.carry_out(batch);
            }
        }
    }

    fn carry_out(&mut self, mut batch: Vec<Piece>) {
        let operations: Vec<_> = batch.iter_mut().map(operation).collect();
        for _ in 0..2 {
            match self.attempt(&operations) {
                Ok(outcomes) => {
                    drop(operations);
                    for (mut piece, outcome) in batch.into_iter().zip(outcomes) {
                        let result = outcome.map(|bytes| match &mut piece.data {
                            Data::Guest(buffers, offset) if piece.kind == OperationKind::Read => {
                                buffers.write(*offset, &bytes);
                            }
                            Data::Host(into) if piece.kind == OperationKind::Read => *into = bytes,
                            _ => {}
                        });
                        end(&self.shared, piece, result);
                    }
                    return;
                }
                Err(fault) => {
                    if !self.recover(fault) {
                        break;
                    }
                }
            }
        }
        if batch.len() == 1 || self.instance.is_none() {
            batch.into_iter().for_each(|piece| end(&self.shared, piece, Err(StoreError::Io)));
        } else {
            // What a write of host memory writes was moved out of its piece.
            for (piece, operation) in batch.iter_mut().zip(operations) {
                if let (Data::Host(bytes), import::types::Operation::Write(write)) =
                    (&mut piece.data, operation)
                {
                    *bytes = write.data;
                }
            }
            batch.into_iter().for_each(|piece| self.carry_out(vec![piece]));
        }
    }

    /// Gives a batch to the instance and saves it if that is due.
    fn attempt(
        &mut self,
        operations: &[import::types::Operation],
    ) -> Result<Vec<Result<Vec<u8>, StoreError>>, Fault> {
        let gone = || Fault::Trap("the store has failed".into());
        let instance = self.instance.as_mut().ok_or_else(gone)?;
        count(&self.shared.counters.batches);
        // Whatever it does from here on may be lost with it.
        let changes = operations.iter().any(|operation| {
            !matches!(operation, import::types::Operation::Read(_) | import::types::Operation::Flush)
        });
        let flushes = operations.iter().any(|operation| matches!(operation, import::types::Operation::Flush));
        let before = self.unsaved;
        let outcomes = instance.submit(&self.recipe, operations)?;
        self.unsaved |= changes;
        if self.unsaved && (flushes || (!before && self.checkpoint.data.len() <= SMALL_STATE)) {
            self.checkpoint = save(instance, &self.recipe).map_err(OpenFailure::into_fault)?;
            // A state that has grown large is saved at flushes only.
            self.unsaved = false;
        }
        Ok(outcomes)
    }

    /// The instance fell: a new one with the state of the old one, if it may have one.
    fn recover(&mut self, mut fault: Fault) -> bool {
        if self.instance.take().is_none() {
            return false;
        }
        if std::mem::take(&mut self.unsaved) {
            self.shared.crashed();
        }
        let (name, plugin) = (&self.shared.name, &self.recipe.plugin);
        loop {
            count(&self.shared.counters.faults);
            let now = Instant::now();
            while self.failures.front().is_some_and(|at| now.duration_since(*at) > WINDOW) {
                self.failures.pop_front();
            }
            self.failures.push_back(now);
            if plugin.manifest.failure == FailurePolicy::Fail || self.failures.len() > FAILURES {
                // What was flushed and not saved elsewhere went with the last instance.
                self.shared.crashed();
                tracing::error!(
                    store = name,
                    plugin = plugin.manifest.id,
                    "the store has failed and every operation on it fails from here on: {fault}. What it was given to keep may be lost; \
                     if it fails again when it is opened anew, report it to the plugin's author or replace the plugin (version {})",
                    plugin.manifest.version
                );
                return false;
            }
            tracing::warn!(store = name, plugin = plugin.manifest.id, %fault, "opening the store anew with its state");
            if let Some(doublings) = self.failures.len().checked_sub(2) {
                std::thread::sleep(Duration::from_millis(10 << doublings));
            }
            match self.anew() {
                Ok(instance) => {
                    count(&self.shared.counters.restarts);
                    self.instance = Some(instance);
                    return true;
                }
                Err(failure) => fault = failure.into_fault(),
            }
        }
    }

    fn anew(&self) -> Result<Instance, OpenFailure> {
        let (mut instance, info) = bring_up(&self.recipe, &self.pre)?;
        match instance.restore(&self.recipe, &self.checkpoint) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(OpenFailure::Refused("restore", error)),
            Err(fault) => return Err(OpenFailure::Fault("restore", fault)),
        }
        if info.block_size != self.block_size {
            let fault = Fault::Contract("`open` gives another block size than the first time".into());
            return Err(OpenFailure::Fault("open", fault));
        }
        Ok(instance)
    }

    fn resize(&mut self, size: u64) -> Result<StoreInfo, String> {
        let instance = self.instance.as_mut().ok_or("the store has failed")?;
        let result = match instance.resize(&self.recipe, size) {
            Ok(Ok(info)) if info.check().is_ok() && info.block_size == self.block_size => {
                match save(instance, &self.recipe) {
                    Ok(state) => {
                        self.checkpoint = state;
                        self.unsaved = false;
                        return Ok(info);
                    }
                    Err(failure) => Err(failure.into_fault()),
                }
            }
            Ok(Ok(info)) => Err(Fault::Contract(format!("`resize` gives what no store can be: {info:?}"))),
            Ok(Err(error)) => return Err(error.to_string()),
            Err(fault) => Err(fault),
        };
        result.map_err(|fault| {
            let text = fault.to_string();
            self.recover(fault);
            text
        })
    }

    fn close(&mut self) -> Result<(), String> {
        let instance = self.instance.as_mut().ok_or("the store has failed")?;
        match instance.close(&self.recipe) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(fault) => {
                if self.unsaved {
                    self.shared.crashed();
                }
                Err(fault.to_string())
            }
        }
    }
}

/// A new instance that was opened.
fn bring_up(recipe: &Recipe, pre: &StorePluginPre<StoreState>) -> Result<(Instance, StoreInfo), OpenFailure> {
    let mut instance = recipe.instance(pre).map_err(|fault| OpenFailure::Fault("instantiate", fault))?;
    match instance.open(recipe) {
        Ok(Ok(info)) => match info.check() {
            Ok(()) => Ok((instance, info)),
            Err(wrong) => Err(OpenFailure::Fault("open", Fault::Contract(wrong))),
        },
        Ok(Err(error)) => Err(OpenFailure::Refused("open", error)),
        Err(fault) => Err(OpenFailure::Fault("open", fault)),
    }
}

fn save(instance: &mut Instance, recipe: &Recipe) -> Result<abi::SavedState, OpenFailure> {
    let promised = recipe.plugin.manifest.schema;
    match instance.save(recipe) {
        Ok(Ok(state)) if state.schema == promised => Ok(state),
        Ok(Ok(state)) => Err(OpenFailure::Fault(
            "save",
            Fault::Contract(format!(
                "it saved a state of schema {}, and its plugin.toml says `state.schema = {promised}`",
                state.schema
            )),
        )),
        Ok(Err(error)) => Err(OpenFailure::Refused("save", error)),
        Err(fault) => Err(OpenFailure::Fault("save", fault)),
    }
}

/// What the plugin is told of a piece. The bytes of a write are copied out of guest memory, once: it falls over what it saw.
fn operation(piece: &mut Piece) -> import::types::Operation {
    use import::types::{Extent, Operation, WriteOperation, ZeroOperation};
    let (position, length) = (piece.position, piece.length);
    match piece.kind {
        OperationKind::Read => Operation::Read(Extent { position, length }),
        OperationKind::Write => {
            let data = match &mut piece.data {
                Data::Guest(buffers, offset) => {
                    let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
                    buffers.read(*offset, &mut bytes);
                    bytes
                }
                Data::Host(bytes) => std::mem::take(bytes),
                Data::None => Vec::new(),
            };
            Operation::Write(WriteOperation { position, data })
        }
        OperationKind::Flush => Operation::Flush,
        OperationKind::Discard => Operation::Discard(Extent { position, length }),
        OperationKind::WriteZeroes { unmap } => {
            Operation::WriteZeroes(ZeroOperation { position, length, unmap })
        }
    }
}

fn from_info(info: import::types::StoreInfo) -> StoreInfo {
    StoreInfo {
        size: info.size,
        block_size: info.block_size,
        optimal_size: info.optimal_size,
        read_only: info.read_only,
        discard: info.discard,
        write_zeroes: info.write_zeroes,
        identity: info.identity,
    }
}

fn from_error(error: import::types::StoreError) -> StoreError {
    use import::types::StoreError as Given;
    match error {
        Given::OutOfRange => StoreError::OutOfRange,
        Given::ReadOnly => StoreError::ReadOnly,
        Given::NoSpace => StoreError::NoSpace,
        Given::Unsupported => StoreError::Unsupported,
        Given::Io => StoreError::Io,
    }
}

fn to_error(error: StoreError) -> import::types::StoreError {
    use import::types::StoreError as Given;
    match error {
        StoreError::OutOfRange => Given::OutOfRange,
        StoreError::ReadOnly => Given::ReadOnly,
        StoreError::NoSpace => Given::NoSpace,
        StoreError::Unsupported => Given::Unsupported,
        StoreError::Io => Given::Io,
    }
}

// The imports.

impl import::types::Host for StoreState {}

impl import::log::Host for StoreState {
    fn log(&mut self, level: import::log::Level, message: String) -> wasmtime::Result<()> {
        use import::log::Level;
        let level = match level {
            Level::Error => abi::Level::Error,
            Level::Warn => abi::Level::Warn,
            Level::Info => abi::Level::Info,
            Level::Debug => abi::Level::Debug,
            Level::Trace => abi::Level::Trace,
        };
        self.services()?.log(level, &message);
        Ok(())
    }
}

impl import::time::Host for StoreState {
    fn now(&mut self) -> wasmtime::Result<u64> {
        self.services()?;
        Ok(services::now())
    }

    fn wait(&mut self, nanoseconds: u64) -> wasmtime::Result<()> {
        self.outside(|services| services::wait(nanoseconds, &services.cut))
    }
}

impl import::entropy::Host for StoreState {
    fn random(&mut self, length: u32) -> wasmtime::Result<Vec<u8>> {
        self.services()?;
        Ok(services::random(length))
    }
}

type Lower = Resource<import::lower_stores::Lower>;

impl import::lower_stores::Host for StoreState {}

impl import::lower_stores::HostLower for StoreState {
    fn info(&mut self, lower: Lower) -> wasmtime::Result<import::types::StoreInfo> {
        let info = self.services()?.info(lower.rep());
        Ok(import::types::StoreInfo {
            size: info.size,
            block_size: info.block_size,
            optimal_size: info.optimal_size,
            read_only: info.read_only,
            discard: info.discard,
            write_zeroes: info.write_zeroes,
            identity: info.identity,
        })
    }

    fn submit(
        &mut self,
        lower: Lower,
        operations: Vec<import::types::Operation>,
    ) -> wasmtime::Result<Vec<Result<Vec<u8>, import::types::StoreError>>> {
        use import::types::Operation;
        let mut room = MAX_READS;
        let operations: Vec<_> = operations
            .into_iter()
            .map(|operation| match operation {
                // A read for which there is no room gets none, and so is refused.
                Operation::Read(e) => {
                    let granted = if e.length <= super::MAX_TRANSFER.min(room) { e.length } else { 0 };
                    room -= granted;
                    let bytes = vec![0; usize::try_from(granted).unwrap_or(0)];
                    (OperationKind::Read, e.position, e.length, Data::Host(bytes))
                }
                Operation::Write(w) => {
                    (OperationKind::Write, w.position, w.data.len() as u64, Data::Host(w.data))
                }
                Operation::Flush => (OperationKind::Flush, 0, 0, Data::None),
                Operation::Discard(e) => (OperationKind::Discard, e.position, e.length, Data::None),
                Operation::WriteZeroes(z) => {
                    (OperationKind::WriteZeroes { unmap: z.unmap }, z.position, z.length, Data::None)
                }
            })
            .collect();
        let reads: Vec<bool> =
            operations.iter().map(|operation| operation.0 == OperationKind::Read).collect();
        let outcomes = self.outside(|services| services.submit(lower.rep(), operations))?;
        let outcome = |((result, bytes), read): ((Result<(), StoreError>, Vec<u8>), bool)| match result {
            Ok(()) if read => Ok(bytes),
            Ok(()) => Ok(Vec::new()),
            Err(error) => Err(to_error(error)),
        };
        Ok(outcomes.into_iter().zip(reads).map(outcome).collect())
    }

    fn resize(&mut self, lower: Lower, size: u64) -> wasmtime::Result<Result<(), import::types::StoreError>> {
        self.outside(|services| services.resize(lower.rep(), size).map_err(to_error))
    }

    fn drop(&mut self, _: Lower) -> wasmtime::Result<()> {
        Ok(())
    }
}

type Connection = Resource<import::connections::Connection>;

fn connection_error(error: abi::ConnectionError) -> import::connections::ConnectionError {
    use import::connections::ConnectionError as Given;
    match error {
        abi::ConnectionError::NotGranted => Given::NotGranted,
        abi::ConnectionError::Unreachable(text) => Given::Unreachable(text),
        abi::ConnectionError::Closed => Given::Closed,
        abi::ConnectionError::TimedOut => Given::TimedOut,
    }
}

impl import::connections::Host for StoreState {
    fn connect(
        &mut self,
        host: String,
        port: u16,
        tls: bool,
    ) -> wasmtime::Result<Result<Connection, import::connections::ConnectionError>> {
        self.outside(|services| {
            let connection = services.connections.connect(&host, port, tls);
            connection.map(Resource::new_own).map_err(connection_error)
        })
    }
}

impl import::connections::HostConnection for StoreState {
    fn send(
        &mut self,
        connection: Connection,
        bytes: Vec<u8>,
    ) -> wasmtime::Result<Result<(), import::connections::ConnectionError>> {
        self.outside(|services| services.connections.send(connection.rep(), &bytes).map_err(connection_error))
    }

    fn receive(
        &mut self,
        connection: Connection,
        max: u32,
    ) -> wasmtime::Result<Result<Vec<u8>, import::connections::ConnectionError>> {
        self.outside(|services| services.connections.receive(connection.rep(), max).map_err(connection_error))
    }

    fn drop(&mut self, connection: Connection) -> wasmtime::Result<()> {
        self.services.connections.close(connection.rep());
        Ok(())
    }
}
