//! The engine under the machine of `tenon-core`: pause, resume, reset and end.

use tenon_core::{Activity, Clock, Engine, Machine, Request, Requests};
use vm_memory::{Bytes, GuestAddress};

use crate::fixture::{CODE, Mode, STACK, engine, setup};

#[test]
fn a_machine_is_paused_and_resumed_many_times_without_losing_a_step() {
    let Some(kvm) = engine() else { return };
    let setup = setup(4, Clock::real().unwrap());
    let ram = setup.ram.clone();
    let vm = kvm.create_vm(setup).unwrap();
    let machine = Machine::new(vm, 4, Clock::real().unwrap(), Requests::new()).unwrap();
    // inc ebx; jmp -4, and hlt; in real mode.
    ram.map().write_slice(&[0x66, 0x43, 0xeb, 0xfc, 0xf4], GuestAddress(CODE)).unwrap();
    let mut state = Mode::Real.state(CODE, STACK);
    state.general[3] = 0;
    machine.set_vcpu(0, &state).unwrap();
    state.rip = 4;
    machine.set_vcpu(1, &state).unwrap();
    let mut last = 0;
    let mut moved = 0;
    for _ in 0..200 {
        machine.resume();
        machine.pause();
        let state = machine.vcpu_state(0).unwrap();
        assert!(state.general[3] >= last && matches!(state.rip, 0 | 2), "{state}");
        moved += u32::from(state.general[3] > last);
        last = state.general[3];
    }
    // A pause may come before the first step; a machine that never moves would not be running.
    while moved == 0 {
        machine.resume();
        machine.pause();
        moved += u32::from(machine.vcpu_state(0).unwrap().general[3] > last);
    }
    assert!(machine.requests().receiver().try_recv().is_err(), "nobody asked for anything");
    assert_eq!(machine.vcpu_state(3).unwrap().activity, Activity::WaitForSipi);
    machine.reset().unwrap();
    assert_eq!(machine.vcpu_state(0).unwrap().rip, 0xfff0);
    assert_eq!(machine.vcpu_state(1).unwrap().activity, Activity::WaitForSipi);
}

#[test]
fn a_crash_reaches_whoever_runs_the_machine() {
    let Some(kvm) = engine() else { return };
    let vm = kvm.create_vm(setup(2, Clock::real().unwrap())).unwrap();
    let machine = Machine::new(vm, 2, Clock::real().unwrap(), Requests::new()).unwrap();
    // The reset vector, where this machine has nothing.
    machine.resume();
    match machine.requests().receiver().recv().unwrap() {
        Request::Crash { vcpu: 0, report } => assert!(report.to_string().contains("rip"), "{report}"),
        other => panic!("{other:?}"),
    }
}
