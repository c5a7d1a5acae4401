//! Branches, and what depends on a condition.
//!
//! Conditions come in kinds, by what the block's last flag-writing instruction is known to have left: the difference of two words, a
//! logic result, some other result, or unknown. A comparison and the branch after it become one handler; the branch's op still
//! follows, for its operands.
#![allow(unsafe_code, reason = "ops are reached by raw pointer")]
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_possible_wrap,
    reason = "arithmetic modulo the word size"
)]

use super::int::{Ea, Flat, LOW, get, set};
use super::{enter, fault, next};
use crate::block::{Block, Op};
use crate::cpu::{Cpu, Fault, RIP, RSP};
use crate::flags::Lazy;
use crate::mem::{Fast, Memory, Trap, Word};

/// Nothing is known.
pub(crate) const ANY: u8 = 0;
/// `dst - src` (CMP, SUB, NEG).
pub(crate) const DIFFERENCE: u8 = 1;
/// A logic result.
pub(crate) const LOGIC: u8 = 2;
/// `dst` is the result of something else.
pub(crate) const RESULT: u8 = 3;

#[inline(always)]
fn holds<const K: u8, const CC: u8>(lazy: Lazy) -> bool {
    let (d, s) = (lazy.dst, lazy.src);
    let yes = match (K, CC >> 1) {
        (DIFFERENCE, 1) => d < s,
        (DIFFERENCE, 2) => d == s,
        (DIFFERENCE, 3) => d <= s,
        (DIFFERENCE, 6) => (d as i64) < s as i64,
        (DIFFERENCE, 7) => d as i64 <= s as i64,
        (LOGIC, 0 | 1) => false,
        (LOGIC | RESULT, 2) | (LOGIC, 3) => d == 0,
        (LOGIC | RESULT, 4) | (LOGIC, 6) => (d as i64) < 0,
        (LOGIC, 7) => d as i64 <= 0,
        _ => return lazy.condition(CC),
    };
    yes != (CC & 1 != 0)
}

/// Goes to a branch's target or past it. `op` is the branch's: `imm` and `disp` are the distances from the block's start,
/// `seg` says which way may be linked.
#[inline(always)]
unsafe fn go(cpu: &mut Cpu, op: *const Op, taken: bool) -> *mut Block {
    // SAFETY: the op and the running block are in the arena.
    unsafe {
        let distance = if taken { (*op).imm } else { (*op).disp as i64 as u64 };
        cpu.gpr[RIP] = cpu.gpr[RIP].wrapping_add(distance);
        let way = usize::from(!taken);
        let link = (&raw mut (*cpu.block).link).cast::<*mut Block>().add(way);
        let block = *link;
        if block.is_null() && (*op).seg >> way & 1 != 0 {
            cpu.blocks.pending = link;
        }
        enter(cpu, block)
    }
}

/// Jcc.
pub(crate) unsafe fn jcc<const K: u8, const CC: u8>(cpu: &mut Cpu, op: *const Op) -> *mut Block {
    let taken = holds::<K, CC>(cpu.lazy);
    // SAFETY: the caller's.
    unsafe { go(cpu, op, taken) }
}

/// JMP to a known target.
pub(crate) unsafe fn jmp(cpu: &mut Cpu, op: *const Op) -> *mut Block {
    // SAFETY: the caller's.
    unsafe { go(cpu, op, true) }
}

/// CALL of a known target.
pub(crate) unsafe fn call(cpu: &mut Cpu, op: *const Op) -> *mut Block {
    #[cold]
    #[inline(never)]
    unsafe fn slow(cpu: &mut Cpu, op: *const Op, sp: u64, next: u64) -> *mut Block {
        // SAFETY: the caller's.
        unsafe {
            if cpu.store::<u64>(sp, next).is_err() {
                return fault_stack(cpu, op);
            }
            cpu.gpr[RSP] = sp;
            go(cpu, op, true)
        }
    }
    // SAFETY: the caller's.
    unsafe {
        let sp = cpu.gpr[RSP].wrapping_sub(8);
        let next = cpu.gpr[RIP].wrapping_add((*op).disp as i64 as u64);
        if Fast(cpu).store::<u64>(sp, next).is_err() {
            return slow(cpu, op, sp, next);
        }
        cpu.gpr[RSP] = sp;
        go(cpu, op, true)
    }
}

/// A branch's `seg` says which ways may be linked; the fault of its stack access is the stack's.
#[cold]
#[inline(never)]
unsafe fn fault_stack(cpu: &mut Cpu, op: *const Op) -> *mut Block {
    if cpu.fault == Fault::gp(0) {
        cpu.fault = Fault::ss(0);
    }
    // SAFETY: the caller's.
    unsafe { fault(cpu, op) }
}

#[inline(always)]
fn canonical(address: u64) -> bool {
    ((address << 16) as i64 >> 16) as u64 == address
}

#[cold]
#[inline(never)]
unsafe fn refuse(cpu: &mut Cpu, op: *const Op) -> *mut Block {
    // Not by way of `fault`: whatever the target was read from, it is #GP.
    cpu.fault = Fault::gp(0);
    // SAFETY: the caller's.
    unsafe { super::leave(cpu, op, crate::exec::FAULT) }
}

#[inline(always)]
unsafe fn call_to(cpu: &mut Cpu, op: *const Op, target: u64) -> *mut Block {
    // SAFETY: the caller's.
    unsafe {
        let sp = cpu.gpr[RSP].wrapping_sub(8);
        if !canonical(target) {
            // The push comes first, as far as it can fail.
            if cpu.for_update::<u64>(sp).is_err() {
                return fault_stack(cpu, op);
            }
            return refuse(cpu, op);
        }
        let next = cpu.gpr[RIP].wrapping_add((*op).imm);
        if cpu.store::<u64>(sp, next).is_err() {
            return fault_stack(cpu, op);
        }
        cpu.gpr[RSP] = sp;
        cpu.gpr[RIP] = target;
        let block = cpu.blocks.quick(target);
        enter(cpu, block)
    }
}

/// CALL register.
pub(crate) unsafe fn call_r(cpu: &mut Cpu, op: *const Op) -> *mut Block {
    // SAFETY: the caller's.
    unsafe {
        let target = get::<u64>(cpu, (*op).a);
        call_to(cpu, op, target)
    }
}

/// CALL memory.
pub(crate) unsafe fn call_m<A: Ea>(cpu: &mut Cpu, op: *const Op) -> *mut Block {
    // SAFETY: the caller's.
    unsafe {
        match cpu.load::<u64>(A::of(cpu, op)) {
            Ok(target) => call_to(cpu, op, target),
            Err(Trap) => fault(cpu, op),
        }
    }
}

#[inline(always)]
unsafe fn jump_to(cpu: &mut Cpu, op: *const Op, target: u64) -> *mut Block {
    if !canonical(target) {
        // SAFETY: the caller's.
        return unsafe { refuse(cpu, op) };
    }
    cpu.gpr[RIP] = target;
    let block = cpu.blocks.quick(target);
    // SAFETY: the caller's.
    unsafe { enter(cpu, block) }
}

/// JMP register.
pub(crate) unsafe fn jmp_r(cpu: &mut Cpu, op: *const Op) -> *mut Block {
    // SAFETY: the caller's.
    unsafe {
        let target = get::<u64>(cpu, (*op).a);
        jump_to(cpu, op, target)
    }
}

/// JMP memory.
pub(crate) unsafe fn jmp_m<A: Ea>(cpu: &mut Cpu, op: *const Op) -> *mut Block {
    // SAFETY: the caller's.
    unsafe {
        match cpu.load::<u64>(A::of(cpu, op)) {
            Ok(target) => jump_to(cpu, op, target),
            Err(Trap) => fault(cpu, op),
        }
    }
}

/// RET; `imm` is what it releases in all.
pub(crate) unsafe fn ret(cpu: &mut Cpu, op: *const Op) -> *mut Block {
    #[cold]
    #[inline(never)]
    unsafe fn slow(cpu: &mut Cpu, op: *const Op) -> *mut Block {
        // SAFETY: the caller's.
        unsafe {
            match cpu.load::<u64>(cpu.gpr[RSP]) {
                Ok(target) => return_to(cpu, op, target),
                Err(Trap) => fault(cpu, op),
            }
        }
    }
    // SAFETY: the caller's.
    unsafe {
        let sp = cpu.gpr[RSP];
        match Fast(cpu).load::<u64>(sp) {
            Ok(target) => return_to(cpu, op, target),
            Err(Trap) => slow(cpu, op),
        }
    }
}

#[inline(always)]
unsafe fn return_to(cpu: &mut Cpu, op: *const Op, target: u64) -> *mut Block {
    // SAFETY: the caller's.
    unsafe {
        if !canonical(target) {
            return refuse(cpu, op);
        }
        cpu.gpr[RSP] = cpu.gpr[RSP].wrapping_add((*op).imm);
        cpu.gpr[RIP] = target;
        let block = cpu.blocks.quick(target);
        enter(cpu, block)
    }
}

/// Goes to an address in flat 32-bit code, where it is a linear one.
#[inline(always)]
unsafe fn jump32_to(cpu: &mut Cpu, target: u32) -> *mut Block {
    cpu.gpr[RIP] = target.into();
    let block = cpu.blocks.quick(target.into());
    // SAFETY: the caller's.
    unsafe { enter(cpu, block) }
}

/// Pushes the address of the instruction after a call, which is so far from the block's start.
#[inline(always)]
unsafe fn push32(cpu: &mut Cpu, distance: u64) -> Result<(), Trap> {
    let sp = cpu.gpr[RSP].wrapping_sub(4) & LOW;
    let next = cpu.gpr[RIP].wrapping_add(distance) as u32;
    cpu.store::<u32>(sp, next)?;
    cpu.gpr[RSP] = sp;
    Ok(())
}

/// CALL of a known target in flat 32-bit code.
pub(crate) unsafe fn call32(cpu: &mut Cpu, op: *const Op) -> *mut Block {
    // SAFETY: the caller's.
    unsafe {
        match push32(cpu, (*op).disp as i64 as u64) {
            Ok(()) => go(cpu, op, true),
            Err(Trap) => fault_stack(cpu, op),
        }
    }
}

/// CALL register in flat 32-bit code.
pub(crate) unsafe fn call32_r(cpu: &mut Cpu, op: *const Op) -> *mut Block {
    // SAFETY: the caller's.
    unsafe {
        let target = get::<u32>(cpu, (*op).a);
        match push32(cpu, (*op).imm) {
            Ok(()) => jump32_to(cpu, target),
            Err(Trap) => fault_stack(cpu, op),
        }
    }
}

/// CALL memory in flat 32-bit code.
pub(crate) unsafe fn call32_m(cpu: &mut Cpu, op: *const Op) -> *mut Block {
    // SAFETY: the caller's.
    unsafe {
        let Ok(target) = cpu.load::<u32>(Flat::of(cpu, op)) else { return fault(cpu, op) };
        match push32(cpu, (*op).imm) {
            Ok(()) => jump32_to(cpu, target),
            Err(Trap) => fault_stack(cpu, op),
        }
    }
}

/// JMP register in flat 32-bit code.
pub(crate) unsafe fn jmp32_r(cpu: &mut Cpu, op: *const Op) -> *mut Block {
    // SAFETY: the caller's.
    unsafe {
        let target = get::<u32>(cpu, (*op).a);
        jump32_to(cpu, target)
    }
}

/// JMP memory in flat 32-bit code.
pub(crate) unsafe fn jmp32_m(cpu: &mut Cpu, op: *const Op) -> *mut Block {
    // SAFETY: the caller's.
    unsafe {
        match cpu.load::<u32>(Flat::of(cpu, op)) {
            Ok(target) => jump32_to(cpu, target),
            Err(Trap) => fault(cpu, op),
        }
    }
}

/// RET in flat 32-bit code; `imm` is what it releases in all.
pub(crate) unsafe fn ret32(cpu: &mut Cpu, op: *const Op) -> *mut Block {
    // SAFETY: the caller's.
    unsafe {
        let sp = cpu.gpr[RSP] & LOW;
        match cpu.load::<u32>(sp) {
            Ok(target) => {
                cpu.gpr[RSP] = sp.wrapping_add((*op).imm) & LOW;
                jump32_to(cpu, target)
            }
            Err(Trap) => fault(cpu, op),
        }
    }
}

/// SETcc register.
pub(crate) unsafe fn set_r<const K: u8, const CC: u8>(cpu: &mut Cpu, op: *const Op) -> *mut Block {
    let yes = holds::<K, CC>(cpu.lazy);
    // SAFETY: the caller's.
    unsafe { set::<u8>(cpu, (*op).a, yes.into()) };
    next!(cpu, op)
}

/// CMOVcc register, register.
pub(crate) unsafe fn cmov_rr<const K: u8, const CC: u8, T: Word>(cpu: &mut Cpu, op: *const Op) -> *mut Block {
    let yes = holds::<K, CC>(cpu.lazy);
    // SAFETY: the caller's.
    unsafe {
        let (a, b) = (get::<T>(cpu, (*op).a).to_u64(), get::<T>(cpu, (*op).b).to_u64());
        set::<T>(cpu, (*op).a, T::from_u64(if yes { b } else { a }));
    }
    next!(cpu, op)
}

/// The words that a comparison's flags come from.
pub(crate) trait Compare {
    unsafe fn words(memory: &mut impl Memory, op: *const Op) -> Result<(u64, u64), Trap>;
    /// log2 of their size.
    const LOG2: u32;
}

/// Register and register.
pub(crate) struct RegReg<T>(std::marker::PhantomData<T>);
/// Register and immediate.
pub(crate) struct RegImm<T>(std::marker::PhantomData<T>);
/// Register and memory.
pub(crate) struct RegMem<T, A>(std::marker::PhantomData<(T, A)>);
/// Memory and register.
pub(crate) struct MemReg<T, A>(std::marker::PhantomData<(T, A)>);
/// Memory and immediate.
pub(crate) struct MemImm<T, A>(std::marker::PhantomData<(T, A)>);

impl<T: Word> Compare for RegReg<T> {
    const LOG2: u32 = T::LOG2;
    #[inline(always)]
    unsafe fn words(memory: &mut impl Memory, op: *const Op) -> Result<(u64, u64), Trap> {
        // SAFETY: the caller's.
        unsafe {
            let cpu = memory.cpu();
            Ok((get::<T>(cpu, (*op).a).sx(), get::<T>(cpu, (*op).b).sx()))
        }
    }
}
impl<T: Word> Compare for RegImm<T> {
    const LOG2: u32 = T::LOG2;
    #[inline(always)]
    unsafe fn words(memory: &mut impl Memory, op: *const Op) -> Result<(u64, u64), Trap> {
        // SAFETY: the caller's.
        unsafe { Ok((get::<T>(memory.cpu(), (*op).a).sx(), (*op).imm)) }
    }
}
impl<T: Word, A: Ea> Compare for RegMem<T, A> {
    const LOG2: u32 = T::LOG2;
    #[inline(always)]
    unsafe fn words(memory: &mut impl Memory, op: *const Op) -> Result<(u64, u64), Trap> {
        // SAFETY: the caller's.
        unsafe {
            let address = A::of(memory.cpu(), op);
            let b = memory.load::<T>(address)?;
            Ok((get::<T>(memory.cpu(), (*op).a).sx(), b.sx()))
        }
    }
}
impl<T: Word, A: Ea> Compare for MemReg<T, A> {
    const LOG2: u32 = T::LOG2;
    #[inline(always)]
    unsafe fn words(memory: &mut impl Memory, op: *const Op) -> Result<(u64, u64), Trap> {
        // SAFETY: the caller's.
        unsafe {
            let address = A::of(memory.cpu(), op);
            let a = memory.load::<T>(address)?;
            Ok((a.sx(), get::<T>(memory.cpu(), (*op).a).sx()))
        }
    }
}
impl<T: Word, A: Ea> Compare for MemImm<T, A> {
    const LOG2: u32 = T::LOG2;
    #[inline(always)]
    unsafe fn words(memory: &mut impl Memory, op: *const Op) -> Result<(u64, u64), Trap> {
        // SAFETY: the caller's.
        unsafe {
            let address = A::of(memory.cpu(), op);
            let a = memory.load::<T>(address)?;
            Ok((a.sx(), (*op).imm))
        }
    }
}

/// CMP and the Jcc after it.
pub(crate) unsafe fn cmp_jcc<C: Compare, const CC: u8>(cpu: &mut Cpu, op: *const Op) -> *mut Block {
    #[cold]
    #[inline(never)]
    unsafe fn slow<C: Compare, const CC: u8>(cpu: &mut Cpu, op: *const Op) -> *mut Block {
        // SAFETY: the caller's.
        unsafe {
            match C::words(cpu, op) {
                Ok(words) => compared::<C, CC>(cpu, op, words),
                Err(Trap) => fault(cpu, op),
            }
        }
    }
    // SAFETY: the caller's.
    unsafe {
        match C::words(&mut Fast(cpu), op) {
            Ok(words) => compared::<C, CC>(cpu, op, words),
            Err(Trap) => slow::<C, CC>(cpu, op),
        }
    }
}

/// The branch's op follows the comparison's.
#[inline(always)]
unsafe fn compared<C: Compare, const CC: u8>(
    cpu: &mut Cpu,
    op: *const Op,
    (dst, src): (u64, u64),
) -> *mut Block {
    let lazy = Lazy { dst, src, op: crate::flags::kind::SUB | C::LOG2 << 8 };
    cpu.lazy = lazy;
    let taken = holds::<DIFFERENCE, CC>(lazy);
    // SAFETY: the caller's.
    unsafe { go(cpu, op.add(1), taken) }
}

/// TEST and the Jcc after it.
pub(crate) unsafe fn test_jcc<C: Compare, const CC: u8>(cpu: &mut Cpu, op: *const Op) -> *mut Block {
    #[cold]
    #[inline(never)]
    unsafe fn slow<C: Compare, const CC: u8>(cpu: &mut Cpu, op: *const Op) -> *mut Block {
        // SAFETY: the caller's.
        unsafe {
            match C::words(cpu, op) {
                Ok(words) => tested::<C, CC>(cpu, op, words),
                Err(Trap) => fault(cpu, op),
            }
        }
    }
    // SAFETY: the caller's.
    unsafe {
        match C::words(&mut Fast(cpu), op) {
            Ok(words) => tested::<C, CC>(cpu, op, words),
            Err(Trap) => slow::<C, CC>(cpu, op),
        }
    }
}

#[inline(always)]
unsafe fn tested<C: Compare, const CC: u8>(cpu: &mut Cpu, op: *const Op, (a, b): (u64, u64)) -> *mut Block {
    cpu.lazy.dst = a & b;
    cpu.lazy.op = crate::flags::kind::LOGIC | C::LOG2 << 8;
    let taken = holds::<LOGIC, CC>(cpu.lazy);
    // SAFETY: the caller's.
    unsafe { go(cpu, op.add(1), taken) }
}
