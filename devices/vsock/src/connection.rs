//! One connection: a stream outside, the guest's socket, and the credit of both directions (virtio 1.2 §5.10.6.3).
//!
//! What is to be said to the guest is kept as facts, not as a list of packets: a guest that gives no buffers makes nothing grow.

use tenon_sdk::virtio::{Handle, Sent, Socket, StreamState};

use crate::packet::{HEADER, Header, Op, SHUT_RECEIVE, SHUT_SEND};

/// How many bytes of a connection the host keeps for a program that does not take them.
pub(crate) const KEPT: u32 = 64 << 10;

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// A program outside wants it, and the guest is to be asked.
    Wanted,
    /// The guest has been asked and has not answered.
    Asked,
    /// The guest wants it, and is to be told that it has it.
    Granted,
    /// Bytes flow.
    Open,
}

/// A connection.
#[derive(Debug)]
pub(crate) struct Connection {
    /// The stream's number.
    pub(crate) stream: u32,
    pub(crate) stage: Stage,
    /// It waits for its turn to say something.
    pub(crate) listed: bool,
    /// The stream may have bytes.
    readable: bool,
    /// The program outside sends no more; it takes no more.
    ended: bool,
    deaf: bool,
    /// Flags of shutdowns: what the guest was told, and what it has said.
    told: u32,
    heard: u32,
    /// Bytes for the guest that were given to it, how many it says it has passed on, and how many it can keep.
    given: u32,
    peer_forwarded: u32,
    peer_room: u32,
    /// The guest was asked for credit, and has given none since.
    credit_asked: bool,
    /// Bytes of the guest that were taken, how many of them wait in the host, and how many it was told were passed on.
    taken: u32,
    unsent: u32,
    reported: u32,
    /// The guest wants to know its credit.
    update_wanted: bool,
}

/// What a connection has to say: the op, its flags, and how many bytes follow.
pub(crate) struct Said {
    pub(crate) op: Op,
    pub(crate) flags: u32,
    pub(crate) length: u32,
}

impl Connection {
    pub(crate) fn new(stream: u32, stage: Stage) -> Self {
        Self {
            stream,
            stage,
            listed: false,
            readable: false,
            ended: false,
            deaf: false,
            told: 0,
            heard: 0,
            given: 0,
            peer_forwarded: 0,
            peer_room: 0,
            credit_asked: false,
            taken: 0,
            unsent: 0,
            reported: 0,
            update_wanted: false,
        }
    }

    /// How many bytes the guest has room for. One that says nonsense has none.
    fn credit(&self) -> u32 {
        self.peer_room.saturating_sub(self.given.wrapping_sub(self.peer_forwarded))
    }

    /// How many bytes of the guest have been passed on.
    fn forwarded(&self) -> u32 {
        self.taken.wrapping_sub(self.unsent)
    }

    /// The guest has used half of the credit that it knows of, and there is more.
    fn owes_credit(&self) -> bool {
        self.forwarded() != self.reported && self.taken.wrapping_sub(self.reported) > KEPT / 2
    }

    /// Takes over what a packet of the guest says of its credit.
    pub(crate) fn note_credit(&mut self, header: &Header) {
        (self.peer_room, self.peer_forwarded) = (header.room, header.forwarded);
        // One that has no room says so when it has some; asking again and again would bring the same answer.
        self.credit_asked &= self.credit() == 0;
    }

    /// The guest wants to know its credit.
    pub(crate) fn want_update(&mut self) {
        self.update_wanted = true;
    }

    /// The guest's flags of a shutdown. Whether it has ended both directions.
    pub(crate) fn shut(&mut self, flags: u32, socket: &Socket) -> bool {
        let more = flags & (SHUT_RECEIVE | SHUT_SEND) & !self.heard;
        self.heard |= more;
        if self.heard == SHUT_RECEIVE | SHUT_SEND {
            return true;
        }
        if more != 0 {
            self.readable &= more & SHUT_RECEIVE == 0;
            socket.shut(self.stream, more & SHUT_RECEIVE != 0, more & SHUT_SEND != 0);
        }
        false
    }

    /// Sends bytes that follow a header. False if the guest may not send them: it has said that it is done, or has no credit for them.
    pub(crate) fn send(&mut self, request: Handle, length: u32, socket: &Socket) -> bool {
        let credit = KEPT.saturating_sub(self.taken.wrapping_sub(self.reported));
        if self.heard & SHUT_SEND != 0 || length > credit {
            return false;
        }
        let Sent { taken, unsent } = socket.send(request, HEADER.into(), length, self.stream);
        self.taken = self.taken.wrapping_add(taken);
        self.unsent = unsent;
        taken == length
    }

    /// Takes over how the stream is. Whether both of its directions have ended.
    pub(crate) fn note_stream(&mut self, state: &StreamState) -> bool {
        self.readable |= state.readable && self.heard & SHUT_RECEIVE == 0;
        self.ended |= state.ended;
        self.deaf |= state.deaf;
        self.unsent = state.unsent;
        self.ended && self.deaf
    }

    /// What there is to say now, with `room` bytes for data, which are put there. Nothing if there is nothing.
    pub(crate) fn speak(&mut self, socket: &Socket, request: Handle, room: u32) -> Option<Said> {
        let say = |op| Some(Said { op, flags: 0, length: 0 });
        match self.stage {
            Stage::Wanted => {
                self.stage = Stage::Asked;
                return say(Op::Request);
            }
            Stage::Asked => return None,
            Stage::Granted => {
                self.stage = Stage::Open;
                return say(Op::Response);
            }
            Stage::Open => {}
        }
        let most = self.credit().min(room);
        if self.readable && most > 0 {
            let length = socket.receive(request, HEADER.into(), most, self.stream).min(most);
            self.readable = length == most;
            self.given = self.given.wrapping_add(length);
            if length > 0 {
                return Some(Said { op: Op::Data, flags: 0, length });
            }
        }
        let ends = if self.ended { SHUT_SEND } else { 0 } | if self.deaf { SHUT_RECEIVE } else { 0 };
        if ends != self.told {
            self.told = ends;
            return Some(Said { op: Op::Shutdown, flags: ends, length: 0 });
        }
        if self.update_wanted || self.owes_credit() {
            return say(Op::CreditUpdate);
        }
        if self.readable && self.credit() == 0 && !self.credit_asked {
            self.credit_asked = true;
            return say(Op::CreditRequest);
        }
        None
    }

    /// How much the host keeps, and how much it has passed on, for a header. The guest knows it then.
    pub(crate) fn report(&mut self) -> (u32, u32) {
        self.reported = self.forwarded();
        self.update_wanted = false;
        (KEPT, self.reported)
    }
}
