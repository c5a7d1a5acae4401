//! Bytes that can be read and placed into guest memory, wherever they are.

use crate::personality::{Error, Image, Memory};

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
    fn read_exact(&self, offset: u64, len: u64) -> Result<Vec<u8>, Error>;

    /// Copies `len` bytes at `offset` to guest-physical `address`.
    ///
    /// # Errors
    /// The source ends before, or the range is not RAM.
    fn place(&self, memory: &Memory<'_>, address: u64, offset: u64, len: u64) -> Result<(), Error>;
}

impl Source for Image {
    fn size(&self) -> u64 {
        Image::size(self)
    }

    fn read_exact(&self, offset: u64, len: u64) -> Result<Vec<u8>, Error> {
        Image::read_exact(self, offset, len)
    }

    fn place(&self, memory: &Memory<'_>, address: u64, offset: u64, len: u64) -> Result<(), Error> {
        memory.copy_image(address, self, offset, len)
    }
}

impl Source for [u8] {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn read_exact(&self, offset: u64, len: u64) -> Result<Vec<u8>, Error> {
        part(self, offset, len).map(<[u8]>::to_vec)
    }

    fn place(&self, memory: &Memory<'_>, address: u64, offset: u64, len: u64) -> Result<(), Error> {
        let mut at = address;
        for chunk in part(self, offset, len)?.chunks(CHUNK) {
            memory.write(at, chunk)?;
            at += chunk.len() as u64;
        }
        Ok(())
    }
}

fn part(bytes: &[u8], offset: u64, len: u64) -> Result<&[u8], Error> {
    let range = usize::try_from(offset).ok().zip(usize::try_from(len).ok());
    range
        .and_then(|(offset, len)| bytes.get(offset..offset.checked_add(len)?))
        .ok_or_else(|| ended(offset, len, bytes.len() as u64))
}

fn ended(offset: u64, len: u64, end: u64) -> Error {
    Error::Corrupt(format!("{len} bytes were expected at {offset:#x}, and there are {end} in all"))
}
