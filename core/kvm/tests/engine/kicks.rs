//! Kicks: none is lost, wherever the vCPU is.

use std::sync::mpsc;

use iced_x86::code_asm::*;
use tenon_core::{Activity, Stop};

use crate::fixture::{CODE, EXIT_PORT, Guest, Mode, engine};

const KICKS: usize = 1_000;

/// Kicks the first vCPU [`KICKS`] times, each time as soon as the last kick was answered, so that kicks come before, at and after the entry.
/// A lost kick would hang here.
fn each_kick_is_answered(guest: &mut Guest) {
    let kicker = guest.vcpus[0].kicker();
    let vcpu = &mut guest.vcpus[0];
    let (answer, answers) = mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for _ in 0..KICKS {
                assert!(matches!(vcpu.run().unwrap(), Stop::Kicked));
                answer.send(()).unwrap();
            }
        });
        for n in 0..KICKS {
            // Vary the moment, so that the kick meets every part of the way into the guest.
            for _ in 0..n * 7 % 500 {
                std::hint::spin_loop();
            }
            kicker.kick();
            answers.recv().unwrap();
        }
    });
}

#[test]
fn no_kick_of_a_spinning_vcpu_is_lost() {
    let Some(kvm) = engine() else { return };
    let mut guest = Guest::new(&kvm, 1);
    guest.load(Mode::Long, |a| {
        let mut forever = a.create_label();
        a.set_label(&mut forever).unwrap();
        a.jmp(forever).unwrap();
    });
    each_kick_is_answered(&mut guest);
    assert_eq!(guest.vcpus[0].state().unwrap().rip, CODE);
}

#[test]
fn no_kick_of_a_spinning_user_program_is_lost() {
    let Some(kvm) = engine() else { return };
    let mut guest = Guest::new(&kvm, 1);
    guest.load(Mode::User, |a| {
        let mut forever = a.create_label();
        a.set_label(&mut forever).unwrap();
        a.jmp(forever).unwrap();
    });
    each_kick_is_answered(&mut guest);
    assert_eq!(guest.vcpus[0].state().unwrap().rip, CODE);
}

#[test]
fn no_kick_of_a_halted_vcpu_is_lost() {
    let Some(kvm) = engine() else { return };
    let mut guest = Guest::new(&kvm, 1);
    guest.load(Mode::Long, |a| a.hlt().unwrap());
    each_kick_is_answered(&mut guest);
    let state = guest.vcpus[0].state().unwrap();
    assert_eq!((state.activity, state.rip), (Activity::Halted, CODE + 1));
}

#[test]
fn no_kick_of_a_vcpu_that_waits_for_sipi_is_lost() {
    let Some(kvm) = engine() else { return };
    let mut guest = Guest::new(&kvm, 2);
    guest.vcpus.swap(0, 1);
    each_kick_is_answered(&mut guest);
    assert_eq!(guest.vcpus[0].state().unwrap().activity, Activity::WaitForSipi);
}

#[test]
fn kicks_before_a_run_make_that_run_return_at_once_and_only_that_one() {
    let Some(kvm) = engine() else { return };
    let mut guest = Guest::new(&kvm, 1);
    guest.load(Mode::Long, |a| {
        a.mov(eax, 9u32).unwrap();
        crate::fixture::exit(a);
    });
    let kicker = guest.vcpus[0].kicker();
    kicker.kick();
    kicker.kick();
    assert!(matches!(guest.vcpus[0].run().unwrap(), Stop::Kicked));
    assert_eq!(guest.vcpus[0].state().unwrap().rip, CODE, "nothing ran");
    assert_eq!(guest.run().value(), 9);
}

#[test]
fn a_kick_from_a_device_leaves_the_access_complete() {
    let Some(kvm) = engine() else { return };
    let mut guest = Guest::new(&kvm, 1);
    guest.load(Mode::Long, |a| {
        a.mov(edx, u32::from(EXIT_PORT)).unwrap();
        a.mov(eax, 1u32).unwrap();
        a.out(dx, eax).unwrap();
        a.mov(eax, 2u32).unwrap();
        a.out(dx, al).unwrap();
    });
    assert_eq!(guest.run().value(), 1);
    // mov edx, imm32; mov eax, imm32; out.
    assert_eq!(guest.vcpus[0].state().unwrap().rip, CODE + 5 + 5 + 1);
    assert_eq!(guest.run().value(), 2);
}

#[test]
fn a_kicker_outlives_its_vcpu() {
    let Some(kvm) = engine() else { return };
    let guest = Guest::new(&kvm, 1);
    let kicker = guest.vcpus[0].kicker();
    drop(guest);
    kicker.kick();
}
