//! What KVM hosts that emulate ring 0 do not run as hardware does: INT n, system calls, IOPL, CR0.TS, decimal arithmetic.
#![no_std]
#![no_main]

use bare_guests::check::equal;
use bare_guests::fault::{on_interrupt, syscall_target, user_at};
use bare_guests::tables::{USER_CODE, USER_CODE32};
use bare_guests::{Fault, boot::Machine, cpu, user};
use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU32, Ordering::SeqCst};

bare_guests::guest!(main);

macro_rules! body {
    ($name:ident, $($code:literal),+) => {
        extern "C" fn $name(argument: u64) {
            // SAFETY: run under `user`, which takes any fault.
            unsafe { asm!($($code),+, inout("rdi") argument => _, out("rax") _, out("rcx") _, out("rdx") _, out("r11") _) }
        }
    };
}

body!(gate, "mov eax, edi", "int 0x80");
body!(closed_gate, "int 0x81");
body!(twice, "int 0x80", "int 0x80", "ud2");
body!(system_call, "mov eax, 1", "syscall", "add eax, 100", "syscall");
body!(float, "fninit", "fld1", "ud2");
body!(clear_interrupts, "cli", "ud2");

unsafe extern "C" {
    fn decimal();
}
global_asm!(
    r#"
.section .text
.code32
decimal:
    mov eax, 0x0009
    add al, 6
    aaa
    shl eax, 16
    mov al, 0x19
    add al, 0x28
    daa
    ud2
.code64
"#
);

static TAKEN: AtomicU32 = AtomicU32::new(0);

fn main(_: &Machine) {
    let fault = user(gate, 1234);
    equal("interrupt gate from ring 3: vector", fault.vector, 0x80);
    equal("interrupt gate from ring 3: RAX", fault.rax, 1234);
    let fault = user(closed_gate, 0);
    equal("closed gate from ring 3: vector", fault.vector, 13);
    equal("closed gate from ring 3: error", fault.error, 0x81 * 8 + 2);
    on_interrupt(0x80, || {
        TAKEN.fetch_add(1, SeqCst);
    });
    equal("a handled interrupt returns to ring 3", user(twice, 0).vector, Fault::END);
    equal("a handled interrupt was handled", u64::from(TAKEN.load(SeqCst)), 2);

    let fault = user_at(clear_interrupts as *const () as u64, 0, 0x3002, USER_CODE);
    equal("CLI in ring 3 with IOPL 3", fault.vector, Fault::END);

    // STAR, LSTAR, SFMASK, EFER.SCE
    cpu::wrmsr(0xc000_0081, 0x0023_0008_0000_0000);
    cpu::wrmsr(0xc000_0082, syscall_target());
    cpu::wrmsr(0xc000_0084, 0x300);
    equal("SYSCALL while off", user(system_call, 0).vector, 6);
    cpu::wrmsr(0xc000_0080, cpu::rdmsr(0xc000_0080) | 1);
    let fault = user(system_call, 0);
    equal("SYSCALL and SYSRET: how it ends", fault.vector, Fault::SYSCALL);
    equal("SYSCALL and SYSRET: RAX", fault.rax, 142);
    equal("SYSCALL: flags kept in R11", fault.rflags & 2, 2);

    let fault = user_at(decimal as *const () as u64, 0, 2, USER_CODE32);
    equal("decimal arithmetic: how it ends", fault.vector, Fault::END);
    equal("decimal arithmetic: AAA and DAA", fault.rax, 0x0105_0047);

    cpu::set_cr0(cpu::cr0() | 8);
    equal("x87 while CR0.TS is set", user(float, 0).vector, 7);
    cpu::set_cr0(cpu::cr0() & !8);
    equal("x87 while CR0.TS is clear", user(float, 0).vector, Fault::END);
}
