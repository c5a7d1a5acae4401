//! Hot plug by ACPI: a queue of events that the guest's method reads, and an eject register.
//!
//! | port | read | write |
//! | --- | --- | --- |
//! | +0, 4 bytes | the next event, or all ones: slot in bits 0–4, bus in 8–15, in 16–23 what to notify: 1 device check, 3 eject request | ignored |
//! | +4, 4 bytes | 0 | eject: slot in bits 0–4, bus in 8–15 |
//!
//! Events of one slot that nobody has read are one: the last. So there are never more than slots.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tenon_core::Region;

use super::{PciSlot, SLOTS, Slots, lock};
use crate::encode::{Reader, Writer};
use crate::power::PowerRegisters;

/// The first port.
pub(crate) const PORT: u16 = 0x608;
/// How many.
pub(crate) const PORTS: u16 = 8;
const EJECT: u64 = 4;

/// What a guest is told of a slot, by the number that its operating system knows (ACPI 6.5 §5.6.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Check = 1,
    Eject = 3,
}

type Hearer = Arc<dyn Fn(PciSlot, &str) + Send + Sync>;

#[derive(Default)]
struct State {
    /// Whether a guest has begun to run: one that starts later scans by itself.
    is_live: bool,
    events: BTreeMap<PciSlot, Event>,
    /// Slots that the guest was asked to give up.
    asked: BTreeSet<PciSlot>,
}

/// See the module.
pub(crate) struct HotPlug {
    slots: Arc<Mutex<Slots>>,
    power: Arc<PowerRegisters>,
    state: Mutex<State>,
    hearer: Mutex<Option<Hearer>>,
}

impl HotPlug {
    pub(crate) fn new(slots: Arc<Mutex<Slots>>, power: Arc<PowerRegisters>) -> Arc<Self> {
        Arc::new(Self { slots, power, state: Mutex::default(), hearer: Mutex::new(None) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_hearer(&self, hearer: Hearer) {
        *self.hearer.lock().unwrap_or_else(PoisonError::into_inner) = Some(hearer);
    }

    pub(crate) fn tell(&self, slot: PciSlot, event: Event) {
        let mut state = self.state();
        if event == Event::Eject {
            state.asked.insert(slot);
        } else {
            state.asked.remove(&slot);
        }
        if state.is_live {
            state.events.insert(slot, event);
            drop(state);
            self.power.tell_slots();
        }
    }

    /// The guest runs from now on.
    pub(crate) fn resume(&self) {
        self.state().is_live = true;
    }

    /// The guest starts anew and scans by itself. What it was asked to give up is gone then.
    pub(crate) fn reset(&self) {
        let asked = {
            let mut state = self.state();
            state.is_live = false;
            state.events.clear();
            std::mem::take(&mut state.asked)
        };
        asked.into_iter().for_each(|slot| self.eject(slot));
    }

    fn eject(&self, slot: PciSlot) {
        let Some(function) = lock(&self.slots).functions.remove(&slot) else { return };
        self.state().asked.remove(&slot);
        function.remove();
        tracing::info!(device = function.name(), "the guest ejected PCI slot {slot}");
        let hearer = self.hearer.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(hearer) = hearer {
            hearer(slot, function.name());
        }
    }

    pub(crate) fn save(&self, out: &mut Writer) {
        let state = self.state();
        out.count(state.events.len());
        for (slot, event) in &state.events {
            [slot.bus, slot.slot, *event as u8].iter().for_each(|byte| out.u8(*byte));
        }
        out.count(state.asked.len());
        for slot in &state.asked {
            [slot.bus, slot.slot].iter().for_each(|byte| out.u8(*byte));
        }
    }

    pub(crate) fn restore(&self, from: &mut Reader) -> Result<(), String> {
        let mut new = State { is_live: true, ..State::default() };
        for _ in 0..from.count()? {
            let slot = PciSlot { bus: from.u8()?, slot: from.u8()? };
            let event = match from.u8()? {
                1 => Event::Check,
                3 => Event::Eject,
                other => return Err(format!("a slot event {other}")),
            };
            new.events.insert(slot, event);
        }
        for _ in 0..from.count()? {
            new.asked.insert(PciSlot { bus: from.u8()?, slot: from.u8()? });
        }
        *self.state() = new;
        Ok(())
    }
}

impl Region for HotPlug {
    fn read(&self, offset: u64, size: u8) -> u64 {
        match (offset, size) {
            (0, 4) => self.state().events.pop_first().map_or(u64::MAX, |(slot, event)| {
                u64::from(slot.slot) | u64::from(slot.bus) << 8 | (event as u64) << 16
            }),
            _ => 0,
        }
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        let [slot, bus, ..] = value.to_le_bytes();
        if (offset, size) == (EJECT, 4) && slot < SLOTS {
            self.eject(PciSlot { bus, slot });
        }
    }
}
