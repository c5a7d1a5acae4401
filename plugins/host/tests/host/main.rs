//! The plugin host from outside: plugins that work, and plugins that do everything that they must not.
//!
//! The plugins under test are in `tests/fixtures`: they are built as a vendor builds theirs, once, into cargo's target folder.
#![allow(clippy::unwrap_used)] // A test's helpers may end it as the test itself may.

mod cache;
mod devices;
mod folders;
mod guests;
mod loading;
mod machine;
mod misdeeds;
mod native;
mod queues;
mod rings;
mod settings;
mod sockets;
mod stores;
