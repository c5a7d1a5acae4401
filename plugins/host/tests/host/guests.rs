//! Personalities.

use std::sync::Arc;

use tenon_core::Ram;
use tenon_plugins::abi::{Machine, MemoryKind, MemoryRange, PersonalityError, StopMethod};
use tenon_plugins::{AttachError, Boot, Fault, GuestError, Image};
use vm_memory::{Bytes, GuestAddress};

use crate::machine::{guest, misdeed, owned};

const RESERVED: u64 = 0x9_f000;

fn load(ram: &Arc<Ram>, options: &[(&str, &str)]) -> Result<Boot, GuestError> {
    let range = |start, end, kind| MemoryRange { start, size: end - start, kind };
    let machine = Machine {
        vcpus: 3,
        memory: vec![
            range(0, RESERVED, MemoryKind::Ram),
            range(RESERVED, 0x10_0000, MemoryKind::Reserved),
            range(0x10_0000, 0x18_0000, MemoryKind::Ram),
            range(0x18_0000, ram.size(), MemoryKind::Ram),
        ],
        rsdp: None,
    };
    let image = Image::from_bytes("kernel", b"an image".to_vec());
    guest().load_guest(&machine, ram, vec![image], &owned(options))
}

#[test]
fn images_reach_guest_memory_by_both_ways() {
    for how in ["copy", "write"] {
        let ram = Ram::new(2 << 20).unwrap();
        // Across the seam of two ranges of RAM.
        let boot = load(&ram, &[("how", how), ("at", "0x17fffc")]).unwrap();
        assert_eq!(boot.summary, "1 images");
        assert_eq!((boot.vcpu.general[3], boot.vcpu.segments[1].base), (3, 0x1000));
        assert_eq!(boot.stop, StopMethod::Console(b"q".to_vec()));
        let mut bytes = [0; 8];
        ram.map().read_slice(&mut bytes, GuestAddress(0x17_fffc)).unwrap();
        assert_eq!(&bytes, b"an image");
    }
}

#[test]
fn only_ram_can_be_written_and_nothing_is_written_in_part() {
    for at in ["0x9effc", "0x9f000", "0xffff8", "0x1ffffc", "0xffffffff", "0xfffffffffffffffe"] {
        for how in ["copy", "write"] {
            let ram = Ram::new(2 << 20).unwrap();
            let error = load(&ram, &[("how", how), ("at", at)]).unwrap_err();
            assert!(
                matches!(&error, GuestError::Refused { error: PersonalityError::NoRoom(_), .. }),
                "{at}: {error}"
            );
            let mut bytes = [0; 4];
            ram.map().read_slice(&mut bytes, GuestAddress(RESERVED - 4)).unwrap();
            assert_eq!(bytes, [0; 4]);
        }
    }
}

#[test]
fn an_image_has_an_end() {
    let error = load(&Ram::new(2 << 20).unwrap(), &[("how", "past-end")]).unwrap_err();
    assert!(matches!(&error, GuestError::Refused { error: PersonalityError::Corrupt(_), .. }), "{error}");
}

#[test]
fn a_personality_that_does_not_return_is_an_error() {
    let ram = Ram::new(2 << 20).unwrap();
    let fault = |how| match load(&ram, &[("how", how)]).unwrap_err() {
        GuestError::Fault { fault, .. } => fault,
        other => panic!("{other}"),
    };
    assert!(matches!(fault("spin"), Fault::Deadline(_)));
    assert!(matches!(fault("trap"), Fault::Trap(_)));
}

#[test]
fn each_kind_is_used_for_what_it_is() {
    let machine = crate::machine::Machine::still();
    assert!(matches!(guest().attach("g", &[], &machine.parts), Err(AttachError::NotADevice { .. })));
    let empty = Machine { vcpus: 1, memory: Vec::new(), rsdp: None };
    let error = misdeed().load_guest(&empty, &Ram::new(1 << 20).unwrap(), Vec::new(), &[]).unwrap_err();
    assert!(matches!(error, GuestError::NotAPersonality(_)));
}
