//! From a decoded instruction to an operation.

use iced_x86::{Code, CodeSize, CpuidFeature, EncodingKind, Instruction, Mnemonic, OpKind, Register};

use crate::forms::{self, undefined};
use crate::int::{self as k, Int};
use crate::{Flags, FpOp, Gpr, Kind, Mem, Run};

/// Lowers an x87, MMX, SSE or SSE2 instruction. `None`: it is not one (fences, PAUSE, CLFLUSH and prefetches are the
/// engine's). Instructions of later extensions on the same registers lower to an operation that answers #UD.
pub fn lower(instruction: &Instruction) -> Option<FpOp> {
    let code = instruction.code();
    match code.encoding() {
        EncodingKind::Legacy => {}
        EncodingKind::D3NOW => return Some(op(undefined, Kind::Plain)),
        _ => return None,
    }
    let mut family = (instruction.mnemonic() == Mnemonic::Wait).then_some(Family::X87);
    for feature in code.cpuid_features() {
        match feature {
            CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387 => {
                family = family.or(Some(Family::X87))
            }
            CpuidFeature::FPU287XL_ONLY => family = Some(Family::Later),
            CpuidFeature::MMX | CpuidFeature::SSE | CpuidFeature::SSE2 | CpuidFeature::FXSR => {
                family = family.or(Some(Family::Simd));
            }
            CpuidFeature::SSE3
            | CpuidFeature::SSSE3
            | CpuidFeature::SSE4_1
            | CpuidFeature::SSE4_2
            | CpuidFeature::SSE4A
            | CpuidFeature::AES
            | CpuidFeature::PCLMULQDQ
            | CpuidFeature::SHA
            | CpuidFeature::GFNI => family = Some(Family::Later),
            _ => {}
        }
    }
    match family? {
        Family::X87 => x87(instruction),
        Family::Simd => simd(instruction),
        Family::Later => Some(op(undefined, Kind::Plain)),
    }
}

enum Family {
    X87,
    Simd,
    Later,
}

#[cfg(target_arch = "x86_64")]
fn x87(instruction: &Instruction) -> Option<FpOp> {
    crate::x87::lower(instruction)
}

#[cfg(not(target_arch = "x86_64"))]
fn x87(_: &Instruction) -> Option<FpOp> {
    None
}

/// An operation without operands.
pub(crate) const fn op(run: Run, kind: Kind) -> FpOp {
    FpOp {
        run,
        mem: Mem::None,
        align: 1,
        kind,
        waits: matches!(kind, Kind::Mmx),
        at_di: false,
        dst: 0,
        src: 0,
        imm: 0,
        gpr: Gpr::None,
        flags: Flags::None,
    }
}

/// An operand as this crate sees it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Operand {
    Xmm,
    Mm,
    Gpr(Register),
    Mem,
    Imm,
    None,
}

fn operand(instruction: &Instruction, n: u32) -> Operand {
    if n >= instruction.op_count() {
        return Operand::None;
    }
    match instruction.op_kind(n) {
        OpKind::Register => match instruction.op_register(n) {
            register if register.is_xmm() => Operand::Xmm,
            register if register.is_mm() => Operand::Mm,
            register => Operand::Gpr(register),
        },
        OpKind::Immediate8 => Operand::Imm,
        _ => Operand::Mem,
    }
}

fn number(instruction: &Instruction, n: u32) -> u8 {
    if n < instruction.op_count() && instruction.op_kind(n) == OpKind::Register {
        instruction.op_register(n).number() as u8
    } else {
        0
    }
}

/// The functions of one mnemonic by operand class: register and memory source for XMM and MMX destinations, and shifts by
/// immediate.
struct Forms {
    xmm: [Run; 2],
    mmx: [Run; 2],
    count: [Run; 2],
}

const fn only_xmm(xmm: [Run; 2]) -> Forms {
    Forms { xmm, mmx: [undefined; 2], count: [undefined; 2] }
}

const fn int<K: Int>() -> Forms {
    Forms {
        xmm: [forms::xmm::<K, false>, forms::xmm::<K, true>],
        mmx: [forms::mmx::<K, false>, forms::mmx::<K, true>],
        count: [undefined; 2],
    }
}

const fn shift<K: Int>() -> Forms {
    Forms { count: [forms::xmm_count::<K>, forms::mmx_count::<K>], ..int::<K>() }
}

const fn pack<K: Int>() -> Forms {
    Forms { mmx: [forms::mmx_pack::<K, false>, forms::mmx_pack::<K, true>], ..int::<K>() }
}

/// `L`: the kernel for the low halves.
const fn high<K: Int, L: Int>() -> Forms {
    Forms { mmx: [forms::mmx_high::<L, false>, forms::mmx_high::<L, true>], ..int::<K>() }
}

/// Integer and bitwise operations: `xmm|mm, xmm|mm|memory|immediate[, immediate]`.
fn integer(mnemonic: Mnemonic) -> Option<Forms> {
    use Mnemonic as M;
    Some(match mnemonic {
        M::Paddb => int::<k::Paddb>(),
        M::Paddw => int::<k::Paddw>(),
        M::Paddd => int::<k::Paddd>(),
        M::Paddq => int::<k::Paddq>(),
        M::Psubb => int::<k::Psubb>(),
        M::Psubw => int::<k::Psubw>(),
        M::Psubd => int::<k::Psubd>(),
        M::Psubq => int::<k::Psubq>(),
        M::Paddsb => int::<k::Paddsb>(),
        M::Paddsw => int::<k::Paddsw>(),
        M::Paddusb => int::<k::Paddusb>(),
        M::Paddusw => int::<k::Paddusw>(),
        M::Psubsb => int::<k::Psubsb>(),
        M::Psubsw => int::<k::Psubsw>(),
        M::Psubusb => int::<k::Psubusb>(),
        M::Psubusw => int::<k::Psubusw>(),
        M::Pmullw => int::<k::Pmullw>(),
        M::Pmulhw => int::<k::Pmulhw>(),
        M::Pmulhuw => int::<k::Pmulhuw>(),
        M::Pmuludq => int::<k::Pmuludq>(),
        M::Pmaddwd => int::<k::Pmaddwd>(),
        M::Psadbw => int::<k::Psadbw>(),
        M::Pcmpeqb => int::<k::Pcmpeqb>(),
        M::Pcmpeqw => int::<k::Pcmpeqw>(),
        M::Pcmpeqd => int::<k::Pcmpeqd>(),
        M::Pcmpgtb => int::<k::Pcmpgtb>(),
        M::Pcmpgtw => int::<k::Pcmpgtw>(),
        M::Pcmpgtd => int::<k::Pcmpgtd>(),
        M::Pminub => int::<k::Pminub>(),
        M::Pmaxub => int::<k::Pmaxub>(),
        M::Pminsw => int::<k::Pminsw>(),
        M::Pmaxsw => int::<k::Pmaxsw>(),
        M::Pavgb => int::<k::Pavgb>(),
        M::Pavgw => int::<k::Pavgw>(),
        M::Pand | M::Andps | M::Andpd => int::<k::And>(),
        M::Pandn | M::Andnps | M::Andnpd => int::<k::Andn>(),
        M::Por | M::Orps | M::Orpd => int::<k::Or>(),
        M::Pxor | M::Xorps | M::Xorpd => int::<k::Xor>(),
        M::Packsswb => pack::<k::Packsswb>(),
        M::Packuswb => pack::<k::Packuswb>(),
        M::Packssdw => pack::<k::Packssdw>(),
        M::Punpcklbw => int::<k::Punpcklbw>(),
        M::Punpcklwd => int::<k::Punpcklwd>(),
        M::Punpckldq | M::Unpcklps => int::<k::Punpckldq>(),
        M::Punpcklqdq | M::Unpcklpd => int::<k::Punpcklqdq>(),
        M::Punpckhbw => high::<k::Punpckhbw, k::Punpcklbw>(),
        M::Punpckhwd => high::<k::Punpckhwd, k::Punpcklwd>(),
        M::Punpckhdq | M::Unpckhps => high::<k::Punpckhdq, k::Punpckldq>(),
        M::Punpckhqdq | M::Unpckhpd => int::<k::Punpckhqdq>(),
        M::Psllw => shift::<k::Psllw>(),
        M::Pslld => shift::<k::Pslld>(),
        M::Psllq => shift::<k::Psllq>(),
        M::Psrlw => shift::<k::Psrlw>(),
        M::Psrld => shift::<k::Psrld>(),
        M::Psrlq => shift::<k::Psrlq>(),
        M::Psraw => shift::<k::Psraw>(),
        M::Psrad => shift::<k::Psrad>(),
        M::Pslldq => shift::<k::Pslldq>(),
        M::Psrldq => shift::<k::Psrldq>(),
        M::Pshufd => int::<k::Pshufd>(),
        M::Pshuflw | M::Pshufw => int::<k::Pshuflw>(),
        M::Pshufhw => int::<k::Pshufhw>(),
        M::Shufps => int::<k::Shufps>(),
        M::Shufpd => int::<k::Shufpd>(),
        _ => return None,
    })
}

/// Floating-point arithmetic, compares and conversions.
#[cfg(target_arch = "x86_64")]
fn arithmetic(instruction: &Instruction) -> Option<Forms> {
    use Mnemonic as M;

    use crate::simd as a;

    macro_rules! arith {
        ($name:ident) => {
            only_xmm([forms::arith::<a::$name, false>, forms::arith::<a::$name, true>])
        };
    }
    macro_rules! flags {
        ($name:ident) => {
            only_xmm([forms::arith_to_flags::<a::$name, false>, forms::arith_to_flags::<a::$name, true>])
        };
    }
    macro_rules! to_gpr {
        ($n:ident, $w:ident) => {
            if matches!(operand(instruction, 0), Operand::Gpr(register) if register.is_gpr64()) {
                only_xmm([forms::arith_to_gpr::<a::$w, false>, forms::arith_to_gpr::<a::$w, true>])
            } else {
                only_xmm([forms::arith_to_gpr::<a::$n, false>, forms::arith_to_gpr::<a::$n, true>])
            }
        };
    }
    macro_rules! from_gpr {
        ($n:ident, $w:ident) => {
            if matches!(instruction.code(), Code::Cvtsi2ss_xmm_rm64 | Code::Cvtsi2sd_xmm_rm64) {
                only_xmm([forms::arith_from_gpr::<a::$w, false>, forms::arith_from_gpr::<a::$w, true>])
            } else {
                only_xmm([forms::arith_from_gpr::<a::$n, false>, forms::arith_from_gpr::<a::$n, true>])
            }
        };
    }
    macro_rules! compare {
        ($($name:ident)*) => {{
            const TABLE: [[Run; 2]; 8] = [$([forms::arith::<a::$name, false>, forms::arith::<a::$name, true>]),*];
            only_xmm(TABLE[usize::from(instruction.immediate8() & 7)])
        }};
    }
    macro_rules! to_mmx {
        ($name:ident, $half:literal) => {
            Forms {
                mmx: [
                    forms::mmx_of_float::<a::$name, false, $half>,
                    forms::mmx_of_float::<a::$name, true, $half>,
                ],
                ..only_xmm([undefined; 2])
            }
        };
    }
    Some(match instruction.mnemonic() {
        M::Addps => arith!(Addps),
        M::Addpd => arith!(Addpd),
        M::Addss => arith!(Addss),
        M::Addsd => arith!(Addsd),
        M::Subps => arith!(Subps),
        M::Subpd => arith!(Subpd),
        M::Subss => arith!(Subss),
        M::Subsd => arith!(Subsd),
        M::Mulps => arith!(Mulps),
        M::Mulpd => arith!(Mulpd),
        M::Mulss => arith!(Mulss),
        M::Mulsd => arith!(Mulsd),
        M::Divps => arith!(Divps),
        M::Divpd => arith!(Divpd),
        M::Divss => arith!(Divss),
        M::Divsd => arith!(Divsd),
        M::Minps => arith!(Minps),
        M::Minpd => arith!(Minpd),
        M::Minss => arith!(Minss),
        M::Minsd => arith!(Minsd),
        M::Maxps => arith!(Maxps),
        M::Maxpd => arith!(Maxpd),
        M::Maxss => arith!(Maxss),
        M::Maxsd => arith!(Maxsd),
        M::Sqrtps => arith!(Sqrtps),
        M::Sqrtpd => arith!(Sqrtpd),
        M::Sqrtss => arith!(Sqrtss),
        M::Sqrtsd => arith!(Sqrtsd),
        M::Rcpps => arith!(Rcpps),
        M::Rcpss => arith!(Rcpss),
        M::Rsqrtps => arith!(Rsqrtps),
        M::Rsqrtss => arith!(Rsqrtss),
        M::Cvtdq2ps => arith!(Cvtdq2ps),
        M::Cvtps2dq => arith!(Cvtps2dq),
        M::Cvttps2dq => arith!(Cvttps2dq),
        M::Cvtdq2pd => arith!(Cvtdq2pd),
        M::Cvtpd2dq => arith!(Cvtpd2dq),
        M::Cvttpd2dq => arith!(Cvttpd2dq),
        M::Cvtps2pd => arith!(Cvtps2pd),
        M::Cvtpd2ps => arith!(Cvtpd2ps),
        M::Cvtss2sd => arith!(Cvtss2sd),
        M::Cvtsd2ss => arith!(Cvtsd2ss),
        M::Cmpps => compare!(Cmpps0 Cmpps1 Cmpps2 Cmpps3 Cmpps4 Cmpps5 Cmpps6 Cmpps7),
        M::Cmppd => compare!(Cmppd0 Cmppd1 Cmppd2 Cmppd3 Cmppd4 Cmppd5 Cmppd6 Cmppd7),
        M::Cmpss => compare!(Cmpss0 Cmpss1 Cmpss2 Cmpss3 Cmpss4 Cmpss5 Cmpss6 Cmpss7),
        M::Cmpsd => compare!(Cmpsd0 Cmpsd1 Cmpsd2 Cmpsd3 Cmpsd4 Cmpsd5 Cmpsd6 Cmpsd7),
        M::Comiss => flags!(Comiss),
        M::Comisd => flags!(Comisd),
        M::Ucomiss => flags!(Ucomiss),
        M::Ucomisd => flags!(Ucomisd),
        M::Cvtsi2ss => from_gpr!(Cvtsi2ss32, Cvtsi2ss64),
        M::Cvtsi2sd => from_gpr!(Cvtsi2sd32, Cvtsi2sd64),
        M::Cvtss2si => to_gpr!(Cvtss2si32, Cvtss2si64),
        M::Cvtsd2si => to_gpr!(Cvtsd2si32, Cvtsd2si64),
        M::Cvttss2si => to_gpr!(Cvttss2si32, Cvttss2si64),
        M::Cvttsd2si => to_gpr!(Cvttsd2si32, Cvttsd2si64),
        M::Cvtpi2ps => {
            only_xmm([forms::ps_of_mmx::<a::Cvtdq2ps, false>, forms::ps_of_mmx::<a::Cvtdq2ps, true>])
        }
        M::Cvtpi2pd => {
            only_xmm([forms::pd_of_mmx::<a::Cvtdq2pd, false>, forms::pd_of_mmx::<a::Cvtdq2pd, true>])
        }
        M::Cvtps2pi => to_mmx!(Cvtps2dq, true),
        M::Cvttps2pi => to_mmx!(Cvttps2dq, true),
        M::Cvtpd2pi => to_mmx!(Cvtpd2dq, false),
        M::Cvttpd2pi => to_mmx!(Cvttpd2dq, false),
        _ => return None,
    })
}

#[cfg(not(target_arch = "x86_64"))]
fn arithmetic(_: &Instruction) -> Option<Forms> {
    None
}

fn simd(instruction: &Instruction) -> Option<FpOp> {
    use Mnemonic as M;
    let forms = integer(instruction.mnemonic()).or_else(|| arithmetic(instruction));
    let (first, second) = (operand(instruction, 0), operand(instruction, 1));
    let from_memory = usize::from(second == Operand::Mem);
    let run = match (forms, first, second) {
        (Some(forms), Operand::Xmm, Operand::Imm) => forms.count[0],
        (Some(forms), Operand::Mm, Operand::Imm) => forms.count[1],
        (Some(forms), Operand::Mm, _) => forms.mmx[from_memory],
        (Some(forms), ..) => forms.xmm[from_memory],
        (None, ..) => movement(instruction, first, second)?,
    };
    let mut result = op(run, kind(first, second));
    result.waits = [first, second].contains(&Operand::Mm) || instruction.mnemonic() == M::Emms;
    if instruction.mnemonic() == M::Emms {
        result.kind = Kind::Mmx;
    }
    result.dst = number(instruction, 0);
    result.src = number(instruction, 1);
    result.imm = match (second, operand(instruction, 2)) {
        (Operand::Imm, _) | (_, Operand::Imm) => instruction.immediate8().into(),
        _ => 0,
    };
    match (first, second) {
        (Operand::Gpr(register), _) => result.gpr = Gpr::Out(register),
        (_, Operand::Gpr(register)) => result.gpr = Gpr::In(register),
        _ => {}
    }
    let size = instruction.memory_size().size() as u16;
    match (first, second) {
        (Operand::Mem, _) => result.mem = Mem::Write(size),
        (_, Operand::Mem) => result.mem = Mem::Read(size),
        _ => {}
    }
    match instruction.mnemonic() {
        M::Comiss | M::Comisd | M::Ucomiss | M::Ucomisd => result.flags = Flags::Out,
        M::Maskmovq | M::Maskmovdqu => {
            result.mem = Mem::Masked(size);
            result.at_di = true;
            result.kind = kind(second, second);
            result.waits = second == Operand::Mm;
            result.dst = number(instruction, 1);
            result.src = number(instruction, 2);
        }
        M::Movnti => result.kind = Kind::Plain,
        M::Ldmxcsr => (result.kind, result.mem) = (Kind::Sse, Mem::Read(4)),
        M::Stmxcsr => (result.kind, result.mem) = (Kind::Sse, Mem::Write(4)),
        M::Fxsave | M::Fxsave64 | M::Fxrstor | M::Fxrstor64 => {
            let long = matches!(instruction.mnemonic(), M::Fxsave64 | M::Fxrstor64);
            let saves = matches!(instruction.mnemonic(), M::Fxsave | M::Fxsave64);
            let registers: u16 = if instruction.code_size() == CodeSize::Code64 { 16 } else { 8 };
            result.kind = Kind::Fx;
            result.align = 16;
            result.imm = registers;
            result.src = u8::from(long);
            // The whole area is checked; what FXSAVE does not define stays.
            result.mem = if saves { Mem::ReadWrite(512) } else { Mem::Read(512) };
        }
        M::Movups | M::Movupd | M::Movdqu => {}
        _ if size == 16 => result.align = 16,
        _ => {}
    }
    Some(result)
}

fn kind(first: Operand, second: Operand) -> Kind {
    if first == Operand::Xmm || second == Operand::Xmm { Kind::Sse } else { Kind::Mmx }
}

/// Moves, and the instructions that fit no table.
fn movement(instruction: &Instruction, first: Operand, second: Operand) -> Option<Run> {
    use Mnemonic as M;
    use Operand as O;
    macro_rules! xmm {
        ($register:ident, $memory:ident) => {
            match second {
                O::Mem => forms::xmm::<k::$memory, true> as Run,
                _ => forms::xmm::<k::$register, false>,
            }
        };
    }
    Some(match (instruction.mnemonic(), first, second) {
        (M::Movaps | M::Movapd | M::Movups | M::Movupd | M::Movdqa | M::Movdqu, O::Xmm, _) => xmm!(Mov, Mov),
        (M::Movss, O::Xmm, _) => xmm!(Movss, Movd),
        (M::Movsd, O::Xmm, _) => xmm!(Movsd, Movq),
        (M::Movlps | M::Movlpd, O::Xmm, _) => xmm!(Movsd, Movsd),
        (M::Movhps | M::Movhpd | M::Movlhps, O::Xmm, _) => xmm!(Movhps, Movhps),
        (M::Movhlps, ..) => xmm!(Movhlps, Movhlps),
        (M::Movd | M::Movq, O::Xmm, O::Gpr(register)) => {
            if register.is_gpr64() {
                forms::xmm_of_gpr::<k::Movq>
            } else {
                forms::xmm_of_gpr::<k::Movd>
            }
        }
        (M::Movd | M::Movq, O::Mm, O::Gpr(register)) => {
            if register.is_gpr64() {
                forms::mmx_of_gpr::<k::Movq>
            } else {
                forms::mmx_of_gpr::<k::Movd>
            }
        }
        (M::Movd | M::Movq, O::Gpr(_), O::Xmm) => forms::gpr_of_xmm,
        (M::Movd | M::Movq, O::Gpr(_), O::Mm) => forms::gpr_of_mmx,
        (M::Movd | M::Movq, O::Xmm, _) if instruction.memory_size().size() == 4 => xmm!(Movd, Movd),
        (M::Movd | M::Movq, O::Xmm, _) => xmm!(Movq, Movq),
        (M::Movd | M::Movq, O::Mm, O::Mem) if instruction.memory_size().size() == 4 => {
            forms::mmx::<k::Movd, true>
        }
        (M::Movd | M::Movq, O::Mm, O::Mem) => forms::mmx::<k::Mov, true>,
        (M::Movq, O::Mm, _) => forms::mmx::<k::Mov, false>,
        (M::Movhps | M::Movhpd, O::Mem, _) => forms::store_high,
        (M::Maskmovdqu, ..) => forms::masked_xmm,
        (M::Maskmovq, ..) => forms::masked_mmx,
        (M::Movdq2q, ..) => forms::mmx_of_xmm,
        (M::Movq2dq, ..) => forms::xmm_of_mmx,
        (M::Movmskps, ..) => forms::movmskps,
        (M::Movmskpd, ..) => forms::movmskpd,
        (M::Pmovmskb, _, O::Xmm) => forms::pmovmskb_xmm,
        (M::Pmovmskb, ..) => forms::pmovmskb_mmx,
        (M::Pextrw, _, O::Xmm) => forms::pextrw_xmm,
        (M::Pextrw, ..) => forms::pextrw_mmx,
        (M::Pinsrw, O::Xmm, O::Mem) => forms::xmm::<k::Pinsrw, true>,
        (M::Pinsrw, O::Xmm, _) => forms::xmm_of_gpr::<k::Pinsrw>,
        (M::Pinsrw, O::Mm, O::Mem) => forms::mmx::<k::Pinsrw4, true>,
        (M::Pinsrw, O::Mm, _) => forms::mmx_of_gpr::<k::Pinsrw4>,
        (M::Emms, ..) => forms::emms,
        (M::Ldmxcsr, ..) => forms::ldmxcsr,
        (M::Stmxcsr, ..) => forms::stmxcsr,
        (M::Fxsave | M::Fxsave64, ..) => forms::fxsave,
        (M::Fxrstor | M::Fxrstor64, ..) => forms::fxrstor,
        (_, O::Mem, O::Xmm) => forms::store_xmm,
        (_, O::Mem, O::Mm) => forms::store_mmx,
        (M::Movnti, O::Mem, _) => forms::store_gpr,
        _ => return None,
    })
}
