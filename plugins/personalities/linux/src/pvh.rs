//! The PVH start of day: a `hvm_start_info`, the memory map, the module list and the command line, and a vCPU in 32-bit protected
//! mode without paging (Xen: docs/misc/pvh.pandoc and public/arch-x86/hvm/start_info.h, version 1).

use tenon_sdk::guest::{Elf, Layout, Source};
use tenon_sdk::personality::{CpuState, Error, Machine, Memory, MemoryKind};

use crate::{Extras, LOW_END, LOW_START};

/// The note that holds the entry point.
const PHYS32_ENTRY: u32 = 18;
const START_MAGIC: u32 = 0x336e_c578;
const START_SIZE: u64 = 56;
const MODULE_SIZE: u64 = 32;
const MAP_ENTRY_SIZE: u64 = 24;

/// The entry point of an image that can be started this way.
///
/// # Errors
/// The image cannot be read, or has the note with something else in it.
pub(crate) fn entry_point(elf: &Elf, image: &(impl Source + ?Sized)) -> Result<Option<u32>, Error> {
    let Some(note) = elf.note(image, "Xen", PHYS32_ENTRY)? else {
        return Ok(None);
    };
    let value = match note.len() {
        4 | 8 => note.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)),
        length => {
            return Err(Error::Corrupt(format!(
                "the PVH entry note has {length} bytes; 4 or 8 were looked for"
            )));
        }
    };
    let (start, end) = elf.extent();
    match u32::try_from(value) {
        Ok(entry) if (start..end).contains(&value) => Ok(Some(entry)),
        _ => Err(Error::Corrupt(format!(
            "the PVH entry point {value:#x} lies outside the image, which is loaded from {start:#x} to {end:#x}"
        ))),
    }
}

/// Writes the start information into low memory and gives the vCPU that enters a loaded kernel.
///
/// # Errors
/// There is no room.
pub(crate) fn prepare(
    entry: u32,
    machine: &Machine,
    extras: &Extras<'_>,
    layout: &mut Layout,
    memory: &Memory<'_>,
) -> Result<CpuState, Error> {
    let modules = if extras.initrd.is_some() { MODULE_SIZE } else { 0 };
    let map_size = MAP_ENTRY_SIZE * machine.memory.len() as u64;
    let size = START_SIZE + modules + map_size + extras.cmdline.len() as u64 + 1;
    let start = layout.take_lowest(size, LOW_START, LOW_END, "the start information")?;
    let module_list = start + START_SIZE;
    let map = module_list + modules;
    let cmdline = map + map_size;

    let mut bytes = Vec::new();
    let u32s =
        |values: &[u32], bytes: &mut Vec<u8>| bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    let u64s =
        |values: &[u64], bytes: &mut Vec<u8>| bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    // Magic, version, flags, number of modules.
    u32s(&[START_MAGIC, 1, 0, u32::from(extras.initrd.is_some())], &mut bytes);
    u64s(&[if modules == 0 { 0 } else { module_list }, cmdline, machine.rsdp.unwrap_or(0), map], &mut bytes);
    u32s(&[u32::try_from(machine.memory.len()).unwrap_or(u32::MAX), 0], &mut bytes);
    if let Some(initrd) = extras.initrd {
        // Address, size, command line, reserved.
        u64s(&[initrd.0, initrd.1, 0, 0], &mut bytes);
    }
    for range in &machine.memory {
        u64s(&[range.start, range.size], &mut bytes);
        u32s(&[map_type(range.kind), 0], &mut bytes);
    }
    bytes.extend_from_slice(extras.cmdline.as_bytes());
    bytes.push(0);
    memory.write(start, &bytes)?;

    let mut vcpu = CpuState::protected_mode(entry);
    vcpu.general[CpuState::RBX] = start;
    Ok(vcpu)
}

/// PVH's memory map and the zero page's both use the numbers of the ACPI address range types (ACPI 6.5 §15).
pub(crate) fn map_type(kind: MemoryKind) -> u32 {
    match kind {
        MemoryKind::Ram => 1,
        MemoryKind::Reserved => 2,
        MemoryKind::Acpi => 3,
    }
}
