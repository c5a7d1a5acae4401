//! `fsx`: does random things to a file, and compares all of it with what it should hold.
//!
//! `fsx FILE SEED STEPS` writes, reads, truncates, punches holes, zeroes ranges and writes through a mapping, each at random; now and then it makes the file durable and has
//! the kernel forget it, so that it comes from the disk again. It prints `fsx ok` with what it did, or what is wrong and where, and ends with 0; with 1 if the content is wrong; with
//! 5 if the file system gives an error. The file may hold what an earlier run left: with 0 steps, its content is compared with what that run left.

use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::process::ExitCode;

unsafe extern "C" {
    fn mmap(address: *mut u8, length: usize, rights: i32, flags: i32, file: i32, offset: i64) -> *mut u8;
    fn munmap(address: *mut u8, length: usize) -> i32;
    fn msync(address: *mut u8, length: usize, flags: i32) -> i32;
    fn fallocate(file: i32, mode: i32, offset: i64, length: i64) -> i32;
    fn posix_fadvise(file: i32, offset: i64, length: i64, advice: i32) -> i32;
}

/// From the kernel's uapi headers: mman-common.h, falloc.h, fadvise.h.
const READ_WRITE: i32 = 3;
const SHARED: i32 = 1;
const SYNC: i32 = 4;
const KEEP_SIZE: i32 = 1;
const PUNCH_HOLE: i32 = 2;
const ZERO_RANGE: i32 = 16;
const DONT_NEED: i32 = 4;

/// The longest file, and the longest range that is touched at once.
const MOST: u64 = 4 << 20;
const MOST_TOUCHED: u64 = 96 << 10;

/// Xorshift64* (Vigna 2016).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 8) % limit.max(1)
    }
}

struct Exerciser {
    file: File,
    /// What the file should hold.
    model: Vec<u8>,
    random: Random,
    counts: [u64; 9],
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [path, seed, steps] = words.as_slice() else {
        eprintln!("fsx: usage: fsx FILE SEED STEPS");
        return ExitCode::from(2);
    };
    let (Ok(seed), Ok(steps)) = (seed.parse::<u64>(), steps.parse::<u64>()) else {
        eprintln!("fsx: SEED and STEPS are numbers");
        return ExitCode::from(2);
    };
    match exercise(path, seed, steps) {
        Ok(counts) => {
            println!("fsx ok: {path}: {counts:?}");
            ExitCode::SUCCESS
        }
        Err(error) if error.kind() == ErrorKind::InvalidData => {
            println!("fsx WRONG: {path}: {error}");
            ExitCode::FAILURE
        }
        Err(error) => {
            println!("fsx error: {path}: {error}");
            ExitCode::from(5)
        }
    }
}

fn exercise(path: &str, seed: u64, steps: u64) -> Result<[u64; 9]> {
    let kept = format!("{path}.sum");
    let file = File::options().read(true).write(true).create(true).truncate(steps > 0).open(path)?;
    let mut exerciser = Exerciser { file, model: Vec::new(), random: Random(seed * 2 + 1), counts: [0; 9] };
    if steps == 0 {
        let length = usize::try_from(exerciser.file.metadata()?.len()).map_err(Error::other)?;
        let mut content = vec![0; length];
        exerciser.file.read_exact_at(&mut content, 0)?;
        let (left, found) = (std::fs::read_to_string(kept)?, sum(&content));
        return if left == found { Ok([0; 9]) } else { Err(wrong(&format!("its sum is {found}, but was {left}"))) };
    }
    for _ in 0..steps {
        exerciser.step()?;
    }
    exerciser.forget()?;
    exerciser.compare(0, MOST)?;
    let file = File::create(kept)?;
    file.write_all_at(sum(&exerciser.model).as_bytes(), 0)?;
    file.sync_all()?;
    Ok(exerciser.counts)
}

/// FNV-1a, and the length.
fn sum(bytes: &[u8]) -> String {
    let sum = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    });
    format!("{sum:016x} {}", bytes.len())
}

fn wrong(what: &str) -> Error {
    Error::new(ErrorKind::InvalidData, what.to_owned())
}

fn check(result: i32) -> Result<()> {
    if result == 0 { Ok(()) } else { Err(Error::last_os_error()) }
}

impl Exerciser {
    fn length(&self) -> u64 {
        self.model.len() as u64
    }

    /// A range, in bytes or now and then in pages, that ends inside `limit`.
    fn range(&mut self, limit: u64) -> (u64, u64) {
        let (mut start, mut length) = (self.random.below(limit), 1 + self.random.below(MOST_TOUCHED));
        if self.random.below(3) == 0 {
            (start, length) = (start / 4096 * 4096, length.next_multiple_of(4096));
        }
        (start, length.min(limit.saturating_sub(start)))
    }

    fn step(&mut self) -> Result<()> {
        let what = self.random.below(40);
        let kind = match what {
            0..14 => self.write()?,
            14..22 => {
                let (start, length) = self.range(self.length());
                self.compare(start, length)?;
                1
            }
            22..25 => {
                let length = self.random.below(MOST);
                self.file.set_len(length)?;
                self.model.resize(length as usize, 0);
                2
            }
            25..29 => self.clear(PUNCH_HOLE | KEEP_SIZE, 3)?,
            29..32 => self.clear(ZERO_RANGE | KEEP_SIZE, 4)?,
            32..37 => self.map()?,
            37 => {
                self.file.sync_data()?;
                6
            }
            _ => {
                self.forget()?;
                self.compare(0, MOST)?;
                7
            }
        };
        self.counts[kind] += 1;
        Ok(())
    }

    fn write(&mut self) -> Result<usize> {
        let (start, length) = self.range(MOST);
        let seed = self.random.below(256) as u8;
        let bytes: Vec<u8> = (0..length).map(|at| (at as u8).wrapping_mul(31) ^ seed).collect();
        self.file.write_all_at(&bytes, start)?;
        let end = (start + length) as usize;
        self.model.resize(self.model.len().max(end), 0);
        self.model[start as usize..end].copy_from_slice(&bytes);
        Ok(0)
    }

    /// Punches a hole or zeroes a range, inside the file's length.
    fn clear(&mut self, mode: i32, kind: usize) -> Result<usize> {
        let (start, length) = self.range(self.length());
        if length > 0 {
            // SAFETY: the descriptor is open.
            check(unsafe { fallocate(self.file.as_raw_fd(), mode, start as i64, length as i64) })?;
            self.model[start as usize..(start + length) as usize].fill(0);
        }
        Ok(kind)
    }

    /// Reads and writes through a mapping.
    fn map(&mut self) -> Result<usize> {
        let (start, length) = self.range(self.length());
        if length == 0 {
            return Ok(8);
        }
        let first = start / 4096 * 4096;
        let whole = (start + length - first) as usize;
        // SAFETY: a new mapping of an open file; it is checked before it is used.
        let at = unsafe {
            mmap(std::ptr::null_mut(), whole, READ_WRITE, SHARED, self.file.as_raw_fd(), first as i64)
        };
        if at as isize == -1 {
            return Err(Error::last_os_error());
        }
        // SAFETY: the mapping is `whole` bytes long, inside the file's length, and nobody else's.
        let mapped = unsafe { std::slice::from_raw_parts_mut(at, whole) };
        let is_right = *mapped == self.model[first as usize..first as usize + whole];
        let (from, flip) = ((start - first) as usize, self.random.below(256) as u8);
        for (byte, model) in mapped[from..].iter_mut().zip(&mut self.model[start as usize..]) {
            *byte ^= flip;
            *model ^= flip;
        }
        let sync = self.random.below(2) == 0;
        // SAFETY: the mapping made above.
        unsafe {
            if sync {
                check(msync(at, whole, SYNC))?;
            }
            check(munmap(at, whole))?;
        }
        if is_right { Ok(5) } else { Err(wrong(&format!("a mapping of {whole} bytes from {first} on"))) }
    }

    /// Makes the file durable and has the kernel forget its content.
    fn forget(&self) -> Result<()> {
        self.file.sync_all()?;
        // SAFETY: the descriptor is open.
        check(unsafe { posix_fadvise(self.file.as_raw_fd(), 0, 0, DONT_NEED) })
    }

    fn compare(&self, start: u64, length: u64) -> Result<()> {
        let found = self.file.metadata()?.len();
        if found != self.length() {
            return Err(wrong(&format!("it has {found} bytes, but should have {}", self.length())));
        }
        let length = length.min(found.saturating_sub(start)) as usize;
        let mut content = vec![0; length];
        self.file.read_exact_at(&mut content, start)?;
        let model = &self.model[start as usize..start as usize + length];
        match content.iter().zip(model).position(|(found, right)| found != right) {
            None => Ok(()),
            Some(at) => Err(wrong(&format!(
                "byte {} is {:#04x}, but should be {:#04x}; {} of {length} bytes from {start} on are wrong",
                start as usize + at,
                content[at],
                model[at],
                content.iter().zip(model).filter(|(found, right)| found != right).count()
            ))),
        }
    }
}
