//! Descriptor tables and page tables: the first 4 GiB identity-mapped with 2 MiB pages that ring 3 may use.

use core::arch::asm;
use core::cell::UnsafeCell;

/// Ring-0 64-bit code.
pub const KERNEL_CODE: u16 = 0x08;
/// Ring-0 data.
pub const KERNEL_DATA: u16 = 0x10;
/// Ring-0 32-bit code.
pub const KERNEL_CODE32: u16 = 0x18;
/// Ring-3 32-bit code.
pub const USER_CODE32: u16 = 0x23;
/// Ring-3 data.
pub const USER_DATA: u16 = 0x2b;
/// Ring-3 64-bit code.
pub const USER_CODE: u16 = 0x33;
const TASK: u16 = 0x48;

/// Memory that code changes through raw pointers.
#[repr(C, align(4096))]
pub struct Shared<T>(UnsafeCell<T>);
// SAFETY: each use says why no two CPUs write it at once.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// Holds a value.
    pub const fn new(value: T) -> Self {
        Self(UnsafeCell::new(value))
    }

    /// Where the value is.
    pub const fn at(&self) -> *mut T {
        self.0.get()
    }
}

/// A page of 512 entries.
pub type Page = [u64; 512];

/// The root of the page tables.
#[unsafe(no_mangle)]
pub static PAGE_ROOT: Shared<Page> = Shared::new([0; 512]);
#[unsafe(no_mangle)]
static PAGE_POINTERS: Shared<Page> = Shared::new([0; 512]);
#[unsafe(no_mangle)]
static PAGE_DIRECTORIES: Shared<[Page; 4]> = Shared::new([[0; 512]; 4]);

static GDT: Shared<[u64; 11]> = Shared::new([0; 11]);
static IDT: Shared<[[u64; 2]; 256]> = Shared::new([[0; 2]; 256]);
static TSS: Shared<[u32; 26]> = Shared::new([0; 26]);
static TRAP_STACK: Shared<[u8; 0x4000]> = Shared::new([0; 0x4000]);

#[repr(C, packed)]
struct Pointer {
    limit: u16,
    base: u64,
}

unsafe extern "C" {
    static trap_vectors: [u8; 0];
}

/// Fills all tables and loads them. Called once, by the first vCPU.
pub fn install() {
    // SAFETY: only the first vCPU runs.
    unsafe {
        let root = PAGE_ROOT.at() as u64;
        (*PAGE_ROOT.at())[0] = PAGE_POINTERS.at() as u64 | 7;
        for n in 0..4 {
            (*PAGE_POINTERS.at())[n] = PAGE_DIRECTORIES.at().cast::<Page>().add(n) as u64 | 7;
            for page in 0..512 {
                (*PAGE_DIRECTORIES.at())[n][page] = ((n * 512 + page) << 21) as u64 | 0x87;
            }
        }
        asm!("mov cr3, {}", in(reg) root);

        let tss = TSS.at() as u64;
        let stack = TRAP_STACK.at() as u64 + 0x4000;
        (*TSS.at())[1] = stack as u32;
        (*TSS.at())[2] = (stack >> 32) as u32;
        // No I/O permission bitmap: it would begin past the segment's limit.
        (*TSS.at())[25] = 104 << 16;
        *GDT.at() = [
            0,
            0x00af_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x00cf_9b00_0000_ffff,
            0x00cf_fb00_0000_ffff,
            0x00cf_f300_0000_ffff,
            0x00af_fb00_0000_ffff,
            0x0000_9b00_0000_ffff,
            0x0000_9300_0000_ffff,
            103 | (tss & 0xff_ffff) << 16 | 0x89 << 40 | (tss >> 24 & 0xff) << 56,
            tss >> 32,
        ];
        let vectors = &raw const trap_vectors as u64;
        for (vector, gate) in (*IDT.at()).iter_mut().enumerate() {
            let handler = vectors + vector as u64 * 16;
            // Ring 3 may use INT 3 and INT 0x80.
            let rights: u64 = if vector == 3 || vector == 0x80 { 0xee } else { 0x8e };
            *gate = [
                handler & 0xffff
                    | u64::from(KERNEL_CODE) << 16
                    | rights << 40
                    | (handler >> 16 & 0xffff) << 48,
                handler >> 32,
            ];
        }
    }
    load();
    // SAFETY: the descriptor is the one made above.
    unsafe { asm!("ltr {:x}", in(reg) TASK) };
}

/// Loads the descriptor tables on this vCPU.
pub fn load() {
    let gdt = Pointer { limit: 11 * 8 - 1, base: GDT.at() as u64 };
    let idt = Pointer { limit: 256 * 16 - 1, base: IDT.at() as u64 };
    // SAFETY: the tables are filled and stay; the code segment is the same in the new table.
    unsafe {
        asm!(
            "lgdt [{gdt}]",
            "lidt [{idt}]",
            "mov ds, {data:e}",
            "mov es, {data:e}",
            "mov ss, {data:e}",
            "push {code}",
            "lea {scratch}, [rip + 2f]",
            "push {scratch}",
            "retfq",
            "2:",
            gdt = in(reg) &gdt,
            idt = in(reg) &idt,
            data = in(reg) u32::from(KERNEL_DATA),
            code = in(reg) u64::from(KERNEL_CODE),
            scratch = out(reg) _,
        );
    }
}

/// Replaces the 2 MiB page of `address` by 4 KiB pages in `table`, mapped the same, and returns where the entry of `address` is.
pub fn split(address: u64, table: &'static Shared<Page>) -> *mut u64 {
    let large = address >> 21 << 21;
    // SAFETY: the guest's main function runs alone while it changes page tables.
    unsafe {
        for (n, entry) in (*table.at()).iter_mut().enumerate() {
            *entry = large + (n << 12) as u64 | 7;
        }
        let directory = PAGE_DIRECTORIES.at().cast::<u64>();
        *directory.add((address >> 21) as usize) = table.at() as u64 | 7;
        crate::cpu::flush();
        table.at().cast::<u64>().add((address >> 12 & 511) as usize)
    }
}
