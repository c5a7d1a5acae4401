//! Picks the fast handlers for 64-bit code and for flat 32-bit code.
//!
//! One file, though long: it is one decision, spelled out for each group of instructions.
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_possible_wrap,
    reason = "fields of ops are small"
)]

use iced_x86::{CodeSize, Instruction, Mnemonic as M, OpKind, Register};

use super::Context;
use crate::block::{Op, Run};
use crate::cpu::{RIP, SS, ZERO, fl};
use crate::flags::sign_extend;
use crate::operand::{by_size, data_segment, locate, size_of_operand};
use crate::ops::flow::{self, MemImm, MemReg, RegImm, RegMem, RegReg};
use crate::ops::int::{self, Base, Flat, Indexed, Segmented};
use crate::ops::sse;
use crate::ops::{self, nothing};
use crate::slow::condition_of;

/// How a memory operand is addressed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    Base,
    Indexed,
    Segmented,
    Flat,
}

/// Runs an expression with the type of an addressing form.
macro_rules! by_form {
    ($form:expr, $a:ident => $body:expr) => {
        match $form {
            Form::Base => {
                type $a = Base;
                $body
            }
            Form::Indexed => {
                type $a = Indexed;
                $body
            }
            Form::Segmented => {
                type $a = Segmented;
                $body
            }
            Form::Flat => {
                type $a = Flat;
                $body
            }
        }
    };
}

macro_rules! by_alu {
    ($mnemonic:expr, $o:ident => $body:expr) => {
        by_alu!(@ $mnemonic, $o, $body, Add Sub Cmp And Or Xor Test Adc Sbb)
    };
    (@ $mnemonic:expr, $o:ident, $body:expr, $($name:ident)*) => {
        match $mnemonic {
            $(M::$name => {
                type $o = int::$name;
                Some($body)
            })*
            _ => None,
        }
    };
}

macro_rules! by_lockable {
    ($mnemonic:expr, $o:ident => $body:expr) => {
        by_alu!(@ $mnemonic, $o, $body, Add Sub And Or Xor)
    };
}

macro_rules! by_condition {
    ($cc:expr, $name:ident => $body:expr) => {
        by_condition!(@ $cc, $name, $body, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    };
    (@ $cc:expr, $name:ident, $body:expr, $($n:literal)*) => {
        match $cc {
            $($n => {
                const $name: u8 = $n;
                Some($body)
            })*
            _ => None,
        }
    };
}

macro_rules! by_kind {
    ($kind:expr, $name:ident => $body:expr) => {
        match $kind {
            flow::DIFFERENCE => {
                const $name: u8 = flow::DIFFERENCE;
                $body
            }
            flow::LOGIC => {
                const $name: u8 = flow::LOGIC;
                $body
            }
            flow::RESULT => {
                const $name: u8 = flow::RESULT;
                $body
            }
            _ => {
                const $name: u8 = flow::ANY;
                $body
            }
        }
    };
}

/// The shape of a comparison that the branch after it may become one with.
#[derive(Clone, Copy)]
pub(super) struct Comparison {
    test: bool,
    log2: u32,
    shape: Shape,
}

#[derive(Clone, Copy)]
enum Shape {
    RegReg,
    RegImm,
    RegMem,
    MemReg,
    MemImm,
}

/// A register operand as ops have it, and log2 of its size.
fn register(register: Register) -> Option<(u8, u32)> {
    let (n, log2, high) = locate(register)?;
    Some((if log2 == 0 { n as u8 * 8 + u8::from(high) } else { n as u8 }, log2))
}

fn reg_operand(insn: &Instruction, i: u32) -> Option<(u8, u32)> {
    if insn.op_kind(i) == OpKind::Register { register(insn.op_register(i)) } else { None }
}

/// Whether an instruction is one of flat 32-bit code: other code than that and 64-bit code does not come here.
fn is_flat(insn: &Instruction) -> bool {
    insn.code_size() == CodeSize::Code32
}

/// log2 of the size of addresses.
fn address_size(insn: &Instruction) -> u32 {
    if is_flat(insn) { 2 } else { 3 }
}

/// Puts a memory operand with an address of the code's own size into an op.
pub(super) fn memory(op: &mut Op, insn: &Instruction) -> Option<Form> {
    let (base, index) = (insn.memory_base(), insn.memory_index());
    let size = address_size(insn);
    let part = |register: Register| match register {
        Register::None => Some(ZERO as u8),
        Register::RIP => Some(RIP as u8),
        _ => locate(register).filter(|(_, log2, _)| *log2 == size).map(|(n, _, _)| n as u8),
    };
    op.base = part(base)?;
    op.index = part(index)?;
    if base == Register::None && index == Register::None && insn.memory_displ_size() != 1 << size {
        return None;
    }
    op.scale = insn.memory_index_scale().ilog2() as u8;
    let segment = data_segment(insn);
    if is_flat(insn) {
        op.disp = insn.memory_displacement32() as i32;
        op.seg = if segment == SS { SS as u8 } else { 0 };
        // Code is not written, FS and GS are anywhere.
        return matches!(segment, crate::cpu::ES | SS | crate::cpu::DS).then_some(Form::Flat);
    }
    op.disp = i32::try_from(insn.memory_displacement64() as i64).ok()?;
    op.seg = segment as u8;
    Some(if segment >= crate::cpu::FS {
        Form::Segmented
    } else {
        // Only the stack's faults are told from others.
        op.seg = if segment == SS { SS as u8 } else { 0 };
        if index == Register::None { Form::Base } else { Form::Indexed }
    })
}

/// The fast op of an instruction; nothing if it has none. `fuse` is what the op before becomes.
pub(super) fn lower(context: &mut Context, insn: &Instruction, fuse: &mut Option<Run>) -> Option<Op> {
    let compared = context.compared.take();
    let mut op = nothing();
    let mnemonic = insn.mnemonic();
    let run: Run = match mnemonic {
        M::Add | M::Sub | M::Cmp | M::And | M::Or | M::Xor | M::Test | M::Adc | M::Sbb => {
            binary(context, &mut op, insn)?
        }
        M::Mov => mov(&mut op, insn)?,
        M::Movzx | M::Movsx | M::Movsxd => extend(&mut op, insn)?,
        M::Lea => {
            let (a, log2) = reg_operand(insn, 0)?;
            op.a = a;
            let form = memory(&mut op, insn)?;
            op.seg = 0;
            match (log2, form) {
                (3, Form::Base) => int::lea::<u64, Base>,
                (3, _) => int::lea::<u64, Indexed>,
                (2, Form::Base) => int::lea::<u32, Base>,
                (2, Form::Flat) => int::lea::<u32, Flat>,
                (2, _) => int::lea::<u32, Indexed>,
                _ => return None,
            }
        }
        M::Push if insn.stack_pointer_increment() == -8 => {
            op.seg = SS as u8;
            if let Some((a, log2)) = reg_operand(insn, 0) {
                op.a = a;
                if log2 != 3 {
                    return None;
                }
                int::push_r
            } else if insn.op0_kind() == OpKind::Memory {
                let form = memory(&mut op, insn)?;
                by_form!(form, A => int::push_m::<A>)
            } else {
                op.imm = insn.try_immediate(0).ok()?;
                int::push_i
            }
        }
        M::Pop if insn.stack_pointer_increment() == 8 => {
            op.seg = SS as u8;
            op.a = reg_operand(insn, 0)?.0;
            int::pop_r
        }
        M::Push if is_flat(insn) && insn.stack_pointer_increment() == -4 => {
            op.seg = SS as u8;
            if let Some((a, log2)) = reg_operand(insn, 0) {
                op.a = a;
                if log2 != 2 {
                    return None;
                }
                int::push32_r
            } else if insn.op0_kind() == OpKind::Memory {
                memory(&mut op, insn)?;
                int::push32_m
            } else {
                op.imm = insn.try_immediate(0).ok()?;
                int::push32_i
            }
        }
        M::Pop if is_flat(insn) && insn.stack_pointer_increment() == 4 => {
            op.seg = SS as u8;
            let (a, log2) = reg_operand(insn, 0)?;
            op.a = a;
            if log2 != 2 {
                return None;
            }
            int::pop32_r
        }
        M::Leave if is_flat(insn) && insn.code() == iced_x86::Code::Leaved => {
            op.seg = SS as u8;
            int::leave32
        }
        M::Leave if insn.code() == iced_x86::Code::Leaveq => {
            op.seg = SS as u8;
            int::leave
        }
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror => shift(context, &mut op, insn)?,
        M::Inc | M::Dec | M::Neg | M::Not => unary(context, &mut op, insn)?,
        M::Imul => imul(&mut op, insn)?,
        M::Mul => {
            let (a, log2) = reg_operand(insn, 0)?;
            op.a = a;
            match log2 {
                2 => int::mul_r::<u32>,
                3 => int::mul_r::<u64>,
                _ => return None,
            }
        }
        M::Xchg | M::Xadd | M::Cmpxchg => exchange(&mut op, insn)?,
        M::Bswap => {
            let (a, log2) = reg_operand(insn, 0)?;
            op.a = a;
            match log2 {
                2 => int::bswap::<u32>,
                3 => int::bswap::<u64>,
                _ => return None,
            }
        }
        M::Cdqe => int::cdqe,
        M::Cqo => int::cqo,
        M::Bt => {
            let (a, log2) = reg_operand(insn, 0)?;
            op.a = a;
            if log2 < 2 {
                return None;
            }
            if let Some((b, _)) = reg_operand(insn, 1) {
                op.b = b;
                if log2 == 2 { int::bt_rr::<u32> } else { int::bt_rr::<u64> }
            } else {
                op.imm = insn.try_immediate(1).ok()?;
                if log2 == 2 { int::bt_ri::<u32> } else { int::bt_ri::<u64> }
            }
        }
        M::Jmp | M::Call | M::Ret if is_flat(insn) => flow32(context, &mut op, insn)?,
        M::Jmp | M::Call | M::Ret => flow(context, &mut op, insn)?,
        _ if condition_of(insn).is_some() => conditional(context, &mut op, insn, compared, fuse)?,
        _ => sse(&mut op, insn)?,
    };
    op.run = run;
    Some(op)
}

fn binary(context: &mut Context, op: &mut Op, insn: &Instruction) -> Option<Run> {
    let mnemonic = insn.mnemonic();
    let log2 = size_of_operand(insn, 0);
    let locked = insn.has_lock_prefix();
    let mut shape = None;
    let run: Run = match (reg_operand(insn, 0), reg_operand(insn, 1)) {
        (Some((a, _)), Some((b, _))) => {
            (op.a, op.b) = (a, b);
            shape = Some(Shape::RegReg);
            by_alu!(mnemonic, O => by_size!(log2, T => int::rr::<O, T> as Run))?
        }
        (Some((a, _)), None) if insn.op1_kind() == OpKind::Memory => {
            op.a = a;
            let form = memory(op, insn)?;
            if form == Form::Base {
                shape = Some(Shape::RegMem);
            }
            by_alu!(mnemonic, O => by_size!(log2, T => by_form!(form, A => int::rm::<O, T, A> as Run)))?
        }
        (Some((a, _)), None) => {
            op.a = a;
            op.imm = sign_extend(insn.try_immediate(1).ok()?, log2);
            shape = Some(Shape::RegImm);
            by_alu!(mnemonic, O => by_size!(log2, T => int::ri::<O, T> as Run))?
        }
        (None, Some((a, _))) => {
            op.a = a;
            let form = memory(op, insn)?;
            if locked {
                by_lockable!(mnemonic, O => by_size!(log2, T => by_form!(form, A => int::lock_mr::<O, T, A> as Run)))?
            } else {
                if form == Form::Base {
                    shape = Some(Shape::MemReg);
                }
                by_alu!(mnemonic, O => by_size!(log2, T => by_form!(form, A => int::mr::<O, T, A> as Run)))?
            }
        }
        (None, None) => {
            let form = memory(op, insn)?;
            op.imm = sign_extend(insn.try_immediate(1).ok()?, log2);
            if locked {
                by_lockable!(mnemonic, O => by_size!(log2, T => by_form!(form, A => int::lock_mi::<O, T, A> as Run)))?
            } else {
                if form == Form::Base {
                    shape = Some(Shape::MemImm);
                }
                by_alu!(mnemonic, O => by_size!(log2, T => by_form!(form, A => int::mi::<O, T, A> as Run)))?
            }
        }
    };
    if let Some(shape) = shape
        && matches!(mnemonic, M::Cmp | M::Test)
    {
        context.compared = Some(Comparison { test: mnemonic == M::Test, log2, shape });
    }
    Some(run)
}

fn mov(op: &mut Op, insn: &Instruction) -> Option<Run> {
    let log2 = size_of_operand(insn, 0);
    Some(match (reg_operand(insn, 0), reg_operand(insn, 1)) {
        (Some((a, _)), Some((b, other))) if log2 == other => {
            (op.a, op.b) = (a, b);
            by_size!(log2, T => int::mov_rr::<T> as Run)
        }
        (Some((a, _)), None) if insn.op1_kind() == OpKind::Memory => {
            op.a = a;
            let form = memory(op, insn)?;
            by_size!(log2, T => by_form!(form, A => int::mov_rm::<T, A> as Run))
        }
        (Some((a, _)), None) if insn.op1_kind() != OpKind::Register => {
            op.a = a;
            op.imm = insn.try_immediate(1).ok()?;
            by_size!(log2, T => int::mov_ri::<T> as Run)
        }
        (None, Some((a, _))) if insn.op0_kind() == OpKind::Memory => {
            op.a = a;
            let form = memory(op, insn)?;
            by_size!(log2, T => by_form!(form, A => int::mov_mr::<T, A> as Run))
        }
        (None, None) if insn.op0_kind() == OpKind::Memory && insn.op1_kind() != OpKind::Register => {
            let form = memory(op, insn)?;
            op.imm = insn.try_immediate(1).ok()?;
            by_size!(log2, T => by_form!(form, A => int::mov_mi::<T, A> as Run))
        }
        _ => return None,
    })
}

fn extend(op: &mut Op, insn: &Instruction) -> Option<Run> {
    let (a, to) = reg_operand(insn, 0)?;
    op.a = a;
    let from = size_of_operand(insn, 1);
    let zero = insn.mnemonic() == M::Movzx;
    macro_rules! pick {
        ($d:ty, $s:ty) => {
            if let Some((b, _)) = reg_operand(insn, 1) {
                op.b = b;
                if zero { int::movzx_rr::<$d, $s> as Run } else { int::movsx_rr::<$d, $s> as Run }
            } else {
                let form = memory(op, insn)?;
                if zero {
                    by_form!(form, A => int::movzx_rm::<$d, $s, A> as Run)
                } else {
                    by_form!(form, A => int::movsx_rm::<$d, $s, A> as Run)
                }
            }
        };
    }
    Some(match (to, from) {
        (2, 0) => pick!(u32, u8),
        (3, 0) => pick!(u64, u8),
        (2, 1) => pick!(u32, u16),
        (3, 1) => pick!(u64, u16),
        (3, 2) => pick!(u64, u32),
        _ => return None,
    })
}

fn shift(context: &mut Context, op: &mut Op, insn: &Instruction) -> Option<Run> {
    let (a, log2) = reg_operand(insn, 0)?;
    op.a = a;
    if insn.op1_kind() == OpKind::Register {
        op.b = u8::from(insn.mnemonic() == M::Ror);
        return Some(match insn.mnemonic() {
            M::Rol | M::Ror => by_size!(log2, T => int::rotate_cl::<T> as Run),
            M::Shr => by_size!(log2, T => int::shr_cl::<T> as Run),
            M::Sar => by_size!(log2, T => int::sar_cl::<T> as Run),
            _ => by_size!(log2, T => int::shl_cl::<T> as Run),
        });
    }
    let count = insn.try_immediate(1).ok()? & if log2 == 3 { 63 } else { 31 };
    op.imm = count;
    if count == 0 {
        // Nothing but the upper half of a 32-bit register.
        op.b = a;
        return Some(by_size!(log2, T => int::mov_rr::<T> as Run));
    }
    Some(match insn.mnemonic() {
        M::Shr => by_size!(log2, T => int::shr_ri::<T> as Run),
        M::Sar => by_size!(log2, T => int::sar_ri::<T> as Run),
        M::Rol | M::Ror => {
            op.b = u8::from(insn.mnemonic() == M::Ror);
            if count % (8 << log2) != 0 {
                context.quiet = Some((by_size!(log2, T => int::rotate_quiet::<T> as Run), fl::CF | fl::OF));
            }
            by_size!(log2, T => int::rotate_ri::<T> as Run)
        }
        _ => by_size!(log2, T => int::shl_ri::<T> as Run),
    })
}

fn unary(context: &mut Context, op: &mut Op, insn: &Instruction) -> Option<Run> {
    let log2 = size_of_operand(insn, 0);
    if let Some((a, _)) = reg_operand(insn, 0) {
        op.a = a;
        context.quiet = match insn.mnemonic() {
            M::Inc => Some((by_size!(log2, T => int::inc_quiet::<T> as Run), fl::ARITH & !fl::CF)),
            M::Dec => Some((by_size!(log2, T => int::dec_quiet::<T> as Run), fl::ARITH & !fl::CF)),
            _ => None,
        };
        return Some(match insn.mnemonic() {
            M::Inc => by_size!(log2, T => int::inc_r::<T> as Run),
            M::Dec => by_size!(log2, T => int::dec_r::<T> as Run),
            M::Neg => by_size!(log2, T => int::neg_r::<T> as Run),
            _ => by_size!(log2, T => int::not_r::<T> as Run),
        });
    }
    if insn.has_lock_prefix() {
        return None;
    }
    let form = memory(op, insn)?;
    Some(match insn.mnemonic() {
        M::Inc => by_size!(log2, T => by_form!(form, A => int::inc_m::<T, A> as Run)),
        M::Dec => by_size!(log2, T => by_form!(form, A => int::dec_m::<T, A> as Run)),
        _ => return None,
    })
}

fn imul(op: &mut Op, insn: &Instruction) -> Option<Run> {
    if insn.op_count() == 1 {
        return None;
    }
    let (a, log2) = reg_operand(insn, 0)?;
    op.a = a;
    if insn.op_count() == 3 {
        op.b = reg_operand(insn, 1)?.0;
        op.imm = sign_extend(insn.try_immediate(2).ok()?, log2);
        return Some(if log2 == 3 {
            int::imul_rri::<u64>
        } else if log2 == 2 {
            int::imul_rri::<u32>
        } else {
            return None;
        });
    }
    if let Some((b, _)) = reg_operand(insn, 1) {
        op.b = b;
        return Some(match log2 {
            3 => int::imul_rr::<u64>,
            2 => int::imul_rr::<u32>,
            _ => return None,
        });
    }
    let form = memory(op, insn)?;
    Some(match log2 {
        3 => by_form!(form, A => int::imul_rm::<u64, A> as Run),
        2 => by_form!(form, A => int::imul_rm::<u32, A> as Run),
        _ => return None,
    })
}

fn exchange(op: &mut Op, insn: &Instruction) -> Option<Run> {
    if insn.mnemonic() == M::Xchg
        && let (Some((a, log2)), Some((b, _))) = (reg_operand(insn, 0), reg_operand(insn, 1))
    {
        (op.a, op.b) = (a, b);
        return Some(by_size!(log2, T => int::xchg_rr::<T> as Run));
    }
    if insn.op0_kind() != OpKind::Memory {
        return None;
    }
    let (a, log2) = reg_operand(insn, 1)?;
    op.a = a;
    let form = memory(op, insn)?;
    Some(match insn.mnemonic() {
        M::Xchg => by_size!(log2, T => by_form!(form, A => int::xchg_mr::<T, A> as Run)),
        M::Xadd => by_size!(log2, T => by_form!(form, A => int::xadd_mr::<T, A> as Run)),
        _ if insn.has_lock_prefix() => {
            by_size!(log2, T => by_form!(form, A => int::lock_cmpxchg_mr::<T, A> as Run))
        }
        _ => by_size!(log2, T => by_form!(form, A => int::cmpxchg_mr::<T, A> as Run)),
    })
}

fn flow(context: &mut Context, op: &mut Op, insn: &Instruction) -> Option<Run> {
    let next = insn.next_ip();
    let run: Run = match (insn.mnemonic(), insn.op0_kind()) {
        (M::Ret, _) => {
            let release = match insn.code() {
                iced_x86::Code::Retnq => 0,
                iced_x86::Code::Retnq_imm16 => u64::from(insn.immediate16()),
                _ => return None,
            };
            op.imm = 8 + release;
            op.seg = SS as u8;
            flow::ret
        }
        (mnemonic, OpKind::NearBranch64) => {
            op.imm = insn.near_branch64();
            op.disp = i32::try_from(next).ok()?;
            context.direct = true;
            if mnemonic == M::Jmp { flow::jmp } else { flow::call }
        }
        (mnemonic, OpKind::Register) => {
            let (a, log2) = reg_operand(insn, 0)?;
            if log2 != 3 {
                return None;
            }
            op.a = a;
            op.imm = next;
            if mnemonic == M::Jmp { flow::jmp_r } else { flow::call_r }
        }
        (mnemonic, OpKind::Memory)
            if insn.code() == iced_x86::Code::Jmp_rm64 || insn.code() == iced_x86::Code::Call_rm64 =>
        {
            let form = memory(op, insn)?;
            op.imm = next;
            if mnemonic == M::Jmp {
                by_form!(form, A => flow::jmp_m::<A> as Run)
            } else {
                by_form!(form, A => flow::call_m::<A> as Run)
            }
        }
        _ => return None,
    };
    context.branched = true;
    Some(run)
}

/// [`flow`] in flat 32-bit code.
fn flow32(context: &mut Context, op: &mut Op, insn: &Instruction) -> Option<Run> {
    let next = insn.next_ip();
    let call = insn.mnemonic() == M::Call;
    let run: Run = match (insn.mnemonic(), insn.op0_kind()) {
        (M::Ret, _) => {
            let release = match insn.code() {
                iced_x86::Code::Retnd => 0,
                iced_x86::Code::Retnd_imm16 => u64::from(insn.immediate16()),
                _ => return None,
            };
            op.imm = 4 + release;
            op.seg = SS as u8;
            flow::ret32
        }
        (_, OpKind::NearBranch32) => {
            op.imm = distance32(insn);
            op.disp = i32::try_from(next).ok()?;
            context.direct = true;
            if call { flow::call32 } else { flow::jmp }
        }
        (_, OpKind::Register) => {
            let (a, log2) = reg_operand(insn, 0)?;
            if log2 != 2 {
                return None;
            }
            op.a = a;
            op.imm = next;
            if call { flow::call32_r } else { flow::jmp32_r }
        }
        (_, OpKind::Memory)
            if insn.code() == iced_x86::Code::Jmp_rm32 || insn.code() == iced_x86::Code::Call_rm32 =>
        {
            memory(op, insn)?;
            op.imm = next;
            if call { flow::call32_m } else { flow::jmp32_m }
        }
        _ => return None,
    };
    context.branched = true;
    Some(run)
}

/// How far a branch's target is from the start of its block.
fn distance32(insn: &Instruction) -> u64 {
    insn.near_branch32() as i32 as i64 as u64
}

fn conditional(
    context: &mut Context,
    op: &mut Op,
    insn: &Instruction,
    compared: Option<Comparison>,
    fuse: &mut Option<Run>,
) -> Option<Run> {
    let cc = condition_of(insn)?;
    let code = insn.code();
    if code.is_jcc_short_or_near() {
        op.imm = match insn.op0_kind() {
            OpKind::NearBranch64 => insn.near_branch64(),
            OpKind::NearBranch32 if is_flat(insn) => distance32(insn),
            _ => return None,
        };
        op.disp = i32::try_from(insn.next_ip()).ok()?;
        context.direct = true;
        context.branched = true;
        if let Some(comparison) = compared {
            *fuse = fused(comparison, cc);
        }
        return by_kind!(context.kind, K => by_condition!(cc, CC => flow::jcc::<K, CC> as Run));
    }
    match insn.op_count() {
        1 => {
            op.a = reg_operand(insn, 0)?.0;
            by_kind!(context.kind, K => by_condition!(cc, CC => flow::set_r::<K, CC> as Run))
        }
        2 => {
            let (a, log2) = reg_operand(insn, 0)?;
            let (b, _) = reg_operand(insn, 1)?;
            (op.a, op.b) = (a, b);
            match log2 {
                2 => by_kind!(context.kind, K => by_condition!(cc, CC => flow::cmov_rr::<K, CC, u32> as Run)),
                3 => by_kind!(context.kind, K => by_condition!(cc, CC => flow::cmov_rr::<K, CC, u64> as Run)),
                _ => None,
            }
        }
        _ => None,
    }
}

fn fused(comparison: Comparison, cc: u8) -> Option<Run> {
    macro_rules! shapes {
        ($t:ty, $handler:ident) => {
            match comparison.shape {
                Shape::RegReg => by_condition!(cc, CC => flow::$handler::<RegReg<$t>, CC> as Run),
                Shape::RegImm => by_condition!(cc, CC => flow::$handler::<RegImm<$t>, CC> as Run),
                Shape::RegMem => by_condition!(cc, CC => flow::$handler::<RegMem<$t, Base>, CC> as Run),
                Shape::MemReg => by_condition!(cc, CC => flow::$handler::<MemReg<$t, Base>, CC> as Run),
                Shape::MemImm => by_condition!(cc, CC => flow::$handler::<MemImm<$t, Base>, CC> as Run),
            }
        };
    }
    match (comparison.test, comparison.log2) {
        (false, 0) => shapes!(u8, cmp_jcc),
        (false, 2) => shapes!(u32, cmp_jcc),
        (false, 3) => shapes!(u64, cmp_jcc),
        (true, 0) => shapes!(u8, test_jcc),
        (true, 2) => shapes!(u32, test_jcc),
        (true, 3) => shapes!(u64, test_jcc),
        _ => None,
    }
}

/// The number of an XMM register.
fn xmm(insn: &Instruction, i: u32) -> Option<u8> {
    let register = insn.op_register(i);
    (insn.op_kind(i) == OpKind::Register && register.is_xmm()).then(|| register.number() as u8)
}

fn sse(op: &mut Op, insn: &Instruction) -> Option<Run> {
    use iced_x86::Code as C;
    Some(match insn.code() {
        C::Movups_xmm_xmmm128 | C::Movupd_xmm_xmmm128 | C::Movdqu_xmm_xmmm128 => {
            op.a = xmm(insn, 0)?;
            if let Some(b) = xmm(insn, 1) {
                op.b = b;
                sse::mov_rr
            } else {
                let form = memory(op, insn)?;
                by_form!(form, A => sse::load::<A, false> as Run)
            }
        }
        C::Movaps_xmm_xmmm128 | C::Movapd_xmm_xmmm128 | C::Movdqa_xmm_xmmm128 => {
            op.a = xmm(insn, 0)?;
            if let Some(b) = xmm(insn, 1) {
                op.b = b;
                sse::mov_rr
            } else {
                let form = memory(op, insn)?;
                by_form!(form, A => sse::load::<A, true> as Run)
            }
        }
        C::Movups_xmmm128_xmm | C::Movupd_xmmm128_xmm | C::Movdqu_xmmm128_xmm
            if insn.op0_kind() == OpKind::Memory =>
        {
            op.a = xmm(insn, 1)?;
            let form = memory(op, insn)?;
            by_form!(form, A => sse::store::<A, false> as Run)
        }
        C::Movaps_xmmm128_xmm | C::Movapd_xmmm128_xmm | C::Movdqa_xmmm128_xmm
            if insn.op0_kind() == OpKind::Memory =>
        {
            op.a = xmm(insn, 1)?;
            let form = memory(op, insn)?;
            by_form!(form, A => sse::store::<A, true> as Run)
        }
        C::Movq_xmm_xmmm64 | C::Movsd_xmm_xmmm64 | C::Movq_xmm_rm64 if insn.op1_kind() == OpKind::Memory => {
            op.a = xmm(insn, 0)?;
            let form = memory(op, insn)?;
            by_form!(form, A => sse::load_low::<u64, A> as Run)
        }
        C::Movss_xmm_xmmm32 | C::Movd_xmm_rm32 if insn.op1_kind() == OpKind::Memory => {
            op.a = xmm(insn, 0)?;
            let form = memory(op, insn)?;
            by_form!(form, A => sse::load_low::<u32, A> as Run)
        }
        C::Movq_xmmm64_xmm
        | C::Movsd_xmmm64_xmm
        | C::Movq_rm64_xmm
        | C::Movlps_m64_xmm
        | C::Movlpd_m64_xmm
            if insn.op0_kind() == OpKind::Memory =>
        {
            op.a = xmm(insn, 1)?;
            let form = memory(op, insn)?;
            by_form!(form, A => sse::store_low::<u64, A> as Run)
        }
        C::Movss_xmmm32_xmm | C::Movd_rm32_xmm if insn.op0_kind() == OpKind::Memory => {
            op.a = xmm(insn, 1)?;
            let form = memory(op, insn)?;
            by_form!(form, A => sse::store_low::<u32, A> as Run)
        }
        C::Movhps_m64_xmm | C::Movhpd_m64_xmm => {
            op.a = xmm(insn, 1)?;
            let form = memory(op, insn)?;
            by_form!(form, A => sse::store_high::<A> as Run)
        }
        C::Movq_xmm_rm64 => {
            (op.a, op.b) = (xmm(insn, 0)?, reg_operand(insn, 1)?.0);
            sse::from_gpr::<u64>
        }
        C::Movd_xmm_rm32 => {
            (op.a, op.b) = (xmm(insn, 0)?, reg_operand(insn, 1)?.0);
            sse::from_gpr::<u32>
        }
        C::Movq_rm64_xmm => {
            (op.a, op.b) = (reg_operand(insn, 0)?.0, xmm(insn, 1)?);
            sse::to_gpr::<u64>
        }
        C::Movd_rm32_xmm => {
            (op.a, op.b) = (reg_operand(insn, 0)?.0, xmm(insn, 1)?);
            sse::to_gpr::<u32>
        }
        C::Pxor_xmm_xmmm128 | C::Xorps_xmm_xmmm128 | C::Xorpd_xmm_xmmm128 => {
            (op.a, op.b) = (xmm(insn, 0)?, xmm(insn, 1)?);
            sse::xor_rr
        }
        C::Por_xmm_xmmm128 | C::Orps_xmm_xmmm128 | C::Orpd_xmm_xmmm128 => {
            (op.a, op.b) = (xmm(insn, 0)?, xmm(insn, 1)?);
            sse::or_rr
        }
        C::Pcmpeqb_xmm_xmmm128 => {
            op.a = xmm(insn, 0)?;
            if let Some(b) = xmm(insn, 1) {
                op.b = b;
                sse::equal_bytes_rr
            } else {
                let form = memory(op, insn)?;
                by_form!(form, A => sse::equal_bytes_rm::<A> as Run)
            }
        }
        C::Pmovmskb_r32_xmm | C::Pmovmskb_r64_xmm => {
            (op.a, op.b) = (reg_operand(insn, 0)?.0, xmm(insn, 1)?);
            sse::byte_mask
        }
        _ => return None,
    })
}

/// Follows which op's flags nobody has looked at yet. If `insn` overwrites them, and nothing in between could fault, that op needs no flags:
/// gives its index and its handler without.
pub(super) fn watch_flags(
    context: &mut Context,
    insn: &Instruction,
    op: Option<&Op>,
    index: usize,
) -> Option<(usize, Run)> {
    let fresh = context.quiet.take();
    let mut found = None;
    if let Some((at, run, bits)) = context.unseen.take() {
        let fast_and_sure = op.is_none_or(|op| {
            let run = op.run as usize;
            run != ops::plain as Run as usize
                && run != ops::fp as Run as usize
                && run != ops::strings as Run as usize
        }) && (0..insn.op_count())
            .all(|i| insn.op_kind(i) != OpKind::Memory || insn.mnemonic() == M::Lea)
            && !insn.is_stack_instruction()
            && !context.branched
            && !(0..insn.op_count()).any(|i| insn.op_register(i).is_vector_register());
        let read = flag_bits(insn.rflags_read());
        let written = flag_bits(
            insn.rflags_written()
                | insn.rflags_cleared()
                | insn.rflags_set()
                | insn.rflags_undefined() & iced_x86::RflagsBits::AF,
        );
        if fast_and_sure && read & bits == 0 {
            if written & bits == bits
                && !matches!(insn.mnemonic(), M::Shl | M::Shr | M::Sar | M::Sal | M::Rol | M::Ror)
            {
                found = Some((at, run));
            } else if written & bits == 0 {
                context.unseen = Some((at, run, bits));
            }
        }
    }
    if let Some((run, bits)) = fresh {
        context.unseen = Some((index, run, bits));
    }
    found
}

fn flag_bits(bits: u32) -> u64 {
    use iced_x86::RflagsBits as R;
    [(R::CF, fl::CF), (R::PF, fl::PF), (R::AF, fl::AF), (R::ZF, fl::ZF), (R::SF, fl::SF), (R::OF, fl::OF)]
        .into_iter()
        .filter(|(bit, _)| bits & bit != 0)
        .fold(0, |all, (_, bit)| all | bit)
}

/// Notes what an instruction leaves in the flags.
pub(super) fn note_flags(context: &mut Context, insn: &Instruction) {
    if insn.rflags_modified() == 0 {
        return;
    }
    context.kind = match insn.mnemonic() {
        M::Cmp | M::Sub | M::Neg | M::Cmpxchg => flow::DIFFERENCE,
        M::And | M::Or | M::Xor | M::Test => flow::LOGIC,
        M::Add | M::Adc | M::Inc | M::Dec | M::Xadd | M::Imul | M::Mul => flow::RESULT,
        M::Shl | M::Sal | M::Shr | M::Sar if insn.op1_kind() != OpKind::Register => {
            if insn.try_immediate(1).unwrap_or(0) & 31 == 0 { flow::ANY } else { flow::RESULT }
        }
        _ => flow::ANY,
    };
}

/// Whether an instruction does nothing at all, so that it needs no op.
pub(super) fn is_nothing(insn: &Instruction) -> bool {
    matches!(
        insn.mnemonic(),
        M::Nop
            | M::Endbr64
            | M::Endbr32
            | M::Prefetch
            | M::Prefetchw
            | M::Prefetchnta
            | M::Prefetcht0
            | M::Prefetcht1
            | M::Prefetcht2
            | M::Reservednop
            | M::Lfence
            | M::Sfence
    )
}

/// Lets a direct branch be linked to targets in its own page. `offset` is the block's in the page.
pub(crate) fn allow_links(op: &mut Op, offset: u64) {
    let inside = |distance: i64| (0..0x1000).contains(&(offset as i64).wrapping_add(distance));
    op.seg = u8::from(inside(op.imm as i64)) | u8::from(inside(op.disp.into())) << 1;
}

const _: () = assert!(size_of::<ops::Fp>() < 256);
