//! Starts the other vCPUs: INIT and SIPI into real mode, then through protected mode to long mode.

use core::arch::global_asm;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};

use crate::tables::Shared;
use crate::{apic, tables};

/// The page where the others begin; its number is the SIPI vector.
const TRAMPOLINE: u64 = 0x8000;

static ARRIVED: AtomicU32 = AtomicU32::new(0);
static WORK: AtomicU64 = AtomicU64::new(0);
#[unsafe(no_mangle)]
static AP_TICKET: AtomicU32 = AtomicU32::new(0);
#[unsafe(no_mangle)]
static AP_STACKS: Shared<[[u8; 0x4000]; 64]> = Shared::new([[0; 0x4000]; 64]);

unsafe extern "C" {
    static trampoline_begin: [u8; 0];
    static trampoline_end: [u8; 0];
}

/// Starts every other vCPU, lets each call `work` with a number of its own from 1 up, and waits until all have begun.
/// `work` does not return into anything useful: the vCPU halts after it.
pub fn start(vcpus: u32, work: fn(u32)) {
    WORK.store(work as *const () as u64, SeqCst);
    let begin = &raw const trampoline_begin as *const u8;
    let length = &raw const trampoline_end as usize - begin as usize;
    // SAFETY: low memory is free, and no vCPU runs there yet.
    unsafe { core::ptr::copy_nonoverlapping(begin, TRAMPOLINE as *mut u8, length) };
    for id in 1..vcpus {
        let id = id as u8;
        apic::send(id, 0x4500);
        apic::send(id, 0x4600 | (TRAMPOLINE >> 12) as u32);
        // A vCPU that has begun ignores the second one.
        apic::send(id, 0x4600 | (TRAMPOLINE >> 12) as u32);
    }
    while ARRIVED.load(SeqCst) + 1 < vcpus {
        core::hint::spin_loop();
    }
}

#[unsafe(no_mangle)]
extern "C" fn ap_main(ticket: u32) -> ! {
    tables::load();
    apic::enable();
    ARRIVED.fetch_add(1, SeqCst);
    // SAFETY: `start` stored a function.
    let work: fn(u32) = unsafe { core::mem::transmute(WORK.load(SeqCst)) };
    work(ticket + 1);
    loop {
        // SAFETY: nothing is left to do.
        unsafe { core::arch::asm!("cli", "hlt") };
    }
}

global_asm!(
    r#"
.section .text
.global trampoline_begin
.global trampoline_end
.code16
trampoline_begin:
    cli
    cld
    mov ax, cs
    mov ds, ax
    // LGDT [offset of the pointer in this page]
    .byte 0x0f, 0x01, 0x16
    .word trampoline_gdt_pointer - trampoline_begin
    mov eax, cr0
    or eax, 1
    mov cr0, eax
    .byte 0x66, 0xea
    .long 0x8000 + trampoline_32 - trampoline_begin
    .word 0x18
.code32
trampoline_32:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov eax, cr4
    or eax, 0x20
    mov cr4, eax
    mov eax, offset PAGE_ROOT
    mov cr3, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, cr0
    or eax, 0x80000000
    mov cr0, eax
    .byte 0xea
    .long trampoline_64
    .word 8
    .balign 8
trampoline_gdt:
    .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cf9b000000ffff
trampoline_gdt_pointer:
    .word 31
    .long 0x8000 + trampoline_gdt - trampoline_begin
trampoline_end:
.code64
trampoline_64:
    mov eax, 1
    lock xadd [AP_TICKET], eax
    mov edi, eax
    inc eax
    shl eax, 14
    mov rsp, offset AP_STACKS
    add rsp, rax
    xor ebp, ebp
    call ap_main
"#
);
