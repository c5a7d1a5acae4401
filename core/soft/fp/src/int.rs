//! Integer SIMD: pure functions of destination, source and immediate, shared by the MMX and SSE2 forms.
//!
//! Written on lanes in plain Rust; the compiler vectorises them.

/// A pure operation on 128 bits; MMX forms use the low 64.
pub(crate) trait Int {
    fn exec(a: u128, b: u128, imm: u8) -> u128;
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
    ($($name:ident: $from:ident $to:ident |$a:ident, $b:ident| $e:expr;)*) => {$(
        pub(crate) struct $name;
        impl Int for $name {
            #[inline(always)]
            fn exec(a: u128, b: u128, _: u8) -> u128 {
                let (mut out, other) = ($from(a), $from(b));
                for (x, y) in out.iter_mut().zip(other) {
                    let ($a, $b) = (*x, y);
                    *x = $e;
                }
                $to(out)
            }
        }
    )*};
}

lane_ops! {
    Paddb: u8s of_u8s |a, b| a.wrapping_add(b);
    Paddw: u16s of_u16s |a, b| a.wrapping_add(b);
    Paddd: u32s of_u32s |a, b| a.wrapping_add(b);
    Paddq: u64s of_u64s |a, b| a.wrapping_add(b);
    Psubb: u8s of_u8s |a, b| a.wrapping_sub(b);
    Psubw: u16s of_u16s |a, b| a.wrapping_sub(b);
    Psubd: u32s of_u32s |a, b| a.wrapping_sub(b);
    Psubq: u64s of_u64s |a, b| a.wrapping_sub(b);
    Paddsb: i8s of_i8s |a, b| a.saturating_add(b);
    Paddsw: i16s of_i16s |a, b| a.saturating_add(b);
    Paddusb: u8s of_u8s |a, b| a.saturating_add(b);
    Paddusw: u16s of_u16s |a, b| a.saturating_add(b);
    Psubsb: i8s of_i8s |a, b| a.saturating_sub(b);
    Psubsw: i16s of_i16s |a, b| a.saturating_sub(b);
    Psubusb: u8s of_u8s |a, b| a.saturating_sub(b);
    Psubusw: u16s of_u16s |a, b| a.saturating_sub(b);
    Pmullw: u16s of_u16s |a, b| a.wrapping_mul(b);
    Pmulhw: i16s of_i16s |a, b| ((i32::from(a) * i32::from(b)) >> 16) as i16;
    Pmulhuw: u16s of_u16s |a, b| ((u32::from(a) * u32::from(b)) >> 16) as u16;
    Pmuludq: u64s of_u64s |a, b| u64::from(a as u32) * u64::from(b as u32);
    Pcmpeqb: u8s of_u8s |a, b| if a == b { 0xff } else { 0 };
    Pcmpeqw: u16s of_u16s |a, b| if a == b { 0xffff } else { 0 };
    Pcmpeqd: u32s of_u32s |a, b| if a == b { u32::MAX } else { 0 };
    Pcmpgtb: i8s of_i8s |a, b| if a > b { -1 } else { 0 };
    Pcmpgtw: i16s of_i16s |a, b| if a > b { -1 } else { 0 };
    Pcmpgtd: i32s of_i32s |a, b| if a > b { -1 } else { 0 };
    Pminub: u8s of_u8s |a, b| a.min(b);
    Pmaxub: u8s of_u8s |a, b| a.max(b);
    Pminsw: i16s of_i16s |a, b| a.min(b);
    Pmaxsw: i16s of_i16s |a, b| a.max(b);
    Pavgb: u8s of_u8s |a, b| ((u16::from(a) + u16::from(b) + 1) >> 1) as u8;
    Pavgw: u16s of_u16s |a, b| ((u32::from(a) + u32::from(b) + 1) >> 1) as u16;
}

/// Operations on the whole: `Name: |a, b, imm| expression`.
macro_rules! whole_ops {
    ($($name:ident: |$a:ident, $b:ident, $imm:tt| $e:expr;)*) => {$(
        pub(crate) struct $name;
        impl Int for $name {
            #[inline(always)]
            fn exec($a: u128, $b: u128, $imm: u8) -> u128 {
                $e
            }
        }
    )*};
}

whole_ops! {
    And: |a, b, _| a & b;
    Andn: |a, b, _| !a & b;
    Or: |a, b, _| a | b;
    Xor: |a, b, _| a ^ b;
    Pmaddwd: |a, b, _| {
        let (a, b) = (i16s(a), i16s(b));
        of_i32s(std::array::from_fn(|i| {
            let product = |n: usize| i32::from(a[n]) * i32::from(b[n]);
            product(2 * i).wrapping_add(product(2 * i + 1))
        }))
    };
    Psadbw: |a, b, _| {
        let (a, b) = (u8s(a), u8s(b));
        of_u64s(std::array::from_fn(|half| (8 * half..8 * half + 8).map(|i| u64::from(a[i].abs_diff(b[i]))).sum()))
    };
    Packsswb: |a, b, _| {
        let (a, b) = (i16s(a), i16s(b));
        of_i8s(std::array::from_fn(|i| if i < 8 { a[i] } else { b[i - 8] }.clamp(-128, 127) as i8))
    };
    Packuswb: |a, b, _| {
        let (a, b) = (i16s(a), i16s(b));
        of_u8s(std::array::from_fn(|i| if i < 8 { a[i] } else { b[i - 8] }.clamp(0, 255) as u8))
    };
    Packssdw: |a, b, _| {
        let (a, b) = (i32s(a), i32s(b));
        of_i16s(std::array::from_fn(|i| if i < 4 { a[i] } else { b[i - 4] }.clamp(-32768, 32767) as i16))
    };
    Punpcklbw: |a, b, _| of_u8s(interleave(u8s(a), u8s(b), 0));
    Punpcklwd: |a, b, _| of_u16s(interleave(u16s(a), u16s(b), 0));
    Punpckldq: |a, b, _| of_u32s(interleave(u32s(a), u32s(b), 0));
    Punpcklqdq: |a, b, _| of_u64s(interleave(u64s(a), u64s(b), 0));
    Punpckhbw: |a, b, _| of_u8s(interleave(u8s(a), u8s(b), 8));
    Punpckhwd: |a, b, _| of_u16s(interleave(u16s(a), u16s(b), 4));
    Punpckhdq: |a, b, _| of_u32s(interleave(u32s(a), u32s(b), 2));
    Punpckhqdq: |a, b, _| of_u64s(interleave(u64s(a), u64s(b), 1));
    // Shift counts are the low 64 bits of the source; counts beyond the lane give zeros or signs.
    Psllw: |a, b, _| { let n = count(b); if n > 15 { 0 } else { of_u16s(u16s(a).map(|x| x << n)) } };
    Pslld: |a, b, _| { let n = count(b); if n > 31 { 0 } else { of_u32s(u32s(a).map(|x| x << n)) } };
    Psllq: |a, b, _| { let n = count(b); if n > 63 { 0 } else { of_u64s(u64s(a).map(|x| x << n)) } };
    Psrlw: |a, b, _| { let n = count(b); if n > 15 { 0 } else { of_u16s(u16s(a).map(|x| x >> n)) } };
    Psrld: |a, b, _| { let n = count(b); if n > 31 { 0 } else { of_u32s(u32s(a).map(|x| x >> n)) } };
    Psrlq: |a, b, _| { let n = count(b); if n > 63 { 0 } else { of_u64s(u64s(a).map(|x| x >> n)) } };
    Psraw: |a, b, _| { let n = count(b).min(15); of_i16s(i16s(a).map(|x| x >> n)) };
    Psrad: |a, b, _| { let n = count(b).min(31); of_i32s(i32s(a).map(|x| x >> n)) };
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
    // SAFETY: 16 plain bytes; SSE2 is part of x86-64.
    unsafe {
        u64::from(std::arch::x86_64::_mm_movemask_epi8(
            std::mem::transmute::<u128, std::arch::x86_64::__m128i>(value),
        ) as u32)
    }
    #[cfg(not(target_arch = "x86_64"))]
    u8s(value).iter().enumerate().fold(0, |mask, (i, &byte)| mask | u64::from(byte >> 7) << i)
}
