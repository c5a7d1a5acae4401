//! A guest of random bytes in every mode: whatever it does, the engine answers with a stop, and in time.
#![allow(clippy::unwrap_used)]

use tenon_core::{Bus, Clock, CpuModel, CpuState, Engine, Ram, Segment, Space, Stop, VmSetup};
use tenon_soft::Soft;
use vm_memory::{Bytes, GuestAddress};

/// xorshift64*: the same bytes everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

const INSTRUCTIONS: u64 = 20_000;
const CODE: u64 = 0x8000;
const TABLES: u64 = 0x1000;

fn state(random: &mut Random, start: &CpuState) -> CpuState {
    let mut state = start.clone();
    let mode = u16::try_from(random.below(4)).unwrap();
    let (code, data) = match mode {
        0 => (0x009b, 0x0093),
        1 => (0x409b, 0x4093),
        2 => (0xc09b, 0xc093),
        _ => (0xa09b, 0xc093),
    };
    let limit = if mode < 2 { 0xffff } else { u32::MAX };
    let ring = if mode == 0 { 0 } else { u16::try_from(random.below(2)).unwrap() * 3 };
    let segment = |selector: u16, rights: u16| Segment {
        selector: selector | ring,
        base: 0,
        limit,
        rights: rights | ring << 5,
    };
    state.segments = [segment(0x10, data); 6];
    state.segments[1] = segment(8, code);
    state.cr0 = [0x10, 0x11, 0x11, 0x8001_0011][usize::from(mode)];
    if mode == 3 {
        state.cr3 = TABLES;
        state.cr4 = 0x220;
        state.efer = 0xd01;
    }
    state.rip = CODE;
    for register in &mut state.general {
        *register = match random.below(3) {
            0 => random.next(),
            1 => random.below(1 << 20),
            _ => random.below(256),
        };
    }
    state.general[4] = 0x7000;
    state.idt.base = random.below(2) * 0x4000;
    state.idt.limit = 0xfff;
    state.gdt.base = 0x5000;
    state.gdt.limit = 0x7f;
    state
}

#[test]
fn random_guests_end_with_a_stop() {
    let rounds: u64 = std::env::var("TENON_RANDOM_ROUNDS").ok().map_or(300, |n| n.parse().expect("a number"));
    let mut random = Random(0x7e40_4e5e);
    let (mut crashed, mut instructions) = (0, 0);
    for _ in 0..rounds {
        let clock = Clock::virtual_time();
        let ram = Ram::new(1 << 20).unwrap();
        let mut bytes = vec![0u8; 1 << 20];
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&random.next().to_le_bytes());
        }
        ram.map().write_slice(&bytes, GuestAddress(0)).unwrap();
        for (at, value) in [(TABLES, 0x2007u64), (0x2000, 0x3007), (0x3000, 0x87), (TABLES + 0xff8, 0x2007)] {
            ram.map().write_obj(value, GuestAddress(at)).unwrap();
        }
        let setup = VmSetup {
            ram,
            pio: Bus::new(Space::Pio),
            mmio: Bus::new(Space::Mmio),
            clock: clock.clone(),
            vcpus: 1,
            cpu_model: CpuModel::Baseline,
        };
        let vm = Soft::new().create_vm(setup).unwrap();
        let mut vcpu = vm.create_vcpu(0).unwrap();
        let start = vcpu.state().unwrap();
        vcpu.set_state(&state(&mut random, &start)).unwrap();
        let kicker = vcpu.kicker();
        let end = clock.timer(move |_| kicker.kick());
        end.arm(INSTRUCTIONS);
        match vcpu.run().unwrap() {
            Stop::Kicked => {}
            Stop::Crashed(report) => {
                crashed += 1;
                assert!(!report.what.is_empty());
            }
        }
        let ran = vcpu.instructions().unwrap();
        assert!(ran <= INSTRUCTIONS, "{ran} instructions");
        instructions += ran;
        // What it left is a state like any other.
        let state = vcpu.state().unwrap();
        let _ = vcpu.set_state(&state);
    }
    assert!(crashed > rounds / 10, "{crashed} of {rounds} crashed");
    assert!(instructions > rounds, "{instructions} instructions");
    println!("{rounds} guests, {instructions} instructions, {crashed} triple faults");
}
