//! The small parts: borrowed bytes, sinks, status codes, log levels, and the plugin's own table.

use std::ffi::c_void;
use std::marker::PhantomData;

use crate::{DeviceTable, PersonalityTable, StoreTable, VirtioTable};

/// Bytes of somebody else, good for the duration of one call.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Bytes<'a> {
    pointer: *const u8,
    length: usize,
    borrowed: PhantomData<&'a [u8]>,
}

// SAFETY: `Bytes` is a shared slice of bytes in another dress.
unsafe impl Send for Bytes<'_> {}
// SAFETY: as above.
unsafe impl Sync for Bytes<'_> {}

impl<'a> Bytes<'a> {
    /// Lends a slice.
    #[must_use]
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self { pointer: bytes.as_ptr(), length: bytes.len(), borrowed: PhantomData }
    }

    /// The bytes.
    ///
    /// # Safety
    /// The value came from the other side in the call that is still running, and that side kept to the convention:
    /// `length` bytes at `pointer` are readable and nobody writes them, or `length` is 0.
    #[must_use]
    pub unsafe fn as_slice(&self) -> &'a [u8] {
        if self.length == 0 || self.pointer.is_null() {
            return &[];
        }
        // SAFETY: promised by the caller.
        unsafe { std::slice::from_raw_parts(self.pointer, self.length) }
    }
}

/// Where a callee puts its output.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Sink {
    /// Given back to `put` unchanged.
    pub context: *mut c_void,
    /// Takes the output. It copies the bytes, does not unwind and calls nobody back.
    pub put: unsafe extern "C" fn(context: *mut c_void, bytes: Bytes<'_>),
}

impl Sink {
    /// A sink that replaces the content of `output`. It may be used for as long as the caller leaves `output` alone.
    pub fn to(output: &mut Vec<u8>) -> Self {
        unsafe extern "C" fn put(context: *mut c_void, bytes: Bytes<'_>) {
            // SAFETY: `context` is the vector that `to` borrowed, and the convention ends the sink's use with the call it was made for.
            let output = unsafe { &mut *context.cast::<Vec<u8>>() };
            output.clear();
            // SAFETY: the bytes came in this call.
            output.extend_from_slice(unsafe { bytes.as_slice() });
        }
        Self { context: std::ptr::from_mut(output).cast(), put }
    }

    /// Puts the output.
    ///
    /// # Safety
    /// The sink came in the call that is still running.
    pub unsafe fn put(&self, bytes: &[u8]) {
        // SAFETY: promised by the caller.
        unsafe { (self.put)(self.context, Bytes::new(bytes)) }
    }
}

/// How a call ended. A plain number, since what comes from the other side may be any.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(pub u32);

impl Status {
    /// It did what it is for; output, if there is any, is in the sink.
    pub const OK: Self = Self(0);
    /// It was refused; the encoded error is in the sink.
    pub const REFUSED: Self = Self(1);
    /// The plugin panicked, and has told the host by `panicked`. The instance is good for nothing but `destroy`.
    pub const TRAPPED: Self = Self(2);
}

/// How much a log message matters.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Something failed.
    Error = 0,
    /// Something is wrong and work goes on.
    Warn = 1,
    /// A rare event that an administrator wants to know of.
    Info = 2,
    /// For the plugin's developer.
    Debug = 3,
    /// For the plugin's developer, in detail.
    Trace = 4,
}

impl Level {
    /// The level of this number; numbers that are none are [`Level::Error`].
    #[must_use]
    pub const fn from_number(number: u32) -> Self {
        match number {
            1 => Self::Warn,
            2 => Self::Info,
            3 => Self::Debug,
            4 => Self::Trace,
            _ => Self::Error,
        }
    }
}

/// What a native plugin exports as [`crate::SYMBOL`]. It lives as long as the library is loaded.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Plugin {
    /// [`crate::MAGIC`]. To be read before anything else.
    pub magic: [u8; 8],
    /// [`crate::ABI_VERSION`]. To be read before what follows.
    pub abi: u32,
    /// Reserved; 0.
    pub reserved: u32,
    /// The version of the contract, such as `0.1.0`.
    pub contract: Bytes<'static>,
    /// The device, or null.
    pub device: Option<&'static DeviceTable>,
    /// The personality, or null.
    pub personality: Option<&'static PersonalityTable>,
    /// The virtio device, or null.
    pub virtio: Option<&'static VirtioTable>,
    /// The store, or null.
    pub store: Option<&'static StoreTable>,
}

impl Plugin {
    /// A plugin of this version with no table yet.
    pub const EMPTY: Self = Self {
        magic: crate::MAGIC,
        abi: crate::ABI_VERSION,
        reserved: 0,
        contract: Bytes::new(crate::CONTRACT.as_bytes()),
        device: None,
        personality: None,
        virtio: None,
        store: None,
    };
}

#[cfg(target_pointer_width = "64")]
const _: () = {
    assert!(size_of::<Bytes<'_>>() == 16 && size_of::<Sink>() == 16);
    assert!(std::mem::offset_of!(Plugin, abi) == 8);
    assert!(std::mem::offset_of!(Plugin, contract) == 16);
    assert!(std::mem::offset_of!(Plugin, device) == 32);
    assert!(std::mem::offset_of!(Plugin, personality) == 40);
    assert!(std::mem::offset_of!(Plugin, virtio) == 48);
    assert!(std::mem::offset_of!(Plugin, store) == 56);
    assert!(size_of::<Plugin>() == 64);
};
