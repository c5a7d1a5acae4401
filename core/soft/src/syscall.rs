//! SYSCALL, SYSRET, SYSENTER and SYSEXIT: transfers between ring 3 and ring 0 with flat segments.
#![allow(clippy::cast_possible_truncation, reason = "selectors are cut out of model-specific registers")]

use tenon_core::Segment;

use crate::cpu::{Cpu, Fault, RCX, RDX, RSP, SS, efer, fl};
use crate::exception;
use crate::exec::ENTERED;
use crate::segment::{self, is_64, is_canonical, is_long, is_protected};

/// Flat code: 64-bit, or 32-bit.
fn code(selector: u16, long: bool, cpl: u8) -> Segment {
    let rights = (if long { 0xa09b } else { 0xc09b }) | u16::from(cpl) << 5;
    Segment { selector, base: 0, limit: u32::MAX, rights }
}

/// Flat data.
fn data(selector: u16, cpl: u8) -> Segment {
    Segment { selector, base: 0, limit: u32::MAX, rights: 0xc093 | u16::from(cpl) << 5 }
}

fn enter(cpu: &mut Cpu, cs: Segment, ss: Segment, cpl: u8, rip: u64) {
    cpu.seg[SS] = ss;
    segment::enter(cpu, cs, cpl, rip);
    cpu.recheck = true;
}

/// SYSCALL.
///
/// # Errors
/// #UD where it is off.
pub(crate) fn syscall(cpu: &mut Cpu) -> Result<(), Fault> {
    if cpu.efer & efer::SCE == 0 || !is_protected(cpu) {
        return Err(Fault::UD);
    }
    let flags = cpu.flags();
    let selector = (cpu.msrs.star >> 32) as u16 & 0xfffc;
    let long = is_long(cpu);
    let rip = if !long {
        cpu.gpr[RCX] = cpu.rip() & 0xffff_ffff;
        cpu.set_flags(flags & !(fl::IF | fl::VM | fl::RF));
        cpu.msrs.star & 0xffff_ffff
    } else {
        let target = if is_64(cpu) { cpu.msrs.lstar } else { cpu.msrs.cstar };
        cpu.gpr[RCX] = cpu.rip();
        cpu.gpr[11] = flags & !fl::RF;
        cpu.set_flags(flags & !cpu.msrs.sfmask & !fl::RF | 2);
        target
    };
    enter(cpu, code(selector, long, 0), data(selector + 8, 0), 0, rip);
    // Masking TF masks the trap after this instruction too.
    if flags & fl::TF != 0 && cpu.rflags & fl::TF == 0 {
        cpu.exit = ENTERED;
    }
    Ok(())
}

/// SYSRET. `size` 8 returns to 64-bit code.
///
/// # Errors
/// #UD where it is off; #GP outside ring 0, or for a target that is not canonical.
pub(crate) fn sysret(cpu: &mut Cpu, size: u8) -> Result<(), Fault> {
    if cpu.efer & efer::SCE == 0 || !is_protected(cpu) {
        return Err(Fault::UD);
    }
    let (rcx, long) = (cpu.gpr[RCX], is_long(cpu) && size == 8);
    if cpu.cpl != 0 || long && !is_canonical(rcx) {
        return Err(Fault::gp(0));
    }
    let base = (cpu.msrs.star >> 48) as u16;
    if is_long(cpu) {
        let flags = cpu.gpr[11] & 0x3c_7fd7 & !fl::RF | 2;
        cpu.set_flags(flags);
    } else {
        cpu.set_flags(cpu.flags() | fl::IF);
    }
    let selector = if long { base.wrapping_add(16) | 3 } else { base | 3 };
    let rip = if long { rcx } else { rcx & 0xffff_ffff };
    enter(cpu, code(selector, long, 3), data(base.wrapping_add(8) | 3, 3), 3, rip);
    // If TF is set now, the trap comes at once, as if SYSCALL had just completed.
    cpu.exit = ENTERED;
    if cpu.rflags & fl::TF != 0 { exception::single_step(cpu) } else { Ok(()) }
}

/// SYSENTER.
///
/// # Errors
/// #GP where it is not set up.
pub(crate) fn sysenter(cpu: &mut Cpu) -> Result<(), Fault> {
    let selector = cpu.msrs.sysenter_cs as u16 & 0xfffc;
    if !is_protected(cpu) || selector == 0 {
        return Err(Fault::gp(0));
    }
    let long = is_long(cpu);
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    cpu.set_flags(cpu.flags() & !(fl::IF | fl::VM | fl::RF));
    cpu.gpr[RSP] = cpu.msrs.sysenter_esp & mask;
    let rip = cpu.msrs.sysenter_eip & mask;
    enter(cpu, code(selector, long, 0), data(selector + 8, 0), 0, rip);
    Ok(())
}

/// SYSEXIT. `size` 8 returns to 64-bit code.
///
/// # Errors
/// #GP where it is not set up, outside ring 0, or for a target that is not canonical.
pub(crate) fn sysexit(cpu: &mut Cpu, size: u8) -> Result<(), Fault> {
    let selector = cpu.msrs.sysenter_cs as u16 & 0xfffc;
    let long = is_long(cpu) && size == 8;
    let (rip, rsp) = (cpu.gpr[RDX], cpu.gpr[RCX]);
    if !is_protected(cpu)
        || selector == 0
        || cpu.cpl != 0
        || long && !(is_canonical(rip) && is_canonical(rsp))
    {
        return Err(Fault::gp(0));
    }
    let base = selector.wrapping_add(if long { 32 } else { 16 });
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    cpu.gpr[RSP] = rsp & mask;
    enter(cpu, code(base | 3, long, 3), data(base.wrapping_add(8) | 3, 3), 3, rip & mask);
    Ok(())
}
