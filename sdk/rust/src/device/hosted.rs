//! Where there is no component around the device: handles are numbers, and calls go to the host that is entered on this thread.
#![allow(unsafe_code, reason = "the host entered on a thread is remembered without its lifetime")]

use std::cell::Cell;

use tenon_abi::{Level, Request};

/// The host of a device that runs in this process: a test bench, or the other side of the native tables.
/// Lines, timers and channels are named by their index in the device's description. Functions are called during calls into the device,
/// on the thread of that call. What each of them does is written at [`super::Line`], [`super::Timer`] and [`super::Channel`].
pub trait Host {
    /// Logs one message.
    fn log(&self, level: Level, message: &str);
    /// Nanoseconds of the machine's clock.
    fn now(&self) -> u64;
    /// Fires once at `deadline`.
    fn timer_arm(&self, timer: u32, deadline: u64);
    /// Fires at `first`, then every `period` nanoseconds.
    fn timer_arm_periodic(&self, timer: u32, first: u64, period: u64);
    /// Stops the timer.
    fn timer_cancel(&self, timer: u32);
    /// Nanoseconds since 1970-01-01 00:00:00 UTC.
    fn wall_clock(&self) -> u64;
    /// Sets the device's own level on the line.
    fn line_set_level(&self, line: u32, high: bool);
    /// Raises and lowers the line.
    fn line_pulse(&self, line: u32);
    /// Gives bytes to the outside; returns how many were taken.
    fn channel_write(&self, channel: u32, bytes: &[u8]) -> u32;
    /// Takes at most `max` bytes that came from the outside.
    fn channel_read(&self, channel: u32, max: u32) -> Vec<u8>;
    /// Asks for the end of the machine.
    fn request(&self, request: Request);
}

thread_local! {
    /// The host of the device that is being called on this thread.
    static ENTERED: Cell<Option<*const dyn Host>> = const { Cell::new(None) };
}

/// Calls a device: for as long as `call` runs, handles and free functions of this module reach `host`.
pub fn enter<R>(host: &dyn Host, call: impl FnOnce() -> R) -> R {
    struct Leave(Option<*const dyn Host>);
    impl Drop for Leave {
        fn drop(&mut self) {
            ENTERED.set(self.0);
        }
    }
    let host: *const (dyn Host + '_) = host;
    // SAFETY: only the lifetime of the trait object changes; the pointer is forgotten by `Leave` before `host` can end, also when `call` unwinds.
    let host: *const (dyn Host + 'static) = unsafe { std::mem::transmute(host) };
    let _leave = Leave(ENTERED.replace(Some(host)));
    call()
}

fn host<R>(call: impl FnOnce(&dyn Host) -> R) -> R {
    let Some(host) = ENTERED.get() else {
        panic!(
            "a device's handles work during calls from its host only; a test makes these with `tenon_testkit::Bench`"
        );
    };
    // SAFETY: `enter` is still running further up on this thread's stack and borrows the host.
    call(unsafe { &*host })
}

pub(super) struct Line(u32);

impl Line {
    pub(super) fn set_level(&self, high: bool) {
        host(|host| host.line_set_level(self.0, high));
    }

    pub(super) fn pulse(&self) {
        host(|host| host.line_pulse(self.0));
    }
}

pub(crate) struct Timer(pub(crate) u32);

impl Timer {
    pub(super) fn arm(&self, deadline: u64) {
        host(|host| host.timer_arm(self.0, deadline));
    }

    pub(super) fn arm_periodic(&self, first: u64, period: u64) {
        host(|host| host.timer_arm_periodic(self.0, first, period));
    }

    pub(super) fn cancel(&self) {
        host(|host| host.timer_cancel(self.0));
    }
}

pub(crate) struct Channel(pub(crate) u32);

impl Channel {
    pub(super) fn write(&self, bytes: &[u8]) -> usize {
        host(|host| host.channel_write(self.0, bytes)) as usize
    }

    pub(super) fn read(&self, max: u32) -> Vec<u8> {
        host(|host| host.channel_read(self.0, max))
    }
}

pub(super) fn now() -> u64 {
    host(|host| host.now())
}

pub(super) fn wall_clock() -> u64 {
    host(|host| host.wall_clock())
}

pub(super) fn request(request: Request) {
    host(|host| host.request(request));
}

pub(super) fn log(level: Level, message: &str) {
    host(|host| host.log(level, message));
}

/// The handles of a device that was granted so many lines, timers and channels.
#[must_use]
pub fn attachment(lines: u32, timers: u32, channels: u32) -> super::Attachment {
    let all = |count: u32| (0..count).collect::<Vec<u32>>().into_iter();
    super::Attachment {
        lines: all(lines).map(|n| super::Line(Line(n))).collect::<Vec<_>>().into_iter(),
        timers: all(timers).map(|n| super::Timer(Timer(n))).collect::<Vec<_>>().into_iter(),
        channels: all(channels).map(|n| super::Channel(Channel(n))).collect::<Vec<_>>().into_iter(),
    }
}
