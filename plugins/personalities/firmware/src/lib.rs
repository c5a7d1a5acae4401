//! The firmware personality: the machine starts as a PC does, in real mode at the last 16 bytes below 4 GiB, and firmware such as OVMF looks for an operating
//! system on the machine's disks.
//!
//! The host maps the image as ROM so that it ends at 4 GiB; nothing is put into RAM. This plugin looks whether the image can be meant, and says how the
//! first vCPU starts.
//!
//! Images: `firmware`. Options: none.

use tenon_sdk::guest::mebibytes;
use tenon_sdk::personality::{
    Boot, Config, CpuState, Error, Image, Machine, Memory, Personality, Result, StopMethod,
};

/// A CPU's first instruction after reset lies this far before 4 GiB, in a segment whose base is the last 64 KiB.
const RESET_VECTOR: u64 = 16;
const RESET_OFFSET: u16 = 0xfff0;
const RESET_SELECTOR: u16 = 0xf000;
const RESET_BASE: u64 = 0xffff_0000;
const PAGE: u64 = 4096;
/// The interrupt controllers end 16 MiB before 4 GiB or lie further down.
const LARGEST: u64 = 16 << 20;
/// A volume of UEFI firmware says so at this offset (PI 1.7 vol. 3 §3.2.1).
const VOLUME_SIGNATURE: (usize, &[u8]) = (40, b"_FVH");
const VOLUME_HEADER: u32 = 64;

/// The personality.
pub struct Firmware;

tenon_sdk::export_personality!(Firmware);

impl Personality for Firmware {
    fn load(_machine: &Machine, _memory: &Memory<'_>, images: Vec<Image>, _options: &Config) -> Result<Boot> {
        let image = images.into_iter().find(|image| image.role() == "firmware");
        let image = image.ok_or_else(|| Error::Invalid("the image `firmware` is missing".into()))?;
        let size = image.size();
        if size == 0 || !size.is_multiple_of(PAGE) || size > LARGEST {
            return Err(Error::NotMine(format!(
                "looked for firmware of whole 4 KiB pages, at most 16 MiB; found {size} bytes"
            )));
        }
        let vector = image.read_exact(size - RESET_VECTOR, RESET_VECTOR)?;
        if vector.iter().all(|byte| matches!(byte, 0 | 0xff)) {
            return Err(Error::NotMine(
                "looked for the instruction at which a CPU starts, 16 bytes before the end; found nothing there".into(),
            ));
        }
        let kind = if has_volume(&image)? { "UEFI firmware" } else { "PC firmware" };
        let mut vcpu = CpuState::real_mode(RESET_SELECTOR, RESET_OFFSET);
        vcpu.cs.base = RESET_BASE;
        Ok(Boot { summary: format!("{kind} ({})", mebibytes(size)), vcpu, stop: StopMethod::PowerButton })
    }
}

/// Whether one of the image's pages begins with a volume's header.
fn has_volume(image: &Image) -> Result<bool> {
    let (at, signature) = VOLUME_SIGNATURE;
    for page in 0..image.size() / PAGE {
        let header = image.read(page * PAGE, VOLUME_HEADER)?;
        if header.get(at..at + signature.len()) == Some(signature) {
            return Ok(true);
        }
    }
    Ok(false)
}
