//! What a store's imports do, the same for a component and for native code.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tenon_abi::{Level, StoreError, StoreInfo};

use super::connections::Connections;
use super::{Data, OperationKind, Store};
use crate::services::LogLimit;

/// The longest wait in one call.
const MAX_WAIT: Duration = Duration::from_secs(10);
/// How long nobody looks whether to go on waiting.
pub(super) const LOOK: Duration = Duration::from_millis(100);
/// The most random bytes in one call.
const MAX_RANDOM: u32 = 64 << 10;

/// The host's side of one store.
pub(crate) struct StoreServices {
    pub(super) name: String,
    pub(super) lowers: Vec<Arc<Store>>,
    pub(super) connections: Connections,
    /// Nothing is waited for any more.
    pub(super) cut: Arc<AtomicBool>,
    pub(super) log: LogLimit,
}

impl StoreServices {
    pub(super) fn log(&mut self, level: Level, message: &str) {
        self.log.write(&self.name, level, message);
    }

    fn lower(&self, lower: u32) -> Option<&Arc<Store>> {
        self.lowers.get(usize::try_from(lower).ok()?)
    }

    pub(super) fn info(&self, lower: u32) -> StoreInfo {
        self.lower(lower).map_or_else(|| StoreInfo::new(0), |store| store.info())
    }

    /// Carries out operations on a lower store and waits for them.
    pub(super) fn submit(
        &self,
        lower: u32,
        operations: Vec<(OperationKind, u64, u64, Data)>,
    ) -> Vec<(Result<(), StoreError>, Vec<u8>)> {
        match self.lower(lower) {
            Some(store) => store.run(operations),
            None => operations.iter().map(|_| (Err(StoreError::Unsupported), Vec::new())).collect(),
        }
    }

    pub(super) fn resize(&self, lower: u32, size: u64) -> Result<(), StoreError> {
        let store = self.lower(lower).ok_or(StoreError::Unsupported)?;
        store.resize(size).map(drop).map_err(|error| {
            tracing::warn!(store = self.name, "{error}");
            StoreError::Unsupported
        })
    }
}

/// Nanoseconds of a clock that never goes back.
pub(super) fn now() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    u64::try_from(START.get_or_init(Instant::now).elapsed().as_nanos()).unwrap_or(u64::MAX)
}

/// Waits, unless it is `cut` short.
pub(super) fn wait(nanoseconds: u64, cut: &AtomicBool) {
    let mut left = Duration::from_nanos(nanoseconds).min(MAX_WAIT);
    while !left.is_zero() && !cut.load(Relaxed) {
        let part = left.min(LOOK);
        std::thread::sleep(part);
        left -= part;
    }
}

/// Random bytes of the host.
pub(super) fn random(length: u32) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(length.min(MAX_RANDOM)).unwrap_or(0)];
    fill_random(&mut bytes);
    bytes
}

/// Fills `bytes` from the host's random number generator.
#[allow(unsafe_code, reason = "the C library's random numbers")]
pub(crate) fn fill_random(bytes: &mut [u8]) {
    let mut done = 0;
    while done < bytes.len() {
        let rest = &mut bytes[done..];
        // SAFETY: `rest` is a writable slice of that length.
        let got = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        // Once the generator is seeded (at boot), only a signal interrupts it.
        done += usize::try_from(got).unwrap_or(0);
    }
}

/// A log that any thread may write to.
pub(super) struct SharedLog(Mutex<LogLimit>);

impl SharedLog {
    pub(super) fn new() -> Self {
        Self(Mutex::new(LogLimit::new()))
    }

    pub(super) fn log(&self, name: &str, level: Level, message: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(name, level, message);
    }
}
