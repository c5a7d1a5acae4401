//! Fuzzing that an ordinary test can do: targets that take any bytes, a corpus of them in a folder, and mutations by numbers that are the same in every run.
//!
//! A target is a function of bytes that panics only where a promise is broken. It says what happened in words ([`Seen`]); an input that reaches something new is mutated
//! further. The same function serves `cargo fuzz`, for which nothing here is needed but [`Input`].
//!
//! ```
//! use tenon_testkit::fuzz::{Input, Seen, run};
//!
//! fn target(data: &[u8]) -> Seen {
//!     let mut input = Input::new(data);
//!     Seen::from([if input.u8() == 0 { "nothing".into() } else { "something".into() }])
//! }
//!
//! let folder = std::env::temp_dir().join(format!("tenon-corpus-{}", std::process::id()));
//! std::fs::create_dir(&folder).unwrap();
//! std::fs::write(folder.join("nothing"), [0, 1]).unwrap();
//! let report = run(&folder, 100, target);
//! assert!(report.count("something") > 0);
//! # std::fs::remove_dir_all(&folder).unwrap();
//! ```
//!
//! `TENON_FUZZ_RUNS=1000000` runs longer, `TENON_FUZZ_SEED=2` elsewhere, and with `TENON_FUZZ_SAVE=1` what reaches something new is added to the corpus.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;

use crate::random::Random;

pub use crate::virtio::fuzz::{Exchange, virtio};

/// The longest input.
const MOST: usize = 8192;

/// What happened to an input, in words.
pub type Seen = BTreeSet<String>;

/// Any bytes as numbers; zeroes after their end.
#[derive(Clone, Copy, Debug)]
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// The whole input.
    #[must_use]
    pub const fn new(data: &'a [u8]) -> Self {
        Self(data)
    }

    /// Whether nothing is left.
    #[must_use]
    pub const fn is_over(&self) -> bool {
        self.0.is_empty()
    }

    /// So many bytes, or what is left.
    pub fn take(&mut self, count: usize) -> &'a [u8] {
        let (now, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        now
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let bytes = self.take(N);
        array[..bytes.len()].copy_from_slice(bytes);
        array
    }

    /// A byte.
    pub fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.array())
    }

    /// A little-endian number of two bytes.
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// A little-endian number of eight bytes.
    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// What is left, as a file that is mostly zeroes: pieces with an offset in units of 8 bytes (two bytes), a length (one byte) and so many bytes. A length of 0 makes the
    /// file reach to the offset. At most 512 KiB and a little.
    #[must_use]
    pub fn sparse(mut self) -> Vec<u8> {
        let mut file = Vec::new();
        while !self.is_over() {
            let (start, length) = (usize::from(self.u16()) * 8, usize::from(self.u8()));
            let bytes = self.take(length);
            file.resize(file.len().max(start + bytes.len()), 0);
            file[start..start + bytes.len()].copy_from_slice(bytes);
        }
        file
    }
}

/// What came of a run.
#[derive(Clone, Debug)]
pub struct Report {
    /// Inputs of the corpus.
    pub known: usize,
    /// Mutations that were tried.
    pub runs: u64,
    /// What happened, and for how many inputs.
    pub seen: BTreeMap<String, u64>,
}

impl Report {
    /// For how many inputs something happened that begins with these words; one input may count several times.
    #[must_use]
    pub fn count(&self, words: &str) -> u64 {
        self.seen.iter().filter(|(what, _)| what.starts_with(words)).map(|(_, count)| count).sum()
    }
}

/// Gives a target every file of a folder, and then `runs` mutations of them.
///
/// # Panics
/// The target does, after the input was shown; or the folder cannot be read.
pub fn run(corpus: &Path, runs: u64, target: impl Fn(&[u8]) -> Seen) -> Report {
    let read = || -> std::io::Result<Vec<Vec<u8>>> {
        let mut files =
            std::fs::read_dir(corpus)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>()?;
        files.sort();
        files.iter().map(std::fs::read).collect()
    };
    let mut pool = read().unwrap_or_else(|error| panic!("the corpus {}: {error}", corpus.display()));
    assert!(!pool.is_empty(), "the corpus {} is empty", corpus.display());
    let number = |variable| std::env::var(variable).ok().and_then(|text| text.parse().ok());
    let (runs, save) = (number("TENON_FUZZ_RUNS").unwrap_or(runs), std::env::var("TENON_FUZZ_SAVE").is_ok());
    let mut random = Random::new(number("TENON_FUZZ_SEED").unwrap_or(1));
    let mut report = Report { known: pool.len(), runs, seen: BTreeMap::new() };
    let mut try_one = |input: &[u8]| {
        let seen = catch_unwind(AssertUnwindSafe(|| target(input))).unwrap_or_else(|panic| {
            eprintln!("the input is {input:02x?}");
            resume_unwind(panic)
        });
        let before = report.seen.len();
        for what in seen {
            *report.seen.entry(what).or_insert(0) += 1;
        }
        report.seen.len() > before
    };
    for input in &pool {
        try_one(input);
    }
    for _ in 0..runs {
        let mut input = pool[random.index(pool.len())].clone();
        mutate(&mut random, &mut input, &pool);
        if try_one(&input) {
            if save {
                let sum = input.iter().fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| {
                    (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
                });
                if let Err(error) = std::fs::write(corpus.join(format!("{sum:016x}")), &input) {
                    panic!("the corpus {}: {error}", corpus.display());
                }
            }
            pool.push(input);
        }
    }
    println!("{}: {} inputs, {} runs", corpus.display(), report.known, report.runs);
    for (what, count) in &report.seen {
        println!("{count:8} {what}");
    }
    report
}

/// Changes an input in one to four places.
fn mutate(random: &mut Random, input: &mut Vec<u8>, pool: &[Vec<u8>]) {
    /// Where programs go wrong.
    const EDGES: [u64; 12] =
        [0, 1, 2, 0x7f, 0x80, 0xff, 0x7fff, 0xffff, 0x7fff_ffff, 0xffff_ffff, i64::MAX as u64, u64::MAX];
    for _ in 0..=random.below(3) {
        let at = random.index(input.len() + 1);
        match random.below(8) {
            0 => input.insert(at, random.byte()),
            1 => drop(input.drain(at..input.len().min(at + random.index(8)))),
            2 => {
                let other = &pool[random.index(pool.len())];
                let from = random.index(other.len() + 1);
                let to = other.len().min(from + random.index(32));
                input.splice(at..at, other[from..to].iter().copied());
            }
            3 => input.extend((0..random.below(16)).map(|_| random.byte())),
            // What ends early is refused early.
            4 if random.below(4) == 0 => input.truncate(at),
            4 | 5 => {
                let (edge, width) = (EDGES[random.index(EDGES.len())], 1 << random.below(4));
                let (little, big) = (edge.to_le_bytes(), edge.to_be_bytes());
                let bytes = if random.below(2) == 0 { &little[..width] } else { &big[8 - width..] };
                input.iter_mut().skip(at).zip(bytes).for_each(|(to, from)| *to = *from);
            }
            6 => {
                if let Some(byte) = input.get_mut(at) {
                    *byte = random.byte();
                }
            }
            _ => {
                if let Some(byte) = input.get_mut(at) {
                    *byte ^= 1 << random.below(8);
                }
            }
        }
    }
    input.truncate(MOST);
}

#[cfg(test)]
mod tests {
    use super::Input;

    #[test]
    fn a_sparse_file_is_what_its_pieces_say() {
        let pieces = [1, 0, 2, b'a', b'b', 4, 0, 0, 0, 0, 1, b'c'];
        let mut file = [0; 32];
        (file[0], file[8], file[9]) = (b'c', b'a', b'b');
        assert_eq!(Input::new(&pieces).sparse(), file);
        assert_eq!(Input::new(&[0, 0, 200, 7]).sparse(), [7], "a piece ends where the input does");
    }
}
