//! The bench of a personality: a machine's memory, images, and what `load` makes of them.

use std::cell::RefCell;
use std::collections::BTreeMap;

use tenon_sdk::personality::{
    Boot, Config, Error, Level, MAX_READ, Machine, MemoryKind, MemoryRange, Personality, Result, hosted,
};

const PAGE: usize = 4096;

/// What a personality is given.
#[derive(Clone, Debug)]
pub struct LoadBench {
    machine: Machine,
    images: Vec<(String, Vec<u8>)>,
    options: Vec<(String, String)>,
}

impl LoadBench {
    /// A machine of one vCPU with `memory` bytes of RAM, laid out as Tenon's: a hole from 640 KiB to 1 MiB that holds the ACPI tables, and RAM
    /// from 3 GiB moved up to 4 GiB.
    #[must_use]
    pub fn new(memory: u64) -> Self {
        const HOLE: (u64, u64) = (0xa_0000, 0x10_0000);
        const LOW: u64 = 3 << 30;
        let mut ranges = vec![
            MemoryRange { start: 0, size: memory.min(HOLE.0), kind: MemoryKind::Ram },
            MemoryRange { start: HOLE.0, size: HOLE.1 - HOLE.0, kind: MemoryKind::Reserved },
        ];
        if memory > HOLE.1 {
            ranges.push(MemoryRange { start: HOLE.1, size: memory.min(LOW) - HOLE.1, kind: MemoryKind::Ram });
        }
        if memory > LOW {
            ranges.push(MemoryRange { start: 4 << 30, size: memory - LOW, kind: MemoryKind::Ram });
        }
        Self::with(Machine { vcpus: 1, memory: ranges, rsdp: Some(0xe_0000) })
    }

    /// A machine of the test's own.
    #[must_use]
    pub fn with(machine: Machine) -> Self {
        Self { machine, images: Vec::new(), options: Vec::new() }
    }

    /// Adds an image.
    #[must_use]
    pub fn image(mut self, role: &str, bytes: impl Into<Vec<u8>>) -> Self {
        self.images.push((role.to_owned(), bytes.into()));
        self
    }

    /// Adds an option.
    #[must_use]
    pub fn option(mut self, key: &str, value: &str) -> Self {
        self.options.push((key.to_owned(), value.to_owned()));
        self
    }

    /// The machine.
    #[must_use]
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Loads.
    ///
    /// # Errors
    /// The personality refuses.
    pub fn load<P: Personality>(&self) -> Result<Loaded> {
        let loading = Loading { bench: self, pages: RefCell::default(), log: RefCell::default() };
        let boot = hosted::enter(&loading, || {
            let (memory, images) = hosted::handles(u32::try_from(self.images.len()).unwrap_or(u32::MAX));
            P::load(&self.machine, &memory, images, &Config::new(self.options.iter().cloned()))
        })?;
        Ok(Loaded { boot, pages: loading.pages.into_inner(), log: loading.log.into_inner() })
    }

    fn image_at(&self, image: u32) -> &(String, Vec<u8>) {
        &self.images[image as usize]
    }

    fn part(&self, image: u32, offset: u64, len: u64) -> &[u8] {
        let bytes = self.image_at(image).1.as_slice();
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
        let len = usize::try_from(len).unwrap_or(usize::MAX).min(bytes.len() - start);
        &bytes[start..start + len]
    }

    /// Whether all of a range is RAM, in one range or several that touch.
    fn is_ram(&self, address: u64, len: u64) -> bool {
        let Some(end) = address.checked_add(len) else { return false };
        let mut reached = address;
        for range in self.machine.memory.iter().filter(|range| range.kind == MemoryKind::Ram) {
            if (range.start..range.start.saturating_add(range.size)).contains(&reached) {
                reached = range.start.saturating_add(range.size);
            }
        }
        reached >= end
    }
}

type Pages = BTreeMap<u64, Box<[u8; PAGE]>>;

struct Loading<'a> {
    bench: &'a LoadBench,
    pages: RefCell<Pages>,
    log: RefCell<Vec<(Level, String)>>,
}

impl hosted::Host for Loading<'_> {
    fn log(&self, level: Level, message: &str) {
        self.log.borrow_mut().push((level, message.to_owned()));
    }

    fn image_role(&self, image: u32) -> String {
        self.bench.image_at(image).0.clone()
    }

    fn image_size(&self, image: u32) -> u64 {
        self.bench.image_at(image).1.len() as u64
    }

    fn image_read(&self, image: u32, offset: u64, len: u32) -> Result<Vec<u8>> {
        Ok(self.bench.part(image, offset, len.min(MAX_READ).into()).to_vec())
    }

    fn memory_write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        if !self.bench.is_ram(address, bytes.len() as u64) {
            return Err(Error::Invalid(format!("{} bytes at {address:#x} are not all RAM", bytes.len())));
        }
        let mut pages = self.pages.borrow_mut();
        let (mut address, mut rest) = (address, bytes);
        while !rest.is_empty() {
            let (page, at) = split(address);
            let (part, more) = rest.split_at(rest.len().min(PAGE - at));
            let page = pages.entry(page).or_insert_with(|| Box::new([0; PAGE]));
            page[at..at + part.len()].copy_from_slice(part);
            address += part.len() as u64;
            rest = more;
        }
        Ok(())
    }

    fn memory_copy_image(&self, address: u64, image: u32, offset: u64, len: u64) -> Result<()> {
        let part = self.bench.part(image, offset, len);
        if (part.len() as u64) < len {
            return Err(Error::Invalid(format!(
                "{len} bytes at {offset:#x} are not all in the image `{}`",
                self.image_role(image)
            )));
        }
        self.memory_write(address, part)
    }
}

fn split(address: u64) -> (u64, usize) {
    let page = address / PAGE as u64;
    (page, usize::try_from(address % PAGE as u64).unwrap_or(0))
}

/// What a personality made.
pub struct Loaded {
    /// What it said.
    pub boot: Boot,
    /// What it logged.
    pub log: Vec<(Level, String)>,
    pages: Pages,
}

impl Loaded {
    /// Guest memory; what was not written is zero.
    #[must_use]
    pub fn memory(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len);
        while bytes.len() < len {
            let (page, at) = split(address + bytes.len() as u64);
            let part = (PAGE - at).min(len - bytes.len());
            match self.pages.get(&page) {
                Some(page) => bytes.extend_from_slice(&page[at..at + part]),
                None => bytes.resize(bytes.len() + part, 0),
            }
        }
        bytes
    }

    /// A little-endian number of at most 8 bytes in guest memory.
    #[must_use]
    pub fn number(&self, address: u64, size: usize) -> u64 {
        self.memory(address, size.min(8)).iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
    }

    /// The text up to the next zero byte in guest memory.
    #[must_use]
    pub fn text(&self, address: u64) -> String {
        let bytes: Vec<u8> =
            (address..).map(|at| self.memory(at, 1)[0]).take_while(|byte| *byte != 0).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}
