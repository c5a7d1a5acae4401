//! Bytes that can be read and placed into guest memory, wherever they are.

use crate::personality::{ErrorCode, Image, Memory};

/// How much is passed to the host in one call: large enough that calls cost nothing, small enough that copies do not count.
const CHUNK: usize = 4 << 20;

/// An image, or bytes in memory.
pub trait Source {
    /// The length in bytes.
    fn size(&self) -> u64;

    /// Reads exactly `len` bytes at `offset`.
    ///
    /// # Errors
    /// The source ends before, or cannot be read.
    fn read_exact(&self, offset: u64, len: usize) -> Result<Vec<u8>, ErrorCode>;

    /// Copies `len` bytes at `offset` to guest-physical `address`.
    ///
    /// # Errors
    /// The source ends before, or the range is not RAM.
    fn place(&self, memory: &Memory, address: u64, offset: u64, len: u64) -> Result<(), ErrorCode>;
}

impl Source for Image {
    fn size(&self) -> u64 {
        Image::size(self)
    }

    fn read_exact(&self, offset: u64, len: usize) -> Result<Vec<u8>, ErrorCode> {
        let end = Image::size(self);
        if offset.checked_add(len as u64).is_none_or(|last| last > end) {
            return Err(ended(offset, len as u64, end));
        }
        let mut bytes = Vec::with_capacity(len);
        while bytes.len() < len {
            let want = (len - bytes.len()).min(CHUNK);
            let chunk = self.read(offset + bytes.len() as u64, u32::try_from(want).unwrap_or(u32::MAX))?;
            if chunk.is_empty() {
                return Err(ended(offset, len as u64, end));
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes)
    }

    fn place(&self, memory: &Memory, address: u64, offset: u64, len: u64) -> Result<(), ErrorCode> {
        memory.copy_image(address, self, offset, len)
    }
}

impl Source for [u8] {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn read_exact(&self, offset: u64, len: usize) -> Result<Vec<u8>, ErrorCode> {
        part(self, offset, len as u64).map(<[u8]>::to_vec)
    }

    fn place(&self, memory: &Memory, address: u64, offset: u64, len: u64) -> Result<(), ErrorCode> {
        let mut at = address;
        for chunk in part(self, offset, len)?.chunks(CHUNK) {
            memory.write(at, chunk)?;
            at += chunk.len() as u64;
        }
        Ok(())
    }
}

fn part(bytes: &[u8], offset: u64, len: u64) -> Result<&[u8], ErrorCode> {
    let range = usize::try_from(offset).ok().zip(usize::try_from(len).ok());
    range
        .and_then(|(offset, len)| bytes.get(offset..offset.checked_add(len)?))
        .ok_or_else(|| ended(offset, len, bytes.len() as u64))
}

fn ended(offset: u64, len: u64, end: u64) -> ErrorCode {
    ErrorCode::Corrupt(format!("the image is truncated: bytes {offset} to {} are needed, it has {end}", offset.saturating_add(len)))
}
