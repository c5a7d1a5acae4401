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

/// What the flat personality leaves at the address in RBX begins with this.
const FLAT: u64 = u64::from_le_bytes(*b"TENONBI1");
/// What PVH loaders leave at the address in EBX begins with this (xen/include/public/arch-x86/hvm/start_info.h).
const PVH: u32 = 0x336e_c578;

/// Reads what the loader left, and sets up descriptor tables, page tables and exception handling.
pub fn begin(info: *const u64) -> Machine {
    let mut machine = Machine { vcpus: 1, command_line: &[] };
    // SAFETY: the loader left one of the two there, or nothing.
    unsafe {
        if info.read() == FLAT {
            machine.vcpus = info.add(3).cast::<u32>().read();
        } else if info.cast::<u32>().read() == PVH {
            machine.command_line = text(info.add(3).read() as *const u8);
        }
    }
    if let Some(vcpus) = machine.number("cpus") {
        machine.vcpus = u32::try_from(vcpus).unwrap_or(1);
    }
    tables::install();
    machine
}

/// # Safety
/// The address is null or that of a NUL-terminated string that stays.
unsafe fn text(address: *const u8) -> &'static [u8] {
    let mut length = 0;
    // SAFETY: as the caller says.
    unsafe {
        while !address.is_null() && *address.add(length) != 0 {
            length += 1;
        }
        if length == 0 { &[] } else { core::slice::from_raw_parts(address, length) }
    }
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
    mov rdi, rbx
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
    mov ebx, ebx
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
