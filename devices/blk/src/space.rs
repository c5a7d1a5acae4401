//! The configuration space (virtio 1.2 §5.2.4).

use crate::request::{Disk, MAX_RANGES, RangeKind, SECTOR};

/// Its length: up to and with the fields of write-zeroes.
pub(crate) const SIZE: u16 = 60;
/// The offset of the only field that a driver writes.
pub(crate) const WRITEBACK: u32 = 32;

/// Drives with larger physical blocks are rare enough that some file systems refuse them.
const MAX_PHYSICAL: u32 = 4096;

/// The space of a disk with so many queues of so many entries.
pub(crate) fn bytes(disk: &Disk, queues: u16, queue_size: u16, writeback: bool) -> [u8; SIZE as usize] {
    let info = &disk.info;
    let block = info.block_size.max(1);
    let physical = info.optimal_size.min(MAX_PHYSICAL).max(block);
    let exponent = (physical / block).checked_ilog2().unwrap_or(0);
    let in_blocks = |size: u32| size / block;

    let mut space = [0; SIZE as usize];
    let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &(info.size / SECTOR).to_le_bytes());
    // A chain needs two descriptors for header and status.
    put(12, &u32::from(queue_size - 2).to_le_bytes());
    put(20, &block.to_le_bytes());
    put(24, &[u8::try_from(exponent).unwrap_or(0), 0]);
    put(26, &u16::try_from(in_blocks(physical)).unwrap_or(1).to_le_bytes());
    put(28, &in_blocks(info.optimal_size).to_le_bytes());
    put(32, &[writeback.into()]);
    put(34, &queues.to_le_bytes());
    put(36, &disk.max_sectors(RangeKind::Discard).to_le_bytes());
    put(40, &MAX_RANGES.to_le_bytes());
    put(44, &(info.optimal_size.max(block) / 512).to_le_bytes());
    put(48, &disk.max_sectors(RangeKind::WriteZeroes).to_le_bytes());
    put(52, &MAX_RANGES.to_le_bytes());
    put(56, &[info.write_zeroes.into()]);
    space
}
