//! What a plugin and its host share: the contract's words as Rust types, and the tables through which a native plugin is called.
//!
//! The WIT files are the only description of what each function means, who calls it when, and on which thread; the tables here carry
//! the same functions under the same names over the C calling convention (a test in `tenon-sdk` compares the two). This crate has no
//! dependencies and holds no logic beyond encoding; `tenon-sdk` and the plugin host are written on top of it.
//!
//! A native plugin is a shared library that exports one symbol, [`SYMBOL`]: a [`Plugin`]. Conventions for everything in it:
//!
//! - Memory never changes hands. A pointer is good for the call that it came with and not longer; who needs the bytes copies them.
//!   Text and lists go in as [`Bytes`], and come out through a [`Sink`], which the callee calls at most once before it returns.
//! - Compound values (configuration, description, machine, boot, errors) travel in the encoding of [`wire`].
//! - A library serves any number of instances. Each is made by `create` with its own host context, which the plugin gives back
//!   unchanged in every call to the host. Calls into one instance come one at a time, though from different threads.
//!   The host's functions may be called during a call into that instance, on the thread of that call, and at no other time, but for
//!   what [`StoreHost`] says of itself.
//! - No function unwinds. A plugin that panics says so by [`Status::TRAPPED`]; the host then calls only `destroy`.
//! - Tables grow at the end only; `size` tells which fields are there.
#![allow(unsafe_code, reason = "a foreign-function interface: its types are made of raw pointers")]

#[macro_use]
mod table;
mod device;
mod folder;
mod parts;
mod personality;
mod store;
mod virtio;
pub mod wire;

pub use device::*;
pub use folder::*;
pub use parts::*;
pub use personality::*;
pub use store::*;
pub use virtio::*;

/// The name of the symbol that a native plugin exports.
pub const SYMBOL: &str = "tenon_plugin_v0";
/// The first field of every [`Plugin`]: `TENONPLG`.
pub const MAGIC: [u8; 8] = *b"TENONPLG";
/// The version of the tables. A host loads exactly this one.
pub const ABI_VERSION: u32 = 1;
/// The version of the contract (the WIT packages) that this crate carries.
pub const CONTRACT: &str = "0.1.0";
