//! The one wasmtime engine of a process, its clock for deadlines, and the compiler in front of the cache.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Thread;
use std::time::Duration;

use wasmtime::component::{Component, HasSelf, Linker};
use wasmtime::{Config, Engine, WasmFeatures};

use crate::bindings::{device, personality, store, virtio};
use crate::cache::{Cache, CacheUse};
use crate::fault::OverLimit;
use crate::guest::GuestState;
use crate::store::StoreState;
use crate::virtio::VirtioState;
use crate::wasm::DeviceState;

/// How long one component may take to compile.
const COMPILE_PATIENCE: Duration = Duration::from_secs(60);

/// The part of a process that loads plugins. One serves any number of machines; make one and keep it.
pub struct Host {
    pub(crate) engine: Engine,
    pub(crate) ticker: Arc<Ticker>,
    pub(crate) devices: Linker<DeviceState>,
    pub(crate) virtio_devices: Linker<VirtioState>,
    pub(crate) personalities: Linker<GuestState>,
    pub(crate) stores: Linker<StoreState>,
    cache: Option<Cache>,
}

/// A host that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// wasmtime does not work on this machine.
    #[error("setting up WebAssembly: {0}")]
    Engine(String),
    /// The host gives no thread.
    #[error("starting the thread that watches deadlines: {0}")]
    Thread(#[from] io::Error),
}

impl Host {
    /// Makes a host. `cache` is the directory for compiled plugins, such as `$XDG_CACHE_HOME/tenon`; without one, or where it cannot be used,
    /// each start compiles.
    ///
    /// # Errors
    /// WebAssembly does not work here.
    pub fn new(cache: Option<&Path>) -> Result<Arc<Self>, HostError> {
        let wrong = |error: wasmtime::Error| HostError::Engine(format!("{error:#}"));
        let engine = Engine::new(&config()).map_err(wrong)?;
        let mut devices = Linker::new(&engine);
        device::DevicePlugin::add_to_linker::<_, HasSelf<_>>(&mut devices, |state| state).map_err(wrong)?;
        let mut virtio_devices = Linker::new(&engine);
        virtio::VirtioPlugin::add_to_linker::<_, HasSelf<_>>(&mut virtio_devices, |state| state)
            .map_err(wrong)?;
        let mut stores = Linker::new(&engine);
        store::StorePlugin::add_to_linker::<_, HasSelf<_>>(&mut stores, |state| state).map_err(wrong)?;
        let mut personalities = Linker::new(&engine);
        personality::PersonalityPlugin::add_to_linker::<_, HasSelf<_>>(&mut personalities, |state| state)
            .map_err(wrong)?;
        let cache = cache.and_then(|directory| {
            Cache::open(directory, engine.precompile_compatibility_hash())
                .inspect_err(|error| {
                    tracing::warn!(directory = %directory.display(), %error, "the cache for compiled plugins cannot be used");
                })
                .ok()
        });
        let ticker = Ticker::start(&engine)?;
        Ok(Arc::new(Self { engine, ticker, devices, virtio_devices, personalities, stores, cache }))
    }

    /// How the cache for compiled plugins was used so far.
    #[must_use]
    pub fn cache_use(&self) -> CacheUse {
        self.cache.as_ref().map(Cache::usage).unwrap_or_default()
    }

    /// The component of these bytes, from the cache or compiled.
    pub(crate) fn compile(&self, wasm: &[u8], digest: &[u8; 32]) -> Result<Component, String> {
        let key = self.cache.as_ref().map(|cache| (cache, cache.key(digest)));
        if let Some((cache, key)) = &key
            && let Some(code) = cache.get(key)
        {
            match deserialize(&self.engine, &code) {
                Ok(component) => return Ok(component),
                Err(error) => {
                    tracing::warn!(%error, "a cached compiled plugin does not load; compiling again")
                }
            }
        }
        let code = self.precompile(wasm)?;
        if let Some((cache, key)) = &key {
            cache.put(key, &code);
        }
        deserialize(&self.engine, &code)
    }

    /// Compiles on a thread of its own, which is left behind when it takes too long: a compiler cannot be interrupted.
    fn precompile(&self, wasm: &[u8]) -> Result<Vec<u8>, String> {
        let (engine, wasm) = (self.engine.clone(), wasm.to_vec());
        let (sender, receiver) = crossbeam_channel::bounded(1);
        let work = move || {
            let _ = sender.send(engine.precompile_component(&wasm).map_err(|error| format!("{error:#}")));
        };
        std::thread::Builder::new()
            .name("compile".into())
            .stack_size(8 << 20)
            .spawn(work)
            .map_err(|error| error.to_string())?;
        receiver.recv_timeout(COMPILE_PATIENCE).unwrap_or_else(|_| {
            Err(format!("compiling it takes longer than {} s", COMPILE_PATIENCE.as_secs()))
        })
    }
}

#[allow(unsafe_code, reason = "wasmtime takes its own compiled code on trust")]
fn deserialize(engine: &Engine, code: &[u8]) -> Result<Component, String> {
    // SAFETY: the code was compiled by this process, or by an earlier one of this user that put its keyed tag on it (see `cache`).
    unsafe { Component::deserialize(engine, code) }.map_err(|error| format!("{error:#}"))
}

fn config() -> Config {
    let mut config = Config::new();
    // A call costs a third of what it costs with the default.
    config.concurrency_support(false);
    config.epoch_interruption(true);
    config.max_wasm_stack(512 << 10);
    // What a compiler for plain components emits stays on; the rest is attack surface.
    for off in [
        WasmFeatures::THREADS,
        WasmFeatures::SHARED_EVERYTHING_THREADS,
        WasmFeatures::RELAXED_SIMD,
        WasmFeatures::MEMORY64,
        WasmFeatures::MULTI_MEMORY,
        WasmFeatures::TAIL_CALL,
        WasmFeatures::EXCEPTIONS,
        WasmFeatures::LEGACY_EXCEPTIONS,
        WasmFeatures::FUNCTION_REFERENCES,
        WasmFeatures::GC,
        WasmFeatures::STACK_SWITCHING,
        WasmFeatures::CUSTOM_PAGE_SIZES,
        WasmFeatures::WIDE_ARITHMETIC,
    ] {
        config.wasm_features(off, false);
    }
    config
}

/// The memory and tables of one instance.
pub(crate) struct Limiter {
    pub(crate) memory: usize,
    used: usize,
}

impl Limiter {
    pub(crate) fn new(memory: u64) -> Self {
        Self { memory: usize::try_from(memory).unwrap_or(usize::MAX), used: 0 }
    }
}

impl wasmtime::ResourceLimiter for Limiter {
    fn memory_growing(&mut self, current: usize, desired: usize, _: Option<usize>) -> wasmtime::Result<bool> {
        let used = self.used.saturating_add(desired.saturating_sub(current));
        if used > self.memory {
            return Err(OverLimit(format!(
                "it asked for {} KiB of memory, and its limit is {} KiB",
                used >> 10,
                self.memory >> 10
            ))
            .into());
        }
        self.used = used;
        Ok(true)
    }

    fn table_growing(&mut self, _: usize, desired: usize, _: Option<usize>) -> wasmtime::Result<bool> {
        const MOST: usize = 1 << 16;
        if desired > MOST {
            return Err(OverLimit(format!(
                "it asked for a table of {desired} elements, and the limit is {MOST}"
            ))
            .into());
        }
        Ok(true)
    }

    fn instances(&self) -> usize {
        32
    }

    fn tables(&self) -> usize {
        32
    }

    fn memories(&self) -> usize {
        4
    }
}

/// How much time one call has, counted so that a busy host is not held against the plugin: half of the deadline by the clock on the wall, then the other half
/// by the time that its thread got from the CPU.
pub(crate) struct Allowance {
    ticker: Arc<Ticker>,
    half: Duration,
    /// Half the deadline in ticks.
    pub(crate) ticks: u64,
    /// The second half ends when the thread has used this much.
    until: Option<Duration>,
}

impl Allowance {
    pub(crate) fn new(ticker: &Arc<Ticker>, deadline: Duration) -> Self {
        let half = deadline / 2;
        Self { ticker: ticker.clone(), half, ticks: ticker.ticks(half), until: None }
    }

    /// A call begins.
    #[inline]
    pub(crate) fn begin(&mut self) {
        self.ticker.touch();
        self.until = None;
    }

    /// The call goes into the host, where it may wait.
    pub(crate) fn leave(&self) -> Duration {
        thread_time()
    }

    /// The call comes back from the host, into which it went at `left`: what the thread did there does not count.
    pub(crate) fn back(&mut self, left: Duration) {
        self.ticker.touch();
        if let Some(until) = &mut self.until {
            *until += thread_time().saturating_sub(left);
        }
    }

    /// The epoch has reached the deadline that was set.
    pub(crate) fn expire(&mut self) -> wasmtime::Result<wasmtime::UpdateDeadline> {
        // Long calls keep the ticker awake.
        self.ticker.touch();
        let used = thread_time();
        match self.until {
            Some(until) if used >= until => Ok(wasmtime::UpdateDeadline::Interrupt),
            Some(until) => {
                let left = u64::try_from((until - used).as_millis()).unwrap_or(u64::MAX);
                Ok(wasmtime::UpdateDeadline::Continue(left.clamp(1, self.ticks)))
            }
            None => {
                self.until = Some(used + self.half);
                Ok(wasmtime::UpdateDeadline::Continue(self.ticks))
            }
        }
    }
}

/// How much time this thread has got from the CPU.
#[allow(unsafe_code, reason = "the C library's clock")]
fn thread_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid place for the answer.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// How long a tick of the epoch lasts.
const TICK: Duration = Duration::from_millis(1);

/// Advances the engine's epoch every millisecond while calls are made; sleeps when there were none for longer than the longest deadline.
///
/// `busy` is set by every call and cleared by every tick, so that a call costs one load of a shared cache line. All orderings are sequentially consistent: either the
/// ticker sees `busy` before it sleeps, or the caller sees `asleep`.
pub(crate) struct Ticker {
    busy: AtomicBool,
    asleep: AtomicBool,
    stop: AtomicBool,
    /// The longest deadline of any instance, in ticks.
    longest: AtomicU64,
    thread: Mutex<Option<Thread>>,
    wakes: AtomicU32,
}

impl Ticker {
    fn start(engine: &Engine) -> io::Result<Arc<Self>> {
        let ticker = Arc::new(Self {
            busy: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            longest: AtomicU64::new(100),
            thread: Mutex::new(None),
            wakes: AtomicU32::new(0),
        });
        let (shared, weak) = (Arc::downgrade(&ticker), engine.weak());
        let serve = move || {
            let mut idle = 0;
            while let (Some(ticker), Some(engine)) = (shared.upgrade(), weak.upgrade()) {
                if ticker.stop.load(Ordering::SeqCst) {
                    return;
                }
                engine.increment_epoch();
                idle = if ticker.busy.swap(false, Ordering::SeqCst) { 0 } else { idle + 1 };
                if idle <= ticker.longest.load(Ordering::Relaxed) + 1 {
                    drop((ticker, engine));
                    std::thread::sleep(TICK);
                    continue;
                }
                ticker.asleep.store(true, Ordering::SeqCst);
                if ticker.busy.load(Ordering::SeqCst) {
                    ticker.asleep.store(false, Ordering::SeqCst);
                    continue;
                }
                drop((ticker, engine));
                // Without a token this waits for `touch`; a spurious return costs one round.
                std::thread::park();
            }
        };
        let thread = std::thread::Builder::new().name("deadlines".into()).spawn(serve)?;
        *ticker.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread.thread().clone());
        Ok(ticker)
    }

    /// An instance with this deadline will be called. Returns the deadline in ticks.
    pub(crate) fn ticks(&self, deadline: Duration) -> u64 {
        // One more: the tick that is under way counts as well.
        let ticks = u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX).saturating_add(1);
        self.longest.fetch_max(ticks, Ordering::SeqCst);
        ticks
    }

    /// A call begins.
    #[inline]
    pub(crate) fn touch(&self) {
        if !self.busy.load(Ordering::SeqCst) {
            self.busy.store(true, Ordering::SeqCst);
            if self.asleep.swap(false, Ordering::SeqCst) {
                self.wake();
            }
        }
    }

    #[cold]
    fn wake(&self) {
        self.wakes.fetch_add(1, Ordering::Relaxed);
        if let Some(thread) = &*self.thread.lock().unwrap_or_else(PoisonError::into_inner) {
            thread.unpark();
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.ticker.stop.store(true, Ordering::SeqCst);
        self.ticker.wake();
    }
}
