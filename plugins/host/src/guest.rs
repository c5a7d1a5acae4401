//! Personalities: a guest's images go in, a guest that is ready to run comes out.
//!
//! A personality's instance lives for one call of `load`. It sees the images and guest memory only through the host's functions, which check every range.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tenon_abi as abi;
use tenon_abi::{MemoryKind, MemoryRange, PersonalityError};
use tenon_core::{CpuState, DescriptorTable, Ram, Segment};
use vm_memory::{Bytes, GuestAddress};
use wasmtime::Store;
use wasmtime::component::Resource;

use crate::bindings::personality::tenon::personality as import;
use crate::bindings::personality::{PersonalityPluginPre, exports};
use crate::fault::{Fault, TooManyHostCalls};
use crate::host::{Allowance, Host, Limiter};
use crate::manifest::Limits;
use crate::services::LogLimit;

/// How often `load` may call the host.
const HOST_CALLS: u32 = 1_000_000;
/// The most that one `image.read` gives.
const MAX_READ: u32 = 16 << 20;

/// A file of the guest: a kernel, an initial RAM disk.
#[derive(Clone)]
pub struct Image {
    role: String,
    size: u64,
    content: Content,
}

#[derive(Clone)]
enum Content {
    File(Arc<File>),
    Bytes(Arc<[u8]>),
}

impl Image {
    /// Opens a file. It does not wait, as it would for the other end of a FIFO.
    ///
    /// # Errors
    /// It cannot be opened, or is not a regular file.
    pub fn open(role: &str, path: &Path) -> io::Result<Self> {
        let file = crate::files::open_regular(path)?;
        let size = file.metadata()?.len();
        Ok(Self { role: role.to_owned(), size, content: Content::File(Arc::new(file)) })
    }

    /// An image in memory.
    #[must_use]
    pub fn from_bytes(role: &str, bytes: impl Into<Arc<[u8]>>) -> Self {
        let bytes = bytes.into();
        Self { role: role.to_owned(), size: bytes.len() as u64, content: Content::Bytes(bytes) }
    }

    /// What it is for, such as `kernel`.
    #[must_use]
    pub fn role(&self) -> &str {
        &self.role
    }

    /// The length in bytes when it was opened.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Fills `buffer` from `offset`. The range lies inside the image.
    fn read_exact(&self, offset: u64, buffer: &mut [u8]) -> Result<(), PersonalityError> {
        match &self.content {
            Content::File(file) => file.read_exact_at(buffer, offset).map_err(|error| {
                PersonalityError::Other(format!("reading the image `{}` at {offset:#x}: {error}", self.role))
            }),
            Content::Bytes(bytes) => {
                let from = usize::try_from(offset).unwrap_or(usize::MAX);
                let part = bytes.get(from..).and_then(|rest| rest.get(..buffer.len()));
                buffer.copy_from_slice(part.ok_or_else(|| {
                    PersonalityError::Other(format!("the image `{}` has shrunk", self.role))
                })?);
                Ok(())
            }
        }
    }
}

/// A guest that is ready to run.
#[derive(Clone, Debug)]
pub struct Boot {
    /// What was found, for people.
    pub summary: String,
    /// The first vCPU.
    pub vcpu: CpuState,
    /// How to ask the guest to stop.
    pub stop: abi::StopMethod,
}

/// A guest that cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// The plugin is no personality.
    #[error("`{0}` is a device, not a personality")]
    NotAPersonality(String),
    /// A setting.
    #[error(transparent)]
    Setting(#[from] crate::SettingError),
    /// The personality refused.
    #[error("personality `{plugin}`: {error}")]
    Refused {
        /// The plugin's id.
        plugin: String,
        /// Its words.
        error: PersonalityError,
    },
    /// The personality did not return.
    #[error("personality `{plugin}` failed: {fault}")]
    Fault {
        /// The plugin's id.
        plugin: String,
        /// What it did.
        fault: Fault,
    },
}

/// What is behind a personality's imports, for a component and for a native library.
pub(crate) struct Loading {
    pub(crate) name: String,
    pub(crate) ram: Arc<Ram>,
    pub(crate) ranges: Vec<MemoryRange>,
    pub(crate) images: Vec<Image>,
    pub(crate) log: LogLimit,
}

impl Loading {
    pub(crate) fn log(&mut self, level: abi::Level, message: &str) {
        self.log.write(&self.name, level, message);
    }

    pub(crate) fn image(&self, index: u32) -> Option<&Image> {
        self.images.get(usize::try_from(index).unwrap_or(usize::MAX))
    }

    pub(crate) fn read(&self, image: u32, offset: u64, len: u32) -> Result<Vec<u8>, PersonalityError> {
        let image =
            self.image(image).ok_or_else(|| PersonalityError::Invalid("there is no such image".into()))?;
        let count = u64::from(len.min(MAX_READ)).min(image.size.saturating_sub(offset));
        let mut bytes = vec![0; usize::try_from(count).unwrap_or(0)];
        image.read_exact(offset, &mut bytes)?;
        Ok(bytes)
    }

    /// All of the range must be RAM: covered by ranges of that kind without a gap.
    fn check(&self, address: u64, size: u64) -> Result<(), PersonalityError> {
        let wrong = || {
            let ram: Vec<String> = self
                .ranges
                .iter()
                .filter(|range| range.kind == MemoryKind::Ram)
                .map(|range| format!("{:#x}-{:#x}", range.start, range.start.saturating_add(range.size)))
                .collect();
            PersonalityError::NoRoom(format!(
                "{size:#x} bytes at {address:#x} do not lie in RAM; RAM is {}",
                ram.join(", ")
            ))
        };
        let end = address.checked_add(size).ok_or_else(wrong)?;
        let mut at = address;
        for range in self.ranges.iter().filter(|range| range.kind == MemoryKind::Ram) {
            let range_end = range.start.saturating_add(range.size);
            if (range.start..range_end).contains(&at) {
                at = range_end;
            }
            if at >= end {
                return Ok(());
            }
        }
        Err(wrong())
    }

    fn put(&self, address: u64, bytes: &[u8]) -> Result<(), PersonalityError> {
        self.ram.map().write_slice(bytes, GuestAddress(address)).map_err(|error| {
            PersonalityError::NoRoom(format!("writing guest memory at {address:#x}: {error}"))
        })
    }

    pub(crate) fn write(&self, address: u64, bytes: &[u8]) -> Result<(), PersonalityError> {
        self.check(address, bytes.len() as u64)?;
        self.put(address, bytes)
    }

    pub(crate) fn copy_image(
        &self,
        address: u64,
        image: u32,
        offset: u64,
        len: u64,
    ) -> Result<(), PersonalityError> {
        let image =
            self.image(image).ok_or_else(|| PersonalityError::Invalid("there is no such image".into()))?;
        self.check(address, len)?;
        if offset.checked_add(len).is_none_or(|end| end > image.size) {
            return Err(PersonalityError::Corrupt(format!(
                "the image `{}` has {:#x} bytes; {len:#x} at {offset:#x} are past its end",
                image.role, image.size
            )));
        }
        let mut buffer = vec![0; 256 << 10];
        let mut done = 0;
        while done < len {
            let count = usize::try_from(len - done).unwrap_or(usize::MAX).min(buffer.len());
            image.read_exact(offset + done, &mut buffer[..count])?;
            self.put(address + done, &buffer[..count])?;
            done += count as u64;
        }
        Ok(())
    }
}

/// The core's state from the contract's: what is not named is as after a reset.
pub(crate) fn cpu_state(state: &abi::CpuState) -> CpuState {
    let segment =
        |s: &abi::Segment| Segment { selector: s.selector, base: s.base, limit: s.limit, rights: s.rights };
    let table = |t: &abi::Table| DescriptorTable { base: t.base, limit: t.limit };
    CpuState {
        general: state.general,
        rip: state.rip,
        rflags: state.rflags | 2,
        segments: [&state.es, &state.cs, &state.ss, &state.ds, &state.fs, &state.gs].map(segment),
        tr: segment(&state.tr),
        ldt: segment(&state.ldt),
        gdt: table(&state.gdt),
        idt: table(&state.idt),
        cr0: state.cr0,
        cr3: state.cr3,
        cr4: state.cr4,
        efer: state.efer,
        ..CpuState::after_reset()
    }
}

/// The store's data.
pub(crate) struct GuestState {
    loading: Loading,
    limiter: Limiter,
    calls_left: u32,
    allowance: Allowance,
}

impl GuestState {
    fn loading(&mut self) -> wasmtime::Result<&mut Loading> {
        self.calls_left = self.calls_left.checked_sub(1).ok_or(TooManyHostCalls)?;
        Ok(&mut self.loading)
    }
}

/// Runs `load` of a component.
pub(crate) fn load(
    host: &Host,
    pre: &PersonalityPluginPre<GuestState>,
    limits: &Limits,
    loading: Loading,
    machine: &abi::Machine,
    options: &[(String, String)],
) -> Result<Result<abi::Boot, PersonalityError>, Fault> {
    let images = u32::try_from(loading.images.len()).unwrap_or(u32::MAX);
    let mut allowance = Allowance::new(&host.ticker, limits.deadline);
    allowance.begin();
    let ticks = allowance.ticks;
    let state =
        GuestState { loading, limiter: Limiter::new(limits.memory), calls_left: HOST_CALLS, allowance };
    let mut store = Store::new(&host.engine, state);
    store.limiter(|state| &mut state.limiter);
    store.set_hostcall_fuel(usize::try_from(limits.memory).unwrap_or(usize::MAX));
    store.set_max_component_handles(1024);
    store.epoch_deadline_callback(|mut store| store.data_mut().allowance.expire());
    store.set_epoch_deadline(ticks);
    let wrong = |error: wasmtime::Error| personality_fault(&error, limits.deadline);
    let bindings = pre.instantiate(&mut store).map_err(wrong)?;
    let machine = import::types::Machine {
        vcpus: machine.vcpus,
        memory: machine
            .memory
            .iter()
            .map(|range| import::types::MemoryRange {
                start: range.start,
                size: range.size,
                kind: match range.kind {
                    MemoryKind::Ram => import::types::MemoryKind::Ram,
                    MemoryKind::Reserved => import::types::MemoryKind::Reserved,
                    MemoryKind::Acpi => import::types::MemoryKind::Acpi,
                },
            })
            .collect(),
        rsdp: machine.rsdp,
    };
    let options: Vec<_> = options
        .iter()
        .map(|(key, value)| import::types::Setting { key: key.clone(), value: value.clone() })
        .collect();
    let images: Vec<_> = (0..images).map(Resource::new_own).collect();
    let guest: &exports::tenon::personality::personality::Guest = bindings.tenon_personality_personality();
    let memory = Resource::new_own(0);
    match guest.call_load(&mut store, &machine, memory, &images, &options).map_err(wrong)? {
        Ok(boot) => Ok(Ok(from_boot(boot)?)),
        Err(error) => Ok(Err(from_error(error))),
    }
}

fn personality_fault(error: &wasmtime::Error, deadline: Duration) -> Fault {
    match crate::wasm::fault(error, deadline) {
        Fault::HostCalls(_) => Fault::HostCalls(HOST_CALLS),
        fault => fault,
    }
}

fn from_boot(boot: import::types::Boot) -> Result<abi::Boot, Fault> {
    let segment = |s: import::types::Segment| abi::Segment {
        selector: s.selector,
        base: s.base,
        limit: s.limit,
        rights: s.rights,
    };
    let table = |t: import::types::Table| abi::Table { base: t.base, limit: t.limit };
    let vcpu = boot.vcpu;
    let general: [u64; 16] = vcpu.general.try_into().map_err(|general: Vec<u64>| {
        Fault::Contract(format!("`cpu-state.general` has {} registers instead of 16", general.len()))
    })?;
    Ok(abi::Boot {
        summary: boot.summary,
        vcpu: abi::CpuState {
            general,
            rip: vcpu.rip,
            rflags: vcpu.rflags,
            cs: segment(vcpu.cs),
            ds: segment(vcpu.ds),
            es: segment(vcpu.es),
            fs: segment(vcpu.fs),
            gs: segment(vcpu.gs),
            ss: segment(vcpu.ss),
            tr: segment(vcpu.tr),
            ldt: segment(vcpu.ldt),
            gdt: table(vcpu.gdt),
            idt: table(vcpu.idt),
            cr0: vcpu.cr0,
            cr3: vcpu.cr3,
            cr4: vcpu.cr4,
            efer: vcpu.efer,
        },
        stop: match boot.stop {
            import::types::StopMethod::None => abi::StopMethod::None,
            import::types::StopMethod::PowerButton => abi::StopMethod::PowerButton,
            import::types::StopMethod::Console(bytes) => abi::StopMethod::Console(bytes),
        },
    })
}

fn from_error(error: import::types::ErrorCode) -> PersonalityError {
    use import::types::ErrorCode;
    match error {
        ErrorCode::NotMine(text) => PersonalityError::NotMine(text),
        ErrorCode::Corrupt(text) => PersonalityError::Corrupt(text),
        ErrorCode::NoRoom(text) => PersonalityError::NoRoom(text),
        ErrorCode::Invalid(text) => PersonalityError::Invalid(text),
        ErrorCode::Other(text) => PersonalityError::Other(text),
    }
}

fn to_error(error: PersonalityError) -> import::types::ErrorCode {
    use import::types::ErrorCode;
    match error {
        PersonalityError::NotMine(text) => ErrorCode::NotMine(text),
        PersonalityError::Corrupt(text) => ErrorCode::Corrupt(text),
        PersonalityError::NoRoom(text) => ErrorCode::NoRoom(text),
        PersonalityError::Invalid(text) => ErrorCode::Invalid(text),
        PersonalityError::Other(text) => ErrorCode::Other(text),
    }
}

// The imports.

impl import::types::Host for GuestState {}

impl import::log::Host for GuestState {
    fn log(&mut self, level: import::log::Level, message: String) -> wasmtime::Result<()> {
        use import::log::Level;
        let level = match level {
            Level::Error => abi::Level::Error,
            Level::Warn => abi::Level::Warn,
            Level::Info => abi::Level::Info,
            Level::Debug => abi::Level::Debug,
            Level::Trace => abi::Level::Trace,
        };
        self.loading()?.log(level, &message);
        Ok(())
    }
}

type ImageHandle = Resource<import::images::Image>;

impl import::images::Host for GuestState {}

impl import::images::HostImage for GuestState {
    fn role(&mut self, image: ImageHandle) -> wasmtime::Result<String> {
        Ok(self.loading()?.image(image.rep()).map(|image| image.role.clone()).unwrap_or_default())
    }

    fn size(&mut self, image: ImageHandle) -> wasmtime::Result<u64> {
        Ok(self.loading()?.image(image.rep()).map_or(0, Image::size))
    }

    fn read(
        &mut self,
        image: ImageHandle,
        offset: u64,
        len: u32,
    ) -> wasmtime::Result<Result<Vec<u8>, import::types::ErrorCode>> {
        Ok(self.loading()?.read(image.rep(), offset, len).map_err(to_error))
    }

    fn drop(&mut self, _: ImageHandle) -> wasmtime::Result<()> {
        Ok(())
    }
}

impl import::guest_memory::Host for GuestState {}

impl import::guest_memory::HostMemory for GuestState {
    fn write(
        &mut self,
        _: Resource<import::guest_memory::Memory>,
        address: u64,
        bytes: Vec<u8>,
    ) -> wasmtime::Result<Result<(), import::types::ErrorCode>> {
        Ok(self.loading()?.write(address, &bytes).map_err(to_error))
    }

    fn copy_image(
        &mut self,
        _: Resource<import::guest_memory::Memory>,
        address: u64,
        image: ImageHandle,
        offset: u64,
        len: u64,
    ) -> wasmtime::Result<Result<(), import::types::ErrorCode>> {
        Ok(self.loading()?.copy_image(address, image.rep(), offset, len).map_err(to_error))
    }

    fn drop(&mut self, _: Resource<import::guest_memory::Memory>) -> wasmtime::Result<()> {
        Ok(())
    }
}
