//! Cargo's test programs, several at a time: many of them wait, for a guest or for another program, while a core would be idle.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::process::{capture, cargo, shown};
use crate::tree;

/// How many tests run at a time, whose threads are as many as the cores, and which have a guest or two.
pub(crate) const AT_ONCE: usize = 2;

/// What cargo says of something that it made.
#[derive(Deserialize)]
struct Message {
    #[serde(default)]
    manifest_path: PathBuf,
    executable: Option<PathBuf>,
    profile: Option<Profile>,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}

/// Runs the commands, this many at a time, and writes what each says to `log`, one after the other. Whether all succeed.
///
/// # Errors
/// One cannot be started, or `log` not be written.
pub(crate) fn run(commands: Vec<Command>, at_once: usize, log: &File) -> Result<bool> {
    let waiting = Mutex::new(commands.into_iter());
    let writing = Mutex::new(log);
    let work = || -> Result<bool> {
        let mut good = true;
        loop {
            let next = lock(&waiting).next();
            let Some(mut command) = next else { return Ok(good) };
            let output = command
                .stdin(Stdio::null())
                .output()
                .with_context(|| format!("cannot start `{}`", shown(&command)))?;
            good &= output.status.success();
            let mut log = lock(&writing);
            writeln!(log, "\n{}: {}", shown(&command), output.status)?;
            log.write_all(&output.stderr)?;
            log.write_all(&output.stdout)?;
        }
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..at_once).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_fold(true, |good, worker| {
            let result = worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            Ok(result? && good)
        })
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Builds the workspace's tests. Those of whole systems come first: they take longest.
///
/// # Errors
/// They do not build.
pub(crate) fn tests() -> Result<Vec<Command>> {
    // The documentation's examples are compiled when they run.
    let mut examples = cargo();
    examples
        .args(["test", "--release", "--workspace", "--no-fail-fast", "--doc", "--", "--show-output"])
        .env("CARGO_TARGET_DIR", tree::target()?);
    let mut build = cargo();
    build
        .args(["test", "--release", "--workspace", "--no-run", "--message-format=json-render-diagnostics"])
        .env("CARGO_TARGET_DIR", tree::target()?);
    let (mut whole_systems, mut others) = (vec![examples], Vec::new());
    for line in capture(&mut build)?.lines() {
        let message: Message = serde_json::from_str(line).context("what cargo says is not understood")?;
        let (Some(executable), Some(Profile { test: true })) = (message.executable, message.profile) else {
            continue;
        };
        let folder = message.manifest_path.parent().unwrap_or(Path::new("/"));
        let mut command = Command::new(executable);
        // As cargo would start it.
        command.arg("--show-output").current_dir(folder).env("CARGO_MANIFEST_DIR", folder);
        let list = if folder == tree::root().join("tests") { &mut whole_systems } else { &mut others };
        list.push(command);
    }
    whole_systems.append(&mut others);
    Ok(whole_systems)
}
