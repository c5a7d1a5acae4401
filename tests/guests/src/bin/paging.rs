//! Page faults of each kind, accessed and dirty bits, INVLPG.
#![no_std]
#![no_main]

use bare_guests::check::{equal, holds};
use bare_guests::tables::{Page, Shared, split};
use bare_guests::{Fault, boot::Machine, cpu, guarded, user};
use core::arch::asm;

bare_guests::guest!(main);

/// The pages under test begin here, in free memory.
const BASE: u64 = 0x40_0000;
static TABLE: Shared<Page> = Shared::new([0; 512]);

const PRESENT: u64 = 1;
const WRITE: u64 = 2;
const USER: u64 = 4;
const ACCESSED: u64 = 0x20;
const DIRTY: u64 = 0x40;
const NO_EXECUTE: u64 = 1 << 63;

macro_rules! body {
    ($name:ident, $($code:literal),+) => {
        extern "C" fn $name(address: u64) {
            // SAFETY: run under `guarded` or `user`, which take any fault.
            unsafe { asm!($($code),+, in("rdi") address, out("rax") _, out("rcx") _) }
        }
    };
}
body!(read, "mov al, [rdi]");
body!(write, "mov byte ptr [rdi], 0x5a");
body!(user_write_wide, "mov rax, -1", "mov [rdi], rax", "ud2");
body!(modify, "add dword ptr [rdi], 1");
body!(execute, "call rdi");
body!(user_read, "mov al, [rdi]", "ud2");
body!(user_write, "mov byte ptr [rdi], 0x5a", "ud2");
body!(user_execute, "call rdi", "ud2");

fn map(entry: *mut u64, value: u64) {
    // SAFETY: the entry is in `TABLE`, and this is the only vCPU.
    unsafe { entry.write_volatile(value) };
    cpu::invlpg(BASE);
}

fn faults(name: &str, fault: Fault, error: u64, address: u64) {
    equal(name, fault.vector << 8 | fault.error, 14 << 8 | error);
    equal("  its CR2", fault.cr2, address);
}

fn main(_: &Machine) {
    let entry = split(BASE, &TABLE);
    let memory = BASE as *mut u8;
    // SAFETY: free memory, mapped by `split`. A RET for the execution checks.
    unsafe { memory.write_bytes(0xc3, 8192) };
    // EFER.NXE, CR0.WP
    cpu::wrmsr(0xc000_0080, cpu::rdmsr(0xc000_0080) | 0x800);
    cpu::set_cr0(cpu::cr0() | 0x1_0000);

    map(entry, 0);
    faults("absent: read in ring 0", guarded(read, BASE + 5), 0, BASE + 5);
    faults("absent: write in ring 0", guarded(write, BASE), 2, BASE);
    faults("absent: execute in ring 0", guarded(execute, BASE), 0x10, BASE);
    faults("absent: read in ring 3", user(user_read, BASE), 4, BASE);
    faults("absent: write in ring 3", user(user_write, BASE + 9), 6, BASE + 9);
    faults("absent: execute in ring 3", user(user_execute, BASE), 0x14, BASE);

    map(entry, BASE | PRESENT | WRITE);
    equal("supervisor page: read in ring 0", guarded(read, BASE).vector, Fault::NONE);
    faults("supervisor page: read in ring 3", user(user_read, BASE), 5, BASE);
    faults("supervisor page: write in ring 3", user(user_write, BASE), 7, BASE);
    faults("supervisor page: execute in ring 3", user(user_execute, BASE), 0x15, BASE);

    map(entry, BASE | PRESENT | USER);
    equal("read-only page: read in ring 3", user(user_read, BASE).vector, Fault::END);
    faults("read-only page: write in ring 3", user(user_write, BASE), 7, BASE);
    faults("read-only page: write in ring 0", guarded(write, BASE), 3, BASE);
    faults("read-only page: read-modify-write in ring 0", guarded(modify, BASE), 3, BASE);
    cpu::set_cr0(cpu::cr0() & !0x1_0000);
    equal("read-only page: write in ring 0 without CR0.WP", guarded(write, BASE + 64).vector, Fault::NONE);
    cpu::set_cr0(cpu::cr0() | 0x1_0000);

    map(entry, BASE | PRESENT | WRITE | USER | NO_EXECUTE);
    equal("no-execute page: read in ring 3", user(user_read, BASE).vector, Fault::END);
    faults("no-execute page: execute in ring 0", guarded(execute, BASE), 0x11, BASE);
    faults("no-execute page: execute in ring 3", user(user_execute, BASE), 0x15, BASE);

    map(entry, BASE | PRESENT | WRITE | USER);
    equal("plain page: execute in ring 3", user(user_execute, BASE + 128).vector, Fault::END);
    let flags = || {
        // SAFETY: the entry is in `TABLE`.
        unsafe { entry.read_volatile() & (ACCESSED | DIRTY) }
    };
    map(entry, BASE | PRESENT | WRITE | USER);
    equal("accessed and dirty before", flags(), 0);
    guarded(read, BASE);
    equal("accessed after a read", flags(), ACCESSED);
    guarded(write, BASE);
    equal("dirty after a write", flags(), ACCESSED | DIRTY);

    // A write across the end of the page, into an absent one.
    // SAFETY: the entry behind is in `TABLE` too.
    unsafe { entry.add(1).write_volatile(0) };
    cpu::invlpg(BASE + 4096);
    faults("write across into an absent page", user(user_write_wide, BASE + 4092), 6, BASE + 4096);
    // SAFETY: mapped above.
    equal("  nothing was written", u64::from(unsafe { memory.add(4095).read_volatile() }), 0xc3);

    // The same address shows another page after INVLPG.
    let other = BASE + 0x10_0000;
    // SAFETY: free memory.
    unsafe { (other as *mut u64).write_volatile(0x0123_4567_89ab_cdef) };
    map(entry, other | PRESENT | WRITE | USER);
    // SAFETY: mapped just now.
    equal(
        "another page after INVLPG",
        unsafe { (BASE as *const u64).read_volatile() },
        0x0123_4567_89ab_cdef,
    );
    // SAFETY: mapped just now.
    unsafe { (BASE as *mut u64).write_volatile(99) };
    // SAFETY: free memory.
    holds("one page at two addresses", unsafe { (other as *const u64).read_volatile() } == 99);
}
