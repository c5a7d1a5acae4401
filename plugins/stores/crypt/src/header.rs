//! What stands at the beginning of the lower store: how the data is encrypted, and its key, wrapped by the administrator's.
//!
//! There are two copies, in blocks of their own, so that one survives whatever happens while the other is written. Numbers are little-endian:
//!
//! | bytes | what |
//! | --- | --- |
//! | 0–7 | `TENONXTS` |
//! | 8–11 | version: 1 |
//! | 12–15 | bytes in a data unit |
//! | 16–23 | where the data begins |
//! | 24–31 | sequence: the copy with the higher one counts |
//! | 32–47 | identity: random |
//! | 48–119 | the volume key, wrapped with the first half of the administrator's key (RFC 3394) |
//! | 120–135 | AES-CMAC of bytes 0–119 under the second half (RFC 4493) |
//! | 136–507 | zeroes |
//! | 508–511 | CRC-32 of bytes 0–507 |
//!
//! The checksum tells damage, the CMAC a wrong key and a header that somebody made up.

use aes::Aes256;
use aes_kw::KwAes256;
use cmac::{Cmac, KeyInit, Mac};
use tenon_sdk::store::{Error, MOST, Result};
use zeroize::Zeroizing;

use crate::xts;

/// How long a copy is.
pub const SIZE: usize = 512;
/// Where the copies are. No block of a lower store holds both.
pub const COPIES: [u64; 2] = [0, 64 << 10];
/// Where the data begins in stores made by this version. It is a multiple of every block size.
pub const DATA: u64 = MOST;

const MAGIC: &[u8; 8] = b"TENONXTS";
const VERSION: u32 = 1;
const WRAPPED: usize = xts::KEY + 8;
const MAC: usize = 120;
const CRC: usize = SIZE - 4;

/// A key of the administrator's, or the volume key. Nothing shows it, and memory forgets it.
pub type Key = Zeroizing<[u8; xts::KEY]>;

/// Reads a key from a setting. The text is in no error.
///
/// # Errors
/// It is no key.
pub fn parse_key(setting: &str, text: &str) -> Result<Key> {
    let wrong = || Error::Invalid(format!("`{setting}` must be 64 bytes as 128 hexadecimal digits"));
    let mut key = Key::new([0; xts::KEY]);
    let digits = text.trim().as_bytes();
    if digits.len() != 2 * xts::KEY {
        return Err(wrong());
    }
    for (byte, pair) in key.iter_mut().zip(digits.chunks_exact(2)) {
        let digit = |c: u8| char::from(c).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        *byte = match (digit(pair[0]), digit(pair[1])) {
            (Some(high), Some(low)) => high << 4 | low,
            _ => return Err(wrong()),
        };
    }
    Ok(key)
}

/// What a copy of the header turns out to be, before any key is tried.
pub enum Copy {
    /// Nothing of ours.
    Foreign,
    /// Ours once.
    Damaged,
    /// Of a version that is not known here.
    Newer(u32),
    /// Whole.
    Whole(Sealed),
}

impl Copy {
    /// Looks at the first [`SIZE`] bytes of where a copy should be.
    #[must_use]
    pub fn look(bytes: &[u8]) -> Self {
        let Some(bytes) = bytes.first_chunk::<SIZE>() else { return Self::Foreign };
        if !bytes.starts_with(MAGIC) {
            return Self::Foreign;
        }
        if crc32fast::hash(&bytes[..CRC]) != u32_at(bytes, CRC) {
            return Self::Damaged;
        }
        match u32_at(bytes, 8) {
            VERSION => Self::Whole(Sealed(Box::new(*bytes))),
            other => Self::Newer(other),
        }
    }
}

/// A copy that is whole. What it says is not to be believed before it was opened with the key.
#[derive(PartialEq, Eq)]
pub struct Sealed(Box<[u8; SIZE]>);

impl Sealed {
    /// The copy with the higher one counts.
    #[must_use]
    pub fn sequence(&self) -> u64 {
        u64_at(&self.0[..], 24)
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.0[..]
    }

    /// Opens the header; none if the key is not the right one.
    ///
    /// # Errors
    /// The key is right, but the header says what cannot be.
    pub fn open(&self, key: &Key) -> Result<Option<Header>> {
        let bytes = &self.0[..];
        if mac(key, &bytes[..MAC]).verify_slice(&bytes[MAC..MAC + 16]).is_err() {
            return Ok(None);
        }
        let mut volume = Key::new([0; xts::KEY]);
        if kek(key).unwrap_key(&bytes[48..48 + WRAPPED], &mut volume[..]).is_err() {
            return Ok(None);
        }
        let (unit, data) = (u32_at(bytes, 12), u64_at(bytes, 16));
        let right = unit.is_power_of_two() && (512..=65536).contains(&unit);
        if !right || data < 2 * COPIES[1] || !data.is_multiple_of(u64::from(unit)) {
            return Err(Error::Other(format!(
                "the header is sealed with this key, but says what cannot be: data units of {unit} bytes from byte {data}"
            )));
        }
        let mut identity = [0; 16];
        identity.copy_from_slice(&bytes[32..48]);
        Ok(Some(Header { unit, data, sequence: self.sequence(), identity, volume }))
    }
}

/// An opened header.
pub struct Header {
    /// Bytes in a data unit.
    pub unit: u32,
    /// Where the data begins.
    pub data: u64,
    /// The copy with the higher one counts.
    pub sequence: u64,
    /// Random; the same for as long as the volume key is.
    pub identity: [u8; 16],
    /// The key that the data is encrypted with.
    pub volume: Key,
}

impl Header {
    /// Closes the header with the administrator's key.
    ///
    /// # Errors
    /// Never, since the length of the key is right.
    pub fn seal(&self, key: &Key) -> Result<Sealed> {
        let mut bytes = Box::new([0; SIZE]);
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.unit.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.data.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[32..48].copy_from_slice(&self.identity);
        kek(key)
            .wrap_key(&self.volume[..], &mut bytes[48..48 + WRAPPED])
            .map_err(|error| Error::Other(format!("the volume key cannot be wrapped: {error}")))?;
        let seal = mac(key, &bytes[..MAC]).finalize().into_bytes();
        bytes[MAC..MAC + 16].copy_from_slice(&seal);
        let crc = crc32fast::hash(&bytes[..CRC]);
        bytes[CRC..].copy_from_slice(&crc.to_le_bytes());
        Ok(Sealed(bytes))
    }
}

fn kek(key: &Key) -> KwAes256 {
    KwAes256::new(xts::halves(key).0)
}

fn mac(key: &Key, bytes: &[u8]) -> Cmac<Aes256> {
    Cmac::new(xts::halves(key).1).chain_update(bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..].first_chunk().map_or(0, |four| u32::from_le_bytes(*four))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..].first_chunk().map_or(0, |eight| u64::from_le_bytes(*eight))
}
