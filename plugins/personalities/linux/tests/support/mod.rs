//! A bench for loading in this process, and images to load.
#![allow(dead_code, reason = "each test file uses its part")]

use std::cell::RefCell;

use tenon_sdk::personality::hosted::{Host, enter, handles};
use tenon_sdk::personality::{
    Boot, Config, Error, Level, Machine, MemoryKind, MemoryRange, Personality, Result,
};

pub(crate) const MIB: u64 = 1 << 20;

/// A machine with RAM from 0, a hole of ACPI tables in it, and memory that remembers.
pub(crate) struct Bench {
    pub(crate) machine: Machine,
    images: Vec<(String, Vec<u8>)>,
    options: Vec<(String, String)>,
    ram: RefCell<Vec<u8>>,
    pub(crate) log: RefCell<Vec<String>>,
}

impl Bench {
    pub(crate) fn new(ram: u64) -> Self {
        let range = |start, end, kind| MemoryRange { start, size: end - start, kind };
        let memory = vec![
            range(0, 0xa_0000, MemoryKind::Ram),
            range(0xa_0000, 0x10_0000, MemoryKind::Reserved),
            range(0x10_0000, ram - 0x1_0000, MemoryKind::Ram),
            range(ram - 0x1_0000, ram, MemoryKind::Acpi),
        ];
        Self {
            machine: Machine { vcpus: 2, memory, rsdp: Some(ram - 0x1_0000) },
            images: Vec::new(),
            options: Vec::new(),
            ram: RefCell::new(vec![0; usize::try_from(ram).unwrap()]),
            log: RefCell::default(),
        }
    }

    pub(crate) fn image(mut self, role: &str, bytes: impl Into<Vec<u8>>) -> Self {
        self.images.push((role.into(), bytes.into()));
        self
    }

    pub(crate) fn option(mut self, key: &str, value: &str) -> Self {
        self.options.push((key.into(), value.into()));
        self
    }

    pub(crate) fn load<P: Personality>(&self) -> Result<Boot> {
        enter(self, || {
            let (memory, images) = handles(u32::try_from(self.images.len()).unwrap());
            P::load(&self.machine, &memory, images, &Config::new(self.options.clone()))
        })
    }

    pub(crate) fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let start = usize::try_from(address).unwrap();
        self.ram.borrow()[start..start + len].to_vec()
    }

    pub(crate) fn u8(&self, address: u64) -> u8 {
        self.bytes(address, 1)[0]
    }

    pub(crate) fn u32(&self, address: u64) -> u32 {
        u32::from_le_bytes(self.bytes(address, 4).try_into().unwrap())
    }

    pub(crate) fn u64(&self, address: u64) -> u64 {
        u64::from_le_bytes(self.bytes(address, 8).try_into().unwrap())
    }

    pub(crate) fn text(&self, address: u64) -> String {
        let bytes = self.bytes(address, 4096);
        String::from_utf8(bytes.into_iter().take_while(|byte| *byte != 0).collect()).unwrap()
    }
}

impl Host for Bench {
    fn log(&self, _level: Level, message: &str) {
        self.log.borrow_mut().push(message.into());
    }

    fn image_role(&self, image: u32) -> String {
        self.images[image as usize].0.clone()
    }

    fn image_size(&self, image: u32) -> u64 {
        self.images[image as usize].1.len() as u64
    }

    fn image_read(&self, image: u32, offset: u64, len: u32) -> Result<Vec<u8>> {
        let bytes = &self.images[image as usize].1;
        let start = usize::try_from(offset).unwrap().min(bytes.len());
        Ok(bytes[start..bytes.len().min(start + len as usize)].to_vec())
    }

    fn memory_write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        let end = address.checked_add(bytes.len() as u64).unwrap();
        let ram = self.machine.memory.iter().filter(|range| range.kind == MemoryKind::Ram);
        if !ram.clone().any(|range| range.start <= address && end <= range.start + range.size) {
            return Err(Error::Other(format!("{address:#x} to {end:#x} is not RAM")));
        }
        let start = usize::try_from(address).unwrap();
        self.ram.borrow_mut()[start..start + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn memory_copy_image(&self, address: u64, image: u32, offset: u64, len: u64) -> Result<()> {
        let bytes = &self.images[image as usize].1;
        let start = usize::try_from(offset).unwrap();
        let part = bytes.get(start..start + usize::try_from(len).unwrap());
        self.memory_write(address, part.ok_or_else(|| Error::Other("past the image".into()))?)
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
            .put(0x260, &(2 * MIB as u32).to_le_bytes())
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
