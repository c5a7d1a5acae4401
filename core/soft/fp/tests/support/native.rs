//! Runs one instruction on the host CPU in ring 3 and captures everything it did.
//!
//! Registers come from and go to one static context; every run ends in a signal: the INT3 behind the instruction, or the
//! fault it raised. The kernel tells vector, error code and CR2 in the signal frame, and the FXSAVE image too.

use std::arch::naked_asm;

/// Where code and data live, in the native process as in a guest: below 4 GiB, so that 32-bit addresses reach it.
pub const CODE: u64 = 0x2000_0000;
pub const CODE_SIZE: usize = 0x1000;
/// Four writable pages, then one read-only page, then nothing.
pub const DATA: u64 = 0x3000_0000;
pub const WRITABLE: usize = 0x4000;
pub const DATA_SIZE: usize = 0x5000;

/// Registers before or after.
#[repr(C, align(16))]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    pub fp: [u8; 512],
    /// In encoding order: RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8-R15.
    pub gpr: [u64; 16],
    pub rflags: u64,
    pub rip: u64,
    /// The code segment: [`CODE64`] or [`CODE32`].
    pub cs: u64,
}

/// Linux's selectors for user code.
pub const CODE64: u64 = 0x33;
pub const CODE32: u64 = 0x23;
/// Its selector for user data.
pub const USER_DATA: u64 = 0x2b;

impl Machine {
    pub const fn zero() -> Self {
        Self { fp: [0; 512], gpr: [0; 16], rflags: 2, rip: 0, cs: CODE64 }
    }
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    pub machine: Machine,
    pub vector: u8,
    pub error: u64,
    pub cr2: u64,
}

#[repr(C, align(16))]
struct Context {
    input: Machine,
    host_rsp: u64,
    /// For DS and ES.
    data: u64,
    active: u64,
    output: Machine,
    vector: u64,
    error: u64,
    cr2: u64,
}

const INPUT_GPR: usize = 512;
const INPUT_RFLAGS: usize = 512 + 128;
const INPUT_RIP: usize = INPUT_RFLAGS + 8;
const HOST_RSP: usize = size_of::<Machine>();

static mut CONTEXT: Context = Context {
    input: Machine::zero(),
    host_rsp: 0,
    data: 0,
    active: 0,
    output: Machine::zero(),
    vector: 0,
    error: 0,
    cr2: 0,
};

#[unsafe(naked)]
unsafe extern "sysv64" fn enter() {
    naked_asm!(
        "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
        "lea r15, [rip + {context}]",
        "mov [r15 + {host_rsp}], rsp",
        "fxrstor64 [r15]",
        "mov eax, [r15 + {data}]",
        "mov ds, eax",
        "mov es, eax",
        "push 0x2b",
        "push qword ptr [r15 + {gpr} + 32]",
        "push qword ptr [r15 + {rflags}]",
        "push qword ptr [r15 + {cs}]",
        "push qword ptr [r15 + {rip}]",
        "mov rax, [r15 + {gpr} + 0]",
        "mov rcx, [r15 + {gpr} + 8]",
        "mov rdx, [r15 + {gpr} + 16]",
        "mov rbx, [r15 + {gpr} + 24]",
        "mov rbp, [r15 + {gpr} + 40]",
        "mov rsi, [r15 + {gpr} + 48]",
        "mov rdi, [r15 + {gpr} + 56]",
        "mov r8, [r15 + {gpr} + 64]",
        "mov r9, [r15 + {gpr} + 72]",
        "mov r10, [r15 + {gpr} + 80]",
        "mov r11, [r15 + {gpr} + 88]",
        "mov r12, [r15 + {gpr} + 96]",
        "mov r13, [r15 + {gpr} + 104]",
        "mov r14, [r15 + {gpr} + 112]",
        "mov r15, [r15 + {gpr} + 120]",
        "iretq",
        context = sym CONTEXT,
        host_rsp = const HOST_RSP,
        rflags = const INPUT_RFLAGS,
        gpr = const INPUT_GPR,
        rip = const INPUT_RIP,
        cs = const INPUT_RIP + 8,
        data = const HOST_RSP + 8,
    )
}

/// Where the signal handler resumes: the stack is as [`enter`] left it.
#[unsafe(naked)]
unsafe extern "sysv64" fn leave() {
    naked_asm!(
        "fninit",
        "push 2",
        "popfq",
        "push 0x1f80",
        "ldmxcsr [rsp]",
        "pop rax",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret"
    )
}

extern "C" fn on_signal(signal: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let ours = &raw mut CONTEXT;
    // SAFETY: the kernel's frame; `CONTEXT` is used by one thread at a time (the caller of `run` holds a lock).
    unsafe {
        let machine = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext;
        if (*ours).active == 0 {
            libc::signal(signal, libc::SIG_DFL);
            return;
        }
        (*ours).active = 0;
        let registers = &mut machine.gregs;
        let order = [
            libc::REG_RAX,
            libc::REG_RCX,
            libc::REG_RDX,
            libc::REG_RBX,
            libc::REG_RSP,
            libc::REG_RBP,
            libc::REG_RSI,
            libc::REG_RDI,
            libc::REG_R8,
            libc::REG_R9,
            libc::REG_R10,
            libc::REG_R11,
            libc::REG_R12,
            libc::REG_R13,
            libc::REG_R14,
            libc::REG_R15,
        ];
        let output = &mut (*ours).output;
        for (to, from) in output.gpr.iter_mut().zip(order) {
            *to = registers[from as usize] as u64;
        }
        output.rip = registers[libc::REG_RIP as usize] as u64;
        output.rflags = registers[libc::REG_EFL as usize] as u64;
        let selectors = &mut registers[libc::REG_CSGSFS as usize];
        output.cs = *selectors as u64 & 0xffff;
        *selectors = *selectors & !0xffff | CODE64 as i64;
        output.fp.copy_from_slice(std::slice::from_raw_parts(machine.fpregs.cast::<u8>(), 512));
        (*ours).vector = registers[libc::REG_TRAPNO as usize] as u64;
        (*ours).error = registers[libc::REG_ERR as usize] as u64;
        (*ours).cr2 = registers[libc::REG_CR2 as usize] as u64;
        registers[libc::REG_RIP as usize] = leave as *const () as i64;
        registers[libc::REG_RSP as usize] = (*ours).host_rsp as i64;
        registers[libc::REG_EFL as usize] = 2;
    }
}

/// Code and data mapped, handlers installed. One per process: the addresses are fixed.
///
/// The pages that the instruction sees (code not writable, the last data page read-only) are second mappings of the memory
/// that this structure writes.
pub struct Native {
    code: &'static mut [u8; CODE_SIZE],
    data: &'static mut [u8; DATA_SIZE],
}

impl Native {
    pub fn new() -> Self {
        // SAFETY: fixed mappings at addresses that a fresh process does not use; handlers on an alternate stack, which is
        // leaked because it must outlive the thread.
        unsafe {
            let file = libc::memfd_create(c"native".as_ptr(), 0);
            assert!(file >= 0 && libc::ftruncate(file, (CODE_SIZE + DATA_SIZE) as i64) == 0);
            let map = |address: u64, size: usize, protection: i32, offset: usize| {
                let flags = libc::MAP_SHARED
                    | libc::MAP_POPULATE
                    | if address == 0 { 0 } else { libc::MAP_FIXED_NOREPLACE };
                let mapped = libc::mmap(address as *mut _, size, protection, flags, file, offset as i64);
                assert!(
                    mapped != libc::MAP_FAILED && (address == 0 || mapped as u64 == address),
                    "mmap at {address:#x}"
                );
                mapped.cast::<u8>()
            };
            let (read, write, execute) =
                (libc::PROT_READ, libc::PROT_READ | libc::PROT_WRITE, libc::PROT_READ | libc::PROT_EXEC);
            map(CODE, CODE_SIZE, execute, 0);
            map(DATA, WRITABLE, write, CODE_SIZE);
            map(DATA + WRITABLE as u64, DATA_SIZE - WRITABLE, read, CODE_SIZE + WRITABLE);
            let code = map(0, CODE_SIZE, write, 0).cast();
            let data = map(0, DATA_SIZE, write, CODE_SIZE).cast();
            libc::close(file);

            let size = 256 << 10;
            let stack = Box::leak(vec![0_u8; size].into_boxed_slice());
            let stack = libc::stack_t { ss_sp: stack.as_mut_ptr().cast(), ss_flags: 0, ss_size: size };
            assert_eq!(libc::sigaltstack(&stack, std::ptr::null_mut()), 0);
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_signal as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
            for signal in [libc::SIGSEGV, libc::SIGFPE, libc::SIGILL, libc::SIGBUS, libc::SIGTRAP] {
                assert_eq!(libc::sigaction(signal, &action, std::ptr::null_mut()), 0);
            }
            Self { code: &mut *code, data: &mut *data }
        }
    }

    /// The code page.
    pub fn code(&mut self) -> &mut [u8; CODE_SIZE] {
        self.code
    }

    /// The data pages.
    pub fn data(&mut self) -> &mut [u8; DATA_SIZE] {
        self.data
    }

    /// Runs from `machine.rip` to the first exception.
    pub fn run(&mut self, machine: &Machine) -> End {
        let ours = &raw mut CONTEXT;
        // SAFETY: one thread at a time: `&mut self`, and tests make one `Native`.
        unsafe {
            (*ours).input = machine.clone();
            (*ours).data = if machine.cs == CODE32 { USER_DATA } else { 0 };
            (*ours).active = 1;
            enter();
            End {
                machine: (*ours).output.clone(),
                vector: (*ours).vector as u8,
                error: (*ours).error,
                cr2: (*ours).cr2,
            }
        }
    }
}
