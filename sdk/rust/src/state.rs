//! How a device writes its state, and reads it back: fields one after the other, little-endian, without names; the schema number
//! says which fields there are.
//!
//! A decoder takes any bytes: it never panics and never allocates more than the state is long.

use tenon_abi::{DeviceError, SavedState};

/// Has a plugin write its state.
pub(crate) fn save(
    schema: u32,
    save: impl FnOnce(&mut Encoder) -> Result<(), DeviceError>,
) -> Result<SavedState, DeviceError> {
    let mut state = Encoder::new();
    save(&mut state)?;
    Ok(SavedState { schema, data: state.into_bytes() })
}

/// Has a plugin that reads schemas 1 to `own` take over a state.
pub(crate) fn restore(
    own: u32,
    state: &SavedState,
    restore: impl FnOnce(&mut Decoder<'_>) -> Result<(), DeviceError>,
) -> Result<(), DeviceError> {
    let found = state.schema;
    if !(1..=own).contains(&found) {
        return Err(DeviceError::Schema(format!("it has schema {found}, and this version reads 1 to {own}")));
    }
    let mut decoder = Decoder::new(found, &state.data);
    restore(&mut decoder)?;
    decoder.finish()
}

/// Writes a state.
#[derive(Clone, Debug, Default)]
pub struct Encoder(Vec<u8>);

impl Encoder {
    /// An empty state.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Writes a byte.
    pub fn u8(&mut self, value: u8) -> &mut Self {
        self.0.push(value);
        self
    }

    /// Writes a 16-bit number.
    pub fn u16(&mut self, value: u16) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    /// Writes a 32-bit number.
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    /// Writes a 64-bit number.
    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    /// Writes a signed 64-bit number.
    pub fn i64(&mut self, value: i64) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    /// Writes a yes or no.
    pub fn bool(&mut self, value: bool) -> &mut Self {
        self.u8(value.into())
    }

    /// Writes a 64-bit number that may be absent, such as a timer's deadline.
    pub fn option(&mut self, value: Option<u64>) -> &mut Self {
        self.bool(value.is_some());
        value.into_iter().for_each(|value| {
            self.u64(value);
        });
        self
    }

    /// Writes bytes whose number is fixed by the schema.
    pub fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// Writes bytes with their number (a `u32`).
    ///
    /// # Panics
    /// There are 4 GiB or more.
    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        let length = u32::try_from(bytes.len()).expect("a device's state is under 4 GiB");
        self.u32(length).raw(bytes)
    }

    /// The bytes written.
    #[must_use]
    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}

/// Reads a state.
#[derive(Clone, Debug)]
pub struct Decoder<'a> {
    schema: u32,
    bytes: &'a [u8],
    offset: usize,
}

impl<'a> Decoder<'a> {
    /// Reads `bytes`, written under `schema`.
    #[must_use]
    pub fn new(schema: u32, bytes: &'a [u8]) -> Self {
        Self { schema, bytes, offset: 0 }
    }

    /// The schema under which the state was written: from 1 to the device's own.
    #[must_use]
    pub fn schema(&self) -> u32 {
        self.schema
    }

    /// Reads a byte.
    ///
    /// # Errors
    /// The state ends before.
    pub fn u8(&mut self) -> Result<u8, DeviceError> {
        Ok(u8::from_le_bytes(self.array()?))
    }

    /// Reads a 16-bit number.
    ///
    /// # Errors
    /// The state ends before.
    pub fn u16(&mut self) -> Result<u16, DeviceError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    /// Reads a 32-bit number.
    ///
    /// # Errors
    /// The state ends before.
    pub fn u32(&mut self) -> Result<u32, DeviceError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    /// Reads a 64-bit number.
    ///
    /// # Errors
    /// The state ends before.
    pub fn u64(&mut self) -> Result<u64, DeviceError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// Reads a signed 64-bit number.
    ///
    /// # Errors
    /// The state ends before.
    pub fn i64(&mut self) -> Result<i64, DeviceError> {
        Ok(i64::from_le_bytes(self.array()?))
    }

    /// Reads a yes or no.
    ///
    /// # Errors
    /// The state ends before, or the byte is neither 0 nor 1.
    pub fn bool(&mut self) -> Result<bool, DeviceError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(self.invalid(&format!("{other} just before it is neither 0 nor 1"))),
        }
    }

    /// Reads a number that may be absent.
    ///
    /// # Errors
    /// The state ends before, or the byte that says whether there is one is neither 0 nor 1.
    pub fn option(&mut self) -> Result<Option<u64>, DeviceError> {
        Ok(if self.bool()? { Some(self.u64()?) } else { None })
    }

    /// Reads `N` bytes.
    ///
    /// # Errors
    /// The state ends before.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], DeviceError> {
        let bytes = self.raw(N)?;
        bytes.try_into().map_err(|_| self.ends(N))
    }

    /// Reads `length` bytes.
    ///
    /// # Errors
    /// The state ends before.
    pub fn raw(&mut self, length: usize) -> Result<&'a [u8], DeviceError> {
        let rest = self.bytes.get(self.offset..).unwrap_or_default();
        let bytes = rest.get(..length).ok_or_else(|| self.ends(length))?;
        self.offset += length;
        Ok(bytes)
    }

    /// Reads bytes with their number, at most `max` of them.
    ///
    /// # Errors
    /// The state ends before, or there are more.
    pub fn bytes(&mut self, max: usize) -> Result<&'a [u8], DeviceError> {
        let length = usize::try_from(self.u32()?).unwrap_or(usize::MAX);
        if length > max {
            return Err(
                self.invalid(&format!("a list there has {length} bytes, but {max} at most are right"))
            );
        }
        self.raw(length)
    }

    /// Says that everything was read. The SDK does this after [`crate::Device::restore`].
    ///
    /// # Errors
    /// Bytes are left.
    pub fn finish(&self) -> Result<(), DeviceError> {
        match self.bytes.len().saturating_sub(self.offset) {
            0 => Ok(()),
            left => Err(self.invalid(&format!("{left} bytes follow its end"))),
        }
    }

    /// The error for a value that was read and cannot be: says where, and `what` is wrong.
    #[must_use]
    pub fn invalid(&self, what: &str) -> DeviceError {
        DeviceError::Invalid(format!("the saved state is damaged at byte {}: {what}", self.offset))
    }

    fn ends(&self, wanted: usize) -> DeviceError {
        let left = self.bytes.len().saturating_sub(self.offset);
        self.invalid(&format!("{wanted} bytes were expected, {left} are left"))
    }
}
