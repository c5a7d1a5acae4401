//! Which of the driver's buffers take which frames.

use std::collections::VecDeque;

use tenon_sdk::virtio::Handle;

/// The length of the header before every frame (virtio 1.2 §5.1.6). A buffer without room for it is of no use.
pub(crate) const HEADER: u32 = 12;

/// A plan for [`tenon_sdk::virtio::Port::receive`].
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// For each frame from the first, how many requests it takes; 0 drops it.
    pub(crate) counts: Vec<u16>,
    pub(crate) requests: Vec<Handle>,
}

impl Plan {
    /// Drops the first so many frames.
    pub(crate) fn dropping(frames: usize) -> Self {
        Self { counts: vec![0; frames], requests: Vec::new() }
    }
}

/// The requests of the receive queue, each with the length of its writable part.
#[derive(Debug, Default)]
pub(crate) struct Room(VecDeque<(Handle, u32)>);

impl Room {
    pub(crate) fn add(&mut self, request: Handle, length: u32) {
        self.0.push_back((request, length));
    }

    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    pub(crate) fn requests(&self) -> usize {
        self.0.len()
    }

    /// Takes requests for the first of these frames, as far as there is room. A frame that is larger than all of it waits for more; without
    /// `mergeable` a frame has one request, and is dropped if it is larger.
    pub(crate) fn plan(&mut self, frames: &[u32], mergeable: bool) -> Plan {
        let mut plan = Plan::default();
        for frame in frames {
            let count = if mergeable {
                let Some(count) = self.requests_for(*frame) else { break };
                count
            } else {
                let Some((_, length)) = self.0.front() else { break };
                (length >= frame).into()
            };
            // A queue is not that long; if it were, its frame would be dropped.
            let number = u16::try_from(count).unwrap_or(0);
            plan.counts.push(number);
            plan.requests.extend(self.0.drain(..usize::from(number)).map(|(request, _)| request));
        }
        plan
    }

    /// Whether something can be done with a first frame of this length: taken, or dropped because it never fits.
    pub(crate) fn settles(&self, frame: u32, mergeable: bool) -> bool {
        if mergeable { self.requests_for(frame).is_some() } else { !self.0.is_empty() }
    }

    /// How many requests from the first hold a frame of this length.
    fn requests_for(&self, frame: u32) -> Option<usize> {
        let mut room = 0;
        let last = self.0.iter().position(|(_, length)| {
            room += u64::from(*length);
            room >= frame.into()
        });
        last.map(|last| last + 1)
    }
}
