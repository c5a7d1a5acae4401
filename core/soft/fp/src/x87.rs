//! x87 on the host's own unit.
//!
//! The state *is* an FXSAVE64 image, so an instruction runs as `fxrstor64; instruction; fxsave64` with the guest's control
//! word, unmasked exceptions included: the host's unit reports those only at the next waiting x87 instruction, and none
//! follows. The instruction is one of two tables of thunks: opcode × ModRM byte for register forms, opcode × reg field with
//! `[rsi]` for memory forms. The instructions that only move control and environment are plain Rust.

use std::arch::naked_asm;

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use crate::forms::{Done, undefined};
use crate::lower::op;
use crate::{Flags, FpFault, FpOp, FpState, Gpr, Kind, Mem, Operands, Run};

/// Bytes from one thunk to the next.
const THUNK: usize = 4;
/// Number of the first thunk for memory forms.
const MEMORY: u16 = 512;

/// All register forms `D8+n, C0+m` at `(64 n + m) * THUNK`, then all memory forms `D8+n /m` with `[rsi]`.
#[unsafe(naked)]
unsafe extern "sysv64" fn thunks() {
    naked_asm!(
        ".irp op, 0xd8, 0xd9, 0xda, 0xdb, 0xdc, 0xdd, 0xde, 0xdf",
        ".irp reg, 0xc0, 0xc8, 0xd0, 0xd8, 0xe0, 0xe8, 0xf0, 0xf8",
        ".irp rm, 0, 1, 2, 3, 4, 5, 6, 7",
        ".byte \\op, \\reg + \\rm, 0xc3, 0x90",
        ".endr",
        ".endr",
        ".endr",
        ".irp op, 0xd8, 0xd9, 0xda, 0xdb, 0xdc, 0xdd, 0xde, 0xdf",
        ".irp reg, 0x06, 0x0e, 0x16, 0x1e, 0x26, 0x2e, 0x36, 0x3e",
        ".byte \\op, \\reg, 0xc3, 0x90",
        ".endr",
        ".endr",
    )
}

/// Runs a thunk on a state. `flags`: CF, PF, ZF before it; the answer is RFLAGS after it. The host's x87 and SSE control
/// are as before, its x87 registers empty.
#[unsafe(naked)]
unsafe extern "sysv64" fn call(state: *mut FpState, memory: *mut u8, flags: u64, thunk: usize) -> u64 {
    naked_asm!(
        "sub rsp, 24",
        "fnstcw [rsp]",
        "stmxcsr [rsp + 4]",
        "mov ah, dl",
        "fxrstor64 [rdi]",
        "sahf",
        "call rcx",
        "pushfq",
        "pop rax",
        "fxsave64 [rdi]",
        "fninit",
        "fldcw [rsp]",
        "ldmxcsr [rsp + 4]",
        "add rsp, 24",
        "ret",
    )
}

#[inline(always)]
fn native(state: &mut FpState, operands: &mut Operands) -> Done {
    if state.pending() {
        return Err(FpFault::Mf);
    }
    let kept = state.untracked();
    let thunk = thunks as *const () as usize + usize::from(operands.imm) * THUNK;
    // SAFETY: the image is valid (reserved bits are clear) and has no pending exception, so nothing here can trap; `imm`
    // comes from `lower`, which names only defined instructions; they touch at most 16 bytes at `mem`.
    operands.flags = unsafe { call(state, operands.mem.as_mut_ptr(), operands.flags, thunk) };
    state.set_untracked(kept);
    Ok(())
}

fn run(state: &mut FpState, operands: &mut Operands) -> Done {
    native(state, operands)
}

/// A store: an unmasked invalid operation, overflow or underflow leaves memory alone.
fn run_store(state: &mut FpState, operands: &mut Operands) -> Done {
    native(state, operands)?;
    if state.fsw & !state.fcw & 0x19 != 0 { Err(FpFault::Unstored) } else { Ok(()) }
}

fn nop(_: &mut FpState, _: &mut Operands) -> Done {
    Ok(())
}

fn fwait(state: &mut FpState, _: &mut Operands) -> Done {
    if state.pending() { Err(FpFault::Mf) } else { Ok(()) }
}

fn fninit(state: &mut FpState, _: &mut Operands) -> Done {
    state.fninit();
    Ok(())
}

fn fnclex(state: &mut FpState, _: &mut Operands) -> Done {
    state.clear_exceptions();
    Ok(())
}

fn fnstcw(state: &mut FpState, operands: &mut Operands) -> Done {
    operands.mem[..2].copy_from_slice(&state.fcw.to_le_bytes());
    Ok(())
}

fn fnstsw(state: &mut FpState, operands: &mut Operands) -> Done {
    operands.mem[..2].copy_from_slice(&state.fsw.to_le_bytes());
    operands.gpr = state.fsw.into();
    Ok(())
}

fn fldcw(state: &mut FpState, operands: &mut Operands) -> Done {
    fwait(state, operands)?;
    state.set_control_status(word(operands, 0), state.fsw);
    Ok(())
}

/// FNSTENV with 16- or 32-bit layout (`imm`: its length, 14 or 28). All exceptions are masked afterwards.
fn fnstenv(state: &mut FpState, operands: &mut Operands) -> Done {
    let (fip, fdp) = (state.fip as u32, state.fdp as u32);
    let words = [state.fcw, state.fsw, state.full_tags()];
    if operands.imm == 14 {
        for (i, value) in words.into_iter().chain([fip as u16, 0, fdp as u16, 0]).enumerate() {
            operands.mem[2 * i..2 * i + 2].copy_from_slice(&value.to_le_bytes());
        }
    } else {
        let [fcw, fsw, tags] = words.map(|value| 0xffff_0000 | u32::from(value));
        let opcode = u32::from(state.fop) << 16;
        for (i, value) in [fcw, fsw, tags, fip, opcode, fdp, 0xffff_0000].into_iter().enumerate() {
            operands.mem[4 * i..4 * i + 4].copy_from_slice(&value.to_le_bytes());
        }
    }
    state.set_control_status(state.fcw | 0x3f, state.fsw);
    Ok(())
}

fn fldenv(state: &mut FpState, operands: &mut Operands) -> Done {
    fwait(state, operands)?;
    load_environment(state, operands);
    Ok(())
}

fn load_environment(state: &mut FpState, operands: &Operands) {
    let wide = operands.imm == 28;
    let step = if wide { 4 } else { 2 };
    state.set_environment(word(operands, 0), word(operands, step));
    state.set_full_tags(word(operands, 2 * step));
    let pointer = |n: usize| {
        let high = if wide { word(operands, n * step + 2) } else { 0 };
        u64::from(word(operands, n * step)) | u64::from(high) << 16
    };
    state.fip = pointer(3);
    state.fop = if wide { word(operands, 18) & 0x7ff } else { 0 };
    state.fdp = pointer(5);
}

/// FNSAVE: the environment and the registers, then FNINIT.
fn fnsave(state: &mut FpState, operands: &mut Operands) -> Done {
    fnstenv(state, operands)?;
    let start = usize::from(operands.imm);
    for (i, value) in state.st.iter().enumerate() {
        operands.mem[start + 10 * i..start + 10 * i + 10].copy_from_slice(&value.to_le_bytes()[..10]);
    }
    state.fninit();
    Ok(())
}

fn frstor(state: &mut FpState, operands: &mut Operands) -> Done {
    fwait(state, operands)?;
    load_environment(state, operands);
    let start = usize::from(operands.imm);
    for (i, value) in state.st.iter_mut().enumerate() {
        let mut bytes = [0; 16];
        bytes[..10].copy_from_slice(&operands.mem[start + 10 * i..start + 10 * i + 10]);
        *value = u128::from_le_bytes(bytes);
    }
    Ok(())
}

fn word(operands: &Operands, at: usize) -> u16 {
    u16::from_le_bytes([operands.mem[at], operands.mem[at + 1]])
}

/// Lowers an instruction that iced-x86 counts to the x87 family.
pub(crate) fn lower(instruction: &Instruction) -> Option<FpOp> {
    use Mnemonic as M;
    let size = instruction.memory_size().size() as u16;
    let control = |run: Run, mem: Mem, waits: bool, imm: u16| FpOp { mem, waits, imm, ..op(run, Kind::X87) };
    Some(match instruction.mnemonic() {
        M::Wait => FpOp { waits: true, ..op(fwait, Kind::Wait) },
        M::Fninit => control(fninit, Mem::None, false, 0),
        M::Fnclex => control(fnclex, Mem::None, false, 0),
        M::Fneni | M::Fndisi | M::Fnsetpm => control(nop, Mem::None, false, 0),
        M::Fnstcw => control(fnstcw, Mem::Write(2), false, 0),
        M::Fldcw => control(fldcw, Mem::Read(2), true, 0),
        M::Fnstsw if instruction.op0_kind() == OpKind::Register => {
            FpOp { gpr: Gpr::Out(Register::AX), ..control(fnstsw, Mem::None, false, 0) }
        }
        M::Fnstsw => control(fnstsw, Mem::Write(2), false, 0),
        M::Fnstenv => control(fnstenv, Mem::Write(size), false, size),
        M::Fldenv => control(fldenv, Mem::Read(size), true, size),
        M::Fnsave => control(fnsave, Mem::Write(size), false, size - 80),
        M::Frstor => control(frstor, Mem::Read(size), true, size - 80),
        M::Frstpm | M::Fstdw | M::Fstsg => op(undefined, Kind::Plain),
        _ => arithmetic(instruction, size)?,
    })
}

fn arithmetic(instruction: &Instruction, size: u16) -> Option<FpOp> {
    use Mnemonic as M;
    let encoding = instruction.code().op_code();
    let mut result = FpOp { waits: true, ..op(run, Kind::X87) };
    if encoding.op_code_len() == 1 {
        let opcode =
            u16::try_from(encoding.op_code()).ok().filter(|opcode| (0xd8..=0xdf).contains(opcode))?;
        result.imm = MEMORY + (opcode - 0xd8) * 8 + u16::try_from(encoding.group_index()).ok()?;
        let stores = matches!(instruction.mnemonic(), M::Fst | M::Fstp | M::Fist | M::Fistp | M::Fbstp);
        (result.run, result.mem) =
            if stores { (run_store as Run, Mem::Write(size)) } else { (run as Run, Mem::Read(size)) };
        return Some(result);
    }
    let (opcode, modrm) = (encoding.op_code() >> 8 & 0xff, encoding.op_code() & 0xff);
    if !(0xd8..=0xdf).contains(&opcode) || modrm < 0xc0 {
        return None;
    }
    // ST(i) is whichever operand is not ST(0).
    let register = (0..instruction.op_count())
        .map(|n| instruction.op_register(n))
        .filter(|register| register.is_st())
        .map(|register| register.number() as u32)
        .max()
        .unwrap_or(0);
    // Opcodes that name ST(i) are given with i = 0; the others have no operands or are complete.
    let modrm = if takes_register(instruction.code()) { modrm & 0xf8 | register } else { modrm };
    result.imm = ((opcode - 0xd8) * 64 + (modrm - 0xc0)) as u16;
    result.flags = match instruction.mnemonic() {
        M::Fcmovb
        | M::Fcmove
        | M::Fcmovbe
        | M::Fcmovu
        | M::Fcmovnb
        | M::Fcmovne
        | M::Fcmovnbe
        | M::Fcmovnu => Flags::In,
        M::Fcomi | M::Fcomip | M::Fucomi | M::Fucomip => Flags::Out,
        _ => Flags::None,
    };
    Some(result)
}

fn takes_register(code: Code) -> bool {
    let encoding = code.op_code();
    (0..encoding.op_count()).any(|n| encoding.op_kind(n) == iced_x86::OpCodeOperandKind::sti_opcode)
}
