//! The decimal adjustments, which 64-bit code does not have.
#![allow(clippy::cast_possible_truncation, reason = "arithmetic on bytes")]

use iced_x86::{Instruction, Mnemonic};

use crate::cpu::{Cpu, Fault, RAX, fl};
use crate::flags::{Lazy, kind, sign_extend};

fn result_flags(al: u64) -> u64 {
    Lazy { dst: sign_extend(al, 0), src: 0, op: kind::LOGIC }.flags()
}

pub(super) fn execute(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Fault> {
    let flags = cpu.lazy.flags();
    let (cf, af) = (flags & fl::CF != 0, flags & fl::AF != 0);
    let ax = cpu.gpr[RAX] & 0xffff;
    let al = ax & 0xff;
    let adjust = al & 0xf > 9 || af;
    match insn.mnemonic() {
        Mnemonic::Aaa | Mnemonic::Aas => {
            let new = match (adjust, insn.mnemonic()) {
                (false, _) => ax,
                (true, Mnemonic::Aaa) => ax.wrapping_add(0x106),
                (true, _) => ax.wrapping_sub(0x106),
            } & 0xff0f;
            cpu.set_sized(RAX, 1, new);
            let carry = if adjust { fl::CF | fl::AF } else { 0 };
            cpu.set_arith(result_flags(new & 0xff) & !(fl::CF | fl::AF) | carry);
        }
        Mnemonic::Aam => {
            let base = insn.immediate(0) & 0xff;
            if base == 0 {
                return Err(Fault::DE);
            }
            cpu.set_sized(RAX, 1, ((al / base) << 8) | (al % base));
            cpu.set_arith(result_flags(al % base));
        }
        Mnemonic::Aad => {
            let new = al.wrapping_add((ax >> 8) * (insn.immediate(0) & 0xff)) & 0xff;
            cpu.set_sized(RAX, 1, new);
            cpu.set_arith(result_flags(new));
        }
        _ => {
            let sub = insn.mnemonic() == Mnemonic::Das;
            let high = al > 0x99 || cf;
            let by = if adjust { 6 } else { 0 } + if high { 0x60 } else { 0 };
            let new = (if sub { al.wrapping_sub(by) } else { al + by }) & 0xff;
            let borrow = sub && adjust && al < 6;
            cpu.set_sized(RAX, 0, new);
            let mut carry = if high || borrow { fl::CF } else { 0 };
            if adjust {
                carry |= fl::AF;
            }
            cpu.set_arith(result_flags(new) & !(fl::CF | fl::AF) | carry);
        }
    }
    Ok(())
}
