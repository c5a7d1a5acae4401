//! Code that changes: by itself, through another mapping, by another vCPU.
#![no_std]
#![no_main]

use bare_guests::check::equal;
use bare_guests::tables::{Page, Shared, split};
use bare_guests::{Fault, apic, boot::Machine, cpu, smp, user};
use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU32, Ordering::SeqCst};

bare_guests::guest!(main);

const BASE: u64 = 0x40_0000;
const ALIAS: u64 = 0x48_0000;
static TABLE: Shared<Page> = Shared::new([0; 512]);
static SEEN: AtomicU32 = AtomicU32::new(0);
static ROUNDS: u32 = 50;

unsafe extern "C" {
    fn change_ahead(argument: u64);
    fn change_far(argument: u64);
}
// Each changes the number that a later instruction of its own loads, and runs on into it.
global_asm!(
    r#"
.section .text
.balign 64
change_ahead:
    mov dword ptr [rip + 3f - 4], 0x2222
    mov eax, 0x1111
3:  ud2
.balign 64
change_far:
    mov ecx, 10
    xor edx, edx
4:  mov eax, 0
5:  add edx, eax
    inc dword ptr [rip + 5b - 4]
    loop 4b
    mov eax, edx
    ud2
"#
);

/// Writes `mov eax, value; ret`.
fn put(address: u64, value: u32) {
    let bytes = value.to_le_bytes();
    let code = [0xb8, bytes[0], bytes[1], bytes[2], bytes[3], 0xc3];
    for (n, byte) in code.iter().enumerate() {
        // SAFETY: free memory.
        unsafe { (address as *mut u8).add(n).write_volatile(*byte) };
    }
}

fn call(address: u64) -> u32 {
    let value;
    // SAFETY: `put` wrote a function there.
    unsafe { asm!("call {}", in(reg) address, out("eax") value, clobber_abi("C")) };
    value
}

fn watch(_: u32) {
    loop {
        SEEN.store(call(BASE + 3), SeqCst);
    }
}

fn main(machine: &Machine) {
    apic::enable();
    for round in 0..3 {
        put(BASE, 100 + round);
        equal("code written and called", u64::from(call(BASE)), u64::from(100 + round));
    }
    equal("an instruction changes the next one", user_result(change_ahead), 0x2222);
    equal("a loop changes itself", user_result(change_far), (0..10).sum());

    // The same code through another address.
    let entry = split(ALIAS, &TABLE);
    // SAFETY: the entry is in `TABLE`.
    unsafe { entry.write_volatile(BASE | 7) };
    cpu::invlpg(ALIAS);
    for round in 0..3 {
        put(ALIAS, 200 + round);
        equal("code changed through another address", u64::from(call(BASE)), u64::from(200 + round));
    }

    if machine.vcpus > 1 {
        // The number lies aligned, so that it changes at once.
        put(BASE + 3, 0);
        smp::start(2, watch);
        let mut agreed = 0;
        for round in 1..=ROUNDS {
            // SAFETY: free memory; the other vCPU sees the old or the new number.
            unsafe { ((BASE + 4) as *mut u32).write_volatile(round) };
            while SEEN.load(SeqCst) != round {
                core::hint::spin_loop();
            }
            agreed += 1;
        }
        equal("code changed by another vCPU", agreed, u64::from(ROUNDS));
    }
}

fn user_result(function: unsafe extern "C" fn(u64)) -> u64 {
    // SAFETY: the two functions touch nothing but their own code and end by UD2.
    let function: extern "C" fn(u64) = unsafe { core::mem::transmute(function) };
    let fault = user(function, 0);
    if fault.vector == Fault::END { fault.rax } else { u64::MAX }
}
