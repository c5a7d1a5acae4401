//! The state of one virtual CPU, as every part of the engine sees it.
//!
//! [`Cpu`] is plain data behind one raw pointer: handlers of decoded instructions get `&mut Cpu`, the system side (segments, paging,
//! exceptions, control registers) works on the same fields. Two rules keep it consistent:
//!
//! - Arithmetic flags are lazy. Read them with [`Cpu::flags`], write them with [`Cpu::set_flags`]; [`Cpu::rflags`] holds the others.
//! - After a change of CR0, CR4, EFER, a segment register but FS and GS, the privilege level, TF or VM call [`Cpu::update_mode`]; after a change of page tables'
//!   meaning call [`Cpu::flush_tlb`], [`Cpu::flush_tlb_non_global`] or [`Cpu::flush_page`].

use std::sync::Arc;

use tenon_core::Segment;

use crate::apic::Lapic;
use crate::block::BlockCache;
use crate::control::Msrs;
use crate::flags::Lazy;
use crate::tlb::Tlb;
use crate::vm::{VcpuShared, VmShared};

/// Index of RAX and so on in [`Cpu::gpr`].
pub(crate) const RAX: usize = 0;
pub(crate) const RCX: usize = 1;
pub(crate) const RDX: usize = 2;
pub(crate) const RBX: usize = 3;
pub(crate) const RSP: usize = 4;
pub(crate) const RBP: usize = 5;
pub(crate) const RSI: usize = 6;
pub(crate) const RDI: usize = 7;
/// A pseudo-register that is always zero: the base or index of an address that has none.
pub(crate) const ZERO: usize = 16;
/// The instruction pointer. Inside a block it is the address of the block's first instruction; at every exit it is exact.
pub(crate) const RIP: usize = 17;

/// Indices into [`Cpu::seg`], in the order of the instruction encoding.
pub(crate) const ES: usize = 0;
pub(crate) const CS: usize = 1;
pub(crate) const SS: usize = 2;
pub(crate) const DS: usize = 3;
pub(crate) const FS: usize = 4;
pub(crate) const GS: usize = 5;

/// Bits of RFLAGS.
pub(crate) mod fl {
    pub(crate) const CF: u64 = 1;
    pub(crate) const PF: u64 = 1 << 2;
    pub(crate) const AF: u64 = 1 << 4;
    pub(crate) const ZF: u64 = 1 << 6;
    pub(crate) const SF: u64 = 1 << 7;
    pub(crate) const TF: u64 = 1 << 8;
    pub(crate) const IF: u64 = 1 << 9;
    pub(crate) const DF: u64 = 1 << 10;
    pub(crate) const OF: u64 = 1 << 11;
    pub(crate) const IOPL: u64 = 3 << 12;
    pub(crate) const NT: u64 = 1 << 14;
    pub(crate) const RF: u64 = 1 << 16;
    pub(crate) const VM: u64 = 1 << 17;
    pub(crate) const AC: u64 = 1 << 18;
    pub(crate) const VIF: u64 = 1 << 19;
    pub(crate) const VIP: u64 = 1 << 20;
    pub(crate) const ID: u64 = 1 << 21;
    /// The six that arithmetic writes: these live in the lazy state.
    pub(crate) const ARITH: u64 = CF | PF | AF | ZF | SF | OF;
}

/// Bits of CR0.
pub(crate) mod cr0 {
    pub(crate) const PE: u64 = 1;
    pub(crate) const MP: u64 = 1 << 1;
    pub(crate) const EM: u64 = 1 << 2;
    pub(crate) const TS: u64 = 1 << 3;
    pub(crate) const ET: u64 = 1 << 4;
    pub(crate) const NE: u64 = 1 << 5;
    pub(crate) const WP: u64 = 1 << 16;
    pub(crate) const AM: u64 = 1 << 18;
    pub(crate) const NW: u64 = 1 << 29;
    pub(crate) const CD: u64 = 1 << 30;
    pub(crate) const PG: u64 = 1 << 31;
}

/// Bits of CR4.
pub(crate) mod cr4 {
    pub(crate) const TSD: u64 = 1 << 2;
    pub(crate) const DE: u64 = 1 << 3;
    pub(crate) const PSE: u64 = 1 << 4;
    pub(crate) const PAE: u64 = 1 << 5;
    pub(crate) const MCE: u64 = 1 << 6;
    pub(crate) const PGE: u64 = 1 << 7;
    pub(crate) const OSFXSR: u64 = 1 << 9;
    pub(crate) const OSXMMEXCPT: u64 = 1 << 10;
}

/// Bits of EFER.
pub(crate) mod efer {
    pub(crate) const SCE: u64 = 1;
    pub(crate) const LME: u64 = 1 << 8;
    pub(crate) const LMA: u64 = 1 << 10;
    pub(crate) const NXE: u64 = 1 << 11;
}

/// Exception vectors.
pub(crate) mod vec {
    pub(crate) const DE: u8 = 0;
    pub(crate) const DB: u8 = 1;
    pub(crate) const NMI: u8 = 2;
    pub(crate) const BP: u8 = 3;
    pub(crate) const OF: u8 = 4;
    pub(crate) const BR: u8 = 5;
    pub(crate) const UD: u8 = 6;
    pub(crate) const NM: u8 = 7;
    pub(crate) const DF: u8 = 8;
    pub(crate) const TS: u8 = 10;
    pub(crate) const NP: u8 = 11;
    pub(crate) const SS: u8 = 12;
    pub(crate) const GP: u8 = 13;
    pub(crate) const PF: u8 = 14;
    pub(crate) const MF: u8 = 16;
    pub(crate) const XM: u8 = 19;
}

/// Why an instruction did not complete. Nothing of it has been committed, and RIP points at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// An exception for the guest. `address` goes to CR2 if the vector is #PF.
    Exception {
        /// The vector, 0 to 31.
        vector: u8,
        /// The error code, for the vectors that have one.
        error: Option<u32>,
        /// The faulting linear address (#PF).
        address: u64,
    },
    /// The guest cannot go on: a triple fault.
    Shutdown {
        /// The vector of the exception that could not be delivered.
        vector: u8,
    },
}

impl Fault {
    /// #UD.
    pub(crate) const UD: Self = Self::Exception { vector: vec::UD, error: None, address: 0 };
    /// #NM.
    pub(crate) const NM: Self = Self::Exception { vector: vec::NM, error: None, address: 0 };
    /// #DE.
    pub(crate) const DE: Self = Self::Exception { vector: vec::DE, error: None, address: 0 };

    /// #GP with this error code (a selector, or 0).
    pub(crate) const fn gp(error: u32) -> Self {
        Self::Exception { vector: vec::GP, error: Some(error), address: 0 }
    }

    /// #SS with this error code.
    pub(crate) const fn ss(error: u32) -> Self {
        Self::Exception { vector: vec::SS, error: Some(error), address: 0 }
    }

    /// #PF.
    pub(crate) const fn pf(address: u64, error: u32) -> Self {
        Self::Exception { vector: vec::PF, error: Some(error), address }
    }

    /// An exception with an error code.
    pub(crate) const fn with_code(vector: u8, error: u32) -> Self {
        Self::Exception { vector, error: Some(error), address: 0 }
    }

    /// An exception without one.
    pub(crate) const fn plain(vector: u8) -> Self {
        Self::Exception { vector, error: None, address: 0 }
    }
}

/// The size of code, and which checks it needs: part of a block's key. Made by [`Cpu::update_mode`].
pub(crate) mod mode {
    /// 16-bit code: CS.D is 0 outside 64-bit mode.
    pub(crate) const CODE16: u32 = 0;
    /// 32-bit code.
    pub(crate) const CODE32: u32 = 1;
    /// 64-bit code.
    pub(crate) const CODE64: u32 = 2;
    /// The two bits of the above.
    pub(crate) const CODE: u32 = 3;
    /// The stack pointer is ESP (SS.B); meaningless in 64-bit code.
    pub(crate) const STACK32: u32 = 4;
    /// 32-bit code and stack in protected mode, where CS, DS, ES and SS are all 4 GiB from 0 on: an address is a linear one.
    pub(crate) const FLAT: u32 = 32;
}

/// One virtual CPU.
#[repr(C)]
pub(crate) struct Cpu {
    /// RAX to R15, then [`ZERO`] and [`RIP`].
    pub(crate) gpr: [u64; 18],
    /// The arithmetic flags.
    pub(crate) lazy: Lazy,
    /// The TLB of the current privilege level, an element of `tlbs`.
    pub(crate) tlb: *mut Tlb,
    /// The block that runs.
    pub(crate) block: *mut crate::block::Block,
    /// The flags that are not arithmetic, and bit 1 set. IF and DF are exact here.
    pub(crate) rflags: u64,
    /// Instructions run; exact between blocks and at faults.
    pub(crate) icount: u64,
    /// The count beyond which no block runs.
    pub(crate) limit: u64,
    /// The count up to which blocks enter the next themselves, without a detour through the dispatch loop. It bounds how deep handlers
    /// nest where the compiler makes no jumps of their tail calls.
    pub(crate) burst: u64,
    /// Why a block's last handler gave no next block: a constant of [`crate::exec`].
    pub(crate) exit: u8,
    /// What the failed memory access or instruction raised, for the dispatch loop.
    pub(crate) fault: Fault,
    /// The address of the instruction that a system handler executes (RIP is already past it).
    pub(crate) start_rip: u64,
    /// The address of the start of the block whose instruction a slow handler executes: what its relative operands are relative to.
    pub(crate) decode_base: u64,
    /// ES, CS, SS, DS, FS, GS. In 64-bit mode the bases of ES, CS, SS and DS are kept as loaded but not used.
    pub(crate) seg: [Segment; 6],
    pub(crate) tr: Segment,
    pub(crate) ldt: Segment,
    pub(crate) gdt: tenon_core::DescriptorTable,
    pub(crate) idt: tenon_core::DescriptorTable,
    pub(crate) cr0: u64,
    pub(crate) cr2: u64,
    pub(crate) cr3: u64,
    pub(crate) cr4: u64,
    pub(crate) efer: u64,
    /// DR0 to DR3, DR6, DR7.
    pub(crate) debug: [u64; 6],
    /// The current privilege level. Kept by whoever loads CS; [`Cpu::update_mode`] follows.
    pub(crate) cpl: u8,
    /// See [`mode`].
    pub(crate) mode: u32,
    /// An interrupt shadow (STI, MOV SS) holds for the next instruction. Set by the instruction, cleared by the dispatch loop.
    pub(crate) shadow: bool,
    /// NMIs are blocked until IRET.
    pub(crate) nmi_masked: bool,
    /// What the vCPU does next.
    pub(crate) activity: tenon_core::Activity,
    /// Set by [`Cpu::update_mode`] and whoever enables interrupts or lowers the task priority: the dispatch loop looks again for a deliverable interrupt.
    pub(crate) recheck: bool,
    /// The x87 and SSE registers.
    pub(crate) fx: tenon_soft_fp::FpState,
    /// Scratch for the instructions on them.
    pub(crate) operands: tenon_soft_fp::Operands,
    /// Model-specific registers that have no field here.
    pub(crate) msrs: Msrs,
    /// This CPU's number and APIC id.
    pub(crate) index: u32,
    /// Its local APIC.
    pub(crate) lapic: Arc<Lapic>,
    /// What other threads tell this vCPU.
    pub(crate) shared: Arc<VcpuShared>,
    /// Memory, buses, clock, the other vCPUs.
    pub(crate) vm: Arc<VmShared>,
    /// Decoded code.
    pub(crate) blocks: BlockCache,
    /// Supervisor's and user's.
    pub(crate) tlbs: [Box<Tlb>; 2],
    /// The page and granules of a store that goes past the TLB, from the look at them until the store is done: see [`Cpu::settle`].
    pub(crate) unsettled: Option<(usize, u64)>,
    /// The instruction count that a virtual clock has seen.
    pub(crate) synced: u64,
}
