//! From the first instruction to the guest's main function.

use core::arch::global_asm;

use crate::{check, port, tables};

/// What the guest was told about its machine.
pub struct Machine {
    /// How many vCPUs there are.
    pub vcpus: u32,
    command_line: &'static [u8],
}

impl Machine {
    /// The number behind `key=` on the command line.
    pub fn number(&self, key: &str) -> Option<u64> {
        self.command_line.split(|byte| *byte == b' ').find_map(|word| {
            let digits = word.strip_prefix(key.as_bytes())?.strip_prefix(b"=")?;
            digits.iter().try_fold(0u64, |sum, digit| {
                Some(sum * 10 + u64::from(digit.checked_sub(b'0').filter(|d| *d < 10)?))
            })
        })
    }
}

/// Sets up descriptor tables, page tables and exception handling, and reads the command line.
pub fn begin(vcpus: u64, command_line: *const u8) -> Machine {
    tables::install();
    let mut length = 0;
    // SAFETY: the personality gives a NUL-terminated string, or none.
    let command_line = unsafe {
        while !command_line.is_null() && *command_line.add(length) != 0 {
            length += 1;
        }
        if length == 0 { &[] } else { core::slice::from_raw_parts(command_line, length) }
    };
    let mut machine = Machine { vcpus: u32::try_from(vcpus).unwrap_or(0), command_line };
    if let Some(vcpus) = machine.number("cpus") {
        machine.vcpus = u32::try_from(vcpus).unwrap_or(0);
    }
    machine
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    use core::fmt::Write;
    let _ = writeln!(port::Serial, "FAIL panic: {info}");
    check::exit(255)
}

global_asm!(
    r#"
.section .text.start, "ax"
.global _start
_start:
    cli
    cld
    mov rsp, offset boot_stack_top
    xor ebp, ebp
    call guest_main

.section .note.pvh, "a", @note
    .balign 4
    .long 4, 4, 18
    .asciz "Xen"
    .long pvh_start

.section .text
.code32
pvh_start:
    cli
    cld
    mov esp, offset boot_stack_top
    mov edi, offset PAGE_DIRECTORIES
    mov eax, 0x87
    mov ecx, 2048
2:  mov [edi], eax
    mov dword ptr [edi + 4], 0
    add eax, 0x200000
    add edi, 8
    loop 2b
    mov edi, offset PAGE_POINTERS
    mov eax, offset PAGE_DIRECTORIES + 7
    mov ecx, 4
3:  mov [edi], eax
    mov dword ptr [edi + 4], 0
    add eax, 0x1000
    add edi, 8
    loop 3b
    mov edi, offset PAGE_ROOT
    mov dword ptr [edi], offset PAGE_POINTERS + 7
    mov cr3, edi
    mov eax, cr4
    or eax, 0x20
    mov cr4, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, cr0
    or eax, 0x80000001
    mov cr0, eax
    lgdt [pvh_gdt_pointer]
    .byte 0xea
    .long pvh_long
    .word 8
.code64
pvh_long:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor edi, edi
    mov ebx, ebx
    mov rsi, [rbx + 24]
    jmp _start
.section .rodata
    .balign 8
pvh_gdt:
    .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff
pvh_gdt_pointer:
    .word 23
    .long pvh_gdt
.section .bss
    .balign 4096
    .skip 0x8000
boot_stack_top:
"#
);
