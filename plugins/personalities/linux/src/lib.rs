//! The Linux personality: understands Linux kernels for x86, puts them into guest memory and enters them.
//!
//! | image | how it is entered |
//! | --- | --- |
//! | ELF (`vmlinux`) with a PVH note | PVH: 32-bit protected mode, `hvm_start_info` |
//! | ELF without one | its own entry point, with a zero page: 64-bit for x86-64, 32-bit for x86 |
//! | bzImage with a gzip, xz, zstd, lz4 or lzma payload | the ELF image inside, as above: it is unpacked here and not by the guest, which is much faster |
//! | any other bzImage | its 64-bit entry if it has one, else its 32-bit entry; the guest unpacks it |
//!
//! Images: `kernel`, and optionally `initrd`. Options: `cmdline`, and `protocol` to take one of the entries by name.
//!
//! Memory, from the bottom: what the kernel finds at its start (start information or zero page, command line, tables) in the lowest
//! free pages under 636 KiB; the kernel where it was linked or wants to be; the initrd as high as the kernel can reach, under 3 or 4 GiB,
//! at a page boundary. Everything outside RAM, too large, or on top of another thing is refused with what was looked for and found.

mod header;
mod pvh;
mod unpack;
mod version;
mod zero_page;

use tenon_sdk::guest::{Class, Elf, Layout, Source, Tables, mebibytes};
use tenon_sdk::personality::{
    Boot, Config, CpuState, Error, Image, Machine, Memory, Personality, Result, StopMethod, info,
};

use crate::header::{HEAD, SetupHeader};
use crate::unpack::Packing;

/// Where the small things go: above the vectors of real mode, below what a PC's firmware would keep for itself.
const LOW_START: u64 = 0x1000;
const LOW_END: u64 = 0x9_f000;
/// The longest command line of a kernel that does not say: `COMMAND_LINE_SIZE` without its NUL.
const CMDLINE_MAX: usize = 2047;
/// A kernel for 64 bits can reach this far before it has page tables of its own, one for 32 bits so far.
const REACH64: u64 = 4 << 30;
const REACH32: u64 = 0x3800_0000;
/// More packed bytes than this are no kernel.
const PAYLOAD_MAX: u64 = 256 << 20;
/// The 64-bit entry lies so far behind the beginning of a bzImage's protected-mode code.
const ENTRY64: u64 = 0x200;

/// The personality.
pub struct Linux;

tenon_sdk::export_personality!(Linux);

impl Personality for Linux {
    fn load(machine: &Machine, memory: &Memory<'_>, images: Vec<Image>, options: &Config) -> Result<Boot> {
        let protocol = options
            .choice(
                "protocol",
                &[
                    ("auto", Protocol::Auto),
                    ("pvh", Protocol::Pvh),
                    ("linux64", Protocol::Linux64),
                    ("linux32", Protocol::Linux32),
                ],
            )?
            .unwrap_or(Protocol::Auto);
        let mut kernel = None;
        let mut initrd = None;
        for image in images {
            let slot = match image.role().as_str() {
                "kernel" => &mut kernel,
                "initrd" => &mut initrd,
                other => {
                    return Err(Error::Invalid(format!(
                        "an image `{other}` is given; Linux takes `kernel` and `initrd`"
                    )));
                }
            };
            if slot.replace(image).is_some() {
                return Err(Error::Invalid(
                    "the same image is given twice; Linux takes one `kernel` and one `initrd`".into(),
                ));
            }
        }
        let kernel = kernel.ok_or_else(|| Error::Invalid("the image `kernel` is missing".into()))?;

        let mut loader = Loader {
            machine,
            memory,
            layout: Layout::new(machine),
            protocol,
            initrd: initrd.as_ref(),
            cmdline: options.text("cmdline").unwrap_or(""),
        };
        let (summary, vcpu) = loader.load(&kernel)?;
        Ok(Boot { summary, vcpu, stop: StopMethod::PowerButton })
    }
}

/// How the kernel is to be entered.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Protocol {
    Auto,
    Pvh,
    Linux64,
    Linux32,
}

/// What the kernel is given beside the machine.
struct Extras<'a> {
    cmdline: &'a str,
    /// Address and length.
    initrd: Option<(u64, u64)>,
}

struct Loader<'a> {
    machine: &'a Machine,
    memory: &'a Memory<'a>,
    layout: Layout,
    protocol: Protocol,
    initrd: Option<&'a Image>,
    cmdline: &'a str,
}

impl<'a> Loader<'a> {
    /// Loads whatever kernel this is; gives the line for people and the vCPU.
    fn load(&mut self, kernel: &Image) -> Result<(String, CpuState)> {
        let size = kernel.size();
        let head = kernel.read_exact(0, size.min(HEAD as u64))?;
        if let Some(header) = SetupHeader::parse(&head, size)? {
            return self.load_bzimage(kernel, &header);
        }
        if let Some(elf) = Elf::parse(kernel)? {
            let release = version::find(kernel)?;
            let (entered, vcpu) = self.load_elf(&elf, kernel, None)?;
            return Ok((summary(release.as_deref(), &["ELF", entered]), vcpu));
        }
        Err(Error::NotMine(format!(
            "looked for a bzImage (`HdrS` at 0x202) or an ELF file for x86; found {}",
            version::describe(&head)
        )))
    }

    fn load_bzimage(&mut self, image: &Image, header: &SetupHeader) -> Result<(String, CpuState)> {
        let release = header.release.as_deref();
        if let Some((packing, kernel)) = unpack_payload(image, header)? {
            let kernel = kernel.as_slice();
            if let Some(elf) = Elf::parse(kernel)? {
                let (entered, vcpu) = self.load_elf(&elf, kernel, Some(header))?;
                return Ok((summary(release, &["bzImage", packing.name(), entered]), vcpu));
            }
        }
        let (entered, vcpu) = self.load_packed(image, header)?;
        Ok((summary(release, &["bzImage", entered]), vcpu))
    }

    /// Loads an unpacked kernel and enters it by PVH, or as its own boot code would.
    fn load_elf(
        &mut self,
        elf: &Elf,
        image: &(impl Source + ?Sized),
        header: Option<&SetupHeader>,
    ) -> Result<(&'static str, CpuState)> {
        let pvh = match self.protocol {
            Protocol::Auto | Protocol::Pvh => pvh::entry_point(elf, image)?,
            Protocol::Linux64 | Protocol::Linux32 => None,
        };
        let (reach, entered) = match (pvh, self.protocol, elf.class) {
            (None, Protocol::Pvh, _) => {
                return Err(Error::NotMine(
                    "looked for a PVH entry (ELF note `Xen`, type 18); the kernel has none".into(),
                ));
            }
            (None, Protocol::Linux64, Class::Elf32) => {
                return Err(Error::NotMine("looked for a 64-bit kernel; found one for 32 bits".into()));
            }
            (None, Protocol::Linux32, Class::Elf64) => {
                return Err(Error::NotMine(
                    "looked for a 32-bit entry; found a kernel whose own entry is for 64 bits".into(),
                ));
            }
            (Some(_), _, Class::Elf64) => (REACH64, "PVH"),
            (Some(_), _, Class::Elf32) => (REACH32, "PVH"),
            (None, _, Class::Elf64) => (REACH64, "64-bit entry"),
            (None, _, Class::Elf32) => (REACH32, "32-bit entry"),
        };
        elf.load(image, &mut self.layout, self.memory)?;
        let extras = self.extras(header, reach)?;
        let vcpu = match pvh {
            Some(entry) => pvh::prepare(entry, self.machine, &extras, &mut self.layout, self.memory)?,
            None => self.enter(elf.entry, elf.class, header, &extras)?,
        };
        Ok((entered, vcpu))
    }

    /// Loads a bzImage as it is: its own code unpacks the kernel.
    fn load_packed(&mut self, image: &Image, header: &SetupHeader) -> Result<(&'static str, CpuState)> {
        let class = match (self.protocol, header.has_entry64) {
            (Protocol::Pvh, _) => {
                return Err(Error::NotMine(
                    "looked for a PVH entry inside the bzImage; its payload is not an ELF file that can be unpacked here"
                        .into(),
                ));
            }
            (Protocol::Linux64, false) => {
                return Err(Error::NotMine("looked for a 64-bit entry; the bzImage has none".into()));
            }
            (Protocol::Auto | Protocol::Linux64, true) => Class::Elf64,
            (Protocol::Auto, false) | (Protocol::Linux32, _) => Class::Elf32,
        };
        let (offset, length) = header.code;
        self.layout.take(header.load_address, header.init_size, "the kernel")?;
        self.memory.copy_image(header.load_address, image, offset, length)?;
        let extras = self.extras(Some(header), REACH64)?;
        let (entry, entered) = match class {
            Class::Elf64 => (header.load_address + ENTRY64, "64-bit entry"),
            Class::Elf32 => (header.load_address, "32-bit entry"),
        };
        Ok((entered, self.enter(entry, class, Some(header), &extras)?))
    }

    /// The vCPU for Linux's own boot protocols: the zero page is in RSI.
    fn enter(
        &mut self,
        entry: u64,
        class: Class,
        header: Option<&SetupHeader>,
        extras: &Extras<'_>,
    ) -> Result<CpuState> {
        let zero_page = zero_page::write(header, self.machine, extras, &mut self.layout, self.memory)?;
        let long = class == Class::Elf64;
        let tables = Tables::write(&mut self.layout, self.memory, LOW_START, LOW_END, long)?;
        let mut vcpu = if long {
            tables.long_mode(entry)
        } else {
            tables.protected_mode(u32::try_from(entry).map_err(|_| {
                Error::Corrupt(format!(
                    "the 32-bit entry point is at {entry:#x}, which takes more than 32 bits"
                ))
            })?)
        };
        vcpu.general[CpuState::RSI] = zero_page;
        Ok(vcpu)
    }

    /// Checks the command line and places the initrd, both by what the kernel says of itself.
    fn extras(&mut self, header: Option<&SetupHeader>, reach: u64) -> Result<Extras<'a>> {
        let cmdline = self.cmdline;
        let most = header.map_or(CMDLINE_MAX, |header| header.cmdline_max);
        if cmdline.len() > most {
            return Err(Error::Invalid(format!(
                "`cmdline` has {} bytes; this kernel takes {most} at most",
                cmdline.len()
            )));
        }
        if cmdline.contains('\0') {
            return Err(Error::Invalid("`cmdline` has a NUL in it, which would end it there".into()));
        }
        let Some(image) = self.initrd else {
            return Ok(Extras { cmdline, initrd: None });
        };
        let size = image.size();
        if size == 0 {
            return Err(Error::Invalid("the image `initrd` is empty".into()));
        }
        let below = header.map_or(reach, |header| reach.min(header.initrd_max.saturating_add(1)));
        let address = self.layout.take_highest(size, below, "the initrd")?;
        self.memory.copy_image(address, image, 0, size)?;
        Ok(Extras { cmdline, initrd: Some((address, size)) })
    }
}

/// The kernel inside a bzImage, if it is packed in a way that can be unpacked here.
fn unpack_payload(image: &Image, header: &SetupHeader) -> Result<Option<(Packing, Vec<u8>)>> {
    let Some((offset, length)) = header.payload else {
        return Ok(None);
    };
    let Some(packing) = Packing::detect(&image.read_exact(offset, length.min(16))?) else {
        info!("the kernel's payload is packed in no way known here: the guest unpacks it");
        return Ok(None);
    };
    if length > PAYLOAD_MAX {
        return Err(Error::Corrupt(format!(
            "the kernel's {} payload has {}; at most {} are looked at",
            packing.name(),
            mebibytes(length),
            mebibytes(PAYLOAD_MAX)
        )));
    }
    let payload = image.read_exact(offset, length)?;
    let kernel = packing.unpack(&payload).map_err(|what| {
        Error::Corrupt(format!("unpacking the kernel's {} payload: {what}", packing.name()))
    })?;
    Ok(Some((packing, kernel)))
}

fn summary(release: Option<&str>, how: &[&str]) -> String {
    format!("Linux {} ({})", release.unwrap_or("of unknown version"), how.join(", "))
}
