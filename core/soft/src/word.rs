//! The integers that the guest moves, and how they reach host memory.
//!
//! Guest loads and stores become host loads and stores of the same width; ordering is the host's on x86-64, acquire and release elsewhere.
#![allow(unsafe_code, reason = "guest RAM is reached through host pointers that the TLB vouches for")]
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_possible_wrap,
    reason = "words are cut to the access's size"
)]

use std::sync::atomic::Ordering;

/// An unsigned integer that the guest moves.
pub(crate) trait Word: Copy + 'static {
    /// Bytes.
    const SIZE: u64;
    /// log2 of [`Word::SIZE`].
    const LOG2: u32;
    fn to_u64(self) -> u64;
    fn from_u64(value: u64) -> Self;
    /// Sign-extended to 64 bits.
    fn sx(self) -> u64;
    /// # Safety
    /// `p` is valid for the access.
    unsafe fn load(p: *const u8) -> Self;
    /// # Safety
    /// As for `load`.
    unsafe fn store(p: *mut u8, value: Self);
    /// Compares and exchanges atomically; gives what was there.
    /// # Safety
    /// As for `load`, and `p` is aligned.
    unsafe fn cas(p: *mut u8, old: Self, new: Self) -> Result<Self, Self>;
}

#[repr(C, packed)]
#[derive(Clone, Copy)]
struct Packed<T>(T);

macro_rules! word {
    ($t:ty, $signed:ty, $atomic:ty, $log2:literal) => {
        impl Word for $t {
            const SIZE: u64 = 1 << $log2;
            const LOG2: u32 = $log2;
            #[inline(always)]
            fn to_u64(self) -> u64 {
                u64::from(self)
            }
            #[inline(always)]
            fn from_u64(value: u64) -> Self {
                value as Self
            }
            #[inline(always)]
            fn sx(self) -> u64 {
                self as $signed as i64 as u64
            }
            #[inline(always)]
            unsafe fn load(p: *const u8) -> Self {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the caller's. A volatile load is one `mov`, which loads acquire on this host and may be misaligned.
                unsafe {
                    p.cast::<Packed<Self>>().read_volatile().0
                }
                #[cfg(not(target_arch = "x86_64"))]
                // SAFETY: the caller's; alignment is checked before the atomic access.
                unsafe {
                    if p.addr() & (Self::SIZE as usize - 1) == 0 {
                        <$atomic>::from_ptr(p.cast_mut().cast()).load(Ordering::Acquire)
                    } else {
                        p.cast::<Self>().read_unaligned()
                    }
                }
            }
            #[inline(always)]
            unsafe fn store(p: *mut u8, value: Self) {
                #[cfg(target_arch = "x86_64")]
                // SAFETY: as in `load`.
                unsafe {
                    p.cast::<Packed<Self>>().write_volatile(Packed(value));
                }
                #[cfg(not(target_arch = "x86_64"))]
                // SAFETY: as in `load`.
                unsafe {
                    if p.addr() & (Self::SIZE as usize - 1) == 0 {
                        <$atomic>::from_ptr(p.cast()).store(value, Ordering::Release)
                    } else {
                        p.cast::<Self>().write_unaligned(value)
                    }
                }
            }
            #[inline(always)]
            unsafe fn cas(p: *mut u8, old: Self, new: Self) -> Result<Self, Self> {
                // SAFETY: the caller's.
                unsafe { <$atomic>::from_ptr(p.cast()) }.compare_exchange(
                    old,
                    new,
                    Ordering::SeqCst,
                    Ordering::SeqCst,
                )
            }
        }
    };
}

word!(u8, i8, std::sync::atomic::AtomicU8, 0);
word!(u16, i16, std::sync::atomic::AtomicU16, 1);
word!(u32, i32, std::sync::atomic::AtomicU32, 2);
word!(u64, i64, std::sync::atomic::AtomicU64, 3);
