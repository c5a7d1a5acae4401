//! Registers of the bundled devices, and addresses that nobody claims.
#![no_std]
#![no_main]

use bare_guests::boot::Machine;
use bare_guests::check::{equal, holds};
use bare_guests::port::{SERIAL, in8, in16, in32, out8, out16, out32};

bare_guests::guest!(main);

/// In the hole below 4 GiB, away from every device.
const NOWHERE: u64 = 0xd800_0000;
const NO_PORT: u16 = 0x5000;

fn clock(register: u8) -> u8 {
    out8(0x70, register);
    in8(0x71)
}

fn main(_: &Machine) {
    equal("unclaimed port, 1 byte", u64::from(in8(NO_PORT)), 0xff);
    equal("unclaimed port, 2 bytes", u64::from(in16(NO_PORT)), 0xffff);
    equal("unclaimed port, 4 bytes", u64::from(in32(NO_PORT)), 0xffff_ffff);
    out8(NO_PORT, 1);
    out16(NO_PORT, 1);
    out32(NO_PORT, 1);
    equal("unclaimed port after a write", u64::from(in8(NO_PORT)), 0xff);

    // SAFETY: mapped, and no memory: that is the point.
    unsafe {
        equal("unclaimed memory, 1 byte", u64::from((NOWHERE as *const u8).read_volatile()), 0xff);
        equal("unclaimed memory, 2 bytes", u64::from((NOWHERE as *const u16).read_volatile()), 0xffff);
        equal("unclaimed memory, 4 bytes", u64::from((NOWHERE as *const u32).read_volatile()), 0xffff_ffff);
        equal("unclaimed memory, 8 bytes", (NOWHERE as *const u64).read_volatile(), u64::MAX);
        (NOWHERE as *mut u64).write_volatile(0);
        equal("unclaimed memory after a write", (NOWHERE as *const u64).read_volatile(), u64::MAX);
    }

    serial();

    equal("clock: valid", u64::from(clock(0x0d) & 0x80), 0x80);
    equal("clock: 32 768 Hz base", u64::from(clock(0x0a) & 0x7f), 0x26);
    let binary = clock(0x0b) & 4 != 0;
    let number = |value: u8| if binary { value } else { (value >> 4) * 10 + (value & 15) };
    let month = number(clock(0x08));
    holds("clock: month", (1..=12).contains(&month));
    let day = number(clock(0x07));
    holds("clock: day", (1..=31).contains(&day));
    holds("clock: second", number(clock(0x00)) < 60);
    out8(0x70, 0x40);
    out8(0x71, 0xa5);
    equal("clock: memory", u64::from(clock(0x40)), 0xa5);
}

/// Nothing is printed before the port is as it was.
fn serial() {
    out8(SERIAL + 7, 0x5a);
    let scratch = in8(SERIAL + 7);
    let line = in8(SERIAL + 3);
    out8(SERIAL + 3, 0x83);
    out8(SERIAL, 0x0c);
    out8(SERIAL + 1, 0);
    let latch = in8(SERIAL);
    out8(SERIAL, 1);
    out8(SERIAL + 3, 0x03);
    let line_back = in8(SERIAL + 3);
    out8(SERIAL + 2, 0x07);
    let identification = in8(SERIAL + 2);
    out8(SERIAL + 4, 0x1f);
    let modem = in8(SERIAL + 6);
    out8(SERIAL, b'U');
    while in8(SERIAL + 5) & 1 == 0 {
        core::hint::spin_loop();
    }
    let byte = in8(SERIAL);
    out8(SERIAL + 4, 0x03);
    out8(SERIAL + 3, line);
    equal("serial: scratch register", u64::from(scratch), 0x5a);
    equal("serial: divisor latch", u64::from(latch), 0x0c);
    equal("serial: line control", u64::from(line_back), 0x03);
    equal("serial: FIFOs on", u64::from(identification & 0xc0), 0xc0);
    equal("serial: modem lines in loopback", u64::from(modem & 0xf0), 0xf0);
    equal("serial: byte in loopback", u64::from(byte), u64::from(b'U'));
}
