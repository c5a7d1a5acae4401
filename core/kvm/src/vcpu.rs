//! A vCPU: the loop around `KVM_RUN`.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use kvm_bindings::{
    KVM_EXIT_FAIL_ENTRY, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_MMIO,
    KVM_EXIT_SHUTDOWN, kvm_lapic_state,
};
use kvm_ioctls::VcpuFd;
use tenon_core::{CpuState, EngineError, Kick, Stop, Vcpu};

use crate::crash::{self, Ending};
use crate::engine::host;
use crate::kick::Kicker;
use crate::run_page::RunPage;
use crate::state::{self, Context, PowerOn};
use crate::vm::Shared;

/// What the vCPU's CPUID shows.
#[derive(Clone, Copy)]
pub(crate) struct Shown {
    /// The states that XCR0 may have; 0 where there is no XSAVE.
    pub(crate) xcr0: u64,
    /// The features are those of the model.
    pub(crate) kept: bool,
}

/// A vCPU.
pub(crate) struct KvmVcpu {
    index: u32,
    fd: Arc<VcpuFd>,
    page: Arc<RunPage>,
    kicker: Arc<Kicker>,
    shared: Arc<Shared>,
    cpuid: Shown,
    power_on: PowerOn,
    /// The vCPU stood still after a kick, and its guest has not been told.
    stood: bool,
}

impl KvmVcpu {
    pub(crate) fn new(
        index: u32,
        fd: Arc<VcpuFd>,
        run_size: usize,
        shared: Arc<Shared>,
        cpuid: Shown,
        lapic: kvm_lapic_state,
    ) -> Result<Self, EngineError> {
        let page = Arc::new(RunPage::new(&*fd, run_size).map_err(host("mapping a vCPU's run page"))?);
        let power_on = PowerOn { lapic, msrs: shared.msrs.read(&fd)? };
        let kicker = Arc::new(Kicker::new(page.clone()));
        Ok(Self { index, fd, page, kicker, shared, cpuid, power_on, stood: false })
    }

    /// Whether the guest sees the features of the CPU model.
    pub(crate) fn keeps_cpu_model(&self) -> bool {
        self.cpuid.kept
    }

    fn context(&self) -> Context<'_> {
        Context {
            fd: &self.fd,
            index: self.index,
            xcr0: self.cpuid.xcr0,
            msrs: &self.shared.msrs,
            power_on: &self.power_on,
        }
    }

    fn go(&mut self) -> Result<Stop, EngineError> {
        if std::mem::take(&mut self.stood) {
            // Fails where the guest has no kvmclock, and then there is nothing to tell.
            let _ = self.fd.kvmclock_ctrl();
        }
        loop {
            if let Err(error) = self.page.run(self.fd.as_raw_fd()) {
                match error.raw_os_error() {
                    // Whatever access was under way has been completed before the kernel says this.
                    Some(libc::EINTR) if self.kicker.take() => {
                        self.stood = true;
                        return Ok(Stop::Kicked);
                    }
                    // A signal that was not a kick, or the late one of a kick that was answered; or a vCPU that was started by SIPI.
                    Some(libc::EINTR | libc::EAGAIN) => continue,
                    _ => return Err(self.failed(error)),
                }
            }
            match self.page.exit_reason() {
                KVM_EXIT_IO => self.port(),
                KVM_EXIT_MMIO => self.mmio(),
                KVM_EXIT_INTR => {}
                KVM_EXIT_SHUTDOWN => return self.crashed(&Ending::Shutdown),
                KVM_EXIT_INTERNAL_ERROR => return self.crashed(&Ending::internal(&self.page)),
                KVM_EXIT_FAIL_ENTRY => return self.crashed(&Ending::fail_entry(&self.page)),
                reason => return self.crashed(&Ending::Unexpected(reason)),
            }
        }
    }

    fn port(&self) {
        let access = self.page.port_access();
        let bus = &self.shared.setup.pio;
        for n in 0..access.count {
            if access.write {
                bus.write(access.address, access.size, self.page.item(&access, n));
            } else {
                self.page.set_item(&access, n, bus.read(access.address, access.size));
            }
        }
    }

    fn mmio(&self) {
        let access = self.page.mmio_access();
        let bus = &self.shared.setup.mmio;
        let written = if access.write { self.page.item(&access, 0) } else { 0 };
        let mut read = 0;
        // An access across a page's end comes in two parts of any length: the bus has powers of two.
        let mut at = 0;
        while at < access.size {
            let rest = access.size - at;
            let part = 1 << rest.ilog2();
            let address = access.address.wrapping_add(at.into());
            if access.write {
                bus.write(address, part, written >> (8 * at));
            } else {
                read |= bus.read(address, part) << (8 * at);
            }
            at += part;
        }
        if !access.write {
            self.page.set_item(&access, 0, read);
        }
    }

    fn crashed(&self, ending: &Ending) -> Result<Stop, EngineError> {
        let report = crash::report(&self.fd, &self.shared.setup.ram, ending)?;
        Ok(Stop::Crashed(Box::new(report)))
    }

    fn failed(&self, error: io::Error) -> EngineError {
        if error.raw_os_error() == Some(libc::EFAULT) {
            let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
            return EngineError::Invalid(format!(
                "KVM_RUN: the host has no memory for a page that the guest uses, at rip {rip:#x} of vCPU {}: {error}",
                self.index
            ));
        }
        EngineError::Host { call: "KVM_RUN", source: error }
    }
}

impl Vcpu for KvmVcpu {
    fn run(&mut self) -> Result<Stop, EngineError> {
        self.kicker.enter();
        let answer = self.go();
        self.kicker.leave();
        answer
    }

    fn state(&mut self) -> Result<CpuState, EngineError> {
        state::get(&self.context())
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        state::set(&self.context(), state)
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.kicker.clone()
    }
}
