//! The neutral CPU state, taken from and given to a KVM vCPU.
#![allow(unsafe_code)] // KVM_SET_XSAVE takes a structure whose length the kernel decides.

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE, KVM_VCPUEVENT_VALID_NMI_PENDING,
    KVM_VCPUEVENT_VALID_SHADOW, KVM_X86_SHADOW_INT_MOV_SS, KVM_X86_SHADOW_INT_STI, kvm_debugregs, kvm_dtable,
    kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use tenon_core::{Activity, CpuState, DescriptorTable, EngineError, Event, Segment};

use crate::engine::host;
use crate::msr::{self, APIC_BASE, MsrNumbers};

/// The bytes of an FXSAVE image, with which an XSAVE image begins.
const FXSAVE: usize = 512;
/// The bytes of the XSAVE image that `KVM_GET_XSAVE` gives: all states but AMX, which no model shows.
const XSAVE: usize = 4096;
/// x87 and SSE, in XCR0 and in an XSAVE image's header.
const LEGACY_STATES: u32 = 3;
/// The local APIC's registers: doublewords at multiples of 16 bytes.
const LAPIC_REGISTERS: usize = 64;
/// The APIC base after power-on: enabled, at its usual place; and the flag of the bootstrap processor.
const APIC_BASE_RESET: u64 = 0xfee0_0800;
const APIC_BASE_BSP: u64 = 0x100;
const RFLAGS_IF: u64 = 1 << 9;

/// A vCPU's registers after power-on, as the kernel made them.
pub(crate) struct PowerOn {
    pub(crate) lapic: kvm_lapic_state,
    pub(crate) msrs: Vec<(u32, u64)>,
}

/// What a vCPU's state depends on.
pub(crate) struct Context<'a> {
    pub(crate) fd: &'a VcpuFd,
    pub(crate) index: u32,
    /// The states that XCR0 may have; 0 where the model has no XSAVE.
    pub(crate) xcr0: u64,
    pub(crate) msrs: &'a MsrNumbers,
    pub(crate) power_on: &'a PowerOn,
}

fn invalid(text: String) -> EngineError {
    EngineError::Invalid(text)
}

fn segment(s: &kvm_segment) -> Segment {
    let flag = |value: u8, at: u32| u16::from(value & 1) << at;
    let present = s.present & 1 & !s.unusable;
    Segment {
        selector: s.selector,
        base: s.base,
        limit: s.limit,
        rights: u16::from(s.type_ & 15)
            | flag(s.s, 4)
            | u16::from(s.dpl & 3) << 5
            | flag(present, 7)
            | flag(s.avl, 12)
            | flag(s.l, 13)
            | flag(s.db, 14)
            | flag(s.g, 15),
    }
}

fn kvm_segment_of(s: &Segment) -> kvm_segment {
    let flag = |at: u32| u8::from(s.rights >> at & 1 != 0);
    let field = |at: u32, mask: u16| u8::try_from(s.rights >> at & mask).unwrap_or(0);
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: field(0, 15),
        s: flag(4),
        dpl: field(5, 3),
        present: flag(7),
        unusable: flag(7) ^ 1,
        avl: flag(12),
        l: flag(13),
        db: flag(14),
        g: flag(15),
        padding: 0,
    }
}

fn table(t: &kvm_dtable) -> DescriptorTable {
    DescriptorTable { base: t.base, limit: t.limit }
}

fn kvm_table(t: &DescriptorTable) -> kvm_dtable {
    kvm_dtable { base: t.base, limit: t.limit, padding: [0; 3] }
}

fn bytes(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn event(e: &kvm_vcpu_events) -> Option<Event> {
    if e.exception.injected != 0 {
        let code = (e.exception.has_error_code != 0).then_some(e.exception.error_code);
        Some(Event::Exception(e.exception.nr, code))
    } else if e.nmi.injected != 0 {
        Some(Event::Nmi)
    } else if e.interrupt.injected != 0 && e.interrupt.soft != 0 {
        Some(Event::SoftwareInterrupt(e.interrupt.nr))
    } else if e.interrupt.injected != 0 {
        Some(Event::Interrupt(e.interrupt.nr))
    } else {
        None
    }
}

fn kvm_events(state: &CpuState) -> kvm_vcpu_events {
    let mut e = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW,
        ..Default::default()
    };
    match state.event {
        None => {}
        Some(Event::Exception(vector, code)) => {
            e.exception.injected = 1;
            e.exception.nr = vector;
            e.exception.has_error_code = code.is_some().into();
            e.exception.error_code = code.unwrap_or(0);
        }
        Some(Event::Nmi) => e.nmi.injected = 1,
        Some(Event::Interrupt(vector)) => (e.interrupt.injected, e.interrupt.nr) = (1, vector),
        Some(Event::SoftwareInterrupt(vector)) => {
            (e.interrupt.injected, e.interrupt.nr, e.interrupt.soft) = (1, vector, 1);
        }
    }
    e.nmi.pending = state.nmi_pending.into();
    e.nmi.masked = state.nmi_masked.into();
    if state.interrupt_shadow {
        // With interrupts off the shadow can only be that of MOV SS, and VT-x insists.
        let shadow =
            if state.rflags & RFLAGS_IF != 0 { KVM_X86_SHADOW_INT_STI } else { KVM_X86_SHADOW_INT_MOV_SS };
        e.interrupt.shadow = u8::try_from(shadow).unwrap_or(0);
    }
    e
}

/// The registers that a crash report shows. They can be had whatever happened to the vCPU.
pub(crate) fn visible(fd: &VcpuFd) -> Result<CpuState, EngineError> {
    let regs = fd.get_regs().map_err(host("KVM_GET_REGS"))?;
    let sregs = fd.get_sregs().map_err(host("KVM_GET_SREGS"))?;
    let mut state = CpuState::after_reset();
    state.general = [
        regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi, regs.r8, regs.r9,
        regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
    ];
    state.rip = regs.rip;
    state.rflags = regs.rflags;
    state.segments = [&sregs.es, &sregs.cs, &sregs.ss, &sregs.ds, &sregs.fs, &sregs.gs].map(segment);
    state.tr = segment(&sregs.tr);
    state.ldt = segment(&sregs.ldt);
    state.gdt = table(&sregs.gdt);
    state.idt = table(&sregs.idt);
    state.cr0 = sregs.cr0;
    state.cr2 = sregs.cr2;
    state.cr3 = sregs.cr3;
    state.cr4 = sregs.cr4;
    state.cr8 = sregs.cr8;
    state.efer = sregs.efer;
    state.msrs = vec![(APIC_BASE, sregs.apic_base)];
    Ok(state)
}

/// The whole state.
pub(crate) fn get(cx: &Context<'_>) -> Result<CpuState, EngineError> {
    let fd = cx.fd;
    // First, for it makes the kernel take INIT and SIPI that have arrived.
    let activity = fd.get_mp_state().map_err(host("KVM_GET_MP_STATE"))?.mp_state;
    let mut state = visible(fd)?;
    state.activity = match activity {
        KVM_MP_STATE_RUNNABLE => Activity::Running,
        KVM_MP_STATE_HALTED => Activity::Halted,
        _ => Activity::WaitForSipi,
    };
    let debug = fd.get_debug_regs().map_err(host("KVM_GET_DEBUGREGS"))?;
    state.debug[..4].copy_from_slice(&debug.db);
    (state.debug[4], state.debug[5]) = (debug.dr6, debug.dr7);
    let xsave = fd.get_xsave().map_err(host("KVM_GET_XSAVE"))?.region;
    let image = bytes(&xsave);
    state.fxsave = image[..FXSAVE].to_vec();
    if cx.xcr0 != 0 {
        let states = u64::from(xsave[FXSAVE / 4]) | u64::from(xsave[FXSAVE / 4 + 1]) << 32;
        if states & !u64::from(LEGACY_STATES) != 0 {
            state.extended = image[FXSAVE..].to_vec();
        }
        let xcrs = fd.get_xcrs().map_err(host("KVM_GET_XCRS"))?;
        state.xcr0 = xcrs.xcrs.iter().find(|x| x.xcr == 0).map_or(1, |x| x.value);
    }
    state.msrs.extend(cx.msrs.read(fd)?);
    state.msrs.sort_unstable();
    let lapic = fd.get_lapic().map_err(host("KVM_GET_LAPIC"))?.regs;
    state.lapic = lapic
        .chunks_exact(16)
        .map(|r| u32::from_le_bytes([r[0], r[1], r[2], r[3]].map(i8::cast_unsigned)))
        .collect();
    let events = fd.get_vcpu_events().map_err(host("KVM_GET_VCPU_EVENTS"))?;
    state.event = event(&events);
    state.interrupt_shadow = events.interrupt.shadow != 0;
    state.nmi_masked = events.nmi.masked != 0;
    state.nmi_pending = events.nmi.pending != 0;
    Ok(state)
}

/// Gives the vCPU a whole state. What the state leaves out is as after power-on.
pub(crate) fn set(cx: &Context<'_>, state: &CpuState) -> Result<(), EngineError> {
    let fd = cx.fd;
    let xsave = xsave_of(state)?;
    let lapic = lapic_of(state, cx.power_on)?;
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = state.general;
    let [es, cs, ss, ds, fs, gs] = [0, 1, 2, 3, 4, 5].map(|n| kvm_segment_of(&state.segments[n]));
    let own_base = APIC_BASE_RESET | if cx.index == 0 { APIC_BASE_BSP } else { 0 };
    let apic_base = state.msrs.iter().find(|(n, _)| *n == APIC_BASE).map_or(own_base, |(_, value)| *value);
    let sregs = kvm_sregs {
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
        tr: kvm_segment_of(&state.tr),
        ldt: kvm_segment_of(&state.ldt),
        gdt: kvm_table(&state.gdt),
        idt: kvm_table(&state.idt),
        cr0: state.cr0,
        cr2: state.cr2,
        cr3: state.cr3,
        cr4: state.cr4,
        cr8: state.cr8,
        efer: state.efer,
        apic_base,
        interrupt_bitmap: [0; 4],
    };
    let regs = kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip: state.rip,
        rflags: state.rflags,
    };
    // The order matters: the APIC's base decides how its registers are read, CR4 whether XCR0 may be set, and its registers
    // whether the timer's deadline counts.
    fd.set_sregs(&sregs).map_err(|error| {
        invalid(format!(
            "KVM refuses the segment and control registers ({error}): they contradict each other"
        ))
    })?;
    fd.set_regs(&regs).map_err(host("KVM_SET_REGS"))?;
    if cx.xcr0 != 0 {
        let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
        xcrs.xcrs[0].value = state.xcr0.max(1);
        fd.set_xcrs(&xcrs)
            .map_err(|error| invalid(format!("KVM refuses XCR0 = {:#x} ({error})", state.xcr0)))?;
    } else if state.xcr0 > 1 {
        return Err(invalid(format!("XCR0 is {:#x}, but the CPU model has no XSAVE", state.xcr0)));
    }
    // SAFETY: without AMX the kernel reads no more than the structure has; the process never asks for AMX in guests.
    unsafe { fd.set_xsave(&xsave) }
        .map_err(|error| invalid(format!("KVM refuses the x87, SSE and extended registers ({error})")))?;
    let [a, b, c, d, dr6, dr7] = state.debug;
    let debug = kvm_debugregs { db: [a, b, c, d], dr6, dr7, ..Default::default() };
    fd.set_debug_regs(&debug)
        .map_err(|error| invalid(format!("KVM refuses the debug registers ({error})")))?;
    fd.set_lapic(&lapic)
        .map_err(|error| invalid(format!("KVM refuses the local APIC's registers ({error})")))?;
    msr::write(fd, &state.msrs, &cx.power_on.msrs)?;
    let mp_state = match state.activity {
        Activity::Running => KVM_MP_STATE_RUNNABLE,
        Activity::Halted => KVM_MP_STATE_HALTED,
        Activity::WaitForSipi => KVM_MP_STATE_INIT_RECEIVED,
    };
    fd.set_mp_state(kvm_mp_state { mp_state }).map_err(host("KVM_SET_MP_STATE"))?;
    fd.set_vcpu_events(&kvm_events(state))
        .map_err(|error| invalid(format!("KVM refuses the events under delivery ({error})")))
}

fn xsave_of(state: &CpuState) -> Result<kvm_xsave, EngineError> {
    if state.fxsave.len() != FXSAVE {
        return Err(invalid(format!(
            "the FXSAVE image has {} bytes; it should have {FXSAVE}",
            state.fxsave.len()
        )));
    }
    if state.extended.len() > XSAVE - FXSAVE {
        return Err(invalid(format!(
            "{} bytes of extended registers are more than this engine has",
            state.extended.len()
        )));
    }
    let mut xsave = kvm_xsave::default();
    let image = state.fxsave.iter().chain(&state.extended).copied().collect::<Vec<u8>>();
    for (to, from) in xsave.region.iter_mut().zip(image.chunks(4)) {
        let mut word = [0; 4];
        word[..from.len()].copy_from_slice(from);
        *to = u32::from_le_bytes(word);
    }
    // A state that the header does not name would be taken as untouched.
    xsave.region[FXSAVE / 4] |= LEGACY_STATES;
    Ok(xsave)
}

fn lapic_of(state: &CpuState, power_on: &PowerOn) -> Result<kvm_lapic_state, EngineError> {
    if state.lapic.is_empty() {
        return Ok(power_on.lapic);
    }
    if state.lapic.len() != LAPIC_REGISTERS {
        return Err(invalid(format!(
            "the local APIC has {} registers; it should have {LAPIC_REGISTERS}",
            state.lapic.len()
        )));
    }
    let mut lapic = kvm_lapic_state::default();
    for (to, from) in lapic.regs.chunks_exact_mut(16).zip(&state.lapic) {
        to[..4].copy_from_slice(&from.to_le_bytes().map(u8::cast_signed));
    }
    Ok(lapic)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_survive_the_way_through_kvm() {
        for rights in [0x93, 0x9b, 0xa09b, 0xc093, 0xc0fb, 0x8b, 0x82, 0x1093, 0x13] {
            let s = Segment { selector: 0x33, base: 0x1234_5678_9abc, limit: 0xffff_ffff, rights };
            assert_eq!(segment(&kvm_segment_of(&s)), s);
        }
        assert_eq!(kvm_segment_of(&Segment { rights: 0x13, ..Segment::default() }).unusable, 1);
    }

    #[test]
    fn events_under_delivery_survive_the_way_through_kvm() {
        let all = [
            None,
            Some(Event::Interrupt(0x41)),
            Some(Event::SoftwareInterrupt(0x80)),
            Some(Event::Nmi),
            Some(Event::Exception(14, Some(2))),
            Some(Event::Exception(6, None)),
        ];
        for wanted in all {
            let state = CpuState { event: wanted, ..CpuState::after_reset() };
            assert_eq!(event(&kvm_events(&state)), wanted);
        }
    }

    #[test]
    fn images_of_the_wrong_size_are_refused() {
        let mut state = CpuState::after_reset();
        state.fxsave.pop();
        assert!(xsave_of(&state).is_err());
        let state = CpuState { extended: vec![0; XSAVE], ..CpuState::after_reset() };
        assert!(xsave_of(&state).is_err());
        let state = CpuState { lapic: vec![0; 63], ..CpuState::after_reset() };
        let power_on = PowerOn { lapic: kvm_lapic_state::default(), msrs: Vec::new() };
        assert!(lapic_of(&state, &power_on).is_err());
    }
}
