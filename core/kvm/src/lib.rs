//! The KVM engine: guest code runs on the host's CPUs, through `/dev/kvm`.
//!
//! [`Kvm`] makes VMs for the machine of `tenon-core`. What the kernel does, and what this crate does:
//!
//! | part | where |
//! | --- | --- |
//! | local APICs, I/O APIC, HLT, INIT and SIPI, TSC, kvmclock | in the kernel |
//! | port and MMIO accesses | [`tenon_core::Bus`], called on the vCPU's thread |
//! | lines | GSI n is input n of the I/O APIC. The kernel's 8259 pair is masked: machines are described without one |
//! | timers other than the local APIC's | devices; there is no 8254 in the kernel |
//!
//! **Time.** The guest's TSC and kvmclock count on while a machine is paused, as they do for a guest whose host is busy; after a pause the
//! guest is told through its kvmclock page, so that its watchdogs do not bark. A saved machine continues at the time at which it was
//! saved: TSC values are part of a vCPU's state and the kvmclock part of the VM's. A virtual clock (execution by instruction count)
//! cannot be had from KVM and is refused.
//!
//! **CPU models.** `Baseline` shows the same features on every host, vendor and frequency apart; `Max` shows all that the kernel
//! supports, except AMX, whose registers need a permission of their own.
//!
//! [`Kvm::measure`] tells how well this host runs guest code; nested and paravirtual hosts differ by a factor of a thousand.

mod cpuid;
mod crash;
mod engine;
mod irq;
mod kick;
mod measure;
mod msr;
mod run_page;
mod state;
mod vcpu;
mod vm;

pub use engine::Kvm;
pub use measure::{Quality, Verdict};
