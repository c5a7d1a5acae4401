//! The functions that connect kernels to registers and the memory operand.
//!
//! `MEM` says that the source is the memory operand. Whatever lies beyond the operand's size in the scratch has no effect:
//! each kernel looks only at the bytes that its instruction reads.

use crate::int::{Int, LOW, byte_signs};
use crate::{FpFault, FpState, Operands};

pub(crate) type Done = Result<(), FpFault>;

pub(crate) fn undefined(_: &mut FpState, _: &mut Operands) -> Done {
    Err(FpFault::Ud)
}

#[inline(always)]
fn scratch(operands: &Operands) -> u128 {
    // SAFETY: 512 bytes, aligned to 16.
    unsafe { operands.mem.as_ptr().cast::<u128>().read() }
}

#[inline(always)]
fn set_scratch(operands: &mut Operands, value: u128) {
    // SAFETY: 512 bytes, aligned to 16.
    unsafe { operands.mem.as_mut_ptr().cast::<u128>().write(value) }
}

#[inline(always)]
const fn xmm_number(register: u8) -> usize {
    (register & 15) as usize
}

#[inline(always)]
pub(crate) fn xmm_source<const MEM: bool>(state: &FpState, operands: &Operands) -> u128 {
    if MEM { scratch(operands) } else { state.xmm[xmm_number(operands.src)] }
}

#[inline(always)]
fn mm_source<const MEM: bool>(state: &FpState, operands: &Operands) -> u128 {
    if MEM { scratch(operands) & LOW } else { u128::from(state.mm(operands.src)) }
}

pub(crate) fn xmm<K: Int, const MEM: bool>(state: &mut FpState, operands: &mut Operands) -> Done {
    let source = xmm_source::<MEM>(state, operands);
    let destination = &mut state.xmm[xmm_number(operands.dst)];
    *destination = K::exec(*destination, source, operands.imm as u8);
    Ok(())
}

pub(crate) fn mmx<K: Int, const MEM: bool>(state: &mut FpState, operands: &mut Operands) -> Done {
    state.enter_mmx();
    let source = mm_source::<MEM>(state, operands);
    let result = K::exec(state.mm(operands.dst).into(), source, operands.imm as u8);
    state.set_mm(operands.dst, result as u64);
    Ok(())
}

/// Packs: the kernel's low half comes from one 128-bit register, here made of both.
pub(crate) fn mmx_pack<K: Int, const MEM: bool>(state: &mut FpState, operands: &mut Operands) -> Done {
    state.enter_mmx();
    let source = mm_source::<MEM>(state, operands);
    let result = K::exec(u128::from(state.mm(operands.dst)) | source << 64, 0, 0);
    state.set_mm(operands.dst, result as u64);
    Ok(())
}

/// PUNPCKHxx: what the low-half kernel does with the upper 32 bits.
pub(crate) fn mmx_high<K: Int, const MEM: bool>(state: &mut FpState, operands: &mut Operands) -> Done {
    state.enter_mmx();
    let source = mm_source::<MEM>(state, operands) >> 32;
    let result = K::exec((state.mm(operands.dst) >> 32).into(), source, 0);
    state.set_mm(operands.dst, result as u64);
    Ok(())
}

/// Shift by immediate.
pub(crate) fn xmm_count<K: Int>(state: &mut FpState, operands: &mut Operands) -> Done {
    let destination = &mut state.xmm[xmm_number(operands.dst)];
    *destination = K::exec(*destination, u128::from(operands.imm), 0);
    Ok(())
}

/// Shift by immediate.
pub(crate) fn mmx_count<K: Int>(state: &mut FpState, operands: &mut Operands) -> Done {
    state.enter_mmx();
    let result = K::exec(state.mm(operands.dst).into(), u128::from(operands.imm), 0);
    state.set_mm(operands.dst, result as u64);
    Ok(())
}

/// A general-purpose register as the source.
pub(crate) fn xmm_of_gpr<K: Int>(state: &mut FpState, operands: &mut Operands) -> Done {
    let destination = &mut state.xmm[xmm_number(operands.dst)];
    *destination = K::exec(*destination, operands.gpr.into(), operands.imm as u8);
    Ok(())
}

pub(crate) fn mmx_of_gpr<K: Int>(state: &mut FpState, operands: &mut Operands) -> Done {
    state.enter_mmx();
    let result = K::exec(state.mm(operands.dst).into(), operands.gpr.into(), operands.imm as u8);
    state.set_mm(operands.dst, result as u64);
    Ok(())
}

/// MOVD, MOVQ to a general-purpose register.
pub(crate) fn gpr_of_xmm(state: &mut FpState, operands: &mut Operands) -> Done {
    operands.gpr = state.xmm[xmm_number(operands.src)] as u64;
    Ok(())
}

pub(crate) fn gpr_of_mmx(state: &mut FpState, operands: &mut Operands) -> Done {
    state.enter_mmx();
    operands.gpr = state.mm(operands.src);
    Ok(())
}

pub(crate) fn store_xmm(state: &mut FpState, operands: &mut Operands) -> Done {
    set_scratch(operands, state.xmm[xmm_number(operands.src)]);
    Ok(())
}

/// MOVHPS, MOVHPD to memory.
pub(crate) fn store_high(state: &mut FpState, operands: &mut Operands) -> Done {
    set_scratch(operands, state.xmm[xmm_number(operands.src)] >> 64);
    Ok(())
}

pub(crate) fn store_mmx(state: &mut FpState, operands: &mut Operands) -> Done {
    state.enter_mmx();
    set_scratch(operands, state.mm(operands.src).into());
    Ok(())
}

/// MOVNTI.
pub(crate) fn store_gpr(_: &mut FpState, operands: &mut Operands) -> Done {
    set_scratch(operands, operands.gpr.into());
    Ok(())
}

/// MASKMOVDQU: `dst` is the data, `src` the mask.
pub(crate) fn masked_xmm(state: &mut FpState, operands: &mut Operands) -> Done {
    set_scratch(operands, state.xmm[xmm_number(operands.dst)]);
    operands.gpr = byte_signs(state.xmm[xmm_number(operands.src)]);
    Ok(())
}

/// MASKMOVQ.
pub(crate) fn masked_mmx(state: &mut FpState, operands: &mut Operands) -> Done {
    state.enter_mmx();
    set_scratch(operands, state.mm(operands.dst).into());
    operands.gpr = byte_signs(state.mm(operands.src).into());
    Ok(())
}

/// MOVQ2DQ.
pub(crate) fn xmm_of_mmx(state: &mut FpState, operands: &mut Operands) -> Done {
    state.enter_mmx();
    state.xmm[xmm_number(operands.dst)] = state.mm(operands.src).into();
    Ok(())
}

/// MOVDQ2Q.
pub(crate) fn mmx_of_xmm(state: &mut FpState, operands: &mut Operands) -> Done {
    state.enter_mmx();
    state.set_mm(operands.dst, state.xmm[xmm_number(operands.src)] as u64);
    Ok(())
}

pub(crate) fn movmskps(state: &mut FpState, operands: &mut Operands) -> Done {
    let value = state.xmm[xmm_number(operands.src)];
    operands.gpr = (0..4).fold(0, |mask, i| mask | ((value >> (32 * i + 31)) as u64 & 1) << i);
    Ok(())
}

pub(crate) fn movmskpd(state: &mut FpState, operands: &mut Operands) -> Done {
    let value = state.xmm[xmm_number(operands.src)];
    operands.gpr = (value >> 63 & 1 | value >> 126 & 2) as u64;
    Ok(())
}

pub(crate) fn pmovmskb_xmm(state: &mut FpState, operands: &mut Operands) -> Done {
    operands.gpr = byte_signs(state.xmm[xmm_number(operands.src)]);
    Ok(())
}

pub(crate) fn pmovmskb_mmx(state: &mut FpState, operands: &mut Operands) -> Done {
    state.enter_mmx();
    operands.gpr = byte_signs(state.mm(operands.src).into());
    Ok(())
}

pub(crate) fn pextrw_xmm(state: &mut FpState, operands: &mut Operands) -> Done {
    operands.gpr = (state.xmm[xmm_number(operands.src)] >> (16 * (operands.imm & 7)) & 0xffff) as u64;
    Ok(())
}

pub(crate) fn pextrw_mmx(state: &mut FpState, operands: &mut Operands) -> Done {
    state.enter_mmx();
    operands.gpr = state.mm(operands.src) >> (16 * (operands.imm & 3)) & 0xffff;
    Ok(())
}

pub(crate) fn emms(state: &mut FpState, _: &mut Operands) -> Done {
    state.enter_mmx();
    state.ftw = 0;
    Ok(())
}

pub(crate) fn ldmxcsr(state: &mut FpState, operands: &mut Operands) -> Done {
    let value = scratch(operands) as u32;
    if value & !crate::state::MXCSR_MASK != 0 {
        return Err(FpFault::Gp);
    }
    state.mxcsr = value;
    Ok(())
}

pub(crate) fn stmxcsr(state: &mut FpState, operands: &mut Operands) -> Done {
    set_scratch(operands, state.mxcsr.into());
    Ok(())
}

/// FXSAVE. `imm`: how many XMM registers; `src`: 1 = 64-bit pointers.
pub(crate) fn fxsave(state: &mut FpState, operands: &mut Operands) -> Done {
    state.fxsave(&mut operands.mem, operands.src == 1, operands.imm.into());
    Ok(())
}

/// FXRSTOR, as [`fxsave`].
pub(crate) fn fxrstor(state: &mut FpState, operands: &mut Operands) -> Done {
    state.fxrstor(&operands.mem, operands.src == 1, operands.imm.into()).map_err(|_| FpFault::Gp)
}

#[cfg(target_arch = "x86_64")]
pub(crate) use arithmetic::*;

/// Forms of the kernels that look at MXCSR.
#[cfg(target_arch = "x86_64")]
mod arithmetic {
    use super::{Done, mm_source, xmm_number, xmm_source};
    use crate::int::LOW;
    use crate::simd::{Arith, guarded};
    use crate::{FpState, Operands};

    pub(crate) fn arith<A: Arith, const MEM: bool>(state: &mut FpState, operands: &mut Operands) -> Done {
        let source = xmm_source::<MEM>(state, operands);
        let mut value = state.xmm[xmm_number(operands.dst)];
        guarded::<A>(state, &mut value, source)?;
        state.xmm[xmm_number(operands.dst)] = value;
        Ok(())
    }

    pub(crate) fn arith_from_gpr<A: Arith, const MEM: bool>(
        state: &mut FpState,
        operands: &mut Operands,
    ) -> Done {
        let source = if MEM { xmm_source::<true>(state, operands) } else { operands.gpr.into() };
        let mut value = state.xmm[xmm_number(operands.dst)];
        guarded::<A>(state, &mut value, source)?;
        state.xmm[xmm_number(operands.dst)] = value;
        Ok(())
    }

    pub(crate) fn arith_to_gpr<A: Arith, const MEM: bool>(
        state: &mut FpState,
        operands: &mut Operands,
    ) -> Done {
        let source = xmm_source::<MEM>(state, operands);
        let mut value = 0;
        guarded::<A>(state, &mut value, source)?;
        operands.gpr = value as u64;
        Ok(())
    }

    pub(crate) fn arith_to_flags<A: Arith, const MEM: bool>(
        state: &mut FpState,
        operands: &mut Operands,
    ) -> Done {
        let source = xmm_source::<MEM>(state, operands);
        let mut value = state.xmm[xmm_number(operands.dst)];
        guarded::<A>(state, &mut value, source)?;
        operands.flags = value as u64;
        Ok(())
    }

    /// CVTPI2PS: the upper half stays.
    pub(crate) fn ps_of_mmx<A: Arith, const MEM: bool>(state: &mut FpState, operands: &mut Operands) -> Done {
        let destination = state.xmm[xmm_number(operands.dst)];
        let mut value = destination;
        of_mmx::<A, MEM>(state, operands, &mut value)?;
        state.xmm[xmm_number(operands.dst)] = destination & !LOW | value & LOW;
        Ok(())
    }

    /// CVTPI2PD.
    pub(crate) fn pd_of_mmx<A: Arith, const MEM: bool>(state: &mut FpState, operands: &mut Operands) -> Done {
        let mut value = 0;
        of_mmx::<A, MEM>(state, operands, &mut value)?;
        state.xmm[xmm_number(operands.dst)] = value;
        Ok(())
    }

    fn of_mmx<A: Arith, const MEM: bool>(state: &mut FpState, operands: &Operands, value: &mut u128) -> Done {
        if !MEM {
            state.enter_mmx();
        }
        let source = mm_source::<MEM>(state, operands);
        guarded::<A>(state, value, source)
    }

    /// CVTPS2PI, CVTTPS2PI (`HALF`: only two lanes count), CVTPD2PI, CVTTPD2PI.
    pub(crate) fn mmx_of_float<A: Arith, const MEM: bool, const HALF: bool>(
        state: &mut FpState,
        operands: &mut Operands,
    ) -> Done {
        state.enter_mmx();
        let source = xmm_source::<MEM>(state, operands);
        let mut value = 0;
        guarded::<A>(state, &mut value, if HALF { source & LOW } else { source })?;
        state.set_mm(operands.dst, value as u64);
        Ok(())
    }
}
