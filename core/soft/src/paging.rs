//! Page walks: 32-bit, PAE and 4-level page tables (Intel SDM vol. 3 ch. 4), called when the TLB has no entry.
//!
//! Accessed and dirty bits are set by compare-exchange on guest memory, because other vCPUs walk and change the same tables.
//! An entry that changed under the walk makes it start again.
//!
//! PAE's four top entries are read on each walk, as AMD's processors do, and not kept from the last write of CR3.
//! Not here: 1 GiB pages, PSE-36, PCID, SMEP, SMAP, protection keys; CPUID shows none of them.

use crate::cpu::{Cpu, Fault, cr0, cr4, efer};
use crate::mem::{Access, Mapping};

/// Width of a guest-physical address in bits.
pub(crate) const PHYSICAL_BITS: u32 = 46;

const PRESENT: u64 = 1;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const GLOBAL: u64 = 1 << 8;
const NO_EXECUTE: u64 = 1 << 63;
/// The address in a 64-bit entry.
const ADDRESS: u64 = (1 << PHYSICAL_BITS) - 4096;
/// Address bits past the physical width.
const BEYOND: u64 = (1 << 52) - (1 << PHYSICAL_BITS);

const ERROR_PRESENT: u32 = 1;
const ERROR_WRITE: u32 = 2;
const ERROR_USER: u32 = 4;
const ERROR_RESERVED: u32 = 8;
const ERROR_FETCH: u32 = 16;

/// Why a walk ended without a translation.
enum Miss {
    NotPresent,
    Reserved,
    Protection,
    /// Somebody changed an entry meanwhile.
    Again,
}

/// The entries of one walk, from the top.
struct Walk {
    wide: bool,
    /// Address and value of each entry.
    entries: [(u64, u64); 4],
    count: usize,
}

impl Walk {
    fn read(&mut self, cpu: &Cpu, address: u64) -> Result<u64, Miss> {
        let entry = if self.wide {
            cpu.vm.phys_read::<u64>(address)
        } else {
            u64::from(cpu.vm.phys_read::<u32>(address))
        };
        if entry & PRESENT == 0 {
            return Err(Miss::NotPresent);
        }
        self.entries[self.count] = (address, entry);
        self.count += 1;
        Ok(entry)
    }

    /// Sets bits in the entry at `address`, unless it has changed.
    #[allow(clippy::cast_possible_truncation, reason = "narrow entries have 32 bits")]
    fn mark(&self, cpu: &Cpu, address: u64, entry: u64, bits: u64) -> Result<(), Miss> {
        if entry & bits == bits {
            return Ok(());
        }
        let done = if self.wide {
            cpu.vm.phys_cas_u64(address, entry, entry | bits).is_ok()
        } else {
            cpu.vm.phys_cas_u32(address, entry as u32, (entry | bits) as u32).is_ok()
        };
        if done { Ok(()) } else { Err(Miss::Again) }
    }
}

/// Translates a canonical linear address for one access, setting accessed and dirty bits.
///
/// # Errors
/// The page fault.
pub(crate) fn walk(cpu: &mut Cpu, linear: u64, access: Access, user: bool) -> Result<Mapping, Fault> {
    if cpu.cr0 & cr0::PG == 0 {
        return Ok(Mapping { phys: linear & !0xfff, write: true, exec: true, global: false });
    }
    loop {
        let reason = match attempt(cpu, linear, access, user) {
            Ok(mapping) => return Ok(mapping),
            Err(Miss::Again) => continue,
            Err(Miss::NotPresent) => 0,
            Err(Miss::Reserved) => ERROR_PRESENT | ERROR_RESERVED,
            Err(Miss::Protection) => ERROR_PRESENT,
        };
        let mut error = reason;
        if access == Access::Write {
            error |= ERROR_WRITE;
        }
        if user {
            error |= ERROR_USER;
        }
        if access == Access::Execute && cpu.efer & efer::NXE != 0 && cpu.cr4 & cr4::PAE != 0 {
            error |= ERROR_FETCH;
        }
        return Err(Fault::pf(linear, error));
    }
}

fn attempt(cpu: &Cpu, linear: u64, access: Access, user: bool) -> Result<Mapping, Miss> {
    let wide = cpu.cr4 & cr4::PAE != 0;
    let mut walk = Walk { wide, entries: [(0, 0); 4], count: 0 };
    // What every level allows; NX is inverted, so that all three are ANDed.
    let mut allowed = WRITE | USER | NO_EXECUTE;
    let page = if wide {
        wide_tables(cpu, linear, &mut walk, &mut allowed)?
    } else {
        narrow_tables(cpu, linear, &mut walk, &mut allowed)?
    };

    let writable = allowed & WRITE != 0 || !user && cpu.cr0 & cr0::WP == 0;
    let executable = allowed & NO_EXECUTE != 0;
    let permitted = match access {
        Access::Read => true,
        Access::Write => writable,
        Access::Execute => executable,
    };
    if user && allowed & USER == 0 || !permitted {
        return Err(Miss::Protection);
    }
    let (upper, leaf) = walk.entries[..walk.count].split_at(walk.count - 1);
    for (n, (address, entry)) in upper.iter().enumerate() {
        // PAE's top entries have no accessed bit.
        if n > 0 || !wide || cpu.efer & efer::LMA != 0 {
            walk.mark(cpu, *address, *entry, ACCESSED)?;
        }
    }
    let (address, entry) = leaf[0];
    let bits = if access == Access::Write { ACCESSED | DIRTY } else { ACCESSED };
    walk.mark(cpu, address, entry, bits)?;
    Ok(Mapping {
        phys: page,
        write: writable && (entry | bits) & DIRTY != 0,
        exec: executable,
        global: entry & GLOBAL != 0 && cpu.cr4 & cr4::PGE != 0,
    })
}

/// PAE and 4-level tables.
fn wide_tables(cpu: &Cpu, linear: u64, walk: &mut Walk, allowed: &mut u64) -> Result<u64, Miss> {
    let reserved = if cpu.efer & efer::NXE != 0 { BEYOND } else { BEYOND | NO_EXECUTE };
    let mut table = cpu.cr3 & ADDRESS;
    let mut shift = 39;
    if cpu.efer & efer::LMA == 0 {
        let entry = walk.read(cpu, (cpu.cr3 & 0xffff_ffe0) + (linear >> 30 & 3) * 8)?;
        // Bits 1, 2, 5 to 8 and everything past the address.
        if entry & (0x1e6 | BEYOND | !((1 << 52) - 1)) != 0 {
            return Err(Miss::Reserved);
        }
        table = entry & ADDRESS;
        shift = 21;
    }
    loop {
        let entry = walk.read(cpu, table + (linear >> shift & 0x1ff) * 8)?;
        let large = entry & LARGE != 0;
        if entry & reserved != 0 || large && (shift > 21 || shift == 21 && entry & 0x1f_e000 != 0) {
            return Err(Miss::Reserved);
        }
        *allowed &= entry ^ NO_EXECUTE;
        if shift == 12 {
            return Ok(entry & ADDRESS);
        }
        if large {
            return Ok(entry & ADDRESS & !0x1f_ffff | linear & 0x1f_f000);
        }
        table = entry & ADDRESS;
        shift -= 9;
    }
}

/// 32-bit tables.
fn narrow_tables(cpu: &Cpu, linear: u64, walk: &mut Walk, allowed: &mut u64) -> Result<u64, Miss> {
    let entry = walk.read(cpu, (cpu.cr3 & 0xffff_f000) + (linear >> 22 & 0x3ff) * 4)?;
    *allowed &= entry | NO_EXECUTE;
    if entry & LARGE != 0 && cpu.cr4 & cr4::PSE != 0 {
        if entry & 0x003f_e000 != 0 {
            return Err(Miss::Reserved);
        }
        return Ok(entry & 0xffc0_0000 | linear & 0x003f_f000);
    }
    let entry = walk.read(cpu, (entry & 0xffff_f000) + (linear >> 12 & 0x3ff) * 4)?;
    *allowed &= entry | NO_EXECUTE;
    Ok(entry & 0xffff_f000)
}
