//! The store against a loop that issues the same reads and writes to io_uring itself, on one thread: `cargo bench -p tenon-store-file [FOLDER]`.
//!
//! Each line compares the two in turns, on the same file; the ratio is the store's requests a second by the loop's.
#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "the host's side of a foreign-function interface, and a ring"
)]

#[path = "../tests/support/mod.rs"]
mod support;

use std::ffi::c_void;
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, types::Fd};
use support::Random;
use tenon_sdk::abi::{Bytes, Sink, Status, StoreOperation, wire};
use tenon_sdk::store::IoVec;
use tenon_store_file::PLUGIN;

const SIZE: u64 = 256 << 20;
const ROUND: Duration = Duration::from_millis(400);
const ROUNDS: u32 = 3;

/// One kind of load.
#[derive(Clone, Copy)]
struct Load {
    write: bool,
    block: u64,
    depth: usize,
    direct: bool,
}

impl Load {
    /// The place of the next request: random for small ones, one after the other for large ones.
    fn place(self, random: &mut Random, last: &mut u64) -> u64 {
        let blocks = SIZE / self.block;
        *last = if self.block < 1 << 20 { random.below(blocks) } else { (*last + 1) % blocks };
        *last * self.block
    }

    fn buffers(self) -> Vec<Vec<u8>> {
        (0..self.depth).map(|_| vec![1; usize::try_from(self.block).unwrap() + 4096]).collect()
    }
}

fn aligned(buffer: &mut [u8]) -> *mut u8 {
    let start = buffer.as_ptr().align_offset(4096);
    buffer[start..].as_mut_ptr()
}

/// The loop: requests done, and CPU seconds used.
fn ring(path: &Path, load: Load) -> (u64, f64) {
    let flags = if load.direct { libc::O_DIRECT } else { 0 };
    let file: File = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path).unwrap();
    let mut ring = IoUring::new(256).unwrap();
    let mut buffers = load.buffers();
    let (mut random, mut last, mut done) = (Random(7), 0, 0);
    let mut free: Vec<usize> = (0..load.depth).collect();
    let (start, cpu) = (Instant::now(), cpu_time());
    loop {
        let more = start.elapsed() < ROUND;
        if !more && free.len() == load.depth {
            return (done, cpu_time() - cpu);
        }
        while more && let Some(name) = free.pop() {
            let (base, length) = (aligned(&mut buffers[name]), u32::try_from(load.block).unwrap());
            let (fd, offset) = (Fd(file.as_raw_fd()), load.place(&mut random, &mut last));
            let entry = if load.write {
                opcode::Write::new(fd, base, length).offset(offset).build()
            } else {
                opcode::Read::new(fd, base, length).offset(offset).build()
            };
            // SAFETY: the buffer stays until all have ended.
            unsafe { ring.submission().push(&entry.user_data(name as u64)).unwrap() };
        }
        ring.submit_and_wait(1).unwrap();
        for entry in ring.completion() {
            assert_eq!(u64::try_from(entry.result()).unwrap(), load.block);
            done += 1;
            free.push(usize::try_from(entry.user_data()).unwrap());
        }
    }
}

#[derive(Default)]
struct Ended {
    tokens: Mutex<Vec<u64>>,
    wake: Condvar,
}

unsafe extern "C" fn done(context: *mut c_void, token: u64, error: u32) {
    assert_eq!(error, 0);
    // SAFETY: the context is an `Ended` that outlives the store.
    let ended = unsafe { &*context.cast::<Ended>() };
    let mut tokens = ended.tokens.lock().unwrap();
    tokens.push(token);
    if tokens.len() == 1 {
        ended.wake.notify_one();
    }
}

unsafe extern "C" fn log(_: *mut c_void, _: u32, _: Bytes<'_>) {}

/// The store: requests done, and CPU seconds used.
fn store(path: &Path, load: Load) -> (u64, f64) {
    let table = PLUGIN.store.unwrap();
    let mut calls = support::calls();
    (calls.done, calls.log_log) = (done, log);
    let ended = Ended::default();
    // SAFETY: table and context live until `destroy`.
    let instance = unsafe { (table.create)(&raw const calls, std::ptr::from_ref(&ended).cast_mut().cast()) };
    let direct = if load.direct { "yes" } else { "no" };
    let engine = std::env::var("TENON_ENGINE").unwrap_or_else(|_| "auto".to_owned());
    let settings = [("path", path.to_str().unwrap()), ("direct", direct), ("engine", &engine)]
        .map(|(key, value)| (key.to_owned(), value.to_owned()));
    let (config, mut output) = (wire::encode_settings(&settings), Vec::new());
    // SAFETY: everything is good for the call.
    let status = unsafe { (table.open)(instance, Bytes::new(&config), 0, Sink::to(&mut output)) };
    assert_eq!(status, Status::OK);

    let mut buffers = load.buffers();
    let vectors: Vec<IoVec> = buffers
        .iter_mut()
        .map(|buffer| IoVec { base: aligned(buffer), length: usize::try_from(load.block).unwrap() })
        .collect();
    let (mut random, mut last, mut count) = (Random(7), 0, 0);
    let mut free: Vec<u64> = (0..load.depth as u64).collect();
    let (mut batch, mut tokens) = (Vec::new(), Vec::new());
    let (start, cpu) = (Instant::now(), cpu_time());
    loop {
        let more = start.elapsed() < ROUND;
        if !more && free.len() == load.depth {
            break;
        }
        if more && !free.is_empty() {
            batch.clear();
            batch.extend(free.drain(..).map(|token| StoreOperation {
                token,
                kind: if load.write { StoreOperation::WRITE } else { StoreOperation::READ },
                flags: 0,
                position: load.place(&mut random, &mut last),
                length: load.block,
                vectors: &raw const vectors[usize::try_from(token).unwrap()],
                vector_count: 1,
            }));
            // SAFETY: the buffers stay until all have ended.
            unsafe { (table.submit)(instance, batch.as_ptr(), u32::try_from(batch.len()).unwrap()) };
        }
        let mut guard = ended.tokens.lock().unwrap();
        while guard.is_empty() {
            guard = ended.wake.wait(guard).unwrap();
        }
        std::mem::swap(&mut *guard, &mut tokens);
        drop(guard);
        count += tokens.len() as u64;
        free.append(&mut tokens);
    }
    let used = cpu_time() - cpu;
    // SAFETY: the last call.
    unsafe { (table.destroy)(instance) };
    (count, used)
}

/// CPU seconds of this process and of the kernel's threads for it.
fn cpu_time() -> f64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the structure is good for the call.
    let usage = unsafe {
        libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr());
        usage.assume_init()
    };
    [usage.ru_utime, usage.ru_stime].iter().map(|time| time.tv_sec as f64 + time.tv_usec as f64 / 1e6).sum()
}

fn main() {
    if !std::env::args().any(|argument| argument == "--bench") {
        return println!("not run: this measures, which `cargo bench` does");
    }
    let folder = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    let folder = folder.map_or_else(|| PathBuf::from(env!("CARGO_TARGET_TMPDIR")), PathBuf::from);
    let folder = tempfile::tempdir_in(folder).unwrap();
    let path = folder.path().join("disk.img");
    {
        use std::io::Write;
        let mut file = File::create(&path).unwrap();
        (0..SIZE >> 20).for_each(|_| file.write_all(&[3; 1 << 20]).unwrap());
        file.sync_all().unwrap();
    }
    println!(
        "{:<34} {:>10} {:>10} {:>6}   {:>8} {:>8}",
        "", "loop/s", "store/s", "ratio", "loop µs", "store µs"
    );
    for direct in [false, true] {
        for (block, what) in [(4096, "4 KiB random"), (1 << 20, "1 MiB in a row")] {
            for write in [false, true] {
                for depth in [1, 32] {
                    let load = Load { write, block, depth, direct };
                    let (mut plain, mut ours) = ((0, 0.0), (0, 0.0));
                    for _ in 0..ROUNDS {
                        let (count, cpu) = ring(&path, load);
                        plain = (plain.0 + count, plain.1 + cpu);
                        let (count, cpu) = store(&path, load);
                        ours = (ours.0 + count, ours.1 + cpu);
                    }
                    let seconds = (ROUND * ROUNDS).as_secs_f64();
                    let (loops, stores) = (plain.0 as f64, ours.0 as f64);
                    println!(
                        "{:<34} {:>10.0} {:>10.0} {:>6.2}   {:>8.1} {:>8.1}",
                        format!(
                            "{what} {}, depth {depth}{}",
                            if write { "write" } else { "read" },
                            if direct { ", direct" } else { "" }
                        ),
                        loops / seconds,
                        stores / seconds,
                        stores / loops,
                        plain.1 * 1e6 / loops,
                        ours.1 * 1e6 / stores,
                    );
                }
            }
        }
    }
}
