//! A VM: memory slots, interrupt controllers, the dirty log, and what all vCPUs share.
#![allow(unsafe_code)] // Memory slots are raw memory, and the interrupt controllers' states are unions.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES,
    KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_clock_data, kvm_ioeventfd, kvm_irqchip,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{VcpuFd, VmFd};
use tenon_core::{EngineError, InterruptController, Interrupts, Vcpu, Vm, VmSetup};
use vmm_sys_util::eventfd::EventFd;

use crate::cpuid::{self, Template};
use crate::engine::host;
use crate::irq::{self, Controller};
use crate::msr::MsrNumbers;
use crate::vcpu::{KvmVcpu, Shown};

/// Three pages that VT-x without unrestricted guest mode needs somewhere where the guest has nothing; and below them its identity map.
/// Both lie in the hole, below where firmware can be: in the last 16 MiB.
const TSS_ADDRESS: usize = 0xfeff_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfeff_c000;

/// `_IOW(KVMIO, 0x79, struct kvm_ioeventfd)`
const KVM_IOEVENTFD: libc::c_ulong = 0x4040_ae79;
/// Flag of that call: end it.
const IOEVENTFD_DEASSIGN: u32 = 1 << 2;

/// The beginning of a saved state: the format, then its version.
const MAGIC: &[u8; 8] = b"TNKVMVM\x01";
/// The chips whose state is saved, in this order.
const CHIPS: [u32; 3] = [KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE];
/// The bytes of a chip's state.
const CHIP: usize = 512;
/// The bytes of a saved state: magic, TSC frequency in kHz, kvmclock in ns, chips.
const SAVED: usize = 8 + 8 + 8 + CHIPS.len() * CHIP;

/// How far the TSC frequencies of two hosts may differ, in parts per thousand, for a guest to go from one to the other unscaled.
const TSC_TOLERANCE: u64 = 1;

/// What vCPUs need of their VM.
pub(crate) struct Shared {
    pub(crate) fd: Arc<VmFd>,
    pub(crate) setup: VmSetup,
    pub(crate) msrs: MsrNumbers,
    /// The guest's TSC frequency, once there is a vCPU to ask.
    pub(crate) tsc_khz: AtomicU64,
}

struct Vcpus {
    /// Every vCPU made so far, and its local APIC's state after power-on.
    made: Vec<(u32, Arc<VcpuFd>, kvm_bindings::kvm_lapic_state)>,
}

/// A VM.
pub(crate) struct KvmVm {
    shared: Arc<Shared>,
    cpuid: Template,
    run_size: usize,
    controller: Arc<Controller>,
    vcpus: Mutex<Vcpus>,
    dirty_log: Mutex<bool>,
    power_on: Vec<u8>,
}

impl KvmVm {
    pub(crate) fn new(
        kvm: &kvm_ioctls::Kvm,
        setup: VmSetup,
        cpuid: Template,
    ) -> Result<Arc<Self>, EngineError> {
        let fd = create(kvm)?;
        fd.set_tss_address(TSS_ADDRESS).map_err(host("KVM_SET_TSS_ADDR"))?;
        // Before any vCPU; a kernel without VT-x does not need it, and may not have it.
        if kvm.check_extension(kvm_ioctls::Cap::SetIdentityMapAddr) {
            fd.set_identity_map_address(IDENTITY_MAP_ADDRESS).map_err(host("KVM_SET_IDENTITY_MAP_ADDR"))?;
        }
        irq::create(&fd)?;
        let fd = Arc::new(fd);
        let msrs = MsrNumbers::new(kvm)?;
        let controller = Arc::new(Controller::new(fd.clone()));
        let run_size = kvm.get_vcpu_mmap_size().map_err(host("KVM_GET_VCPU_MMAP_SIZE"))?;
        let shared = Arc::new(Shared { fd, setup, msrs, tsc_khz: AtomicU64::new(0) });
        let mut vm = Self {
            shared,
            cpuid,
            run_size,
            controller,
            vcpus: Mutex::new(Vcpus { made: Vec::new() }),
            dirty_log: Mutex::new(false),
            power_on: Vec::new(),
        };
        vm.map_memory(false)?;
        vm.map_roms(kvm)?;
        vm.power_on = vm.chips()?;
        Ok(Arc::new(vm))
    }

    /// Gives the kernel each region of RAM as a slot, with or without a log of its pages.
    fn map_memory(&self, log: bool) -> Result<(), EngineError> {
        for (slot, (start, size, at)) in (0..).zip(self.shared.setup.ram.regions()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: if log { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
                guest_phys_addr: start,
                memory_size: size,
                userspace_addr: at as u64,
            };
            // SAFETY: the mapping lives as long as `setup.ram`, and so as long as any vCPU, for these hold `Shared` too. What else holds
            // the VM's descriptor runs no guest code.
            unsafe { self.shared.fd.set_user_memory_region(region) }
                .map_err(host("KVM_SET_USER_MEMORY_REGION"))?;
        }
        Ok(())
    }

    /// Gives the kernel each ROM as a read-only slot, after those of RAM. A write to it comes here as one to a device.
    fn map_roms(&self, kvm: &kvm_ioctls::Kvm) -> Result<(), EngineError> {
        let ram = &self.shared.setup.ram;
        if !ram.roms().is_empty() && !kvm.check_extension(kvm_ioctls::Cap::ReadonlyMem) {
            return Err(EngineError::Invalid(
                "this kernel's KVM has no read-only memory (KVM_CAP_READONLY_MEM), which firmware lies in; use --engine soft".into(),
            ));
        }
        let first = u32::try_from(ram.regions().count()).unwrap_or(u32::MAX);
        for (slot, rom) in (first..).zip(ram.roms()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: KVM_MEM_READONLY,
                guest_phys_addr: rom.base(),
                memory_size: rom.size(),
                userspace_addr: rom.as_ptr() as u64,
            };
            // SAFETY: as for RAM, which holds the ROM's mapping.
            unsafe { self.shared.fd.set_user_memory_region(region) }
                .map_err(host("KVM_SET_USER_MEMORY_REGION"))?;
        }
        Ok(())
    }

    fn chips(&self) -> Result<Vec<u8>, EngineError> {
        let mut bytes = Vec::with_capacity(CHIPS.len() * CHIP);
        for chip_id in CHIPS {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            self.shared.fd.get_irqchip(&mut chip).map_err(host("KVM_GET_IRQCHIP"))?;
            // SAFETY: every member of the union is plain bytes, and `dummy` is all of it.
            bytes.extend(unsafe { chip.chip.dummy }.map(i8::cast_unsigned));
        }
        Ok(bytes)
    }

    fn set_chips(&self, bytes: &[u8]) -> Result<(), EngineError> {
        for (chip_id, state) in CHIPS.into_iter().zip(bytes.chunks_exact(CHIP)) {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            let mut dummy = [0; CHIP];
            for (to, from) in dummy.iter_mut().zip(state) {
                *to = from.cast_signed();
            }
            chip.chip.dummy = dummy;
            self.shared.fd.set_irqchip(&chip).map_err(host("KVM_SET_IRQCHIP"))?;
        }
        Ok(())
    }

    fn vcpus(&self) -> MutexGuard<'_, Vcpus> {
        self.vcpus.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn make_vcpu(&self, index: u32) -> Result<KvmVcpu, EngineError> {
        let mut vcpus = self.vcpus();
        let all = self.shared.setup.vcpus;
        if index >= all {
            return Err(EngineError::Invalid(format!("vCPU {index}: the machine has {all}")));
        }
        if vcpus.made.iter().any(|made| made.0 == index) {
            return Err(EngineError::Invalid(format!("vCPU {index} was made already")));
        }
        let fd = Arc::new(self.shared.fd.create_vcpu(index.into()).map_err(host("KVM_CREATE_VCPU"))?);
        // What the host cannot tell is shown as unknown.
        let tsc_khz = fd.get_tsc_khz().unwrap_or(0);
        self.shared.tsc_khz.store(tsc_khz.into(), Ordering::Relaxed);
        let asked = self.cpuid.of_vcpu(index, all, tsc_khz)?;
        fd.set_cpuid2(&asked).map_err(host("KVM_SET_CPUID2"))?;
        // Some paravirtual hosts show what they like, so the vCPU's own leaves count.
        let shown = fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(host("KVM_GET_CPUID2"))?;
        let kept = cpuid::kept(asked.as_slice(), shown.as_slice());
        if !kept && index == 0 {
            tracing::debug!("this host's KVM shows guests other CPU features than the model's");
        }
        let cpuid = Shown { xcr0: cpuid::xcr0(shown.as_slice()), kept };
        let lapic = fd.get_lapic().map_err(host("KVM_GET_LAPIC"))?;
        let vcpu = KvmVcpu::new(index, fd.clone(), self.run_size, self.shared.clone(), cpuid, lapic)?;
        vcpus.made.push((index, fd, lapic));
        Ok(vcpu)
    }
}

impl Vm for KvmVm {
    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, EngineError> {
        Ok(Box::new(self.make_vcpu(index)?))
    }

    fn interrupts(&self) -> Arc<dyn InterruptController> {
        self.controller.clone()
    }

    fn reset(&self) -> Result<(), EngineError> {
        self.set_chips(&self.power_on)?;
        for (_, fd, lapic) in &self.vcpus().made {
            fd.set_lapic(lapic).map_err(host("KVM_SET_LAPIC"))?;
        }
        Ok(())
    }

    fn save(&self) -> Result<Vec<u8>, EngineError> {
        let clock = self.shared.fd.get_clock().map_err(host("KVM_GET_CLOCK"))?.clock;
        let mut bytes = Vec::with_capacity(SAVED);
        bytes.extend(MAGIC);
        bytes.extend(self.shared.tsc_khz.load(Ordering::Relaxed).to_le_bytes());
        bytes.extend(clock.to_le_bytes());
        bytes.extend(self.chips()?);
        Ok(bytes)
    }

    fn restore(&self, state: &[u8]) -> Result<(), EngineError> {
        if state.get(..7) != Some(&MAGIC[..7]) {
            return Err(EngineError::Invalid("the VM's state was not saved by the KVM engine".into()));
        }
        if state.get(7) != Some(&MAGIC[7]) {
            return Err(EngineError::Invalid(format!(
                "the VM's state has version {}; this engine reads version {}",
                state.get(7).copied().unwrap_or(0),
                MAGIC[7]
            )));
        }
        if state.len() != SAVED {
            return Err(EngineError::Invalid(format!(
                "the VM's state has {} bytes; it should have {SAVED}",
                state.len()
            )));
        }
        let number = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&state[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        let (saved_khz, clock) = (number(8), number(16));
        let own_khz = self.shared.tsc_khz.load(Ordering::Relaxed);
        if own_khz != 0 && saved_khz != 0 && own_khz.abs_diff(saved_khz) > own_khz / 1000 * TSC_TOLERANCE {
            return Err(EngineError::Invalid(format!(
                "the saved guest's TSC runs at {saved_khz} kHz, this host's at {own_khz} kHz: its clock would go wrong here"
            )));
        }
        self.set_chips(&state[24..])?;
        let clock = kvm_clock_data { clock, ..Default::default() };
        self.shared.fd.set_clock(&clock).map_err(host("KVM_SET_CLOCK"))
    }

    fn set_dirty_log(&self, on: bool) -> Result<(), EngineError> {
        let mut log = self.dirty_log.lock().unwrap_or_else(PoisonError::into_inner);
        if *log != on {
            self.map_memory(on)?;
            *log = on;
            self.shared.setup.ram.dirty_log().set(on);
        }
        Ok(())
    }

    fn take_dirty_log(&self) -> Result<Vec<u64>, EngineError> {
        let log = self.dirty_log.lock().unwrap_or_else(PoisonError::into_inner);
        if !*log {
            return Err(EngineError::Invalid("the dirty log is off".into()));
        }
        let mut pages = Vec::new();
        for (slot, (start, size, _)) in (0..).zip(self.shared.setup.ram.regions()) {
            let size = usize::try_from(size).map_err(|_| EngineError::Unsupported("memory of this size"))?;
            let bitmap = self.shared.fd.get_dirty_log(slot, size).map_err(host("KVM_GET_DIRTY_LOG"))?;
            for (word, mut bits) in (0u64..).zip(bitmap) {
                while bits != 0 {
                    pages.push(start + (word * 64 + u64::from(bits.trailing_zeros())) * 4096);
                    bits &= bits - 1;
                }
            }
        }
        // The kernel has logged what vCPUs wrote; devices' writes are logged where they are said.
        let ram = &self.shared.setup.ram;
        pages.extend(ram.dirty_log().take().into_iter().map(|page| ram.page_address(page)));
        pages.sort_unstable();
        pages.dedup();
        Ok(pages)
    }

    fn register_irqfd(&self, event: BorrowedFd<'_>, gsi: u32) -> Result<(), EngineError> {
        if gsi >= Interrupts::LINES {
            return Err(EngineError::Invalid(format!("GSI {gsi} does not exist")));
        }
        self.shared.fd.register_irqfd(&own(event)?, gsi).map_err(host("KVM_IRQFD"))
    }

    fn register_ioeventfd(&self, event: BorrowedFd<'_>, address: u64, size: u8) -> Result<(), EngineError> {
        self.set_ioeventfd(event, address, size, 0)
    }

    fn unregister_ioeventfd(&self, event: BorrowedFd<'_>, address: u64, size: u8) -> Result<(), EngineError> {
        self.set_ioeventfd(event, address, size, IOEVENTFD_DEASSIGN)
    }
}

impl KvmVm {
    fn set_ioeventfd(
        &self,
        event: BorrowedFd<'_>,
        address: u64,
        size: u8,
        flags: u32,
    ) -> Result<(), EngineError> {
        if !matches!(size, 0 | 1 | 2 | 4 | 8) {
            return Err(EngineError::Invalid(format!("no access has {size} bytes")));
        }
        // The crate that makes the other calls knows sizes only together with values.
        let request = kvm_ioeventfd {
            addr: address,
            len: size.into(),
            fd: event.as_raw_fd(),
            flags,
            ..Default::default()
        };
        // SAFETY: the kernel reads the structure, which has the size that the request's number says.
        match unsafe { libc::ioctl(self.shared.fd.as_raw_fd(), KVM_IOEVENTFD, &raw const request) } {
            -1 => Err(host("KVM_IOEVENTFD")(io::Error::last_os_error())),
            _ => Ok(()),
        }
    }
}

/// Makes the VM. The kernel lets a signal interrupt this, and then wants to be asked again.
fn create(kvm: &kvm_ioctls::Kvm) -> Result<VmFd, EngineError> {
    /// More signals than that in a row are not a coincidence.
    const TRIES: u32 = 100;
    let mut result = kvm.create_vm();
    for _ in 0..TRIES {
        match result {
            Err(error) if error.errno() == libc::EINTR => result = kvm.create_vm(),
            _ => break,
        }
    }
    result.map_err(host("KVM_CREATE_VM"))
}

/// The crate that makes the calls wants events of its own; the kernel keeps the event, not the descriptor.
fn own(event: BorrowedFd<'_>) -> Result<EventFd, EngineError> {
    let copy = event.try_clone_to_owned().map_err(host("dup"))?;
    // SAFETY: a descriptor that nobody else owns.
    Ok(unsafe { EventFd::from_raw_fd(copy.into_raw_fd()) })
}
