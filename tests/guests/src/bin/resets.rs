//! Resets a virtio disk with reads under way, again and again, and looks whether anything is written to memory once the reset is done. `rounds=N`.
#![no_std]
#![no_main]

use bare_guests::boot::Machine;
use bare_guests::check::{equal, finish, holds};
use bare_guests::tables::Shared;
use bare_guests::virtio::{Device, Part};
use core::hint::spin_loop;

bare_guests::guest!(main);

const BLOCK_DEVICE: u32 = 2;
/// Reads under way.
const DEPTH: usize = 32;
const LENGTH: usize = 4096;
/// What the buffers hold after a reset, which no disk of the test holds.
const MARK: u64 = 0xa5a5_5a5a_1234_8765;

#[repr(C, align(4096))]
struct Requests {
    data: [[u64; LENGTH / 8]; DEPTH],
    /// Read, sector.
    headers: [[u64; 2]; DEPTH],
    status: [u64; DEPTH],
}

static REQUESTS: Shared<Requests> =
    Shared::new(Requests { data: [[0; LENGTH / 8]; DEPTH], headers: [[0; 2]; DEPTH], status: [0; DEPTH] });

fn submit(device: &mut Device) {
    let requests = REQUESTS.at();
    for n in 0..DEPTH {
        // SAFETY: no request is under way; the addresses are of memory that stays.
        let parts = unsafe {
            (&raw mut (*requests).headers[n]).write_volatile([0, n as u64 * 8]);
            [
                Part { address: &raw const (*requests).headers[n] as u64, length: 16, written: false },
                Part { address: &raw const (*requests).data[n] as u64, length: LENGTH as u32, written: true },
                Part { address: &raw const (*requests).status[n] as u64, length: 1, written: true },
            ]
        };
        device.queue(n as u16 * 3, &parts);
    }
    device.notify();
}

/// Every word that a device may write: data, then status. The stack has no room for all of them.
fn words() -> impl Iterator<Item = *mut u64> {
    let requests = REQUESTS.at();
    // SAFETY: only places are taken.
    let (data, status) =
        unsafe { ((&raw mut (*requests).data).cast::<u64>(), (&raw mut (*requests).status).cast::<u64>()) };
    (0..DEPTH * LENGTH / 8)
        .map(move |n| data.wrapping_add(n))
        .chain((0..DEPTH).map(move |n| status.wrapping_add(n)))
}

fn mark() {
    // SAFETY: the device is reset: the memory is the driver's.
    words().for_each(|word| unsafe { word.write_volatile(MARK) });
}

/// How many words are not what [`mark`] wrote.
fn touched() -> u64 {
    // SAFETY: as above.
    words().filter(|word| unsafe { word.read_volatile() } != MARK).count() as u64
}

fn main(machine: &Machine) {
    let Some(mut device) = Device::begin(BLOCK_DEVICE, 0) else {
        holds("a disk is found and accepts its driver", false);
        finish()
    };
    let rounds = machine.number("rounds").unwrap_or(1000);
    let (mut early, mut late) = (0, 0);
    for round in 0..rounds {
        submit(&mut device);
        // Now at once, now after some answers.
        for _ in 0..(round % 16) * 400 {
            spin_loop();
        }
        early += u64::from(usize::from(device.used_index()) < DEPTH);
        device.reset();
        let index = device.used_index();
        mark();
        for _ in 0..2000 {
            spin_loop();
        }
        late += touched() + u64::from(device.used_index() != index);
        device.forget();
        let Some(again) = Device::begin(BLOCK_DEVICE, 0) else {
            holds("the disk accepts its driver after a reset", false);
            finish()
        };
        device = again;
    }
    holds("resets come with requests under way", early > rounds / 8);
    equal("words written after a reset", late, 0);
    // It still works.
    submit(&mut device);
    let mut answers = 0;
    while answers < DEPTH {
        answers += usize::from(device.take().is_some());
    }
    finish()
}
