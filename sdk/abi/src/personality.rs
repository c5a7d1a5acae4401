//! `tenon:personality`: its records, and the two tables of a native personality.

use std::ffi::c_void;
use std::fmt;

use crate::{Bytes, DeviceError, Sink, Status};

/// Why a personality could not load its guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PersonalityError {
    /// The image is not one that this personality understands. The text says what it looked for and what it found.
    NotMine(String),
    /// The image is damaged. The text says where.
    Corrupt(String),
    /// The machine cannot hold the guest. The text says how much memory is there and how much would do.
    NoRoom(String),
    /// An option is wrong, or an image is missing. The text names it.
    Invalid(String),
    /// Any other failure.
    Other(String),
}

impl fmt::Display for PersonalityError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotMine(text) => write!(f, "not an image for this personality: {text}"),
            Self::Corrupt(text) => write!(f, "the image is damaged: {text}"),
            Self::NoRoom(text) => write!(f, "not enough memory: {text}"),
            Self::Invalid(text) => write!(f, "invalid: {text}"),
            Self::Other(text) => f.write_str(text),
        }
    }
}

impl std::error::Error for PersonalityError {}

/// The words that devices and personalities share for settings make one error out of the other.
impl From<DeviceError> for PersonalityError {
    fn from(error: DeviceError) -> Self {
        match error {
            DeviceError::Invalid(text) => Self::Invalid(text),
            DeviceError::Unsupported(text) | DeviceError::Schema(text) | DeviceError::Other(text) => {
                Self::Other(text)
            }
        }
    }
}

/// What a range of guest-physical addresses is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MemoryKind {
    /// Free for the guest.
    Ram,
    /// Kept from the guest, such as the range of the boot tables and firmware.
    Reserved,
    /// Holds ACPI tables; the guest may take it over once it has read them.
    Acpi,
}

/// A range of guest-physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRange {
    /// The first address.
    pub start: u64,
    /// The length in bytes.
    pub size: u64,
    /// What it is.
    pub kind: MemoryKind,
}

/// The machine that the guest will find.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// How many vCPUs; the first one starts, the others wait for INIT and SIPI.
    pub vcpus: u32,
    /// All memory, in ascending order, without overlap.
    pub memory: Vec<MemoryRange>,
    /// The address of the ACPI root pointer (RSDP), if the machine has ACPI tables.
    pub rsdp: Option<u64>,
}

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// The visible selector.
    pub selector: u16,
    /// The base address.
    pub base: u64,
    /// The limit in bytes, granularity applied.
    pub limit: u32,
    /// Bits 8 to 23 of a descriptor's second doubleword, shifted down by 8: type and S in bits 0 to 4, DPL in 5 and 6, P in 7, AVL in 12,
    /// L in 13, D/B in 14, G in 15. An unusable segment has P clear.
    pub rights: u16,
}

impl Segment {
    /// A real-mode segment: base is 16 times the selector, limit 64 KiB, readable and writable.
    #[must_use]
    pub const fn real(selector: u16) -> Self {
        Self { selector, base: (selector as u64) << 4, limit: 0xffff, rights: 0x0093 }
    }

    /// 64-bit code, ring 0.
    #[must_use]
    pub const fn code64(selector: u16) -> Self {
        Self { selector, base: 0, limit: u32::MAX, rights: 0xa09b }
    }

    /// Flat 32-bit code, ring 0.
    #[must_use]
    pub const fn code32(selector: u16) -> Self {
        Self { selector, base: 0, limit: u32::MAX, rights: 0xc09b }
    }

    /// Flat data for 32- and 64-bit mode, ring 0.
    #[must_use]
    pub const fn data(selector: u16) -> Self {
        Self { selector, base: 0, limit: u32::MAX, rights: 0xc093 }
    }

    /// A busy 32- or 64-bit task-state segment of the least size.
    #[must_use]
    pub const fn task(selector: u16) -> Self {
        Self { selector, base: 0, limit: 0x67, rights: 0x008b }
    }

    /// An unusable segment.
    #[must_use]
    pub const fn unusable() -> Self {
        Self { selector: 0, base: 0, limit: 0, rights: 0 }
    }
}

/// A descriptor-table register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// The linear address.
    pub base: u64,
    /// The limit in bytes.
    pub limit: u16,
}

/// The first vCPU's state at its first instruction. What is not named here is as after a hardware reset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuState {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15, in this order.
    pub general: [u64; 16],
    /// The instruction pointer.
    pub rip: u64,
    /// The flags; bit 1 is set whatever is given.
    pub rflags: u64,
    /// Code segment.
    pub cs: Segment,
    /// Data segment.
    pub ds: Segment,
    /// Extra segment.
    pub es: Segment,
    /// FS.
    pub fs: Segment,
    /// GS.
    pub gs: Segment,
    /// Stack segment.
    pub ss: Segment,
    /// Task register.
    pub tr: Segment,
    /// Local descriptor table.
    pub ldt: Segment,
    /// Global descriptor table.
    pub gdt: Table,
    /// Interrupt descriptor table.
    pub idt: Table,
    /// Control register 0.
    pub cr0: u64,
    /// Control register 3.
    pub cr3: u64,
    /// Control register 4.
    pub cr4: u64,
    /// The extended feature enable register.
    pub efer: u64,
}

impl CpuState {
    /// RAX in [`CpuState::general`]; the others follow in the order of the instruction encoding.
    pub const RAX: usize = 0;
    /// RCX.
    pub const RCX: usize = 1;
    /// RDX.
    pub const RDX: usize = 2;
    /// RBX.
    pub const RBX: usize = 3;
    /// RSP.
    pub const RSP: usize = 4;
    /// RBP.
    pub const RBP: usize = 5;
    /// RSI.
    pub const RSI: usize = 6;
    /// RDI.
    pub const RDI: usize = 7;

    /// Real mode at `segment:offset`, interrupts off, the interrupt table at 0.
    #[must_use]
    pub const fn real_mode(segment: u16, offset: u16) -> Self {
        let data = Segment::real(0);
        let mut cs = Segment::real(segment);
        cs.rights = 0x009b;
        Self {
            general: [0; 16],
            rip: offset as u64,
            rflags: 2,
            cs,
            ds: data,
            es: data,
            fs: data,
            gs: data,
            ss: data,
            tr: Segment { selector: 0, base: 0, limit: 0xffff, rights: 0x008b },
            ldt: Segment { selector: 0, base: 0, limit: 0xffff, rights: 0x0082 },
            gdt: Table { base: 0, limit: 0xffff },
            idt: Table { base: 0, limit: 0x03ff },
            cr0: 0x6000_0010,
            cr3: 0,
            cr4: 0,
            efer: 0,
        }
    }

    /// Flat 32-bit protected mode at `entry`: paging and interrupts off, code selector 0x10, data selector 0x18, no descriptor tables
    /// (the guest loads its own before it loads a segment register).
    #[must_use]
    pub const fn protected_mode(entry: u32) -> Self {
        let data = Segment::data(0x18);
        let mut state = Self::real_mode(0, 0);
        state.rip = entry as u64;
        state.cs = Segment::code32(0x10);
        state.ds = data;
        state.es = data;
        state.fs = data;
        state.gs = data;
        state.ss = data;
        state.tr = Segment::task(0);
        state.gdt = Table { base: 0, limit: 0 };
        state.idt = Table { base: 0, limit: 0 };
        // PE, ET.
        state.cr0 = 0x11;
        state
    }

    /// 64-bit mode at `entry` with the page tables at `cr3`: interrupts off, code selector 0x10, data selector 0x18, no descriptor tables.
    #[must_use]
    pub const fn long_mode(entry: u64, cr3: u64) -> Self {
        let mut state = Self::protected_mode(0);
        state.rip = entry;
        state.cs = Segment::code64(0x10);
        // PG, ET, PE; PAE; LME and LMA.
        state.cr0 = 0x8000_0011;
        state.cr3 = cr3;
        state.cr4 = 0x20;
        state.efer = 0x500;
        state
    }
}

/// How to ask a running guest to stop in an orderly way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopMethod {
    /// There is no way; only a hard stop works.
    None,
    /// The ACPI power button.
    PowerButton,
    /// These bytes on the console.
    Console(Vec<u8>),
}

/// A guest that is ready to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Boot {
    /// What was found, for people, such as `Linux 6.1.0 (bzImage, PVH)`.
    pub summary: String,
    /// The first vCPU.
    pub vcpu: CpuState,
    /// How to ask the guest to stop.
    pub stop: StopMethod,
}

table! {
    /// What the host offers a personality during `load`. Names follow the rule of [`crate::DeviceHost`]; an image is its index in the list
    /// given to `load`. Errors go to the sink in the encoding of [`crate::wire::encode_personality_error`].
    pub struct PersonalityHost {
        /// Logs one message; `level` is a [`crate::Level`] as number, the message is UTF-8.
        log_log: fn(context: *mut c_void, level: u32, message: Bytes<'_>);
        /// The sink gets the role, UTF-8.
        image_role: fn(context: *mut c_void, image: u32, output: Sink);
        /// The length in bytes.
        image_size: fn(context: *mut c_void, image: u32) -> u64;
        /// Copies at most `length` bytes at `offset` to `buffer`, which has room for them; how many goes to `done`.
        image_read: fn(context: *mut c_void, image: u32, offset: u64, buffer: *mut u8, length: u32, done: *mut u32, error: Sink) -> Status;
        /// Writes guest memory.
        memory_write: fn(context: *mut c_void, address: u64, bytes: Bytes<'_>, error: Sink) -> Status;
        /// Copies a part of an image to guest memory.
        memory_copy_image: fn(context: *mut c_void, address: u64, image: u32, offset: u64, length: u64, error: Sink) -> Status;
        /// Not in the WIT: the plugin panicked with this text (UTF-8) in the call that is about to return [`Status::TRAPPED`].
        panicked: fn(context: *mut c_void, message: Bytes<'_>);
    }
}

table! {
    /// What a personality does.
    pub struct PersonalityTable {
        /// `host` and `context` are good during the call. `machine` is encoded by [`crate::wire::encode_machine`], `options` by
        /// [`crate::wire::encode_settings`]; the sink gets the encoded boot, or the error.
        load: fn(host: *const PersonalityHost, context: *mut c_void, machine: Bytes<'_>, images: u32, options: Bytes<'_>, output: Sink) -> Status;
    }
}
