//! An entropy device (virtio 1.2 §5.4): the driver gives it room, and gets random bytes of the host.

use tenon_sdk::virtio::{
    Answer, Attachment, Batch, Config, Decoder, Encoder, Error, Result, VirtioDescription, VirtioDevice,
    complete_all, fill_random,
};

/// The virtio device type of an entropy device.
const ENTROPY: u16 = 4;

/// The device.
pub struct {{type}} {
    /// The most bytes that one request gets.
    most: u32,
    /// How many bytes it has given since power-on.
    given: u64,
}

tenon_sdk::export_virtio_device!({{type}});

impl VirtioDevice for {{type}} {
    fn describe(config: &Config) -> Result<VirtioDescription> {
        most(config)?;
        Ok(VirtioDescription::new(ENTROPY).queue("requests", 64, 0))
    }

    fn start(config: &Config, _attachment: Attachment) -> Result<Self> {
        Ok(Self { most: most(config)?, given: 0 })
    }

    fn requests_ready(&mut self, _queue: u16, batch: &Batch<'_>) {
        let answers: Vec<Answer> = batch
            .iter()
            .map(|request| {
                let written = fill_random(request.handle, 0, request.writable.min(self.most));
                self.given += u64::from(written);
                Answer { request: request.handle, written }
            })
            .collect();
        complete_all(&answers);
    }

    fn adjust(&mut self, key: &str, value: &str) -> Result<()> {
        if key != "most" {
            return Err(Error::Unsupported(format!("`{key}` cannot be changed while the machine runs")));
        }
        self.most = most(&Config::new([(key, value)]))?;
        Ok(())
    }

    fn reset(&mut self) {
        self.given = 0;
    }

    fn save(&self, state: &mut Encoder) -> Result<()> {
        state.u64(self.given);
        Ok(())
    }

    fn restore(&mut self, state: &mut Decoder<'_>) -> Result<()> {
        self.given = state.u64()?;
        Ok(())
    }
}

fn most(config: &Config) -> Result<u32> {
    Ok(config.number_in("most", 1..=65536)?.unwrap_or(4096))
}
