//! Fetches ranges of one image, over one connection that is kept.

use tenon_sdk::store::{Connection, ConnectionError, connect, debug, now, wait, warn};

use crate::response::Head;
use crate::url::Url;

/// The first and the longest wait before a piece is asked for again.
const FIRST_WAIT: u64 = 100_000_000;
const LONGEST_WAIT: u64 = 5_000_000_000;
/// How long one response may take: the server must send 18 KB a second.
const ATTEMPT: u64 = 60_000_000_000;
/// How much is received at once.
const RECEIVE: u32 = 256 << 10;

/// The longest name of a version that is used.
pub(crate) const VALIDATOR: usize = 1024;

/// Which image it is: what must be the same in every response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Version {
    /// How long it is.
    pub(crate) length: u64,
    /// What the server calls it, if it does.
    pub(crate) validator: Option<String>,
}

impl Version {
    fn of(head: &Head, length: u64) -> Self {
        // What is sent back to the server must be one line, and short.
        let good =
            |name: &&str| name.len() <= VALIDATOR && name.bytes().all(|byte| (b' '..=b'~').contains(&byte));
        Self { length, validator: head.validator().filter(good).map(str::to_owned) }
    }
}

/// Why there is no range.
pub(crate) enum Failure {
    /// It may be there next time.
    Passing(String),
    /// It will not.
    Lasting(String),
    /// The image is another one.
    Changed(String),
}

/// The client.
pub(crate) struct Client {
    url: Url,
    /// How often a range is asked for again.
    pub(crate) retries: u32,
    connection: Option<Connection>,
    /// When the server is given up.
    until: u64,
    /// What came after the last response.
    rest: Vec<u8>,
}

impl Client {
    pub(crate) fn new(url: Url, retries: u32) -> Self {
        Self { url, retries, connection: None, until: 0, rest: Vec::new() }
    }

    /// Fetches `length` bytes at `first`, or as many as there are if the version is not known yet. Asks again as often as it may.
    pub(crate) fn fetch(
        &mut self,
        first: u64,
        length: u64,
        version: Option<&Version>,
    ) -> Result<(Vec<u8>, Version), Failure> {
        let mut pause = FIRST_WAIT;
        let mut left = self.retries;
        loop {
            let kept = self.connection.is_some();
            let failure = match self.attempt(first, length, version) {
                Ok(answer) => return Ok(answer),
                Err(failure) => failure,
            };
            self.hang_up();
            let Failure::Passing(what) = failure else { return Err(failure) };
            if kept {
                // A server may end a connection that it was kept; that says nothing about the next one.
                debug!("the connection was lost: {what}");
                continue;
            }
            if left == 0 {
                return Err(Failure::Passing(what));
            }
            left -= 1;
            warn!("{what}; asking again in {} ms", pause / 1_000_000);
            wait(pause);
            pause = (pause * 2).min(LONGEST_WAIT);
        }
    }

    fn hang_up(&mut self) {
        self.connection = None;
        self.rest.clear();
    }

    fn attempt(
        &mut self,
        first: u64,
        length: u64,
        version: Option<&Version>,
    ) -> Result<(Vec<u8>, Version), Failure> {
        let Url { tls, host, port, authority, path } = &self.url;
        let mut request = format!(
            "GET {path} HTTP/1.1\r\nHost: {authority}\r\nUser-Agent: tenon\r\nAccept-Encoding: identity\r\nRange: bytes={first}-{}\r\n",
            first + (length - 1)
        );
        if let Some(validator) = version.and_then(|version| version.validator.as_ref()) {
            request += &format!("If-Range: {validator}\r\n");
        }
        request += "\r\n";
        self.until = now() + ATTEMPT;
        if self.connection.is_none() {
            self.connection = Some(connect(host, *port, *tls).map_err(|error| self.lost(&error))?);
        }
        let sent = self.connection().and_then(|connection| connection.send(request.as_bytes()));
        sent.map_err(|error| self.lost(&error))?;
        let head = self.head()?;
        let version = self.judge(&head, first, length, version)?;
        let last = first + length.min(version.length - first) - 1;
        let size = usize::try_from(last - first + 1).map_err(|_| self.wrong("its response is too long"))?;
        while self.rest.len() < size {
            self.receive()?;
        }
        let behind = self.rest.split_off(size);
        let data = std::mem::replace(&mut self.rest, behind);
        if head.closes || !self.rest.is_empty() {
            self.hang_up();
        }
        Ok((data, version))
    }

    /// Receives the head of the response.
    fn head(&mut self) -> Result<Head, Failure> {
        loop {
            match Head::parse(&self.rest).map_err(|what| self.wrong(&what))? {
                Some((head, length)) => {
                    self.rest.drain(..length);
                    if !(100..200).contains(&head.status) {
                        return Ok(head);
                    }
                }
                None => self.receive()?,
            }
        }
    }

    fn receive(&mut self) -> Result<(), Failure> {
        if now() > self.until {
            return Err(self.lost(&ConnectionError::TimedOut));
        }
        let received = self.connection().and_then(|connection| connection.receive(RECEIVE));
        match received {
            Ok(bytes) if bytes.is_empty() => Err(self.lost(&ConnectionError::Closed)),
            Ok(bytes) => {
                self.rest.extend(bytes);
                Ok(())
            }
            Err(error) => Err(self.lost(&error)),
        }
    }

    fn connection(&mut self) -> Result<&mut Connection, ConnectionError> {
        self.connection.as_mut().ok_or(ConnectionError::Closed)
    }

    /// What a response with this head means. The version of the image, if its body is what was asked for.
    fn judge(
        &self,
        head: &Head,
        first: u64,
        length: u64,
        known: Option<&Version>,
    ) -> Result<Version, Failure> {
        let place = self.place();
        let lasting = |what: String| Err(Failure::Lasting(what));
        match head.status {
            206 => {}
            200 => {
                return match known {
                    Some(_) => Err(Failure::Changed(format!("{place}: the image was changed on the server"))),
                    None => lasting(format!(
                        "{place}: the server gives whole files only (it answers a request for a range with 200), and a store needs ranges; use another server, or fetch the image and use the store `file`"
                    )),
                };
            }
            301 | 302 | 303 | 307 | 308 => {
                let there = head.location.as_deref().and_then(|there| self.url.join(there));
                return lasting(match there {
                    Some(there) => {
                        format!("{place}: the server says that the image is at {there}: give that as `url`")
                    }
                    None => format!(
                        "{place}: the server says that the image is at some other place, and not at which"
                    ),
                });
            }
            408 | 429 | 500 | 502 | 503 | 504 => {
                return Err(Failure::Passing(format!(
                    "{place}: the server is in trouble (status {})",
                    head.status
                )));
            }
            404 | 410 if known.is_some() => {
                return Err(Failure::Changed(format!("{place}: the image is gone from the server")));
            }
            416 if known.is_some() => {
                return Err(Failure::Changed(format!("{place}: the image has become shorter on the server")));
            }
            416 => return lasting(format!("{place}: the image is empty")),
            401 | 403 => {
                return lasting(format!("{place}: the server does not let us (status {})", head.status));
            }
            404 | 410 => {
                return lasting(format!(
                    "{place}: there is no such image on the server (status {})",
                    head.status
                ));
            }
            other => return lasting(format!("{place}: the server answers with status {other}")),
        }
        let Some((from, to, total)) = head.range else {
            return Err(self.wrong("its response has no range, or several"));
        };
        let version = Version::of(head, total);
        if known.is_some_and(|known| *known != version) {
            return Err(Failure::Changed(format!("{place}: the image was changed on the server")));
        }
        if from != first
            || to != first.saturating_add(length.min(total.saturating_sub(first))).saturating_sub(1)
        {
            return Err(self.wrong("its response is of another range than was asked for"));
        }
        if head.coded || head.length != Some(to - from + 1) {
            return Err(
                self.wrong("its response has another length than its range, or is in chunks or compressed")
            );
        }
        Ok(version)
    }

    fn place(&self) -> String {
        let Url { host, port, path, .. } = &self.url;
        // What stands behind a question mark may be a secret.
        let path = path.split('?').next().unwrap_or_default();
        format!("{host}:{port}{path}")
    }

    fn lost(&self, error: &ConnectionError) -> Failure {
        let what = format!("{}: {error}", self.place());
        if *error == ConnectionError::NotGranted { Failure::Lasting(what) } else { Failure::Passing(what) }
    }

    fn wrong(&self, what: &str) -> Failure {
        Failure::Passing(format!("{}: the server is not to be understood: {what}", self.place()))
    }
}
