//! The string instructions, with and without REP.
//!
//! Each iteration is committed by itself, so that a fault or an interrupt in the middle resumes where it was. Forward MOVS and STOS
//! over RAM go a page at a time.
#![allow(unsafe_code, reason = "bulk copies between host pointers that the TLB vouches for")]
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "operands are cut to their size")]

use std::sync::atomic::Ordering;

use iced_x86::{Code, Instruction, OpKind};

use crate::cpu::{Cpu, ES, Fault, RAX, RCX, RDI, RDX, RSI, fl, mode};
use crate::mem::{Access, Word};
use crate::operand::{by_size, data_segment, mask};
use crate::slow::alu::{Alu, binary};

/// What a string instruction does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Movs,
    Stos,
    Lods,
    Scas,
    Cmps,
    Ins,
    Outs,
}

fn kind_of(code: Code) -> Option<(What, u32)> {
    Some(match code {
        Code::Movsb_m8_m8 => (What::Movs, 0),
        Code::Movsw_m16_m16 => (What::Movs, 1),
        Code::Movsd_m32_m32 => (What::Movs, 2),
        Code::Movsq_m64_m64 => (What::Movs, 3),
        Code::Stosb_m8_AL => (What::Stos, 0),
        Code::Stosw_m16_AX => (What::Stos, 1),
        Code::Stosd_m32_EAX => (What::Stos, 2),
        Code::Stosq_m64_RAX => (What::Stos, 3),
        Code::Lodsb_AL_m8 => (What::Lods, 0),
        Code::Lodsw_AX_m16 => (What::Lods, 1),
        Code::Lodsd_EAX_m32 => (What::Lods, 2),
        Code::Lodsq_RAX_m64 => (What::Lods, 3),
        Code::Scasb_AL_m8 => (What::Scas, 0),
        Code::Scasw_AX_m16 => (What::Scas, 1),
        Code::Scasd_EAX_m32 => (What::Scas, 2),
        Code::Scasq_RAX_m64 => (What::Scas, 3),
        Code::Cmpsb_m8_m8 => (What::Cmps, 0),
        Code::Cmpsw_m16_m16 => (What::Cmps, 1),
        Code::Cmpsd_m32_m32 => (What::Cmps, 2),
        Code::Cmpsq_m64_m64 => (What::Cmps, 3),
        Code::Insb_m8_DX => (What::Ins, 0),
        Code::Insw_m16_DX => (What::Ins, 1),
        Code::Insd_m32_DX => (What::Ins, 2),
        Code::Outsb_DX_m8 => (What::Outs, 0),
        Code::Outsw_DX_m16 => (What::Outs, 1),
        Code::Outsd_DX_m32 => (What::Outs, 2),
        _ => return None,
    })
}

/// Whether this is one of the string instructions.
pub(crate) fn knows(insn: &Instruction) -> bool {
    kind_of(insn.code()).is_some()
}

/// Whether it does I/O, and so ends its block.
pub(crate) fn is_io(insn: &Instruction) -> bool {
    matches!(kind_of(insn.code()), Some((What::Ins | What::Outs, _)))
}

fn address_log2(insn: &Instruction) -> u32 {
    for i in 0..2 {
        match insn.op_kind(i) {
            OpKind::MemoryESDI | OpKind::MemorySegSI | OpKind::MemorySegDI => return 1,
            OpKind::MemoryESEDI | OpKind::MemorySegESI | OpKind::MemorySegEDI => return 2,
            _ => {}
        }
    }
    3
}

/// Executes the instruction. False: something else wants the CPU; the instruction is to be executed again for the rest.
pub(crate) fn run(cpu: &mut Cpu, insn: &Instruction) -> Result<bool, Fault> {
    let Some((what, log2)) = kind_of(insn.code()) else { return Err(Fault::UD) };
    let size = 1u64 << log2;
    let wide = address_log2(insn);
    let cut = mask(wide);
    let repeated = insn.has_rep_prefix() || insn.has_repne_prefix();
    let backward = cpu.rflags & fl::DF != 0;
    let step = if backward { size.wrapping_neg() } else { size };
    let source = data_segment(insn);
    let mut left = if repeated { cpu.gpr[RCX] & cut } else { 1 };
    if matches!(what, What::Ins | What::Outs) {
        crate::slow::check_port(cpu, cpu.gpr[RDX] as u16, size as u8)?;
        cpu.sync_clock();
    }
    let bulk = repeated
        && !backward
        && cpu.mode & mode::CODE == mode::CODE64
        && matches!(what, What::Movs | What::Stos);
    let mut turns = 0u32;
    while left != 0 {
        let (si, di) = (cpu.gpr[RSI] & cut, cpu.gpr[RDI] & cut);
        let done = if bulk { chunk(cpu, what, log2, source, si, di, left)? } else { 0 };
        let done = if done == 0 {
            let stop = one(cpu, what, log2, source, si, di, insn)?;
            if stop {
                left = 1;
            }
            1
        } else {
            done
        };
        let moved = step.wrapping_mul(done);
        if matches!(what, What::Movs | What::Lods | What::Cmps | What::Outs) {
            cpu.set_sized(RSI, wide, si.wrapping_add(moved));
        }
        if !matches!(what, What::Lods | What::Outs) {
            cpu.set_sized(RDI, wide, di.wrapping_add(moved));
        }
        if repeated {
            cpu.set_sized(RCX, wide, (cpu.gpr[RCX] & cut).wrapping_sub(done));
        }
        left -= done;
        turns += 1;
        if left != 0 && (done > 1 || turns & 63 == 0) && cpu.shared.event.load(Ordering::Relaxed) != 0 {
            return Ok(false);
        }
    }
    Ok(true)
}

/// One iteration. True: the repetition ends (REPE, REPNE).
fn one(
    cpu: &mut Cpu,
    what: What,
    log2: u32,
    source: usize,
    si: u64,
    di: u64,
    insn: &Instruction,
) -> Result<bool, Fault> {
    let size = 1u64 << log2;
    match what {
        What::Movs => {
            let from = cpu.segment_linear(source, si, size, false)?;
            let value = cpu.read_sized(from, log2)?;
            let to = cpu.segment_linear(ES, di, size, true)?;
            cpu.write_sized(to, log2, value)?;
        }
        What::Stos => {
            let to = cpu.segment_linear(ES, di, size, true)?;
            cpu.write_sized(to, log2, cpu.gpr[RAX])?;
        }
        What::Lods => {
            let from = cpu.segment_linear(source, si, size, false)?;
            let value = cpu.read_sized(from, log2)?;
            cpu.set_sized(RAX, log2, value);
        }
        What::Scas | What::Cmps => {
            // The second operand first: where both fault, that one is reported.
            let to = cpu.segment_linear(ES, di, size, false)?;
            let b = cpu.read_sized(to, log2)?;
            let a = if what == What::Cmps {
                let from = cpu.segment_linear(source, si, size, false)?;
                cpu.read_sized(from, log2)?
            } else {
                cpu.gpr[RAX]
            };
            cpu.lazy = binary(Alu::Sub, log2, a, b, false).1;
            let equal = cpu.lazy.zf();
            return Ok(insn.has_repne_prefix() && equal
                || !insn.has_repne_prefix() && insn.has_rep_prefix() && !equal);
        }
        What::Ins => {
            let to = cpu.segment_linear(ES, di, size, true)?;
            cpu.probe_write_as(to, size, cpu.cpl == 3)?;
            let value = cpu.vm.pio.read(cpu.gpr[RDX] & 0xffff, size as u8);
            cpu.write_sized(to, log2, value)?;
        }
        What::Outs => {
            let from = cpu.segment_linear(source, si, size, false)?;
            let value = cpu.read_sized(from, log2)?;
            cpu.vm.pio.write(cpu.gpr[RDX] & 0xffff, size as u8, value);
        }
    }
    Ok(false)
}

/// Many iterations of a forward MOVS or STOS in one page; how many were done, 0 where they are better done one by one.
fn chunk(
    cpu: &mut Cpu,
    what: What,
    log2: u32,
    source: usize,
    si: u64,
    di: u64,
    left: u64,
) -> Result<u64, Fault> {
    let size = 1u64 << log2;
    if left < 4 {
        return Ok(0);
    }
    let bytes = left.saturating_mul(size);
    let to = cpu.segment_linear(ES, di, size, true)?;
    if what == What::Stos {
        if 0x1000 - (to & 0xfff) < size {
            return Ok(0);
        }
        let (p, room) = cpu.run_of(to, bytes.min(0x1000 - (to & 0xfff)) & !(size - 1), Access::Write)?;
        if p.is_null() {
            return Ok(0);
        }
        let count = room >> log2;
        let value = cpu.gpr[RAX];
        // SAFETY: `run_of` vouches for `room` bytes.
        unsafe {
            if value == 0 {
                std::ptr::write_bytes(p, 0, room as usize);
            } else {
                by_size!(log2, T => for n in 0..count {
                    T::store(p.add((n << log2) as usize), T::from_u64(value));
                });
            }
        }
        cpu.settle();
        return Ok(count);
    }
    let from = cpu.segment_linear(source, si, size, false)?;
    let room = bytes.min(0x1000 - (to & 0xfff)).min(0x1000 - (from & 0xfff)) & !(size - 1);
    if room == 0 {
        return Ok(0);
    }
    let (s, _) = cpu.run_of(from, room, Access::Read)?;
    if s.is_null() {
        return Ok(0);
    }
    let (d, _) = cpu.run_of(to, room, Access::Write)?;
    if d.is_null() {
        return Ok(0);
    }
    let count = room >> log2;
    let ahead = d.addr().wrapping_sub(s.addr());
    // SAFETY: `run_of` vouches for `room` bytes at both ends.
    unsafe {
        if ahead >= room as usize || ahead == 0 {
            std::ptr::copy(s, d, room as usize);
        } else {
            // The destination overlaps what is still to be read: element by element, as the instruction is defined.
            by_size!(log2, T => for n in 0..count {
                let at = (n << log2) as usize;
                T::store(d.add(at), T::load(s.add(at)));
            });
        }
    }
    cpu.settle();
    Ok(count)
}
