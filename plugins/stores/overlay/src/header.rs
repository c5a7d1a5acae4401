//! The header of a store for changes.
//!
//! There are two copies, in clusters 0 and 1; they are written in turn, so that one is whole whatever happens while the other is written. The table begins at
//! cluster 2, clusters with data behind it. Numbers are little-endian:
//!
//! | bytes | what |
//! | --- | --- |
//! | 0–7 | `TENONOVL` |
//! | 8–11 | version: 1 |
//! | 12–15 | the block size of the copy when it was made |
//! | 16–23 | how long the base is |
//! | 24–31 | how long the copy is |
//! | 32–39 | the first cluster that was never used: no entry of the table names it or one behind it |
//! | 40–47 | sequence: the copy of the header with the higher one counts |
//! | 48–507 | zeroes |
//! | 508–511 | CRC-32 of bytes 0–507 |

use tenon_sdk::store::{Error, Result};

/// How much of a cluster the header takes.
pub const SIZE: usize = 512;
/// The unit of space.
pub const CLUSTER: u64 = 64 << 10;
/// Where the table begins.
pub const TABLE: u64 = 2;
/// The longest copy.
pub const LONGEST: u64 = 4 << 40;

const MAGIC: &[u8; 8] = b"TENONOVL";
const VERSION: u32 = 1;
const CRC: usize = SIZE - 4;

/// What the header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The block size of the copy when it was made.
    pub block: u32,
    /// How long the base is.
    pub base: u64,
    /// How long the copy is.
    pub size: u64,
    /// The first cluster that was never used.
    pub next: u64,
    /// The copy of the header with the higher one counts.
    pub sequence: u64,
}

impl Header {
    /// The first cluster behind the table.
    #[must_use]
    pub fn first_data(&self) -> u64 {
        TABLE + (self.size.div_ceil(CLUSTER) * 8).div_ceil(CLUSTER)
    }

    /// The header as it is stored.
    #[must_use]
    pub fn encode(&self) -> [u8; SIZE] {
        let mut bytes = [0; SIZE];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.block.to_le_bytes());
        for (at, number) in [(16, self.base), (24, self.size), (32, self.next), (40, self.sequence)] {
            bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
        }
        let crc = crc32fast::hash(&bytes[..CRC]);
        bytes[CRC..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads a copy of the header; none if it is not whole.
    ///
    /// # Errors
    /// It is whole, but of another version or cannot be.
    pub fn decode(bytes: &[u8]) -> Result<Option<Self>> {
        let Some(bytes) = bytes.first_chunk::<SIZE>() else { return Ok(None) };
        let u32_at = |at: usize| bytes[at..].first_chunk().map_or(0, |four| u32::from_le_bytes(*four));
        let u64_at = |at: usize| bytes[at..].first_chunk().map_or(0, |eight| u64::from_le_bytes(*eight));
        if !bytes.starts_with(MAGIC) || u32_at(CRC) != crc32fast::hash(&bytes[..CRC]) {
            return Ok(None);
        }
        if u32_at(8) != VERSION {
            return Err(Error::Unsupported(format!(
                "the header has version {}, and this plugin reads version {VERSION}: use a newer one",
                u32_at(8)
            )));
        }
        let header = Self {
            block: u32_at(12),
            base: u64_at(16),
            size: u64_at(24),
            next: u64_at(32),
            sequence: u64_at(40),
        };
        let Self { block, base, size, next, .. } = header;
        let right =
            block.is_power_of_two() && (512..=65536).contains(&block) && size.is_multiple_of(block.into());
        if !right || size > LONGEST || base > size || next < header.first_data() || next > 1 << 47 {
            return Err(Error::Other(format!("the header says what cannot be: {header:?}")));
        }
        Ok(Some(header))
    }
}
