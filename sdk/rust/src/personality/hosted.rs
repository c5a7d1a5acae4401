//! Where there is no component around the personality: handles are numbers, and calls go to the host that is entered on this thread.
#![allow(unsafe_code, reason = "the host entered on a thread is remembered without its lifetime")]

use std::cell::Cell;
use std::marker::PhantomData;

use tenon_abi::Level;

use super::Result;

/// The host of a personality that runs in this process: a test bench, or the other side of the native tables. Images are named by their index.
/// Functions are called during `load`, on its thread. What each of them does is written at [`super::Image`] and [`super::Memory`].
pub trait Host {
    /// Logs one message.
    fn log(&self, level: Level, message: &str);
    /// What an image is for.
    fn image_role(&self, image: u32) -> String;
    /// An image's length in bytes.
    fn image_size(&self, image: u32) -> u64;
    /// Reads at most `len` bytes at `offset`.
    ///
    /// # Errors
    /// The file cannot be read.
    fn image_read(&self, image: u32, offset: u64, len: u32) -> Result<Vec<u8>>;
    /// Writes guest memory.
    ///
    /// # Errors
    /// The range is not RAM.
    fn memory_write(&self, address: u64, bytes: &[u8]) -> Result<()>;
    /// Copies a part of an image to guest memory.
    ///
    /// # Errors
    /// The range is not RAM, or not in the image.
    fn memory_copy_image(&self, address: u64, image: u32, offset: u64, len: u64) -> Result<()>;
}

thread_local! {
    /// The host of the personality that is being called on this thread.
    static ENTERED: Cell<Option<*const dyn Host>> = const { Cell::new(None) };
}

/// Calls a personality: for as long as `call` runs, handles reach `host`.
pub fn enter<R>(host: &dyn Host, call: impl FnOnce() -> R) -> R {
    struct Leave(Option<*const dyn Host>);
    impl Drop for Leave {
        fn drop(&mut self) {
            ENTERED.set(self.0);
        }
    }
    let host: *const (dyn Host + '_) = host;
    // SAFETY: only the lifetime of the trait object changes; the pointer is forgotten by `Leave` before `host` can end, also when `call` unwinds.
    let host: *const (dyn Host + 'static) = unsafe { std::mem::transmute(host) };
    let _leave = Leave(ENTERED.replace(Some(host)));
    call()
}

fn host<R>(call: impl FnOnce(&dyn Host) -> R) -> R {
    let Some(host) = ENTERED.get() else {
        panic!(
            "a personality's handles work during `load` only; a test makes it with `tenon_testkit::LoadBench`"
        );
    };
    // SAFETY: `enter` is still running further up on this thread's stack and borrows the host.
    call(unsafe { &*host })
}

pub(crate) struct Image(u32);

impl Image {
    pub(super) fn role(&self) -> String {
        host(|host| host.image_role(self.0))
    }

    pub(super) fn size(&self) -> u64 {
        host(|host| host.image_size(self.0))
    }

    pub(super) fn read(&self, offset: u64, len: u32) -> Result<Vec<u8>> {
        host(|host| host.image_read(self.0, offset, len))
    }
}

/// The machine's memory: there is one, that of the host entered.
pub(crate) struct Memory<'a>(PhantomData<&'a ()>);

impl Memory<'_> {
    pub(super) fn write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        host(|host| host.memory_write(address, bytes))
    }

    pub(super) fn copy_image(&self, address: u64, image: &Image, offset: u64, len: u64) -> Result<()> {
        host(|host| host.memory_copy_image(address, image.0, offset, len))
    }
}

pub(super) fn log(level: Level, message: &str) {
    host(|host| host.log(level, message));
}

/// The handles that `load` is given: the memory, and so many images.
#[must_use]
pub fn handles(images: u32) -> (super::Memory<'static>, Vec<super::Image>) {
    (super::Memory(Memory(PhantomData)), (0..images).map(|n| super::Image(Image(n))).collect())
}
