//! What a request costs in the rings: made available, taken, completed, published and seen again by the driver, in batches, with split and packed rings.
//!
//! `cargo bench -p tenon-platform`. The driver's part, which is in here too, is the same test code for both.
#![allow(missing_docs)]
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]
#![allow(dead_code, reason = "the machine, the device and the driver are shared with tests")]

#[path = "../tests/virtio/device.rs"]
mod device;
#[path = "../tests/virtio/driver.rs"]
mod driver;
#[path = "../tests/virtio/machine.rs"]
mod machine;

use std::time::{Duration, Instant};

use device::Echo;
use driver::{Driver, EVENT_INDEX, F_WRITE, PACKED, Ring, VERSION_1};
use machine::TestMachine;

const ROUNDS: u32 = 20_000;

struct Setup {
    machine: TestMachine,
    device: std::sync::Arc<Echo>,
    ring: Ring,
}

fn setup(format: u64) -> Setup {
    let machine = TestMachine::new(1);
    let device = Echo::new(&[256]);
    let slot = machine.attach("echo", &device);
    let mut driver = Driver::new(&machine, slot);
    assert!(driver.negotiate(VERSION_1 | EVENT_INDEX | format));
    driver.enable_msix(2);
    let ring = driver.queue(0, 256, 1);
    driver.set_driver_ok();
    Setup { machine, device, ring }
}

/// The time that the device's side takes for a request, in batches of this size: a header, 4 KiB and a status byte. The median of all rounds, for the host may be
/// busy with other things.
fn device_side(setup: &mut Setup, batch: usize) -> f64 {
    let mut times: Vec<Duration> = Vec::new();
    let mut requests = Vec::with_capacity(batch);
    for _ in 0..ROUNDS {
        for _ in 0..batch {
            setup.ring.add(&[(0x20_0000, 16, 0), (0x30_0000, 4096, F_WRITE), (0x40_0000, 1, F_WRITE)]);
        }
        let start = Instant::now();
        setup.device.with(0, |queue| {
            queue.take(batch, &mut requests).unwrap();
            requests.drain(..).for_each(|request| queue.complete(request.token, 4097));
            queue.publish();
        });
        times.push(start.elapsed());
        for _ in 0..batch {
            setup.ring.poll().unwrap();
        }
        setup.machine.controller.take_msis();
    }
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64() * 1e9 / batch as f64
}

fn main() {
    let (mut split, mut packed) = (setup(0), setup(PACKED));
    println!("ns for a request of three descriptors, taken, completed and published");
    for batch in [1, 8, 64] {
        let times = [device_side(&mut split, batch), device_side(&mut packed, batch)];
        println!(
            "batches of {batch:2}: split {:6.1}, packed {:6.1}, ratio {:.2}",
            times[0],
            times[1],
            times[1] / times[0]
        );
    }
}
