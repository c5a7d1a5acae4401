//! What fuzzers call: each target takes any bytes as a series of a driver's deeds, and panics only where the platform breaks a promise.
//!
//! Shared by `cargo fuzz` (the folder `fuzz`) and by the test beside this file, which runs them on a stable compiler. Each returns labels of what happened, by which the
//! test knows an input that reaches something new.

use std::collections::BTreeSet;

use tenon_core::{GuestRequest, Lifecycle};
use tenon_platform::ECAM_BASE;
use vm_memory::{Bytes, GuestAddress};

use crate::device::Echo;
use crate::machine::{RAM, TestMachine};

/// What happened.
pub(crate) type Seen = BTreeSet<String>;

/// The bytes as numbers; zeros after their end.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn is_over(&self) -> bool {
        self.0.is_empty()
    }

    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let count = N.min(self.0.len());
        let (now, rest) = self.0.split_at(count);
        bytes[..count].copy_from_slice(now);
        self.0 = rest;
        bytes
    }

    fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.bytes())
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.bytes())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.bytes())
    }
}

/// A text without its numbers.
fn kind(text: &str) -> String {
    text.chars().filter(|c| !c.is_ascii_hexdigit()).collect()
}

struct Target {
    machine: TestMachine,
    device: std::sync::Arc<Echo>,
    bar: u64,
}

const CONFIG: u64 = ECAM_BASE + (1 << 15);

impl Target {
    fn new(queues: &[u16]) -> Self {
        let machine = TestMachine::new(1);
        let device = Echo::new(queues);
        machine.attach("echo", &device);
        let bar = machine.mmio.read(CONFIG + 0x10, 8) & !0xf;
        Self { machine, device, bar }
    }

    fn common(&self, at: u64, size: u8, value: u64) {
        self.machine.mmio.write(self.bar + at, size, value);
    }

    fn status(&self) -> u64 {
        self.machine.mmio.read(self.bar + 20, 1)
    }

    fn poke(&self, at: u64, bytes: &[u8]) {
        self.machine.ram.map().write_slice(bytes, GuestAddress(at)).unwrap();
    }

    /// Takes from a queue as a device does, and checks what it is given.
    fn take(&self, queue: usize, most: usize, size: u16, held: &mut Vec<GuestRequest>, seen: &mut Seen) {
        let mut started = self.device.started.lock().unwrap();
        let Some(queue) = started.as_mut().and_then(|started| started.queues.get_mut(queue)?.as_mut()) else {
            return;
        };
        let mut requests = Vec::new();
        if let Err(broken) = queue.take(most, &mut requests) {
            drop(started);
            seen.insert(kind(&broken.what));
            assert_eq!(self.status() & 0x40, 0x40);
            return;
        }
        assert!(requests.len() <= most && requests.len() + held.len() <= usize::from(size));
        for request in &requests {
            let ranges: Vec<_> = request.readable.ranges().chain(request.writable.ranges()).collect();
            assert!(ranges.len() <= usize::from(size));
            assert!(ranges.iter().all(|(address, length)| *address < RAM && *length <= RAM - *address));
            assert!(request.readable.length() + request.writable.length() < 1 << 32);
            seen.insert(format!("{} ranges", ranges.len().min(4)));
        }
        held.append(&mut requests);
    }

    fn give_back(&self, queue: usize, held: &mut Vec<GuestRequest>, which: u8, seen: &mut Seen) {
        let mut started = self.device.started.lock().unwrap();
        let Some(queue) = started.as_mut().and_then(|started| started.queues.get_mut(queue)?.as_mut()) else {
            return;
        };
        if !held.is_empty() {
            let request = held.swap_remove(usize::from(which) % held.len());
            queue.complete(request.token, which.into());
        }
        queue.publish();
        seen.insert(format!("armed {}", queue.arm()));
    }
}

const TABLE: u64 = 0x1_0000;
const DRIVER: u64 = 0x2_0000;
const DEVICE: u64 = 0x3_0000;
const INDIRECT: u64 = 0x4_0000;

/// A queue of any format with rings of any content.
pub(crate) fn virtqueue(data: &[u8]) -> Seen {
    let mut input = Input(data);
    let mut seen = Seen::new();
    let target = Target::new(&[256]);
    let (format, size) = (input.u8(), 1 << (input.u8() % 9));
    let features = [1 << 28, 1 << 29, 1 << 34]
        .iter()
        .zip(0..)
        .fold(1u64 << 32, |all, (feature, n)| if format >> n & 1 != 0 { all | feature } else { all });
    let start = || {
        target.common(20, 1, 0);
        target.common(20, 1, 3);
        target.common(8, 4, 0);
        target.common(12, 4, features & 0xffff_ffff);
        target.common(8, 4, 1);
        target.common(12, 4, features >> 32);
        target.common(20, 1, 0xb);
        target.common(24, 2, size);
        for (at, place) in [(32, TABLE), (40, DRIVER), (48, DEVICE)] {
            target.common(at, 8, place);
        }
        target.common(28, 2, 1);
        target.common(20, 1, 0xf);
        assert_eq!(target.status(), 0xf);
    };
    start();
    let ring_size = u16::try_from(size).unwrap();
    let mut held = Vec::new();
    let mut available = 0u16;
    while !input.is_over() {
        match input.u8() % 10 {
            0..=2 => {
                // A descriptor, in the table or in an indirect one: mostly in RAM and short.
                let (place, form) = (input.u16(), input.u8());
                let table = if form & 1 == 0 { TABLE } else { INDIRECT };
                let address = if form & 2 == 0 { u64::from(input.u16()) << 8 } else { input.u64() };
                let address = if form & 4 == 0 { address } else { INDIRECT };
                let length =
                    if form & 8 == 0 { u32::from(input.u8()) << (form >> 4) } else { input.u64() as u32 };
                let at = table + 16 * (u64::from(place) % size);
                target.poke(at, &address.to_le_bytes());
                target.poke(at + 8, &length.to_le_bytes());
                target.poke(at + 12, &input.bytes::<4>());
            }
            3 => {
                let at = DRIVER + 4 + 2 * (u64::from(available) % size);
                target.poke(at, &(input.u16() % 512).to_le_bytes());
                available = available.wrapping_add(1);
                target.poke(DRIVER + 2, &available.to_le_bytes());
            }
            4 => target.poke(DRIVER + u64::from(input.u8()), &input.bytes::<2>()),
            5 => target.poke(DEVICE + u64::from(input.u8()), &input.bytes::<2>()),
            6 | 7 => target.take(0, usize::from(input.u8() % 32), ring_size, &mut held, &mut seen),
            8 => target.give_back(0, &mut held, input.u8(), &mut seen),
            _ => {
                if input.u8() % 4 == 0 {
                    held.clear();
                    available = 0;
                    start();
                } else {
                    let (schema, state) = target.machine.pci.save().unwrap();
                    target.machine.pci.restore(schema, &state).unwrap();
                    target.machine.pci.resume();
                    held.clear();
                    seen.insert("restored".into());
                }
            }
        }
    }
    seen.insert(format!("status {:x}", target.status()));
    seen
}

/// Accesses to configuration space, by both ways.
pub(crate) fn pci_config(data: &[u8]) -> Seen {
    let mut input = Input(data);
    let mut seen = Seen::new();
    let target = Target::new(&[8]);
    let (pio, mmio) = (&target.machine.pio, &target.machine.mmio);
    let config = || (0..64).map(|n| mmio.read(CONFIG + 4 * n, 4)).collect::<Vec<_>>();
    let before = config();
    let claims = mmio.claims().len();
    while !input.is_over() {
        let (op, at) = (input.u8(), u64::from(input.u8()));
        let size = 1 << (op >> 6);
        let place = CONFIG + at + (u64::from(op & 0x20) << 10);
        match op % 6 {
            0 | 1 => mmio.write(place, size, input.u64()),
            2 => drop(mmio.read(place, size)),
            3 => pio.write(0xcf8, 4, 0x8000_0800 | at),
            4 => pio.write(0xcfc + (at & 3), size.min(4), input.u64()),
            _ => {
                let value = pio.read(0xcf8 + (at & 7), size);
                assert!(size == 8 || value >> (8 * size) == 0);
            }
        }
    }
    assert_eq!(mmio.read(CONFIG, 4), 0x1044_1af4);
    let mut capability = mmio.read(CONFIG + 0x34, 1);
    let mut count = 0;
    while capability != 0 {
        assert!(count < 8);
        count += 1;
        capability = mmio.read(CONFIG + capability + 1, 1);
    }
    assert_eq!(count, 6);
    assert!(mmio.claims().len() <= claims);
    seen.insert(format!("claims {}", mmio.claims().len()));
    seen.insert(format!("command {:x}", mmio.read(CONFIG + 4, 2)));
    seen.insert(format!("status {:x}", target.status()));
    target.machine.pci.reset();
    assert_eq!(config(), before);
    seen
}

/// Accesses to the registers in the BAR, with a device that works in between.
pub(crate) fn virtio_registers(data: &[u8]) -> Seen {
    const FIELDS: [(u64, u8); 21] = [
        (0, 4),
        (4, 4),
        (8, 4),
        (12, 4),
        (16, 2),
        (18, 2),
        (20, 1),
        (21, 1),
        (22, 2),
        (24, 2),
        (26, 2),
        (28, 2),
        (30, 2),
        (32, 8),
        (40, 8),
        (48, 8),
        (32, 4),
        (44, 4),
        (0x1000, 1),
        (0x3000, 2),
        (0x4004, 4),
    ];
    let mut input = Input(data);
    let mut seen = Seen::new();
    let target = Target::new(&[8, 16]);
    let mmio = &target.machine.mmio;
    let mut held: [Vec<GuestRequest>; 2] = Default::default();
    while !input.is_over() {
        let op = input.u8();
        match op % 8 {
            0..=3 => {
                let (at, size) = FIELDS[usize::from(input.u8()) % FIELDS.len()];
                let value = match op >> 3 & 3 {
                    0 => input.u8().into(),
                    1 => u64::from(input.u8()) << 12,
                    2 => 1 << (input.u8() & 63),
                    _ => input.u64(),
                };
                let was = target.status();
                mmio.write(target.bar + at, size, value);
                let status = target.status();
                if at == 20 && value & 0xff == 0 {
                    assert_eq!(status, 0);
                } else {
                    assert_eq!(status & was, was, "bits of the status byte only come until a reset");
                }
                if status & 4 != was & 4 {
                    held = Default::default();
                }
                assert!(target.device.started.lock().unwrap().is_none() || status & 4 != 0);
                seen.insert(format!("status {status:x}"));
            }
            4 => mmio.write(target.bar + u64::from(input.u16() & 0x7fff), 1 << (op >> 6), input.u64()),
            5 => drop(mmio.read(target.bar + u64::from(input.u16() & 0x7fff), 1 << (op >> 6))),
            6 => {
                let queue = usize::from(op >> 3 & 1);
                let size = [8, 16][queue];
                target.take(queue, 4, size, &mut held[queue], &mut seen);
            }
            _ => {
                let queue = usize::from(op >> 3 & 1);
                target.give_back(queue, &mut held[queue], op, &mut seen);
            }
        }
        if target.device.started.lock().unwrap().is_none() {
            held = Default::default();
        }
    }
    target.common(20, 1, 0);
    assert_eq!((target.status(), target.device.started.lock().unwrap().is_none()), (0, true));
    seen
}
