//! The text by which a user names a network, such as `user,forward=2222:22,pcap=FILE`: what may stand in it, and what is wrong with it.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::path::PathBuf;

use crate::user::{DNS, Forward, GATEWAY, GUEST, Protocol};

/// Something that a user asked for and cannot have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("network: {key}: {problem}; {remedy}")]
pub struct NetworkError {
    /// Which part of the request.
    pub key: String,
    /// What is wrong with it.
    pub problem: String,
    /// What would be right, or what to do.
    pub remedy: String,
}

impl NetworkError {
    pub(crate) fn new(key: impl Into<String>, problem: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { key: key.into(), problem: problem.into(), remedy: remedy.into() }
    }
}

/// Which network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A private network through ordinary sockets.
    User {
        /// What comes in.
        forwards: Vec<Forward>,
        /// Nothing goes out.
        restrict: bool,
        /// The name server to ask.
        dns: Option<SocketAddr>,
    },
    /// An interface of the host.
    Tap {
        /// Its name.
        name: String,
    },
    /// Another machine, at a Unix socket.
    Socket {
        /// The socket's path.
        path: PathBuf,
        /// Make it and wait there, and not connect to it.
        listen: bool,
    },
}

/// A network as it was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// Which.
    pub kind: Kind,
    /// What the guest's MAC address is made from if [`Spec::mac`] is none: the same name on the same host always gives the same. `id=` sets it;
    /// who runs several machines puts the machine's name into it.
    pub name: String,
    /// The guest's MAC address.
    pub mac: Option<[u8; 6]>,
    /// The longest packet.
    pub mtu: Option<u16>,
    /// Where to record the frames.
    pub pcap: Option<PathBuf>,
    /// The most bytes recorded of a frame: 64 to 262144.
    pub snaplen: u32,
}

/// How much of each frame is recorded if nothing is said: all of the longest.
pub const SNAPLEN: u32 = 65535 + 18;

impl Kind {
    /// The settings that it takes, as a sentence.
    #[must_use]
    pub fn settings(&self) -> String {
        let name = match self {
            Self::User { .. } => "user",
            Self::Tap { .. } => "tap",
            Self::Socket { .. } => "socket",
        };
        format!("{name} takes {}, {COMMON}", own_settings(name).unwrap_or_default())
    }
}

/// The settings of one kind of network and of no other.
fn own_settings(kind: &str) -> Option<&'static str> {
    match kind {
        "user" => Some("forward, restrict, dns"),
        "tap" => Some("name"),
        "socket" => Some("listen, connect"),
        _ => None,
    }
}

/// Whether a setting is one of any kind of network: others can be those of the card.
#[must_use]
pub fn is_setting(key: &str) -> bool {
    let own = ["user", "tap", "socket"].into_iter().filter_map(own_settings);
    own.chain([COMMON]).any(|keys| keys.split(", ").any(|other| other == key))
}

const KINDS: &str = "say user, tap:NAME, socket,listen=PATH or socket,connect=PATH";
const COMMON: &str = "id, mac, mtu, pcap, snaplen";

/// Reads such a text.
///
/// # Errors
/// It names no network, or something in it is wrong.
pub fn parse(text: &str) -> Result<Spec, NetworkError> {
    let mut words = text.split(',');
    let kind = words.next().unwrap_or_default();
    let mut name = None;
    let (mut mac, mut mtu, mut pcap, mut snaplen) = (None, None, None, SNAPLEN);
    let (mut forwards, mut restrict, mut dns) = (Vec::new(), false, None);
    let (kind, mut tap) = match kind.split_once(':') {
        Some(("tap", name)) => ("tap", Some(name.to_owned())),
        _ => (kind, None),
    };
    let own = match (kind, own_settings(kind)) {
        ("", _) => return Err(NetworkError::new("kind", "none is named", KINDS)),
        (_, Some(own)) => own,
        (other, None) => return Err(NetworkError::new("kind", format!("`{other}` is not known"), KINDS)),
    };
    let (mut listen, mut connect) = (None, None);
    let mut seen = Vec::new();
    for word in words {
        let Some((key, value)) = word.split_once('=') else {
            return Err(NetworkError::new(
                word,
                "has no value",
                format!("write KEY=VALUE with one of {own}, {COMMON}"),
            ));
        };
        if value.is_empty() {
            return Err(NetworkError::new(key, "the value is empty", "write it behind the ="));
        }
        if key != "forward" && seen.contains(&key) {
            return Err(NetworkError::new(key, "is there twice", "leave one out"));
        }
        seen.push(key);
        match (kind, key) {
            (_, "id") => name = Some(value.to_owned()),
            (_, "mac") => mac = Some(mac_address(value)?),
            (_, "mtu") => {
                let least = if kind == "user" { 576 } else { 68 };
                mtu = Some(number(key, value, least, u32::from(u16::MAX))?);
            }
            (_, "pcap") => pcap = Some(PathBuf::from(value)),
            (_, "snaplen") => snaplen = number(key, value, 64, 1 << 18)?,
            ("user", "forward") => {
                let new = forward(value)?;
                let same = |other: &Forward| (other.protocol, other.host) == (new.protocol, new.host);
                if new.host.port() != 0 && forwards.iter().any(same) {
                    let problem = format!("`{value}`: another forward listens at {}", new.host);
                    return Err(NetworkError::new("forward", problem, "take another port, or leave one out"));
                }
                forwards.push(new);
            }
            ("user", "restrict") => restrict = switch(key, value)?,
            ("user", "dns") => dns = Some(name_server(value)?),
            ("tap", "name") if tap.is_none() => tap = Some(value.to_owned()),
            ("socket", "listen") => listen = Some(PathBuf::from(value)),
            ("socket", "connect") => connect = Some(PathBuf::from(value)),
            _ => {
                return Err(NetworkError::new(
                    key,
                    format!("is not known to {kind}"),
                    format!("it has {own}, {COMMON}"),
                ));
            }
        }
    }
    let mtu = mtu.and_then(|mtu| u16::try_from(mtu).ok());
    if pcap.is_none() && snaplen != SNAPLEN {
        return Err(NetworkError::new("snaplen", "nothing is recorded", "add pcap=FILE"));
    }
    let kind = match kind {
        "user" => Kind::User { forwards, restrict, dns },
        "tap" => Kind::Tap {
            name: tap
                .filter(|name| !name.is_empty())
                .ok_or_else(|| NetworkError::new("name", "the interface is not named", "write tap:NAME"))?,
        },
        _ => {
            let (path, listen) = match (listen, connect) {
                (Some(path), None) => (path, true),
                (None, Some(path)) => (path, false),
                _ => {
                    return Err(NetworkError::new(
                        "socket",
                        "it is not clear which end this is",
                        "write either listen=PATH or connect=PATH",
                    ));
                }
            };
            Kind::Socket { path, listen }
        }
    };
    Ok(Spec { kind, name: name.unwrap_or_else(|| text.to_owned()), mac, mtu, pcap, snaplen })
}

fn number(key: &str, value: &str, least: u32, most: u32) -> Result<u32, NetworkError> {
    value.parse().ok().filter(|number| (least..=most).contains(number)).ok_or_else(|| {
        NetworkError::new(
            key,
            format!("`{value}` is not possible"),
            format!("write a number from {least} to {most}"),
        )
    })
}

fn switch(key: &str, value: &str) -> Result<bool, NetworkError> {
    match value {
        "yes" | "on" => Ok(true),
        "no" | "off" => Ok(false),
        _ => Err(NetworkError::new(key, format!("`{value}` is neither"), "write yes or no")),
    }
}

fn mac_address(value: &str) -> Result<[u8; 6], NetworkError> {
    let wrong = |problem: &str| {
        NetworkError::new("mac", format!("`{value}` {problem}"), "write one such as 52:54:00:12:34:56")
    };
    let mut mac = [0; 6];
    let mut parts = value.split([':', '-']);
    for byte in &mut mac {
        let part =
            parts.next().filter(|part| part.len() == 2).ok_or_else(|| wrong("is not six pairs of digits"))?;
        *byte = u8::from_str_radix(part, 16).map_err(|_| wrong("has something else than digits in it"))?;
    }
    if parts.next().is_some() {
        return Err(wrong("is too long"));
    }
    if mac[0] & 1 != 0 || mac == [0; 6] {
        return Err(wrong(
            "cannot be that of one device: its first byte must be even, and not all may be zero",
        ));
    }
    Ok(mac)
}

fn name_server(value: &str) -> Result<SocketAddr, NetworkError> {
    value.parse().or_else(|_| value.parse().map(|address| SocketAddr::new(address, 53))).map_err(|_| {
        NetworkError::new("dns", format!("`{value}` is no address"), "write ADDRESS or ADDRESS:PORT")
    })
}

/// Reads `[tcp:|udp:]HOST:GUEST` or `[tcp:|udp:][ADDRESS]:PORT-[ADDRESS]:PORT`.
fn forward(value: &str) -> Result<Forward, NetworkError> {
    let wrong = |problem: String| {
        NetworkError::new(
            "forward",
            format!("`{value}`: {problem}"),
            "write HOST-PORT:GUEST-PORT, or [tcp:|udp:][ADDRESS]:PORT-[ADDRESS]:PORT",
        )
    };
    let (protocol, ends) = match value.split_once(':') {
        Some(("tcp", ends)) => (Protocol::Tcp, ends),
        Some(("udp", ends)) => (Protocol::Udp, ends),
        _ => (Protocol::Tcp, value),
    };
    let port = |text: &str| text.parse::<u16>().map_err(|_| wrong(format!("`{text}` is no port")));
    let end = |text: &str, default: Ipv4Addr| {
        let (address, number) = text.rsplit_once(':').unwrap_or(("", text));
        let address = match address {
            "" => default,
            text => text.parse().map_err(|_| wrong(format!("`{text}` is no IPv4 address")))?,
        };
        Ok(SocketAddrV4::new(address, port(number)?))
    };
    let (host, guest) = if let Some((host, guest)) = ends.split_once('-') {
        (end(host, Ipv4Addr::LOCALHOST)?, end(guest, GUEST)?)
    } else {
        let (host, guest) = ends.split_once(':').ok_or_else(|| wrong("one port is missing".into()))?;
        (SocketAddrV4::new(Ipv4Addr::LOCALHOST, port(host)?), SocketAddrV4::new(GUEST, port(guest)?))
    };
    if guest.port() == 0 {
        return Err(wrong("the guest's port is 0".into()));
    }
    if guest.ip().octets()[..3] != GUEST.octets()[..3] || [GATEWAY, DNS].contains(guest.ip()) {
        return Err(wrong(format!("{} is not in the guest's network 10.0.2.0/24", guest.ip())));
    }
    Ok(Forward { protocol, host, guest })
}

/// A MAC address of the locally administered kind, the same for the same name on the same host.
#[must_use]
pub fn local_mac(name: &str) -> [u8; 6] {
    // What tells this host from others that share a bridge with it; without it the name alone decides.
    let host = std::fs::read_to_string("/etc/machine-id").unwrap_or_default();
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for byte in host.trim().bytes().chain([0]).chain(name.bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    // FNV-1a leaves names that differ in the end close to each other: mix.
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash ^= hash >> 33;
    let [a, b, c, d, e, f, ..] = hash.to_be_bytes();
    [(a | 2) & !1, b, c, d, e, f]
}
