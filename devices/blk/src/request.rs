//! Requests as the driver writes them (virtio 1.2 §5.2.6), and what they come to once they are checked. Nothing here touches a request or a store.

use tenon_sdk::virtio::StoreInfo;

/// The length of a request's header.
pub(crate) const HEADER: u16 = 16;
/// The unit of positions and lengths, whatever the block size.
pub(crate) const SECTOR: u64 = 512;
/// The most ranges of one discard or write-zeroes request.
pub(crate) const MAX_RANGES: u32 = 32;
/// The length of a range.
const RANGE: u32 = 16;
/// The length of an identity.
pub(crate) const IDENTITY: usize = 20;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

/// The only flag of a range.
const UNMAP: u32 = 1;

/// The last byte of every answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// A request whose header is right and whose range lies on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    /// Fills the start of the writable part.
    Read {
        length: u32,
        position: u64,
    },
    /// Takes what follows the header.
    Write {
        length: u32,
        position: u64,
    },
    Flush,
    /// Gives the serial number, cut to `room`.
    Identity {
        room: u32,
    },
    /// Ranges of this many bytes follow the header.
    Ranges {
        kind: RangeKind,
        length: u32,
    },
}

/// What happens to ranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RangeKind {
    Discard,
    WriteZeroes,
}

/// A range that lies on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) position: u64,
    pub(crate) length: u64,
    /// Space may be given back.
    pub(crate) unmap: bool,
}

/// What requests are checked against.
#[derive(Clone, Debug)]
pub(crate) struct Disk {
    pub(crate) info: StoreInfo,
    /// Nothing may be changed, as a setting or the store says.
    pub(crate) read_only: bool,
}

impl Disk {
    /// Reads a request: `head` are its first bytes, `writable` is at least 1 and includes the status.
    pub(crate) fn parse(&self, head: &[u8], readable: u32, writable: u32) -> Result<Command, Status> {
        let (kind, sector) = header(head).ok_or(Status::IoError)?;
        let (payload, room) = (readable.saturating_sub(HEADER.into()), writable.saturating_sub(1));
        match kind {
            IN => Ok(Command::Read { length: room, position: self.place(sector, room.into())? }),
            OUT => {
                self.changes()?;
                Ok(Command::Write { length: payload, position: self.place(sector, payload.into())? })
            }
            FLUSH => Ok(Command::Flush),
            GET_ID => Ok(Command::Identity { room }),
            DISCARD | WRITE_ZEROES => {
                self.changes()?;
                let kind = if kind == DISCARD { RangeKind::Discard } else { RangeKind::WriteZeroes };
                if kind == RangeKind::Discard && !self.info.discard {
                    return Err(Status::Unsupported);
                }
                if payload == 0 || !payload.is_multiple_of(RANGE) || payload / RANGE > MAX_RANGES {
                    return Err(Status::IoError);
                }
                Ok(Command::Ranges { kind, length: payload })
            }
            _ => Err(Status::Unsupported),
        }
    }

    /// Reads the ranges of a request, all of which must be right before the first is worked on. Empty ones are left out.
    pub(crate) fn parse_ranges(&self, kind: RangeKind, payload: &[u8]) -> Result<Vec<Range>, Status> {
        let (ranges, []) = payload.as_chunks::<16>() else { return Err(Status::IoError) };
        let mut checked = Vec::with_capacity(ranges.len());
        for range in ranges {
            let [sector, rest] = halves(range);
            let (sectors, flags) = (rest & u64::from(u32::MAX), rest >> 32);
            // The unmap flag belongs to write-zeroes alone (virtio 1.2 §5.2.6.2).
            let allowed = if kind == RangeKind::WriteZeroes { u64::from(UNMAP) } else { 0 };
            if flags & !allowed != 0 {
                return Err(Status::Unsupported);
            }
            if sectors > self.max_sectors(kind).into() {
                return Err(Status::IoError);
            }
            let length = sectors * SECTOR;
            let position = self.place(sector, length)?;
            if length > 0 {
                checked.push(Range { position, length, unmap: flags != 0 });
            }
        }
        Ok(checked)
    }

    /// The most sectors of one range. Where the store has to write zeroes for them, a range must not hold up the queue for long.
    pub(crate) fn max_sectors(&self, kind: RangeKind) -> u32 {
        match kind {
            RangeKind::WriteZeroes if !self.info.write_zeroes => 1 << 15,
            _ => 1 << 22,
        }
    }

    /// Where a range begins in bytes, if all of it lies on the disk and is made of whole blocks.
    fn place(&self, sector: u64, length: u64) -> Result<u64, Status> {
        let block = u64::from(self.info.block_size.max(1));
        let position = sector.checked_mul(SECTOR).ok_or(Status::IoError)?;
        let end = position.checked_add(length).ok_or(Status::IoError)?;
        if end > self.info.size || !position.is_multiple_of(block) || !length.is_multiple_of(block) {
            return Err(Status::IoError);
        }
        Ok(position)
    }

    fn changes(&self) -> Result<(), Status> {
        if self.read_only { Err(Status::IoError) } else { Ok(()) }
    }
}

/// Type and sector.
fn header(head: &[u8]) -> Option<(u32, u64)> {
    let [first, sector] = halves(head.first_chunk()?);
    // The upper half of the first is reserved.
    Some((u32::try_from(first & u64::from(u32::MAX)).ok()?, sector))
}

fn halves(bytes: &[u8; 16]) -> [u64; 2] {
    let half = |from: usize| (0..8).rev().fold(0, |value, at| value << 8 | u64::from(bytes[from + at]));
    [half(0), half(8)]
}
