//! x87, MMX, SSE and SSE2: the floating-point and SIMD half of the software engine.
//!
//! The crate knows registers ([`FpState`], which *is* the 512-byte FXSAVE64 image), turns a decoded instruction into an
//! [`FpOp`] ([`lower`]) and executes that on a state and an operand block ([`Operands`]). It does not know the vCPU:
//! the engine checks CR0/CR4, resolves addresses, moves memory and delivers faults.
//!
//! # How the engine executes an [`FpOp`]
//!
//! 1. By [`FpOp::kind`]: CR0.EM/TS, CR4.OSFXSR → #NM or #UD (table at [`Kind`]); then, if [`FpOp::waits`] and
//!    [`FpState::pending`], #MF (or IGNNE's way when CR0.NE is 0; the operation itself refuses with [`FpFault::Mf`]).
//! 2. Memory operand: effective address as in the decoded instruction ([`FpOp::at_di`]: seg:\[rDI\], the segment being DS
//!    or the override); misaligned to [`FpOp::align`] → #GP(0); [`Mem::Read`] and [`Mem::ReadWrite`] are read into
//!    [`Operands::mem`]; [`Mem::Write`] and [`Mem::Masked`] are probed for write *before* the call: an operation that
//!    pops the x87 stack must not be followed by a page fault.
//! 3. Copy `dst`, `src`, `imm` to the operands; [`Gpr::In`]: the register into `gpr`; [`Flags::In`]: RFLAGS into `flags`.
//! 4. Call `run`. On `Err` nothing was changed but exception flags: deliver it ([`FpFault`]).
//! 5. Write `mem` back, `gpr` to its register ([`Gpr::Out`]), `flags` under [`RFLAGS_MASK`] ([`Flags::Out`]).
//!
//! # What is exact
//!
//! On x86-64 hosts arithmetic runs on the host's own units under the guest's MXCSR and FCW, so results, flags and NaN
//! payloads are the host's. The host's MXCSR and x87 control word are restored by each operation. Integer SIMD and data
//! movement are plain Rust. On other hosts [`lower`] answers `None` for whatever needs floating-point arithmetic; that is open.
//!
//! Two things are not exact. The x87 error pointers (FOP, FIP, FDP) are not tracked: they keep what FXRSTOR, FLDENV or FRSTOR
//! loaded, and environments have the protected-mode layout in real mode too. And PE beside an *unmasked* SIMD overflow or
//! underflow is that of the masked response.
#![allow(unsafe_code)] // Inline assembly on register images, and operands viewed as the layouts the hardware gives them.
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_possible_wrap)] // Lanes and bit fields.

mod forms;
mod int;
mod lower;
#[cfg(target_arch = "x86_64")]
mod simd;
mod state;
#[cfg(target_arch = "x86_64")]
mod x87;

pub use lower::lower;
pub use state::{FpState, ReservedBits};

const _: () = assert!(cfg!(target_endian = "little"), "registers are viewed as lanes in memory order");

/// RFLAGS bits that [`Flags::Out`] defines: CF, PF, AF, ZF, SF, OF.
pub const RFLAGS_MASK: u64 = 0x8d5;

/// What executing one instruction needs beyond the state.
#[repr(C, align(16))]
#[derive(Clone)]
pub struct Operands {
    /// The memory operand, from offset 0. Bytes beyond the operand's size may hold anything.
    pub mem: [u8; 512],
    /// General-purpose register in or out ([`FpOp::gpr`]); for [`Mem::Masked`]: bit *n* set on return = write byte *n*.
    pub gpr: u64,
    /// RFLAGS in or out ([`FpOp::flags`]).
    pub flags: u64,
    /// From [`FpOp::dst`].
    pub dst: u8,
    /// From [`FpOp::src`].
    pub src: u8,
    /// From [`FpOp::imm`].
    pub imm: u16,
}

impl Default for Operands {
    fn default() -> Self {
        Self { mem: [0; 512], gpr: 0, flags: 0, dst: 0, src: 0, imm: 0 }
    }
}

/// Why an operation did not (simply) complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum FpFault {
    /// #MF: an unmasked x87 exception is pending.
    Mf,
    /// #XM, vector 19 (#UD if CR4.OSXMMEXCPT is 0): an unmasked SIMD exception; MXCSR's flags are set, the destination is not written.
    Xm,
    /// #UD: the instruction is not one that the shown CPU has.
    Ud,
    /// #GP(0): reserved MXCSR bits.
    Gp,
    /// Not a fault: the instruction retires, but its memory destination must be left as it was (an x87 store with an
    /// unmasked exception, which becomes pending).
    Unstored,
}

/// The function that executes an operation.
pub type Run = fn(&mut FpState, &mut Operands) -> Result<(), FpFault>;

/// The memory operand: direction and length in bytes (at most 512).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mem {
    /// There is none.
    None,
    /// Read before the call.
    Read(u16),
    /// Written after the call; probed before it.
    Write(u16),
    /// Read before, written after.
    ReadWrite(u16),
    /// MASKMOVQ, MASKMOVDQU: after the call only the bytes whose bit is set in [`Operands::gpr`] are written.
    Masked(u16),
}

/// Which control-register checks come before the operation.
///
/// | kind | #UD if | #NM if |
/// |---|---|---|
/// | `X87` | | CR0.EM or CR0.TS |
/// | `Wait` | | CR0.MP and CR0.TS |
/// | `Mmx` | CR0.EM | CR0.TS |
/// | `Sse` | CR0.EM or not CR4.OSFXSR | CR0.TS |
/// | `Fx` (FXSAVE, FXRSTOR) | | CR0.EM or CR0.TS |
/// | `Plain` (MOVNTI, undefined ones) | | |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // The table above.
pub enum Kind {
    X87,
    Wait,
    Mmx,
    Sse,
    Fx,
    Plain,
}

/// A general-purpose register that takes part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gpr {
    /// None does.
    None,
    /// Read into [`Operands::gpr`] before the call; as wide as the register named (AX, EAX, RAX and so on).
    In(iced_x86::Register),
    /// Written from [`Operands::gpr`] after the call, at the named register's width (32-bit ones clear the upper half).
    Out(iced_x86::Register),
}

/// How RFLAGS takes part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flags {
    /// Not at all.
    None,
    /// CF, PF, ZF are read from [`Operands::flags`] (FCMOVcc).
    In,
    /// [`RFLAGS_MASK`] is replaced from [`Operands::flags`] (COMISx, UCOMISx, FCOMI family).
    Out,
}

/// One lowered instruction.
#[derive(Clone, Copy)]
pub struct FpOp {
    /// Executes it.
    pub run: Run,
    /// Its memory operand.
    pub mem: Mem,
    /// Alignment that the address must have (16), or 1.
    pub align: u8,
    /// The checks before it.
    pub kind: Kind,
    /// A pending unmasked x87 exception faults with #MF first.
    pub waits: bool,
    /// The memory operand is at rDI (MASKMOVQ, MASKMOVDQU).
    pub at_di: bool,
    /// Destination register number.
    pub dst: u8,
    /// Source register number.
    pub src: u8,
    /// Immediate, or another constant that `run` wants.
    pub imm: u16,
    /// The general-purpose register.
    pub gpr: Gpr,
    /// RFLAGS.
    pub flags: Flags,
}
