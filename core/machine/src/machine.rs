//! A running machine: its vCPU threads, its devices' life cycle, and what the guest asks of whoever started it.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender};

use crate::{Clock, CpuState, CrashReport, EngineError, Kick, Stop, Vcpu, Vm};

/// What a device does with its machine. Called on the thread that controls the machine, while no vCPU runs.
pub trait Lifecycle: Send + Sync {
    /// The device's name in this machine.
    fn name(&self) -> &str;

    /// Goes back to the state after power-on.
    fn reset(&self);

    /// The machine was paused: no work on guest memory and no interrupt from here to [`Lifecycle::resume`].
    fn pause(&self) {}

    /// The machine goes on.
    fn resume(&self) {}

    /// The whole state, with the number of its schema.
    ///
    /// # Errors
    /// The device cannot say its state; the text says why.
    fn save(&self) -> Result<(u32, Vec<u8>), String>;

    /// Takes over a state.
    ///
    /// # Errors
    /// The state is not one that this device reads; the text names both schemas.
    fn restore(&self, schema: u32, data: &[u8]) -> Result<(), String>;
}

/// What a guest or an administrator asks of whoever runs the machine.
#[derive(Clone, Debug)]
pub enum Request {
    /// Power off.
    PowerOff,
    /// Reset.
    Reset,
    /// End with this exit status.
    Exit(u8),
    /// A vCPU cannot go on.
    Crash {
        /// The vCPU.
        vcpu: u32,
        /// Where and how.
        report: Box<CrashReport>,
    },
    /// The engine failed.
    EngineFailed {
        /// The vCPU on which it failed.
        vcpu: u32,
        /// The engine's words.
        error: String,
    },
}

/// What failed about a machine.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The host gives no thread.
    #[error("starting a vCPU thread: {0}")]
    Thread(#[from] std::io::Error),
    /// A vCPU's thread has ended.
    #[error("vCPU {0} has ended")]
    Gone(u32),
}

/// Whether vCPUs run.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Gate {
    Run,
    Hold,
    End,
}

struct Control {
    gate: Gate,
    /// How many vCPU threads stand at the gate.
    held: usize,
    /// How many vCPU threads live.
    alive: usize,
    kickers: Vec<Arc<dyn Kick>>,
}

/// The gate at which vCPU threads stand while the machine is paused.
struct Shared {
    control: Mutex<Control>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes the gate and kicks every vCPU, without waiting for them.
    fn close(&self, gate: Gate) {
        let mut control = self.lock();
        if control.gate != Gate::End {
            control.gate = gate;
        }
        for kicker in &control.kickers {
            kicker.kick();
        }
        self.changed.notify_all();
    }
}

/// The way by which devices ask for power-off, reset or exit. Clones ask the same machine.
#[derive(Clone)]
pub struct Requests {
    sender: Sender<Request>,
    receiver: Receiver<Request>,
    shared: Arc<Shared>,
}

impl Requests {
    /// A way that is not yet tied to vCPUs: devices are made before the machine starts.
    #[must_use]
    pub fn new() -> Self {
        let (sender, receiver) = crossbeam_channel::bounded(16);
        let control = Control { gate: Gate::Hold, held: 0, alive: 0, kickers: Vec::new() };
        Self {
            sender,
            receiver,
            shared: Arc::new(Shared { control: Mutex::new(control), changed: Condvar::new() }),
        }
    }

    /// Asks, and stops all vCPUs: the one that made the access before its next instruction, the others soon.
    /// Called from any thread; it does not wait. Requests past the sixteenth that nobody has read are dropped.
    pub fn send(&self, request: Request) {
        self.shared.close(Gate::Hold);
        let _ = self.sender.try_send(request);
    }

    /// The requests, in order. While there is one to be answered the vCPUs stand still.
    #[must_use]
    pub fn receiver(&self) -> &Receiver<Request> {
        &self.receiver
    }
}

impl Default for Requests {
    fn default() -> Self {
        Self::new()
    }
}

/// A machine with its vCPU threads. Dropping it ends them.
pub struct Machine {
    vm: Arc<dyn Vm>,
    clock: Arc<Clock>,
    requests: Requests,
    vcpus: Vec<Arc<Mutex<Box<dyn Vcpu>>>>,
    threads: Vec<JoinHandle<()>>,
    devices: Mutex<Vec<Arc<dyn Lifecycle>>>,
}

impl Machine {
    /// Makes `vcpus` vCPUs and their threads, held. The clock stands until [`Machine::resume`].
    ///
    /// # Errors
    /// The engine or the host refuses.
    pub fn new(
        vm: Arc<dyn Vm>,
        vcpus: u32,
        clock: Arc<Clock>,
        requests: Requests,
    ) -> Result<Self, MachineError> {
        clock.pause();
        let mut machine = Self {
            vm,
            clock,
            requests,
            vcpus: Vec::new(),
            threads: Vec::new(),
            devices: Mutex::new(Vec::new()),
        };
        for index in 0..vcpus {
            let vcpu = machine.vm.create_vcpu(index)?;
            {
                let mut control = machine.requests.shared.lock();
                control.kickers.push(vcpu.kicker());
                control.alive += 1;
            }
            let vcpu = Arc::new(Mutex::new(vcpu));
            machine.vcpus.push(vcpu.clone());
            let requests = machine.requests.clone();
            let thread = std::thread::Builder::new()
                .name(format!("vcpu{index}"))
                .stack_size(4 << 20)
                .spawn(move || serve(index, &vcpu, &requests));
            match thread {
                Ok(thread) => machine.threads.push(thread),
                Err(error) => {
                    machine.requests.shared.lock().alive -= 1;
                    return Err(error.into());
                }
            }
        }
        Ok(machine)
    }

    /// Adds a device to those that are paused, reset and saved with the machine.
    pub fn add_device(&self, device: Arc<dyn Lifecycle>) {
        self.devices().push(device);
    }

    /// Takes the device of this name out again.
    pub fn remove_device(&self, name: &str) {
        self.devices().retain(|device| device.name() != name);
    }

    /// The engine's VM.
    #[must_use]
    pub fn vm(&self) -> &Arc<dyn Vm> {
        &self.vm
    }

    /// The machine's clock.
    #[must_use]
    pub fn clock(&self) -> &Arc<Clock> {
        &self.clock
    }

    /// What the guest asks for.
    #[must_use]
    pub fn requests(&self) -> &Requests {
        &self.requests
    }

    /// Stops all vCPUs between two instructions and waits until they stand; then stops the clock and the devices.
    /// Does nothing where the machine is paused already.
    pub fn pause(&self) {
        let shared = &self.requests.shared;
        shared.close(Gate::Hold);
        let mut control = shared.lock();
        while control.held < control.alive {
            control = shared.changed.wait(control).unwrap_or_else(PoisonError::into_inner);
        }
        drop(control);
        self.clock.pause();
        self.devices().iter().for_each(|device| device.pause());
    }

    /// Lets a paused machine go on.
    pub fn resume(&self) {
        self.devices().iter().for_each(|device| device.resume());
        self.clock.resume();
        let mut control = self.requests.shared.lock();
        if control.gate == Gate::Hold {
            control.gate = Gate::Run;
            self.requests.shared.changed.notify_all();
        }
    }

    /// Pauses the machine and puts devices, interrupt controller and vCPUs into their state after power-on. The caller then loads the
    /// guest again, gives [`Machine::set_vcpu`] the first vCPU's state, and resumes.
    ///
    /// # Errors
    /// The engine refuses.
    pub fn reset(&self) -> Result<(), MachineError> {
        self.pause();
        while self.requests.receiver.try_recv().is_ok() {}
        self.devices().iter().for_each(|device| device.reset());
        self.vm.reset()?;
        for index in 0..self.vcpus.len() {
            let mut state = CpuState::after_reset();
            if index > 0 {
                state.activity = crate::Activity::WaitForSipi;
            }
            self.vcpu_at(index).set_state(&state)?;
        }
        Ok(())
    }

    /// Sets a vCPU's state. The machine is paused.
    ///
    /// # Errors
    /// There is no such vCPU, or its CPU cannot have this state.
    pub fn set_vcpu(&self, index: u32, state: &CpuState) -> Result<(), MachineError> {
        Ok(self.vcpu(index)?.set_state(state)?)
    }

    /// A vCPU's state. The machine is paused.
    ///
    /// # Errors
    /// There is no such vCPU, or the host refuses.
    pub fn vcpu_state(&self, index: u32) -> Result<CpuState, MachineError> {
        Ok(self.vcpu(index)?.state()?)
    }

    /// How many guest instructions have run on all vCPUs, where the engine counts them. The machine is paused.
    #[must_use]
    pub fn instructions(&self) -> Option<u64> {
        (0..self.vcpus.len()).map(|index| self.vcpu_at(index).instructions()).sum()
    }

    fn vcpu(&self, index: u32) -> Result<MutexGuard<'_, Box<dyn Vcpu>>, MachineError> {
        let at = usize::try_from(index).unwrap_or(usize::MAX);
        if at >= self.vcpus.len() {
            return Err(MachineError::Gone(index));
        }
        Ok(self.vcpu_at(at))
    }

    fn vcpu_at(&self, index: usize) -> MutexGuard<'_, Box<dyn Vcpu>> {
        self.vcpus[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn devices(&self) -> MutexGuard<'_, Vec<Arc<dyn Lifecycle>>> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.requests.shared.close(Gate::End);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// A vCPU's thread: stands at the gate, runs, and tells of every end.
fn serve(index: u32, vcpu: &Mutex<Box<dyn Vcpu>>, requests: &Requests) {
    let shared = &*requests.shared;
    loop {
        {
            let mut control = shared.lock();
            control.held += 1;
            shared.changed.notify_all();
            while control.gate == Gate::Hold {
                control = shared.changed.wait(control).unwrap_or_else(PoisonError::into_inner);
            }
            control.held -= 1;
            if control.gate == Gate::End {
                control.alive -= 1;
                shared.changed.notify_all();
                return;
            }
        }
        let mut vcpu = vcpu.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match vcpu.run() {
                Ok(Stop::Kicked) => {}
                Ok(Stop::Crashed(report)) => requests.send(Request::Crash { vcpu: index, report }),
                Err(error) => requests.send(Request::EngineFailed { vcpu: index, error: error.to_string() }),
            }
            if shared.lock().gate != Gate::Run {
                break;
            }
        }
    }
}
