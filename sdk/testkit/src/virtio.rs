//! Virtio devices without a VM.

mod bench;
mod blk;
mod outside;
mod suite;

pub use bench::{PortEnd, VirtioBench, VirtioChannelEnd, VirtioSetup};
pub use blk::{blk, blk_conformance};
pub use outside::{Answered, Ticket};
pub use suite::{VirtioSubject, virtio, virtio_conformance};
