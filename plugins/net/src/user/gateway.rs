//! What the virtual network itself answers: ARP, DHCP, and pings of the gateway.

use std::net::Ipv4Addr;

use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, DhcpMessageType, DhcpOption, DhcpPacket, DhcpRepr, EthernetAddress,
};

use super::link::{GATEWAY_MAC, ICMP, Link, UDP, short};
use super::{DNS, GATEWAY, GUEST, MASK};
use crate::checksum;

const LEASE: u32 = 86400;
/// DHCP option: the MTU of the interface (RFC 2132 §5.1).
const MTU_OPTION: u8 = 26;

/// Answers a question for an address of ours. Returns who asked, and with which MAC address.
pub(super) fn arp(link: &Link, packet: &[u8]) -> Option<(Ipv4Addr, [u8; 6])> {
    let packet = ArpPacket::new_checked(packet).ok()?;
    let ArpRepr::EthernetIpv4 {
        operation,
        source_hardware_addr,
        source_protocol_addr,
        target_protocol_addr,
        ..
    } = ArpRepr::parse(&packet).ok()?
    else {
        return None;
    };
    if operation == ArpOperation::Request && [GATEWAY, DNS].contains(&target_protocol_addr) {
        let answer = ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Reply,
            source_hardware_addr: EthernetAddress(GATEWAY_MAC),
            source_protocol_addr: target_protocol_addr,
            target_hardware_addr: source_hardware_addr,
            target_protocol_addr: source_protocol_addr,
        };
        link.ethernet(source_hardware_addr.0, 0x0806, answer.buffer_len(), |bytes| {
            answer.emit(&mut ArpPacket::new_unchecked(bytes));
        });
    }
    Some((source_protocol_addr, source_hardware_addr.0))
}

/// Answers a ping.
pub(super) fn icmp(link: &Link, mac: [u8; 6], from: Ipv4Addr, to: Ipv4Addr, message: &[u8]) -> Option<()> {
    const ECHO: u8 = 8;
    if message.len() < 8 || message[0] != ECHO || checksum::finish(checksum::sum(message)) != 0 {
        return None;
    }
    let mut answer = message.to_vec();
    answer[0] = 0;
    answer[2..4].fill(0);
    let sum = checksum::finish(checksum::sum(&answer));
    answer[2..4].copy_from_slice(&sum.to_be_bytes());
    link.ipv4(mac, (to, from), ICMP, &answer);
    Some(())
}

/// How much of a packet an error message quotes: with it the message has at most 576 bytes (RFC 1812 §4.3.2.3).
pub(super) const QUOTE: usize = 576 - 28;

/// Tells the guest that a packet of its could not be delivered (RFC 792): `code` 1 is the host, 3 the port, 13 a prohibition. `from` is who says so.
pub(super) fn unreachable(link: &Link, mac: [u8; 6], from: Ipv4Addr, to: Ipv4Addr, code: u8, packet: &[u8]) {
    const UNREACHABLE: u8 = 3;
    let quoted = &packet[..packet.len().min(QUOTE)];
    let mut message = vec![UNREACHABLE, code, 0, 0, 0, 0, 0, 0];
    message.extend_from_slice(quoted);
    let sum = checksum::finish(checksum::sum(&message));
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    link.ipv4(mac, (from, to), ICMP, &message);
}

/// Answers a DHCP message.
pub(super) fn dhcp(link: &Link, message: &[u8]) -> Option<()> {
    let packet = DhcpPacket::new_checked(message).ok()?;
    let question = DhcpRepr::parse(&packet).ok()?;
    let client = question.client_hardware_address;
    let ours = question.server_identifier.is_none_or(|server| server == GATEWAY);
    let wanted = question.requested_ip.unwrap_or(question.client_ip);
    let (message_type, address) = match question.message_type {
        DhcpMessageType::Discover => (DhcpMessageType::Offer, GUEST),
        DhcpMessageType::Request if ours && wanted == GUEST => (DhcpMessageType::Ack, GUEST),
        DhcpMessageType::Request if ours => (DhcpMessageType::Nak, Ipv4Addr::UNSPECIFIED),
        DhcpMessageType::Inform => (DhcpMessageType::Ack, Ipv4Addr::UNSPECIFIED),
        _ => return None,
    };
    let good = message_type != DhcpMessageType::Nak;
    let leased = good && address == GUEST;
    let mtu = link.mtu.to_be_bytes();
    let options = [DhcpOption { kind: MTU_OPTION, data: &mtu }];
    let answer = DhcpRepr {
        message_type,
        transaction_id: question.transaction_id,
        secs: 0,
        client_hardware_address: client,
        client_ip: if leased { Ipv4Addr::UNSPECIFIED } else { question.client_ip },
        your_ip: address,
        server_ip: GATEWAY,
        router: good.then_some(GATEWAY),
        subnet_mask: good.then_some(MASK),
        relay_agent_ip: Ipv4Addr::UNSPECIFIED,
        broadcast: question.broadcast,
        requested_ip: None,
        client_identifier: question.client_identifier,
        server_identifier: Some(GATEWAY),
        parameter_request_list: None,
        dns_servers: good.then(|| [DNS].into_iter().collect()),
        max_size: None,
        lease_duration: leased.then_some(LEASE),
        renew_duration: None,
        rebind_duration: None,
        additional_options: if good { &options } else { &[] },
    };
    let mut bytes = vec![0; 8 + answer.buffer_len()];
    let length = short(bytes.len());
    bytes[..2].copy_from_slice(&67_u16.to_be_bytes());
    bytes[2..4].copy_from_slice(&68_u16.to_be_bytes());
    bytes[4..6].copy_from_slice(&length.to_be_bytes());
    answer.emit(&mut DhcpPacket::new_unchecked(&mut bytes[8..])).ok()?;
    let (mac, to) = if question.message_type == DhcpMessageType::Inform {
        (client.0, question.client_ip)
    } else {
        ([0xff; 6], Ipv4Addr::BROADCAST)
    };
    link.ipv4(mac, (GATEWAY, to), UDP, &bytes);
    Some(())
}
