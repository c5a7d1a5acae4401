//! The zero page (`boot_params`) of Linux's own boot protocols (Documentation/arch/x86/zero-page.rst and boot.rst).

use tenon_sdk::guest::{Layout, Source};
use tenon_sdk::personality::{Error, Machine, Memory};

use crate::header::{START, SetupHeader};
use crate::pvh::map_type;
use crate::{Extras, LOW_END, LOW_START};

const SIZE: usize = 4096;
/// The table in the zero page has this many entries.
const MAX_MAP: usize = 128;
const MAP: usize = 0x2d0;
/// No boot loader of the registered ones.
const LOADER_UNKNOWN: u8 = 0xff;

/// Writes the zero page and the command line into low memory; returns the zero page's address. Without a `header` the kernel is
/// a bare ELF image and gets the one that a boot loader would have made of its own bzImage.
///
/// # Errors
/// There is no room.
pub(crate) fn write(
    header: Option<&SetupHeader>,
    machine: &Machine,
    extras: &Extras<'_>,
    layout: &mut Layout,
    memory: &Memory<'_>,
) -> Result<u64, Error> {
    let cmdline =
        layout.take_lowest(extras.cmdline.len() as u64 + 1, LOW_START, LOW_END, "the command line")?;
    let mut text = extras.cmdline.as_bytes().to_vec();
    text.push(0);
    text[..].place(memory, cmdline, 0, text.len() as u64)?;

    let mut page = Page(vec![0; SIZE]);
    match header {
        Some(header) => page.put(START, &header.bytes),
        None => {
            page.put(0x1fe, &[0x55, 0xaa]);
            page.put(0x202, b"HdrS");
            page.put(0x206, &0x020f_u16.to_le_bytes());
            page.put(0x211, &[1]);
            page.put(0x230, &(2u32 << 20).to_le_bytes());
        }
    }
    page.put(0x210, &[LOADER_UNKNOWN]);
    page.put_split(0x228, 0x0c8, cmdline);
    if let Some((address, size)) = extras.initrd {
        page.put_split(0x218, 0x0c0, address);
        page.put_split(0x21c, 0x0c4, size);
    }
    page.put(0x070, &machine.rsdp.unwrap_or(0).to_le_bytes());

    let Ok(count) = u8::try_from(machine.memory.len())
        .map_err(drop)
        .and_then(|count| if usize::from(count) <= MAX_MAP { Ok(count) } else { Err(()) })
    else {
        return Err(Error::NoRoom(format!(
            "the machine has {} memory ranges; Linux's zero page has room for {MAX_MAP}",
            machine.memory.len()
        )));
    };
    page.put(0x1e8, &[count]);
    for (index, range) in machine.memory.iter().enumerate() {
        let at = MAP + index * 20;
        page.put(at, &range.start.to_le_bytes());
        page.put(at + 8, &range.size.to_le_bytes());
        page.put(at + 16, &map_type(range.kind).to_le_bytes());
    }

    let address = layout.take_lowest(SIZE as u64, LOW_START, LOW_END, "the zero page")?;
    memory.write(address, &page.0)?;
    Ok(address)
}

/// The page; offsets are the protocol's, all inside it.
struct Page(Vec<u8>);

impl Page {
    fn put(&mut self, offset: usize, bytes: &[u8]) {
        self.0[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// Older kernels know the low half of an address or size only; the high half has a place elsewhere.
    fn put_split(&mut self, low: usize, high: usize, value: u64) {
        let bytes = value.to_le_bytes();
        self.put(low, &bytes[..4]);
        self.put(high, &bytes[4..]);
    }
}
