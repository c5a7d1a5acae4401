//! Packed virtqueues (virtio 1.2 §2.8): one ring of descriptors, which the device overwrites with those that it has used.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use tenon_core::Ram;

use super::chain::{Chain, DESCRIPTOR, Descriptor, INDIRECT, NEXT, RingError, Table, WRITE};
use super::memory::RingMemory;
use super::queue::{Layout, Taken, passed};

const AVAILABLE: u16 = 1 << 7;
const USED: u16 = 1 << 15;

/// What an event structure says (virtio 1.2 §2.8.10).
const EVENT_ALWAYS: u16 = 0;
const EVENT_NEVER: u16 = 1;
const EVENT_AT: u16 = 2;

/// A place in the ring: its index and the wrap counter.
#[derive(Clone, Copy)]
struct Place {
    index: u16,
    wrap: bool,
}

impl Place {
    const START: Self = Self { index: 0, wrap: true };

    /// `by` is at most `size`.
    fn advance(&mut self, by: u16, size: u16) {
        let index = u32::from(self.index) + u32::from(by);
        let size = u32::from(size);
        if index >= size {
            self.wrap = !self.wrap;
        }
        // Below `size`, which is 16 bits wide.
        self.index = u16::try_from(index % size).unwrap_or(0);
    }

    fn encode(self) -> u16 {
        self.index | u16::from(self.wrap) << 15
    }

    fn decode(word: u16) -> Self {
        Self { index: word & 0x7fff, wrap: word >> 15 != 0 }
    }
}

struct Used {
    id: u16,
    slots: u16,
    written: u32,
}

/// A packed ring.
pub(crate) struct Packed {
    ram: Arc<Ram>,
    size: u16,
    event_index: bool,
    indirect: bool,
    ring: RingMemory,
    driver: RingMemory,
    device: RingMemory,
    next: Place,
    done: Place,
    /// Ring entries that were taken and not used.
    flying: u32,
    /// What is used and not yet to be seen.
    pending: Vec<Used>,
    armed: bool,
}

impl Packed {
    /// The ring at its place. `Err` says which part is not aligned or not in RAM.
    pub(crate) fn new(ram: &Arc<Ram>, layout: &Layout) -> Result<Self, &'static str> {
        let part = |address, length, align, what| RingMemory::new(ram, address, length, align).ok_or(what);
        Ok(Self {
            ram: ram.clone(),
            size: layout.size,
            event_index: layout.event_index,
            indirect: layout.indirect,
            ring: part(layout.descriptors, DESCRIPTOR * usize::from(layout.size), 16, "descriptor ring")?,
            driver: part(layout.driver, 4, 4, "driver's event structure")?,
            device: part(layout.device, 4, 4, "device's event structure")?,
            next: Place::START,
            done: Place::START,
            flying: 0,
            pending: Vec::new(),
            armed: true,
        })
    }

    /// The descriptor at this place, if the driver has made it available.
    fn available(&self, place: Place) -> Option<Descriptor> {
        let at = usize::from(place.index) * DESCRIPTOR;
        let rest = self.ring.load64(at + 8, Ordering::Acquire);
        let descriptor = Descriptor::new(self.ring.load64(at, Ordering::Relaxed), rest);
        let (available, used) = (descriptor.high & AVAILABLE != 0, descriptor.high & USED != 0);
        (available == place.wrap && used != place.wrap).then_some(descriptor)
    }

    /// The next request, if the driver has made one available.
    pub(crate) fn take(&mut self) -> Result<Option<Taken>, RingError> {
        let Some(mut found) = self.available(self.next) else { return Ok(None) };
        let mut chain = Chain::new(&self.ram, self.size);
        let mut place = self.next;
        let mut slots = 1;
        loop {
            if found.high & INDIRECT != 0 {
                if !self.indirect || slots > 1 || found.high & NEXT != 0 {
                    return Err(RingError::Nested);
                }
                self.indirect(&found, &mut chain)?;
                break;
            }
            chain.add(found.address, found.length, found.high & WRITE != 0)?;
            if found.high & NEXT == 0 {
                break;
            }
            // The driver makes the first one available last, so the others are there.
            place.advance(1, self.size);
            let at = usize::from(place.index) * DESCRIPTOR;
            found = Descriptor::new(
                self.ring.load64(at, Ordering::Relaxed),
                self.ring.load64(at + 8, Ordering::Relaxed),
            );
            slots += 1;
        }
        self.flying += u32::from(slots);
        if self.flying > self.size.into() {
            return Err(RingError::Overrun(self.flying));
        }
        self.next.advance(slots, self.size);
        Ok(Some(Taken { id: found.low, slots, chain }))
    }

    fn indirect(&self, found: &Descriptor, chain: &mut Chain) -> Result<(), RingError> {
        let table = Table::new(&self.ram, found.address, found.length, self.size)?;
        for index in 0..table.entries {
            let found = table.entry(index);
            if found.high & INDIRECT != 0 {
                return Err(RingError::Nested);
            }
            chain.add(found.address, found.length, found.high & WRITE != 0)?;
        }
        Ok(())
    }

    /// Notes a request as used; the driver does not see it yet.
    pub(crate) fn put(&mut self, id: u16, slots: u16, written: u32) {
        self.flying = self.flying.saturating_sub(slots.into());
        self.pending.push(Used { id, slots, written });
    }

    /// Lets the driver see what was put; says whether it wants an interrupt.
    pub(crate) fn publish(&mut self) -> bool {
        let Some(first) = self.pending.first() else { return false };
        let start = self.done;
        let first_rest = Self::used(first, start);
        let mut place = start;
        let mut passed_by: u16 = 0;
        for (n, used) in self.pending.iter().enumerate() {
            if n > 0 {
                let at = usize::from(place.index) * DESCRIPTOR + 8;
                self.ring.store64(at, Self::used(used, place), Ordering::Relaxed);
                self.ring.written(at, 8);
            }
            place.advance(used.slots, self.size);
            passed_by = passed_by.wrapping_add(used.slots);
        }
        // The driver reads them in order, so it sees all when it sees the first.
        let at = usize::from(start.index) * DESCRIPTOR + 8;
        self.ring.store64(at, first_rest, Ordering::Release);
        self.ring.written(at, 8);
        self.pending.clear();
        self.done = place;
        fence(Ordering::SeqCst);
        let wish = self.driver.load32(0, Ordering::Relaxed).to_le_bytes();
        let flags = u16::from_le_bytes([wish[2], wish[3]]) & 3;
        match flags {
            EVENT_ALWAYS => true,
            EVENT_AT if self.event_index => {
                let event = Place::decode(u16::from_le_bytes([wish[0], wish[1]]));
                let round = if event.wrap == place.wrap { 0 } else { self.size };
                passed(event.index.wrapping_sub(round), place.index, place.index.wrapping_sub(passed_by))
            }
            _ => false,
        }
    }

    /// The second half of a used descriptor: length, id, flags.
    fn used(used: &Used, place: Place) -> u64 {
        let mut flags = if place.wrap { AVAILABLE | USED } else { 0 };
        if used.written > 0 {
            flags |= WRITE;
        }
        u64::from(used.written) | u64::from(used.id) << 32 | u64::from(flags) << 48
    }

    /// Asks for a notification; says false if there is something to take already.
    pub(crate) fn arm(&mut self) -> bool {
        if self.available(self.next).is_some() {
            return false;
        }
        if self.event_index {
            self.set_event(self.next.encode(), EVENT_AT);
        } else {
            self.set_event(0, EVENT_ALWAYS);
        }
        self.armed = true;
        fence(Ordering::SeqCst);
        if self.available(self.next).is_some() {
            self.disarm();
            return false;
        }
        true
    }

    /// Needs no notification until it is armed again.
    pub(crate) fn disarm(&mut self) {
        if self.armed {
            self.set_event(0, EVENT_NEVER);
        }
        self.armed = false;
    }

    fn set_event(&self, at: u16, flags: u16) {
        self.device.store32(0, u32::from(at) | u32::from(flags) << 16, Ordering::Relaxed);
        self.device.written(0, 4);
    }

    /// Where the ring stands, for [`Packed::set_position`]: next to take, next to use.
    pub(crate) fn position(&self) -> (u16, u16) {
        (self.next.encode(), self.done.encode())
    }

    /// `flying` is the number of ring entries in flight.
    pub(crate) fn set_position(&mut self, (next, done): (u16, u16), flying: u32) -> bool {
        (self.next, self.done, self.flying) = (Place::decode(next), Place::decode(done), flying);
        self.next.index < self.size && self.done.index < self.size && flying <= self.size.into()
    }
}
