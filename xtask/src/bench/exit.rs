//! What one register access costs: of a component, of the same source as a native library, and of a register that is built in.
//!
//! A bare guest reads one port again and again, in ring 3 where the host allows it. The time of a run without reads is taken off.

use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use super::{bare, median, summary_of, tenon, write};

/// The serial port's scratch register.
const SCRATCH: u16 = 0x3ff;
/// The platform's sleep-status register: a claim of the program itself, of which a read does next to nothing.
const BUILT_IN: u16 = 0x601;

#[derive(Serialize)]
struct Row {
    engine: &'static str,
    built_in_ns: f64,
    native_ns: f64,
    wasm_ns: f64,
    wasm_adds_ns: f64,
}

pub(super) fn run(rounds: u32) -> Result<()> {
    let guest = bare("exits")?;
    let mut rows = Vec::new();
    for (engine, count) in [("soft", 3_000_000), ("kvm", 20_000)] {
        if engine == "kvm" && !Path::new("/dev/kvm").exists() {
            println!("not run: kvm: there is no /dev/kvm here");
            continue;
        }
        let (mut built_in, mut native, mut wasm) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..rounds {
            built_in.push(each(&guest, engine, BUILT_IN, count, false)?);
            native.push(each(&guest, engine, SCRATCH, count, true)?);
            wasm.push(each(&guest, engine, SCRATCH, count, false)?);
        }
        let (built_in, native, wasm) = (median(built_in), median(native), median(wasm));
        println!(
            "{engine}: one register read: built-in {built_in:.0} ns, native {native:.0} ns, wasm {wasm:.0} ns; \
             wasm adds {:.0} ns to native",
            wasm - native
        );
        rows.push(Row {
            engine,
            built_in_ns: built_in,
            native_ns: native,
            wasm_ns: wasm,
            wasm_adds_ns: wasm - native,
        });
    }
    write("exit", &rows)
}

/// Nanoseconds for one read.
fn each(guest: &Path, engine: &str, port: u16, count: u32, native: bool) -> Result<f64> {
    let run_ms = |count: u32| -> Result<f64> {
        let mut command = tenon()?;
        command.args(["--engine", engine, "--device", "exit", "--console", "none", "--kernel"]).arg(guest);
        command.args(["--cmdline", &format!("count={count} port={port}")]);
        if native {
            command.args(["--allow-native", "serial"]);
        }
        Ok(summary_of(&mut command)?.run_ms)
    };
    Ok((run_ms(count)? - run_ms(0)?) * 1e6 / f64::from(count))
}
