//! The handlers of decoded instructions.
//!
//! A handler executes its op and calls the next op's in tail position; release builds make a jump of that. A block's last
//! handler returns the next block, if it knows it, or null with [`Cpu::exit`] saying what is to be done. Inside a block RIP stays at the
//! block's start: [`Op::ip`] says where an instruction is.
#![allow(unsafe_code, reason = "ops are reached by raw pointer: the next one follows in the arena")]
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "operands are cut to their size")]

pub(crate) mod flow;
mod fp;
pub(crate) mod int;
pub(crate) mod sse;

pub(crate) use fp::{Fp, fp};

use std::sync::atomic::Ordering;

use iced_x86::Instruction;

use crate::block::{Block, Op};
use crate::cpu::{Cpu, Fault, RIP, SS, mode};
use crate::exec::{ATTEND, FAULT, LOOK_UP};
use crate::{slow, string};

/// Goes on with the op after `op`.
macro_rules! next {
    ($cpu:ident, $op:ident) => {{
        // SAFETY: an op that is not a block's last is followed by another.
        unsafe {
            let next = $op.add(1);
            ((*next).run)($cpu, next)
        }
    }};
}
pub(crate) use next;

/// How many instructions run without a return to the dispatch loop.
pub(crate) const BURST: u64 = 2048;

/// Enters a block that was found or linked, if nothing is against it; else the dispatch loop sees to it.
#[inline(always)]
pub(crate) unsafe fn enter(cpu: &mut Cpu, block: *mut Block) -> *mut Block {
    // SAFETY: blocks that were found or linked are in the arena.
    unsafe {
        if block.is_null() {
            return block;
        }
        let after = cpu.icount + u64::from((*block).count);
        if after > cpu.burst || cpu.shared.event.load(Ordering::Relaxed) != 0 {
            return block;
        }
        cpu.icount = after;
        cpu.block = block;
        let first = Block::first(block);
        ((*first).run)(cpu, first)
    }
}

/// An offset in CS from the block's start, cut to the code's size.
#[inline]
fn at(cpu: &Cpu, distance: u64) -> u64 {
    let rip = cpu.gpr[RIP].wrapping_add(distance);
    match cpu.mode & mode::CODE {
        mode::CODE64 => rip,
        mode::CODE32 => rip & 0xffff_ffff,
        // A 16-bit block that runs past 64 KiB goes on there: the limit check is the next fetch's.
        _ => rip & 0xffff_ffff,
    }
}

/// Leaves the block at an op's instruction, which was not executed: RIP and the instruction count become exact.
#[inline]
unsafe fn leave(cpu: &mut Cpu, op: *const Op, exit: u8) -> *mut Block {
    // SAFETY: the running block is in the arena.
    unsafe {
        let count = if cpu.block.is_null() { u32::from((*op).n) } else { (*cpu.block).count };
        cpu.icount = cpu.icount.wrapping_sub(u64::from(count)).wrapping_add(u64::from((*op).n));
        cpu.gpr[RIP] = at(cpu, (*op).ip.into());
    }
    cpu.exit = exit;
    std::ptr::null_mut()
}

/// Ends the block with [`Cpu::fault`] raised by this op.
#[cold]
#[inline(never)]
pub(crate) unsafe fn fault(cpu: &mut Cpu, op: *const Op) -> *mut Block {
    // SAFETY: the caller's.
    unsafe {
        // A non-canonical address in the stack segment.
        if (*op).seg == SS as u8 && cpu.fault == Fault::gp(0) {
            cpu.fault = Fault::ss(0);
        }
        leave(cpu, op, FAULT)
    }
}

/// Takes the place of the ops of a block whose code has been overwritten.
pub(crate) unsafe fn resume_elsewhere(cpu: &mut Cpu, op: *const Op) -> *mut Block {
    // SAFETY: the caller's.
    unsafe { leave(cpu, op, LOOK_UP) }
}

/// The op after a block's last instruction, if that is no branch.
pub(crate) fn fall_through() -> Op {
    Op { run: fall, ..nothing() }
}

/// An op without operands.
pub(crate) fn nothing() -> Op {
    Op { run: nop, imm: 0, disp: 0, ip: 0, len: 0, n: 0, a: 0, b: 0, base: 0, index: 0, scale: 0, seg: 0 }
}

unsafe fn fall(cpu: &mut Cpu, op: *const Op) -> *mut Block {
    // SAFETY: the op and the running block are in the arena.
    unsafe {
        cpu.gpr[RIP] = at(cpu, (*op).imm);
        let link = &raw mut (*cpu.block).link[1];
        if (*link).is_null() && (*op).a != 0 {
            cpu.blocks.pending = link;
        }
        enter(cpu, *link)
    }
}

/// NOP and what has no effect here.
pub(crate) unsafe fn nop(cpu: &mut Cpu, op: *const Op) -> *mut Block {
    next!(cpu, op)
}

/// An instruction that no block can run.
pub(crate) unsafe fn undefined(cpu: &mut Cpu, op: *const Op) -> *mut Block {
    cpu.fault = Fault::UD;
    // SAFETY: the caller's.
    unsafe { fault(cpu, op) }
}

/// An instruction that the engine does not have: undefined for the guest, and said once in the log.
pub(crate) unsafe fn unknown(cpu: &mut Cpu, op: *const Op) -> *mut Block {
    // SAFETY: `imm` points to the instruction in the arena.
    let insn = unsafe { &*std::ptr::with_exposed_provenance::<Instruction>((*op).imm as usize) };
    crate::lower::say_unknown(insn.mnemonic(), cpu.gpr[RIP]);
    // SAFETY: the caller's.
    unsafe { undefined(cpu, op) }
}

/// Executes an instruction from its decoded form.
pub(crate) unsafe fn plain(cpu: &mut Cpu, op: *const Op) -> *mut Block {
    cpu.decode_base = cpu.gpr[RIP];
    // SAFETY: `imm` points to the instruction in the arena.
    let insn = unsafe { &*std::ptr::with_exposed_provenance::<Instruction>((*op).imm as usize) };
    match slow::execute(cpu, insn) {
        Ok(()) => next!(cpu, op),
        Err(raised) => {
            cpu.fault = raised;
            // SAFETY: the caller's.
            unsafe { fault(cpu, op) }
        }
    }
}

/// Executes a block's last instruction from its decoded form.
pub(crate) unsafe fn last(cpu: &mut Cpu, op: *const Op) -> *mut Block {
    let base = cpu.gpr[RIP];
    cpu.decode_base = base;
    // SAFETY: `imm` points to the instruction in the arena.
    let insn = unsafe { &*std::ptr::with_exposed_provenance::<Instruction>((*op).imm as usize) };
    // SAFETY: the op is in the arena.
    let (ip, len) = unsafe { (u64::from((*op).ip), u64::from((*op).len)) };
    cpu.start_rip = at(cpu, ip);
    cpu.gpr[RIP] = at(cpu, ip + len);
    cpu.exit = LOOK_UP;
    match slow::execute_last(cpu, insn) {
        Ok(()) => std::ptr::null_mut(),
        Err(raised) => {
            cpu.gpr[RIP] = base;
            cpu.fault = raised;
            // SAFETY: the caller's.
            unsafe { fault(cpu, op) }
        }
    }
}

/// Executes a string instruction.
pub(crate) unsafe fn strings(cpu: &mut Cpu, op: *const Op) -> *mut Block {
    // SAFETY: `imm` points to the instruction in the arena.
    let insn = unsafe { &*std::ptr::with_exposed_provenance::<Instruction>((*op).imm as usize) };
    match string::run(cpu, insn) {
        Ok(true) => next!(cpu, op),
        // SAFETY: the caller's.
        Ok(false) => unsafe { leave(cpu, op, ATTEND) },
        Err(raised) => {
            cpu.fault = raised;
            // SAFETY: the caller's.
            unsafe { fault(cpu, op) }
        }
    }
}
