//! Split virtqueues (virtio 1.2 §2.7): a table of descriptors, a ring of heads that the driver makes available, a ring of those used.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use tenon_core::Ram;

use super::chain::{Chain, DESCRIPTOR, Descriptor, INDIRECT, NEXT, RingError, Table, WRITE};
use super::memory::RingMemory;
use super::queue::{Layout, Taken, passed};

/// Flag of both rings: the other side need not be told.
const QUIET: u16 = 1;
const INDEX: usize = 2;
const ENTRIES: usize = 4;

/// A split ring.
pub(crate) struct Split {
    ram: Arc<Ram>,
    size: u16,
    event_index: bool,
    indirect: bool,
    table: RingMemory,
    available: RingMemory,
    used: RingMemory,
    /// The available index up to which heads were taken.
    next: u16,
    /// The driver's index as it was last seen.
    seen: u16,
    /// The used index, with what is not published yet.
    done: u16,
    /// The used index that the driver sees.
    published: u16,
    /// Whether the driver was last told to notify.
    armed: bool,
    /// Which heads are in flight, a bit each.
    flying: Box<[u64]>,
}

impl Split {
    /// The ring at its place. `Err` says which part is not aligned or not in RAM.
    pub(crate) fn new(ram: &Arc<Ram>, layout: &Layout) -> Result<Self, &'static str> {
        let size = usize::from(layout.size);
        let part = |address, length, align, what| RingMemory::new(ram, address, length, align).ok_or(what);
        Ok(Self {
            ram: ram.clone(),
            size: layout.size,
            event_index: layout.event_index,
            indirect: layout.indirect,
            table: part(layout.descriptors, DESCRIPTOR * size, 16, "descriptor table")?,
            available: part(layout.driver, 6 + 2 * size, 2, "available ring")?,
            used: part(layout.device, 6 + 8 * size, 4, "used ring")?,
            next: 0,
            seen: 0,
            done: 0,
            published: 0,
            armed: true,
            flying: vec![0; size.div_ceil(64)].into(),
        })
    }

    /// The next request, if the driver has made one available.
    pub(crate) fn take(&mut self) -> Result<Option<Taken>, RingError> {
        if self.next == self.seen && !self.look()? {
            return Ok(None);
        }
        let place = usize::from(self.next % self.size);
        let head = self.available.load16(ENTRIES + 2 * place, Ordering::Relaxed);
        let chain = self.chain(head)?;
        self.claim(head)?;
        self.next = self.next.wrapping_add(1);
        Ok(Some(Taken { id: head, slots: 1, chain }))
    }

    /// Reads the driver's index; says whether there is something to take.
    fn look(&mut self) -> Result<bool, RingError> {
        let index = self.available.load16(INDEX, Ordering::Acquire);
        if index.wrapping_sub(self.next) > self.size {
            return Err(RingError::Jump { seen: self.next, index, size: self.size });
        }
        self.seen = index;
        Ok(index != self.next)
    }

    fn claim(&mut self, head: u16) -> Result<(), RingError> {
        let (word, bit) = (&mut self.flying[usize::from(head / 64)], 1 << (head % 64));
        if *word & bit != 0 {
            return Err(RingError::Again(head));
        }
        *word |= bit;
        Ok(())
    }

    fn descriptor(&self, index: u16) -> Result<Descriptor, RingError> {
        if index >= self.size {
            return Err(RingError::Index { index, size: self.size });
        }
        let at = usize::from(index) * DESCRIPTOR;
        Ok(Descriptor::new(
            self.table.load64(at, Ordering::Relaxed),
            self.table.load64(at + 8, Ordering::Relaxed),
        ))
    }

    fn chain(&self, head: u16) -> Result<Chain, RingError> {
        let mut chain = Chain::new(&self.ram, self.size);
        let mut index = head;
        loop {
            let found = self.descriptor(index)?;
            if found.low & INDIRECT != 0 {
                if !self.indirect || found.low & NEXT != 0 {
                    return Err(RingError::Nested);
                }
                self.indirect(&found, &mut chain)?;
                return Ok(chain);
            }
            chain.add(found.address, found.length, found.low & WRITE != 0)?;
            if found.low & NEXT == 0 {
                return Ok(chain);
            }
            index = found.high;
        }
    }

    fn indirect(&self, found: &Descriptor, chain: &mut Chain) -> Result<(), RingError> {
        let table = Table::new(&self.ram, found.address, found.length, self.size)?;
        let mut index = 0;
        loop {
            if index >= table.entries {
                return Err(RingError::Index { index, size: table.entries });
            }
            let found = table.entry(index);
            if found.low & INDIRECT != 0 {
                return Err(RingError::Nested);
            }
            // A circle ends here, for the chain's length is bounded.
            chain.add(found.address, found.length, found.low & WRITE != 0)?;
            if found.low & NEXT == 0 {
                return Ok(());
            }
            index = found.high;
        }
    }

    /// Puts a request into the used ring; the driver does not see it yet.
    pub(crate) fn put(&mut self, head: u16, written: u32) {
        if let Some(word) = self.flying.get_mut(usize::from(head / 64)) {
            *word &= !(1 << (head % 64));
        }
        let at = ENTRIES + 8 * usize::from(self.done % self.size);
        self.used.store32(at, head.into(), Ordering::Relaxed);
        self.used.store32(at + 4, written, Ordering::Relaxed);
        self.used.written(at, 8);
        self.done = self.done.wrapping_add(1);
    }

    /// Lets the driver see what was put; says whether it wants an interrupt.
    pub(crate) fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.done);
        if old == new {
            return false;
        }
        self.used.store16(INDEX, new, Ordering::Release);
        self.used.written(INDEX, 2);
        self.published = new;
        // The driver writes its wish and then looks at the index; here it is the other way round.
        fence(Ordering::SeqCst);
        if self.event_index {
            let event = self.available.load16(ENTRIES + 2 * usize::from(self.size), Ordering::Relaxed);
            passed(event, new, old)
        } else {
            self.available.load16(0, Ordering::Relaxed) & QUIET == 0
        }
    }

    /// Asks for a notification; says false if there is something to take already.
    pub(crate) fn arm(&mut self) -> Result<bool, RingError> {
        if self.next != self.seen || self.look()? {
            return Ok(false);
        }
        if self.event_index {
            let at = ENTRIES + 8 * usize::from(self.size);
            self.used.store16(at, self.next, Ordering::Relaxed);
            self.used.written(at, 2);
        } else {
            self.set_flags(0);
        }
        self.armed = true;
        fence(Ordering::SeqCst);
        if self.look()? {
            self.disarm();
            return Ok(false);
        }
        Ok(true)
    }

    /// Needs no notification until it is armed again.
    pub(crate) fn disarm(&mut self) {
        // With event indices the index that was asked for is simply behind.
        if self.armed && !self.event_index {
            self.set_flags(QUIET);
        }
        self.armed = false;
    }

    fn set_flags(&self, flags: u16) {
        self.used.store16(0, flags, Ordering::Relaxed);
        self.used.written(0, 2);
    }

    /// Where the ring stands, for [`Split::set_position`]: next to take, next to use.
    pub(crate) fn position(&self) -> (u16, u16) {
        (self.next, self.done)
    }

    pub(crate) fn set_position(&mut self, (next, done): (u16, u16), flying: impl Iterator<Item = u16>) {
        (self.next, self.seen, self.done, self.published) = (next, next, done, done);
        for head in flying {
            if let Some(word) = self.flying.get_mut(usize::from(head / 64)) {
                *word |= 1 << (head % 64);
            }
        }
    }
}
