//! Several vCPUs: start-up, messages between them, atomic operations, code that one changes and another runs; and repeatable runs.

use std::sync::Arc;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use tenon_core::{Clock, Stop, Vcpu};

use crate::guest::*;

const APIC: u64 = 0x20_0000;
/// Where the other vCPUs start.
const TRAMPOLINE: u64 = 0xc000;
/// Where they go on in long mode.
pub const OTHERS: u64 = 0x5_0000;
pub const SHARED: u64 = 0x6_0000;

/// Makes a guest of `vcpus` whose first sends INIT and SIPI to all others; they go on at [`OTHERS`] with their APIC id in RDI and a stack.
pub fn guest(clock: Arc<Clock>, vcpus: u32) -> Guest {
    let mut guest = Guest::long_with(clock, vcpus);
    guest.put(DIRECTORY + 8, 0xfee0_0000u64 | 0x93);
    guest.put(0xcf00, 0x7fu16);
    guest.put(0xcf02, GDT as u32);
    guest.put(0xcf10, 0xfffu16);
    guest.put(0xcf12, IDT);
    guest.program(16, TRAMPOLINE, |a| {
        a.cli()?;
        a.xor(ax, ax)?;
        a.mov(ds, ax)?;
        a.lgdt(ptr(0xcf00))?;
        a.mov(eax, 0x6a0)?;
        a.mov(cr4, eax)?;
        a.mov(eax, PML4 as i32)?;
        a.mov(cr3, eax)?;
        a.mov(ecx, 0xc000_0080u32)?;
        a.mov(eax, 0x901)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.mov(eax, 0x8001_0011u32)?;
        a.mov(cr0, eax)?;
        a.db(&[0xea, 0x00, 0xc1, CODE64 as u8, 0])
    });
    guest.program(64, 0xc100, |a| {
        a.mov(eax, u32::from(DATA))?;
        a.mov(ss, ax)?;
        a.mov(ds, ax)?;
        a.lidt(ptr(0xcf10))?;
        a.mov(dword_ptr(APIC + 0xf0), 0x1ff)?;
        a.mov(edi, dword_ptr(APIC + 0x20))?;
        a.shr(edi, 24)?;
        a.mov(esp, edi)?;
        a.shl(esp, 12)?;
        a.add(esp, 0x10_0000)?;
        a.jmp(OTHERS)
    });
    guest
}

pub fn start_others(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(dword_ptr(APIC + 0xf0), 0x1ff)?;
    for command in [0xc_4500u32, 0xc_4600 | (TRAMPOLINE >> 12) as u32, 0xc_4600 | (TRAMPOLINE >> 12) as u32] {
        a.mov(eax, command)?;
        a.mov(dword_ptr(APIC + 0x300), eax)?;
    }
    Ok(())
}

/// Runs all vCPUs until the first one stops; gives the instructions that each ran.
pub fn run(guest: &mut Guest, vcpus: u32) -> Vec<u64> {
    let mut others: Vec<Box<dyn Vcpu>> = (1..vcpus).map(|n| guest.vm.create_vcpu(n).unwrap()).collect();
    let kickers: Vec<_> = others.iter().map(|vcpu| vcpu.kicker()).collect();
    std::thread::scope(|scope| {
        for vcpu in &mut others {
            scope.spawn(|| match vcpu.run().unwrap() {
                Stop::Kicked => {}
                Stop::Crashed(report) => panic!("{report}"),
            });
        }
        guest.run();
        kickers.iter().for_each(|kicker| kicker.kick());
    });
    let first = guest.vcpu.instructions().unwrap();
    std::iter::once(first).chain(others.iter().map(|vcpu| vcpu.instructions().unwrap())).collect()
}

/// Waits until the counter at [`SHARED`] is `value`.
fn wait_for(a: &mut CodeAssembler, value: i32) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.set_label(&mut again)?;
    a.pause()?;
    a.cmp(dword_ptr(SHARED), value)?;
    a.jne(again)
}

#[test]
fn init_and_sipi_start_every_other_vcpu() {
    for vcpus in [2, 4, 16] {
        let mut guest = guest(Clock::real().unwrap(), vcpus);
        guest.program(64, OTHERS, |a| {
            a.mov(dword_ptr(rdi * 4 + SHARED + 0x100), 1)?;
            a.lock().inc(dword_ptr(SHARED))?;
            a.cli()?;
            a.hlt()
        });
        guest.program(64, CODE, |a| {
            start_others(a)?;
            wait_for(a, vcpus.cast_signed() - 1)?;
            a.out(STOP, al)
        });
        run(&mut guest, vcpus);
        for n in 1..vcpus {
            assert_eq!(guest.get::<u32>(SHARED + 0x100 + 4 * u64::from(n)), 1, "vCPU {n} of {vcpus}");
        }
    }
}

/// Every vCPU counts up one number by locked additions, another by compare and exchange and a third under a lock by exchange.
fn counting(rounds: i32, a: &mut CodeAssembler) -> Result<(), IcedError> {
    let (mut again, mut retry, mut spin) = (a.create_label(), a.create_label(), a.create_label());
    a.mov(ebx, rounds)?;
    a.set_label(&mut again)?;
    a.lock().add(qword_ptr(SHARED + 0x10), 1)?;
    a.mov(rax, qword_ptr(SHARED + 0x18))?;
    a.set_label(&mut retry)?;
    a.lea(rcx, qword_ptr(rax + 1))?;
    a.lock().cmpxchg(qword_ptr(SHARED + 0x18), rcx)?;
    a.jne(retry)?;
    a.set_label(&mut spin)?;
    a.pause()?;
    a.mov(eax, 1)?;
    a.xchg(dword_ptr(SHARED + 0x20), eax)?;
    a.test(eax, eax)?;
    a.jne(spin)?;
    a.inc(qword_ptr(SHARED + 0x28))?;
    a.mov(dword_ptr(SHARED + 0x20), 0)?;
    // Across a cache line, where hosts have no atomic operation without trouble.
    a.lock().add(qword_ptr(SHARED + 0x7c), 1)?;
    a.dec(ebx)?;
    a.jne(again)?;
    a.lock().inc(dword_ptr(SHARED))?;
    Ok(())
}

#[test]
fn locked_operations_of_several_vcpus_lose_nothing() {
    const ROUNDS: i32 = 5_000;
    for vcpus in [2, 4] {
        let mut guest = guest(Clock::real().unwrap(), vcpus);
        guest.program(64, OTHERS, |a| {
            counting(ROUNDS, a)?;
            a.cli()?;
            a.hlt()
        });
        guest.program(64, CODE, |a| {
            start_others(a)?;
            counting(ROUNDS, a)?;
            wait_for(a, vcpus.cast_signed())?;
            a.out(STOP, al)
        });
        run(&mut guest, vcpus);
        let expected = u64::from(vcpus) * ROUNDS as u64;
        for offset in [0x10, 0x18, 0x28, 0x7c] {
            assert_eq!(guest.get::<u64>(SHARED + offset), expected, "{vcpus} vCPUs at {offset:#x}");
        }
    }
}

#[test]
fn an_ipi_wakes_a_halted_vcpu_and_is_answered() {
    const ROUNDS: u64 = 200;
    let mut guest = guest(Clock::real().unwrap(), 2);
    // Vector 0x50 answers with 0x51 to vCPU 0; 0x51 counts.
    guest.handler(0x50, |a| {
        a.mov(dword_ptr(APIC + 0xb0), 0)?;
        a.mov(dword_ptr(APIC + 0x310), 0)?;
        a.mov(dword_ptr(APIC + 0x300), 0x4051)?;
        a.iretq()
    });
    guest.handler(0x51, |a| {
        a.inc(r15)?;
        a.mov(dword_ptr(APIC + 0xb0), 0)?;
        a.iretq()
    });
    guest.program(64, OTHERS, |a| {
        let mut again = a.create_label();
        a.lock().inc(dword_ptr(SHARED))?;
        a.set_label(&mut again)?;
        a.sti()?;
        a.hlt()?;
        a.jmp(again)
    });
    guest.program(64, CODE, |a| {
        let mut again = a.create_label();
        start_others(a)?;
        wait_for(a, 1)?;
        a.set_label(&mut again)?;
        a.mov(dword_ptr(APIC + 0x310), 1 << 24)?;
        a.mov(dword_ptr(APIC + 0x300), 0x4050)?;
        a.sti()?;
        a.hlt()?;
        a.cli()?;
        a.cmp(r15, ROUNDS as i32)?;
        a.jb(again)?;
        a.out(STOP, al)
    });
    run(&mut guest, 2);
    assert_eq!(guest.vcpu.state().unwrap().general[15], ROUNDS);
}

#[test]
fn code_that_changes_itself_runs_as_changed() {
    let mut guest = Guest::long();
    guest.program(64, CODE, |a| {
        let mut again = a.create_label();
        let mut patched = a.create_label();
        a.mov(ebx, 0)?;
        a.set_label(&mut again)?;
        // The immediate of the MOV below, in the same block even.
        a.lea(rcx, ptr(patched))?;
        a.mov(byte_ptr(rcx + 1), bl)?;
        a.set_label(&mut patched)?;
        a.mov(eax, 0x7fff_ff00u32)?;
        a.movzx(eax, al)?;
        a.add(r8d, eax)?;
        a.inc(ebx)?;
        a.cmp(ebx, 100)?;
        a.jne(again)?;
        a.out(STOP, al)
    });
    assert_eq!(guest.run().general[8], 99 * 100 / 2);
}

#[test]
fn code_that_another_vcpu_changes_runs_as_changed() {
    const ROUNDS: i32 = 500;
    let mut guest = guest(Clock::real().unwrap(), 2);
    const FUNCTION: u64 = OTHERS + 0x800;
    // MOV EAX, imm32; RET.
    guest.load(FUNCTION, &[0xb8, 0, 0, 0, 0, 0xc3]);
    // The other vCPU runs the function whenever the number at SHARED + 8 is new, and acknowledges with what it returned.
    guest.program(64, OTHERS, |a| {
        let mut again = a.create_label();
        a.xor(ebx, ebx)?;
        a.lock().inc(dword_ptr(SHARED))?;
        a.set_label(&mut again)?;
        a.call(FUNCTION)?;
        a.mov(dword_ptr(SHARED + 16), eax)?;
        a.jmp(again)
    });
    guest.program(64, CODE, |a| {
        let (mut again, mut wait) = (a.create_label(), a.create_label());
        start_others(a)?;
        wait_for(a, 1)?;
        a.xor(ebx, ebx)?;
        a.set_label(&mut again)?;
        a.inc(ebx)?;
        a.mov(dword_ptr(FUNCTION + 1), ebx)?;
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(dword_ptr(SHARED + 16), ebx)?;
        a.jne(wait)?;
        a.cmp(ebx, ROUNDS)?;
        a.jne(again)?;
        a.out(STOP, al)
    });
    // An aligned immediate, so that no half-written one is seen.
    assert_eq!((FUNCTION + 1) % 64 / 61, 0);
    run(&mut guest, 2);
}

/// A guest whose vCPUs count under a lock while timers interrupt the first: instructions, time and notes at its end.
fn counted(vcpus: u32) -> (Vec<u64>, u64, Vec<u64>) {
    let mut guest = guest(Clock::virtual_time(), vcpus);
    guest.handler(0x40, |a| {
        a.push(rax)?;
        a.mov(rax, ptr(rsp + 8))?;
        a.out(NOTE, eax)?;
        a.rdtsc()?;
        a.out(NOTE, eax)?;
        a.mov(dword_ptr(APIC + 0xb0), 0)?;
        a.pop(rax)?;
        a.iretq()
    });
    guest.program(64, OTHERS, |a| {
        counting(3_000, a)?;
        a.cli()?;
        a.hlt()
    });
    guest.program(64, CODE, |a| {
        start_others(a)?;
        a.mov(dword_ptr(APIC + 0x3e0), 0xb)?;
        a.mov(dword_ptr(APIC + 0x320), 0x2_0040)?;
        a.mov(dword_ptr(APIC + 0x380), 23_456)?;
        a.sti()?;
        counting(3_000, a)?;
        wait_for(a, vcpus.cast_signed())?;
        // Idle time is skipped, and counted.
        a.hlt()?;
        a.rdtsc()?;
        a.out(NOTE, eax)?;
        a.cli()?;
        a.out(STOP, al)
    });
    let instructions = run(&mut guest, vcpus);
    (instructions, guest.clock.now(), guest.notes())
}

#[test]
fn the_same_guest_by_instruction_count_runs_the_same_twice() {
    for vcpus in [1, 2, 4] {
        let first = counted(vcpus);
        assert!(first.2.len() > 2 * vcpus as usize, "the timer interrupted it");
        assert!(first.0.iter().all(|n| *n > 10_000), "{first:?}");
        for _ in 0..3 {
            assert_eq!(counted(vcpus), first, "{vcpus} vCPUs");
        }
    }
}
