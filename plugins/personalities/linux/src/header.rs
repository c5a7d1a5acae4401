//! The setup header of a bzImage: what the image says about itself (Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header").
//!
//! [`SetupHeader::parse`] checks everything that later code relies on: lengths and offsets lie inside the image, and fields that the
//! image's protocol version does not have hold the value that the protocol gives them by default.

use tenon_sdk::personality::Error;

/// How much of the image's beginning [`SetupHeader::parse`] wants to see, if there is so much.
pub(crate) const HEAD: usize = 64 << 10;
/// Where the setup header begins, in the image and in the zero page.
pub(crate) const START: usize = 0x1f1;
/// The header may grow up to here; the zero page uses what follows for other things.
const END_MAX: usize = 0x290;
const SECTOR: u64 = 512;

/// A bzImage's setup header, checked.
#[derive(Clone, Debug)]
pub(crate) struct SetupHeader {
    /// The header's own bytes, from [`START`], as they go into the zero page.
    pub(crate) bytes: Vec<u8>,
    /// The kernel's version, such as `6.1.0-49-cloud-amd64`, if the image has one.
    pub(crate) release: Option<String>,
    /// The protected-mode code: offset and length in the image.
    pub(crate) code: (u64, u64),
    /// The packed kernel: offset and length in the image, from protocol 2.08 on.
    pub(crate) payload: Option<(u64, u64)>,
    /// The highest address that the last byte of an initrd may have.
    pub(crate) initrd_max: u64,
    /// The longest command line, without its NUL.
    pub(crate) cmdline_max: usize,
    /// Where the protected-mode code is loaded.
    pub(crate) load_address: u64,
    /// How much RAM from there the code needs before it can look at the memory map.
    pub(crate) init_size: u64,
    /// The code has a 64-bit entry, 0x200 past its beginning.
    pub(crate) has_entry64: bool,
}

impl SetupHeader {
    /// Reads the header from the first bytes of an image of `size` bytes. `None`: this is no Linux boot image.
    ///
    /// # Errors
    /// It is one, but truncated, damaged, or of a kind that cannot be booted here.
    pub(crate) fn parse(head: &[u8], size: u64) -> Result<Option<Self>, Error> {
        if bytes(head, 0x1fe) != Some([0x55, 0xaa]) || bytes(head, 0x202) != Some(*b"HdrS") {
            return Ok(None);
        }
        let short = || Error::Corrupt("the kernel image ends inside its setup header".into());
        let end = (0x202 + usize::from(*head.get(0x201).ok_or_else(short)?)).min(END_MAX);
        let header = head.get(START..end).ok_or_else(short)?;
        let u8_at = |offset: usize| header.get(offset - START).copied().unwrap_or(0);
        let u16_at = |offset| bytes(header, offset - START).map_or(0, u16::from_le_bytes);
        let u32_at = |offset| bytes(header, offset - START).map_or(0, u32::from_le_bytes);
        let u64_at = |offset| bytes(header, offset - START).map_or(0, u64::from_le_bytes);

        let protocol = u16_at(0x206);
        let loaded_high = u8_at(0x211) & 1 != 0;
        if protocol < 0x0200 || !loaded_high {
            return Err(Error::NotMine(format!(
                "looked for a bzImage (boot protocol 2.00 or later, loaded at 1 MiB); found boot protocol {}.{:02}{}",
                protocol >> 8,
                protocol & 0xff,
                if loaded_high { "" } else { " and a zImage, which is loaded low" },
            )));
        }

        let setup_sectors = match u8_at(0x1f1) {
            0 => 4,
            sectors => u64::from(sectors),
        };
        let code_offset = (setup_sectors + 1) * SECTOR;
        // In 16-byte paragraphs; only the low half counts before 2.04.
        let paragraphs = if protocol >= 0x0204 { u32_at(0x1f4) } else { u32::from(u16_at(0x1f4)) };
        let code_size = u64::from(paragraphs) * 16;
        // The count is rounded up: the last paragraph may be a part of one.
        if code_size == 0 || code_offset + code_size > size + 15 {
            return Err(Error::Corrupt(format!(
                "the kernel image is truncated: its header speaks of {} bytes, the file has {size}",
                code_offset + code_size,
            )));
        }
        let code = (code_offset, code_size.min(size - code_offset));

        let payload = match (protocol >= 0x0208, u64::from(u32_at(0x248)), u64::from(u32_at(0x24c))) {
            (false, ..) | (true, _, 0) => None,
            (true, offset, length) if offset + length > size - code_offset => {
                return Err(Error::Corrupt(format!(
                    "the kernel image is truncated: its payload ends at byte {}, the file has {size}",
                    code_offset + offset + length,
                )));
            }
            (true, offset, length) => Some((code_offset + offset, length)),
        };

        let relocatable = protocol >= 0x0205 && u8_at(0x234) != 0;
        let has_preference = protocol >= 0x020a;
        let load_address = if has_preference && relocatable {
            u64_at(0x258)
        } else {
            u64::from(u32_at(0x214)).max(0x10_0000)
        };
        // Before 2.10 an image does not say how much it needs: twelve times its size was enough for every packing of its time.
        let init_size = if has_preference { u64::from(u32_at(0x260)) } else { code_size * 12 };
        Ok(Some(Self {
            bytes: header.to_vec(),
            release: release(head, u16_at(0x20e)),
            code,
            payload,
            initrd_max: if protocol >= 0x0203 { u64::from(u32_at(0x22c)) } else { 0x37ff_ffff },
            cmdline_max: if protocol >= 0x0206 { u32_at(0x238) as usize } else { 255 },
            load_address,
            init_size: init_size.max(code_size),
            has_entry64: protocol >= 0x020c && u16_at(0x236) & 1 != 0,
        }))
    }
}

/// The first word of the version text, which lies 0x200 past where the header says.
fn release(head: &[u8], offset: u16) -> Option<String> {
    let text = head.get(usize::from(offset) + 0x200..).filter(|_| offset != 0)?;
    let word: Vec<u8> = text.iter().copied().take(128).take_while(u8::is_ascii_graphic).collect();
    String::from_utf8(word).ok().filter(|word| !word.is_empty())
}

/// `N` bytes at `offset`, if the slice reaches so far.
fn bytes<const N: usize>(slice: &[u8], offset: usize) -> Option<[u8; N]> {
    slice.get(offset..)?.first_chunk().copied()
}
