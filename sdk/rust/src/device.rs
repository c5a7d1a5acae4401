//! Devices: the trait, and the handles and calls that a device has of its host.
//!
//! Handles and free functions work during a call from the host (and so during every method of [`Device`]); each interface that a plugin uses
//! shows in its component as one import, which is one permission:
//!
//! | used | permission |
//! | --- | --- |
//! | [`error!`], [`warn!`], [`info!`], [`debug!`], [`trace!`], [`log`] | `log` |
//! | [`now`], [`Timer`] | `time` |
//! | [`wall_clock`] | `wall-clock` |
//! | [`Line`] | `interrupts` |
//! | [`Channel`] | `channels` |
//! | [`request`] | `machine-control` |

use std::fmt;

#[cfg(target_arch = "wasm32")]
#[doc(hidden)]
pub mod component;
#[cfg(not(target_arch = "wasm32"))]
pub mod hosted;
#[cfg(not(target_arch = "wasm32"))]
#[doc(hidden)]
pub mod native;

#[cfg(target_arch = "wasm32")]
use component as sys;
#[cfg(not(target_arch = "wasm32"))]
use hosted as sys;

pub use tenon_abi::{
    AcpiNode, Description, DeviceError as Error, Level, LineRequest, Region, Request, SavedState, Space,
    Trigger,
};

pub use crate::config::Config;
pub use crate::state::{Decoder, Encoder};
pub use crate::{
    device_debug as debug, device_error as error, device_info as info, device_trace as trace,
    device_warn as warn,
};

/// What a device's functions return.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A device with registers. The host makes one call at a time; calls come from different threads.
///
/// A panic ends this instance and nothing else: the host makes a new one from the last saved state.
pub trait Device: Sized + Send + 'static {
    /// The schema that [`Device::save`] writes, to be raised whenever the layout of the state changes. It is also `[state] schema` in `plugin.toml`.
    const SCHEMA: u32 = 1;

    /// Says what the device needs, given its configuration. The host calls it once, before anything else, on the thread that assembles the
    /// machine, and grants all or refuses the device. There are no handles yet.
    ///
    /// # Errors
    /// The configuration is not one that the device accepts.
    fn describe(config: &Config) -> Result<Description>;

    /// Makes the device, as after power-on, with the handles of everything that the description asked for. The device keeps those
    /// that it needs. The host calls it once, after `describe` with the same configuration.
    ///
    /// # Errors
    /// The device cannot start.
    fn start(config: &Config, attachment: Attachment) -> Result<Self>;

    /// A guest reads `size` bytes (1, 2, 4 or 8) at `offset` in region number `region`. The vCPU waits for the answer,
    /// whose bits above the size are ignored. The host has checked that the access lies inside the region; it may be misaligned.
    /// A register that does not exist reads as all ones. Called on the vCPU's thread.
    fn read(&mut self, region: u32, offset: u64, size: u8) -> u64;

    /// A guest writes `size` bytes; bits of `value` above them are zero. Otherwise as [`Device::read`].
    fn write(&mut self, region: u32, offset: u64, size: u8, value: u64);

    /// Timer number `timer` reached its deadline. A call may still arrive shortly after the timer was cancelled.
    fn timer_fired(&mut self, timer: u32) {
        let _ = timer;
    }

    /// Channel number `channel` has bytes to read. Called again only after a read that returned fewer bytes than it asked for.
    fn channel_readable(&mut self, channel: u32) {
        let _ = channel;
    }

    /// Puts the device into its state after power-on: registers, lines low, timers cancelled. Handles stay valid.
    fn reset(&mut self);

    /// Writes the whole state, from which [`Device::restore`] makes an equal device. The host calls it between other calls, and often:
    /// it must be quick and change nothing. Levels of lines and deadlines of timers belong to the state.
    ///
    /// # Errors
    /// The device cannot be saved now.
    fn save(&self, state: &mut Encoder) -> Result<()>;

    /// Takes over a saved state, after [`Device::start`] and before any access. The device raises its lines and arms its timers again as the
    /// state says. `state` may come from an older version ([`Decoder::schema`]); newer ones were refused before this call, and
    /// bytes left over are refused after it.
    ///
    /// # Errors
    /// The state cannot be read. The host then drops the instance.
    fn restore(&mut self, state: &mut Decoder<'_>) -> Result<()>;
}

/// The handles of everything that the description asked for, in its order.
pub struct Attachment {
    lines: std::vec::IntoIter<Line>,
    timers: std::vec::IntoIter<Timer>,
    channels: std::vec::IntoIter<Channel>,
}

impl Attachment {
    /// The next interrupt line: the first call gives line 0.
    ///
    /// # Errors
    /// The description asked for no more.
    pub fn line(&mut self) -> Result<Line> {
        self.lines.next().ok_or_else(|| missing("interrupt line"))
    }

    /// The next timer: the first call gives timer 0.
    ///
    /// # Errors
    /// The description asked for no more.
    pub fn timer(&mut self) -> Result<Timer> {
        self.timers.next().ok_or_else(|| missing("timer"))
    }

    /// The next channel: the first call gives channel 0.
    ///
    /// # Errors
    /// The description asked for no more.
    pub fn channel(&mut self) -> Result<Channel> {
        self.channels.next().ok_or_else(|| missing("channel"))
    }
}

fn missing(what: &str) -> Error {
    Error::Other(format!("the device takes one more {what} than its description asks for"))
}

/// An interrupt line that the device drives. It is low until raised.
pub struct Line(sys::Line);

impl Line {
    /// Sets the device's own level on the line. The line is high while any device that shares it holds it high.
    /// Setting the level that it has is free.
    pub fn set_level(&self, high: bool) {
        self.0.set_level(high);
    }

    /// Raises the line.
    pub fn raise(&self) {
        self.set_level(true);
    }

    /// Lowers the line.
    pub fn lower(&self) {
        self.set_level(false);
    }

    /// Raises and lowers the line: one edge.
    pub fn pulse(&self) {
        self.0.pulse();
    }
}

/// A timer on the machine's clock. At its deadline the host calls [`Device::timer_fired`].
pub struct Timer(pub(crate) sys::Timer);

impl Timer {
    /// Fires once, at `deadline` (nanoseconds of the machine's clock). A deadline that has passed fires at once. A deadline that was armed
    /// before is replaced.
    pub fn arm(&self, deadline: u64) {
        self.0.arm(deadline);
    }

    /// Fires at `first`, then every `period` nanoseconds; a period under 10 000 ns is raised to that.
    /// Periods missed while the device was busy are not made up for: one call stands for all of them.
    pub fn arm_periodic(&self, first: u64, period: u64) {
        self.0.arm_periodic(first, period);
    }

    /// Stops the timer. A call that is already on its way may still arrive.
    pub fn cancel(&self) {
        self.0.cancel();
    }
}

/// A two-way byte stream to the outside. The host buffers at most 64 KiB each way.
pub struct Channel(pub(crate) sys::Channel);

impl Channel {
    /// Gives bytes to the outside. Returns how many were taken, from the front; the rest is for the device to keep or to drop.
    pub fn write(&self, bytes: &[u8]) -> usize {
        self.0.write(bytes)
    }

    /// Takes at most `max` bytes that came from the outside; empty when there are none.
    /// After it has returned fewer than `max`, the host calls [`Device::channel_readable`] when there are more.
    #[must_use]
    pub fn read(&self, max: usize) -> Vec<u8> {
        self.0.read(u32::try_from(max).unwrap_or(u32::MAX))
    }
}

/// Nanoseconds of the machine's clock. It starts at 0, never goes back, and stands still while the machine is paused.
#[must_use]
pub fn now() -> u64 {
    sys::now()
}

/// Nanoseconds since 1970-01-01 00:00:00 UTC.
#[must_use]
pub fn wall_clock() -> u64 {
    sys::wall_clock()
}

/// Asks for the end, or the reset, of the whole machine. No further guest instruction runs on the vCPU that made the access;
/// the first request wins.
pub fn request(request: Request) {
    sys::request(request);
}

/// Logs one message under the device's name. The macros of this module are the usual way.
pub fn log(level: Level, message: fmt::Arguments<'_>) {
    match message.as_str() {
        Some(text) => sys::log(level, text),
        None => sys::log(level, &message.to_string()),
    }
}

/// Saves a device, as the host does.
///
/// # Errors
/// The device refuses.
pub fn save<D: Device>(device: &D) -> Result<SavedState> {
    crate::state::save(D::SCHEMA, |state| device.save(state))
}

/// Restores a device that was just started, as the host does: newer schemas, and bytes that the device left, are refused.
///
/// # Errors
/// The state is not one of this device, or is damaged.
pub fn restore<D: Device>(device: &mut D, state: &SavedState) -> Result<()> {
    crate::state::restore(D::SCHEMA, state, |state| device.restore(state))
}
