//! All vCPUs: start by INIT and SIPI, locked arithmetic, messages by IPI.
#![no_std]
#![no_main]

use bare_guests::check::equal;
use bare_guests::fault::on_interrupt;
use bare_guests::{apic, boot::Machine, cpu, smp};
use core::arch::asm;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};

bare_guests::guest!(main);

const EACH: u64 = 1000;
static SUM: AtomicU64 = AtomicU64::new(0);
static XADD: AtomicU64 = AtomicU64::new(0);
static COMPARED: AtomicU64 = AtomicU64::new(0);
static IDS: AtomicU64 = AtomicU64::new(0);
static FINISHED: AtomicU32 = AtomicU32::new(0);
static WOKEN: AtomicU32 = AtomicU32::new(0);
static LOCK: AtomicU32 = AtomicU32::new(0);
/// Guarded by `LOCK`, and changed without a locked instruction.
static PLAIN: AtomicU64 = AtomicU64::new(0);

fn share(_: u32) {
    IDS.fetch_or(1 << (cpu::cpuid(1, 0)[1] >> 24), SeqCst);
    for _ in 0..EACH {
        // SAFETY: a locked addition to a static.
        unsafe { asm!("lock add qword ptr [{}], 1", in(reg) SUM.as_ptr()) };
        XADD.fetch_add(3, SeqCst);
        while COMPARED.fetch_update(SeqCst, SeqCst, |value| Some(value + 5)).is_err() {}
    }
    for _ in 0..EACH / 10 {
        while LOCK.swap(1, SeqCst) != 0 {
            core::hint::spin_loop();
        }
        let value = PLAIN.load(SeqCst);
        PLAIN.store(value + 1, SeqCst);
        LOCK.store(0, SeqCst);
    }
    FINISHED.fetch_add(1, SeqCst);
}

fn other(number: u32) {
    share(number);
    loop {
        cpu::wait_for_interrupt();
    }
}

fn main(machine: &Machine) {
    let all = u64::from(machine.vcpus);
    apic::enable();
    on_interrupt(0x50, || {
        WOKEN.fetch_add(1, SeqCst);
        apic::end_of_interrupt();
    });
    smp::start(machine.vcpus, other);
    share(0);
    while u64::from(FINISHED.load(SeqCst)) < all {
        core::hint::spin_loop();
    }
    equal("every vCPU came, with its own number", u64::from(IDS.load(SeqCst).count_ones()), all);
    equal("locked addition", SUM.load(SeqCst), all * EACH);
    equal("exchange and add", XADD.load(SeqCst), all * EACH * 3);
    equal("compare and exchange", COMPARED.load(SeqCst), all * EACH * 5);
    equal("spin lock", PLAIN.load(SeqCst), all * (EACH / 10));

    for id in 1..machine.vcpus {
        apic::send(id as u8, 0x4050);
    }
    while u64::from(WOKEN.load(SeqCst)) < all - 1 {
        core::hint::spin_loop();
    }
    equal("IPI to each of the others", u64::from(WOKEN.load(SeqCst)), all - 1);
    WOKEN.store(0, SeqCst);
    // To all but itself.
    apic::send(0, 0xc4050);
    while u64::from(WOKEN.load(SeqCst)) < all - 1 {
        core::hint::spin_loop();
    }
    equal("IPI to all the others", u64::from(WOKEN.load(SeqCst)), all - 1);
}
