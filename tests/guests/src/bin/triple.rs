//! Triple-faults, on purpose.
#![no_std]
#![no_main]

use bare_guests::boot::Machine;

bare_guests::guest!(main);

fn main(_: &Machine) {
    let table = [0u16; 5];
    // SAFETY: nothing comes after.
    unsafe { core::arch::asm!("lidt [{}]", "ud2", in(reg) &table) };
}
