//! One instance of a virtio device plugin, whatever it is made of.

use tenon_abi::{OperationDone, RequestRecord, SavedState, VirtioDescription};

use super::services::VirtioServices;
use crate::fault::Fault;
use crate::instance::Answer;

/// A call into a device that runs.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Entry<'a> {
    Activate(u64),
    ConfigRead {
        offset: u32,
        size: u8,
    },
    ConfigWrite {
        offset: u32,
        size: u8,
        value: u64,
    },
    /// Requests of one queue, and their first readable bytes.
    Requests {
        queue: u16,
        requests: &'a [RequestRecord],
        heads: &'a [u8],
    },
    Done(&'a [OperationDone]),
    PortReady(u32),
    PortChanged(u32),
    StoreChanged(u32),
    SocketReady(u32),
    Readable(u32),
    Writable(u32),
    /// A timer came due at this time.
    Timer(u32, u64),
    Adjust {
        key: &'a str,
        value: &'a str,
    },
    Reset,
}

impl Entry<'_> {
    /// How much it carries: an entry may call the host as often as that asks for.
    pub(super) fn weight(&self) -> usize {
        match self {
            Self::Requests { requests, .. } => requests.len(),
            Self::Done(done) => done.len(),
            _ => 0,
        }
    }
}

/// A device's code with its state. One call at a time.
pub(crate) trait VirtioInstance: Send {
    /// Gives the instance its host side. Without one it can call nothing.
    fn attach(&mut self, services: Box<VirtioServices>);

    /// Takes the host side away.
    fn detach(&mut self) -> Option<Box<VirtioServices>>;

    /// The host side.
    fn services(&mut self) -> Option<&mut VirtioServices>;

    fn describe(&mut self, settings: &[(String, String)]) -> Answer<VirtioDescription>;

    /// Hands out what the services were granted.
    fn start(&mut self) -> Answer<()>;

    /// Does `entry`; the value of a read, else 0.
    fn call(&mut self, entry: &Entry<'_>) -> Answer<u64>;

    fn save(&mut self) -> Answer<SavedState>;

    fn restore(&mut self, state: &SavedState) -> Answer<()>;
}

/// How often one call may call the host: so often, and so often more for each request that it carries.
const HOST_CALLS: u32 = 10_000;
const HOST_CALLS_EACH: u32 = 64;

/// The host calls that a call of this weight has.
pub(super) fn host_calls(weight: usize) -> u32 {
    let more = u32::try_from(weight).unwrap_or(u32::MAX).saturating_mul(HOST_CALLS_EACH);
    HOST_CALLS.saturating_add(more)
}

/// Nothing went wrong that can only be seen afterwards.
pub(super) fn checked<T>(services: Option<&mut VirtioServices>, value: T) -> Result<T, Fault> {
    match services.and_then(VirtioServices::take_misuse) {
        Some(misuse) => Err(Fault::Contract(misuse.0)),
        None => Ok(value),
    }
}
