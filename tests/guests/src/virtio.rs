//! A small driver for virtio over PCI (virtio 1.2 §4.1): finds a device, moves its BAR below 4 GiB, and drives one split queue by polling. After [`Device::begin`] nothing needs ring 0.

use core::sync::atomic::{Ordering, fence};

use crate::port::{in32, out32};
use crate::tables::Shared;

const CONFIG_ADDRESS: u16 = 0xcf8;
const CONFIG_DATA: u16 = 0xcfc;
const VENDOR: u32 = 0x1af4;
/// Modern devices have this plus their type.
const FIRST_ID: u32 = 0x1040;
const CAP_POINTER: u8 = 0x34;
const CAP_VENDOR: u32 = 9;
const CAP_MSIX: u32 = 0x11;
/// In the first word of the MSI-X capability: on.
const MSIX_ENABLE: u32 = 1 << 31;
/// Where a message to the local APIC with id 0 goes (Intel SDM vol. 3 §11.11).
const MESSAGES: u32 = 0xfee0_0000;
const COMMAND: u8 = 4;
const MEMORY_AND_BUS_MASTER: u32 = 6;
const BAR0: u8 = 0x10;
/// Where the BAR of the device in slot 0 would go; each slot has 64 KiB. In the hole below 4 GiB where PCI devices may be.
const WINDOW: u64 = 0xc000_0000;
/// Entries of the queue.
pub const QUEUE: usize = 128;

const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
/// Feature bit 32, as a bit of the second word.
const VERSION_1_HIGH: u32 = 1;

fn config_read(slot: u32, offset: u8) -> u32 {
    out32(CONFIG_ADDRESS, 1 << 31 | slot << 11 | u32::from(offset & 0xfc));
    in32(CONFIG_DATA)
}

fn config_write(slot: u32, offset: u8, value: u32) {
    out32(CONFIG_ADDRESS, 1 << 31 | slot << 11 | u32::from(offset & 0xfc));
    out32(CONFIG_DATA, value);
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

#[repr(C, align(4096))]
struct Ring {
    descriptors: [Descriptor; QUEUE],
    available: [u16; 3 + QUEUE],
    used: Used,
}

#[repr(C, align(4))]
struct Used {
    flags: u16,
    index: u16,
    entries: [[u32; 2]; QUEUE],
    event: u16,
}

const NOTHING: Descriptor = Descriptor { address: 0, length: 0, flags: 0, next: 0 };
static RING: Shared<Ring> = Shared::new(Ring {
    descriptors: [NOTHING; QUEUE],
    available: [0; 3 + QUEUE],
    used: Used { flags: 0, index: 0, entries: [[0; 2]; QUEUE], event: 0 },
});

/// A part of a request: where, how long, and whether the device writes it.
#[derive(Clone, Copy)]
pub struct Part {
    /// The first byte.
    pub address: u64,
    /// The length in bytes.
    pub length: u32,
    /// The device writes it.
    pub written: bool,
}

/// A device with one queue.
pub struct Device {
    common: u64,
    /// The notification registers, and how far apart they are.
    notify: u64,
    stride: u64,
    queue: u16,
    /// The queue's notification register.
    doorbell: u64,
    config: u64,
    /// The first entry of the MSI-X table, if it interrupts.
    msix: Option<u64>,
    /// Available entries that were made so far.
    made: u16,
    /// Used entries that were taken so far.
    taken: u16,
}

impl Device {
    /// Finds the first device of this type on bus 0 and brings it up with `features` of the first 32 (those that it offers). None if there is none, or it refuses.
    pub fn begin(kind: u32, features: u32) -> Option<Self> {
        Self::begin_with(kind, features, 0, None)
    }

    /// As [`Device::begin`], with this queue instead of the first; the device sends `vector` by MSI-X to vCPU 0 when it has answered.
    pub fn begin_with(kind: u32, features: u32, queue: u16, vector: Option<u8>) -> Option<Self> {
        let slot = (1..32).find(|slot| config_read(*slot, 0) == VENDOR | (FIRST_ID + kind) << 16)?;
        let base = WINDOW + u64::from(slot) * 0x1_0000;
        config_write(slot, COMMAND, 0);
        config_write(slot, BAR0, base as u32);
        config_write(slot, BAR0 + 4, 0);
        config_write(slot, COMMAND, MEMORY_AND_BUS_MASTER);
        let (mut common, mut notify, mut stride, mut config, mut msix) = (0, 0, 0, 0, None);
        let mut at = config_read(slot, CAP_POINTER) as u8;
        while at != 0 {
            let head = config_read(slot, at);
            if head & 0xff == CAP_VENDOR {
                let place = base + u64::from(config_read(slot, at + 8));
                match head >> 24 {
                    1 => common = place,
                    2 => {
                        notify = place;
                        stride = u64::from(config_read(slot, at + 16));
                    }
                    4 => config = place,
                    _ => {}
                }
            }
            if head & 0xff == CAP_MSIX
                && let Some(vector) = vector
            {
                let table = base + u64::from(config_read(slot, at + 4) & !7);
                // SAFETY: the table's first entry: address, data, not masked.
                unsafe {
                    for (offset, word) in [(0, MESSAGES), (4, 0), (8, u32::from(vector)), (12, 0)] {
                        ((table + offset) as *mut u32).write_volatile(word);
                    }
                }
                config_write(slot, at, head | MSIX_ENABLE);
                msix = Some(table);
            }
            at = (head >> 8) as u8;
        }
        let mut device = Self { common, notify, stride, queue, doorbell: 0, config, msix, made: 0, taken: 0 };
        device.bring_up(features).then_some(device)
    }

    fn bring_up(&mut self, features: u32) -> bool {
        self.set_status(0);
        while self.status() != 0 {}
        self.set_status(ACKNOWLEDGE | DRIVER);
        let ring = RING.at();
        // SAFETY: registers of the device (virtio 1.2 §4.1.4.3), mapped one to one, and the ring, which nobody else uses.
        unsafe {
            (self.common as *mut u32).write_volatile(0);
            let offered = ((self.common + 4) as *const u32).read_volatile();
            for (select, bits) in [(0, features & offered), (1, VERSION_1_HIGH)] {
                ((self.common + 8) as *mut u32).write_volatile(select);
                ((self.common + 12) as *mut u32).write_volatile(bits);
            }
            self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
            if self.status() & FEATURES_OK == 0 {
                return false;
            }
            ((self.common + 0x16) as *mut u16).write_volatile(self.queue);
            self.doorbell =
                self.notify + self.stride * u64::from(((self.common + 0x1e) as *const u16).read_volatile());
            ((self.common + 0x18) as *mut u16).write_volatile(QUEUE as u16);
            for (register, place) in [
                (0x20, &raw const (*ring).descriptors as u64),
                (0x28, &raw const (*ring).available as u64),
                (0x30, &raw const (*ring).used as u64),
            ] {
                ((self.common + register) as *mut u32).write_volatile(place as u32);
                ((self.common + register + 4) as *mut u32).write_volatile((place >> 32) as u32);
            }
            if self.msix.is_some() {
                ((self.common + 0x1a) as *mut u16).write_volatile(0);
                if ((self.common + 0x1a) as *const u16).read_volatile() != 0 {
                    return false;
                }
            }
            ((self.common + 0x1c) as *mut u16).write_volatile(1);
            // Without MSI-X this driver polls, and wants no interrupts.
            (*ring).available[0] = u16::from(self.msix.is_none());
        }
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        true
    }

    fn status(&self) -> u8 {
        // SAFETY: the status register.
        unsafe { ((self.common + 0x14) as *const u8).read_volatile() }
    }

    fn set_status(&self, status: u8) {
        // SAFETY: the status register.
        unsafe { ((self.common + 0x14) as *mut u8).write_volatile(status) };
    }

    /// Masks the device's vector, or lets it through again.
    pub fn mask(&self, masked: bool) {
        if let Some(table) = self.msix {
            // SAFETY: the entry's vector control.
            unsafe { ((table + 12) as *mut u32).write_volatile(masked.into()) };
        }
    }

    /// Eight bytes of the configuration space.
    pub fn config(&self, offset: u64) -> u64 {
        // SAFETY: registers of the device.
        unsafe { ((self.config + offset) as *const u64).read_volatile() }
    }

    /// Puts a request into the descriptors from `first` on. The device sees it from [`Device::notify`] on.
    pub fn queue(&mut self, first: u16, parts: &[Part]) {
        let ring = RING.at();
        // SAFETY: the descriptors of a request that is not under way are the driver's.
        unsafe {
            for (n, part) in parts.iter().enumerate() {
                let at = usize::from(first) + n;
                let more = n + 1 < parts.len();
                let flags = u16::from(more) | u16::from(part.written) << 1;
                let descriptor =
                    Descriptor { address: part.address, length: part.length, flags, next: at as u16 + 1 };
                (&raw mut (*ring).descriptors[at]).write_volatile(descriptor);
            }
            (&raw mut (*ring).available[2 + usize::from(self.made) % QUEUE]).write_volatile(first);
            self.made = self.made.wrapping_add(1);
        }
    }

    /// Makes what was queued available, all at once, and tells the device if it wants to know.
    pub fn notify(&self) {
        fence(Ordering::Release);
        // SAFETY: the device reads the index and writes the flags; the doorbell is the queue's.
        unsafe {
            (&raw mut (*RING.at()).available[1]).write_volatile(self.made);
            fence(Ordering::SeqCst);
            if (&raw const (*RING.at()).used.flags).read_volatile() & 1 == 0 {
                (self.doorbell as *mut u16).write_volatile(self.queue);
            }
        }
    }

    /// The first descriptor of a request that has been answered, and how many bytes were written; none if there is none yet.
    pub fn take(&mut self) -> Option<(u16, u32)> {
        let ring = RING.at();
        // SAFETY: the device writes the entry before the index.
        unsafe {
            if (&raw const (*ring).used.index).read_volatile() == self.taken {
                return None;
            }
            fence(Ordering::Acquire);
            let [first, written] =
                (&raw const (*ring).used.entries[usize::from(self.taken) % QUEUE]).read_volatile();
            self.taken = self.taken.wrapping_add(1);
            Some((first as u16, written))
        }
    }

    /// How many used entries the device says there are.
    pub fn used_index(&self) -> u16 {
        // SAFETY: reading memory that is always there.
        unsafe { (&raw const (*RING.at()).used.index).read_volatile() }
    }

    /// Resets the device, and returns when it says that it is: it must not touch memory any more.
    pub fn reset(&self) {
        self.set_status(0);
        while self.status() != 0 {}
    }

    /// Forgets what is in the queue of a device that was reset, which can then be begun again.
    pub fn forget(self) {
        // SAFETY: the device that used it is reset.
        unsafe {
            (&raw mut (*RING.at()).available).write_bytes(0, 1);
            (&raw mut (*RING.at()).used).write_bytes(0, 1);
        }
    }
}
