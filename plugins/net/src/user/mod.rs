//! The user network: a private network of one guest, carried by ordinary sockets of this process. It needs no rights and no set-up.
//!
//! | address | who |
//! | --- | --- |
//! | 10.0.2.2 | the gateway; TCP and UDP to it reach the host's loopback address |
//! | 10.0.2.3 | a name server; what it is asked is asked of the host's |
//! | 10.0.2.15 | the guest, by DHCP |
//!
//! TCP and UDP out go to any address that the host can reach, but for the host's own 127.0.0.0/8 by that name. In come only what is forwarded.
//! Pings are answered by the gateway alone. It is IPv4 only, and datagrams in fragments are dropped on their way out.
//!
//! All work is done on one thread for each network, which sleeps in `epoll`; the guest's threads hand frames over and never wait. Connections, datagram
//! pairs, frames that wait, and the buffers of each are limited: the connection that was used least recently makes room for a new one.

mod gateway;
mod link;
mod packet;
mod stack;
mod tcp;
mod udp;

use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, UdpSocket};
use std::sync::Arc;
use std::thread::JoinHandle;

use tenon_core::{Buffers, NetworkPort, Offloads, PortCounters, PortInfo, PortNews};

use crate::frame::{Header, MAX_FRAME};
use crate::poll::Bell;
use crate::queue::{Counts, Inbox, Outbox};
pub(crate) use stack::Stack;

/// The gateway.
pub(crate) const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// The name server.
pub(crate) const DNS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
/// The guest.
pub(crate) const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
/// The network's mask.
const MASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);

/// What is forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// Connections.
    Tcp,
    /// Datagrams.
    Udp,
}

/// Something that the host takes for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// What.
    pub protocol: Protocol,
    /// Where the host listens; port 0 lets it choose.
    pub host: SocketAddrV4,
    /// Where the guest does.
    pub guest: SocketAddrV4,
}

/// How a user network is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserConfig {
    /// The guest's MAC address.
    pub mac: [u8; 6],
    /// The longest packet in bytes: 576 to 65535.
    pub mtu: u16,
    /// What comes in.
    pub forwards: Vec<Forward>,
    /// Nothing goes out, names are not looked up; what is forwarded works.
    pub restrict: bool,
    /// The name server to ask, instead of the first of the host's own `/etc/resolv.conf`.
    pub dns: Option<SocketAddr>,
}

/// What the port's thread shares with the guest's.
pub(crate) struct Shared {
    pub(crate) outbox: Outbox,
    pub(crate) inbox: Arc<Inbox>,
    pub(crate) counts: Arc<Counts>,
    pub(crate) bell: Bell,
}

/// A user network.
pub struct UserNetwork {
    shared: Arc<Shared>,
    info: PortInfo,
    forwards: Vec<(Protocol, SocketAddr)>,
    thread: Option<JoinHandle<()>>,
}

impl UserNetwork {
    /// Opens the forwards' sockets and starts the network.
    ///
    /// # Errors
    /// The host refuses: the first of the pair says what was being done.
    pub fn new(config: &UserConfig) -> Result<Arc<Self>, (String, io::Error)> {
        let failed = |what: &str| {
            let what = what.to_owned();
            move |error: io::Error| (what, error)
        };
        let (mut listeners, mut sockets, mut forwards) = (Vec::new(), Vec::new(), Vec::new());
        for forward in &config.forwards {
            let at = failed(&format!("listening at {}", forward.host));
            let host = match forward.protocol {
                Protocol::Tcp => {
                    let listener = TcpListener::bind(forward.host).and_then(|socket| {
                        socket.set_nonblocking(true)?;
                        Ok((socket.local_addr()?, socket))
                    });
                    let (address, socket) = listener.map_err(at)?;
                    listeners.push((socket, forward.guest));
                    address
                }
                Protocol::Udp => {
                    let socket = UdpSocket::bind(forward.host).and_then(|socket| {
                        socket.set_nonblocking(true)?;
                        Ok((socket.local_addr()?, socket))
                    });
                    let (address, socket) = socket.map_err(at)?;
                    sockets.push((socket, forward.guest));
                    address
                }
            };
            forwards.push((forward.protocol, host));
        }
        let bell = Bell::new().map_err(failed("making an eventfd"))?;
        let shared = Arc::new(Shared {
            outbox: Outbox::default(),
            inbox: Arc::default(),
            counts: Arc::default(),
            bell,
        });
        let stack =
            Stack::new(shared.clone(), config, listeners, sockets).map_err(failed("watching the sockets"))?;
        let thread = std::thread::Builder::new()
            .name("net-user".into())
            .spawn(move || stack.run())
            .map_err(failed("starting the network's thread"))?;
        let offloads = Offloads { checksum: true, tso4: true, tso6: false };
        let info =
            PortInfo { mac: config.mac, mtu: config.mtu, link_up: true, send: offloads, receive: offloads };
        Ok(Arc::new(Self { shared, info, forwards, thread: Some(thread) }))
    }

    /// Where the host listens, in the order of the configuration.
    #[must_use]
    pub fn forwards(&self) -> &[(Protocol, SocketAddr)] {
        &self.forwards
    }
}

impl NetworkPort for UserNetwork {
    fn info(&self) -> PortInfo {
        self.info
    }

    fn accept(&self, offloads: Offloads) {
        self.shared.inbox.accept(offloads);
    }

    fn send(&self, frame: &Buffers) -> bool {
        let length = usize::try_from(frame.length()).unwrap_or(usize::MAX);
        let taken = length <= MAX_FRAME && {
            let mut bytes = vec![0; length];
            frame.read(0, &mut bytes);
            // From here on it is ours, and the guest cannot change it.
            Header::parse(&bytes).is_ok()
                && self.shared.outbox.push(bytes).is_some_and(|first| {
                    if first {
                        self.shared.bell.ring();
                    }
                    true
                })
        };
        let counts = &self.shared.counts;
        Counts::add(if taken { &counts.sent } else { &counts.send_dropped });
        taken
    }

    fn waiting(&self, most: usize, into: &mut Vec<u32>) {
        self.shared.inbox.waiting(most, into);
    }

    fn receive(&self) -> Option<Vec<u8>> {
        let (frame, wake) = self.shared.inbox.receive();
        if wake {
            self.shared.bell.ring();
        }
        if frame.is_some() {
            Counts::add(&self.shared.counts.received);
        }
        frame
    }

    fn watch(&self, news: Box<dyn Fn(PortNews) + Send + Sync>) {
        self.shared.inbox.watch(news);
    }

    fn counters(&self) -> PortCounters {
        self.shared.counts.read()
    }
}

impl Drop for UserNetwork {
    fn drop(&mut self) {
        self.shared.bell.stop(self.thread.take());
    }
}
