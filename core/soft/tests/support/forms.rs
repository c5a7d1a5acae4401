//! Which instruction forms are compared, and what of them is undefined.

use iced_x86::{Code, CpuidFeature, Instruction, Mnemonic, OpKind};

/// The instruction forms that ring 3 can execute in 64- or 32-bit code, and the engine's CPU shows.
pub fn forms(bits: u32) -> Vec<Code> {
    Code::values().filter(|&code| usable(code, bits)).collect()
}

fn usable(code: Code, bits: u32) -> bool {
    use CpuidFeature as F;
    use Mnemonic as M;
    let form = code.op_code();
    if !form.is_instruction()
        || !(if bits == 64 { form.mode64() } else { form.mode32() })
        || form.encoding() != iced_x86::EncodingKind::Legacy
    {
        return false;
    }
    let shown = code.cpuid_features().iter().all(|feature| {
        matches!(
            feature,
            F::INTEL8086
                | F::INTEL186
                | F::INTEL286
                | F::INTEL386
                | F::INTEL486
                | F::X64
                | F::FPU
                | F::FPU287
                | F::FPU387
                | F::CMOV
                | F::MMX
                | F::SSE
                | F::SSE2
                | F::FXSR
                | F::CX8
                | F::CLFSH
                | F::MULTIBYTENOP
                | F::PAUSE
                | F::PREFETCHW
                | F::MSR
                | F::CET_IBT
        )
    });
    shown
        && !form.fwait() // Two instructions.
        && !matches!(
            code.mnemonic(),
            // The host's kernel answers these, or they show the host's own tables.
            M::Int | M::Int1 | M::Int3 | M::Syscall | M::Sysenter | M::Sysexit | M::Sysret
                | M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw | M::Lar | M::Lsl | M::Verr | M::Verw
                    // Without a ModRM byte on AMD.
                | M::Ud0
                // 0F 0D with a register: a NOP of Intel's, undefined on AMD.
                | M::Reservednop
            // Segment loads and far transfers would change the host process.
                | M::Lss | M::Lfs | M::Lgs | M::Lds | M::Les | M::Retf | M::Iret | M::Iretd | M::Iretq
        )
        && code != Code::Movsxd_r16_rm16 // Reads 32 bits on AMD.
        && !form.loads_segment()
        && !is_far(code)
}

trait SegmentOperand {
    fn loads_segment(&self) -> bool;
}

impl SegmentOperand for iced_x86::OpCodeInfo {
    /// MOV to and POP of a segment register.
    fn loads_segment(&self) -> bool {
        use iced_x86::OpCodeOperandKind as K;
        let writes = matches!(self.code().mnemonic(), Mnemonic::Mov | Mnemonic::Pop);
        writes
            && self.op_count() > 0
            && matches!(self.op_kind(0), K::seg_reg | K::fs | K::gs | K::es | K::ds | K::ss | K::cs)
    }
}

fn is_far(code: Code) -> bool {
    let form = code.op_code();
    form.op_count() > 0
        && matches!(code.mnemonic(), Mnemonic::Jmp | Mnemonic::Call)
        && (format!("{code:?}").contains("_m16") || format!("{code:?}").contains("ptr"))
}

/// iced-x86's flag bits as RFLAGS.
pub fn flags(bits: u32) -> u64 {
    use iced_x86::RflagsBits as R;
    [(R::CF, 1_u64), (R::PF, 4), (R::AF, 16), (R::ZF, 64), (R::SF, 128), (R::OF, 0x800), (R::DF, 0x400)]
        .into_iter()
        .filter(|&(bit, _)| bits & bit != 0)
        .map(|(_, flag)| flag)
        .sum()
}

/// A count of zero leaves the flags alone.
pub fn shifts(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd
    )
}

/// Results that the manuals leave open: double shifts of 16 bits by more.
pub fn undefined_result(instruction: &Instruction) -> bool {
    matches!(instruction.mnemonic(), Mnemonic::Shld | Mnemonic::Shrd)
        && (instruction.op1_register().size() == 2)
        && instruction.op2_kind() == OpKind::Immediate8
        && instruction.immediate8() & 31 > 16
}
