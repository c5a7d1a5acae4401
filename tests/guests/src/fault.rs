//! Exceptions, interrupts and ring 3.

use core::arch::global_asm;
use core::sync::atomic::{AtomicU64, Ordering::SeqCst};

use crate::tables::{Shared, USER_CODE, USER_DATA};

/// What the CPU said when it stopped a function.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Fault {
    /// The vector; [`Fault::NONE`] if the function returned, [`Fault::SYSCALL`] if it made a system call.
    pub vector: u64,
    /// The error code; zero for vectors without one.
    pub error: u64,
    /// The instruction pointer that was pushed.
    pub rip: u64,
    /// The code segment that was pushed.
    pub cs: u64,
    /// The flags that were pushed.
    pub rflags: u64,
    /// The stack pointer that was pushed.
    pub rsp: u64,
    /// RAX at the time.
    pub rax: u64,
    /// CR2 at the time.
    pub cr2: u64,
}

impl Fault {
    /// No fault: the function returned.
    pub const NONE: u64 = 0x200;
    /// The SYSCALL instruction.
    pub const SYSCALL: u64 = 0x100;
    /// How a ring-3 function ends that comes to its end: by UD2. Some KVM hosts do not run INT n in ring 3.
    pub const END: u64 = 6;
}

/// What the vectors push.
#[repr(C)]
struct Frame {
    general: [u64; 15],
    vector: u64,
    error: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

/// The stack pointer to return to when the guarded function faults; 0 when none runs. Only the first vCPU runs guarded functions.
#[unsafe(no_mangle)]
static RECOVERY: AtomicU64 = AtomicU64::new(0);
static LAST: Shared<Fault> =
    Shared::new(Fault { vector: 0, error: 0, rip: 0, cs: 0, rflags: 0, rsp: 0, rax: 0, cr2: 0 });
static HANDLERS: [AtomicU64; 256] = [const { AtomicU64::new(0) }; 256];
static USER_STACK: Shared<[u8; 0x4000]> = Shared::new([0; 0x4000]);

unsafe extern "C" {
    fn call_guarded(function: u64, argument: u64, recovery: *const AtomicU64) -> u64;
    fn call_user(
        function: u64,
        stack: u64,
        recovery: *const AtomicU64,
        argument: u64,
        rflags: u64,
        cs: u64,
    ) -> u64;
    fn syscall_entry();
}

/// Where SYSCALL goes: put this into the LSTAR register. A call with RAX 1 returns 42; any other ends the ring-3 function.
pub fn syscall_target() -> u64 {
    syscall_entry as *const () as u64
}

/// Calls a function in ring 0 and returns how it ended.
pub fn guarded(function: extern "C" fn(u64), argument: u64) -> Fault {
    // SAFETY: the assembly restores what the calling convention wants restored, however the function ends.
    let faulted = unsafe { call_guarded(function as *const () as u64, argument, &RECOVERY) };
    outcome(faulted)
}

/// Calls a function in ring 3 and returns how it ended: it may not return, and ends by UD2 ([`Fault::END`]), by another fault, or by SYSCALL.
pub fn user(function: extern "C" fn(u64), argument: u64) -> Fault {
    user_at(function as *const () as u64, argument, 0x2, USER_CODE)
}

/// As [`user`], at an address, with these flags and this code segment.
pub fn user_at(function: u64, argument: u64, rflags: u64, cs: u16) -> Fault {
    let stack = USER_STACK.at() as u64 + 0x4000 - 8;
    // SAFETY: as for `guarded`.
    let faulted = unsafe { call_user(function, stack, &RECOVERY, argument, rflags, u64::from(cs)) };
    outcome(faulted)
}

fn outcome(faulted: u64) -> Fault {
    if faulted == 0 {
        return Fault { vector: Fault::NONE, ..Fault::default() };
    }
    // SAFETY: the trap that wrote it is over.
    unsafe { *LAST.at() }
}

/// Calls `handler` at each interrupt with this vector. It runs with interrupts off.
pub fn on_interrupt(vector: u8, handler: fn()) {
    HANDLERS[usize::from(vector)].store(handler as *const () as u64, SeqCst);
}

#[unsafe(no_mangle)]
extern "C" fn trap(frame: &Frame) -> u64 {
    let handler = HANDLERS[(frame.vector & 255) as usize].load(SeqCst);
    if handler != 0 {
        // SAFETY: only `on_interrupt` stores here.
        let handler: fn() = unsafe { core::mem::transmute(handler) };
        handler();
        return 0;
    }
    let cr2: u64;
    // SAFETY: reading changes nothing.
    unsafe { core::arch::asm!("mov {}, cr2", out(reg) cr2) };
    let fault = Fault {
        vector: frame.vector,
        error: frame.error,
        rip: frame.rip,
        cs: frame.cs,
        rflags: frame.rflags,
        rsp: frame.rsp,
        rax: frame.general[14],
        cr2,
    };
    let recovery = RECOVERY.swap(0, SeqCst);
    assert!(recovery != 0, "unexpected {fault:x?}");
    // SAFETY: only the first vCPU comes here.
    unsafe { *LAST.at() = fault };
    recovery
}

#[unsafe(no_mangle)]
extern "C" fn syscall_trap(rax: u64, rip: u64, rflags: u64, rsp: u64) -> u64 {
    // SAFETY: only the first vCPU comes here.
    unsafe {
        *LAST.at() = Fault {
            vector: Fault::SYSCALL,
            rip,
            rflags,
            rsp,
            rax,
            cs: u64::from(USER_DATA),
            ..Fault::default()
        };
    }
    RECOVERY.swap(0, SeqCst)
}

global_asm!(
    r#"
.macro save_callee
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    sub rsp, 8
.endm
.macro restore_callee
    add rsp, 8
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
.endm
.section .text
.global call_guarded
call_guarded:
    save_callee
    mov [rdx], rsp
    mov rbx, rdx
    mov rax, rdi
    mov rdi, rsi
    call rax
    mov qword ptr [rbx], 0
    xor eax, eax
    restore_callee
    ret
recovered:
    mov rsp, rax
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov eax, 1
    restore_callee
    ret
.global call_user
call_user:
    save_callee
    mov [rdx], rsp
    push 0x2b
    push rsi
    push r8
    push r9
    push rdi
    mov rdi, rcx
    mov eax, 0x2b
    mov ds, eax
    mov es, eax
    xor eax, eax
    iretq
.global syscall_entry
syscall_entry:
    cmp rax, 1
    jne 2f
    mov eax, 42
    sysretq
2:  mov rdi, rax
    mov rsi, rcx
    mov rdx, r11
    mov rcx, rsp
    mov rsp, [RECOVERY]
    call syscall_trap
    jmp recovered
.balign 16
.global trap_vectors
trap_vectors:
.set vector, 0
.rept 256
    .balign 16
    .if (vector != 8) && ((vector < 10) || (vector > 14)) && (vector != 17) && (vector != 21)
    push 0
    .endif
    .byte 0x68
    .long vector
    jmp trap_common
    .set vector, vector + 1
.endr
trap_common:
    push rax
    push rcx
    push rdx
    push rbx
    push rbp
    push rsi
    push rdi
    push r8
    push r9
    push r10
    push r11
    push r12
    push r13
    push r14
    push r15
    mov rdi, rsp
    cld
    call trap
    test rax, rax
    jnz recovered
    pop r15
    pop r14
    pop r13
    pop r12
    pop r11
    pop r10
    pop r9
    pop r8
    pop rdi
    pop rsi
    pop rbp
    pop rbx
    pop rdx
    pop rcx
    pop rax
    add rsp, 16
    iretq
"#
);
