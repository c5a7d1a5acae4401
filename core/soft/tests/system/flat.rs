//! Flat 32-bit code has handlers of its own. Where one segment is a byte short of flat it runs by those of any code: both must do the same.

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use tenon_core::CpuState;

use crate::guest::*;

const DATA_AT: u32 = 0x10_0000;
const DATA_SIZE: usize = 0x100;
const PROGRAMS: u64 = 1000;
const INSTRUCTIONS: u64 = 40;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}

/// EBX holds the data's address and ESP the stack's; the others are free.
const FREE: [AsmRegister32; 6] = [eax, ecx, edx, esi, edi, ebp];
const FREE16: [AsmRegister16; 6] = [ax, cx, dx, si, di, bp];
const FREE8: [AsmRegister8; 6] = [al, ah, cl, ch, dl, dh];

fn place(random: &mut Random) -> AsmMemoryOperand {
    let offset = random.below(DATA_SIZE as u64 - 8) as i32;
    match random.below(4) {
        0 => ptr(DATA_AT + offset as u32),
        1 => ebx + offset,
        2 => esp + (DATA_AT.cast_signed() - (STACK as i32 - 0x2000)) + offset,
        // The index is 16 at most, the base a carry past 4 GiB back.
        _ => ebx + edi * 4 - (4 * 5) + (offset / 2),
    }
}

macro_rules! operation {
    ($a:ident, $random:ident, $($name:ident)*) => {{
        let mut n = $random.below([$(stringify!($name)),*].len() as u64);
        let (imm, form) = ($random.next() as i32, $random.below(9));
        let place = place($random);
        $(
            if n == 0 {
                let (r, s) = ($random.pick(&FREE), $random.pick(&FREE));
                let (w, v) = ($random.pick(&FREE16), $random.pick(&FREE16));
                let (b, c) = ($random.pick(&FREE8), $random.pick(&FREE8));
                return match form {
                    0 => $a.$name(r, s),
                    1 => $a.$name(r, imm),
                    2 => $a.$name(dword_ptr(place), r),
                    3 => $a.$name(dword_ptr(place), imm),
                    4 => $a.$name(w, v),
                    5 => $a.$name(word_ptr(place), w),
                    6 => $a.$name(b, c),
                    7 => $a.$name(byte_ptr(place), b),
                    _ => $a.$name(b, imm & 0x7f),
                };
            }
            n = n.wrapping_sub(1);
        )*
        let _ = n;
        Ok(())
    }};
}

fn arithmetic(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    operation!(a, random, add sub cmp and or xor test adc sbb mov)
}

fn other(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    let (r, s) = (random.pick(&FREE), random.pick(&FREE));
    let (b, imm) = (random.pick(&FREE8), random.next());
    let place = place(random);
    match random.below(34) {
        0 => a.push(r),
        1 => a.push(imm as i32),
        2 => a.push(dword_ptr(place)),
        3 => a.push(imm as i32 & 0x7f),
        4 => {
            a.push(r)?;
            a.pop(s)
        }
        5 => a.inc(r),
        6 => a.dec(dword_ptr(place)),
        7 => a.neg(r),
        8 => a.not(r),
        9 => a.shl(r, imm as i32 & 31),
        10 => a.shr(r, imm as i32 & 31),
        11 => a.sar(r, cl),
        12 => a.rol(r, imm as i32 & 31),
        13 => a.imul_2(r, s),
        14 => a.imul_3(r, dword_ptr(place), imm as i32),
        15 => a.mul(r),
        16 => a.movzx(r, b),
        17 => a.movsx(r, word_ptr(place)),
        18 => a.lea(r, place),
        19 => a.lea(r, ebx + s * 8 + imm as i32 as i64 as i32),
        20 => a.xchg(dword_ptr(place), r),
        21 => a.lock().xadd(dword_ptr(place), r),
        22 => a.cmpxchg(dword_ptr(place), r),
        23 => a.bswap(r),
        24 => a.bt(r, s),
        25 => a.setle(b),
        26 => a.cmovb(r, s),
        27 => a.cdq(),
        28 => a.mov(r, dword_ptr(place).fs()),
        29 => a.movdqu(xmm1, xmmword_ptr(ebx + (imm & 0x7f) as i32)),
        30 => a.movd(xmm1, r),
        31 => a.mov(word_ptr(place), imm as i32 & 0xffff),
        32 => a.mov(r, dword_ptr(place).cs()),
        _ => a.lea(r, ptr(imm as u32)),
    }
}

/// A jump over an instruction, forward or by way of a call, direct or not.
fn jump(a: &mut CodeAssembler, random: &mut Random) -> Result<(), IcedError> {
    let (mut over, mut out) = (a.create_label(), a.create_label());
    let r = random.pick(&FREE);
    match random.below(8) {
        0 => {
            a.cmp(r, random.next() as i32)?;
            a.jl(over)?;
        }
        1 => {
            a.test(r, r)?;
            a.jne(over)?;
        }
        2 => a.jb(over)?,
        3 => a.jmp(over)?,
        4 => {
            // The address that the call pushes is that of POP; the instructions from there on have 6 bytes.
            a.call(out)?;
            a.set_label(&mut out)?;
            a.pop(ecx)?;
            a.add(ecx, 6)?;
            a.jmp(ecx)?;
            a.nop()?;
        }
        5 | 6 => {
            let through_register = random.below(2) == 0;
            a.jmp(out)?;
            a.set_label(&mut over)?;
            a.xchg(dword_ptr(esp + 4), r)?;
            if through_register {
                a.ret_1(8)?
            } else {
                a.ret()?
            }
            a.set_label(&mut out)?;
            a.push(r)?;
            a.push(r)?;
            if through_register {
                a.push(0x5a)?;
                a.pop(ebp)?;
                a.call(over)?;
                return a.nop();
            }
            a.call(over)?;
            return a.nop();
        }
        _ => {
            a.push(ebp)?;
            a.mov(ebp, esp)?;
            a.sub(esp, 0x20)?;
            a.leave()?;
            a.jo(over)?;
        }
    }
    other(a, random)?;
    a.set_label(&mut over)?;
    a.nop()
}

/// What is left: registers, flags, memory.
fn outcome(seed: u64, flat: bool) -> (Vec<u64>, u64, Vec<u8>, Vec<u8>) {
    let mut random = Random(seed);
    let mut guest = Guest::protected();
    let mut bytes = [0u8; DATA_SIZE];
    bytes.iter_mut().for_each(|byte| *byte = random.next() as u8);
    guest.load(DATA_AT.into(), &bytes);
    let general: [u64; 16] = std::array::from_fn(|_| random.next() & 0xffff_ffff);
    guest.change(|state: &mut CpuState| {
        state.general[..8].copy_from_slice(&general[..8]);
        state.general[3] = DATA_AT.into();
        state.general[4] = STACK - 0x100;
        if !flat {
            state.segments[0].limit -= 1;
        }
    });
    guest.program(32, CODE, |a| {
        a.mov(ecx, 3)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.push(ecx)?;
        for _ in 0..INSTRUCTIONS {
            a.mov(edi, random.below(5) as u32)?;
            match random.below(8) {
                0..=3 => arithmetic(a, &mut random)?,
                4..=6 => other(a, &mut random)?,
                _ => jump(a, &mut random)?,
            }
        }
        a.mov(esp, (STACK - 0x104) as u32)?;
        a.pop(ecx)?;
        a.pushfd()?;
        a.pop(dword_ptr(DATA_AT + DATA_SIZE as u32))?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.out(STOP, al)?;
        a.hlt()
    });
    let state = guest.run();
    // With the flags of the last round behind the data.
    let mut data = vec![0; DATA_SIZE + 4];
    let mut stack = vec![0; 0x1000];
    let map = guest.ram.map();
    vm_memory::Bytes::read_slice(map, &mut data, vm_memory::GuestAddress(DATA_AT.into())).unwrap();
    vm_memory::Bytes::read_slice(map, &mut stack, vm_memory::GuestAddress(STACK - 0x1000)).unwrap();
    let registers = state.general[..8].iter().map(|value| value & 0xffff_ffff).collect();
    (registers, state.rflags & !0x10, data, stack)
}

#[test]
fn flat_code_does_what_the_same_code_does_in_segments() {
    for n in 0..PROGRAMS {
        let seed = 0x9e37_79b9_7f4a_7c15 ^ (n + 1).wrapping_mul(0xd134_2543_de82_ef95);
        assert_eq!(outcome(seed, true), outcome(seed, false), "seed {seed:#x}");
    }
}

#[test]
fn a_segment_that_stops_being_flat_is_heeded_at_the_next_instruction() {
    let mut guest = Guest::protected();
    // 64 KiB of data from 0x10000 on.
    guest.put(GDT + u64::from(GATE), 0x0000_9301_0000_ffffu64);
    guest.put(0x2_0010u64, 0x1111_1111u32);
    guest.put(0x1_0010u64, 0x2222_2222u32);
    guest.put(0x10u64, 0x3333_3333u32);
    guest.program(32, CODE + 0x8000, |a| {
        a.mov(ecx, 2)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.mov(ebx, 0x10)?;
        a.mov(esi, dword_ptr(ebx))?;
        a.mov(eax, i32::from(GATE))?;
        a.mov(ds, eax)?;
        a.mov(edi, dword_ptr(ebx))?;
        a.mov(eax, i32::from(DATA))?;
        a.mov(ds, eax)?;
        a.mov(edx, dword_ptr(ebx))?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.mov(eax, i32::from(GATE))?;
        a.mov(ds, eax)?;
        a.mov(eax, dword_ptr(0x1_0000))?;
        a.hlt()
    });
    guest.change(|state| state.rip = CODE + 0x8000);
    let exception = guest.exception();
    assert_eq!((exception.vector, exception.error), (13, Some(0)));
    let general = exception.state.general;
    assert_eq!([general[6], general[7], general[2]], [0x3333_3333, 0x2222_2222, 0x3333_3333]);
}
