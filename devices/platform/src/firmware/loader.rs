//! The ACPI tables as firmware takes them: two files, and a script that says which pointers and checksums to set once the files have their places
//! (QEMU's `etc/table-loader`).

use super::fw_cfg::{NAME, name};
use crate::acpi::{self, AcpiError, Platform};

const ROOT: &str = "etc/acpi/rsdp";
const TABLES: &str = "etc/acpi/tables";
/// The bytes of a command: its number, and what it needs, filled up.
const COMMAND: usize = 128;
const ALLOCATE: u32 = 1;
const ADD_POINTER: u32 = 2;
const ADD_CHECKSUM: u32 = 3;
/// Anywhere below 4 GiB.
const ZONE_HIGH: u8 = 1;
/// Where old guests look for the root pointer.
const ZONE_FSEG: u8 = 2;

#[derive(Default)]
struct Script(Vec<u8>);

impl Script {
    fn command(&mut self, number: u32, parts: &[&[u8]]) {
        let mut command = number.to_le_bytes().to_vec();
        parts.iter().for_each(|part| command.extend(*part));
        command.resize(COMMAND, 0);
        self.0.extend(command);
    }

    fn allocate(&mut self, file: &str, alignment: u32, zone: u8) {
        self.command(ALLOCATE, &[&name(file), &alignment.to_le_bytes(), &[zone]]);
    }

    /// The 8 bytes at `offset` of `file` hold an offset into `target`; they become an address.
    fn pointer(&mut self, file: &str, target: &str, offset: u32) {
        self.command(ADD_POINTER, &[&name(file), &name(target), &offset.to_le_bytes(), &[8]]);
    }

    fn checksum(&mut self, file: &str, at: u32, start: u32, length: u32) {
        let numbers = [at, start, length].map(u32::to_le_bytes).concat();
        self.command(ADD_CHECKSUM, &[&name(file), &numbers]);
    }
}

const _: () = assert!(4 + 2 * NAME + 5 <= COMMAND);

/// The files.
///
/// # Errors
/// The tables cannot be made.
pub(super) fn files(platform: &Platform) -> Result<Vec<(String, Vec<u8>)>, AcpiError> {
    // With the base 0 addresses are offsets. The root pointer has a file of its own, and the rest begins with its room.
    let mut image = acpi::build(platform, 0)?;
    let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let mut script = Script::default();
    script.allocate(ROOT, 16, ZONE_FSEG);
    script.allocate(TABLES, 64, ZONE_HIGH);
    let mut root = image.bytes[..acpi::RSDP_LENGTH].to_vec();
    for pointer in &image.pointers {
        script.pointer(TABLES, TABLES, number(*pointer));
    }
    script.pointer(ROOT, TABLES, number(acpi::RSDP_XSDT));
    for table in &image.tables {
        let start = table.start;
        image.bytes[start + acpi::TABLE_CHECKSUM] = 0;
        script.checksum(TABLES, number(start + acpi::TABLE_CHECKSUM), number(start), number(table.len()));
    }
    // The first sum covers the fields of ACPI 1, the second one all.
    for (at, length) in [(acpi::RSDP_CHECKSUM, 20), (acpi::RSDP_LONG_CHECKSUM, acpi::RSDP_LENGTH)] {
        root[at] = 0;
        script.checksum(ROOT, number(at), 0, number(length));
    }
    Ok(vec![(ROOT.into(), root), (TABLES.into(), image.bytes), ("etc/table-loader".into(), script.0)])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn u32_at(bytes: &[u8], at: usize) -> usize {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
    }

    fn text(bytes: &[u8]) -> String {
        String::from_utf8(bytes.iter().copied().take_while(|b| *b != 0).collect()).unwrap()
    }

    /// Does what firmware does.
    fn run(files: Vec<(String, Vec<u8>)>) -> BTreeMap<String, (u64, Vec<u8>)> {
        let mut files: BTreeMap<_, _> = files.into_iter().collect();
        let script = files.remove("etc/table-loader").unwrap();
        let mut loaded: BTreeMap<String, (u64, Vec<u8>)> = BTreeMap::new();
        for (n, command) in script.chunks(COMMAND).enumerate() {
            let file = text(&command[4..4 + NAME]);
            match u32_at(command, 0) {
                1 => {
                    let content = files.remove(&file).unwrap();
                    loaded.insert(file, (0x7000_0000 + 0x10_0000 * n as u64, content));
                }
                2 => {
                    let base = loaded[&text(&command[60..60 + NAME])].0;
                    let at = u32_at(command, 116);
                    let field = &mut loaded.get_mut(&file).unwrap().1[at..at + 8];
                    let value = u64::from_le_bytes((&*field).try_into().unwrap()) + base;
                    field.copy_from_slice(&value.to_le_bytes());
                }
                3 => {
                    let [at, start, length] = [60, 64, 68].map(|n| u32_at(command, n));
                    let bytes = &mut loaded.get_mut(&file).unwrap().1;
                    let sum = bytes[start..start + length].iter().fold(0u8, |sum, b| sum.wrapping_sub(*b));
                    bytes[at] = sum;
                }
                other => panic!("command {other}"),
            }
        }
        loaded
    }

    #[test]
    fn after_the_script_every_table_is_reached_with_a_right_checksum() {
        let platform = Platform { vcpus: 2, pci_buses: 1, ..Platform::default() };
        let loaded = run(files(&platform).unwrap());
        let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        let (base, tables) = &loaded[TABLES];
        let table = |address: &[u8]| {
            let at = usize::try_from(u64::from_le_bytes(address.try_into().unwrap()) - base).unwrap();
            tables[at..at + u32_at(tables, at + 4)].to_vec()
        };
        let root = &loaded[ROOT].1;
        assert_eq!((&root[..8], sum(&root[..20]), sum(root)), (&b"RSD PTR "[..], 0, 0));
        let xsdt = table(&root[24..32]);
        let entries: Vec<_> = xsdt[36..].chunks(8).map(table).collect();
        let names: Vec<_> = entries.iter().map(|table| &table[..4]).collect();
        assert_eq!(names, [b"FACP", b"APIC", b"MCFG"]);
        let dsdt = table(&entries[0][140..148]);
        assert_eq!(&dsdt[..4], b"DSDT");
        assert!(entries.iter().chain([&xsdt, &dsdt]).all(|table| sum(table) == 0));
    }
}
