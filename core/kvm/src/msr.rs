//! Model-specific registers: which are part of a vCPU's state, reading and writing them.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use tenon_core::EngineError;

use crate::engine::host;

/// The local APIC's base, which KVM has among the segment registers.
pub(crate) const APIC_BASE: u32 = 0x1b;
/// The local APIC timer's deadline: meaningful only after the local APIC's state is in place.
const TSC_DEADLINE: u32 = 0x6e0;
/// EFER, FS base and GS base have places of their own in a CPU's state.
const ELSEWHERE: [u32; 4] = [APIC_BASE, 0xc000_0080, 0xc000_0100, 0xc000_0101];
/// Hyper-V's, which no CPU model shows.
const HYPER_V: std::ops::RangeInclusive<u32> = 0x4000_0000..=0x4000_01ff;
/// How many the kernel takes in one call.
const BATCH: usize = 256;

/// The numbers of the registers that this host's KVM has, in ascending order.
pub(crate) struct MsrNumbers(Vec<u32>);

fn failed(what: &str) -> impl FnOnce(vmm_sys_util::fam::Error) -> EngineError {
    move |error| EngineError::Invalid(format!("{what}: {error:?}"))
}

fn entry((index, data): (u32, u64)) -> kvm_msr_entry {
    kvm_msr_entry { index, data, ..Default::default() }
}

impl MsrNumbers {
    pub(crate) fn new(kvm: &kvm_ioctls::Kvm) -> Result<Self, EngineError> {
        let list = kvm.get_msr_index_list().map_err(host("KVM_GET_MSR_INDEX_LIST"))?;
        let mut numbers: Vec<u32> = list
            .as_slice()
            .iter()
            .copied()
            .filter(|n| !ELSEWHERE.contains(n) && !HYPER_V.contains(n))
            .collect();
        numbers.sort_unstable();
        numbers.dedup();
        Ok(Self(numbers))
    }

    /// All values. Registers that this CPU model does not have are left out.
    pub(crate) fn read(&self, fd: &VcpuFd) -> Result<Vec<(u32, u64)>, EngineError> {
        read(fd, &self.0)
    }
}

/// The values of those of `numbers` that the vCPU has.
pub(crate) fn read(fd: &VcpuFd, numbers: &[u32]) -> Result<Vec<(u32, u64)>, EngineError> {
    let mut values = Vec::with_capacity(numbers.len());
    let mut rest = numbers;
    while !rest.is_empty() {
        let batch: Vec<_> = rest[..rest.len().min(BATCH)].iter().map(|n| entry((*n, 0))).collect();
        let mut msrs = Msrs::from_entries(&batch).map_err(failed("reading MSRs"))?;
        let done = fd.get_msrs(&mut msrs).map_err(host("KVM_GET_MSRS"))?;
        values.extend(msrs.as_slice()[..done].iter().map(|msr| (msr.index, msr.data)));
        // The kernel stops at the first that it refuses.
        rest = &rest[if done < batch.len() { done + 1 } else { done }..];
    }
    Ok(values)
}

/// Sets `wanted`, and every register of `initial` that is not among them to its value there.
pub(crate) fn write(fd: &VcpuFd, wanted: &[(u32, u64)], initial: &[(u32, u64)]) -> Result<(), EngineError> {
    let is_wanted = |number| wanted.iter().any(|(n, _)| *n == number);
    let mut all: Vec<_> = initial.iter().copied().filter(|(n, _)| !is_wanted(*n)).collect();
    all.extend(wanted.iter().copied().filter(|(n, _)| !ELSEWHERE.contains(n)));
    all.sort_unstable_by_key(|(n, _)| (*n == TSC_DEADLINE, *n));
    let mut rest = all.as_slice();
    while !rest.is_empty() {
        let batch: Vec<_> = rest[..rest.len().min(BATCH)].iter().copied().map(entry).collect();
        let msrs = Msrs::from_entries(&batch).map_err(failed("writing MSRs"))?;
        let done = fd.set_msrs(&msrs).map_err(host("KVM_SET_MSRS"))?;
        if done == batch.len() {
            rest = &rest[done..];
            continue;
        }
        // One was refused. That matters if somebody asked for a value that it does not have already; 0 stands for not having it.
        let (number, value) = rest[done];
        let current = read(fd, &[number])?.first().map_or(0, |(_, value)| *value);
        if is_wanted(number) && current != value {
            return Err(EngineError::Invalid(format!(
                "MSR {number:#x} cannot be {value:#x} on this host: its KVM refuses it (it is {current:#x})"
            )));
        }
        rest = &rest[done + 1..];
    }
    Ok(())
}
