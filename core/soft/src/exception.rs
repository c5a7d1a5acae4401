//! Exceptions and interrupts: delivery through the interrupt vector table and the IDT in every mode, and the ways back
//! (Intel SDM vol. 3 ch. 6; vol. 2 for IRET, SYSCALL, SYSENTER and their kin).
//!
//! [`deliver`] follows the double-fault rules (SDM table 6-5) and ends in [`Fault::Shutdown`] on a triple fault; [`what_happened`]
//! then tells the story. SYSCALL and its kin are in [`crate::syscall`].
//!
//! Long for its one story: the frames of three modes, and the way back.
//!
//! Not here: task gates (#GP with the gate's number), virtual-8086 mode (IRET to it raises #GP), hardware breakpoints.
//! RF never stays set, since there are no instruction breakpoints that it could mask.
#![allow(clippy::cast_possible_truncation, reason = "gates are taken apart here")]

use std::fmt::Write as _;

use tenon_core::{Activity, Segment};

use crate::apic::{PENDING_INIT, PENDING_INTERRUPT, PENDING_NMI, PENDING_SIPI};
use crate::cpu::{CS, Cpu, Fault, RSP, SS, fl, vec};
use crate::exec::ENTERED;
use crate::segment::{
    self, CODE_OR_DATA, LONG, Return, Stack, code_of, code_segment, is_64, is_canonical, is_long,
    is_protected, stack_segment,
};

/// Something that is being delivered.
#[derive(Clone, Copy)]
struct Event {
    vector: u8,
    error: Option<u32>,
    /// The page-fault address.
    address: u64,
    source: Source,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    /// A fault of an instruction.
    Fault,
    /// An interrupt from outside, an NMI or a debug trap.
    External,
    /// INT n, INT3 or INTO: the gate's privilege is checked.
    Software,
}

impl Event {
    fn fault(vector: u8, error: Option<u32>, address: u64) -> Self {
        Self { vector, error, address, source: Source::Fault }
    }

    fn external(vector: u8) -> Self {
        Self { vector, error: None, address: 0, source: Source::External }
    }

    /// The error code of a fault about something that this event's delivery uses.
    fn code(self, code: u32) -> u32 {
        if self.source == Source::Software { code } else { code | 1 }
    }

    /// As an error code: the number of the IDT's entry.
    fn gate_code(self) -> u32 {
        self.code(u32::from(self.vector) * 8 + 2)
    }
}

/// Delivers a fault to the guest. RIP points at the instruction that raised it.
///
/// # Errors
/// [`Fault::Shutdown`]: a triple fault.
pub(crate) fn deliver(cpu: &mut Cpu, fault: Fault) -> Result<(), Fault> {
    match fault {
        Fault::Exception { vector, error, address } => escalate(cpu, Event::fault(vector, error, address)),
        shutdown @ Fault::Shutdown { .. } => Err(shutdown),
    }
}

/// Delivers an event, and what its delivery raises.
fn escalate(cpu: &mut Cpu, event: Event) -> Result<(), Fault> {
    let mut event = event;
    let mut history = History::default();
    loop {
        history.push(event);
        let second = match raise(cpu, event) {
            Ok(()) => return Ok(()),
            Err(Fault::Exception { vector, error, address }) => Event::fault(vector, error, address),
            Err(shutdown) => return Err(shutdown),
        };
        let contributory = |v: u8| matches!(v, vec::DE | vec::TS | vec::NP | vec::SS | vec::GP);
        let first = event.vector;
        let is_exception = event.source == Source::Fault;
        if is_exception && first == vec::DF {
            history.push(second);
            cpu.msrs.story = history.story(cpu);
            return Err(Fault::Shutdown { vector: second.vector });
        }
        let double = is_exception
            && (contributory(first) && contributory(second.vector)
                || first == vec::PF && (second.vector == vec::PF || contributory(second.vector)));
        if double {
            history.push(second);
        }
        event = if double { Event::fault(vec::DF, Some(0), 0) } else { second };
    }
}

/// The events of one escalation. There are at most six: something benign, #GP, #PF, #GP, #DF and what ended it.
#[derive(Default)]
struct History {
    events: [Option<Event>; 6],
    count: usize,
}

impl History {
    fn push(&mut self, event: Event) {
        if let Some(slot) = self.events.get_mut(self.count) {
            *slot = Some(event);
            self.count += 1;
        }
    }

    fn story(&self, cpu: &Cpu) -> String {
        let mut text = String::from("triple fault: ");
        let mut separator = "";
        for event in self.events[..self.count].iter().rev().flatten() {
            text.push_str(separator);
            separator = if event.vector == vec::DF { " after " } else { " while delivering " };
            text.push_str(&name(event.vector));
            if let Some(error) = event.error.filter(|_| event.vector != vec::DF) {
                let _ = write!(text, "({error:#x})");
            }
            if event.vector == vec::PF {
                let _ = write!(text, " at {:#x}", event.address);
            }
        }
        let _ = write!(text, "; idt {:#x} limit {:#x}", cpu.idt.base, cpu.idt.limit);
        text
    }
}

/// What led to the last triple fault, for the crash report.
pub(crate) fn what_happened(cpu: &Cpu) -> String {
    if cpu.msrs.story.is_empty() { "triple fault".into() } else { cpu.msrs.story.clone() }
}

fn name(vector: u8) -> String {
    const NAMES: [&str; 20] = [
        "DE", "DB", "NMI", "BP", "OF", "BR", "UD", "NM", "DF", "9", "TS", "NP", "SS", "GP", "PF", "15", "MF",
        "AC", "MC", "XM",
    ];
    match NAMES.get(usize::from(vector)) {
        Some(name) => format!("#{name}"),
        None => format!("interrupt {vector:#x}"),
    }
}

/// Delivers an external interrupt.
///
/// # Errors
/// [`Fault::Shutdown`]: a triple fault.
pub(crate) fn interrupt(cpu: &mut Cpu, vector: u8) -> Result<(), Fault> {
    escalate(cpu, Event::external(vector))
}

/// Delivers a non-maskable interrupt, and blocks further ones until IRET.
///
/// # Errors
/// [`Fault::Shutdown`]: a triple fault.
pub(crate) fn nmi(cpu: &mut Cpu) -> Result<(), Fault> {
    cpu.nmi_masked = true;
    escalate(cpu, Event::external(vec::NMI))
}

/// Delivers the debug trap after an instruction that began with TF set.
///
/// # Errors
/// [`Fault::Shutdown`]: a triple fault.
pub(crate) fn single_step(cpu: &mut Cpu) -> Result<(), Fault> {
    cpu.debug[4] |= 1 << 14;
    escalate(cpu, Event::external(vec::DB))
}

/// INT n. RIP is past the instruction.
///
/// # Errors
/// The exception that it raises instead.
pub(crate) fn software_interrupt(cpu: &mut Cpu, vector: u8) -> Result<(), Fault> {
    raise(cpu, Event { vector, error: None, address: 0, source: Source::Software })?;
    cpu.exit = ENTERED;
    Ok(())
}

/// INT3. RIP is past the instruction.
///
/// # Errors
/// The exception that it raises instead.
pub(crate) fn breakpoint(cpu: &mut Cpu) -> Result<(), Fault> {
    software_interrupt(cpu, vec::BP)
}

/// INTO, when OF is set. RIP is past the instruction.
///
/// # Errors
/// The exception that it raises instead.
pub(crate) fn overflow(cpu: &mut Cpu) -> Result<(), Fault> {
    software_interrupt(cpu, vec::OF)
}

/// INT1. RIP is past the instruction. No privilege is checked.
///
/// # Errors
/// The exception that it raises instead.
pub(crate) fn icebp(cpu: &mut Cpu) -> Result<(), Fault> {
    raise(cpu, Event::external(vec::DB))?;
    cpu.exit = ENTERED;
    Ok(())
}

/// Whether a vCPU that is halted or waits for a start-up interrupt has something to do.
pub(crate) fn wakes(cpu: &Cpu) -> bool {
    let pending = cpu.lapic.pending();
    match cpu.activity {
        Activity::WaitForSipi => pending & (PENDING_INIT | PENDING_SIPI) != 0,
        _ => {
            pending & PENDING_INIT != 0
                || pending & PENDING_NMI != 0 && !cpu.nmi_masked
                || pending & PENDING_INTERRUPT != 0 && cpu.rflags & fl::IF != 0
        }
    }
}

/// Takes what the local APIC has for this vCPU: INIT and start-up always, NMI and interrupts when they are not blocked.
/// Called between instructions; a halted vCPU goes on when something was delivered.
///
/// # Errors
/// [`Fault::Shutdown`]: a triple fault.
pub(crate) fn service(cpu: &mut Cpu) -> Result<(), Fault> {
    let pending = cpu.lapic.pending();
    if pending & PENDING_INIT != 0 && cpu.lapic.take_init() {
        crate::control::init(cpu);
    }
    if pending & (PENDING_INIT | PENDING_SIPI) != 0
        && let Some(page) = cpu.lapic.take_sipi()
        && cpu.activity == Activity::WaitForSipi
    {
        crate::control::start_up(cpu, page);
    }
    if cpu.activity == Activity::WaitForSipi || cpu.shadow {
        return Ok(());
    }
    if pending & PENDING_NMI != 0 && !cpu.nmi_masked && cpu.lapic.take_nmi() {
        cpu.activity = Activity::Running;
        return nmi(cpu);
    }
    if pending & PENDING_INTERRUPT != 0
        && cpu.rflags & fl::IF != 0
        && let Some(vector) = cpu.lapic.acknowledge()
    {
        cpu.activity = Activity::Running;
        return interrupt(cpu, vector);
    }
    Ok(())
}

/// One attempt at delivery.
fn raise(cpu: &mut Cpu, event: Event) -> Result<(), Fault> {
    if event.source == Source::Fault && event.vector == vec::PF {
        cpu.cr2 = event.address;
    }
    let result = if !is_protected(cpu) {
        through_vector_table(cpu, event)
    } else if is_long(cpu) {
        through_long_gate(cpu, event)
    } else {
        through_gate(cpu, event)
    };
    match result {
        // What goes wrong with selectors during delivery is marked as external.
        Err(Fault::Exception { vector: vector @ vec::TS..=vec::GP, error: Some(error), address }) => {
            Err(Fault::Exception { vector, error: Some(event.code(error)), address })
        }
        Ok(()) if event.vector == vec::DB && event.source != Source::Software => {
            // The debug exception switches general detection off.
            cpu.debug[5] &= !(1 << 13);
            Ok(())
        }
        other => other,
    }
}

/// The flags as they are pushed.
fn pushed_flags(cpu: &Cpu, event: Event) -> u64 {
    let flags = cpu.flags() & !fl::RF;
    // Faults are pushed with RF set, so that a return does not trip over an instruction breakpoint; traps and aborts are not.
    let is_fault = event.source == Source::Fault
        && !matches!(event.vector, vec::DB | vec::NMI | vec::BP | vec::OF | vec::DF);
    if is_fault { flags | fl::RF } else { flags }
}

fn clear_flags(cpu: &mut Cpu, flags: u64) {
    cpu.rflags &= !flags;
}

/// Real mode: four bytes of offset and segment each.
fn through_vector_table(cpu: &mut Cpu, event: Event) -> Result<(), Fault> {
    let entry = u64::from(event.vector) * 4;
    if entry + 3 > cpu.idt.limit.into() {
        return Err(Fault::gp(event.gate_code()));
    }
    let target = cpu.read_sys::<u32>(cpu.idt.base.wrapping_add(entry))?;
    let selector = (target >> 16) as u16;
    let mut stack = Stack::current(cpu);
    stack.push(cpu, 2, cpu.flags())?;
    stack.push(cpu, 2, cpu.seg[CS].selector.into())?;
    stack.push(cpu, 2, cpu.rip())?;
    cpu.gpr[RSP] = stack.sp;
    clear_flags(cpu, fl::IF | fl::TF | fl::AC | fl::RF);
    let code = Segment { selector, base: u64::from(selector) << 4, ..cpu.seg[CS] };
    segment::enter(cpu, code, 0, u64::from(target & 0xffff));
    Ok(())
}

/// A gate of the IDT, checked as far as 32-bit and 64-bit gates agree.
struct Gate {
    selector: u16,
    offset: u64,
    /// 16-bit gates push words.
    size: u8,
    interrupt: bool,
    ist: u8,
}

fn gate(cpu: &mut Cpu, event: Event) -> Result<Gate, Fault> {
    let long = is_long(cpu);
    let width: u64 = if long { 16 } else { 8 };
    let entry = u64::from(event.vector) * width;
    let refused = Fault::gp(event.gate_code());
    if entry + width - 1 > cpu.idt.limit.into() {
        return Err(refused);
    }
    let address = cpu.idt.base.wrapping_add(entry);
    let low = cpu.read_sys::<u64>(address)?;
    let kind = low >> 40 & 0x1f;
    let size = match (kind, long) {
        (14 | 15, true) => 8,
        (14 | 15, false) => 4,
        (6 | 7, false) => 2,
        _ => return Err(refused),
    };
    if event.source == Source::Software && ((low >> 45) as u8 & 3) < cpu.cpl {
        return Err(refused);
    }
    if low >> 47 & 1 == 0 {
        return Err(Fault::with_code(vec::NP, event.gate_code()));
    }
    let mut offset = low & 0xffff;
    if size != 2 {
        offset |= low >> 32 & 0xffff_0000;
    }
    if long {
        offset |= cpu.read_sys::<u64>(address.wrapping_add(8))? << 32;
    }
    Ok(Gate {
        selector: (low >> 16) as u16,
        offset,
        size,
        interrupt: kind & 1 == 0,
        ist: if long { (low >> 32) as u8 & 7 } else { 0 },
    })
}

/// The gate's code segment, and the privilege level after the delivery.
fn handler(cpu: &mut Cpu, gate: &Gate) -> Result<(Segment, u8), Fault> {
    if gate.selector & 0xfffc == 0 {
        return Err(Fault::gp(0));
    }
    let found = segment::descriptor(cpu, gate.selector, vec::GP)?;
    let wrong_size = is_long(cpu) && found.rights() & (LONG | segment::BIG) != LONG;
    if !found.is_code() || found.dpl() > cpu.cpl || wrong_size {
        return Err(Fault::gp(code_of(gate.selector)));
    }
    let conforming = found.rights() & segment::CONFORMING != 0;
    let cpl = if conforming { cpu.cpl } else { found.dpl() };
    let code = code_segment(cpu, found, gate.selector, cpl)?;
    segment::check_target(cpu, &code, gate.offset)?;
    Ok((code, cpl))
}

fn finish(cpu: &mut Cpu, gate: &Gate, code: Segment, cpl: u8, stack: &Stack, segment: Segment) {
    cpu.seg[SS] = segment;
    cpu.gpr[RSP] = stack.sp;
    let mut cleared = fl::TF | fl::NT | fl::RF | fl::VM;
    if gate.interrupt {
        cleared |= fl::IF;
    }
    clear_flags(cpu, cleared);
    segment::enter(cpu, code, cpl, gate.offset);
}

/// Protected mode without long mode.
fn through_gate(cpu: &mut Cpu, event: Event) -> Result<(), Fault> {
    let gate = gate(cpu, event)?;
    let (code, cpl) = handler(cpu, &gate)?;
    let flags = pushed_flags(cpu, event);
    let (old_ss, old_sp) = (cpu.seg[SS], cpu.gpr[RSP]);
    let (segment, mut stack) = if cpl < cpu.cpl {
        let (segment, sp) = inner_stack(cpu, cpl)?;
        let mut stack = Stack::on(segment, sp, false, cpl, code_of(segment.selector));
        stack.push(cpu, gate.size, old_ss.selector.into())?;
        stack.push(cpu, gate.size, old_sp)?;
        (segment, stack)
    } else {
        (old_ss, Stack::current(cpu))
    };
    stack.push(cpu, gate.size, flags)?;
    stack.push(cpu, gate.size, cpu.seg[CS].selector.into())?;
    stack.push(cpu, gate.size, cpu.rip())?;
    if let Some(error) = event.error {
        stack.push(cpu, gate.size, error.into())?;
    }
    finish(cpu, &gate, code, cpl, &stack, segment);
    Ok(())
}

/// Long mode: from 64-bit and compatibility code alike, to 64-bit code.
fn through_long_gate(cpu: &mut Cpu, event: Event) -> Result<(), Fault> {
    let gate = gate(cpu, event)?;
    let (code, cpl) = handler(cpu, &gate)?;
    let flags = pushed_flags(cpu, event);
    let (old_ss, old_sp) = (cpu.seg[SS], cpu.gpr[RSP]);
    let inward = cpl < cpu.cpl;
    let sp = if gate.ist != 0 {
        stack_from_tss(cpu, 0x24 + 8 * (u32::from(gate.ist) - 1))?
    } else if inward {
        stack_from_tss(cpu, 4 + 8 * u32::from(cpl))?
    } else {
        old_sp
    };
    let segment = if inward { segment::null(cpl.into()) } else { old_ss };
    let mut stack = Stack::on(segment, sp & !0xf, true, cpl, 0);
    for value in [old_ss.selector.into(), old_sp, flags, cpu.seg[CS].selector.into(), cpu.rip()] {
        stack.push(cpu, 8, value)?;
    }
    if let Some(error) = event.error {
        stack.push(cpu, 8, error.into())?;
    }
    finish(cpu, &gate, code, cpl, &stack, segment);
    Ok(())
}

/// A stack pointer from the 64-bit TSS.
fn stack_from_tss(cpu: &mut Cpu, offset: u32) -> Result<u64, Fault> {
    if offset + 7 > cpu.tr.limit {
        return Err(Fault::with_code(vec::TS, code_of(cpu.tr.selector)));
    }
    let sp = cpu.read_sys::<u64>(cpu.tr.base.wrapping_add(offset.into()))?;
    if is_canonical(sp) { Ok(sp) } else { Err(Fault::ss(0)) }
}

/// The stack of an inner level, from the TSS.
pub(crate) fn inner_stack(cpu: &mut Cpu, cpl: u8) -> Result<(Segment, u64), Fault> {
    if is_long(cpu) {
        let sp = stack_from_tss(cpu, 4 + 8 * u32::from(cpl))?;
        return Ok((segment::null(cpl.into()), sp));
    }
    let wide = cpu.tr.rights & 8 != 0;
    let (offset, size) = if wide { (4 + 8 * u32::from(cpl), 8) } else { (2 + 4 * u32::from(cpl), 4) };
    if offset + size - 1 > cpu.tr.limit {
        return Err(Fault::with_code(vec::TS, code_of(cpu.tr.selector)));
    }
    let address = cpu.tr.base.wrapping_add(offset.into());
    let (sp, selector) = if wide {
        (u64::from(cpu.read_sys::<u32>(address)?), cpu.read_sys::<u16>(address.wrapping_add(4))?)
    } else {
        (u64::from(cpu.read_sys::<u16>(address)?), cpu.read_sys::<u16>(address.wrapping_add(2))?)
    };
    let segment = stack_segment(cpu, selector, cpl, false, vec::TS)?;
    Ok((segment, sp))
}

/// IRET. `size` is the operand size in bytes.
///
/// # Errors
/// The exception; nothing has changed.
pub(crate) fn iret(cpu: &mut Cpu, size: u8) -> Result<(), Fault> {
    if is_protected(cpu) && cpu.flags() & fl::NT != 0 {
        // A return to another task, which there is not; in long mode the manual says #GP as well.
        return Err(Fault::gp(0));
    }
    let mut stack = Stack::current(cpu);
    let rip = stack.pop(cpu, size)?;
    let selector = stack.pop(cpu, size)? as u16;
    let flags = stack.pop(cpu, size)?;
    if !is_protected(cpu) {
        let code = Segment { selector, base: u64::from(selector) << 4, ..cpu.seg[CS] };
        segment::check_target(cpu, &code, rip)?;
        cpu.gpr[RSP] = stack.sp;
        restore_flags(cpu, flags, size, 0);
        segment::enter(cpu, code, 0, rip);
        return Ok(());
    }
    if flags & fl::VM != 0 && size == 4 && cpu.cpl == 0 && !is_long(cpu) {
        return Err(Fault::gp(0));
    }
    let transfer = Return::to(cpu, selector, rip)?;
    let old = cpu.cpl;
    if transfer.cpl > old || is_64(cpu) {
        let outer = transfer.pop_stack(cpu, &mut stack, size)?;
        restore_flags(cpu, flags, size, old);
        transfer.commit(cpu);
        segment::commit_outer(cpu, outer, 0);
    } else {
        cpu.gpr[RSP] = stack.sp;
        restore_flags(cpu, flags, size, old);
        transfer.commit(cpu);
    }
    Ok(())
}

fn restore_flags(cpu: &mut Cpu, flags: u64, size: u8, cpl: u8) {
    let mut writable = fl::ARITH | fl::TF | fl::DF | fl::NT | fl::AC | fl::ID;
    let old = cpu.flags();
    if u64::from(cpl) <= (old & fl::IOPL) >> 12 {
        writable |= fl::IF;
    }
    if cpl == 0 {
        writable |= fl::IOPL | fl::VIF | fl::VIP;
    }
    if size == 2 {
        writable &= 0xffff;
    }
    cpu.set_flags(old & !writable & !fl::RF | flags & writable);
    cpu.nmi_masked = false;
    cpu.recheck = true;
}

/// Whether the current privilege may access `size` I/O ports from `port`.
///
/// # Errors
/// #GP where it may not.
pub(crate) fn io_allowed(cpu: &mut Cpu, port: u16, size: u8) -> Result<(), Fault> {
    if !is_protected(cpu) || u64::from(cpu.cpl) <= (cpu.rflags & fl::IOPL) >> 12 {
        return Ok(());
    }
    // A 32-bit or 64-bit TSS with room for the bitmap's offset.
    if cpu.tr.rights & (CODE_OR_DATA | 8) != 8 || cpu.tr.limit < 0x67 {
        return Err(Fault::gp(0));
    }
    let bitmap = cpu.read_sys::<u16>(cpu.tr.base.wrapping_add(0x66))?;
    let byte = u32::from(bitmap) + u32::from(port / 8);
    // The processor reads two bytes, so that an access across a byte's edge is covered.
    if byte + 1 > cpu.tr.limit {
        return Err(Fault::gp(0));
    }
    let bits = cpu.read_sys::<u16>(cpu.tr.base.wrapping_add(byte.into()))?;
    if bits >> (port % 8) & ((1 << size) - 1) == 0 { Ok(()) } else { Err(Fault::gp(0)) }
}
