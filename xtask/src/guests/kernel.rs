//! Takes the kernel proper out of a bzImage (Linux, Documentation/arch/x86/boot.rst): some hypervisors that tests compare with want the ELF file.

use std::io::Read;

use anyhow::{Context, Result, bail};

const LZ4_LEGACY: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// An lz4 legacy frame is a row of blocks that each unpack to at most this.
const LZ4_BLOCK: usize = 8 << 20;

/// The ELF file in a bzImage.
///
/// # Errors
/// It is no bzImage, or is packed in a way that Debian does not use.
pub(crate) fn unpack(image: &[u8]) -> Result<Vec<u8>> {
    if image.get(0x202..0x206) != Some(b"HdrS") {
        bail!("not a bzImage: no `HdrS` at 0x202");
    }
    let setup_sectors = usize::from(image[0x1f1]);
    let start = (setup_sectors + 1) * 512 + word(image, 0x248)?;
    let payload =
        image.get(start..start + word(image, 0x24c)?).context("the bzImage's payload lies outside it")?;
    let elf = match payload.first_chunk::<4>() {
        Some(&LZ4_LEGACY) => lz4(payload)?,
        Some(&ZSTD) => zstd(payload)?,
        other => bail!("the bzImage's payload is neither lz4 nor zstd; it begins with {other:02x?}"),
    };
    if !elf.starts_with(b"\x7fELF") {
        bail!("the bzImage's payload is no ELF file");
    }
    Ok(elf)
}

fn word(bytes: &[u8], at: usize) -> Result<usize> {
    let bytes = bytes.get(at..at + 4).and_then(|bytes| bytes.first_chunk::<4>()).context("cut short")?;
    Ok(u32::from_le_bytes(*bytes) as usize)
}

fn lz4(payload: &[u8]) -> Result<Vec<u8>> {
    let mut elf = Vec::new();
    let mut at = 4;
    // The last word is the unpacked length, which the kernel's build adds.
    while at + 4 < payload.len() {
        let length = word(payload, at)?;
        let block = payload.get(at + 4..at + 4 + length).context("an lz4 block is cut short")?;
        elf.extend(lz4_flex::block::decompress(block, LZ4_BLOCK)?);
        at += 4 + length;
    }
    Ok(elf)
}

fn zstd(payload: &[u8]) -> Result<Vec<u8>> {
    let mut elf = Vec::new();
    ruzstd::decoding::StreamingDecoder::new(payload)?.read_to_end(&mut elf)?;
    Ok(elf)
}
