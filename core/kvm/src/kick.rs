//! Kicks: how another thread makes a vCPU leave `KVM_RUN`.
//!
//! Two things together lose no kick. `immediate_exit` in the run page makes the *next* `KVM_RUN` return at once; a signal makes the
//! *current* one return. The kicker sets the first and then sends the second, so whichever side of the entry the vCPU is on, one of them
//! reaches it. The signal's handler does nothing: that the signal interrupts the call is all that is wanted.
#![allow(unsafe_code)] // Signals and thread handles are libc's.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use tenon_core::Kick;

use crate::run_page::RunPage;

/// Which of the real-time signals interrupts vCPUs: SIGRTMIN plus this. The first ones are the C library's favourites.
const SIGNAL_OFFSET: i32 = 4;

fn signal() -> i32 {
    libc::SIGRTMIN() + SIGNAL_OFFSET
}

/// Installs the handler, once in the process. SA_RESTART: system calls of devices that run on a vCPU's thread go on; `KVM_RUN` itself
/// returns EINTR all the same.
pub(crate) fn install_handler() -> io::Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| {
            // SAFETY: all zero is a valid `sigaction`; the handler touches nothing.
            let answer = unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
                action.sa_flags = libc::SA_RESTART;
                libc::sigaction(signal(), &raw const action, std::ptr::null_mut())
            };
            if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error().raw_os_error().unwrap_or(0)) }
        })
        .map_err(io::Error::from_raw_os_error)
}

struct Target {
    /// The thread inside [`Kicker::enter`] and [`Kicker::leave`].
    thread: Option<libc::pthread_t>,
    /// A kick that no `run` has answered yet.
    pending: bool,
}

/// The kicks of one vCPU.
pub(crate) struct Kicker {
    page: Arc<RunPage>,
    target: Mutex<Target>,
}

impl Kicker {
    pub(crate) fn new(page: Arc<RunPage>) -> Self {
        Self { page, target: Mutex::new(Target { thread: None, pending: false }) }
    }

    /// The current thread begins to run the vCPU.
    pub(crate) fn enter(&self) {
        // SAFETY: plain libc calls on a local set. A thread that inherited the signal blocked could not be kicked.
        let thread = unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, signal());
            libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut());
            libc::pthread_self()
        };
        self.lock().thread = Some(thread);
    }

    /// The thread no longer runs the vCPU: from here on nobody signals it.
    pub(crate) fn leave(&self) {
        self.lock().thread = None;
    }

    /// Takes the kick, if there is one. `KVM_RUN` has returned EINTR: what was under way is complete.
    pub(crate) fn take(&self) -> bool {
        let mut target = self.lock();
        self.page.request_exit(false);
        std::mem::take(&mut target.pending)
    }

    fn lock(&self) -> MutexGuard<'_, Target> {
        self.target.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kick for Kicker {
    fn kick(&self) {
        let mut target = self.lock();
        if std::mem::replace(&mut target.pending, true) {
            return;
        }
        self.page.request_exit(true);
        if let Some(thread) = target.thread {
            // SAFETY: the thread lives, for it takes this lock before it leaves `run`.
            unsafe { libc::pthread_kill(thread, signal()) };
        }
    }
}
