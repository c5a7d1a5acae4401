//! Interrupts: by line from the serial port, by IPI, from the local APIC's timer; priority, masking, HLT, NMI, and ring 3.
#![no_std]
#![no_main]

use bare_guests::check::{equal, holds};
use bare_guests::fault::{on_interrupt, user_at};
use bare_guests::port::{SERIAL, in8, out8};
use bare_guests::tables::USER_CODE;
use bare_guests::{Fault, apic, boot::Machine, cpu};
use core::arch::asm;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};

bare_guests::guest!(main);

static COUNT: AtomicU32 = AtomicU32::new(0);
/// The vectors that arrived, the last in the low byte.
static ORDER: AtomicU64 = AtomicU64::new(0);

const LINE: u8 = 0x40;
const LOW: u8 = 0x51;
const HIGH: u8 = 0x72;
const TIMER: u8 = 0x60;

fn note(vector: u8) {
    ORDER.store(ORDER.load(SeqCst) << 8 | u64::from(vector), SeqCst);
    COUNT.fetch_add(1, SeqCst);
    apic::end_of_interrupt();
}

fn taken() -> u64 {
    let count = COUNT.swap(0, SeqCst);
    ORDER.store(0, SeqCst);
    u64::from(count)
}

fn wait_for(count: u32) {
    while COUNT.load(SeqCst) < count {
        cpu::wait_for_interrupt();
    }
}

fn send_self(vector: u8) {
    apic::send(0, 0x4000 | u32::from(vector));
}

/// Lets pending interrupts in for a while: hosts that emulate this code look for them now and then only.
fn open() {
    cpu::enable_interrupts();
    for _ in 0..2000 {
        core::hint::spin_loop();
    }
    cpu::disable_interrupts();
}

extern "C" fn spin_in_ring_3(_: u64) {
    while COUNT.load(SeqCst) < 3 {
        core::hint::spin_loop();
    }
    // SAFETY: ends the ring-3 function.
    unsafe { asm!("ud2") };
}

fn main(_: &Machine) {
    apic::enable();
    on_interrupt(LINE, || {
        // Reading the interrupt's identification takes it back.
        let cause = in8(SERIAL + 2) & 0xf;
        ORDER.store(u64::from(cause), SeqCst);
        COUNT.fetch_add(1, SeqCst);
        apic::end_of_interrupt();
    });
    on_interrupt(LOW, || note(LOW));
    on_interrupt(HIGH, || note(HIGH));
    on_interrupt(TIMER, || note(TIMER));

    // A line: the serial port's "transmitter empty", I/O APIC input 4.
    equal("I/O APIC has 24 inputs", u64::from(apic::io_read(1) >> 16 & 0xff), 23);
    apic::route(4, LINE, 0);
    out8(SERIAL + 4, 0x08);
    out8(SERIAL + 1, 0x02);
    wait_for(1);
    out8(SERIAL + 1, 0);
    equal("serial line: cause", ORDER.load(SeqCst), 2);
    holds("serial line: taken", taken() >= 1);
    apic::route(4, LINE, apic::MASKED);
    out8(SERIAL + 1, 0x02);
    open();
    out8(SERIAL + 1, 0);
    equal("masked line: not taken", taken(), 0);

    send_self(LOW);
    holds(
        "IPI to itself: pending",
        apic::read(apic::REQUEST + 0x10 * u64::from(LOW / 32)) & 1 << (LOW % 32) != 0,
    );
    equal("IPI to itself: not taken while interrupts are off", u64::from(COUNT.load(SeqCst)), 0);
    open();
    equal("IPI to itself: taken once", taken(), 1);

    send_self(LOW);
    send_self(HIGH);
    open();
    equal("priority: the higher vector first", ORDER.load(SeqCst), u64::from(HIGH) << 8 | u64::from(LOW));
    equal("priority: both taken", taken(), 2);

    apic::write(apic::TPR, 0x60);
    send_self(LOW);
    send_self(HIGH);
    open();
    equal("task priority: only the higher one", ORDER.load(SeqCst), u64::from(HIGH));
    apic::write(apic::TPR, 0);
    open();
    equal("task priority: the lower one when it may", taken(), 2);

    // The timer, divided by 1.
    apic::write(apic::DIVIDE, 0xb);
    apic::write(apic::LVT_TIMER, u32::from(TIMER));
    apic::write(apic::INITIAL_COUNT, u32::MAX);
    for _ in 0..100 {
        core::hint::spin_loop();
    }
    let early = apic::read(apic::CURRENT_COUNT);
    apic::write(apic::INITIAL_COUNT, 1_000_000);
    wait_for(1);
    holds("one-shot timer: counts down", early > 0 && early < u32::MAX);
    equal("one-shot timer: fires", taken(), 1);
    equal("one-shot timer: stands at zero", u64::from(apic::read(apic::CURRENT_COUNT)), 0);
    let before = cpu::rdtsc();
    apic::write(apic::LVT_TIMER, u32::from(TIMER) | 1 << 17);
    apic::write(apic::INITIAL_COUNT, 2_000_000);
    wait_for(5);
    apic::write(apic::INITIAL_COUNT, 0);
    holds("periodic timer: fires again and again", taken() >= 5);
    holds("the time-stamp counter goes on", cpu::rdtsc() > before);

    apic::write(apic::INITIAL_COUNT, 2_000_000);
    let fault = user_at(spin_in_ring_3 as *const () as u64, 0, 0x202, USER_CODE);
    apic::write(apic::INITIAL_COUNT, 0);
    equal("interrupts in ring 3: it ends on its own", fault.vector, Fault::END);
    holds("interrupts in ring 3: taken", taken() >= 3);

    if cpu::cpuid(1, 0)[2] & 1 << 24 != 0 {
        apic::write(apic::LVT_TIMER, u32::from(TIMER) | 2 << 17);
        cpu::wrmsr(0x6e0, cpu::rdtsc() + 3_000_000);
        wait_for(1);
        equal("deadline timer: disarmed when it fires", cpu::rdmsr(0x6e0), 0);
        taken();
    } else {
        equal("deadline timer: disarmed when it fires", 0, 0);
    }
    apic::write(apic::LVT_TIMER, apic::MASKED);

    on_interrupt(2, || {
        COUNT.fetch_add(1, SeqCst);
    });
    apic::send(0, 0x4400);
    while COUNT.load(SeqCst) == 0 {
        core::hint::spin_loop();
    }
    equal("non-maskable interrupt: taken while interrupts are off", taken(), 1);
    apic::send(0, 0x4400);
    while COUNT.load(SeqCst) == 0 {
        core::hint::spin_loop();
    }
    equal("non-maskable interrupt: and again", taken(), 1);
}
