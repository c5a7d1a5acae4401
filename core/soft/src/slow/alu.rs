//! Integer arithmetic as functions of values: a result and the lazy flags, for words of any size.
//!
//! Operands come in with anything above their size; results and the flags' words are sign-extended from it.
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_possible_wrap,
    reason = "arithmetic modulo the word size"
)]

use crate::cpu::fl;
use crate::flags::{Lazy, kind, sign_extend as sx};

/// What the two-operand instructions do, in the order of the encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Alu {
    Add,
    Or,
    Adc,
    Sbb,
    And,
    Sub,
    Xor,
}

fn lazy(kind: u32, log2: u32, dst: u64, src: u64) -> Lazy {
    Lazy { dst, src, op: kind | log2 << 8 }
}

/// `a op b`, with a carry in for ADC and SBB.
pub(crate) fn binary(op: Alu, log2: u32, a: u64, b: u64, carry: bool) -> (u64, Lazy) {
    let (a, b) = (sx(a, log2), sx(b, log2));
    let c = u64::from(carry);
    match op {
        Alu::Add => {
            let r = sx(a.wrapping_add(b), log2);
            (r, lazy(kind::ADD, log2, r, b))
        }
        Alu::Adc => {
            let r = sx(a.wrapping_add(b).wrapping_add(c), log2);
            (r, lazy(if carry { kind::ADC } else { kind::ADD }, log2, r, b))
        }
        Alu::Sub => (sx(a.wrapping_sub(b), log2), lazy(kind::SUB, log2, a, b)),
        Alu::Sbb => {
            let r = sx(a.wrapping_sub(b).wrapping_sub(c), log2);
            (r, lazy(if carry { kind::SBB } else { kind::SUB }, log2, a, b))
        }
        Alu::And => logic(log2, a & b),
        Alu::Or => logic(log2, a | b),
        Alu::Xor => logic(log2, a ^ b),
    }
}

fn logic(log2: u32, r: u64) -> (u64, Lazy) {
    (r, lazy(kind::LOGIC, log2, r, 0))
}

/// INC (`up`) and DEC; the carry stays.
pub(crate) fn step(up: bool, log2: u32, a: u64, carry: bool) -> (u64, Lazy) {
    let a = sx(a, log2);
    let r = sx(if up { a.wrapping_add(1) } else { a.wrapping_sub(1) }, log2);
    (r, lazy(if up { kind::INC } else { kind::DEC }, log2, r, carry.into()))
}

/// NEG.
pub(crate) fn negate(log2: u32, a: u64) -> (u64, Lazy) {
    binary(Alu::Sub, log2, 0, a, false)
}

/// The shifts and rotates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shift {
    Rol,
    Ror,
    Rcl,
    Rcr,
    Shl,
    Shr,
    Sar,
}

/// Shifts or rotates. No flags: nothing happened to them.
pub(crate) fn shift(op: Shift, log2: u32, a: u64, count: u64, before: Lazy) -> (u64, Option<Lazy>) {
    let bits = 8u64 << log2;
    let count = count & if log2 == 3 { 63 } else { 31 };
    if count == 0 {
        return (a, None);
    }
    let mask = u64::MAX >> (64 - bits);
    let a = a & mask;
    let top = |v: u64| v >> (bits - 1) & 1;
    match op {
        Shift::Shl => {
            let half = if count > bits { 0 } else { a << (count - 1) & mask };
            let r = sx(half << 1, log2);
            (r, Some(lazy(kind::SHL, log2, r, sx(half, log2))))
        }
        Shift::Shr => {
            let half = if count > bits { 0 } else { a >> (count - 1) };
            let r = sx(half >> 1, log2);
            (r, Some(lazy(kind::SHR, log2, r, half)))
        }
        Shift::Sar => {
            let half = ((sx(a, log2) as i64) >> (count - 1).min(63)) as u64;
            let r = ((half as i64) >> 1) as u64;
            (r, Some(lazy(kind::SAR, log2, r, half)))
        }
        Shift::Rol | Shift::Ror => {
            let left = if op == Shift::Rol { count % bits } else { (bits - count % bits) % bits };
            let r = if left == 0 { a } else { (a << left | a >> (bits - left)) & mask };
            let (cf, of) = if op == Shift::Rol {
                (r & 1, top(r) ^ r & 1)
            } else {
                (top(r), top(r) ^ r >> (bits - 2) & 1)
            };
            (r, Some(with_carry(before, cf, of)))
        }
        Shift::Rcl | Shift::Rcr => {
            // A rotate of one bit more than the word: the carry is on top.
            let width = bits + 1;
            let count = count % width;
            if count == 0 {
                let cf = u64::from(before.cf());
                let of = if op == Shift::Rcl { top(a) ^ cf } else { top(a) ^ a >> (bits - 2) & 1 };
                return (a, Some(with_carry(before, cf, of)));
            }
            let whole = u128::from(a) | u128::from(before.cf()) << bits;
            let left = if op == Shift::Rcl { count } else { width - count };
            let turned = (whole << left | whole >> (width - left)) & ((1 << width) - 1);
            let (r, cf) = (turned as u64 & mask, (turned >> bits) as u64 & 1);
            let of = if op == Shift::Rcl { top(r) ^ cf } else { top(r) ^ r >> (bits - 2) & 1 };
            (r, Some(with_carry(before, cf, of)))
        }
    }
}

fn with_carry(before: Lazy, cf: u64, of: u64) -> Lazy {
    Lazy::explicit(before.flags() & !(fl::CF | fl::OF) | cf | of << 11)
}

/// SHLD (`left`) and SHRD. No flags: nothing happened to them.
pub(crate) fn double_shift(left: bool, log2: u32, a: u64, b: u64, count: u64) -> (u64, Option<Lazy>) {
    let bits = 8u64 << log2;
    let count = count & if log2 == 3 { 63 } else { 31 };
    if count == 0 {
        return (a, None);
    }
    let mask = u64::MAX >> (64 - bits);
    let (a, b) = (a & mask, b & mask);
    let (r, cf) = if left {
        // A 16-bit shift by more than 16 goes on with the bits of the destination.
        let whole = if bits == 16 {
            u128::from(a) << 32 | u128::from(b) << 16 | u128::from(a)
        } else {
            u128::from(a) << bits | u128::from(b)
        };
        let width = if bits == 16 { 48 } else { 2 * bits };
        let shifted = whole << (count - 1);
        ((shifted << 1 >> (width - bits)) as u64 & mask, (shifted >> (width - 1)) as u64 & 1)
    } else {
        let whole = if bits == 16 {
            u128::from(a) << 32 | u128::from(b) << 16 | u128::from(a)
        } else {
            u128::from(b) << bits | u128::from(a)
        };
        let shifted = whole >> (count - 1);
        ((shifted >> 1) as u64 & mask, shifted as u64 & 1)
    };
    let mut flags = lazy(kind::LOGIC, log2, sx(r, log2), 0).flags() & !fl::CF | cf;
    if (r ^ a) >> (bits - 1) & 1 != 0 {
        flags |= fl::OF;
    }
    (sx(r, log2), Some(Lazy::explicit(flags)))
}

/// The product's low and high words, and the flags.
pub(crate) fn multiply(signed: bool, log2: u32, a: u64, b: u64) -> (u64, u64, Lazy) {
    let bits = 8u32 << log2;
    let mask = u64::MAX >> (64 - bits);
    let (low, high, wide) = if signed {
        let p = i128::from(sx(a, log2) as i64) * i128::from(sx(b, log2) as i64);
        let low = sx(p as u64, log2);
        (low, (p >> bits) as u64, p != i128::from(low as i64))
    } else {
        let p = u128::from(a & mask) * u128::from(b & mask);
        (p as u64, (p >> bits) as u64, p >> bits != 0)
    };
    let low = sx(low, log2);
    (low & mask, high & mask, lazy(kind::MUL, log2, low, wide.into()))
}

/// The quotient and remainder of `high:low / b`; nothing: #DE.
pub(crate) fn divide(signed: bool, log2: u32, low: u64, high: u64, b: u64) -> Option<(u64, u64)> {
    let bits = 8u32 << log2;
    let mask = u64::MAX >> (64 - bits);
    let whole = u128::from(high & mask) << bits | u128::from(low & mask);
    if signed {
        let shift = 128 - 2 * bits;
        let (whole, b) = ((whole << shift) as i128 >> shift, i128::from(sx(b, log2) as i64));
        if b == 0 {
            return None;
        }
        let q = whole.checked_div(b)?;
        let limit = 1i128 << (bits - 1);
        (q >= -limit && q < limit).then(|| (q as u64 & mask, (whole % b) as u64 & mask))
    } else {
        let b = u128::from(b & mask);
        if b == 0 || whole / b > u128::from(mask) {
            return None;
        }
        Some(((whole / b) as u64, (whole % b) as u64))
    }
}
