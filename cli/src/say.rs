//! What this program says: results on standard output, messages on standard error.
//!
//! `println!` and `eprintln!` panic where nobody takes what they print. Here a result that cannot be printed is an error, a reader that has gone
//! is an end without a word, and a message that cannot be printed is dropped.

use std::fmt::Display;
use std::io::{self, Write};

use anyhow::{Context, Result};
use comfy_table::Table;

/// Whoever read standard output has gone, as `head` does when it has seen enough.
#[derive(Debug, thiserror::Error)]
#[error("nobody reads standard output any more")]
pub(crate) struct ReaderGone;

/// Prints a result and ends the line.
pub(crate) fn print(text: impl Display) -> Result<()> {
    let mut out = io::stdout().lock();
    printed(writeln!(out, "{text}").and_then(|()| out.flush()))
}

/// What became of something that was printed on standard output.
pub(crate) fn printed(result: io::Result<()>) -> Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(ReaderGone.into()),
        result => result.context("standard output cannot be written"),
    }
}

/// Prints a table without the blanks that it would have around each line.
pub(crate) fn print_table(table: &Table) -> Result<()> {
    let lines = table.lines().map(|line| line.strip_prefix(' ').unwrap_or(&line).trim_end().to_owned());
    print(lines.collect::<Vec<_>>().join("\n"))
}

/// Prints a message on standard error and ends the line.
macro_rules! tell {
    ($($arg:tt)*) => {{
        use std::io::Write;
        // There is nowhere to say that nothing can be said.
        let _ = writeln!(std::io::stderr(), $($arg)*);
    }};
}
pub(crate) use tell;

/// An error with its causes in one line, each said once.
pub(crate) fn explain(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        // Some errors tell their cause themselves.
        if text.ends_with(&cause) {
            continue;
        }
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&cause);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_said_once() {
        let error =
            anyhow::anyhow!("no such file").context("plugin.toml: no such file").context("device `x`");
        assert_eq!(explain(&error), "device `x`: plugin.toml: no such file");
    }
}
