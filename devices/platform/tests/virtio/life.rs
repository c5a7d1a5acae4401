//! Resets with requests in flight, saved state, hot plug.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use tenon_core::Lifecycle;
use tenon_platform::{PciError, PciSlot};
use vm_memory::{Bytes, GuestAddress};

use crate::device::Echo;
use crate::driver::{ConfigSpace, F_WRITE, VERSION_1};
use crate::machine::TestMachine;
use crate::queues::{FORMATS, running};
use crate::random::Random;

#[test]
fn after_a_reset_a_request_in_flight_writes_no_ring() {
    for format in FORMATS {
        let machine = TestMachine::new(1);
        let (device, mut driver, mut ring) = running(&machine, format, 8);
        let to = driver.allocate(16);
        for _ in 0..1000 {
            for _ in 0..4 {
                ring.add(&[(to, 16, F_WRITE)]);
            }
            let mut queue = device.started.lock().unwrap().as_mut().unwrap().queues[0].take().unwrap();
            let mut requests = Vec::new();
            queue.take(3, &mut requests).unwrap();
            assert_eq!(requests.len(), 3);
            let stops = device.stops.load(Ordering::SeqCst);
            driver.set_status(0);
            assert_eq!((driver.status(), device.stops.load(Ordering::SeqCst)), (0, stops + 1));
            // A device that does not let go, against its obligation.
            let before: Vec<u64> = ring.places.iter().map(|place| driver.peek(*place)).collect();
            for request in &requests {
                queue.complete(request.token, 1);
            }
            queue.publish();
            assert!(queue.arm() && queue.take(9, &mut requests).is_ok() && requests.len() == 3);
            let after: Vec<u64> = ring.places.iter().map(|place| driver.peek(*place)).collect();
            assert_eq!((before, machine.controller.take_msis()), (after, vec![]));
            assert!(driver.negotiate(VERSION_1 | format));
            for place in ring.places {
                machine.ram.map().write_slice(&[0; 256], GuestAddress(place)).unwrap();
            }
            ring = driver.queue_at(0, 8, 1, ring.places);
            driver.set_driver_ok();
        }
        ring.add(&[(to, 16, F_WRITE)]);
        assert_eq!(device.work(0), 1);
        assert!(ring.poll().is_some());
    }
}

#[test]
fn a_restored_machine_goes_on_where_it_was_saved_and_gives_unfinished_requests_again() {
    for format in FORMATS {
        let machine = TestMachine::new(1);
        let (device, mut driver, mut ring) = running(&machine, format, 8);
        let (from, to) = (driver.allocate(16), driver.allocate(64));
        driver.poke(from, [7u8; 16]);
        for _ in 0..11 {
            ring.add(&[(from, 16, 0), (to, 16, F_WRITE)]);
            device.work(0);
            ring.poll().unwrap();
        }
        let ids: Vec<_> = (0..3).map(|n| ring.add(&[(from, 16, 0), (to + 16 * n, 16, F_WRITE)])).collect();
        let requests = device.take(0, 3).unwrap();
        // The second one is answered, which in a packed ring overwrites what described the first.
        let second = requests.into_iter().nth(1).unwrap();
        device.answer(0, vec![second]);
        assert_eq!(ring.poll().unwrap().0, ids[1]);
        machine.controller.take_msis();
        let (schema, state) = machine.pci.save().unwrap();

        let restored = TestMachine::new(1);
        let new = Echo::new(&[8, 8]);
        restored.attach("echo", &new);
        let mut memory = vec![0; crate::machine::RAM as usize];
        machine.ram.map().read_slice(&mut memory, GuestAddress(0)).unwrap();
        restored.ram.map().write_slice(&memory, GuestAddress(0)).unwrap();
        restored.pci.restore(schema, &state).unwrap();
        assert!(new.started.lock().unwrap().is_none());
        restored.pci.resume();
        assert_eq!(restored.pci.save().unwrap(), (schema, state.clone()));
        ring.move_to(&restored);
        ring.add(&[(from, 16, 0), (to + 48, 16, F_WRITE)]);
        assert_eq!(new.work(0), 3);
        let back: Vec<_> = std::iter::from_fn(|| ring.poll()).collect();
        assert_eq!(back.iter().map(|(_, length)| *length).collect::<Vec<_>>(), [16; 3]);
        assert_eq!((back[0].0, back[1].0), (ids[0], ids[2]));
        assert_eq!(
            restored.ram.map().read_obj::<[u64; 8]>(GuestAddress(to)).unwrap(),
            [u64::from_le_bytes([8; 8]); 8]
        );
        let msis = restored.controller.take_msis();
        assert!(msis.iter().all(|data| *data == 0x41), "{msis:?}");

        // Cut short anywhere, it is refused and nothing else happens.
        for length in 0..state.len() {
            assert!(restored.pci.restore(schema, &state[..length]).is_err());
        }
        assert!(restored.pci.restore(schema + 1, &state).unwrap_err().contains("schema"));
    }
}

#[test]
fn a_damaged_state_is_refused_or_does_no_harm() {
    let (mut refused, mut taken) = (0, 0);
    for format in FORMATS {
        let machine = TestMachine::new(1);
        let (device, mut driver, mut ring) = running(&machine, format, 8);
        let to = driver.allocate(16);
        for _ in 0..3 {
            ring.add(&[(to, 16, F_WRITE)]);
        }
        let requests = device.take(0, 3).unwrap();
        let (schema, state) = machine.pci.save().unwrap();
        drop(requests);
        for seed in 0..1000 {
            let mut random = Random::new(seed);
            let mut damaged = state.clone();
            for _ in 0..=random.below(3) {
                damaged[random.below(state.len() as u64) as usize] = random.next() as u8;
            }
            if machine.pci.restore(schema, &damaged).is_err() {
                refused += 1;
                continue;
            }
            taken += 1;
            machine.pci.resume();
            let mut requests = Vec::new();
            if device.started.lock().unwrap().as_ref().is_some_and(|started| started.queues[0].is_some()) {
                let _ = device.with(0, |queue| queue.take(9, &mut requests));
                for request in &requests {
                    let ranges = request.readable.ranges().chain(request.writable.ranges());
                    assert!(ranges.fold(true, |all, (at, length)| all && at + length <= crate::machine::RAM));
                }
                device.answer(0, requests);
            }
        }
        machine.pci.reset();
        assert!(driver.negotiate(VERSION_1 | format));
    }
    assert!(refused > 100 && taken > 100, "{refused} refused, {taken} taken");
}

#[test]
fn a_machine_reset_puts_everything_back() {
    let machine = TestMachine::new(1);
    let (device, driver, _ring) = running(&machine, 0, 8);
    let (config, bar) = (driver.config.clone(), driver.config.bar());
    let before: Vec<_> = (0..64).map(|n| config.read(4 * n, 4)).collect();
    config.write(0x10, 4, 0xc800_0000);
    config.write(0x14, 4, 0);
    config.write(4, 2, 0);
    machine.pci.reset();
    assert!(device.started.lock().unwrap().is_none());
    assert_eq!((config.bar(), driver.status(), machine.mmio.read(driver.table, 4)), (bar, 0, 0));
    let msix = config.capabilities(0x11)[0] / 4;
    let after: Vec<_> = (0..64).map(|n| config.read(4 * n, 4)).collect();
    for n in (0..64).filter(|n| *n as u64 != msix) {
        assert_eq!(before[n], after[n], "{n}");
    }
    assert_eq!(after[msix as usize] >> 31, 0);
}

const EVENT: u64 = 0x608;
const EJECT: u64 = 0x60c;

fn events(machine: &TestMachine) -> Vec<u64> {
    let pending = machine.pio.read(0x603, 1);
    let read = || Some(machine.pio.read(EVENT, 4)).filter(|event| *event != 0xffff_ffff);
    let events: Vec<_> = std::iter::from_fn(read).collect();
    assert_eq!(events.is_empty(), pending & 2 == 0);
    events
}

#[test]
fn a_guest_is_told_of_devices_that_come_and_go_and_ejects_them() {
    let machine = TestMachine::new(2);
    let heard = Arc::new(Mutex::new(Vec::new()));
    let hear = heard.clone();
    machine.pci.on_ejected(move |slot, name| hear.lock().unwrap().push((slot, name.to_owned())));
    machine.attach("cold", &Echo::new(&[8]));
    machine.pci.resume();
    assert!(!machine.controller.is_high(9) && events(&machine).is_empty());

    let slot = PciSlot { bus: 1, slot: 4 };
    let device = Echo::new(&[8]);
    machine.pci.attach("hot", device.clone(), Some(slot)).unwrap();
    assert!(machine.controller.is_high(9));
    assert_eq!(events(&machine), [0x1_0104]);
    assert!(!machine.controller.is_high(9));

    machine.pci.detach(slot).unwrap();
    assert_eq!(events(&machine), [0x3_0104]);
    assert_eq!(ConfigSpace::new(&machine, slot).read(0, 2), 0x1af4);
    machine.pio.write(EJECT, 4, 0x104);
    assert_eq!(ConfigSpace::new(&machine, slot).read(0, 2), 0xffff);
    assert_eq!(*heard.lock().unwrap(), [(slot, "hot".to_owned())]);
    assert_eq!(Arc::strong_count(&device), 1);
    assert!(matches!(machine.pci.detach(slot), Err(PciError::Empty(_))));
    // What is not there cannot be ejected.
    for place in [0x104, 0, 0xffff_ffff, 0x1f] {
        machine.pio.write(EJECT, 4, place);
    }
    assert_eq!(machine.pci.devices().len(), 1);
    // What the guest was asked to give up is gone when it starts anew.
    machine.pci.detach(PciSlot { bus: 0, slot: 1 }).unwrap();
    machine.pci.reset();
    assert_eq!(heard.lock().unwrap().len(), 2);
}

#[test]
fn a_device_that_is_pulled_is_stopped_and_its_registers_are_gone() {
    for format in FORMATS {
        let machine = TestMachine::new(1);
        let (device, mut driver, mut ring) = running(&machine, format, 8);
        machine.pci.resume();
        let to = driver.allocate(16);
        ring.add(&[(to, 16, F_WRITE)]);
        let mut queue = device.started.lock().unwrap().as_mut().unwrap().queues[0].take().unwrap();
        let mut requests = Vec::new();
        queue.take(1, &mut requests).unwrap();
        machine.pci.remove(PciSlot { bus: 0, slot: 1 }).unwrap();
        assert_eq!(events(&machine), [0x1_0001]);
        assert!(device.started.lock().unwrap().is_none());
        queue.complete(requests[0].token, 1);
        queue.publish();
        assert!(ring.poll().is_none() && machine.controller.take_msis().is_empty());
        ring.notify();
        assert_eq!(device.notified.load(Ordering::SeqCst), 0);
        assert_eq!((driver.status(), driver.config.read(0, 4)), (0xff, u32::MAX));
        drop(queue);
        assert_eq!(Arc::strong_count(&device), 1);
    }
}

#[test]
fn a_thousand_devices_come_and_go_without_a_trace() {
    let machine = TestMachine::new(1);
    machine.pci.resume();
    let claims = machine.mmio.claims().len();
    for _ in 0..1000 {
        let (_device, driver, _ring) = running(&machine, 0, 8);
        assert_eq!(driver.status(), 0xf);
        machine.pci.remove(PciSlot { bus: 0, slot: 1 }).unwrap();
    }
    assert_eq!(machine.mmio.claims().len(), claims);
    assert_eq!(events(&machine).len(), 1);
}
