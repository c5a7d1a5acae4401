//! Resets the machine: writes 1 to the third of the platform's power registers, or to the port that `port=` names.
#![no_std]
#![no_main]

use bare_guests::boot::Machine;
use bare_guests::port::{Serial, out8};
use core::fmt::Write;

bare_guests::guest!(main);

fn main(machine: &Machine) {
    let _ = writeln!(Serial, "resetting");
    out8(u16::try_from(machine.number("port").unwrap_or(0x602)).unwrap_or(0x602), 1);
    loop {
        core::hint::spin_loop();
    }
}
