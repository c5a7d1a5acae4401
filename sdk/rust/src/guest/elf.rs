//! ELF images for x86: the segments to load, the entry point, the notes (System V ABI, chapters 4 and 5).

use super::{Layout, Source};
use crate::personality::{Error, Memory};

/// More program headers than this are no guest's: the count is the image's word.
const MAX_HEADERS: u16 = 256;
/// More bytes of notes than this are not looked at.
const MAX_NOTES: u64 = 1 << 20;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;

/// The width of an ELF image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// ELFCLASS32 for the 80386.
    Elf32,
    /// ELFCLASS64 for x86-64.
    Elf64,
}

/// A segment to load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where its bytes are in the image.
    pub offset: u64,
    /// Its guest-physical address.
    pub address: u64,
    /// How many bytes come from the image.
    pub file_size: u64,
    /// How many bytes it takes in memory; those past `file_size` are zero.
    pub memory_size: u64,
}

/// An ELF image, checked: every segment's bytes lie inside the image, and its addresses do not wrap.
#[derive(Clone, Debug)]
pub struct Elf {
    /// Its width.
    pub class: Class,
    /// The entry point, as linked.
    pub entry: u64,
    /// The segments to load, in the image's order; none is empty.
    pub segments: Vec<Segment>,
    notes: Vec<(u64, u64)>,
}

impl Elf {
    /// Reads the headers. `None`: the image does not begin as an ELF file does.
    ///
    /// # Errors
    /// It is one for another machine, or damaged, or has nothing to load.
    pub fn parse(image: &(impl Source + ?Sized)) -> Result<Option<Self>, Error> {
        if image.size() < 4 || image.read_exact(0, 4)? != *b"\x7fELF" {
            return Ok(None);
        }
        let corrupt = |what: String| Error::Corrupt(format!("the ELF file {what}"));
        if image.size() < 52 {
            return Err(corrupt(format!(
                "is truncated: it has {} bytes, its header alone takes 52",
                image.size()
            )));
        }
        let head = Fields(image.read_exact(0, 52)?);
        let machine = head.u16(18);
        let class = match (head.0[4], head.0[5], machine) {
            (1, 1, EM_386) => Class::Elf32,
            (2, 1, EM_X86_64) => Class::Elf64,
            _ => {
                return Err(Error::NotMine(format!(
                    "looked for an ELF image for x86 (machine 3, 32-bit) or x86-64 (machine 62, 64-bit), little-endian; \
                     found class {}, data encoding {}, machine {machine}",
                    head.0[4], head.0[5],
                )));
            }
        };
        let head = Fields(image.read_exact(0, if class == Class::Elf64 { 64 } else { 52 })?);
        let (entry, table, entry_size, count) = match class {
            Class::Elf32 => (head.u32(24), head.u32(28), head.u16(42), head.u16(44)),
            Class::Elf64 => (head.u64(24), head.u64(32), head.u16(54), head.u16(56)),
        };
        let expected = if class == Class::Elf64 { 56 } else { 32 };
        if entry_size != expected || count == 0 || count > MAX_HEADERS {
            return Err(corrupt(format!(
                "has {count} program headers of {entry_size} bytes; 1 to {MAX_HEADERS} of {expected} were looked for"
            )));
        }
        let table = image.read_exact(table, u64::from(entry_size) * u64::from(count))?;

        let mut elf = Self { class, entry, segments: Vec::new(), notes: Vec::new() };
        for (index, header) in table.chunks_exact(usize::from(entry_size)).enumerate() {
            let header = Fields(header.to_vec());
            let (offset, address, file_size, memory_size) = match class {
                Class::Elf32 => (header.u32(4), header.u32(12), header.u32(16), header.u32(20)),
                Class::Elf64 => (header.u64(8), header.u64(24), header.u64(32), header.u64(40)),
            };
            let kind = header.u32(0);
            let is = |wanted: u32| kind == u64::from(wanted);
            if !is(PT_LOAD) && !is(PT_NOTE) {
                continue;
            }
            if offset.checked_add(file_size).is_none_or(|end| end > image.size()) {
                return Err(corrupt(format!(
                    "is truncated: segment {index} ends at byte {}, the file has {}",
                    offset.saturating_add(file_size),
                    image.size()
                )));
            }
            if is(PT_NOTE) {
                elf.notes.push((offset, file_size));
            } else if memory_size > 0 {
                if file_size > memory_size || address.checked_add(memory_size).is_none() {
                    return Err(corrupt(format!(
                        "is damaged: segment {index} is to put {file_size:#x} bytes into {memory_size:#x} at {address:#x}"
                    )));
                }
                elf.segments.push(Segment { offset, address, file_size, memory_size });
            }
        }
        if elf.segments.is_empty() {
            return Err(corrupt("has no segment to load".into()));
        }
        Ok(Some(elf))
    }

    /// The first address that any segment takes, and the first one past all of them.
    #[must_use]
    pub fn extent(&self) -> (u64, u64) {
        let start = self.segments.iter().map(|segment| segment.address).min().unwrap_or(0);
        let end =
            self.segments.iter().map(|segment| segment.address + segment.memory_size).max().unwrap_or(0);
        (start, end)
    }

    /// The contents of the first note of this owner and type.
    ///
    /// # Errors
    /// The image cannot be read.
    pub fn note(
        &self,
        image: &(impl Source + ?Sized),
        owner: &str,
        kind: u32,
    ) -> Result<Option<Vec<u8>>, Error> {
        for &(offset, size) in &self.notes {
            let bytes = image.read_exact(offset, size.min(MAX_NOTES))?;
            if let Some(found) = find_note(&bytes, owner.as_bytes(), kind) {
                return Ok(Some(found.to_vec()));
            }
        }
        Ok(None)
    }

    /// Takes room for every segment and copies it there. What a segment has in memory beyond its bytes in the image stays zero.
    ///
    /// # Errors
    /// A segment does not lie in RAM, or on something else.
    pub fn load(
        &self,
        image: &(impl Source + ?Sized),
        layout: &mut Layout,
        memory: &Memory<'_>,
    ) -> Result<(), Error> {
        let (start, end) = self.extent();
        // As one range: what lies between the segments is the guest's as well, and the message names the whole.
        layout.take(start, end - start, "the image")?;
        for segment in &self.segments {
            image.place(memory, segment.address, segment.offset, segment.file_size)?;
        }
        Ok(())
    }
}

/// Notes are a name size, a contents size and a type, then name and contents, each padded to 4 bytes.
fn find_note<'a>(mut bytes: &'a [u8], owner: &[u8], kind: u32) -> Option<&'a [u8]> {
    loop {
        let (header, rest) = bytes.split_first_chunk::<12>()?;
        let header = Fields(header.to_vec());
        let name_size = usize::try_from(header.u32(0)).ok()?;
        let contents_size = usize::try_from(header.u32(4)).ok()?;
        let name = rest.get(..name_size)?;
        let rest = rest.get(name_size.checked_next_multiple_of(4)?..)?;
        let contents = rest.get(..contents_size)?;
        if header.u32(8) == u64::from(kind) && name.strip_suffix(b"\0").unwrap_or(name) == owner {
            return Some(contents);
        }
        bytes = rest.get(contents_size.checked_next_multiple_of(4)?..)?;
    }
}

/// Little-endian fields of a header that was read whole. Offsets are constants of the format, inside it.
struct Fields(Vec<u8>);

impl Fields {
    fn at<const N: usize>(&self, offset: usize) -> [u8; N] {
        self.0.get(offset..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
    }
    fn u16(&self, offset: usize) -> u16 {
        u16::from_le_bytes(self.at(offset))
    }
    fn u32(&self, offset: usize) -> u64 {
        u32::from_le_bytes(self.at(offset)).into()
    }
    fn u64(&self, offset: usize) -> u64 {
        u64::from_le_bytes(self.at(offset))
    }
}
