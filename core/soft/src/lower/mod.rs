//! From decoded instructions to ops: picks the handler.
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "operands are cut to their size")]

mod fast;

use std::collections::BTreeSet;
use std::sync::Mutex;

use iced_x86::{FlowControl, Instruction, Mnemonic, OpKind};

use crate::block::{BlockCache, Op, Run};
use crate::cpu::mode;
use crate::ops::{self, flow, nothing};
use crate::{slow, string};

/// An op, and whether its block ends with it.
pub(crate) struct Lowered {
    /// None: the instruction does nothing.
    pub(crate) op: Option<Op>,
    pub(crate) ends: bool,
    /// What the op before becomes.
    pub(crate) fuse: Option<Run>,
    /// An op further back, by index, that becomes another because nobody looks at its flags.
    pub(crate) quiet: Option<(usize, Run)>,
}

/// What is known of the block that is being made.
pub(crate) struct Context {
    /// 64-bit code, or flat 32-bit code: what the fast handlers know.
    fast: bool,
    branched: bool,
    /// The last instruction is a direct branch.
    direct: bool,
    /// What the last instruction to write the flags left: a constant of [`flow`].
    kind: u8,
    /// The comparison right before.
    compared: Option<fast::Comparison>,
    /// The handler that the op being made may have if nobody looks at its flags, and which they are.
    quiet: Option<(Run, u64)>,
    /// The op to which that applies while nobody has looked: its index, the handler, the flags.
    unseen: Option<(usize, Run, u64)>,
}

impl Context {
    pub(crate) fn new(bits: u32) -> Self {
        Self {
            fast: bits & mode::CODE == mode::CODE64 || bits & mode::FLAT != 0,
            branched: false,
            direct: false,
            kind: flow::ANY,
            compared: None,
            quiet: None,
            unseen: None,
        }
    }

    /// Whether the last instruction says itself where to go on.
    pub(crate) fn branched(&self) -> bool {
        self.branched
    }

    /// Lets the last op be linked to blocks in its own page, if it is a direct branch. `offset` is the block's in the page.
    pub(crate) fn allow_links(&self, op: &mut Op, offset: u64) {
        if self.direct {
            fast::allow_links(op, offset);
        }
    }

    /// Makes an op of the next instruction, which will have this index.
    pub(crate) fn lower(&mut self, cache: &mut BlockCache, insn: &Instruction, index: usize) -> Lowered {
        let mut fuse = None;
        let (op, ends) = self.pick(cache, insn, &mut fuse);
        fast::note_flags(self, insn);
        let quiet = fast::watch_flags(self, insn, op.as_ref(), index);
        Lowered { op, ends, fuse, quiet }
    }

    fn pick(
        &mut self,
        cache: &mut BlockCache,
        insn: &Instruction,
        fuse: &mut Option<Run>,
    ) -> (Option<Op>, bool) {
        if insn.is_invalid() {
            self.branched = true;
            return (Some(Op { run: ops::undefined, ..nothing() }), true);
        }
        if fast::is_nothing(insn) {
            return (None, false);
        }
        if self.fast
            && let Some(op) = fast::lower(self, insn, fuse)
        {
            return (Some(op), self.branched);
        }
        self.compared = None;
        if string::knows(insn) {
            let imm = cache.keep(*insn);
            return (Some(Op { run: ops::strings, imm, ..nothing() }), string::is_io(insn));
        }
        if ends(insn) {
            self.branched = true;
            let imm = cache.keep(*insn);
            return (Some(Op { run: ops::last, imm, ..nothing() }), true);
        }
        if slow::knows(insn) {
            let imm = cache.keep(*insn);
            return (Some(Op { run: ops::plain, imm, ..nothing() }), false);
        }
        if let Some(op) = tenon_soft_fp::lower(insn) {
            let imm = cache.keep(ops::Fp { op, insn: *insn });
            return (Some(Op { run: ops::fp, imm, ..nothing() }), false);
        }
        self.branched = true;
        let imm = cache.keep(*insn);
        (Some(Op { run: ops::unknown, imm, ..nothing() }), true)
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

/// Notes an instruction that the engine does not have: once each in the log.
pub(crate) fn say_unknown(mnemonic: Mnemonic, rip: u64) {
    static SAID: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());
    let mut said = SAID.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if said.insert(mnemonic as u32) {
        tracing::warn!("the guest uses {mnemonic:?} near {rip:#x}, which the CPU shown to it does not have");
    }
}
