//! The system side of the engine, seen by bare guest programs: modes, rings, page faults, exceptions, interrupts, several vCPUs.
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::unwrap_used,
    clippy::precedence,
    missing_docs,
    unsafe_code,
    unreachable_pub,
    reason = "a test"
)]

#[path = "system/device.rs"]
mod device;
#[path = "system/exceptions.rs"]
mod exceptions;
#[path = "system/flat.rs"]
mod flat;
#[path = "system/guest.rs"]
mod guest;
#[path = "system/interrupts.rs"]
mod interrupts;
#[path = "system/modes.rs"]
mod modes;
#[path = "system/paging.rs"]
mod paging;
#[path = "system/rings.rs"]
mod rings;
#[path = "system/rom.rs"]
mod rom;
#[path = "system/several.rs"]
mod several;
