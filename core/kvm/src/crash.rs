//! Reports of guests that cannot go on: what KVM said, put in words, with the instruction and what the user can do.
#![allow(unsafe_code)] // The exit's details are a union of plain integers.

use iced_x86::{Decoder, DecoderOptions, FastFormatter};
use kvm_bindings::{
    KVM_EXIT_SYSTEM_EVENT, KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_SIMUL_EX, KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON,
};
use kvm_ioctls::VcpuFd;
use tenon_core::{CpuState, CrashReport, EngineError, Ram};
use vm_memory::{Bytes, GuestAddress};

use crate::run_page::RunPage;
use crate::state;

/// The longest instruction.
const INSTRUCTION: usize = 15;
const PAGE: u64 = 4096;
/// Index of CS in [`CpuState::segments`], and its rights' L and D bits.
const CS: usize = 1;
const RIGHTS_L: u16 = 1 << 13;
const RIGHTS_D: u16 = 1 << 14;
const EFER_LMA: u64 = 1 << 10;

/// How `KVM_RUN` said that the guest cannot go on.
pub(crate) enum Ending {
    /// Triple fault.
    Shutdown,
    /// The kernel cannot go on with this guest.
    Internal { suberror: u32, data: Vec<u64> },
    /// The CPU refused to enter the guest.
    FailEntry { reason: u64, cpu: u32 },
    /// An exit that nothing in this engine asks for.
    Unexpected(u32),
}

impl Ending {
    pub(crate) fn internal(page: &RunPage) -> Self {
        // SAFETY: plain integers.
        let internal = page.detail(|u| unsafe { u.internal });
        let count = usize::try_from(internal.ndata).unwrap_or(0).min(internal.data.len());
        Self::Internal { suberror: internal.suberror, data: internal.data[..count].to_vec() }
    }

    pub(crate) fn fail_entry(page: &RunPage) -> Self {
        // SAFETY: plain integers.
        let entry = page.detail(|u| unsafe { u.fail_entry });
        Self::FailEntry { reason: entry.hardware_entry_failure_reason, cpu: entry.cpu }
    }

    /// What happened, and what the user can do.
    fn words(&self, state: &CpuState, instruction: &[u8]) -> (String, Option<String>) {
        let text = decode(state, instruction);
        let here = text.as_ref().map_or_else(
            || format!("at rip {:#x}, where no instruction can be read", state.rip),
            |text| format!("at rip {:#x}, instruction `{text}`", state.rip),
        );
        let soft = |why: &str| Some(format!("{why}: run this guest with --engine soft"));
        match self {
            Self::Shutdown => {
                let reset = CpuState::after_reset();
                let lost = state.rip == reset.rip && state.segments[CS].base == reset.segments[CS].base;
                if lost {
                    // AMD-V leaves the state undefined, and the kernel resets it.
                    let why = "KVM on this CPU does not keep the registers of a triple fault; --engine soft shows them";
                    ("triple fault; the registers below are those after it".into(), Some(why.into()))
                } else {
                    (format!("triple fault {here}; cr2 is {:#x}", state.cr2), None)
                }
            }
            Self::Internal { suberror: KVM_INTERNAL_ERROR_EMULATION, .. } if instruction.is_empty() => {
                (format!("KVM: the guest jumped to {:#x}, where it has no memory", state.rip), None)
            }
            Self::Internal { suberror: KVM_INTERNAL_ERROR_EMULATION, .. } => (
                format!("KVM internal error 1, emulation failure {here}"),
                soft(
                    "KVM had to emulate this instruction, as it does for accesses to devices and, on hosts without full hardware \
                      virtualisation, for all guest kernel code, and does not know it",
                ),
            ),
            Self::Internal { suberror: KVM_INTERNAL_ERROR_DELIVERY_EV, data } => (
                format!("KVM internal error 3, an exit while an event was delivered ({}) {here}", hex(data)),
                Some("the guest's descriptor tables or its stack are probably not in RAM".into()),
            ),
            Self::Internal { suberror, data } => {
                let name = match *suberror {
                    KVM_INTERNAL_ERROR_SIMUL_EX => ", exceptions at the same time",
                    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => ", an exit that this kernel does not know",
                    _ => "",
                };
                (
                    format!("KVM internal error {suberror}{name} ({}) {here}", hex(data)),
                    soft("this host's KVM cannot go on"),
                )
            }
            Self::FailEntry { reason, cpu } => (
                format!(
                    "KVM: the CPU (host CPU {cpu}) refuses to enter the guest, hardware reason {reason:#x}, {here}"
                ),
                soft("the registers contradict each other, or this CPU cannot run this mode of the guest"),
            ),
            Self::Unexpected(KVM_EXIT_SYSTEM_EVENT) => (
                format!(
                    "KVM: the guest asked its hypervisor for an end in a way that this machine does not offer, {here}"
                ),
                None,
            ),
            Self::Unexpected(reason) => (
                format!("KVM: exit {reason}, which this engine never asked for, {here}"),
                soft("this host's KVM cannot go on"),
            ),
        }
    }
}

fn hex(data: &[u64]) -> String {
    data.iter().map(|word| format!("{word:#x}")).collect::<Vec<_>>().join(" ")
}

/// The instruction in words, if the bytes are one.
fn decode(state: &CpuState, bytes: &[u8]) -> Option<String> {
    let rights = state.segments[CS].rights;
    let bits = match (state.efer & EFER_LMA != 0 && rights & RIGHTS_L != 0, rights & RIGHTS_D != 0) {
        (true, _) => 64,
        (false, true) => 32,
        (false, false) => 16,
    };
    let instruction = Decoder::with_ip(bits, bytes, state.rip, DecoderOptions::NONE).decode();
    if instruction.is_invalid() {
        return None;
    }
    let mut text = String::new();
    FastFormatter::new().format(&instruction, &mut text);
    Some(text)
}

/// The bytes at the instruction pointer, through the guest's page tables, as far as they can be read.
fn instruction(fd: &VcpuFd, ram: &Ram, state: &CpuState) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(INSTRUCTION);
    let mut linear = state.segments[CS].base.wrapping_add(state.rip);
    if state.efer & EFER_LMA == 0 {
        linear &= 0xffff_ffff;
    }
    while bytes.len() < INSTRUCTION {
        let Ok(to) = fd.translate_gva(linear) else { break };
        if to.valid == 0 {
            break;
        }
        let rest = (PAGE - linear % PAGE).min((INSTRUCTION - bytes.len()) as u64);
        let mut part = [0; INSTRUCTION];
        let part = &mut part[..usize::try_from(rest).unwrap_or(0)];
        let (address, roms) = (to.physical_address, ram.roms());
        if ram.map().read_slice(part, GuestAddress(address)).is_err()
            && !roms.iter().any(|rom| rom.read(address, part))
        {
            break;
        }
        bytes.extend_from_slice(part);
        linear = linear.wrapping_add(rest);
    }
    bytes
}

/// Where and how the guest ended.
pub(crate) fn report(fd: &VcpuFd, ram: &Ram, ending: &Ending) -> Result<CrashReport, EngineError> {
    let state = state::visible(fd)?;
    let instruction = instruction(fd, ram, &state);
    let (what, remedy) = ending.words(&state, &instruction);
    Ok(CrashReport { what, remedy, state: Box::new(state), instruction })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn long_mode() -> CpuState {
        let mut state = CpuState { efer: 0x500, rip: 0x1000, ..CpuState::after_reset() };
        state.segments[CS].rights = 0xa09b;
        state
    }

    #[test]
    fn an_emulation_failure_names_the_instruction_and_the_remedy() {
        let ending = Ending::Internal { suberror: KVM_INTERNAL_ERROR_EMULATION, data: vec![] };
        let (what, remedy) = ending.words(&long_mode(), &[0x48, 0x0f, 0xc7, 0x0f]);
        assert!(what.contains("0x1000") && what.contains("cmpxchg16b"), "{what}");
        assert!(remedy.unwrap().contains("--engine soft"));
        let (what, remedy) = ending.words(&long_mode(), &[]);
        assert!(what.contains("no memory") && remedy.is_none(), "{what}");
    }

    #[test]
    fn every_ending_has_words() {
        let endings = [
            (Ending::Shutdown, "triple fault"),
            (
                Ending::Internal { suberror: KVM_INTERNAL_ERROR_DELIVERY_EV, data: vec![0x8000_000e] },
                "0x8000000e",
            ),
            (Ending::Internal { suberror: 99, data: vec![] }, "internal error 99"),
            (Ending::FailEntry { reason: 0x8000_0021, cpu: 1 }, "0x80000021"),
            (Ending::Unexpected(KVM_EXIT_SYSTEM_EVENT), "asked its hypervisor"),
            (Ending::Unexpected(77), "exit 77"),
        ];
        for (ending, word) in endings {
            let (what, _) = ending.words(&long_mode(), &[0xf4]);
            assert!(what.contains(word), "{what}");
        }
    }
}
