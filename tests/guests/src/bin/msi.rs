//! Message-signalled interrupts: a virtio disk sends its vector by MSI-X, is masked, and sends it late.
#![no_std]
#![no_main]

use bare_guests::boot::Machine;
use bare_guests::check::{equal, finish, holds};
use bare_guests::fault::on_interrupt;
use bare_guests::tables::Shared;
use bare_guests::virtio::{Device, Part};
use bare_guests::{apic, cpu};
use core::sync::atomic::{AtomicU32, Ordering::SeqCst};

bare_guests::guest!(main);

const BLOCK_DEVICE: u32 = 2;
const VECTOR: u8 = 0x61;

static COUNT: AtomicU32 = AtomicU32::new(0);

#[repr(C, align(4096))]
struct Request {
    /// A read of sector 0.
    header: [u64; 2],
    data: [u8; 512],
    status: u8,
}

static REQUEST: Shared<Request> = Shared::new(Request { header: [0; 2], data: [0; 512], status: 0xff });

fn read_sector(device: &mut Device) {
    let request = REQUEST.at();
    // SAFETY: no request is under way.
    let parts = unsafe {
        (&raw mut (*request).status).write_volatile(0xff);
        [
            Part { address: &raw const (*request).header as u64, length: 16, written: false },
            Part { address: &raw const (*request).data as u64, length: 512, written: true },
            Part { address: &raw const (*request).status as u64, length: 1, written: true },
        ]
    };
    device.queue(0, &parts);
    device.notify();
}

/// Polls until the request has been answered; whether it was a success.
fn answered(device: &mut Device) -> bool {
    while device.take().is_none() {
        core::hint::spin_loop();
    }
    // SAFETY: the request has ended.
    unsafe { (&raw const (*REQUEST.at()).status).read_volatile() == 0 }
}

fn wait_for(count: u32) {
    while COUNT.load(SeqCst) < count {
        cpu::wait_for_interrupt();
    }
}

fn main(_: &Machine) {
    apic::enable();
    on_interrupt(VECTOR, || {
        COUNT.fetch_add(1, SeqCst);
        apic::end_of_interrupt();
    });
    let Some(mut device) = Device::begin_with(BLOCK_DEVICE, 0, 0, Some(VECTOR)) else {
        holds("a disk is found and takes a vector", false);
        finish()
    };
    read_sector(&mut device);
    wait_for(1);
    holds("MSI-X: a halted vCPU is woken and the answer is there", answered(&mut device));
    equal("MSI-X: one interrupt for one answer", u64::from(COUNT.load(SeqCst)), 1);

    device.mask(true);
    read_sector(&mut device);
    holds("MSI-X masked: the answer comes", answered(&mut device));
    equal("MSI-X masked: no interrupt", u64::from(COUNT.load(SeqCst)), 1);
    device.mask(false);
    wait_for(2);
    equal("MSI-X unmasked: what was pending arrives once", u64::from(COUNT.load(SeqCst)), 2);
}
