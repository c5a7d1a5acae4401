//! The machine around a device on the bench: clock, timers, lines, channels, log.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;

use tenon_sdk::device::{Description, Level, Request, hosted};

/// The state of an interrupt line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LineState {
    /// Whether the device holds the line high.
    pub high: bool,
    /// How many times the line went from low to high.
    pub edges: u64,
}

impl LineState {
    /// Whether the device holds the line high.
    #[must_use]
    pub fn level(self) -> bool {
        self.high
    }
}

/// A timer that is armed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Armed {
    pub(crate) deadline: u64,
    pub(crate) period: Option<u64>,
}

/// The far end of a channel.
#[derive(Clone, Debug)]
pub(crate) struct Stream {
    pub(crate) input: VecDeque<u8>,
    pub(crate) output: Vec<u8>,
    /// How many bytes of output are taken before the device is told that there is no room.
    pub(crate) capacity: usize,
    /// The device wants to be told of input: it has read less than it asked for, or not read yet.
    pub(crate) notify: bool,
    /// The device wants to be told of room: it has offered more than was taken.
    pub(crate) blocked: bool,
}

/// How many bytes the host buffers each way.
const BUFFER: usize = 64 << 10;
/// Shorter periods are raised to this, in nanoseconds.
const LEAST_PERIOD: u64 = 10_000;

/// Everything outside the device.
#[derive(Clone, Debug)]
pub(crate) struct Outside {
    pub(crate) now: Cell<u64>,
    /// The time of day at time 0 of the machine's clock.
    pub(crate) epoch: Cell<u64>,
    pub(crate) timers: RefCell<Vec<Option<Armed>>>,
    pub(crate) lines: RefCell<Vec<LineState>>,
    pub(crate) channels: RefCell<Vec<Stream>>,
    pub(crate) log: RefCell<Vec<(Level, String)>>,
    pub(crate) request: Cell<Option<Request>>,
}

impl Outside {
    pub(crate) fn new(description: &Description) -> Self {
        let stream = |_: &String| Stream {
            input: VecDeque::new(),
            output: Vec::new(),
            capacity: BUFFER,
            notify: true,
            blocked: false,
        };
        Self {
            now: Cell::new(0),
            // 2026-01-01 00:00:00 UTC.
            epoch: Cell::new(1_767_225_600_000_000_000),
            timers: RefCell::new(vec![None; description.timers as usize]),
            lines: RefCell::new(vec![LineState::default(); description.lines.len()]),
            channels: RefCell::new(description.channels.iter().map(stream).collect()),
            log: RefCell::default(),
            request: Cell::new(None),
        }
    }

    /// Makes the handles' side as a new instance finds it: lines low, timers stopped, channels telling of input.
    pub(crate) fn detach(&self) {
        self.timers.borrow_mut().fill(None);
        self.lines.borrow_mut().iter_mut().for_each(|line| line.high = false);
        self.channels.borrow_mut().iter_mut().for_each(|channel| {
            channel.notify = true;
            channel.blocked = false;
        });
    }

    /// The timer that fires next, until `end`.
    fn next_timer(&self, end: u64) -> Option<(u32, Armed)> {
        let timers = self.timers.borrow();
        let armed = (0u32..).zip(timers.iter()).filter_map(|(n, timer)| Some((n, (*timer)?)));
        armed.filter(|(_, timer)| timer.deadline <= end).min_by_key(|(n, timer)| (timer.deadline, *n))
    }

    /// Lets time go on to the timer that fires next, until `end`, and arms it for its next period. Without such a timer, time goes on to `end`.
    pub(crate) fn fire_next(&self, end: u64) -> Option<u32> {
        let Some((timer, armed)) = self.next_timer(end) else {
            self.now.set(end);
            return None;
        };
        let now = armed.deadline.max(self.now.get());
        self.now.set(now);
        let next = armed.period.and_then(|period| {
            // Missed periods are not made up for. Nothing fires at the end of time.
            let deadline = armed.deadline.checked_add(period * ((now - armed.deadline) / period + 1))?;
            Some(Armed { deadline, period: armed.period })
        });
        self.arm(timer, next);
        Some(timer)
    }

    fn arm(&self, timer: u32, armed: Option<Armed>) {
        if let Some(slot) = self.timers.borrow_mut().get_mut(timer as usize) {
            *slot = armed;
        }
    }
}

impl hosted::Host for Outside {
    fn log(&self, level: Level, message: &str) {
        self.log.borrow_mut().push((level, message.to_owned()));
    }

    fn now(&self) -> u64 {
        self.now.get()
    }

    fn timer_arm(&self, timer: u32, deadline: u64) {
        self.arm(timer, Some(Armed { deadline, period: None }));
    }

    fn timer_arm_periodic(&self, timer: u32, first: u64, period: u64) {
        self.arm(timer, Some(Armed { deadline: first, period: Some(period.max(LEAST_PERIOD)) }));
    }

    fn timer_cancel(&self, timer: u32) {
        self.arm(timer, None);
    }

    fn wall_clock(&self) -> u64 {
        self.epoch.get().saturating_add(self.now.get())
    }

    fn line_set_level(&self, line: u32, high: bool) {
        if let Some(state) = self.lines.borrow_mut().get_mut(line as usize) {
            state.edges += u64::from(high && !state.high);
            state.high = high;
        }
    }

    fn line_pulse(&self, line: u32) {
        self.line_set_level(line, true);
        self.line_set_level(line, false);
    }

    fn channel_write(&self, channel: u32, bytes: &[u8]) -> u32 {
        let mut channels = self.channels.borrow_mut();
        let Some(channel) = channels.get_mut(channel as usize) else { return 0 };
        let taken = bytes.len().min(channel.capacity.saturating_sub(channel.output.len()));
        channel.output.extend_from_slice(&bytes[..taken]);
        channel.blocked |= taken < bytes.len();
        u32::try_from(taken).unwrap_or(u32::MAX)
    }

    fn channel_read(&self, channel: u32, max: u32) -> Vec<u8> {
        let mut channels = self.channels.borrow_mut();
        let Some(channel) = channels.get_mut(channel as usize) else { return Vec::new() };
        let count = channel.input.len().min(max as usize);
        channel.notify = count < max as usize;
        channel.input.drain(..count).collect()
    }

    fn request(&self, request: Request) {
        if self.request.get().is_none() {
            self.request.set(Some(request));
        }
    }
}
