//! The register state: the 512-byte FXSAVE64 image, its conversions to what guests see in memory, and resets.

/// Status-word bits.
pub(crate) const FSW_EXCEPTIONS: u16 = 0x3f;
const FSW_ES_BUSY: u16 = 0x8080;
/// TOP, bits 11-13.
const FSW_TOP: u16 = 0x3800;
/// MXCSR bits that can be set: everything but the upper half (AMD APM vol. 1 §4.2.2; no misaligned-exception mask).
pub(crate) const MXCSR_MASK: u32 = 0xffff;

/// The x87, MMX and SSE registers, laid out as FXSAVE64 does (AMD APM vol. 2 §11.4.4): `st[i]` is ST(i), so it moves with
/// TOP; MMX register *n* is physical register *n*, which is ST(n) once an MMX instruction has made TOP zero.
#[repr(C, align(16))]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FpState {
    /// Control word.
    pub fcw: u16,
    /// Status word.
    pub fsw: u16,
    /// Abridged tag word: bit *n* set = physical register *n* is not empty.
    pub ftw: u8,
    reserved0: u8,
    /// Last opcode.
    pub fop: u16,
    /// Last instruction pointer.
    pub fip: u64,
    /// Last data pointer.
    pub fdp: u64,
    /// SSE control and status.
    pub mxcsr: u32,
    mxcsr_mask: u32,
    /// ST(0)-ST(7), in the low 80 bits each.
    pub st: [u128; 8],
    /// XMM0-XMM15.
    pub xmm: [u128; 16],
    reserved1: [u8; 96],
}

/// An image with reserved MXCSR bits: FXRSTOR refuses it with #GP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the FXSAVE image sets reserved bits of MXCSR")]
pub struct ReservedBits;

const _: () = assert!(size_of::<FpState>() == 512);

impl Default for FpState {
    fn default() -> Self {
        Self::power_on()
    }
}

impl FpState {
    /// The state after RESET (AMD APM vol. 2 table 14-1): FCW 0x40, all x87 registers valid zeros.
    pub const fn power_on() -> Self {
        Self {
            fcw: 0x40,
            fsw: 0,
            ftw: 0xff,
            reserved0: 0,
            fop: 0,
            fip: 0,
            fdp: 0,
            mxcsr: 0x1f80,
            mxcsr_mask: MXCSR_MASK,
            st: [0; 8],
            xmm: [0; 16],
            reserved1: [0; 96],
        }
    }

    /// FNINIT: control, status, tags and pointers; physical registers keep their contents.
    pub fn fninit(&mut self) {
        let top = self.top();
        self.st.rotate_right(top);
        self.fcw = 0x37f;
        self.fsw = 0;
        self.ftw = 0;
        self.fop = 0;
        self.fip = 0;
        self.fdp = 0;
    }

    /// An unmasked x87 exception waits for the next waiting instruction.
    #[inline]
    pub const fn pending(&self) -> bool {
        self.fsw & !self.fcw & FSW_EXCEPTIONS != 0
    }

    /// The image as bytes.
    pub const fn as_bytes(&self) -> &[u8; 512] {
        // SAFETY: repr(C), 512 bytes, no padding (asserted by the sizes of the fields).
        unsafe { &*std::ptr::from_ref(self).cast() }
    }

    /// FXSAVE: `long` = REX.W form (64-bit pointers), `xmm` = how many XMM registers the mode has (16, or 8 outside 64-bit
    /// code). Bytes from 416 on, and registers beyond `xmm`, stay as they are in `image`.
    pub fn fxsave(&self, image: &mut [u8; 512], long: bool, xmm: usize) {
        let bytes = self.as_bytes();
        let end = 160 + 16 * xmm.min(16);
        image[..end].copy_from_slice(&bytes[..end]);
        if !long {
            // 32-bit offsets; the selectors are not tracked.
            image[12..16].fill(0);
            image[20..24].fill(0);
        }
    }

    /// FXRSTOR; the same parameters. Reserved MXCSR bits refuse the whole image (#GP).
    pub fn fxrstor(&mut self, image: &[u8; 512], long: bool, xmm: usize) -> Result<(), ReservedBits> {
        let u16_at = |at: usize| u16::from_le_bytes([image[at], image[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        let u128_at = |at: usize| {
            let mut bytes = [0; 16];
            bytes.copy_from_slice(&image[at..at + 16]);
            u128::from_le_bytes(bytes)
        };
        let mxcsr = u32_at(24);
        if mxcsr & !MXCSR_MASK != 0 {
            return Err(ReservedBits);
        }
        self.mxcsr = mxcsr;
        self.ftw = image[4];
        self.fop = u16_at(6) & 0x7ff;
        let high = |at| if long { u64::from(u32_at(at)) << 32 } else { 0 };
        self.fip = u64::from(u32_at(8)) | high(12);
        self.fdp = u64::from(u32_at(16)) | high(20);
        self.set_control_status(u16_at(0), u16_at(2));
        for (i, st) in self.st.iter_mut().enumerate() {
            *st = u128_at(32 + 16 * i) & ((1 << 80) - 1);
        }
        for (i, register) in self.xmm.iter_mut().enumerate().take(xmm) {
            *register = u128_at(160 + 16 * i);
        }
        Ok(())
    }

    /// Sets FCW and FSW together; ES and B follow from them.
    pub(crate) const fn set_control_status(&mut self, fcw: u16, fsw: u16) {
        self.fcw = fcw & 0x1f7f | 0x40;
        self.fsw = fsw & !FSW_ES_BUSY;
        if self.pending() {
            self.fsw |= FSW_ES_BUSY;
        }
    }

    /// FLDENV: as [`Self::set_control_status`], the physical registers staying where they are while TOP moves.
    pub(crate) fn set_environment(&mut self, fcw: u16, fsw: u16) {
        let top = self.top();
        self.st.rotate_right(top);
        self.set_control_status(fcw, fsw);
        let top = self.top();
        self.st.rotate_left(top);
    }

    pub(crate) const fn top(&self) -> usize {
        (self.fsw >> 11 & 7) as usize
    }

    /// What running on the host's unit changes and the guest must not see.
    pub(crate) const fn untracked(&self) -> (u16, u64, u64) {
        (self.fop, self.fip, self.fdp)
    }

    pub(crate) const fn set_untracked(&mut self, kept: (u16, u64, u64)) {
        (self.fop, self.fip, self.fdp) = kept;
        self.mxcsr_mask = MXCSR_MASK;
    }

    pub(crate) const fn clear_exceptions(&mut self) {
        self.fsw &= 0x7f00;
    }

    /// What every MMX instruction does: TOP becomes 0, all registers valid. Contents keep their physical register.
    #[inline]
    pub(crate) fn enter_mmx(&mut self) {
        if self.fsw & FSW_TOP != 0 {
            let top = self.top();
            self.st.rotate_right(top);
            self.fsw &= !FSW_TOP;
        }
        self.ftw = 0xff;
    }

    /// An MMX register. Callers have entered MMX.
    #[inline]
    pub(crate) const fn mm(&self, register: u8) -> u64 {
        self.st[(register & 7) as usize] as u64
    }

    /// Writes an MMX register: the exponent becomes all ones.
    #[inline]
    pub(crate) const fn set_mm(&mut self, register: u8, value: u64) {
        self.st[(register & 7) as usize] = 0xffff << 64 | value as u128;
    }

    /// The full 16-bit tag word of FNSTENV: per physical register valid 0, zero 1, special 2, empty 3.
    pub(crate) fn full_tags(&self) -> u16 {
        (0..8).fold(0, |tags, physical| tags | self.full_tag(physical) << (2 * physical))
    }

    fn full_tag(&self, physical: usize) -> u16 {
        if self.ftw >> physical & 1 == 0 {
            return 3;
        }
        let value = self.st[(physical + 8 - self.top()) & 7];
        let (exponent, mantissa) = ((value >> 64) as u16 & 0x7fff, value as u64);
        match (exponent, mantissa) {
            (0, 0) => 1,
            (0 | 0x7fff, _) => 2,
            (_, m) if m >> 63 == 0 => 2,
            _ => 0,
        }
    }

    /// Sets the abridged tags from a full tag word.
    pub(crate) fn set_full_tags(&mut self, tags: u16) {
        self.ftw = (0..8).fold(0, |ftw, n| ftw | u8::from(tags >> (2 * n) & 3 != 3) << n);
    }
}
