//! `cargo xtask guests`: makes the guests that tests, demo and benchmarks boot.
//!
//! - Debian: the kernel of the distribution's current `linux-image-cloud-amd64`, as it is and unpacked, and an initramfs of
//!   `busybox-static` with the init script of tests/guests/linux. Kept in the user's cache, checked by digest at every use.
//! - Bare guests: the small programs of tests/guests, built into the target folder; with them, the plugins that misbehave on purpose.

mod bare;
mod cpio;
mod debian;
mod kernel;

use anyhow::Result;
use clap::Args;

pub(crate) use bare::build as bare;
pub(crate) use debian::{Debian, make as debian};

/// What to make anew.
#[derive(Args)]
pub(crate) struct Options {
    /// Fetch Debian's packages again, even though the cache is good
    #[arg(long)]
    refresh: bool,
}

/// Makes all guests and says where they are.
///
/// # Errors
/// A package cannot be fetched, or a guest does not build.
pub(crate) fn run(options: &Options) -> Result<()> {
    crate::host::prepare()?;
    let debian = debian(options.refresh)?;
    for file in [&debian.vmlinuz, &debian.vmlinux, &debian.initramfs] {
        println!("{}", file.display());
    }
    for guest in bare()? {
        println!("{}", guest.display());
    }
    for plugin in crate::plugins::build_misbehaving()? {
        println!("{}", plugin.directory.display());
    }
    Ok(())
}
