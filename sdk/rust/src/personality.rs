//! Personalities: the trait, and the handles that `load` is given.
//!
//! | used | permission |
//! | --- | --- |
//! | [`error!`], [`warn!`], [`info!`], [`debug!`], [`trace!`], [`log`] | `log` |
//! | [`Image`] | `images` |
//! | [`Memory`] | `guest-memory` |

use std::fmt;

#[cfg(target_arch = "wasm32")]
#[doc(hidden)]
pub mod component;
#[cfg(not(target_arch = "wasm32"))]
pub mod hosted;
#[cfg(not(target_arch = "wasm32"))]
#[doc(hidden)]
pub mod native;

#[cfg(target_arch = "wasm32")]
use component as sys;
#[cfg(not(target_arch = "wasm32"))]
use hosted as sys;

pub use tenon_abi::{
    Boot, CpuState, Level, Machine, MemoryKind, MemoryRange, PersonalityError as Error, Segment, StopMethod,
    Table,
};

pub use crate::config::Config;
pub use crate::{
    personality_debug as debug, personality_error as error, personality_info as info,
    personality_trace as trace, personality_warn as warn,
};

/// What a personality's functions return.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The most that one read of an image returns: 16 MiB.
pub const MAX_READ: u32 = 16 << 20;

/// A personality: how one family of guests is loaded.
pub trait Personality: 'static {
    /// Loads the guest: puts the images into memory, builds what the guest expects to find there, and says how the first vCPU begins.
    /// The host calls it once for each start or reset of the machine, on the thread that assembles the machine, before any vCPU runs.
    /// The images stay the same from start to reset. The guest's command line is the option `cmdline`.
    ///
    /// # Errors
    /// The guest cannot be loaded; the machine does not start.
    fn load(machine: &Machine, memory: &Memory<'_>, images: Vec<Image>, options: &Config) -> Result<Boot>;
}

/// An image: a file that was opened by the host and does not change size while the handle lives.
pub struct Image(pub(crate) sys::Image);

impl Image {
    /// What it is for: `kernel`, `initrd`, or another role that the administrator gave it.
    #[must_use]
    pub fn role(&self) -> String {
        self.0.role()
    }

    /// The length in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.0.size()
    }

    /// Reads at most `len` bytes at `offset`; fewer at the end of the image, and never more than [`MAX_READ`].
    ///
    /// # Errors
    /// The host cannot read the file.
    pub fn read(&self, offset: u64, len: u32) -> Result<Vec<u8>> {
        self.0.read(offset, len.min(MAX_READ))
    }

    /// Reads exactly `len` bytes at `offset`, of any length.
    ///
    /// # Errors
    /// The image ends before, or the host cannot read the file.
    pub fn read_exact(&self, offset: u64, len: u64) -> Result<Vec<u8>> {
        let size = self.size();
        if offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(Error::Corrupt(format!(
                "`{}` has {size} bytes, and {len} were expected at {offset:#x}",
                self.role()
            )));
        }
        let mut bytes = Vec::with_capacity(usize::try_from(len).unwrap_or(0));
        while (bytes.len() as u64) < len {
            let left = len - bytes.len() as u64;
            let part = self.read(offset + bytes.len() as u64, u32::try_from(left).unwrap_or(u32::MAX))?;
            if part.is_empty() {
                return Err(Error::Corrupt(format!("`{}` became shorter while it was read", self.role())));
            }
            bytes.extend_from_slice(&part);
        }
        Ok(bytes)
    }

    /// Reads the whole image.
    ///
    /// # Errors
    /// The host cannot read the file.
    pub fn read_all(&self) -> Result<Vec<u8>> {
        self.read_exact(0, self.size())
    }
}

/// The machine's memory. All of it is zero at first, but for the ranges that the machine's description does not call [`MemoryKind::Ram`]:
/// those are filled by the host, and writing them is refused.
pub struct Memory<'a>(pub(crate) sys::Memory<'a>);

impl Memory<'_> {
    /// Writes bytes. All of the range must be RAM; otherwise nothing is written.
    ///
    /// # Errors
    /// The range is not RAM.
    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        self.0.write(address, bytes)
    }

    /// Copies `len` bytes of an image, from `offset`, without passing them through the plugin.
    ///
    /// # Errors
    /// The range is not RAM, or not in the image.
    pub fn copy_image(&self, address: u64, image: &Image, offset: u64, len: u64) -> Result<()> {
        self.0.copy_image(address, &image.0, offset, len)
    }
}

/// Logs one message under the personality's name. The macros of this module are the usual way.
pub fn log(level: Level, message: fmt::Arguments<'_>) {
    match message.as_str() {
        Some(text) => sys::log(level, text),
        None => sys::log(level, &message.to_string()),
    }
}
