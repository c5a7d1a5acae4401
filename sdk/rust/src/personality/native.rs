//! The personality as a native plugin: the table that calls it, and the host behind the host's table.
#![allow(unsafe_code, reason = "the native tables are a foreign-function interface")]

use std::ffi::c_void;

use tenon_abi::{Bytes, Level, PersonalityHost, PersonalityTable, Plugin, Sink, Status, wire};

use super::{Config, Error, Personality, Result, hosted};
use crate::native::{answer, guard};

/// The plugin that [`crate::export_personality!`] exports.
#[must_use]
pub const fn plugin(table: &'static PersonalityTable) -> Plugin {
    Plugin { personality: Some(table), ..Plugin::EMPTY }
}

/// The table of a personality.
#[must_use]
pub const fn table<P: Personality>() -> PersonalityTable {
    PersonalityTable { size: PersonalityTable::SIZE, load: load::<P> }
}

/// The host's table with its context, good during `load`.
struct Remote<'a> {
    table: &'a PersonalityHost,
    context: *mut c_void,
}

/// What a call to the host came to.
fn outcome(status: Status, error: &[u8]) -> Result<()> {
    if status == Status::OK {
        return Ok(());
    }
    Err(wire::decode_personality_error(error).unwrap_or_else(|error| Error::Other(error.to_string())))
}

// In all of these: the host's function is called during `load`, with the context that came with the table, and what is lent to it
// lives for the call.
impl hosted::Host for Remote<'_> {
    fn log(&self, level: Level, message: &str) {
        // SAFETY: see above.
        unsafe { (self.table.log_log)(self.context, level as u32, Bytes::new(message.as_bytes())) }
    }

    fn image_role(&self, image: u32) -> String {
        let mut role = Vec::new();
        // SAFETY: see above.
        unsafe { (self.table.image_role)(self.context, image, Sink::to(&mut role)) };
        String::from_utf8_lossy(&role).into_owned()
    }

    fn image_size(&self, image: u32) -> u64 {
        // SAFETY: see above.
        unsafe { (self.table.image_size)(self.context, image) }
    }

    fn image_read(&self, image: u32, offset: u64, len: u32) -> Result<Vec<u8>> {
        let left = self.image_size(image).saturating_sub(offset);
        let len = len.min(u32::try_from(left).unwrap_or(u32::MAX));
        let (mut buffer, mut error) = (vec![0; len as usize], Vec::new());
        let mut done = 0;
        // SAFETY: see above; the buffer has room for `len` bytes.
        let status = unsafe {
            let error = Sink::to(&mut error);
            (self.table.image_read)(
                self.context,
                image,
                offset,
                buffer.as_mut_ptr(),
                len,
                &raw mut done,
                error,
            )
        };
        outcome(status, &error)?;
        buffer.truncate(done as usize);
        Ok(buffer)
    }

    fn memory_write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        let mut error = Vec::new();
        // SAFETY: see above.
        let status = unsafe {
            (self.table.memory_write)(self.context, address, Bytes::new(bytes), Sink::to(&mut error))
        };
        outcome(status, &error)
    }

    fn memory_copy_image(&self, address: u64, image: u32, offset: u64, len: u64) -> Result<()> {
        let mut error = Vec::new();
        // SAFETY: see above.
        let status = unsafe {
            (self.table.memory_copy_image)(self.context, address, image, offset, len, Sink::to(&mut error))
        };
        outcome(status, &error)
    }
}

unsafe extern "C" fn load<P: Personality>(
    host: *const PersonalityHost,
    context: *mut c_void,
    machine: Bytes<'_>,
    images: u32,
    options: Bytes<'_>,
    output: Sink,
) -> Status {
    // SAFETY: the host gives its table, good during this call, or null.
    let table = unsafe { host.as_ref() };
    let Some(table) = table.filter(|table| table.size >= PersonalityHost::SIZE) else {
        return Status::TRAPPED;
    };
    let remote = Remote { table, context };
    let panicked = |message: &str| {
        // SAFETY: called during a call from the host, with the context that it gave.
        unsafe { (table.panicked)(context, Bytes::new(message.as_bytes())) }
    };
    let load = || -> Result<Vec<u8>> {
        // SAFETY: the bytes came in this call.
        let (machine, options) = unsafe { (machine.as_slice(), options.as_slice()) };
        let machine = wire::decode_machine(machine).map_err(|error| Error::Other(error.to_string()))?;
        let options = wire::decode_settings(options).map_err(|error| Error::Other(error.to_string()))?;
        let (memory, images) = hosted::handles(images);
        P::load(&machine, &memory, images, &Config::new(options)).map(|boot| wire::encode_boot(&boot))
    };
    guard(panicked, || {
        let loaded = hosted::enter(&remote, load);
        // SAFETY: the sink came in this call.
        unsafe { answer(output, loaded.map_err(|error| wire::encode_personality_error(&error))) }
    })
}
