//! Model-specific registers, and the KVM clock that is set up through them.
//!
//! What Linux reads at boot is here; anything else raises #GP, which Linux takes as "not there".
#![allow(clippy::cast_possible_truncation, reason = "MSRs are pairs of 32-bit registers")]

use vm_memory::{Bytes, GuestAddress};

use crate::apic::{APIC_BASE, BASE_ENABLE};
use crate::cpu::{Cpu, FS, Fault, GS, cr0, efer};
use crate::segment::is_canonical;

const TSC: u32 = 0x10;
/// KVM clock, first edition.
const KVM_WALL_CLOCK_OLD: u32 = 0x11;
const KVM_SYSTEM_TIME_OLD: u32 = 0x12;
const APIC_BASE_MSR: u32 = 0x1b;
const MICROCODE: u32 = 0x8b;
const SYSENTER_CS: u32 = 0x174;
const SYSENTER_ESP: u32 = 0x175;
const SYSENTER_EIP: u32 = 0x176;
const MISC_ENABLE: u32 = 0x1a0;
const PAT: u32 = 0x277;
const TSC_DEADLINE: u32 = 0x6e0;
const X2APIC: u32 = 0x800;
const X2APIC_LAST: u32 = 0x83f;
const KVM_WALL_CLOCK: u32 = 0x4b56_4d00;
const KVM_SYSTEM_TIME: u32 = 0x4b56_4d01;
const EFER: u32 = 0xc000_0080;
const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const CSTAR: u32 = 0xc000_0083;
const SFMASK: u32 = 0xc000_0084;
const FS_BASE: u32 = 0xc000_0100;
const GS_BASE: u32 = 0xc000_0101;
const KERNEL_GS_BASE: u32 = 0xc000_0102;
/// AMD's hardware configuration; bit 24 says that the TSC counts at the nominal frequency.
const HWCR: u32 = 0xc001_0015;
/// AMD's northbridge configuration; Linux switches access to extended configuration space on in it.
const NB_CFG: u32 = 0xc001_001f;
/// AMD's decode configuration; bit 1 says that LFENCE serialises.
const DE_CFG: u32 = 0xc001_1029;

/// How far in nanoseconds a saved TSC may be from the clock and still be the clock.
const SYNCHRONOUS: u64 = 1_000_000_000;

/// The registers that have no field in [`Cpu`].
pub(crate) struct Msrs {
    pub(crate) star: u64,
    pub(crate) lstar: u64,
    pub(crate) cstar: u64,
    pub(crate) sfmask: u64,
    pub(crate) kernel_gs_base: u64,
    pub(crate) sysenter_cs: u64,
    pub(crate) sysenter_esp: u64,
    pub(crate) sysenter_eip: u64,
    /// What is added to the machine's clock to make the TSC.
    pub(crate) tsc_offset: u64,
    /// What led to a triple fault; not a register.
    pub(crate) story: String,
    pat: u64,
    misc_enable: u64,
    hwcr: u64,
    nb_cfg: u64,
    kvm_system_time: u64,
    kvm_wall_clock: u64,
}

impl Default for Msrs {
    fn default() -> Self {
        Self {
            star: 0,
            lstar: 0,
            cstar: 0,
            sfmask: 0,
            kernel_gs_base: 0,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            tsc_offset: 0,
            story: String::new(),
            pat: 0x0007_0406_0007_0406,
            misc_enable: 1,
            hwcr: 1 << 24,
            nb_cfg: 0,
            kvm_system_time: 0,
            kvm_wall_clock: 0,
        }
    }
}

/// The time-stamp counter: one tick is a nanosecond.
pub(crate) fn tsc(cpu: &Cpu) -> u64 {
    cpu.now().wrapping_add(cpu.msrs.tsc_offset)
}

/// RDMSR.
///
/// # Errors
/// #GP for a register that does not exist.
pub(crate) fn read(cpu: &mut Cpu, msr: u32) -> Result<u64, Fault> {
    let m = &cpu.msrs;
    Ok(match msr {
        TSC => tsc(cpu),
        KVM_WALL_CLOCK | KVM_WALL_CLOCK_OLD => m.kvm_wall_clock,
        KVM_SYSTEM_TIME | KVM_SYSTEM_TIME_OLD => m.kvm_system_time,
        APIC_BASE_MSR => cpu.lapic.base(),
        MICROCODE => 0,
        SYSENTER_CS => m.sysenter_cs,
        SYSENTER_ESP => m.sysenter_esp,
        SYSENTER_EIP => m.sysenter_eip,
        MISC_ENABLE => m.misc_enable,
        PAT => m.pat,
        TSC_DEADLINE => cpu.lapic.tsc_deadline(),
        X2APIC..=X2APIC_LAST => cpu.lapic.msr_read(msr - X2APIC).map_err(|_| Fault::gp(0))?,
        EFER => cpu.efer,
        STAR => m.star,
        LSTAR => m.lstar,
        CSTAR => m.cstar,
        SFMASK => m.sfmask,
        FS_BASE => cpu.seg[FS].base,
        GS_BASE => cpu.seg[GS].base,
        KERNEL_GS_BASE => m.kernel_gs_base,
        HWCR => m.hwcr,
        NB_CFG => m.nb_cfg,
        DE_CFG => 2,
        _ => return Err(unknown("reads", msr)),
    })
}

fn unknown(what: &str, msr: u32) -> Fault {
    tracing::debug!("the guest {what} MSR {msr:#x}, which does not exist");
    Fault::gp(0)
}

fn canonical(value: u64) -> Result<u64, Fault> {
    if is_canonical(value) { Ok(value) } else { Err(Fault::gp(0)) }
}

/// WRMSR.
///
/// # Errors
/// #GP for a register that does not exist or a value that it cannot take.
pub(crate) fn write(cpu: &mut Cpu, msr: u32, value: u64) -> Result<(), Fault> {
    match msr {
        TSC => cpu.msrs.tsc_offset = value.wrapping_sub(cpu.now()),
        KVM_WALL_CLOCK | KVM_WALL_CLOCK_OLD => {
            cpu.msrs.kvm_wall_clock = value;
            publish_wall_clock(cpu, value);
        }
        KVM_SYSTEM_TIME | KVM_SYSTEM_TIME_OLD => {
            cpu.msrs.kvm_system_time = value;
            publish_system_time(cpu);
        }
        APIC_BASE_MSR => {
            cpu.lapic.set_base(value).map_err(|_| Fault::gp(0))?;
            // The register page appears or goes.
            cpu.flush_tlb();
        }
        MICROCODE => {}
        SYSENTER_CS => cpu.msrs.sysenter_cs = value & 0xffff_ffff,
        SYSENTER_ESP => cpu.msrs.sysenter_esp = canonical(value)?,
        SYSENTER_EIP => cpu.msrs.sysenter_eip = canonical(value)?,
        MISC_ENABLE => cpu.msrs.misc_enable = value,
        PAT => {
            // Each byte is a memory type: 0, 1, 4, 5, 6 or 7.
            if value.to_le_bytes().iter().any(|kind| !matches!(kind, 0 | 1 | 4..=7)) {
                return Err(Fault::gp(0));
            }
            cpu.msrs.pat = value;
        }
        TSC_DEADLINE => cpu.lapic.set_tsc_deadline(value, value.wrapping_sub(cpu.msrs.tsc_offset)),
        X2APIC..=X2APIC_LAST => {
            let effect = cpu.lapic.msr_write(msr - X2APIC, value).map_err(|_| Fault::gp(0))?;
            cpu.vm.chip.apply(effect);
            cpu.recheck = true;
        }
        EFER => write_efer(cpu, value)?,
        STAR => cpu.msrs.star = value,
        LSTAR => cpu.msrs.lstar = canonical(value)?,
        CSTAR => cpu.msrs.cstar = canonical(value)?,
        SFMASK => cpu.msrs.sfmask = value & 0xffff_ffff,
        FS_BASE => cpu.seg[FS].base = canonical(value)?,
        GS_BASE => cpu.seg[GS].base = canonical(value)?,
        KERNEL_GS_BASE => cpu.msrs.kernel_gs_base = canonical(value)?,
        HWCR => cpu.msrs.hwcr = value,
        NB_CFG => cpu.msrs.nb_cfg = value,
        DE_CFG => {}
        _ => return Err(unknown("writes", msr)),
    }
    Ok(())
}

fn write_efer(cpu: &mut Cpu, value: u64) -> Result<(), Fault> {
    let writable = efer::SCE | efer::LME | efer::NXE;
    let changed = (value ^ cpu.efer) & writable;
    // LMA follows LME and paging; writing it is allowed as long as it does not change on processors that Linux runs on, so it is ignored.
    if value & !(writable | efer::LMA) != 0 || changed & efer::LME != 0 && cpu.cr0 & cr0::PG != 0 {
        return Err(Fault::gp(0));
    }
    cpu.efer ^= changed;
    if changed & efer::NXE != 0 {
        cpu.flush_tlb();
    }
    cpu.update_mode();
    Ok(())
}

/// Writes `struct pvclock_vcpu_time_info` to the page that the guest named, under its version protocol: odd while it changes.
/// The TSC is the clock, so one description is good for ever and for every vCPU.
fn publish_system_time(cpu: &Cpu) {
    /// Nanoseconds are ticks times 2 (the shift) times 0.5 (the multiplier in 32.32).
    const HALF: u32 = 0x8000_0000;
    const SHIFT: u8 = 1;
    const STABLE: u8 = 1;
    let value = cpu.msrs.kvm_system_time;
    if value & 1 == 0 {
        return;
    }
    let address = value & !1;
    let mut body = [0; 28];
    body[4..12].copy_from_slice(&cpu.msrs.tsc_offset.to_le_bytes());
    body[20..24].copy_from_slice(&HALF.to_le_bytes());
    body[24] = SHIFT;
    body[25] = STABLE;
    publish(cpu, address, &body);
}

/// Writes `struct pvclock_wall_clock`: the time of day at which the machine's clock stood at 0.
fn publish_wall_clock(cpu: &Cpu, address: u64) {
    const SECOND: u64 = 1_000_000_000;
    let boot = cpu.vm.clock.wall().saturating_sub(cpu.now());
    let mut body = [0; 8];
    body[..4].copy_from_slice(&((boot / SECOND) as u32).to_le_bytes());
    body[4..].copy_from_slice(&((boot % SECOND) as u32).to_le_bytes());
    publish(cpu, address, &body);
}

/// Writes a structure that begins with a version. An address outside RAM is the guest's loss.
fn publish(cpu: &Cpu, address: u64, body: &[u8]) {
    let map = cpu.vm.ram.map();
    let at = GuestAddress(address);
    let version = map.read_obj::<u32>(at).unwrap_or(0) | 1;
    let steps = map
        .write_obj(version, at)
        .and_then(|()| map.write_slice(body, GuestAddress(address.wrapping_add(4))))
        .and_then(|()| map.write_obj(version.wrapping_add(1), at));
    if steps.is_err() {
        tracing::debug!("the guest's clock page {address:#x} is not in RAM");
    }
}

/// The registers as [`tenon_core::CpuState::msrs`] has them.
pub(crate) fn save(cpu: &Cpu) -> Vec<(u32, u64)> {
    let m = &cpu.msrs;
    vec![
        (TSC, tsc(cpu)),
        (APIC_BASE_MSR, cpu.lapic.base()),
        (SYSENTER_CS, m.sysenter_cs),
        (SYSENTER_ESP, m.sysenter_esp),
        (SYSENTER_EIP, m.sysenter_eip),
        (MISC_ENABLE, m.misc_enable),
        (PAT, m.pat),
        (TSC_DEADLINE, cpu.lapic.tsc_deadline()),
        (KVM_WALL_CLOCK, m.kvm_wall_clock),
        (KVM_SYSTEM_TIME, m.kvm_system_time),
        (STAR, m.star),
        (LSTAR, m.lstar),
        (CSTAR, m.cstar),
        (SFMASK, m.sfmask),
        (KERNEL_GS_BASE, m.kernel_gs_base),
        (HWCR, m.hwcr),
        (NB_CFG, m.nb_cfg),
    ]
}

/// Takes over what [`save`] gave, except the TSC deadline, which needs the APIC's registers first: [`restore_deadline`].
/// What is not named takes its value after reset.
///
/// # Errors
/// Names the register that does not fit.
pub(crate) fn restore(cpu: &mut Cpu, msrs: &[(u32, u64)]) -> Result<(), String> {
    cpu.msrs = Msrs::default();
    cpu.lapic.reset();
    for (msr, value) in msrs {
        let done = match *msr {
            TSC_DEADLINE => Ok(()),
            // The TSC follows the clock, which the machine restores; a small difference is the time between saving the two, and
            // taking it over would set the vCPUs apart.
            TSC if cpu.now().abs_diff(*value) < SYNCHRONOUS => Ok(()),
            // Through "on" on the way to x2APIC mode.
            APIC_BASE_MSR => {
                let _ = cpu.lapic.set_base(APIC_BASE | BASE_ENABLE);
                cpu.lapic.set_base(*value).map_err(|_| Fault::gp(0))
            }
            // The wall clock was published when the guest asked; only the register is taken over.
            KVM_WALL_CLOCK | KVM_WALL_CLOCK_OLD => {
                cpu.msrs.kvm_wall_clock = *value;
                Ok(())
            }
            // FS, GS and EFER have fields of their own in a CPU state.
            EFER | FS_BASE | GS_BASE => Ok(()),
            _ => write(cpu, *msr, *value),
        };
        done.map_err(|_| format!("MSR {msr:#x} cannot hold {value:#x} on this engine"))?;
    }
    publish_system_time(cpu);
    Ok(())
}

/// Arms the TSC deadline timer again, after the APIC's registers were restored.
pub(crate) fn restore_deadline(cpu: &Cpu, msrs: &[(u32, u64)]) {
    if let Some((_, deadline)) = msrs.iter().find(|(msr, value)| *msr == TSC_DEADLINE && *value != 0) {
        cpu.lapic.set_tsc_deadline(*deadline, deadline.wrapping_sub(cpu.msrs.tsc_offset));
    }
}
