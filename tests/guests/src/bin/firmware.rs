//! PC firmware in small: starts at the reset vector in ROM, and tries what firmware needs of its board: ROM, the flash chip right below it, fw_cfg, the 440FX's functions and the PM timer.
//!
//! The test puts the program's image at the beginning of a ROM and [`TOP`] at its end; the first byte of the flash says how the program ends.
#![no_std]
#![no_main]

use core::arch::global_asm;

use bare_guests::boot::Machine;
use bare_guests::check::{equal, holds};
use bare_guests::port::{in8, in16, in32, out8, out16, out32};

bare_guests::guest!(main);

unsafe extern "C" {
    /// The last 512 bytes of the ROM, as they are in the program's image.
    #[link_name = "top_of_rom"]
    static TOP: [u8; 512];
}

/// Where they are.
const TOP_ADDRESS: usize = 0xffff_fe00;
/// What the test has put there: where the ROM begins.
const ROM_START: *const u32 = (TOP_ADDRESS + 0x10) as *const u32;
/// Behind what it has put there.
const SAME: usize = 0x20;
const BLOCK: usize = 4096;
const FLASH: usize = 2 * BLOCK;

const FW_CFG: u16 = 0x510;
const PM: u16 = 0xb000;

fn main(machine: &Machine) {
    // SAFETY: the ROM is mapped one to one; the image has the same bytes.
    let rom = unsafe { core::slice::from_raw_parts(TOP_ADDRESS as *const u8, TOP.len()) };
    // SAFETY: only read.
    let image = unsafe { &TOP };
    let differ = (SAME..image.len()).filter(|n| rom[*n] != image[*n]).count();
    equal("ROM: bytes that differ from the image", differ as u64, 0);
    rom_ignores_writes();
    // SAFETY: in ROM.
    let flash = unsafe { ROM_START.read_volatile() } as usize - FLASH;
    let end = flash_chip(flash as *mut u8);
    fw_cfg(machine);
    board();
    if end == b'E' {
        return;
    }
    match end {
        b'R' => out8(0xcf9, 6),
        b'K' => out8(0x64, 0xfe),
        // Sleep enable with the PIIX4's sleep type 0, soft off.
        b'O' => out16(PM + 4, 1 << 13),
        other => equal("the way to end", other.into(), 0),
    }
    loop {
        core::hint::spin_loop();
    }
}

fn rom_ignores_writes() {
    let at = (TOP_ADDRESS + SAME) as *mut u64;
    // SAFETY: what writes to ROM do is what is tried; it holds nothing that is used later but a descriptor table that they do not change.
    unsafe {
        let before = at.add(1).read_volatile();
        at.add(1).write_volatile(!before);
        at.add(1).cast::<u8>().write_volatile(0x5a);
        at.add(1).cast::<u16>().add(1).write_volatile(0x5a5a);
        equal("ROM: content after writes", at.add(1).read_volatile(), before);
    }
}

/// Tries the chip's commands; returns the byte that says how to end.
fn flash_chip(base: *mut u8) -> u8 {
    let read = |at: usize| {
        // SAFETY: the chip's range is mapped one to one.
        unsafe { base.add(at).read_volatile() }
    };
    let write = |at: usize, byte: u8| {
        // SAFETY: as for reading.
        unsafe { base.add(at).write_volatile(byte) };
    };
    let end = read(0);
    equal("flash: content", read(1).into(), 0xf0);
    write(1, 0x50);
    equal("flash: content while the status is cleared", read(1).into(), 0xf0);
    write(1, 0x70);
    equal("flash: status before any command", read(1).into(), 0);
    write(1, 0x40);
    write(1, 0x3c);
    equal("flash: status after programming", read(7).into(), 0x80);
    write(0, 0xff);
    equal("flash: programming clears bits", read(1).into(), 0x30);
    write(BLOCK + 5, 0x20);
    write(BLOCK + 5, 0xd0);
    write(0, 0xff);
    // SAFETY: in the chip's range.
    let across = unsafe { base.add(BLOCK - 4).cast::<u64>().read_unaligned() };
    equal("flash: erasing sets the bits of one block", across, 0xffff_ffff_f0f0_f0f0);
    // SAFETY: as above. The chip answers accesses of one byte alone.
    unsafe { base.cast::<u32>().write_volatile(0x7070_7070) };
    equal("flash: a wide write is no command", read(1).into(), 0x30);
    write(BLOCK + 9, 0x10);
    write(BLOCK + 9, b'!');
    write(0, 0xff);
    equal("flash: programming what was erased", read(BLOCK + 9).into(), b'!'.into());
    end
}

struct File {
    size: u32,
    select: u16,
}

fn fw_cfg(machine: &Machine) {
    let byte = || in8(FW_CFG + 1);
    let big = |bytes: u32| (0..bytes).fold(0u32, |value, _| value << 8 | u32::from(byte()));
    out16(FW_CFG, 0);
    equal("fw_cfg: signature", big(4).into(), u32::from_be_bytes(*b"QEMU").into());
    out16(FW_CFG, 5);
    equal("fw_cfg: CPUs", (u16::from(byte()) | u16::from(byte()) << 8).into(), machine.vcpus.into());
    out16(FW_CFG, 0x19);
    let (count, mut map, mut tables) = (big(4), None, 0);
    for _ in 0..count {
        let (size, select) = (big(4), big(4) >> 16);
        let mut name = [0; 56];
        name.iter_mut().for_each(|to| *to = byte());
        let file = File { size, select: u16::try_from(select).unwrap_or(0) };
        match name.split(|byte| *byte == 0).next() {
            Some(b"etc/e820") => map = Some(file),
            Some(b"etc/acpi/rsdp" | b"etc/acpi/tables" | b"etc/table-loader") if size > 0 => tables += 1,
            _ => {}
        }
    }
    equal("fw_cfg: files of ACPI tables", tables, 3);
    holds("fw_cfg: a map of memory", map.is_some());
    let Some(map) = map else { return };
    out16(FW_CFG, map.select);
    let little = |bytes: u32| (0..bytes).fold(0u64, |value, n| value | u64::from(byte()) << (8 * n));
    let mut usable = 0;
    for _ in 0..map.size / 20 {
        let (_, size, kind) = (little(8), little(8), little(4));
        usable += if kind == 1 { size } else { 0 };
    }
    equal("fw_cfg: usable memory", usable, 128 << 20);
}

fn board() {
    let config = |slot: u32, function: u32, at: u32| {
        out32(0xcf8, 1 << 31 | slot << 11 | function << 8 | at);
        in32(0xcfc)
    };
    equal("PCI: host bridge", config(0, 0, 0).into(), 0x1237_8086);
    equal("PCI: ISA bridge", config(1, 0, 0).into(), 0x7000_8086);
    equal("PCI: power management", config(1, 3, 0).into(), 0x7113_8086);
    equal("PCI: base of the power management", config(1, 3, 0x40).into(), u64::from(PM) | 1);
    let (start, mut polls) = (in32(PM + 8), 0u64);
    while in32(PM + 8) == start && polls < 1 << 20 {
        polls += 1;
    }
    holds("PM timer: runs", polls < 1 << 20);
    equal("PM timer: 24 bits", (in32(PM + 8) >> 24).into(), 0);
    out16(PM + 4, 1);
    equal("PM control: SCI enable stays", in16(PM + 4).into(), 1);
}

// Offsets count from the address of the ROM's last 512 bytes. The three words behind the name are the test's: where the image lies, how many doublewords it
// has, and its entry.
global_asm!(
    r#"
.section .rodata
    .balign 16
.global top_of_rom
top_of_rom:
    .ascii "TENON-TOP-OF-ROM"
    .long 0, 0, 0, 0
    .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff, 0x00af9b000000ffff
    .word 31
    .long 0xfffffe20
.code16
2:  cli
    // lgdt cs:[0xfe40], with all 32 bits of the base
    .byte 0x2e, 0x66, 0x0f, 0x01, 0x16, 0x40, 0xfe
    mov eax, cr0
    or al, 1
    mov cr0, eax
    // jmp far 8:3f
    .byte 0x66, 0xea
    .long 3f - top_of_rom + 0xfffffe00
    .word 8
.code32
3:  mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    cld
    mov esi, [0xfffffe10]
    mov ecx, [0xfffffe14]
    mov edi, 0x100000
    rep movsd
    // The first 4 GiB one to one, in large pages. Memory is zero.
    mov edi, 0x3000
    mov eax, 0x83
    mov ecx, 2048
4:  mov [edi], eax
    add eax, 0x200000
    add edi, 8
    loop 4b
    mov dword ptr [0x1000], 0x2003
    mov dword ptr [0x2000], 0x3003
    mov dword ptr [0x2008], 0x4003
    mov dword ptr [0x2010], 0x5003
    mov dword ptr [0x2018], 0x6003
    mov eax, 0x1000
    mov cr3, eax
    mov eax, 0x620
    mov cr4, eax
    mov ecx, 0xc0000080
    mov eax, 0x100
    xor edx, edx
    wrmsr
    mov eax, 0x80000011
    mov cr0, eax
    // jmp far 0x18:5f
    .byte 0xea
    .long 5f - top_of_rom + 0xfffffe00
    .word 0x18
.code64
5:  mov ecx, 0xfffffe18
    mov eax, [rcx]
    // No boot information: zeros.
    mov ebx, 0x8000
    jmp rax
.code16
    .org top_of_rom + 0x1f0, 0xcc
    jmp 2b
    .org top_of_rom + 0x200, 0xcc
.code64
"#
);
