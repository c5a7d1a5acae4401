//! What personalities for x86 guests have in common: reading ELF images, finding room in guest memory, and the usual
//! states in which a vCPU enters a guest.
//!
//! Nothing here is needed to write a personality, and nothing here does what another crate could not: it is a convenience,
//! written against the contract.
//!
//! - [`Source`]: an image, or bytes that were unpacked from one, to read from and to place into guest memory;
//! - [`Elf`]: the loadable segments, entry point and notes of an ELF image, checked;
//! - [`Layout`]: which addresses are RAM, and which of them are taken;
//! - [`Tables`]: the descriptor and page tables of a guest that is entered in protected or long mode.

mod elf;
mod entry;
mod layout;
mod source;

pub use elf::{Class, Elf, Segment as ElfSegment};
pub use entry::{TABLES_SIZE, Tables};
pub use layout::{Layout, mebibytes};
pub use source::Source;
