//! Read-only memory: executed from the reset vector on, read, and written without effect but on the bus.

use std::sync::{Arc, Mutex};

use iced_x86::code_asm::*;
use tenon_core::{Clock, HIGH_BASE, Ram, Region, Rom};

use crate::guest::*;

const SIZE: u64 = 0x3000;
const BASE: u64 = HIGH_BASE - SIZE;

#[derive(Default)]
struct Writes(Mutex<Vec<(u64, u8, u64)>>);

impl Region for Writes {
    fn read(&self, _: u64, _: u8) -> u64 {
        panic!("ROM is read without a device")
    }
    fn write(&self, offset: u64, size: u8, value: u64) {
        self.0.lock().unwrap().push((offset, size, value));
    }
}

/// A machine with `code` at the offset `at` of its ROM and a jump there at the reset vector.
fn rom(at: u64, code: &[u8], data: &[(u64, u64)]) -> Guest {
    let mut content = vec![0xcc; SIZE as usize];
    content[at as usize..][..code.len()].copy_from_slice(code);
    for (offset, value) in data {
        content[*offset as usize..][..8].copy_from_slice(&value.to_le_bytes());
    }
    let jump = assemble(16, 0xfff0, |a| a.jmp(0x1_0000 - SIZE + at));
    content[SIZE as usize - 16..][..jump.len()].copy_from_slice(&jump);
    let ram = Ram::with_roms(8 << 20, vec![Rom::new(BASE, &content).unwrap()]).unwrap();
    Guest::with_ram(ram, Clock::real().unwrap(), 1)
}

#[test]
fn a_machine_starts_in_its_rom_and_code_there_crosses_pages() {
    let code = assemble(16, 0x1_0000 - SIZE + 0xff9, |a| {
        a.mov(eax, 0x1234_5678)?;
        a.mov(ebx, 0x9abc_def0u32.cast_signed())?;
        a.out(STOP, al)?;
        a.hlt()
    });
    let state = rom(0xff9, &code, &[]).run();
    assert_eq!((state.general[0], state.general[3]), (0x1234_5678, 0x9abc_def0));
}

#[test]
fn a_write_to_rom_goes_to_the_bus_and_leaves_the_rom_as_it_is() {
    let mut guest = rom(0x100, &[], &[(0x800, 0x1122_3344_5566_7788)]);
    let writes = Arc::new(Writes::default());
    let _claim = guest.mmio.claim("flash", BASE, SIZE, writes.clone()).unwrap();
    // The whole last GiB below 4 GiB in large pages.
    for n in 0..512u64 {
        guest.put(0x5000 + 8 * n, 0xc000_0000 + (n << 21) | 0x83);
    }
    guest.put(PDPT + 3 * 8, 0x5000u64 | 3);
    guest.program(64, CODE, |a| {
        a.mov(edi, (BASE + 0x800) as u32)?;
        a.mov(rax, qword_ptr(rdi))?;
        a.mov(dword_ptr(rdi), 7)?;
        a.add(byte_ptr(rdi), 1)?;
        a.mov(ecx, 3)?;
        a.mov(esi, 0x7000)?;
        a.rep().movsb()?;
        a.sub(edi, 3)?;
        a.mov(rbx, qword_ptr(rdi))?;
        a.mov(ecx, 8)?;
        a.mov(rsi, rdi)?;
        a.mov(edi, 0x7100)?;
        a.rep().movsb()?;
        a.out(STOP, al)?;
        a.hlt()
    });
    let reset = guest.vcpu.state().unwrap();
    assert_eq!(reset.rip, 0xfff0);
    let long = Guest::long().vcpu.state().unwrap();
    guest.change(|state| *state = long);
    guest.put(0x7000, [1u8, 2, 3]);
    let state = guest.run();
    assert_eq!(state.general[0], 0x1122_3344_5566_7788);
    assert_eq!(state.general[3], state.general[0]);
    assert_eq!(guest.get::<u64>(0x7100), state.general[0]);
    let seen = std::mem::take(&mut *writes.0.lock().unwrap());
    assert_eq!(seen, [(0x800, 4, 7), (0x800, 1, 0x89), (0x800, 1, 1), (0x801, 1, 2), (0x802, 1, 3)]);
}

#[test]
fn page_tables_may_be_in_rom() {
    // A directory in ROM that maps the first 2 MiB, all bits set that the walk would set.
    let mut guest = rom(0x100, &[], &[(0, 0xe3)]);
    guest.put(PDPT, BASE | 0x23);
    guest.program(64, CODE, |a| {
        a.mov(eax, dword_ptr(0x7000))?;
        a.out(STOP, al)?;
        a.hlt()
    });
    let long = Guest::long().vcpu.state().unwrap();
    guest.change(|state| *state = long);
    guest.put(0x7000, 0x0bad_cafeu32);
    assert_eq!(guest.run().general[0], 0x0bad_cafe);
}
