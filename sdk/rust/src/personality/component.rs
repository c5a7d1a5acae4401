//! The personality as a component: handles are the contract's resources.
#![allow(unsafe_code, reason = "generated bindings")]

use tenon_abi::Level;

use self::bindings::exports::tenon::personality::personality as exports;
use self::bindings::tenon::personality as imports;
use super::{
    Boot, Config, CpuState, Error, Machine, MemoryKind, MemoryRange, Personality, Result, Segment,
    StopMethod, Table,
};

/// What `wit-bindgen` makes of the contract. It is kept as a file, so that a plugin's build need not make it; a test says when it is out of date.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic, clippy::restriction, reason = "generated code")]
#[rustfmt::skip]
pub mod bindings;

pub(crate) struct Image(imports::images::Image);

impl Image {
    pub(super) fn role(&self) -> String {
        self.0.role()
    }

    pub(super) fn size(&self) -> u64 {
        self.0.size()
    }

    pub(super) fn read(&self, offset: u64, len: u32) -> Result<Vec<u8>> {
        Ok(self.0.read(offset, len)?)
    }
}

pub(crate) struct Memory<'a>(&'a imports::guest_memory::Memory);

impl Memory<'_> {
    pub(super) fn write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        Ok(self.0.write(address, bytes)?)
    }

    pub(super) fn copy_image(&self, address: u64, image: &Image, offset: u64, len: u64) -> Result<()> {
        Ok(self.0.copy_image(address, &image.0, offset, len)?)
    }
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

/// A plugin that exports a personality. [`crate::export_personality!`] implements it.
pub trait Exported {
    /// The personality.
    type Personality: Personality;
}

impl<E: Exported> exports::Guest for E {
    fn load(
        machine: exports::Machine,
        memory: &imports::guest_memory::Memory,
        images: Vec<imports::images::Image>,
        options: Vec<exports::Setting>,
    ) -> Result<exports::Boot, exports::ErrorCode> {
        let images = images.into_iter().map(|image| super::Image(Image(image))).collect();
        let options = Config::new(options.into_iter().map(|setting| (setting.key, setting.value)));
        Ok(E::Personality::load(&machine.into(), &super::Memory(Memory(memory)), images, &options)?.into())
    }
}

impl From<exports::ErrorCode> for Error {
    fn from(error: exports::ErrorCode) -> Self {
        match error {
            exports::ErrorCode::NotMine(text) => Self::NotMine(text),
            exports::ErrorCode::Corrupt(text) => Self::Corrupt(text),
            exports::ErrorCode::NoRoom(text) => Self::NoRoom(text),
            exports::ErrorCode::Invalid(text) => Self::Invalid(text),
            exports::ErrorCode::Other(text) => Self::Other(text),
        }
    }
}

impl From<Error> for exports::ErrorCode {
    fn from(error: Error) -> Self {
        match error {
            Error::NotMine(text) => Self::NotMine(text),
            Error::Corrupt(text) => Self::Corrupt(text),
            Error::NoRoom(text) => Self::NoRoom(text),
            Error::Invalid(text) => Self::Invalid(text),
            Error::Other(text) => Self::Other(text),
        }
    }
}

impl From<exports::Machine> for Machine {
    fn from(machine: exports::Machine) -> Self {
        use imports::types::MemoryKind as Wit;
        let exports::Machine { vcpus, memory, rsdp } = machine;
        let range = |range: imports::types::MemoryRange| MemoryRange {
            start: range.start,
            size: range.size,
            kind: match range.kind {
                Wit::Ram => MemoryKind::Ram,
                Wit::Reserved => MemoryKind::Reserved,
                Wit::Acpi => MemoryKind::Acpi,
            },
        };
        Self { vcpus, memory: memory.into_iter().map(range).collect(), rsdp }
    }
}

impl From<Boot> for exports::Boot {
    fn from(boot: Boot) -> Self {
        use imports::types::StopMethod as Wit;
        let Boot { summary, vcpu, stop } = boot;
        let stop = match stop {
            StopMethod::None => Wit::None,
            StopMethod::PowerButton => Wit::PowerButton,
            StopMethod::Console(bytes) => Wit::Console(bytes),
        };
        Self { summary, vcpu: vcpu.into(), stop }
    }
}

impl From<CpuState> for imports::types::CpuState {
    fn from(state: CpuState) -> Self {
        use imports::types as wit;
        let segment =
            |Segment { selector, base, limit, rights }| wit::Segment { selector, base, limit, rights };
        let table = |Table { base, limit }| wit::Table { base, limit };
        let CpuState { general, rip, rflags, cs, ds, es, fs, gs, ss, tr, ldt, gdt, idt, cr0, cr3, cr4, efer } =
            state;
        Self {
            general: general.to_vec(),
            rip,
            rflags,
            cs: segment(cs),
            ds: segment(ds),
            es: segment(es),
            fs: segment(fs),
            gs: segment(gs),
            ss: segment(ss),
            tr: segment(tr),
            ldt: segment(ldt),
            gdt: table(gdt),
            idt: table(idt),
            cr0,
            cr3,
            cr4,
            efer,
        }
    }
}
