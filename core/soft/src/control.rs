//! System instructions: control, debug and descriptor-table registers, mode switches, CPUID, MSRs, and the checks of selectors.
//!
//! [`execute`] is the way in for the interpreter. INIT and start-up interrupts end here as well.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};
use tenon_core::{Activity, CpuState, DescriptorTable};

use crate::cpu::{CS, Cpu, Fault, GS, RAX, RCX, RDX, cr0, cr4, efer, fl, vec};
pub(crate) use crate::msr::{Msrs, restore as set_state_msrs, save as state_msrs};
use crate::paging::PHYSICAL_BITS;
use crate::segment::{
    self, CODE, CODE_OR_DATA, CONFORMING, LONG, READ_WRITE, code_of, is_64, is_canonical, is_long,
    is_protected, rpl,
};
use crate::{cpuid, msr, syscall};

/// Executes a system instruction. RIP is past it, `start_rip` at it.
///
/// # Errors
/// The exception; nothing has changed.
pub(crate) fn execute(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Fault> {
    match insn.mnemonic() {
        Mnemonic::Mov => mov_special(cpu, insn),
        Mnemonic::Lgdt | Mnemonic::Lidt => load_table(cpu, insn),
        Mnemonic::Sgdt => store_table(cpu, insn, cpu.gdt),
        Mnemonic::Sidt => store_table(cpu, insn, cpu.idt),
        Mnemonic::Lldt => load_ldt(cpu, insn),
        Mnemonic::Ltr => load_tr(cpu, insn),
        Mnemonic::Sldt => only_protected(cpu).and_then(|()| store16(cpu, insn, cpu.ldt.selector.into())),
        Mnemonic::Str => only_protected(cpu).and_then(|()| store16(cpu, insn, cpu.tr.selector.into())),
        Mnemonic::Smsw => store16(cpu, insn, cpu.cr0),
        Mnemonic::Lmsw => {
            privileged(cpu)?;
            let value = u64::from(cpu.operand16(insn, 0)?) & 0xf;
            // It can set PE and not clear it.
            write_cr0(cpu, cpu.cr0 & !0xe | value)
        }
        Mnemonic::Clts => {
            privileged(cpu)?;
            cpu.cr0 &= !cr0::TS;
            cpu.update_mode();
            Ok(())
        }
        Mnemonic::Invlpg => {
            privileged(cpu)?;
            // An address that could not be accessed has no translation either.
            if let Ok(linear) = cpu.operand_linear(insn, 1, false) {
                cpu.flush_page(linear);
            }
            Ok(())
        }
        Mnemonic::Invd | Mnemonic::Wbinvd => privileged(cpu),
        Mnemonic::Cpuid => {
            let [eax, ebx, ecx, edx] = cpuid::leaf(cpu, low(cpu.gpr[RAX]), low(cpu.gpr[RCX]));
            for (register, value) in [(RAX, eax), (crate::cpu::RBX, ebx), (RCX, ecx), (RDX, edx)] {
                cpu.gpr[register] = value.into();
            }
            Ok(())
        }
        Mnemonic::Rdmsr => {
            privileged(cpu)?;
            let value = msr::read(cpu, low(cpu.gpr[RCX]))?;
            set_pair(cpu, value);
            Ok(())
        }
        Mnemonic::Wrmsr => {
            privileged(cpu)?;
            let value = cpu.gpr[RDX] << 32 | u64::from(low(cpu.gpr[RAX]));
            msr::write(cpu, low(cpu.gpr[RCX]), value)
        }
        Mnemonic::Rdtsc => {
            if cpu.cr4 & cr4::TSD != 0 && cpu.cpl != 0 {
                return Err(Fault::gp(0));
            }
            let value = msr::tsc(cpu);
            set_pair(cpu, value);
            Ok(())
        }
        // There are no performance counters.
        Mnemonic::Rdpmc => Err(Fault::gp(0)),
        Mnemonic::Lar | Mnemonic::Lsl => lar_lsl(cpu, insn),
        Mnemonic::Verr | Mnemonic::Verw => verify(cpu, insn),
        Mnemonic::Arpl => adjust_rpl(cpu, insn),
        Mnemonic::Swapgs => {
            if !is_64(cpu) {
                return Err(Fault::UD);
            }
            privileged(cpu)?;
            std::mem::swap(&mut cpu.seg[GS].base, &mut cpu.msrs.kernel_gs_base);
            Ok(())
        }
        Mnemonic::Syscall => syscall::syscall(cpu),
        Mnemonic::Sysret => syscall::sysret(cpu, 4),
        Mnemonic::Sysretq => syscall::sysret(cpu, 8),
        Mnemonic::Sysenter => syscall::sysenter(cpu),
        Mnemonic::Sysexit => syscall::sysexit(cpu, 4),
        Mnemonic::Sysexitq => syscall::sysexit(cpu, 8),
        // RDTSCP, MONITOR, MWAIT, XSETBV, XGETBV, VMCALL and whatever else CPUID does not show.
        _ => Err(Fault::UD),
    }
}

#[allow(clippy::cast_possible_truncation, reason = "the low half is meant")]
fn low(value: u64) -> u32 {
    value as u32
}

#[allow(clippy::cast_possible_truncation, reason = "the low word is meant")]
fn word(value: u64) -> u16 {
    value as u16
}

/// Puts a value into EDX:EAX.
fn set_pair(cpu: &mut Cpu, value: u64) {
    cpu.gpr[RAX] = value & 0xffff_ffff;
    cpu.gpr[RDX] = value >> 32;
}

fn privileged(cpu: &Cpu) -> Result<(), Fault> {
    if cpu.cpl == 0 { Ok(()) } else { Err(Fault::gp(0)) }
}

fn only_protected(cpu: &Cpu) -> Result<(), Fault> {
    if is_protected(cpu) { Ok(()) } else { Err(Fault::UD) }
}

/// Stores a word to memory, or to a register at its own width.
fn store16(cpu: &mut Cpu, insn: &Instruction, value: u64) -> Result<(), Fault> {
    if insn.op0_kind() == OpKind::Register {
        cpu.set_reg(insn.op0_register(), value);
        Ok(())
    } else {
        let address = cpu.operand_linear(insn, 2, true)?;
        cpu.write::<u16>(address, word(value))
    }
}

/// MOV to and from control and debug registers.
fn mov_special(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Fault> {
    let (to, from) = (insn.op0_register(), insn.op1_register());
    let writes = to.is_cr() || to.is_dr();
    let special = if writes { to } else { from };
    let general = if writes { from } else { to };
    let number = special.number();
    if special.is_cr() && !matches!(number, 0 | 2 | 3 | 4 | 8) {
        return Err(Fault::UD);
    }
    if special.is_tr() {
        return Err(Fault::UD);
    }
    privileged(cpu)?;
    if special.is_dr() {
        return mov_debug(cpu, number, general, writes);
    }
    if writes {
        let value = cpu.reg(general);
        match number {
            0 => write_cr0(cpu, value),
            2 => {
                cpu.cr2 = value;
                Ok(())
            }
            3 => write_cr3(cpu, value),
            4 => write_cr4(cpu, value),
            _ => {
                if value > 15 {
                    return Err(Fault::gp(0));
                }
                cpu.lapic.set_cr8(value);
                cpu.recheck = true;
                Ok(())
            }
        }
    } else {
        let value = match number {
            0 => cpu.cr0,
            2 => cpu.cr2,
            3 => cpu.cr3,
            4 => cpu.cr4,
            _ => cpu.lapic.cr8(),
        };
        cpu.set_reg(general, value);
        Ok(())
    }
}

/// MOV to and from debug registers. Breakpoints can be set and do nothing.
fn mov_debug(cpu: &mut Cpu, number: usize, general: Register, writes: bool) -> Result<(), Fault> {
    const GENERAL_DETECT: u64 = 1 << 13;
    const DETECTED: u64 = 1 << 13;
    if matches!(number, 4 | 5) && cpu.cr4 & cr4::DE != 0 || number > 7 {
        return Err(Fault::UD);
    }
    if cpu.debug[5] & GENERAL_DETECT != 0 {
        cpu.debug[4] |= DETECTED;
        return Err(Fault::plain(vec::DB));
    }
    let index = if number < 4 { number } else { 4 + number % 2 };
    if !writes {
        cpu.set_reg(general, cpu.debug[index]);
        return Ok(());
    }
    let value = cpu.reg(general);
    cpu.debug[index] = match index {
        4 | 5 if value >> 32 != 0 => return Err(Fault::gp(0)),
        4 => value & 0xe00f | 0xffff_0ff0,
        5 => value & 0xffff_2bff | 0x400,
        _ => value,
    };
    Ok(())
}

fn write_cr0(cpu: &mut Cpu, value: u64) -> Result<(), Fault> {
    use cr0::{AM, CD, EM, ET, MP, NE, NW, PE, PG, TS, WP};
    const KNOWN: u64 = PE | MP | EM | TS | ET | NE | WP | AM | NW | CD | PG;
    if value >> 32 != 0 || value & PG != 0 && value & PE == 0 || value & NW != 0 && value & CD == 0 {
        return Err(Fault::gp(0));
    }
    let value = value & KNOWN | ET;
    let changed = cpu.cr0 ^ value;
    let mut new_efer = cpu.efer;
    if changed & PG != 0 {
        let code64 = cpu.seg[CS].rights & LONG != 0;
        if value & PG == 0 {
            if is_long(cpu) && code64 {
                return Err(Fault::gp(0));
            }
            new_efer &= !efer::LMA;
        } else if cpu.efer & efer::LME != 0 {
            if cpu.cr4 & cr4::PAE == 0 || code64 {
                return Err(Fault::gp(0));
            }
            new_efer |= efer::LMA;
        }
    }
    cpu.cr0 = value;
    cpu.efer = new_efer;
    if changed & (PG | WP | PE) != 0 {
        cpu.flush_tlb();
    }
    cpu.update_mode();
    Ok(())
}

fn write_cr3(cpu: &mut Cpu, value: u64) -> Result<(), Fault> {
    if value >> PHYSICAL_BITS != 0 {
        return Err(Fault::gp(0));
    }
    cpu.cr3 = value;
    cpu.flush_tlb_non_global();
    Ok(())
}

fn write_cr4(cpu: &mut Cpu, value: u64) -> Result<(), Fault> {
    if value & !cpuid::CR4_ALLOWED != 0 || is_long(cpu) && value & cr4::PAE == 0 {
        return Err(Fault::gp(0));
    }
    let changed = cpu.cr4 ^ value;
    cpu.cr4 = value;
    if changed & (cr4::PSE | cr4::PAE | cr4::PGE) != 0 {
        cpu.flush_tlb();
    }
    cpu.update_mode();
    Ok(())
}

/// LGDT and LIDT.
fn load_table(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Fault> {
    privileged(cpu)?;
    let long = is_64(cpu);
    let address = cpu.operand_linear(insn, if long { 10 } else { 6 }, false)?;
    let limit = cpu.read::<u16>(address)?;
    let base = if long { cpu.read::<u64>(address + 2)? } else { cpu.read::<u32>(address + 2)?.into() };
    let base = match insn.code() {
        // A 16-bit operand has a base of 24 bits.
        Code::Lgdt_m1632_16 | Code::Lidt_m1632_16 => base & 0xff_ffff,
        _ if !is_canonical(base) => return Err(Fault::gp(0)),
        _ => base,
    };
    let table = DescriptorTable { base, limit };
    if insn.mnemonic() == Mnemonic::Lgdt {
        cpu.gdt = table;
    } else {
        cpu.idt = table;
    }
    Ok(())
}

/// SGDT and SIDT.
fn store_table(cpu: &mut Cpu, insn: &Instruction, table: DescriptorTable) -> Result<(), Fault> {
    let long = is_64(cpu);
    let size = if long { 10 } else { 6 };
    let address = cpu.operand_linear(insn, size, true)?;
    cpu.probe_write_as(address, size, cpu.cpl == 3)?;
    cpu.write::<u16>(address, table.limit)?;
    if long {
        cpu.write::<u64>(address + 2, table.base)
    } else {
        cpu.write::<u32>(address + 2, low(table.base))
    }
}

/// Reads a system descriptor for LLDT or LTR: in long mode it is 16 bytes long.
fn system_segment(cpu: &mut Cpu, selector: u16) -> Result<(segment::Descriptor, tenon_core::Segment), Fault> {
    if selector & 4 != 0 {
        return Err(Fault::gp(code_of(selector)));
    }
    let found = segment::descriptor(cpu, selector, vec::GP)?;
    let mut segment = found.segment(selector);
    if is_long(cpu) {
        if u32::from(selector & 0xfff8) + 15 > u32::from(cpu.gdt.limit) {
            return Err(Fault::gp(code_of(selector)));
        }
        let upper = cpu.read_sys::<u64>(found.address + 8)?;
        segment.base |= upper << 32;
        if !is_canonical(segment.base) {
            return Err(Fault::gp(code_of(selector)));
        }
    }
    Ok((found, segment))
}

fn load_ldt(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Fault> {
    only_protected(cpu)?;
    privileged(cpu)?;
    let selector = cpu.operand16(insn, 0)?;
    if selector & 0xfffc == 0 {
        cpu.ldt = segment::null(selector);
        return Ok(());
    }
    let (found, segment) = system_segment(cpu, selector)?;
    if found.rights() & 0x1f != 2 {
        return Err(Fault::gp(code_of(selector)));
    }
    if !found.is_present() {
        return Err(Fault::with_code(vec::NP, code_of(selector)));
    }
    cpu.ldt = segment;
    Ok(())
}

fn load_tr(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Fault> {
    /// The bit that makes an available TSS a busy one.
    const BUSY: u16 = 2;
    only_protected(cpu)?;
    privileged(cpu)?;
    let selector = cpu.operand16(insn, 0)?;
    if selector & 0xfffc == 0 {
        return Err(Fault::gp(0));
    }
    let (found, mut segment) = system_segment(cpu, selector)?;
    let kind = found.rights() & 0x1f;
    if kind != 9 && (kind != 1 || is_long(cpu)) {
        return Err(Fault::gp(code_of(selector)));
    }
    if !found.is_present() {
        return Err(Fault::with_code(vec::NP, code_of(selector)));
    }
    segment.rights |= BUSY;
    let [rights, _] = segment.rights.to_le_bytes();
    cpu.write_sys::<u8>(found.address + 5, rights)?;
    cpu.tr = segment;
    Ok(())
}

/// Whether LAR (or LSL) shows a system descriptor of this type.
fn shown(kind: u16, long: bool, lar: bool) -> bool {
    match kind {
        // LDT, and 32- or 64-bit TSS.
        2 | 9 | 11 => true,
        // 16-bit TSS.
        1 | 3 => !long,
        // Call gates.
        12 => lar,
        4 => lar && !long,
        // Task gate.
        5 => lar && !long,
        _ => false,
    }
}

fn lar_lsl(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Fault> {
    only_protected(cpu)?;
    let selector = cpu.operand16(insn, 1)?;
    let lar = insn.mnemonic() == Mnemonic::Lar;
    let found = segment::look_up(cpu, selector)?.filter(|found| {
        let rights = found.rights();
        let conforming = rights & (CODE_OR_DATA | CODE | CONFORMING) == CODE_OR_DATA | CODE | CONFORMING;
        let visible = conforming || found.dpl() >= cpu.cpl.max(rpl(selector));
        visible && (rights & CODE_OR_DATA != 0 || shown(rights & 0xf, is_long(cpu), lar))
    });
    if let Some(found) = found {
        let value = if lar { found.raw >> 32 & 0x00ff_ff00 } else { found.segment(selector).limit.into() };
        cpu.set_reg(insn.op0_register(), value);
    }
    set_zf(cpu, found.is_some());
    Ok(())
}

fn set_zf(cpu: &mut Cpu, on: bool) {
    let flags = cpu.flags() & !fl::ZF;
    cpu.set_flags(if on { flags | fl::ZF } else { flags });
}

/// VERR and VERW.
fn verify(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Fault> {
    only_protected(cpu)?;
    let selector = cpu.operand16(insn, 0)?;
    let write = insn.mnemonic() == Mnemonic::Verw;
    let good = segment::look_up(cpu, selector)?.is_some_and(|found| {
        let rights = found.rights();
        let level = cpu.cpl.max(rpl(selector));
        let free = rights & (CODE | CONFORMING) == CODE | CONFORMING;
        rights & CODE_OR_DATA != 0
            && (found.dpl() >= level || free && !write)
            && if write {
                rights & (CODE | READ_WRITE) == READ_WRITE
            } else {
                rights & CODE == 0 || rights & READ_WRITE != 0
            }
    });
    set_zf(cpu, good);
    Ok(())
}

fn adjust_rpl(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Fault> {
    only_protected(cpu)?;
    if is_64(cpu) {
        return Err(Fault::UD);
    }
    let (to, from) = (cpu.operand16(insn, 0)?, word(cpu.reg(insn.op1_register())));
    let lower = rpl(to) < rpl(from);
    if lower {
        let adjusted = to & !3 | from & 3;
        if insn.op0_kind() == OpKind::Register {
            // The upper half of a 32-bit register stays.
            let register = insn.op0_register().full_register();
            let old = cpu.reg(register);
            cpu.set_reg(register, old & !0xffff | u64::from(adjusted));
        } else {
            let address = cpu.operand_linear(insn, 2, true)?;
            cpu.write::<u16>(address, adjusted)?;
        }
    }
    set_zf(cpu, lower);
    Ok(())
}

/// The state after INIT (SDM table 10-1): as after a reset, but the caches' bits, the x87 and SSE registers, the TSC and other MSRs stay.
/// The bootstrap processor starts anew; the others wait for a start-up interrupt.
pub(crate) fn init(cpu: &mut Cpu) {
    let state = CpuState::after_reset();
    cpu.gpr[..16].copy_from_slice(&state.general);
    cpu.set_flags(state.rflags);
    cpu.set_rip(state.rip);
    cpu.seg = state.segments;
    (cpu.tr, cpu.ldt, cpu.gdt, cpu.idt) = (state.tr, state.ldt, state.gdt, state.idt);
    cpu.cr0 = cpu.cr0 & (cr0::CD | cr0::NW) | cr0::ET;
    (cpu.cr2, cpu.cr3, cpu.cr4, cpu.efer) = (0, 0, 0, 0);
    cpu.debug = state.debug;
    cpu.cpl = 0;
    cpu.shadow = false;
    cpu.nmi_masked = false;
    let is_bootstrap = cpu.lapic.base() & crate::apic::BASE_BSP != 0;
    cpu.activity = if is_bootstrap { Activity::Running } else { Activity::WaitForSipi };
    cpu.flush_tlb();
    cpu.update_mode();
}

/// A start-up interrupt: runs in real mode from `page` times 4 KiB.
pub(crate) fn start_up(cpu: &mut Cpu, page: u8) {
    cpu.seg[CS].selector = u16::from(page) << 8;
    cpu.seg[CS].base = u64::from(page) << 12;
    cpu.set_rip(0);
    cpu.activity = Activity::Running;
    cpu.update_mode();
}
