//! Devices that do what they must not. Each test sees in the counters that they did.

use tenon_core::{Clock, Lifecycle};
use tenon_plugins::{AttachError, Fault, Status};

use crate::machine::{BASE, Machine, misdeed, owned};

const MISDEEDS: [&str; 6] = ["spin", "trap", "memory", "handles", "host-calls", "stack"];

fn is_the_fault_of(misdeed: &str, fault: &Fault) -> bool {
    match misdeed {
        "spin" => matches!(fault, Fault::Deadline(_)),
        "memory" | "handles" => matches!(fault, Fault::Limit(_)),
        "host-calls" => matches!(fault, Fault::HostCalls(_)),
        _ => matches!(fault, Fault::Trap(_)),
    }
}

#[test]
fn whatever_it_does_before_it_has_started_refuses_the_device_and_says_why() {
    for when in ["describe", "start", "first-save"] {
        for what in MISDEEDS {
            let machine = Machine::still();
            let settings = owned(&[("misdeed", what), ("when", when)]);
            let error = misdeed().attach("bad", &settings, &machine.parts).err().unwrap();
            let AttachError::Fault { call, fault, .. } = &error else { panic!("{what} in {when}: {error}") };
            assert_eq!(*call, when.trim_start_matches("first-"));
            assert!(is_the_fault_of(what, fault), "{what} in {when}: {fault:?}");
            assert!(machine.parts.pio.claims().is_empty(), "{what} in {when} left claims behind");
        }
    }
}

/// A device that has seen some life: the byte 0x5a kept, the timer fired once and armed again, the line high, a byte waiting.
fn lively(settings: &[(&str, &str)]) -> (Machine, std::sync::Arc<tenon_plugins::Device>) {
    let machine = Machine::still();
    let device = machine.misdeed(settings);
    let _ = device.channel("console").unwrap().take(0);
    machine.write(0, 0x5a);
    machine.write(10, 1);
    machine.write(4, 100);
    machine.parts.clock.advance_to(100);
    machine.write(4, 1000);
    machine.write(8, u64::from(b'1'));
    machine.write(1, 1);
    (machine, device)
}

fn assert_lively(machine: &Machine, what: &str) {
    assert_eq!(machine.read(0), 0x5a, "{what}");
    assert_eq!(machine.read(4), 1, "{what}");
    assert_eq!(machine.levels(), [(5, true)], "{what}: the guest must not see the line move");
    machine.parts.clock.advance_to(1100);
    assert_eq!(machine.read(4), 2, "{what}: the timer must still be armed");
}

#[test]
fn a_device_that_faults_in_an_access_goes_on_with_its_state() {
    for what in MISDEEDS {
        for (when, sign) in [("read", b'r'), ("write", b'w')] {
            let case = format!("{what} in {when}");
            let (machine, device) = lively(&[("misdeed", what), ("when", when)]);
            if when == "read" {
                assert_eq!(machine.read(2), 0xff, "{case}");
            } else {
                machine.write(2, 0);
            }
            let usage = device.usage();
            // Twice: the call is made once more before it is given up.
            assert_eq!((usage.faults, usage.restarts, usage.lost_calls), (2, 1, 1), "{case}: {usage:?}");
            assert_eq!(usage.divergences, 0, "{case}");
            assert_eq!(device.status(), Status::Running, "{case}");
            assert_lively(&machine, &case);
            // What the faulted call wrote before its fault was written once.
            assert_eq!(device.channel("console").unwrap().take(10), [b'1', sign], "{case}");
        }
    }
}

#[test]
fn a_device_that_faults_in_its_timer_goes_on_with_its_state() {
    let (machine, device) = lively(&[("misdeed", "trap"), ("when", "timer")]);
    machine.parts.clock.advance_to(1100);
    let usage = device.usage();
    assert_eq!((usage.faults, usage.lost_calls), (2, 1));
    assert_eq!(
        (machine.read(0), machine.read(4)),
        (0x5a, 1),
        "the call that faulted is lost, and nothing else"
    );
    machine.write(1, 0);
    machine.write(4, 100);
    machine.parts.clock.advance_to(2000);
    assert_eq!(machine.read(4), 2);
}

#[test]
fn a_device_that_faults_when_bytes_come_gets_the_next_ones() {
    let machine = Machine::new(Clock::real().unwrap());
    let device = machine.misdeed(&[("misdeed", "trap"), ("when", "readable")]);
    machine.write(1, 1);
    device.channel("console").unwrap().push(b"a");
    while device.usage().restarts < 1 {
        std::thread::yield_now();
    }
    machine.write(1, 0);
    device.channel("console").unwrap().push(b"b");
    while machine.read(9) < 2 {
        std::thread::yield_now();
    }
    assert_eq!((machine.read(8), machine.read(8)), (u64::from(b'a'), u64::from(b'b')));
}

#[test]
fn a_device_that_faults_in_reset_keeps_the_machine_alive() {
    let (machine, device) = lively(&[("misdeed", "spin"), ("when", "reset")]);
    device.reset();
    assert_eq!(device.usage().lost_calls, 1);
    assert_eq!(device.status(), Status::Running);
    assert_eq!(machine.read(0), 0x5a);
}

#[test]
fn a_device_that_keeps_faulting_is_switched_off_and_the_machine_goes_on() {
    let (machine, device) = lively(&[("misdeed", "trap"), ("when", "read")]);
    let other =
        misdeed().attach("other", &owned(&[("base", "0x600"), ("gsi", "6")]), &machine.parts).unwrap();
    for _ in 0..3 {
        assert_eq!(machine.read(2), 0xff);
    }
    assert_eq!(device.status(), Status::Failed);
    assert_eq!(device.usage().faults, 6);
    assert_eq!(machine.levels(), [(5, true), (5, false)], "a device that is off holds no line");
    assert_eq!(machine.read(0), 0xff);
    machine.write(0, 1);
    machine.parts.clock.advance_to(5000);
    assert!(device.save().unwrap_err().contains("misdeed0"));
    machine.parts.pio.write(0x600, 1, 0x33);
    assert_eq!(machine.parts.pio.read(0x600, 1), 0x33);
    assert_eq!(other.status(), Status::Running);

    device.reset();
    assert_eq!(device.status(), Status::Running);
    assert_eq!(machine.read(0), 0, "a reset tries it again, as after power-on");
}

#[test]
fn a_device_that_can_no_longer_be_saved_is_switched_off_in_the_end() {
    let (machine, device) = lively(&[("misdeed", "spin"), ("when", "save")]);
    assert!(device.save().is_err());
    assert_eq!(device.usage().faults, 2);
    assert_eq!(machine.read(0), 0x5a, "it goes on from the journal");
    for _ in 0..1100 {
        machine.read(0);
    }
    assert_eq!(device.status(), Status::Failed);
    assert_eq!(device.usage().faults, 6);
}

#[test]
fn a_device_that_faults_in_restore_leaves_the_old_one_in_place() {
    let (machine, device) = lively(&[("misdeed", "spin"), ("when", "restore")]);
    let (schema, data) = device.save().unwrap();
    let error = device.restore(schema, &data).unwrap_err();
    assert!(error.contains("deadline"), "{error}");
    assert_lively(&machine, "after a restore that failed");
}

#[test]
fn a_flood_of_messages_is_cut() {
    let machine = Machine::still();
    let device = machine.misdeed(&[]);
    machine.parts.pio.write(BASE + 13, 2, 9000);
    assert_eq!(device.usage().faults, 0);
    machine.parts.pio.write(BASE + 13, 2, 20_000);
    assert_eq!(device.usage().faults, 2, "that is more than a call may call the host");
}

#[test]
fn a_restart_replays_time_and_input_as_they_were() {
    let machine = Machine::new(Clock::real().unwrap());
    let device = machine.misdeed(&[("misdeed", "trap"), ("when", "write")]);
    device.channel("console").unwrap().push(b"xyz");
    while machine.read(9) < 3 {
        std::thread::yield_now();
    }
    assert_eq!(machine.read(8), u64::from(b'x'));
    machine.read(14);
    machine.write(1, 1);
    machine.write(2, 0);
    assert_eq!(device.usage().lost_calls, 1);
    assert_eq!(device.usage().divergences, 0);
    assert_eq!((machine.read(8), machine.read(8), machine.read(8)), (u64::from(b'y'), u64::from(b'z'), 0xff));
}
