//! Every chore of the repository: `cargo xtask …`.
//!
//! One file per command. A chore works on a new machine that has rustup and nothing else: what it lacks it installs, and says so
//! ([`host`]).

mod bench;
mod demo;
mod deps;
mod guests;
mod host;
mod lint;
mod plugins;
mod process;
mod programs;
mod test;
mod tree;
mod wit;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Chores of the Tenon repository.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version)]
struct Args {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Build everything and boot Debian on the engine that fits this host
    Demo(demo::Options),
    /// Run every check and every test, as CI does
    Test(test::Options),
    /// Check formatting and run clippy
    Lint,
    /// Check formatting
    Format,
    /// Run clippy; every warning is an error
    Clippy,
    /// Check that dependencies point the way that DESIGN.md says
    Deps,
    /// Check that the plugin contract is compatible with the committed baseline
    WitCheck,
    /// Write the plugin contract's reference to the target folder's doc/contract
    WitDocs,
    /// Make the guests: Debian's kernel, its initramfs, the bare guests
    Guests(guests::Options),
    /// Build the tenon command with its bundled plugins
    Build,
    /// Measure against a peer, side by side
    #[command(subcommand)]
    Bench(bench::Bench),
}

fn main() -> std::process::ExitCode {
    match run(Args::parse().chore) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

fn run(chore: Chore) -> Result<()> {
    match chore {
        Chore::Demo(options) => demo::run(&options),
        Chore::Test(options) => test::run(&options),
        Chore::Lint => lint::run_all(),
        Chore::Format => lint::format(),
        Chore::Clippy => lint::clippy(),
        Chore::Deps => deps::run(),
        Chore::WitCheck => wit::check::run(),
        Chore::WitDocs => wit::docs::run(),
        Chore::Guests(options) => guests::run(&options),
        Chore::Build => plugins::build_all().map(drop),
        Chore::Bench(bench) => bench::run(&bench),
    }
}
