//! Lines, message-signalled interrupts, and starting the other vCPUs.

use std::os::fd::{AsFd, OwnedFd};

use iced_x86::code_asm::*;
use rustix::event::{EventfdFlags, eventfd};
use tenon_core::{Clock, Engine, Msi};

use crate::fixture::{CODE, Ended, Guest, Mode, NOTE_MMIO, NOTE_PORT, engine, exit, setup};

const HANDLER: u64 = CODE + 0x1000;
const VECTOR: u8 = 0x41;

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap()
}

/// How often an event was signalled since the last look.
fn signals(event: &OwnedFd) -> u64 {
    let mut count = [0; 8];
    rustix::io::read(event, &mut count).map_or(0, |_| u64::from_ne_bytes(count))
}

/// Enables the local APIC, makes the I/O APIC's input 5 edge-triggered with [`VECTOR`] for vCPU 0, says on a port that it is ready
/// (which a test answers by an interrupt), and halts with interrupts on until the handler has run.
fn waits_for_an_interrupt(guest: &mut Guest) {
    guest.gate(VECTOR, HANDLER);
    guest.assemble(64, HANDLER, |a| {
        a.inc(ebx).unwrap();
        a.mov(rdi, 0xfee0_00b0u64).unwrap();
        a.mov(dword_ptr(rdi), 0u32).unwrap();
        a.iretq().unwrap();
    });
    guest.load(Mode::Long, |a| {
        let mut again = a.create_label();
        a.mov(rdi, 0xfee0_00f0u64).unwrap();
        a.mov(dword_ptr(rdi), 0x1ffu32).unwrap();
        a.mov(rdi, 0xfec0_0000u64).unwrap();
        a.mov(dword_ptr(rdi), 0x10u32 + 5 * 2).unwrap();
        a.mov(dword_ptr(rdi + 16), u32::from(VECTOR)).unwrap();
        a.mov(dword_ptr(rdi), 0x11u32 + 5 * 2).unwrap();
        a.mov(dword_ptr(rdi + 16), 0u32).unwrap();
        a.xor(ebx, ebx).unwrap();
        a.mov(edx, u32::from(NOTE_PORT)).unwrap();
        a.out(dx, eax).unwrap();
        a.set_label(&mut again).unwrap();
        a.sti().unwrap();
        a.hlt().unwrap();
        a.cmp(ebx, 1i32).unwrap();
        a.jne(again).unwrap();
        a.mov(eax, ebx).unwrap();
        exit(a);
    });
}

/// Runs the guest on a thread of its own, and calls `raise` when it is ready.
fn answered(guest: &mut Guest, raise: impl FnOnce()) -> u64 {
    let ports = guest.ports.clone();
    std::thread::scope(|scope| {
        let running = scope.spawn(|| guest.run());
        while ports.writes.lock().unwrap().is_empty() && !running.is_finished() {
            std::thread::yield_now();
        }
        raise();
        running.join().unwrap()
    })
    .value()
}

#[test]
fn a_line_wakes_a_halted_vcpu() {
    let Some(kvm) = engine() else { return };
    let mut guest = Guest::new(&kvm, 1);
    waits_for_an_interrupt(&mut guest);
    let controller = guest.vm.interrupts();
    let count = answered(&mut guest, || {
        controller.set_line(5, true);
        controller.set_line(5, false);
        controller.set_line(24, true);
        controller.set_line(u32::MAX, true);
    });
    assert_eq!(count, 1);
}

#[test]
fn a_message_wakes_a_halted_vcpu() {
    let Some(kvm) = engine() else { return };
    let mut guest = Guest::new(&kvm, 1);
    waits_for_an_interrupt(&mut guest);
    let controller = guest.vm.interrupts();
    let count = answered(&mut guest, || {
        controller.signal_msi(Msi { address: 0xfee0_0000, data: u32::from(VECTOR) });
    });
    assert_eq!(count, 1);
}

#[test]
fn an_irqfd_wakes_a_halted_vcpu() {
    let Some(kvm) = engine() else { return };
    let mut guest = Guest::new(&kvm, 1);
    waits_for_an_interrupt(&mut guest);
    let event = event();
    guest.vm.register_irqfd(event.as_fd(), 5).unwrap();
    assert!(guest.vm.register_irqfd(event.as_fd(), 24).is_err());
    let count = answered(&mut guest, || {
        rustix::io::write(&event, &1u64.to_ne_bytes()).unwrap();
    });
    assert_eq!(count, 1);
}

#[test]
fn an_ioeventfd_takes_a_guests_write_without_an_exit() {
    let Some(kvm) = engine() else { return };
    let mut guest = Guest::new(&kvm, 1);
    let (any, four) = (event(), event());
    guest.vm.register_ioeventfd(any.as_fd(), NOTE_MMIO + 0x100, 0).unwrap();
    guest.vm.register_ioeventfd(four.as_fd(), NOTE_MMIO + 0x200, 4).unwrap();
    assert!(guest.vm.register_ioeventfd(four.as_fd(), NOTE_MMIO + 0x300, 3).is_err());
    let ended = guest.play(Mode::Long, |a| {
        a.mov(rdi, NOTE_MMIO).unwrap();
        a.mov(word_ptr(rdi + 0x100), 7u32).unwrap();
        a.mov(dword_ptr(rdi + 0x200), 7u32).unwrap();
        a.mov(word_ptr(rdi + 0x200), 9u32).unwrap();
        a.mov(eax, 3u32).unwrap();
        exit(a);
    });
    assert_eq!(ended.value(), 3);
    assert_eq!((signals(&any), signals(&four)), (1, 1));
    assert_eq!(guest.mmio.taken(), [(0x200, 2, 9)]);
    guest.vm.unregister_ioeventfd(any.as_fd(), NOTE_MMIO + 0x100, 0).unwrap();
    assert!(guest.vm.unregister_ioeventfd(any.as_fd(), NOTE_MMIO + 0x100, 0).is_err());
    let ended = guest.play(Mode::Long, |a| {
        a.mov(rdi, NOTE_MMIO).unwrap();
        a.mov(word_ptr(rdi + 0x100), 7u32).unwrap();
        a.mov(dword_ptr(rdi + 0x200), 7u32).unwrap();
        a.mov(eax, 4u32).unwrap();
        exit(a);
    });
    assert_eq!(ended.value(), 4);
    assert_eq!((signals(&any), signals(&four)), (0, 1));
    assert_eq!(guest.mmio.taken(), [(0x100, 2, 7)]);
}

#[test]
fn init_and_sipi_start_the_second_vcpu_in_real_mode() {
    let Some(kvm) = engine() else { return };
    let mut guest = Guest::new(&kvm, 2);
    // The second vCPU begins at 0x8000, leaves a word, and ends the run.
    guest.assemble(16, 0x8000, |a| {
        a.mov(ax, 0u32).unwrap();
        a.mov(ds, ax).unwrap();
        a.mov(dword_ptr(0x7000), 0x600d_cafeu32).unwrap();
        a.mov(eax, 0x77u32).unwrap();
        exit(a);
    });
    guest.load(Mode::Long, |a| {
        let mut wait = a.create_label();
        a.mov(rdi, 0xfee0_0000u64).unwrap();
        a.mov(dword_ptr(rdi + 0xf0), 0x1ffu32).unwrap();
        a.mov(dword_ptr(rdi + 0x310), 1u32 << 24).unwrap();
        a.mov(dword_ptr(rdi + 0x300), 0x4500u32).unwrap();
        a.mov(dword_ptr(rdi + 0x310), 1u32 << 24).unwrap();
        a.mov(dword_ptr(rdi + 0x300), 0x4608u32).unwrap();
        a.set_label(&mut wait).unwrap();
        a.pause().unwrap();
        a.jmp(wait).unwrap();
    });
    assert_eq!(guest.run_all(), 0x77);
    assert_eq!(guest.peek(0x7000) & 0xffff_ffff, 0x600d_cafe);
}

#[test]
fn sixty_four_vcpus_are_made_and_each_reads_its_own_apic_id() {
    let Some(kvm) = engine() else { return };
    let mut guest = Guest::new(&kvm, 64);
    assert!(guest.vm.create_vcpu(64).is_err());
    assert!(guest.vm.create_vcpu(63).is_err(), "made twice");
    for index in [0usize, 1, 63] {
        guest.assemble(64, CODE, |a| {
            a.mov(eax, 1u32).unwrap();
            a.cpuid().unwrap();
            a.shr(ebx, 24i32).unwrap();
            a.mov(rdi, 0xfee0_0020u64).unwrap();
            a.mov(eax, dword_ptr(rdi)).unwrap();
            a.shr(eax, 16i32).unwrap();
            a.or(eax, ebx).unwrap();
            exit(a);
        });
        guest.vcpus.swap(0, index);
        guest.vcpus[0].set_state(&Mode::Long.state(CODE, 0x8_0000)).unwrap();
        let Ended::Exit(seen) = guest.run() else { panic!("vCPU {index} crashed") };
        guest.vcpus.swap(0, index);
        assert_eq!(seen, (index << 8 | index) as u64);
    }
}

#[test]
fn a_number_of_vcpus_out_of_range_is_refused() {
    let Some(kvm) = engine() else { return };
    for vcpus in [0, 65] {
        let error = kvm.create_vm(setup(vcpus, Clock::real().unwrap())).err().unwrap().to_string();
        assert!(error.contains("1 to 64"), "{error}");
    }
}

#[test]
fn a_machine_by_instruction_count_is_refused_with_the_way_out() {
    let Some(kvm) = engine() else { return };
    let error = kvm.create_vm(setup(1, Clock::virtual_time())).err().unwrap().to_string();
    assert!(error.contains("--engine soft"), "{error}");
}
