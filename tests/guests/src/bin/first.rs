//! Ends with status 0 at its first instructions: for `cargo xtask bench start`.
#![no_std]
#![no_main]

// The same bytes do in long mode and, for PVH loaders, in protected mode.
core::arch::global_asm!(
    ".section .text.start, \"ax\"",
    ".global _start",
    "_start:",
    "mov edx, 0xf4",
    "xor eax, eax",
    "out dx, al",
    "2: hlt",
    "jmp 2b",
    ".section .note.pvh, \"a\", @note",
    ".balign 4",
    ".long 4, 4, 18",
    ".asciz \"Xen\"",
    ".long _start",
);

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {
        core::hint::spin_loop();
    }
}
