//! The ACPI tables of a hardware-reduced platform (ACPI 6.5 §4.1): RSDP, XSDT, FADT, MADT, DSDT, and MCFG where there is PCI.
//!
//! The DSDT holds a node for each device that a plugin described, the power button, and the generic event device that
//! tells of it. Tables lie from [`ACPI_BASE`] on, the root pointer first.

mod pci;

use std::ops::Range;

use acpi_tables::aml::{
    self, EISAName, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, OpRegionSpace,
};
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use tenon_core::Ram;
use vm_memory::{Bytes, GuestAddress};

use crate::map::{ACPI_BASE, RESET_VECTOR};
use crate::power::{BUTTON_EVENT, POWER_BUTTON_GSI, POWER_PORT, POWER_PORTS, RESET_VALUE, S5, SLOTS_EVENT};

const OEM: [u8; 6] = *b"TENON ";
const OEM_TABLE: [u8; 8] = *b"TENON1  ";
const REVISION: u32 = 1;
const LAPIC_ADDRESS: u32 = 0xfee0_0000;
const IOAPIC_ADDRESS: u32 = 0xfec0_0000;

/// A resource of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resource {
    /// `size` ports from `base`.
    Ports {
        /// The first port.
        base: u16,
        /// How many; at most 255 are told to the guest.
        size: u16,
    },
    /// Memory-mapped registers below 4 GiB.
    Memory {
        /// The first address.
        base: u32,
        /// The length in bytes.
        size: u32,
    },
    /// An interrupt line, active high.
    Line {
        /// The global system interrupt.
        gsi: u32,
        /// Edge-triggered and exclusive; otherwise level-triggered and shared.
        edge: bool,
    },
}

/// A device in the ACPI namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcpiNode {
    /// The hardware id: an EISA id such as `PNP0501`, or an ACPI id of eight characters.
    pub hid: String,
    /// The unique id among devices of the same hardware id.
    pub uid: u32,
    /// Its current resources.
    pub resources: Vec<Resource>,
}

/// What the tables tell of.
#[derive(Clone, Debug, Default)]
pub struct Platform {
    /// How many vCPUs; their APIC ids are 0 to `vcpus - 1`.
    pub vcpus: u8,
    /// The devices that are not on PCI.
    pub devices: Vec<AcpiNode>,
    /// How many PCI root buses: [`Pci::buses`](crate::Pci::buses), or 0 where there is no PCI.
    pub pci_buses: u8,
}

/// Tables that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// They are too long for their place.
    #[error("the ACPI tables need {0} bytes; there is room for {room}", room = RESET_VECTOR - ACPI_BASE)]
    TooLong(usize),
    /// A hardware id that is neither an EISA nor an ACPI id.
    #[error(
        "`{0}` is no hardware id: an EISA id has three capital letters and four hexadecimal digits, an ACPI id four capital letters or digits and four hexadecimal digits"
    )]
    HardwareId(String),
    /// Guest memory refused the write.
    #[error("writing the ACPI tables: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

#[derive(Default)]
struct Bytecode(Vec<u8>);

impl AmlSink for Bytecode {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }

    fn vec(&mut self, bytes: &[u8]) {
        self.0.extend(bytes);
    }
}

fn bytecode(item: &dyn Aml) -> Vec<u8> {
    let mut sink = Bytecode::default();
    item.to_aml_bytes(&mut sink);
    sink.0
}

/// Writes the tables into guest memory and returns the address of the root pointer.
///
/// # Errors
/// A device's hardware id is malformed, the tables are too long, or there is no memory at their place.
pub fn write_tables(ram: &Ram, platform: &Platform) -> Result<u64, AcpiError> {
    let image = build(platform, ACPI_BASE)?.bytes;
    if image.len() as u64 > RESET_VECTOR - ACPI_BASE {
        return Err(AcpiError::TooLong(image.len()));
    }
    ram.map().write_slice(&image, GuestAddress(ACPI_BASE))?;
    Ok(ACPI_BASE)
}

/// The root pointer's length, and where its fields are (ACPI 6.5 table 5.3).
pub(crate) const RSDP_LENGTH: usize = 36;
pub(crate) const RSDP_XSDT: usize = 24;
pub(crate) const RSDP_CHECKSUM: usize = 8;
pub(crate) const RSDP_LONG_CHECKSUM: usize = 32;
/// Where a table's checksum is.
pub(crate) const TABLE_CHECKSUM: usize = 9;
/// Where the FADT and the XSDT have addresses.
const FADT_DSDT: usize = 140;
const XSDT_ENTRIES: usize = 36;

/// The tables as they lie in memory.
pub(crate) struct Image {
    /// The root pointer first.
    pub(crate) bytes: Vec<u8>,
    /// Where each table is.
    pub(crate) tables: Vec<Range<usize>>,
    /// Where tables have an address of 8 bytes.
    pub(crate) pointers: Vec<usize>,
}

/// Makes the tables for this address.
pub(crate) fn build(platform: &Platform, base: u64) -> Result<Image, AcpiError> {
    // The root pointer comes first, so each later table's address is known when it is referred to.
    let mut bytes = vec![0; RSDP_LENGTH.next_multiple_of(16)];
    let mut tables = Vec::new();
    let mut place = |table: &[u8]| {
        let start = bytes.len();
        bytes.extend(table);
        tables.push(start..bytes.len());
        bytes.resize(bytes.len().next_multiple_of(16), 0);
        start
    };
    let address = |start: usize| base + start as u64;
    let dsdt = address(place(&dsdt(platform)?));
    let fadt = place(&fadt(dsdt, platform));
    let madt = place(&madt(platform));
    let mut entries = vec![fadt, madt];
    if platform.pci_buses > 0 {
        entries.push(place(&pci::mcfg(platform.pci_buses)));
    }
    let mut table = XSDT::new(OEM, OEM_TABLE, REVISION);
    entries.iter().for_each(|entry| table.add_entry(address(*entry)));
    let xsdt = place(&bytecode(&table));
    bytes[..RSDP_LENGTH].copy_from_slice(&bytecode(&Rsdp::new(OEM, address(xsdt))));
    let mut pointers = vec![fadt + FADT_DSDT];
    pointers.extend((0..entries.len()).map(|n| xsdt + XSDT_ENTRIES + 8 * n));
    Ok(Image { bytes, tables, pointers })
}

fn port(number: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, number.into())
}

fn fadt(dsdt: u64, platform: &Platform) -> Vec<u8> {
    // IA-PC boot architecture flags (ACPI 6.5 table 5.10).
    const LEGACY_DEVICES: u16 = 1;
    const NO_VGA: u16 = 1 << 2;
    const NO_CMOS_RTC: u16 = 1 << 5;
    let clock = platform.devices.iter().any(|device| device.hid == "PNP0B00");
    let mut table = FADTBuilder::new(OEM, OEM_TABLE, REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Wbinvd);
    table.iapc_boot_arch = (LEGACY_DEVICES | NO_VGA | if clock { 0 } else { NO_CMOS_RTC }).into();
    table.sleep_control_reg = port(POWER_PORT);
    table.sleep_status_reg = port(POWER_PORT + 1);
    table.reset_reg = port(POWER_PORT + 2);
    table.reset_value = RESET_VALUE;
    bytecode(&table.finalize())
}

fn madt(platform: &Platform) -> Vec<u8> {
    let mut madt = MADT::new(OEM, OEM_TABLE, REVISION, LocalInterruptController::Address(LAPIC_ADDRESS));
    for id in 0..platform.vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IOAPIC_ADDRESS, 0));
    bytecode(&madt)
}

fn dsdt(platform: &Platform) -> Result<Vec<u8>, AcpiError> {
    let mut code = Vec::new();
    for (number, device) in platform.devices.iter().enumerate() {
        code.extend(node(number, device)?);
    }
    code.extend(power(platform.pci_buses > 0));
    if platform.pci_buses > 0 {
        code.extend(pci::namespace(platform.pci_buses));
    }
    let sleep = aml::Package::new(vec![&S5, &aml::ZERO, &aml::ZERO, &aml::ZERO]);
    code.extend(bytecode(&aml::Name::new("_S5_".into(), &sleep)));
    // Revision 2: integers have 64 bits.
    let mut table = Sdt::new(*b"DSDT", 36, 2, OEM, OEM_TABLE, REVISION);
    table.append_slice(&code);
    Ok(table.as_slice().to_vec())
}

fn node(number: usize, device: &AcpiNode) -> Result<Vec<u8>, AcpiError> {
    let resources: Vec<Box<dyn Aml>> = device.resources.iter().map(resource).collect();
    let resources = aml::ResourceTemplate::new(resources.iter().map(|item| &**item).collect());
    let hid = hardware_id(&device.hid)?;
    Ok(bytecode(&aml::Device::new(
        format!("_SB_.D{number:03X}").as_str().into(),
        vec![
            &aml::Name::new("_HID".into(), &*hid),
            &aml::Name::new("_UID".into(), &device.uid),
            &aml::Name::new("_CRS".into(), &resources),
        ],
    )))
}

fn hardware_id(id: &str) -> Result<Box<dyn Aml>, AcpiError> {
    let upper = |text: &str| text.bytes().all(|b| b.is_ascii_uppercase() || b.is_ascii_digit());
    let hex = |text: &str| text.bytes().all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b));
    match id.len() {
        7 if id.is_ascii() && id[..3].bytes().all(|b| b.is_ascii_uppercase()) && hex(&id[3..]) => {
            Ok(Box::new(EISAName::new(id)))
        }
        8 if id.is_ascii() && upper(&id[..4]) && hex(&id[4..]) => Ok(Box::new(id.to_owned())),
        _ => Err(AcpiError::HardwareId(id.to_owned())),
    }
}

fn resource(resource: &Resource) -> Box<dyn Aml> {
    match *resource {
        Resource::Ports { base, size } => {
            Box::new(aml::IO::new(base, base, 1, u8::try_from(size).unwrap_or(u8::MAX)))
        }
        Resource::Memory { base, size } => Box::new(aml::Memory32Fixed::new(true, base, size)),
        Resource::Line { gsi, edge } => Box::new(aml::Interrupt::new(true, edge, false, !edge, gsi)),
    }
}

/// The power button, and the generic event device whose method asks the registers what happened (ACPI 6.5 §5.6.9).
fn power(has_slots: bool) -> Vec<u8> {
    let mut code = bytecode(&aml::Device::new(
        "_SB_.PWRB".into(),
        vec![
            &aml::Name::new("_HID".into(), &EISAName::new("PNP0C0C")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
        ],
    ));
    let events = POWER_PORT + 3;
    let length = POWER_PORTS - 3;
    let interrupt = aml::Interrupt::new(true, false, false, false, POWER_BUTTON_GSI);
    let line = aml::ResourceTemplate::new(vec![&interrupt]);
    let line = aml::Name::new("_CRS".into(), &line);
    let region = aml::OpRegion::new("EVTR".into(), OpRegionSpace::SystemIO, &events, &length);
    let field = aml::Field::new(
        "EVTR".into(),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::Preserve,
        vec![FieldEntry::Named(*b"EVTS", 8)],
    );
    let events_field = aml::Path::new("EVTS");
    let status = aml::Store::new(&aml::Local(0), &events_field);
    let pressed = aml::And::new(&aml::Local(1), &aml::Local(0), &BUTTON_EVENT);
    let press = aml::Path::new("\\_SB_.PWRB");
    let notify = aml::Notify::new(&press, &0x80u8);
    let when = aml::If::new(&aml::Local(1), vec![&notify]);
    let slots_told = aml::And::new(&aml::Local(1), &aml::Local(0), &SLOTS_EVENT);
    let scan = aml::MethodCall::new(pci::SCAN.into(), vec![]);
    let when_slots = aml::If::new(&aml::Local(1), vec![&scan]);
    let mut body: Vec<&dyn Aml> = vec![&status, &pressed, &when];
    if has_slots {
        body.extend([&slots_told as &dyn Aml, &when_slots]);
    }
    let method = aml::Method::new("_EVT".into(), 1, true, body);
    let hid = "ACPI0013".to_owned();
    code.extend(bytecode(&aml::Device::new(
        "_SB_.GED0".into(),
        vec![
            &aml::Name::new("_HID".into(), &hid),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &line,
            &region,
            &field,
            &method,
        ],
    )));
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn read(ram: &Ram, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        ram.map().read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    fn table(ram: &Ram, address: u64) -> Vec<u8> {
        let length = ram.map().read_obj::<u32>(GuestAddress(address + 4)).unwrap();
        read(ram, address, length.try_into().unwrap())
    }

    fn serial() -> AcpiNode {
        AcpiNode {
            hid: "PNP0501".into(),
            uid: 0,
            resources: vec![Resource::Ports { base: 0x3f8, size: 8 }, Resource::Line { gsi: 4, edge: true }],
        }
    }

    #[test]
    fn every_table_is_reached_from_the_root_with_a_right_checksum() {
        let ram = Ram::new(2 << 20).unwrap();
        let platform = Platform { vcpus: 64, devices: vec![serial()], pci_buses: 9 };
        let root = write_tables(&ram, &platform).unwrap();
        let rsdp = read(&ram, root, 36);
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));
        let xsdt = table(&ram, u64::from_le_bytes(rsdp[24..32].try_into().unwrap()));
        assert_eq!(sum(&xsdt), 0);
        let entries: Vec<_> =
            xsdt[36..].chunks(8).map(|a| table(&ram, u64::from_le_bytes(a.try_into().unwrap()))).collect();
        let names: Vec<_> = entries.iter().map(|table| &table[..4]).collect();
        assert_eq!(names, [b"FACP", b"APIC", b"MCFG"]);
        assert!(entries.iter().all(|table| sum(table) == 0));
        assert_eq!(entries[1].len(), 44 + 64 * 8 + 12);
        let dsdt = table(&ram, u64::from_le_bytes(entries[0][140..148].try_into().unwrap()));
        assert_eq!((&dsdt[..4], sum(&dsdt)), (&b"DSDT"[..], 0));
    }

    #[test]
    fn a_malformed_hardware_id_is_refused_by_name() {
        let ram = Ram::new(2 << 20).unwrap();
        for hid in ["", "PNP05", "pnp0501", "PNP050G", "TOOLONG12", "ÄPNP050"] {
            let node = AcpiNode { hid: hid.into(), ..serial() };
            let error =
                write_tables(&ram, &Platform { vcpus: 1, devices: vec![node], pci_buses: 0 }).unwrap_err();
            assert!(matches!(error, AcpiError::HardwareId(id) if id == hid));
        }
    }

    #[test]
    fn tables_that_do_not_fit_are_refused() {
        let ram = Ram::new(2 << 20).unwrap();
        let platform = Platform { vcpus: 1, devices: vec![serial(); 4000], pci_buses: 0 };
        assert!(matches!(write_tables(&ram, &platform), Err(AcpiError::TooLong(_))));
    }
}
