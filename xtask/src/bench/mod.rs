//! `cargo xtask bench`: measures Tenon and a peer side by side, in turns, and prints ratios.
//!
//! Medians of several runs; the machine should have nothing else to do. Results are also written as JSON to the target folder's `bench`.

mod blk;
mod boot;
mod disk;
mod exit;
mod net;
mod start;

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use serde::Serialize;

use crate::demo::Summary;
use crate::process::{command, shown};
use crate::{host, plugins, tree};

/// What to measure.
#[derive(Subcommand)]
pub(crate) enum Bench {
    /// Requests to a virtio disk: component, native library, and the host's io_uring without a machine
    Blk(Rounds),
    /// Debian to its shell: the software engine and QEMU's TCG
    Boot(Rounds),
    /// A whole Debian from a virtio disk to its login: the software engine and QEMU's TCG
    Disk(Rounds),
    /// One register access: component, native library, built-in
    Exit(Rounds),
    /// What a virtio network card sends, in frames and over TCP: component and native library
    Net(Rounds),
    /// From the start of the process to the guest's first instruction, and memory beyond the guest's: Tenon and QEMU
    Start(Rounds),
}

/// How often.
#[derive(Args)]
pub(crate) struct Rounds {
    /// How many runs of each; the median counts
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
}

/// Measures.
///
/// # Errors
/// Something does not build or run.
pub(crate) fn run(bench: &Bench) -> Result<()> {
    host::prepare()?;
    host::prepare_peer()?;
    plugins::build_command()?;
    plugins::build_bundled()?;
    match bench {
        Bench::Blk(rounds) => blk::run(rounds.rounds),
        Bench::Boot(rounds) => boot::run(rounds.rounds),
        Bench::Disk(rounds) => disk::run(rounds.rounds),
        Bench::Exit(rounds) => exit::run(rounds.rounds),
        Bench::Net(rounds) => net::run(rounds.rounds),
        Bench::Start(rounds) => start::run(rounds.rounds),
    }
}

/// `tenon run`.
fn tenon() -> Result<Command> {
    let mut tenon = command(tree::release()?.join("tenon"));
    tenon.arg("run").stdin(Stdio::null());
    Ok(tenon)
}

/// Runs `tenon run` and returns its summary.
fn summary_of(tenon: &mut Command) -> Result<Summary> {
    let scratch = tempfile::tempdir().context("cannot make a temporary folder")?;
    let file = scratch.path().join("summary.json");
    let output = tenon
        .arg("--summary")
        .arg(&file)
        .output()
        .with_context(|| format!("cannot start `{}`", shown(tenon)))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("`{}` failed: {}\n{}", shown(tenon), output.status, said.trim_end());
    }
    serde_json::from_str(&fs::read_to_string(&file)?).context("tenon's summary is not what was expected")
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// A bare guest, by name.
fn bare(name: &str) -> Result<PathBuf> {
    crate::guests::bare()?
        .into_iter()
        .find(|guest| guest.file_name().is_some_and(|file| file == name))
        .with_context(|| format!("there is no bare guest `{name}`"))
}

fn write(name: &str, result: &impl Serialize) -> Result<()> {
    let folder = tree::target()?.join("bench");
    fs::create_dir_all(&folder)?;
    let file = folder.join(format!("{name}.json"));
    fs::write(&file, serde_json::to_string_pretty(result)?)
        .with_context(|| format!("cannot write {}", file.display()))?;
    eprintln!("bench: {}", file.display());
    Ok(())
}
