//! Raw and ELF images in every mode, and what is refused.
#![allow(
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    reason = "a test fails by panicking; its numbers are its own"
)]

use tenon_personality_flat::Flat;
use tenon_sdk::personality::{CpuState, Error, Machine, MemoryKind, MemoryRange, StopMethod};
use tenon_testkit::{LoadBench, Loaded};

const MIB: u64 = 1 << 20;

/// A program that halts, and bytes by which it is recognised.
const PROGRAM: &[u8] = b"\xf4flat\x01\x02\x03";

fn bench(image: &[u8]) -> LoadBench {
    LoadBench::new(16 * MIB).image("kernel", image)
}

fn load(bench: &LoadBench) -> Loaded {
    bench.load::<Flat>().unwrap()
}

fn refusal(bench: &LoadBench) -> Error {
    bench.load::<Flat>().err().expect("this must be refused")
}

/// An ELF image with one segment at `address` that has `PROGRAM` and a page of zeros after it.
fn elf(long: bool, address: u64, entry: u64) -> Vec<u8> {
    let word =
        |value: u64| if long { value.to_le_bytes().to_vec() } else { (value as u32).to_le_bytes().to_vec() };
    let (header, program_header) = if long { (64_u64, 56_u16) } else { (52, 32) };
    let offset = header + u64::from(program_header);
    let mut image = b"\x7fELF".to_vec();
    image.extend([if long { 2 } else { 1 }, 1, 1]);
    image.resize(16, 0);
    image.extend(2_u16.to_le_bytes());
    image.extend(if long { 62_u16 } else { 3 }.to_le_bytes());
    image.extend(1_u32.to_le_bytes());
    image.extend([word(entry), word(header), word(0)].concat());
    image.extend(0_u32.to_le_bytes());
    for half in [u16::try_from(header).unwrap(), program_header, 1, 0, 0, 0] {
        image.extend(half.to_le_bytes());
    }
    let length = PROGRAM.len() as u64;
    image.extend(1_u32.to_le_bytes());
    if long {
        image.extend(5_u32.to_le_bytes());
        image
            .extend([offset, 0xffff_8000_0000_0000, address, length, length + 4096, 4096].map(word).concat());
    } else {
        image.extend([offset, 0xc000_0000, address, length, length + 4096, 5, 4096].map(word).concat());
    }
    image.extend(PROGRAM);
    image
}

fn assert_boot_information(guest: &Loaded, machine: &Machine) {
    let info = guest.boot.vcpu.general[CpuState::RBX];
    assert_eq!(guest.memory(info, 8), b"TENONBI1");
    let ram: u64 =
        machine.memory.iter().filter(|range| range.kind == MemoryKind::Ram).map(|range| range.size).sum();
    assert_eq!(guest.number(info + 8, 8), ram);
    assert_eq!(guest.number(info + 16, 8), machine.rsdp.unwrap());
    assert_eq!(guest.number(info + 24, 4), u64::from(machine.vcpus));
    assert_eq!(guest.number(info + 28, 4), machine.memory.len() as u64);
    for (range, at) in machine.memory.iter().zip((info + 32..).step_by(24)) {
        assert_eq!((guest.number(at, 8), guest.number(at + 8, 8)), (range.start, range.size));
        assert_eq!(
            guest.number(at + 16, 4),
            match range.kind {
                MemoryKind::Ram => 1,
                MemoryKind::Reserved => 2,
                MemoryKind::Acpi => 3,
            }
        );
    }
}

#[test]
fn a_boot_sector_begins_in_real_mode_at_7c00() {
    let bench = bench(PROGRAM);
    let guest = load(&bench);
    assert_eq!(guest.memory(0x7c00, PROGRAM.len()), PROGRAM);
    let vcpu = &guest.boot.vcpu;
    assert_eq!((vcpu.cs.selector, vcpu.cs.base, vcpu.cs.limit, vcpu.rip), (0, 0, 0xffff, 0x7c00));
    assert_eq!((vcpu.ss.base, vcpu.general[CpuState::RSP]), (0, 0x7c00));
    assert_eq!((vcpu.cr0 & 0x8000_0001, vcpu.efer), (0, 0));
    assert_eq!(guest.boot.summary, "raw image of 8 bytes at 0x7c00 in real mode");
    assert_eq!(guest.boot.stop, StopMethod::None);
    assert_boot_information(&guest, bench.machine());
}

#[test]
fn real_mode_reaches_the_first_mebibyte_by_its_segments() {
    let guest = load(&bench(PROGRAM).option("load", "0x12340").option("entry", "0x12345"));
    assert_eq!(guest.memory(0x12340, PROGRAM.len()), PROGRAM);
    let vcpu = &guest.boot.vcpu;
    assert_eq!((vcpu.cs.selector, vcpu.cs.base, vcpu.rip), (0x1000, 0x10000, 0x2345));
    let error = refusal(&bench(PROGRAM).option("mode", "real").option("load", "0x100000"));
    assert!(matches!(&error, Error::Invalid(text) if text.contains("first MiB")), "{error}");
}

#[test]
fn protected_mode_is_flat_and_has_descriptors_to_reload() {
    let bench = bench(PROGRAM).option("mode", "protected");
    let guest = load(&bench);
    assert_eq!(guest.memory(MIB, PROGRAM.len()), PROGRAM);
    let vcpu = &guest.boot.vcpu;
    assert_eq!((vcpu.rip, vcpu.cr0, vcpu.cr4, vcpu.efer), (MIB, 0x11, 0, 0));
    assert_eq!((vcpu.cs.base, vcpu.cs.limit, vcpu.cs.rights), (0, u32::MAX, 0xc09b));
    assert_eq!(guest.number(vcpu.gdt.base + u64::from(vcpu.cs.selector), 8), 0x00cf_9b00_0000_ffff);
    assert_eq!(guest.number(vcpu.gdt.base + u64::from(vcpu.ds.selector), 8), 0x00cf_9300_0000_ffff);
    assert_boot_information(&guest, bench.machine());
}

#[test]
fn long_mode_maps_the_first_4_gib_one_to_one() {
    let bench = bench(PROGRAM).option("mode", "long");
    let guest = load(&bench);
    let vcpu = &guest.boot.vcpu;
    assert_eq!(
        (vcpu.rip, vcpu.cr0 & 0x8000_0001, vcpu.cr4 & 0x20, vcpu.efer),
        (MIB, 0x8000_0001, 0x20, 0x500)
    );
    assert_eq!(guest.number(vcpu.gdt.base + u64::from(vcpu.cs.selector), 8), 0x00af_9b00_0000_ffff);
    for page in 0..2048_u64 {
        let third = guest.number(vcpu.cr3, 8);
        let second = guest.number((third & !0xfff) + 8 * (page >> 9), 8);
        let first = guest.number((second & !0xfff) + 8 * (page & 0x1ff), 8);
        assert_eq!((third & 3, second & 3, first), (3, 3, page << 21 | 0x83));
    }
    assert_eq!(guest.number(vcpu.cr3 + 8, 8), 0, "and no more than that");
    assert_boot_information(&guest, bench.machine());
}

#[test]
fn elf_images_are_entered_in_the_mode_of_their_width() {
    for (long, summary) in [
        (false, "32-bit ELF image of 92 bytes at 0x200001 in protected mode"),
        (true, "64-bit ELF image of 128 bytes at 0x200001 in long mode"),
    ] {
        let guest = load(&bench(&elf(long, 2 * MIB, 2 * MIB + 1)));
        assert_eq!(guest.boot.summary, summary);
        assert_eq!(guest.memory(2 * MIB, PROGRAM.len()), PROGRAM);
        assert_eq!(guest.boot.vcpu.rip, 2 * MIB + 1);
        assert_eq!(guest.boot.vcpu.efer != 0, long);
    }
}

#[test]
fn the_mode_and_the_entry_of_an_elf_image_can_be_overridden() {
    let image = elf(true, 0x8000, 0x8000);
    let guest = load(&bench(&image).option("mode", "real").option("entry", "0x8002"));
    assert_eq!((guest.boot.vcpu.rip, guest.boot.vcpu.cr0 & 1), (0x8002, 0));
}

#[test]
fn tables_make_way_for_an_image_in_low_memory() {
    let guest = load(&bench(&[0x90; 0x3000]).option("mode", "long").option("load", "0x1000"));
    assert_eq!(guest.memory(0x1000, 0x3000), [0x90; 0x3000]);
    assert!(guest.boot.vcpu.cr3 >= 0x4000 && guest.boot.vcpu.gdt.base >= 0x4000);
}

#[test]
fn a_machine_of_one_mebibyte_is_enough() {
    let machine = Machine {
        vcpus: 3,
        memory: vec![MemoryRange { start: 0, size: MIB, kind: MemoryKind::Ram }],
        rsdp: Some(0xe_0000),
    };
    let bench =
        LoadBench::with(machine).image("kernel", PROGRAM).option("mode", "long").option("load", "0x10000");
    assert_boot_information(&load(&bench), bench.machine());
}

#[test]
fn what_does_not_fit_is_refused_with_the_size_of_the_machine() {
    for bench in [
        bench(PROGRAM).option("load", "0xfffffc"),
        bench(PROGRAM).option("load", "0x9fffc"),
        bench(PROGRAM).option("load", "0xfffffffffffffffe"),
        bench(PROGRAM).option("mode", "long").option("load", "0x2000000"),
        bench(&vec![0; 20 << 20]).option("mode", "protected"),
        bench(&elf(true, 64 * MIB, 64 * MIB)),
    ] {
        let error = refusal(&bench);
        assert!(matches!(&error, Error::NoRoom(text) if text.contains("has 16 MiB")), "{error}");
    }
}

#[test]
fn a_wrong_image_or_option_is_refused_by_name() {
    for (bench, said) in [
        (LoadBench::new(MIB), "`kernel` is missing"),
        (bench(PROGRAM).image("initrd", PROGRAM), "`initrd`"),
        (bench(PROGRAM).image("kernel", PROGRAM), "`kernel` too many"),
        (bench(PROGRAM).option("mode", "virtual"), "protected"),
        (bench(PROGRAM).option("load", "here"), "`load`"),
        (bench(PROGRAM).option("entry", "0x7c08"), "outside the image"),
        (bench(&elf(true, MIB, MIB)).option("load", "0x7c00"), "`load`"),
        (bench(&elf(true, MIB, 0)), "outside the image"),
    ] {
        let error = refusal(&bench);
        assert!(matches!(&error, Error::Invalid(text) if text.contains(said)), "{error}");
    }
    assert!(matches!(refusal(&bench(b"")), Error::NotMine(_)));
    let mut foreign = elf(true, MIB, MIB);
    foreign[18] = 0xb7;
    assert!(matches!(refusal(&bench(&foreign)), Error::NotMine(text) if text.contains("machine 183")));
}

#[test]
fn no_flipped_bit_of_an_elf_image_does_worse_than_an_error() {
    let mut refused = 0;
    for image in [elf(false, MIB, MIB), elf(true, MIB, MIB)] {
        for bit in 0..(image.len() - PROGRAM.len()) * 8 {
            let mut damaged = image.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            refused += u32::from(bench(&damaged).load::<Flat>().is_err());
        }
        for length in 5..image.len() {
            assert!(matches!(refusal(&bench(&image[..length])), Error::Corrupt(_)), "{length}");
        }
    }
    assert!(refused > 400, "the flips were felt: {refused}");
}
