//! A driver: PCI configuration by ECAM, virtio's registers by their capabilities, and both kinds of rings.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tenon_core::{Bus, Ram};
use tenon_platform::{ECAM_BASE, PciSlot};
use vm_memory::{Bytes, GuestAddress};

use crate::machine::TestMachine;

pub(crate) const INDIRECT: u64 = 1 << 28;
pub(crate) const EVENT_INDEX: u64 = 1 << 29;
pub(crate) const VERSION_1: u64 = 1 << 32;
pub(crate) const PACKED: u64 = 1 << 34;

pub(crate) const F_NEXT: u16 = 1;
pub(crate) const F_WRITE: u16 = 2;
pub(crate) const F_INDIRECT: u16 = 4;

/// A function's configuration space.
#[derive(Clone)]
pub(crate) struct ConfigSpace {
    mmio: Arc<Bus>,
    base: u64,
}

impl ConfigSpace {
    pub(crate) fn new(machine: &TestMachine, slot: PciSlot) -> Self {
        let base = ECAM_BASE + (u64::from(slot.bus) << 20) + (u64::from(slot.slot) << 15);
        Self { mmio: machine.mmio.clone(), base }
    }

    pub(crate) fn read(&self, at: u64, size: u8) -> u32 {
        self.mmio.read(self.base + at, size) as u32
    }

    pub(crate) fn write(&self, at: u64, size: u8, value: u32) {
        self.mmio.write(self.base + at, size, value.into());
    }

    /// Where the capabilities of this id are.
    pub(crate) fn capabilities(&self, id: u8) -> Vec<u64> {
        let mut found = Vec::new();
        let mut at = u64::from(self.read(0x34, 1));
        while at != 0 {
            if self.read(at, 1) == u32::from(id) {
                found.push(at);
            }
            at = self.read(at + 1, 1).into();
            assert!(found.len() < 16);
        }
        found
    }

    pub(crate) fn bar(&self) -> u64 {
        u64::from(self.read(0x10, 4) & !0xf) | u64::from(self.read(0x14, 4)) << 32
    }
}

/// A virtio device as its driver sees it.
pub(crate) struct Driver {
    pub(crate) config: ConfigSpace,
    pub(crate) ram: Arc<Ram>,
    pub(crate) mmio: Arc<Bus>,
    pub(crate) common: u64,
    pub(crate) isr: u64,
    pub(crate) device: u64,
    pub(crate) notify: u64,
    step: u64,
    pub(crate) table: u64,
    pub(crate) pending: u64,
    pub(crate) features: u64,
    /// Where the next ring or buffer goes.
    free: u64,
}

impl Driver {
    /// Finds the registers.
    pub(crate) fn new(machine: &TestMachine, slot: PciSlot) -> Self {
        let config = ConfigSpace::new(machine, slot);
        let bar = config.bar();
        let place = |kind: u32| {
            let at = config.capabilities(9).into_iter().find(|at| config.read(at + 3, 1) == kind).unwrap();
            (at, bar + u64::from(config.read(at + 8, 4)))
        };
        let (notify_at, notify) = place(2);
        let msix = config.capabilities(0x11).first().copied().unwrap_or(0);
        Self {
            ram: machine.ram.clone(),
            mmio: machine.mmio.clone(),
            common: place(1).1,
            isr: place(3).1,
            device: place(4).1,
            notify,
            step: config.read(notify_at + 16, 4).into(),
            table: bar + u64::from(config.read(msix + 4, 4)),
            pending: bar + u64::from(config.read(msix + 8, 4)),
            config,
            features: 0,
            free: 0x10_0000,
        }
    }

    pub(crate) fn read(&self, at: u64, size: u8) -> u64 {
        self.mmio.read(self.common + at, size)
    }

    pub(crate) fn write(&self, at: u64, size: u8, value: u64) {
        self.mmio.write(self.common + at, size, value);
    }

    pub(crate) fn status(&self) -> u64 {
        self.read(20, 1)
    }

    pub(crate) fn set_status(&self, status: u64) {
        self.write(20, 1, status);
    }

    pub(crate) fn offered(&self) -> u64 {
        let half = |n| {
            self.write(0, 4, n);
            self.read(4, 4)
        };
        half(0) | half(1) << 32
    }

    /// Resets the device and agrees on features; says whether the device does.
    pub(crate) fn negotiate(&mut self, features: u64) -> bool {
        self.set_status(0);
        assert_eq!(self.status(), 0);
        self.set_status(1);
        self.set_status(3);
        for half in 0..2 {
            self.write(8, 4, half);
            self.write(12, 4, features >> (32 * half) & 0xffff_ffff);
        }
        self.features = features;
        self.set_status(0xb);
        self.status() & 8 != 0
    }

    pub(crate) fn set_driver_ok(&self) {
        self.set_status(0xf);
    }

    pub(crate) fn enable_msix(&self, vectors: u64) {
        for vector in 0..vectors {
            let entry = self.table + 16 * vector;
            self.mmio.write(entry, 4, 0xfee0_0000);
            self.mmio.write(entry + 4, 4, 0);
            self.mmio.write(entry + 8, 4, 0x40 + vector);
            self.mmio.write(entry + 12, 4, 0);
        }
        let at = self.config.capabilities(0x11)[0];
        self.config.write(at + 2, 2, 0x8000);
    }

    pub(crate) fn allocate(&mut self, length: u64) -> u64 {
        let at = self.free;
        self.free += length.next_multiple_of(64);
        at
    }

    pub(crate) fn poke<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        self.ram.map().write_obj(value, GuestAddress(at)).unwrap();
    }

    pub(crate) fn peek<T: vm_memory::ByteValued>(&self, at: u64) -> T {
        self.ram.map().read_obj(GuestAddress(at)).unwrap()
    }

    /// Sets a queue up and enables it, with this MSI-X vector.
    pub(crate) fn queue(&mut self, number: u16, size: u16, vector: u16) -> Ring {
        let places = if self.features & PACKED != 0 {
            [16 * u64::from(size), 4, 4]
        } else {
            [16 * u64::from(size), 6 + 2 * u64::from(size), 6 + 8 * u64::from(size)]
        }
        .map(|length| {
            let place = self.allocate(length);
            self.ram.map().write_slice(&vec![0; length as usize], GuestAddress(place)).unwrap();
            place
        });
        self.queue_at(number, size, vector, places)
    }

    /// As [`Driver::queue`], with the ring's parts at these places, which are zero.
    pub(crate) fn queue_at(&mut self, number: u16, size: u16, vector: u16, places: [u64; 3]) -> Ring {
        self.write(22, 2, number.into());
        self.write(24, 2, size.into());
        self.write(26, 2, vector.into());
        for (n, place) in (0..).zip(places) {
            self.write(32 + 8 * n, 4, place & 0xffff_ffff);
            self.write(36 + 8 * n, 4, place >> 32);
        }
        self.write(28, 2, 1);
        let doorbell = self.notify + self.step * self.read(30, 2);
        Ring {
            ram: self.ram.clone(),
            mmio: self.mmio.clone(),
            packed: self.features & PACKED != 0,
            event_index: self.features & EVENT_INDEX != 0,
            number,
            size,
            places,
            doorbell,
            next: 0,
            used: 0,
            available_wrap: true,
            used_wrap: true,
            available: 0,
            slots: [0; 1024],
        }
    }
}

/// A descriptor to be made available: address, length, flags without NEXT.
pub(crate) type Part = (u64, u32, u16);

/// The driver's end of a ring.
pub(crate) struct Ring {
    ram: Arc<Ram>,
    mmio: Arc<Bus>,
    packed: bool,
    event_index: bool,
    pub(crate) number: u16,
    pub(crate) size: u16,
    /// Table, available or driver's area, used or device's area.
    pub(crate) places: [u64; 3],
    pub(crate) doorbell: u64,
    /// The next free descriptor.
    next: u16,
    used: u16,
    available_wrap: bool,
    used_wrap: bool,
    available: u16,
    /// By id, how many entries.
    slots: [u16; 1024],
}

impl Ring {
    /// Goes on in another machine with the same memory.
    pub(crate) fn move_to(&mut self, machine: &TestMachine) {
        (self.ram, self.mmio) = (machine.ram.clone(), machine.mmio.clone());
    }

    pub(crate) fn poke<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        self.ram.map().write_obj(value, GuestAddress(at)).unwrap();
    }

    pub(crate) fn peek<T: vm_memory::ByteValued>(&self, at: u64) -> T {
        self.ram.map().read_obj(GuestAddress(at)).unwrap()
    }

    /// Makes a request available; returns its id.
    pub(crate) fn add(&mut self, parts: &[Part]) -> u16 {
        if self.packed { self.add_packed(parts) } else { self.add_split(parts) }
    }

    fn add_split(&mut self, parts: &[Part]) -> u16 {
        let head = self.next;
        for (n, (address, length, flags)) in parts.iter().enumerate() {
            let index = self.next;
            self.next = (self.next + 1) % self.size;
            let flags = if n + 1 < parts.len() { flags | F_NEXT } else { *flags };
            let at = self.places[0] + 16 * u64::from(index);
            self.poke(at, *address);
            self.poke(at + 8, *length);
            self.poke(at + 12, flags);
            self.poke(at + 14, self.next);
        }
        self.offer(head);
        head
    }

    /// Makes a head available in a split ring.
    pub(crate) fn offer(&mut self, head: u16) {
        let at = self.places[1] + 4 + 2 * u64::from(self.available % self.size);
        self.poke(at, head);
        self.available = self.available.wrapping_add(1);
        self.ram.map().store(self.available, GuestAddress(self.places[1] + 2), Ordering::Release).unwrap();
    }

    fn add_packed(&mut self, parts: &[Part]) -> u16 {
        let id = self.next;
        self.slots[usize::from(id)] = parts.len() as u16;
        let mut first = None;
        for (n, (address, length, flags)) in parts.iter().enumerate() {
            let at = self.places[0] + 16 * u64::from(self.next);
            let mut flags = if n + 1 < parts.len() { flags | F_NEXT } else { *flags };
            flags |= if self.available_wrap { 1 << 7 } else { 1 << 15 };
            self.poke(at, *address);
            self.poke(at + 8, *length);
            self.poke(at + 12, id);
            if n == 0 {
                first = Some((at + 14, flags));
            } else {
                self.poke(at + 14, flags);
            }
            self.next += 1;
            if self.next == self.size {
                self.next = 0;
                self.available_wrap = !self.available_wrap;
            }
        }
        let (at, flags) = first.unwrap();
        self.ram.map().store(flags, GuestAddress(at), Ordering::Release).unwrap();
        id
    }

    /// The next used request, if there is one: id and length.
    pub(crate) fn poll(&mut self) -> Option<(u16, u32)> {
        if self.packed {
            let at = self.places[0] + 16 * u64::from(self.used);
            let flags: u16 = self.ram.map().load(GuestAddress(at + 14), Ordering::Acquire).unwrap();
            let wanted = if self.used_wrap { 0x8080 } else { 0 };
            if flags & 0x8080 != wanted {
                return None;
            }
            let (id, length): (u16, u32) = (self.peek(at + 12), self.peek(at + 8));
            self.used += self.slots[usize::from(id)];
            if self.used >= self.size {
                self.used -= self.size;
                self.used_wrap = !self.used_wrap;
            }
            return Some((id, length));
        }
        let index: u16 = self.ram.map().load(GuestAddress(self.places[2] + 2), Ordering::Acquire).unwrap();
        if index == self.used {
            return None;
        }
        let at = self.places[2] + 4 + 8 * u64::from(self.used % self.size);
        self.used = self.used.wrapping_add(1);
        Some((self.peek::<u32>(at) as u16, self.peek(at + 4)))
    }

    /// Whether there is a used request to be seen.
    pub(crate) fn has_used(&self) -> bool {
        if self.packed {
            let flags: u16 = self.peek(self.places[0] + 16 * u64::from(self.used) + 14);
            return flags & 0x8080 == if self.used_wrap { 0x8080 } else { 0 };
        }
        self.peek::<u16>(self.places[2] + 2) != self.used
    }

    /// Says after which request it wants an interrupt: `ahead` more than were seen.
    pub(crate) fn want_interrupt(&self, ahead: u16) {
        assert!(self.event_index);
        if self.packed {
            let (mut at, mut wrap) = (self.used + ahead, self.used_wrap);
            if at >= self.size {
                at -= self.size;
                wrap = !wrap;
            }
            self.poke(self.places[1], at | u16::from(wrap) << 15);
            self.poke(self.places[1] + 2, 2u16);
        } else {
            let at = self.places[1] + 4 + 2 * u64::from(self.size);
            self.poke(at, self.used.wrapping_add(ahead));
        }
    }

    /// Wants no interrupt, as a driver without event indices says it.
    pub(crate) fn want_no_interrupt(&self) {
        if self.packed { self.poke(self.places[1] + 2, 1u16) } else { self.poke(self.places[1], 1u16) }
    }

    /// Whether the device wants to be notified of what was added since `added` requests of one entry ago.
    pub(crate) fn wants_notification(&self, added: u16) -> bool {
        if self.packed {
            let (at, flags): (u16, u16) = (self.peek(self.places[2]), self.peek(self.places[2] + 2));
            return match flags {
                0 => true,
                2 => {
                    let event = at & 0x7fff;
                    let round = if (at >> 15 != 0) == self.available_wrap { 0 } else { self.size };
                    let (event, new) = (event.wrapping_sub(round), self.next);
                    new.wrapping_sub(event).wrapping_sub(1) < added
                }
                _ => false,
            };
        }
        if self.event_index {
            let event: u16 = self.peek(self.places[2] + 4 + 8 * u64::from(self.size));
            self.available.wrapping_sub(event).wrapping_sub(1) < added
        } else {
            self.peek::<u16>(self.places[2]) & 1 == 0
        }
    }

    pub(crate) fn notify(&self) {
        self.mmio.write(self.doorbell, 2, self.number.into());
    }
}
