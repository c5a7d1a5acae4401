//! The least device: one port that answers a text, a byte for each read and 0 at its end. A write of anything begins anew.

use tenon_sdk::device::{Attachment, Config, Decoder, Description, Device, Encoder, Result};

const TEXT: &str = "Hello from a plugin!\n";

/// The device.
pub struct HelloPort {
    text: Vec<u8>,
    /// How many bytes the guest has read.
    position: usize,
}

tenon_sdk::export_device!(HelloPort);

impl Device for HelloPort {
    fn describe(config: &Config) -> Result<Description> {
        Ok(Description::new().pio("port", config.number("base")?.unwrap_or(0x500), 1))
    }

    fn start(config: &Config, _attachment: Attachment) -> Result<Self> {
        Ok(Self { text: config.text("text").unwrap_or(TEXT).into(), position: 0 })
    }

    fn read(&mut self, _region: u32, _offset: u64, _size: u8) -> u64 {
        let byte = self.text.get(self.position).copied();
        self.position += usize::from(byte.is_some());
        byte.unwrap_or(0).into()
    }

    fn write(&mut self, _region: u32, _offset: u64, _size: u8, _value: u64) {
        self.position = 0;
    }

    fn reset(&mut self) {
        self.position = 0;
    }

    fn save(&self, state: &mut Encoder) -> Result<()> {
        state.u64(self.position as u64);
        Ok(())
    }

    fn restore(&mut self, state: &mut Decoder<'_>) -> Result<()> {
        let position = state.u64()?;
        self.position = usize::try_from(position).unwrap_or(usize::MAX).min(self.text.len());
        Ok(())
    }
}
