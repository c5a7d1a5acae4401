//! Lines and message-signalled interrupts into the kernel's interrupt controllers.

use std::sync::Arc;

use kvm_bindings::{KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip, kvm_msi};
use kvm_ioctls::VmFd;
use tenon_core::{EngineError, InterruptController, Interrupts, Msi};

use crate::engine::host;

/// Makes the VM's interrupt controllers. The kernel's own routes stay: GSI n is input n of the I/O APIC and, below 16, of the 8259 pair as well. Machines
/// are described without an 8259, so all of its inputs are masked: else its interrupts would come as vectors that no guest has asked for.
/// (Routes without it would say so more plainly, but the kernel takes milliseconds to change routes.)
pub(crate) fn create(vm: &VmFd) -> Result<(), EngineError> {
    vm.create_irq_chip().map_err(host("KVM_CREATE_IRQCHIP"))?;
    for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE] {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        vm.get_irqchip(&mut chip).map_err(host("KVM_GET_IRQCHIP"))?;
        chip.chip.pic.imr = 0xff;
        vm.set_irqchip(&chip).map_err(host("KVM_SET_IRQCHIP"))?;
    }
    Ok(())
}

/// The kernel's controllers, as devices see them.
pub(crate) struct Controller {
    vm: Arc<VmFd>,
}

impl Controller {
    pub(crate) fn new(vm: Arc<VmFd>) -> Self {
        Self { vm }
    }
}

impl InterruptController for Controller {
    fn set_line(&self, gsi: u32, high: bool) {
        if gsi >= Interrupts::LINES {
            return;
        }
        if let Err(error) = self.vm.set_irq_line(gsi, high) {
            tracing::warn!(gsi, %error, "KVM_IRQ_LINE failed");
        }
    }

    fn signal_msi(&self, msi: Msi) {
        let [low, high] = [msi.address & 0xffff_ffff, msi.address >> 32].map(|half| {
            u32::try_from(half).unwrap_or(0) // Both fit.
        });
        let message = kvm_msi { address_lo: low, address_hi: high, data: msi.data, ..Default::default() };
        // 0 says that no local APIC took it, which is the guest's affair.
        if let Err(error) = self.vm.signal_msi(message) {
            tracing::debug!(address = msi.address, data = msi.data, %error, "KVM_SIGNAL_MSI failed");
        }
    }
}
