//! Write Tenon plugins: devices, backing stores and guest-OS personalities.
//!
//! A plugin is a type that implements one of the traits, and one line that exports it:
//!
//! | trait | what it is | exported by |
//! | --- | --- | --- |
//! | [`Device`] | a device with registers | [`export_device!`] |
//! | [`VirtioDevice`] | a device that is fed by queues of requests | [`export_virtio_device!`] |
//! | [`Store`] | a backing store, on copies of the data | [`export_store!`] |
//! | [`NativeStore`](store::NativeStore) | a backing store, native only, on the data itself | [`export_native_store!`] |
//! | [`Personality`] | how a guest is loaded | [`export_personality!`] |
//!
//! ```
//! use tenon_sdk::device::{Attachment, Decoder, Description, Device, Encoder, Result};
//! use tenon_sdk::Config;
//!
//! /// A port that remembers the last byte written to it.
//! struct Scratch {
//!     value: u8,
//! }
//!
//! impl Device for Scratch {
//!     fn describe(config: &Config) -> Result<Description> {
//!         Ok(Description::new().pio("scratch", config.number("base")?.unwrap_or(0x80), 1))
//!     }
//!     fn start(_config: &Config, _attachment: Attachment) -> Result<Self> {
//!         Ok(Self { value: 0 })
//!     }
//!     fn read(&mut self, _region: u32, _offset: u64, _size: u8) -> u64 {
//!         self.value.into()
//!     }
//!     fn write(&mut self, _region: u32, _offset: u64, _size: u8, value: u64) {
//!         self.value = value.to_le_bytes()[0];
//!     }
//!     fn reset(&mut self) {
//!         self.value = 0;
//!     }
//!     fn save(&self, state: &mut Encoder) -> Result<()> {
//!         state.u8(self.value);
//!         Ok(())
//!     }
//!     fn restore(&mut self, state: &mut Decoder) -> Result<()> {
//!         self.value = state.u8()?;
//!         Ok(())
//!     }
//! }
//!
//! tenon_sdk::export_device!(Scratch);
//! # fn main() {}
//! ```
//!
//! The same source builds three ways: for `wasm32-unknown-unknown` it becomes a component whose imports are exactly the permissions that it
//! uses; as a native library it has the table of `tenon-abi`; and in `cargo test` it runs in the test's own process, driven by
//! `tenon-testkit`. What each function is called for, when, and on which thread is written in the WIT files of the contract,
//! and repeated at the traits.

// The bindings and the export macros name this crate by its name, also from within.
extern crate self as tenon_sdk;

mod macros;
#[cfg(not(target_arch = "wasm32"))]
mod native;

pub mod config;
pub mod device;
pub mod guest;
pub mod personality;
pub mod state;
pub mod store;
pub mod virtio;

pub use config::Config;
pub use device::Device;
pub use personality::Personality;
pub use store::Store;
pub use virtio::VirtioDevice;

#[doc(hidden)]
pub use tenon_abi as abi;
#[cfg(target_arch = "wasm32")]
#[doc(hidden)]
pub use wit_bindgen;
