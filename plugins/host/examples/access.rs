//! What a register access costs: a device as a component, the same source as native code, and a claim that does nothing, side by side in one run.
//!
//! `cargo run --release -p tenon-plugins --example access -- PLUGIN-DIRECTORY PORT [SETTING=VALUE]…`, where the directory holds both forms of a device.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tenon_core::{Bus, Clock, InterruptController, Interrupts, Msi, Region, Requests, Space};
use tenon_plugins::{Bundle, Grants, Host, MachineParts};

struct Nothing;

impl Region for Nothing {
    fn read(&self, _: u64, _: u8) -> u64 {
        0
    }
    fn write(&self, _: u64, _: u8, _: u64) {}
}

impl InterruptController for Nothing {
    fn set_line(&self, _: u32, _: bool) {}
    fn signal_msi(&self, _: Msi) {}
}

fn parts() -> MachineParts {
    MachineParts {
        pio: Bus::new(Space::Pio),
        mmio: Bus::new(Space::Mmio),
        mmio_window: 0xd000_0000..0xe000_0000,
        interrupts: Interrupts::new(Arc::new(Nothing)),
        clock: Clock::virtual_time(),
        requests: Requests::new(),
    }
}

/// Nanoseconds for one read: the best of several rounds, since the host has other work.
fn measure(bus: &Bus, port: u64) -> f64 {
    const READS: u32 = 200_000;
    let round = || {
        let start = Instant::now();
        for _ in 0..READS {
            std::hint::black_box(bus.read(port, 1));
        }
        start.elapsed()
    };
    let best = (0..15).map(|_| round()).min().unwrap_or(Duration::ZERO);
    best.as_secs_f64() * 1e9 / f64::from(READS)
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [directory, port, settings @ ..] = &arguments[..] else {
        return Err("give a plugin directory and a port".into());
    };
    let port = u64::from_str_radix(port.trim_start_matches("0x"), 16)?;
    let settings: Vec<(String, String)> = settings
        .iter()
        .filter_map(|setting| setting.split_once('='))
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect();
    let cache = tempfile::tempdir()?;
    let host = Host::new(Some(cache.path()))?;
    let open = || Bundle::open(Path::new(directory));
    let id = open()?.manifest.id;

    let none = parts();
    let _claim = none.pio.claim("nothing", port, 1, Arc::new(Nothing))?;
    let nothing = measure(&none.pio, port);
    println!("no-op claim   {nothing:8.1} ns");
    for (name, grants) in [("native", Grants::none().allow_native(&id)), ("component", Grants::none())] {
        let machine = parts();
        let plugin = host.load(open()?, &grants)?;
        let device = plugin.attach(name, &settings, &machine)?;
        let cost = measure(&machine.pio, port);
        println!(
            "{name:13} {cost:8.1} ns, {:.1} more than nothing, {} faults",
            cost - nothing,
            device.usage().faults
        );
    }

    // A start from a warm cache: engine, component, instance, first checkpoint.
    let start = Instant::now();
    let host = Host::new(Some(cache.path()))?;
    let engine = start.elapsed();
    let machine = parts();
    let _device = host.load(open()?, &Grants::none())?.attach("again", &settings, &machine)?;
    println!("warm start    {engine:?} for the engine, {:?} in all, {:?}", start.elapsed(), host.cache_use());
    Ok(())
}
