//! Stores without a VM.

mod bench;
mod outside;
mod suite;

pub use bench::StoreBench;
pub use suite::{StoreChecks, StoreSubject, store, store_conformance};
