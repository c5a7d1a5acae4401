//! Fast handlers of the SSE moves that 64-bit user code does most. The rest goes through [`super::fp`].
#![allow(clippy::redundant_closure_call, reason = "a handler's body is a closure so that it may use `?`")]
#![allow(unsafe_code, reason = "ops are reached by raw pointer; register numbers were made by the lowering")]

use tenon_soft_fp::Kind;

use super::fp::allowed;
use super::int::{Ea, get, set};
use super::{fault, next};
use crate::block::{Block, Op};
use crate::cpu::{Cpu, Fault, vec};
use crate::mem::{Fast, Trap, Word};

/// A handler's body, as in [`super::int`], after the checks of the control registers.
macro_rules! handler {
    ($(#[$doc:meta])* $name:ident[$($bound:tt)*]<$($g:ident),*>($cpu:ident, $op:ident) $body:block) => {
        $(#[$doc])*
        pub(crate) unsafe fn $name<$($bound)*>($cpu: &mut Cpu, $op: *const Op) -> *mut Block {
            /// The same with all that a TLB miss may lead to.
            #[cold]
            #[inline(never)]
            unsafe fn slow<$($bound)*>($cpu: &mut Cpu, $op: *const Op) -> *mut Block {
                // SAFETY: as below.
                unsafe {
                    if let Err(refused) = allowed($cpu, Kind::Sse) {
                        $cpu.fault = refused;
                        return fault($cpu, $op);
                    }
                    let done: Result<(), Trap> = (|| { $body; Ok(()) })();
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
                    (|| {
                        if allowed($cpu, Kind::Sse).is_err() {
                            return Err(Trap);
                        }
                        $body;
                        Ok(())
                    })()
                };
                if done.is_err() {
                    return slow::<$($g),*>($cpu, $op);
                }
            }
            next!($cpu, $op)
        }
    };
}

#[inline(always)]
fn aligned<const ALIGNED: bool>(cpu: &mut Cpu, address: u64) -> Result<(), Trap> {
    if ALIGNED && address & 15 != 0 {
        // Not like an address that is not canonical, which is the stack's fault where the base is RSP.
        cpu.fault = Fault::Exception { vector: vec::GP, error: Some(0), address: 1 };
        return Err(Trap);
    }
    Ok(())
}

#[inline(always)]
unsafe fn xmm(cpu: &mut Cpu, n: u8) -> &mut u128 {
    // SAFETY: register numbers are below 16.
    unsafe { cpu.fx.xmm.get_unchecked_mut(n as usize) }
}

handler! {
    /// MOVAPS and its kin, register to register.
    mov_rr[]<>(cpu, op) {
        let value = *xmm(cpu, (*op).b);
        *xmm(cpu, (*op).a) = value;
    }
}
handler! {
    /// MOVUPS, MOVDQU (or the aligned forms), from memory.
    load[A: Ea, const ALIGNED: bool]<A, ALIGNED>(cpu, op) {
        let address = A::of(cpu, op);
        aligned::<ALIGNED>(cpu, address)?;
        let value = cpu.load_wide(address)?;
        *xmm(cpu, (*op).a) = value;
    }
}
handler! {
    /// MOVUPS, MOVDQU (or the aligned forms), to memory.
    store[A: Ea, const ALIGNED: bool]<A, ALIGNED>(cpu, op) {
        let address = A::of(cpu, op);
        aligned::<ALIGNED>(cpu, address)?;
        let value = *xmm(cpu, (*op).a);
        cpu.store_wide(address, value)?;
    }
}
handler! {
    /// MOVQ, MOVD, MOVSD, MOVSS from memory: the rest becomes zero.
    load_low[T: Word, A: Ea]<T, A>(cpu, op) {
        let value = cpu.load::<T>(A::of(cpu, op))?;
        *xmm(cpu, (*op).a) = value.to_u64().into();
    }
}
handler! {
    /// MOVQ, MOVD, MOVSD, MOVSS, MOVLPS, MOVLPD to memory.
    store_low[T: Word, A: Ea]<T, A>(cpu, op) {
        let [low, _] = halves(*xmm(cpu, (*op).a));
        cpu.store::<T>(A::of(cpu, op), T::from_u64(low))?;
    }
}
handler! {
    /// MOVHPS, MOVHPD to memory.
    store_high[A: Ea]<A>(cpu, op) {
        let [_, high] = halves(*xmm(cpu, (*op).a));
        cpu.store::<u64>(A::of(cpu, op), high)?;
    }
}
handler! {
    /// MOVQ, MOVD from a general-purpose register.
    from_gpr[T: Word]<T>(cpu, op) {
        let value = get::<T>(cpu, (*op).b).to_u64();
        *xmm(cpu, (*op).a) = value.into();
    }
}
handler! {
    /// MOVQ, MOVD to a general-purpose register.
    to_gpr[T: Word]<T>(cpu, op) {
        let [low, _] = halves(*xmm(cpu, (*op).b));
        set::<T>(cpu, (*op).a, T::from_u64(low));
    }
}
handler! {
    /// PXOR, XORPS, XORPD.
    xor_rr[]<>(cpu, op) {
        let value = *xmm(cpu, (*op).b);
        *xmm(cpu, (*op).a) ^= value;
    }
}
handler! {
    /// POR, ORPS, ORPD.
    or_rr[]<>(cpu, op) {
        let value = *xmm(cpu, (*op).b);
        *xmm(cpu, (*op).a) |= value;
    }
}
handler! {
    /// PCMPEQB.
    equal_bytes_rr[]<>(cpu, op) {
        let (a, b) = (xmm(cpu, (*op).a).to_le_bytes(), xmm(cpu, (*op).b).to_le_bytes());
        *xmm(cpu, (*op).a) = equal_bytes(a, b);
    }
}
handler! {
    /// PCMPEQB with memory.
    equal_bytes_rm[A: Ea]<A>(cpu, op) {
        let address = A::of(cpu, op);
        aligned::<true>(cpu, address)?;
        let b = cpu.load_wide(address)?.to_le_bytes();
        let a = xmm(cpu, (*op).a).to_le_bytes();
        *xmm(cpu, (*op).a) = equal_bytes(a, b);
    }
}
handler! {
    /// PMOVMSKB.
    byte_mask[]<>(cpu, op) {
        let bytes = xmm(cpu, (*op).b).to_le_bytes();
        let mask = bytes.iter().rev().fold(0u32, |mask, byte| mask << 1 | u32::from(byte >> 7));
        set::<u32>(cpu, (*op).a, mask);
    }
}

#[inline(always)]
fn equal_bytes(a: [u8; 16], b: [u8; 16]) -> u128 {
    let mut equal = [0; 16];
    for n in 0..16 {
        equal[n] = if a[n] == b[n] { 0xff } else { 0 };
    }
    u128::from_le_bytes(equal)
}

#[inline(always)]
fn halves(value: u128) -> [u64; 2] {
    let bytes = value.to_le_bytes();
    let half = |at: usize| {
        let mut half = [0; 8];
        half.copy_from_slice(&bytes[at..at + 8]);
        u64::from_le_bytes(half)
    };
    [half(0), half(8)]
}
