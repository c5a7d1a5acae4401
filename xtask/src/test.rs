//! `cargo xtask test`: every check and every test, in the order in which mistakes are found soonest. CI runs this.
//!
//! Each step's output goes to a file under the target folder's `test-logs`, and is shown when the step fails. All steps run, whatever the ones
//! before them said. A test that cannot run on this host prints `not run: WHY`, and is counted as such.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::process::cargo;
use crate::{host, plugins, programs, tree};

/// What to run.
#[derive(Args)]
pub(crate) struct Options {
    /// Run only these steps, such as `clippy` or `tests`
    steps: Vec<String>,
}

/// How a step is done.
enum How {
    /// A chore of this program, run as a process of its own so that its output can be kept.
    Chore(&'static [&'static str]),
    /// Cargo, with these arguments.
    Cargo(&'static [&'static str]),
    /// The workspace's tests: their number is what counts.
    Tests,
    /// The tests of every example plugin.
    Examples,
}

/// The build and the tests take the whole workspace with all its targets: cargo then resolves features alike for both, and
/// compiles wasmtime once.
const STEPS: [(&str, How); 9] = [
    ("format", How::Chore(&["format"])),
    ("deps", How::Chore(&["deps"])),
    ("wit", How::Chore(&["wit-check"])),
    ("clippy", How::Chore(&["clippy"])),
    ("docs", How::Cargo(&["doc", "--release", "--workspace", "--no-deps", "--quiet"])),
    ("build", How::Chore(&["build"])),
    ("guests", How::Chore(&["guests", "--firmware", "--disk", "--web"])),
    ("tests", How::Tests),
    ("examples", How::Examples),
];

#[derive(Default)]
struct Count {
    passed: usize,
    failed: usize,
    not_run: Vec<String>,
}

struct Outcome {
    step: &'static str,
    took: Duration,
    count: Count,
}

/// Runs the steps.
///
/// # Errors
/// A step or a test failed.
pub(crate) fn run(options: &Options) -> Result<()> {
    let known = |step: &String| STEPS.iter().any(|(name, _)| name == step);
    if let Some(unknown) = options.steps.iter().find(|step| !known(step)) {
        let names: Vec<&str> = STEPS.iter().map(|(name, _)| *name).collect();
        bail!("there is no step `{unknown}`; there are {}", names.join(", "));
    }
    host::prepare_tests()?;
    let logs = tree::target()?.join("test-logs");
    fs::create_dir_all(&logs).with_context(|| format!("cannot make {}", logs.display()))?;
    let mut outcomes = Vec::new();
    for (step, how) in &STEPS {
        if !options.steps.is_empty() && !options.steps.iter().any(|wanted| wanted == step) {
            continue;
        }
        eprintln!("test: {step}");
        let started = Instant::now();
        let count = take(step, how, &logs.join(format!("{step}.log")))?;
        outcomes.push(Outcome { step, took: started.elapsed(), count });
    }
    summarise(&outcomes)
}

fn take(step: &str, how: &How, log: &Path) -> Result<Count> {
    let file = File::create(log).with_context(|| format!("cannot make {}", log.display()))?;
    let tests = matches!(how, How::Tests | How::Examples);
    let at_once = if matches!(how, How::Tests) { programs::AT_ONCE } else { 1 };
    let good = match commands(how) {
        Ok(commands) => programs::run(commands, at_once, &file)?,
        Err(error) => {
            writeln!(&file, "error: {error:#}")?;
            false
        }
    };
    let text = String::from_utf8_lossy(&fs::read(log)?).into_owned();
    let mut count = if tests { counted(&text) } else { Count::default() };
    // A step without tests is one check; so is a build of tests that fails.
    match (good, tests) {
        (true, false) => count.passed = 1,
        (false, _) if count.failed == 0 => count.failed = 1,
        _ => {}
    }
    if !good {
        eprintln!("{}", interesting(&text));
        eprintln!("test: {step} failed; all of its output is in {}", log.display());
    }
    Ok(count)
}

fn commands(how: &How) -> Result<Vec<Command>> {
    let target = tree::target()?;
    Ok(match how {
        How::Chore(words) => {
            // Not by its path: the build replaces the file.
            let mut command = crate::process::command("/proc/self/exe");
            command.args(*words);
            vec![command]
        }
        How::Cargo(words) => {
            let mut command = cargo();
            command.args(*words).env("RUSTDOCFLAGS", "--deny warnings").env("CARGO_TARGET_DIR", target);
            vec![command]
        }
        How::Tests => programs::tests()?,
        How::Examples => plugins::in_folder(&tree::root().join("plugin-examples"))?
            .into_iter()
            .map(|folder| {
                let mut command = cargo();
                command
                    .current_dir(folder)
                    .args(["test", "--release", "--", "--show-output"])
                    .env("CARGO_TARGET_DIR", target.join("examples"));
                command
            })
            .collect(),
    })
}

/// Adds up what libtest says.
fn counted(text: &str) -> Count {
    let mut count = Count::default();
    for line in text.lines() {
        if let Some(result) = line.strip_prefix("test result: ") {
            let number = |what: &str| {
                let before = result.split(what).next().unwrap_or_default();
                before.rsplit([' ', '.']).find_map(|word| word.parse::<usize>().ok()).unwrap_or(0)
            };
            count.passed += number(" passed");
            count.failed += number(" failed");
        } else if let Some(why) = line.trim().strip_prefix("not run: ") {
            count.not_run.push(why.to_owned());
        }
    }
    // libtest calls them passed.
    count.passed = count.passed.saturating_sub(count.not_run.len());
    count
}

/// The part of a log that says what went wrong.
fn interesting(text: &str) -> String {
    const MOST: usize = 120;
    let lines: Vec<&str> = text.lines().collect();
    let begin = lines
        .iter()
        .position(|line| {
            line.starts_with("error") || line.starts_with("failures:") || line.starts_with("Diff in")
        })
        .unwrap_or(lines.len().saturating_sub(MOST));
    lines[begin..].iter().take(MOST).copied().collect::<Vec<_>>().join("\n")
}

fn summarise(outcomes: &[Outcome]) -> Result<()> {
    println!();
    for Outcome { step, took, count } in outcomes {
        let verdict = if count.failed == 0 { "ok" } else { "FAILED" };
        println!(
            "{step:10} {verdict:6} {:7.1} s  {} passed, {} failed",
            took.as_secs_f64(),
            count.passed,
            count.failed
        );
    }
    for why in outcomes.iter().flat_map(|outcome| &outcome.count.not_run) {
        println!("not run: {why}");
    }
    let sum = |what: fn(&Count) -> usize| outcomes.iter().map(|outcome| what(&outcome.count)).sum::<usize>();
    let failed = sum(|count| count.failed);
    let total: Duration = outcomes.iter().map(|outcome| outcome.took).sum();
    println!(
        "\n{} passed, {failed} failed, {} not run, in {:.0} s",
        sum(|count| count.passed),
        sum(|count| count.not_run.len()),
        total.as_secs_f64()
    );
    if failed > 0 {
        bail!("{failed} failed");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::counted;

    #[test]
    fn results_of_several_test_programs_add_up() {
        let text = "test result: ok. 12 passed; 0 failed; 0 ignored; 0 measured\nnot run: no /dev/kvm here\n\
                    test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured\n";
        let count = counted(text);
        assert_eq!((count.passed, count.failed, count.not_run.len()), (14, 2, 1));
    }
}
