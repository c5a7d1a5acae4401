//! What CPUID shows: the host's abilities, cut down to a named model, with the leaves that differ from vCPU to vCPU filled in.
//!
//! Leaves are those of the Intel SDM vol. 2 (CPUID) and the AMD APM vol. 3 appendix E; 0x40000000 and up are KVM's
//! (Linux, Documentation/virt/kvm/x86/cpuid.rst) and the timing leaf that hypervisors agreed on.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Cap;
use tenon_core::{CpuModel, EngineError};

use crate::engine::host;

// The baseline is what the software engine implements, so that a guest finds the same CPU on both.
/// FPU DE PSE TSC MSR PAE MCE CX8 APIC PGE CMOV PAT MMX FXSR: what leaves 1 and, on AMD, 0x80000001 have in EDX.
const COMMON_EDX: u32 = 0x0181_a3fd;
/// Leaf 1 EDX: also SEP, CLFSH, SSE, SSE2.
const BASELINE_1_EDX: u32 = COMMON_EDX | 1 << 11 | 1 << 19 | 1 << 25 | 1 << 26;
/// Leaf 1 ECX.
const BASELINE_1_ECX: u32 = X2APIC | TSC_DEADLINE | HYPERVISOR;
/// Leaf 6 EAX: the local APIC's timer never stops.
const ALWAYS_RUNNING_TIMER: u32 = 1 << 2;
/// Leaf 0x80000001 EDX: SYSCALL, NX, LM.
const BASELINE_EXT_EDX: u32 = 1 << 11 | 1 << 20 | 1 << 29;
/// Leaf 0x80000007 EDX: the TSC runs at one rate always.
const INVARIANT_TSC: u32 = 1 << 8;
/// Leaf 0x40000001 EAX: kvmclock by its old and new MSRs, no delays after port accesses, and kvmclock is stable across vCPUs.
const BASELINE_KVM: u32 = 1 | 1 << 1 | 1 << 3 | 1 << 24;
/// Family, model and stepping, by vendor: what guests do about errata goes by these. AMD's families before 0x17 have timer errata.
const BASELINE_INTEL: u32 = 0x0001_067a;
const BASELINE_AMD: u32 = 0x0080_0f12;
const BASELINE_BRAND: &[u8] = b"Tenon KVM CPU";
/// Physical address bits, where the host has as many.
const BASELINE_PHYSICAL: u32 = 46;
/// The bytes of a cache line, in the unit of leaf 1: 8.
const CACHE_LINE: u32 = 8;
/// The last of the basic leaves.
const LAST: u32 = 0x15;

const HYPERVISOR: u32 = 1 << 31;
const X2APIC: u32 = 1 << 21;
const TSC_DEADLINE: u32 = 1 << 24;
const XSAVE: u32 = 1 << 26;
const HTT: u32 = 1 << 28;
const CMP_LEGACY: u32 = 1 << 1;
const TOPOEXT: u32 = 1 << 22;
/// Leaf 7 EDX: AMX-BF16, AMX-TILE, AMX-INT8.
const AMX: u32 = 1 << 22 | 1 << 24 | 1 << 25;
/// XCR0: the tile registers.
const XCR0_AMX: u32 = 3 << 17;

const KVM_BASE: u32 = 0x4000_0000;
const KVM_FEATURES: u32 = 0x4000_0001;
const TIMING: u32 = 0x4000_0010;
/// The frequency of the kernel's local APIC timer in kHz: one tick a nanosecond.
const APIC_KHZ: u32 = 1_000_000;

/// What is the same for all vCPUs of a VM.
pub(crate) struct Template {
    entries: Vec<kvm_cpuid_entry2>,
    amd: bool,
}

fn entry(function: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..Default::default() }
}

fn subleaf(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 { index, flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX, ..entry(function, registers) }
}

fn word(bytes: &[u8]) -> u32 {
    bytes.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

impl Template {
    /// The entries of `model` on this host.
    pub(crate) fn new(kvm: &kvm_ioctls::Kvm, model: CpuModel) -> Result<Self, EngineError> {
        let supported =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(host("KVM_GET_SUPPORTED_CPUID"))?;
        let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        Ok(Self::of(supported.as_slice(), model, deadline))
    }

    fn of(supported: &[kvm_cpuid_entry2], model: CpuModel, deadline: bool) -> Self {
        let leaf = |function| {
            supported.iter().find(|e| e.function == function && e.index == 0).copied().unwrap_or_default()
        };
        let vendor = leaf(0);
        let amd = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat();
        let amd = amd == b"AuthenticAMD" || amd == b"HygonGenuine";
        match model {
            CpuModel::Baseline => Self { entries: baseline(leaf, amd, deadline), amd },
            CpuModel::Max => {
                let mut entries = supported.to_vec();
                for e in &mut entries {
                    match (e.function, e.index) {
                        (1, _) => {
                            e.ecx |= HYPERVISOR | X2APIC | if deadline { TSC_DEADLINE } else { 0 };
                        }
                        (7, 0) => e.edx &= !AMX,
                        (0xd, 0) => e.eax &= !XCR0_AMX,
                        _ => {}
                    }
                }
                entries.retain(|e| {
                    let replaced = matches!(e.function, 0xb | 0x1f | TIMING);
                    let amx = matches!((e.function, e.index), (0x1d | 0x1e, _) | (0xd, 17 | 18));
                    !replaced && !amx
                });
                Self { entries, amd }
            }
        }
    }

    /// What vCPU `index` of `all` sees. Its APIC id is `index`; all are cores of one package.
    pub(crate) fn of_vcpu(&self, index: u32, all: u32, tsc_khz: u32) -> Result<CpuId, EngineError> {
        let many = all > 1;
        let id_bits = u32::BITS - (all - 1).leading_zeros();
        let mut entries = self.entries.clone();
        let topoext = entries.iter().any(|e| e.function == 0x8000_0001 && e.ecx & TOPOEXT != 0) && self.amd;
        for e in &mut entries {
            match e.function {
                0 => e.eax = e.eax.max(LAST),
                1 => {
                    e.ebx = index << 24 | all << 16 | (e.ebx & 0xffff);
                    e.edx = if many { e.edx | HTT } else { e.edx & !HTT };
                }
                // Cores of the package in bits 31:26; threads that share this cache in 25:14.
                4 if e.eax & 0x1f != 0 => {
                    let shared = if (e.eax >> 5) & 7 >= 3 { (1 << id_bits) - 1 } else { 0 };
                    e.eax = (e.eax & 0x3fff) | shared << 14 | ((1 << id_bits) - 1) << 26;
                }
                KVM_BASE => e.eax = TIMING,
                0x8000_0001 if self.amd => {
                    e.ecx = if many { e.ecx | CMP_LEGACY } else { e.ecx & !CMP_LEGACY };
                }
                0x8000_0008 if self.amd => e.ecx = id_bits << 12 | (all - 1),
                0x8000_001e if topoext => (e.eax, e.ebx, e.ecx, e.edx) = (index, index, 0, 0),
                _ => {}
            }
        }
        // Level 0: threads of a core, of which there is one. Level 1: cores of the package.
        let topology = [[0, 1, 0x100, index], [id_bits, all, 0x201, index], [0, 0, 2, index]];
        entries.extend((0..).zip(topology).map(|(level, registers)| subleaf(0xb, level, registers)));
        if tsc_khz != 0 {
            entries.push(entry(TIMING, [tsc_khz, APIC_KHZ, 0, 0]));
            entries.retain(|e| !matches!(e.function, 0x15 | 0x16));
            // The TSC runs at ECX · EBX / EAX Hz; ECX is the local APIC timer's frequency.
            entries.push(entry(0x15, [1_000_000, tsc_khz, APIC_KHZ * 1000, 0]));
        }
        CpuId::from_entries(&entries)
            .map_err(|error| EngineError::Invalid(format!("{} CPUID leaves: {error:?}", entries.len())))
    }
}

/// The extended states that a vCPU with these leaves can switch on in XCR0; 0 without XSAVE.
pub(crate) fn xcr0(entries: &[kvm_cpuid_entry2]) -> u64 {
    if !entries.iter().any(|e| e.function == 1 && e.ecx & XSAVE != 0) {
        return 0;
    }
    let states = entries.iter().find(|e| e.function == 0xd && e.index == 0);
    states.map_or(0, |e| u64::from(e.eax & !XCR0_AMX) | u64::from(e.edx) << 32)
}

/// Whether the features that the kernel shows, `shown`, are those that it was asked to show.
pub(crate) fn kept(asked: &[kvm_cpuid_entry2], shown: &[kvm_cpuid_entry2]) -> bool {
    // What follows the guest's doings: MWAIT and OSXSAVE, and the local APIC's flag.
    const OWN: [u32; 2] = [1 << 3 | 1 << 27, 1 << 9];
    let features = |entries: &[kvm_cpuid_entry2]| {
        let leaf = |function| {
            entries.iter().find(|e| e.function == function && e.index == 0).copied().unwrap_or_default()
        };
        let (one, seven, extended) = (leaf(1), leaf(7), leaf(0x8000_0001));
        [one.ecx & !OWN[0], one.edx & !OWN[1], seven.ebx, extended.ecx, extended.edx]
    };
    features(asked) == features(shown)
}

/// A sub-leaf of leaf 4: a cache of 8 ways and 64-byte lines, of this kind and level. [`Template::of_vcpu`] says who shares it.
fn cache(kind: u32, level: u32, sets: u32) -> [u32; 4] {
    let self_initializing = 1 << 8;
    [self_initializing | level << 5 | kind, 7 << 22 | 63, sets - 1, 0]
}

fn baseline(leaf: impl Fn(u32) -> kvm_cpuid_entry2, amd: bool, deadline: bool) -> Vec<kvm_cpuid_entry2> {
    let show = |what, wanted: u32, offered: u32| {
        let missing = wanted & !offered;
        if missing != 0 {
            tracing::warn!("this host's KVM lacks {what} bits {missing:#x} of the baseline CPU model");
        }
        wanted & offered
    };
    let (vendor, one, extended, sizes) = (leaf(0), leaf(1), leaf(0x8000_0001), leaf(0x8000_0008));
    let features = show("CPUID 1 EDX", BASELINE_1_EDX, one.edx);
    // Older kernels leave these to the caller.
    let offered = one.ecx | HYPERVISOR | if deadline { TSC_DEADLINE } else { 0 };
    let more = show("CPUID 1 ECX", BASELINE_1_ECX, offered);
    let mut extended = show("CPUID 0x80000001 EDX", BASELINE_EXT_EDX, extended.edx);
    if amd {
        extended |= features & COMMON_EDX;
    }
    let physical = match sizes.eax & 0xff {
        0 => 36, // The value where the leaf does not exist.
        bits => bits.min(BASELINE_PHYSICAL),
    };
    let mut entries = vec![
        entry(0, [LAST, vendor.ebx, vendor.ecx, vendor.edx]),
        entry(1, [if amd { BASELINE_AMD } else { BASELINE_INTEL }, CACHE_LINE << 8, more, features]),
        subleaf(4, 0, cache(1, 1, 64)),
        subleaf(4, 1, cache(2, 1, 64)),
        subleaf(4, 2, cache(3, 2, 1024)),
        subleaf(4, 3, [0; 4]),
        entry(6, [ALWAYS_RUNNING_TIMER, 0, 0, 0]),
        subleaf(7, 0, [0; 4]),
        entry(KVM_BASE, [TIMING, word(b"KVMK"), word(b"VMKV"), word(b"M\0\0\0")]),
        entry(KVM_FEATURES, [BASELINE_KVM & leaf(KVM_FEATURES).eax, 0, 0, 0]),
        entry(0x8000_0000, [0x8000_0008, vendor.ebx, vendor.ecx, vendor.edx]),
        entry(0x8000_0001, [if amd { BASELINE_AMD } else { 0 }, 0, 0, extended]),
        // L1: 32 KiB each, 8 ways; 64 TLB entries. L2: 512 KiB, 8 ways. Lines of 64 bytes.
        entry(0x8000_0005, [0xff40_ff40, 0xff40_ff40, 0x2008_0140, 0x2008_0140]),
        entry(0x8000_0006, [0, 0x4200_4200, 0x0200_6140, 0]),
        entry(0x8000_0007, [0, 0, 0, INVARIANT_TSC & leaf(0x8000_0007).edx]),
        entry(0x8000_0008, [48 << 8 | physical, 0, 0, 0]),
    ];
    let mut brand = [0; 48];
    brand[..BASELINE_BRAND.len()].copy_from_slice(BASELINE_BRAND);
    entries.extend((0x8000_0002..).zip(brand.chunks_exact(16)).map(|(function, part)| {
        entry(function, [word(&part[..4]), word(&part[4..8]), word(&part[8..12]), word(&part[12..])])
    }));
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host with everything, by vendor.
    fn rich(vendor: &[u8; 12]) -> Vec<kvm_cpuid_entry2> {
        let name = [word(&vendor[..4]), word(&vendor[8..]), word(&vendor[4..8])];
        let all = u32::MAX;
        vec![
            entry(0, [0x20, name[0], name[1], name[2]]),
            entry(1, [0x00a2_0f10, all, all, all]),
            subleaf(7, 0, [2, all, all, all]),
            subleaf(0xd, 0, [0x6_00e7, 0x240, 0xa88, 0]),
            subleaf(0xd, 17, [64, 0, 0, 0]),
            entry(KVM_BASE, [KVM_FEATURES, word(b"KVMK"), word(b"VMKV"), word(b"M")]),
            entry(KVM_FEATURES, [all, 0, 0, 0]),
            entry(0x8000_0001, [0, 0, all, all]),
            entry(0x8000_0008, [0x3934, 0, 0, 0]),
        ]
    }

    fn seen(template: &Template, index: u32, all: u32) -> Vec<kvm_cpuid_entry2> {
        template.of_vcpu(index, all, 2_500_000).unwrap().as_slice().to_vec()
    }

    fn leaf(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        let mut found = entries.iter().filter(|e| e.function == function && e.index == index);
        let one = *found.next().unwrap_or_else(|| panic!("no leaf {function:#x}.{index}"));
        assert!(found.next().is_none(), "leaf {function:#x}.{index} twice");
        one
    }

    #[test]
    fn baseline_features_are_the_same_on_a_rich_and_a_plain_host() {
        let rich_host = rich(b"AuthenticAMD");
        let mut plain_host = rich_host.clone();
        for e in &mut plain_host {
            match e.function {
                1 => (e.ecx, e.edx) = (X2APIC, BASELINE_1_EDX),
                0x8000_0001 => (e.ecx, e.edx) = (0, BASELINE_EXT_EDX),
                KVM_FEATURES => e.eax = BASELINE_KVM,
                _ => {}
            }
        }
        plain_host.retain(|e| !matches!(e.function, 7 | 0xd));
        let [a, b] = [rich_host, plain_host].map(|h| seen(&Template::of(&h, CpuModel::Baseline, true), 0, 2));
        assert_eq!(a, b);
        assert_eq!(leaf(&a, 1, 0).ecx, BASELINE_1_ECX);
        assert_eq!(leaf(&a, 7, 0).ebx, 0);
    }

    #[test]
    fn each_vcpu_sees_its_own_apic_id_and_all_see_one_package() {
        for vendor in [b"AuthenticAMD", b"GenuineIntel"] {
            for model in [CpuModel::Baseline, CpuModel::Max] {
                let template = Template::of(&rich(vendor), model, true);
                for index in [0, 5, 63] {
                    let entries = seen(&template, index, 64);
                    assert_eq!(leaf(&entries, 1, 0).ebx >> 16, index << 8 | 64);
                    assert_eq!(leaf(&entries, 0xb, 1).edx, index);
                    assert_eq!((leaf(&entries, 0xb, 1).eax, leaf(&entries, 0xb, 1).ebx), (6, 64));
                }
                assert_eq!(leaf(&seen(&template, 0, 1), 0xb, 1).eax, 0);
                assert_eq!(leaf(&seen(&template, 0, 1), 1, 0).edx & HTT, 0);
            }
        }
    }

    #[test]
    fn the_tsc_frequency_is_told_in_every_leaf_that_has_it() {
        let entries = seen(&Template::of(&rich(b"GenuineIntel"), CpuModel::Baseline, true), 0, 1);
        assert_eq!(leaf(&entries, TIMING, 0).eax, 2_500_000);
        assert!(leaf(&entries, KVM_BASE, 0).eax >= TIMING);
        let fifteen = leaf(&entries, 0x15, 0);
        let hertz = u64::from(fifteen.ecx) * u64::from(fifteen.ebx) / u64::from(fifteen.eax);
        assert_eq!(hertz, 2_500_000_000);
        assert!(leaf(&entries, 0, 0).eax >= 0x15);
    }

    #[test]
    fn the_full_model_leaves_amx_out_and_baseline_xsave() {
        let host = rich(b"GenuineIntel");
        let full = seen(&Template::of(&host, CpuModel::Max, true), 0, 1);
        assert_eq!((xcr0(&full), leaf(&full, 7, 0).edx & AMX), (0xe7, 0));
        let plain = seen(&Template::of(&host, CpuModel::Baseline, true), 0, 1);
        assert_eq!(xcr0(&plain), 0);
        assert!(kept(&plain, &plain) && !kept(&plain, &full));
    }
}
