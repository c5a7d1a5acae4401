//! The device as a component: handles are the contract's resources, and the exports call the one device that the component holds.
#![allow(unsafe_code, reason = "generated bindings")]

use std::cell::RefCell;
use std::thread::LocalKey;

use tenon_abi::{Level, Request, SavedState, Space, Trigger};

use self::bindings::exports::tenon::device::device as exports;
use self::bindings::tenon::device as imports;
use super::{Config, Description, Device, Error};

/// What `wit-bindgen` makes of the contract. It is kept as a file, so that a plugin's build need not make it; a test says when it is out of date.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, clippy::restriction, reason = "generated code")]
#[rustfmt::skip]
pub mod bindings;

pub(super) struct Line(imports::interrupts::Line);

impl Line {
    pub(super) fn set_level(&self, high: bool) {
        self.0.set_level(high);
    }

    pub(super) fn pulse(&self) {
        self.0.pulse();
    }
}

pub(crate) struct Timer(pub(crate) imports::time::Timer);

impl Timer {
    pub(super) fn arm(&self, deadline: u64) {
        self.0.arm(deadline);
    }

    pub(super) fn arm_periodic(&self, first: u64, period: u64) {
        self.0.arm_periodic(first, period);
    }

    pub(super) fn cancel(&self) {
        self.0.cancel();
    }
}

pub(crate) struct Channel(pub(crate) imports::channels::Channel);

impl Channel {
    pub(super) fn write(&self, bytes: &[u8]) -> usize {
        self.0.write(bytes) as usize
    }

    pub(super) fn read(&self, max: u32) -> Vec<u8> {
        self.0.read(max)
    }
}

pub(super) fn now() -> u64 {
    imports::time::now()
}

pub(super) fn wall_clock() -> u64 {
    imports::wall_clock::now()
}

pub(super) fn request(request: Request) {
    use imports::machine_control::Request as Wit;
    imports::machine_control::ask(match request {
        Request::PowerOff => Wit::PowerOff,
        Request::Reset => Wit::Reset,
        Request::Exit(status) => Wit::Exit(status),
    });
}

pub(super) fn log(level: Level, message: &str) {
    use imports::log::Level as Wit;
    let level = match level {
        Level::Error => Wit::Error,
        Level::Warn => Wit::Warn,
        Level::Info => Wit::Info,
        Level::Debug => Wit::Debug,
        Level::Trace => Wit::Trace,
    };
    imports::log::log(level, message);
}

/// The component's device, and before it the configuration.
pub struct Slot<D> {
    config: Option<Config>,
    device: Option<D>,
}

impl<D> Slot<D> {
    /// No device yet.
    #[must_use]
    pub const fn new() -> RefCell<Self> {
        RefCell::new(Self { config: None, device: None })
    }
}

/// A plugin that exports a device. [`crate::export_device!`] implements it.
pub trait Exported {
    /// The device.
    type Device: Device;
    /// Where it lives.
    fn slot() -> &'static LocalKey<RefCell<Slot<Self::Device>>>;
}

/// Calls the device. The host starts it before it calls anything else.
fn with<E: Exported, R>(call: impl FnOnce(&mut E::Device) -> R) -> R {
    E::slot().with_borrow_mut(|slot| {
        call(slot.device.as_mut().expect("the host starts a device before it calls it"))
    })
}

impl<E: Exported> exports::Guest for E {
    fn describe(config: Vec<exports::Setting>) -> Result<exports::Description, exports::ErrorCode> {
        let config = Config::new(config.into_iter().map(|setting| (setting.key, setting.value)));
        let description = E::Device::describe(&config)?;
        E::slot().with_borrow_mut(|slot| slot.config = Some(config));
        Ok(description.into())
    }

    fn start(attachment: exports::Attachment) -> Result<(), exports::ErrorCode> {
        let config = E::slot().with_borrow_mut(|slot| slot.config.take());
        let Some(config) = config else {
            return Err(exports::ErrorCode::Other("`start` was called before `describe`".into()));
        };
        let exports::Attachment { lines, timers, channels } = attachment;
        let attachment = super::Attachment {
            lines: lines.into_iter().map(|line| super::Line(Line(line))).collect::<Vec<_>>().into_iter(),
            timers: timers
                .into_iter()
                .map(|timer| super::Timer(Timer(timer)))
                .collect::<Vec<_>>()
                .into_iter(),
            channels: channels
                .into_iter()
                .map(|c| super::Channel(Channel(c)))
                .collect::<Vec<_>>()
                .into_iter(),
        };
        let device = E::Device::start(&config, attachment)?;
        E::slot().with_borrow_mut(|slot| slot.device = Some(device));
        Ok(())
    }

    fn read(region: u32, offset: u64, size: u8) -> u64 {
        with::<E, _>(|device| device.read(region, offset, size))
    }

    fn write(region: u32, offset: u64, size: u8, value: u64) {
        with::<E, _>(|device| device.write(region, offset, size, value));
    }

    fn timer_fired(timer: u32) {
        with::<E, _>(|device| device.timer_fired(timer));
    }

    fn channel_readable(channel: u32) {
        with::<E, _>(|device| device.channel_readable(channel));
    }

    fn reset() {
        with::<E, _>(Device::reset);
    }

    fn save() -> Result<exports::SavedState, exports::ErrorCode> {
        let SavedState { schema, data } = with::<E, _>(|device| super::save(device))?;
        Ok(exports::SavedState { schema, data })
    }

    fn restore(state: exports::SavedState) -> Result<(), exports::ErrorCode> {
        let exports::SavedState { schema, data } = state;
        Ok(with::<E, _>(|device| super::restore(device, &SavedState { schema, data }))?)
    }
}

impl From<Error> for exports::ErrorCode {
    fn from(error: Error) -> Self {
        match error {
            Error::Invalid(text) => Self::Invalid(text),
            Error::Unsupported(text) => Self::Unsupported(text),
            Error::Schema(text) => Self::Schema(text),
            Error::Other(text) => Self::Other(text),
        }
    }
}

impl From<Description> for exports::Description {
    fn from(description: Description) -> Self {
        use imports::types as wit;
        let Description { regions, lines, timers, channels, acpi } = description;
        let region = |region: super::Region| wit::Region {
            name: region.name,
            space: match region.space {
                Space::Pio => wit::Space::Pio,
                Space::Mmio => wit::Space::Mmio,
            },
            base: region.base,
            size: region.size,
        };
        let line = |line: super::LineRequest| wit::LineRequest {
            gsi: line.gsi,
            trigger: match line.trigger {
                Trigger::Edge => wit::Trigger::Edge,
                Trigger::Level => wit::Trigger::Level,
            },
        };
        Self {
            regions: regions.into_iter().map(region).collect(),
            lines: lines.into_iter().map(line).collect(),
            timers,
            channels,
            acpi: acpi.map(|node| wit::AcpiNode { hid: node.hid, uid: node.uid }),
        }
    }
}
