//! What is put into guest memory at each start: ACPI tables, the reset vector, and what the personality makes of the images.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use tenon_core::Ram;
use tenon_platform::Platform;
use tenon_plugins::{Boot, Image};

use crate::plugins::Personality;

/// Opens a file that the personality may read.
pub(crate) fn open_image(role: &str, path: &Path) -> Result<Image> {
    Image::open(role, path).with_context(|| format!("{role} `{}`", path.display()))
}

/// The guest as it is started, and started again after a reset.
pub(crate) struct Guest {
    pub(crate) ram: Arc<Ram>,
    pub(crate) platform: Platform,
    pub(crate) personality: Personality,
    pub(crate) images: Vec<Image>,
}

impl Guest {
    /// Fills guest memory, which is all zero, and says how the first vCPU begins.
    pub(crate) fn load(&self) -> Result<Boot> {
        let rsdp = tenon_platform::write_tables(&self.ram, &self.platform)?;
        tenon_platform::write_reset_vector(&self.ram).context("writing the reset vector")?;
        self.personality.load(&self.ram, self.platform.vcpus, rsdp, &self.images)
    }
}
