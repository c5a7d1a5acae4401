//! A device with two ports: the first identifies it, the second keeps what was last written to it.

use tenon_sdk::device::{Attachment, Config, Decoder, Description, Device, Encoder, Result};

/// What the first port reads as.
pub const IDENTITY: u8 = 0x54;

/// The device.
pub struct {{type}} {
    scratch: u8,
}

tenon_sdk::export_device!({{type}});

impl Device for {{type}} {
    fn describe(config: &Config) -> Result<Description> {
        let base = config.number("base")?.unwrap_or(0x510);
        Ok(Description::new().pio("registers", base, 2))
    }

    fn start(_config: &Config, _attachment: Attachment) -> Result<Self> {
        Ok(Self { scratch: 0 })
    }

    fn read(&mut self, _region: u32, offset: u64, size: u8) -> u64 {
        match (offset, size) {
            (0, 1) => IDENTITY.into(),
            (1, 1) => self.scratch.into(),
            _ => u64::MAX,
        }
    }

    fn write(&mut self, _region: u32, offset: u64, size: u8, value: u64) {
        if (offset, size) == (1, 1) {
            self.scratch = value as u8;
        }
    }

    fn reset(&mut self) {
        self.scratch = 0;
    }

    fn save(&self, state: &mut Encoder) -> Result<()> {
        state.u8(self.scratch);
        Ok(())
    }

    fn restore(&mut self, state: &mut Decoder<'_>) -> Result<()> {
        self.scratch = state.u8()?;
        Ok(())
    }
}
