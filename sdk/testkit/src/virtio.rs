//! Virtio devices without a VM.

mod bench;
mod blk;
mod ends;
mod folders;
pub(crate) mod fuzz;
mod outside;
mod sockets;
mod suite;

pub use bench::{VirtioBench, VirtioSetup};
pub use blk::{blk, blk_conformance};
pub use ends::{PortEnd, VirtioChannelEnd};
pub use outside::{Answered, Ticket};
pub use sockets::SocketEnd;
pub use suite::{VirtioSubject, virtio, virtio_conformance};
