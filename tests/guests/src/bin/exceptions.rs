//! Exceptions in ring 0 and ring 3: vectors, error codes, what is pushed; system calls.
#![no_std]
#![no_main]

use bare_guests::check::{equal, holds};
use bare_guests::fault::{on_interrupt, syscall_target, user_at};
use bare_guests::tables::{USER_CODE, USER_CODE32};
use bare_guests::{Fault, boot::Machine, cpu, guarded, user};
use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU32, Ordering::SeqCst};

bare_guests::guest!(main);

macro_rules! body {
    ($name:ident, $($code:literal),+) => {
        extern "C" fn $name(argument: u64) {
            // SAFETY: run under `guarded` or `user`, which take any fault.
            unsafe { asm!($($code),+, inout("rdi") argument => _, out("rax") _, out("rcx") _, out("rdx") _, out("r11") _) }
        }
    };
}

body!(divide, "xor edx, edx", "mov eax, 5", "div edi");
body!(divide_overflow, "mov edx, 5", "xor eax, eax", "mov ecx, 5", "div ecx");
body!(undefined, "ud2");
body!(load_ds, "mov ds, edi");
body!(read_memory, "mov rax, [rdi]");
body!(read_stack, "xchg rsp, rdi", "pop rax");
body!(read_msr, "mov ecx, edi", "rdmsr");
body!(halt, "hlt");
body!(clear_interrupts, "cli");
body!(read_port, "mov edx, 0x3f8", "in al, dx");
body!(breakpoint, "mov eax, 7", "int3");
body!(gate, "mov eax, edi", "int 0x80");
body!(closed_gate, "int 0x81");
body!(system_call, "mov eax, 1", "syscall", "add eax, 100", "syscall");
body!(read_control, "mov rax, cr0");
body!(float, "fninit", "fld1", "int 0x80");
body!(step, "nop", "nop", "int 0x80");

unsafe extern "C" {
    fn thirty_two_bits();
}
global_asm!(
    r#"
.section .text
.code32
thirty_two_bits:
    mov eax, 0x7fffffff
    inc eax
    push eax
    pop ecx
    int 0x80
.code64
"#
);

static TICKS: AtomicU32 = AtomicU32::new(0);

fn main(_: &Machine) {
    let fault = guarded(divide, 0);
    equal("divide by zero in ring 0: vector", fault.vector, 0);
    equal("divide by zero in ring 0: code segment", fault.cs, 8);
    equal("divide works in ring 0", guarded(divide, 2).vector, Fault::NONE);
    equal("divide by zero in ring 3", user(divide, 0).vector, 0);
    equal("divide overflow in ring 3", user(divide_overflow, 0).vector, 0);
    equal("undefined instruction in ring 0", guarded(undefined, 0).vector, 6);
    let fault = user(undefined, 0);
    equal("undefined instruction in ring 3", fault.vector, 6);
    equal("undefined instruction in ring 3: code segment", fault.cs, 0x33);

    let fault = guarded(load_ds, 0x1000);
    equal("selector past the table: vector", fault.vector, 13);
    equal("selector past the table: error", fault.error, 0x1000);
    let fault = guarded(load_ds, 0x08 | 4);
    equal("selector in the absent local table: vector", fault.vector, 13);
    equal("selector in the absent local table: error", fault.error, 0x0c);
    let fault = guarded(read_memory, 0x8000_0000_0000_0000);
    equal("non-canonical address: vector", fault.vector, 13);
    equal("non-canonical address: error", fault.error, 0);
    equal("non-canonical stack", user(read_stack, 0x8000_0000_0000_0000).vector, 12);
    equal("unknown model-specific register", guarded(read_msr, 0x1234_5678).vector, 13);

    equal("HLT in ring 3", user(halt, 0).vector, 13);
    equal("CLI in ring 3", user(clear_interrupts, 0).vector, 13);
    equal("port in ring 3", user(read_port, 0).vector, 13);
    equal("control register in ring 3", user(read_control, 0).vector, 13);
    equal("model-specific register in ring 3", user(read_msr, 0x10).vector, 13);
    let fault = user_at(clear_interrupts as *const () as u64, 0, 0x3002, USER_CODE);
    holds("CLI in ring 3 with IOPL 3", fault.vector != 13);

    let fault = user(breakpoint, 0);
    equal("breakpoint in ring 3: vector", fault.vector, 3);
    equal("breakpoint in ring 3: RAX", fault.rax, 7);
    let fault = user(gate, 1234);
    equal("interrupt gate from ring 3: vector", fault.vector, 0x80);
    equal("interrupt gate from ring 3: RAX", fault.rax, 1234);
    let fault = user(closed_gate, 0);
    equal("closed gate from ring 3: vector", fault.vector, 13);
    equal("closed gate from ring 3: error", fault.error, 0x81 * 8 + 2);

    let fault = user_at(step as *const () as u64, 0, 0x102, USER_CODE);
    equal("single step: vector", fault.vector, 1);
    holds(
        "single step: one instruction",
        fault.rip > step as *const () as u64 && fault.rip < step as *const () as u64 + 16,
    );

    let fault = user_at(thirty_two_bits as *const () as u64, 0, 2, USER_CODE32);
    equal("32-bit code in ring 3: vector", fault.vector, 0x80);
    equal("32-bit code in ring 3: result", fault.rax, 0x8000_0000);
    equal("32-bit code in ring 3: flags O, S, A, not Z", fault.rflags & 0x8d0, 0x890);

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

    cpu::set_cr0(cpu::cr0() | 8);
    equal("x87 while CR0.TS is set", user(float, 0).vector, 7);
    cpu::set_cr0(cpu::cr0() & !8);
    equal("x87 while CR0.TS is clear", user(float, 0).vector, 0x80);

    on_interrupt(0x80, || {
        TICKS.fetch_add(1, SeqCst);
    });
    equal("a handled interrupt returns to ring 3", user(twice, 0).vector, 6);
    equal("a handled interrupt was handled", u64::from(TICKS.load(SeqCst)), 2);
}
body!(twice, "int 0x80", "int 0x80", "ud2");
