//! Exceptions in ring 0 and ring 3: vectors, error codes, what is pushed.
#![no_std]
#![no_main]

use bare_guests::check::{equal, holds};
use bare_guests::fault::user_at;
use bare_guests::tables::{USER_CODE, USER_CODE32};
use bare_guests::{Fault, boot::Machine, guarded, user};
use core::arch::{asm, global_asm};

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
body!(read_control, "mov rax, cr0");
body!(float, "fninit", "fld1", "ud2");
body!(step, "nop", "nop", "ud2");

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
    ud2
.code64
"#
);

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
    let fault = user(breakpoint, 0);
    equal("breakpoint in ring 3: vector", fault.vector, 3);
    equal("breakpoint in ring 3: RAX", fault.rax, 7);
    let fault = user_at(step as *const () as u64, 0, 0x102, USER_CODE);
    equal("single step: vector", fault.vector, 1);
    holds(
        "single step: one instruction",
        fault.rip > step as *const () as u64 && fault.rip < step as *const () as u64 + 16,
    );

    let fault = user_at(thirty_two_bits as *const () as u64, 0, 2, USER_CODE32);
    equal("32-bit code in ring 3: vector", fault.vector, Fault::END);
    equal("32-bit code in ring 3: result", fault.rax, 0x8000_0000);
    equal("32-bit code in ring 3: flags O, S, A, not Z", fault.rflags & 0x8d0, 0x890);

    equal("x87 in ring 3", user(float, 0).vector, Fault::END);
}
