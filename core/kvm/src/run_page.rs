//! The page that a vCPU shares with the kernel (`struct kvm_run`), accessed without ever making a reference to it:
//! the kernel writes to it during `KVM_RUN`, and other threads set `immediate_exit` in it.
#![allow(unsafe_code)] // A mapping shared with the kernel is raw memory.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::kvm_run;

/// `_IO(KVMIO, 0x80)`
const KVM_RUN: libc::c_ulong = 0xae80;

/// A mapping of a vCPU's run page. It stays mapped while anyone holds it, the vCPU gone or not.
pub(crate) struct RunPage {
    page: NonNull<kvm_run>,
    size: usize,
}

// SAFETY: the mapping belongs to the process. Other threads only use `request_exit`, which is atomic; everything else is called by the one
// thread that drives the vCPU.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

/// An access of the guest to a register.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Access {
    /// The port or guest-physical address.
    pub(crate) address: u64,
    /// The bytes of one item.
    pub(crate) size: u8,
    /// How many items: more than one for string instructions.
    pub(crate) count: usize,
    /// Whether the guest writes.
    pub(crate) write: bool,
    /// Where in the page the data is.
    offset: usize,
}

impl RunPage {
    /// Maps the page of the vCPU behind `fd`, of which the kernel says that it has `size` bytes.
    pub(crate) fn new(fd: &impl AsRawFd, size: usize) -> io::Result<Self> {
        if size < size_of::<kvm_run>() {
            return Err(io::Error::other(format!("the kernel's run page has {size} bytes only")));
        }
        // SAFETY: a new shared mapping at an address of the kernel's choice.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(at.cast())
            .map(|page| Self { page, size })
            .ok_or_else(|| io::Error::other("the run page is mapped at zero"))
    }

    /// Runs the vCPU behind `fd` until the kernel has something to say.
    pub(crate) fn run(&self, fd: RawFd) -> io::Result<()> {
        // SAFETY: no reference to the page or to guest memory is alive; the kernel writes to both.
        match unsafe { libc::ioctl(fd, KVM_RUN, 0) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }

    /// Makes the next `KVM_RUN` finish what is under way and return EINTR, or takes that back. Any thread.
    pub(crate) fn request_exit(&self, exit: bool) {
        // SAFETY: the byte is inside the mapping, and nobody accesses it other than atomically.
        let byte = unsafe { AtomicU8::from_ptr(&raw mut (*self.page.as_ptr()).immediate_exit) };
        byte.store(exit.into(), Ordering::SeqCst);
    }

    /// Why `KVM_RUN` returned: one of `KVM_EXIT_*`.
    pub(crate) fn exit_reason(&self) -> u32 {
        // SAFETY: inside the mapping; the vCPU does not run.
        unsafe { (&raw const (*self.page.as_ptr()).exit_reason).read_volatile() }
    }

    /// What belongs to the exit reason. Every member is plain integers, valid whatever their bytes.
    pub(crate) fn detail<T: Copy>(&self, member: fn(&kvm_bindings::kvm_run__bindgen_ty_1) -> T) -> T {
        // SAFETY: inside the mapping; the vCPU does not run.
        let copy = unsafe { (&raw const (*self.page.as_ptr()).__bindgen_anon_1).read_volatile() };
        member(&copy)
    }

    /// The port access of a `KVM_EXIT_IO`.
    pub(crate) fn port_access(&self) -> Access {
        // SAFETY: inside the mapping; the vCPU does not run; plain integers.
        let io = unsafe { (&raw const (*self.page.as_ptr()).__bindgen_anon_1.io).read_volatile() };
        let offset = usize::try_from(io.data_offset).unwrap_or(usize::MAX);
        let size = if matches!(io.size, 1 | 2 | 4) { io.size } else { 1 };
        // The kernel keeps to its page; a count that does not is cut, so that the page is never left.
        let room = self.size.saturating_sub(offset) / usize::from(size);
        Access {
            address: io.port.into(),
            size,
            count: usize::try_from(io.count).unwrap_or(0).min(room),
            write: u32::from(io.direction) == kvm_bindings::KVM_EXIT_IO_OUT,
            offset,
        }
    }

    /// The access of a `KVM_EXIT_MMIO`: up to 8 bytes, of any length.
    pub(crate) fn mmio_access(&self) -> Access {
        // SAFETY: inside the mapping; the vCPU does not run; plain integers.
        let mmio = unsafe { (&raw const (*self.page.as_ptr()).__bindgen_anon_1.mmio).read_volatile() };
        Access {
            address: mmio.phys_addr,
            size: u8::try_from(mmio.len.clamp(1, 8)).unwrap_or(8),
            count: 1,
            write: mmio.is_write != 0,
            offset: std::mem::offset_of!(kvm_run, __bindgen_anon_1.mmio.data),
        }
    }

    /// Item `n` of an access.
    pub(crate) fn item(&self, access: &Access, n: usize) -> u64 {
        let mut bytes = [0; 8];
        let size = usize::from(access.size);
        assert!(n < access.count && access.offset + (n + 1) * size <= self.size);
        // SAFETY: checked to be inside the mapping; the vCPU does not run.
        unsafe {
            let from = self.page.as_ptr().cast::<u8>().add(access.offset + n * size);
            std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), size);
        }
        u64::from_le_bytes(bytes)
    }

    /// Answers item `n` of a reading access.
    pub(crate) fn set_item(&self, access: &Access, n: usize, value: u64) {
        let size = usize::from(access.size);
        assert!(n < access.count && access.offset + (n + 1) * size <= self.size);
        // SAFETY: checked to be inside the mapping; the vCPU does not run.
        unsafe {
            let to = self.page.as_ptr().cast::<u8>().add(access.offset + n * size);
            std::ptr::copy_nonoverlapping(value.to_le_bytes().as_ptr(), to, size);
        }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and nobody else holds it.
        unsafe { libc::munmap(self.page.as_ptr().cast(), self.size) };
    }
}
