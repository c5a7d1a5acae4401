//! The engine against the host CPU in ring 3: random sequences of 64- and 32-bit instructions run natively and in a guest; registers, defined
//! flags, the FXSAVE image, memory, and the exception that ends each run (vector, error code, address) must be the same.
//!
//! `TENON_DIFF_CASES` sets the number of cases (200,000; nightly 10,000,000), `TENON_DIFF_SEED` where the random numbers
//! begin: a failure prints the seed of its own case, with which `TENON_DIFF_CASES=1` runs just that one. `TENON_DIFF_ONLY`
//! restricts the first instruction to a mnemonic. The forms covered, and how often, go to `soft-coverage.tsv` in cargo's
//! directory for test outputs (`target/tmp`); `instruction-mix-coverage.tsv` beside it says for each instruction that a Debian
//! boot executes whether this test or a bare guest covers it.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]
#![allow(unsafe_code, missing_docs, unreachable_pub)] // The host CPU is reached through mappings and signal frames.
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_possible_wrap)]

#[path = "support/forms.rs"]
mod forms;
#[path = "../fp/tests/support/generate.rs"]
mod generate;
#[path = "support/guest.rs"]
mod guest;
#[path = "support/mix.rs"]
mod mix;
#[path = "../fp/tests/support/native.rs"]
mod native;
#[path = "support/sequence.rs"]
mod sequence;

use std::collections::BTreeMap;
use std::fmt::Write;

use forms::forms;
use generate::Random;
use guest::Guest;
use iced_x86::Code;
use native::{CODE_SIZE, DATA_SIZE, End, Native};
use sequence::Case;
use tenon_soft::Soft;

/// CF, PF, AF, ZF, SF, DF, OF, IOPL, NT, ID. RF differs by convention of the frames.
const FLAGS: u64 = 0x20_7cd5;

fn env(name: &str, default: u64) -> u64 {
    let Ok(value) = std::env::var(name) else { return default };
    match value.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).expect("a hexadecimal number"),
        None => value.parse().expect("a number"),
    }
}

#[test]
fn ring_3_does_what_the_host_does() {
    let cases = env("TENON_DIFF_CASES", 200_000);
    let first_seed = env("TENON_DIFF_SEED", 1);
    let mut random = Random(first_seed);
    let only = std::env::var("TENON_DIFF_ONLY").ok();
    let wanted = |code: &Code| {
        only.as_ref().is_none_or(|name| format!("{:?}", code.mnemonic()).eq_ignore_ascii_case(name))
    };
    // Per mode: the forms for the first instruction, and for the others.
    let [long, compatible] = [64, 32].map(|bits| {
        let all = forms(bits);
        (all.iter().copied().filter(wanted).collect::<Vec<_>>(), all)
    });
    assert!(!long.0.is_empty() || !compatible.0.is_empty(), "no such mnemonic");
    let engine = Soft::new();
    let mut native = Native::new();
    let mut guest = Guest::new(&engine);
    let mut counts: BTreeMap<Code, (u64, u64)> =
        long.1.iter().chain(&compatible.1).map(|&code| (code, (0, 0))).collect();
    let mut wrong: BTreeMap<String, (u64, String)> = BTreeMap::new();
    for n in 0..cases {
        if guest.used_up() {
            guest = Guest::new(&engine);
        }
        let seed = if n == 0 { first_seed } else { random.next() };
        let mut own = Random(seed);
        let narrow = own.one_in(4) || long.0.is_empty();
        let (bits, (first, all)) =
            if narrow && !compatible.0.is_empty() { (32, &compatible) } else { (64, &long) };
        let Some(case) = Case::new(&mut own, bits, first, all) else { continue };
        let host = run_native(&mut native, &case);
        let mut data = case.data.clone();
        let ours = guest.run(&case.machine, &case.code, &mut data);
        for (n, instruction) in case.instructions.iter().enumerate() {
            let count = counts.entry(instruction.code()).or_default();
            count.0 += u64::from(n == 0 || host.vector == 3);
            count.1 += u64::from(n == 0 && host.vector != 3);
        }
        if let Some(difference) = compare(&case, &host, &ours, native.data(), &data) {
            if ours.is_err() {
                guest = Guest::new(&engine);
            }
            let name = if case.instructions.len() == 1 {
                format!("{:?}", case.instructions[0].code())
            } else {
                "sequence".into()
            };
            let entry =
                wrong.entry(name).or_insert_with(|| (0, format!("seed {seed:#x}: {difference}\n{case}")));
            entry.0 += 1;
        }
    }
    let mut report = String::new();
    for (code, (count, text)) in &wrong {
        let _ = writeln!(report, "{count} × {code}: {text}");
    }
    assert!(wrong.is_empty(), "{} forms differ:\n{report}", wrong.len());
    write_coverage(&counts);
    if only.is_none() && cases >= 200_000 {
        let missing: Vec<_> =
            counts.iter().filter(|(_, (cases, _))| *cases == 0).map(|(code, _)| code).collect();
        assert!(missing.is_empty(), "forms that no case executed: {missing:?}");
        mix::check(&counts);
    }
}

fn run_native(native: &mut Native, case: &Case) -> End {
    native.code().copy_from_slice(&case.code[..]);
    native.data().copy_from_slice(&case.data[..]);
    native.run(&case.machine)
}

/// What differs, in words.
fn compare(
    case: &Case,
    host: &End,
    ours: &Result<End, String>,
    host_data: &[u8; DATA_SIZE],
    our_data: &[u8; DATA_SIZE],
) -> Option<String> {
    let ours = match ours {
        Ok(ours) => ours,
        Err(error) => return Some(error.clone()),
    };
    let mut out = String::new();
    let mut differ = |what: &str, ours: u128, host: u128| {
        if ours != host {
            let _ = write!(out, "{what} {ours:#x} not {host:#x}; ");
        }
    };
    let (mine, theirs) = (&ours.machine, &host.machine);
    let piecewise = case.is_large(theirs.rip)
        && [12, 13, 14].contains(&host.vector)
        && [12, 13, 14].contains(&ours.vector);
    if !piecewise {
        differ("vector", ours.vector.into(), host.vector.into());
    }
    if ours.vector == host.vector {
        let mut error_mask = u64::MAX;
        if host.vector == 14 {
            if !case.is_large(theirs.rip) {
                differ("cr2", ours.cr2.into(), host.cr2.into());
            }
            if host.cr2 >= 0x7fff_ffff_f000 {
                error_mask = !1; // Linux hides whether addresses beyond the user's are mapped.
            }
        }
        if case.is_large(theirs.rip) {
            error_mask = 0;
        }
        differ("error code", (ours.error & error_mask).into(), (host.error & error_mask).into());
    }
    differ("rip", mine.rip.into(), theirs.rip.into());
    differ("cs", mine.cs.into(), theirs.cs.into());
    for i in 0..16 {
        differ(
            &format!("{:?}", iced_x86::Register::RAX + i as u32),
            mine.gpr[i].into(),
            theirs.gpr[i].into(),
        );
    }
    let mask = FLAGS & !case.undefined_flags(theirs.rip, host.vector);
    differ("rflags", (mine.rflags & mask).into(), (theirs.rflags & mask).into());
    let (a, mut b) = (fp(&mine.fp, host.vector == 19), fp(&theirs.fp, host.vector == 19));
    if host.vector != 3 && case.is_maskmovq(theirs.rip) {
        b = a; // AMD enters MMX before the address faults.
    }
    for at in (0..416).step_by(8) {
        let word = |image: &[u8; 416]| u64::from_le_bytes(image[at..at + 8].try_into().expect("8 bytes"));
        differ(&format!("fxsave+{at}"), word(&a).into(), word(&b).into());
    }
    if host_data != our_data {
        let untracked = case.untracked_bytes();
        let different =
            (0..DATA_SIZE).filter(|&at| host_data[at] != our_data[at] && !untracked.contains(&at));
        for at in different.take(8) {
            differ(&format!("data+{at:#x}"), our_data[at].into(), host_data[at].into());
        }
    }
    (!out.is_empty()).then_some(out)
}

/// The image without FOP, FIP, FDP and the MXCSR mask, which are not tracked, and without PE when an unmasked SIMD overflow
/// or underflow was reported, where it is approximate.
fn fp(image: &[u8; 512], simd_exception: bool) -> [u8; 416] {
    let mut out = [0; 416];
    out.copy_from_slice(&image[..416]);
    out[5..24].fill(0);
    out[28..32].fill(0);
    if simd_exception && out[24] & 0x18 != 0 {
        out[24] &= !0x20;
    }
    out
}

fn write_coverage(counts: &BTreeMap<Code, (u64, u64)>) {
    let mut text = String::from("form\tencoding\tcases\tended in a fault\n");
    for (code, (cases, faults)) in counts {
        let _ = writeln!(text, "{}\t{code:?}\t{cases}\t{faults}", code.op_code().instruction_string());
    }
    let path = concat!(env!("CARGO_TARGET_TMPDIR"), "/soft-coverage.tsv");
    std::fs::write(path, text).expect("cargo's directory for test outputs is writable");
}

const _: () = assert!(CODE_SIZE == 0x1000);
