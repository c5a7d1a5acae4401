//! The KVM engine through the traits of `tenon-core`, with small guests assembled here.
//! Where there is no usable `/dev/kvm` each test says `not run:` and why.
#![allow(clippy::unwrap_used)] // A test's failure is a panic.

mod crashes;
mod fixture;
mod interrupts;
mod kicks;
mod machine;
mod measure;
mod memory;
mod modes;
mod state;
