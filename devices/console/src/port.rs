//! One port: a channel to the outside, and the requests that wait for it in either direction.
//!
//! Requests wait where they are until the channel has bytes, or room: nothing is copied out of them, so nothing is lost and nothing grows.

use std::collections::VecDeque;

use tenon_sdk::virtio::{Answer, Channel, Handle, Request, from_channel, to_channel};

/// How far the first request of the transmit queue has been sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sent {
    pub(crate) length: u32,
    pub(crate) offset: u32,
}

/// A port.
pub(crate) struct Port {
    pub(crate) name: String,
    channel: Channel,
    /// Somebody in the guest listens.
    pub(crate) open: bool,
    /// Requests to be filled, with the lengths of their writable parts.
    filling: VecDeque<(Handle, u32)>,
    /// Requests to be sent, with the lengths of their readable parts.
    sending: VecDeque<(Handle, u32)>,
    /// Of the first of `sending`; with nothing in `sending`, that of which the saved state told.
    sent: Sent,
    /// The channel may have bytes. It says when it gets some, but only after it has given fewer than it was asked for.
    readable: bool,
    /// The channel may have room; likewise.
    writable: bool,
}

impl Port {
    pub(crate) fn new(name: &str, channel: Channel) -> Self {
        Self {
            name: name.to_owned(),
            channel,
            open: false,
            filling: VecDeque::new(),
            sending: VecDeque::new(),
            sent: Sent::default(),
            readable: true,
            writable: true,
        }
    }

    /// As after power-on. What came from the outside and was not read waits there.
    pub(crate) fn reset(&mut self) {
        self.open = false;
        self.filling.clear();
        self.sending.clear();
        self.sent = Sent::default();
        self.readable = true;
        self.writable = true;
    }

    /// A byte that goes out at once or not at all.
    pub(crate) fn emergency(&self, byte: u8) {
        self.channel.write(&[byte]);
    }

    /// Room for bytes from the outside.
    pub(crate) fn add_room(&mut self, request: &Request<'_>) {
        self.filling.push_back((request.handle, request.writable));
    }

    /// Bytes for the outside.
    pub(crate) fn add_bytes(&mut self, request: &Request<'_>) {
        let (handle, length) = (request.handle, request.readable);
        if self.sending.is_empty() {
            // After a restore, the request that had been sent in part comes again as the first, and is gone on with.
            let offset = if self.sent.length == length { self.sent.offset } else { 0 };
            self.sent = Sent { length, offset };
        }
        self.sending.push_back((handle, length));
    }

    /// The channel has bytes.
    pub(crate) fn set_readable(&mut self) {
        self.readable = true;
    }

    /// The channel has room.
    pub(crate) fn set_writable(&mut self) {
        self.writable = true;
    }

    /// Fills requests with what came from the outside.
    pub(crate) fn fill(&mut self, answers: &mut Vec<Answer>) {
        while self.open
            && self.readable
            && let Some(&(request, room)) = self.filling.front()
        {
            let written = from_channel(request, 0, room, &self.channel);
            self.readable = written == room;
            if written == 0 && room > 0 {
                break;
            }
            self.filling.pop_front();
            answers.push(Answer { request, written });
        }
    }

    /// Sends what the channel takes.
    pub(crate) fn send(&mut self, answers: &mut Vec<Answer>) {
        while self.writable
            && let Some(&(request, length)) = self.sending.front()
        {
            let left = length.saturating_sub(self.sent.offset);
            let taken = to_channel(request, self.sent.offset, left, &self.channel).min(left);
            if taken < left {
                self.sent.offset += taken;
                self.writable = false;
                break;
            }
            self.sending.pop_front();
            answers.push(Answer { request, written: 0 });
            let length = self.sending.front().map_or(0, |(_, length)| *length);
            self.sent = Sent { length, offset: 0 };
        }
    }

    /// How far the first request to be sent has got. Zeroes when none has begun.
    pub(crate) fn sent(&self) -> Sent {
        if self.sent.offset == 0 { Sent::default() } else { self.sent }
    }

    /// Takes over what [`Port::sent`] said.
    pub(crate) fn set_sent(&mut self, sent: Sent) {
        self.sent = sent;
    }
}
