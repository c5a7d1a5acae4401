//! What an engine is: a way to run guest CPUs.

use std::fmt;
use std::sync::Arc;

use crate::{Bus, Clock, CpuState, InterruptController, Ram};

/// Makes virtual machines.
pub trait Engine: Send + Sync {
    /// The engine's name on the command line and in messages: `kvm` or `soft`.
    fn name(&self) -> &'static str;

    /// Makes a VM without vCPUs. Guest memory is mapped; nothing runs yet.
    ///
    /// # Errors
    /// The host refuses, or the setup asks for more than the engine has.
    fn create_vm(&self, setup: VmSetup) -> Result<Arc<dyn Vm>, EngineError>;
}

/// What an engine needs for a VM.
#[derive(Clone)]
pub struct VmSetup {
    /// Guest memory.
    pub ram: Arc<Ram>,
    /// Port I/O.
    pub pio: Arc<Bus>,
    /// Memory-mapped I/O: every guest-physical address that is not RAM.
    pub mmio: Arc<Bus>,
    /// The machine's clock. A virtual clock asks the engine for deterministic execution by instruction count.
    pub clock: Arc<Clock>,
    /// How many vCPUs will be made, 1 to 64; their indices, and APIC ids, are 0 to `vcpus - 1`.
    pub vcpus: u32,
    /// What CPUID shows.
    pub cpu_model: CpuModel,
}

/// A named CPU model: what CPUID shows, further filtered by what the engine and the host can do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CpuModel {
    /// The same on every host and engine: x86-64-v1 with the features that every engine implements.
    #[default]
    Baseline,
    /// Everything that the engine can give on this host.
    Max,
}

/// A virtual machine of one engine.
pub trait Vm: Send + Sync {
    /// Makes the vCPU with this index. Each index is made once. Index 0 is the bootstrap processor; the others wait for INIT and SIPI.
    ///
    /// # Errors
    /// The index is out of range or taken, or the host refuses.
    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, EngineError>;

    /// The interrupt controller: local APICs and I/O APIC. GSI 0 to 23 are the I/O APIC's inputs.
    fn interrupts(&self) -> Arc<dyn InterruptController>;

    /// Puts the interrupt controller into its state after power-on. The vCPUs are not running.
    ///
    /// # Errors
    /// The host refuses.
    fn reset(&self) -> Result<(), EngineError>;

    /// The state of what is shared by all vCPUs: the I/O APIC. The vCPUs are not running. The encoding is the engine's own, and carries its version.
    ///
    /// # Errors
    /// The host refuses.
    fn save(&self) -> Result<Vec<u8>, EngineError>;

    /// Takes over what [`Vm::save`] gave.
    ///
    /// # Errors
    /// The state is not one of this engine, or the host refuses.
    fn restore(&self, state: &[u8]) -> Result<(), EngineError>;

    /// Starts or stops to note which pages of RAM the guest writes.
    ///
    /// # Errors
    /// The host refuses.
    fn set_dirty_log(&self, on: bool) -> Result<(), EngineError>;

    /// Takes the notes: guest-physical addresses of the 4 KiB pages that were written since the last call, in ascending order. A page that
    /// was only read may be among them, a page that was written never misses; one that a running vCPU is writing may come with the next
    /// call instead. What devices have written ([`Ram::written`]) is among them.
    ///
    /// # Errors
    /// The log is off, or the host refuses.
    fn take_dirty_log(&self) -> Result<Vec<u64>, EngineError>;

    /// Raises and lowers GSI `gsi` whenever `event` (an eventfd) is signalled, without a detour through this process.
    ///
    /// # Errors
    /// [`EngineError::Unsupported`] where the engine has no such thing; the caller then waits for the event itself.
    fn register_irqfd(&self, event: std::os::fd::BorrowedFd<'_>, gsi: u32) -> Result<(), EngineError> {
        let _ = (event, gsi);
        Err(EngineError::Unsupported("irqfd"))
    }

    /// Signals `event` (an eventfd) instead of an MMIO exit when the guest writes `size` bytes (0 for any size) at `address`.
    ///
    /// # Errors
    /// [`EngineError::Unsupported`] where the engine has no such thing; the caller then claims the address on the bus.
    fn register_ioeventfd(
        &self,
        event: std::os::fd::BorrowedFd<'_>,
        address: u64,
        size: u8,
    ) -> Result<(), EngineError> {
        let _ = (event, address, size);
        Err(EngineError::Unsupported("ioeventfd"))
    }

    /// Ends what [`Vm::register_ioeventfd`] began with the same event, address and size. Works while vCPUs run; a write that is under way
    /// may still signal.
    ///
    /// # Errors
    /// There is no such registration, or no such thing.
    fn unregister_ioeventfd(
        &self,
        event: std::os::fd::BorrowedFd<'_>,
        address: u64,
        size: u8,
    ) -> Result<(), EngineError> {
        let _ = (event, address, size);
        Err(EngineError::Unsupported("ioeventfd"))
    }
}

/// A virtual CPU. It is driven by one thread at a time.
pub trait Vcpu: Send {
    /// Runs guest code, calling the machine's buses for I/O, until there is a reason to stop.
    /// A halted vCPU, or one that waits for SIPI, waits inside, without using the host's CPU.
    ///
    /// A [`Stop::Kicked`] leaves the vCPU between two instructions with all I/O completed: its state can be read.
    ///
    /// # Errors
    /// The engine failed in a way that is not the guest's doing.
    fn run(&mut self) -> Result<Stop, EngineError>;

    /// The whole state. The vCPU is not running.
    ///
    /// # Errors
    /// The host refuses.
    fn state(&mut self) -> Result<CpuState, EngineError>;

    /// Takes over a state. The vCPU is not running.
    ///
    /// # Errors
    /// The state is not one that this CPU can have.
    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError>;

    /// A handle by which other threads make [`Vcpu::run`] return.
    fn kicker(&self) -> Arc<dyn Kick>;

    /// How many guest instructions have run, where the engine counts them.
    fn instructions(&self) -> Option<u64> {
        None
    }
}

/// Makes a vCPU's [`Vcpu::run`] return.
pub trait Kick: Send + Sync {
    /// Makes the current `run`, or if there is none the next one, return [`Stop::Kicked`] soon. Called from any thread; it does not wait.
    fn kick(&self);
}

/// Why a vCPU stopped.
#[derive(Debug)]
pub enum Stop {
    /// It was kicked.
    Kicked,
    /// The guest cannot go on: a triple fault, or an instruction that the engine cannot run.
    Crashed(Box<CrashReport>),
}

/// Where and how a guest ended.
#[derive(Clone, Debug)]
pub struct CrashReport {
    /// What happened, such as `triple fault: #PF at 0x10 while delivering #DF`.
    pub what: String,
    /// What the user can do, if anything.
    pub remedy: Option<String>,
    /// The vCPU's registers.
    pub state: Box<CpuState>,
    /// The bytes at the instruction pointer, as far as they could be read.
    pub instruction: Vec<u8>,
}

impl fmt::Display for CrashReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.what)?;
        writeln!(f, "{}", self.state)?;
        write!(f, "instruction bytes at rip:")?;
        for byte in &self.instruction {
            write!(f, " {byte:02x}")?;
        }
        if let Some(remedy) = &self.remedy {
            write!(f, "\n{remedy}")?;
        }
        Ok(())
    }
}

/// An engine's failure.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The engine has no such ability.
    #[error("this engine has no {0}")]
    Unsupported(&'static str),
    /// A call to the host failed.
    #[error("{call}: {source}")]
    Host {
        /// The call, such as `KVM_CREATE_VM`.
        call: &'static str,
        /// The host's answer.
        source: std::io::Error,
    },
    /// What was asked cannot be.
    #[error("{0}")]
    Invalid(String),
}
