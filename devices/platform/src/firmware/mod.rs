//! What PC firmware built for virtual machines (OVMF) looks for: the chips of an old PC's board, as far as it uses them.
//!
//! | part | module | what the firmware does with it |
//! | --- | --- | --- |
//! | 440FX host bridge, PIIX3 and PIIX4 functions | [`Pci::show_as_pc`](crate::Pci::show_as_pc) | decides by their ids which board it is on |
//! | PIIX4 power management | `pm` | measures time by the PM timer; powers off |
//! | fw_cfg | `fw_cfg` | asks how much memory and how many CPUs there are; takes the ACPI tables |
//! | table loader | `loader` | puts the ACPI tables where it wants them |
//! | flash | `flash` | keeps its variables |
//!
//! The firmware's code itself is a [`Rom`](tenon_core::Rom) that ends at 4 GiB; the variables lie below it. There is no 8254 timer and no 8259
//! interrupt controller: OVMF of this decade takes the local APIC's timer, whose bus clock of 1 GHz it assumes.
//!
//! None of this is there in a machine without firmware.

mod flash;
mod fw_cfg;
mod loader;
mod pm;

use std::sync::Arc;

use tenon_core::{Bus, BusError, Claim, Clock, HIGH_BASE, Lifecycle, Ram, Requests};

use crate::acpi::{AcpiError, Platform};
pub use flash::{Flash, FlashStore};
use fw_cfg::FwCfg;
pub(crate) use pm::PORT as PM_PORT;
use pm::PmRegisters;

/// Flash, code and variables, lies from here on: behind the interrupt controllers and what KVM keeps for itself.
const FLASH_START: u64 = HIGH_BASE - (16 << 20);

/// What firmware needs of a machine.
pub struct FirmwareParts<'a> {
    /// RAM, and the ROM that holds the firmware's code.
    pub ram: &'a Ram,
    /// Port I/O.
    pub pio: &'a Arc<Bus>,
    /// Memory-mapped I/O.
    pub mmio: &'a Arc<Bus>,
    /// For the PM timer.
    pub clock: &'a Arc<Clock>,
    /// For the power-off.
    pub requests: &'a Requests,
    /// What the ACPI tables tell of.
    pub platform: &'a Platform,
    /// The firmware's variables; without them it keeps them in RAM until the machine ends.
    pub variables: Option<Flash>,
}

/// What cannot be done with firmware.
#[derive(Debug, thiserror::Error)]
pub enum FirmwareError {
    /// A range is taken.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The ACPI tables cannot be made.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// The variables do not fit.
    #[error(
        "{size:#x} bytes of firmware variables do not fit below the firmware's code at {code:#x}: all of it lies in the last 16 MiB below 4 GiB"
    )]
    Variables {
        /// How many bytes.
        size: u64,
        /// Where the code begins.
        code: u64,
    },
    /// There is no firmware.
    #[error("no ROM ends at 4 GiB, where a CPU starts")]
    NoCode,
}

/// The board's chips that only firmware uses. They are gone when this is dropped.
pub struct FirmwareBoard {
    fw_cfg: Arc<FwCfg>,
    pm: Arc<PmRegisters>,
    flash: Option<Arc<Flash>>,
    _claims: Vec<Claim>,
}

impl FirmwareBoard {
    /// Claims the chips' places: ports 0x510 and 0xb000, and the flash right below the ROM that ends at 4 GiB.
    ///
    /// # Errors
    /// A place is taken, there is no ROM at the end, or the ACPI tables cannot be made.
    pub fn new(parts: FirmwareParts<'_>) -> Result<Self, FirmwareError> {
        let code = parts.ram.roms().iter().find(|rom| rom.base() + rom.size() == HIGH_BASE);
        let code = code.ok_or(FirmwareError::NoCode)?.base();
        let mut files = loader::files(parts.platform)?;
        files.push(("etc/e820".into(), memory_map(parts.ram)));
        let fw_cfg = Arc::new(FwCfg::new(files, parts.platform.vcpus.into()));
        let pm = Arc::new(PmRegisters::new(parts.clock.clone(), parts.requests.clone()));
        let mut claims = vec![
            parts.pio.claim("fw_cfg", fw_cfg::PORT, fw_cfg::PORTS, fw_cfg.clone())?,
            parts.pio.claim("pm", pm::PORT.into(), pm::PORTS, pm.clone())?,
        ];
        let flash = parts.variables.map(Arc::new);
        if let Some(flash) = &flash {
            let size = flash.size();
            let base = code.checked_sub(size).filter(|base| *base >= FLASH_START);
            let base = base.ok_or(FirmwareError::Variables { size, code })?;
            claims.push(parts.mmio.claim("flash", base, size, flash.clone())?);
        }
        Ok(Self { fw_cfg, pm, flash, _claims: claims })
    }

    /// The chips, for a machine to reset and save.
    #[must_use]
    pub fn lifecycles(&self) -> Vec<Arc<dyn Lifecycle>> {
        let mut all: Vec<Arc<dyn Lifecycle>> = vec![self.fw_cfg.clone(), self.pm.clone()];
        all.extend(self.flash.clone().map(|flash| flash as Arc<dyn Lifecycle>));
        all
    }
}

/// RAM in the form of the BIOS's call E820: start, length and type 1, packed.
fn memory_map(ram: &Ram) -> Vec<u8> {
    const USABLE: u32 = 1;
    let mut map = Vec::new();
    for (start, size, _) in ram.regions() {
        map.extend(start.to_le_bytes());
        map.extend(size.to_le_bytes());
        map.extend(USABLE.to_le_bytes());
    }
    map
}
