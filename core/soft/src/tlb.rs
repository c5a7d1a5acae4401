//! The software TLB: how it is filled, flushed, and kept from letting stores to decoded code by.
//!
//! An entry holds one tag for each kind of access and the distance from linear to host address. A tag is the page's linear
//! address, or [`NONE`] where this kind of access must take the slow path: because the page is not mapped so, holds decoded code, is
//! not yet in the dirty log, is ROM, or is neither. The tag is compared with the page of the access's *last* byte at the index of its first
//! one's page, so that an access that crosses into the next page misses as well.
//!
//! A vCPU that decodes a page tells those that have fast stores to it; they take them away and answer between two blocks, or before they
//! forget that they had them. One limit: a vCPU that changes code and says so by a flag, both within the rest of the block in which the
//! other one first decoded that page, is answered for only at the end of this block.
#![allow(unsafe_code, reason = "host addresses of guest pages are computed here")]
#![allow(clippy::cast_possible_truncation, reason = "offsets inside a page")]
#![allow(clippy::cast_sign_loss, clippy::cast_possible_wrap, reason = "addresses are sign-extended")]

use std::sync::atomic::{Ordering, fence};

use tenon_core::CodePages;

use crate::cpu::{Cpu, Fault, efer};
use crate::mem::{Access, Mapping};
use crate::paging;
use crate::vm::{EV_INBOX, Notice};

/// Entries per privilege.
const ENTRIES: usize = 1024;
/// A tag that no page has.
const NONE: u64 = u64::MAX;
pub(crate) const PAGE: u64 = !0xfff;
/// Set in a shadow entry whose translation is global.
const GLOBAL: u64 = 1;

/// One translation.
#[repr(C, align(32))]
#[derive(Clone, Copy)]
pub(crate) struct Entry {
    pub(crate) read: u64,
    pub(crate) write: u64,
    pub(crate) exec: u64,
    /// Host address minus linear address.
    pub(crate) addend: u64,
}

const EMPTY: Entry = Entry { read: NONE, write: NONE, exec: NONE, addend: 0 };

/// The translations of one privilege: user or supervisor.
#[repr(C)]
pub(crate) struct Tlb {
    entries: [Entry; ENTRIES],
    /// The guest-physical page of each entry, and [`GLOBAL`].
    shadow: [u64; ENTRIES],
}

impl Tlb {
    /// An empty one.
    pub(crate) fn new() -> Box<Self> {
        Box::new(Self { entries: [EMPTY; ENTRIES], shadow: [0; ENTRIES] })
    }

    fn flush(&mut self) {
        self.entries = [EMPTY; ENTRIES];
    }
}

/// Where the bytes of an access are.
#[derive(Clone, Copy)]
pub(crate) enum Place {
    /// RAM, contiguous; for reading and execution also ROM, which must not be written.
    Ram(*mut u8),
    /// Neither: the guest-physical address.
    Io(u64),
}

impl Cpu {
    #[inline(always)]
    pub(crate) fn entry(tlb: *mut Tlb, address: u64) -> *mut Entry {
        // SAFETY: the index is below ENTRIES; `tlb` is one of the CPU's two.
        unsafe { (&raw mut (*tlb).entries).cast::<Entry>().add((address >> 12) as usize & (ENTRIES - 1)) }
    }

    /// Finds `size` bytes, which lie in one page, and fills the TLB.
    pub(crate) fn place(
        &mut self,
        address: u64,
        size: u64,
        access: Access,
        user: bool,
    ) -> Result<Place, Fault> {
        if self.efer & efer::LMA != 0 && ((address << 16) as i64 >> 16) as u64 != address {
            return Err(Fault::gp(0));
        }
        let page = address & PAGE;
        let mapping = paging::walk(self, address, access, user)?;
        let Some(index) = self.vm.page_index(mapping.phys) else {
            if access != Access::Write
                && let Some(host) = self.vm.rom_page(mapping.phys)
            {
                return Ok(self.place_rom(address, host, mapping, user));
            }
            return Ok(Place::Io(mapping.phys & PAGE | address & 0xfff));
        };
        let host = self.vm.ram_page(index);
        let vm = &self.vm;
        let mut code = vm.code.page(index).load(Ordering::SeqCst);
        if access == Access::Write {
            vm.mark_dirty(index);
            if code & CodePages::granules(address, size) != 0 {
                self.written_code(index);
                code = 0;
            }
        }
        let write = mapping.write && code == 0 && self.vm.is_dirty_or_off(index);
        if access == Access::Write {
            self.unsettled = if write { None } else { Some((index, CodePages::granules(address, size))) };
        }
        let slot = (address >> 12) as usize & (ENTRIES - 1);
        if self.tlbs[usize::from(user)].entries[slot].write != NONE && self.owes_word() {
            self.drop_write_tag(user, slot);
        }
        let tlb = &mut *self.tlbs[usize::from(user)];
        tlb.entries[slot] = Entry {
            read: page,
            write: if write { page } else { NONE },
            exec: if mapping.exec { page } else { NONE },
            addend: (host.expose_provenance() as u64).wrapping_sub(page),
        };
        tlb.shadow[slot] = mapping.phys & PAGE | if mapping.global { GLOBAL } else { 0 };
        // SAFETY: the offset stays inside the page.
        Ok(Place::Ram(unsafe { host.add((address & 0xfff) as usize) }))
    }

    /// Fills the TLB for a page of ROM, to which no store is ever fast. Its code is not registered anywhere, for it never changes.
    #[cold]
    fn place_rom(&mut self, address: u64, host: *const u8, mapping: Mapping, user: bool) -> Place {
        let page = address & PAGE;
        let slot = (address >> 12) as usize & (ENTRIES - 1);
        if self.tlbs[usize::from(user)].entries[slot].write != NONE && self.owes_word() {
            self.drop_write_tag(user, slot);
        }
        let tlb = &mut *self.tlbs[usize::from(user)];
        tlb.entries[slot] = Entry {
            read: page,
            write: NONE,
            exec: if mapping.exec { page } else { NONE },
            addend: (host.expose_provenance() as u64).wrapping_sub(page),
        };
        tlb.shadow[slot] = mapping.phys & PAGE | if mapping.global { GLOBAL } else { 0 };
        // SAFETY: the offset stays inside the page.
        Place::Ram(unsafe { host.add((address & 0xfff) as usize) }.cast_mut())
    }

    /// A store hits decoded code: forgets the page's blocks, here and on the other vCPUs.
    #[cold]
    fn written_code(&mut self, index: usize) {
        self.vm.code.page(index).store(0, Ordering::SeqCst);
        self.forget_page(index);
        self.vm.tell_others(self.index, Notice::CodeWritten(index));
    }

    /// To be called after a store to what [`Cpu::place`] gave. Where that was no fast store, somebody may have decoded the bytes, or taken
    /// the dirty log, between the look and the store.
    #[inline]
    pub(crate) fn settle(&mut self) {
        if let Some((index, granules)) = self.unsettled.take() {
            self.settle_page(index, granules);
        }
    }

    #[cold]
    fn settle_page(&mut self, index: usize, granules: u64) {
        fence(Ordering::SeqCst);
        self.vm.mark_dirty(index);
        if self.vm.code.page(index).load(Ordering::Relaxed) & granules != 0 {
            self.written_code(index);
        }
    }

    /// Notes that granules of a page have been decoded. The first time, stores to the page stop being fast on every vCPU.
    pub(crate) fn note_code(&mut self, index: usize, mask: u64) {
        let before = self.vm.code.page(index).fetch_or(mask, Ordering::SeqCst);
        if before == 0 {
            self.drop_write_tags(index);
            self.vm.tell_others(self.index, Notice::CodeDecoded(index));
        }
    }

    /// Takes fast stores away from a page. Whether there were any.
    pub(crate) fn drop_write_tags(&mut self, index: usize) -> bool {
        let phys = self.vm.page_address(index);
        let mut any = false;
        for tlb in &mut self.tlbs {
            for slot in 0..ENTRIES {
                if tlb.shadow[slot] & PAGE == phys && tlb.entries[slot].write != NONE {
                    tlb.entries[slot].write = NONE;
                    any = true;
                }
            }
        }
        if any {
            self.vm.mark_dirty(index);
        }
        any
    }

    /// Takes fast stores away from all pages, and says which had them.
    pub(crate) fn drop_all_write_tags(&mut self) {
        for user in [false, true] {
            for slot in 0..ENTRIES {
                if self.tlbs[usize::from(user)].entries[slot].write != NONE {
                    self.drop_write_tag(user, slot);
                }
            }
        }
    }

    /// Takes fast stores away from a page, notes it in the dirty log, and tells the other vCPUs if one of them has decoded it meanwhile.
    fn drop_write_tag(&mut self, user: bool, slot: usize) {
        let tlb = &mut self.tlbs[usize::from(user)];
        tlb.entries[slot].write = NONE;
        if let Some(index) = self.vm.page_index(tlb.shadow[slot] & PAGE) {
            self.vm.mark_dirty(index);
            if self.vm.code.page(index).load(Ordering::SeqCst) != 0 {
                self.vm.tell_others(self.index, Notice::CodeWritten(index));
            }
        }
    }

    /// Whether the dirty log, or another vCPU that has decoded a page, counts on this vCPU to say at the next notice which pages it may
    /// have written: then no write tag may go unsaid before that.
    #[inline]
    fn owes_word(&self) -> bool {
        fence(Ordering::SeqCst);
        self.vm.ram.dirty_log().is_on() || self.shared.event.load(Ordering::Relaxed) & EV_INBOX != 0
    }

    /// Forgets all translations.
    pub(crate) fn flush_tlb(&mut self) {
        if self.owes_word() {
            self.drop_all_write_tags();
        }
        self.tlbs[0].flush();
        self.tlbs[1].flush();
        self.blocks.new_context();
    }

    /// Forgets the translations that are not global.
    pub(crate) fn flush_tlb_non_global(&mut self) {
        if self.owes_word() {
            self.drop_all_write_tags();
        }
        for tlb in &mut self.tlbs {
            for slot in 0..ENTRIES {
                if tlb.shadow[slot] & GLOBAL == 0 {
                    tlb.entries[slot] = EMPTY;
                }
            }
        }
        self.blocks.new_context();
    }

    /// Forgets the translation of one page.
    pub(crate) fn flush_page(&mut self, address: u64) {
        let slot = (address >> 12) as usize & (ENTRIES - 1);
        for user in [false, true] {
            if self.tlbs[usize::from(user)].entries[slot].write != NONE && self.owes_word() {
                self.drop_write_tag(user, slot);
            }
        }
        self.tlbs[0].entries[slot] = EMPTY;
        self.tlbs[1].entries[slot] = EMPTY;
        self.blocks.new_context();
    }

    /// The guest-physical address that an entry of the TLB gives, if it allows execution, and the host's.
    pub(crate) fn cached_code(&self, address: u64, user: bool) -> Option<(u64, *const u8)> {
        let tlb = &self.tlbs[usize::from(user)];
        let slot = (address >> 12) as usize & (ENTRIES - 1);
        let entry = &tlb.entries[slot];
        (entry.exec == address & PAGE).then(|| {
            let host = std::ptr::with_exposed_provenance(address.wrapping_add(entry.addend) as usize);
            (tlb.shadow[slot] & PAGE | address & 0xfff, host)
        })
    }
}
