//! The virtual wire to the guest: puts packets into frames, and frames into the row that waits for the driver.

use std::net::Ipv4Addr;
use std::sync::Arc;

use tenon_core::FRAME_HEADER;

use crate::checksum;
use crate::frame::{ETHERNET, Family, Header, Large, Partial, fit};
use crate::queue::{Counts, Inbox};

/// The length of the IPv4 headers that we make.
pub(super) const IPV4: usize = 20;
/// Where a packet begins in a frame.
pub(super) const PACKET: usize = FRAME_HEADER + ETHERNET;
/// The gateway's MAC address, the same as in other hypervisors' user networks.
pub(super) const GATEWAY_MAC: [u8; 6] = [0x52, 0x55, 10, 0, 2, 2];

pub(super) const ICMP: u8 = 1;
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;

/// A length within a packet as a field of a header: longer packets are not made.
pub(super) fn short(length: usize) -> u16 {
    u16::try_from(length).unwrap_or(u16::MAX)
}

pub(super) struct Link {
    pub(super) inbox: Arc<Inbox>,
    pub(super) counts: Arc<Counts>,
    pub(super) mtu: u16,
}

impl Link {
    /// Sends a frame whose packet `fill` writes into `length` zero bytes.
    pub(super) fn ethernet(&self, to: [u8; 6], ethertype: u16, length: usize, fill: impl FnOnce(&mut [u8])) {
        let mut frame = vec![0; PACKET + length];
        fill(&mut frame[PACKET..]);
        self.push(frame, to, ethertype, Header::default());
    }

    /// Sends an IPv4 packet with `payload`. The checksum of UDP is filled in here; ICMP has its own. It is cut into fragments if it is too long.
    pub(super) fn ipv4(&self, to: [u8; 6], addresses: (Ipv4Addr, Ipv4Addr), protocol: u8, payload: &[u8]) {
        let room = usize::from(self.mtu) - IPV4;
        let mut payload = std::borrow::Cow::Borrowed(payload);
        if protocol == UDP {
            let bytes = payload.to_mut();
            bytes[6..8].fill(0);
            let pseudo = [addresses.0.octets(), addresses.1.octets()].concat();
            let sum = checksum::pseudo_header(&pseudo, UDP, bytes.len()) + checksum::sum(bytes);
            let value = match checksum::finish(sum) {
                0 => 0xffff,
                value => value,
            };
            bytes[6..8].copy_from_slice(&value.to_be_bytes());
        }
        let whole = payload.len() <= room;
        // All fragments but the last are of a multiple of 8 bytes.
        let piece = if whole { room.max(1) } else { room & !7 };
        let id = if whole { 0 } else { self.fragment_id(&payload) };
        let count = payload.len().div_ceil(piece).max(1);
        for number in 0..count {
            let at = number * piece;
            let part = &payload[at..payload.len().min(at + piece)];
            let more = if number + 1 < count { 0x2000 } else { 0 };
            self.ethernet(to, 0x0800, IPV4 + part.len(), |packet| {
                packet[IPV4..].copy_from_slice(part);
                header(packet, addresses, protocol);
                packet[4..6].copy_from_slice(&id.to_be_bytes());
                packet[6..8].copy_from_slice(&(short(at / 8) | more).to_be_bytes());
                let sum = checksum::finish(checksum::sum(&packet[..IPV4]));
                packet[10..12].copy_from_slice(&sum.to_be_bytes());
            });
        }
    }

    /// Something that two datagrams in a row do not have in common: what they hold.
    fn fragment_id(&self, payload: &[u8]) -> u16 {
        let frames = self.counts.received.load(std::sync::atomic::Ordering::Relaxed);
        checksum::finish(checksum::sum(payload) + frames)
    }

    /// Sends an IPv4 packet with a TCP segment that `fill` writes into `length` bytes, without the checksum of TCP. With more than `mss` bytes of data it
    /// is a large one.
    pub(super) fn tcp<R>(
        &self,
        to: [u8; 6],
        mss: u16,
        length: usize,
        fill: impl FnOnce(&mut [u8]) -> R,
    ) -> R {
        let mut frame = vec![0; PACKET + length];
        let packet = &mut frame[PACKET..];
        let result = fill(packet);
        let mut header = Header::default();
        if length >= IPV4 + 20 {
            let pseudo = checksum::partial(&packet[12..20], TCP, length - IPV4);
            let (start, data) = (IPV4, IPV4 + usize::from(packet[IPV4 + 12] >> 4) * 4);
            packet[start + 16..start + 18].copy_from_slice(&pseudo.to_be_bytes());
            header.checksum = Some(Partial { start: short(ETHERNET + start), offset: 16 });
            if length > data + usize::from(mss) {
                header.large = Some(Large { family: Family::V4, size: mss, ecn: false });
            }
        }
        self.push(frame, to, 0x0800, header);
        result
    }

    fn push(&self, mut frame: Vec<u8>, to: [u8; 6], ethertype: u16, header: Header) {
        let head = &mut frame[FRAME_HEADER..PACKET];
        head[..6].copy_from_slice(&to);
        head[6..12].copy_from_slice(&GATEWAY_MAC);
        head[12..].copy_from_slice(&ethertype.to_be_bytes());
        header.write(&mut frame);
        let made = fit(frame, self.inbox.accepted(), |frame| {
            if !self.inbox.push(frame) {
                Counts::add(&self.counts.receive_dropped);
            }
        });
        if made.is_err() {
            Counts::add(&self.counts.receive_dropped);
        }
    }
}

/// Writes an IPv4 header for all of `packet`, without its checksum.
fn header(packet: &mut [u8], addresses: (Ipv4Addr, Ipv4Addr), protocol: u8) {
    let length = short(packet.len());
    packet[..IPV4].fill(0);
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&length.to_be_bytes());
    packet[8] = 64;
    packet[9] = protocol;
    packet[12..16].copy_from_slice(&addresses.0.octets());
    packet[16..20].copy_from_slice(&addresses.1.octets());
}
