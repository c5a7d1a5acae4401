//! Images to load, and a closer look at what was loaded.
#![allow(dead_code, reason = "each test file uses its part")]
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a number of so many bytes fits so many"
)]

use tenon_testkit::Loaded;

pub(crate) const MIB: u64 = 1 << 20;

/// Numbers of the usual sizes in guest memory.
pub(crate) trait Look {
    fn u8(&self, address: u64) -> u8;
    fn u32(&self, address: u64) -> u32;
    fn u64(&self, address: u64) -> u64;
}

impl Look for Loaded {
    fn u8(&self, address: u64) -> u8 {
        self.number(address, 1) as u8
    }

    fn u32(&self, address: u64) -> u32 {
        self.number(address, 4) as u32
    }

    fn u64(&self, address: u64) -> u64 {
        self.number(address, 8)
    }
}

/// A bzImage as Linux's build makes it: one setup sector with the header of protocol 2.15, then protected-mode code with a payload in it.
pub(crate) struct BzImage {
    bytes: Vec<u8>,
}

/// Bytes of boot code before the payload.
const BOOT_CODE: usize = 0x400;

impl BzImage {
    pub(crate) fn new(payload: &[u8]) -> Self {
        let code_size = (BOOT_CODE + payload.len()).next_multiple_of(16);
        let mut image = Self { bytes: vec![0; 1024 + code_size] };
        image.bytes[1024..1024 + BOOT_CODE].fill(0xc0);
        image.bytes[1024 + BOOT_CODE..1024 + BOOT_CODE + payload.len()].copy_from_slice(payload);
        let version = b"6.1.0-tiny (someone@somewhere) #1\0";
        image.bytes[0x300..0x300 + version.len()].copy_from_slice(version);
        image
            .put(0x1f1, &[1])
            .put(0x1f4, &u32::try_from(code_size / 16).unwrap().to_le_bytes())
            .put(0x1fe, &[0x55, 0xaa])
            // A jump over a header of 0x6a bytes.
            .put(0x200, &[0xeb, 0x6a])
            .put(0x202, b"HdrS")
            .put(0x206, &0x020f_u16.to_le_bytes())
            .put(0x20e, &0x100_u16.to_le_bytes())
            .put(0x211, &[1])
            .put(0x214, &0x10_0000_u32.to_le_bytes())
            .put(0x22c, &0x7fff_ffff_u32.to_le_bytes())
            .put(0x230, &0x20_0000_u32.to_le_bytes())
            .put(0x234, &[1])
            .put(0x236, &1_u16.to_le_bytes())
            .put(0x238, &2047_u32.to_le_bytes())
            .put(0x248, &u32::try_from(BOOT_CODE).unwrap().to_le_bytes())
            .put(0x24c, &u32::try_from(payload.len()).unwrap().to_le_bytes())
            .put(0x258, &(16 * MIB).to_le_bytes())
            .put(0x260, &0x20_0000_u32.to_le_bytes())
    }

    /// Changes some bytes.
    pub(crate) fn put(mut self, offset: usize, bytes: &[u8]) -> Self {
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
        self
    }

    pub(crate) fn bytes(self) -> Vec<u8> {
        self.bytes
    }
}
