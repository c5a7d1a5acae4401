//! Saved state: named, versioned units in one container with magic, version and checksum.
//!
//! Layout, little-endian: `TENONSTA`, container version (u32), number of units (u32); then for each unit: length of its name (u16),
//! name (UTF-8), schema (u32), length of its data (u64), data; at the end the CRC-32C of everything before it (u32).

use std::collections::BTreeMap;

const MAGIC: &[u8; 8] = b"TENONSTA";
const VERSION: u32 = 1;

/// One unit: what one part of the machine saved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    /// The schema of `data`, numbered by the part itself.
    pub schema: u32,
    /// The state in the part's own encoding.
    pub data: Vec<u8>,
}

/// A saved state that cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum StateError {
    /// It does not begin as one.
    #[error("this is not a saved machine state: it does not begin with `TENONSTA`")]
    Magic,
    /// It is of another container version.
    #[error("the saved state has container version {0}; this Tenon reads version {VERSION}")]
    Version(u32),
    /// Bytes are missing.
    #[error("the saved state ends in the middle, in {0}")]
    Truncated(&'static str),
    /// Bytes have changed.
    #[error("the saved state is damaged: its checksum is {found:#010x}, its content gives {computed:#010x}")]
    Checksum {
        /// What the file says.
        found: u32,
        /// What the content gives.
        computed: u32,
    },
    /// A unit is not there.
    #[error("the saved state has no unit `{0}`")]
    Missing(String),
    /// A unit that nobody asked for.
    #[error("the saved state has a unit `{0}` that this machine does not have")]
    Unknown(String),
    /// Two units of the same name.
    #[error("the saved state has the unit `{0}` twice")]
    Twice(String),
}

/// A container of units.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Units(BTreeMap<String, Unit>);

impl Units {
    /// An empty container.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a unit.
    ///
    /// # Errors
    /// There is one of that name.
    pub fn put(&mut self, name: &str, unit: Unit) -> Result<(), StateError> {
        match self.0.insert(name.to_owned(), unit) {
            None => Ok(()),
            Some(_) => Err(StateError::Twice(name.to_owned())),
        }
    }

    /// Takes a unit out.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn take(&mut self, name: &str) -> Result<Unit, StateError> {
        self.0.remove(name).ok_or_else(|| StateError::Missing(name.to_owned()))
    }

    /// Says that all units were taken.
    ///
    /// # Errors
    /// One is left; it is named.
    pub fn finish(self) -> Result<(), StateError> {
        self.0.into_keys().next().map_or(Ok(()), |name| Err(StateError::Unknown(name)))
    }

    /// The container as bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend(VERSION.to_le_bytes());
        out.extend(u32::try_from(self.0.len()).unwrap_or(u32::MAX).to_le_bytes());
        for (name, unit) in &self.0 {
            let length = u16::try_from(name.len()).unwrap_or(u16::MAX);
            out.extend(length.to_le_bytes());
            out.extend(&name.as_bytes()[..usize::from(length)]);
            out.extend(unit.schema.to_le_bytes());
            out.extend((unit.data.len() as u64).to_le_bytes());
            out.extend(&unit.data);
        }
        out.extend(crc32c(&out).to_le_bytes());
        out
    }

    /// Reads a container.
    ///
    /// # Errors
    /// The bytes are not a whole, undamaged container of this version.
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let mut rest = bytes.strip_prefix(MAGIC).ok_or(StateError::Magic)?;
        let version = u32::from_le_bytes(take(&mut rest, "the header")?);
        if version != VERSION {
            return Err(StateError::Version(version));
        }
        let (body, sum) = bytes.split_last_chunk::<4>().ok_or(StateError::Truncated("the checksum"))?;
        let (found, computed) = (u32::from_le_bytes(*sum), crc32c(body));
        if found != computed {
            return Err(StateError::Checksum { found, computed });
        }
        let count = u32::from_le_bytes(take(&mut rest, "the header")?);
        let mut units = Self::new();
        for _ in 0..count {
            let length = u16::from_le_bytes(take(&mut rest, "a unit's name")?).into();
            let name = String::from_utf8_lossy(cut(&mut rest, length, "a unit's name")?).into_owned();
            let schema = u32::from_le_bytes(take(&mut rest, "a unit's schema")?);
            let length = u64::from_le_bytes(take(&mut rest, "a unit's length")?);
            let length = usize::try_from(length).map_err(|_| StateError::Truncated("a unit's data"))?;
            let data = cut(&mut rest, length, "a unit's data")?.to_vec();
            units.put(&name, Unit { schema, data })?;
        }
        Ok(units)
    }
}

fn cut<'a>(rest: &mut &'a [u8], length: usize, what: &'static str) -> Result<&'a [u8], StateError> {
    let (head, tail) = rest.split_at_checked(length).ok_or(StateError::Truncated(what))?;
    *rest = tail;
    Ok(head)
}

fn take<const N: usize>(rest: &mut &[u8], what: &'static str) -> Result<[u8; N], StateError> {
    let (head, tail) = rest.split_first_chunk::<N>().ok_or(StateError::Truncated(what))?;
    *rest = tail;
    Ok(*head)
}

/// CRC-32C (Castagnoli), as in iSCSI (RFC 3720, appendix B.4).
fn crc32c(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut n = 0;
        while n < 256 {
            #[allow(clippy::cast_possible_truncation, reason = "n is below 256")]
            let mut value = n as u32;
            let mut bit = 0;
            while bit < 8 {
                value = if value & 1 == 1 { value >> 1 ^ 0x82f6_3b78 } else { value >> 1 };
                bit += 1;
            }
            table[n] = value;
            n += 1;
        }
        table
    };
    !bytes.iter().fold(!0, |sum, byte| {
        let low = usize::from(sum.to_le_bytes()[0] ^ byte);
        TABLE[low] ^ sum >> 8
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Units {
        let mut units = Units::new();
        units.put("serial", Unit { schema: 1, data: vec![1, 2, 3] }).unwrap();
        units.put("vcpu0", Unit { schema: 7, data: vec![] }).unwrap();
        units
    }

    #[test]
    fn what_was_saved_comes_back() {
        assert_eq!(Units::decode(&sample().encode()).unwrap(), sample());
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn every_truncation_and_every_flipped_bit_is_refused() {
        let bytes = sample().encode();
        for length in 0..bytes.len() {
            assert!(Units::decode(&bytes[..length]).is_err(), "{length} bytes were accepted");
        }
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(Units::decode(&damaged).is_err(), "bit {bit} flipped was accepted");
        }
    }

    #[test]
    fn missing_and_unknown_units_are_named() {
        let mut units = sample();
        assert_eq!(units.take("rtc"), Err(StateError::Missing("rtc".into())));
        units.take("serial").unwrap();
        assert_eq!(units.finish(), Err(StateError::Unknown("vcpu0".into())));
    }
}
