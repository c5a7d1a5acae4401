//! What all bare guests share: the way in, a serial line, exception handling, and a way to report checks.
//!
//! A guest is an ELF file that `--personality flat` enters in long mode, ring 0, with interrupts off and the first 4 GiB
//! mapped one to one. It also has a PVH entry: `--personality linux` gives it a command line, and other hypervisors can be
//! asked what they make of it. It reports each check as a line on the first serial port, `ok NAME` or `FAIL NAME: got … want …`,
//! prints nothing that depends on time or on the engine, and ends by writing its status to port 0xf4.
#![no_std]

pub mod apic;
pub mod boot;
pub mod check;
pub mod cpu;
pub mod fault;
pub mod port;
pub mod smp;
pub mod tables;
pub mod virtio;

pub use fault::{Fault, guarded, user};

/// Begins a guest: `guest!(main)`, where `main` is a `fn(&Machine)` that makes checks.
#[macro_export]
macro_rules! guest {
    ($main:path) => {
        #[unsafe(no_mangle)]
        extern "C" fn guest_main(info: *const u64) -> ! {
            let machine = $crate::boot::begin(info);
            $main(&machine);
            $crate::check::finish()
        }
    };
}
