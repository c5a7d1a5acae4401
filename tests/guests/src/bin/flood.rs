//! Floods the serial line with `bytes=N`, whether it takes them or not, and ends.
#![no_std]
#![no_main]

use bare_guests::boot::Machine;
use bare_guests::check::exit;
use bare_guests::port::{SERIAL, out8};

bare_guests::guest!(main);

fn main(machine: &Machine) {
    for _ in 0..machine.number("bytes").unwrap_or(8 << 20) {
        out8(SERIAL, b'y');
    }
    exit(0)
}
