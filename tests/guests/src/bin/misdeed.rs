//! Provokes the misbehaving test device (plugins/host/tests/fixtures/misdeed), and checks that the rest of the machine works on.
#![no_std]
#![no_main]

use bare_guests::boot::Machine;
use bare_guests::check::equal;
use bare_guests::port::{SERIAL, Serial, in8, out8};
use core::fmt::Write;

bare_guests::guest!(main);

const DEVICE: u16 = 0x500;
/// Enough that the host takes a checkpoint of the device on the way.
const ROUNDS: u32 = 1000;

fn main(_: &Machine) {
    out8(DEVICE + 1, 1);
    for _ in 0..ROUNDS {
        in8(DEVICE + 2);
        out8(DEVICE, 0x42);
        in8(DEVICE);
    }
    out8(SERIAL + 7, 0x5a);
    equal("the serial port works on", u64::from(in8(SERIAL + 7)), 0x5a);
    let _ = writeln!(Serial, "the machine goes on");
}
