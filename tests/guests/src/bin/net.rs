//! Drives a virtio network card, in ring 3 after it was brought up: sends `count=` frames of `size=` bytes with `depth=` of them under way, for `cargo xtask bench net`.
#![no_std]
#![no_main]

use bare_guests::boot::Machine;
use bare_guests::check::{equal, exit, finish, holds};
use bare_guests::tables::Shared;
use bare_guests::virtio::{Device, Part};
use bare_guests::{Fault, user};

bare_guests::guest!(main);

const NETWORK_DEVICE: u32 = 1;
const STATUS_FEATURE: u32 = 1 << 16;
const LINK_UP: u64 = 1 << 48;
/// The queue that the driver sends by.
const SEND: u16 = 1;
/// The most frames under way.
const DEPTH: usize = 64;
/// What stands before each frame.
const HEADER: usize = 12;
const LONGEST: u64 = 1514;
/// For experiments within one site; nobody answers it.
const LOCAL_EXPERIMENTAL: [u8; 2] = [0x88, 0xb5];

#[repr(C, align(4096))]
struct Frames([[u8; 2048]; DEPTH]);

static FRAMES: Shared<Frames> = Shared::new(Frames([[0; 2048]; DEPTH]));

struct Job {
    device: Device,
    count: u64,
    size: usize,
    depth: usize,
    done: u64,
}

static JOB: Shared<Option<Job>> = Shared::new(None);

fn main(machine: &Machine) {
    let Some(device) = Device::begin_with(NETWORK_DEVICE, STATUS_FEATURE, SEND, None) else {
        holds("a network card is found and accepts its driver", false);
        finish()
    };
    while device.config(0) & LINK_UP == 0 {}
    let number = |key, default| machine.number(key).unwrap_or(default);
    let job = Job {
        count: number("count", 1000),
        size: number("size", 60).clamp(60, LONGEST) as usize,
        depth: number("depth", DEPTH as u64).clamp(1, DEPTH as u64) as usize,
        done: 0,
        device,
    };
    // SAFETY: nothing else runs.
    unsafe { *JOB.at() = Some(job) };
    let fault = user(send, 0);
    // SAFETY: ring 3 has ended.
    let (done, count) = unsafe { (*JOB.at()).as_ref().map_or((0, 1), |job| (job.done, job.count)) };
    if fault.vector == Fault::END && done == count {
        exit(0);
    }
    equal("the driver in ring 3 came to its end", u64::from(fault.vector), u64::from(Fault::END));
    equal("frames that were sent", done, count);
    finish()
}

/// Ends the function in ring 3.
fn end() -> ! {
    // SAFETY: the handler in ring 0 takes over.
    unsafe { core::arch::asm!("ud2", options(noreturn)) }
}

impl Job {
    fn start(&mut self, slot: usize) {
        // SAFETY: the slot is not under way.
        let frame = unsafe { &raw mut (*FRAMES.at()).0[slot] };
        // SAFETY: as above.
        unsafe {
            // To everybody, from a local address.
            (frame.cast::<u8>()).add(HEADER).write_bytes(0xff, 6);
            (frame.cast::<u8>()).add(HEADER + 6).write_bytes(0x02, 6);
            (frame.cast::<[u8; 2]>()).byte_add(HEADER + 12).write_volatile(LOCAL_EXPERIMENTAL);
        }
        let length = (HEADER + self.size) as u32;
        self.device.queue(slot as u16, &[Part { address: frame as u64, length, written: false }]);
    }
}

/// Sends all frames, `depth` of them under way. The device is told once for all that were made since the last time.
extern "C" fn send(_: u64) {
    // SAFETY: ring 3 alone uses it while it runs.
    let Some(job) = (unsafe { (*JOB.at()).as_mut() }) else { end() };
    let mut free: [usize; DEPTH] = core::array::from_fn(|slot| slot);
    let (mut begun, mut idle) = (0, job.depth);
    while job.done < job.count {
        while idle > 0 && begun < job.count {
            idle -= 1;
            job.start(free[idle]);
            begun += 1;
        }
        job.device.notify();
        let mut sent = loop {
            match job.device.take() {
                None => core::hint::spin_loop(),
                sent => break sent,
            }
        };
        while let Some((slot, _)) = sent {
            free[idle] = usize::from(slot) % DEPTH;
            idle += 1;
            job.done += 1;
            sent = job.device.take();
        }
    }
    end()
}
