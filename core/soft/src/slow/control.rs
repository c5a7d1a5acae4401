//! Instructions that end a block: branches, I/O, and what changes the CPU's mode or privilege.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::condition_of;
use crate::cpu::{Cpu, Fault, RAX, RCX, RDX, SS, cr0, fl};
use crate::exec::{ATTEND, YIELD};
use crate::operand::{mask, segment_index, size_of_operand};
use crate::{control, exception, segment, syscall};

/// The size of a return address or far operand, from the instruction's form.
fn size_by_stack(insn: &Instruction) -> u64 {
    insn.stack_pointer_increment().unsigned_abs().into()
}

/// Executes an instruction that ends its block. RIP is past it; [`Cpu::exit`] may be raised to [`ATTEND`].
pub(crate) fn execute_last(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Fault> {
    use Mnemonic as M;
    match insn.mnemonic() {
        M::Jmp
            if insn.op0_kind() == OpKind::FarBranch16
                || insn.op0_kind() == OpKind::FarBranch32
                || insn.code().is_jmp_far_indirect() =>
        {
            cpu.exit = ATTEND;
            let (selector, offset, size) = far_target(cpu, insn)?;
            segment::far_jump(cpu, selector, offset, size)
        }
        M::Call
            if insn.op0_kind() == OpKind::FarBranch16
                || insn.op0_kind() == OpKind::FarBranch32
                || insn.code().is_call_far_indirect() =>
        {
            cpu.exit = ATTEND;
            let (selector, offset, size) = far_target(cpu, insn)?;
            segment::far_call(cpu, selector, offset, size)
        }
        M::Jmp => {
            let target = near_target(cpu, insn)?;
            cpu.jump(target)
        }
        M::Call => {
            let size = size_by_stack(insn);
            let target = near_target(cpu, insn)?;
            let next = cpu.rip();
            cpu.jump(target)?;
            cpu.push(size, next)
        }
        M::Ret => {
            let size = match insn.code() {
                Code::Retnw | Code::Retnw_imm16 => 2,
                Code::Retnd | Code::Retnd_imm16 => 4,
                _ => 8,
            };
            let release = if insn.op_count() == 1 { u64::from(insn.immediate16()) } else { 0 };
            let target = cpu.peek(size, 0)?;
            cpu.jump(target)?;
            cpu.set_sp(cpu.gpr[crate::cpu::RSP].wrapping_add(size + release));
            Ok(())
        }
        M::Retf => {
            cpu.exit = ATTEND;
            let size = match insn.code() {
                Code::Retfw | Code::Retfw_imm16 => 2,
                Code::Retfd | Code::Retfd_imm16 => 4,
                _ => 8,
            };
            let release = if insn.op_count() == 1 { insn.immediate16() } else { 0 };
            segment::far_return(cpu, size, release)
        }
        M::Jcxz | M::Jecxz | M::Jrcxz | M::Loop | M::Loope | M::Loopne => counted(cpu, insn),
        M::In | M::Out => port(cpu, insn),
        M::Mov => {
            cpu.exit = ATTEND;
            if let (OpKind::Register, true) = (insn.op0_kind(), insn.op0_register().is_segment_register()) {
                let selector = cpu.operand16(insn, 1)?;
                return load_segment(cpu, segment_index(insn.op0_register()), selector);
            }
            control::execute(cpu, insn)
        }
        M::Pop => {
            cpu.exit = ATTEND;
            let size = size_by_stack(insn);
            let selector = cpu.peek(size, 0)?.to_le_bytes();
            load_segment(
                cpu,
                segment_index(insn.op0_register()),
                u16::from_le_bytes([selector[0], selector[1]]),
            )?;
            cpu.set_sp(cpu.gpr[crate::cpu::RSP].wrapping_add(size));
            Ok(())
        }
        M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss => {
            cpu.exit = ATTEND;
            let log2 = insn.op0_register().size().ilog2();
            let linear = cpu.operand_linear(insn, (1 << log2) + 2, false)?;
            let offset = cpu.read_sized(linear, log2)?;
            let selector = cpu.read::<u16>(linear.wrapping_add(1 << log2))?;
            let which = match insn.mnemonic() {
                M::Lds => crate::cpu::DS,
                M::Les => crate::cpu::ES,
                M::Lfs => crate::cpu::FS,
                M::Lgs => crate::cpu::GS,
                _ => SS,
            };
            segment::load(cpu, which, selector)?;
            cpu.set_reg(insn.op0_register(), offset);
            Ok(())
        }
        M::Popf | M::Popfd | M::Popfq => {
            cpu.exit = ATTEND;
            pop_flags(cpu, size_by_stack(insn))
        }
        M::Cli | M::Sti => {
            let iopl = cpu.rflags >> 12 & 3;
            if u64::from(cpu.cpl) > iopl || cpu.rflags & fl::VM != 0 && iopl < 3 {
                return Err(Fault::gp(0));
            }
            if insn.mnemonic() == M::Cli {
                cpu.rflags &= !fl::IF;
            } else if cpu.rflags & fl::IF == 0 {
                cpu.rflags |= fl::IF;
                cpu.shadow = true;
                cpu.exit = ATTEND;
            }
            Ok(())
        }
        M::Hlt => {
            if cpu.cpl != 0 {
                return Err(Fault::gp(0));
            }
            cpu.exit = ATTEND;
            cpu.activity = tenon_core::Activity::Halted;
            Ok(())
        }
        M::Pause => {
            cpu.exit = YIELD;
            Ok(())
        }
        M::Int => {
            cpu.exit = ATTEND;
            let vector = insn.immediate8();
            exception::software_interrupt(cpu, vector)
        }
        M::Int3 => {
            cpu.exit = ATTEND;
            exception::breakpoint(cpu)
        }
        M::Int1 => {
            cpu.exit = ATTEND;
            exception::icebp(cpu)
        }
        M::Into => {
            cpu.exit = ATTEND;
            if cpu.lazy.of() { exception::overflow(cpu) } else { Ok(()) }
        }
        M::Iret | M::Iretd | M::Iretq => {
            cpu.exit = ATTEND;
            let size = match insn.code() {
                Code::Iretw => 2,
                Code::Iretd => 4,
                _ => 8,
            };
            exception::iret(cpu, size)
        }
        M::Syscall => {
            cpu.exit = ATTEND;
            syscall::syscall(cpu)
        }
        M::Sysret | M::Sysretq => {
            cpu.exit = ATTEND;
            syscall::sysret(cpu, if insn.code() == Code::Sysretq { 8 } else { 4 })
        }
        M::Sysenter => {
            cpu.exit = ATTEND;
            syscall::sysenter(cpu)
        }
        M::Sysexit | M::Sysexitq => {
            cpu.exit = ATTEND;
            syscall::sysexit(cpu, if insn.code() == Code::Sysexitq { 8 } else { 4 })
        }
        M::Ud0 | M::Ud1 | M::Ud2 | M::INVALID => Err(Fault::UD),
        _ => {
            if insn.code().is_jcc_short_or_near()
                && let Some(condition) = condition_of(insn)
            {
                if cpu.lazy.condition(condition) {
                    let target = cpu.branch_target(insn);
                    return cpu.jump(target);
                }
                return Ok(());
            }
            cpu.exit = ATTEND;
            cpu.sync_clock();
            control::execute(cpu, insn)
        }
    }
}

fn near_target(cpu: &mut Cpu, insn: &Instruction) -> Result<u64, Fault> {
    match insn.op0_kind() {
        OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => Ok(cpu.branch_target(insn)),
        _ => cpu.get(insn, 0),
    }
}

fn far_target(cpu: &mut Cpu, insn: &Instruction) -> Result<(u16, u64, u8), Fault> {
    match insn.op0_kind() {
        OpKind::FarBranch16 => Ok((insn.far_branch_selector(), insn.far_branch16().into(), 2)),
        OpKind::FarBranch32 => Ok((insn.far_branch_selector(), insn.far_branch32().into(), 4)),
        _ => {
            let size = match insn.code() {
                Code::Jmp_m1616 | Code::Call_m1616 => 2u8,
                Code::Jmp_m1632 | Code::Call_m1632 => 4,
                _ => 8,
            };
            let linear = cpu.operand_linear(insn, u64::from(size) + 2, false)?;
            let offset = cpu.read_sized(linear, size.ilog2())?;
            let selector = cpu.read::<u16>(linear.wrapping_add(size.into()))?;
            Ok((selector, offset, size))
        }
    }
}

fn load_segment(cpu: &mut Cpu, which: usize, selector: u16) -> Result<(), Fault> {
    segment::load(cpu, which, selector)?;
    if which == SS {
        cpu.shadow = true;
    }
    Ok(())
}

fn counted(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Fault> {
    use Mnemonic as M;
    let code = insn.code();
    let log2 = match code {
        Code::Jcxz_rel8_16 | Code::Jcxz_rel8_32 => 1,
        Code::Jecxz_rel8_16 | Code::Jecxz_rel8_32 | Code::Jecxz_rel8_64 => 2,
        Code::Jrcxz_rel8_16 | Code::Jrcxz_rel8_64 => 3,
        Code::Loop_rel8_16_CX | Code::Loop_rel8_32_CX | Code::Loope_rel8_16_CX | Code::Loope_rel8_32_CX => 1,
        Code::Loopne_rel8_16_CX | Code::Loopne_rel8_32_CX => 1,
        Code::Loop_rel8_16_ECX | Code::Loop_rel8_32_ECX | Code::Loop_rel8_64_ECX => 2,
        Code::Loope_rel8_16_ECX | Code::Loope_rel8_32_ECX | Code::Loope_rel8_64_ECX => 2,
        Code::Loopne_rel8_16_ECX | Code::Loopne_rel8_32_ECX | Code::Loopne_rel8_64_ECX => 2,
        _ => 3,
    };
    let mut count = cpu.gpr[RCX] & mask(log2);
    let taken = match insn.mnemonic() {
        M::Jcxz | M::Jecxz | M::Jrcxz => count == 0,
        mnemonic => {
            count = count.wrapping_sub(1) & mask(log2);
            count != 0
                && match mnemonic {
                    M::Loope => cpu.lazy.zf(),
                    M::Loopne => !cpu.lazy.zf(),
                    _ => true,
                }
        }
    };
    if taken {
        let target = cpu.branch_target(insn);
        cpu.jump(target)?;
    }
    if matches!(insn.mnemonic(), M::Loop | M::Loope | M::Loopne) {
        cpu.set_sized(RCX, log2, count);
    }
    Ok(())
}

fn pop_flags(cpu: &mut Cpu, size: u64) -> Result<(), Fault> {
    let iopl = cpu.rflags >> 12 & 3;
    let protected = cpu.cr0 & cr0::PE != 0;
    if cpu.rflags & fl::VM != 0 && iopl < 3 {
        return Err(Fault::gp(0));
    }
    let value = cpu.pop(size)?;
    let mut may = fl::ARITH | fl::TF | fl::DF | fl::NT | fl::AC | fl::ID;
    if !protected || cpu.cpl == 0 {
        may |= fl::IOPL;
    }
    if !protected || u64::from(cpu.cpl) <= iopl {
        may |= fl::IF;
    }
    if size == 2 {
        may &= 0xffff;
    }
    let flags = cpu.flags() & !may & !fl::RF | value & may;
    cpu.set_flags(flags);
    Ok(())
}

/// Checks the right to a port: privilege against IOPL, else the task's bitmap.
pub(crate) fn check_port(cpu: &mut Cpu, port: u16, size: u8) -> Result<(), Fault> {
    let protected = cpu.cr0 & cr0::PE != 0;
    if protected && (u64::from(cpu.cpl) > cpu.rflags >> 12 & 3 || cpu.rflags & fl::VM != 0) {
        return exception::io_allowed(cpu, port, size);
    }
    Ok(())
}

fn port(cpu: &mut Cpu, insn: &Instruction) -> Result<(), Fault> {
    let input = insn.mnemonic() == Mnemonic::In;
    let (data, number) = if input { (0, 1) } else { (1, 0) };
    let log2 = size_of_operand(insn, data);
    let port = if insn.op_kind(number) == OpKind::Register {
        let bytes = cpu.gpr[RDX].to_le_bytes();
        u16::from_le_bytes([bytes[0], bytes[1]])
    } else {
        insn.immediate8().into()
    };
    let size = 1u8 << log2;
    check_port(cpu, port, size)?;
    cpu.exit = ATTEND;
    cpu.sync_clock();
    if input {
        let value = cpu.vm.pio.read(port.into(), size);
        cpu.set_sized(RAX, log2, value);
    } else {
        let value = cpu.gpr[RAX] & mask(log2);
        cpu.vm.pio.write(port.into(), size, value);
    }
    Ok(())
}
