//! Guest memory by linear address: how handlers, the slow instructions and the system side read and write it.
//!
//! [`Fast`] knows the TLB alone; the methods of [`Cpu`] do all that an access may lead to: a page walk ([`crate::tlb`]), device registers,
//! the local APIC, accesses across pages.
//!
//! Long, for the fast path, the slow path and the rules for page crossings are only right together.
#![allow(unsafe_code, reason = "guest RAM is reached through host pointers that the TLB vouches for")]
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_possible_wrap,
    reason = "words are cut to the access's size"
)]

use std::sync::atomic::Ordering;

use crate::cpu::{Cpu, Fault, SS, mode};
use crate::tlb::{PAGE, Place};
use crate::vm::EV_CLOCK;
pub(crate) use crate::word::Word;

/// The kind of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
    Execute,
}

/// What a page walk found.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mapping {
    /// The guest-physical address of the 4 KiB page.
    pub(crate) phys: u64,
    /// Later writes at this privilege need no walk: the page is writable, and marked dirty.
    pub(crate) write: bool,
    /// Execution is allowed.
    pub(crate) exec: bool,
    /// The translation outlives a change of CR3.
    pub(crate) global: bool,
}

/// A memory access that faulted; [`Cpu::fault`] says how.
#[derive(Debug)]
pub(crate) struct Trap;

/// A CPU whose memory is what the TLB has: an access that misses fails without any effect, and without a call.
///
/// Handlers run on this first, and when that fails once more on the [`Cpu`] itself, out of line. So the fast form has nothing to save
/// on the host's stack.
pub(crate) struct Fast<'a>(pub(crate) &'a mut Cpu);

impl std::ops::Deref for Fast<'_> {
    type Target = Cpu;
    #[inline(always)]
    fn deref(&self) -> &Cpu {
        self.0
    }
}

impl std::ops::DerefMut for Fast<'_> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut Cpu {
        self.0
    }
}

/// Memory as handlers reach it: by the TLB alone ([`Fast`]), or by all means ([`Cpu`]).
pub(crate) trait Memory {
    /// The CPU.
    fn cpu(&mut self) -> &mut Cpu;
    /// [`Cpu::load`].
    fn load<T: Word>(&mut self, address: u64) -> Result<T, Trap>;
    /// [`Cpu::update`].
    fn update<T: Word>(&mut self, address: u64, f: impl FnOnce(&mut Cpu, T) -> T) -> Result<(), Trap>;
    /// [`Cpu::update_locked`].
    fn update_locked<T: Word, R>(&mut self, address: u64, f: impl Fn(T) -> (T, R)) -> Result<R, Trap>;
}

macro_rules! memory {
    ($($t:tt)*) => {
        impl Memory for $($t)* {
            #[inline(always)]
            fn cpu(&mut self) -> &mut Cpu {
                self
            }
            #[inline(always)]
            fn load<T: Word>(&mut self, address: u64) -> Result<T, Trap> {
                <$($t)*>::load(self, address)
            }
            #[inline(always)]
            fn update<T: Word>(&mut self, address: u64, f: impl FnOnce(&mut Cpu, T) -> T) -> Result<(), Trap> {
                <$($t)*>::update(self, address, f)
            }
            #[inline(always)]
            fn update_locked<T: Word, R>(&mut self, address: u64, f: impl Fn(T) -> (T, R)) -> Result<R, Trap> {
                <$($t)*>::update_locked(self, address, f)
            }
        }
    };
}

memory!(Fast<'_>);
memory!(Cpu);

impl Fast<'_> {
    #[inline(always)]
    fn readable(&self, address: u64, size: u64) -> Result<*const u8, Trap> {
        // SAFETY: the entry is inside the TLB.
        unsafe {
            let entry = Cpu::entry(self.0.tlb, address);
            if (*entry).read == address.wrapping_add(size - 1) & PAGE {
                return Ok(std::ptr::with_exposed_provenance(address.wrapping_add((*entry).addend) as usize));
            }
        }
        Err(Trap)
    }

    #[inline(always)]
    fn writable(&self, address: u64, size: u64) -> Result<*mut u8, Trap> {
        // SAFETY: the entry is inside the TLB.
        unsafe {
            let entry = Cpu::entry(self.0.tlb, address);
            if (*entry).write == address.wrapping_add(size - 1) & PAGE {
                return Ok(std::ptr::with_exposed_provenance_mut(
                    address.wrapping_add((*entry).addend) as usize
                ));
            }
        }
        Err(Trap)
    }

    /// [`Cpu::load`].
    #[inline(always)]
    pub(crate) fn load<T: Word>(&mut self, address: u64) -> Result<T, Trap> {
        let p = self.readable(address, T::SIZE)?;
        // SAFETY: a matching tag vouches for the page's host memory.
        Ok(unsafe { T::load(p) })
    }

    /// [`Cpu::store`].
    #[inline(always)]
    pub(crate) fn store<T: Word>(&mut self, address: u64, value: T) -> Result<(), Trap> {
        let p = self.writable(address, T::SIZE)?;
        // SAFETY: as in `load`.
        unsafe { T::store(p, value) };
        Ok(())
    }

    /// [`Cpu::update`].
    #[inline(always)]
    pub(crate) fn update<T: Word>(
        &mut self,
        address: u64,
        f: impl FnOnce(&mut Cpu, T) -> T,
    ) -> Result<(), Trap> {
        let p = self.writable(address, T::SIZE)?;
        // SAFETY: as in `load`.
        unsafe {
            let new = f(self.0, T::load(p));
            T::store(p, new);
        }
        Ok(())
    }

    /// [`Cpu::update_locked`].
    #[inline(always)]
    pub(crate) fn update_locked<T: Word, R>(
        &mut self,
        address: u64,
        f: impl Fn(T) -> (T, R),
    ) -> Result<R, Trap> {
        let p = self.writable(address, T::SIZE)?;
        if address & (T::SIZE - 1) != 0 {
            return Err(Trap);
        }
        // SAFETY: as in `load`; the address is aligned.
        Ok(unsafe { exchange(p, f) })
    }

    /// [`Cpu::load_wide`].
    #[inline(always)]
    pub(crate) fn load_wide(&mut self, address: u64) -> Result<u128, Trap> {
        let p = self.readable(address, 16)?;
        // SAFETY: as in `load`.
        Ok(unsafe { u128::from(u64::load(p)) | u128::from(u64::load(p.add(8))) << 64 })
    }

    /// [`Cpu::store_wide`].
    #[inline(always)]
    pub(crate) fn store_wide(&mut self, address: u64, value: u128) -> Result<(), Trap> {
        let p = self.writable(address, 16)?;
        // SAFETY: as in `load`.
        unsafe {
            u64::store(p, value as u64);
            u64::store(p.add(8), (value >> 64) as u64);
        }
        Ok(())
    }
}

/// Replaces a word atomically by what `f` makes of it, and gives what else `f` gives.
///
/// # Safety
/// `p` is valid for the access and aligned.
#[inline(always)]
unsafe fn exchange<T: Word, R>(p: *mut u8, f: impl Fn(T) -> (T, R)) -> R {
    // SAFETY: the caller's.
    unsafe {
        let mut old = T::load(p);
        loop {
            let (new, keep) = f(old);
            match T::cas(p, old, new) {
                Ok(_) => return keep,
                Err(now) => old = now,
            }
        }
    }
}

impl Cpu {
    /// Reads at the current privilege. The handlers' way: on a fault [`Cpu::fault`] is set.
    #[inline(always)]
    pub(crate) fn load<T: Word>(&mut self, address: u64) -> Result<T, Trap> {
        match Fast(self).load(address) {
            Ok(value) => Ok(value),
            Err(Trap) => self.load_slow(address, T::SIZE).map(T::from_u64),
        }
    }

    /// Writes at the current privilege, like [`Cpu::load`].
    #[inline(always)]
    pub(crate) fn store<T: Word>(&mut self, address: u64, value: T) -> Result<(), Trap> {
        match Fast(self).store(address, value) {
            Ok(()) => Ok(()),
            Err(Trap) => self.store_slow(address, T::SIZE, value.to_u64()),
        }
    }

    /// Begins a read-modify-write, which [`Cpu::settle`] ends: the host address if the whole operand is in RAM and writable (null otherwise, and then
    /// [`Cpu::load`] and [`Cpu::store`] will not fault).
    #[inline(always)]
    pub(crate) fn for_update<T: Word>(&mut self, address: u64) -> Result<*mut u8, Trap> {
        match Fast(self).writable(address, T::SIZE) {
            Ok(p) => {
                self.unsettled = None;
                Ok(p)
            }
            Err(Trap) => self.for_update_slow(address, T::SIZE),
        }
    }

    /// Replaces a word by what `f` makes of it: not atomic, but no fault comes after `f`.
    #[inline(always)]
    pub(crate) fn update<T: Word>(
        &mut self,
        address: u64,
        f: impl FnOnce(&mut Self, T) -> T,
    ) -> Result<(), Trap> {
        let p = self.for_update::<T>(address)?;
        if p.is_null() {
            let old = self.load::<T>(address)?;
            let new = f(self, old);
            return self.store::<T>(address, new);
        }
        // SAFETY: `for_update` vouches for `p`.
        unsafe {
            let old = T::load(p);
            let new = f(self, old);
            T::store(p, new);
        }
        self.settle();
        Ok(())
    }

    /// The atomic form of [`Cpu::update`]. `f` gives the new word and whatever the caller wants to keep; it may run more than once.
    #[inline(always)]
    pub(crate) fn update_locked<T: Word, R>(
        &mut self,
        address: u64,
        f: impl Fn(T) -> (T, R),
    ) -> Result<R, Trap> {
        let p = self.for_update::<T>(address)?;
        if !p.is_null() && address & (T::SIZE - 1) == 0 {
            // SAFETY: `for_update` vouches for `p`; pages are aligned in host memory as in the guest's.
            let keep = unsafe { exchange(p, f) };
            self.settle();
            return Ok(keep);
        }
        let vm = self.vm.clone();
        let _only = vm.split_lock.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let old = self.load::<T>(address)?;
        let (new, keep) = f(old);
        self.store::<T>(address, new)?;
        Ok(keep)
    }

    /// Reads 16 bytes at the current privilege, like [`Cpu::load`]. Not atomic.
    pub(crate) fn load_wide(&mut self, address: u64) -> Result<u128, Trap> {
        let mut bytes = [0; 16];
        self.read_bytes(address, &mut bytes).map_err(|fault| self.trap(fault))?;
        Ok(u128::from_le_bytes(bytes))
    }

    /// Writes 16 bytes at the current privilege, like [`Cpu::store`]. Not atomic.
    pub(crate) fn store_wide(&mut self, address: u64, value: u128) -> Result<(), Trap> {
        self.write_bytes(address, &value.to_le_bytes()).map_err(|fault| self.trap(fault))
    }

    #[cold]
    #[inline(never)]
    fn load_slow(&mut self, address: u64, size: u64) -> Result<u64, Trap> {
        let user = self.cpl == 3;
        self.read_slow(address, size, user).map_err(|fault| self.trap(fault))
    }

    #[cold]
    #[inline(never)]
    fn store_slow(&mut self, address: u64, size: u64, value: u64) -> Result<(), Trap> {
        let user = self.cpl == 3;
        self.write_slow(address, size, value, user).map_err(|fault| self.trap(fault))
    }

    #[cold]
    #[inline(never)]
    fn for_update_slow(&mut self, address: u64, size: u64) -> Result<*mut u8, Trap> {
        let user = self.cpl == 3;
        if Self::crosses(address, size) {
            return self
                .probe_write_as(address, size, user)
                .map(|()| std::ptr::null_mut())
                .map_err(|fault| self.trap(fault));
        }
        match self.place(address, size, Access::Write, user) {
            Ok(Place::Ram(p)) => Ok(p),
            Ok(Place::Io(_)) => Ok(std::ptr::null_mut()),
            Err(fault) => Err(self.trap(fault)),
        }
    }

    fn trap(&mut self, fault: Fault) -> Trap {
        self.fault = fault;
        Trap
    }

    /// Reads a word at the current privilege.
    pub(crate) fn read<T: Word>(&mut self, address: u64) -> Result<T, Fault> {
        self.load(address).map_err(|Trap| self.fault)
    }

    /// Writes a word at the current privilege.
    pub(crate) fn write<T: Word>(&mut self, address: u64, value: T) -> Result<(), Fault> {
        self.store(address, value).map_err(|Trap| self.fault)
    }

    /// Reads a word as user code or as the supervisor would.
    pub(crate) fn read_as<T: Word>(&mut self, address: u64, user: bool) -> Result<T, Fault> {
        self.read_slow(address, T::SIZE, user).map(T::from_u64)
    }

    /// Writes a word as user code or as the supervisor would.
    pub(crate) fn write_as<T: Word>(&mut self, address: u64, value: T, user: bool) -> Result<(), Fault> {
        self.write_slow(address, T::SIZE, value.to_u64(), user)
    }

    /// Reads a word of a system table.
    pub(crate) fn read_sys<T: Word>(&mut self, address: u64) -> Result<T, Fault> {
        self.read_as(address, false)
    }

    /// Writes a word of a system table.
    pub(crate) fn write_sys<T: Word>(&mut self, address: u64, value: T) -> Result<(), Fault> {
        self.write_as(address, value, false)
    }

    /// Whether `size` bytes could be written now; the access bits of the page tables change as if they were.
    pub(crate) fn probe_write_as(&mut self, address: u64, size: u64, user: bool) -> Result<(), Fault> {
        self.check_last(address, size)?;
        self.place(address, 1, Access::Write, user)?;
        if Self::crosses(address, size) {
            self.place((address.wrapping_add(size - 1)) & PAGE, 1, Access::Write, user)?;
        }
        Ok(())
    }

    /// Reads bytes at the current privilege (at most a page).
    pub(crate) fn read_bytes(&mut self, address: u64, out: &mut [u8]) -> Result<(), Fault> {
        self.check_last(address, (out.len() as u64).max(1))?;
        self.check_last(address, (out.len() as u64).max(1))?;
        let mut done = 0;
        while done < out.len() {
            let n = (out.len() - done).min(8);
            let n = if n < 8 { 1 << n.ilog2() } else { n };
            let word = self.read_slow(address.wrapping_add(done as u64), n as u64, self.cpl == 3)?;
            out[done..done + n].copy_from_slice(&word.to_le_bytes()[..n]);
            done += n;
        }
        Ok(())
    }

    /// Writes bytes at the current privilege (at most a page); all of them or, on a fault, none.
    pub(crate) fn write_bytes(&mut self, address: u64, bytes: &[u8]) -> Result<(), Fault> {
        let user = self.cpl == 3;
        self.check_last(address, (bytes.len() as u64).max(1))?;
        self.probe_write_as(address, (bytes.len() as u64).max(1), user)?;
        let mut done = 0;
        while done < bytes.len() {
            let n = (bytes.len() - done).min(8);
            let n = if n < 8 { 1 << n.ilog2() } else { n };
            let mut word = [0; 8];
            word[..n].copy_from_slice(&bytes[done..done + n]);
            self.write_slow(address.wrapping_add(done as u64), n as u64, u64::from_le_bytes(word), user)?;
            done += n;
        }
        Ok(())
    }

    /// The host address of up to `limit` bytes from `address` to its page's end for a bulk operation, and how many there are;
    /// null where the page is not RAM. After a write comes [`Cpu::settle`].
    pub(crate) fn run_of(
        &mut self,
        address: u64,
        limit: u64,
        access: Access,
    ) -> Result<(*mut u8, u64), Fault> {
        let length = limit.min(0x1000 - (address & 0xfff));
        // SAFETY: as in `load`.
        unsafe {
            let entry = Self::entry(self.tlb, address);
            let tag = if access == Access::Write { (*entry).write } else { (*entry).read };
            if tag == address & PAGE {
                if access == Access::Write {
                    self.unsettled = None;
                }
                return Ok((
                    std::ptr::with_exposed_provenance_mut(address.wrapping_add((*entry).addend) as usize),
                    length,
                ));
            }
        }
        match self.place(address, length, access, self.cpl == 3)? {
            Place::Ram(p) => Ok((p, length)),
            Place::Io(_) => Ok((std::ptr::null_mut(), length)),
        }
    }

    /// The guest-physical address of code at `address`, and its host address (null where it is not RAM).
    pub(crate) fn code_at(&mut self, address: u64) -> Result<(u64, *const u8), Fault> {
        let user = self.cpl == 3;
        if let Some(found) = self.cached_code(address, user) {
            return Ok(found);
        }
        match self.place(address, 1, Access::Execute, user)? {
            Place::Ram(p) => Ok(self.cached_code(address, user).unwrap_or((u64::MAX, p))),
            Place::Io(phys) => Ok((phys, std::ptr::null())),
        }
    }

    fn crosses(address: u64, size: u64) -> bool {
        (address & 0xfff) + size > 0x1000
    }

    fn read_slow(&mut self, address: u64, size: u64, user: bool) -> Result<u64, Fault> {
        if Self::crosses(address, size) {
            self.check_last(address, size)?;
            let mut value = 0;
            for n in 0..size {
                let at = self.wrap(address.wrapping_add(n));
                value |= self.read_slow(at, 1, user)? << (8 * n);
            }
            return Ok(value);
        }
        match self.place(address, size, Access::Read, user)? {
            // SAFETY: `place` vouches for `size` bytes.
            Place::Ram(p) => Ok(unsafe {
                match size {
                    1 => u8::load(p).into(),
                    2 => u16::load(p).into(),
                    4 => u32::load(p).into(),
                    _ => u64::load(p),
                }
            }),
            Place::Io(phys) => Ok(self.io_read(phys, size)),
        }
    }

    fn write_slow(&mut self, address: u64, size: u64, value: u64, user: bool) -> Result<(), Fault> {
        if Self::crosses(address, size) {
            self.probe_write_as(address, size, user)?;
            for n in 0..size {
                let at = self.wrap(address.wrapping_add(n));
                self.write_slow(at, 1, value >> (8 * n) & 0xff, user)?;
            }
            return Ok(());
        }
        match self.place(address, size, Access::Write, user)? {
            // SAFETY: `place` vouches for `size` bytes.
            Place::Ram(p) => unsafe {
                match size {
                    1 => u8::store(p, value as u8),
                    2 => u16::store(p, value as u16),
                    4 => u32::store(p, value as u32),
                    _ => u64::store(p, value),
                }
                self.settle();
            },
            Place::Io(phys) => self.io_write(phys, size, value),
        }
        Ok(())
    }

    /// An access that runs out of the canonical addresses, or in flat 32-bit code past 4 GiB, is refused as a whole, before its first page is looked at.
    fn check_last(&self, address: u64, size: u64) -> Result<(), Fault> {
        if self.mode & mode::FLAT != 0 && address.wrapping_add(size - 1) >> 32 != 0 {
            return Err(Fault::gp(0));
        }
        let last = self.wrap(address.wrapping_add(size - 1));
        if crate::segment::is_canonical(last) { Ok(()) } else { Err(Fault::gp(0)) }
    }

    fn wrap(&self, address: u64) -> u64 {
        if self.mode & mode::CODE == mode::CODE64 { address } else { address & 0xffff_ffff }
    }

    /// Device registers may arm timers: by instruction count the block ends, and the deadlines are looked at again.
    fn io_clock(&self) {
        if self.vm.turns.is_some() {
            self.shared.event.fetch_or(EV_CLOCK, Ordering::Relaxed);
        }
    }

    fn io_read(&mut self, phys: u64, size: u64) -> u64 {
        self.io_clock();
        if phys & PAGE == crate::apic::APIC_BASE && self.lapic.is_mapped() {
            let shift = 8 * (phys & 3);
            return u64::from(self.lapic.mmio_read(phys & 0xffc)) >> shift;
        }
        self.vm.mmio.read(phys, size as u8)
    }

    fn io_write(&mut self, phys: u64, size: u64, value: u64) {
        self.io_clock();
        if phys & PAGE == crate::apic::APIC_BASE && self.lapic.is_mapped() {
            let effect = self.lapic.mmio_write(phys & 0xffc, value as u32);
            self.vm.chip.apply(effect);
            return;
        }
        self.vm.mmio.write(phys, size as u8, value);
    }

    /// Checks an address in a segment and gives the linear one. `log` bytes from it are accessed.
    pub(crate) fn segment_linear(
        &mut self,
        segment: usize,
        offset: u64,
        size: u64,
        write: bool,
    ) -> Result<u64, Fault> {
        let stack = segment == SS;
        let refuse = || if stack { Fault::ss(0) } else { Fault::gp(0) };
        let seg = &self.seg[segment];
        if self.mode & mode::CODE == mode::CODE64 {
            let base = if segment >= crate::cpu::FS { seg.base } else { 0 };
            let linear = base.wrapping_add(offset);
            let last = linear.wrapping_add(size - 1);
            if ((linear << 16) as i64 >> 16) as u64 != linear || ((last << 16) as i64 >> 16) as u64 != last {
                return Err(refuse());
            }
            return Ok(linear);
        }
        let protected = self.cr0 & crate::cpu::cr0::PE != 0 && self.rflags & crate::cpu::fl::VM == 0;
        if protected {
            let code = seg.rights & 8 != 0;
            // The bit says writable for data and readable for code.
            let allowed = if seg.rights & 2 != 0 { !(write && code) } else { !write && !code };
            if seg.rights & 0x80 == 0 || !allowed {
                return Err(refuse());
            }
        }
        let last = offset + (size - 1);
        let down = seg.rights & 0xc == 4;
        let good = if down {
            let top = if seg.rights & 0x4000 != 0 { 0xffff_ffff } else { 0xffff };
            offset > u64::from(seg.limit) && last <= top
        } else {
            last <= u64::from(seg.limit)
        };
        if good { Ok(seg.base.wrapping_add(offset) & 0xffff_ffff) } else { Err(refuse()) }
    }
}
