//! fw_cfg: numbered items and named files that firmware reads byte by byte (QEMU, docs/specs/fw_cfg). Two ports, no DMA, nothing to write.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tenon_core::{Lifecycle, Region};

/// The selector's port; the data port follows.
pub(crate) const PORT: u64 = 0x510;
/// How many ports.
pub(crate) const PORTS: u64 = 2;
const DATA: u64 = 1;

const SIGNATURE: u16 = 0;
const FEATURES: u16 = 1;
const CPUS: u16 = 5;
const DIRECTORY: u16 = 0x19;
const FIRST_FILE: u16 = 0x20;
/// A file's name, ended by a zero.
pub(crate) const NAME: usize = 56;

#[derive(Clone, Copy, Default)]
struct Position {
    item: u16,
    offset: u32,
}

/// See the module.
pub(crate) struct FwCfg {
    /// By number.
    items: Vec<(u16, Vec<u8>)>,
    position: Mutex<Position>,
}

/// A name as firmware compares it.
pub(crate) fn name(text: &str) -> [u8; NAME] {
    let mut name = [0; NAME];
    name.iter_mut().zip(text.bytes().take(NAME - 1)).for_each(|(to, from)| *to = from);
    name
}

impl FwCfg {
    /// Items that tell of `cpus` CPUs and of these files.
    pub(crate) fn new(mut files: Vec<(String, Vec<u8>)>, cpus: u16) -> Self {
        files.sort();
        let mut items = vec![
            (SIGNATURE, b"QEMU".to_vec()),
            // Bit 0: these ports. Bit 1 would be DMA.
            (FEATURES, 1u32.to_le_bytes().to_vec()),
            (CPUS, cpus.to_le_bytes().to_vec()),
        ];
        // The directory is big-endian: count; then size, number, two bytes of nothing, and name of each.
        let mut directory = u32::try_from(files.len()).unwrap_or(u32::MAX).to_be_bytes().to_vec();
        for (number, (path, content)) in (FIRST_FILE..).zip(files) {
            directory.extend(u32::try_from(content.len()).unwrap_or(u32::MAX).to_be_bytes());
            directory.extend(number.to_be_bytes());
            directory.extend([0; 2]);
            directory.extend(name(&path));
            items.push((number, content));
        }
        items.push((DIRECTORY, directory));
        Self { items, position: Mutex::default() }
    }

    fn position(&self) -> MutexGuard<'_, Position> {
        self.position.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next byte of the selected item; zero past its end and where there is none.
    fn next(&self) -> u8 {
        let mut position = self.position();
        let at = position.offset as usize;
        position.offset = position.offset.saturating_add(1);
        let item = self.items.iter().find(|item| item.0 == position.item);
        item.and_then(|item| item.1.get(at)).copied().unwrap_or(0)
    }
}

impl Region for FwCfg {
    fn read(&self, offset: u64, _: u8) -> u64 {
        if offset == DATA { self.next().into() } else { 0 }
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        if (offset, size) == (0, 2) {
            // Bit 14 asks for writing, which there is none of.
            let item = u16::try_from(value & 0xffff).unwrap_or(0) & !(1 << 14);
            *self.position() = Position { item, offset: 0 };
        }
    }
}

impl Lifecycle for FwCfg {
    fn name(&self) -> &'static str {
        "fw_cfg"
    }

    fn reset(&self) {
        *self.position() = Position::default();
    }

    fn save(&self) -> Result<(u32, Vec<u8>), String> {
        let position = *self.position();
        Ok((1, [&position.item.to_le_bytes()[..], &position.offset.to_le_bytes()].concat()))
    }

    fn restore(&self, schema: u32, data: &[u8]) -> Result<(), String> {
        let (1, &[i0, i1, o0, o1, o2, o3]) = (schema, data) else {
            return Err(format!(
                "fw_cfg of schema {schema} with {} bytes; this version reads schema 1, 6 bytes",
                data.len()
            ));
        };
        *self.position() =
            Position { item: u16::from_le_bytes([i0, i1]), offset: u32::from_le_bytes([o0, o1, o2, o3]) };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(device: &FwCfg, item: u16, count: usize) -> Vec<u8> {
        device.write(0, 2, item.into());
        (0..count).map(|_| device.read(DATA, 1).to_le_bytes()[0]).collect()
    }

    #[test]
    fn a_file_is_found_by_its_name_and_read_to_its_end() {
        let device = FwCfg::new(vec![("etc/b".into(), vec![1, 2, 3]), ("etc/a".into(), vec![9])], 4);
        assert_eq!(read(&device, SIGNATURE, 4), b"QEMU");
        assert_eq!(read(&device, CPUS, 2), [4, 0]);
        let directory = read(&device, DIRECTORY, 4 + 2 * 64);
        assert_eq!(directory[..4], [0, 0, 0, 2]);
        let second = &directory[4 + 64..];
        assert_eq!((&second[..4], &second[8..14]), (&[0, 0, 0, 3][..], &b"etc/b\0"[..]));
        let number = u16::from_be_bytes([second[4], second[5]]);
        assert_eq!(read(&device, number, 5), [1, 2, 3, 0, 0]);
        assert_eq!(read(&device, 0x7777, 2), [0, 0]);
    }

    #[test]
    fn a_restored_device_reads_on_where_it_was() {
        let files = || vec![("etc/b".into(), vec![1, 2, 3])];
        let device = FwCfg::new(files(), 1);
        read(&device, FIRST_FILE, 2);
        let (schema, saved) = device.save().unwrap();
        let other = FwCfg::new(files(), 1);
        other.restore(schema, &saved).unwrap();
        assert_eq!(other.read(DATA, 1), 3);
        assert!(other.restore(1, &saved[1..]).is_err());
    }
}
