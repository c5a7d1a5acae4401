//! Device plugin: a virtio entropy device (virtio 1.2 §5.4). Every request is filled with random bytes of the host; the bytes never pass through the plugin.
//!
//! One request gets at most 64 KiB, whatever its length: a device may give fewer bytes than there is room for, and a driver that
//! wants gigabytes should not hold up the host for them.

use tenon_sdk::virtio::{
    self, Answer, Attachment, Batch, Config, Decoder, Encoder, Result, VirtioDescription, VirtioDevice,
};

const DEVICE_TYPE: u16 = 4;
/// The most bytes for one request.
const MOST: u32 = 64 << 10;

/// The entropy device.
pub struct Rng;

tenon_sdk::export_virtio_device!(Rng);

impl VirtioDevice for Rng {
    fn describe(_config: &Config) -> Result<VirtioDescription> {
        Ok(VirtioDescription::new(DEVICE_TYPE).queue("requests", 64, 0))
    }

    fn start(_config: &Config, _attachment: Attachment) -> Result<Self> {
        Ok(Self)
    }

    fn requests_ready(&mut self, _queue: u16, batch: &Batch<'_>) {
        let answers: Vec<Answer> = batch
            .iter()
            .map(|request| Answer {
                request: request.handle,
                written: virtio::fill_random(request.handle, 0, request.writable.min(MOST)),
            })
            .collect();
        virtio::complete_all(&answers);
    }

    fn reset(&mut self) {}

    fn save(&self, _state: &mut Encoder) -> Result<()> {
        Ok(())
    }

    fn restore(&mut self, _state: &mut Decoder<'_>) -> Result<()> {
        Ok(())
    }
}
