//! A driver and a device on two threads, each of which sleeps whenever the other has said that it will wake it. One wish that is lost, and both sleep for ever.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use tenon_core::{InterruptController, Msi};

use crate::driver::{EVENT_INDEX, F_WRITE, Part};
use crate::machine::TestMachine;
use crate::queues::{FORMATS, running};

/// Long past any hold-up of a busy host.
const NEVER: Duration = Duration::from_secs(60);
const REQUESTS: u32 = 30_000;

/// Interrupts as messages; one that waits stands for more.
struct Wake(SyncSender<()>);

impl InterruptController for Wake {
    fn set_line(&self, _: u32, _: bool) {}
    fn signal_msi(&self, _: Msi) {
        let _ = self.0.try_send(());
    }
}

#[test]
fn no_wakeup_is_lost_between_a_driver_and_a_device_that_sleep() {
    for format in FORMATS {
        let (interrupt, interrupted) = sync_channel(1);
        let machine = TestMachine::with_controller(Arc::new(Wake(interrupt)));
        let (device, driver, mut ring) = running(&machine, format, 16);
        let mut queue = device.started.lock().unwrap().as_mut().unwrap().queues[0].take().unwrap();
        let (notify, notified) = sync_channel::<bool>(1);
        let worker = std::thread::spawn(move || {
            let (mut requests, mut sleeps, mut done) = (Vec::new(), 0u32, 0u32);
            loop {
                queue.take(3, &mut requests).unwrap();
                if requests.is_empty() {
                    if queue.arm() {
                        sleeps += 1;
                        match notified.recv_timeout(NEVER) {
                            Ok(true) => {}
                            Ok(false) | Err(RecvTimeoutError::Disconnected) => return (done, sleeps),
                            Err(error) => panic!("after {done} requests nobody woke the device: {error}"),
                        }
                    }
                    continue;
                }
                for request in requests.drain(..) {
                    request.writable.write(0, &done.to_le_bytes());
                    done += 1;
                    queue.complete(request.token, 4);
                }
                queue.publish();
            }
        });
        let (mut added, mut seen, mut naps) = (0u32, 0u32, 0u32);
        let part = |n: u32| -> Part { (0x40_0000 + 64 * u64::from(n % 16), 4, F_WRITE) };
        while seen < REQUESTS {
            let batch = (1 + added % 5).min(16 - (added - seen)).min(REQUESTS - added);
            for _ in 0..batch {
                ring.add(&[part(added)]);
                added += 1;
            }
            fence(Ordering::SeqCst);
            if batch > 0 && ring.wants_notification(batch as u16) {
                let _ = notify.try_send(true);
            }
            let mut found = false;
            while let Some((_, length)) = ring.poll() {
                assert_eq!(length, 4);
                let answer: u32 = driver.peek(part(seen).0);
                assert_eq!(answer, seen, "the bytes are there before the driver is told");
                seen += 1;
                found = true;
            }
            if found || added - seen < 16 && added < REQUESTS {
                continue;
            }
            if format & EVENT_INDEX != 0 {
                ring.want_interrupt(0);
            }
            fence(Ordering::SeqCst);
            if !ring.has_used() {
                naps += 1;
                interrupted.recv_timeout(NEVER).unwrap_or_else(|error| {
                    panic!("format {format:#x}: after {seen} of {added} nobody woke the driver: {error}")
                });
            }
        }
        let _ = notify.send(false);
        let (done, sleeps) = worker.join().unwrap();
        assert_eq!(done, REQUESTS);
        assert!(sleeps > 0 && naps > 0, "{sleeps} sleeps, {naps} naps: nothing was tried");
        assert_eq!(driver.status(), 0xf);
    }
}
