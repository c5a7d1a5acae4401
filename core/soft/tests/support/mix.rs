//! What a Linux system executes, and where each instruction is covered.

use std::collections::BTreeMap;
use std::fmt::Write;

use iced_x86::{Code, Mnemonic};

const MIX: &str = include_str!("../data/instruction-mix.txt");

/// Instructions of the list that this test cannot judge: of ring 0 or other modes (bare guests execute them), with results
/// that are the machine's own (time, identity), or of extensions that the engine's CPU does not show.
const ELSEWHERE: &[(&str, &str)] = &[
    (".byte", "data that the disassembler met"),
    ("cli", "ring 0"),
    ("cmpxchg16b", "not shown by CPUID"),
    ("cpuid", "the engine's own answer"),
    ("hlt", "ring 0"),
    ("inb", "ring 0"),
    ("inl", "ring 0"),
    ("int", "ring 0: gates"),
    ("int3", "ends every case"),
    ("invlpg", "ring 0"),
    ("inw", "ring 0"),
    ("iretq", "ring 0: the handlers' way back"),
    ("iretw", "real mode"),
    ("lgdtl", "ring 0"),
    ("lgdtq", "ring 0"),
    ("lgdtw", "ring 0"),
    ("lidtl", "ring 0"),
    ("lidtq", "ring 0"),
    ("lidtw", "ring 0"),
    ("ljmpl", "mode changes"),
    ("ljmpw", "mode changes"),
    ("lldtw", "ring 0"),
    ("lock cmpxchg16b", "not shown by CPUID"),
    ("lretl", "mode changes"),
    ("lretq", "mode changes"),
    ("lretw", "mode changes"),
    ("ltrw", "ring 0"),
    ("outb", "ring 0"),
    ("outl", "ring 0"),
    ("outw", "ring 0"),
    ("popal", "32-bit code"),
    ("pushal", "32-bit code"),
    ("rdmsr", "ring 0"),
    ("rdtsc", "the machine's own time"),
    ("rep insb", "ring 0"),
    ("rsm", "system management mode"),
    ("sgdtl", "ring 0"),
    ("sgdtq", "ring 0"),
    ("sti", "ring 0"),
    ("swapgs", "ring 0"),
    ("syscall", "ring 0's entry"),
    ("sysretq", "ring 0"),
    ("tzcntq", "not shown by CPUID: executes as BSF"),
    ("wbinvd", "ring 0"),
    ("wrmsr", "ring 0"),
];

/// AT&T names that are not the Intel name with a size behind it.
const NAMES: &[(&str, Mnemonic)] = &[
    ("movabsq", Mnemonic::Mov),
    ("cltq", Mnemonic::Cdqe),
    ("cltd", Mnemonic::Cdq),
    ("cqto", Mnemonic::Cqo),
    ("movslq", Mnemonic::Movsxd),
    ("fldt", Mnemonic::Fld),
    ("fstpt", Mnemonic::Fstp),
    ("movsl", Mnemonic::Movsd),
    ("stosl", Mnemonic::Stosd),
    ("popfl", Mnemonic::Popfq),
    ("pushfl", Mnemonic::Pushfq),
    ("pushfw", Mnemonic::Pushf),
];

fn mnemonic(att: &str) -> Option<Mnemonic> {
    let name = att.rsplit(' ').next().unwrap_or(att);
    if let Some(&(_, mnemonic)) = NAMES.iter().find(|(special, _)| *special == name) {
        return Some(mnemonic);
    }
    let by_name =
        |name: &str| Mnemonic::values().find(|mnemonic| format!("{mnemonic:?}").eq_ignore_ascii_case(name));
    let extension = name.len() == 6 && (name.starts_with("movz") || name.starts_with("movs"));
    if extension && name != "movsxd" {
        return Some(if name.starts_with("movz") { Mnemonic::Movzx } else { Mnemonic::Movsx });
    }
    by_name(name).or_else(|| by_name(name.strip_suffix(['b', 'w', 'l', 'q'])?))
}

/// Writes `instruction-mix-coverage.tsv`, and panics if an instruction is covered nowhere.
pub fn check(counts: &BTreeMap<Code, (u64, u64)>) {
    let mut text = String::from("instruction\tcovered by\n");
    let mut uncovered = Vec::new();
    for att in MIX.lines().filter(|line| !line.starts_with('#')) {
        if let Some((_, why)) = ELSEWHERE.iter().find(|(name, _)| *name == att) {
            let _ = writeln!(text, "{att}\tbare guests and booting ({why})");
            continue;
        }
        let completed: u64 = mnemonic(att).map_or(0, |mnemonic| {
            counts
                .iter()
                .filter(|(code, _)| code.mnemonic() == mnemonic)
                .map(|(_, (cases, faults))| cases - faults)
                .sum()
        });
        if completed == 0 {
            uncovered.push(att);
        }
        let _ = writeln!(text, "{att}\tthe host CPU, {completed} cases without a fault");
    }
    std::fs::write(concat!(env!("CARGO_TARGET_TMPDIR"), "/instruction-mix-coverage.tsv"), text)
        .expect("writable");
    assert!(uncovered.is_empty(), "covered nowhere: {uncovered:?}");
}
