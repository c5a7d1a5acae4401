//! What follows a write to guest memory: the dirty log notes the page, and an engine forgets the code that it decoded from there.
//!
//! Engines see to the writes of their vCPUs themselves. Everybody else who writes guest memory while a machine runs, on whatever thread,
//! has one obligation, [`Ram::written`](crate::Ram::written): after the bytes are in memory, and before the guest can learn of them
//! (a used ring, a register, an interrupt). Writes through [`Ram::map`](crate::Ram::map) and [`Buffers::write`](crate::Buffers::write) do
//! it by themselves; whoever writes by a pointer, or lets the host's kernel write by one, calls it.
//!
//! How a write and decoding go together. The writer stores the bytes, passes a fence and then looks whether they are marked as code. The
//! engine marks them, passes a fence and then reads the bytes that it goes by. So the writer sees the mark, or the engine sees the
//! bytes, or both.
//!
//! A write that nobody has to hear of, as under KVM without a dirty log, costs two loads.
#![allow(unsafe_code, reason = "tables of zeros that cost no memory until they are touched")]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};

const PAGE: u64 = 4096;

/// Zeros that cost no memory until they are touched.
fn zeros(count: usize) -> Box<[AtomicU64]> {
    // SAFETY: an `AtomicU64` of zero bytes is a zero.
    unsafe { Box::new_zeroed_slice(count).assume_init() }
}

/// Pages are known by their index: their place in the memory file in units of 4 KiB.
fn index(page: u64) -> usize {
    usize::try_from(page).unwrap_or(usize::MAX)
}

/// Which pages of RAM have been written.
#[derive(Debug)]
pub struct DirtyLog {
    on: AtomicBool,
    /// A bit per page.
    bits: Box<[AtomicU64]>,
}

impl DirtyLog {
    fn new(pages: usize) -> Self {
        Self { on: AtomicBool::new(false), bits: zeros(pages.div_ceil(64)) }
    }

    /// Starts an empty log, or ends it.
    pub fn set(&self, on: bool) {
        for word in self.bits.iter().filter(|word| word.load(Ordering::Relaxed) != 0) {
            word.store(0, Ordering::SeqCst);
        }
        self.on.store(on, Ordering::SeqCst);
    }

    /// Whether writes are noted.
    #[inline]
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    /// Notes that the page with this index was written, if the log is on.
    #[inline]
    pub fn mark(&self, page: usize) {
        if self.is_on() {
            self.bits[page / 64].fetch_or(1 << (page % 64), Ordering::SeqCst);
        }
    }

    /// Whether the page is noted.
    #[inline]
    #[must_use]
    pub fn is_marked(&self, page: usize) -> bool {
        self.bits[page / 64].load(Ordering::SeqCst) >> (page % 64) & 1 != 0
    }

    /// Takes the notes: the indices of pages, in ascending order.
    #[must_use]
    pub fn take(&self) -> Vec<usize> {
        let mut pages = Vec::new();
        for (n, word) in self.bits.iter().enumerate() {
            if word.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let mut bits = word.swap(0, Ordering::SeqCst);
            while bits != 0 {
                pages.push(n * 64 + bits.trailing_zeros() as usize);
                bits &= bits - 1;
            }
        }
        pages
    }
}

/// An engine that keeps decoded code.
pub trait CodeWatch: Send + Sync {
    /// Bytes that are marked in [`CodePages`] have been written, in the page with this index. From when this returns no vCPU enters what was
    /// decoded from that page without having looked at the new bytes. Called on the writer's thread, which may be a vCPU's; it does not
    /// wait for a vCPU.
    fn code_written(&self, page: usize);
}

/// Which bytes of RAM an engine has decoded as code.
pub struct CodePages {
    granules: Box<[AtomicU64]>,
    watchers: Mutex<Vec<Weak<dyn CodeWatch>>>,
}

impl CodePages {
    /// The marks of the page with this index: a bit for each 64 bytes of it. The engine sets them before it reads the bytes that it goes
    /// by, and clears them when it forgets.
    #[inline]
    #[must_use]
    pub fn page(&self, page: usize) -> &AtomicU64 {
        &self.granules[page]
    }

    /// The marks that bytes in one page have, from the address of the first one and their number, which is at least 1.
    #[inline]
    #[must_use]
    pub fn granules(address: u64, length: u64) -> u64 {
        let (first, last) = (address >> 6 & 63, (address & (PAGE - 1)).wrapping_add(length - 1) >> 6 & 63);
        (u64::MAX >> (63 - (last - first))) << first
    }

    /// Adds an engine to those that are told.
    pub fn watch(&self, watcher: Weak<dyn CodeWatch>) {
        let mut watchers = self.watchers.lock().unwrap_or_else(PoisonError::into_inner);
        watchers.retain(|watcher| watcher.strong_count() != 0);
        watchers.push(watcher);
    }

    #[cold]
    fn tell(&self, page: usize) {
        let watchers = self.watchers.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for watcher in watchers.iter().filter_map(Weak::upgrade) {
            watcher.code_written(page);
        }
    }
}

/// What there is to do after a write.
pub(crate) struct Writes {
    pages: usize,
    pub(crate) log: DirtyLog,
    code: OnceLock<Arc<CodePages>>,
}

impl std::fmt::Debug for Writes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writes").field("pages", &self.pages).finish_non_exhaustive()
    }
}

impl Writes {
    pub(crate) fn new(size: u64) -> Arc<Self> {
        let pages = index(size / PAGE);
        Arc::new(Self { pages, log: DirtyLog::new(pages), code: OnceLock::new() })
    }

    pub(crate) fn code(&self) -> &Arc<CodePages> {
        self.code.get_or_init(|| {
            Arc::new(CodePages { granules: zeros(self.pages), watchers: Mutex::new(Vec::new()) })
        })
    }

    /// Bytes were written, at this offset in the memory file.
    #[inline]
    pub(crate) fn note(&self, offset: u64, length: u64) {
        if length != 0 && (self.log.is_on() || self.code.get().is_some()) {
            self.note_pages(offset, length);
        }
    }

    fn note_pages(&self, offset: u64, length: u64) {
        fence(Ordering::SeqCst);
        let end = offset.saturating_add(length).min(self.pages as u64 * PAGE);
        let mut at = offset;
        while at < end {
            let here = (PAGE - at % PAGE).min(end - at);
            let page = index(at / PAGE);
            self.log.mark(page);
            if let Some(code) = self.code.get()
                && code.page(page).load(Ordering::Relaxed) & CodePages::granules(at, here) != 0
            {
                code.tell(page);
            }
            at += here;
        }
    }
}

/// A region of RAM as `vm-memory` marks writes to it: [`Ram::written`](crate::Ram::written) for whatever is written through [`Ram::map`](crate::Ram::map).
#[derive(Debug)]
pub struct RegionWrites {
    writes: Arc<Writes>,
    /// Where the region begins in the memory file.
    offset: u64,
}

impl RegionWrites {
    pub(crate) fn new(writes: &Arc<Writes>, offset: u64) -> Self {
        Self { writes: writes.clone(), offset }
    }
}

/// A part of [`RegionWrites`].
#[derive(Clone, Debug)]
pub struct PartWrites<'a> {
    writes: &'a Writes,
    offset: u64,
}

impl<'a> WithBitmapSlice<'a> for RegionWrites {
    type S = PartWrites<'a>;
}

impl Bitmap for RegionWrites {
    #[inline]
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.writes.note(self.offset + offset as u64, len as u64);
    }
    fn dirty_at(&self, offset: usize) -> bool {
        self.writes.log.is_marked(index((self.offset + offset as u64) / PAGE))
    }
    fn slice_at(&self, offset: usize) -> PartWrites<'_> {
        PartWrites { writes: &self.writes, offset: self.offset + offset as u64 }
    }
}

impl<'a> WithBitmapSlice<'a> for PartWrites<'_> {
    type S = Self;
}

impl BitmapSlice for PartWrites<'_> {}

impl Bitmap for PartWrites<'_> {
    #[inline]
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.writes.note(self.offset + offset as u64, len as u64);
    }
    fn dirty_at(&self, offset: usize) -> bool {
        self.writes.log.is_marked(index((self.offset + offset as u64) / PAGE))
    }
    fn slice_at(&self, offset: usize) -> Self {
        Self { writes: self.writes, offset: self.offset + offset as u64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{HIGH_BASE, LOW_END, MAX_MEMORY, MIN_MEMORY, Ram};
    use vm_memory::{Bytes, GuestAddress};

    #[derive(Default)]
    struct Heard(Mutex<Vec<usize>>);

    impl CodeWatch for Heard {
        fn code_written(&self, page: usize) {
            self.0.lock().unwrap().push(page);
        }
    }

    #[test]
    fn only_writes_to_marked_granules_are_told() {
        let ram = Ram::new(LOW_END + 0x4000).unwrap();
        let heard = Arc::new(Heard::default());
        let watcher: Arc<dyn CodeWatch> = heard.clone();
        ram.code_pages().watch(Arc::downgrade(&watcher));
        let above = index(LOW_END / PAGE);
        ram.code_pages().page(3).store(CodePages::granules(0x3ff0, 0x10), Ordering::SeqCst);
        ram.code_pages().page(above + 1).store(1, Ordering::SeqCst);
        let told = || std::mem::take(&mut *heard.0.lock().unwrap());

        ram.written(0x3000, 0xfc0);
        ram.written(0x4000, 0x1000);
        ram.written(0x3fc0, 0);
        ram.written(LOW_END, HIGH_BASE - LOW_END);
        assert!(told().is_empty());
        ram.written(0x3fff, 1);
        ram.written(0, u64::MAX);
        assert_eq!(told(), [3, 3, above + 1]);
        ram.map().write_obj(7u16, GuestAddress(0x3fbf)).unwrap();
        ram.map().store(7u32, GuestAddress(0x3ffc), Ordering::Release).unwrap();
        ram.map().write_slice(&[1; 9], GuestAddress(HIGH_BASE + 0xff8)).unwrap();
        assert_eq!(told(), [3, 3, above + 1]);
        drop(watcher);
        let mut row = crate::Buffers::new(&ram);
        row.push(0x3fc1, 2).unwrap();
        row.push(0x5000, 8).unwrap();
        row.write(2, &[1]);
        assert!(told().is_empty());
        row.write(0, &[1, 2, 3]);
        assert_eq!(told(), [3]);
    }

    #[test]
    fn the_dirty_log_has_what_was_written_while_it_was_on() {
        let ram = Ram::new(LOW_END + 0x4000).unwrap();
        let above = index(LOW_END / PAGE);
        ram.written(0, 1);
        assert!(ram.dirty_log().take().is_empty());
        ram.dirty_log().set(true);
        ram.map().write_slice(&[1; 0x1002], GuestAddress(0x5fff)).unwrap();
        ram.written(HIGH_BASE + 0x3000, 0x1000);
        assert_eq!(ram.dirty_log().take(), [5, 6, 7, above + 3]);
        assert!(ram.dirty_log().take().is_empty());
        ram.written(0x8000, 1);
        ram.dirty_log().set(false);
        ram.written(0x9000, 1);
        assert!(ram.dirty_log().take().is_empty());
    }

    #[test]
    fn clearing_memory_dirties_all_of_it() {
        let ram = Ram::new(MIN_MEMORY).unwrap();
        ram.dirty_log().set(true);
        ram.clear().unwrap();
        assert_eq!(ram.dirty_log().take(), (0..256).collect::<Vec<_>>());
    }

    #[test]
    fn the_tables_of_the_largest_machine_are_not_touched_at_first() {
        let ram = Ram::new(MAX_MEMORY).unwrap();
        let last = HIGH_BASE + MAX_MEMORY - LOW_END - 1;
        assert_eq!(ram.code_pages().page(index(MAX_MEMORY / PAGE) - 1).load(Ordering::Relaxed), 0);
        ram.dirty_log().set(true);
        ram.written(last, 1);
        assert_eq!(ram.dirty_log().take(), [index(MAX_MEMORY / PAGE) - 1]);
    }
}
