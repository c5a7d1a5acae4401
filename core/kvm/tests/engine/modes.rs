//! Port and MMIO accesses from each mode.

use iced_x86::code_asm::*;

use crate::fixture::{Guest, Mode, NOTE_MMIO, NOTE_PORT, engine, exit, quality};

const MODES: [Mode; 4] = [Mode::Real, Mode::Protected, Mode::Long, Mode::User];

#[test]
fn port_accesses_of_each_size_reach_the_bus_from_every_mode() {
    let Some(kvm) = engine() else { return };
    for mode in MODES {
        let mut guest = Guest::new(&kvm, 1);
        guest.ports.answers.lock().unwrap().extend([0x1122_3344, 0x5566, 0x77]);
        let ended = guest.play(mode, |a| {
            a.mov(dx, u32::from(NOTE_PORT)).unwrap();
            a.mov(eax, 0x8765_4321u32).unwrap();
            a.out(dx, eax).unwrap();
            a.out(dx, ax).unwrap();
            a.out(dx, al).unwrap();
            a.in_(eax, dx).unwrap();
            a.mov(ebx, eax).unwrap();
            a.in_(ax, dx).unwrap();
            a.add(ebx, eax).unwrap();
            a.in_(al, dx).unwrap();
            a.add(ebx, eax).unwrap();
            a.mov(eax, ebx).unwrap();
            exit(a);
        });
        let expected = 0x1122_3344u32.wrapping_add(0x1122_5566).wrapping_add(0x1122_5577);
        assert_eq!(ended.value(), u64::from(expected), "{mode:?}");
        assert_eq!(guest.ports.taken(), [(0, 4, 0x8765_4321), (0, 2, 0x4321), (0, 1, 0x21)], "{mode:?}");
    }
}

#[test]
fn string_port_accesses_move_every_item_in_order() {
    let Some(kvm) = engine() else { return };
    let mut guest = Guest::new(&kvm, 1);
    guest.put(0x4_0000, &[1, 0, 2, 0, 3, 0, 4, 0]);
    guest.ports.answers.lock().unwrap().extend([0xa1b1, 0xa2b2, 0xa3b3]);
    let ended = guest.play(Mode::Long, |a| {
        a.mov(edx, u32::from(NOTE_PORT)).unwrap();
        a.mov(esi, 0x4_0000u32).unwrap();
        a.mov(ecx, 4u32).unwrap();
        a.cld().unwrap();
        a.rep().outsw().unwrap();
        a.mov(edi, 0x4_1000u32).unwrap();
        a.mov(ecx, 3u32).unwrap();
        a.rep().insw().unwrap();
        a.mov(eax, edi).unwrap();
        exit(a);
    });
    assert_eq!(ended.value(), 0x4_1006);
    assert_eq!(guest.ports.taken(), [(0, 2, 1), (0, 2, 2), (0, 2, 3), (0, 2, 4)]);
    assert_eq!(guest.peek(0x4_1000), 0xa3b3_a2b2_a1b1);
}

#[test]
fn mmio_accesses_of_each_size_reach_the_bus() {
    let Some(kvm) = engine() else { return };
    let mut guest = Guest::new(&kvm, 1);
    guest.mmio.answers.lock().unwrap().extend([0x1111_2222_3333_4444, 0x55]);
    let ended = guest.play(Mode::Long, |a| {
        a.mov(rdi, NOTE_MMIO).unwrap();
        a.mov(rax, 0x8877_6655_4433_2211u64).unwrap();
        a.mov(qword_ptr(rdi), rax).unwrap();
        a.mov(dword_ptr(rdi + 8), eax).unwrap();
        a.mov(word_ptr(rdi + 12), ax).unwrap();
        a.mov(byte_ptr(rdi + 15), al).unwrap();
        a.mov(rbx, qword_ptr(rdi + 16)).unwrap();
        a.movzx(eax, byte_ptr(rdi + 24)).unwrap();
        a.add(rbx, rax).unwrap();
        a.shr(rbx, 16i32).unwrap();
        a.mov(eax, ebx).unwrap();
        exit(a);
    });
    assert_eq!(ended.value(), 0x2222_3333);
    let expected = [(0, 8, 0x8877_6655_4433_2211), (8, 4, 0x4433_2211), (12, 2, 0x2211), (15, 1, 0x11)];
    assert_eq!(guest.mmio.taken(), expected);
}

#[test]
fn an_access_into_a_claims_edge_is_split_and_the_rest_reads_as_ones() {
    let Some(kvm) = engine() else { return };
    let mut guest = Guest::new(&kvm, 1);
    // Three bytes of the last claimed doubleword, five beyond it, across a page's end.
    let ended = guest.play(Mode::Long, |a| {
        a.mov(rdi, NOTE_MMIO + 0xffd).unwrap();
        a.mov(rbx, qword_ptr(rdi)).unwrap();
        a.mov(rax, rbx).unwrap();
        a.shr(rax, 32i32).unwrap();
        a.mov(edx, u32::from(NOTE_PORT)).unwrap();
        a.out(dx, eax).unwrap();
        a.mov(eax, ebx).unwrap();
        exit(a);
    });
    // The fixture answers with offsets: 0xffd to the first two bytes, 0xfff to the third.
    assert_eq!(ended.value(), 0xffff_0ffd);
    assert_eq!(guest.ports.taken(), [(0, 4, 0xffff_ffff)]);
}

#[test]
fn an_unclaimed_address_reads_as_ones() {
    let Some(kvm) = engine() else { return };
    let mut guest = Guest::new(&kvm, 1);
    let ended = guest.play(Mode::Long, |a| {
        a.mov(rdi, 0xc123_4568u64).unwrap();
        a.mov(dword_ptr(rdi), 5u32).unwrap();
        a.mov(eax, dword_ptr(rdi)).unwrap();
        exit(a);
    });
    assert_eq!(ended.value(), 0xffff_ffff);
}

#[test]
fn baseline_shows_the_hypervisor_and_nothing_newer_than_sse2() {
    let Some(kvm) = engine() else { return };
    if !quality(&kvm).keeps_cpu_model {
        println!("not run: this host's KVM shows guests its own CPU, whatever the model");
        return;
    }
    let mut guest = Guest::new(&kvm, 1);
    let ended = guest.play(Mode::Long, |a| {
        a.mov(eax, 1u32).unwrap();
        a.cpuid().unwrap();
        a.mov(edi, edx).unwrap();
        a.mov(eax, ecx).unwrap();
        a.mov(edx, u32::from(NOTE_PORT)).unwrap();
        a.out(dx, eax).unwrap();
        a.mov(eax, 0x4000_0000u32).unwrap();
        a.cpuid().unwrap();
        a.mov(eax, ebx).unwrap();
        a.mov(edx, u32::from(NOTE_PORT)).unwrap();
        a.out(dx, eax).unwrap();
        a.mov(eax, edi).unwrap();
        exit(a);
    });
    let features = ended.value();
    assert_eq!(features, 0x0789_ab7d, "FPU to SSE2");
    let noted = guest.ports.taken();
    assert_eq!(noted[0].2, 1 << 31 | 1 << 24 | 1 << 21, "hypervisor, TSC deadline, x2APIC");
    assert_eq!(noted[1].2, u64::from(u32::from_le_bytes(*b"KVMK")));
}
