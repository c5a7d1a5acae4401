//! Saved state of the platform as bytes: little-endian fields, one after another, without padding.

/// Writes fields.
#[derive(Default)]
pub(crate) struct Writer(pub(crate) Vec<u8>);

/// Reads fields.
pub(crate) struct Reader<'a>(pub(crate) &'a [u8]);

macro_rules! numbers {
    ($($name:ident)*) => {
        impl Writer {
            $(pub(crate) fn $name(&mut self, value: $name) {
                self.0.extend(value.to_le_bytes());
            })*
        }

        impl Reader<'_> {
            $(pub(crate) fn $name(&mut self) -> Result<$name, String> {
                let (bytes, rest) = self.0.split_first_chunk().ok_or("the state ends in the middle")?;
                self.0 = rest;
                Ok($name::from_le_bytes(*bytes))
            })*
        }
    };
}

numbers!(u8 u16 u32 u64);

impl Writer {
    /// A number of things, at most `u32::MAX`.
    pub(crate) fn count(&mut self, count: usize) {
        self.u32(u32::try_from(count).unwrap_or(u32::MAX));
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.count(bytes.len());
        self.0.extend(bytes);
    }
}

impl<'a> Reader<'a> {
    /// A number of things of which each has at least one byte: no more than there are bytes.
    pub(crate) fn count(&mut self) -> Result<usize, String> {
        let count = self.u32()? as usize;
        if count > self.0.len() { Err("the state ends in the middle".into()) } else { Ok(count) }
    }

    pub(crate) fn bytes(&mut self) -> Result<&'a [u8], String> {
        let count = self.count()?;
        let (bytes, rest) = self.0.split_at(count);
        self.0 = rest;
        Ok(bytes)
    }

    pub(crate) fn text(&mut self) -> Result<&'a str, String> {
        std::str::from_utf8(self.bytes()?).map_err(|error| error.to_string())
    }

    pub(crate) fn end(&self) -> Result<(), String> {
        if self.0.is_empty() { Ok(()) } else { Err(format!("{} bytes too many", self.0.len())) }
    }
}
