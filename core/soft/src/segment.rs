//! Segments: descriptors, loads of segment registers, and far transfers (Intel SDM vol. 3 ch. 3, 5 and 7).
//!
//! In real mode a load sets selector and base and leaves limit and rights, as processors do. Limits are checked by whoever accesses memory.
//!
//! Not here: hardware task switches (a far transfer to a TSS or a task gate raises #GP with its selector; 64-bit mode has none anyway)
//! and virtual-8086 mode.
//!
//! Long for its one story: what a selector means in each mode, and the far transfers that load one.
#![allow(clippy::cast_possible_truncation, reason = "descriptors are taken apart here")]

use tenon_core::Segment;

use crate::cpu::{CS, Cpu, DS, ES, FS, Fault, GS, RSP, SS, cr0, efer, vec};

/// Segment rights: present.
pub(crate) const PRESENT: u16 = 0x80;
/// Segment rights: code or data, not a system descriptor.
pub(crate) const CODE_OR_DATA: u16 = 0x10;
/// Segment rights: code.
pub(crate) const CODE: u16 = 0x08;
/// Segment rights of code: conforming. Of data: expands down.
pub(crate) const CONFORMING: u16 = 0x04;
/// Segment rights of code: readable. Of data: writable.
pub(crate) const READ_WRITE: u16 = 0x02;
/// Segment rights: 64-bit code.
pub(crate) const LONG: u16 = 1 << 13;
/// Segment rights: 32-bit code or stack.
pub(crate) const BIG: u16 = 1 << 14;

/// The privilege level of a descriptor.
pub(crate) fn dpl(rights: u16) -> u8 {
    (rights >> 5 & 3) as u8
}

/// The requested privilege level of a selector.
pub(crate) fn rpl(selector: u16) -> u8 {
    (selector & 3) as u8
}

/// A selector as an error code.
pub(crate) fn code_of(selector: u16) -> u32 {
    u32::from(selector & 0xfffc)
}

/// A descriptor with the address of its memory.
#[derive(Clone, Copy)]
pub(crate) struct Descriptor {
    pub(crate) address: u64,
    pub(crate) raw: u64,
}

impl Descriptor {
    pub(crate) fn rights(self) -> u16 {
        (self.raw >> 40) as u16 & 0xf0ff
    }

    fn limit(self) -> u32 {
        let limit = (self.raw & 0xffff | self.raw >> 32 & 0xf_0000) as u32;
        if self.raw >> 55 & 1 != 0 { limit << 12 | 0xfff } else { limit }
    }

    /// The segment register that a load of this descriptor gives.
    pub(crate) fn segment(self, selector: u16) -> Segment {
        let base = self.raw >> 16 & 0xff_ffff | self.raw >> 32 & 0xff00_0000;
        Segment { selector, base, limit: self.limit(), rights: self.rights() }
    }

    pub(crate) fn is_code(self) -> bool {
        self.rights() & (CODE_OR_DATA | CODE) == CODE_OR_DATA | CODE
    }

    fn is_conforming(self) -> bool {
        self.rights() & CONFORMING != 0
    }

    pub(crate) fn dpl(self) -> u8 {
        dpl(self.rights())
    }

    pub(crate) fn is_present(self) -> bool {
        self.rights() & PRESENT != 0
    }

    /// Sets the accessed bit in memory and here.
    pub(crate) fn access(&mut self, cpu: &mut Cpu) -> Result<(), Fault> {
        if self.raw >> 40 & 1 == 0 {
            self.raw |= 1 << 40;
            cpu.write_sys::<u8>(self.address + 5, (self.raw >> 40) as u8)?;
        }
        Ok(())
    }
}

/// Reads the descriptor of a selector that is not null. Outside its table: `vector` with the selector.
pub(crate) fn descriptor(cpu: &mut Cpu, selector: u16, vector: u8) -> Result<Descriptor, Fault> {
    descriptor_sized(cpu, selector, vector, 8)
}

fn table_of(cpu: &Cpu, selector: u16, size: u32) -> Option<u64> {
    let offset = u32::from(selector & 0xfff8);
    let (base, limit) = if selector & 4 == 0 {
        (cpu.gdt.base, u32::from(cpu.gdt.limit))
    } else if cpu.ldt.rights & PRESENT != 0 && cpu.ldt.selector & 0xfffc != 0 {
        (cpu.ldt.base, cpu.ldt.limit)
    } else {
        return None;
    };
    (offset + size - 1 <= limit).then(|| base.wrapping_add(offset.into()))
}

fn descriptor_sized(cpu: &mut Cpu, selector: u16, vector: u8, size: u32) -> Result<Descriptor, Fault> {
    let address = table_of(cpu, selector, size).ok_or(Fault::with_code(vector, code_of(selector)))?;
    Ok(Descriptor { address, raw: cpu.read_sys::<u64>(address)? })
}

/// The descriptor of a selector, or nothing when it is null or outside its table: for LAR, LSL, VERR and VERW.
pub(crate) fn look_up(cpu: &mut Cpu, selector: u16) -> Result<Option<Descriptor>, Fault> {
    if selector & 0xfffc == 0 {
        return Ok(None);
    }
    match table_of(cpu, selector, 8) {
        Some(address) => Ok(Some(Descriptor { address, raw: cpu.read_sys::<u64>(address)? })),
        None => Ok(None),
    }
}

/// Protected mode, in contrast to real mode.
pub(crate) fn is_protected(cpu: &Cpu) -> bool {
    cpu.cr0 & cr0::PE != 0
}

/// Long mode is active: 64-bit or compatibility mode.
pub(crate) fn is_long(cpu: &Cpu) -> bool {
    cpu.efer & efer::LMA != 0
}

/// 64-bit mode.
pub(crate) fn is_64(cpu: &Cpu) -> bool {
    is_long(cpu) && cpu.seg[CS].rights & LONG != 0
}

/// Whether a 48-bit linear address is canonical.
pub(crate) fn is_canonical(address: u64) -> bool {
    let top = address >> 47;
    top == 0 || top == 0x1_ffff
}

/// The value of a segment register loaded with a null selector.
pub(crate) fn null(selector: u16) -> Segment {
    Segment { selector, base: 0, limit: 0, rights: 0 }
}

/// Loads ES, SS, DS, FS or GS, as MOV, POP and LDS and its kin do.
///
/// # Errors
/// The exception; nothing has changed.
pub(crate) fn load(cpu: &mut Cpu, seg: usize, selector: u16) -> Result<(), Fault> {
    if !is_protected(cpu) {
        let old = cpu.seg[seg];
        let base = u64::from(selector) << 4;
        // A segment that a null selector made unusable is usable again.
        cpu.seg[seg] = if old.rights & PRESENT == 0 {
            Segment { selector, base, limit: 0xffff, rights: 0x93 }
        } else {
            Segment { selector, base, ..old }
        };
    } else if seg == SS {
        cpu.seg[SS] = stack_segment(cpu, selector, cpu.cpl, is_64(cpu), vec::GP)?;
    } else {
        cpu.seg[seg] = data_segment(cpu, selector)?;
    }
    cpu.update_mode();
    Ok(())
}

fn data_segment(cpu: &mut Cpu, selector: u16) -> Result<Segment, Fault> {
    if selector & 0xfffc == 0 {
        return Ok(null(selector));
    }
    let mut found = descriptor(cpu, selector, vec::GP)?;
    let rights = found.rights();
    let readable = rights & CODE_OR_DATA != 0 && (rights & CODE == 0 || rights & READ_WRITE != 0);
    let free = found.is_code() && found.is_conforming();
    if !readable || !free && found.dpl() < rpl(selector).max(cpu.cpl) {
        return Err(Fault::gp(code_of(selector)));
    }
    if !found.is_present() {
        return Err(Fault::with_code(vec::NP, code_of(selector)));
    }
    found.access(cpu)?;
    Ok(found.segment(selector))
}

/// Checks and reads a stack segment for privilege `cpl`. `vector` is #GP for a load, #TS for a stack from the TSS.
pub(crate) fn stack_segment(
    cpu: &mut Cpu,
    selector: u16,
    cpl: u8,
    may_be_null: bool,
    vector: u8,
) -> Result<Segment, Fault> {
    if selector & 0xfffc == 0 {
        return if may_be_null && cpl < 3 && rpl(selector) == cpl {
            Ok(null(selector))
        } else {
            Err(Fault::with_code(vector, 0))
        };
    }
    let mut found = descriptor(cpu, selector, vector)?;
    let writable = found.rights() & (CODE_OR_DATA | CODE | READ_WRITE) == CODE_OR_DATA | READ_WRITE;
    if rpl(selector) != cpl || found.dpl() != cpl || !writable {
        return Err(Fault::with_code(vector, code_of(selector)));
    }
    if !found.is_present() {
        return Err(Fault::ss(code_of(selector)));
    }
    found.access(cpu)?;
    Ok(found.segment(selector))
}

/// A stack under change: pushes and pops happen in memory at once, the stack pointer is the caller's to commit.
pub(crate) struct Stack {
    pub(crate) sp: u64,
    segment: Segment,
    /// The part of RSP that is the stack pointer.
    mask: u64,
    long: bool,
    user: bool,
    /// The error code of a #SS.
    error: u32,
}

impl Stack {
    /// The current stack.
    pub(crate) fn current(cpu: &Cpu) -> Self {
        Self::on(cpu.seg[SS], cpu.gpr[RSP], is_64(cpu), cpu.cpl, 0)
    }

    /// The stack in `segment` at `sp`, used with privilege `cpl`; `long` in 64-bit mode.
    pub(crate) fn on(segment: Segment, sp: u64, long: bool, cpl: u8, error: u32) -> Self {
        let mask = match (long, segment.rights & BIG != 0) {
            (true, _) => u64::MAX,
            (false, true) => 0xffff_ffff,
            (false, false) => 0xffff,
        };
        Self { sp, segment, mask, long, user: cpl == 3, error }
    }

    fn address(&self, sp: u64, size: u64) -> Result<u64, Fault> {
        if self.long {
            return if is_canonical(sp) && is_canonical(sp.wrapping_add(size - 1)) {
                Ok(sp)
            } else {
                Err(Fault::ss(self.error))
            };
        }
        let offset = sp & self.mask;
        let last = offset + size - 1;
        let limit = u64::from(self.segment.limit);
        let expands_down =
            self.segment.rights & (CODE_OR_DATA | CODE | CONFORMING) == CODE_OR_DATA | CONFORMING;
        let inside = if expands_down { offset > limit && last <= self.mask } else { last <= limit };
        if inside {
            Ok(self.segment.base.wrapping_add(offset) & 0xffff_ffff)
        } else {
            Err(Fault::ss(self.error))
        }
    }

    /// Pushes the low `size` bytes (2, 4 or 8).
    pub(crate) fn push(&mut self, cpu: &mut Cpu, size: u8, value: u64) -> Result<(), Fault> {
        let sp = self.moved(self.sp.wrapping_sub(size.into()));
        let address = self.address(sp, size.into())?;
        match size {
            2 => cpu.write_as::<u16>(address, value as u16, self.user)?,
            4 => cpu.write_as::<u32>(address, value as u32, self.user)?,
            _ => cpu.write_as::<u64>(address, value, self.user)?,
        }
        self.sp = sp;
        Ok(())
    }

    /// Pops `size` bytes (2, 4 or 8).
    pub(crate) fn pop(&mut self, cpu: &mut Cpu, size: u8) -> Result<u64, Fault> {
        let address = self.address(self.sp, size.into())?;
        let value = match size {
            2 => u64::from(cpu.read_as::<u16>(address, self.user)?),
            4 => u64::from(cpu.read_as::<u32>(address, self.user)?),
            _ => cpu.read_as::<u64>(address, self.user)?,
        };
        self.skip(size.into());
        Ok(value)
    }

    /// Lets go of `count` bytes.
    pub(crate) fn skip(&mut self, count: u64) {
        self.sp = self.moved(self.sp.wrapping_add(count));
    }

    /// The stack pointer after a move: bits outside the stack's width stay.
    fn moved(&self, sp: u64) -> u64 {
        self.sp & !self.mask | sp & self.mask
    }
}

/// Checks a code segment as the target of a transfer and reads it; its RPL becomes `cpl`.
pub(crate) fn code_segment(
    cpu: &mut Cpu,
    mut found: Descriptor,
    selector: u16,
    cpl: u8,
) -> Result<Segment, Fault> {
    if is_long(cpu) && found.rights() & (LONG | BIG) == LONG | BIG {
        return Err(Fault::gp(code_of(selector)));
    }
    if !found.is_present() {
        return Err(Fault::with_code(vec::NP, code_of(selector)));
    }
    found.access(cpu)?;
    Ok(found.segment(selector & !3 | u16::from(cpl)))
}

/// Checks an instruction pointer against the code segment it is for.
pub(crate) fn check_target(cpu: &Cpu, code: &Segment, rip: u64) -> Result<(), Fault> {
    let fits = if is_long(cpu) && code.rights & LONG != 0 {
        is_canonical(rip)
    } else {
        rip <= u64::from(code.limit)
    };
    if fits { Ok(()) } else { Err(Fault::gp(0)) }
}

/// Commits a new code segment, privilege level and instruction pointer.
pub(crate) fn enter(cpu: &mut Cpu, code: Segment, cpl: u8, rip: u64) {
    cpu.seg[CS] = code;
    cpu.cpl = cpl;
    cpu.set_rip(rip);
    cpu.update_mode();
}

fn truncate(value: u64, size: u8) -> u64 {
    match size {
        2 => value & 0xffff,
        4 => value & 0xffff_ffff,
        _ => value,
    }
}

/// JMP to another segment. `size` is the operand size in bytes.
///
/// # Errors
/// The exception; nothing has changed.
pub(crate) fn far_jump(cpu: &mut Cpu, selector: u16, offset: u64, size: u8) -> Result<(), Fault> {
    far_transfer(cpu, selector, truncate(offset, size), None)
}

/// CALL to another segment. `size` is the operand size in bytes.
///
/// # Errors
/// The exception; registers have not changed.
pub(crate) fn far_call(cpu: &mut Cpu, selector: u16, offset: u64, size: u8) -> Result<(), Fault> {
    far_transfer(cpu, selector, truncate(offset, size), Some(size))
}

/// `call` is the operand size of a call; none for a jump.
fn far_transfer(cpu: &mut Cpu, selector: u16, offset: u64, call: Option<u8>) -> Result<(), Fault> {
    let return_rip = cpu.rip();
    if !is_protected(cpu) {
        let code = Segment { selector, base: u64::from(selector) << 4, ..cpu.seg[CS] };
        check_target(cpu, &code, offset)?;
        push_return(cpu, call, return_rip)?;
        enter(cpu, code, 0, offset);
        return Ok(());
    }
    if selector & 0xfffc == 0 {
        return Err(Fault::gp(0));
    }
    let found = descriptor(cpu, selector, vec::GP)?;
    if found.rights() & CODE_OR_DATA == 0 {
        return through_gate(cpu, found, selector, call.is_some());
    }
    let allowed = if found.is_conforming() {
        found.dpl() <= cpu.cpl
    } else {
        rpl(selector) <= cpu.cpl && found.dpl() == cpu.cpl
    };
    if !found.is_code() || !allowed {
        return Err(Fault::gp(code_of(selector)));
    }
    let code = code_segment(cpu, found, selector, cpu.cpl)?;
    check_target(cpu, &code, offset)?;
    push_return(cpu, call, return_rip)?;
    enter(cpu, code, cpu.cpl, offset);
    Ok(())
}

fn push_return(cpu: &mut Cpu, call: Option<u8>, rip: u64) -> Result<(), Fault> {
    let Some(size) = call else { return Ok(()) };
    let mut stack = Stack::current(cpu);
    stack.push(cpu, size, cpu.seg[CS].selector.into())?;
    stack.push(cpu, size, rip)?;
    cpu.gpr[RSP] = stack.sp;
    Ok(())
}

/// A jump or call through a call gate.
fn through_gate(cpu: &mut Cpu, gate: Descriptor, selector: u16, call: bool) -> Result<(), Fault> {
    let refused = Fault::gp(code_of(selector));
    let long = is_long(cpu);
    let kind = gate.rights() & 0xf;
    // 12: 32-bit, in long mode 64-bit; 4: 16-bit. Tasks are refused.
    if kind != 12 && (kind != 4 || long) || gate.dpl() < cpu.cpl.max(rpl(selector)) {
        return Err(refused);
    }
    if !gate.is_present() {
        return Err(Fault::with_code(vec::NP, code_of(selector)));
    }
    let size = if long {
        8
    } else if kind == 12 {
        4
    } else {
        2
    };
    let mut offset = gate.raw & 0xffff;
    if size != 2 {
        offset |= gate.raw >> 32 & 0xffff_0000;
    }
    if long {
        let gate = descriptor_sized(cpu, selector, vec::GP, 16)?;
        let upper = cpu.read_sys::<u64>(gate.address + 8)?;
        if upper >> 40 & 0x1f != 0 {
            return Err(refused);
        }
        offset |= upper << 32;
    }
    let target = (gate.raw >> 16) as u16;
    if target & 0xfffc == 0 {
        return Err(Fault::gp(0));
    }
    let found = descriptor(cpu, target, vec::GP)?;
    let inner = call && !found.is_conforming() && found.dpl() < cpu.cpl;
    let allowed = if found.is_conforming() || call { found.dpl() <= cpu.cpl } else { found.dpl() == cpu.cpl };
    if !found.is_code() || !allowed || long && found.rights() & (LONG | BIG) != LONG {
        return Err(Fault::gp(code_of(target)));
    }
    let cpl = if inner { found.dpl() } else { cpu.cpl };
    let code = code_segment(cpu, found, target, cpl)?;
    check_target(cpu, &code, offset)?;
    let (old_cs, old_ss, rip) = (cpu.seg[CS].selector, cpu.seg[SS].selector, cpu.rip());
    let mut new_ss = cpu.seg[SS];
    let mut stack;
    if inner {
        let old = Stack::current(cpu);
        let (segment, sp) = crate::exception::inner_stack(cpu, cpl)?;
        stack = Stack::on(segment, sp, long, cpl, code_of(segment.selector));
        stack.push(cpu, size, old_ss.into())?;
        stack.push(cpu, size, old.sp)?;
        let parameters = if long { 0 } else { gate.raw >> 32 & 0x1f };
        for n in (0..parameters).rev() {
            let mut from =
                Stack { sp: old.moved(old.sp.wrapping_add(n * u64::from(size))), ..Stack::current(cpu) };
            let value = from.pop(cpu, size)?;
            stack.push(cpu, size, value)?;
        }
        new_ss = segment;
    } else {
        stack = Stack::on(new_ss, cpu.gpr[RSP], long, cpl, 0);
    }
    if call {
        stack.push(cpu, size, old_cs.into())?;
        stack.push(cpu, size, rip)?;
        cpu.seg[SS] = new_ss;
        cpu.gpr[RSP] = stack.sp;
    }
    enter(cpu, code, cpl, offset);
    Ok(())
}

/// RETF, releasing `release` bytes of parameters. `size` is the operand size in bytes.
///
/// # Errors
/// The exception; nothing has changed.
pub(crate) fn far_return(cpu: &mut Cpu, size: u8, release: u16) -> Result<(), Fault> {
    let mut stack = Stack::current(cpu);
    let rip = stack.pop(cpu, size)?;
    let selector = stack.pop(cpu, size)? as u16;
    stack.skip(release.into());
    if !is_protected(cpu) {
        let code = Segment { selector, base: u64::from(selector) << 4, ..cpu.seg[CS] };
        check_target(cpu, &code, rip)?;
        cpu.gpr[RSP] = stack.sp;
        enter(cpu, code, 0, rip);
        return Ok(());
    }
    let transfer = Return::to(cpu, selector, rip)?;
    if transfer.cpl == cpu.cpl {
        cpu.gpr[RSP] = stack.sp;
        transfer.commit(cpu);
        return Ok(());
    }
    let outer = transfer.pop_stack(cpu, &mut stack, size)?;
    transfer.commit(cpu);
    commit_outer(cpu, outer, release.into());
    Ok(())
}

/// The code segment that a far return or an IRET goes to.
pub(crate) struct Return {
    code: Segment,
    pub(crate) cpl: u8,
    rip: u64,
}

impl Return {
    /// Checks the target.
    pub(crate) fn to(cpu: &mut Cpu, selector: u16, rip: u64) -> Result<Self, Fault> {
        if selector & 0xfffc == 0 {
            return Err(Fault::gp(0));
        }
        let found = descriptor(cpu, selector, vec::GP)?;
        let cpl = rpl(selector);
        let allowed = if found.is_conforming() { found.dpl() <= cpl } else { found.dpl() == cpl };
        if !found.is_code() || cpl < cpu.cpl || !allowed {
            return Err(Fault::gp(code_of(selector)));
        }
        let code = code_segment(cpu, found, selector, cpl)?;
        check_target(cpu, &code, rip)?;
        Ok(Self { code, cpl, rip })
    }

    fn is_64(&self, cpu: &Cpu) -> bool {
        is_long(cpu) && self.code.rights & LONG != 0
    }

    /// Pops the stack pointer and segment that follow on the stack.
    pub(crate) fn pop_stack(
        &self,
        cpu: &mut Cpu,
        stack: &mut Stack,
        size: u8,
    ) -> Result<(Segment, u64), Fault> {
        let sp = stack.pop(cpu, size)?;
        let selector = stack.pop(cpu, size)? as u16;
        let segment = stack_segment(cpu, selector, self.cpl, self.is_64(cpu), vec::GP)?;
        Ok((segment, sp))
    }

    /// Goes there. The stack is the caller's to commit.
    pub(crate) fn commit(self, cpu: &mut Cpu) {
        let outward = self.cpl > cpu.cpl;
        enter(cpu, self.code, self.cpl, self.rip);
        if outward {
            // Data segments that the outer level may not use become null.
            for seg in [ES, DS, FS, GS] {
                let rights = cpu.seg[seg].rights;
                let free = rights & (CODE | CONFORMING) == CODE | CONFORMING;
                if cpu.seg[seg].selector & 0xfffc == 0 {
                    // Null already: its RPL goes. The base stays, which 64-bit code sets apart from the selector.
                    cpu.seg[seg].selector = 0;
                } else if rights & PRESENT != 0 && !free && dpl(rights) < self.cpl {
                    cpu.seg[seg] = null(0);
                }
            }
            cpu.update_mode();
        }
    }
}

/// Commits the stack of an outer level and releases `release` bytes from it.
pub(crate) fn commit_outer(cpu: &mut Cpu, (segment, sp): (Segment, u64), release: u64) {
    let mut stack = Stack::on(segment, sp, is_64(cpu), cpu.cpl, 0);
    if !is_64(cpu) && segment.rights & BIG == 0 {
        // A 16-bit stack: the upper half of ESP stays.
        stack.sp = cpu.gpr[RSP] & 0xffff_0000 | sp & 0xffff;
    }
    stack.skip(release);
    cpu.gpr[RSP] = stack.sp;
    cpu.seg[SS] = segment;
    cpu.update_mode();
}
