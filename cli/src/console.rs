//! What the guest's console is connected to: this terminal, a pseudo-terminal, a file, or nothing.
//!
//! On a terminal the keys go to the guest as they are, but for the escape Ctrl-B; the terminal's own mode is put back
//! when [`Console`] is dropped (and on other ways out, see [`terminal`]).

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;

use anyhow::{Context, Result};
use crossbeam_channel::Sender;
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

use crate::args::ConsoleChoice;
use crate::say::tell;
use crate::{places, terminal};

/// The escape key: Ctrl-B, as on the ancestor's consoles.
const ESCAPE: u8 = 2;

/// What the person at the console asks of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ask {
    /// Press the power button.
    PowerButton,
    /// Reset the machine.
    Reset,
    /// Stop at once.
    Quit,
    /// Say how the machine is.
    Status,
    /// Pause, or go on.
    Pause,
}

pub(crate) const HELP: &str = "\
Ctrl-B ?  this list          Ctrl-B p  press the power button
Ctrl-B b  send Ctrl-B        Ctrl-B r  reset the machine
Ctrl-B s  status             Ctrl-B h  halt the machine, or let it go on
Ctrl-B x  stop the machine at once and leave";

/// The outside of the guest's console.
pub(crate) struct Console {
    input: Option<Box<dyn Read + Send>>,
    output: Option<Box<dyn Write + Send>>,
    has_escape: bool,
    /// Keeps the far side open, so that nobody who opens and closes the pseudo-terminal ends it.
    _far: Option<OwnedFd>,
}

impl Console {
    /// Opens it. For a terminal this changes its mode; for a pseudo-terminal it prints the name on stderr.
    pub(crate) fn open(choice: &ConsoleChoice) -> Result<Self> {
        Ok(match choice {
            ConsoleChoice::None => Self { input: None, output: None, has_escape: false, _far: None },
            ConsoleChoice::File(path) => {
                let file = places::create(path)
                    .with_context(|| format!("console file `{}` cannot be made", path.display()))?;
                Self { input: None, output: Some(Box::new(file)), has_escape: false, _far: None }
            }
            ConsoleChoice::Pty => Self::pty()?,
            ConsoleChoice::Stdio => {
                let has_escape = terminal::is_there();
                if has_escape {
                    terminal::make_raw().context("changing the terminal's mode")?;
                }
                let (input, output) = (Box::new(io::stdin()), Box::new(io::stdout()));
                Self { input: Some(input), output: Some(output), has_escape, _far: None }
            }
        })
    }

    fn pty() -> Result<Self> {
        use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
        let near = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
            .context("making a pseudo-terminal")?;
        grantpt(&near)?;
        unlockpt(&near)?;
        let name = ptsname(&near, Vec::new())?;
        let far = rustix::fs::open(
            &name,
            rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC,
            rustix::fs::Mode::empty(),
        )?;
        let mut mode = tcgetattr(&far)?;
        mode.make_raw();
        tcsetattr(&far, OptionalActions::Now, &mode)?;
        tell!("tenon: the console is on {}", name.to_string_lossy());
        // Output that nobody reads is dropped instead of holding up the guest.
        rustix::io::ioctl_fionbio(&near, false)?;
        let file = File::from(near);
        Ok(Self {
            input: Some(Box::new(file.try_clone()?)),
            output: Some(Box::new(file)),
            has_escape: false,
            _far: Some(far),
        })
    }

    /// Whether a person sits at a terminal with an escape key.
    pub(crate) fn is_interactive(&self) -> bool {
        self.has_escape
    }

    /// The way out for the guest's bytes.
    pub(crate) fn take_output(&mut self) -> Box<dyn Write + Send> {
        self.output.take().unwrap_or_else(|| Box::new(io::sink()))
    }

    /// Starts a thread that gives what is typed to `guest`, and what is asked by escape to `asks`. It ends with the input.
    pub(crate) fn serve_input(
        &mut self,
        guest: impl Fn(&[u8]) + Send + 'static,
        asks: Sender<Ask>,
    ) -> io::Result<()> {
        let Some(mut input) = self.input.take() else { return Ok(()) };
        let has_escape = self.has_escape;
        std::thread::Builder::new().name("console".into()).spawn(move || {
            let mut keys = Keys::new(has_escape);
            let mut buffer = [0; 4096];
            loop {
                match input.read(&mut buffer) {
                    Ok(0) => return,
                    Ok(length) => {
                        let (bytes, wanted) = keys.take(&buffer[..length]);
                        if !bytes.is_empty() {
                            guest(&bytes);
                        }
                        for key in wanted {
                            match key {
                                Key::Ask(ask) => drop(asks.send(ask)),
                                Key::Help => tell!("\n{HELP}"),
                            }
                        }
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(_) => return,
                }
            }
        })?;
        Ok(())
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        terminal::restore();
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Key {
    Ask(Ask),
    Help,
}

/// Sorts what is typed into bytes for the guest and what follows the escape.
struct Keys {
    has_escape: bool,
    escaped: bool,
}

impl Keys {
    fn new(has_escape: bool) -> Self {
        Self { has_escape, escaped: false }
    }

    fn take(&mut self, typed: &[u8]) -> (Vec<u8>, Vec<Key>) {
        if !self.has_escape {
            return (typed.to_vec(), Vec::new());
        }
        let (mut bytes, mut wanted) = (Vec::with_capacity(typed.len()), Vec::new());
        for &byte in typed {
            if !std::mem::take(&mut self.escaped) {
                if byte == ESCAPE {
                    self.escaped = true;
                } else {
                    bytes.push(byte);
                }
                continue;
            }
            match byte.to_ascii_lowercase() {
                b'b' | ESCAPE => bytes.push(ESCAPE),
                b'p' => wanted.push(Key::Ask(Ask::PowerButton)),
                b'r' => wanted.push(Key::Ask(Ask::Reset)),
                b'x' => wanted.push(Key::Ask(Ask::Quit)),
                b's' => wanted.push(Key::Ask(Ask::Status)),
                b'h' => wanted.push(Key::Ask(Ask::Pause)),
                _ => wanted.push(Key::Help),
            }
        }
        (bytes, wanted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_escape_is_taken_out_and_can_be_sent() {
        let mut keys = Keys::new(true);
        assert_eq!(keys.take(b"ab\x02p\x02bc"), (b"ab\x02c".to_vec(), vec![Key::Ask(Ask::PowerButton)]));
        assert_eq!(keys.take(b"\x02"), (vec![], vec![]));
        assert_eq!(keys.take(b"x"), (vec![], vec![Key::Ask(Ask::Quit)]));
        assert_eq!(keys.take(b"\x02?z"), (b"z".to_vec(), vec![Key::Help]));
    }

    #[test]
    fn a_pipe_has_no_escape() {
        assert_eq!(Keys::new(false).take(b"\x02x"), (b"\x02x".to_vec(), vec![]));
    }
}
