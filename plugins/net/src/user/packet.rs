//! What came from the guest, read and checked: every range in it lies in the frame.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::ops::Range;

use super::link::{IPV4, PACKET, TCP, UDP};
use crate::checksum;
use crate::frame::Header;
use tenon_core::FRAME_HEADER;

/// An IPv4 packet in a frame of the guest.
pub(super) struct Packet {
    pub(super) frame: Vec<u8>,
    pub(super) mac: [u8; 6],
    pub(super) source: Ipv4Addr,
    pub(super) to: Ipv4Addr,
    pub(super) protocol: u8,
    /// The packet with its header.
    pub(super) ip: Range<usize>,
    /// What is behind the IPv4 header.
    pub(super) payload: Range<usize>,
    /// The checksum of TCP or UDP need not be looked at: it is the guest's to leave it out.
    trusted: bool,
}

impl Packet {
    /// Reads a frame whose header was checked. `None` if it is not a whole IPv4 packet.
    pub(super) fn parse(frame: Vec<u8>) -> Option<Self> {
        let header = Header::parse(&frame).ok()?;
        let packet = frame.get(PACKET..)?;
        let length = usize::from(*packet.first()? & 15) * 4;
        let total = usize::from(u16::from_be_bytes([*packet.get(2)?, *packet.get(3)?]));
        let head = packet.get(..length)?;
        let fragment = u16::from_be_bytes([*head.get(6)?, *head.get(7)?]) & 0x3fff;
        let sound = head.len() >= IPV4
            && head[0] >> 4 == 4
            && total >= length
            && total <= packet.len()
            && fragment == 0
            && checksum::finish(checksum::sum(head)) == 0;
        if !sound {
            return None;
        }
        let address = |at: usize| Ipv4Addr::new(head[at], head[at + 1], head[at + 2], head[at + 3]);
        let (source, to, protocol) = (address(12), address(16), head[9]);
        let mut mac = [0; 6];
        mac.copy_from_slice(&frame[FRAME_HEADER + 6..FRAME_HEADER + 12]);
        Some(Self {
            mac,
            source,
            to,
            protocol,
            ip: PACKET..PACKET + total,
            payload: PACKET + length..PACKET + total,
            trusted: header.checksum.is_some(),
            frame,
        })
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.frame[self.payload.clone()]
    }

    fn sum_is_right(&self) -> bool {
        let addresses = &self.frame[self.ip.start + 12..self.ip.start + 20];
        let bytes = self.bytes();
        let sum = checksum::pseudo_header(addresses, self.protocol, bytes.len()) + checksum::sum(bytes);
        self.trusted || checksum::finish(sum) == 0
    }

    fn ports(&self) -> (SocketAddrV4, SocketAddrV4) {
        let bytes = self.bytes();
        let port = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        (SocketAddrV4::new(self.source, port(0)), SocketAddrV4::new(self.to, port(2)))
    }

    /// Reads it as TCP.
    pub(super) fn tcp(&self) -> Option<Segment> {
        let bytes = self.bytes();
        let data = usize::from(*bytes.get(12)? >> 4) * 4;
        if self.protocol != TCP || bytes.len() < 20 || !(20..=bytes.len()).contains(&data) {
            return None;
        }
        let number = |at: usize| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let (guest, remote) = self.ports();
        let segment = Segment {
            guest,
            remote,
            flags: bytes[13],
            sequence: number(4),
            acknowledgement: number(8),
            length: bytes.len() - data,
        };
        (guest.port() != 0 && remote.port() != 0 && self.sum_is_right()).then_some(segment)
    }

    /// Reads it as UDP: the addresses and where the data is.
    pub(super) fn udp(&self) -> Option<(SocketAddrV4, SocketAddrV4, &[u8])> {
        let bytes = self.bytes();
        let length = usize::from(u16::from_be_bytes([*bytes.get(4)?, *bytes.get(5)?]));
        let unsummed = bytes.get(6..8)? == [0, 0];
        let data = bytes.get(8..length)?;
        let (guest, remote) = self.ports();
        let sound = self.protocol == UDP && guest.port() != 0 && remote.port() != 0;
        (sound && (unsummed || length != bytes.len() || self.sum_is_right())).then_some((guest, remote, data))
    }
}

/// The head of a TCP segment.
pub(super) struct Segment {
    pub(super) guest: SocketAddrV4,
    pub(super) remote: SocketAddrV4,
    pub(super) flags: u8,
    pub(super) sequence: u32,
    pub(super) acknowledgement: u32,
    /// Bytes of data.
    pub(super) length: usize,
}

pub(super) const FIN: u8 = 1;
pub(super) const SYN: u8 = 2;
pub(super) const RST: u8 = 4;
pub(super) const ACK: u8 = 16;

/// The place of the maximum segment size in the options of `segment`, if it has that option.
pub(super) fn mss_option(segment: &[u8]) -> Option<usize> {
    let end = (usize::from(*segment.get(12)? >> 4) * 4).min(segment.len());
    let mut at = 20;
    while at < end {
        match segment[at] {
            0 => return None,
            1 => at += 1,
            2 => return (at + 4 <= end && segment[at + 1] == 4).then_some(at + 2),
            _ => at += usize::from(*segment.get(at + 1)?).max(2),
        }
    }
    None
}
