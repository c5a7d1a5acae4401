//! `cargo xtask guests`: makes the guests that tests, demo and benchmarks boot.
//!
//! - Debian: the kernel of the distribution's current `linux-image-cloud-amd64`, as it is and unpacked, and an initramfs of
//!   `busybox-static` with the init script of tests/guests/linux. Kept in the user's cache, checked by digest at every use.
//! - A whole Debian on a disk, for those chores that need it: made from packages by mmdebstrap, kept in the same cache.
//! - The same disk with a partition table and Debian's GRUB, for machines with PC firmware.
//! - Debian's OVMF, and a small disk with GRUB that starts the first of these, for the tests of firmware.
//! - Debian's nginx, for the tests with images on a web server.
//! - Bare guests: the small programs of tests/guests, built into the target folder; with them, the plugins that misbehave on purpose.

mod bare;
mod boot_disk;
mod cpio;
mod debian;
mod disk;
mod firmware;
mod kernel;
mod modules;
mod web;

use anyhow::Result;
use clap::Args;

pub(crate) use bare::build as bare;
pub(crate) use debian::{Debian, make as debian};
pub(crate) use disk::{Disk, make as disk};

/// What to make anew.
#[derive(Args)]
pub(crate) struct Options {
    /// Fetch Debian's packages again, even though the cache is good
    #[arg(long)]
    refresh: bool,
    /// Make the Debian disk as well, which takes some minutes the first time
    #[arg(long)]
    disk: bool,
    /// Make the Debian disk that PC firmware boots as well
    #[arg(long)]
    boot_disk: bool,
    /// Fetch PC firmware and make the small disk that its tests boot as well
    #[arg(long)]
    firmware: bool,
    /// Fetch the web server of the tests with images on one as well
    #[arg(long)]
    web: bool,
}

/// Makes all guests and says where they are.
///
/// # Errors
/// A package cannot be fetched, or a guest does not build.
pub(crate) fn run(options: &Options) -> Result<()> {
    crate::host::prepare()?;
    let debian = debian(options.refresh)?;
    for file in [&debian.vmlinuz, &debian.vmlinux, &debian.initramfs, &debian.initramfs_virtio] {
        println!("{}", file.display());
    }
    if options.disk {
        let Disk { image, kernel, initramfs, key } = disk(options.refresh)?;
        for file in [image, kernel, initramfs, key] {
            println!("{}", file.display());
        }
    }
    if options.boot_disk {
        println!("{}", boot_disk::make(options.refresh)?.display());
    }
    if options.firmware {
        for file in firmware::make(&debian, options.refresh)? {
            println!("{}", file.display());
        }
    }
    if options.web {
        println!("{}", web::make(options.refresh)?.display());
    }
    for guest in bare()? {
        println!("{}", guest.display());
    }
    for plugin in crate::plugins::build_misbehaving()? {
        println!("{}", plugin.directory.display());
    }
    Ok(())
}
