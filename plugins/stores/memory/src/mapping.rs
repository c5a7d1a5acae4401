//! Memory that exists where it was written: an anonymous mapping without reserve.
#![allow(unsafe_code, reason = "mmap, and copies to and from it")]

use std::io;

/// The unit in which memory is taken and given back.
pub(crate) const PAGE: usize = 4096;

/// The unit in which is noted what was written.
const CHUNK: u64 = 64 << 10;

/// So many bytes of zeroes, until they are written.
pub(crate) struct Mapping {
    base: *mut u8,
    size: u64,
    /// The chunks that were written: a bit each.
    written: Vec<u64>,
}

// SAFETY: the mapping is this value's own.
unsafe impl Send for Mapping {}

impl Mapping {
    pub(crate) fn new(size: u64) -> io::Result<Self> {
        // SAFETY: a new mapping, anywhere.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length(size)?,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { base: base.cast(), size, written: vec![0; words(size)] })
    }

    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    pub(crate) fn resize(&mut self, size: u64) -> io::Result<()> {
        if size < self.size {
            // The last page stays, and shall hold nothing when the disk grows again.
            self.clear(size, self.size - size);
        }
        // SAFETY: the mapping is ours, and nothing points into it.
        let base = unsafe {
            libc::mremap(self.base.cast(), length(self.size)?, length(size)?, libc::MREMAP_MAYMOVE)
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        (self.base, self.size) = (base.cast(), size);
        self.written.resize(words(size), 0);
        Ok(())
    }

    /// Copies bytes of the disk to memory.
    ///
    /// # Safety
    /// The range is inside the disk, and `to` is good for as many bytes.
    pub(crate) unsafe fn read(&self, position: u64, to: *mut u8, count: usize) {
        // SAFETY: promised by the caller.
        unsafe { std::ptr::copy_nonoverlapping(self.at(position), to, count) };
    }

    /// Copies memory to the disk.
    ///
    /// # Safety
    /// The range is inside the disk, and `from` is good for as many bytes.
    pub(crate) unsafe fn write(&mut self, position: u64, from: *const u8, count: usize) {
        if count > 0 {
            (position / CHUNK..=(position + count as u64 - 1) / CHUNK)
                .for_each(|chunk| self.note(chunk, true));
        }
        // SAFETY: promised by the caller.
        unsafe { std::ptr::copy_nonoverlapping(from, self.at(position), count) };
    }

    /// Makes a range inside the disk read as zeroes, and gives its whole pages back.
    pub(crate) fn clear(&mut self, position: u64, count: u64) {
        let page = PAGE as u64;
        let end = position + count;
        assert!(end <= self.size, "the range was checked");
        let (first, last) = (position.next_multiple_of(page), end / page * page);
        if first >= last {
            self.zero(position, end);
            return;
        }
        self.zero(position, first);
        self.zero(last, end);
        (position.div_ceil(CHUNK)..end / CHUNK).for_each(|chunk| self.note(chunk, false));
        let whole = usize::try_from(last - first).unwrap_or(0);
        // SAFETY: whole pages of our own mapping; anonymous private memory then reads as zeroes.
        if unsafe { libc::madvise(self.at(first).cast(), whole, libc::MADV_DONTNEED) } != 0 {
            self.zero(first, last);
        }
    }

    /// The pages that may hold something else than zeroes; the disk's last may be shorter.
    pub(crate) fn pages(&self) -> impl Iterator<Item = (u64, &[u8])> {
        let page = PAGE as u64;
        let chunks = (0_u64..).zip(&self.written).filter(|(_, bits)| **bits != 0).flat_map(|(word, bits)| {
            (0..64).filter(move |bit| bits >> bit & 1 != 0).map(move |bit| word * 64 + bit)
        });
        chunks
            .flat_map(move |chunk| (chunk * CHUNK..(chunk + 1) * CHUNK).step_by(PAGE))
            .take_while(|position| *position < self.size)
            .map(move |position| {
                let count = usize::try_from((self.size - position).min(page)).unwrap_or(0);
                // SAFETY: inside the mapping, which nobody writes while it is borrowed.
                (position / page, unsafe { std::slice::from_raw_parts(self.at(position), count) })
            })
    }

    fn note(&mut self, chunk: u64, written: bool) {
        let (word, bit) = (usize::try_from(chunk / 64).unwrap_or(usize::MAX), 1 << (chunk % 64));
        if let Some(word) = self.written.get_mut(word) {
            *word = if written { *word | bit } else { *word & !bit };
        }
    }

    fn zero(&mut self, from: u64, to: u64) {
        let count = usize::try_from(to - from).unwrap_or(0);
        // SAFETY: inside the mapping.
        unsafe { std::ptr::write_bytes(self.at(from), 0, count) };
    }

    fn at(&self, position: u64) -> *mut u8 {
        debug_assert!(position <= self.size);
        // SAFETY: inside the mapping; what is mapped fits a `usize`.
        unsafe { self.base.add(usize::try_from(position).unwrap_or(0)) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if let Ok(length) = length(self.size) {
            // SAFETY: the mapping is ours, and nothing points into it.
            unsafe { libc::munmap(self.base.cast(), length) };
        }
    }
}

/// The words that have a bit for each chunk of so many bytes.
fn words(size: u64) -> usize {
    usize::try_from(size.div_ceil(CHUNK * 64)).unwrap_or(0)
}

/// The length of a mapping of so many bytes.
fn length(size: u64) -> io::Result<usize> {
    usize::try_from(size)
        .ok()
        .and_then(|size| size.checked_next_multiple_of(PAGE))
        .ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))
}
