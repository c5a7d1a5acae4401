//! The `tenon` command: the only place where engines, platform and plugins are put together.

mod args;
mod console;
mod doctor;
mod engine;
mod guest;
mod places;
mod plugin;
mod plugins;
mod run;
mod trial;

use std::process::ExitCode;
use std::time::Instant;

use clap::{CommandFactory, Parser};
use tracing_subscriber::EnvFilter;

use args::{Cli, Command};

/// Exit status: the command line is wrong.
const USAGE: u8 = 2;

/// An error that is the command line's: exit status 2.
#[derive(Debug)]
pub(crate) struct Usage(pub(crate) anyhow::Error);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#}", self.0)
    }
}

impl std::error::Error for Usage {}

fn main() -> ExitCode {
    let start = Instant::now();
    let cli = Cli::parse();
    match EnvFilter::builder().parse(&cli.log) {
        Ok(filter) => {
            tracing_subscriber::fmt()
                .with_env_filter(filter)
                .with_writer(std::io::stderr)
                .without_time()
                .init();
        }
        Err(error) => {
            eprintln!("tenon: --log `{}`: {error}", cli.log);
            return ExitCode::from(USAGE);
        }
    }
    let done = match &cli.command {
        Command::Run(args) => run::check(args).and_then(|()| run::run(args, start)),
        Command::Doctor(args) => doctor::doctor(args).map(|()| ExitCode::SUCCESS),
        Command::Plugin(command) => plugin::plugin(command),
        Command::Completions { shell } => {
            clap_complete::generate(*shell, &mut Cli::command(), "tenon", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
    };
    done.unwrap_or_else(|error| {
        console::restore_terminal();
        eprintln!("tenon: {error:#}");
        ExitCode::from(if error.is::<Usage>() { USAGE } else { run::FAILED })
    })
}
