//! TCP connections of stores, to the hosts that the administrator granted and to no others, in plain or by TLS.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, RootCertStore, Stream};
use tenon_abi::ConnectionError;

use super::services::LOOK;

/// How long connecting may take, over all addresses of the name.
const CONNECT: Duration = Duration::from_secs(10);
/// How long a transfer may take.
const TRANSFER: Duration = Duration::from_secs(30);
/// The most connections at a time.
const MOST: usize = 64;
/// The most bytes in one call.
pub(super) const MAX_BYTES: u32 = 1 << 20;

/// The connections of one instance.
pub(super) struct Connections {
    granted: BTreeSet<(String, u16)>,
    list: Vec<Option<Connection>>,
    /// Whose certificates are believed: what the host believes, once it was asked for.
    trust: Option<Arc<ClientConfig>>,
    /// Nothing is waited for any more.
    cut: Arc<AtomicBool>,
}

struct Connection {
    stream: Timed,
    tls: Option<ClientConnection>,
}

/// A stream that is given up at a time, however slowly the other side goes on.
struct Timed {
    stream: TcpStream,
    until: Instant,
    cut: Arc<AtomicBool>,
}

impl Connections {
    pub(super) fn new(granted: BTreeSet<(String, u16)>, cut: Arc<AtomicBool>) -> Self {
        Self { granted, list: Vec::new(), trust: None, cut }
    }

    /// Connects; the connection's number.
    pub(super) fn connect(&mut self, host: &str, port: u16, tls: bool) -> Result<u32, ConnectionError> {
        let unreachable = ConnectionError::Unreachable;
        if !self.granted.contains(&(host.to_ascii_lowercase(), port)) {
            return Err(ConnectionError::NotGranted);
        }
        if self.list.iter().flatten().count() >= MOST {
            return Err(unreachable(format!("the store has {MOST} connections, and gets no more")));
        }
        // An IPv6 address is in brackets, as in an address of the web.
        let name = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        let mut stream = Timed::connect(name, port, self.cut.clone())?;
        let tls = if tls {
            let connection = self.handshake(name, &mut stream);
            Some(connection.map_err(|what| unreachable(format!("TLS with {host}:{port}: {what}")))?)
        } else {
            None
        };
        let place = self.list.iter().position(Option::is_none).unwrap_or_else(|| {
            self.list.push(None);
            self.list.len() - 1
        });
        self.list[place] = Some(Connection { stream, tls });
        Ok(u32::try_from(place).unwrap_or(u32::MAX))
    }

    /// Agrees on keys with the other side, whose certificate must be for this name.
    fn handshake(&mut self, name: &str, stream: &mut Timed) -> Result<ClientConnection, String> {
        let trust = if let Some(trust) = &self.trust { trust } else { self.trust.insert(host_trust()?) };
        let name = ServerName::try_from(name.to_owned()).map_err(|error| error.to_string())?;
        let mut tls = ClientConnection::new(trust.clone(), name).map_err(|error| error.to_string())?;
        while tls.is_handshaking() {
            tls.complete_io(stream).map_err(|error| refusal(&error))?;
        }
        Ok(tls)
    }

    fn connection(&mut self, connection: u32) -> Result<&mut Connection, ConnectionError> {
        usize::try_from(connection)
            .ok()
            .and_then(|index| self.list.get_mut(index))
            .and_then(Option::as_mut)
            .ok_or(ConnectionError::Closed)
    }

    pub(super) fn send(&mut self, connection: u32, bytes: &[u8]) -> Result<(), ConnectionError> {
        let most = usize::try_from(MAX_BYTES).unwrap_or(usize::MAX);
        let Some(bytes) = bytes.get(..bytes.len().min(most)) else { return Ok(()) };
        let Connection { stream, tls } = self.connection(connection)?;
        stream.until = Instant::now() + TRANSFER;
        let sent = match tls {
            Some(tls) => {
                let mut stream = Stream::new(tls, stream);
                stream.write_all(bytes).and_then(|()| stream.flush())
            }
            None => stream.write_all(bytes),
        };
        sent.map_err(|error| failure(&error))
    }

    pub(super) fn receive(&mut self, connection: u32, max: u32) -> Result<Vec<u8>, ConnectionError> {
        let mut bytes = vec![0; usize::try_from(max.min(MAX_BYTES)).unwrap_or(0)];
        let Connection { stream, tls } = self.connection(connection)?;
        stream.until = Instant::now() + TRANSFER;
        loop {
            let received = match tls {
                Some(tls) => Stream::new(tls, stream).read(&mut bytes),
                None => stream.read(&mut bytes),
            };
            match received {
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
        if let Some(place) = usize::try_from(connection).ok().and_then(|index| self.list.get_mut(index)) {
            *place = None;
        }
    }
}

impl Timed {
    /// Connects to the first address of the name that answers.
    fn connect(name: &str, port: u16, cut: Arc<AtomicBool>) -> Result<Self, ConnectionError> {
        let until = Instant::now() + CONNECT;
        let unreachable = |error: &dyn std::fmt::Display| ConnectionError::Unreachable(error.to_string());
        let addresses = (name, port).to_socket_addrs().map_err(|error| unreachable(&error))?;
        let mut last = unreachable(&format!("`{name}` has no address"));
        for address in addresses.take(4) {
            let Some(left) = left(until) else { break };
            if cut.load(Relaxed) {
                return Err(ConnectionError::Closed);
            }
            match TcpStream::connect_timeout(&address, left) {
                Ok(stream) => {
                    stream.set_nodelay(true).map_err(|error| unreachable(&error))?;
                    return Ok(Self { stream, until, cut });
                }
                Err(error) if error.kind() == ErrorKind::TimedOut => last = ConnectionError::TimedOut,
                Err(error) => last = unreachable(&format!("{address}: {error}")),
            }
        }
        Err(last)
    }

    /// How long may be waited now, before it is looked whether to go on.
    fn pause(&self) -> std::io::Result<Duration> {
        if self.cut.load(Relaxed) {
            return Err(ErrorKind::ConnectionAborted.into());
        }
        left(self.until).map(|left| left.min(LOOK)).ok_or_else(|| ErrorKind::TimedOut.into())
    }
}

fn is_timeout(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

impl Read for Timed {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        loop {
            self.stream.set_read_timeout(Some(self.pause()?))?;
            match self.stream.read(into) {
                Err(error) if is_timeout(&error) => {}
                read => return read,
            }
        }
    }
}

impl Write for Timed {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        loop {
            self.stream.set_write_timeout(Some(self.pause()?))?;
            match self.stream.write(bytes) {
                Err(error) if is_timeout(&error) => {}
                written => return written,
            }
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.stream.flush()
    }
}

/// The time that is left, more than none.
fn left(until: Instant) -> Option<Duration> {
    until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
}

/// What this host believes: the authorities of its operating system, or of `SSL_CERT_FILE` and `SSL_CERT_DIR`.
fn host_trust() -> Result<Arc<ClientConfig>, String> {
    if let Some(file) = std::env::var_os("SSL_CERT_FILE")
        && let Err(error) = std::fs::File::open(&file)
    {
        return Err(format!("SSL_CERT_FILE is `{}`: {error}", file.display()));
    }
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(found.certs);
    if roots.is_empty() {
        let why = found.errors.first().map(|error| format!(" ({error})")).unwrap_or_default();
        return Err(format!(
            "this host knows no certificate authority{why}; install `ca-certificates` or set SSL_CERT_FILE"
        ));
    }
    believe(roots)
}

fn believe(roots: RootCertStore) -> Result<Arc<ClientConfig>, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let builder = builder.map_err(|error| error.to_string())?;
    Ok(Arc::new(builder.with_root_certificates(roots).with_no_client_auth()))
}

/// Why there is no TLS.
fn refusal(error: &std::io::Error) -> String {
    use rustls::{CertificateError, Error};
    let tls = error.get_ref().and_then(|error| error.downcast_ref());
    match tls {
        Some(Error::InvalidMessage(_)) => "what the other side answers is no TLS".into(),
        Some(error @ Error::InvalidCertificate(CertificateError::UnknownIssuer)) => {
            format!("{error}: this host does not know who signed it; SSL_CERT_FILE can name who is believed")
        }
        Some(error) => error.to_string(),
        None if error.kind() == ErrorKind::UnexpectedEof => "the other side hung up".into(),
        None if is_timeout(error) => "no answer in time".into(),
        None => error.to_string(),
    }
}

fn failure(error: &std::io::Error) -> ConnectionError {
    if is_timeout(error) { ConnectionError::TimedOut } else { ConnectionError::Closed }
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
            Connections::new([("localhost".into(), port), ("127.0.0.1".into(), port)].into(), Arc::default());
        assert_eq!(
            connections.connect("localhost", port.wrapping_add(1), false),
            Err(ConnectionError::NotGranted)
        );
        assert_eq!(connections.connect("127.0.0.2", port, false), Err(ConnectionError::NotGranted));
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
    fn a_transfer_is_given_up_at_its_time_though_there_are_bytes() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut stream = Timed::connect("127.0.0.1", port, Arc::default()).unwrap();
        let (mut peer, _) = listener.accept().unwrap();
        peer.write_all(b"ab").unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap(), 1);
        stream.until = Instant::now();
        assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), ErrorKind::TimedOut);
        assert_eq!(stream.write(b"c").unwrap_err().kind(), ErrorKind::TimedOut);
    }

    #[test]
    fn nobody_is_waited_for_once_connections_are_cut() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let cut = Arc::new(AtomicBool::new(false));
        let mut connections = Connections::new([("127.0.0.1".into(), port)].into(), cut.clone());
        let connection = connections.connect("127.0.0.1", port, false).unwrap();
        let waiting = std::thread::spawn(move || {
            let received = connections.receive(connection, 1);
            (received, connections.connect("127.0.0.1", port, false))
        });
        // The peer takes the connection and says nothing.
        let _peer = listener.accept().unwrap();
        cut.store(true, Relaxed);
        assert_eq!(waiting.join().unwrap(), (Err(ConnectionError::Closed), Err(ConnectionError::Closed)));
    }

    #[test]
    fn an_address_in_brackets_is_an_ipv6_address() {
        let Ok(listener) = TcpListener::bind("[::1]:0") else {
            return println!("not run: this host has no IPv6");
        };
        let port = listener.local_addr().unwrap().port();
        let mut connections = Connections::new([("[::1]".into(), port)].into(), Arc::default());
        connections.connect("[::1]", port, false).unwrap();
        assert_eq!(connections.connect("::1", port, false), Err(ConnectionError::NotGranted));
    }

    /// A server that answers each connection's four bytes with the same, in at most so many records of a byte, by TLS with a certificate for `localhost` of its own.
    fn server(connections: usize) -> (u16, RootCertStore, std::thread::JoinHandle<()>) {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(made.cert.der().clone()).unwrap();
        let key = rustls::pki_types::PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key.into())
            .unwrap();
        let config = Arc::new(config);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming().take(connections) {
                let tls = rustls::ServerConnection::new(config.clone()).unwrap();
                let mut stream = rustls::StreamOwned::new(tls, stream.unwrap());
                let mut bytes = [0; 4];
                if stream.read_exact(&mut bytes).is_ok() {
                    bytes.iter().for_each(|byte| stream.write_all(&[*byte]).unwrap());
                    stream.conn.send_close_notify();
                    stream.flush().unwrap();
                }
            }
        });
        (port, roots, thread)
    }

    #[test]
    fn by_tls_bytes_pass_both_ways_when_the_certificate_is_believed_and_for_the_name() {
        let (port, roots, peer) = server(3);
        let granted = ["localhost", "127.0.0.1"].map(|host| (host.to_owned(), port));
        let mut connections = Connections::new(granted.into(), Arc::default());
        connections.trust = Some(believe(roots).unwrap());
        let connection = connections.connect("LocalHost", port, true).unwrap();
        connections.send(connection, b"echo").unwrap();
        let mut all = Vec::new();
        while all.len() < 4 {
            all.extend(connections.receive(connection, 100).unwrap());
        }
        assert_eq!(all, b"echo");
        assert_eq!(connections.receive(connection, 4).unwrap(), b"", "the end, in good order");

        let refused = |connections: &mut Connections, host: &str| match connections.connect(host, port, true)
        {
            Err(ConnectionError::Unreachable(what)) => what,
            other => panic!("{other:?}"),
        };
        let what = refused(&mut connections, "127.0.0.1");
        assert!(what.contains("not valid for name"), "{what}");
        connections.trust = Some(believe(RootCertStore::empty()).unwrap());
        let what = refused(&mut connections, "localhost");
        assert!(what.contains("SSL_CERT_FILE"), "{what}");
        peer.join().unwrap();
    }

    #[test]
    fn a_server_that_speaks_no_tls_is_refused() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let peer = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
            let (mut second, _) = listener.accept().unwrap();
            let _ = second.read(&mut [0; 1024]);
        });
        let mut connections = Connections::new([("127.0.0.1".into(), port)].into(), Arc::default());
        connections.trust = Some(believe(RootCertStore::empty()).unwrap());
        for why in ["no TLS", "hung up"] {
            let refused = connections.connect("127.0.0.1", port, true);
            assert!(
                matches!(&refused, Err(ConnectionError::Unreachable(what)) if what.contains(why)),
                "{refused:?}"
            );
        }
        peer.join().unwrap();
        assert!(connections.list.iter().all(Option::is_none));
    }
}
