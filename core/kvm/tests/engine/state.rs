//! Getting, setting, saving and restoring state.

use iced_x86::code_asm::*;
use tenon_core::{Activity, CpuModel, CpuState};

use crate::fixture::{CODE, EXIT_PORT, Guest, Mode, RAM, STACK, engine, exit, quality};

const TSC: u32 = 0x10;
const TSC_ADJUST: u32 = 0x3b;
const LSTAR: u32 = 0xc000_0082;

fn msr(state: &CpuState, number: u32) -> u64 {
    state.msrs.iter().find(|(n, _)| *n == number).unwrap().1
}

/// Counts in a register, in memory and, by mode, in an SSE register and on the x87 stack, or in an MSR and in a debug register; and ends the run
/// with all of that at each step. (Kernel code with x87 would not run where KVM emulates kernel code.)
fn counts(mode: Mode, a: &mut CodeAssembler) {
    let mut again = a.create_label();
    a.xor(ebx, ebx).unwrap();
    a.mov(r15, 0x1234_5678_9abc_def0u64).unwrap();
    if mode == Mode::User {
        a.fldz().unwrap();
    }
    a.set_label(&mut again).unwrap();
    a.inc(ebx).unwrap();
    a.inc(dword_ptr(0x7000)).unwrap();
    if mode == Mode::User {
        a.movd(xmm7, ebx).unwrap();
        a.fld1().unwrap();
        a.faddp(st1, st0).unwrap();
        a.movd(eax, xmm7).unwrap();
        a.fist(dword_ptr(0x7008)).unwrap();
        a.mov(ecx, dword_ptr(0x7008)).unwrap();
    } else {
        a.mov(ecx, LSTAR).unwrap();
        a.mov(eax, ebx).unwrap();
        a.xor(edx, edx).unwrap();
        a.wrmsr().unwrap();
        a.mov(dr0, rbx).unwrap();
        a.rdmsr().unwrap();
        a.mov(rcx, dr0).unwrap();
    }
    a.shl(ecx, 8i32).unwrap();
    a.or(eax, ecx).unwrap();
    a.mov(ecx, dword_ptr(0x7000)).unwrap();
    a.shl(ecx, 16i32).unwrap();
    a.or(eax, ecx).unwrap();
    a.mov(edx, u32::from(EXIT_PORT)).unwrap();
    a.out(dx, eax).unwrap();
    a.jmp(again).unwrap();
}

#[test]
fn a_state_that_was_set_is_the_state_that_is_got() {
    let Some(kvm) = engine() else { return };
    for mode in [Mode::Real, Mode::Protected, Mode::Long, Mode::User] {
        let mut guest = Guest::new(&kvm, 1);
        let mut state = mode.state(CODE, STACK);
        for (n, register) in (1..).zip(&mut state.general) {
            *register = n * 0x0101_0101;
        }
        if mode == Mode::Long {
            state.general[15] = u64::MAX;
            state.segments[4].base = 0x7fff_1234_5000;
        }
        state.fxsave[160..176].copy_from_slice(&[7; 16]);
        state.debug[1] = 0x1_2345;
        state.cr2 = 0xdead_b000;
        state.activity = Activity::Halted;
        guest.vcpus[0].set_state(&state).unwrap();
        let got = guest.vcpus[0].state().unwrap();
        // What was left to the engine comes back filled in; and unused bytes of the FXSAVE image are the host's.
        let mut expected = state.clone();
        expected.msrs.clone_from(&got.msrs);
        expected.lapic.clone_from(&got.lapic);
        expected.xcr0 = got.xcr0;
        expected.fxsave[28..32].copy_from_slice(&got.fxsave[28..32]);
        expected.fxsave[416..].copy_from_slice(&got.fxsave[416..]);
        assert!(got == expected, "{mode:?}: got\n{got}\nexpected\n{expected}");
        assert_eq!(got.lapic.len(), 64);
        // A state that was got can be set, and gives the same again, the TSC apart.
        guest.vcpus[0].set_state(&got).unwrap();
        let mut again = guest.vcpus[0].state().unwrap();
        let clock = |n: u32| matches!(n, TSC | TSC_ADJUST);
        again.msrs.iter_mut().zip(&got.msrs).filter(|(a, _)| clock(a.0)).for_each(|(a, b)| a.1 = b.1);
        assert!(again == got, "{mode:?}: got\n{again}\nexpected\n{got}");
    }
}

#[test]
fn a_saved_machine_goes_on_in_a_new_one() {
    let Some(kvm) = engine() else { return };
    for mode in [Mode::User, Mode::Long] {
        let mut old = Guest::new(&kvm, 2);
        old.load(mode, |a| counts(mode, a));
        for step in 1..=3 {
            assert_eq!(old.run().value(), step << 16 | step << 8 | step, "{mode:?}");
        }
        let shared = old.vm.save().unwrap();
        let states: Vec<_> = old.vcpus.iter_mut().map(|vcpu| vcpu.state().unwrap()).collect();
        let memory: Vec<_> = (0..RAM / 8).map(|n| old.peek(n * 8)).collect();
        drop(old);

        let mut new = Guest::new(&kvm, 2);
        (0..).zip(&memory).for_each(|(n, word)| new.put(n * 8, &word.to_le_bytes()));
        new.vm.restore(&shared).unwrap();
        for (vcpu, state) in new.vcpus.iter_mut().zip(&states) {
            vcpu.set_state(state).unwrap();
        }
        for step in 4..=6 {
            assert_eq!(new.run().value(), step << 16 | step << 8 | step, "{mode:?}");
        }
        let state = new.vcpus[0].state().unwrap();
        assert_eq!(state.general[15], 0x1234_5678_9abc_def0);
        if mode == Mode::Long {
            assert_eq!((msr(&state, LSTAR), state.debug[0]), (6, 6));
        }
        assert_eq!(new.vcpus[1].state().unwrap().activity, Activity::WaitForSipi);
    }
}

#[test]
fn the_tsc_goes_on_from_where_it_was_saved() {
    let Some(kvm) = engine() else { return };
    if !quality(&kvm).sets_tsc {
        println!("not run: this host's KVM gives guests the host's time stamp counter as it is");
        return;
    }
    let mut guest = Guest::new(&kvm, 1);
    let mut state = guest.vcpus[0].state().unwrap();
    let far = 1 << 59;
    state.msrs.iter_mut().find(|(n, _)| *n == TSC).unwrap().1 = far;
    guest.vcpus[0].set_state(&state).unwrap();
    let now = msr(&guest.vcpus[0].state().unwrap(), TSC);
    assert!((far..far + (1 << 40)).contains(&now), "{now:#x}");
}

#[test]
fn a_reset_puts_the_interrupt_controllers_and_registers_back() {
    let Some(kvm) = engine() else { return };
    let mut guest = Guest::new(&kvm, 1);
    let fresh = (guest.vm.save().unwrap(), guest.vcpus[0].state().unwrap());
    guest
        .play(Mode::Long, |a| {
            a.mov(rdi, 0xfec0_0000u64).unwrap();
            a.mov(dword_ptr(rdi), 0x12u32).unwrap();
            a.mov(dword_ptr(rdi + 16), 0x8031u32).unwrap();
            a.mov(rdi, 0xfee0_00f0u64).unwrap();
            a.mov(dword_ptr(rdi), 0x1ffu32).unwrap();
            a.mov(ecx, LSTAR).unwrap();
            a.mov(eax, 7u32).unwrap();
            a.xor(edx, edx).unwrap();
            a.wrmsr().unwrap();
            exit(a);
        })
        .value();
    // Magic, TSC frequency and kvmclock come before the chips.
    let chips = |saved: &[u8]| saved[24..].to_vec();
    assert_ne!(chips(&guest.vm.save().unwrap()), chips(&fresh.0));
    assert_ne!(guest.vcpus[0].state().unwrap().lapic, fresh.1.lapic);
    guest.vm.reset().unwrap();
    guest.vcpus[0].set_state(&CpuState::after_reset()).unwrap();
    assert_eq!(chips(&guest.vm.save().unwrap()), chips(&fresh.0));
    let state = guest.vcpus[0].state().unwrap();
    assert_eq!(state.lapic, fresh.1.lapic);
    assert_eq!(msr(&state, LSTAR), 0);
    assert_eq!((state.rip, state.segments[1].base), (0xfff0, 0xffff_0000));
}

#[test]
fn states_that_are_none_are_refused() {
    let Some(kvm) = engine() else { return };
    let mut guest = Guest::new(&kvm, 1);
    let saved = guest.vm.save().unwrap();
    let error = |bytes: &[u8]| guest.vm.restore(bytes).unwrap_err().to_string();
    assert!(error(b"").contains("not saved by the KVM engine"));
    assert!(error(&saved[..saved.len() - 1]).contains("bytes"));
    let mut later = saved.clone();
    later[7] = 9;
    assert!(error(&later).contains("version 9"));
    let mut foreign = saved.clone();
    foreign[8..16].copy_from_slice(&77u64.to_le_bytes());
    assert!(error(&foreign).contains("77 kHz"));
    guest.vm.restore(&saved).unwrap();

    let refused = |guest: &mut Guest, change: fn(&mut CpuState)| {
        let mut state = CpuState::after_reset();
        change(&mut state);
        guest.vcpus[0].set_state(&state).unwrap_err().to_string()
    };
    assert!(refused(&mut guest, |s| s.fxsave = vec![0; 511]).contains("511"));
    assert!(refused(&mut guest, |s| s.lapic = vec![0; 3]).contains("3 registers"));
    assert!(refused(&mut guest, |s| s.xcr0 = 1 << 40).contains("XCR0"));
    assert!(refused(&mut guest, |s| s.cr4 = 1 << 40).contains("contradict"));
    assert!(refused(&mut guest, |s| s.msrs = vec![(0x1234_5678, 1)]).contains("MSR 0x12345678"));
}

#[test]
fn extended_registers_of_the_full_model_are_part_of_the_state() {
    let Some(kvm) = engine() else { return };
    let mut guest = Guest::with(&kvm, 1, CpuModel::Max, RAM);
    let mut state = guest.vcpus[0].state().unwrap();
    assert!(state.extended.is_empty(), "nothing is in use yet");
    state.xcr0 = 7;
    // The header names AVX; the upper half of YMM0 begins at byte 576 of the image.
    state.extended = vec![0; 512];
    state.extended[0] = 7;
    state.extended[64..80].copy_from_slice(&[9; 16]);
    state.cr4 |= 1 << 18;
    if guest.vcpus[0].set_state(&state).is_err() {
        println!("not run: this host's KVM has no AVX");
        return;
    }
    let got = guest.vcpus[0].state().unwrap();
    assert_eq!(got.extended[64..80], [9; 16]);
    assert_eq!(got.xcr0, 7);
    guest.vcpus[0].set_state(&CpuState::after_reset()).unwrap();
    let got = guest.vcpus[0].state().unwrap();
    assert_eq!((got.xcr0, got.extended.len()), (1, 0));
}
