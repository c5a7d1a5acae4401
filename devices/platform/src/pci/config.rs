//! A function's configuration space: 256 bytes of which the guest may write some bits.

use crate::encode::{Reader, Writer};

/// The bytes of a configuration space.
pub(crate) const CONFIG_SIZE: usize = 256;

pub(crate) const COMMAND: usize = 0x04;
pub(crate) const STATUS: usize = 0x06;
pub(crate) const BAR0: usize = 0x10;
const SUBSYSTEM: usize = 0x2c;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
/// Where capabilities begin.
const FIRST_CAPABILITY: usize = 0x40;

pub(crate) const MEMORY_ENABLE: u16 = 1 << 1;
pub(crate) const INTX_DISABLE: u16 = 1 << 10;
/// Memory, bus master, parity error response, SERR, INTx disable.
const COMMAND_WRITABLE: u16 = 0x0546;
/// In the status register.
pub(crate) const INTERRUPT_STATUS: u16 = 1 << 3;
const CAPABILITIES_LIST: u16 = 1 << 4;

/// Who a function is.
#[derive(Clone, Copy)]
pub(crate) struct Identity {
    pub(crate) vendor: u16,
    pub(crate) device: u16,
    pub(crate) subsystem_vendor: u16,
    pub(crate) subsystem: u16,
    pub(crate) revision: u8,
    /// Class, subclass and programming interface as one number.
    pub(crate) class: u32,
}

/// See the module.
#[derive(Clone)]
pub(crate) struct Config {
    bytes: [u8; CONFIG_SIZE],
    writable: [u8; CONFIG_SIZE],
    next_capability: usize,
    last_pointer: usize,
}

impl Config {
    pub(crate) fn new(identity: Identity) -> Self {
        let mut config = Self {
            bytes: [0; CONFIG_SIZE],
            writable: [0; CONFIG_SIZE],
            next_capability: FIRST_CAPABILITY,
            last_pointer: CAPABILITIES,
        };
        config.put(0, &identity.vendor.to_le_bytes());
        config.put(2, &identity.device.to_le_bytes());
        config.put(8, &(identity.class << 8 | u32::from(identity.revision)).to_le_bytes());
        config.put(SUBSYSTEM, &identity.subsystem_vendor.to_le_bytes());
        config.put(SUBSYSTEM + 2, &identity.subsystem.to_le_bytes());
        config.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        // Cache line size and latency timer, which mean nothing here.
        config.allow(0x0c, &[0xff, 0xff]);
        config
    }

    /// Sets bytes as the device does.
    pub(crate) fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Takes every bit from the guest, for a function that has nothing to set.
    pub(crate) fn fix(mut self) -> Self {
        self.writable = [0; CONFIG_SIZE];
        self
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }

    /// Adds a 64-bit prefetchable memory BAR, 0 and 1, of `size` bytes, a power of two, at `base`.
    pub(crate) fn add_bar(&mut self, size: u64, base: u64) {
        const MEMORY64_PREFETCHABLE: u64 = 0xc;
        self.put(BAR0, &(base | MEMORY64_PREFETCHABLE).to_le_bytes());
        self.allow(BAR0, &(!(size - 1) & !0xf).to_le_bytes());
    }

    /// Adds INTA with the line that the platform has wired it to.
    pub(crate) fn add_interrupt(&mut self, line: u8) {
        self.put(INTERRUPT_LINE, &[line, 1]);
        self.allow(INTERRUPT_LINE, &[0xff]);
    }

    /// Adds a capability: its id, what follows the pointer to the next, and which of those bits the guest may write. Returns where it is.
    pub(crate) fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let at = self.next_capability;
        let pointer = at.to_le_bytes()[0];
        self.put(self.last_pointer, &[pointer]);
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.allow(at + 2, writable);
        let status = self.u16(STATUS) | CAPABILITIES_LIST;
        self.put(STATUS, &status.to_le_bytes());
        self.last_pointer = at + 1;
        self.next_capability = (at + 2 + body.len()).next_multiple_of(4);
        at
    }

    pub(crate) fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    pub(crate) fn u32(&self, at: usize) -> u32 {
        u32::from(self.u16(at)) | u32::from(self.u16(at + 2)) << 16
    }

    /// Where the BAR is, if memory accesses are answered.
    pub(crate) fn bar(&self) -> Option<u64> {
        let base = u64::from(self.u32(BAR0) & !0xf) | u64::from(self.u32(BAR0 + 4)) << 32;
        (self.u16(COMMAND) & MEMORY_ENABLE != 0).then_some(base)
    }

    /// The guest reads `size` bytes (1, 2, 4); `at + size` is at most 256.
    pub(crate) fn read(&self, at: usize, size: usize) -> u32 {
        self.bytes[at..at + size].iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte))
    }

    /// The guest writes `size` bytes.
    pub(crate) fn write(&mut self, at: usize, size: usize, value: u32) {
        for (at, byte) in (at..at + size).zip(value.to_le_bytes()) {
            self.bytes[at] = self.bytes[at] & !self.writable[at] | byte & self.writable[at];
        }
    }

    /// The bits that the guest may write.
    pub(crate) fn save(&self, out: &mut Writer) {
        out.bytes(&self.bytes);
    }

    /// Takes over the bits that the guest may write. The others are the device's, and must be the same.
    pub(crate) fn restore(&mut self, from: &mut Reader) -> Result<(), String> {
        let saved = from.bytes()?;
        if saved.len() != CONFIG_SIZE {
            return Err(format!("a configuration space of {} bytes", saved.len()));
        }
        let fixed = |bytes: &[u8], n: usize| bytes[n] & !self.writable[n];
        if let Some(at) = (0..CONFIG_SIZE).find(|&n| fixed(saved, n) != fixed(&self.bytes, n)) {
            return Err(format!(
                "PCI configuration byte {at:#x} is another one; it was saved from another device"
            ));
        }
        self.bytes.copy_from_slice(saved);
        Ok(())
    }
}
