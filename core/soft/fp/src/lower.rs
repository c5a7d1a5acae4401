//! From a decoded instruction to an operation.

use iced_x86::Instruction;

use crate::FpOp;

/// Lowers an x87, MMX, SSE or SSE2 instruction. `None`: it is not one (fences, PAUSE, CLFLUSH and prefetches are the
/// engine's). Instructions of later extensions on the same registers lower to an operation that answers #UD.
pub fn lower(instruction: &Instruction) -> Option<FpOp> {
    let _ = instruction;
    None
}
