//! Port I/O and the serial line.

use core::arch::asm;
use core::fmt;

/// The first serial port.
pub const SERIAL: u16 = 0x3f8;

macro_rules! access {
    ($read:ident, $write:ident, $kind:ty, $register:tt) => {
        /// Reads a port.
        pub fn $read(port: u16) -> $kind {
            let value;
            // SAFETY: what ports do here is what these guests test.
            unsafe { asm!(concat!("in ", $register, ", dx"), out($register) value, in("dx") port, options(nostack, preserves_flags)) };
            value
        }
        /// Writes a port.
        pub fn $write(port: u16, value: $kind) {
            // SAFETY: as for reading.
            unsafe { asm!(concat!("out dx, ", $register), in($register) value, in("dx") port, options(nostack, preserves_flags)) };
        }
    };
}
access!(in8, out8, u8, "al");
access!(in16, out16, u16, "ax");
access!(in32, out32, u32, "eax");

/// Writes to the first serial port.
pub struct Serial;

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            while in8(SERIAL + 5) & 0x20 == 0 {
                core::hint::spin_loop();
            }
            out8(SERIAL, byte);
        }
        Ok(())
    }
}
