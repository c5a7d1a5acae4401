//! Byte channels between a device and the outside: the device's end is behind its `channel` handle, the other is a [`ChannelEnd`].
//!
//! Each way holds at most 64 KiB. Nobody ever waits for a device while holding a channel's lock, and a device never waits for the outside:
//! what does not fit is the writer's to keep. While nobody listens, what a device writes is taken, dropped and counted.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

/// How many bytes each way of a channel holds.
pub const CHANNEL_CAPACITY: usize = 64 << 10;

/// What a device is told of its channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ChannelNews {
    /// There are bytes to read.
    Readable(u32),
    /// There is room again.
    Writable(u32),
}

/// Tells a device's worker. It does not block, and does not call back.
pub(crate) type Tell = Box<dyn Fn(ChannelNews) + Send>;

struct State {
    /// To the device.
    input: VecDeque<u8>,
    /// From the device.
    output: VecDeque<u8>,
    /// Whether somebody takes the output.
    listening: bool,
    /// Bytes were taken out of `output` and have not yet reached the sink.
    in_flight: bool,
    /// The device wants to be told when there is input.
    wanted: bool,
    /// The device wrote more than fitted, and is to be told when there is room.
    short: bool,
    /// Tells the device's worker; gone when the device is.
    worker: Option<Tell>,
    dropped: u64,
}

/// The part of a channel that both ends share.
pub(crate) struct Channel {
    name: String,
    index: u32,
    state: Mutex<State>,
    /// Output came, was taken, or the device went.
    output_changed: Condvar,
    /// Input was taken, or the device went.
    input_changed: Condvar,
}

impl Channel {
    pub(crate) fn new(name: String, index: u32, worker: Tell) -> Arc<Self> {
        let state = State {
            input: VecDeque::new(),
            output: VecDeque::new(),
            listening: false,
            in_flight: false,
            wanted: false,
            short: false,
            worker: Some(worker),
            dropped: 0,
        };
        Arc::new(Self {
            name,
            index,
            state: Mutex::new(state),
            output_changed: Condvar::new(),
            input_changed: Condvar::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The device gives bytes to the outside; returns how many were taken.
    pub(crate) fn device_write(&self, bytes: &[u8]) -> u32 {
        let mut state = self.lock();
        let taken = if state.listening {
            let room = CHANNEL_CAPACITY - state.output.len();
            let taken = bytes.len().min(room);
            state.output.extend(&bytes[..taken]);
            state.short |= taken < bytes.len();
            self.output_changed.notify_all();
            taken
        } else {
            state.dropped += bytes.len() as u64;
            bytes.len()
        };
        u32::try_from(taken).unwrap_or(u32::MAX)
    }

    /// The device takes bytes from the outside.
    pub(crate) fn device_read(&self, max: u32) -> Vec<u8> {
        let mut state = self.lock();
        let max = usize::try_from(max).unwrap_or(usize::MAX);
        let count = max.min(state.input.len());
        let bytes = state.input.drain(..count).collect();
        if count < max {
            state.wanted = true;
        }
        if count > 0 {
            self.input_changed.notify_all();
        }
        bytes
    }

    /// A new instance knows nothing of what was said before: it is told again of what there is to read.
    pub(crate) fn rearm(&self) {
        let mut state = self.lock();
        state.wanted = true;
        self.tell(&mut state);
    }

    /// The device is to be told when more comes.
    pub(crate) fn want(&self) {
        self.lock().wanted = true;
    }

    fn tell(&self, state: &mut State) {
        if state.wanted && !state.input.is_empty() {
            state.wanted = false;
            if let Some(worker) = &state.worker {
                worker(ChannelNews::Readable(self.index));
            }
        }
    }

    /// A new instance was given the answer again that not everything fitted: it is to be told when there is room.
    pub(crate) fn want_room(&self) {
        let mut state = self.lock();
        state.short = true;
        self.tell_room(&mut state);
    }

    fn tell_room(&self, state: &mut State) {
        if state.short && state.output.len() < CHANNEL_CAPACITY {
            state.short = false;
            if let Some(worker) = &state.worker {
                worker(ChannelNews::Writable(self.index));
            }
        }
    }

    /// The device is gone: whoever waits is let go.
    pub(crate) fn close(&self) {
        self.lock().worker = None;
        self.output_changed.notify_all();
        self.input_changed.notify_all();
    }
}

/// The outside's end of a device's byte channel. Clones are the same end. It outlives the device: it then takes no more bytes, and gives what is left.
#[derive(Clone)]
pub struct ChannelEnd {
    channel: Arc<Channel>,
}

impl ChannelEnd {
    pub(crate) fn new(channel: Arc<Channel>) -> Self {
        Self { channel }
    }

    /// The channel's name as the device gave it, such as `console`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.channel.name
    }

    /// Gives bytes to the device. Returns how many fit, from the front; it does not wait.
    pub fn push(&self, bytes: &[u8]) -> usize {
        let mut state = self.channel.lock();
        if state.worker.is_none() {
            return 0;
        }
        let taken = bytes.len().min(CHANNEL_CAPACITY - state.input.len());
        state.input.extend(&bytes[..taken]);
        self.channel.tell(&mut state);
        taken
    }

    /// Gives all bytes to the device, waiting for room for at most `patience`. Returns how many fit.
    pub fn push_all(&self, bytes: &[u8], patience: Duration) -> usize {
        let end = Instant::now() + patience;
        let mut done = 0;
        loop {
            done += self.push(&bytes[done..]);
            let state = self.channel.lock();
            let left = end.saturating_duration_since(Instant::now());
            if done == bytes.len() || left.is_zero() || state.worker.is_none() {
                return done;
            }
            if state.input.len() == CHANNEL_CAPACITY {
                drop(self.channel.input_changed.wait_timeout(state, left));
            }
        }
    }

    /// Starts to listen, and takes what the device has written since: at most `max` bytes, none if there are none. It does not wait.
    #[must_use]
    pub fn take(&self, max: usize) -> Vec<u8> {
        let mut state = self.channel.lock();
        state.listening = true;
        let count = max.min(state.output.len());
        let bytes = state.output.drain(..count).collect();
        self.channel.tell_room(&mut state);
        self.channel.output_changed.notify_all();
        bytes
    }

    /// Starts to listen: a thread of its own gives every byte that the device writes to `sink`, which may block. The thread ends when the device is
    /// gone and everything was given. A second sink shares the bytes with the first.
    ///
    /// # Errors
    /// The host gives no thread.
    pub fn set_sink(&self, mut sink: impl FnMut(&[u8]) + Send + 'static) -> std::io::Result<()> {
        self.channel.lock().listening = true;
        let weak: Weak<Channel> = Arc::downgrade(&self.channel);
        let pump = move || {
            while let Some(channel) = weak.upgrade() {
                let mut state = channel.lock();
                while state.output.is_empty() {
                    if state.worker.is_none() {
                        return;
                    }
                    state = channel.output_changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                let bytes: Vec<u8> = state.output.drain(..).collect();
                channel.tell_room(&mut state);
                state.in_flight = true;
                drop(state);
                sink(&bytes);
                channel.lock().in_flight = false;
                channel.output_changed.notify_all();
            }
        };
        std::thread::Builder::new().name(format!("{}-out", self.channel.name)).spawn(pump)?;
        Ok(())
    }

    /// Waits until everything that the device has written was given to the sink, for at most `patience`. Returns whether it was.
    #[must_use]
    pub fn flush(&self, patience: Duration) -> bool {
        let end = Instant::now() + patience;
        let mut state = self.channel.lock();
        while !state.output.is_empty() || state.in_flight {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.channel.output_changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// How many bytes the device wrote while nobody listened.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.channel.lock().dropped
    }
}
