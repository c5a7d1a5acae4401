//! Resets the machine through the ACPI reset register's usual place, the chipset's reset port.
#![no_std]
#![no_main]

use bare_guests::boot::Machine;
use bare_guests::port::{Serial, out8};
use core::fmt::Write;

bare_guests::guest!(main);

fn main(machine: &Machine) {
    let _ = writeln!(Serial, "resetting");
    out8(u16::try_from(machine.number("port").unwrap_or(0xcf9)).unwrap_or(0xcf9), 6);
    loop {
        core::hint::spin_loop();
    }
}
