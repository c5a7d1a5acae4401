//! The functions of the board itself: configuration space without anything behind it.

use std::collections::BTreeMap;

use super::config::{COMMAND, Config, Identity};
use crate::firmware::PM_PORT;

/// Where a PIIX is on a 440FX board.
pub(super) const PIIX_SLOT: u8 = 1;
const HEADER_TYPE: usize = 0x0e;
const SEVERAL_FUNCTIONS: u8 = 0x80;
const INTEL: u16 = 0x8086;
/// I/O, memory, bus master: always on.
const ALL_ON: u16 = 7;
/// Of the PIIX4's power management (Intel 290562 §7.1): the base of its ports, of which bit 0 says that they are ports, and whether they are on.
const PM_BASE: usize = 0x40;
const PM_MISC: usize = 0x80;
const PM_ON: u8 = 1;

fn function(vendor: u16, device: u16, class: u32) -> Config {
    let identity =
        Identity { vendor, device, subsystem_vendor: 0x1af4, subsystem: 0x1100, revision: 0, class };
    Config::new(identity).fix()
}

/// A host bridge of the bus's own kind, for which nobody's driver looks.
pub(super) fn plain() -> BTreeMap<u8, Config> {
    BTreeMap::from([(0, function(0x1b36, 0x0008, 0x06_0000))])
}

/// As much of a 440FX with a PIIX as OVMF looks at. The power management's ports are where the firmware would put them, and on.
pub(super) fn pc() -> BTreeMap<u8, Config> {
    let mut isa = function(INTEL, 0x7000, 0x06_0100);
    isa.put(COMMAND, &ALL_ON.to_le_bytes());
    isa.put(HEADER_TYPE, &[SEVERAL_FUNCTIONS]);
    let mut power = function(INTEL, 0x7113, 0x06_8000);
    power.put(PM_BASE, &(PM_PORT | 1).to_le_bytes());
    power.put(PM_MISC, &[PM_ON]);
    let first = PIIX_SLOT << 3;
    BTreeMap::from([(0, function(INTEL, 0x1237, 0x06_0000)), (first, isa), (first + 3, power)])
}
