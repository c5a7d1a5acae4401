//! Frames as they come from a driver: the header of virtio-net (virtio 1.2 §5.1.6), checked against the packet behind it, and the work it
//! asks for, done in software where the receiver does not do it: checksums filled in, large TCP segments cut up.

use tenon_core::{FRAME_HEADER, Offloads};

use crate::checksum;

/// The length of an Ethernet header without a VLAN tag.
pub(crate) const ETHERNET: usize = 14;
/// The longest frame with its header: a VLAN tag and 65535 bytes of payload.
pub(crate) const MAX_FRAME: usize = FRAME_HEADER + ETHERNET + 4 + 65535;
/// The least data of a TCP segment that a large one may be cut into. Less would turn one frame into thousands.
const MIN_SEGMENT: u16 = 48;

const NEEDS_CHECKSUM: u8 = 1;
const DATA_VALID: u8 = 2;
const GSO_TCP4: u8 = 1;
const GSO_TCP6: u8 = 4;
const GSO_ECN: u8 = 0x80;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_VLAN: u16 = 0x8100;
const TCP: u8 = 6;
const TCP_CHECKSUM: u16 = 16;
const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;

/// Why a frame is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FrameError {
    /// It has no room for both headers, or is longer than any packet.
    #[error("a frame of {0} bytes: 26 to {MAX_FRAME} are possible")]
    Length(usize),
    /// The place of the checksum is not in the frame.
    #[error("a checksum from {start}, to be put {offset} bytes after it, is not in the frame")]
    Checksum {
        /// Where the sum begins, from the Ethernet header.
        start: u16,
        /// Where the sum goes, from `start`.
        offset: u16,
    },
    /// A large segment that is not what its header says.
    #[error("a large segment whose {0}")]
    Segment(&'static str),
}

/// Which large segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
}

/// A large TCP segment, to be cut up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Large {
    pub(crate) family: Family,
    /// The most data in each of the parts.
    pub(crate) size: u16,
    pub(crate) ecn: bool,
}

/// A checksum that is left to the receiver of the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Partial {
    /// Where the sum begins, from the Ethernet header.
    pub(crate) start: u16,
    /// Where the sum goes, from `start`.
    pub(crate) offset: u16,
}

/// What a header asks for. Holding one proves that the frame it was read from is long enough for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) checksum: Option<Partial>,
    /// The checksum needs no look.
    pub(crate) valid: bool,
    pub(crate) large: Option<Large>,
}

fn word(bytes: &[u8], at: usize) -> u16 {
    match bytes.get(at..at + 2) {
        Some(&[high, low]) => u16::from_be_bytes([high, low]),
        _ => 0,
    }
}

fn put(bytes: &mut [u8], at: usize, value: u16) {
    if let Some(place) = bytes.get_mut(at..at + 2) {
        place.copy_from_slice(&value.to_be_bytes());
    }
}

/// A length or an index within a frame as the 16 bits of a header: [`MAX_FRAME`] bounds it so that nothing is cut off but by a lie that was refused before.
fn short(value: usize) -> u16 {
    u16::try_from(value).unwrap_or(u16::MAX)
}

/// Where a large segment's parts are, from the Ethernet header.
struct Layout {
    network: usize,
    transport: usize,
    data: usize,
}

impl Layout {
    fn of(packet: &[u8], large: Large, checksum: Partial) -> Result<Self, FrameError> {
        let wrong = |what| Err(FrameError::Segment(what));
        let (network, ethertype) = match word(packet, 12) {
            ETHERTYPE_VLAN => (ETHERNET + 4, word(packet, ETHERNET + 2)),
            other => (ETHERNET, other),
        };
        let transport = usize::from(checksum.start);
        let Some(ip) = packet.get(network..transport) else { return wrong("headers are cut short") };
        match large.family {
            Family::V4 => {
                if ethertype != ETHERTYPE_IPV4 || ip.len() < 20 || ip[0] >> 4 != 4 {
                    return wrong("packet is not IPv4");
                }
                if usize::from(ip[0] & 15) * 4 != ip.len() || ip[9] != TCP || word(ip, 6) & 0x3fff != 0 {
                    return wrong("IPv4 header is not that of whole TCP segment");
                }
            }
            Family::V6 => {
                if ethertype != ETHERTYPE_IPV6 || ip.len() < 40 || ip[0] >> 4 != 6 {
                    return wrong("packet is not IPv6");
                }
                if ip.len() != 40 || ip[6] != TCP {
                    return wrong("IPv6 header is not followed by TCP");
                }
            }
        }
        if checksum.offset != TCP_CHECKSUM {
            return wrong("checksum is not where TCP has it");
        }
        let Some(&words) = packet.get(transport + 12) else { return wrong("TCP header is cut short") };
        let length = usize::from(words >> 4) * 4;
        let data = transport + length;
        if length < 20 || data >= packet.len() {
            return wrong("TCP header is cut short");
        }
        if packet.len() - network > 65535 + usize::from(large.family == Family::V6) * 40 {
            return wrong("packet is longer than an IP packet can be");
        }
        if large.size < MIN_SEGMENT {
            return wrong("parts are of less than 48 bytes");
        }
        Ok(Self { network, transport, data })
    }
}

impl Header {
    /// Reads the header of a frame and checks it against the frame.
    pub(crate) fn parse(frame: &[u8]) -> Result<Self, FrameError> {
        if !(FRAME_HEADER + ETHERNET..=MAX_FRAME).contains(&frame.len()) {
            return Err(FrameError::Length(frame.len()));
        }
        let (head, packet) = frame.split_at(FRAME_HEADER);
        let field = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
        let checksum = if head[0] & NEEDS_CHECKSUM == 0 {
            None
        } else {
            let (start, offset) = (field(6), field(8));
            let end = usize::from(start) + usize::from(offset) + 2;
            if usize::from(start) < ETHERNET || end > packet.len() {
                return Err(FrameError::Checksum { start, offset });
            }
            Some(Partial { start, offset })
        };
        let family = match head[1] & !GSO_ECN {
            0 => None,
            GSO_TCP4 => Some(Family::V4),
            GSO_TCP6 => Some(Family::V6),
            _ => return Err(FrameError::Segment("kind was not offered")),
        };
        let large = family.map(|family| Large { family, size: field(4), ecn: head[1] & GSO_ECN != 0 });
        let header = Self { checksum, valid: head[0] & DATA_VALID != 0, large };
        header.layout(packet)?;
        Ok(header)
    }

    fn layout(&self, packet: &[u8]) -> Result<Option<Layout>, FrameError> {
        match (self.large, self.checksum) {
            (None, _) => Ok(None),
            (Some(large), Some(checksum)) => Layout::of(packet, large, checksum).map(Some),
            (Some(_), None) => Err(FrameError::Segment("checksum is not left to the device")),
        }
    }

    /// Writes the header in front of the packet that the rest of `frame` holds.
    pub(crate) fn write(&self, frame: &mut [u8]) {
        let Some(head) = frame.first_chunk_mut::<FRAME_HEADER>() else { return };
        *head = [0; FRAME_HEADER];
        let mut field = |at: usize, value: u16| head[at..at + 2].copy_from_slice(&value.to_le_bytes());
        if let Some(partial) = self.checksum {
            field(6, partial.start);
            field(8, partial.offset);
        }
        if let Some(large) = self.large {
            field(4, large.size);
        }
        // One buffer, until the device says otherwise.
        field(10, 1);
        head[0] = u8::from(self.checksum.is_some()) * NEEDS_CHECKSUM + u8::from(self.valid) * DATA_VALID;
        if let Some(large) = self.large {
            head[1] = match large.family {
                Family::V4 => GSO_TCP4,
                Family::V6 => GSO_TCP6,
            } | (u8::from(large.ecn) * GSO_ECN);
            // The length of all headers together is a hint; the frame says it itself.
            if let Ok(Some(layout)) = self.layout(&frame[FRAME_HEADER..]) {
                frame[2..4].copy_from_slice(&short(layout.data).to_le_bytes());
            }
        }
    }

    /// Whether a receiver that accepts `offloads` can be given the frame as it is.
    fn fits(&self, offloads: Offloads) -> bool {
        let large = match self.large.map(|large| large.family) {
            None => true,
            Some(Family::V4) => offloads.tso4,
            Some(Family::V6) => offloads.tso6,
        };
        large && (self.checksum.is_none() || offloads.checksum)
    }
}

/// Turns a frame into one or several that a receiver takes who accepts `offloads`, and gives each to `take`.
///
/// # Errors
/// The header is wrong; then `take` was not called.
pub(crate) fn fit(
    mut frame: Vec<u8>,
    offloads: Offloads,
    mut take: impl FnMut(Vec<u8>),
) -> Result<(), FrameError> {
    let header = Header::parse(&frame)?;
    if header.fits(offloads) {
        // Who accepts no offloads is not told that a checksum needs no look.
        let header = Header { valid: header.valid && offloads.checksum, ..header };
        header.write(&mut frame);
        take(frame);
    } else if let (Some(large), Some(layout)) = (header.large, header.layout(&frame[FRAME_HEADER..])?) {
        segments(&frame, large, &layout, take);
    } else {
        if let Some(partial) = header.checksum {
            fill(&mut frame[FRAME_HEADER..], partial);
        }
        Header::default().write(&mut frame);
        take(frame);
    }
    Ok(())
}

/// Fills in a checksum that was left to us. What is there already is part of the sum (the pseudo-header).
fn fill(packet: &mut [u8], partial: Partial) {
    let start = usize::from(partial.start);
    let Some(summed) = packet.get(start..) else { return };
    let value = match checksum::finish(checksum::sum(summed)) {
        // To UDP a zero means that there is none, and to TCP both zeros are the same.
        0 => 0xffff,
        value => value,
    };
    put(packet, start + usize::from(partial.offset), value);
}

fn segments(frame: &[u8], large: Large, layout: &Layout, mut take: impl FnMut(Vec<u8>)) {
    let packet = &frame[FRAME_HEADER..];
    let (headers, data) = packet.split_at(layout.data);
    let transport = layout.transport;
    let sequence = u32::from_be_bytes([
        headers[transport + 4],
        headers[transport + 5],
        headers[transport + 6],
        headers[transport + 7],
    ]);
    let size = usize::from(large.size);
    let last = data.len().div_ceil(size) - 1;
    let mut offset: u32 = 0;
    for (number, piece) in data.chunks(size).enumerate() {
        let mut part = Vec::with_capacity(FRAME_HEADER + headers.len() + piece.len());
        part.resize(FRAME_HEADER, 0);
        part.extend_from_slice(headers);
        part.extend_from_slice(piece);
        Header::default().write(&mut part);
        let packet = &mut part[FRAME_HEADER..];
        let length = packet.len() - layout.network;
        let ip = &mut packet[layout.network..];
        match large.family {
            Family::V4 => {
                put(ip, 2, short(length));
                let id = word(ip, 4).wrapping_add(short(number));
                put(ip, 4, id);
                put(ip, 10, 0);
                let sum = checksum::finish(checksum::sum(&ip[..transport - layout.network]));
                put(ip, 10, sum);
            }
            Family::V6 => put(ip, 4, short(length - 40)),
        }
        let at = sequence.wrapping_add(offset);
        packet[transport + 4..transport + 8].copy_from_slice(&at.to_be_bytes());
        // What ends the whole ends its last part only; that the window was reduced is said once.
        if number != last {
            packet[transport + 13] &= !(FIN | PSH);
        }
        if number != 0 {
            packet[transport + 13] &= !CWR;
        }
        put(packet, transport + 16, 0);
        let ip = &packet[layout.network..transport];
        let addresses = match large.family {
            Family::V4 => &ip[12..20],
            Family::V6 => &ip[8..40],
        };
        let segment = &packet[transport..];
        let sum = checksum::pseudo_header(addresses, TCP, segment.len()) + checksum::sum(segment);
        put(packet, transport + 16, checksum::finish(sum));
        offset = offset.wrapping_add(u32::from(short(piece.len())));
        take(part);
    }
}
