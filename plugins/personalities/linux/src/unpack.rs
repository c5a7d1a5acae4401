//! Unpacks the payload of a bzImage: the kernel proper, compressed by one of the five ways that Linux's build offers here.
//!
//! It knows nothing of kernels: bytes in, bytes out. The build appends the unpacked length to the payload as a little-endian
//! 32-bit word (gzip ends with such a word anyway), so the output is allocated once and a wrong length is noticed.

use std::io::Read;

/// The most that a payload may unpack to. Kernels take some 50 MiB; the rest of the plugin's memory is for the packed bytes
/// and the decoder.
pub(crate) const MAX_UNPACKED: usize = 512 << 20;
/// The most memory for an xz or lzma decoder's dictionary, in KiB: Linux is packed with 32 to 128 MiB.
const MAX_DICTIONARY_KIB: u32 = 192 << 10;
/// A block of the lz4 legacy frame unpacks to this much, but for the last one.
const LZ4_LEGACY_BLOCK: usize = 8 << 20;
/// Begins an lz4 legacy frame: what `lz4 -l` makes and Linux's build uses.
const LZ4_LEGACY_MAGIC: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];

/// How a payload is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Packing {
    /// RFC 1952.
    Gzip,
    /// The .xz container, with the x86 branch filter before LZMA2.
    Xz,
    /// RFC 8878.
    Zstd,
    /// The lz4 legacy frame.
    Lz4,
    /// The .lzma ("alone") format.
    Lzma,
}

impl Packing {
    /// Tells the packing by the first bytes.
    pub(crate) fn detect(payload: &[u8]) -> Option<Self> {
        match payload {
            [0x1f, 0x8b, 0x08, ..] => Some(Self::Gzip),
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Some(Self::Xz),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(Self::Zstd),
            [0x02, 0x21, 0x4c, 0x18, ..] => Some(Self::Lz4),
            // Properties byte for lc=3 lp=0 pb=2, then a dictionary that is a multiple of 64 KiB: what every encoder writes.
            [0x5d, 0, 0, ..] => Some(Self::Lzma),
            _ => None,
        }
    }

    /// The name that people know.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Zstd => "zstd",
            Self::Lz4 => "lz4",
            Self::Lzma => "lzma",
        }
    }

    /// Unpacks `payload`, of which the last four bytes hold the unpacked length.
    ///
    /// # Errors
    /// Says what is damaged, for a person to read.
    pub(crate) fn unpack(self, payload: &[u8]) -> Result<Vec<u8>, String> {
        let (packed, trailer) =
            payload.split_last_chunk::<4>().ok_or("it is shorter than its length word")?;
        let length = u32::from_le_bytes(*trailer) as usize;
        if length > MAX_UNPACKED {
            return Err(format!(
                "it says that it unpacks to {} MiB; at most {} MiB are allowed",
                length >> 20,
                MAX_UNPACKED >> 20
            ));
        }
        let unpacked = match self {
            // The length word is gzip's own trailer and belongs to the stream.
            Self::Gzip => read_exactly(flate2::bufread::GzDecoder::new(payload), length)?,
            Self::Xz => {
                read_exactly(lzma_rust2::XzReader::new_mem_limit(packed, false, MAX_DICTIONARY_KIB), length)?
            }
            Self::Zstd => read_exactly(
                ruzstd::decoding::StreamingDecoder::new(packed).map_err(|e| e.to_string())?,
                length,
            )?,
            Self::Lz4 => lz4_legacy(packed, length)?,
            Self::Lzma => read_exactly(
                lzma_rust2::LzmaReader::new_mem_limit(packed, MAX_DICTIONARY_KIB, None)
                    .map_err(|e| e.to_string())?,
                length,
            )?,
        };
        if unpacked.len() == length {
            Ok(unpacked)
        } else {
            Err(format!("it unpacks to {} bytes but should to {length}", unpacked.len()))
        }
    }
}

/// Reads a decoder to its end, but no further than one byte past `length`.
fn read_exactly(decoder: impl Read, length: usize) -> Result<Vec<u8>, String> {
    let mut unpacked = Vec::with_capacity(length + 1);
    decoder.take(length as u64 + 1).read_to_end(&mut unpacked).map_err(|error| error.to_string())?;
    Ok(unpacked)
}

/// A legacy frame is a magic number and then blocks to the end of the data: a 32-bit packed length and an lz4 block each.
/// No crate reads it whole; the magic number may come again between blocks, where two frames were joined.
fn lz4_legacy(mut packed: &[u8], length: usize) -> Result<Vec<u8>, String> {
    let mut unpacked = vec![0; length];
    let mut done = 0;
    while !packed.is_empty() {
        let (word, rest) = packed.split_first_chunk::<4>().ok_or("its last lz4 block has no length")?;
        packed = rest;
        if *word == LZ4_LEGACY_MAGIC {
            continue;
        }
        let size = u32::from_le_bytes(*word) as usize;
        let (block, rest) = packed
            .split_at_checked(size)
            .ok_or_else(|| format!("an lz4 block of {size} bytes ends past the payload's end"))?;
        packed = rest;
        let room = LZ4_LEGACY_BLOCK.min(length - done);
        done += lz4_flex::block::decompress_into(block, &mut unpacked[done..done + room])
            .map_err(|error| format!("the lz4 block that unpacks to byte {done}: {error}"))?;
    }
    unpacked.truncate(done);
    Ok(unpacked)
}
