//! `tenon:device`: its records, and the two tables of a native device.

use std::ffi::c_void;
use std::fmt;

use crate::{Bytes, Sink, Status};

/// Why a device refused a call, or could not start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceError {
    /// The configuration, or an argument, is not one that the device accepts. The text names the key, what was wrong and what would be right.
    Invalid(String),
    /// The device cannot do this, now or ever. The text says what.
    Unsupported(String),
    /// A saved state has a schema that this version cannot read. The text names both schemas.
    Schema(String),
    /// Any other failure. The text says what failed.
    Other(String),
}

impl fmt::Display for DeviceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invalid(text) => write!(f, "invalid: {text}"),
            Self::Unsupported(text) => write!(f, "unsupported: {text}"),
            Self::Schema(text) => write!(f, "saved state: {text}"),
            Self::Other(text) => f.write_str(text),
        }
    }
}

impl std::error::Error for DeviceError {}

/// An address space in which a device has registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Space {
    /// Port I/O: 64 Ki ports; accesses of 1, 2 or 4 bytes.
    Pio,
    /// Memory-mapped I/O: guest-physical addresses; accesses of 1, 2, 4 or 8 bytes.
    Mmio,
}

/// A range of registers that the device claims.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region {
    /// The name of the range in listings and errors, such as `registers`.
    pub name: String,
    /// The address space.
    pub space: Space,
    /// The first address. Without one, the host chooses (memory-mapped ranges only).
    pub base: Option<u64>,
    /// The length in bytes; at least 1.
    pub size: u64,
}

/// How an interrupt line is wired.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Trigger {
    /// The controller latches a change from low to high.
    Edge,
    /// The controller looks at the level; several devices may share the line.
    Level,
}

/// An interrupt line that the device drives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LineRequest {
    /// The global system interrupt. Without one, the host chooses a free one.
    pub gsi: Option<u32>,
    /// How the line is wired.
    pub trigger: Trigger,
}

/// How the device is listed in the ACPI namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcpiNode {
    /// The hardware id, such as `PNP0501`.
    pub hid: String,
    /// The unique id among devices of the same hardware id.
    pub uid: u32,
}

/// Everything that a device needs from its machine. The index of a region, line, timer or channel is the number that later calls name it by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Description {
    /// Register ranges.
    pub regions: Vec<Region>,
    /// Interrupt lines.
    pub lines: Vec<LineRequest>,
    /// How many one-shot or periodic timers.
    pub timers: u32,
    /// The names of byte channels to the outside, such as `console`.
    pub channels: Vec<String>,
    /// The device's ACPI node, if it has one. Its resources are the regions and lines above.
    pub acpi: Option<AcpiNode>,
}

impl Description {
    /// A device that needs nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds `size` ports from `base`.
    #[must_use]
    pub fn pio(mut self, name: &str, base: u16, size: u16) -> Self {
        self.regions.push(Region {
            name: name.to_owned(),
            space: Space::Pio,
            base: Some(base.into()),
            size: size.into(),
        });
        self
    }

    /// Adds `size` bytes of memory-mapped registers at `base`, or where the host chooses.
    #[must_use]
    pub fn mmio(mut self, name: &str, base: Option<u64>, size: u64) -> Self {
        self.regions.push(Region { name: name.to_owned(), space: Space::Mmio, base, size });
        self
    }

    /// Adds an interrupt line: this global system interrupt, or one that the host chooses.
    #[must_use]
    pub fn line(mut self, gsi: Option<u32>, trigger: Trigger) -> Self {
        self.lines.push(LineRequest { gsi, trigger });
        self
    }

    /// Adds a timer.
    #[must_use]
    pub fn timer(mut self) -> Self {
        self.timers = self.timers.saturating_add(1);
        self
    }

    /// Adds a byte channel to the outside.
    #[must_use]
    pub fn channel(mut self, name: &str) -> Self {
        self.channels.push(name.to_owned());
        self
    }

    /// Lists the device in the ACPI namespace.
    #[must_use]
    pub fn acpi(mut self, hid: &str, uid: u32) -> Self {
        self.acpi = Some(AcpiNode { hid: hid.to_owned(), uid });
        self
    }
}

/// A device's whole state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedState {
    /// The schema of `data`: the plugin's own number, raised whenever the layout changes.
    pub schema: u32,
    /// The state, in the plugin's own encoding.
    pub data: Vec<u8>,
}

/// What a device may ask the machine for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Power the machine off, as if its guest had done so.
    PowerOff,
    /// Reset the machine.
    Reset,
    /// End the machine, with this exit status for whoever started it.
    Exit(u8),
}

impl Request {
    /// The request as two numbers, for [`DeviceHost::machine_control_ask`].
    #[must_use]
    pub const fn to_numbers(self) -> (u32, u8) {
        match self {
            Self::PowerOff => (0, 0),
            Self::Reset => (1, 0),
            Self::Exit(status) => (2, status),
        }
    }

    /// The request of these numbers, if they are one.
    #[must_use]
    pub const fn from_numbers(kind: u32, status: u8) -> Option<Self> {
        match kind {
            0 => Some(Self::PowerOff),
            1 => Some(Self::Reset),
            2 => Some(Self::Exit(status)),
            _ => None,
        }
    }
}

table! {
    /// What the host offers a device. Free functions of the WIT are named `interface_function`, methods `resource_method`; a resource is its
    /// index in the description. `context` is that given to [`DeviceTable::create`]. An index that the device was not given does nothing.
    /// The table lives as long as the instance.
    pub struct DeviceHost {
        /// Logs one message; `level` is a [`crate::Level`] as number, the message is UTF-8.
        log_log: fn(context: *mut c_void, level: u32, message: Bytes<'_>);
        /// Nanoseconds of the machine's clock.
        time_now: fn(context: *mut c_void) -> u64;
        /// Fires once at `deadline`.
        timer_arm: fn(context: *mut c_void, timer: u32, deadline: u64);
        /// Fires at `first`, then every `period` nanoseconds.
        timer_arm_periodic: fn(context: *mut c_void, timer: u32, first: u64, period: u64);
        /// Stops the timer.
        timer_cancel: fn(context: *mut c_void, timer: u32);
        /// Nanoseconds since 1970-01-01 00:00:00 UTC.
        wall_clock_now: fn(context: *mut c_void) -> u64;
        /// Sets the device's own level on the line: 0 is low, anything else high.
        line_set_level: fn(context: *mut c_void, line: u32, high: u32);
        /// Raises and lowers the line.
        line_pulse: fn(context: *mut c_void, line: u32);
        /// Gives bytes to the outside; returns how many were taken.
        channel_write: fn(context: *mut c_void, channel: u32, bytes: Bytes<'_>) -> u32;
        /// Copies at most `max` bytes that came from the outside to `buffer`, which has room for them; returns how many.
        channel_read: fn(context: *mut c_void, channel: u32, buffer: *mut u8, max: u32) -> u32;
        /// Asks for the end of the machine, in the numbers of [`Request::to_numbers`].
        machine_control_ask: fn(context: *mut c_void, kind: u32, status: u32);
        /// Not in the WIT: the plugin panicked with this text (UTF-8) in the call that is about to return [`Status::TRAPPED`].
        panicked: fn(context: *mut c_void, message: Bytes<'_>);
    }
}

table! {
    /// What a device does. Each function but `create` takes the instance that `create` returned.
    pub struct DeviceTable {
        /// Not in the WIT: makes an instance, or returns null. `host` and `context` are good until `destroy` has returned.
        create: fn(host: *const DeviceHost, context: *mut c_void) -> *mut c_void;
        /// Not in the WIT: ends an instance, also one that trapped. It may still call the host.
        destroy: fn(instance: *mut c_void);
        /// `config` is encoded settings ([`crate::wire::encode_settings`]); the sink gets the description, or the error.
        describe: fn(instance: *mut c_void, config: Bytes<'_>, output: Sink) -> Status;
        /// How many lines, timers and channels were granted: all that the description asked for. The sink gets the error, if any.
        start: fn(instance: *mut c_void, lines: u32, timers: u32, channels: u32, output: Sink) -> Status;
        /// The value goes to `value`.
        read: fn(instance: *mut c_void, region: u32, offset: u64, size: u32, value: *mut u64) -> Status;
        /// As in the WIT.
        write: fn(instance: *mut c_void, region: u32, offset: u64, size: u32, value: u64) -> Status;
        /// As in the WIT.
        timer_fired: fn(instance: *mut c_void, timer: u32) -> Status;
        /// As in the WIT.
        channel_readable: fn(instance: *mut c_void, channel: u32) -> Status;
        /// As in the WIT.
        reset: fn(instance: *mut c_void) -> Status;
        /// The schema goes to `schema`, the data to the sink; or the error.
        save: fn(instance: *mut c_void, schema: *mut u32, output: Sink) -> Status;
        /// The sink gets the error, if any.
        restore: fn(instance: *mut c_void, schema: u32, data: Bytes<'_>, output: Sink) -> Status;
    }
}
