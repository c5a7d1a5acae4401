//! Privileged instructions.

use core::arch::asm;

/// Reads a model-specific register.
pub fn rdmsr(msr: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the caller names a register that exists, or guards the call.
    unsafe { asm!("rdmsr", in("ecx") msr, out("eax") low, out("edx") high, options(nostack)) };
    u64::from(high) << 32 | u64::from(low)
}

/// Writes a model-specific register.
pub fn wrmsr(msr: u32, value: u64) {
    // SAFETY: as for reading.
    unsafe {
        asm!("wrmsr", in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack))
    };
}

/// CPUID: EAX, EBX, ECX, EDX.
pub fn cpuid(leaf: u32, sub: u32) -> [u32; 4] {
    let result = core::arch::x86_64::__cpuid_count(leaf, sub);
    [result.eax, result.ebx, result.ecx, result.edx]
}

/// The time-stamp counter.
pub fn rdtsc() -> u64 {
    // SAFETY: every CPU here has one.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Lets interrupts in.
pub fn enable_interrupts() {
    // SAFETY: handlers are installed.
    unsafe { asm!("sti") };
}

/// Keeps interrupts out.
pub fn disable_interrupts() {
    // SAFETY: always allowed in ring 0.
    unsafe { asm!("cli") };
}

/// Waits for an interrupt, and returns after it was handled, with interrupts off.
pub fn wait_for_interrupt() {
    // SAFETY: handlers are installed; STI holds interrupts off until HLT has begun.
    unsafe { asm!("sti", "hlt", "cli") };
}

/// Drops the translation of one page.
pub fn invlpg(address: u64) {
    // SAFETY: only speed is lost.
    unsafe { asm!("invlpg [{}]", in(reg) address, options(nostack)) };
}

/// Reads CR0.
pub fn cr0() -> u64 {
    let value;
    // SAFETY: reading changes nothing.
    unsafe { asm!("mov {}, cr0", out(reg) value, options(nostack)) };
    value
}

/// Writes CR0.
pub fn set_cr0(value: u64) {
    // SAFETY: the caller keeps the machine running.
    unsafe { asm!("mov cr0, {}", in(reg) value, options(nostack)) };
}

/// Loads CR3 again: drops translations that are not global.
pub fn flush() {
    // SAFETY: only speed is lost.
    unsafe { asm!("mov {0}, cr3", "mov cr3, {0}", out(reg) _) };
}
