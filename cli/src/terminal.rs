//! The mode of the terminal on standard input: made raw for a guest's console, and put back on every way out.
//!
//! An ordinary end calls [`restore`], as does the panic hook. Signals that end a process without asking it
//! are caught for that ([`guard`]) and then do what they did before. Only SIGKILL leaves a raw terminal behind.
#![allow(unsafe_code, reason = "signal handlers are installed by the C library")]

use std::ffi::{c_int, c_void};
use std::io;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::stdio::stdin;
use rustix::termios::{OptionalActions, OutputModes, Termios, tcgetattr, tcgetpgrp, tcsetattr};

/// The signals that end a process and that nothing else here waits for.
const FATAL: [c_int; 15] = [
    libc::SIGQUIT,
    libc::SIGILL,
    libc::SIGTRAP,
    libc::SIGABRT,
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGSEGV,
    libc::SIGSYS,
    libc::SIGALRM,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGXCPU,
    libc::SIGXFSZ,
    libc::SIGVTALRM,
    libc::SIGPROF,
];
/// Those of them that an instruction causes, which would cause it again.
const FAULTS: [c_int; 4] = [libc::SIGILL, libc::SIGBUS, libc::SIGFPE, libc::SIGSEGV];

/// The mode as it was found.
static FOUND: OnceLock<Termios> = OnceLock::new();
static IS_RAW: AtomicBool = AtomicBool::new(false);
/// What the signals did before, in the order of [`FATAL`].
static BEFORE: [OnceLock<libc::sigaction>; FATAL.len()] = [const { OnceLock::new() }; FATAL.len()];

/// Whether standard input is a terminal.
pub(crate) fn is_there() -> bool {
    rustix::termios::isatty(stdin())
}

/// Makes the terminal raw, but for its output: messages of this program still end their lines properly beside the guest's output.
pub(crate) fn make_raw() -> io::Result<()> {
    let found = tcgetattr(stdin())?;
    let mut mode = found.clone();
    mode.make_raw();
    mode.output_modes |= OutputModes::OPOST | OutputModes::ONLCR;
    let _ = FOUND.set(found);
    IS_RAW.store(true, Ordering::SeqCst);
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore();
        hook(info);
    }));
    tcsetattr(stdin(), OptionalActions::Now, &mode)?;
    Ok(())
}

/// Puts the terminal's mode back, if it was changed. May be called at any time, also in a signal handler: it makes system calls and nothing else.
pub(crate) fn restore() {
    if !IS_RAW.swap(false, Ordering::SeqCst) {
        return;
    }
    // In the background the terminal is somebody else's, and touching it would stop this process.
    let in_background = tcgetpgrp(stdin()).is_ok_and(|group| group != rustix::process::getpgrp());
    if let Some(mode) = FOUND.get().filter(|_| !in_background) {
        let _ = tcsetattr(stdin(), OptionalActions::Now, mode);
    }
}

/// Puts the mode back before a signal ends this process. To be called before anything else catches faults, as wasmtime does: what comes later asks
/// what was there before.
pub(crate) fn guard() -> io::Result<()> {
    for (signal, before) in FATAL.iter().zip(&BEFORE) {
        // SAFETY: all zero is a valid `sigaction`, which the call fills.
        let found = unsafe {
            let mut found: libc::sigaction = std::mem::zeroed();
            if libc::sigaction(*signal, ptr::null(), &raw mut found) != 0 {
                return Err(io::Error::last_os_error());
            }
            found
        };
        if found.sa_sigaction == libc::SIG_IGN || before.set(found).is_err() {
            continue;
        }
        // SAFETY: all zero is a valid `sigaction`, with an empty mask; the handler calls only what a handler may.
        let installed = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction =
                on_signal as extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigaction(*signal, &raw const action, ptr::null_mut())
        };
        if installed != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

extern "C" fn on_signal(signal: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
    restore();
    // SAFETY: the kernel gives a handler with SA_SIGINFO its information.
    let is_fault = FAULTS.contains(&signal) && unsafe { (*info).si_code } > 0;
    let before = FATAL.iter().zip(&BEFORE).find(|(other, _)| **other == signal);
    if is_fault && let Some(before) = before.and_then(|(_, before)| before.get()) {
        // The instruction runs again and faults again, for a handler that may know more about it, such as that of stack overflows.
        // SAFETY: this is what the call itself gave.
        unsafe { libc::sigaction(signal, before, ptr::null_mut()) };
        return;
    }
    // SAFETY: both may be called in a handler. The signal waits until this returns.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
}
