//! The platform: what every machine has before any plugin adds to it.
//!
//! | part | module | what the guest sees |
//! | --- | --- | --- |
//! | memory map | `map` | RAM, and where the firmware's tables are kept from it |
//! | ACPI tables | `acpi` | a hardware-reduced ACPI platform: CPUs, I/O APIC, the plugins' devices, power and reset |
//! | power registers | `power` | sleep control, reset and the power button |
//! | PCI | `pci` | a host bridge with root buses, ECAM, hot plug |
//! | virtio | `virtio` | devices as PCI functions, with split and packed queues |
//! | firmware's chips | `firmware` | in a machine with PC firmware: fw_cfg, PM timer, flash |
//! | old ways to reset | `reset` | code at F000:FFF0, the keyboard controller's reset command |
//!
//! This code is native and trusted. It knows no device plugin: an [`AcpiNode`] is made from what a plugin described.

mod acpi;
mod encode;
mod firmware;
mod map;
mod pci;
mod power;
mod reset;
mod virtio;

pub use acpi::{AcpiError, AcpiNode, Platform, Resource, write_tables};
pub use firmware::{FirmwareBoard, FirmwareError, FirmwareParts, Flash, FlashStore};
pub use map::{
    ACPI_BASE, ACPI_END, DEVICE_WINDOW, EBDA_BASE, MemoryKind, MemoryRange, RESET_VECTOR, memory_map,
};
pub use pci::{
    CONFIG_PORTS, ECAM_BASE, HIGH_WINDOW, HIGH_WINDOW_OF_BUS, MAX_BUSES, MEMORY_WINDOW, MEMORY_WINDOW_OF_BUS,
    MSIX_DEVICES, PCI_GSIS, Pci, PciError, PciParts, PciSlot, SLOTS,
};
pub use power::{POWER_BUTTON_GSI, POWER_PORT, POWER_PORTS, PowerRegisters};
pub use reset::{KEYBOARD_PORT, KeyboardReset, write_reset_vector};
