//! SSE arithmetic on the host's own unit: one inline-assembly instruction each, under the guest's MXCSR.

use std::arch::asm;

use crate::int::{integer, vector};
use crate::{FpFault, FpState};

/// An operation that looks at MXCSR: `a` becomes the result, the answer is MXCSR afterwards.
pub(crate) trait Arith {
    fn exec(a: &mut u128, b: u128, mxcsr: u32) -> u32;
}

const FLAGS: u32 = 0x3f;
const MASKS: u32 = 0x1f80;
const UNDERFLOW: u32 = 0x10;
const FLUSH_TO_ZERO: u32 = 0x8000;
/// Invalid, denormal, divide by zero: found before the operation computes anything.
const PRE: u32 = 0x7;

/// Executes, merges the sticky flags, and answers #XM, with `a` untouched, if an unmasked one came up.
#[inline(always)]
pub(crate) fn guarded<A: Arith>(state: &mut FpState, a: &mut u128, b: u128) -> Result<(), FpFault> {
    if state.mxcsr & MASKS != MASKS {
        return unmasked(state, a, b, A::exec);
    }
    state.mxcsr |= A::exec(a, b, state.mxcsr & !FLAGS) & FLAGS;
    Ok(())
}

/// As [`guarded`] with some exception unmasked. Runs masked and judges by the flags; one thing differs from a masked run:
/// an unmasked underflow is reported for exact tiny results too (and flushing is off), which a second run with flushing on tells. Not exact: with an unmasked
/// overflow or underflow, PE is that of the masked response, not that of a result with an unbounded exponent.
#[cold]
#[inline(never)]
fn unmasked(
    state: &mut FpState,
    a: &mut u128,
    b: u128,
    exec: fn(&mut u128, u128, u32) -> u32,
) -> Result<(), FpFault> {
    let enabled = !state.mxcsr >> 7 & FLAGS;
    let mut control = state.mxcsr & !FLAGS | MASKS;
    let mut flags = 0;
    if enabled & UNDERFLOW != 0 {
        let mut scratch = *a;
        flags |= exec(&mut scratch, b, control | FLUSH_TO_ZERO) & UNDERFLOW;
        control &= !FLUSH_TO_ZERO;
    }
    let mut result = *a;
    flags |= exec(&mut result, b, control) & FLAGS;
    if flags & enabled & PRE != 0 {
        state.mxcsr |= flags & PRE;
        return Err(FpFault::Xm);
    }
    state.mxcsr |= flags;
    if flags & enabled != 0 {
        return Err(FpFault::Xm);
    }
    *a = result;
    Ok(())
}

/// `Name = "instruction"` with operands `xmm, xmm`, and optionally `, immediate`.
macro_rules! arith {
    ($($name:ident = $insn:literal $(, $imm:literal)?;)*) => {$(
        pub(crate) struct $name;
        impl Arith for $name {
            #[inline(always)]
            fn exec(a: &mut u128, b: u128, mxcsr: u32) -> u32 {
                let mut control = mxcsr;
                let mut host = 0_u32;
                let mut value = vector(*a);
                // SAFETY: reads and writes the named registers and the two words; the host's MXCSR is put back.
                unsafe {
                    asm!(
                        "stmxcsr [{host}]",
                        "ldmxcsr [{control}]",
                        concat!($insn, " {a}, {b}" $(, ", ", $imm)?),
                        "stmxcsr [{control}]",
                        "ldmxcsr [{host}]",
                        host = in(reg) &raw mut host,
                        control = in(reg) &raw mut control,
                        a = inout(xmm_reg) value,
                        b = in(xmm_reg) vector(b),
                        options(nostack, preserves_flags)
                    );
                }
                *a = integer(value);
                control
            }
        }
    )*};
}

arith! {
    Addps = "addps"; Addpd = "addpd"; Addss = "addss"; Addsd = "addsd";
    Subps = "subps"; Subpd = "subpd"; Subss = "subss"; Subsd = "subsd";
    Mulps = "mulps"; Mulpd = "mulpd"; Mulss = "mulss"; Mulsd = "mulsd";
    Divps = "divps"; Divpd = "divpd"; Divss = "divss"; Divsd = "divsd";
    Minps = "minps"; Minpd = "minpd"; Minss = "minss"; Minsd = "minsd";
    Maxps = "maxps"; Maxpd = "maxpd"; Maxss = "maxss"; Maxsd = "maxsd";
    Sqrtps = "sqrtps"; Sqrtpd = "sqrtpd"; Sqrtss = "sqrtss"; Sqrtsd = "sqrtsd";
    Rcpps = "rcpps"; Rcpss = "rcpss"; Rsqrtps = "rsqrtps"; Rsqrtss = "rsqrtss";
    Cvtdq2ps = "cvtdq2ps"; Cvtps2dq = "cvtps2dq"; Cvttps2dq = "cvttps2dq";
    Cvtdq2pd = "cvtdq2pd"; Cvtpd2dq = "cvtpd2dq"; Cvttpd2dq = "cvttpd2dq";
    Cvtps2pd = "cvtps2pd"; Cvtpd2ps = "cvtpd2ps"; Cvtss2sd = "cvtss2sd"; Cvtsd2ss = "cvtsd2ss";
    Cmpps0 = "cmpps", "0"; Cmpps1 = "cmpps", "1"; Cmpps2 = "cmpps", "2"; Cmpps3 = "cmpps", "3";
    Cmpps4 = "cmpps", "4"; Cmpps5 = "cmpps", "5"; Cmpps6 = "cmpps", "6"; Cmpps7 = "cmpps", "7";
    Cmppd0 = "cmppd", "0"; Cmppd1 = "cmppd", "1"; Cmppd2 = "cmppd", "2"; Cmppd3 = "cmppd", "3";
    Cmppd4 = "cmppd", "4"; Cmppd5 = "cmppd", "5"; Cmppd6 = "cmppd", "6"; Cmppd7 = "cmppd", "7";
    Cmpss0 = "cmpss", "0"; Cmpss1 = "cmpss", "1"; Cmpss2 = "cmpss", "2"; Cmpss3 = "cmpss", "3";
    Cmpss4 = "cmpss", "4"; Cmpss5 = "cmpss", "5"; Cmpss6 = "cmpss", "6"; Cmpss7 = "cmpss", "7";
    Cmpsd0 = "cmpsd", "0"; Cmpsd1 = "cmpsd", "1"; Cmpsd2 = "cmpsd", "2"; Cmpsd3 = "cmpsd", "3";
    Cmpsd4 = "cmpsd", "4"; Cmpsd5 = "cmpsd", "5"; Cmpsd6 = "cmpsd", "6"; Cmpsd7 = "cmpsd", "7";
}

/// A general-purpose register as source: `b` holds its value.
macro_rules! from_gpr {
    ($($name:ident = $insn:literal;)*) => {$(
        pub(crate) struct $name;
        impl Arith for $name {
            #[inline(always)]
            fn exec(a: &mut u128, b: u128, mxcsr: u32) -> u32 {
                let mut control = mxcsr;
                let mut host = 0_u32;
                let mut value = vector(*a);
                // SAFETY: as in `arith`.
                unsafe {
                    asm!(
                        "stmxcsr [{host}]",
                        "ldmxcsr [{control}]",
                        concat!($insn),
                        "stmxcsr [{control}]",
                        "ldmxcsr [{host}]",
                        host = in(reg) &raw mut host,
                        control = in(reg) &raw mut control,
                        a = inout(xmm_reg) value,
                        b = in(reg) b as u64,
                        options(nostack, preserves_flags)
                    );
                }
                *a = integer(value);
                control
            }
        }
    )*};
}

from_gpr! {
    Cvtsi2ss32 = "cvtsi2ss {a}, {b:e}"; Cvtsi2ss64 = "cvtsi2ss {a}, {b:r}";
    Cvtsi2sd32 = "cvtsi2sd {a}, {b:e}"; Cvtsi2sd64 = "cvtsi2sd {a}, {b:r}";
}

/// A general-purpose register as result: in the low half of `a`.
macro_rules! to_gpr {
    ($($name:ident = $insn:literal;)*) => {$(
        pub(crate) struct $name;
        impl Arith for $name {
            #[inline(always)]
            fn exec(a: &mut u128, b: u128, mxcsr: u32) -> u32 {
                let mut control = mxcsr;
                let mut host = 0_u32;
                let value: u64;
                // SAFETY: as in `arith`.
                unsafe {
                    asm!(
                        "stmxcsr [{host}]",
                        "ldmxcsr [{control}]",
                        $insn,
                        "stmxcsr [{control}]",
                        "ldmxcsr [{host}]",
                        host = in(reg) &raw mut host,
                        control = in(reg) &raw mut control,
                        a = out(reg) value,
                        b = in(xmm_reg) vector(b),
                        options(nostack, preserves_flags)
                    );
                }
                *a = u128::from(value);
                control
            }
        }
    )*};
}

to_gpr! {
    Cvtss2si32 = "cvtss2si {a:e}, {b}"; Cvtss2si64 = "cvtss2si {a:r}, {b}";
    Cvtsd2si32 = "cvtsd2si {a:e}, {b}"; Cvtsd2si64 = "cvtsd2si {a:r}, {b}";
    Cvttss2si32 = "cvttss2si {a:e}, {b}"; Cvttss2si64 = "cvttss2si {a:r}, {b}";
    Cvttsd2si32 = "cvttsd2si {a:e}, {b}"; Cvttsd2si64 = "cvttsd2si {a:r}, {b}";
}

/// Compares that set flags: the flags replace `a`.
macro_rules! to_flags {
    ($($name:ident = $insn:literal;)*) => {$(
        pub(crate) struct $name;
        impl Arith for $name {
            #[inline(always)]
            fn exec(a: &mut u128, b: u128, mxcsr: u32) -> u32 {
                let mut control = mxcsr;
                let mut host = 0_u32;
                let flags: u32;
                // SAFETY: as in `arith`.
                unsafe {
                    asm!(
                        "stmxcsr [{host}]",
                        "ldmxcsr [{control}]",
                        concat!($insn, " {a}, {b}"),
                        "lahf",
                        "movzx eax, ah",
                        "stmxcsr [{control}]",
                        "ldmxcsr [{host}]",
                        host = in(reg) &raw mut host,
                        control = in(reg) &raw mut control,
                        a = in(xmm_reg) vector(*a),
                        b = in(xmm_reg) vector(b),
                        out("eax") flags,
                        options(nostack)
                    );
                }
                *a = u128::from(flags & 0xd5);
                control
            }
        }
    )*};
}

to_flags! {
    Comiss = "comiss"; Comisd = "comisd"; Ucomiss = "ucomiss"; Ucomisd = "ucomisd";
}
