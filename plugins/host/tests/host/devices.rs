//! Devices that work.

use std::sync::mpsc;
use std::time::Duration;

use tenon_core::{Clock, Lifecycle, Request};
use tenon_plugins::{CHANNEL_CAPACITY, Status};

use crate::machine::{BASE, Machine, misdeed, owned};

#[test]
fn registers_keep_what_the_guest_writes() {
    let machine = Machine::still();
    let device = machine.misdeed(&[]);
    machine.write(0, 0x5a);
    assert_eq!(machine.read(0), 0x5a);
    assert_eq!(device.status(), Status::Running);
    assert_eq!(device.usage().calls, 2);
}

#[test]
fn a_timer_fires_at_its_time_and_once() {
    let machine = Machine::still();
    let _device = machine.misdeed(&[]);
    machine.write(4, 1000);
    machine.parts.clock.advance_to(999);
    assert_eq!(machine.read(4), 0);
    machine.parts.clock.advance_to(1_000_000);
    assert_eq!(machine.read(4), 1);
}

#[test]
fn lines_follow_the_device_and_go_low_with_it() {
    let machine = Machine::still();
    let device = machine.misdeed(&[("gsi", "9")]);
    assert_eq!(device.description().lines[0].gsi, Some(9));
    machine.write(10, 1);
    machine.write(10, 1);
    assert_eq!(machine.levels(), [(9, true)]);
    drop(device);
    assert_eq!(machine.levels(), [(9, true), (9, false)]);
    assert!(machine.parts.pio.claims().is_empty());
}

#[test]
fn bytes_pass_through_a_channel_both_ways() {
    let machine = Machine::new(Clock::real().unwrap());
    let device = machine.misdeed(&[]);
    let console = device.channel("console").unwrap();
    let (sender, receiver) = mpsc::channel();
    console.set_sink(move |bytes| sender.send(bytes.to_vec()).unwrap()).unwrap();
    machine.write(8, u64::from(b'!'));
    assert_eq!(receiver.recv_timeout(Duration::from_secs(30)).unwrap(), b"!");
    assert!(console.flush(Duration::from_secs(30)));
    assert_eq!(console.push(b"hello, this is more than sixteen bytes"), 38);
    // The worker calls the device; until then the register reads as it stands.
    while machine.read(9) < 38 {
        std::thread::yield_now();
    }
    assert_eq!(machine.read(8), u64::from(b'h'));
}

#[test]
fn a_full_channel_takes_no_more_and_an_unheard_one_drops_and_counts() {
    let machine = Machine::still();
    let device = machine.misdeed(&[]);
    let console = device.channel("console").unwrap();
    machine.write(8, 1);
    assert_eq!(console.dropped(), 1);
    assert!(console.take(10).is_empty());
    machine.write(8, 2);
    assert_eq!(console.take(10), [2]);
    // A paused device does not read, so that its input fills.
    device.pause();
    assert_eq!(console.push(&vec![0; CHANNEL_CAPACITY + 1]), CHANNEL_CAPACITY);
    assert_eq!(console.push_all(b"more", Duration::from_millis(1)), 0);
    device.resume();
    assert_eq!(console.push_all(b"more", Duration::from_secs(30)), 4);
    drop(device);
}

#[test]
fn a_request_of_the_device_reaches_whoever_runs_the_machine() {
    let machine = Machine::still();
    let _device = machine.misdeed(&[]);
    machine.write(12, 3);
    let request = machine.parts.requests.receiver().try_recv().unwrap();
    assert!(matches!(request, Request::Exit(3)), "{request:?}");
}

#[test]
fn overlapping_claims_are_refused_and_both_owners_are_named() {
    let machine = Machine::still();
    let _first = machine.misdeed(&[]);
    let error = misdeed().attach("second", &owned(&[("base", "0x50f"), ("gsi", "6")]), &machine.parts);
    let error = error.err().unwrap().to_string();
    assert!(error.contains("`second`") && error.contains("`misdeed0`"), "{error}");
    // Nothing of the second is left: its line can be had.
    let _third =
        misdeed().attach("third", &owned(&[("base", "0x600"), ("gsi", "6")]), &machine.parts).unwrap();
}

#[test]
fn a_saved_state_makes_an_equal_device_elsewhere() {
    let from = Machine::still();
    let saved = from.misdeed(&[]);
    from.write(0, 0x77);
    from.write(10, 1);
    from.write(4, 5000);
    let (schema, data) = saved.save().unwrap();

    let to = Machine::still();
    let restored = to.misdeed(&[]);
    restored.restore(schema, &data).unwrap();
    assert_eq!(to.read(0), 0x77);
    assert_eq!(to.levels(), [(5, true)]);
    to.parts.clock.advance_to(5000);
    assert_eq!(to.read(4), 1);
}

#[test]
fn a_state_that_cannot_be_read_leaves_the_device_as_it_was() {
    let machine = Machine::still();
    let device = machine.misdeed(&[]);
    machine.write(0, 0x11);
    machine.write(10, 1);
    machine.write(4, 100);
    let error = device.restore(9, &[1, 2, 3]).unwrap_err();
    assert!(error.contains("misdeed0") && error.contains("schema 9"), "{error}");
    device.restore(1, &[1]).unwrap_err();
    assert_eq!(machine.read(0), 0x11);
    assert_eq!(machine.levels(), [(5, true)]);
    machine.parts.clock.advance_to(100);
    assert_eq!(machine.read(4), 1);
}

#[test]
fn a_paused_device_is_told_nothing_until_it_goes_on() {
    let machine = Machine::still();
    let device = machine.misdeed(&[]);
    machine.write(4, 10);
    device.pause();
    // The clock is not stopped here, as it is in a machine: the call that comes too late must not get through.
    machine.parts.clock.advance_to(20);
    assert_eq!(machine.read(4), 0);
    device.resume();
    machine.parts.clock.advance_to(21);
    assert_eq!(machine.read(4), 1);
}

#[test]
fn many_accesses_cost_few_checkpoints() {
    let machine = Machine::still();
    let device = machine.misdeed(&[]);
    for value in 0..10_000 {
        machine.write(0, value);
    }
    let usage = device.usage();
    assert_eq!((usage.calls, usage.faults), (10_000, 0));
    assert!((5..20).contains(&usage.checkpoints), "{usage:?}");
    assert_eq!(machine.parts.pio.read(BASE, 1), 9999 & 0xff);
}
