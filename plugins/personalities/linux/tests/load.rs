//! Every kind of kernel image that Linux's build makes leads to the same kernel in memory, entered in the right way; what is
//! damaged, foreign or too large is refused with what was looked for and found.
#![allow(
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    reason = "a test fails by panicking; its numbers are its own"
)]

mod support;

use support::{BzImage, Look, MIB};
use tenon_personality_linux::Linux;
use tenon_sdk::personality::{CpuState, Error, StopMethod};
use tenon_testkit::{LoadBench, Loaded};

const ELF: &[u8] = include_bytes!("fixtures/kernel.elf");
/// Made with Linux's own packer commands; see `fixtures/make.py`.
const PAYLOADS: [(&str, &[u8]); 5] = [
    ("gzip", include_bytes!("fixtures/payload.gzip")),
    ("xz", include_bytes!("fixtures/payload.xz")),
    ("zstd", include_bytes!("fixtures/payload.zstd")),
    ("lz4", include_bytes!("fixtures/payload.lz4")),
    ("lzma", include_bytes!("fixtures/payload.lzma")),
];
/// Where the loadable part of the ELF image begins in the file.
const ELF_TEXT: usize = 0xc4;
const LOAD: u64 = 16 * MIB;
const PVH_ENTRY: u64 = LOAD + 0x10;
/// The bench's machine: RAM, a hole from 640 KiB to 1 MiB with the root pointer in it, RAM.
const RSDP: u64 = 0xe_0000;
const RANGES: usize = 3;

/// The kernel lies in memory, byte for byte.
fn assert_loaded(guest: &Loaded) {
    assert!(guest.memory(LOAD, ELF.len() - ELF_TEXT) == ELF[ELF_TEXT..]);
}

fn refusal(bench: &LoadBench) -> Error {
    bench.load::<Linux>().err().expect("this must be refused")
}

#[test]
fn every_packing_leads_to_the_same_kernel_entered_by_pvh() {
    for (packing, payload) in PAYLOADS {
        let bench = LoadBench::new(64 * MIB).image("kernel", BzImage::new(payload).bytes());
        let guest = bench.load::<Linux>().unwrap();
        let boot = &guest.boot;
        assert_eq!(boot.summary, format!("Linux 6.1.0-tiny (bzImage, {packing}, PVH)"));
        assert_eq!(boot.stop, StopMethod::PowerButton);
        assert_loaded(&guest);
    }
}

#[test]
fn a_bare_elf_kernel_is_loaded_without_passing_through_the_plugin_and_shows_its_banner() {
    let bench = LoadBench::new(64 * MIB).image("kernel", ELF);
    let guest = bench.load::<Linux>().unwrap();
    let boot = &guest.boot;
    assert_eq!(boot.summary, "Linux 6.1.0-tiny (ELF, PVH)");
    assert_loaded(&guest);
}

#[test]
fn pvh_finds_command_line_initrd_memory_map_and_root_pointer() {
    let bench = LoadBench::new(64 * MIB)
        .image("initrd", *b"0707012345")
        .image("kernel", ELF)
        .option("cmdline", "console=ttyS0 quiet");
    let guest = bench.load::<Linux>().unwrap();
    let start = guest.boot.vcpu.general[CpuState::RBX];
    assert_eq!((guest.u32(start), guest.u32(start + 4), guest.u32(start + 8)), (0x336e_c578, 1, 0));
    assert_eq!(guest.text(guest.u64(start + 24)), "console=ttyS0 quiet");
    assert_eq!(guest.u64(start + 32), RSDP);

    assert_eq!(guest.u32(start + 12), 1, "one module");
    let module = guest.u64(start + 16);
    let (address, size) = (guest.u64(module), guest.u64(module + 8));
    assert_eq!(size, 10);
    assert_eq!(address, 64 * MIB - 0x1000, "the highest page of RAM");
    assert_eq!(guest.memory(address, 10), b"0707012345");

    let map = guest.u64(start + 40);
    assert_eq!(guest.u32(start + 48) as usize, RANGES);
    let kinds: Vec<u32> = (0..3).map(|index| guest.u32(map + 24 * index + 16)).collect();
    assert_eq!(kinds, [1, 2, 1]);
    assert_eq!((guest.u64(map + 48), guest.u64(map + 56)), (MIB, 63 * MIB));
}

#[test]
fn pvh_begins_in_flat_protected_mode_without_paging() {
    let vcpu = LoadBench::new(64 * MIB).image("kernel", ELF).load::<Linux>().unwrap().boot.vcpu;
    assert_eq!(vcpu.rip, PVH_ENTRY);
    assert_eq!((vcpu.cr0, vcpu.cr4, vcpu.efer), (0x11, 0, 0));
    assert_eq!((vcpu.cs.base, vcpu.cs.limit, vcpu.cs.rights), (0, u32::MAX, 0xc09b));
    for segment in [vcpu.ds, vcpu.es, vcpu.ss] {
        assert_eq!((segment.base, segment.limit, segment.rights), (0, u32::MAX, 0xc093));
    }
    assert_eq!((vcpu.tr.base, vcpu.tr.limit, vcpu.tr.rights), (0, 0x67, 0x8b));
    assert_eq!(vcpu.rflags & !2, 0, "no interrupts, no single steps");
}

/// What both of Linux's own protocols give the kernel, at `zero_page`.
fn assert_zero_page(guest: &Loaded, zero_page: u64) {
    assert_eq!(guest.memory(zero_page + 0x202, 4), b"HdrS");
    assert_eq!(guest.u8(zero_page + 0x210), 0xff, "a loader without a number");
    assert_eq!(guest.text(guest.u32(zero_page + 0x228).into()), "root=/dev/vda");
    assert_eq!((guest.u32(zero_page + 0x218), guest.u32(zero_page + 0x21c)), (64 * (MIB as u32) - 0x1000, 4));
    assert_eq!((guest.u32(zero_page + 0x0c0), guest.u32(zero_page + 0x0c4)), (0, 0));
    assert_eq!(guest.u64(zero_page + 0x070), RSDP);
    assert_eq!(usize::from(guest.u8(zero_page + 0x1e8)), RANGES);
    assert_eq!((guest.u64(zero_page + 0x2d0 + 40), guest.u32(zero_page + 0x2d0 + 56)), (MIB, 1));
    assert_eq!(guest.u8(zero_page + 0x1ef), 0, "the sentinel of a loader that knows what it copies");
}

fn with_extras(kernel: Vec<u8>) -> LoadBench {
    LoadBench::new(64 * MIB)
        .image("kernel", kernel)
        .image("initrd", *b"cpio")
        .option("cmdline", "root=/dev/vda")
}

#[test]
fn an_elf_kernel_without_pvh_note_is_entered_in_long_mode_with_a_zero_page() {
    let mut kernel = ELF.to_vec();
    let note = kernel.windows(4).position(|word| word == b"Xen\0").unwrap();
    kernel[note] = b'Y';
    let bench = with_extras(kernel);
    let guest = bench.load::<Linux>().unwrap();
    let boot = &guest.boot;
    assert_eq!(boot.summary, "Linux 6.1.0-tiny (ELF, 64-bit entry)");
    assert_loaded(&guest);
    assert_eq!(boot.vcpu.rip, LOAD);
    assert_zero_page(&guest, boot.vcpu.general[CpuState::RSI]);
    assert_long_mode(&guest, &boot.vcpu);
}

/// Walks the page tables for some addresses, and looks at the descriptors that the boot protocol asks for.
fn assert_long_mode(guest: &Loaded, vcpu: &CpuState) {
    assert_eq!((vcpu.cr0 & 0x8000_0001, vcpu.cr4 & 0x20, vcpu.efer & 0x500), (0x8000_0001, 0x20, 0x500));
    for address in [0, LOAD, 0x7fff_ffff_u64, 0xffff_ffff] {
        let third = guest.u64(vcpu.cr3);
        let second = guest.u64((third & !0xfff) + 8 * (address >> 30));
        let first = guest.u64((second & !0xfff) + 8 * (address >> 21 & 0x1ff));
        assert_eq!((third & 3, second & 3, first & 0x83), (3, 3, 0x83));
        assert_eq!(first & !0x1f_ffff, address & !0x1f_ffff, "mapped one to one");
    }
    assert_eq!((vcpu.cs.selector, vcpu.ds.selector), (0x10, 0x18));
    assert_eq!(guest.u64(vcpu.gdt.base + 0x10), 0x00af_9b00_0000_ffff);
    assert_eq!(guest.u64(vcpu.gdt.base + 0x18), 0x00cf_9300_0000_ffff);
    assert!(vcpu.gdt.limit >= 0x1f);
}

#[test]
fn a_payload_of_an_unknown_kind_is_left_to_the_guest_by_the_64_bit_entry() {
    let image = BzImage::new(b"LZO? who packs with that today").bytes();
    let bench = with_extras(image.clone());
    let guest = bench.load::<Linux>().unwrap();
    let boot = &guest.boot;
    assert_eq!(boot.summary, "Linux 6.1.0-tiny (bzImage, 64-bit entry)");
    assert!(guest.memory(LOAD, image.len() - 1024) == image[1024..]);
    assert_eq!(boot.vcpu.rip, LOAD + 0x200);
    assert_zero_page(&guest, boot.vcpu.general[CpuState::RSI]);
    assert_long_mode(&guest, &boot.vcpu);
}

#[test]
fn a_bzimage_without_64_bit_entry_is_entered_in_protected_mode() {
    let image = BzImage::new(b"LZO? who packs with that today").put(0x236, &[0, 0]).bytes();
    let bench = with_extras(image);
    let guest = bench.load::<Linux>().unwrap();
    let boot = &guest.boot;
    assert_eq!(boot.summary, "Linux 6.1.0-tiny (bzImage, 32-bit entry)");
    let vcpu = &boot.vcpu;
    assert_eq!((vcpu.rip, vcpu.cr0, vcpu.efer), (LOAD, 0x11, 0));
    assert_eq!((vcpu.cs.selector, vcpu.ds.selector), (0x10, 0x18));
    assert_eq!(guest.u64(vcpu.gdt.base + 0x10), 0x00cf_9b00_0000_ffff);
    for register in [CpuState::RBX, CpuState::RBP, CpuState::RDI] {
        assert_eq!(vcpu.general[register], 0, "the protocol says so");
    }
    assert_zero_page(&guest, vcpu.general[CpuState::RSI]);
}

#[test]
fn a_kernel_too_old_to_name_its_payload_is_loaded_at_one_mebibyte() {
    // Boot protocol 2.04 ends before the fields of relocation, payload and 64-bit entry: whatever is there means nothing.
    let image = BzImage::new(PAYLOADS[0].1).put(0x206, &0x0204_u16.to_le_bytes()).bytes();
    let bench = LoadBench::new(64 * MIB).image("kernel", image);
    let guest = bench.load::<Linux>().unwrap();
    let boot = &guest.boot;
    assert_eq!(boot.summary, "Linux 6.1.0-tiny (bzImage, 32-bit entry)");
    assert_eq!(boot.vcpu.rip, MIB);
}

#[test]
fn the_entry_can_be_chosen_and_a_missing_one_is_refused() {
    let packed = BzImage::new(PAYLOADS[3].1).bytes();
    let bench = LoadBench::new(64 * MIB).image("kernel", packed.clone()).option("protocol", "linux64");
    assert_eq!(bench.load::<Linux>().unwrap().boot.summary, "Linux 6.1.0-tiny (bzImage, lz4, 64-bit entry)");
    let unknown = BzImage::new(b"LZO? who packs with that today").bytes();
    let bench = LoadBench::new(64 * MIB).image("kernel", unknown).option("protocol", "pvh");
    assert!(matches!(refusal(&bench), Error::NotMine(text) if text.contains("PVH")));
    let bench = LoadBench::new(64 * MIB).image("kernel", packed).option("protocol", "multiboot");
    assert!(matches!(refusal(&bench), Error::Invalid(text) if text.contains("linux64")));
}

#[test]
fn an_initrd_stays_below_what_the_kernel_reaches() {
    let image = BzImage::new(b"unknown payload").put(0x22c, &(32 * MIB as u32 - 1).to_le_bytes()).bytes();
    let bench = LoadBench::new(64 * MIB).image("kernel", image).image("initrd", vec![1; 5000]);
    let guest = bench.load::<Linux>().unwrap();
    let zero_page = guest.boot.vcpu.general[CpuState::RSI];
    assert_eq!(u64::from(guest.u32(zero_page + 0x218)), 32 * MIB - 0x2000);
}

#[test]
fn every_truncation_is_refused_and_says_so() {
    let image = BzImage::new(PAYLOADS[3].1).bytes();
    for length in (0x206..image.len() - 15).step_by(13) {
        let bench = LoadBench::new(64 * MIB).image("kernel", &image[..length]);
        let error = refusal(&bench);
        assert!(
            matches!(&error, Error::Corrupt(text) if text.contains("truncated") || text.contains("ends")),
            "{length}: {error}"
        );
    }
    for length in 4..ELF.len() {
        let error = refusal(&LoadBench::new(64 * MIB).image("kernel", &ELF[..length]));
        assert!(matches!(error, Error::Corrupt(_)), "{length}: {error}");
    }
}

#[test]
fn a_damaged_payload_is_refused_and_says_where() {
    for (packing, payload) in PAYLOADS {
        // Past the magic numbers, before the length.
        let mut damaged = payload.to_vec();
        let length = damaged.len();
        damaged.drain(length / 2..length - 8);
        let error = refusal(&LoadBench::new(64 * MIB).image("kernel", BzImage::new(&damaged).bytes()));
        assert!(matches!(&error, Error::Corrupt(text) if text.contains(packing)), "{packing}: {error}");
    }
}

#[test]
fn no_flipped_bit_of_any_image_does_worse_than_an_error() {
    let images = PAYLOADS.iter().map(|(_, payload)| BzImage::new(payload).bytes()).chain([ELF.to_vec()]);
    let mut refused = 0;
    for image in images {
        for offset in (0..image.len()).filter(|offset| !(1024..1024 + 0x400).contains(offset)) {
            let mut damaged = image.clone();
            damaged[offset] ^= 1 << (offset % 8);
            refused +=
                usize::from(LoadBench::new(32 * MIB).image("kernel", damaged).load::<Linux>().is_err());
        }
    }
    assert!(refused > 500, "the flips were felt: {refused}");
}

#[test]
fn a_length_word_that_lies_is_noticed() {
    let mut payload = PAYLOADS[3].1.to_vec();
    let end = payload.len();
    for (length, said) in [(0x7fff_ffff_u32, "512 MiB"), (2000, "should"), (100, "")] {
        payload[end - 4..].copy_from_slice(&length.to_le_bytes());
        let error = refusal(&LoadBench::new(64 * MIB).image("kernel", BzImage::new(&payload).bytes()));
        assert!(matches!(&error, Error::Corrupt(text) if text.contains(said)), "{error}");
    }
}

#[test]
fn lz4_payloads_of_several_blocks_are_put_together() {
    // 20 MiB: two blocks of 8 MiB and one of 4.
    let mut kernel = ELF.to_vec();
    kernel.resize(20 << 20, 0);
    let grown = (kernel.len() - ELF_TEXT) as u64;
    kernel[64 + 32..64 + 40].copy_from_slice(&grown.to_le_bytes());
    kernel[64 + 40..64 + 48].copy_from_slice(&grown.to_le_bytes());
    kernel[(9 << 20) - 1] = 0xa5;
    let mut payload = vec![0x02, 0x21, 0x4c, 0x18];
    for block in kernel.chunks(8 << 20) {
        let packed = lz4_flex::block::compress(block);
        payload.extend(u32::try_from(packed.len()).unwrap().to_le_bytes());
        payload.extend(packed);
    }
    payload.extend(u32::try_from(kernel.len()).unwrap().to_le_bytes());
    let bench = LoadBench::new(64 * MIB).image("kernel", BzImage::new(&payload).bytes());
    let guest = bench.load::<Linux>().unwrap();
    assert!(guest.memory(LOAD, kernel.len() - ELF_TEXT) == kernel[ELF_TEXT..]);
}

#[test]
fn what_is_no_kernel_is_refused_with_what_it_seems_to_be() {
    let mut arm = vec![0; 4096];
    arm[0x38..0x3c].copy_from_slice(b"ARM\x64");
    let mut foreign = ELF.to_vec();
    foreign[18] = 183;
    for (image, said) in [
        (Vec::new(), "an empty file"),
        (vec![0; 9000], "zeros"),
        (b"\x1f\x8b\x08 and so on".to_vec(), "gzip"),
        (arm, "ARM64"),
        (b"MZ is for Mark Zbikowski".to_vec(), "EFI"),
        (foreign, "machine 183"),
        (b"Dear kernel".to_vec(), "44, 65, 61, 72"),
        (BzImage::new(b"").put(0x211, &[0]).bytes(), "zImage"),
    ] {
        let error = refusal(&LoadBench::new(64 * MIB).image("kernel", image));
        assert!(
            matches!(&error, Error::NotMine(text) if text.contains("looked for") && text.contains(said)),
            "{error}"
        );
    }
}

#[test]
fn too_little_memory_is_refused_with_how_much_would_do() {
    let packed = BzImage::new(PAYLOADS[0].1).bytes();
    let error = refusal(&LoadBench::new(8 * MIB).image("kernel", packed));
    assert!(
        matches!(&error, Error::NoRoom(text) if text.contains("has 8 MiB") && text.contains("32 MiB would do")),
        "{error}"
    );
    let error = refusal(&LoadBench::new(32 * MIB).image("kernel", ELF).image("initrd", vec![0; 40 << 20]));
    assert!(
        matches!(&error, Error::NoRoom(text) if text.contains("initrd") && text.contains("40 MiB")),
        "{error}"
    );
}

#[test]
fn a_wrong_set_of_images_or_options_is_refused_by_name() {
    for (bench, said) in [
        (LoadBench::new(32 * MIB), "`kernel` is missing"),
        (LoadBench::new(32 * MIB).image("kernel", ELF).image("firmware", ELF), "`firmware`"),
        (LoadBench::new(32 * MIB).image("kernel", ELF).image("kernel", ELF), "twice"),
        (LoadBench::new(32 * MIB).image("kernel", ELF).image("initrd", Vec::new()), "`initrd` is empty"),
        (LoadBench::new(32 * MIB).image("kernel", ELF).option("cmdline", &"x".repeat(2048)), "2047"),
        (LoadBench::new(32 * MIB).image("kernel", ELF).option("cmdline", "a\0b"), "NUL"),
    ] {
        let error = refusal(&bench);
        assert!(matches!(&error, Error::Invalid(text) if text.contains(said)), "{error}");
    }
}
