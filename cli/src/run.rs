//! `tenon run`: assembles a machine, stays with it until it ends, and turns its end into an exit status.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use crossbeam_channel::{Receiver, Sender, select, unbounded};
use serde::Serialize;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use tenon_core::{
    Bus, Clock, CpuModel, Interrupts, Machine, Ram, Request, Requests, Space, Trigger, Vm, VmSetup,
};
use tenon_platform::{
    KEYBOARD_PORT, KeyboardReset, POWER_BUTTON_GSI, POWER_PORT, POWER_PORTS, Pci, PciParts, Platform,
    PowerRegisters, SLOTS,
};
use tenon_plugins::MachineParts;

use crate::args::{ClockChoice, ConsoleChoice, CpuChoice, OnReset, RunArgs};
use crate::console::{Ask, Console};
use crate::devices::{Attached, Devices, Sockets};
use crate::firmware::Firmware;
use crate::guest::{Guest, open_image};
use crate::plugins::{PluginSummary, Shelf};
use crate::say::tell;
use crate::{Usage, devices, engine, places, terminal};

/// Exit status: an error, or a guest that crashed.
pub(crate) const FAILED: u8 = 1;
/// Exit status: the guest asked for a reset.
const RESET: u8 = 3;

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum End {
    PowerOff,
    Reset,
    Exit(u8),
    Crash(String),
    EngineFailed(String),
    Stopped(&'static str),
}

impl End {
    fn status(&self) -> u8 {
        match self {
            End::PowerOff | End::Stopped("console") => 0,
            End::Reset => RESET,
            End::Exit(status) => *status,
            End::Crash(_) | End::EngineFailed(_) => FAILED,
            // As a shell reports a process that ended by a signal.
            End::Stopped("SIGINT") => 130,
            End::Stopped("SIGHUP") => 129,
            End::Stopped(_) => 143,
        }
    }
}

/// What `--summary` writes.
#[derive(Serialize)]
struct Summary<'a> {
    end: &'a End,
    status: u8,
    engine: &'static str,
    engine_reason: &'a str,
    vcpus: u8,
    memory: u64,
    guest: &'a str,
    /// From the start of this process to the first guest instruction.
    start_ms: f64,
    /// From the first guest instruction to the end.
    run_ms: f64,
    /// CPU time of this process from the first guest instruction to the end.
    cpu_ms: f64,
    instructions: Option<u64>,
    guest_ns: u64,
    unclaimed_accesses: u64,
    personality: PluginSummary,
    devices: Vec<PluginSummary>,
}

pub(crate) fn run(args: &RunArgs, process_start: Instant) -> Result<ExitCode> {
    if args.console == ConsoleChoice::Stdio && terminal::is_there() {
        terminal::guard().context("catching the signals that would leave the terminal raw")?;
    }
    let mut images = Vec::new();
    if let Some(path) = &args.kernel {
        images.push(open_image("kernel", path)?);
    }
    if let Some(path) = &args.initrd {
        images.push(open_image("initrd", path)?);
    }
    let summary_file = match &args.summary {
        Some(path) => Some(
            places::create(path)
                .with_context(|| format!("summary file `{}` cannot be made", path.display()))?,
        ),
        None => None,
    };
    let shelf = Shelf::open(&args.plugins.places, &args.plugins.allow_native)?;
    let mut personality = shelf.personality(&args.personality)?;
    if let Some(text) = &args.cmdline {
        personality.set_cmdline(text)?;
    }

    let firmware = Firmware::open(args, &shelf)?;
    if let Some(firmware) = &firmware {
        images.push(open_image("firmware", &firmware.path)?);
    }

    let choice = engine::choose(args.engine, args.clock)?;
    let ram = match &firmware {
        Some(firmware) => firmware.ram(args.memory.0)?,
        None => Ram::new(args.memory.0).map_err(|error| Usage(anyhow!("--memory: {error}")))?,
    };
    let clock = match args.clock {
        ClockChoice::Real => Clock::real().context("starting the machine's clock")?,
        ClockChoice::Icount => Clock::virtual_time(),
    };
    clock.pause();
    let (pio, mmio) = (Bus::new(Space::Pio), Bus::new(Space::Mmio));
    let vm = choice.engine.create_vm(VmSetup {
        ram: ram.clone(),
        pio: pio.clone(),
        mmio: mmio.clone(),
        clock: clock.clone(),
        vcpus: args.cpus.into(),
        cpu_model: match args.cpu {
            CpuChoice::Baseline => CpuModel::Baseline,
            CpuChoice::Max => CpuModel::Max,
        },
    })?;
    let parts = MachineParts {
        pio: pio.clone(),
        mmio: mmio.clone(),
        interrupts: Interrupts::new(vm.interrupts()),
        clock: clock.clone(),
        requests: Requests::new(),
        mmio_window: tenon_platform::DEVICE_WINDOW,
    };
    let line = parts.interrupts.line("power", Some(POWER_BUTTON_GSI), Trigger::Level)?;
    let power = Arc::new(PowerRegisters::new(parts.requests.clone(), line));
    let _power = pio.claim("power", POWER_PORT.into(), POWER_PORTS.into(), power.clone())?;
    let pci = pci(args, &parts, &ram, &power, &vm)?;
    if firmware.is_some() {
        Firmware::show_board(&pci)?;
    }
    let sockets = Sockets { parts: parts.clone(), pci: pci.clone(), ram: ram.clone() };
    let mut devices = Devices::new(&shelf, sockets);
    devices.attach_all(args)?;
    let devices = devices.all;
    let keyboard = Arc::new(KeyboardReset::new(parts.requests.clone()));
    // Not where a device has the port: a keyboard controller resets by itself.
    let _keyboard = pio.claim("power", KEYBOARD_PORT.into(), 1, keyboard).ok();
    let platform = Platform {
        vcpus: args.cpus,
        devices: devices.iter().filter_map(Attached::acpi_node).collect(),
        pci_buses: pci.buses(),
    };
    let chips = firmware.map(|firmware| firmware.add_chips(&parts, &ram, &platform)).transpose()?;
    let guest = Guest { ram: ram.clone(), platform, personality, images };
    let boot = guest.load()?;
    tracing::info!(guest = boot.summary, engine = choice.engine.name(), why = choice.why, "loaded");

    let machine = Machine::new(vm, args.cpus.into(), clock.clone(), parts.requests.clone())?;
    machine.set_vcpu(0, &boot.vcpu)?;
    machine.add_device(power.clone());
    if let Some(chips) = &chips {
        Firmware::join(chips, &machine);
    }
    devices.iter().for_each(|device| machine.add_device(device.lifecycle()));
    // After its devices: they are reset before their slots are.
    machine.add_device(pci);

    let signals = watch_signals()?;
    let mut console = Console::open(&args.console)?;
    let (asks, asked) = unbounded();
    let channel = devices.iter().find_map(Attached::console);
    if let Some(channel) = &channel {
        devices::connect(channel, console.take_output())?;
    }
    let input = channel.clone();
    console
        .serve_input(
            move |bytes| {
                // A guest that does not read holds up whoever types, and nothing else.
                if let Some(channel) = &input {
                    channel.push_all(bytes, Duration::from_secs(3600));
                }
            },
            asks,
        )
        .context("starting the console's thread")?;
    if console.is_interactive() {
        tell!(
            "tenon: {} on {} ({}); Ctrl-B ? lists what the console can do",
            boot.summary,
            choice.engine.name(),
            choice.reason
        );
    }

    let cpu_before = cpu_ms();
    machine.resume();
    let running = Instant::now();
    let control = Control { machine: &machine, power: &power, asked, signals, running };
    let end = control.serve(args.on_reset, || {
        ram.clear()?;
        Ok(machine.set_vcpu(0, &guest.load()?.vcpu)?)
    })?;
    devices.iter().for_each(Attached::cut);
    machine.pause();
    let (run_time, cpu) = (running.elapsed(), cpu_ms() - cpu_before);
    channel.iter().for_each(devices::drain);
    drop(console);

    if let End::Crash(text) | End::EngineFailed(text) = &end {
        tell!("tenon: {text}");
    }
    if let Some(file) = summary_file {
        let summary = Summary {
            status: end.status(),
            end: &end,
            engine: choice.engine.name(),
            engine_reason: &choice.why,
            vcpus: args.cpus,
            memory: args.memory.0,
            guest: &boot.summary,
            start_ms: running.duration_since(process_start).as_secs_f64() * 1e3,
            run_ms: run_time.as_secs_f64() * 1e3,
            cpu_ms: cpu,
            instructions: machine.instructions(),
            guest_ns: clock.now(),
            unclaimed_accesses: pio.misses() + mmio.misses(),
            personality: guest.personality.summary(),
            devices: devices.iter().map(Attached::summary).collect(),
        };
        serde_json::to_writer_pretty(file, &summary).context("writing the summary")?;
    }
    Ok(ExitCode::from(end.status()))
}

/// How much CPU time this process has used (proc(5): `utime` and `stime`, in clock ticks of 10 ms).
fn cpu_ms() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let ticks = |at: usize| stat.rsplit(") ").next()?.split(' ').nth(at)?.parse::<f64>().ok();
    (ticks(11).unwrap_or(0.0) + ticks(12).unwrap_or(0.0)) * 10.0
}

/// PCI with as many buses as the devices of the command line may need.
fn pci(
    args: &RunArgs,
    parts: &MachineParts,
    ram: &Arc<Ram>,
    power: &Arc<PowerRegisters>,
    vm: &Arc<dyn Vm>,
) -> Result<Arc<Pci>> {
    // One slot of the first bus is the host bridge's.
    let buses = (devices::most_slots(args) + 1 + usize::from(args.firmware.is_some())).div_ceil(SLOTS.into());
    let parts = PciParts {
        ram: ram.clone(),
        pio: parts.pio.clone(),
        mmio: parts.mmio.clone(),
        interrupts: parts.interrupts.clone(),
        requests: parts.requests.clone(),
        power: power.clone(),
        vm: Some(vm.clone()),
    };
    Ok(Pci::new(parts, u8::try_from(buses).unwrap_or(u8::MAX))?)
}

/// The loop that answers requests of the guest, of the person at the console and of signals.
struct Control<'a> {
    machine: &'a Machine,
    power: &'a PowerRegisters,
    asked: Receiver<Ask>,
    signals: Receiver<i32>,
    running: Instant,
}

impl Control<'_> {
    fn serve(&self, on_reset: OnReset, mut reload: impl FnMut() -> Result<()>) -> Result<End> {
        let mut paused = false;
        loop {
            let reset = select! {
                recv(self.machine.requests().receiver()) -> request => match request? {
                    Request::PowerOff => return Ok(End::PowerOff),
                    Request::Exit(status) => return Ok(End::Exit(status)),
                    Request::Crash { vcpu, report } => {
                        return Ok(End::Crash(format!("the guest crashed on vCPU {vcpu}: {report}")));
                    }
                    Request::EngineFailed { vcpu, error } => {
                        return Ok(End::EngineFailed(format!("the engine failed on vCPU {vcpu}: {error}")));
                    }
                    Request::Reset if on_reset == OnReset::Exit => return Ok(End::Reset),
                    Request::Reset => true,
                },
                recv(self.asked) -> ask => match ask {
                    Ok(Ask::Quit) => return Ok(End::Stopped("console")),
                    Ok(Ask::PowerButton) => {
                        self.power.press_power_button();
                        tell!("\ntenon: power button pressed");
                        false
                    }
                    Ok(Ask::Reset) => {
                        tell!("\ntenon: reset");
                        true
                    }
                    Ok(Ask::Status) => {
                        self.tell_status(paused);
                        false
                    }
                    Ok(Ask::Pause) => {
                        paused = !paused;
                        if paused { self.machine.pause() } else { self.machine.resume() }
                        tell!("\ntenon: {}", if paused { "halted; Ctrl-B h lets it go on" } else { "goes on" });
                        false
                    }
                    // The input has ended; requests and signals go on.
                    Err(_) => return self.serve_without_console(on_reset, reload),
                },
                recv(self.signals) -> signal => return Ok(stopped_by(signal?)),
            };
            if reset {
                self.reset(&mut reload)?;
                paused = false;
            }
        }
    }

    /// As [`Control::serve`], once nobody types any more.
    fn serve_without_console(&self, on_reset: OnReset, reload: impl FnMut() -> Result<()>) -> Result<End> {
        let (_open, asked) = unbounded();
        let control = Control {
            machine: self.machine,
            power: self.power,
            asked,
            signals: self.signals.clone(),
            running: self.running,
        };
        control.serve(on_reset, reload)
    }

    fn reset(&self, reload: &mut impl FnMut() -> Result<()>) -> Result<()> {
        self.machine.reset()?;
        reload()?;
        self.machine.resume();
        Ok(())
    }

    fn tell_status(&self, paused: bool) {
        self.machine.pause();
        let rip = self
            .machine
            .vcpu_state(0)
            .map(|state| format!(", vCPU 0 at {:#x}", state.rip))
            .unwrap_or_default();
        let instructions = self
            .machine
            .instructions()
            .map(|n| format!(", {:.1} M instructions", n as f64 / 1e6))
            .unwrap_or_default();
        if !paused {
            self.machine.resume();
        }
        let state = if paused { "halted; started" } else { "running; started" };
        let seconds = self.running.elapsed().as_secs_f64();
        tell!("\ntenon: {state} {seconds:.1} s ago{instructions}{rip}");
    }
}

fn stopped_by(signal: i32) -> End {
    End::Stopped(match signal {
        SIGINT => "SIGINT",
        SIGHUP => "SIGHUP",
        _ => "SIGTERM",
    })
}

/// Signals that end the machine, as messages.
fn watch_signals() -> Result<Receiver<i32>> {
    let (sender, receiver): (Sender<i32>, _) = unbounded();
    let mut signals =
        signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP]).context("watching for signals")?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        for (count, signal) in signals.forever().enumerate() {
            // Whoever asks twice does not want to wait for what holds up the end.
            if sender.send(signal).is_err() || count > 0 {
                terminal::restore();
                std::process::exit(i32::from(stopped_by(signal).status()));
            }
        }
    })?;
    Ok(receiver)
}

/// The usage errors that only show when options are taken together.
pub(crate) fn check(args: &RunArgs) -> Result<()> {
    for id in &args.plugins.allow_native {
        if !devices::names_plugin(args, id) && args.personality.plugin != *id {
            bail!(Usage(anyhow!("--allow-native {id}: this machine has no plugin `{id}`")));
        }
    }
    Ok(())
}
