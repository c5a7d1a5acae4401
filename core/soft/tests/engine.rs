//! The engine's own promises, through its public door: code that changes, vCPUs that share memory, kicks, the dirty log,
//! determinism, and states that move.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use tenon_core::{
    Bus, Claim, Clock, CpuModel, CpuState, Engine, Kick, Ram, Region, Segment, Space, Stop, Vcpu, Vm, VmSetup,
};
use tenon_soft::Soft;
use vm_memory::{Bytes, GuestAddress};

const CODE: u64 = 0x10_0000;
const DATA: u64 = 0x20_0000;
const STACKS: u64 = 0x30_0000;
const TABLES: u64 = 0x1000;
const RAM_SIZE: u64 = 16 << 20;
/// A write here kicks all vCPUs, and is noted.
const DONE: u16 = 0x80;

#[derive(Default)]
struct Done {
    kicks: Mutex<Vec<Arc<dyn Kick>>>,
    values: Mutex<Vec<u64>>,
}

impl Region for Done {
    fn read(&self, _: u64, _: u8) -> u64 {
        0
    }
    fn write(&self, _: u64, _: u8, value: u64) {
        self.values.lock().unwrap().push(value);
        self.kicks.lock().unwrap().iter().for_each(|kick| kick.kick());
    }
}

/// A machine with 64-bit code at [`CODE`], memory mapped one to one.
struct Rig {
    ram: Arc<Ram>,
    vm: Arc<dyn Vm>,
    done: Arc<Done>,
    _claim: Claim,
}

impl Rig {
    fn new(vcpus: u32, clock: Arc<Clock>, code: &[u8]) -> Self {
        let ram = Ram::new(RAM_SIZE).unwrap();
        let pio = Bus::new(Space::Pio);
        let setup = VmSetup {
            ram: ram.clone(),
            pio: pio.clone(),
            mmio: Bus::new(Space::Mmio),
            clock,
            vcpus,
            cpu_model: CpuModel::Baseline,
        };
        let vm = Soft::new().create_vm(setup).unwrap();
        let done = Arc::new(Done::default());
        let claim = pio.claim("done", DONE.into(), 4, done.clone()).unwrap();
        let put = |at: u64, value: u64| ram.map().write_obj(value, GuestAddress(at)).unwrap();
        put(TABLES, (TABLES + 0x1000) | 3);
        put(TABLES + 0x1000, (TABLES + 0x2000) | 3);
        for n in 0..RAM_SIZE >> 21 {
            put(TABLES + 0x2000 + 8 * n, n << 21 | 0x83);
        }
        ram.map().write_slice(code, GuestAddress(CODE)).unwrap();
        Self { ram, vm, done, _claim: claim }
    }

    fn real(vcpus: u32, code: &[u8]) -> Self {
        Self::new(vcpus, Clock::real().unwrap(), code)
    }

    /// The vCPU, at [`CODE`] with its index in RDI.
    fn vcpu(&self, index: u32) -> Box<dyn Vcpu> {
        let mut vcpu = self.vm.create_vcpu(index).unwrap();
        self.done.kicks.lock().unwrap().push(vcpu.kicker());
        let mut state = CpuState::after_reset();
        let data = Segment { selector: 0x10, base: 0, limit: u32::MAX, rights: 0xc093 };
        state.segments = [data; 6];
        state.segments[1] = Segment { selector: 8, base: 0, limit: u32::MAX, rights: 0xa09b };
        state.cr0 = 0x8000_0011;
        state.cr3 = TABLES;
        state.cr4 = 0x20;
        state.efer = 0x500;
        state.rip = CODE;
        state.general = [0; 16];
        state.general[4] = STACKS + 0x1_0000 * u64::from(index + 1);
        state.general[7] = index.into();
        vcpu.set_state(&state).unwrap();
        vcpu
    }

    fn word(&self, at: u64) -> u64 {
        self.ram.map().read_obj(GuestAddress(at)).unwrap()
    }

    fn values(&self) -> Vec<u64> {
        self.done.values.lock().unwrap().clone()
    }
}

fn assemble(build: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    build(&mut a).unwrap();
    a.assemble(CODE).unwrap()
}

fn run_until_kicked(vcpu: &mut dyn Vcpu) {
    match vcpu.run().unwrap() {
        Stop::Kicked => {}
        Stop::Crashed(report) => panic!("{report}"),
    }
}

#[test]
fn a_store_into_the_running_block_takes_effect_at_the_next_instruction() {
    let code = assemble(|a| {
        let mut patched = a.create_label();
        // Once to have it decoded, then with another immediate from the block that contains it.
        a.mov(ebx, 2)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.lea(rsi, ptr(patched))?;
        a.mov(byte_ptr(rsi + 1), 0x77)?;
        a.set_label(&mut patched)?;
        a.mov(al, 0x11)?;
        a.out(u32::from(DONE), al)?;
        a.dec(ebx)?;
        a.jnz(again)
    });
    let rig = Rig::real(1, &code);
    let mut vcpu = rig.vcpu(0);
    run_until_kicked(&mut *vcpu);
    run_until_kicked(&mut *vcpu);
    assert_eq!(rig.values(), [0x77, 0x77]);
}

#[test]
fn code_that_another_vcpu_writes_is_what_runs() {
    // vCPU 0 calls a function until it returns 2; vCPU 1 waits until the function has run often, and then changes its immediate.
    let code = assemble(|a| {
        let mut writer = a.create_label();
        let mut function = a.create_label();
        let (mut call, mut wait) = (a.create_label(), a.create_label());
        a.test(edi, edi)?;
        a.jnz(writer)?;
        a.set_label(&mut call)?;
        a.lock().inc(qword_ptr(DATA))?;
        a.call(function)?;
        a.cmp(eax, 2)?;
        a.jne(call)?;
        a.out(u32::from(DONE), al)?;
        a.set_label(&mut writer)?;
        a.lea(rsi, ptr(function))?;
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(qword_ptr(DATA), 10_000)?;
        a.jb(wait)?;
        a.mov(dword_ptr(rsi + 1), 2)?;
        a.hlt()?;
        // Far enough not to share a block's bytes with the rest, in the same page as the code that calls it.
        a.db(&[0x90; 256])?;
        a.set_label(&mut function)?;
        a.mov(eax, 1)?;
        a.ret()
    });
    let rig = Rig::real(2, &code);
    std::thread::scope(|scope| {
        for index in 0..2 {
            let mut vcpu = rig.vcpu(index);
            scope.spawn(move || run_until_kicked(&mut *vcpu));
        }
    });
    assert_eq!(rig.values(), [2]);
    assert!(rig.word(DATA) >= 10_000);
}

#[test]
fn locked_additions_of_all_vcpus_arrive_aligned_or_not() {
    const EACH: u32 = 20_000;
    const VCPUS: u64 = 4;
    let places = [DATA, DATA + 0x1003, DATA + 0x2ffc, DATA + 0x303e];
    let code = assemble(|a| {
        let mut again = a.create_label();
        a.mov(ecx, EACH)?;
        a.set_label(&mut again)?;
        a.lock().inc(qword_ptr(places[0]))?;
        a.lock().add(qword_ptr(places[1]), 3)?;
        a.mov(eax, 1)?;
        a.lock().xadd(qword_ptr(places[2]), rax)?;
        let mut retry = a.create_label();
        a.mov(rax, qword_ptr(places[3]))?;
        a.set_label(&mut retry)?;
        a.lea(rdx, rax + 5)?;
        a.lock().cmpxchg(qword_ptr(places[3]), rdx)?;
        a.jnz(retry)?;
        a.dec(ecx)?;
        a.jnz(again)?;
        // The last one to come tells.
        a.mov(eax, 1)?;
        a.lock().xadd(dword_ptr(DATA + 0x8000), eax)?;
        a.cmp(eax, VCPUS as u32 - 1)?;
        let mut wait = a.create_label();
        a.jne(wait)?;
        a.out(u32::from(DONE), al)?;
        a.set_label(&mut wait)?;
        a.hlt()?;
        a.jmp(wait)
    });
    let rig = Rig::real(VCPUS as u32, &code);
    std::thread::scope(|scope| {
        for index in 0..VCPUS as u32 {
            let mut vcpu = rig.vcpu(index);
            scope.spawn(move || run_until_kicked(&mut *vcpu));
        }
    });
    let all = VCPUS * u64::from(EACH);
    assert_eq!(places.map(|at| rig.word(at)), [all, 3 * all, all, 5 * all]);
}

#[test]
fn a_kick_ends_a_halt_and_a_kick_before_run_is_not_lost() {
    let code = assemble(|a| {
        a.hlt()?;
        a.hlt()
    });
    let rig = Rig::real(1, &code);
    let mut vcpu = rig.vcpu(0);
    vcpu.kicker().kick();
    run_until_kicked(&mut *vcpu);
    assert_eq!(vcpu.instructions(), Some(0));
    let kicker = vcpu.kicker();
    std::thread::scope(|scope| {
        let halted = scope.spawn(|| {
            run_until_kicked(&mut *vcpu);
            vcpu.state().unwrap()
        });
        kicker.kick();
        let state = halted.join().unwrap();
        assert!(state.rip == CODE || state.rip == CODE + 1);
    });
}

#[test]
fn the_dirty_log_names_exactly_the_pages_that_were_written() {
    let code = assemble(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.mov(qword_ptr(DATA), rax)?;
        a.mov(qword_ptr(DATA + 0x2ffc), rax)?; // Two pages.
        a.mov(rax, qword_ptr(DATA + 0x7000))?;
        a.mov(edi, DATA as u32 + 0x1_0000)?;
        a.mov(ecx, 0x300)?;
        a.rep().stosq()?;
        a.out(u32::from(DONE), al)?;
        a.jmp(again)
    });
    let rig = Rig::real(1, &code);
    let mut vcpu = rig.vcpu(0);
    run_until_kicked(&mut *vcpu);
    assert!(rig.vm.take_dirty_log().is_err());
    rig.vm.set_dirty_log(true).unwrap();
    let pages: Vec<u64> = [0, 0x2000, 0x3000, 0x1_0000, 0x1_1000].iter().map(|at| DATA + at).collect();
    // The first answer may name pages that could be written at full speed when the log began.
    run_until_kicked(&mut *vcpu);
    let first = rig.vm.take_dirty_log().unwrap();
    assert!(pages.iter().all(|page| first.contains(page)));
    for _ in 0..3 {
        run_until_kicked(&mut *vcpu);
        assert_eq!(rig.vm.take_dirty_log().unwrap(), pages);
    }
    assert!(rig.vm.take_dirty_log().unwrap().is_empty());
    rig.vm.set_dirty_log(false).unwrap();
    run_until_kicked(&mut *vcpu);
}

/// A loop with memory, string and branch instructions: a hash in RAX, and the time in RBX.
fn busy(turns: u32) -> Vec<u8> {
    assemble(|a| {
        let mut again = a.create_label();
        a.mov(ebp, turns)?;
        a.set_label(&mut again)?;
        a.imul_3(rax, rax, 0x1234_5677)?;
        a.add(rax, rbp)?;
        a.ror(rax, 7)?;
        a.mov(qword_ptr(DATA + 8), rax)?;
        a.mov(esi, DATA as u32)?;
        a.mov(edi, DATA as u32 + 0x1ff0)?;
        a.mov(ecx, 5)?;
        a.rep().movsq()?;
        a.xor(rax, qword_ptr(DATA + 0x1ff8))?;
        a.rdtsc()?;
        a.add(rbx, rax)?;
        a.xor(rax, rbx)?;
        a.dec(ebp)?;
        a.jnz(again)?;
        a.out(u32::from(DONE), al)
    })
}

#[test]
fn by_instruction_count_two_runs_are_the_same() {
    let code = busy(5_000);
    let run = || {
        let rig = Rig::new(1, Clock::virtual_time(), &code);
        let mut vcpu = rig.vcpu(0);
        run_until_kicked(&mut *vcpu);
        let mut state = vcpu.state().unwrap();
        state.lapic.clear();
        (state, vcpu.instructions())
    };
    let (first, second) = (run(), run());
    assert_eq!(first, second);
    assert_eq!(first.1, Some(1 + 5_000 * 14 + 1));
}

#[test]
fn a_state_goes_on_in_another_vm() {
    // Without the time, which is another one there.
    let code = assemble(|a| {
        let mut again = a.create_label();
        a.mov(ebp, 3_000_000)?;
        a.set_label(&mut again)?;
        a.imul_3(rax, rax, 0x1234_5677)?;
        a.add(rax, rbp)?;
        a.ror(rax, 7)?;
        a.movq(xmm3, rax)?;
        a.paddq(xmm4, xmm3)?;
        a.dec(ebp)?;
        a.jnz(again)?;
        a.movq(rbx, xmm4)?;
        a.out(u32::from(DONE), al)
    });
    let whole = Rig::real(1, &code);
    let mut vcpu = whole.vcpu(0);
    let mut from = vcpu.state().unwrap();
    from.cr4 |= 0x200;
    vcpu.set_state(&from).unwrap();
    run_until_kicked(&mut *vcpu);
    let expected = vcpu.state().unwrap().general;

    let first = Rig::real(1, &code);
    let mut vcpu = first.vcpu(0);
    vcpu.set_state(&from).unwrap();
    let kicker = vcpu.kicker();
    let seen = AtomicU64::new(0);
    let middle = std::thread::scope(|scope| {
        let running = scope.spawn(|| {
            run_until_kicked(&mut *vcpu);
            seen.store(vcpu.instructions().unwrap(), Ordering::SeqCst);
            vcpu.state().unwrap()
        });
        kicker.kick();
        running.join().unwrap()
    });
    let second = Rig::real(1, &code);
    let mut vcpu = second.vcpu(0);
    vcpu.set_state(&middle).unwrap();
    assert_eq!(vcpu.state().unwrap().general, middle.general);
    assert_eq!(vcpu.state().unwrap().fxsave, middle.fxsave);
    run_until_kicked(&mut *vcpu);
    assert_eq!(vcpu.state().unwrap().general, expected);
}

#[test]
fn code_that_came_without_a_vcpus_store_is_noticed_after_a_flush() {
    // As a device's DMA brings it. The guest reloads CR3 before it runs what has come.
    let code = assemble(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.mov(rdx, cr3)?;
        a.mov(cr3, rdx)?;
        a.mov(esi, DATA as u32)?;
        a.call(rsi)?;
        a.out(u32::from(DONE), al)?;
        a.jmp(again)
    });
    let rig = Rig::real(1, &code);
    let mut vcpu = rig.vcpu(0);
    for value in [0x11, 0x22, 0x33] {
        rig.ram.map().write_slice(&[0xb0, value, 0xc3], GuestAddress(DATA)).unwrap();
        run_until_kicked(&mut *vcpu);
    }
    assert_eq!(rig.values(), [0x11, 0x22, 0x33]);
}
