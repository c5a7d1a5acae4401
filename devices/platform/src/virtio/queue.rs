//! A virtqueue as its device holds it: requests go out, tokens come back. Split and packed rings differ below this.
//!
//! Requests in flight are kept as copies of what their descriptors said, so that they can be given again after a restore; the guest's memory is not
//! asked a second time. How many descriptors are in flight is bounded, whatever the driver's indirect tables say: where the bound is
//! reached, `take` gives no more until some come back, and the device is then notified.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use tenon_core::{BrokenQueue, Buffers, GuestRequest, Ram, RequestQueue};

use super::chain::{Chain, RingError};
use super::packed::Packed;
use super::session::Session;
use super::split::Split;
use crate::encode::{Reader, Writer};

/// The most descriptors in flight in one queue, but that one request is always let through.
const MAX_PARTS: usize = 1 << 16;

/// What a driver set before it enabled a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) size: u16,
    pub(crate) descriptors: u64,
    pub(crate) driver: u64,
    pub(crate) device: u64,
    pub(crate) packed: bool,
    pub(crate) indirect: bool,
    pub(crate) event_index: bool,
}

/// A request that was taken out of a ring.
pub(crate) struct Taken {
    /// How the ring calls it.
    pub(crate) id: u16,
    /// How many of the ring's entries it has.
    pub(crate) slots: u16,
    pub(crate) chain: Chain,
}

/// Whether an index that goes from `old` to `new` passes `event` (virtio 1.2 §2.7.10).
pub(crate) fn passed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

enum Ring {
    Split(Split),
    Packed(Packed),
}

#[derive(Clone)]
struct Flying {
    id: u16,
    slots: u16,
    parts: u16,
    readable: Buffers,
    writable: Buffers,
}

/// The state of an enabled queue.
pub(crate) struct Core {
    number: u16,
    ring: Ring,
    /// Requests that the device has, by token.
    flying: Vec<Option<Flying>>,
    free: Vec<u32>,
    parts: usize,
    /// Requests that a device had when it was saved.
    again: VecDeque<u32>,
    is_held_up: bool,
    broken: Option<RingError>,
    /// Set when the driver resets the device: nothing touches the ring any more.
    is_over: bool,
    session: Session,
}

impl Core {
    /// `Err` says which part of the ring is not aligned or not in RAM.
    pub(crate) fn new(
        ram: &Arc<Ram>,
        layout: &Layout,
        number: u16,
        session: Session,
    ) -> Result<Self, &'static str> {
        let ring = if layout.packed {
            Ring::Packed(Packed::new(ram, layout)?)
        } else {
            Ring::Split(Split::new(ram, layout)?)
        };
        Ok(Self {
            number,
            ring,
            flying: Vec::new(),
            free: Vec::new(),
            parts: 0,
            again: VecDeque::new(),
            is_held_up: false,
            broken: None,
            is_over: false,
            session,
        })
    }

    fn keep(&mut self, flying: Flying) -> u32 {
        self.parts += usize::from(flying.parts);
        let token = self.free.pop().unwrap_or_else(|| {
            self.flying.push(None);
            // No more than the ring has entries.
            u32::try_from(self.flying.len() - 1).unwrap_or(u32::MAX)
        });
        self.flying[token as usize] = Some(flying);
        token
    }

    fn take(&mut self, most: usize, into: &mut Vec<GuestRequest>) -> Result<(), RingError> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        let mut count = 0;
        while count < most {
            if let Some(token) = self.again.pop_front() {
                if let Some(Some(flying)) = self.flying.get(token as usize) {
                    let (readable, writable) = (flying.readable.clone(), flying.writable.clone());
                    into.push(GuestRequest { token, readable, writable });
                    count += 1;
                }
                continue;
            }
            if self.parts >= MAX_PARTS {
                self.is_held_up = true;
                break;
            }
            let taken = match &mut self.ring {
                Ring::Split(ring) => ring.take(),
                Ring::Packed(ring) => ring.take(),
            };
            let Some(Taken { id, slots, chain }) = taken.inspect_err(|error| self.fail(error))? else {
                break;
            };
            let Chain { readable, writable, parts, .. } = chain;
            let request = GuestRequest { token: 0, readable: readable.clone(), writable: writable.clone() };
            let token = self.keep(Flying { id, slots, parts, readable, writable });
            into.push(GuestRequest { token, ..request });
            count += 1;
        }
        if count > 0 {
            match &mut self.ring {
                Ring::Split(ring) => ring.disarm(),
                Ring::Packed(ring) => ring.disarm(),
            }
        }
        Ok(())
    }

    fn fail(&self, error: &RingError) {
        tracing::warn!(
            device = self.session.name(),
            queue = self.number,
            "the driver broke a queue: {error}"
        );
    }

    fn complete(&mut self, token: u32, written: u32) {
        let Some(flying) = self.flying.get_mut(token as usize).and_then(Option::take) else {
            tracing::debug!(queue = self.number, token, "a request was completed that is not in flight");
            return;
        };
        self.free.push(token);
        self.parts -= usize::from(flying.parts);
        let written = u64::from(written).min(flying.writable.length());
        // A request has less than 4 GiB.
        let written = u32::try_from(written).unwrap_or(u32::MAX);
        match &mut self.ring {
            Ring::Split(ring) => ring.put(flying.id, written),
            Ring::Packed(ring) => ring.put(flying.id, flying.slots, written),
        }
    }

    fn publish(&mut self) -> bool {
        match &mut self.ring {
            Ring::Split(ring) => ring.publish(),
            Ring::Packed(ring) => ring.publish(),
        }
    }

    fn arm(&mut self) -> bool {
        if !self.again.is_empty() {
            return false;
        }
        if self.is_held_up || self.broken.is_some() || self.is_over {
            return true;
        }
        match &mut self.ring {
            // What is wrong with the index comes out when requests are taken.
            Ring::Split(ring) => ring.arm().unwrap_or(false),
            Ring::Packed(ring) => ring.arm(),
        }
    }

    /// The driver has reset the device.
    pub(crate) fn end(&mut self) {
        self.is_over = true;
        self.flying = Vec::new();
        self.again.clear();
    }

    /// Where the ring stands, and every request in flight.
    pub(crate) fn save(&self, out: &mut Writer) {
        let (next, done) = match &self.ring {
            Ring::Split(ring) => ring.position(),
            Ring::Packed(ring) => ring.position(),
        };
        out.u16(next);
        out.u16(done);
        out.u8(self.broken.is_some().into());
        let flying: Vec<_> = (0u32..).zip(&self.flying).filter_map(|(n, f)| Some((n, f.as_ref()?))).collect();
        out.count(flying.len());
        for (token, request) in flying {
            out.u32(token);
            out.u16(request.id);
            out.u16(request.slots);
            for row in [&request.readable, &request.writable] {
                out.count(row.ranges().count());
                for (address, length) in row.ranges() {
                    out.u64(address);
                    out.u64(length);
                }
            }
        }
    }

    /// Takes over what [`Core::save`] wrote. The requests in flight are given to the device again, with the same tokens.
    pub(crate) fn restore(
        &mut self,
        ram: &Arc<Ram>,
        layout: &Layout,
        from: &mut Reader,
    ) -> Result<(), String> {
        let position = (from.u16()?, from.u16()?);
        if from.u8()? != 0 {
            self.broken = Some(RingError::Before);
        }
        let count = from.count()?;
        if count > usize::from(layout.size) {
            return Err(format!("{count} requests in flight in a queue of {}", layout.size));
        }
        for _ in 0..count {
            let (token, id, slots) = (from.u32()?, from.u16()?, from.u16()?);
            let mut rows = [Buffers::new(ram), Buffers::new(ram)];
            let mut parts: u16 = 0;
            for row in &mut rows {
                for _ in 0..from.count()? {
                    row.push(from.u64()?, from.u64()?).map_err(|error| error.to_string())?;
                    parts = parts.checked_add(1).ok_or("a request of too many ranges")?;
                }
            }
            let place = usize::try_from(token).unwrap_or(usize::MAX);
            if place >= usize::from(layout.size) || parts > layout.size {
                return Err(format!("token {token} with {parts} ranges in a queue of {}", layout.size));
            }
            if self.flying.len() <= place {
                self.flying.resize(place + 1, None);
            }
            let [readable, writable] = rows;
            self.parts += usize::from(parts);
            self.flying[place] = Some(Flying { id, slots, parts, readable, writable });
            self.again.push_back(token);
        }
        self.free =
            (0u32..).zip(&self.flying).filter_map(|(n, flying)| flying.is_none().then_some(n)).collect();
        let flying = self.flying.iter().flatten();
        match &mut self.ring {
            Ring::Split(ring) => ring.set_position(position, flying.map(|request| request.id)),
            Ring::Packed(ring) => {
                let slots = flying.map(|request| u32::from(request.slots)).sum();
                if !ring.set_position(position, slots) {
                    return Err(format!("a packed ring of {} at {position:?}", layout.size));
                }
            }
        }
        Ok(())
    }
}

/// The device's end.
pub(crate) struct Handle(pub(crate) Arc<Mutex<Core>>);

impl RequestQueue for Handle {
    fn take(&mut self, most: usize, into: &mut Vec<GuestRequest>) -> Result<(), BrokenQueue> {
        let mut core = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if core.is_over {
            return Ok(());
        }
        let result = core.take(most, into);
        if let Err(error) = &result
            && core.broken.is_none()
        {
            core.broken = Some(error.clone());
            core.session.fail();
        }
        result.map_err(|error| BrokenQueue { queue: core.number, what: error.to_string() })
    }

    fn complete(&mut self, token: u32, written: u32) {
        let mut core = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !core.is_over {
            core.complete(token, written);
        }
    }

    fn publish(&mut self) {
        let mut core = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if core.is_over {
            return;
        }
        if core.publish() {
            core.session.interrupt(core.number);
        }
        if core.is_held_up && core.parts < MAX_PARTS {
            core.is_held_up = false;
            let (session, number) = (core.session.clone(), core.number);
            drop(core);
            session.notify(number);
        }
    }

    fn arm(&mut self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).arm()
    }
}
