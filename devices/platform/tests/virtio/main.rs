//! The platform's PCI and virtio through their public door: a driver in test code finds devices over real buses and RAM, and runs queues.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod device;
mod doorbells;
mod driver;
mod hostile;
mod life;
mod machine;
mod pci;
mod queues;
mod random;
mod registers;
mod threads;
