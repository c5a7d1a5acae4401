//! Compound values survive the native boundary, and no bytes from the other side do harm.
#![allow(clippy::unwrap_used, reason = "a test and its helpers")]

use tenon_abi::wire::{self, WireError};
use tenon_abi::{
    Access, AllocateHow, Attributes, Boot, Changes, ConnectionError, CpuState, Description, DeviceError,
    FileRange, FileTime, FolderAction, FolderEntry, FolderItem, FolderOutcome, FolderStatistics, Machine,
    MemoryKind, MemoryRange, NewFile, NewTime, Node, Offloads, OpenFile, PersonalityError, Place, PortInfo,
    RenameHow, StopMethod, StoreError, StoreInfo, Trigger, VirtioDescription,
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

fn virtio() -> VirtioDescription {
    VirtioDescription::new(2)
        .features(1 << 6 | 1 << 63)
        .queue("requests", 256, 16)
        .queue("events", 1, 0)
        .config(60)
        .timer()
        .channel("console")
        .store("disk")
        .port("net")
        .socket("vsock")
        .folder("share")
}

fn store() -> StoreInfo {
    StoreInfo { discard: true, identity: "serial".into(), ..StoreInfo::new(1 << 40) }
}

fn port() -> PortInfo {
    let send = Offloads { checksum: true, tso4: true, tso6: false };
    PortInfo { mac: [2, 0, 0, 0, 0, 1], mtu: 1500, link_up: true, send, receive: Offloads::default() }
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
    check(&virtio(), &wire::encode_virtio_description(&virtio()), wire::decode_virtio_description);
    check(&store(), &wire::encode_store_info(&store()), wire::decode_store_info);
    check(&port(), &wire::encode_port_info(&port()), wire::decode_port_info);
    for error in [
        ConnectionError::NotGranted,
        ConnectionError::Unreachable("why".into()),
        ConnectionError::Closed,
        ConnectionError::TimedOut,
    ] {
        check(&error, &wire::encode_connection_error(&error), wire::decode_connection_error);
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
fn what_is_asked_of_a_folder_survives_and_damage_is_harmless() {
    let (node, file) = (Node(1 << 40), OpenFile(7));
    let place = |name: &str| Place { folder: node, name: name.into() };
    let new = NewFile { place: place("new"), mode: 0o644, uid: 1000, gid: 100 };
    let access = Access { read: true, append: true, ..Access::default() };
    let range = FileRange { file, offset: 80, length: 4096, position: 1 << 33 };
    let time = FileTime { seconds: -5, nanoseconds: 999_999_999 };
    let changes = Changes {
        mode: Some(0o600),
        size: Some(1 << 40),
        accessed: Some(NewTime::Now),
        modified: Some(NewTime::At(time)),
        ..Changes::default()
    };
    let attributes =
        Attributes { inode: 9, size: 10, mode: 0o100_644, changed: time, ..Attributes::default() };
    let entry = FolderEntry { node, attributes };
    let actions = [
        FolderAction::Clear,
        FolderAction::Forget(vec![(node, 3), (Node::ROOT, u64::MAX)]),
        FolderAction::LookUp(place("\u{fc}")),
        FolderAction::Attributes { node, file: Some(file) },
        FolderAction::Change { node, file: None, changes },
        FolderAction::ReadLink(node),
        FolderAction::MakeFile(new.clone()),
        FolderAction::MakeFolder(new.clone()),
        FolderAction::MakeLink { new: new.clone(), target: b"../x".to_vec() },
        FolderAction::Link { node, place: place("a") },
        FolderAction::Remove(place("a")),
        FolderAction::RemoveFolder(place("a")),
        FolderAction::Rename { from: place("a"), to: place("b"), how: RenameHow::Exchange },
        FolderAction::Open { node, access },
        FolderAction::Create { new, access, exclusive: true },
        FolderAction::OpenFolder(node),
        FolderAction::Names { file, position: 5, room: 4096, each: 24, entries: true },
        FolderAction::Read(range),
        FolderAction::Write(range),
        FolderAction::Sync { file, data_only: true },
        FolderAction::Allocate { file, how: AllocateHow::Punch, position: 1, length: 2 },
        FolderAction::Seek { file, position: 1, hole: true },
        FolderAction::Statistics(node),
        FolderAction::Close(file),
    ];
    for action in actions {
        check(&action, &wire::encode_folder_action(&action), wire::decode_folder_action);
    }
    let item = FolderItem { next: 3, inode: 4, kind: 8, name: b"name".to_vec(), entry: Some(entry) };
    let outcomes = [
        FolderOutcome::Done,
        FolderOutcome::Entry(entry),
        FolderOutcome::Attributes(attributes),
        FolderOutcome::Target(b"target".to_vec()),
        FolderOutcome::Opened(file),
        FolderOutcome::Created(entry, file),
        FolderOutcome::Items(vec![FolderItem { entry: None, ..item.clone() }, item]),
        FolderOutcome::Moved(4096),
        FolderOutcome::Position(1 << 40),
        FolderOutcome::Statistics(FolderStatistics { blocks: 5, ..FolderStatistics::default() }),
    ];
    for outcome in outcomes {
        check(&outcome, &wire::encode_folder_outcome(&outcome), wire::decode_folder_outcome);
    }
    for bits in 0..32 {
        assert_eq!(Access::from_bits(bits).to_bits(), bits);
    }
}

#[test]
fn a_count_of_four_thousand_million_is_refused_at_once() {
    assert_eq!(wire::decode_settings(&[0xff; 4]), Err(WireError { what: "settings", offset: 4 }));
}

#[test]
fn outcomes_and_offloads_survive_as_numbers() {
    assert_eq!(StoreError::result(0), Ok(()));
    for error in [
        StoreError::OutOfRange,
        StoreError::ReadOnly,
        StoreError::NoSpace,
        StoreError::Unsupported,
        StoreError::Io,
    ] {
        assert_eq!(StoreError::result(StoreError::number_of(Err(error))), Err(error));
    }
    assert_eq!(StoreError::result(77), Err(StoreError::Io), "an unknown outcome was taken for a success");
    for bits in 0..8 {
        assert_eq!(Offloads::from_bits(bits).to_bits(), bits);
    }
}

#[test]
fn a_store_that_cannot_be_is_told_apart() {
    assert_eq!(store().check(), Ok(()));
    let wrong = [
        StoreInfo { block_size: 0, ..store() },
        StoreInfo { block_size: 256, ..store() },
        StoreInfo { block_size: 768, ..store() },
        StoreInfo { size: 513, ..store() },
        StoreInfo { optimal_size: 0, ..store() },
        StoreInfo { optimal_size: 700, ..store() },
        StoreInfo { identity: "a".repeat(21), ..store() },
        StoreInfo { identity: "ü".into(), ..store() },
    ];
    for info in wrong {
        assert!(info.check().is_err(), "{info:?}");
    }
}
