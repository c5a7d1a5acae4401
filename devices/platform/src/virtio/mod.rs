//! Virtio 1.2 over PCI: rings, registers, and the PCI function around them.
//!
//! | module | what |
//! | --- | --- |
//! | `memory` | a part of a ring in guest memory, accessed field by field |
//! | `chain` | descriptors, copied once and checked |
//! | `split`, `packed` | the two formats of rings |
//! | `queue` | a queue as its device holds it |
//! | `session` | status byte and interrupts, shared by queues and registers |
//! | `registers` | the common configuration and the state machine |
//! | `doorbell` | doorbells that are events of the engine |
//! | `function` | the PCI function: configuration space, BAR, doorbells |

pub(crate) mod chain;
pub(crate) mod doorbell;
pub(crate) mod function;
pub(crate) mod memory;
pub(crate) mod packed;
pub(crate) mod queue;
pub(crate) mod registers;
pub(crate) mod session;
pub(crate) mod split;
