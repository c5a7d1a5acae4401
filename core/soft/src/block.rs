//! Decoded basic blocks: how they are made, found, linked and forgotten.
//!
//! A block is straight-line code from one page, up to a branch or an instruction that changes the CPU's mode. It is known by
//! the guest-physical address of its first byte and the mode it was decoded for; each vCPU has its own blocks. Three ways lead to one,
//! from fast to slow: the link of the block before it (same page only, so that the translation that was good for one is good for the
//! other), the jump cache by linear address, and [`Cpu::find_block`], which compares the guest's bytes with those that were decoded.
//! Only the last one looks at memory; so whoever writes decoded code (a vCPU in [`crate::tlb`], a device by [`tenon_core::Ram::written`])
//! has every vCPU forget the page before it enters another block.
//!
//! An instruction that crosses into the next page is a block of its own, checked against both pages and never linked to.
//!
//! Blocks live in an arena and are never freed one by one: a forgotten block may be running. When the arena is full all are forgotten,
//! between two blocks.
#![allow(unsafe_code, reason = "blocks are variable-sized and linked by raw pointers into the arena")]
#![allow(clippy::cast_possible_truncation, reason = "offsets inside a page")]

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::atomic::{Ordering, fence};

use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction};

use crate::cpu::{CS, Cpu, Fault, RIP, mode};
use crate::lower::{self, Lowered};
use crate::ops;

/// Executes one instruction and those after it in the block. The block to go on with, or null: see [`Cpu::exit`].
pub(crate) type Run = unsafe fn(&mut Cpu, *const Op) -> *mut Block;

/// A decoded instruction.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Op {
    pub(crate) run: Run,
    /// An immediate, a branch's distance from the block's start, or a pointer to the whole [`Instruction`] in the arena.
    pub(crate) imm: u64,
    pub(crate) disp: i32,
    /// Offset of the instruction from the block's start.
    pub(crate) ip: u16,
    /// Its length.
    pub(crate) len: u8,
    /// Its index in the block.
    pub(crate) n: u8,
    /// Registers: indices into `gpr`, for 8-bit operands byte offsets.
    pub(crate) a: u8,
    pub(crate) b: u8,
    pub(crate) base: u8,
    pub(crate) index: u8,
    /// log2.
    pub(crate) scale: u8,
    pub(crate) seg: u8,
}

const _: () = assert!(size_of::<Op>() == 32);

/// The most instructions of a block.
const MOST: usize = 48;
/// The most bytes that [`MOST`] instructions have.
const BYTES: usize = 15 * MOST;
/// No second page.
const ONE_PAGE: u64 = u64::MAX;
/// Mode bit of blocks with a single instruction.
pub(crate) const SINGLE: u32 = 8;

/// A basic block; its ops follow it in the arena, and then its bytes.
#[repr(C)]
pub(crate) struct Block {
    pub(crate) count: u32,
    mode: u32,
    /// The blocks that follow: at the branch's target, and after the branch.
    pub(crate) link: [*mut Block; 2],
    phys: u64,
    next: *mut Block,
    bytes: *const u8,
    len: u32,
    ops: u32,
    /// The page that the instruction crosses into, or [`ONE_PAGE`].
    second: u64,
    first: [Op; 0],
}

impl Block {
    /// Whether it may be linked to.
    pub(crate) fn one_page(&self) -> bool {
        self.second == ONE_PAGE
    }

    #[inline(always)]
    pub(crate) fn first(this: *mut Self) -> *const Op {
        // SAFETY: ops follow the header; the address is only computed.
        unsafe { (&raw const (*this).first).cast() }
    }
}

#[derive(Clone, Copy)]
struct Jump {
    linear: u64,
    context: u64,
    block: *mut Block,
}

const JUMPS: usize = 4096;
const BUCKETS: usize = 1 << 16;
const CHUNK: usize = 1 << 20;
/// The arenas of all vCPUs together; each has at least [`LEAST`].
const ARENAS: usize = 256 << 20;
/// What a booting Linux needs without decoding much twice.
const LEAST: usize = 16 << 20;

/// A multiplying hash for page numbers.
#[derive(Default)]
pub(crate) struct PageHash(u64);

impl Hasher for PageHash {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }
    fn write_u64(&mut self, n: u64) {
        self.0 = (self.0 ^ n).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
    fn write_usize(&mut self, n: usize) {
        self.write_u64(n as u64);
    }
}

/// One vCPU's blocks.
pub(crate) struct BlockCache {
    jumps: Vec<Jump>,
    buckets: Vec<*mut Block>,
    pages: HashMap<usize, Vec<*mut Block>, BuildHasherDefault<PageHash>>,
    /// Changes when translations, mode or blocks do: a jump-cache entry of another context is void.
    context: u64,
    chunks: Vec<Box<[u64]>>,
    /// How many there may be; beyond that all blocks are forgotten.
    most_chunks: usize,
    /// Bytes used of the last chunk.
    used: usize,
    /// The link that the next block found may be put into.
    pub(crate) pending: *mut *mut Block,
    scratch: Vec<Op>,
    /// Blocks decoded.
    pub(crate) decoded: u64,
}

impl BlockCache {
    /// The cache of one of `vcpus`.
    pub(crate) fn new(vcpus: usize) -> Self {
        Self {
            most_chunks: (ARENAS / vcpus.max(1)).clamp(LEAST, ARENAS / 2) / CHUNK,
            jumps: vec![Jump { linear: 0, context: 0, block: std::ptr::null_mut() }; JUMPS],
            buckets: vec![std::ptr::null_mut(); BUCKETS],
            pages: HashMap::default(),
            context: 1 << 8,
            chunks: Vec::new(),
            used: CHUNK,
            pending: std::ptr::null_mut(),
            scratch: Vec::new(),
            decoded: 0,
        }
    }

    /// Voids the jump cache.
    #[inline]
    pub(crate) fn new_context(&mut self) {
        self.context += 1 << 8;
        self.pending = std::ptr::null_mut();
    }

    /// Makes the jump cache show the entries of another mode.
    #[inline]
    pub(crate) fn set_mode(&mut self, bits: u8) {
        self.context = self.context & !0xff | u64::from(bits);
        self.pending = std::ptr::null_mut();
    }

    #[inline(always)]
    fn jump_slot(linear: u64) -> usize {
        (linear ^ linear >> 12) as usize & (JUMPS - 1)
    }

    /// The block at a linear address, if the jump cache knows it.
    #[inline(always)]
    pub(crate) fn quick(&self, linear: u64) -> *mut Block {
        // SAFETY: the slot is below JUMPS.
        let jump = unsafe { self.jumps.get_unchecked(Self::jump_slot(linear)) };
        if jump.linear == linear && jump.context == self.context { jump.block } else { std::ptr::null_mut() }
    }

    fn bucket(phys: u64, mode: u32) -> usize {
        ((phys ^ u64::from(mode) << 3).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48) as usize & (BUCKETS - 1)
    }

    /// Forgets all blocks. None is running.
    pub(crate) fn clear(&mut self) {
        self.buckets.fill(std::ptr::null_mut());
        self.pages.clear();
        self.chunks.truncate(1);
        self.used = if self.chunks.is_empty() { CHUNK } else { 0 };
        self.new_context();
    }

    fn allocate(&mut self, bytes: usize) -> *mut u8 {
        let bytes = bytes.next_multiple_of(16);
        if self.used + bytes > CHUNK {
            self.chunks.push(vec![0; CHUNK / 8].into_boxed_slice());
            self.used = 0;
        }
        let chunk = self.chunks.last_mut().map_or(std::ptr::null_mut(), |c| c.as_mut_ptr().cast::<u8>());
        let at = self.used;
        self.used += bytes;
        // SAFETY: the offset is inside the chunk.
        unsafe { chunk.add(at) }
    }

    /// Keeps an instruction for as long as the block that is being made; the address for [`Op::imm`].
    pub(crate) fn keep<T: Copy>(&mut self, value: T) -> u64 {
        let p = self.allocate(size_of::<T>()).cast::<T>();
        // SAFETY: the arena gives aligned (16) memory of that size.
        unsafe { p.write(value) };
        p.expose_provenance() as u64
    }

    fn unlink(&mut self, block: *mut Block) {
        // SAFETY: blocks in the tables point into the arena.
        unsafe {
            let mut at = &raw mut self.buckets[Self::bucket((*block).phys, (*block).mode)];
            while !(*at).is_null() {
                if *at == block {
                    *at = (*block).next;
                    break;
                }
                at = &raw mut (**at).next;
            }
            (*block).link = [std::ptr::null_mut(); 2];
        }
    }
}

impl Cpu {
    /// The linear address of the next instruction.
    #[inline(always)]
    pub(crate) fn linear_rip(&self) -> u64 {
        if self.mode & mode::CODE == mode::CODE64 {
            self.gpr[RIP]
        } else {
            self.seg[CS].base.wrapping_add(self.gpr[RIP]) & 0xffff_ffff
        }
    }

    /// The block at RIP, of one instruction if `single`.
    #[inline(never)]
    pub(crate) fn find_block(&mut self, single: bool) -> Result<*mut Block, Fault> {
        let linear = self.linear_rip();
        let mode = self.mode | if single { SINGLE } else { 0 };
        let (phys, host) = self.code_at(linear)?;
        if host.is_null() {
            return Err(Fault::UD);
        }
        let mut block = self.blocks.buckets[BlockCache::bucket(phys, mode)];
        // SAFETY: blocks in the tables point into the arena, and `host` is good to the page's end.
        unsafe {
            while !block.is_null() && ((*block).phys != phys || (*block).mode != mode) {
                block = (*block).next;
            }
            if !block.is_null() && !self.still_same(block, linear, host)? {
                self.forget_pages_of(block);
                block = std::ptr::null_mut();
            }
            if block.is_null() {
                block = self.decode_block(linear, phys, host, mode)?;
                // Whoever wrote the bytes before they were marked as code has told nobody.
                fence(Ordering::SeqCst);
                if !self.still_same(block, linear, host)? {
                    // It was fetched while it was written, and may run, this time.
                    self.forget_pages_of(block);
                    return Ok(block);
                }
            }
            if !single {
                let context = self.blocks.context;
                self.blocks.jumps[BlockCache::jump_slot(linear)] = Jump { linear, context, block };
            }
            let pending = std::mem::replace(&mut self.blocks.pending, std::ptr::null_mut());
            if !pending.is_null() && (*block).second == ONE_PAGE && !single {
                *pending = block;
            }
        }
        Ok(block)
    }

    unsafe fn forget_pages_of(&mut self, block: *mut Block) {
        // SAFETY: the caller's block is in the arena.
        let (phys, second) = unsafe { ((*block).phys, (*block).second) };
        for page in [phys, second] {
            if let Some(index) = self.vm.page_index(page) {
                self.forget_page(index);
            }
        }
    }

    /// Whether the guest's memory still holds what was decoded.
    unsafe fn still_same(&mut self, block: *mut Block, linear: u64, host: *const u8) -> Result<bool, Fault> {
        // SAFETY: the block's bytes are in the arena; `host` is good to its page's end, `next` to that of its page.
        unsafe {
            let length = (*block).len as usize;
            let bytes = std::slice::from_raw_parts((*block).bytes, length);
            if (*block).second == ONE_PAGE {
                return Ok(same(bytes, host));
            }
            let here = 0x1000 - (linear & 0xfff) as usize;
            let (phys, next) = self.code_at(linear.wrapping_add(here as u64))?;
            Ok(phys == (*block).second
                && !next.is_null()
                && same(&bytes[..here], host)
                && same(&bytes[here..], next))
        }
    }

    unsafe fn decode_block(
        &mut self,
        linear: u64,
        phys: u64,
        host: *const u8,
        mode: u32,
    ) -> Result<*mut Block, Fault> {
        if self.blocks.chunks.len() > self.blocks.most_chunks {
            self.block = std::ptr::null_mut();
            self.blocks.clear();
        }
        let here = 0x1000 - (linear & 0xfff) as usize;
        let mut bytes = [0u8; BYTES + 16];
        let mut available = here.min(BYTES);
        // SAFETY: `host` is good to the page's end. The copy may be torn by other vCPUs' stores, like the hardware's fetch.
        unsafe { std::ptr::copy_nonoverlapping(host, bytes.as_mut_ptr(), available) };
        let bits = match mode & mode::CODE {
            mode::CODE16 => 16,
            mode::CODE32 => 32,
            _ => 64,
        };
        let mut second = ONE_PAGE;
        let mut ops = std::mem::take(&mut self.blocks.scratch);
        ops.clear();
        let mut length = 0;
        let most = if mode & SINGLE != 0 { 1 } else { MOST };
        let mut insn = Instruction::default();
        let mut ended = false;
        let mut count = 0;
        let mut lowering = lower::Context::new(mode);
        while count < most && !ended {
            let options = DecoderOptions::AMD | DecoderOptions::NO_MPFX_0FBC | DecoderOptions::NO_MPFX_0FBD;
            let mut decoder = Decoder::with_ip(bits, &bytes[length..available], length as u64, options);
            decoder.decode_out(&mut insn);
            if insn.is_invalid() && decoder.last_error() == DecoderError::NoMoreBytes && available == here {
                if count != 0 {
                    break;
                }
                // The instruction crosses into the next page.
                let (next_phys, next) = match self.code_at(self.wrap_code(linear.wrapping_add(here as u64))) {
                    Ok(next) => next,
                    Err(fault) => {
                        self.blocks.scratch = ops;
                        return Err(fault);
                    }
                };
                if next.is_null() {
                    self.blocks.scratch = ops;
                    return Err(Fault::UD);
                }
                // SAFETY: `next` is the start of a page.
                unsafe { std::ptr::copy_nonoverlapping(next, bytes.as_mut_ptr().add(here), 15) };
                available = here + 15;
                second = next_phys;
                continue;
            }
            let Lowered { op, ends, fuse, quiet } = lowering.lower(&mut self.blocks, &insn, ops.len());
            if let Some((at, run)) = quiet {
                ops[at].run = run;
            }
            if let (Some(run), Some(before)) = (fuse, ops.last_mut()) {
                before.run = run;
            }
            if let Some(mut op) = op {
                op.ip = length as u16;
                op.len = insn.len() as u8;
                op.n = count as u8;
                ops.push(op);
            }
            count += 1;
            length += insn.len().max(1);
            ended = ends || second != ONE_PAGE;
        }
        if !lowering.branched() {
            let mut op = ops::fall_through();
            op.ip = length as u16;
            op.n = count as u8;
            op.imm = length as u64;
            // Only code in the same page may be linked.
            op.a = u8::from(length < here && second == ONE_PAGE && mode & SINGLE == 0);
            ops.push(op);
        } else if let Some(last) = ops.last_mut()
            && mode & SINGLE == 0
            && second == ONE_PAGE
        {
            lowering.allow_links(last, linear & 0xfff);
        }
        let size = size_of::<Block>() + ops.len() * size_of::<Op>() + length;
        let block = self.blocks.allocate(size).cast::<Block>();
        let bucket = BlockCache::bucket(phys, mode);
        // SAFETY: the arena gave room for the header, the ops and the bytes.
        unsafe {
            let to = Block::first(block).cast_mut();
            std::ptr::copy_nonoverlapping(ops.as_ptr(), to, ops.len());
            let copy = to.add(ops.len()).cast::<u8>();
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), copy, length);
            block.write(Block {
                count: count as u32,
                mode,
                link: [std::ptr::null_mut(); 2],
                phys,
                next: self.blocks.buckets[bucket],
                bytes: copy,
                len: length as u32,
                ops: ops.len() as u32,
                second,
                first: [],
            });
        }
        self.blocks.buckets[bucket] = block;
        self.blocks.scratch = ops;
        self.blocks.decoded += 1;
        self.register(block, phys, length.min(here));
        if second != ONE_PAGE && length > here {
            self.register(block, second, length - here);
        }
        Ok(block)
    }

    fn wrap_code(&self, linear: u64) -> u64 {
        if self.mode & mode::CODE == mode::CODE64 { linear } else { linear & 0xffff_ffff }
    }

    fn register(&mut self, block: *mut Block, phys: u64, length: usize) {
        let Some(index) = self.vm.page_index(phys) else { return };
        self.blocks.pages.entry(index).or_default().push(block);
        let (first, last) = (phys >> 6 & 63, ((phys & 0xfff) + length as u64 - 1) >> 6 & 63);
        self.note_code(index, (u64::MAX >> (63 - (last - first))) << first);
    }

    /// Forgets the blocks with bytes in a page. If one of them runs it is left after the current instruction.
    pub(crate) fn forget_page(&mut self, index: usize) {
        let Some(blocks) = self.blocks.pages.remove(&index) else { return };
        for block in blocks {
            self.blocks.unlink(block);
            if block == self.block {
                // SAFETY: the running block is in the arena; the running handler has read what it needs of its own op.
                unsafe {
                    let first = Block::first(block).cast_mut();
                    for n in 0..(*block).ops as usize {
                        (*first.add(n)).run = ops::resume_elsewhere;
                    }
                }
            }
        }
        self.blocks.new_context();
    }
}

/// Whether guest memory at `host` equals `bytes`.
unsafe fn same(bytes: &[u8], host: *const u8) -> bool {
    // SAFETY: the caller vouches for `host`; a racing store makes the comparison fail or succeed, both of which are fine.
    let guest = unsafe { std::slice::from_raw_parts(host, bytes.len()) };
    bytes == guest
}
