//! TCP connections of stores, to the hosts that the administrator granted and to no others.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;

use tenon_abi::ConnectionError;

/// How long connecting may take, for each address of the name.
const CONNECT: Duration = Duration::from_secs(10);
/// How long a transfer may stand still.
const TRANSFER: Duration = Duration::from_secs(30);
/// The most connections at a time.
const MOST: usize = 64;
/// The most bytes in one call.
pub(super) const MAX_BYTES: u32 = 1 << 20;

/// The connections of one instance.
pub(super) struct Connections {
    granted: BTreeSet<(String, u16)>,
    list: Vec<Option<TcpStream>>,
}

impl Connections {
    pub(super) fn new(granted: BTreeSet<(String, u16)>) -> Self {
        Self { granted, list: Vec::new() }
    }

    /// Connects; the connection's number.
    pub(super) fn connect(&mut self, host: &str, port: u16, tls: bool) -> Result<u32, ConnectionError> {
        let unreachable = |text: String| Err(ConnectionError::Unreachable(text));
        if !self.granted.contains(&(host.to_ascii_lowercase(), port)) {
            return Err(ConnectionError::NotGranted);
        }
        if tls {
            return unreachable("this host speaks no TLS; use a plain address".into());
        }
        if self.list.iter().flatten().count() >= MOST {
            return unreachable(format!("the store has {MOST} connections, and gets no more"));
        }
        // An IPv6 address is in brackets, as in an address of the web.
        let name = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        let addresses = match (name, port).to_socket_addrs() {
            Ok(addresses) => addresses,
            Err(error) => return unreachable(error.to_string()),
        };
        let mut last = ConnectionError::Unreachable(format!("`{host}` has no address"));
        for address in addresses.take(4) {
            match TcpStream::connect_timeout(&address, CONNECT) {
                Ok(stream) => {
                    let ready = stream
                        .set_read_timeout(Some(TRANSFER))
                        .and_then(|()| stream.set_write_timeout(Some(TRANSFER)))
                        .and_then(|()| stream.set_nodelay(true));
                    if let Err(error) = ready {
                        return unreachable(error.to_string());
                    }
                    let place = self.list.iter().position(Option::is_none).unwrap_or_else(|| {
                        self.list.push(None);
                        self.list.len() - 1
                    });
                    self.list[place] = Some(stream);
                    return Ok(u32::try_from(place).unwrap_or(u32::MAX));
                }
                Err(error) if error.kind() == ErrorKind::TimedOut => last = ConnectionError::TimedOut,
                Err(error) => last = ConnectionError::Unreachable(format!("{address}: {error}")),
            }
        }
        Err(last)
    }

    fn stream(&mut self, connection: u32) -> Result<&mut TcpStream, ConnectionError> {
        usize::try_from(connection)
            .ok()
            .and_then(|index| self.list.get_mut(index))
            .and_then(Option::as_mut)
            .ok_or(ConnectionError::Closed)
    }

    pub(super) fn send(&mut self, connection: u32, bytes: &[u8]) -> Result<(), ConnectionError> {
        let most = usize::try_from(MAX_BYTES).unwrap_or(usize::MAX);
        let Some(bytes) = bytes.get(..bytes.len().min(most)) else { return Ok(()) };
        self.stream(connection)?.write_all(bytes).map_err(|error| failure(&error))
    }

    pub(super) fn receive(&mut self, connection: u32, max: u32) -> Result<Vec<u8>, ConnectionError> {
        let mut bytes = vec![0; usize::try_from(max.min(MAX_BYTES)).unwrap_or(0)];
        let stream = self.stream(connection)?;
        loop {
            match stream.read(&mut bytes) {
                Ok(count) => {
                    bytes.truncate(count);
                    return Ok(bytes);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(failure(&error)),
            }
        }
    }

    pub(super) fn close(&mut self, connection: u32) {
        if let Some(stream) = usize::try_from(connection).ok().and_then(|index| self.list.get_mut(index)) {
            *stream = None;
        }
    }
}

fn failure(error: &std::io::Error) -> ConnectionError {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => ConnectionError::TimedOut,
        _ => ConnectionError::Closed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn only_granted_hosts_are_reached_and_bytes_pass_both_ways() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut connections =
            Connections::new([("localhost".into(), port), ("127.0.0.1".into(), port)].into());
        assert_eq!(
            connections.connect("localhost", port.wrapping_add(1), false),
            Err(ConnectionError::NotGranted)
        );
        assert_eq!(connections.connect("127.0.0.2", port, false), Err(ConnectionError::NotGranted));
        assert!(matches!(connections.connect("LocalHost", port, true), Err(ConnectionError::Unreachable(_))));
        let peer = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut bytes = [0; 4];
            stream.read_exact(&mut bytes).unwrap();
            stream.write_all(&bytes).unwrap();
        });
        let connection = connections.connect("127.0.0.1", port, false).unwrap();
        connections.send(connection, b"echo").unwrap();
        assert_eq!(connections.receive(connection, 4).unwrap(), b"echo");
        peer.join().unwrap();
        assert_eq!(connections.receive(connection, 4).unwrap(), b"");
        connections.close(connection);
        assert_eq!(connections.receive(connection, 4), Err(ConnectionError::Closed));
    }

    #[test]
    fn an_address_in_brackets_is_an_ipv6_address() {
        let Ok(listener) = TcpListener::bind("[::1]:0") else {
            return println!("not run: this host has no IPv6");
        };
        let port = listener.local_addr().unwrap().port();
        let mut connections = Connections::new([("[::1]".into(), port)].into());
        connections.connect("[::1]", port, false).unwrap();
        assert_eq!(connections.connect("::1", port, false), Err(ConnectionError::NotGranted));
    }
}
