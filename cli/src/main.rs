//! The `tenon` command: the only place where engines, platform and plugins are put together.

mod args;
mod console;
mod devices;
mod disk_command;
mod disks;
mod doctor;
mod engine;
mod firmware;
mod guest;
mod networks;
mod places;
mod plugin;
mod plugins;
mod run;
mod say;
mod shares;
mod terminal;
mod trial;
mod trial_driver;
mod trial_medium;
mod trial_store;
mod trial_virtio;
mod vsock;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Instant;

use clap::{CommandFactory, Parser};
use tracing_subscriber::EnvFilter;

use args::{Cli, Command};
use say::{ReaderGone, tell};

/// Exit status: the command line is wrong.
const USAGE: u8 = 2;

/// An error that is the command line's: exit status 2.
#[derive(Debug)]
pub(crate) struct Usage(pub(crate) anyhow::Error);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&say::explain(&self.0))
    }
}

impl std::error::Error for Usage {}

fn main() -> ExitCode {
    let start = Instant::now();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(told) if told.use_stderr() => told.exit(),
        // Help, or the version.
        Err(told) => return end(say::printed(told.print().and_then(|()| std::io::stdout().flush()))),
    };
    // What this crate says is about its own code; errors reach the user anyway.
    let rules = if cli.log.contains("imago") { cli.log.clone() } else { format!("{},imago=off", cli.log) };
    match EnvFilter::builder().parse(rules) {
        Ok(filter) => {
            tracing_subscriber::fmt()
                .with_env_filter(filter)
                .with_writer(std::io::stderr)
                .with_ansi(is_colourful())
                // It would say on stderr that stderr cannot be written.
                .log_internal_errors(false)
                .without_time()
                .init();
        }
        Err(error) => {
            tell!("tenon: --log `{}`: {error}", cli.log);
            return ExitCode::from(USAGE);
        }
    }
    let done = match &cli.command {
        Command::Run(args) => run::check(args).and_then(|()| run::run(args, start)),
        Command::Doctor(args) => doctor::doctor(args).map(|()| ExitCode::SUCCESS),
        Command::Disk(command) => disk_command::disk(command),
        Command::Plugin(command) => plugin::plugin(command),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "tenon", &mut script);
            say::print(String::from_utf8_lossy(&script).trim_end()).map(|()| ExitCode::SUCCESS)
        }
    };
    done.unwrap_or_else(|error| end(Err(error)))
}

/// Says what went wrong, if anything did, and gives the exit status.
fn end(done: anyhow::Result<()>) -> ExitCode {
    terminal::restore();
    match done {
        Err(error) if !error.is::<ReaderGone>() => {
            tell!("tenon: {}", say::explain(&error));
            ExitCode::from(if error.is::<Usage>() { USAGE } else { run::FAILED })
        }
        _ => ExitCode::SUCCESS,
    }
}

/// Whether the log may have colours: on a terminal, unless the environment says that it must not (no-color.org).
fn is_colourful() -> bool {
    std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}
