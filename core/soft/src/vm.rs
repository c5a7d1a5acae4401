//! The VM of the software engine: what its vCPUs share, and the engine's traits over it.
#![allow(unsafe_code, reason = "guest RAM is reached through the host pointers that `Ram` gives")]
#![allow(
    clippy::cast_possible_truncation,
    reason = "guest-physical addresses that were found in RAM fit the host's"
)]

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use tenon_core::{
    Activity, Bus, Claim, Clock, CodePages, CodeWatch, CpuState, Engine, EngineError, InterruptController,
    Kick, Ram, Region, Stop, Vcpu, Vm, VmSetup,
};

use crate::apic::Notify;
use crate::cpu::Cpu;
use crate::ioapic;
use crate::irqchip::IrqChip;
use crate::turns::Turns;

/// [`VcpuShared::event`]: return from `run`.
pub(crate) const EV_KICK: u32 = 1;
/// [`VcpuShared::event`]: the local APIC has something pending.
pub(crate) const EV_INTR: u32 = 2;
/// [`VcpuShared::event`]: look at the inbox.
pub(crate) const EV_INBOX: u32 = 4;
/// [`VcpuShared::event`]: a deadline on the virtual clock may have changed.
pub(crate) const EV_CLOCK: u32 = 8;

/// The most notices that wait; beyond them the vCPU forgets all it has cached.
const INBOX: usize = 256;

/// What one vCPU tells another about cached knowledge.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Notice {
    /// The page with this index has decoded code now: stores to it are not fast any more.
    CodeDecoded(usize),
    /// Code in the page with this index has been overwritten.
    CodeWritten(usize),
    /// Stores must be noted in the dirty log again.
    DirtyLog,
    /// Forget everything.
    All,
}

/// What other threads may touch of a vCPU.
pub(crate) struct VcpuShared {
    /// `EV_` bits, tested between blocks.
    pub(crate) event: AtomicU32,
    inbox: Mutex<Vec<Notice>>,
    asleep: AtomicBool,
    bed: Mutex<()>,
    wake: Condvar,
    /// By instruction count: the turns, and this vCPU's index.
    turns: Option<(Arc<Turns>, usize)>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl VcpuShared {
    fn new(turns: Option<(Arc<Turns>, usize)>) -> Arc<Self> {
        Arc::new(Self {
            event: AtomicU32::new(0),
            inbox: Mutex::new(Vec::new()),
            asleep: AtomicBool::new(false),
            bed: Mutex::new(()),
            wake: Condvar::new(),
            turns,
        })
    }

    /// Sets event bits and wakes the vCPU if it sleeps.
    pub(crate) fn signal(&self, bits: u32) {
        self.event.fetch_or(bits, Ordering::SeqCst);
        if let Some((turns, index)) = &self.turns {
            // Here and not when the woken thread comes to it: who runs next must not depend on the host's scheduling.
            turns.ready(*index);
        }
        if self.asleep.load(Ordering::SeqCst) {
            drop(lock(&self.bed));
            self.wake.notify_all();
        }
    }

    /// Sleeps until an event bit is set.
    pub(crate) fn sleep(&self) {
        let mut bed = lock(&self.bed);
        self.asleep.store(true, Ordering::SeqCst);
        while self.event.load(Ordering::SeqCst) == 0 {
            bed = self.wake.wait(bed).unwrap_or_else(PoisonError::into_inner);
        }
        self.asleep.store(false, Ordering::SeqCst);
    }

    fn tell(&self, notice: Notice) {
        {
            let mut inbox = lock(&self.inbox);
            if inbox.len() >= INBOX {
                inbox.clear();
                inbox.push(Notice::All);
            } else {
                inbox.push(notice);
            }
        }
        self.signal(EV_INBOX);
    }

    pub(crate) fn take_notices(&self) -> Vec<Notice> {
        std::mem::take(&mut *lock(&self.inbox))
    }
}

impl Notify for VcpuShared {
    fn notify(&self) {
        self.signal(EV_INTR);
    }
}

impl Kick for VcpuShared {
    fn kick(&self) {
        self.signal(EV_KICK);
    }
}

/// What the vCPUs of a VM share.
pub(crate) struct VmShared {
    /// Holds the mapping that the pointers below point into.
    pub(crate) ram: Arc<Ram>,
    low: *mut u8,
    low_pages: usize,
    high: *mut u8,
    high_pages: usize,
    pub(crate) pio: Arc<Bus>,
    pub(crate) mmio: Arc<Bus>,
    pub(crate) clock: Arc<Clock>,
    pub(crate) chip: Arc<IrqChip>,
    pub(crate) vcpus: Vec<Arc<VcpuShared>>,
    /// For each page of RAM, the 64-byte granules that hold decoded code.
    pub(crate) code: Arc<CodePages>,
    /// Held during a locked access that the host cannot do atomically.
    pub(crate) split_lock: Mutex<()>,
    /// Whose turn it is, when execution is by instruction count.
    pub(crate) turns: Option<Arc<Turns>>,
    /// The vCPUs whose code pages others must be told of: bit per index. Set when the vCPU first runs.
    pub(crate) active: AtomicU64,
}

// SAFETY: the raw pointers point to guest RAM, which any thread may access at any time as guest memory.
unsafe impl Send for VmShared {}
// SAFETY: as above.
unsafe impl Sync for VmShared {}

impl VmShared {
    /// The index of a page of RAM, by guest-physical address.
    #[inline]
    pub(crate) fn page_index(&self, phys: u64) -> Option<usize> {
        let page = (phys >> 12) as usize;
        if page < self.low_pages {
            return Some(page);
        }
        let above = page.wrapping_sub((tenon_core::HIGH_BASE >> 12) as usize);
        (above < self.high_pages).then(|| self.low_pages + above)
    }

    /// The guest-physical address of the page with this index.
    pub(crate) fn page_address(&self, index: usize) -> u64 {
        if index < self.low_pages {
            (index as u64) << 12
        } else {
            tenon_core::HIGH_BASE + ((index - self.low_pages) as u64) * 4096
        }
    }

    /// The host address of the page with this index.
    #[inline]
    pub(crate) fn ram_page(&self, index: usize) -> *mut u8 {
        // SAFETY: an index comes from `page_index`, so that the page is inside its region.
        unsafe {
            if index < self.low_pages {
                self.low.add(index << 12)
            } else {
                self.high.add((index - self.low_pages) << 12)
            }
        }
    }

    /// The host address of `len` bytes at `phys` that lie in one page of RAM.
    pub(crate) fn ram_ptr(&self, phys: u64, len: u64) -> Option<*mut u8> {
        if (phys & 0xfff) + len > 0x1000 {
            return None;
        }
        // SAFETY: the offset stays inside the page.
        self.page_index(phys).map(|index| unsafe { self.ram_page(index).add((phys & 0xfff) as usize) })
    }

    /// The host address of the page of read-only memory that holds `phys`.
    #[cold]
    pub(crate) fn rom_page(&self, phys: u64) -> Option<*const u8> {
        self.ram.roms().iter().find_map(|rom| {
            let offset = phys.checked_sub(rom.base()).filter(|offset| *offset < rom.size())?;
            // SAFETY: the offset is inside the ROM, which is made of whole pages and lives as long as `ram`.
            Some(unsafe { rom.as_ptr().add((offset & !0xfff) as usize) })
        })
    }

    /// Reads an aligned word of physical memory; all ones outside RAM and ROM.
    pub(crate) fn phys_read<T: crate::mem::Word>(&self, phys: u64) -> T {
        let rom = || {
            let page = self.rom_page(phys).filter(|_| (phys & 0xfff) + T::SIZE <= 0x1000)?;
            // SAFETY: the bytes lie in the page.
            Some(unsafe { page.add((phys & 0xfff) as usize) }.cast_mut())
        };
        match self.ram_ptr(phys, T::SIZE).or_else(rom) {
            // SAFETY: `ram_ptr` and `rom_page` vouch for the bytes.
            Some(p) => unsafe { T::load(p) },
            None => T::from_u64(u64::MAX),
        }
    }

    /// Compares and exchanges an aligned word of physical memory; gives what was there.
    pub(crate) fn phys_cas<T: crate::mem::Word>(&self, phys: u64, old: T, new: T) -> Result<T, T> {
        match self.ram_ptr(phys, T::SIZE) {
            Some(p) if phys & (T::SIZE - 1) == 0 => {
                // SAFETY: `ram_ptr` vouches for the bytes, and they are aligned.
                let done = unsafe { T::cas(p, old, new) };
                self.ram.written(phys, T::SIZE);
                done
            }
            _ => Ok(old),
        }
    }

    /// Compares and exchanges a quadword.
    pub(crate) fn phys_cas_u64(&self, phys: u64, old: u64, new: u64) -> Result<u64, u64> {
        self.phys_cas(phys, old, new)
    }

    /// Compares and exchanges a doubleword.
    pub(crate) fn phys_cas_u32(&self, phys: u64, old: u32, new: u32) -> Result<u32, u32> {
        self.phys_cas(phys, old, new)
    }

    /// Notes a write to a page.
    #[inline]
    pub(crate) fn mark_dirty(&self, index: usize) {
        self.ram.dirty_log().mark(index);
    }

    /// Whether further writes to a page need no note.
    #[inline]
    pub(crate) fn is_dirty_or_off(&self, index: usize) -> bool {
        !self.ram.dirty_log().is_on() || self.ram.dirty_log().is_marked(index)
    }

    /// How many vCPUs the VM has.
    pub(crate) fn vcpu_count(&self) -> u32 {
        self.vcpus.len() as u32
    }

    /// Sends a notice to all vCPUs but `from`.
    pub(crate) fn tell_others(&self, from: u32, notice: Notice) {
        let active = self.active.load(Ordering::SeqCst);
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            if index != from as usize && active >> index & 1 != 0 {
                vcpu.tell(notice);
            }
        }
    }

    fn tell_all(&self, notice: Notice) {
        self.tell_others(u32::MAX, notice);
    }
}

impl CodeWatch for VmShared {
    /// A device has written decoded code. Every vCPU looks at its notices before it enters another block.
    fn code_written(&self, page: usize) {
        self.code.page(page).store(0, Ordering::SeqCst);
        self.tell_all(Notice::CodeWritten(page));
    }
}

/// The I/O APIC's registers on the bus.
struct IoApicRegisters(Arc<IrqChip>);

impl Region for IoApicRegisters {
    fn read(&self, offset: u64, _size: u8) -> u64 {
        self.0.ioapic_read(offset).into()
    }
    fn write(&self, offset: u64, _size: u8, value: u64) {
        self.0.ioapic_write(offset, value as u32);
    }
}

/// The software engine.
#[derive(Clone, Copy, Debug, Default)]
pub struct Soft;

impl Soft {
    /// The engine. It needs nothing of the host.
    #[must_use]
    pub fn new() -> Self {
        Self
    }
}

impl Engine for Soft {
    fn name(&self) -> &'static str {
        "soft"
    }

    fn create_vm(&self, setup: VmSetup) -> Result<Arc<dyn Vm>, EngineError> {
        if !(1..=64).contains(&setup.vcpus) {
            return Err(EngineError::Invalid(format!("{} vCPUs: the engine runs 1 to 64", setup.vcpus)));
        }
        let (mut low, mut high) = ((std::ptr::null_mut(), 0), (std::ptr::null_mut(), 0));
        for (start, length, host) in setup.ram.regions() {
            let region = (host, (length >> 12) as usize);
            if start == 0 { low = region } else { high = region }
        }
        let chip = IrqChip::new(&setup.clock, setup.vcpus);
        let claim = setup
            .mmio
            .claim(
                "I/O APIC",
                ioapic::IOAPIC_BASE,
                ioapic::IOAPIC_SIZE,
                Arc::new(IoApicRegisters(chip.clone())),
            )
            .map_err(|error| EngineError::Invalid(error.to_string()))?;
        let turns = setup.clock.is_virtual().then(|| Arc::new(Turns::new(setup.vcpus as usize)));
        let vcpus: Vec<_> = (0..setup.vcpus as usize)
            .map(|index| VcpuShared::new(turns.clone().map(|turns| (turns, index))))
            .collect();
        for (index, vcpu) in (0..).zip(&vcpus) {
            chip.apic(index).set_notify(vcpu.clone());
        }
        let shared = VmShared {
            code: setup.ram.code_pages().clone(),
            ram: setup.ram,
            low: low.0,
            low_pages: low.1,
            high: high.0,
            high_pages: high.1,
            pio: setup.pio,
            mmio: setup.mmio,
            chip,
            vcpus,
            split_lock: Mutex::new(()),
            turns,
            clock: setup.clock,
            active: AtomicU64::new(0),
        };
        let shared = Arc::new(shared);
        let watcher: Arc<dyn CodeWatch> = shared.clone();
        shared.code.watch(Arc::downgrade(&watcher));
        Ok(Arc::new(SoftVm { shared, made: Mutex::new(0), _ioapic: claim }))
    }
}

struct SoftVm {
    shared: Arc<VmShared>,
    /// Bit per vCPU that was made.
    made: Mutex<u64>,
    _ioapic: Claim,
}

impl Vm for SoftVm {
    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, EngineError> {
        let count = self.shared.vcpus.len();
        if index as usize >= count {
            return Err(EngineError::Invalid(format!("vCPU {index} of {count}")));
        }
        let mut made = lock(&self.made);
        if *made >> index & 1 != 0 {
            return Err(EngineError::Invalid(format!("vCPU {index} exists already")));
        }
        *made |= 1 << index;
        let mut state = CpuState::after_reset();
        if index != 0 {
            state.activity = Activity::WaitForSipi;
        }
        let mut cpu = Cpu::new(self.shared.clone(), index);
        cpu.set_state(&state).map_err(EngineError::Invalid)?;
        self.shared.active.fetch_or(1 << index, Ordering::SeqCst);
        if let Some(turns) = &self.shared.turns {
            turns.expect(index as usize);
        }
        Ok(Box::new(SoftVcpu { cpu }))
    }

    fn interrupts(&self) -> Arc<dyn InterruptController> {
        self.shared.chip.clone()
    }

    fn reset(&self) -> Result<(), EngineError> {
        self.shared.chip.reset();
        self.shared.tell_all(Notice::All);
        Ok(())
    }

    fn save(&self) -> Result<Vec<u8>, EngineError> {
        Ok(self.shared.chip.save())
    }

    fn restore(&self, state: &[u8]) -> Result<(), EngineError> {
        self.shared.tell_all(Notice::All);
        self.shared.chip.restore(state).map_err(EngineError::Invalid)
    }

    fn set_dirty_log(&self, on: bool) -> Result<(), EngineError> {
        self.shared.ram.dirty_log().set(on);
        self.shared.tell_all(Notice::DirtyLog);
        Ok(())
    }

    fn take_dirty_log(&self) -> Result<Vec<u64>, EngineError> {
        let ram = &self.shared.ram;
        if !ram.dirty_log().is_on() {
            return Err(EngineError::Invalid("the dirty log is off; turn it on first".into()));
        }
        let pages = ram.dirty_log().take();
        // A vCPU that still has fast stores notes their pages again when it drops them.
        self.shared.tell_all(Notice::DirtyLog);
        Ok(pages.into_iter().map(|page| ram.page_address(page)).collect())
    }
}

struct SoftVcpu {
    cpu: Box<Cpu>,
}

// SAFETY: the raw pointers in `Cpu` point to what it owns itself, or to guest RAM.
unsafe impl Send for SoftVcpu {}

impl Vcpu for SoftVcpu {
    fn run(&mut self) -> Result<Stop, EngineError> {
        let stop = self.cpu.run();
        if self.cpu.vm.ram.dirty_log().is_on() {
            // While no vCPU runs the log lacks nothing.
            self.cpu.drop_all_write_tags();
        }
        Ok(stop)
    }

    fn state(&mut self) -> Result<CpuState, EngineError> {
        Ok(self.cpu.state())
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), EngineError> {
        self.cpu.set_state(state).map_err(EngineError::Invalid)
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.cpu.shared.clone()
    }

    fn instructions(&self) -> Option<u64> {
        Some(self.cpu.icount)
    }
}
