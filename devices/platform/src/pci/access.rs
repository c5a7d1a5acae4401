//! The two ways to configuration space: memory-mapped (ECAM, PCI Express 5.0 §7.2.2) and by a pair of ports (PCI 3.0 §3.2.2.3.2).

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use tenon_core::{Region, Request, Requests};

use super::{PciSlot, SLOTS, Slots, lock};

/// The bytes of configuration space of a function by ECAM.
const FUNCTION_BITS: u32 = 12;

/// Reads an aligned 1, 2 or 4 bytes. What is not there reads as all ones.
fn read(slots: &Mutex<Slots>, bus: u8, devfn: u8, at: usize, size: usize) -> u32 {
    let here = lock(slots);
    let slot = PciSlot { bus, slot: devfn >> 3 };
    if bus == 0
        && let Some(function) = here.board.get(&devfn)
    {
        return if at + size <= super::config::CONFIG_SIZE { function.read(at, size) } else { u32::MAX };
    }
    if devfn & 7 != 0 {
        return u32::MAX;
    }
    let function = here.at(slot);
    drop(here);
    function.map_or(u32::MAX, |function| function.read_config(at, size))
}

fn write(slots: &Mutex<Slots>, bus: u8, devfn: u8, at: usize, size: usize, value: u32) {
    let slot = PciSlot { bus, slot: devfn >> 3 };
    let function = lock(slots).at(slot).filter(|_| devfn & 7 == 0);
    if let Some(function) = function {
        function.write_config(at, size, value);
    }
}

/// Splits an access into aligned ones of at most four bytes: offset from its start, and size.
fn pieces(at: u64, size: u8) -> impl Iterator<Item = (u8, u8)> {
    let step = if at.is_multiple_of(size.into()) { size.min(4) } else { 1 };
    (0..size).step_by(step.into()).map(move |offset| (offset, step))
}

/// Configuration space as memory.
pub(crate) struct Ecam(pub(crate) Arc<Mutex<Slots>>);

impl Ecam {
    fn place(address: u64) -> (u8, u8, usize) {
        let [_, devfn, bus, ..] = (address >> (FUNCTION_BITS - 8)).to_le_bytes();
        (bus, devfn, usize::try_from(address & 0xfff).unwrap_or(0))
    }
}

impl Region for Ecam {
    fn read(&self, offset: u64, size: u8) -> u64 {
        pieces(offset, size).fold(0, |value, (by, size)| {
            let (bus, devfn, at) = Self::place(offset + u64::from(by));
            let ones = u32::MAX >> (32 - 8 * u32::from(size));
            value | u64::from(read(&self.0, bus, devfn, at, size.into()) & ones) << (8 * by)
        })
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        for (by, size) in pieces(offset, size) {
            let (bus, devfn, at) = Self::place(offset + u64::from(by));
            let value = u32::try_from(value >> (8 * by) & 0xffff_ffff).unwrap_or(0);
            write(&self.0, bus, devfn, at, size.into(), value);
        }
    }
}

/// Configuration space by ports: +0 the address, with four bytes at once; +4 the data. Port +1 alone is the reset register of old chip sets.
pub(crate) struct Ports {
    slots: Arc<Mutex<Slots>>,
    requests: Requests,
    address: AtomicU32,
}

const ENABLE: u32 = 1 << 31;
const RESET_CPU: u64 = 1 << 2;

impl Ports {
    pub(crate) fn new(slots: Arc<Mutex<Slots>>, requests: Requests) -> Self {
        Self { slots, requests, address: AtomicU32::new(0) }
    }

    fn place(&self, offset: u64) -> Option<(u8, u8, usize)> {
        let address = self.address.load(Ordering::Relaxed);
        let [register, devfn, bus, _] = address.to_le_bytes();
        let at = usize::from(register & !3) + usize::try_from(offset & 3).unwrap_or(0);
        (address & ENABLE != 0).then_some((bus, devfn, at))
    }
}

impl Region for Ports {
    fn read(&self, offset: u64, size: u8) -> u64 {
        match (offset, size) {
            (0, 4) => self.address.load(Ordering::Relaxed).into(),
            (4.., 1 | 2 | 4) => pieces(offset, size).fold(0, |value, (by, size)| {
                let found = self
                    .place(offset + u64::from(by))
                    .map_or(u32::MAX, |(bus, devfn, at)| read(&self.slots, bus, devfn, at, size.into()));
                let ones = u32::MAX >> (32 - 8 * u32::from(size));
                value | u64::from(found & ones) << (8 * by)
            }),
            _ => u64::MAX,
        }
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        match (offset, size) {
            // Bits 24 to 30 are reserved, and the lowest two are 0.
            (0, 4) => self.address.store(u32::try_from(value).unwrap_or(0) & 0x80ff_fffc, Ordering::Relaxed),
            (1, 1) if value & RESET_CPU != 0 => self.requests.send(Request::Reset),
            (4.., 1 | 2 | 4) => {
                for (by, size) in pieces(offset, size) {
                    if let Some((bus, devfn, at)) = self.place(offset + u64::from(by)) {
                        let value = u32::try_from(value >> (8 * by) & 0xffff_ffff).unwrap_or(0);
                        write(&self.slots, bus, devfn, at, size.into(), value);
                    }
                }
            }
            _ => {}
        }
    }
}

const _: () = assert!((SLOTS as u32 * 8) << FUNCTION_BITS == 1 << 20);
