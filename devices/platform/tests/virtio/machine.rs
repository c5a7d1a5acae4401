//! A machine without vCPUs: RAM, buses and an interrupt controller that notes what comes.

use std::sync::{Arc, Mutex};

use tenon_core::{
    Bus, Claim, InterruptController, Interrupts, Msi, QueueDevice, Ram, Requests, Space, Trigger, Vm,
};
use tenon_platform::{POWER_BUTTON_GSI, POWER_PORT, POWER_PORTS, Pci, PciParts, PciSlot, PowerRegisters};

/// What came to the interrupt controller.
#[derive(Default)]
pub(crate) struct Controller {
    msis: Mutex<Vec<u32>>,
    lines: Mutex<[bool; 24]>,
}

impl InterruptController for Controller {
    fn set_line(&self, gsi: u32, high: bool) {
        self.lines.lock().unwrap()[gsi as usize] = high;
    }

    fn signal_msi(&self, msi: Msi) {
        self.msis.lock().unwrap().push(msi.data);
    }
}

impl Controller {
    /// The data of the MSIs since the last call.
    pub(crate) fn take_msis(&self) -> Vec<u32> {
        std::mem::take(&mut self.msis.lock().unwrap())
    }

    pub(crate) fn is_high(&self, gsi: u32) -> bool {
        self.lines.lock().unwrap()[gsi as usize]
    }
}

pub(crate) struct TestMachine {
    pub(crate) ram: Arc<Ram>,
    pub(crate) pio: Arc<Bus>,
    pub(crate) mmio: Arc<Bus>,
    pub(crate) controller: Arc<Controller>,
    pub(crate) requests: Requests,
    pub(crate) pci: Arc<Pci>,
    _power: Claim,
}

pub(crate) const RAM: u64 = 16 << 20;

impl TestMachine {
    pub(crate) fn new(buses: u8) -> Self {
        Self::with_vm(buses, None)
    }

    pub(crate) fn with_vm(buses: u8, vm: Option<Arc<dyn Vm>>) -> Self {
        let controller = Arc::new(Controller::default());
        Self::with(buses, vm, controller.clone(), controller)
    }

    /// Interrupts go to this one alone.
    pub(crate) fn with_controller(to: Arc<dyn InterruptController>) -> Self {
        Self::with(1, None, to, Arc::default())
    }

    fn with(
        buses: u8,
        vm: Option<Arc<dyn Vm>>,
        to: Arc<dyn InterruptController>,
        controller: Arc<Controller>,
    ) -> Self {
        let ram = Ram::new(RAM).unwrap();
        let (pio, mmio) = (Bus::new(Space::Pio), Bus::new(Space::Mmio));
        let interrupts = Interrupts::new(to);
        let requests = Requests::new();
        let line = interrupts.line("power", Some(POWER_BUTTON_GSI), Trigger::Level).unwrap();
        let power = Arc::new(PowerRegisters::new(requests.clone(), line));
        let claim = pio.claim("power", POWER_PORT.into(), POWER_PORTS.into(), power.clone()).unwrap();
        let parts = PciParts {
            ram: ram.clone(),
            pio: pio.clone(),
            mmio: mmio.clone(),
            interrupts,
            requests: requests.clone(),
            power,
            vm,
        };
        let pci = Pci::new(parts, buses).unwrap();
        Self { ram, pio, mmio, controller, requests, pci, _power: claim }
    }

    pub(crate) fn attach(&self, name: &str, device: &Arc<impl QueueDevice + 'static>) -> PciSlot {
        self.pci.attach(name, device.clone(), None).unwrap()
    }
}
