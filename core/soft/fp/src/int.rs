//! Integer SIMD: pure functions of destination, source and immediate, shared by the MMX and SSE2 forms.
//!
//! Each is defined on lanes in plain Rust; on x86-64 hosts most run as the instruction itself.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::__m128i;

/// A pure operation on 128 bits; MMX forms use the low 64.
pub(crate) trait Int {
    /// The definition.
    fn portable(a: u128, b: u128, imm: u8) -> u128;

    /// What runs: the host's own instruction where it is named, or the definition.
    #[inline(always)]
    fn exec(a: u128, b: u128, imm: u8) -> u128 {
        Self::portable(a, b, imm)
    }
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) const fn vector(value: u128) -> __m128i {
    // SAFETY: 16 plain bytes both.
    unsafe { std::mem::transmute(value) }
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) const fn integer(value: __m128i) -> u128 {
    // SAFETY: 16 plain bytes both.
    unsafe { std::mem::transmute(value) }
}

/// [`Int::exec`] by an SSE2 intrinsic.
macro_rules! by_host {
    () => {};
    ($intrinsic:ident) => {
        #[cfg(target_arch = "x86_64")]
        #[inline(always)]
        fn exec(a: u128, b: u128, _: u8) -> u128 {
            // SAFETY: SSE2 is part of x86-64, and the operation has no other condition.
            integer(unsafe { std::arch::x86_64::$intrinsic(vector(a), vector(b)) })
        }
    };
}

macro_rules! lanes {
    ($from:ident, $to:ident, $t:ty, $n:literal) => {
        #[allow(unnecessary_transmutes)] // For bytes there is a method.
        fn $from(value: u128) -> [$t; $n] {
            // SAFETY: both are 16 plain bytes; hosts are little-endian (asserted in lib.rs).
            unsafe { std::mem::transmute(value) }
        }
        #[allow(unnecessary_transmutes)] // As above.
        fn $to(lanes: [$t; $n]) -> u128 {
            // SAFETY: as above.
            unsafe { std::mem::transmute(lanes) }
        }
    };
}
lanes!(u8s, of_u8s, u8, 16);
lanes!(i8s, of_i8s, i8, 16);
lanes!(u16s, of_u16s, u16, 8);
lanes!(i16s, of_i16s, i16, 8);
lanes!(u32s, of_u32s, u32, 4);
lanes!(i32s, of_i32s, i32, 4);
lanes!(u64s, of_u64s, u64, 2);

/// Lane-wise operations: `Name: from, to, |a, b| expression`.
macro_rules! lane_ops {
    ($($name:ident $(= $host:ident)?: $from:ident $to:ident |$a:ident, $b:ident| $e:expr;)*) => {$(
        pub(crate) struct $name;
        impl Int for $name {
            #[inline(always)]
            fn portable(a: u128, b: u128, _: u8) -> u128 {
                let (mut out, other) = ($from(a), $from(b));
                for (x, y) in out.iter_mut().zip(other) {
                    let ($a, $b) = (*x, y);
                    *x = $e;
                }
                $to(out)
            }
            by_host!($($host)?);
        }
    )*};
}

lane_ops! {
    Paddb = _mm_add_epi8: u8s of_u8s |a, b| a.wrapping_add(b);
    Paddw = _mm_add_epi16: u16s of_u16s |a, b| a.wrapping_add(b);
    Paddd = _mm_add_epi32: u32s of_u32s |a, b| a.wrapping_add(b);
    Paddq = _mm_add_epi64: u64s of_u64s |a, b| a.wrapping_add(b);
    Psubb = _mm_sub_epi8: u8s of_u8s |a, b| a.wrapping_sub(b);
    Psubw = _mm_sub_epi16: u16s of_u16s |a, b| a.wrapping_sub(b);
    Psubd = _mm_sub_epi32: u32s of_u32s |a, b| a.wrapping_sub(b);
    Psubq = _mm_sub_epi64: u64s of_u64s |a, b| a.wrapping_sub(b);
    Paddsb = _mm_adds_epi8: i8s of_i8s |a, b| a.saturating_add(b);
    Paddsw = _mm_adds_epi16: i16s of_i16s |a, b| a.saturating_add(b);
    Paddusb = _mm_adds_epu8: u8s of_u8s |a, b| a.saturating_add(b);
    Paddusw = _mm_adds_epu16: u16s of_u16s |a, b| a.saturating_add(b);
    Psubsb = _mm_subs_epi8: i8s of_i8s |a, b| a.saturating_sub(b);
    Psubsw = _mm_subs_epi16: i16s of_i16s |a, b| a.saturating_sub(b);
    Psubusb = _mm_subs_epu8: u8s of_u8s |a, b| a.saturating_sub(b);
    Psubusw = _mm_subs_epu16: u16s of_u16s |a, b| a.saturating_sub(b);
    Pmullw = _mm_mullo_epi16: u16s of_u16s |a, b| a.wrapping_mul(b);
    Pmulhw = _mm_mulhi_epi16: i16s of_i16s |a, b| ((i32::from(a) * i32::from(b)) >> 16) as i16;
    Pmulhuw = _mm_mulhi_epu16: u16s of_u16s |a, b| ((u32::from(a) * u32::from(b)) >> 16) as u16;
    Pmuludq = _mm_mul_epu32: u64s of_u64s |a, b| u64::from(a as u32) * u64::from(b as u32);
    Pcmpeqb = _mm_cmpeq_epi8: u8s of_u8s |a, b| if a == b { 0xff } else { 0 };
    Pcmpeqw = _mm_cmpeq_epi16: u16s of_u16s |a, b| if a == b { 0xffff } else { 0 };
    Pcmpeqd = _mm_cmpeq_epi32: u32s of_u32s |a, b| if a == b { u32::MAX } else { 0 };
    Pcmpgtb = _mm_cmpgt_epi8: i8s of_i8s |a, b| if a > b { -1 } else { 0 };
    Pcmpgtw = _mm_cmpgt_epi16: i16s of_i16s |a, b| if a > b { -1 } else { 0 };
    Pcmpgtd = _mm_cmpgt_epi32: i32s of_i32s |a, b| if a > b { -1 } else { 0 };
    Pminub = _mm_min_epu8: u8s of_u8s |a, b| a.min(b);
    Pmaxub = _mm_max_epu8: u8s of_u8s |a, b| a.max(b);
    Pminsw = _mm_min_epi16: i16s of_i16s |a, b| a.min(b);
    Pmaxsw = _mm_max_epi16: i16s of_i16s |a, b| a.max(b);
    Pavgb = _mm_avg_epu8: u8s of_u8s |a, b| ((u16::from(a) + u16::from(b) + 1) >> 1) as u8;
    Pavgw = _mm_avg_epu16: u16s of_u16s |a, b| ((u32::from(a) + u32::from(b) + 1) >> 1) as u16;
}

/// Operations on the whole: `Name: |a, b, imm| expression`.
macro_rules! whole_ops {
    ($($name:ident $(= $host:ident)?: |$a:ident, $b:ident, $imm:tt| $e:expr;)*) => {$(
        pub(crate) struct $name;
        impl Int for $name {
            #[inline(always)]
            fn portable($a: u128, $b: u128, $imm: u8) -> u128 {
                $e
            }
            by_host!($($host)?);
        }
    )*};
}

whole_ops! {
    And: |a, b, _| a & b;
    Andn: |a, b, _| !a & b;
    Or: |a, b, _| a | b;
    Xor: |a, b, _| a ^ b;
    Pmaddwd = _mm_madd_epi16: |a, b, _| {
        let (a, b) = (i16s(a), i16s(b));
        of_i32s(std::array::from_fn(|i| {
            let product = |n: usize| i32::from(a[n]) * i32::from(b[n]);
            product(2 * i).wrapping_add(product(2 * i + 1))
        }))
    };
    Psadbw = _mm_sad_epu8: |a, b, _| {
        let (a, b) = (u8s(a), u8s(b));
        of_u64s(std::array::from_fn(|half| (8 * half..8 * half + 8).map(|i| u64::from(a[i].abs_diff(b[i]))).sum()))
    };
    Packsswb = _mm_packs_epi16: |a, b, _| {
        let (a, b) = (i16s(a), i16s(b));
        of_i8s(std::array::from_fn(|i| if i < 8 { a[i] } else { b[i - 8] }.clamp(-128, 127) as i8))
    };
    Packuswb = _mm_packus_epi16: |a, b, _| {
        let (a, b) = (i16s(a), i16s(b));
        of_u8s(std::array::from_fn(|i| if i < 8 { a[i] } else { b[i - 8] }.clamp(0, 255) as u8))
    };
    Packssdw = _mm_packs_epi32: |a, b, _| {
        let (a, b) = (i32s(a), i32s(b));
        of_i16s(std::array::from_fn(|i| if i < 4 { a[i] } else { b[i - 4] }.clamp(-32768, 32767) as i16))
    };
    Punpcklbw = _mm_unpacklo_epi8: |a, b, _| of_u8s(interleave(u8s(a), u8s(b), 0));
    Punpcklwd = _mm_unpacklo_epi16: |a, b, _| of_u16s(interleave(u16s(a), u16s(b), 0));
    Punpckldq = _mm_unpacklo_epi32: |a, b, _| of_u32s(interleave(u32s(a), u32s(b), 0));
    Punpcklqdq = _mm_unpacklo_epi64: |a, b, _| of_u64s(interleave(u64s(a), u64s(b), 0));
    Punpckhbw = _mm_unpackhi_epi8: |a, b, _| of_u8s(interleave(u8s(a), u8s(b), 8));
    Punpckhwd = _mm_unpackhi_epi16: |a, b, _| of_u16s(interleave(u16s(a), u16s(b), 4));
    Punpckhdq = _mm_unpackhi_epi32: |a, b, _| of_u32s(interleave(u32s(a), u32s(b), 2));
    Punpckhqdq = _mm_unpackhi_epi64: |a, b, _| of_u64s(interleave(u64s(a), u64s(b), 1));
    // Shift counts are the low 64 bits of the source; counts beyond the lane give zeros or signs.
    Psllw = _mm_sll_epi16: |a, b, _| { let n = count(b); if n > 15 { 0 } else { of_u16s(u16s(a).map(|x| x << n)) } };
    Pslld = _mm_sll_epi32: |a, b, _| { let n = count(b); if n > 31 { 0 } else { of_u32s(u32s(a).map(|x| x << n)) } };
    Psllq = _mm_sll_epi64: |a, b, _| { let n = count(b); if n > 63 { 0 } else { of_u64s(u64s(a).map(|x| x << n)) } };
    Psrlw = _mm_srl_epi16: |a, b, _| { let n = count(b); if n > 15 { 0 } else { of_u16s(u16s(a).map(|x| x >> n)) } };
    Psrld = _mm_srl_epi32: |a, b, _| { let n = count(b); if n > 31 { 0 } else { of_u32s(u32s(a).map(|x| x >> n)) } };
    Psrlq = _mm_srl_epi64: |a, b, _| { let n = count(b); if n > 63 { 0 } else { of_u64s(u64s(a).map(|x| x >> n)) } };
    Psraw = _mm_sra_epi16: |a, b, _| { let n = count(b).min(15); of_i16s(i16s(a).map(|x| x >> n)) };
    Psrad = _mm_sra_epi32: |a, b, _| { let n = count(b).min(31); of_i32s(i32s(a).map(|x| x >> n)) };
    Pslldq: |a, b, _| { let n = count(b); if n > 15 { 0 } else { a << (8 * n) } };
    Psrldq: |a, b, _| { let n = count(b); if n > 15 { 0 } else { a >> (8 * n) } };
    Pshufd: |_a, b, imm| { let b = u32s(b); of_u32s(std::array::from_fn(|i| b[select(imm, i)])) };
    Pshuflw: |_a, b, imm| { let b = u16s(b); of_u16s(std::array::from_fn(|i| if i < 4 { b[select(imm, i)] } else { b[i] })) };
    Pshufhw: |_a, b, imm| { let b = u16s(b); of_u16s(std::array::from_fn(|i| if i < 4 { b[i] } else { b[4 + select(imm, i - 4)] })) };
    Shufps: |a, b, imm| {
        let (a, b) = (u32s(a), u32s(b));
        of_u32s(std::array::from_fn(|i| if i < 2 { a[select(imm, i)] } else { b[select(imm, i)] }))
    };
    Shufpd: |a, b, imm| {
        let (a, b) = (u64s(a), u64s(b));
        of_u64s([a[usize::from(imm & 1)], b[usize::from(imm >> 1 & 1)]])
    };
    Pinsrw: |a, b, imm| { let at = 16 * u32::from(imm & 7); a & !(0xffff << at) | (b & 0xffff) << at };
    Pinsrw4: |a, b, imm| { let at = 16 * u32::from(imm & 3); a & !(0xffff << at) | (b & 0xffff) << at };
    Mov: |_a, b, _| b;
    Movss: |a, b, _| a >> 32 << 32 | b & 0xffff_ffff;
    Movsd: |a, b, _| a >> 64 << 64 | b & LOW;
    Movq: |_a, b, _| b & LOW;
    Movd: |_a, b, _| b & 0xffff_ffff;
    Movhps: |a, b, _| a & LOW | b << 64;
    Movhlps: |a, b, _| a >> 64 << 64 | b >> 64;
}

pub(crate) const LOW: u128 = u64::MAX as u128;

#[inline(always)]
fn count(source: u128) -> u32 {
    (source as u64).min(255) as u32
}

#[inline(always)]
const fn select(imm: u8, lane: usize) -> usize {
    (imm >> (2 * lane) & 3) as usize
}

#[inline(always)]
fn interleave<T: Copy, const N: usize>(a: [T; N], b: [T; N], from: usize) -> [T; N] {
    std::array::from_fn(|i| if i % 2 == 0 { a[from + i / 2] } else { b[from + i / 2] })
}

/// PMOVMSKB on 16 bytes.
#[inline(always)]
pub(crate) fn byte_signs(value: u128) -> u64 {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE2 is part of x86-64.
    return u64::from(unsafe { std::arch::x86_64::_mm_movemask_epi8(vector(value)) } as u32);
    #[cfg(not(target_arch = "x86_64"))]
    u8s(value).iter().enumerate().fold(0, |mask, (i, &byte)| mask | u64::from(byte >> 7) << i)
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    #[test]
    fn definitions_agree_with_the_hosts_instructions() {
        let mut seed = 1_u64;
        let mut random = || {
            let mut word = || {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                // Edges: all bits of some lanes, small shift counts.
                if seed & 3 == 0 { seed >> 58 } else { seed ^ (seed >> 32 & 1).wrapping_neg() << (seed & 63) }
            };
            u128::from(word()) << 64 | u128::from(word())
        };
        macro_rules! compare {
            ($($name:ident),*) => {
                for _ in 0..2_000 {
                    let (a, b) = (random(), random());
                    $(assert_eq!($name::portable(a, b, 0), $name::exec(a, b, 0), "{} {a:x} {b:x}", stringify!($name));)*
                }
            };
        }
        compare!(
            Paddb, Paddw, Paddd, Paddq, Psubb, Psubw, Psubd, Psubq, Paddsb, Paddsw, Paddusb, Paddusw, Psubsb,
            Psubsw, Psubusb, Psubusw, Pmullw, Pmulhw, Pmulhuw, Pmuludq, Pcmpeqb, Pcmpeqw, Pcmpeqd, Pcmpgtb,
            Pcmpgtw, Pcmpgtd, Pminub, Pmaxub, Pminsw, Pmaxsw, Pavgb, Pavgw, Pmaddwd, Psadbw, Packsswb,
            Packuswb, Packssdw, Punpcklbw, Punpcklwd, Punpckldq, Punpcklqdq, Punpckhbw, Punpckhwd, Punpckhdq,
            Punpckhqdq, Psllw, Pslld, Psllq, Psrlw, Psrld, Psrlq, Psraw, Psrad
        );
    }
}
