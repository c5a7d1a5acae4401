//! A personality that loads a raw image to 1 MiB and enters it at its first byte, in flat 32-bit mode, with the address of
//! a zero-terminated command line in EBX.

use tenon_sdk::personality::{Boot, Config, CpuState, Error, Image, Machine, Memory, Personality, Result, StopMethod};

/// Where the image goes.
pub const IMAGE: u32 = 0x10_0000;
/// Where the command line goes.
pub const COMMAND_LINE: u32 = 0x8000;

/// The personality.
pub struct {{type}};

tenon_sdk::export_personality!({{type}});

impl Personality for {{type}} {
    fn load(_machine: &Machine, memory: &Memory<'_>, images: Vec<Image>, options: &Config) -> Result<Boot> {
        let kernel = images
            .iter()
            .find(|image| image.role() == "kernel")
            .ok_or_else(|| Error::Invalid("there is no image `kernel`".into()))?;
        memory.copy_image(IMAGE.into(), kernel, 0, kernel.size())?;
        let mut command_line = options.text("cmdline").unwrap_or("").as_bytes().to_vec();
        command_line.push(0);
        memory.write(COMMAND_LINE.into(), &command_line)?;
        let mut vcpu = CpuState::protected_mode(IMAGE);
        vcpu.general[CpuState::RBX] = COMMAND_LINE.into();
        let summary = format!("raw image, {} bytes", kernel.size());
        Ok(Boot { summary, vcpu, stop: StopMethod::None })
    }
}
