//! The machine: guest memory, buses, interrupts, clock and vCPU threads, and the traits that an engine implements.
//!
//! This crate names no device, no backing store, no guest OS and no plugin. It knows traits:
//!
//! | trait | implemented by | for |
//! | --- | --- | --- |
//! | [`Engine`], [`Vm`], [`Vcpu`], [`Kick`] | `core/kvm`, `core/soft` | running guest code |
//! | [`InterruptController`] | the engine | taking lines and MSIs from devices |
//! | [`CodeWatch`] | an engine that decodes code | hearing of devices' writes to it |
//! | [`Region`] | devices | answering register accesses |
//! | [`Lifecycle`] | devices | reset, pause, save and restore with the machine |
//! | [`QueueDevice`] | devices that are fed by queues | taking requests and answering them |
//! | [`NetworkPort`] | ways out into a network | sending and receiving frames |
//! | [`RequestQueue`], [`QueueTransport`] | a transport, such as virtio over PCI | the rings behind those queues |
//!
//! A program that assembles a machine makes [`Ram`], the two [`Bus`]es and the [`Clock`], gives them to an engine
//! in a [`VmSetup`], claims ranges of the buses for its devices, and starts a [`Machine`].

mod bus;
mod clock;
mod cpu;
mod dma;
mod engine;
mod interrupt;
mod machine;
mod memory;
mod port;
mod queue;
mod rom;
mod state;
mod written;

pub use bus::{Bus, BusError, Claim, Region, Space};
pub use clock::{Clock, Timer};
pub use cpu::{Activity, CpuState, DescriptorTable, Event, Segment};
pub use dma::{Buffers, OutsideRam};
pub use engine::{CpuModel, CrashReport, Engine, EngineError, Kick, Stop, Vcpu, Vm, VmSetup};
pub use interrupt::{InterruptController, Interrupts, IrqLine, LineError, Msi, Trigger};
pub use machine::{Lifecycle, Machine, MachineError, Request, Requests};
pub use memory::{HIGH_BASE, LOW_END, MAX_MEMORY, MIN_MEMORY, MemoryError, Ram};
pub use port::{FRAME_HEADER, NetworkPort, Offloads, PortCounters, PortInfo, PortNews};
pub use queue::{BrokenQueue, GuestRequest, QueueDevice, QueueProfile, QueueTransport, RequestQueue};
pub use rom::Rom;
pub use state::{StateError, Unit, Units};
pub use written::{CodePages, CodeWatch, DirtyLog, PartWrites, RegionWrites};
