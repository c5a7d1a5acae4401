//! The flat personality: puts a raw or ELF image into memory as it is and enters it. For boot sectors, test guests, unikernels, other
//! people's firmware: whatever needs no boot protocol.
//!
//! | mode | loaded at (raw) | first instruction | tables |
//! | --- | --- | --- | --- |
//! | `real` | 0x7c00 | CS:IP, CS a multiple of 0x1000: 0000:7c00, 1000:2345 for 0x12345; the other segments are 0, SP is 0x7c00 | none |
//! | `protected` | 0x100000 | flat 32-bit, paging off | descriptors |
//! | `long` | 0x100000 | 64-bit, the first 4 GiB mapped one to one | descriptors, page tables |
//!
//! In protected and long mode the selectors are 0x08 (32-bit code), 0x10 (code), 0x18 (data). The tables take seven pages and the boot information
//! one, the lowest free ones from 0x1000 on: 0x1000 to 0x8fff, unless the image itself lies there. There is no stack: set one.
//! Interrupts are off, and there is no interrupt table (in real mode it is at 0 and empty).
//!
//! # Boot information
//!
//! EBX (RBX) holds the address of this, in real mode too. All fields are little-endian.
//!
//! | offset | bytes | what |
//! | --- | --- | --- |
//! | 0 | 8 | `TENONBI1` |
//! | 8 | 8 | all RAM, in bytes |
//! | 16 | 8 | the address of the ACPI root pointer, or 0 |
//! | 24 | 4 | how many vCPUs |
//! | 28 | 4 | how many memory ranges follow |
//! | 32 | 24 each | start, length (8 bytes each), kind (4 bytes: 1 RAM, 2 reserved, 3 ACPI tables), 0 (4 bytes) |
//!
//! Images: `kernel`. Options: `mode`, `load`, `entry`.

use tenon_sdk::guest::{Class, Elf, Layout, Tables, mebibytes};
use tenon_sdk::personality::{
    Boot, Config, CpuState, Error, Image, Machine, Memory, MemoryKind, Personality, Result, StopMethod,
};

/// Tables and boot information lie from here.
const LOW_START: u64 = 0x1000;
const LOW_END: u64 = 0xa_0000;
/// Where a PC's firmware puts a boot sector.
const BOOT_SECTOR: u64 = 0x7c00;
const ONE_MEBIBYTE: u64 = 0x10_0000;
/// The first address that real mode cannot name.
const REAL_END: u64 = 0x10_0000;
const INFO_MAGIC: &[u8; 8] = b"TENONBI1";

/// The personality.
pub struct Flat;

tenon_sdk::export_personality!(Flat);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Real,
    Protected,
    Long,
}

impl Personality for Flat {
    fn load(machine: &Machine, memory: &Memory<'_>, images: Vec<Image>, options: &Config) -> Result<Boot> {
        let kernel = the_kernel(images)?;
        let mode = options.choice(
            "mode",
            &[
                ("auto", None),
                ("real", Some(Mode::Real)),
                ("protected", Some(Mode::Protected)),
                ("long", Some(Mode::Long)),
            ],
        )?;
        let mode = mode.flatten();
        let entry = options.number::<u64>("entry")?;
        let load = options.number::<u64>("load")?;

        let mut layout = Layout::new(machine);
        let (kind, mode, extent, entry) = match Elf::parse(&kernel)? {
            Some(elf) => {
                if load.is_some() {
                    return Err(Error::Invalid(
                        "`load` is given, but an ELF image says itself where it belongs".into(),
                    ));
                }
                elf.load(&kernel, &mut layout, memory)?;
                let (name, natural) = match elf.class {
                    Class::Elf32 => ("32-bit ELF", Mode::Protected),
                    Class::Elf64 => ("64-bit ELF", Mode::Long),
                };
                (name, mode.unwrap_or(natural), elf.extent(), entry.unwrap_or(elf.entry))
            }
            None => {
                let mode = mode.unwrap_or(Mode::Real);
                let load = load.unwrap_or(if mode == Mode::Real { BOOT_SECTOR } else { ONE_MEBIBYTE });
                let size = kernel.size();
                if size == 0 {
                    return Err(Error::NotMine(
                        "looked for an image with something in it; found an empty file".into(),
                    ));
                }
                layout.take(load, size, "the image")?;
                memory.copy_image(load, &kernel, 0, size)?;
                ("raw", mode, (load, load + size), entry.unwrap_or(load))
            }
        };
        if !(extent.0..extent.1).contains(&entry) {
            return Err(Error::Invalid(format!(
                "the entry {entry:#x} lies outside the image, which is loaded from {:#x} to {:#x}",
                extent.0, extent.1
            )));
        }

        let mut vcpu = match mode {
            Mode::Real => real_mode(entry)?,
            Mode::Protected => {
                let entry = u32::try_from(entry).map_err(|_| {
                    Error::Invalid(format!("the entry {entry:#x} is past the 4 GiB of protected mode"))
                })?;
                Tables::write(&mut layout, memory, LOW_START, LOW_END, false)?.protected_mode(entry)
            }
            Mode::Long => {
                if entry >> 32 != 0 {
                    return Err(Error::Invalid(format!(
                        "the entry {entry:#x} is past the first 4 GiB, which are all that is mapped"
                    )));
                }
                Tables::write(&mut layout, memory, LOW_START, LOW_END, true)?.long_mode(entry)
            }
        };
        let info = boot_information(machine);
        let address = layout.take_lowest(info.len() as u64, LOW_START, LOW_END, "the boot information")?;
        memory.write(address, &info)?;
        vcpu.general[CpuState::RBX] = address;

        let entered = match mode {
            Mode::Real => "real mode",
            Mode::Protected => "protected mode",
            Mode::Long => "long mode",
        };
        let summary = format!("{kind} image of {} at {entry:#x} in {entered}", mebibytes(kernel.size()));
        Ok(Boot { summary, vcpu, stop: StopMethod::None })
    }
}

fn the_kernel(images: Vec<Image>) -> Result<Image> {
    let mut kernel = None;
    for image in images {
        let role = image.role();
        if role != "kernel" || kernel.replace(image).is_some() {
            return Err(Error::Invalid(format!(
                "one image `{role}` too many is given; a flat guest takes one `kernel`"
            )));
        }
    }
    kernel.ok_or_else(|| Error::Invalid("the image `kernel` is missing".into()))
}

/// Code that runs at `entry`: below 64 KiB in segment 0, as firmware enters a boot sector, else in the 64 KiB-aligned segment.
fn real_mode(entry: u64) -> Result<CpuState> {
    if entry >= REAL_END {
        return Err(Error::Invalid(format!(
            "the entry {entry:#x} is past the first MiB, which is all that real mode reaches"
        )));
    }
    let low = |value: u64| u16::try_from(value & 0xffff).unwrap_or(0);
    let mut vcpu = CpuState::real_mode(low(entry >> 4 & 0xf000), low(entry));
    vcpu.general[CpuState::RSP] = BOOT_SECTOR;
    Ok(vcpu)
}

fn boot_information(machine: &Machine) -> Vec<u8> {
    let ram: u64 =
        machine.memory.iter().filter(|range| range.kind == MemoryKind::Ram).map(|range| range.size).sum();
    let mut info = INFO_MAGIC.to_vec();
    info.extend(ram.to_le_bytes());
    info.extend(machine.rsdp.unwrap_or(0).to_le_bytes());
    info.extend(machine.vcpus.to_le_bytes());
    info.extend(u32::try_from(machine.memory.len()).unwrap_or(u32::MAX).to_le_bytes());
    for range in &machine.memory {
        let kind: u64 = match range.kind {
            MemoryKind::Ram => 1,
            MemoryKind::Reserved => 2,
            MemoryKind::Acpi => 3,
        };
        for word in [range.start, range.size, kind] {
            info.extend(word.to_le_bytes());
        }
    }
    info
}
