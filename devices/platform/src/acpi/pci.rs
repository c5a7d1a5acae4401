//! What the DSDT says of PCI: root buses with their windows and interrupt routes, slots that can be ejected, and the method that passes on what slots tell.

use acpi_tables::aml::{
    self, AddressSpace, AddressSpaceCacheable, EISAName, FieldAccessType, FieldEntry, FieldLockRule,
    FieldUpdateRule, OpRegionSpace,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::{Aml, AmlSink};

use super::{OEM, OEM_TABLE, REVISION, bytecode};
use crate::pci::hotplug::{PORT, PORTS};
use crate::pci::{
    CONFIG_PORTS, ECAM_BASE, HIGH_WINDOW, HIGH_WINDOW_OF_BUS, MEMORY_WINDOW, MEMORY_WINDOW_OF_BUS, PCI_GSIS,
    PciSlot, SLOTS,
};

/// The method that passes on what slots tell.
pub(super) const SCAN: &str = "\\_SB_.PHP0.SCAN";

/// The table that says where configuration space is (PCI Firmware 3.3 §4.1.2).
pub(super) fn mcfg(buses: u8) -> Vec<u8> {
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, REVISION);
    mcfg.add_ecam(ECAM_BASE, 0, 0, buses - 1);
    bytecode(&mcfg)
}

/// Everything in the namespace that is PCI's.
pub(super) fn namespace(buses: u8) -> Vec<u8> {
    let mut code = Vec::new();
    for bus in 0..buses {
        code.extend(root_bus(bus));
    }
    code.extend(board(buses));
    code.extend(slots_device(buses));
    code
}

fn slots(bus: u8) -> impl Iterator<Item = PciSlot> {
    (u8::from(bus == 0)..SLOTS).map(move |slot| PciSlot { bus, slot })
}

fn path(slot: PciSlot) -> String {
    format!("\\_SB_.PC{:02X}.S{:02X}_", slot.bus, slot.slot)
}

fn number(slot: PciSlot) -> u16 {
    u16::from_le_bytes([slot.slot, slot.bus])
}

/// A root bus: bus number, windows, routes of INTA to INTD (ACPI 6.5 §6.2.13), slots.
fn root_bus(bus: u8) -> Vec<u8> {
    let low = MEMORY_WINDOW.start + MEMORY_WINDOW_OF_BUS * u64::from(bus);
    // Below 4 GiB.
    let [low, low_end] = [low, low + MEMORY_WINDOW_OF_BUS - 1].map(|at| u32::try_from(at).unwrap_or(0));
    let high = HIGH_WINDOW.start + HIGH_WINDOW_OF_BUS * u64::from(bus);
    let none = AddressSpaceCacheable::NotCacheable;
    let numbers = AddressSpace::new_bus_number(u16::from(bus), u16::from(bus));
    let low = AddressSpace::new_memory(none, true, low, low_end, None);
    let high = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        high,
        high + HIGH_WINDOW_OF_BUS - 1,
        None,
    );
    let ports = aml::IO::new(CONFIG_PORTS.start, CONFIG_PORTS.start, 1, 8);
    let mut resources: Vec<&dyn Aml> = vec![&numbers, &low, &high];
    if bus == 0 {
        resources.push(&ports);
    }
    let resources = aml::ResourceTemplate::new(resources);
    let routes: Vec<[u32; 4]> = (0..SLOTS)
        .flat_map(|slot| (0..4).map(move |pin| (PciSlot { bus, slot }, pin)))
        .map(|(slot, pin)| {
            let line = PCI_GSIS.start + (slot.gsi() - PCI_GSIS.start + pin) % 4;
            [u32::from(slot.slot) << 16 | 0xffff, pin, 0, line]
        })
        .collect();
    let mut prt = aml::PackageBuilder::new();
    for route in &routes {
        prt.add_element(&aml::Package::new(route.iter().map(|n| n as &dyn Aml).collect()));
    }
    let slots: Vec<Vec<u8>> = slots(bus).map(slot_device).collect();
    let slots: Vec<Code> = slots.into_iter().map(Code).collect();
    let (hid, cid) = (EISAName::new("PNP0A08"), EISAName::new("PNP0A03"));
    let names: [(&str, &dyn Aml); 7] = [
        ("_HID", &hid),
        ("_CID", &cid),
        ("_SEG", &aml::ZERO),
        ("_BBN", &bus),
        ("_UID", &bus),
        ("_CRS", &resources),
        ("_PRT", &prt),
    ];
    let names = names.map(|(name, value)| aml::Name::new(name.into(), value));
    let mut children: Vec<&dyn Aml> = Vec::new();
    children.extend(names.iter().map(|name| name as &dyn Aml));
    children.extend(slots.iter().map(|slot| slot as &dyn Aml));
    bytecode(&aml::Device::new(format!("_SB_.PC{bus:02X}").as_str().into(), children))
}

/// A slot: its address, its number for people, and how it is ejected.
fn slot_device(slot: PciSlot) -> Vec<u8> {
    let address = u32::from(slot.slot) << 16;
    let sun = u16::from(slot.bus) * u16::from(SLOTS) + u16::from(slot.slot);
    let (register, value) = (aml::Path::new("\\_SB_.PHP0.EJCT"), number(slot));
    let eject = aml::Store::new(&register, &value);
    bytecode(&aml::Device::new(
        format!("S{:02X}_", slot.slot).as_str().into(),
        vec![
            &aml::Name::new("_ADR".into(), &address),
            &aml::Name::new("_SUN".into(), &sun),
            &aml::Method::new("_EJ0".into(), 1, false, vec![&eject]),
        ],
    ))
}

/// The board's own resource: configuration space, so that nobody else is put there.
fn board(buses: u8) -> Vec<u8> {
    let size = u32::from(buses) << 20;
    // Below 4 GiB.
    let ecam = aml::Memory32Fixed::new(true, u32::try_from(ECAM_BASE).unwrap_or(0), size);
    bytecode(&aml::Device::new(
        "_SB_.MBRD".into(),
        vec![
            &aml::Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new("_CRS".into(), &aml::ResourceTemplate::new(vec![&ecam])),
        ],
    ))
}

/// The registers of hot plug, and the method that reads events until there are none and notifies the slots.
fn slots_device(buses: u8) -> Vec<u8> {
    let region = aml::OpRegion::new("PHPR".into(), OpRegionSpace::SystemIO, &PORT, &PORTS);
    let field = aml::Field::new(
        "PHPR".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::Preserve,
        vec![FieldEntry::Named(*b"EVNT", 32), FieldEntry::Named(*b"EJCT", 32)],
    );
    let (event, slot, bus, what) = (aml::Local(0), aml::Local(1), aml::Local(2), aml::Local(3));
    let register = aml::Path::new("EVNT");
    let next = aml::Store::new(&event, &register);
    let take_slot = aml::And::new(&slot, &event, &0xffffu16);
    let take_bus = aml::ShiftRight::new(&bus, &slot, &8u8);
    let take_what = aml::ShiftRight::new(&what, &event, &16u8);
    let by_bus: Vec<Code> = (0..buses)
        .map(|number_of_bus| {
            let notifies: Vec<Code> = slots(number_of_bus)
                .map(|place| {
                    let (object, number) = (aml::Path::new(&path(place)), number(place));
                    let notify = aml::Notify::new(&object, &what);
                    Code(bytecode(&aml::If::new(&aml::Equal::new(&slot, &number), vec![&notify])))
                })
                .collect();
            let notifies = notifies.iter().map(|code| code as &dyn Aml).collect();
            Code(bytecode(&aml::If::new(&aml::Equal::new(&bus, &number_of_bus), notifies)))
        })
        .collect();
    let none = u32::MAX;
    let more = aml::NotEqual::new(&event, &none);
    let mut body: Vec<&dyn Aml> = vec![&take_slot, &take_bus, &take_what];
    body.extend(by_bus.iter().map(|code| code as &dyn Aml));
    body.push(&next);
    let round = aml::While::new(&more, body);
    let ports = aml::IO::new(PORT, PORT, 1, PORTS.to_le_bytes()[0]);
    bytecode(&aml::Device::new(
        "_SB_.PHP0".into(),
        vec![
            &aml::Name::new("_HID".into(), &EISAName::new("PNP0A06")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new("_CRS".into(), &aml::ResourceTemplate::new(vec![&ports])),
            &region,
            &field,
            &aml::Method::new("SCAN".into(), 0, true, vec![&next, &round]),
        ],
    ))
}

/// Bytecode that is finished.
struct Code(Vec<u8>);

impl Aml for Code {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}
