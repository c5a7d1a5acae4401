//! Lines and message-signalled interrupts into the kernel's interrupt controllers.

use std::sync::Arc;

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_irqchip, kvm_msi,
};
use kvm_ioctls::VmFd;
use tenon_core::{EngineError, InterruptController, Interrupts, Msi};

use crate::engine::host;

/// Makes GSI n input n of the I/O APIC, and of nothing else. (The kernel's own default also has the 8259 pair, which machines are described without:
/// its interrupts would come as vectors that no guest has asked for.)
pub(crate) fn route(vm: &VmFd) -> Result<(), EngineError> {
    let entries: Vec<_> = (0..Interrupts::LINES)
        .map(|pin| kvm_irq_routing_entry {
            gsi: pin,
            type_: KVM_IRQ_ROUTING_IRQCHIP,
            u: kvm_irq_routing_entry__bindgen_ty_1 {
                irqchip: kvm_irq_routing_irqchip { irqchip: KVM_IRQCHIP_IOAPIC, pin },
            },
            ..Default::default()
        })
        .collect();
    let table = KvmIrqRouting::from_entries(&entries)
        .map_err(|error| EngineError::Invalid(format!("interrupt routes: {error:?}")))?;
    vm.set_gsi_routing(&table).map_err(host("KVM_SET_GSI_ROUTING"))
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
