//! Random accesses to everything that is no RAM: ports, device memory, PCI configuration space, model-specific registers, CPUID. `seed=N steps=M`.
//!
//! Left out is what ends the machine or this vCPU by right: the ports of power, reset and exit, INIT and other deliveries than plain interrupts, EFER, and registers by which
//! the host writes to an address.
#![no_std]
#![no_main]

use bare_guests::boot::Machine;
use bare_guests::check::holds;
use bare_guests::port::{SERIAL, in8, in16, in32, out8, out16, out32};
use bare_guests::tables::Shared;
use bare_guests::{Fault, cpu, guarded};
use core::arch::asm;

bare_guests::guest!(main);

/// Where BARs are put: slot by slot, 64 KiB each.
const WINDOW: u64 = 0xc000_0000;
const SLOTS: u64 = 12;
const ECAM: u64 = 0xe000_0000;
const IO_APIC: u64 = 0xfec0_0000;
const LOCAL_APIC: u64 = 0xfee0_0000;

/// One access, made under `guarded`.
#[derive(Clone, Copy)]
struct Access {
    kind: u64,
    at: u64,
    value: u64,
}

static NEXT: Shared<Access> = Shared::new(Access { kind: 0, at: 0, value: 0 });
static SCRATCH: Shared<[u8; 64]> = Shared::new([0; 64]);

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 3
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// A small number, a single bit, all ones, or anything.
    fn value(&mut self) -> u64 {
        match self.below(5) {
            0 => self.below(256),
            1 => 1 << self.below(64),
            2 => u64::MAX,
            3 => self.below(1 << 32),
            _ => self.next() ^ self.next() << 32,
        }
    }

    fn port(&mut self) -> u64 {
        match self.below(6) {
            0 => u64::from(SERIAL) + self.below(8),
            1 => 0x70 + self.below(2),
            2 | 3 => 0xcf8 + self.below(8),
            4 => 0x500 + self.below(0x100),
            _ => self.below(1 << 16),
        }
    }

    fn address(&mut self) -> u64 {
        match self.below(8) {
            0 | 1 => WINDOW + self.below(SLOTS << 16),
            // The parts of a virtio function: common, interrupts, the device's own, notifications.
            2 => WINDOW + (self.below(SLOTS) << 16) + (self.below(8) << 12) + self.below(64),
            3 => ECAM + self.below(SLOTS << 15),
            4 => ECAM + self.below(1 << 24),
            5 => IO_APIC + self.below(32),
            6 => LOCAL_APIC + self.below(64) * 16,
            _ => WINDOW + self.below(0x3e00_0000),
        }
    }

    fn register(&mut self) -> u64 {
        match self.below(6) {
            0 => self.below(0x1000),
            1 => 0xc000_0000 + self.below(0x200),
            2 => 0x4000_0000 + self.below(0x200),
            3 => 0x800 + self.below(0x100),
            4 => 0xc001_0000 + self.below(0x200),
            _ => self.below(1 << 32),
        }
    }
}

/// Whether a write of this value is left out.
fn ends_machine(kind: u64, at: u64, value: u64) -> bool {
    // Deliveries that stop this vCPU or interrupt it whatever it does are bits 8 to 10 of every register that has them.
    let delivery = value & 0x700 != 0;
    match kind {
        // A wider access reaches the ports behind.
        0..=5 => [0x60, 0x64, 0x92, 0xf4, 0xf5, 0xf6, 0xf7, 0x600, 0x601, 0x602, 0x603, 0xcf9]
            .iter()
            .any(|port| (at..at + 4).contains(port)),
        6..=12 => at >= IO_APIC && (delivery || at & 0xff0 == 0x300 || at == LOCAL_APIC + 0x80),
        13 => {
            let by_address = (0x4b56_4d00..0x4b56_4d10).contains(&at)
                || (0x11..=0x12).contains(&at)
                || (0x4000_0000..0x4000_0200).contains(&at);
            let apic = (0x800..0x900).contains(&at) && (delivery || at == 0x830 || at == 0x808) || at == 0x1b;
            by_address || apic || at == 0xc000_0080
        }
        _ => false,
    }
}

extern "C" fn access(_: u64) {
    // SAFETY: nothing else runs.
    let Access { kind, at, value } = unsafe { NEXT.at().read() };
    let (port, scratch) = (at as u16, SCRATCH.at().cast::<u8>());
    // SAFETY: what such accesses do is what is tried; a fault comes back to `guarded`.
    unsafe {
        match kind {
            0 => drop(in8(port)),
            1 => drop(in16(port)),
            2 => drop(in32(port)),
            3 => out8(port, value as u8),
            4 => out16(port, value as u16),
            5 => out32(port, value as u32),
            6 => drop((at as *const u8).read_volatile()),
            7 => (at as *mut u8).write_volatile(value as u8),
            8 => drop((at as *const u32).read_unaligned()),
            9 => (at as *mut u32).write_unaligned(value as u32),
            10 => asm!("mov {0}, [{1}]", "mov [{1}], {2}", out(reg) _, in(reg) at, in(reg) value),
            11 => asm!("lock xadd [{0}], {1:e}", in(reg) at, inout(reg) value => _),
            12 => {
                asm!("rep movsb", inout("rsi") at => _, inout("rdi") scratch => _, inout("rcx") 1 + value % 32 => _)
            }
            13 => cpu::wrmsr(at as u32, value),
            14 => drop(cpu::rdmsr(at as u32)),
            15 => drop(cpu::cpuid(at as u32, value as u32)),
            16 => asm!("mov dr0, {0}", "mov dr3, {0}", "mov {0}, dr6", inout(reg) value => _),
            _ => asm!("rep insb", in("dx") port, inout("rdi") scratch => _, inout("rcx") 1 + value % 32 => _),
        }
    }
}

fn config(slot: u64, offset: u64, value: u32) {
    // SAFETY: configuration space, which is no memory.
    unsafe { ((ECAM + (slot << 15) + offset) as *mut u32).write_volatile(value) };
}

/// Puts every device where it can be reached, wherever the accesses before have put it.
fn place_devices() {
    for slot in 1..SLOTS {
        config(slot, 0x10, (WINDOW + (slot << 16)) as u32);
        config(slot, 0x14, 0);
        config(slot, 4, 6);
    }
}

fn main(machine: &Machine) {
    let steps = machine.number("steps").unwrap_or(20_000);
    let mut random = Random(machine.number("seed").unwrap_or(1) << 8 | 1);
    let (mut done, mut faults) = (0, 0);
    for step in 0..steps {
        if step % 64 == 0 {
            place_devices();
        }
        let kind = random.below(18);
        let at = match kind {
            0..=5 | 17 => random.port(),
            6..=12 => random.address(),
            13 | 14 => random.register(),
            _ => random.value(),
        };
        let value = random.value();
        if ends_machine(if kind == 17 { 0 } else { kind }, at, value) {
            continue;
        }
        // SAFETY: nothing else runs.
        unsafe { NEXT.at().write(Access { kind, at, value }) };
        let fault = guarded(access, 0);
        done += 1;
        faults += u64::from(fault.vector != Fault::NONE);
    }
    // The serial line as it should be.
    for (register, value) in [(3, 3), (1, 0), (2, 7), (4, 3)] {
        out8(SERIAL + register, value);
    }
    out8(SERIAL, b'\n');
    holds("random accesses are made", done > steps / 2);
    holds("some of them fault", faults > 0 && faults < done);
}
