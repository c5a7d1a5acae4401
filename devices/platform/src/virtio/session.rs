//! What a device's queues and its registers share: the status byte and the interrupts. One small lock, never held while the device is called.
//!
//! From each DRIVER_OK to the next reset is a session. A device that still speaks for an old one is not heard.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tenon_core::{IrqLine, QueueDevice, QueueTransport};

use crate::encode::{Reader, Writer};
use crate::pci::msix::Msix;

pub(crate) const DRIVER_OK: u8 = 4;
pub(crate) const NEEDS_RESET: u8 = 0x40;
/// The vector that stands for none.
pub(crate) const NO_VECTOR: u16 = 0xffff;

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// See the module.
pub(crate) struct State {
    pub(crate) status: u8,
    pub(crate) generation: u8,
    pub(crate) config_vector: u16,
    pub(crate) queue_vectors: Vec<u16>,
    pub(crate) msix: Msix,
    isr: u8,
    intx_disabled: bool,
    session: u64,
}

/// What outlives sessions.
pub(crate) struct Live {
    name: String,
    state: Mutex<State>,
    line: IrqLine,
    device: Weak<dyn QueueDevice>,
}

impl Live {
    pub(crate) fn new(
        name: &str,
        queues: usize,
        msix: Msix,
        line: IrqLine,
        device: &Arc<dyn QueueDevice>,
    ) -> Arc<Self> {
        let state = State {
            status: 0,
            generation: 0,
            config_vector: NO_VECTOR,
            queue_vectors: vec![NO_VECTOR; queues],
            msix,
            isr: 0,
            intx_disabled: false,
            session: 0,
        };
        Arc::new(Self {
            name: name.to_owned(),
            state: Mutex::new(state),
            line,
            device: Arc::downgrade(device),
        })
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The session that the next DRIVER_OK begins, or that a reset ends.
    pub(crate) fn new_session(self: &Arc<Self>) -> Session {
        let mut state = self.state();
        state.session += 1;
        Session { live: self.clone(), number: state.session }
    }

    /// The driver has reset the device: its vectors and what it was told are forgotten. The MSI-X table is PCI's and stays.
    pub(crate) fn reset(&self) {
        let mut state = self.state();
        state.session += 1;
        state.status = 0;
        state.config_vector = NO_VECTOR;
        state.queue_vectors.fill(NO_VECTOR);
        state.isr = 0;
        self.set_line(&state);
    }

    /// Sets DEVICE_NEEDS_RESET, and tells the driver if it is there already.
    pub(crate) fn needs_reset(&self, state: &mut State) {
        state.status |= NEEDS_RESET;
        if state.status & DRIVER_OK != 0 {
            self.interrupt_config(state);
        }
    }

    fn interrupt_config(&self, state: &mut State) {
        let vector = state.config_vector;
        self.interrupt(state, vector, ISR_CONFIG);
    }

    fn interrupt(&self, state: &mut State, vector: u16, isr: u8) {
        if state.msix.is_enabled() {
            state.msix.signal(vector);
        } else {
            state.isr |= isr;
            self.set_line(state);
        }
    }

    fn set_line(&self, state: &State) {
        self.line.set_level(state.isr != 0 && !state.intx_disabled && !state.msix.is_enabled());
    }

    /// The driver reads the ISR register, which clears it.
    pub(crate) fn read_isr(&self) -> u8 {
        let mut state = self.state();
        let isr = std::mem::take(&mut state.isr);
        self.set_line(&state);
        isr
    }

    /// Whether the function holds its line for an interrupt: the bit in PCI's status register.
    pub(crate) fn is_interrupting(&self) -> bool {
        self.state().isr != 0
    }

    /// PCI's command register and MSI-X's control word as the driver set them.
    pub(crate) fn set_pci(&self, intx_disabled: bool, msix_control: u16) {
        let mut state = self.state();
        state.intx_disabled = intx_disabled;
        state.msix.set_control(msix_control);
        self.set_line(&state);
    }

    pub(crate) fn save(&self, out: &mut Writer) {
        let state = self.state();
        out.u8(state.status);
        out.u8(state.generation);
        out.u8(state.isr);
        out.u16(state.config_vector);
        out.count(state.queue_vectors.len());
        state.queue_vectors.iter().for_each(|vector| out.u16(*vector));
        state.msix.save(out);
    }

    pub(crate) fn restore(&self, from: &mut Reader) -> Result<(), String> {
        let mut state = self.state();
        state.session += 1;
        (state.status, state.generation, state.isr) = (from.u8()?, from.u8()?, from.u8()?);
        state.config_vector = from.u16()?;
        let count = from.count()?;
        if count != state.queue_vectors.len() {
            return Err(format!("{count} queues; the device has {}", state.queue_vectors.len()));
        }
        for vector in &mut state.queue_vectors {
            *vector = from.u16()?;
        }
        state.msix.restore(from)
    }
}

/// One session's voice. It is silent once the session is over.
#[derive(Clone)]
pub(crate) struct Session {
    live: Arc<Live>,
    number: u64,
}

impl Session {
    pub(crate) fn name(&self) -> &str {
        &self.live.name
    }

    fn with(&self, act: impl FnOnce(&mut State)) {
        let mut state = self.live.state();
        if state.session == self.number {
            act(&mut state);
        }
    }

    /// Interrupts for this queue.
    pub(crate) fn interrupt(&self, queue: u16) {
        self.with(|state| {
            let vector = state.queue_vectors.get(usize::from(queue)).copied().unwrap_or(NO_VECTOR);
            self.live.interrupt(state, vector, ISR_QUEUE);
        });
    }

    /// Sets DEVICE_NEEDS_RESET.
    pub(crate) fn fail(&self) {
        self.with(|state| self.live.needs_reset(state));
    }

    /// Notifies the device, as a driver would. No lock is held.
    pub(crate) fn notify(&self, queue: u16) {
        if let Some(device) = self.live.device.upgrade() {
            device.notify(queue);
        }
    }
}

impl QueueTransport for Session {
    fn config_changed(&self) {
        self.with(|state| {
            state.generation = state.generation.wrapping_add(1);
            if state.status & DRIVER_OK != 0 {
                self.live.interrupt_config(state);
            }
        });
    }

    fn needs_reset(&self) {
        tracing::warn!(device = self.name(), "the device asks its driver for a reset");
        self.fail();
    }
}
