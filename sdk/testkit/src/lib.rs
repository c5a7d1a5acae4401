//! Drive a Tenon plugin without a VM, in the vendor's own `cargo test`.
//!
//! A [`Bench`] is the machine around one device: the test reads and writes registers as a guest would, moves the clock, pushes bytes into
//! channels, and looks at lines and output. Time is the test's: it stands still but for [`Bench::advance`], and then timers fire in the order of
//! their deadlines, each at its own time. A [`LoadBench`] is the same for a personality: memory and images in, memory and first vCPU out.
//!
//! [`conformance`] checks in one call what every host relies on. A plugin's tests should begin with it:
//!
//! ```
//! # use tenon_sdk::device::{Attachment, Config, Decoder, Description, Device, Encoder, Result};
//! # struct Scratch(u8);
//! # impl Device for Scratch {
//! #     fn describe(_: &Config) -> Result<Description> { Ok(Description::new().pio("scratch", 0x80, 1)) }
//! #     fn start(_: &Config, _: Attachment) -> Result<Self> { Ok(Self(0)) }
//! #     fn read(&mut self, _: u32, _: u64, _: u8) -> u64 { self.0.into() }
//! #     fn write(&mut self, _: u32, _: u64, _: u8, value: u64) { self.0 = value.to_le_bytes()[0] }
//! #     fn reset(&mut self) { self.0 = 0 }
//! #     fn save(&self, state: &mut Encoder) -> Result<()> { state.u8(self.0); Ok(()) }
//! #     fn restore(&mut self, state: &mut Decoder<'_>) -> Result<()> { self.0 = state.u8()?; Ok(()) }
//! # }
//! use tenon_testkit::Bench;
//!
//! tenon_testkit::conformance::<Scratch>(&[]);
//!
//! let mut bench = Bench::<Scratch>::new(&[]).unwrap();
//! bench.write(0, 0, 1, 0x5a);
//! bench.round_trip();
//! assert_eq!(bench.read(0, 0, 1), 0x5a);
//! ```
//!
//! | bench | around | checked by |
//! | --- | --- | --- |
//! | [`Bench`] | a device with registers | [`conformance`] |
//! | [`VirtioBench`] | a virtio device: the test makes requests available, and has its stores, ports, sockets and channels in hand | [`virtio_conformance`], and [`blk_conformance`] for disks |
//! | [`StoreBench`] | a store, over stores in memory that fail, forget or lose power as the test says | [`store_conformance`] |
//! | [`NativeStoreBench`] | a native store behind its table, of either trait | [`suite::store`] |
//! | [`LoadBench`] | a personality | – |
//!
//! The checks of virtio devices and stores are written over what they check ([`VirtioSubject`], [`StoreSubject`]), so that a host can run them on a plugin that it has loaded: [`suite`].
//!
//! [`fuzz`] gives any bytes to anything, in an ordinary test and under `cargo fuzz`; to a virtio device, as deeds of everyone around it.
//!
//! What is wrong with the test itself, such as an access outside the device's regions, panics.

mod bench;
mod conformance;
pub mod fuzz;
mod load;
mod memory;
mod outside;
mod random;
mod store;
mod virtio;

pub use bench::{Bench, ChannelEnd};
pub use conformance::conformance;
pub use load::{LoadBench, Loaded};
pub use memory::{Counts, MemoryStore, On};
pub use outside::LineState;
pub use random::Random;
pub use store::{NativeStoreBench, StoreBench, StoreChecks, StoreSubject, store_conformance};
pub use virtio::{
    Answered, PortEnd, SocketEnd, Ticket, VirtioBench, VirtioChannelEnd, VirtioSetup, VirtioSubject,
    blk_conformance, virtio_conformance,
};

/// The conformance suites over any subject: a bench of this crate, or a plugin as a host has loaded it.
pub mod suite {
    pub use crate::store::store;
    pub use crate::virtio::{blk, virtio};
}
