//! Commands of the control queue (virtio 1.2 §5.1.6.5): class, command and data in the readable part, an acknowledgement in the writable part.

/// How many of the first bytes of a command come with it: enough for every command but a table of addresses.
pub(crate) const HEAD: u16 = 16;

/// The acknowledgement.
pub(crate) const OK: u8 = 0;
pub(crate) const ERROR: u8 = 1;

const CLASS_RX: u8 = 0;
const RX_LAST: u8 = 5;
const CLASS_MAC: u8 = 1;
const MAC_TABLE_SET: u8 = 0;
const MAC_ADDR_SET: u8 = 1;
const CLASS_MQ: u8 = 4;
const MQ_PAIRS_SET: u8 = 0;
const CLASS_OFFLOADS: u8 = 5;
const OFFLOADS_SET: u8 = 0;

const ADDRESS: u64 = 6;

/// A command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    /// Which frames the driver wants besides those to its address.
    Filter,
    /// The same by two lists of addresses, each behind its count. The second count is at this offset of the request.
    FilterTable {
        second: u32,
    },
    SetAddress([u8; 6]),
    SetPairs(u16),
    SetOffloads(u64),
}

/// Reads a command, which has exactly the length that it must have. `head` are its first bytes, `length` is the length of the whole.
pub(crate) fn parse(head: &[u8], length: u32) -> Option<Command> {
    let (class, command) = (*head.first()?, *head.get(1)?);
    let data = head.get(2..)?;
    let data_length = u64::from(length).checked_sub(2)?;
    let is_long = |length: u64| data_length == length;
    match (class, command) {
        (CLASS_RX, 0..=RX_LAST) if is_long(1) => Some(Command::Filter),
        (CLASS_MAC, MAC_TABLE_SET) => {
            let count = u32::from_le_bytes(*data.first_chunk()?);
            let second = 6 + u64::from(count) * ADDRESS;
            let second = u32::try_from(second).ok().filter(|second| *second < length)?;
            Some(Command::FilterTable { second })
        }
        (CLASS_MAC, MAC_ADDR_SET) if is_long(6) => Some(Command::SetAddress(*data.first_chunk()?)),
        (CLASS_MQ, MQ_PAIRS_SET) if is_long(2) => {
            Some(Command::SetPairs(u16::from_le_bytes(*data.first_chunk()?)))
        }
        (CLASS_OFFLOADS, OFFLOADS_SET) if is_long(8) => {
            Some(Command::SetOffloads(u64::from_le_bytes(*data.first_chunk()?)))
        }
        _ => None,
    }
}

/// Whether a table of addresses has the length that its counts say, where `count` are the bytes of its second one.
pub(crate) fn is_whole(second: u32, count: &[u8], length: u32) -> bool {
    let count = count.try_into().map(u32::from_le_bytes);
    count.is_ok_and(|count| u64::from(second) + 4 + u64::from(count) * ADDRESS == u64::from(length))
}
