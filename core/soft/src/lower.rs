//! From decoded instructions to ops: picks the handler.
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "operands are cut to their size")]

use std::collections::BTreeSet;
use std::sync::Mutex;

use iced_x86::{FlowControl, Instruction, Mnemonic, OpKind};

use crate::block::{BlockCache, Op};
use crate::ops::{self, nothing};
use crate::{slow, string};

/// An op, and whether its block ends with it.
pub(crate) struct Lowered {
    pub(crate) op: Op,
    pub(crate) ends: bool,
}

/// What is known of the block that is being made.
pub(crate) struct Context {
    branched: bool,
}

impl Context {
    pub(crate) fn new(_mode: u32) -> Self {
        Self { branched: false }
    }

    /// Whether the last instruction says itself where to go on.
    pub(crate) fn branched(&self) -> bool {
        self.branched
    }

    /// Makes an op of the next instruction.
    pub(crate) fn lower(&mut self, cache: &mut BlockCache, insn: &Instruction) -> Lowered {
        if insn.is_invalid() {
            self.branched = true;
            return Lowered { op: Op { run: ops::undefined, ..nothing() }, ends: true };
        }
        if string::knows(insn) {
            let imm = cache.keep(*insn);
            return Lowered { op: Op { run: ops::strings, imm, ..nothing() }, ends: string::is_io(insn) };
        }
        if ends(insn) {
            self.branched = true;
            let imm = cache.keep(*insn);
            return Lowered { op: Op { run: ops::last, imm, ..nothing() }, ends: true };
        }
        if slow::knows(insn) {
            let imm = cache.keep(*insn);
            return Lowered { op: Op { run: ops::plain, imm, ..nothing() }, ends: false };
        }
        if let Some(op) = tenon_soft_fp::lower(insn) {
            let imm = cache.keep(ops::Fp { op, insn: *insn });
            return Lowered { op: Op { run: ops::fp, imm, ..nothing() }, ends: false };
        }
        self.branched = true;
        let imm = cache.keep(*insn);
        Lowered { op: Op { run: ops::unknown, imm, ..nothing() }, ends: true }
    }
}

/// Whether an instruction ends its block.
fn ends(insn: &Instruction) -> bool {
    use Mnemonic as M;
    if insn.flow_control() != FlowControl::Next && !matches!(insn.mnemonic(), M::Bound) {
        return true;
    }
    let to_segment = |n| insn.op_kind(n) == OpKind::Register && insn.op_register(n).is_segment_register();
    match insn.mnemonic() {
        M::Mov => {
            to_segment(0)
                || (0..2).any(|n| {
                    insn.op_kind(n) == OpKind::Register && {
                        let register = insn.op_register(n);
                        register.is_cr() || register.is_dr() || register.is_tr()
                    }
                })
        }
        M::Pop => to_segment(0),
        M::Lds
        | M::Les
        | M::Lfs
        | M::Lgs
        | M::Lss
        | M::In
        | M::Out
        | M::Popf
        | M::Popfd
        | M::Popfq
        | M::Cli
        | M::Sti
        | M::Hlt
        | M::Pause
        | M::Lgdt
        | M::Lidt
        | M::Sgdt
        | M::Sidt
        | M::Lldt
        | M::Ltr
        | M::Sldt
        | M::Str
        | M::Lmsw
        | M::Smsw
        | M::Clts
        | M::Invlpg
        | M::Invd
        | M::Wbinvd
        | M::Cpuid
        | M::Rdmsr
        | M::Wrmsr
        | M::Rdtsc
        | M::Rdtscp
        | M::Rdpmc
        | M::Lar
        | M::Lsl
        | M::Verr
        | M::Verw
        | M::Arpl
        | M::Swapgs
        | M::Syscall
        | M::Sysret
        | M::Sysretq
        | M::Sysenter
        | M::Sysexit
        | M::Sysexitq
        | M::Into
        | M::Int
        | M::Int3
        | M::Int1
        | M::Ud0
        | M::Ud1
        | M::Ud2 => true,
        _ => false,
    }
}

/// Lets a direct branch be linked to targets in its own page.
pub(crate) fn allow_links(_op: &mut Op, _offset: u64, _length: u64) {}

/// Notes an instruction that the engine does not have: once each in the log.
pub(crate) fn say_unknown(mnemonic: Mnemonic, rip: u64) {
    static SAID: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());
    let mut said = SAID.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if said.insert(mnemonic as u32) {
        tracing::warn!("the guest uses {mnemonic:?} near {rip:#x}, which the CPU shown to it does not have");
    }
}
