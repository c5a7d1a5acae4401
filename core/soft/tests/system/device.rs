//! What devices write: code that a vCPU has decoded and linked, and pages that the dirty log must have.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use tenon_core::{Buffers, Clock, Ram, Region};
use vm_memory::{Bytes, GuestAddress};

use crate::guest::*;
use crate::several::{OTHERS, SHARED, guest, run, start_others};

/// The page that the device writes and every vCPU executes.
const PAGE: u64 = 0x7_0000;
/// What a vCPU says, by its number: the last round that it has seen, and what the page's code gave then.
const SEEN: u64 = SHARED + 0x100;
const GAVE: u64 = SHARED + 0x200;
/// The guest is to stop.
const END: u64 = SHARED + 8;

/// RAM as a device's own pointer sees it.
struct Pointer(*mut u8);

// SAFETY: it points to guest RAM, which the guest outlives; every thread may write that.
unsafe impl Send for Pointer {}

impl Pointer {
    fn new(ram: &Ram) -> Self {
        Self(ram.regions().next().unwrap().2)
    }

    fn word(&self, address: u64) -> &AtomicU32 {
        // SAFETY: the address is an aligned one below the end of RAM.
        unsafe { AtomicU32::from_ptr(self.0.add(address as usize).cast()) }
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.0.add(address as usize), bytes.len()) };
    }

    /// Waits until all vCPUs have seen `round`. False where the guest has ended.
    fn wait(&self, vcpus: u32, round: u32, ended: &AtomicBool) -> bool {
        (0..u64::from(vcpus)).all(|n| {
            while self.word(SEEN + 4 * n).load(Ordering::Acquire) < round {
                if ended.load(Ordering::Acquire) {
                    return false;
                }
                std::thread::yield_now();
            }
            true
        })
    }
}

/// Sets a flag also where a vCPU panics.
struct Ended<'a>(&'a AtomicBool);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Runs a guest of which every vCPU executes `program`, with its number in RDI, while a device runs beside it.
fn run_beside(
    vcpus: u32,
    first: &[u8],
    program: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>,
    device: impl FnOnce(&Ram, &Pointer, &AtomicBool) + Send,
) {
    let mut guest = guest(Clock::real().unwrap(), vcpus);
    guest.load(PAGE, first);
    guest.program(64, OTHERS, |a| {
        program(a)?;
        a.cli()?;
        a.hlt()
    });
    guest.program(64, CODE, |a| {
        start_others(a)?;
        a.xor(edi, edi)?;
        program(a)?;
        a.out(STOP, al)
    });
    let (ram, ended) = (guest.ram.clone(), AtomicBool::new(false));
    let pointer = Pointer::new(&ram);
    std::thread::scope(|scope| {
        let ended = &ended;
        scope.spawn(move || {
            device(&ram, &pointer, ended);
            pointer.word(END).store(1, Ordering::Release);
        });
        let _ended = Ended(ended);
        run(&mut guest, vcpus);
    });
}

/// A function of several blocks of the page, which link to each other and turn in a loop before it returns `value`.
fn function(value: u32) -> Vec<u8> {
    assemble(64, PAGE, |a| {
        let (mut again, mut over, mut back) = (a.create_label(), a.create_label(), a.create_label());
        for _ in 0..value % 7 {
            a.nop()?;
        }
        a.xor(eax, eax)?;
        a.mov(ecx, 5)?;
        a.set_label(&mut again)?;
        a.test(cl, 1)?;
        a.je(over)?;
        a.add(eax, value.cast_signed())?;
        a.jmp(back)?;
        a.set_label(&mut over)?;
        a.add(eax, value.cast_signed())?;
        a.set_label(&mut back)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.ret()
    })
}

#[test]
fn a_page_of_code_that_a_device_brings_is_what_runs_next() {
    for (vcpus, rounds) in [(1, 300), (4, 100)] {
        let program = |a: &mut CodeAssembler| {
            let (mut again, mut wait, mut end) = (a.create_label(), a.create_label(), a.create_label());
            // Nobody runs the page while its first code comes: half of a function may do anything.
            a.xor(ebx, ebx)?;
            a.jmp(wait)?;
            a.set_label(&mut again)?;
            // Often enough that its blocks are known and linked.
            for _ in 0..3 {
                a.mov(rax, PAGE)?;
                a.call(rax)?;
            }
            a.mov(dword_ptr(rdi * 4 + GAVE), eax)?;
            a.mov(dword_ptr(rdi * 4 + SEEN), ebx)?;
            a.set_label(&mut wait)?;
            a.pause()?;
            a.cmp(dword_ptr(END), 0)?;
            a.jne(end)?;
            a.cmp(dword_ptr(SHARED), ebx)?;
            a.je(wait)?;
            a.mov(ebx, dword_ptr(SHARED))?;
            a.jmp(again)?;
            a.set_label(&mut end)?;
            a.nop()
        };
        let mut results = Vec::new();
        run_beside(vcpus, &[], program, |ram, pointer, ended| {
            for round in 1..=rounds {
                let code = function(round);
                match round % 2 {
                    0 => {
                        pointer.write(PAGE, &code);
                        ram.written(PAGE, code.len() as u64);
                    }
                    _ => ram.map().write_slice(&code, GuestAddress(PAGE)).unwrap(),
                }
                pointer.word(SHARED).store(round, Ordering::Release);
                if !pointer.wait(vcpus, round, ended) {
                    return;
                }
                for n in 0..u64::from(vcpus) {
                    results.push((round, pointer.word(GAVE + 4 * n).load(Ordering::Acquire)));
                }
            }
        });
        assert_eq!(results.len() as u32, rounds * vcpus);
        for (round, gave) in results {
            assert_eq!(gave, 5 * round, "{vcpus} vCPUs");
        }
    }
}

#[test]
fn code_that_runs_while_a_device_writes_it_is_new_once_the_device_says_so() {
    // In the page: a loop over three linked blocks, with an aligned immediate in the middle one, that a vCPU leaves when it was stale.
    let page = assemble(64, PAGE, |a| {
        let (mut again, mut middle, mut last, mut stale) =
            (a.create_label(), a.create_label(), a.create_label(), a.create_label());
        a.set_label(&mut again)?;
        a.mov(ebx, dword_ptr(SHARED))?;
        a.jmp(middle)?;
        a.nops_with_size(64 - 9 - 1)?;
        a.set_label(&mut middle)?;
        a.db(&[0xb8, 0, 0, 0, 0])?;
        a.jmp(last)?;
        a.set_label(&mut last)?;
        a.cmp(eax, ebx)?;
        a.jb(stale)?;
        a.mov(dword_ptr(rdi * 4 + SEEN), ebx)?;
        a.cmp(dword_ptr(END), 0)?;
        a.je(again)?;
        a.ret()?;
        a.set_label(&mut stale)?;
        a.mov(dword_ptr(rdi * 4 + GAVE), 1)?;
        a.mov(dword_ptr(rdi * 4 + SEEN), ebx)?;
        a.cmp(dword_ptr(END), 0)?;
        a.je(again)?;
        a.ret()
    });
    let immediate = PAGE + page.windows(5).position(|code| code == [0xb8, 0, 0, 0, 0]).unwrap() as u64 + 1;
    assert_eq!(immediate % 4, 0, "no half-written one is seen");
    for (vcpus, rounds) in [(1, 1_000), (4, 100)] {
        let program = |a: &mut CodeAssembler| {
            a.mov(rax, PAGE)?;
            a.call(rax)
        };
        let mut done = 0;
        let mut stale = Vec::new();
        run_beside(vcpus, &page, program, |ram, pointer, ended| {
            for round in 1..=rounds {
                pointer.word(immediate).store(round, Ordering::Relaxed);
                ram.written(immediate, 4);
                pointer.word(SHARED).store(round, Ordering::Release);
                if !pointer.wait(vcpus, round, ended) {
                    return;
                }
                done += 1;
            }
            stale.extend((0..u64::from(vcpus)).map(|n| pointer.word(GAVE + 4 * n).load(Ordering::Acquire)));
        });
        assert_eq!(done, rounds);
        assert!(stale.iter().all(|&stale| stale == 0), "{vcpus} vCPUs: {stale:?} ran old code");
    }
}

/// Answers a port write by writing that function into memory, before the instruction ends.
struct Loader(Arc<Ram>);

impl Region for Loader {
    fn read(&self, _: u64, _: u8) -> u64 {
        0
    }
    fn write(&self, _: u64, _: u8, value: u64) {
        let mut buffers = Buffers::new(&self.0);
        buffers.push(PAGE, 4096).unwrap();
        buffers.write(0, &function(value as u32));
    }
}

#[test]
fn code_that_a_port_write_brings_runs_right_after_it() {
    let mut guest = Guest::long();
    let loader = guest.pio.claim("loader", 0x200, 4, Arc::new(Loader(guest.ram.clone()))).unwrap();
    guest.program(64, CODE, |a| {
        let mut again = a.create_label();
        a.mov(ebx, 1)?;
        a.mov(edx, 0x200)?;
        a.set_label(&mut again)?;
        a.mov(eax, ebx)?;
        a.out(dx, eax)?;
        a.mov(rax, PAGE)?;
        a.call(rax)?;
        a.out(NOTE, eax)?;
        a.inc(ebx)?;
        a.cmp(ebx, 50)?;
        a.jne(again)?;
        a.out(STOP, al)
    });
    guest.run();
    assert_eq!(guest.notes(), (1..50).map(|n| 5 * n).collect::<Vec<_>>());
    drop(loader);
}

#[test]
fn the_dirty_log_has_the_writes_of_devices_and_of_vcpus() {
    let mut guest = Guest::long();
    guest.program(64, CODE, |a| {
        a.mov(dword_ptr(0x20_3000), 1)?;
        a.out(STOP, al)
    });
    guest.vm.set_dirty_log(true).unwrap();
    guest.load(0x20_5ffe, &[1, 2, 3]);
    guest.ram.written(0x20_8000, 0x1000);
    guest.run();
    let pages = guest.vm.take_dirty_log().unwrap();
    for page in [0x20_3000, 0x20_5000, 0x20_6000, 0x20_8000] {
        assert!(pages.contains(&page), "{page:#x} in {pages:x?}");
    }
    assert!(!pages.contains(&0x20_7000) && !pages.contains(&0x20_9000));
}

/// A register whose write does something on the vCPU's thread, in the middle of a block.
struct Register<F>(F);

impl<F: Fn() + Send + Sync> Region for Register<F> {
    fn read(&self, _: u64, _: u8) -> u64 {
        0
    }
    fn write(&self, _: u64, _: u8, _: u64) {
        self.0();
    }
}

const REGISTER: u64 = 0x3000_0000;

/// What makes a vCPU forget that it has been writing to the page at RSI.
const FORGETTING: [fn(&mut CodeAssembler) -> Result<(), IcedError>; 4] = [
    |a| {
        a.mov(rax, cr3)?;
        a.mov(cr3, rax)
    },
    |a| a.invlpg(byte_ptr(rsi)),
    // The page whose translation is kept in the same place.
    |a| a.mov(byte_ptr(rsi + 0x40_0000), 1),
    |a| a.nop(),
];

#[test]
fn no_write_is_lost_where_the_dirty_log_is_taken_in_the_middle_of_a_block() {
    const WRITTEN: u64 = 0x20_3000;
    for (n, forget) in FORGETTING.into_iter().enumerate() {
        let mut guest = Guest::long();
        guest.program(64, CODE, |a| {
            a.mov(esi, WRITTEN as i32)?;
            a.mov(byte_ptr(rsi), 1)?;
            a.mov(byte_ptr(REGISTER), 1)?;
            a.mov(byte_ptr(rsi), 2)?;
            forget(a)?;
            a.out(STOP, al)
        });
        guest.vm.set_dirty_log(true).unwrap();
        let (vm, taken) = (guest.vm.clone(), Arc::new(Mutex::new(Vec::new())));
        let in_the_middle = taken.clone();
        let take = Register(move || *in_the_middle.lock().unwrap() = vm.take_dirty_log().unwrap());
        let claim = guest.mmio.claim("log", REGISTER, 1, Arc::new(take)).unwrap();
        guest.run();
        assert!(taken.lock().unwrap().contains(&WRITTEN));
        assert!(guest.vm.take_dirty_log().unwrap().contains(&WRITTEN), "case {n}");
        drop(claim);
    }
}

#[test]
fn a_vcpu_that_decodes_while_another_one_writes_hears_of_the_write() {
    for (n, forget) in FORGETTING.into_iter().enumerate() {
        let mut guest = guest(Clock::real().unwrap(), 2);
        // MOV EAX, imm32; RET.
        guest.load(PAGE + 3, &[0xb8, 1, 0, 0, 0, 0xc3]);
        let call = |a: &mut CodeAssembler, when: i32| {
            let mut wait = a.create_label();
            a.set_label(&mut wait)?;
            a.pause()?;
            a.cmp(dword_ptr(SHARED), when)?;
            a.jne(wait)?;
            a.mov(rax, PAGE + 3)?;
            a.call(rax)?;
            a.mov(dword_ptr(GAVE), eax)?;
            a.mov(dword_ptr(SEEN), when)
        };
        guest.program(64, OTHERS, |a| {
            call(a, 1)?;
            call(a, 2)?;
            a.cli()?;
            a.hlt()
        });
        guest.program(64, CODE, |a| {
            let mut wait = a.create_label();
            start_others(a)?;
            a.mov(esi, PAGE as i32)?;
            a.jmp(wait)?;
            a.set_label(&mut wait)?;
            // From here to the jump is one block: its stores are fast until what makes it forget.
            a.mov(byte_ptr(rsi), 1)?;
            a.mov(byte_ptr(REGISTER), 1)?;
            a.mov(dword_ptr(rsi + 4), 2)?;
            forget(a)?;
            let (mut say, mut done) = (a.create_label(), a.create_label());
            a.jmp(say)?;
            a.set_label(&mut say)?;
            a.mov(dword_ptr(SHARED), 2)?;
            a.set_label(&mut done)?;
            a.pause()?;
            a.cmp(dword_ptr(SEEN), 2)?;
            a.jne(done)?;
            a.out(STOP, al)
        });
        let (ram, given) = (guest.ram.clone(), Arc::new(AtomicU32::new(0)));
        let first = given.clone();
        // The other vCPU decodes the function and returns from it, while this one is in the middle of its block.
        let wait = Register(move || {
            let pointer = Pointer::new(&ram);
            pointer.word(SHARED).store(1, Ordering::Release);
            while pointer.word(SEEN).load(Ordering::Acquire) != 1 {
                std::thread::yield_now();
            }
            first.store(pointer.word(GAVE).load(Ordering::Acquire), Ordering::Release);
        });
        let claim = guest.mmio.claim("wait", REGISTER, 1, Arc::new(wait)).unwrap();
        run(&mut guest, 2);
        assert_eq!((given.load(Ordering::Acquire), guest.get::<u32>(GAVE)), (1, 2), "case {n}");
        drop(claim);
    }
}
