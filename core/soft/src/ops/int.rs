//! Fast handlers of the integer instructions of 64-bit code and of flat 32-bit code.
//!
//! They are generic in the operand's size ([`Word`]), in how the memory operand's address is made ([`Ea`]) and in the
//! operation; [`crate::lower`] picks. Registers are committed last, after everything that can fault.
//!
//! One file, though long: it is a list of small handlers, and the macro that makes them.
#![allow(clippy::redundant_closure_call, reason = "a handler's body is a closure so that it may use `?`")]
#![allow(unsafe_code, reason = "ops are reached by raw pointer; register numbers were made by the lowering")]
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_possible_wrap,
    reason = "arithmetic modulo the word size"
)]

use super::{fault, next};
use crate::block::{Block, Op};
use crate::cpu::{Cpu, RAX, RBP, RCX, RDX, RSP};
use crate::flags::{Lazy, kind};
use crate::mem::{Fast, Memory, Trap, Word};
use crate::slow::alu;

/// Reads a register; 8-bit ones are known by their byte's offset.
#[inline(always)]
pub(super) unsafe fn get<T: Word>(cpu: &Cpu, n: u8) -> T {
    // SAFETY: the lowering makes numbers below 18, and byte offsets below 128.
    unsafe {
        let registers = (&raw const cpu.gpr).cast::<u64>();
        if T::SIZE == 1 {
            T::from_u64((*registers.cast::<u8>().add(n as usize)).into())
        } else {
            T::from_u64(*registers.add(n as usize))
        }
    }
}

/// Sets a register: 8- and 16-bit ones keep the rest, 32-bit ones clear the upper half.
#[inline(always)]
pub(super) unsafe fn set<T: Word>(cpu: &mut Cpu, n: u8, value: T) {
    // SAFETY: as in `get`.
    unsafe {
        let registers = (&raw mut cpu.gpr).cast::<u64>();
        match T::SIZE {
            1 => *registers.cast::<u8>().add(n as usize) = value.to_u64() as u8,
            2 => *registers.add(n as usize).cast::<u16>() = value.to_u64() as u16,
            _ => *registers.add(n as usize) = value.to_u64(),
        }
    }
}

/// How a memory operand's address is made.
pub(crate) trait Ea {
    /// The linear address.
    unsafe fn of(cpu: &Cpu, op: *const Op) -> u64;
}

/// Base and displacement.
pub(crate) struct Base;
/// Base, scaled index and displacement.
pub(crate) struct Indexed;
/// As [`Indexed`], in FS or GS.
pub(crate) struct Segmented;
/// As [`Indexed`], cut to 32 bits.
pub(crate) struct Flat;

impl Ea for Base {
    #[inline(always)]
    unsafe fn of(cpu: &Cpu, op: *const Op) -> u64 {
        // SAFETY: the caller's op.
        unsafe { get::<u64>(cpu, (*op).base).wrapping_add((*op).disp as i64 as u64) }
    }
}

impl Ea for Indexed {
    #[inline(always)]
    unsafe fn of(cpu: &Cpu, op: *const Op) -> u64 {
        // SAFETY: the caller's op.
        unsafe {
            get::<u64>(cpu, (*op).base)
                .wrapping_add(get::<u64>(cpu, (*op).index) << ((*op).scale & 3))
                .wrapping_add((*op).disp as i64 as u64)
        }
    }
}

impl Ea for Segmented {
    #[inline(always)]
    unsafe fn of(cpu: &Cpu, op: *const Op) -> u64 {
        // SAFETY: the caller's op; segment numbers are below 6.
        unsafe { Indexed::of(cpu, op).wrapping_add(cpu.seg.get_unchecked((*op).seg as usize).base) }
    }
}

impl Ea for Flat {
    #[inline(always)]
    unsafe fn of(cpu: &Cpu, op: *const Op) -> u64 {
        // SAFETY: the caller's op.
        unsafe { Indexed::of(cpu, op) & LOW }
    }
}

/// What 32-bit code has of a stack pointer or an address.
pub(super) const LOW: u64 = 0xffff_ffff;

/// A two-operand operation on sign-extended words.
pub(crate) trait Binary {
    /// Whether the result is written (not CMP, TEST).
    const WRITES: bool;
    /// The result (upper bits are junk), with the flags set.
    unsafe fn run<T: Word>(cpu: &mut Cpu, a: u64, b: u64) -> u64;
    /// The result without flags, for the operations that take no carry.
    fn pure(a: u64, b: u64) -> u64;
}

macro_rules! binary {
    ($name:ident, $writes:literal, $pure:expr, |$cpu:ident, $a:ident, $b:ident, $t:ident| $body:expr) => {
        #[doc = stringify!($name)]
        pub(crate) struct $name;
        impl Binary for $name {
            const WRITES: bool = $writes;
            #[inline(always)]
            unsafe fn run<$t: Word>($cpu: &mut Cpu, $a: u64, $b: u64) -> u64 {
                $body
            }
            #[inline(always)]
            fn pure(a: u64, b: u64) -> u64 {
                let f: fn(u64, u64) -> u64 = $pure;
                f(a, b)
            }
        }
    };
}

#[inline(always)]
fn flags<T: Word>(cpu: &mut Cpu, kind: u32, dst: u64, src: u64) {
    cpu.lazy = Lazy { dst, src, op: kind | T::LOG2 << 8 };
}

#[inline(always)]
fn logic<T: Word>(cpu: &mut Cpu, r: u64) -> u64 {
    cpu.lazy.dst = r;
    cpu.lazy.op = kind::LOGIC | T::LOG2 << 8;
    r
}

binary!(Add, true, u64::wrapping_add, |cpu, a, b, T| {
    let r = T::from_u64(a.wrapping_add(b)).sx();
    flags::<T>(cpu, kind::ADD, r, b);
    r
});
binary!(Sub, true, u64::wrapping_sub, |cpu, a, b, T| {
    flags::<T>(cpu, kind::SUB, a, b);
    a.wrapping_sub(b)
});
binary!(Cmp, false, u64::wrapping_sub, |cpu, a, b, T| {
    flags::<T>(cpu, kind::SUB, a, b);
    0
});
binary!(And, true, |a, b| a & b, |cpu, a, b, T| logic::<T>(cpu, a & b));
binary!(Or, true, |a, b| a | b, |cpu, a, b, T| logic::<T>(cpu, a | b));
binary!(Xor, true, |a, b| a ^ b, |cpu, a, b, T| logic::<T>(cpu, a ^ b));
binary!(Test, false, |a, b| a & b, |cpu, a, b, T| logic::<T>(cpu, a & b));
binary!(Adc, true, u64::wrapping_add, |cpu, a, b, T| {
    let carry = cpu.lazy.cf();
    let r = T::from_u64(a.wrapping_add(b).wrapping_add(carry.into())).sx();
    flags::<T>(cpu, if carry { kind::ADC } else { kind::ADD }, r, b);
    r
});
binary!(Sbb, true, u64::wrapping_sub, |cpu, a, b, T| {
    let carry = cpu.lazy.cf();
    flags::<T>(cpu, if carry { kind::SBB } else { kind::SUB }, a, b);
    a.wrapping_sub(b).wrapping_sub(carry.into())
});

/// A handler's body: `$body` may use `?` on memory accesses, all of which come before anything is changed; then the next op.
macro_rules! handler {
    ($(#[$doc:meta])* $name:ident<$($g:ident $(: $bound:ident)?),*>($cpu:ident, $op:ident) $body:block) => {
        $(#[$doc])*
        pub(crate) unsafe fn $name<$($g $(: $bound)?),*>($cpu: &mut Cpu, $op: *const Op) -> *mut Block {
            /// The same with all that a TLB miss may lead to.
            #[cold]
            #[inline(never)]
            unsafe fn slow<$($g $(: $bound)?),*>($cpu: &mut Cpu, $op: *const Op) -> *mut Block {
                // SAFETY: as below.
                unsafe {
                    let done: Result<(), Trap> = (|| { $body; #[allow(unreachable_code)] Ok(()) })();
                    if done.is_err() {
                        return fault($cpu, $op);
                    }
                }
                next!($cpu, $op)
            }
            // SAFETY: `op` is a live op that the lowering made for this handler.
            unsafe {
                let done: Result<(), Trap> = {
                    let $cpu = &mut Fast($cpu);
                    (|| { $body; #[allow(unreachable_code)] Ok(()) })()
                };
                if done.is_err() {
                    return slow::<$($g),*>($cpu, $op);
                }
            }
            next!($cpu, $op)
        }
    };
}

handler! {
    /// Register, register.
    rr<O: Binary, T: Word>(cpu, op) {
        let (a, b) = (get::<T>(cpu, (*op).a).sx(), get::<T>(cpu, (*op).b).sx());
        let r = O::run::<T>(cpu, a, b);
        if O::WRITES { set(cpu, (*op).a, T::from_u64(r)); }
    }
}
handler! {
    /// Register, immediate.
    ri<O: Binary, T: Word>(cpu, op) {
        let a = get::<T>(cpu, (*op).a).sx();
        let r = O::run::<T>(cpu, a, (*op).imm);
        if O::WRITES { set(cpu, (*op).a, T::from_u64(r)); }
    }
}
handler! {
    /// Register, memory.
    rm<O: Binary, T: Word, A: Ea>(cpu, op) {
        let b = cpu.load::<T>(A::of(cpu, op))?;
        let a = get::<T>(cpu, (*op).a).sx();
        let r = O::run::<T>(cpu, a, b.sx());
        if O::WRITES { set(cpu, (*op).a, T::from_u64(r)); }
    }
}
handler! {
    /// Memory, register.
    mr<O: Binary, T: Word, A: Ea>(cpu, op) {
        let b = get::<T>(cpu, (*op).a).sx();
        modify::<O, T>(cpu, A::of(cpu, op), b)?;
    }
}
handler! {
    /// Memory, immediate.
    mi<O: Binary, T: Word, A: Ea>(cpu, op) {
        modify::<O, T>(cpu, A::of(cpu, op), (*op).imm)?;
    }
}

#[inline(always)]
unsafe fn modify<O: Binary, T: Word>(memory: &mut impl Memory, address: u64, b: u64) -> Result<(), Trap> {
    // SAFETY: the caller's.
    unsafe {
        if O::WRITES {
            memory.update::<T>(address, |cpu, a| T::from_u64(O::run::<T>(cpu, a.sx(), b)))
        } else {
            let a = memory.load::<T>(address)?;
            O::run::<T>(memory.cpu(), a.sx(), b);
            Ok(())
        }
    }
}

handler! {
    /// MOV register, register.
    mov_rr<T: Word>(cpu, op) {
        let value = get::<T>(cpu, (*op).b);
        set(cpu, (*op).a, value);
    }
}
handler! {
    /// MOV register, immediate.
    mov_ri<T: Word>(cpu, op) {
        set(cpu, (*op).a, T::from_u64((*op).imm));
    }
}
handler! {
    /// MOV register, memory.
    mov_rm<T: Word, A: Ea>(cpu, op) {
        let value = cpu.load::<T>(A::of(cpu, op))?;
        set(cpu, (*op).a, value);
    }
}
handler! {
    /// MOV memory, register.
    mov_mr<T: Word, A: Ea>(cpu, op) {
        let value = get::<T>(cpu, (*op).a);
        cpu.store::<T>(A::of(cpu, op), value)?;
    }
}
handler! {
    /// MOV memory, immediate.
    mov_mi<T: Word, A: Ea>(cpu, op) {
        cpu.store::<T>(A::of(cpu, op), T::from_u64((*op).imm))?;
    }
}
handler! {
    /// MOVZX register, register: D from S.
    movzx_rr<D: Word, S: Word>(cpu, op) {
        let value = get::<S>(cpu, (*op).b).to_u64();
        set(cpu, (*op).a, D::from_u64(value));
    }
}
handler! {
    /// MOVZX register, memory.
    movzx_rm<D: Word, S: Word, A: Ea>(cpu, op) {
        let value = cpu.load::<S>(A::of(cpu, op))?;
        set(cpu, (*op).a, D::from_u64(value.to_u64()));
    }
}
handler! {
    /// MOVSX register, register.
    movsx_rr<D: Word, S: Word>(cpu, op) {
        let value = get::<S>(cpu, (*op).b).sx();
        set(cpu, (*op).a, D::from_u64(value));
    }
}
handler! {
    /// MOVSX register, memory.
    movsx_rm<D: Word, S: Word, A: Ea>(cpu, op) {
        let value = cpu.load::<S>(A::of(cpu, op))?;
        set(cpu, (*op).a, D::from_u64(value.sx()));
    }
}
handler! {
    /// LEA.
    lea<T: Word, A: Ea>(cpu, op) {
        let address = A::of(cpu, op);
        set(cpu, (*op).a, T::from_u64(address));
    }
}
handler! {
    /// PUSH register, of 64 bits.
    push_r<>(cpu, op) {
        let value = get::<u64>(cpu, (*op).a);
        let sp = cpu.gpr[RSP].wrapping_sub(8);
        cpu.store::<u64>(sp, value)?;
        cpu.gpr[RSP] = sp;
    }
}
handler! {
    /// PUSH immediate.
    push_i<>(cpu, op) {
        let sp = cpu.gpr[RSP].wrapping_sub(8);
        cpu.store::<u64>(sp, (*op).imm)?;
        cpu.gpr[RSP] = sp;
    }
}
handler! {
    /// PUSH memory.
    push_m<A: Ea>(cpu, op) {
        let value = cpu.load::<u64>(A::of(cpu, op))?;
        let sp = cpu.gpr[RSP].wrapping_sub(8);
        if let Err(trap) = cpu.store::<u64>(sp, value) {
            // The op's segment is that of the operand read.
            if cpu.fault == crate::cpu::Fault::gp(0) { cpu.fault = crate::cpu::Fault::ss(0); }
            return Err(trap);
        }
        cpu.gpr[RSP] = sp;
    }
}
handler! {
    /// POP register. POP RSP leaves the value popped.
    pop_r<>(cpu, op) {
        let value = cpu.load::<u64>(cpu.gpr[RSP])?;
        cpu.gpr[RSP] = cpu.gpr[RSP].wrapping_add(8);
        set::<u64>(cpu, (*op).a, value);
    }
}
handler! {
    /// LEAVE.
    leave<>(cpu, op) {
        let value = cpu.load::<u64>(cpu.gpr[RBP])?;
        cpu.gpr[RSP] = cpu.gpr[RBP].wrapping_add(8);
        cpu.gpr[RBP] = value;
        let _ = op;
    }
}
handler! {
    /// PUSH register in flat 32-bit code.
    push32_r<>(cpu, op) {
        let value = get::<u32>(cpu, (*op).a);
        let sp = cpu.gpr[RSP].wrapping_sub(4) & LOW;
        cpu.store::<u32>(sp, value)?;
        cpu.gpr[RSP] = sp;
    }
}
handler! {
    /// PUSH immediate in flat 32-bit code.
    push32_i<>(cpu, op) {
        let sp = cpu.gpr[RSP].wrapping_sub(4) & LOW;
        cpu.store::<u32>(sp, (*op).imm as u32)?;
        cpu.gpr[RSP] = sp;
    }
}
handler! {
    /// PUSH memory in flat 32-bit code.
    push32_m<>(cpu, op) {
        let value = cpu.load::<u32>(Flat::of(cpu, op))?;
        let sp = cpu.gpr[RSP].wrapping_sub(4) & LOW;
        if let Err(trap) = cpu.store::<u32>(sp, value) {
            // As in `push_m`.
            if cpu.fault == crate::cpu::Fault::gp(0) { cpu.fault = crate::cpu::Fault::ss(0); }
            return Err(trap);
        }
        cpu.gpr[RSP] = sp;
    }
}
handler! {
    /// POP register in flat 32-bit code.
    pop32_r<>(cpu, op) {
        let sp = cpu.gpr[RSP] & LOW;
        let value = cpu.load::<u32>(sp)?;
        cpu.gpr[RSP] = sp.wrapping_add(4) & LOW;
        set::<u32>(cpu, (*op).a, value);
    }
}
handler! {
    /// LEAVE in flat 32-bit code.
    leave32<>(cpu, op) {
        let frame = cpu.gpr[RBP] & LOW;
        let value = cpu.load::<u32>(frame)?;
        cpu.gpr[RSP] = frame.wrapping_add(4) & LOW;
        cpu.gpr[RBP] = value.into();
        let _ = op;
    }
}
handler! {
    /// SHL register, immediate (not 0).
    shl_ri<T: Word>(cpu, op) {
        let half = get::<T>(cpu, (*op).a).to_u64() << ((*op).imm - 1);
        let r = T::from_u64(half << 1);
        flags::<T>(cpu, kind::SHL, r.sx(), T::from_u64(half).sx());
        set(cpu, (*op).a, r);
    }
}
handler! {
    /// SHR register, immediate (not 0).
    shr_ri<T: Word>(cpu, op) {
        let half = get::<T>(cpu, (*op).a).to_u64() >> ((*op).imm - 1);
        let r = T::from_u64(half >> 1);
        flags::<T>(cpu, kind::SHR, r.sx(), half);
        set(cpu, (*op).a, r);
    }
}
handler! {
    /// SAR register, immediate (not 0).
    sar_ri<T: Word>(cpu, op) {
        let half = (get::<T>(cpu, (*op).a).sx() as i64) >> ((*op).imm - 1);
        let r = (half >> 1) as u64;
        flags::<T>(cpu, kind::SAR, r, half as u64);
        set(cpu, (*op).a, T::from_u64(r));
    }
}
handler! {
    /// ROL register, immediate (less than the word, not 0). ROR comes as its complement would, but for the flags; `b` says which.
    rotate_ri<T: Word>(cpu, op) {
        let what = if (*op).b == 0 { alu::Shift::Rol } else { alu::Shift::Ror };
        let before = cpu.lazy;
        let (r, lazy) = alu::shift(what, T::LOG2, get::<T>(cpu, (*op).a).to_u64(), (*op).imm, before);
        cpu.lazy = lazy.unwrap_or(before);
        set(cpu, (*op).a, T::from_u64(r));
    }
}
handler! {
    /// ROL or ROR as above, where the flags are overwritten before anybody looks.
    rotate_quiet<T: Word>(cpu, op) {
        let a = get::<T>(cpu, (*op).a).to_u64();
        let bits = 8 * T::SIZE;
        let left = if (*op).b == 0 { (*op).imm } else { bits.wrapping_sub((*op).imm) } & (bits - 1);
        let r = if T::SIZE == 8 { a.rotate_left(left as u32) } else { a << left | a >> ((bits - left) & (bits - 1)) };
        set(cpu, (*op).a, T::from_u64(r));
    }
}
handler! {
    /// SHL register, CL.
    shl_cl<T: Word>(cpu, op) {
        let a = get::<T>(cpu, (*op).a);
        let count = cpu.gpr[RCX] & if T::SIZE == 8 { 63 } else { 31 };
        if count != 0 {
            let half = a.to_u64() << (count - 1);
            let r = T::from_u64(half << 1);
            flags::<T>(cpu, kind::SHL, r.sx(), T::from_u64(half).sx());
            set(cpu, (*op).a, r);
        } else {
            set(cpu, (*op).a, a);
        }
    }
}
handler! {
    /// SHR register, CL.
    shr_cl<T: Word>(cpu, op) {
        let a = get::<T>(cpu, (*op).a);
        let count = cpu.gpr[RCX] & if T::SIZE == 8 { 63 } else { 31 };
        if count != 0 {
            let half = a.to_u64() >> (count - 1);
            let r = T::from_u64(half >> 1);
            flags::<T>(cpu, kind::SHR, r.sx(), half);
            set(cpu, (*op).a, r);
        } else {
            set(cpu, (*op).a, a);
        }
    }
}
handler! {
    /// SAR register, CL.
    sar_cl<T: Word>(cpu, op) {
        let a = get::<T>(cpu, (*op).a);
        let count = cpu.gpr[RCX] & if T::SIZE == 8 { 63 } else { 31 };
        if count != 0 {
            let half = (a.sx() as i64) >> (count - 1);
            let r = (half >> 1) as u64;
            flags::<T>(cpu, kind::SAR, r, half as u64);
            set(cpu, (*op).a, T::from_u64(r));
        } else {
            set(cpu, (*op).a, a);
        }
    }
}
handler! {
    /// INC register, where the flags are overwritten before anybody looks.
    inc_quiet<T: Word>(cpu, op) {
        let r = get::<T>(cpu, (*op).a).to_u64().wrapping_add(1);
        set(cpu, (*op).a, T::from_u64(r));
    }
}
handler! {
    /// DEC register, likewise.
    dec_quiet<T: Word>(cpu, op) {
        let r = get::<T>(cpu, (*op).a).to_u64().wrapping_sub(1);
        set(cpu, (*op).a, T::from_u64(r));
    }
}
handler! {
    /// ROL or ROR of a register by CL; `b` says which.
    rotate_cl<T: Word>(cpu, op) {
        let what = if (*op).b == 0 { alu::Shift::Rol } else { alu::Shift::Ror };
        let before = cpu.lazy;
        let (r, lazy) = alu::shift(what, T::LOG2, get::<T>(cpu, (*op).a).to_u64(), cpu.gpr[RCX] & 0xff, before);
        cpu.lazy = lazy.unwrap_or(before);
        set(cpu, (*op).a, T::from_u64(r));
    }
}
handler! {
    /// INC register.
    inc_r<T: Word>(cpu, op) {
        let carry = cpu.lazy.cf();
        let r = T::from_u64(get::<T>(cpu, (*op).a).to_u64().wrapping_add(1));
        flags::<T>(cpu, kind::INC, r.sx(), carry.into());
        set(cpu, (*op).a, r);
    }
}
handler! {
    /// DEC register.
    dec_r<T: Word>(cpu, op) {
        let carry = cpu.lazy.cf();
        let r = T::from_u64(get::<T>(cpu, (*op).a).to_u64().wrapping_sub(1));
        flags::<T>(cpu, kind::DEC, r.sx(), carry.into());
        set(cpu, (*op).a, r);
    }
}
handler! {
    /// INC memory.
    inc_m<T: Word, A: Ea>(cpu, op) {
        cpu.update::<T>(A::of(cpu, op), |cpu, old| {
            let carry = cpu.lazy.cf();
            let r = T::from_u64(old.to_u64().wrapping_add(1));
            flags::<T>(cpu, kind::INC, r.sx(), carry.into());
            r
        })?;
    }
}
handler! {
    /// DEC memory.
    dec_m<T: Word, A: Ea>(cpu, op) {
        cpu.update::<T>(A::of(cpu, op), |cpu, old| {
            let carry = cpu.lazy.cf();
            let r = T::from_u64(old.to_u64().wrapping_sub(1));
            flags::<T>(cpu, kind::DEC, r.sx(), carry.into());
            r
        })?;
    }
}
handler! {
    /// NEG register.
    neg_r<T: Word>(cpu, op) {
        let a = get::<T>(cpu, (*op).a).sx();
        flags::<T>(cpu, kind::SUB, 0, a);
        set(cpu, (*op).a, T::from_u64(a.wrapping_neg()));
    }
}
handler! {
    /// NOT register.
    not_r<T: Word>(cpu, op) {
        let a = get::<T>(cpu, (*op).a).to_u64();
        set(cpu, (*op).a, T::from_u64(!a));
    }
}

#[inline(always)]
fn product<T: Word>(cpu: &mut Cpu, a: u64, b: u64) -> T {
    let (low, wide) = if T::SIZE == 8 {
        let (low, wide) = (a as i64).overflowing_mul(b as i64);
        (low as u64, wide)
    } else {
        let p = (a as i64).wrapping_mul(b as i64) as u64;
        (p, T::from_u64(p).sx() != p)
    };
    flags::<T>(cpu, kind::MUL, T::from_u64(low).sx(), wide.into());
    T::from_u64(low)
}

handler! {
    /// IMUL register, register.
    imul_rr<T: Word>(cpu, op) {
        let (a, b) = (get::<T>(cpu, (*op).a).sx(), get::<T>(cpu, (*op).b).sx());
        let r = product::<T>(cpu, a, b);
        set(cpu, (*op).a, r);
    }
}
handler! {
    /// IMUL register, register, immediate.
    imul_rri<T: Word>(cpu, op) {
        let b = get::<T>(cpu, (*op).b).sx();
        let r = product::<T>(cpu, b, (*op).imm);
        set(cpu, (*op).a, r);
    }
}
handler! {
    /// IMUL register, memory.
    imul_rm<T: Word, A: Ea>(cpu, op) {
        let b = cpu.load::<T>(A::of(cpu, op))?;
        let a = get::<T>(cpu, (*op).a).sx();
        let r = product::<T>(cpu, a, b.sx());
        set(cpu, (*op).a, r);
    }
}
handler! {
    /// MUL register.
    mul_r<T: Word>(cpu, op) {
        let (low, high, lazy) = alu::multiply(false, T::LOG2, cpu.gpr[RAX], get::<T>(cpu, (*op).a).to_u64());
        set(cpu, RAX as u8, T::from_u64(low));
        set(cpu, RDX as u8, T::from_u64(high));
        cpu.lazy = lazy;
    }
}
handler! {
    /// XCHG register, register.
    xchg_rr<T: Word>(cpu, op) {
        let (a, b) = (get::<T>(cpu, (*op).a), get::<T>(cpu, (*op).b));
        set(cpu, (*op).a, b);
        set(cpu, (*op).b, a);
    }
}
handler! {
    /// XCHG memory, register.
    xchg_mr<T: Word, A: Ea>(cpu, op) {
        let new = get::<T>(cpu, (*op).a);
        let old = cpu.update_locked::<T, T>(A::of(cpu, op), |old| (new, old))?;
        set(cpu, (*op).a, old);
    }
}
handler! {
    /// LOCK XADD memory, register. Without LOCK the same.
    xadd_mr<T: Word, A: Ea>(cpu, op) {
        let b = get::<T>(cpu, (*op).a);
        let add = b.to_u64();
        let old = cpu.update_locked::<T, T>(A::of(cpu, op), |old| (T::from_u64(old.to_u64().wrapping_add(add)), old))?;
        Add::run::<T>(cpu, old.sx(), b.sx());
        set(cpu, (*op).a, old);
    }
}
handler! {
    /// CMPXCHG memory, register: not atomic.
    cmpxchg_mr<T: Word, A: Ea>(cpu, op) {
        let new = get::<T>(cpu, (*op).a);
        let expected = T::from_u64(cpu.gpr[RAX]);
        let mut old = expected;
        cpu.update::<T>(A::of(cpu, op), |_, was| {
            old = was;
            if was.to_u64() == expected.to_u64() { new } else { was }
        })?;
        exchanged(cpu, expected, old);
    }
}
handler! {
    /// LOCK CMPXCHG memory, register.
    lock_cmpxchg_mr<T: Word, A: Ea>(cpu, op) {
        let new = get::<T>(cpu, (*op).a);
        let expected = T::from_u64(cpu.gpr[RAX]);
        let old = cpu.update_locked::<T, T>(A::of(cpu, op), |was| (if was.to_u64() == expected.to_u64() { new } else { was }, was))?;
        exchanged(cpu, expected, old);
    }
}

#[inline(always)]
unsafe fn exchanged<T: Word>(cpu: &mut Cpu, expected: T, old: T) {
    flags::<T>(cpu, kind::SUB, expected.sx(), old.sx());
    if old.to_u64() != expected.to_u64() {
        // SAFETY: RAX is a register, and its low byte's offset is 0 as well.
        unsafe { set(cpu, RAX as u8, old) };
    }
}

handler! {
    /// A locked operation on memory with a register.
    lock_mr<O: Binary, T: Word, A: Ea>(cpu, op) {
        let b = get::<T>(cpu, (*op).a).sx();
        locked::<O, T>(cpu, A::of(cpu, op), b)?;
    }
}
handler! {
    /// A locked operation on memory with an immediate.
    lock_mi<O: Binary, T: Word, A: Ea>(cpu, op) {
        locked::<O, T>(cpu, A::of(cpu, op), (*op).imm)?;
    }
}

/// The operation is done twice: on memory without flags, and once more on what was there, for the flags.
#[inline(always)]
unsafe fn locked<O: Binary, T: Word>(memory: &mut impl Memory, address: u64, b: u64) -> Result<(), Trap> {
    let old = memory.update_locked::<T, T>(address, |old| (T::from_u64(O::pure(old.sx(), b)), old))?;
    // SAFETY: the caller's.
    unsafe { O::run::<T>(memory.cpu(), old.sx(), b) };
    Ok(())
}

handler! {
    /// BSWAP.
    bswap<T: Word>(cpu, op) {
        let value = get::<u64>(cpu, (*op).a);
        let swapped = if T::SIZE == 8 { value.swap_bytes() } else { u64::from((value as u32).swap_bytes()) };
        set::<u64>(cpu, (*op).a, swapped);
    }
}
handler! {
    /// CDQE.
    cdqe<>(cpu, op) {
        cpu.gpr[RAX] = cpu.gpr[RAX] as i32 as i64 as u64;
        let _ = op;
    }
}
handler! {
    /// CQO.
    cqo<>(cpu, op) {
        cpu.gpr[RDX] = ((cpu.gpr[RAX] as i64) >> 63) as u64;
        let _ = op;
    }
}
handler! {
    /// BT register, register.
    bt_rr<T: Word>(cpu, op) {
        let carry = get::<T>(cpu, (*op).a).to_u64() >> (get::<T>(cpu, (*op).b).to_u64() & (8 * T::SIZE - 1)) & 1;
        carried(cpu, carry);
    }
}
handler! {
    /// BT register, immediate.
    bt_ri<T: Word>(cpu, op) {
        let carry = get::<T>(cpu, (*op).a).to_u64() >> ((*op).imm & (8 * T::SIZE - 1)) & 1;
        carried(cpu, carry);
    }
}

#[inline(always)]
fn carried(cpu: &mut Cpu, carry: u64) {
    let flags = cpu.lazy.flags();
    cpu.set_arith(flags & !crate::cpu::fl::CF | carry);
}
