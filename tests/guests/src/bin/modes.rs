//! Down from long mode through compatibility and protected mode to real mode, and up again.
#![no_std]
#![no_main]

use bare_guests::boot::Machine;
use bare_guests::check::equal;
use bare_guests::tables;
use core::arch::global_asm;

bare_guests::guest!(main);

unsafe extern "C" {
    fn descend() -> u64;
    static low_begin: [u8; 0];
    static low_end: [u8; 0];
}

/// Where the 16-bit code runs, and where it leaves what it found: 16-bit words.
const LOW: u64 = 0x9000;
const FOUND: *const u16 = 0x7f00 as *const u16;

fn main(_: &Machine) {
    let begin = &raw const low_begin as *const u8;
    let length = &raw const low_end as usize - begin as usize;
    // SAFETY: low memory is free.
    unsafe { core::ptr::copy_nonoverlapping(begin, LOW as *mut u8, length) };
    // SAFETY: the assembly comes back in the state in which it was called, but for the interrupt table.
    let wide = unsafe { descend() };
    tables::load();
    // SAFETY: free memory that the 16-bit code filled.
    let found = |n: usize| u64::from(unsafe { FOUND.add(n).read_volatile() });
    equal("compatibility mode: 32-bit arithmetic wraps", wide & 0xffff_ffff, 1);
    equal("protected mode: came back", wide >> 32, 0x600d);
    equal("real mode: segment arithmetic", found(0), 0x5aa5);
    equal("real mode: software interrupt", found(1), 0x2121);
    equal("real mode: interrupt returns with flags", found(2), 1);
    equal("real mode: divide by zero goes to vector 0", found(3), 0x0d0d);
    equal("real mode: string copy", found(4), 0xbeef);
    equal("real mode: stack", found(5), 0x7777);
    equal("real mode: 32-bit registers", found(6), 0x8001);
    equal("real mode: rotate through carry", found(7), 0x0003);
    equal("real mode: far call", found(8), 0xfa12);
}

global_asm!(
    r#"
.section .bss
    .balign 8
descend_stack: .skip 8
.section .text
.global descend
descend:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    mov [descend_stack], rsp
    push 0x18
    mov rax, offset descend_32
    push rax
    retfq
.code32
descend_32:
    mov ebp, 0xffffffff
    add ebp, 2
    mov ax, 0x10
    mov ss, ax
    mov ds, ax
    mov es, ax
    mov eax, cr0
    and eax, 0x7fffffff
    mov cr0, eax
    mov ecx, 0xc0000080
    rdmsr
    and eax, 0xfffffeff
    wrmsr
    .byte 0xea
    .long 0x9000
    .word 0x38
ascend_32:
    mov ax, 0x10
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, offset PAGE_ROOT
    mov cr3, eax
    mov eax, cr0
    or eax, 0x80000000
    mov cr0, eax
    .byte 0xea
    .long ascend_64
    .word 8
.code64
ascend_64:
    mov rsp, [descend_stack]
    mov eax, 0x600d
    shl rax, 32
    mov ebp, ebp
    or rax, rbp
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret

.code16
.global low_begin
.global low_end
low_begin:
    mov ax, 0x40
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov eax, cr0
    and eax, 0xfffffffe
    mov cr0, eax
    .byte 0xea
    .word low_real - low_begin
    .word 0x900
low_real:
    xor ax, ax
    mov ds, ax
    mov ss, ax
    mov sp, 0x7000
    mov ax, cs
    mov es, ax
    // LIDT ES:[offset of the pointer in this page]
    .byte 0x26, 0x0f, 0x01, 0x1e
    .word low_idt - low_begin

    mov ax, 0x1230
    mov es, ax
    mov word ptr es:[0x40], 0x5aa5
    mov ax, 0x1234
    mov es, ax
    mov ax, es:[0]
    mov [0x7f00], ax

    // MOV word [0x84], offset of low_interrupt in this page
    .byte 0xc7, 0x06
    .word 0x84, low_interrupt - low_begin
    mov word ptr [0x86], 0x900
    xor bx, bx
    stc
    int 0x21
    mov [0x7f02], bx
    mov ax, 0
    adc ax, 0
    mov [0x7f04], ax

    // MOV word [0], offset of low_divide in this page
    .byte 0xc7, 0x06
    .word 0, low_divide - low_begin
    mov word ptr [2], 0x900
    xor bx, bx
    xor cx, cx
    mov ax, 1
    xor dx, dx
    div cx
    mov [0x7f06], bx

    xor ax, ax
    mov es, ax
    mov word ptr [0x7e10], 0xbeef
    mov si, 0x7e10
    mov di, 0x7f08
    cld
    mov cx, 2
    rep movsb

    mov ax, 0x7777
    push ax
    pop word ptr [0x7f0a]

    mov eax, 0x40000000
    add eax, 0x40010000
    shr eax, 16
    mov [0x7f0c], ax

    mov ax, 9
    add al, 0xf8
    rcl ax, 1
    mov [0x7f0e], ax

    xor bx, bx
    .byte 0x9a
    .word low_far - low_begin
    .word 0x900
    mov [0x7f10], bx

    mov eax, cr0
    or al, 1
    mov cr0, eax
    .byte 0x66, 0xea
    .long ascend_32
    .word 0x18
low_interrupt:
    mov bx, 0x2121
    clc
    iret
low_divide:
    mov bx, 0x0d0d
    push bp
    mov bp, sp
    add word ptr [bp + 2], 2
    pop bp
    iret
low_far:
    mov bx, 0xfa12
    // RETF; the assembler would make it a 32-bit one
    .byte 0xcb
    .balign 4
low_idt:
    .word 0x3ff
    .long 0
low_end:
.code64
"#
);
