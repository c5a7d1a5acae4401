//! Device plugin: the debug exit port. A guest that was written to be tested ends its machine with a verdict: a write of `v`, of any size and to
//! any of the four ports, ends it with exit status `v & 0xff`.
//!
//! The status is `v` itself: 0 is success. (QEMU's `isa-debug-exit` gives `2 v + 1`, so that no guest can end with 0.)
//! Reads give all ones. The device has no state.

use tenon_sdk::device::{
    Attachment, Config, Decoder, Description, Device, Encoder, Request, Result, request,
};

/// How many ports the device has.
const PORTS: u16 = 4;

/// The debug exit port.
pub struct Exit;

tenon_sdk::export_device!(Exit);

impl Device for Exit {
    fn describe(config: &Config) -> Result<Description> {
        let base = config.number_in("base", 0..=0xfffc_u16)?.unwrap_or(0xf4);
        Ok(Description::new().pio("exit", base, PORTS))
    }

    fn start(_config: &Config, _attachment: Attachment) -> Result<Self> {
        Ok(Self)
    }

    fn read(&mut self, _region: u32, _offset: u64, _size: u8) -> u64 {
        u64::MAX
    }

    fn write(&mut self, _region: u32, _offset: u64, _size: u8, value: u64) {
        let [status, ..] = value.to_le_bytes();
        request(Request::Exit(status));
    }

    fn reset(&mut self) {}

    fn save(&self, _state: &mut Encoder) -> Result<()> {
        Ok(())
    }

    fn restore(&mut self, _state: &mut Decoder<'_>) -> Result<()> {
        Ok(())
    }
}
