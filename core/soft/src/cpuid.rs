//! What CPUID shows: an x86-64-v1 processor that names nothing which is not implemented.
//!
//! The vendor is AMD's, because Linux then leaves page-table isolation out; family 0x17, because the families before have timer errata
//! that make Linux avoid the local APIC's timer. The KVM leaves announce the KVM clock and the frequencies, so that nothing is calibrated.
#![allow(clippy::cast_possible_truncation, reason = "register fields are put together here")]

use crate::cpu::{Cpu, cr4};
use crate::paging::PHYSICAL_BITS;

/// EAX, EBX, ECX, EDX.
pub(crate) type Leaf = [u32; 4];

/// Machine checks can be switched on in CR4, as PC firmware does without asking. None ever comes, and there is no architecture of banks (MCA).
const MCE: u32 = 1 << 7;
/// FPU DE PSE TSC MSR PAE MCE CX8 APIC PGE CMOV PAT MMX FXSR: what leaves 1 and 0x80000001 share.
const COMMON: u32 = 1
    | 1 << 2
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | MCE
    | 1 << 8
    | 1 << 9
    | 1 << 13
    | 1 << 15
    | 1 << 16
    | 1 << 23
    | 1 << 24;
const SEP: u32 = 1 << 11;
const CLFLUSH: u32 = 1 << 19;
const SSE: u32 = 1 << 25;
const SSE2: u32 = 1 << 26;
const HTT: u32 = 1 << 28;
const X2APIC: u32 = 1 << 21;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
const SYSCALL: u32 = 1 << 11;
const NX: u32 = 1 << 20;
const LONG_MODE: u32 = 1 << 29;
/// Leaf 0x80000001 ECX: the logical processors of a package are cores, not threads.
const CMP_LEGACY: u32 = 1 << 1;
/// Bits of [`cr4`] that the features above allow.
pub(crate) const CR4_ALLOWED: u64 =
    cr4::TSD | cr4::DE | cr4::PSE | cr4::PAE | cr4::MCE | cr4::PGE | cr4::OSFXSR | cr4::OSXMMEXCPT;

const LAST: u32 = 0x15;
const LAST_EXTENDED: u32 = 0x8000_0008;
const LAST_HYPERVISOR: u32 = 0x4000_0010;
/// The TSC and the APIC bus, in kHz and Hz.
const KILOHERTZ: u32 = 1_000_000;
const HERTZ: u32 = 1_000_000_000;

const BRAND: &[u8; 48] = b"Tenon software CPU\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

fn text(bytes: &[u8]) -> u32 {
    bytes.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

/// The bits of an APIC id that number the cores of the package.
fn core_bits(vcpus: u32) -> u32 {
    vcpus.next_power_of_two().trailing_zeros()
}

/// CPUID with this EAX and ECX.
pub(crate) fn leaf(cpu: &Cpu, eax: u32, ecx: u32) -> Leaf {
    of(cpu.index, cpu.vm.vcpu_count(), eax, ecx)
}

fn of(index: u32, vcpus: u32, eax: u32, ecx: u32) -> Leaf {
    let last = match eax >> 28 {
        0 => LAST,
        4 => LAST_HYPERVISOR,
        8 => LAST_EXTENDED,
        _ => 0,
    };
    if eax > last {
        return [0; 4];
    }
    match eax {
        0 => [LAST, text(b"Auth"), text(b"cAMD"), text(b"enti")],
        1 => {
            let several = if vcpus > 1 { HTT } else { 0 };
            [
                // Family 0x17, model 1, stepping 2.
                0x0080_0f12,
                // APIC id, logical processors, 64-byte cache lines.
                index << 24 | vcpus << 16 | 8 << 8,
                X2APIC | TSC_DEADLINE | HYPERVISOR,
                COMMON | SEP | CLFLUSH | SSE | SSE2 | several,
            ]
        }
        4 => cache(vcpus, ecx),
        // The APIC's timer never stops.
        6 => [1 << 2, 0, 0, 0],
        0xb => {
            let bits = core_bits(vcpus);
            match ecx {
                0 => [0, 1, 1 << 8, index],
                1 => [bits, vcpus, 2 << 8 | 1, index],
                _ => [0, 0, ecx & 0xff, index],
            }
        }
        // TSC ticks per crystal tick, and the crystal.
        0x15 => [1, 1, HERTZ, 0],
        0x4000_0000 => [LAST_HYPERVISOR, text(b"KVMK"), text(b"VMKV"), text(b"M\0\0\0")],
        // Both editions of the clock, no delay after port I/O, clock stable across vCPUs.
        0x4000_0001 => [1 | 1 << 1 | 1 << 3 | 1 << 24, 0, 0, 0],
        0x4000_0010 => [KILOHERTZ, KILOHERTZ, 0, 0],
        0x8000_0000 => [LAST_EXTENDED, text(b"Auth"), text(b"cAMD"), text(b"enti")],
        0x8000_0001 => {
            let several = if vcpus > 1 { CMP_LEGACY } else { 0 };
            [0x0080_0f12, 0, several, COMMON | SYSCALL | NX | LONG_MODE]
        }
        0x8000_0002..=0x8000_0004 => {
            let part = &BRAND[(eax - 0x8000_0002) as usize * 16..];
            [text(&part[..4]), text(&part[4..8]), text(&part[8..12]), text(&part[12..16])]
        }
        // L1: 32 KiB each, 8 ways, 64-byte lines; 64 fully associative TLB entries.
        0x8000_0005 => [0xff40_ff40, 0xff40_ff40, 0x2008_0140, 0x2008_0140],
        // L2: 512 KiB, 8 ways, 64-byte lines.
        0x8000_0006 => [0, 0x4200_4200, 0x0200_6140, 0],
        // The TSC runs at one rate always.
        0x8000_0007 => [0, 0, 0, 1 << 8],
        0x8000_0008 => [48 << 8 | PHYSICAL_BITS, 0, core_bits(vcpus) << 12 | (vcpus - 1), 0],
        _ => [0; 4],
    }
}

/// Leaf 4: L1 data, L1 instruction and L2, each a core's own.
fn cache(vcpus: u32, ecx: u32) -> Leaf {
    let (kind, level, sets) = match ecx {
        0 => (1, 1, 64),
        1 => (2, 1, 64),
        2 => (3, 2, 1024),
        _ => return [0; 4],
    };
    let cores = (1 << core_bits(vcpus)) - 1;
    let self_initializing = 1 << 8;
    // 8 ways, one partition, 64-byte lines.
    [cores << 26 | self_initializing | level << 5 | kind, 7 << 22 | 63, sets - 1, 0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_vcpu_sees_its_own_number_and_the_same_package() {
        for vcpus in 1..=64 {
            for index in 0..vcpus {
                assert_eq!(of(index, vcpus, 1, 0)[1] >> 24, index);
                assert_eq!(of(index, vcpus, 0xb, 1)[3], index);
                let shift = of(index, vcpus, 0xb, 1)[0];
                assert_eq!(index >> shift, 0, "one package");
                assert_eq!(of(index, vcpus, 0x8000_0008, 0)[2] >> 12, shift);
                assert_eq!(of(index, vcpus, 0x8000_0008, 0)[2] & 0xff, vcpus - 1);
                assert!(of(index, vcpus, 4, 0)[0] >> 26 >= vcpus - 1);
            }
        }
    }

    #[test]
    fn leaves_past_the_last_are_zero() {
        for eax in [LAST + 1, LAST_EXTENDED + 1, LAST_HYPERVISOR + 1, 0x2000_0000, 0xc000_0000] {
            assert_eq!(of(0, 1, eax, 0), [0; 4], "{eax:#x}");
        }
    }
}
