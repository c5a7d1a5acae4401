//! One local APIC: xAPIC and x2APIC registers, priorities, and the timer (Intel SDM vol. 3 ch. 11).
//!
//! Any thread may inject; the owning vCPU's thread reads, acknowledges and ends interrupts. The registers stand under one small mutex,
//! and [`Lapic::pending`] is an atomic summary of what the vCPU has to look at, so that running code never takes the lock.
//! Where a message goes is decided in [`crate::irqchip`]; lock order is I/O APIC, then one local APIC, then the clock.
//!
//! It is long because the registers, the priorities and the timer all stand under that one lock.
//!
//! Not here: external interrupts through an 8259 (there is none), SMIs, thermal and performance counter sources.
#![allow(clippy::cast_possible_truncation, reason = "registers are taken apart here")]

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use tenon_core::{Clock, Timer};

use crate::irqchip::{Delivery, Destination, Message};

/// Where the registers of a local APIC in xAPIC mode are.
pub(crate) const APIC_BASE: u64 = 0xfee0_0000;
/// MSR APIC_BASE: this is the bootstrap processor.
pub(crate) const BASE_BSP: u64 = 1 << 8;
/// MSR APIC_BASE: x2APIC mode.
pub(crate) const BASE_X2APIC: u64 = 1 << 10;
/// MSR APIC_BASE: the APIC is on.
pub(crate) const BASE_ENABLE: u64 = 1 << 11;

/// [`Lapic::pending`]: an interrupt is above the processor priority.
pub(crate) const PENDING_INTERRUPT: u32 = 1;
/// [`Lapic::pending`]: a non-maskable interrupt has come.
pub(crate) const PENDING_NMI: u32 = 2;
/// [`Lapic::pending`]: an INIT has come.
pub(crate) const PENDING_INIT: u32 = 4;
/// [`Lapic::pending`]: a start-up interrupt has come.
pub(crate) const PENDING_SIPI: u32 = 8;

/// Tells a vCPU, from any thread, that its APIC has something for it: sets its event word, and wakes it when it waits.
pub(crate) trait Notify: Send + Sync {
    /// Called after [`Lapic::pending`] gained a bit, without any APIC lock that the vCPU needs for longer than an instant.
    fn notify(&self);
}

/// A register access that raises #GP (x2APIC) or counts as an illegal address (xAPIC).
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct IllegalRegister;

/// What the caller has to do after a register write, once the lock is released.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    None,
    /// Tell the I/O APICs that this vector's level-triggered interrupt is done.
    Eoi(u8),
    /// Send an interrupt.
    Send(Message),
}

// Register numbers: offset in the page divided by 16.
const ID: u32 = 0x02;
const VERSION: u32 = 0x03;
const TPR: u32 = 0x08;
const APR: u32 = 0x09;
const PPR: u32 = 0x0a;
const EOI: u32 = 0x0b;
const RRD: u32 = 0x0c;
const LDR: u32 = 0x0d;
const DFR: u32 = 0x0e;
const SVR: u32 = 0x0f;
const ISR: u32 = 0x10;
const TMR: u32 = 0x18;
const IRR: u32 = 0x20;
const ESR: u32 = 0x28;
const ICR_LOW: u32 = 0x30;
const ICR_HIGH: u32 = 0x31;
const LVT_TIMER: u32 = 0x32;
const LVT_THERMAL: u32 = 0x33;
const LVT_PERF: u32 = 0x34;
const LVT_LINT0: u32 = 0x35;
const LVT_LINT1: u32 = 0x36;
const LVT_ERROR: u32 = 0x37;
const TIMER_INITIAL: u32 = 0x38;
const TIMER_CURRENT: u32 = 0x39;
const TIMER_DIVIDE: u32 = 0x3e;
const SELF_IPI: u32 = 0x3f;

/// Version 0x14 with six LVT entries.
const VERSION_VALUE: u32 = 0x0005_0014;
const SVR_ENABLE: u32 = 1 << 8;
const LVT_MASKED: u32 = 1 << 16;

const ERROR_SEND_VECTOR: u32 = 1 << 5;
const ERROR_RECEIVE_VECTOR: u32 = 1 << 6;
const ERROR_ADDRESS: u32 = 1 << 7;

/// The shortest period of the periodic timer in nanoseconds: a guest that asks for less would only keep the clock's thread busy.
const SHORTEST_PERIOD: u64 = 20_000;

#[derive(Clone, Copy, PartialEq, Eq)]
enum TimerMode {
    OneShot,
    Periodic,
    TscDeadline,
}

struct Regs {
    base: u64,
    tpr: u32,
    ldr: u32,
    dfr: u32,
    svr: u32,
    irr: [u64; 4],
    isr: [u64; 4],
    tmr: [u64; 4],
    /// The errors as last latched by a write of ESR, and those since.
    esr: u32,
    errors: u32,
    icr: u64,
    /// LVT timer, thermal, performance, LINT0, LINT1, error.
    lvt: [u32; 6],
    initial: u32,
    divide: u32,
    /// When the timer fires, on the machine's clock.
    deadline: Option<u64>,
    /// The guest's TSC deadline, 0 if none.
    tsc_deadline: u64,
    nmi: bool,
    init: bool,
    sipi: Option<u8>,
}

fn highest(bits: &[u64; 4]) -> Option<u8> {
    (0..4).rev().find(|n| bits[*n] != 0).map(|n| (n * 64 + 63 - bits[n].leading_zeros() as usize) as u8)
}

fn set(bits: &mut [u64; 4], vector: u8, on: bool) {
    let (word, bit) = (usize::from(vector) / 64, 1 << (vector % 64));
    if on {
        bits[word] |= bit;
    } else {
        bits[word] &= !bit;
    }
}

fn test(bits: &[u64; 4], vector: u8) -> bool {
    bits[usize::from(vector) / 64] >> (vector % 64) & 1 != 0
}

fn dword(bits: &[u64; 4], n: u32) -> u32 {
    (bits[n as usize / 2] >> (32 * (n % 2))) as u32
}

fn set_dword(bits: &mut [u64; 4], n: u32, value: u32) {
    let shift = 32 * (n % 2);
    let word = &mut bits[n as usize / 2];
    *word = *word & !(0xffff_ffff << shift) | u64::from(value) << shift;
}

impl Regs {
    fn after_reset(id: u32) -> Self {
        Self {
            base: APIC_BASE | BASE_ENABLE | if id == 0 { BASE_BSP } else { 0 },
            tpr: 0,
            ldr: 0,
            dfr: 0xffff_ffff,
            svr: 0xff,
            irr: [0; 4],
            isr: [0; 4],
            tmr: [0; 4],
            esr: 0,
            errors: 0,
            icr: 0,
            lvt: [LVT_MASKED; 6],
            initial: 0,
            divide: 0,
            deadline: None,
            tsc_deadline: 0,
            nmi: false,
            init: false,
            sipi: None,
        }
    }

    fn enabled(&self) -> bool {
        self.base & BASE_ENABLE != 0
    }

    fn x2apic(&self) -> bool {
        self.base & (BASE_ENABLE | BASE_X2APIC) == BASE_ENABLE | BASE_X2APIC
    }

    fn mode(&self) -> TimerMode {
        match self.lvt[0] >> 17 & 3 {
            0 => TimerMode::OneShot,
            2 => TimerMode::TscDeadline,
            _ => TimerMode::Periodic,
        }
    }

    /// Nanoseconds per count: the bus clock is 1 GHz.
    fn divisor(&self) -> u64 {
        let code = self.divide & 3 | self.divide >> 1 & 4;
        if code == 7 { 1 } else { 2 << code }
    }

    fn period(&self) -> u64 {
        (u64::from(self.initial) * self.divisor()).max(SHORTEST_PERIOD)
    }

    fn current(&self, now: u64) -> u32 {
        match self.deadline {
            Some(deadline) if self.mode() != TimerMode::TscDeadline => {
                (deadline.saturating_sub(now) / self.divisor()).min(self.initial.into()) as u32
            }
            _ => 0,
        }
    }

    fn ppr(&self) -> u32 {
        let service = u32::from(highest(&self.isr).unwrap_or(0));
        if self.tpr >> 4 >= service >> 4 { self.tpr } else { service & 0xf0 }
    }

    /// The vector to deliver now.
    fn deliverable(&self) -> Option<u8> {
        highest(&self.irr).filter(|vector| self.enabled() && u32::from(*vector) >> 4 > self.ppr() >> 4)
    }

    fn summary(&self) -> u32 {
        let mut summary = 0;
        if self.deliverable().is_some() {
            summary |= PENDING_INTERRUPT;
        }
        if self.nmi {
            summary |= PENDING_NMI;
        }
        if self.init {
            summary |= PENDING_INIT;
        }
        if self.sipi.is_some() {
            summary |= PENDING_SIPI;
        }
        summary
    }

    /// Takes in an interrupt of its own or from outside.
    fn accept(&mut self, vector: u8, level: bool) -> bool {
        if vector < 16 {
            self.error(ERROR_RECEIVE_VECTOR);
            return false;
        }
        if !self.enabled() || self.svr & SVR_ENABLE == 0 {
            return false;
        }
        set(&mut self.irr, vector, true);
        set(&mut self.tmr, vector, level);
        true
    }

    fn error(&mut self, bit: u32) {
        if self.errors & bit == 0 {
            self.errors |= bit;
            let (lvt, vector) = (self.lvt[5], (self.lvt[5] & 0xff) as u8);
            // A vector that is itself illegal raises no further error.
            if lvt & LVT_MASKED == 0 && vector >= 16 {
                self.accept(vector, false);
            }
        }
    }

    fn fire_timer(&mut self) {
        if self.lvt[0] & LVT_MASKED == 0 {
            self.accept((self.lvt[0] & 0xff) as u8, false);
        }
    }
}

/// A local APIC.
pub(crate) struct Lapic {
    id: u32,
    clock: Arc<Clock>,
    regs: Mutex<Regs>,
    pending: AtomicU32,
    notify: OnceLock<Arc<dyn Notify>>,
    timer: Timer,
}

impl Lapic {
    /// An APIC after power-on. `timer` calls [`Lapic::timer_fired`] on the result.
    pub(crate) fn new(id: u32, clock: Arc<Clock>, timer: Timer) -> Self {
        Self {
            id,
            clock,
            regs: Mutex::new(Regs::after_reset(id)),
            pending: AtomicU32::new(0),
            notify: OnceLock::new(),
            timer,
        }
    }

    /// Names the vCPU to notify; the first call counts.
    pub(crate) fn set_notify(&self, notify: Arc<dyn Notify>) {
        let _ = self.notify.set(notify);
    }

    /// The `PENDING_…` bits. No lock is taken.
    pub(crate) fn pending(&self) -> u32 {
        self.pending.load(Ordering::Acquire)
    }

    fn lock(&self) -> MutexGuard<'_, Regs> {
        self.regs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Publishes the summary before the lock goes, and notifies the vCPU of what is new.
    fn publish(&self, regs: MutexGuard<'_, Regs>) {
        let summary = regs.summary();
        let old = self.pending.swap(summary, Ordering::AcqRel);
        drop(regs);
        if summary & !old != 0
            && let Some(notify) = self.notify.get()
        {
            notify.notify();
        }
    }

    /// Takes the highest deliverable interrupt into service.
    pub(crate) fn acknowledge(&self) -> Option<u8> {
        let mut regs = self.lock();
        let vector = regs.deliverable();
        if let Some(vector) = vector {
            set(&mut regs.irr, vector, false);
            set(&mut regs.isr, vector, true);
        }
        self.publish(regs);
        vector
    }

    /// Takes a pending NMI.
    pub(crate) fn take_nmi(&self) -> bool {
        let mut regs = self.lock();
        let nmi = std::mem::take(&mut regs.nmi);
        self.publish(regs);
        nmi
    }

    /// Takes a pending INIT and puts the APIC into its state after INIT, which keeps the mode and the id (SDM vol. 3 §11.4.7.3).
    pub(crate) fn take_init(&self) -> bool {
        let mut regs = self.lock();
        let init = regs.init;
        if init {
            self.timer.cancel();
            let (base, sipi) = (regs.base, regs.sipi);
            *regs = Regs { base, sipi, ..Regs::after_reset(self.id) };
            if regs.x2apic() {
                regs.ldr = self.x2apic_ldr();
            }
        }
        self.publish(regs);
        init
    }

    /// Takes a pending start-up interrupt: the page at which to start. The caller drops it if the vCPU does not wait for one.
    pub(crate) fn take_sipi(&self) -> Option<u8> {
        let mut regs = self.lock();
        let sipi = regs.sipi.take();
        self.publish(regs);
        sipi
    }

    /// Puts the APIC into its state after power-on.
    pub(crate) fn reset(&self) {
        let mut regs = self.lock();
        self.timer.cancel();
        *regs = Regs::after_reset(self.id);
        self.publish(regs);
    }

    /// Whether a message for this destination concerns this APIC.
    pub(crate) fn matches(&self, destination: Destination) -> bool {
        let regs = self.lock();
        if !regs.enabled() {
            return false;
        }
        match destination {
            Destination::All => true,
            Destination::Physical(id) => id == self.id,
            Destination::Logical(bits) if regs.x2apic() => {
                regs.ldr >> 16 == bits >> 16 && regs.ldr & bits & 0xffff != 0
            }
            Destination::Logical(bits) if bits <= 0xff => {
                let logical = regs.ldr >> 24;
                if regs.dfr >> 28 == 0xf {
                    logical & bits != 0
                } else {
                    logical >> 4 == bits >> 4 && logical & bits & 0xf != 0
                }
            }
            Destination::Logical(_) => false,
        }
    }

    /// The processor priority, for lowest-priority delivery; nothing when the APIC takes no interrupts.
    pub(crate) fn priority(&self) -> Option<u32> {
        let regs = self.lock();
        (regs.enabled() && regs.svr & SVR_ENABLE != 0).then(|| regs.ppr() >> 4)
    }

    /// Takes in a message that was found to be for this APIC. Says whether it was accepted.
    pub(crate) fn deliver(&self, delivery: Delivery, vector: u8, level: bool) -> bool {
        let mut regs = self.lock();
        let accepted = match delivery {
            Delivery::Fixed | Delivery::LowestPriority => regs.accept(vector, level),
            Delivery::Nmi => {
                regs.nmi = true;
                true
            }
            Delivery::Init => {
                // A start-up interrupt from before this INIT is void.
                regs.init = true;
                regs.sipi = None;
                true
            }
            Delivery::StartUp => {
                regs.sipi = Some(vector);
                true
            }
        };
        self.publish(regs);
        accepted
    }

    /// The timer's deadline has come. A call that was overtaken by a change of the timer does nothing.
    pub(crate) fn timer_fired(&self, now: u64) {
        let mut regs = self.lock();
        let Some(deadline) = regs.deadline.filter(|deadline| *deadline <= now) else { return };
        regs.deadline = None;
        regs.tsc_deadline = 0;
        if regs.mode() == TimerMode::Periodic && regs.initial != 0 {
            let period = regs.period();
            self.arm(&mut regs, deadline + ((now - deadline) / period + 1) * period);
        }
        regs.fire_timer();
        self.publish(regs);
    }

    fn arm(&self, regs: &mut Regs, deadline: u64) {
        regs.deadline = Some(deadline);
        self.timer.arm(deadline);
    }

    fn disarm(&self, regs: &mut Regs) {
        regs.deadline = None;
        regs.tsc_deadline = 0;
        self.timer.cancel();
    }

    /// MSR TSC_DEADLINE. 0 when the timer is in another mode or has fired.
    pub(crate) fn tsc_deadline(&self) -> u64 {
        self.lock().tsc_deadline
    }

    /// A write of MSR TSC_DEADLINE: `tsc` is what the guest wrote, `deadline` the same on the machine's clock. Ignored in other modes.
    pub(crate) fn set_tsc_deadline(&self, tsc: u64, deadline: u64) {
        let mut regs = self.lock();
        if regs.mode() != TimerMode::TscDeadline {
            return;
        }
        if tsc == 0 {
            self.disarm(&mut regs);
        } else if deadline <= self.clock.now() {
            self.disarm(&mut regs);
            regs.fire_timer();
        } else {
            regs.tsc_deadline = tsc;
            self.arm(&mut regs, deadline);
        }
        self.publish(regs);
    }

    /// MSR APIC_BASE.
    pub(crate) fn base(&self) -> u64 {
        self.lock().base
    }

    /// A write of MSR APIC_BASE. The registers stay at [`APIC_BASE`].
    pub(crate) fn set_base(&self, value: u64) -> Result<(), IllegalRegister> {
        let mut regs = self.lock();
        let mode = |base: u64| base & (BASE_ENABLE | BASE_X2APIC);
        let legal = match (mode(regs.base), mode(value)) {
            (old, new) if old == new => true,
            // Bit 10 alone is no mode; into x2APIC only from xAPIC; out of it only to off.
            (_, BASE_X2APIC) => false,
            (0, new) => new == BASE_ENABLE,
            (BASE_ENABLE, _) => true,
            (_, new) => new == 0,
        };
        if value & !(BASE_BSP | BASE_X2APIC | BASE_ENABLE) != APIC_BASE || !legal {
            return Err(IllegalRegister);
        }
        if mode(value) == 0 && mode(regs.base) != 0 {
            self.timer.cancel();
            *regs = Regs { nmi: regs.nmi, init: regs.init, sipi: regs.sipi, ..Regs::after_reset(self.id) };
        }
        regs.base = value;
        if regs.x2apic() {
            regs.ldr = self.x2apic_ldr();
        }
        self.publish(regs);
        Ok(())
    }

    fn x2apic_ldr(&self) -> u32 {
        self.id >> 4 << 16 | 1 << (self.id & 15)
    }

    /// CR8: bits 4 to 7 of the task priority.
    pub(crate) fn cr8(&self) -> u64 {
        u64::from(self.lock().tpr >> 4)
    }

    /// A write of CR8 (0 to 15).
    pub(crate) fn set_cr8(&self, value: u64) {
        let mut regs = self.lock();
        regs.tpr = (value as u32 & 15) << 4;
        self.publish(regs);
    }

    /// Whether memory accesses to [`APIC_BASE`] reach the registers.
    pub(crate) fn is_mapped(&self) -> bool {
        let regs = self.lock();
        regs.enabled() && !regs.x2apic()
    }

    /// A read in xAPIC mode at `offset` of the register page.
    pub(crate) fn mmio_read(&self, offset: u64) -> u32 {
        let mut regs = self.lock();
        // Bytes between the registers' first doublewords are undefined; they read as 0.
        if offset & 0xc != 0 {
            return 0;
        }
        let value = self.register(&regs, (offset >> 4) as u32 & 0xff);
        if value.is_none() {
            regs.error(ERROR_ADDRESS);
        }
        self.publish(regs);
        value.map_or(0, |v| (u64::from(v) >> (8 * (offset & 3))) as u32)
    }

    /// A 32-bit write in xAPIC mode at `offset` of the register page.
    pub(crate) fn mmio_write(&self, offset: u64, value: u32) -> Effect {
        if offset & 0xf != 0 {
            return Effect::None;
        }
        let mut regs = self.lock();
        let register = (offset >> 4) as u32 & 0xff;
        let effect = match register {
            ID | SELF_IPI => None,
            LDR => {
                regs.ldr = value & 0xff00_0000;
                Some(Effect::None)
            }
            DFR => {
                regs.dfr = value | 0x0fff_ffff;
                Some(Effect::None)
            }
            ICR_HIGH => {
                regs.icr = regs.icr & 0xffff_ffff | u64::from(value & 0xff00_0000) << 32;
                Some(Effect::None)
            }
            ICR_LOW => {
                let high = regs.icr & !0xffff_ffff;
                Some(self.send(&mut regs, high | u64::from(value)))
            }
            _ => self.write_register(&mut regs, register, value),
        };
        let effect = effect.unwrap_or_else(|| {
            regs.error(ERROR_ADDRESS);
            Effect::None
        });
        self.publish(regs);
        effect
    }

    /// RDMSR of `0x800 + register`.
    pub(crate) fn msr_read(&self, register: u32) -> Result<u64, IllegalRegister> {
        let regs = self.lock();
        match register {
            _ if !regs.x2apic() => Err(IllegalRegister),
            ICR_LOW => Ok(regs.icr),
            DFR | ICR_HIGH | EOI | APR | RRD | SELF_IPI => Err(IllegalRegister),
            _ => self.register(&regs, register).map(u64::from).ok_or(IllegalRegister),
        }
    }

    /// WRMSR of `0x800 + register`.
    pub(crate) fn msr_write(&self, register: u32, value: u64) -> Result<Effect, IllegalRegister> {
        let mut regs = self.lock();
        if !regs.x2apic() {
            return Err(IllegalRegister);
        }
        let legal = match register {
            TPR => 0xff,
            SVR => 0x3ff,
            EOI | ESR => 0,
            ICR_LOW => 0xffff_ffff_000c_cfff,
            LVT_TIMER => 0x7_10ff,
            LVT_THERMAL | LVT_PERF => 0x1_17ff,
            LVT_LINT0 | LVT_LINT1 => 0x1_f7ff,
            LVT_ERROR => 0x1_10ff,
            TIMER_INITIAL => 0xffff_ffff,
            TIMER_DIVIDE => 0xb,
            SELF_IPI => 0xff,
            _ => return Err(IllegalRegister),
        };
        // SVR bit 9 (focus checking) has no effect; it is let through because some systems write it back as read.
        if value & !legal != 0 {
            return Err(IllegalRegister);
        }
        let effect = match register {
            ICR_LOW => self.send(&mut regs, value),
            SELF_IPI => Effect::Send(Message {
                delivery: Delivery::Fixed,
                vector: value as u8,
                level: false,
                destination: Destination::Physical(self.id),
                except: None,
            }),
            _ => self.write_register(&mut regs, register, value as u32).ok_or(IllegalRegister)?,
        };
        self.publish(regs);
        Ok(effect)
    }

    /// The value of a register that reads alike in both modes; nothing for one that does not exist.
    fn register(&self, regs: &Regs, register: u32) -> Option<u32> {
        Some(match register {
            ID if regs.x2apic() => self.id,
            ID => self.id << 24,
            VERSION => VERSION_VALUE,
            TPR => regs.tpr,
            APR | EOI | RRD => 0,
            PPR => regs.ppr(),
            LDR => regs.ldr,
            DFR => regs.dfr,
            SVR => regs.svr,
            ISR..=0x17 => dword(&regs.isr, register - ISR),
            TMR..=0x1f => dword(&regs.tmr, register - TMR),
            IRR..=0x27 => dword(&regs.irr, register - IRR),
            ESR => regs.esr,
            ICR_LOW => regs.icr as u32,
            ICR_HIGH => (regs.icr >> 32) as u32,
            LVT_TIMER..=LVT_ERROR => regs.lvt[(register - LVT_TIMER) as usize],
            TIMER_INITIAL => regs.initial,
            TIMER_CURRENT => regs.current(self.clock.now()),
            TIMER_DIVIDE => regs.divide,
            _ => return None,
        })
    }

    /// Writes a register that is written alike in both modes; nothing if there is none such.
    fn write_register(&self, regs: &mut Regs, register: u32, value: u32) -> Option<Effect> {
        match register {
            TPR => regs.tpr = value & 0xff,
            EOI => {
                if let Some(vector) = highest(&regs.isr) {
                    set(&mut regs.isr, vector, false);
                    if test(&regs.tmr, vector) {
                        return Some(Effect::Eoi(vector));
                    }
                }
            }
            SVR => {
                regs.svr = value & 0x3ff;
                if value & SVR_ENABLE == 0 {
                    regs.lvt.iter_mut().for_each(|lvt| *lvt |= LVT_MASKED);
                }
            }
            ESR => {
                regs.esr = regs.errors;
                regs.errors = 0;
            }
            LVT_TIMER..=LVT_ERROR => self.write_lvt(regs, register, value),
            TIMER_INITIAL => {
                if regs.mode() != TimerMode::TscDeadline {
                    regs.initial = value;
                    if value == 0 {
                        self.disarm(regs);
                    } else {
                        let length = match regs.mode() {
                            TimerMode::Periodic => regs.period(),
                            _ => u64::from(value) * regs.divisor(),
                        };
                        self.arm(regs, self.clock.now() + length);
                    }
                }
            }
            TIMER_DIVIDE => {
                let now = self.clock.now();
                let rest = regs.current(now);
                regs.divide = value & 0xb;
                if rest != 0 {
                    self.arm(regs, now + u64::from(rest) * regs.divisor());
                }
            }
            // Read-only registers take no notice.
            ID | VERSION | APR | PPR | RRD | ISR..=0x27 | TIMER_CURRENT => {}
            _ => return None,
        }
        Some(Effect::None)
    }

    fn write_lvt(&self, regs: &mut Regs, register: u32, value: u32) {
        let writable = match register {
            LVT_TIMER => 0x7_00ff,
            LVT_THERMAL | LVT_PERF => 0x1_07ff,
            LVT_LINT0 | LVT_LINT1 => 0x1_a7ff,
            _ => 0x1_00ff,
        };
        let mut value = value & writable;
        if regs.svr & SVR_ENABLE == 0 {
            value |= LVT_MASKED;
        }
        let was_deadline = regs.mode() == TimerMode::TscDeadline;
        regs.lvt[(register - LVT_TIMER) as usize] = value;
        // One-shot and periodic share the counter; going to or from the TSC deadline disarms (SDM vol. 3 §11.5.4.1).
        if register == LVT_TIMER && was_deadline != (regs.mode() == TimerMode::TscDeadline) {
            regs.initial = 0;
            self.disarm(regs);
        }
    }

    /// A write of the interrupt command register.
    fn send(&self, regs: &mut Regs, icr: u64) -> Effect {
        // Delivery is at once: the status bit never reads as busy.
        regs.icr = icr & !(1 << 12);
        let vector = icr as u8;
        let assert = icr >> 14 & 1 != 0;
        let level = icr >> 15 & 1 != 0;
        let delivery = match icr >> 8 & 7 {
            0 => Delivery::Fixed,
            1 => Delivery::LowestPriority,
            4 => Delivery::Nmi,
            // INIT level de-assert only synchronised arbitration ids on old systems.
            5 if level && !assert => return Effect::None,
            5 => Delivery::Init,
            6 => Delivery::StartUp,
            _ => return Effect::None,
        };
        if vector < 16 && matches!(delivery, Delivery::Fixed | Delivery::LowestPriority) {
            regs.error(ERROR_SEND_VECTOR);
            return Effect::None;
        }
        let x2apic = regs.x2apic();
        let field = if x2apic { (icr >> 32) as u32 } else { (icr >> 56) as u32 };
        let all = if x2apic { u32::MAX } else { 0xff };
        let shorthand = icr >> 18 & 3;
        let destination = match shorthand {
            0 if field == all => Destination::All,
            0 if icr >> 11 & 1 != 0 => Destination::Logical(field),
            0 => Destination::Physical(field),
            // INIT, NMI and start-up to oneself by shorthand are not valid.
            1 if delivery != Delivery::Fixed => return Effect::None,
            1 => Destination::Physical(self.id),
            _ => Destination::All,
        };
        let except = (shorthand == 3).then_some(self.id);
        Effect::Send(Message { delivery, vector, level: false, destination, except })
    }

    /// The registers as [`tenon_core::CpuState::lapic`] has them. Pending NMI, INIT and start-up are not among them.
    pub(crate) fn save(&self) -> Vec<u32> {
        let regs = self.lock();
        (0..64).map(|n| self.register(&regs, n).unwrap_or(0)).collect()
    }

    /// Takes over what [`Lapic::save`] gave, after APIC_BASE has been set. Any other length puts the registers into their state after reset.
    pub(crate) fn restore(&self, saved: &[u32]) {
        let mut regs = self.lock();
        self.timer.cancel();
        *regs = Regs { base: regs.base, ..Regs::after_reset(self.id) };
        if let Ok(saved) = <&[u32; 64]>::try_from(saved) {
            let at = |n: u32| saved[n as usize];
            regs.tpr = at(TPR) & 0xff;
            regs.ldr = at(LDR);
            regs.dfr = at(DFR) | 0x0fff_ffff;
            regs.svr = at(SVR) & 0x3ff;
            regs.esr = at(ESR);
            regs.icr = u64::from(at(ICR_HIGH)) << 32 | u64::from(at(ICR_LOW));
            for n in 0..8 {
                set_dword(&mut regs.isr, n, at(ISR + n));
                set_dword(&mut regs.tmr, n, at(TMR + n));
                set_dword(&mut regs.irr, n, at(IRR + n));
            }
            for n in 0..6 {
                regs.lvt[n as usize] = at(LVT_TIMER + n);
            }
            regs.initial = at(TIMER_INITIAL);
            regs.divide = at(TIMER_DIVIDE) & 0xb;
            let rest = at(TIMER_CURRENT);
            if rest != 0 {
                let deadline = self.clock.now() + u64::from(rest) * regs.divisor();
                self.arm(&mut regs, deadline);
            }
        }
        if regs.x2apic() {
            regs.ldr = self.x2apic_ldr();
        }
        self.publish(regs);
    }
}
