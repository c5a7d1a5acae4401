//! Reads one port again and again, for `cargo xtask bench exit`: `count=` times, `port=` in decimal. In ring 3, which
//! most hosts run natively; in ring 0 where ring 3 may not use ports.
#![no_std]
#![no_main]

use bare_guests::boot::Machine;
use bare_guests::check::exit;
use bare_guests::fault::user_at;
use bare_guests::tables::USER_CODE;
use bare_guests::{Fault, guarded};
use core::arch::asm;

bare_guests::guest!(main);

extern "C" fn read_many(argument: u64) {
    // SAFETY: the ports of serial devices; ends the ring-3 function.
    unsafe {
        asm!("test rcx, rcx", "jz 3f", "2:", "in al, dx", "dec rcx", "jnz 2b", "3:", "ud2",
            in("rcx") argument >> 16, in("edx") argument as u16, options(noreturn))
    }
}

fn main(machine: &Machine) {
    let count = machine.number("count").unwrap_or(0);
    let port = machine.number("port").unwrap_or(0x3ff);
    let argument = count << 16 | port & 0xffff;
    let mut fault = user_at(read_many as *const () as u64, argument, 0x3002, USER_CODE);
    if fault.vector == 13 {
        // A host that does not honour IOPL 3.
        fault = guarded(read_many, argument);
    }
    exit(u8::from(fault.vector != Fault::END));
}
