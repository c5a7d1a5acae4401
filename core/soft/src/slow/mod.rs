//! Every integer instruction, in every mode, executed from its decoded form.
//!
//! This is the whole instruction set, written to be right and plain; [`crate::ops`] has fast handlers for what 64-bit code does most.
//! [`execute`] leaves RIP alone, [`execute_last`] is for those that end a block: RIP is past the instruction when it is called.
//!
//! Long, for it is one list: every instruction that has no fast handler, by mnemonic.
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_possible_wrap,
    reason = "operands are cut to their size"
)]

pub(crate) mod alu;
mod control;
mod decimal;

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

pub(crate) use control::{check_port, execute_last};

use crate::cpu::{Cpu, Fault, RAX, RCX, RDX, RSP, fl};
use crate::flags::{Lazy, kind};
use crate::operand::{locate, mask, size_of_operand};
use alu::{Alu, Shift};

fn alu_of(mnemonic: Mnemonic) -> Option<Alu> {
    Some(match mnemonic {
        Mnemonic::Add => Alu::Add,
        Mnemonic::Or => Alu::Or,
        Mnemonic::Adc => Alu::Adc,
        Mnemonic::Sbb => Alu::Sbb,
        Mnemonic::And => Alu::And,
        Mnemonic::Sub => Alu::Sub,
        Mnemonic::Xor => Alu::Xor,
        _ => return None,
    })
}

fn shift_of(mnemonic: Mnemonic) -> Option<Shift> {
    Some(match mnemonic {
        Mnemonic::Rol => Shift::Rol,
        Mnemonic::Ror => Shift::Ror,
        Mnemonic::Rcl => Shift::Rcl,
        Mnemonic::Rcr => Shift::Rcr,
        Mnemonic::Shl | Mnemonic::Sal => Shift::Shl,
        Mnemonic::Shr => Shift::Shr,
        Mnemonic::Sar => Shift::Sar,
        _ => return None,
    })
}

/// The number of the condition in the encoding, for CMOVcc, SETcc and Jcc.
pub(crate) fn condition_of(insn: &Instruction) -> Option<u8> {
    use iced_x86::ConditionCode as C;
    Some(match insn.condition_code() {
        C::None => return None,
        C::o => 0,
        C::no => 1,
        C::b => 2,
        C::ae => 3,
        C::e => 4,
        C::ne => 5,
        C::be => 6,
        C::a => 7,
        C::s => 8,
        C::ns => 9,
        C::p => 10,
        C::np => 11,
        C::l => 12,
        C::ge => 13,
        C::le => 14,
        C::g => 15,
    })
}

/// Executes an instruction that does not end its block.
pub(crate) fn execute(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Fault> {
    use Mnemonic as M;
    let mnemonic = insn.mnemonic();
    if let Some(op) = alu_of(mnemonic) {
        return binary(cpu, insn, op);
    }
    if let Some(op) = shift_of(mnemonic) {
        return shift(cpu, insn, op);
    }
    match mnemonic {
        M::Mov => mov(cpu, insn),
        M::Movzx => {
            let value = cpu.get(insn, 1)?;
            cpu.set(insn, 0, value)
        }
        M::Movsx | M::Movsxd => {
            let value = cpu.get(insn, 1)?;
            cpu.set(insn, 0, crate::flags::sign_extend(value, size_of_operand(insn, 1)))
        }
        M::Lea => {
            let offset = cpu.offset(insn);
            cpu.set(insn, 0, offset)
        }
        M::Cmp => {
            let (a, b) = (cpu.get(insn, 0)?, cpu.get(insn, 1)?);
            cpu.lazy = alu::binary(Alu::Sub, size_of_operand(insn, 0), a, b, false).1;
            Ok(())
        }
        M::Test => {
            let (a, b) = (cpu.get(insn, 0)?, cpu.get(insn, 1)?);
            cpu.lazy = alu::binary(Alu::And, size_of_operand(insn, 0), a, b, false).1;
            Ok(())
        }
        M::Inc | M::Dec => {
            let (log2, carry) = (size_of_operand(insn, 0), cpu.lazy.cf());
            let up = mnemonic == M::Inc;
            cpu.lazy = cpu.modify(insn, 0, insn.has_lock_prefix(), |a| alu::step(up, log2, a, carry))?;
            Ok(())
        }
        M::Neg => {
            let log2 = size_of_operand(insn, 0);
            cpu.lazy = cpu.modify(insn, 0, insn.has_lock_prefix(), |a| alu::negate(log2, a))?;
            Ok(())
        }
        M::Not => cpu.modify(insn, 0, insn.has_lock_prefix(), |a| (!a, ())),
        M::Shld | M::Shrd => {
            let (log2, b) = (size_of_operand(insn, 0), cpu.get(insn, 1)?);
            let count = cpu.get(insn, 2)?;
            let lazy =
                cpu.modify(insn, 0, false, |a| alu::double_shift(mnemonic == M::Shld, log2, a, b, count))?;
            cpu.lazy = lazy.unwrap_or(cpu.lazy);
            Ok(())
        }
        M::Mul | M::Imul => multiply(cpu, insn),
        M::Div | M::Idiv => divide(cpu, insn),
        M::Xchg => {
            if insn.op1_kind() == OpKind::Memory {
                let register = insn.op0_register();
                let value = cpu.reg(register);
                let old = cpu.modify(insn, 1, true, |old| (value, old))?;
                cpu.set_reg(register, old);
                return Ok(());
            }
            let register = insn.op1_register();
            let value = cpu.reg(register);
            let old = cpu.modify(insn, 0, insn.op0_kind() == OpKind::Memory, |old| (value, old))?;
            cpu.set_reg(register, old);
            Ok(())
        }
        M::Xadd => {
            let log2 = size_of_operand(insn, 0);
            let register = insn.op1_register();
            let value = cpu.reg(register);
            let (lazy, old) = cpu.modify(insn, 0, insn.has_lock_prefix(), |old| {
                let (new, lazy) = alu::binary(Alu::Add, log2, old, value, false);
                (new, (lazy, old))
            })?;
            cpu.lazy = lazy;
            // With the same register twice the sum stays (Intel SDM vol. 2, XADD).
            if insn.op0_kind() == OpKind::Memory || insn.op0_register() != register {
                cpu.set_reg(register, old);
            }
            Ok(())
        }
        M::Cmpxchg => {
            let log2 = size_of_operand(insn, 0);
            let new = cpu.reg(insn.op1_register());
            let expected = cpu.gpr[RAX] & mask(log2);
            // A comparison that fails writes too: what was there. (On AMD not to a register, of which 32 bits would clear the rest.)
            if insn.op0_kind() == OpKind::Register && cpu.reg(insn.op0_register()) != expected {
                let old = cpu.reg(insn.op0_register());
                cpu.lazy = alu::binary(Alu::Sub, log2, expected, old, false).1;
                cpu.set_sized(RAX, log2, old);
                return Ok(());
            }
            let old = cpu.modify(insn, 0, insn.has_lock_prefix(), |old| {
                (if old == expected { new } else { old }, old)
            })?;
            cpu.lazy = alu::binary(Alu::Sub, log2, expected, old, false).1;
            if old != expected {
                cpu.set_sized(RAX, log2, old);
            }
            Ok(())
        }
        M::Cmpxchg8b => {
            let linear = cpu.operand_linear(insn, 8, true)?;
            let expected = cpu.gpr[RDX] << 32 | cpu.gpr[RAX] & 0xffff_ffff;
            let new = cpu.gpr[RCX] << 32 | cpu.gpr[crate::cpu::RBX] & 0xffff_ffff;
            let old = cpu.modify_at(linear, 3, insn.has_lock_prefix(), |old| {
                (if old == expected { new } else { old }, old)
            })?;
            let flags = cpu.lazy.flags() & !fl::ZF;
            cpu.set_arith(if old == expected { flags | fl::ZF } else { flags });
            if old != expected {
                cpu.gpr[RAX] = old & 0xffff_ffff;
                cpu.gpr[RDX] = old >> 32;
            }
            Ok(())
        }
        M::Bswap => {
            let register = insn.op0_register();
            let value = cpu.reg(register);
            let swapped = match register.size() {
                8 => value.swap_bytes(),
                4 => (value as u32).swap_bytes().into(),
                // Undefined; processors give zero.
                _ => 0,
            };
            cpu.set_reg(register, swapped);
            Ok(())
        }
        M::Bt | M::Bts | M::Btr | M::Btc => bit_test(cpu, insn),
        M::Bsf | M::Bsr => {
            let log2 = size_of_operand(insn, 1);
            let value = cpu.get(insn, 1)?;
            cpu.lazy =
                Lazy { dst: crate::flags::sign_extend(value, log2), src: 0, op: kind::LOGIC | log2 << 8 };
            if value != 0 {
                let n = if mnemonic == M::Bsf { value.trailing_zeros() } else { value.ilog2() };
                cpu.set(insn, 0, n.into())?;
            }
            Ok(())
        }
        M::Push => push(cpu, insn),
        M::Pop => pop(cpu, insn),
        M::Pushf | M::Pushfd | M::Pushfq => {
            if cpu.rflags & fl::VM != 0 && cpu.rflags & fl::IOPL != fl::IOPL {
                return Err(Fault::gp(0));
            }
            let flags = cpu.flags() & !(fl::VM | fl::RF);
            cpu.push((-insn.stack_pointer_increment()) as u64, flags)
        }
        M::Pusha | M::Pushad => {
            let size = if mnemonic == M::Pusha { 2 } else { 4 };
            let sp = cpu.gpr[RSP];
            for n in 0..8 {
                if let Err(fault) = cpu.push(size, if n == RSP { sp } else { cpu.gpr[n] }) {
                    cpu.gpr[RSP] = sp;
                    return Err(fault);
                }
            }
            Ok(())
        }
        M::Popa | M::Popad => {
            let size = if mnemonic == M::Popa { 2u64 } else { 4 };
            let mut values = [0; 8];
            for (n, value) in (0..).zip(&mut values) {
                *value = cpu.peek(size, n * size)?;
            }
            for n in 0..8 {
                if n != RSP {
                    cpu.set_sized(n, size.ilog2(), values[7 - n]);
                }
            }
            cpu.set_sp(cpu.gpr[RSP].wrapping_add(8 * size));
            Ok(())
        }
        M::Enter => enter(cpu, insn),
        M::Leave => {
            let size = insn.stack_pointer_increment();
            let size = match size {
                0 if insn.code() == iced_x86::Code::Leaveq => 8,
                0 if insn.code() == iced_x86::Code::Leaved => 4,
                0 => 2,
                n => n as u64,
            };
            let before = cpu.gpr[RSP];
            cpu.set_sp(cpu.gpr[crate::cpu::RBP]);
            match cpu.pop(size) {
                Ok(value) => {
                    cpu.set_sized(crate::cpu::RBP, size.ilog2(), value);
                    Ok(())
                }
                Err(fault) => {
                    cpu.gpr[RSP] = before;
                    Err(fault)
                }
            }
        }
        M::Cbw => widen(cpu, RAX, 0, 1),
        M::Cwde => widen(cpu, RAX, 1, 2),
        M::Cdqe => widen(cpu, RAX, 2, 3),
        M::Cwd => spread(cpu, 1),
        M::Cdq => spread(cpu, 2),
        M::Cqo => spread(cpu, 3),
        M::Lahf => {
            let flags = cpu.lazy.flags() & 0xd5 | 2;
            cpu.gpr[RAX] = cpu.gpr[RAX] & !0xff00 | flags << 8;
            Ok(())
        }
        M::Sahf => {
            let flags = cpu.lazy.flags() & fl::OF | cpu.gpr[RAX] >> 8 & 0xd5;
            cpu.set_arith(flags);
            Ok(())
        }
        M::Clc => set_carry(cpu, |_| false),
        M::Stc => set_carry(cpu, |_| true),
        M::Cmc => set_carry(cpu, |carry| !carry),
        M::Cld => {
            cpu.rflags &= !fl::DF;
            Ok(())
        }
        M::Std => {
            cpu.rflags |= fl::DF;
            Ok(())
        }
        M::Xlatb => {
            let linear = cpu.operand_linear(insn, 1, false)?;
            let value = cpu.read::<u8>(linear)?;
            cpu.set_sized(RAX, 0, value.into());
            Ok(())
        }
        M::Salc => {
            let value = if cpu.lazy.cf() { 0xff } else { 0 };
            cpu.set_sized(RAX, 0, value);
            Ok(())
        }
        M::Bound => {
            let log2 = size_of_operand_register(insn);
            let linear = cpu.operand_linear(insn, 2 << log2, false)?;
            let low = cpu.read_sized(linear, log2)?;
            let high = cpu.read_sized(linear + (1 << log2), log2)?;
            let sx = |v| crate::flags::sign_extend(v, log2) as i64;
            let index = sx(cpu.reg(insn.op0_register()));
            if index < sx(low) || index > sx(high) { Err(Fault::plain(crate::cpu::vec::BR)) } else { Ok(()) }
        }
        M::Aaa | M::Aas | M::Aad | M::Aam | M::Daa | M::Das => decimal::execute(cpu, insn),
        M::Lfence | M::Sfence => Ok(()),
        M::Mfence => {
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
            Ok(())
        }
        M::Clflush => {
            let linear = cpu.operand_linear(insn, 1, false)?;
            cpu.read::<u8>(linear).map(|_| ())
        }
        _ => {
            if let Some(condition) = condition_of(insn) {
                return conditional(cpu, insn, condition);
            }
            Ok(())
        }
    }
}

fn size_of_operand_register(insn: &Instruction) -> u32 {
    insn.op0_register().size().ilog2()
}

/// Whether [`execute`] knows the instruction.
pub(crate) fn knows(insn: &Instruction) -> bool {
    use Mnemonic as M;
    let mnemonic = insn.mnemonic();
    alu_of(mnemonic).is_some()
        || shift_of(mnemonic).is_some()
        || matches!(
            mnemonic,
            M::Mov
                | M::Movzx
                | M::Movsx
                | M::Movsxd
                | M::Lea
                | M::Cmp
                | M::Test
                | M::Inc
                | M::Dec
                | M::Neg
                | M::Not
                | M::Shld
                | M::Shrd
                | M::Mul
                | M::Imul
                | M::Div
                | M::Idiv
                | M::Xchg
                | M::Xadd
                | M::Cmpxchg
                | M::Cmpxchg8b
                | M::Bswap
                | M::Bt
                | M::Bts
                | M::Btr
                | M::Btc
                | M::Bsf
                | M::Bsr
                | M::Push
                | M::Pop
                | M::Pushf
                | M::Pushfd
                | M::Pushfq
                | M::Pusha
                | M::Pushad
                | M::Popa
                | M::Popad
                | M::Enter
                | M::Leave
                | M::Cbw
                | M::Cwde
                | M::Cdqe
                | M::Cwd
                | M::Cdq
                | M::Cqo
                | M::Lahf
                | M::Sahf
                | M::Clc
                | M::Stc
                | M::Cmc
                | M::Cld
                | M::Std
                | M::Xlatb
                | M::Salc
                | M::Bound
                | M::Aaa
                | M::Aas
                | M::Aad
                | M::Aam
                | M::Daa
                | M::Das
                | M::Lfence
                | M::Sfence
                | M::Mfence
                | M::Clflush
                | M::Nop
                | M::Prefetchw
                | M::Prefetch
                | M::Prefetchnta
                | M::Prefetcht0
                | M::Prefetcht1
                | M::Prefetcht2
                | M::Endbr64
                | M::Endbr32
                | M::Reservednop
        )
        || is_cmov_or_set(insn)
}

fn is_cmov_or_set(insn: &Instruction) -> bool {
    let code = insn.code();
    condition_of(insn).is_some()
        && !code.is_jcc_short_or_near()
        && !code.is_loop()
        && !code.is_loopcc()
        && !matches!(
            insn.mnemonic(),
            Mnemonic::Fcmovb
                | Mnemonic::Fcmove
                | Mnemonic::Fcmovbe
                | Mnemonic::Fcmovu
                | Mnemonic::Fcmovnb
                | Mnemonic::Fcmovne
                | Mnemonic::Fcmovnbe
                | Mnemonic::Fcmovnu
        )
}

fn conditional(cpu: &mut Cpu, insn: &Instruction, condition: u8) -> Result<(), Fault> {
    let yes = cpu.lazy.condition(condition);
    if insn.op_count() == 1 {
        return cpu.set(insn, 0, yes.into());
    }
    // CMOVcc reads its source in any case, and a 32-bit one clears the upper half in any case.
    let value = cpu.get(insn, 1)?;
    let register = insn.op0_register();
    let value = if yes { value } else { cpu.reg(register) };
    cpu.set_reg(register, value);
    Ok(())
}

fn binary(cpu: &mut Cpu, insn: &Instruction, op: Alu) -> Result<(), Fault> {
    let log2 = size_of_operand(insn, 0);
    let b = cpu.get(insn, 1)?;
    let carry = matches!(op, Alu::Adc | Alu::Sbb) && cpu.lazy.cf();
    cpu.lazy = cpu.modify(insn, 0, insn.has_lock_prefix(), |a| alu::binary(op, log2, a, b, carry))?;
    Ok(())
}

fn shift(cpu: &mut Cpu, insn: &Instruction, op: Shift) -> Result<(), Fault> {
    let log2 = size_of_operand(insn, 0);
    let count = cpu.get(insn, 1)? & 0xff;
    let before = cpu.lazy;
    let lazy = cpu.modify(insn, 0, false, |a| alu::shift(op, log2, a, count, before))?;
    cpu.lazy = lazy.unwrap_or(before);
    Ok(())
}

fn mov(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Fault> {
    if insn.op1_kind() == OpKind::Register && insn.op1_register().is_segment_register() {
        let selector = cpu.reg(insn.op1_register());
        if insn.op0_kind() == OpKind::Register {
            cpu.set_reg(insn.op0_register(), selector);
            return Ok(());
        }
        let linear = cpu.operand_linear(insn, 2, true)?;
        return cpu.write::<u16>(linear, selector as u16);
    }
    let value = cpu.get(insn, 1)?;
    cpu.set(insn, 0, value)
}

fn multiply(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Fault> {
    let signed = insn.mnemonic() == Mnemonic::Imul;
    let log2 = size_of_operand(insn, 0);
    let (a, b, one) = match insn.op_count() {
        1 => (cpu.gpr[RAX], cpu.get(insn, 0)?, true),
        2 => (cpu.get(insn, 0)?, cpu.get(insn, 1)?, false),
        _ => (cpu.get(insn, 1)?, cpu.get(insn, 2)?, false),
    };
    let (low, high, lazy) = alu::multiply(signed, log2, a, b);
    if !one {
        cpu.set_reg(insn.op0_register(), low);
    } else if log2 == 0 {
        cpu.set_sized(RAX, 1, high << 8 | low);
    } else {
        cpu.set_sized(RAX, log2, low);
        cpu.set_sized(RDX, log2, high);
    }
    cpu.lazy = lazy;
    Ok(())
}

fn divide(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Fault> {
    let signed = insn.mnemonic() == Mnemonic::Idiv;
    let log2 = size_of_operand(insn, 0);
    let b = cpu.get(insn, 0)?;
    let high = if log2 == 0 { cpu.gpr[RAX] >> 8 } else { cpu.gpr[RDX] };
    let (quotient, remainder) = alu::divide(signed, log2, cpu.gpr[RAX], high, b).ok_or(Fault::DE)?;
    if log2 == 0 {
        cpu.set_sized(RAX, 1, remainder << 8 | quotient);
    } else {
        cpu.set_sized(RAX, log2, quotient);
        cpu.set_sized(RDX, log2, remainder);
    }
    Ok(())
}

fn bit_test(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Fault> {
    let log2 = size_of_operand(insn, 0);
    let bits = 8u64 << log2;
    let number = cpu.get(insn, 1)?;
    let change = |old: u64| {
        let bit = 1 << (number & (bits - 1));
        let new = match insn.mnemonic() {
            Mnemonic::Bts => old | bit,
            Mnemonic::Btr => old & !bit,
            Mnemonic::Btc => old ^ bit,
            _ => old,
        };
        (new, old & bit != 0)
    };
    let carry = if insn.op0_kind() == OpKind::Register {
        let (new, carry) = change(cpu.reg(insn.op0_register()));
        if insn.mnemonic() != Mnemonic::Bt {
            cpu.set_reg(insn.op0_register(), new);
        }
        carry
    } else {
        let read_only = insn.mnemonic() == Mnemonic::Bt;
        // A register counts bits from the operand's start, in both directions; an immediate stays inside the word.
        let ahead = if insn.op1_kind() == OpKind::Register {
            (crate::flags::sign_extend(number, log2) as i64 >> (3 + log2) << log2) as u64
        } else {
            0
        };
        let mut offset = cpu.offset(insn).wrapping_add(ahead);
        match address_size(insn) {
            2 => offset &= 0xffff,
            4 => offset &= 0xffff_ffff,
            _ => {}
        }
        let segment = crate::operand::data_segment(insn);
        let linear = cpu.segment_linear(segment, offset, 1 << log2, !read_only)?;
        if read_only {
            change(cpu.read_sized(linear, log2)?).1
        } else {
            cpu.modify_at(linear, log2, insn.has_lock_prefix(), change)?
        }
    };
    // Only CF is defined; processors leave the others.
    set_carry(cpu, |_| carry)
}

fn address_size(insn: &Instruction) -> usize {
    let base = insn.memory_base();
    let index = insn.memory_index();
    if base != Register::None {
        base.size()
    } else if index != Register::None {
        index.size()
    } else {
        insn.memory_displ_size() as usize
    }
}

fn set_carry(cpu: &mut Cpu, f: impl Fn(bool) -> bool) -> Result<(), Fault> {
    let flags = cpu.lazy.flags();
    let carry = f(flags & fl::CF != 0);
    cpu.set_arith(flags & !fl::CF | u64::from(carry));
    Ok(())
}

fn widen(cpu: &mut Cpu, n: usize, from: u32, to: u32) -> Result<(), Fault> {
    let value = crate::flags::sign_extend(cpu.gpr[n], from);
    cpu.set_sized(n, to, value);
    Ok(())
}

fn spread(cpu: &mut Cpu, log2: u32) -> Result<(), Fault> {
    let sign = crate::flags::sign_extend(cpu.gpr[RAX], log2) as i64 >> 63;
    cpu.set_sized(RDX, log2, sign as u64);
    Ok(())
}

fn push(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Fault> {
    let size = (-insn.stack_pointer_increment()) as u64;
    let value = if insn.op0_kind() == OpKind::Memory {
        let linear = cpu.operand_linear(insn, size, false)?;
        cpu.read_sized(linear, size.ilog2())?
    } else {
        cpu.get(insn, 0)?
    };
    cpu.push(size, value)
}

fn pop(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Fault> {
    let size = insn.stack_pointer_increment() as u64;
    let before = cpu.gpr[RSP];
    let value = cpu.pop(size)?;
    // An address by RSP uses its new value.
    let done = if let Some((n, _, _)) =
        insn.op0_register().is_gpr().then(|| locate(insn.op0_register())).flatten()
    {
        cpu.set_sized(n, size.ilog2(), value);
        Ok(())
    } else {
        match cpu.operand_linear(insn, size, true) {
            Ok(linear) => cpu.write_sized(linear, size.ilog2(), value),
            Err(fault) => Err(fault),
        }
    };
    if done.is_err() {
        cpu.gpr[RSP] = before;
    }
    done
}

fn enter(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Fault> {
    let size = match insn.code() {
        iced_x86::Code::Enterw_imm16_imm8 => 2u64,
        iced_x86::Code::Enterd_imm16_imm8 => 4,
        _ => 8,
    };
    let room = u64::from(insn.immediate16());
    let level = u64::from(insn.immediate8_2nd() & 31);
    let before = cpu.gpr[RSP];
    let result = (|| {
        let rbp = cpu.gpr[crate::cpu::RBP];
        cpu.push(size, rbp)?;
        let frame = cpu.gpr[RSP];
        let mut at = rbp;
        for _ in 1..level {
            at = at.wrapping_sub(size) & cpu.stack_mask();
            let linear = cpu.segment_linear(crate::cpu::SS, at, size, false)?;
            let value = cpu.read_sized(linear, size.ilog2())?;
            cpu.push(size, value)?;
        }
        if level > 0 {
            cpu.push(size, frame)?;
        }
        let sp = cpu.gpr[RSP].wrapping_sub(room);
        let linear = cpu.segment_linear(crate::cpu::SS, sp & cpu.stack_mask(), size, true)?;
        cpu.probe_write_as(linear, size, cpu.cpl == 3)?;
        cpu.set_sp(sp);
        cpu.set_sized(crate::cpu::RBP, size.ilog2(), frame);
        Ok(())
    })();
    if result.is_err() {
        cpu.gpr[RSP] = before;
    }
    result
}
