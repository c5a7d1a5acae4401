//! Registers and operands by name, for the instructions that are executed from their decoded form.
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "operands are cut to their size")]

use iced_x86::{Instruction, OpKind, Register};

use crate::cpu::{CS, Cpu, Fault, RIP, RSP, SS, mode};
use crate::mem::{Trap, Word};

/// Runs an expression with a type of the size given as log2 of bytes.
macro_rules! by_size {
    ($log2:expr, $t:ident => $body:expr) => {
        match $log2 {
            0 => {
                type $t = u8;
                $body
            }
            1 => {
                type $t = u16;
                $body
            }
            2 => {
                type $t = u32;
                $body
            }
            _ => {
                type $t = u64;
                $body
            }
        }
    };
}
pub(crate) use by_size;

/// The bits of a word of this size.
pub(crate) fn mask(log2: u32) -> u64 {
    u64::MAX >> (64 - (8 << log2))
}

/// The index of a segment register.
pub(crate) fn segment_index(register: Register) -> usize {
    (register as usize).wrapping_sub(Register::ES as usize)
}

/// The segment that an instruction's memory operand is in. In 64-bit code the prefixes for ES, CS, SS and DS are ignored
/// (AMD APM vol. 3 §1.2.4), also for which exception a non-canonical address raises.
pub(crate) fn data_segment(insn: &Instruction) -> usize {
    use crate::cpu::{DS, FS, SS};
    let named = segment_index(insn.memory_segment());
    if insn.code_size() != iced_x86::CodeSize::Code64 || named >= FS {
        return named;
    }
    match insn.memory_base() {
        Register::RSP | Register::ESP | Register::RBP | Register::EBP => SS,
        _ => DS,
    }
}

/// Where a general-purpose register lies: its index, log2 of its size, and whether it is AH, CH, DH or BH.
pub(crate) fn locate(register: Register) -> Option<(usize, u32, bool)> {
    let n = register as usize;
    let of = |first: Register| n.wrapping_sub(first as usize);
    if of(Register::AL) < 20 {
        let n = of(Register::AL);
        return Some(match n {
            0..=3 => (n, 0, false),
            4..=7 => (n - 4, 0, true),
            _ => (n - 4, 0, false),
        });
    }
    for (first, log2) in [(Register::AX, 1), (Register::EAX, 2), (Register::RAX, 3)] {
        if of(first) < 16 {
            return Some((of(first), log2, false));
        }
    }
    None
}

impl Cpu {
    /// A general-purpose or segment register, zero-extended.
    pub(crate) fn reg(&self, register: Register) -> u64 {
        match locate(register) {
            Some((n, _, true)) => self.gpr[n] >> 8 & 0xff,
            Some((n, log2, false)) => self.gpr[n] & mask(log2),
            None => self.seg.get(segment_index(register)).map_or(0, |s| s.selector.into()),
        }
    }

    /// Sets a general-purpose register: 8- and 16-bit ones keep the rest, 32-bit ones clear the upper half.
    pub(crate) fn set_reg(&mut self, register: Register, value: u64) {
        match locate(register) {
            Some((n, _, true)) => self.gpr[n] = self.gpr[n] & !0xff00 | (value & 0xff) << 8,
            Some((n, log2, false)) => self.set_sized(n, log2, value),
            None => {}
        }
    }

    /// Sets the part of a register that has this size.
    pub(crate) fn set_sized(&mut self, n: usize, log2: u32, value: u64) {
        self.gpr[n] = match log2 {
            0 | 1 => self.gpr[n] & !mask(log2) | value & mask(log2),
            2 => value & 0xffff_ffff,
            _ => value,
        };
    }

    /// The offset of an instruction's memory operand in its segment.
    pub(crate) fn offset(&self, insn: &Instruction) -> u64 {
        let base = insn.memory_base();
        let index = insn.memory_index();
        let width = if base != Register::None {
            base.size()
        } else if index != Register::None {
            index.size()
        } else {
            insn.memory_displ_size() as usize
        };
        let mut offset = insn.memory_displacement64();
        match base {
            Register::None => {}
            Register::RIP | Register::EIP => offset = offset.wrapping_add(self.decode_base),
            _ => offset = offset.wrapping_add(self.reg(base)),
        }
        if index != Register::None {
            offset = offset.wrapping_add(self.reg(index).wrapping_mul(insn.memory_index_scale().into()));
        }
        match width {
            2 => offset & 0xffff,
            4 => offset & 0xffff_ffff,
            _ => offset,
        }
    }

    /// The linear address of an instruction's memory operand, of which `size` bytes are accessed, checked.
    pub(crate) fn operand_linear(
        &mut self,
        insn: &Instruction,
        size: u64,
        write: bool,
    ) -> Result<u64, Fault> {
        let offset = self.offset(insn);
        self.segment_linear(data_segment(insn), offset, size, write)
    }

    /// Reads a word of the size given as log2.
    pub(crate) fn read_sized(&mut self, linear: u64, log2: u32) -> Result<u64, Fault> {
        by_size!(log2, T => self.read::<T>(linear).map(Word::to_u64))
    }

    /// Writes a word of the size given as log2.
    pub(crate) fn write_sized(&mut self, linear: u64, log2: u32, value: u64) -> Result<(), Fault> {
        by_size!(log2, T => self.write::<T>(linear, T::from_u64(value)))
    }

    /// An operand's value, zero-extended; immediates are sign-extended to 64 bits as encoded.
    pub(crate) fn get(&mut self, insn: &Instruction, i: u32) -> Result<u64, Fault> {
        match insn.op_kind(i) {
            OpKind::Register => Ok(self.reg(insn.op_register(i))),
            OpKind::Memory => {
                let log2 = size_of_operand(insn, i);
                let linear = self.operand_linear(insn, 1 << log2, false)?;
                self.read_sized(linear, log2)
            }
            _ => Ok(insn.try_immediate(i).unwrap_or(0)),
        }
    }

    /// Sets an operand.
    pub(crate) fn set(&mut self, insn: &Instruction, i: u32, value: u64) -> Result<(), Fault> {
        if insn.op_kind(i) == OpKind::Register {
            self.set_reg(insn.op_register(i), value);
            return Ok(());
        }
        let log2 = size_of_operand(insn, i);
        let linear = self.operand_linear(insn, 1 << log2, true)?;
        self.write_sized(linear, log2, value)
    }

    /// A 16-bit operand: a selector.
    pub(crate) fn operand16(&mut self, insn: &Instruction, i: u32) -> Result<u16, Fault> {
        if insn.op_kind(i) == OpKind::Register {
            return Ok(self.reg(insn.op_register(i)) as u16);
        }
        let linear = self.operand_linear(insn, 2, false)?;
        self.read::<u16>(linear)
    }

    /// Replaces operand `i` by what `f` makes of it (zero-extended); `f` also gives what the caller keeps. Atomic with LOCK.
    pub(crate) fn modify<R>(
        &mut self,
        insn: &Instruction,
        i: u32,
        lock: bool,
        f: impl Fn(u64) -> (u64, R),
    ) -> Result<R, Fault> {
        let log2 = size_of_operand(insn, i);
        if insn.op_kind(i) == OpKind::Register {
            let register = insn.op_register(i);
            let (new, keep) = f(self.reg(register));
            self.set_reg(register, new);
            return Ok(keep);
        }
        let linear = self.operand_linear(insn, 1 << log2, true)?;
        self.modify_at(linear, log2, lock, f)
    }

    /// [`Cpu::modify`] at a linear address.
    pub(crate) fn modify_at<R>(
        &mut self,
        linear: u64,
        log2: u32,
        lock: bool,
        f: impl Fn(u64) -> (u64, R),
    ) -> Result<R, Fault> {
        if lock {
            return by_size!(log2, T => self.update_locked::<T, R>(linear, |old| {
                let (new, keep) = f(old.to_u64());
                (T::from_u64(new), keep)
            }))
            .map_err(|Trap| self.fault);
        }
        let mut kept = None;
        by_size!(log2, T => self.update::<T>(linear, |_, old| {
            let (new, keep) = f(old.to_u64());
            kept = Some(keep);
            T::from_u64(new)
        }))
        .map_err(|Trap| self.fault)?;
        kept.ok_or(self.fault)
    }

    /// The mask of the stack pointer.
    pub(crate) fn stack_mask(&self) -> u64 {
        if self.mode & mode::CODE == mode::CODE64 {
            u64::MAX
        } else if self.mode & mode::STACK32 != 0 {
            0xffff_ffff
        } else {
            0xffff
        }
    }

    /// Sets the stack pointer as wide as the stack is.
    pub(crate) fn set_sp(&mut self, value: u64) {
        let mask = self.stack_mask();
        self.gpr[RSP] = if mask == 0xffff { self.gpr[RSP] & !mask | value & mask } else { value & mask };
    }

    /// Pushes a word of `size` bytes.
    pub(crate) fn push(&mut self, size: u64, value: u64) -> Result<(), Fault> {
        let sp = self.gpr[RSP].wrapping_sub(size) & self.stack_mask();
        let linear = self.segment_linear(SS, sp, size, true)?;
        self.write_sized(linear, size.ilog2(), value)?;
        self.set_sp(sp);
        Ok(())
    }

    /// Reads the word that is `depth` bytes up the stack.
    pub(crate) fn peek(&mut self, size: u64, depth: u64) -> Result<u64, Fault> {
        let sp = self.gpr[RSP].wrapping_add(depth) & self.stack_mask();
        let linear = self.segment_linear(SS, sp, size, false)?;
        self.read_sized(linear, size.ilog2())
    }

    /// Pops a word.
    pub(crate) fn pop(&mut self, size: u64) -> Result<u64, Fault> {
        let value = self.peek(size, 0)?;
        self.set_sp(self.gpr[RSP].wrapping_add(size));
        Ok(value)
    }

    /// Jumps to an offset in CS, which must be inside its limit or canonical.
    pub(crate) fn jump(&mut self, target: u64) -> Result<(), Fault> {
        if self.mode & mode::CODE == mode::CODE64 {
            if ((target << 16).cast_signed() >> 16).cast_unsigned() != target {
                return Err(Fault::gp(0));
            }
        } else if target > u64::from(self.seg[CS].limit) {
            return Err(Fault::gp(0));
        }
        self.gpr[RIP] = target;
        Ok(())
    }

    /// The target of a near branch.
    pub(crate) fn branch_target(&self, insn: &Instruction) -> u64 {
        let target = self.decode_base.wrapping_add(insn.near_branch_target());
        match insn.op0_kind() {
            OpKind::NearBranch16 => target & 0xffff,
            OpKind::NearBranch32 => target & 0xffff_ffff,
            _ => target,
        }
    }
}

/// log2 of the size of an operand: the register's or memory's, and for an immediate that of operand 0.
pub(crate) fn size_of_operand(insn: &Instruction, i: u32) -> u32 {
    let size = match insn.op_kind(i) {
        OpKind::Register => insn.op_register(i).size(),
        OpKind::Memory => insn.memory_size().size(),
        _ if i != 0 => return size_of_operand(insn, 0),
        _ => 8,
    };
    size.max(1).ilog2()
}
