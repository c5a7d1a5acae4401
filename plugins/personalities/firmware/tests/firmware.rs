//! What is firmware, and how it is entered.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use tenon_personality_firmware::Firmware;
use tenon_sdk::personality::{Error, StopMethod};
use tenon_testkit::LoadBench;

fn bench(image: Vec<u8>) -> LoadBench {
    LoadBench::new(16 << 20).image("firmware", image)
}

fn image(size: usize) -> Vec<u8> {
    let mut image = vec![0xff; size];
    image[size - 16..size - 13].copy_from_slice(&[0xe9, 0, 0xf0]);
    image
}

#[test]
fn the_first_vcpu_starts_at_the_reset_vector_and_ram_is_left_alone() {
    let mut uefi = image(0x3000);
    uefi[0x1028..0x102c].copy_from_slice(b"_FVH");
    let loaded = bench(uefi).load::<Firmware>().unwrap();
    let vcpu = &loaded.boot.vcpu;
    assert_eq!((vcpu.cs.selector, vcpu.cs.base, vcpu.rip), (0xf000, 0xffff_0000, 0xfff0));
    assert_eq!(vcpu.cr0 & 1, 0);
    assert!(loaded.boot.summary.starts_with("UEFI firmware"), "{}", loaded.boot.summary);
    assert!(matches!(loaded.boot.stop, StopMethod::PowerButton));
    assert!(loaded.memory(0, 1 << 20).iter().all(|byte| *byte == 0));
}

#[test]
fn firmware_without_a_volume_is_entered_too() {
    let loaded = bench(image(0x1_0000)).load::<Firmware>().unwrap();
    assert!(loaded.boot.summary.starts_with("PC firmware"), "{}", loaded.boot.summary);
}

#[test]
fn what_cannot_be_firmware_is_refused() {
    for image in [Vec::new(), image(0x1001), image((16 << 20) + 0x1000), vec![0xff; 0x1000], vec![0; 0x2000]]
    {
        assert!(matches!(bench(image).load::<Firmware>(), Err(Error::NotMine(_))));
    }
    let kernel = LoadBench::new(16 << 20).image("kernel", image(0x1000));
    assert!(matches!(kernel.load::<Firmware>(), Err(Error::Invalid(_))));
}
