//! The interrupt controller as a whole: all local APICs, the I/O APIC, and the way of a message between them.
//!
//! A vCPU holds an `Arc<IrqChip>` and its own index; devices hold it as [`InterruptController`].

use std::sync::{Arc, Weak};

use tenon_core::{Clock, InterruptController, Msi};

use crate::apic::{Effect, Lapic};
use crate::ioapic::IoApic;

/// What an interrupt message does to the APIC that takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Delivery {
    Fixed,
    LowestPriority,
    Nmi,
    Init,
    StartUp,
}

/// Whom an interrupt message is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Destination {
    All,
    Physical(u32),
    Logical(u32),
}

/// An interrupt message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) delivery: Delivery,
    pub(crate) vector: u8,
    pub(crate) level: bool,
    pub(crate) destination: Destination,
    /// The sender, where it is left out.
    pub(crate) except: Option<u32>,
}

impl Message {
    /// A message in the form that the I/O APIC and MSIs share: vector and delivery mode in bits 0 to 10 of `data`.
    /// Nothing for a delivery mode that does not exist here (SMI, external).
    pub(crate) fn from_bus(data: u32, level: bool, destination: u8, logical: bool) -> Option<Self> {
        let delivery = match data >> 8 & 7 {
            0 => Delivery::Fixed,
            1 => Delivery::LowestPriority,
            4 => Delivery::Nmi,
            5 => Delivery::Init,
            _ => return None,
        };
        let destination = match destination {
            0xff => Destination::All,
            bits if logical => Destination::Logical(bits.into()),
            id => Destination::Physical(id.into()),
        };
        Some(Self { delivery, vector: data.to_le_bytes()[0], level, destination, except: None })
    }
}

/// The interrupt controller of a VM.
pub(crate) struct IrqChip {
    apics: Vec<Arc<Lapic>>,
    ioapic: IoApic,
}

impl IrqChip {
    /// Local APICs with ids 0 to `count - 1`, and an I/O APIC, after power-on.
    pub(crate) fn new(clock: &Arc<Clock>, count: u32) -> Arc<Self> {
        Arc::new_cyclic(|weak: &Weak<Self>| {
            let apic = |id: u32| {
                let weak = weak.clone();
                let timer = clock.timer(move |now| {
                    if let Some(apic) = weak.upgrade().as_ref().and_then(|chip| chip.apics.get(id as usize)) {
                        apic.timer_fired(now);
                    }
                });
                Arc::new(Lapic::new(id, clock.clone(), timer))
            };
            Self { apics: (0..count).map(apic).collect(), ioapic: IoApic::new() }
        })
    }

    /// The local APIC of vCPU `index`, which exists.
    pub(crate) fn apic(&self, index: u32) -> &Arc<Lapic> {
        &self.apics[index as usize]
    }

    /// Puts everything into its state after power-on.
    pub(crate) fn reset(&self) {
        self.apics.iter().for_each(|apic| apic.reset());
        self.ioapic.reset();
    }

    /// Delivers a message. Says whether any APIC took it.
    pub(crate) fn send(&self, message: Message) -> bool {
        let Message { delivery, vector, level, destination, except } = message;
        let mut targets = self
            .apics
            .iter()
            .enumerate()
            .filter(|(id, apic)| except.is_none_or(|e| e as usize != *id) && apic.matches(destination))
            .map(|(_, apic)| apic);
        if delivery == Delivery::LowestPriority {
            // Among equals the one with the lowest id, so that runs repeat.
            let target =
                targets.filter_map(|apic| apic.priority().map(|p| (p, apic))).min_by_key(|(p, _)| *p);
            return target.is_some_and(|(_, apic)| apic.deliver(delivery, vector, level));
        }
        if matches!(destination, Destination::Physical(_)) {
            return targets.next().is_some_and(|apic| apic.deliver(delivery, vector, level));
        }
        let mut taken = false;
        for apic in targets {
            taken |= apic.deliver(delivery, vector, level);
        }
        taken
    }

    /// Does what a write to a local APIC's register asked for.
    pub(crate) fn apply(&self, effect: Effect) {
        match effect {
            Effect::None => {}
            Effect::Eoi(vector) => self.ioapic.end_of_interrupt(self, vector),
            Effect::Send(message) => {
                self.send(message);
            }
        }
    }

    /// A guest's read of the I/O APIC's registers.
    pub(crate) fn ioapic_read(&self, offset: u64) -> u32 {
        self.ioapic.read(offset)
    }

    /// A guest's write to the I/O APIC's registers.
    pub(crate) fn ioapic_write(&self, offset: u64, value: u32) {
        self.ioapic.write(self, offset, value);
    }

    /// The I/O APIC's state, with its version.
    pub(crate) fn save(&self) -> Vec<u8> {
        self.ioapic.save()
    }

    /// Takes over what [`IrqChip::save`] gave; an error says what does not fit.
    pub(crate) fn restore(&self, state: &[u8]) -> Result<(), String> {
        self.ioapic.restore(state)
    }
}

impl InterruptController for IrqChip {
    fn set_line(&self, gsi: u32, high: bool) {
        self.ioapic.set_line(self, gsi, high);
    }

    fn signal_msi(&self, msi: Msi) {
        // Address bits 12 to 19: destination, 2: logical. Data bit 15: level-triggered (Intel SDM vol. 3 §11.11).
        let [_, low, high, _, ..] = msi.address.to_le_bytes();
        let destination = low >> 4 | high << 4;
        let level = msi.data >> 15 & 1 != 0;
        if let Some(message) = Message::from_bus(msi.data, level, destination, msi.address & 4 != 0) {
            self.send(message);
        }
    }
}

#[cfg(test)]
mod tests;
