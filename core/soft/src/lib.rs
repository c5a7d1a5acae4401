//! The software engine: a portable x86-64 system interpreter.
//!
//! [`Soft`] is a [`tenon_core::Engine`] that needs nothing of the host but memory and threads. Instructions are decoded once into
//! basic blocks of small ops, each a handler's address and its operands; handlers of a block call each other in tail position.
//!
//! | module | holds |
//! | --- | --- |
//! | `cpu`, `flags`, `operand` | the state of a vCPU, lazy flags, registers and operands by name |
//! | `mem`, `word`, `tlb`, `paging` | guest memory: by the software TLB, and what is behind it |
//! | `block`, `lower`, `ops` | decoded code: the cache, the lowering, the fast handlers |
//! | `slow`, `string` | every integer instruction from its decoded form |
//! | `segment`, `exception`, `syscall`, `control`, `cpuid`, `msr` | the system side |
//! | `apic`, `ioapic`, `irqchip` | interrupt controllers |
//! | `exec`, `vm`, `turns` | the dispatch loop, the engine's traits, deterministic execution |

mod apic;
mod block;
mod control;
mod cpu;
mod cpuid;
mod exception;
mod exec;
mod flags;
mod ioapic;
mod irqchip;
mod lower;
mod mem;
mod msr;
mod operand;
mod ops;
mod paging;
mod segment;
mod slow;
mod string;
mod syscall;
mod tlb;
mod turns;
mod vm;
mod word;

pub use vm::Soft;
