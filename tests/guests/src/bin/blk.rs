//! Drives a virtio disk, in ring 3 after it was brought up: checks what it reads back, or does `count=` requests of `size=` bytes with `depth=` of them under way, for `cargo xtask bench blk`:
//! `write=1` writes, `random=1` jumps about. Every block holds its own number, so that wrong data is found. Needs 128 MiB of memory.
#![no_std]
#![no_main]

use bare_guests::boot::Machine;
use bare_guests::check::{equal, exit, finish, holds};
use bare_guests::tables::Shared;
use bare_guests::virtio::{Device, Part};
use bare_guests::{Fault, user};

bare_guests::guest!(main);

const BLOCK_DEVICE: u32 = 2;
const FLUSH_FEATURE: u32 = 1 << 9;
const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
/// The most requests under way.
const DEPTH: usize = 32;
/// The longest request.
const LONGEST: usize = 1 << 20;
const SECTOR: u64 = 512;

#[repr(C)]
struct Header {
    kind: u32,
    reserved: u32,
    sector: u64,
}

#[repr(C, align(4096))]
struct Slots {
    headers: [Header; DEPTH],
    status: [u8; DEPTH],
}

static SLOTS: Shared<Slots> = Shared::new(Slots {
    headers: [const { Header { kind: 0, reserved: 0, sector: 0 } }; DEPTH],
    status: [0; DEPTH],
});
/// Where the data of the slots is: free memory, from 64 MiB on.
const DATA: *mut u8 = 0x0400_0000 as *mut u8;

struct Job {
    device: Device,
    count: u64,
    size: u32,
    depth: usize,
    kind: u32,
    random: bool,
    blocks: u64,
    wrong: u64,
}

static JOB: Shared<Option<Job>> = Shared::new(None);

fn main(machine: &Machine) {
    let Some(device) = Device::begin(BLOCK_DEVICE, FLUSH_FEATURE) else {
        holds("a disk is found and accepts its driver", false);
        finish()
    };
    let number = |key, default| machine.number(key).unwrap_or(default);
    let size = number("size", 4096).clamp(SECTOR, LONGEST as u64);
    let job = Job {
        count: number("count", 0),
        size: size as u32,
        depth: number("depth", 1).clamp(1, DEPTH as u64) as usize,
        kind: if number("write", 0) == 1 { WRITE } else { READ },
        random: number("random", 0) == 1,
        blocks: device.config(0) * SECTOR / size,
        wrong: 0,
        device,
    };
    // SAFETY: nothing else runs.
    unsafe { *JOB.at() = Some(job) };
    let bench = machine.number("count").is_some();
    let fault = user(if bench { measure } else { verify }, 0);
    // SAFETY: ring 3 has ended.
    let wrong = unsafe { (*JOB.at()).as_ref().map_or(1, |job| job.wrong) };
    if bench {
        exit(u8::from(fault.vector != Fault::END || wrong != 0));
    }
    equal("the driver in ring 3 came to its end", u64::from(fault.vector), u64::from(Fault::END));
    equal("requests that failed or brought wrong data", wrong, 0);
    finish()
}

/// Ends the function in ring 3.
fn end() -> ! {
    // SAFETY: the handler in ring 0 takes over.
    unsafe { core::arch::asm!("ud2", options(noreturn)) }
}

fn job() -> &'static mut Job {
    // SAFETY: ring 3 alone uses it while it runs.
    match unsafe { (*JOB.at()).as_mut() } {
        Some(job) => job,
        None => end(),
    }
}

/// What the first and last word of a block hold.
fn mark(block: u64) -> u64 {
    (block + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

impl Job {
    fn words(&self, slot: usize) -> [*mut u64; 2] {
        let start = DATA.wrapping_add(slot * LONGEST);
        [start.cast(), start.wrapping_add(self.size as usize - 8).cast()]
    }

    fn start(&mut self, slot: usize, kind: u32, block: u64) {
        let slots = SLOTS.at();
        let sector = block * u64::from(self.size) / SECTOR;
        // SAFETY: the slot is not under way.
        unsafe {
            (*slots).headers[slot] = Header { kind, reserved: 0, sector };
            (*slots).status[slot] = 0xff;
            for word in self.words(slot) {
                word.write_volatile(if kind == WRITE { mark(block) } else { 0 });
            }
            let header =
                Part { address: &raw const (*slots).headers[slot] as u64, length: 16, written: false };
            let data = Part { address: self.words(slot)[0] as u64, length: self.size, written: kind == READ };
            let status = Part { address: &raw const (*slots).status[slot] as u64, length: 1, written: true };
            let first = slot as u16 * 3;
            if kind == FLUSH {
                self.device.queue(first, &[header, status]);
            } else {
                self.device.queue(first, &[header, data, status]);
            }
        }
    }

    /// Takes an answer, if there is one; gives its slot.
    fn answer(&mut self) -> Option<usize> {
        let (first, _) = self.device.take()?;
        let slot = usize::from(first / 3) % DEPTH;
        // SAFETY: the request has ended.
        if unsafe { (&raw const (*SLOTS.at()).status[slot]).read_volatile() } != 0 {
            self.wrong += 1;
        }
        Some(slot)
    }

    /// Waits for an answer; gives its slot.
    fn finish(&mut self) -> usize {
        loop {
            match self.answer() {
                Some(slot) => return slot,
                None => core::hint::spin_loop(),
            }
        }
    }
}

/// As many requests as asked for, `depth` of them under way. The device is told once for all that were made since the last time.
extern "C" fn measure(_: u64) {
    let job = job();
    let mut state = 0x1234_5678_9abc_def1u64;
    let (mut begun, mut done) = (0, 0);
    let mut free: [usize; DEPTH] = core::array::from_fn(|slot| slot);
    let mut idle = job.depth;
    while done < job.count {
        while idle > 0 && begun < job.count {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let block = if job.random { state % job.blocks } else { begun % job.blocks };
            idle -= 1;
            job.start(free[idle], job.kind, block);
            begun += 1;
        }
        job.device.notify();
        free[idle] = job.finish();
        idle += 1;
        done += 1;
        // Whatever else has ended by now, so that the next notification stands for as many requests.
        while done < job.count
            && let Some(slot) = job.answer()
        {
            free[idle] = slot;
            idle += 1;
            done += 1;
        }
    }
    end()
}

/// Writes blocks all over the disk, flushes, and reads them back with all slots under way.
extern "C" fn verify(_: u64) {
    const ROUNDS: u64 = 64;
    let job = job();
    let stride = job.blocks / ROUNDS;
    for round in 0..ROUNDS {
        job.start(0, WRITE, round * stride);
        job.device.notify();
        job.finish();
    }
    job.start(0, FLUSH, 0);
    job.device.notify();
    job.finish();
    let mut at = [0; DEPTH];
    for half in 0..ROUNDS / DEPTH as u64 {
        for slot in 0..DEPTH {
            at[slot] = (half * DEPTH as u64 + slot as u64) * stride;
            job.start(slot, READ, at[slot]);
        }
        job.device.notify();
        for _ in 0..DEPTH {
            let slot = job.finish();
            for word in job.words(slot) {
                // SAFETY: the request has ended.
                if unsafe { word.read_volatile() } != mark(at[slot]) {
                    job.wrong += 1;
                }
            }
        }
    }
    // Past the end: an error, and no harm.
    let before = job.wrong;
    job.start(0, READ, job.blocks + 1);
    job.device.notify();
    job.finish();
    job.wrong = if job.wrong == before + 1 { before } else { before + 1 };
    end()
}
