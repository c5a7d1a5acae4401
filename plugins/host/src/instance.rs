//! One instance of a device plugin, whatever it is made of.

use tenon_abi::{Description, DeviceError, SavedState};

use crate::fault::Fault;
use crate::services::Services;

/// What a call into the plugin gives: its answer or refusal, or a fault after which the instance is dropped.
pub(crate) type Answer<T> = Result<Result<T, DeviceError>, Fault>;

/// A call that comes again and again while the machine runs.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Call {
    /// A register is read.
    Read { region: u32, offset: u64, size: u8 },
    /// A register is written.
    Write { region: u32, offset: u64, size: u8, value: u64 },
    /// A timer is due.
    Timer(u32),
    /// A channel has bytes.
    Readable(u32),
    /// Back to the state after power-on.
    Reset,
}

/// A device's code with its state. One call at a time.
pub(crate) trait DeviceInstance: Send {
    /// Gives the instance its host side. Without one it can call nothing.
    fn attach(&mut self, services: Box<Services>);

    /// Takes the host side away.
    fn detach(&mut self) -> Option<Box<Services>>;

    /// The host side.
    fn services(&mut self) -> Option<&mut Services>;

    /// Whether the host side's records have grown so far that the device ought to be saved.
    fn crowded(&self) -> bool;

    fn describe(&mut self, settings: &[(String, String)]) -> Answer<Description>;

    /// Hands out what the services were granted.
    fn start(&mut self) -> Answer<()>;

    /// Does `call`; the value of a read, else 0.
    fn call(&mut self, call: Call) -> Result<u64, Fault>;

    fn save(&mut self) -> Answer<SavedState>;

    fn restore(&mut self, state: &SavedState) -> Answer<()>;
}
