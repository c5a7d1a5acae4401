//! Handlers of the instructions that `tenon-soft-fp` executes.
#![allow(unsafe_code, reason = "ops are reached by raw pointer")]
#![allow(clippy::cast_possible_truncation, reason = "operands are cut to their size")]

use iced_x86::Instruction;
use tenon_soft_fp::{Flags, FpFault, FpOp, Gpr, Kind, Mem};

use super::{fault, next};
use crate::block::{Block, Op};
use crate::cpu::{Cpu, Fault, RDI, RIP, cr0, cr4, vec};
use crate::operand::data_segment;

/// An instruction as the floating-point crate and the engine know it.
#[derive(Clone, Copy)]
pub(crate) struct Fp {
    pub(crate) op: FpOp,
    pub(crate) insn: Instruction,
}

/// Executes one.
pub(crate) unsafe fn fp(cpu: &mut Cpu, op: *const Op) -> *mut Block {
    cpu.decode_base = cpu.gpr[RIP];
    // SAFETY: `imm` points into the arena.
    let fp = unsafe { &*std::ptr::with_exposed_provenance::<Fp>((*op).imm as usize) };
    match execute(cpu, fp) {
        Ok(()) => next!(cpu, op),
        Err(raised) => {
            cpu.fault = raised;
            // SAFETY: the caller's.
            unsafe { fault(cpu, op) }
        }
    }
}

/// The checks of the control registers.
#[inline]
pub(crate) fn allowed(cpu: &Cpu, kind: Kind) -> Result<(), Fault> {
    let ts = cpu.cr0 & cr0::TS != 0;
    let em = cpu.cr0 & cr0::EM != 0;
    match kind {
        Kind::Plain => Ok(()),
        Kind::X87 | Kind::Fx if em || ts => Err(Fault::NM),
        Kind::Wait if cpu.cr0 & cr0::MP != 0 && ts => Err(Fault::NM),
        Kind::Mmx if em => Err(Fault::UD),
        Kind::Sse if em || cpu.cr4 & cr4::OSFXSR == 0 => Err(Fault::UD),
        Kind::Mmx | Kind::Sse if ts => Err(Fault::NM),
        _ => Ok(()),
    }
}

fn execute(cpu: &mut Cpu, fp: &Fp) -> Result<(), Fault> {
    let (op, insn) = (&fp.op, &fp.insn);
    allowed(cpu, op.kind)?;
    if op.waits && cpu.fx.pending() {
        return Err(Fault::plain(vec::MF));
    }
    let (length, reads, writes) = match op.mem {
        Mem::None => (0, false, false),
        Mem::Read(n) => (n, true, false),
        Mem::Write(n) | Mem::Masked(n) => (n, false, true),
        Mem::ReadWrite(n) => (n, true, true),
    };
    let mut linear = 0;
    if length != 0 {
        let size = u64::from(length);
        linear = if op.at_di {
            let segment = data_segment(insn);
            let width = insn.op_kind(0);
            let di = match width {
                iced_x86::OpKind::MemorySegDI => cpu.gpr[RDI] & 0xffff,
                iced_x86::OpKind::MemorySegEDI => cpu.gpr[RDI] & 0xffff_ffff,
                _ => cpu.gpr[RDI],
            };
            cpu.segment_linear(segment, di, size, true)?
        } else {
            // Alignment is looked at before the address.
            let misaligned = op.align > 1 && cpu.offset(insn) & (u64::from(op.align) - 1) != 0;
            cpu.operand_linear(insn, size, writes)
                .map_err(|fault| if misaligned { Fault::gp(0) } else { fault })?
        };
        if linear & (u64::from(op.align) - 1) != 0 {
            return Err(Fault::gp(0));
        }
        if writes {
            let user = cpu.cpl == 3;
            cpu.probe_write_as(linear, size, user)?;
        }
        if reads {
            read(cpu, linear, length)?;
        }
    }
    cpu.operands.dst = op.dst;
    cpu.operands.src = op.src;
    cpu.operands.imm = op.imm;
    if let Gpr::In(register) = op.gpr {
        cpu.operands.gpr = cpu.reg(register);
    }
    if op.flags != Flags::None {
        cpu.operands.flags = cpu.flags();
    }
    let stored = match (op.run)(&mut cpu.fx, &mut cpu.operands) {
        Ok(()) => true,
        Err(FpFault::Unstored) => false,
        Err(FpFault::Mf) => return Err(Fault::plain(vec::MF)),
        Err(FpFault::Xm) if cpu.cr4 & cr4::OSXMMEXCPT != 0 => return Err(Fault::plain(vec::XM)),
        Err(FpFault::Xm | FpFault::Ud) => return Err(Fault::UD),
        Err(FpFault::Gp) => return Err(Fault::gp(0)),
    };
    if let Mem::Masked(n) = op.mem {
        for byte in 0..u64::from(n) {
            if cpu.operands.gpr >> byte & 1 != 0 {
                let value = cpu.operands.mem[byte as usize];
                cpu.write::<u8>(linear.wrapping_add(byte), value)?;
            }
        }
    } else if writes && stored {
        write_back(cpu, linear, length)?;
    }
    if let Gpr::Out(register) = op.gpr {
        cpu.set_reg(register, cpu.operands.gpr);
    }
    if op.flags == Flags::Out {
        cpu.set_arith(cpu.operands.flags);
    }
    Ok(())
}

/// Reads the memory operand into the scratch.
fn read(cpu: &mut Cpu, linear: u64, length: u16) -> Result<(), Fault> {
    match length {
        4 => {
            let value = cpu.read::<u32>(linear)?;
            cpu.operands.mem[..4].copy_from_slice(&value.to_le_bytes());
        }
        8 | 16 => {
            let low = cpu.read::<u64>(linear)?;
            cpu.operands.mem[..8].copy_from_slice(&low.to_le_bytes());
            if length == 16 {
                let high = cpu.read::<u64>(linear.wrapping_add(8))?;
                cpu.operands.mem[8..16].copy_from_slice(&high.to_le_bytes());
            }
        }
        _ => {
            let mut bytes = [0; 512];
            let bytes = &mut bytes[..usize::from(length)];
            cpu.read_bytes(linear, bytes)?;
            cpu.operands.mem[..bytes.len()].copy_from_slice(bytes);
        }
    }
    Ok(())
}

/// Writes the scratch to the memory operand, which has been probed.
fn write_back(cpu: &mut Cpu, linear: u64, length: u16) -> Result<(), Fault> {
    let mem = &cpu.operands.mem;
    let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|n| mem[at + n]));
    let (low, high) = (word(0), word(8));
    match length {
        4 => cpu.write::<u32>(linear, low as u32),
        8 => cpu.write::<u64>(linear, low),
        16 => {
            cpu.write::<u64>(linear, low)?;
            cpu.write::<u64>(linear.wrapping_add(8), high)
        }
        _ => {
            let mem = cpu.operands.mem;
            cpu.write_bytes(linear, &mem[..usize::from(length)])
        }
    }
}
