//! The common configuration registers of virtio over PCI (virtio 1.2 §4.1.4.3), and the state machine behind the status byte.
//!
//! What the driver sets before DRIVER_OK is frozen there: writes to the registers of a queue that is enabled, and to features after
//! FEATURES_OK, do nothing. A reset waits for [`QueueDevice::stop`] on the vCPU's thread.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tenon_core::{QueueDevice, Ram, RequestQueue};

use super::packed::Packed;
use super::queue::{Core, Handle, Layout};
use super::session::{DRIVER_OK, Live, NEEDS_RESET, NO_VECTOR, Session};
use super::split::Split;
use crate::encode::{Reader, Writer};

/// The length of the registers.
pub(crate) const COMMON_SIZE: usize = 56;

const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const FEATURES_OK: u8 = 8;
const FAILED: u8 = 0x80;

const INDIRECT_DESC: u64 = 1 << 28;
const EVENT_IDX: u64 = 1 << 29;
const VERSION_1: u64 = 1 << 32;
const RING_PACKED: u64 = 1 << 34;
/// What the transport offers.
const TRANSPORT_FEATURES: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1 | RING_PACKED;
/// The bits that are the device's to offer (virtio 1.2 §2.2).
const DEVICE_FEATURES: u64 = 0xff_ffff | !0 << 50;

#[derive(Clone, Copy)]
struct QueueSetup {
    layout: Layout,
    max: u16,
    enabled: bool,
}

struct Control {
    device_select: u32,
    driver_select: u32,
    driver_features: u64,
    queue_select: u16,
    queues: Vec<QueueSetup>,
    cores: Vec<Option<Arc<Mutex<Core>>>>,
    /// Restored as running: the device is started when the machine goes on.
    start_later: bool,
    session: Option<Session>,
    /// The function was taken out: nothing works any more.
    is_gone: bool,
}

/// The registers of one device.
pub(crate) struct Registers {
    ram: Arc<Ram>,
    device: Arc<dyn QueueDevice>,
    offered: u64,
    pub(crate) live: Arc<Live>,
    control: Mutex<Control>,
}

fn power_on(device: &dyn QueueDevice) -> Control {
    let queues: Vec<_> = device
        .profile()
        .queues
        .iter()
        .map(|&max| QueueSetup { layout: Layout { size: max, ..Layout::default() }, max, enabled: false })
        .collect();
    Control {
        device_select: 0,
        driver_select: 0,
        driver_features: 0,
        queue_select: 0,
        queues,
        cores: Vec::new(),
        start_later: false,
        session: None,
        is_gone: false,
    }
}

impl Registers {
    pub(crate) fn new(ram: &Arc<Ram>, device: Arc<dyn QueueDevice>, live: Arc<Live>) -> Self {
        let offered = device.profile().features & DEVICE_FEATURES | TRANSPORT_FEATURES;
        let control = Mutex::new(power_on(&*device));
        Self { ram: ram.clone(), device, offered, live, control }
    }

    fn control(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the driver has set DRIVER_OK and the device has not failed.
    pub(crate) fn is_running(&self) -> bool {
        self.live.state().status & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK
    }

    /// All registers as bytes.
    pub(crate) fn image(&self) -> [u8; COMMON_SIZE] {
        let control = self.control();
        let state = self.live.state();
        let selected = usize::from(control.queue_select);
        let queue = control.queues.get(selected);
        let layout = queue.map(|queue| queue.layout).unwrap_or_default();
        let half = |features: u64, select: u32| match select {
            0 => features & 0xffff_ffff,
            1 => features >> 32,
            _ => 0,
        };
        let mut image = [0; COMMON_SIZE];
        let mut at = 0;
        let mut put = |value: u64, size: usize| {
            image[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
            at += size;
        };
        put(control.device_select.into(), 4);
        put(half(self.offered, control.device_select), 4);
        put(control.driver_select.into(), 4);
        put(half(control.driver_features, control.driver_select), 4);
        put(state.config_vector.into(), 2);
        put(control.queues.len() as u64, 2);
        put(state.status.into(), 1);
        put(state.generation.into(), 1);
        put(control.queue_select.into(), 2);
        put(layout.size.into(), 2);
        put(state.queue_vectors.get(selected).copied().unwrap_or(NO_VECTOR).into(), 2);
        put(queue.is_some_and(|queue| queue.enabled).into(), 2);
        put(queue.map_or(0, |_| control.queue_select).into(), 2);
        put(layout.descriptors, 8);
        put(layout.driver, 8);
        put(layout.device, 8);
        image
    }

    /// The driver writes a register. What is not a whole field does nothing.
    pub(crate) fn write(&self, offset: u64, size: u8, value: u64) {
        if size == 8 {
            self.write(offset, 4, value & 0xffff_ffff);
            return self.write(offset + 4, 4, value >> 32);
        }
        let mut control = self.control();
        if control.is_gone {
            return;
        }
        // The bus has cut the value to the size.
        let word = u32::try_from(value).unwrap_or(u32::MAX);
        let half = u16::try_from(value & 0xffff).unwrap_or(0);
        match (offset, size) {
            (0, 4) => control.device_select = word,
            (8, 4) => control.driver_select = word,
            (12, 4) if self.live.state().status & FEATURES_OK == 0 => {
                let shift = match control.driver_select {
                    0 => 0,
                    1 => 32,
                    _ => return,
                };
                control.driver_features &= !(0xffff_ffff << shift);
                control.driver_features |= u64::from(word) << shift;
            }
            (16, 2) => {
                let mut state = self.live.state();
                state.config_vector = if state.msix.has(half) { half } else { NO_VECTOR };
            }
            (20, 1) => self.set_status(&mut control, half.to_le_bytes()[0]),
            (22, 2) => control.queue_select = half,
            (26, 2) => {
                let mut state = self.live.state();
                let vector = if state.msix.has(half) { half } else { NO_VECTOR };
                if let Some(place) = state.queue_vectors.get_mut(usize::from(control.queue_select)) {
                    *place = vector;
                }
            }
            (24 | 28 | 32..56, _) => self.write_queue(&mut control, offset, size, word),
            _ => {}
        }
    }

    fn write_queue(&self, control: &mut Control, offset: u64, size: u8, value: u32) {
        let status = self.live.state().status;
        let (select, features) = (usize::from(control.queue_select), control.driver_features);
        let Some(queue) = control.queues.get_mut(select).filter(|queue| !queue.enabled) else { return };
        if status & DRIVER_OK != 0 {
            return;
        }
        let layout = &mut queue.layout;
        let set = |place: &mut u64, high: bool| {
            let shift = if high { 32 } else { 0 };
            *place = *place & !(0xffff_ffff << shift) | u64::from(value) << shift;
        };
        match (offset, size) {
            (24, 2) => {
                // Zero or too many is refused by keeping what was there; what a split ring cannot have, when it is enabled.
                let asked = u16::try_from(value).unwrap_or(0);
                if (1..=queue.max).contains(&asked) {
                    layout.size = asked;
                }
            }
            (28, 2) if value == 1 && status & FEATURES_OK != 0 => {
                layout.packed = features & RING_PACKED != 0;
                layout.indirect = features & INDIRECT_DESC != 0;
                layout.event_index = features & EVENT_IDX != 0;
                match self.check(layout) {
                    Ok(()) => queue.enabled = true,
                    Err(what) => {
                        tracing::warn!(
                            device = self.device.name(),
                            queue = select,
                            "the driver enables a queue whose {what} is misplaced"
                        );
                        self.live.needs_reset(&mut self.live.state());
                    }
                }
            }
            (32 | 36, 4) => set(&mut layout.descriptors, offset == 36),
            (40 | 44, 4) => set(&mut layout.driver, offset == 44),
            (48 | 52, 4) => set(&mut layout.device, offset == 52),
            _ => {}
        }
    }

    fn check(&self, layout: &Layout) -> Result<(), &'static str> {
        if !layout.packed && !layout.size.is_power_of_two() {
            return Err("size (no power of two)");
        }
        if layout.packed {
            Packed::new(&self.ram, layout).map(drop)
        } else {
            Split::new(&self.ram, layout).map(drop)
        }
    }

    fn set_status(&self, control: &mut Control, value: u8) {
        if value == 0 {
            return self.reset_locked(control);
        }
        let old = self.live.state().status;
        let mut status = old | value & (ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED);
        if old & FEATURES_OK == 0
            && (control.driver_features & !self.offered != 0 || control.driver_features & VERSION_1 == 0)
        {
            status &= !FEATURES_OK;
        }
        if status & FEATURES_OK == 0 {
            status &= !DRIVER_OK;
        }
        self.live.state().status |= status;
        if status & DRIVER_OK != 0 && old & (DRIVER_OK | NEEDS_RESET) == 0 {
            self.start(control);
        }
    }

    fn start(&self, control: &mut Control) {
        if let Err(error) = self.make_cores(control, None) {
            tracing::warn!(device = self.device.name(), "a queue cannot be used: {error}");
        }
        self.hand_over(control);
    }

    /// Makes what is behind each enabled queue, from `saved` where there is something.
    fn make_cores(&self, control: &mut Control, mut saved: Option<&mut Reader>) -> Result<(), String> {
        let session = self.live.new_session();
        control.cores = vec![];
        for (number, queue) in (0..).zip(&control.queues) {
            let mut core = None;
            if queue.enabled {
                let mut new = Core::new(&self.ram, &queue.layout, number, session.clone())
                    .map_err(|what| format!("queue {number}: its {what} is misplaced"))?;
                if let Some(from) = &mut saved {
                    new.restore(&self.ram, &queue.layout, from)
                        .map_err(|error| format!("queue {number}: {error}"))?;
                }
                core = Some(Arc::new(Mutex::new(new)));
            }
            control.cores.push(core);
        }
        control.session = Some(session);
        Ok(())
    }

    fn hand_over(&self, control: &mut Control) {
        control.start_later = false;
        let Some(session) = control.session.clone() else { return };
        let handle = |core: &Option<Arc<Mutex<Core>>>| -> Option<Box<dyn RequestQueue>> {
            core.clone().map(|core| -> Box<dyn RequestQueue> { Box::new(Handle(core)) })
        };
        let queues = control.cores.iter().map(handle).collect();
        self.device.start(control.driver_features, queues, Arc::new(session));
    }

    fn reset_locked(&self, control: &mut Control) {
        self.device.stop();
        for core in control.cores.iter().flatten() {
            core.lock().unwrap_or_else(PoisonError::into_inner).end();
        }
        *control = power_on(&*self.device);
        self.live.reset();
    }

    /// As if the driver wrote 0 to the status byte.
    pub(crate) fn reset(&self) {
        self.reset_locked(&mut self.control());
    }

    /// Stops the device for good.
    pub(crate) fn remove(&self) {
        let mut control = self.control();
        self.reset_locked(&mut control);
        control.is_gone = true;
    }

    /// What was restored as running starts.
    pub(crate) fn resume(&self) {
        let mut control = self.control();
        if control.start_later {
            self.hand_over(&mut control);
        }
    }

    pub(crate) fn save(&self, out: &mut Writer) {
        let control = self.control();
        out.u32(control.device_select);
        out.u32(control.driver_select);
        out.u64(control.driver_features);
        out.u16(control.queue_select);
        out.count(control.queues.len());
        for queue in &control.queues {
            let layout = &queue.layout;
            out.u16(layout.size);
            out.u8(queue.enabled.into());
            [layout.descriptors, layout.driver, layout.device].iter().for_each(|place| out.u64(*place));
        }
        self.live.save(out);
        out.u8((!control.cores.is_empty()).into());
        for core in control.cores.iter().flatten() {
            core.lock().unwrap_or_else(PoisonError::into_inner).save(out);
        }
    }

    /// Takes over what [`Registers::save`] wrote, on a device that was reset. It starts when the machine goes on.
    pub(crate) fn restore(&self, from: &mut Reader) -> Result<(), String> {
        let mut control = self.control();
        // A device that has not started has nothing to stop, and may have its own state back already.
        if control.session.is_some() {
            self.reset_locked(&mut control);
        }
        (control.device_select, control.driver_select) = (from.u32()?, from.u32()?);
        (control.driver_features, control.queue_select) = (from.u64()?, from.u16()?);
        let features = control.driver_features;
        if from.count()? != control.queues.len() {
            return Err(format!("the device has {} queues", control.queues.len()));
        }
        for queue in &mut control.queues {
            let size = from.u16()?;
            queue.enabled = from.u8()? != 0;
            if !(1..=queue.max).contains(&size) {
                return Err(format!("a queue of {size} entries; the device has {}", queue.max));
            }
            queue.layout = Layout {
                size,
                descriptors: from.u64()?,
                driver: from.u64()?,
                device: from.u64()?,
                packed: features & RING_PACKED != 0,
                indirect: features & INDIRECT_DESC != 0,
                event_index: features & EVENT_IDX != 0,
            };
            if queue.enabled {
                self.check(&queue.layout).map_err(|what| format!("a queue whose {what} is misplaced"))?;
            }
        }
        self.live.restore(from)?;
        if from.u8()? != 0 {
            if features & !self.offered != 0 {
                return Err(format!("features {features:#x}; the device offers {:#x}", self.offered));
            }
            self.make_cores(&mut control, Some(from))?;
            control.start_later = true;
        }
        Ok(())
    }
}
