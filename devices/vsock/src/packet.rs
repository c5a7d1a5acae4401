//! The header of a packet (virtio 1.2 §5.10.6).

/// The length of a header.
pub(crate) const HEADER: u16 = 44;

/// The type of stream sockets.
pub(crate) const STREAM: u16 = 1;

/// A flag of a shutdown: whoever says it receives no more.
pub(crate) const SHUT_RECEIVE: u32 = 1;
/// A flag of a shutdown: whoever says it sends no more.
pub(crate) const SHUT_SEND: u32 = 2;

/// What a packet says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    /// A connection is asked for.
    Request = 1,
    /// It is taken.
    Response = 2,
    /// It is refused, or has ended.
    Reset = 3,
    /// One direction, or both, have ended: see the flags.
    Shutdown = 4,
    /// Bytes follow the header.
    Data = 5,
    /// There is so much room.
    CreditUpdate = 6,
    /// Say how much room there is.
    CreditRequest = 7,
}

impl Op {
    fn from_number(number: u16) -> Option<Self> {
        use Op::{CreditRequest, CreditUpdate, Data, Request, Reset, Response, Shutdown};
        let all = [Request, Response, Reset, Shutdown, Data, CreditUpdate, CreditRequest];
        all.into_iter().find(|op| *op as u16 == number)
    }
}

/// A header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) source_cid: u64,
    pub(crate) destination_cid: u64,
    pub(crate) source_port: u32,
    pub(crate) destination_port: u32,
    /// How many bytes follow.
    pub(crate) length: u32,
    /// The type of the socket.
    pub(crate) kind: u16,
    /// None for one that there is not.
    pub(crate) op: Option<Op>,
    pub(crate) flags: u32,
    /// How many bytes the sender of the packet can keep, and how many it has passed on since the connection began.
    pub(crate) room: u32,
    pub(crate) forwarded: u32,
}

impl Header {
    /// Reads a header; none if the bytes are too few.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; HEADER as usize] = bytes.first_chunk()?;
        let u64_at = |at: usize| Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
        let u32_at = |at: usize| Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
        let u16_at = |at: usize| Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
        Some(Self {
            source_cid: u64_at(0)?,
            destination_cid: u64_at(8)?,
            source_port: u32_at(16)?,
            destination_port: u32_at(20)?,
            length: u32_at(24)?,
            kind: u16_at(28)?,
            op: Op::from_number(u16_at(30)?),
            flags: u32_at(32)?,
            room: u32_at(36)?,
            forwarded: u32_at(40)?,
        })
    }

    /// The bytes of the header.
    pub(crate) fn to_bytes(self) -> [u8; HEADER as usize] {
        let mut bytes = [0; HEADER as usize];
        bytes[0..8].copy_from_slice(&self.source_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.destination_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.source_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.destination_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.length.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.map_or(0, |op| op as u16).to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.room.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.forwarded.to_le_bytes());
        bytes
    }
}
