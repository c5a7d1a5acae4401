//! What a request to a virtio block device costs: a device as a component and the same source as native code, side by side in one run, over a store that does nothing.
//!
//! `cargo run --release -p tenon-plugins --example requests -- DEVICE-DIRECTORY STORE-DIRECTORY`, where the first holds both forms of a virtio block device, and the second a native
//! store whose defaults do, such as `null`. The driver is a loop without rings that keeps so many reads of 4 KiB under way.

use std::collections::VecDeque;
use std::error::Error;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tenon_core::{BrokenQueue, Buffers, Clock, GuestRequest, QueueDevice, QueueTransport, Ram, RequestQueue};
use tenon_plugins::{Bundle, Grants, Host, StoreGrants, VirtioParts};

#[derive(Default)]
struct Ring {
    /// Waiting requests, and answered ones.
    state: Mutex<(VecDeque<GuestRequest>, Vec<u32>)>,
    published: Condvar,
}

struct Queue(Arc<Ring>, Vec<u32>);

impl RequestQueue for Queue {
    fn take(&mut self, most: usize, into: &mut Vec<GuestRequest>) -> Result<(), BrokenQueue> {
        let waiting = &mut self.0.state.lock().unwrap_or_else(PoisonError::into_inner).0;
        let count = most.min(waiting.len());
        into.extend(waiting.drain(..count));
        Ok(())
    }

    fn complete(&mut self, token: u32, _: u32) {
        self.1.push(token);
    }

    fn publish(&mut self) {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner).1.append(&mut self.1);
        self.0.published.notify_one();
    }

    fn arm(&mut self) -> bool {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner).0.is_empty()
    }
}

struct Nobody;

impl QueueTransport for Nobody {
    fn config_changed(&self) {}
    fn needs_reset(&self) {}
}

/// Requests a second at this depth.
fn measure(device: &dyn QueueDevice, ram: &Arc<Ram>, depth: u32) -> Result<f64, Box<dyn Error>> {
    const TIME: Duration = Duration::from_secs(1);
    let ring = Arc::new(Ring::default());
    device.start(0, vec![Some(Box::new(Queue(ring.clone(), Vec::new())))], Arc::new(Nobody));
    let request = |token: u32| -> Result<GuestRequest, Box<dyn Error>> {
        let base = u64::from(token) * 8192;
        let (mut readable, mut writable) = (Buffers::new(ram), Buffers::new(ram));
        readable.push(base, 16)?;
        readable.write(0, &[0; 16]);
        writable.push(base + 4096, 4096)?;
        writable.push(base + 16, 1)?;
        Ok(GuestRequest { token, readable, writable })
    };
    let mut free: Vec<u32> = (0..depth).collect();
    let (start, mut done) = (Instant::now(), 0u32);
    while start.elapsed() < TIME {
        let made: Vec<GuestRequest> = free.drain(..).map(request).collect::<Result<_, _>>()?;
        let mut state = ring.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.0.extend(made);
        drop(state);
        device.notify(0);
        let mut state = ring.state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.1.is_empty() {
            state = ring.published.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        free.append(&mut state.1);
        done += u32::try_from(free.len())?;
    }
    let rate = f64::from(done) / start.elapsed().as_secs_f64();
    device.stop();
    Ok(rate)
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [device, store] = arguments.as_slice() else {
        return Err("usage: requests DEVICE-DIRECTORY STORE-DIRECTORY".into());
    };
    let host = Host::new(None)?;
    let store = Bundle::open(Path::new(store))?;
    let grants = Grants::none().allow_native(&store.manifest.id);
    let store = host.load(store, &grants)?.open_store("disk", &[], Vec::new(), &StoreGrants::none())?;
    let bundle = Bundle::open(Path::new(device))?;
    let native = Grants::none().allow_native(&bundle.manifest.id);
    let ram = Ram::new(8 << 20)?;
    let parts = VirtioParts {
        clock: Clock::virtual_time(),
        ram: ram.clone(),
        stores: vec![("disk".into(), store)],
        ports: Vec::new(),
        sockets: Vec::new(),
        folders: Vec::new(),
    };
    let devices = [
        host.load(Bundle::open(Path::new(device))?, &Grants::none())?.attach_virtio("wasm", &[], &parts)?,
        host.load(bundle, &native)?.attach_virtio("native", &[], &parts)?,
    ];
    for depth in [1, 32] {
        // In turns, and the best of each: the machine has other work.
        let mut best = [0.0f64; 2];
        for _ in 0..5 {
            for (best, device) in best.iter_mut().zip(&devices) {
                *best = best.max(measure(&**device, &ram, depth)?);
            }
        }
        let [wasm, native] = best;
        println!(
            "depth {depth}: wasm {:.0} k/s, native {:.0} k/s, ratio {:.2}",
            wasm / 1e3,
            native / 1e3,
            wasm / native
        );
    }
    for (name, device) in ["wasm", "native"].iter().zip(&devices) {
        let usage = device.usage();
        println!("{name}: {} requests in {} batches", usage.requests, usage.batches);
    }
    Ok(())
}
