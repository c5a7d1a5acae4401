//! Guest memory given back to the host, page by page.

use rustix::fs::{FallocateFlags, fallocate};
use tenon_core::{Buffers, HIGH_BASE, LOW_END, Ram};

const PAGE: u64 = 4096;
/// How many page numbers are read at once, and the most in one request.
const AT_ONCE: usize = 4096;
const MOST: u64 = 1 << 20;

/// Collects neighbouring pages, so that each row of them costs one system call.
struct Rows<'a> {
    ram: &'a Ram,
    start: u64,
    count: u64,
    released: u32,
}

impl Rows<'_> {
    fn add(&mut self, page: u64) {
        if self.count > 0 && page == self.start + self.count {
            self.count += 1;
        } else {
            self.finish();
            (self.start, self.count) = (page, 1);
        }
    }

    fn finish(&mut self) {
        let (start, count) = (self.start, std::mem::take(&mut self.count));
        if count > 0 && release(self.ram, start * PAGE, count * PAGE) {
            self.released = self.released.saturating_add(u32::try_from(count).unwrap_or(u32::MAX));
        }
    }
}

/// Whether these bytes are RAM, and if so where they are in the memory file.
fn place(ram: &Ram, address: u64, length: u64) -> Option<u64> {
    let low = ram.size().min(LOW_END);
    let end = address.checked_add(length)?;
    if end <= low {
        return Some(address);
    }
    let offset = address.checked_sub(HIGH_BASE)?.checked_add(low)?;
    (offset + length <= ram.size()).then_some(offset)
}

fn release(ram: &Ram, address: u64, length: u64) -> bool {
    let Some(offset) = place(ram, address, length) else { return false };
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let released = fallocate(ram.file(), flags, offset, length).is_ok();
    if released {
        ram.written(address, length);
    }
    released
}

/// Gives back the pages whose numbers are in `list`; how many.
pub(super) fn numbered(list: &Buffers) -> u32 {
    let ram = list.ram().clone();
    let mut rows = Rows { ram: &ram, start: 0, count: 0, released: 0 };
    let mut bytes = [0; 4 * AT_ONCE];
    let end = list.length().min(4 * MOST) & !3;
    let mut offset = 0;
    while offset < end {
        let count = usize::try_from(end - offset).unwrap_or(usize::MAX).min(bytes.len());
        list.read(offset, &mut bytes[..count]);
        for number in bytes[..count].as_chunks::<4>().0 {
            let page = u64::from(u32::from_le_bytes(*number));
            // One by one, so that a row never runs out of RAM.
            if place(&ram, page * PAGE, PAGE).is_some() {
                // The end of low RAM and the beginning of high RAM are no neighbours by number.
                rows.add(page);
            }
        }
        offset += count as u64;
    }
    rows.finish();
    rows.released
}

/// Gives back the whole pages of `row`; how many.
pub(super) fn own(row: &Buffers) -> u32 {
    let mut released = 0u64;
    for (address, length) in row.ranges() {
        let start = address.next_multiple_of(PAGE);
        let end = (address + length) & !(PAGE - 1);
        if start < end && release(row.ram(), start, end - start) {
            released += (end - start) / PAGE;
        }
    }
    u32::try_from(released).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tenon_core::MIN_MEMORY;

    fn byte(ram: &std::sync::Arc<Ram>, address: u64) -> u8 {
        let mut row = Buffers::new(ram);
        row.push(address, 1).unwrap();
        let mut byte = [0];
        row.read(0, &mut byte);
        byte[0]
    }

    fn filled() -> std::sync::Arc<Ram> {
        let ram = Ram::new(MIN_MEMORY).unwrap();
        let mut row = Buffers::new(&ram);
        row.push(0, MIN_MEMORY).unwrap();
        row.write(0, &vec![0xaa; usize::try_from(MIN_MEMORY).unwrap()]);
        ram
    }

    #[test]
    fn numbered_pages_read_as_zeroes_and_others_are_passed_over() {
        let ram = filled();
        let mut list = Buffers::new(&ram);
        list.push(0, 4 * 5 + 2).unwrap();
        let numbers = [16u32, 17, 20, u32::MAX, 256].map(u32::to_le_bytes).concat();
        list.write(0, &numbers);
        assert_eq!(numbered(&list), 3);
        let seen = [15, 16, 17, 18, 20, 21].map(|page| byte(&ram, page * PAGE));
        assert_eq!(seen, [0xaa, 0, 0, 0xaa, 0, 0xaa]);
    }

    #[test]
    fn partial_pages_of_a_request_stay() {
        let ram = filled();
        let mut row = Buffers::new(&ram);
        row.push(0x1800, 0x2000).unwrap();
        row.push(0x8000, 0xfff).unwrap();
        assert_eq!(own(&row), 1);
        let seen = [0x1800, 0x2000, 0x2fff, 0x3000, 0x8000].map(|address| byte(&ram, address));
        assert_eq!(seen, [0xaa, 0, 0, 0xaa, 0xaa]);
    }
}
