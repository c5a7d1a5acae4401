//! Says that it runs, and then does so for ever.
#![no_std]
#![no_main]

use bare_guests::boot::Machine;
use bare_guests::port::Serial;
use core::fmt::Write;

bare_guests::guest!(main);

fn main(_: &Machine) {
    let _ = writeln!(Serial, "spinning");
    loop {
        core::hint::spin_loop();
    }
}
