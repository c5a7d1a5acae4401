//! Lazy arithmetic flags: an operation leaves its kind, size and two words, and a flag is worked out when somebody asks.
//!
//! Both words are sign-extended from the operation's size, so that zero, sign and the unsigned order need no size:
//! `a - b` leaves `a` and `b`, and "below" is `a < b` of the extended words for every size.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_possible_wrap,
    reason = "words are read as signed and unsigned"
)]

use crate::cpu::{Cpu, fl};

/// What the last flag-writing operation was, with the log2 of its size in bytes in bits 8 and 9.
pub(crate) mod kind {
    /// `dst` holds the flags themselves.
    pub(crate) const EXPLICIT: u32 = 0;
    /// `dst` = result, `src` = second operand.
    pub(crate) const ADD: u32 = 1;
    /// As ADD, with a carry in.
    pub(crate) const ADC: u32 = 2;
    /// `dst` - `src`.
    pub(crate) const SUB: u32 = 3;
    /// `dst` - `src` - 1.
    pub(crate) const SBB: u32 = 4;
    /// `dst` = result; CF = OF = 0.
    pub(crate) const LOGIC: u32 = 5;
    /// `dst` = result, `src` = the carry that stays.
    pub(crate) const INC: u32 = 6;
    /// `dst` = result, `src` = the carry that stays.
    pub(crate) const DEC: u32 = 7;
    /// `dst` = result, `src` = the operand shifted by one less than the count.
    pub(crate) const SHL: u32 = 8;
    /// As SHL.
    pub(crate) const SHR: u32 = 9;
    /// As SHL.
    pub(crate) const SAR: u32 = 10;
    /// `dst` = the low result, `src` = 1 if the high part is significant.
    pub(crate) const MUL: u32 = 11;
}

/// The lazy state.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lazy {
    pub(crate) dst: u64,
    pub(crate) src: u64,
    pub(crate) op: u32,
}

impl Lazy {
    pub(crate) const fn explicit(flags: u64) -> Self {
        Self { dst: flags, src: 0, op: kind::EXPLICIT }
    }
}

/// Sign-extends from a size given as log2 of bytes.
#[inline(always)]
pub(crate) fn sign_extend(value: u64, log2: u32) -> u64 {
    let shift = 64 - (8 << log2);
    (((value << shift) as i64) >> shift) as u64
}

impl Lazy {
    #[inline(always)]
    fn log2(self) -> u32 {
        self.op >> 8
    }

    #[inline]
    fn result(self) -> u64 {
        match self.op & 0xff {
            kind::SUB => sign_extend(self.dst.wrapping_sub(self.src), self.log2()),
            kind::SBB => sign_extend(self.dst.wrapping_sub(self.src).wrapping_sub(1), self.log2()),
            _ => self.dst,
        }
    }

    fn bit(self, value: u64) -> bool {
        value >> ((8 << self.log2()) - 1) & 1 != 0
    }

    #[inline]
    pub(crate) fn cf(self) -> bool {
        match self.op & 0xff {
            kind::EXPLICIT => self.dst & fl::CF != 0,
            kind::ADD => self.dst < self.src,
            kind::ADC => self.dst <= self.src,
            kind::SUB => self.dst < self.src,
            kind::SBB => self.dst <= self.src,
            kind::LOGIC => false,
            kind::SHL => self.bit(self.src),
            _ => self.src & 1 != 0,
        }
    }

    #[inline]
    pub(crate) fn zf(self) -> bool {
        match self.op & 0xff {
            kind::EXPLICIT => self.dst & fl::ZF != 0,
            kind::SUB => self.dst == self.src,
            _ => self.result() == 0,
        }
    }

    #[inline]
    pub(crate) fn sf(self) -> bool {
        if self.op & 0xff == kind::EXPLICIT { self.dst & fl::SF != 0 } else { (self.result() as i64) < 0 }
    }

    pub(crate) fn pf(self) -> bool {
        if self.op & 0xff == kind::EXPLICIT {
            self.dst & fl::PF != 0
        } else {
            (self.result() as u8).count_ones() & 1 == 0
        }
    }

    pub(crate) fn of(self) -> bool {
        match self.op & 0xff {
            kind::EXPLICIT => self.dst & fl::OF != 0,
            kind::ADD | kind::ADC => {
                let first = self.first();
                self.bit((first ^ self.dst) & (self.src ^ self.dst))
            }
            kind::SUB | kind::SBB => (((self.dst ^ self.src) & (self.dst ^ self.result())) as i64) < 0,
            kind::INC => self.dst == sign_extend(1 << ((8 << self.log2()) - 1), self.log2()),
            kind::DEC => self.dst == (1 << ((8 << self.log2()) - 1)) - 1,
            kind::SHL => ((self.dst as i64) < 0) != self.bit(self.src),
            kind::SHR => self.bit(self.src),
            kind::MUL => self.src & 1 != 0,
            _ => false,
        }
    }

    fn first(self) -> u64 {
        let carry = u64::from(self.op & 0xff == kind::ADC);
        self.dst.wrapping_sub(self.src).wrapping_sub(carry)
    }

    pub(crate) fn af(self) -> bool {
        match self.op & 0xff {
            kind::EXPLICIT => self.dst & fl::AF != 0,
            kind::ADD | kind::ADC => (self.first() ^ self.src ^ self.dst) & 0x10 != 0,
            kind::SUB | kind::SBB => (self.dst ^ self.src ^ self.result()) & 0x10 != 0,
            kind::INC => self.dst & 0xf == 0,
            kind::DEC => self.dst & 0xf == 0xf,
            _ => false,
        }
    }

    /// All six.
    pub(crate) fn flags(self) -> u64 {
        if self.op & 0xff == kind::EXPLICIT {
            return self.dst;
        }
        let mut flags = 0;
        for (set, bit) in [
            (self.cf(), fl::CF),
            (self.pf(), fl::PF),
            (self.af(), fl::AF),
            (self.zf(), fl::ZF),
            (self.sf(), fl::SF),
            (self.of(), fl::OF),
        ] {
            if set {
                flags |= bit;
            }
        }
        flags
    }

    /// Condition `cc` of the instruction encoding (0 = O, 1 = NO, 2 = B …).
    #[inline]
    pub(crate) fn condition(self, cc: u8) -> bool {
        let yes = match cc >> 1 {
            0 => self.of(),
            1 => self.cf(),
            2 => self.zf(),
            3 => {
                if self.op & 0xff == kind::SUB {
                    self.dst <= self.src
                } else {
                    self.cf() || self.zf()
                }
            }
            4 => self.sf(),
            5 => self.pf(),
            6 => self.less(),
            _ => {
                if self.op & 0xff == kind::SUB {
                    self.dst as i64 <= self.src as i64
                } else {
                    self.zf() || self.less()
                }
            }
        };
        yes != (cc & 1 != 0)
    }

    #[inline]
    fn less(self) -> bool {
        match self.op & 0xff {
            kind::SUB => (self.dst as i64) < self.src as i64,
            kind::LOGIC => (self.dst as i64) < 0,
            _ => self.sf() != self.of(),
        }
    }
}

impl Cpu {
    /// RFLAGS, complete.
    pub(crate) fn flags(&self) -> u64 {
        self.rflags & !fl::ARITH | self.lazy.flags()
    }

    /// Sets RFLAGS, complete. The caller has decided which bits may change.
    pub(crate) fn set_flags(&mut self, flags: u64) {
        self.lazy = Lazy::explicit(flags & fl::ARITH);
        self.rflags = flags & !fl::ARITH | 2;
    }

    /// Sets the arithmetic flags only.
    pub(crate) fn set_arith(&mut self, flags: u64) {
        self.lazy = Lazy::explicit(flags & fl::ARITH);
    }
}
