//! Compound values survive the native boundary, and no bytes from the other side do harm.
#![allow(clippy::unwrap_used, reason = "a test and its helpers")]

use tenon_abi::wire::{self, WireError};
use tenon_abi::{
    Boot, CpuState, Description, DeviceError, Machine, MemoryKind, MemoryRange, PersonalityError, StopMethod,
    Trigger,
};

fn description() -> Description {
    Description::new()
        .pio("ports", 0x3f8, 8)
        .mmio("registers", None, 0x1000)
        .mmio("doorbell", Some(0xfee0_0000_0000), 4)
        .line(Some(4), Trigger::Edge)
        .line(None, Trigger::Level)
        .timer()
        .channel("console")
        .acpi("PNP0501", 7)
}

fn machine() -> Machine {
    let range = |start, kind| MemoryRange { start, size: 0x1000, kind };
    Machine {
        vcpus: 64,
        memory: vec![
            range(0, MemoryKind::Ram),
            range(0x1000, MemoryKind::Acpi),
            range(0x2000, MemoryKind::Reserved),
        ],
        rsdp: Some(0x1000),
    }
}

fn boot() -> Boot {
    let mut vcpu = CpuState::long_mode(0x1_0000_0000, 0x9000);
    for (n, register) in vcpu.general.iter_mut().enumerate() {
        *register = n as u64;
    }
    Boot { summary: "Größe".into(), vcpu, stop: StopMethod::Console(b"\x03poweroff\n".to_vec()) }
}

/// The value comes back; every truncation, and bytes behind it, are refused; no flipped bit panics.
fn check<T: PartialEq + std::fmt::Debug>(
    value: &T,
    bytes: &[u8],
    decode: impl Fn(&[u8]) -> Result<T, WireError>,
) {
    assert_eq!(&decode(bytes).unwrap(), value);
    for length in 0..bytes.len() {
        assert!(decode(&bytes[..length]).is_err(), "{length} of {} bytes were accepted", bytes.len());
    }
    assert!(decode(&[bytes, &[0]].concat()).is_err());
    for bit in 0..bytes.len() * 8 {
        let mut damaged = bytes.to_vec();
        damaged[bit / 8] ^= 1 << (bit % 8);
        let _ = decode(&damaged);
    }
}

#[test]
fn every_compound_value_survives_and_damage_is_harmless() {
    check(&description(), &wire::encode_description(&description()), wire::decode_description);
    check(&machine(), &wire::encode_machine(&machine()), wire::decode_machine);
    check(&boot(), &wire::encode_boot(&boot()), wire::decode_boot);
    let settings = vec![("base".to_owned(), "0x3f8".to_owned()), ("base".to_owned(), String::new())];
    check(&settings, &wire::encode_settings(&settings), wire::decode_settings);
    for make in [DeviceError::Invalid, DeviceError::Unsupported, DeviceError::Schema, DeviceError::Other] {
        let error = make("why".into());
        check(&error, &wire::encode_device_error(&error), wire::decode_device_error);
    }
    for make in [
        PersonalityError::NotMine,
        PersonalityError::Corrupt,
        PersonalityError::NoRoom,
        PersonalityError::Invalid,
        PersonalityError::Other,
    ] {
        let error = make("why".into());
        check(&error, &wire::encode_personality_error(&error), wire::decode_personality_error);
    }
}

#[test]
fn a_count_of_four_thousand_million_is_refused_at_once() {
    assert_eq!(wire::decode_settings(&[0xff; 4]), Err(WireError { what: "settings", offset: 4 }));
}
