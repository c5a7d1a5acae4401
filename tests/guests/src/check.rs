//! Checks and their report.

use core::fmt::Write;
use core::sync::atomic::{AtomicU32, Ordering::Relaxed};

use crate::port::{Serial, out8};

static DONE: AtomicU32 = AtomicU32::new(0);
static FAILED: AtomicU32 = AtomicU32::new(0);

/// Checks that two numbers are equal.
pub fn equal(name: &str, got: u64, want: u64) {
    DONE.fetch_add(1, Relaxed);
    if got == want {
        let _ = writeln!(Serial, "ok {name}");
    } else {
        FAILED.fetch_add(1, Relaxed);
        let _ = writeln!(Serial, "FAIL {name}: got {got:#x} want {want:#x}");
    }
}

/// Checks that something holds.
pub fn holds(name: &str, got: bool) {
    equal(name, u64::from(got), 1);
}

/// Says how many checks there were and ends the machine.
pub fn finish() -> ! {
    let failed = FAILED.load(Relaxed);
    let _ = writeln!(Serial, "{} checks, {failed} failed", DONE.load(Relaxed));
    exit(u8::from(failed != 0))
}

/// Ends the machine with this status.
pub fn exit(status: u8) -> ! {
    out8(0xf4, status);
    loop {
        // SAFETY: nothing is left to do.
        unsafe { core::arch::asm!("cli", "hlt") };
    }
}
