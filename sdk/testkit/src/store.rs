//! Stores without a VM.

mod bench;
mod native;
mod outside;
mod suite;

pub use bench::StoreBench;
pub use native::NativeStoreBench;
pub use suite::{StoreChecks, StoreSubject, store, store_conformance};
