//! What is around a store on the bench: lower stores in memory, time, random bytes, and servers that the test plays.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;

use tenon_sdk::store::hosted::Host;
use tenon_sdk::store::{ConnectionError, Level, Operation, StoreError, StoreInfo};

use crate::memory::MemoryStore;
use crate::random::Random;

/// What a server says to what it is told: the bytes that it sends back.
pub(super) type Serve = Box<dyn FnMut(&[u8]) -> Vec<u8>>;

/// A server that the administrator granted.
pub(super) struct Server {
    pub(super) host: String,
    pub(super) port: u16,
    /// Makes what answers on a new connection.
    pub(super) accept: Box<dyn FnMut() -> Serve>,
    /// Connections are cut from now on.
    pub(super) down: bool,
}

struct Line {
    server: usize,
    serve: Serve,
    waiting: VecDeque<u8>,
}

/// Everything outside a store.
pub(super) struct StoreOutside {
    pub(super) lower: RefCell<Vec<MemoryStore>>,
    pub(super) now: Cell<u64>,
    pub(super) log: RefCell<Vec<(Level, String)>>,
    pub(super) servers: RefCell<Vec<Server>>,
    lines: RefCell<Vec<Option<Line>>>,
    random: RefCell<Random>,
}

impl StoreOutside {
    pub(super) fn new(lower: Vec<MemoryStore>) -> Self {
        Self {
            lower: RefCell::new(lower),
            now: Cell::new(0),
            log: RefCell::default(),
            servers: RefCell::default(),
            lines: RefCell::default(),
            random: RefCell::new(Random::new(0x7e17)),
        }
    }

    /// The connections that are open.
    pub(super) fn connections(&self) -> usize {
        self.lines.borrow().iter().flatten().count()
    }

    fn line<R>(&self, connection: u32, call: impl FnOnce(&mut Line) -> R) -> Result<R, ConnectionError> {
        let mut lines = self.lines.borrow_mut();
        let line = lines.get_mut(connection as usize).and_then(Option::as_mut);
        let line = line.unwrap_or_else(|| panic!("the store uses a connection that it does not have"));
        if self.servers.borrow()[line.server].down {
            return Err(ConnectionError::Closed);
        }
        Ok(call(line))
    }
}

impl Host for StoreOutside {
    fn log(&self, level: Level, message: &str) {
        self.log.borrow_mut().push((level, message.to_owned()));
    }

    fn now(&self) -> u64 {
        self.now.get()
    }

    fn wait(&self, nanoseconds: u64) {
        self.now.set(self.now.get().saturating_add(nanoseconds.min(10_000_000_000)));
    }

    fn random(&self, length: u32) -> Vec<u8> {
        self.random.borrow_mut().bytes(length.min(64 << 10) as usize)
    }

    fn lower_info(&self, lower: u32) -> StoreInfo {
        let stores = self.lower.borrow();
        let Some(store) = stores.get(lower as usize) else {
            panic!("the store uses lower store number {lower}, which it was not given");
        };
        store.info().clone()
    }

    fn lower_submit(&self, lower: u32, operations: &[Operation]) -> Vec<Result<Vec<u8>, StoreError>> {
        let mut stores = self.lower.borrow_mut();
        let Some(store) = stores.get_mut(lower as usize) else {
            panic!("the store uses lower store number {lower}, which it was not given");
        };
        // A flush covers earlier calls only, so it comes before the writes of this one.
        let mut outcomes: Vec<Option<Result<Vec<u8>, StoreError>>> = vec![None; operations.len()];
        for flushes in [true, false] {
            for (operation, outcome) in operations.iter().zip(&mut outcomes) {
                if (*operation == Operation::Flush) == flushes {
                    *outcome = Some(store.submit(operation));
                }
            }
        }
        outcomes.into_iter().map(|outcome| outcome.unwrap_or(Err(StoreError::Io))).collect()
    }

    fn lower_resize(&self, lower: u32, size: u64) -> Result<(), StoreError> {
        let mut stores = self.lower.borrow_mut();
        let Some(store) = stores.get_mut(lower as usize) else {
            panic!("the store uses lower store number {lower}, which it was not given");
        };
        if !size.is_multiple_of(store.info().block_size.into()) {
            return Err(StoreError::OutOfRange);
        }
        store.resize(size);
        Ok(())
    }

    fn connect(&self, host: &str, port: u16, _tls: bool) -> Result<u32, ConnectionError> {
        let mut servers = self.servers.borrow_mut();
        let found = servers.iter().position(|server| server.host == host && server.port == port);
        let server = found.ok_or(ConnectionError::NotGranted)?;
        if servers[server].down {
            return Err(ConnectionError::Unreachable(format!("{host}:{port} is down in this test")));
        }
        let serve = (servers[server].accept)();
        let mut lines = self.lines.borrow_mut();
        lines.push(Some(Line { server, serve, waiting: VecDeque::new() }));
        Ok(u32::try_from(lines.len() - 1).unwrap_or(u32::MAX))
    }

    fn connection_send(&self, connection: u32, bytes: &[u8]) -> Result<(), ConnectionError> {
        self.line(connection, |line| {
            let answer = (line.serve)(bytes);
            line.waiting.extend(answer);
        })
    }

    fn connection_receive(&self, connection: u32, max: u32) -> Result<Vec<u8>, ConnectionError> {
        self.line(connection, |line| {
            let count = line.waiting.len().min(max as usize);
            line.waiting.drain(..count).collect::<Vec<u8>>()
        })
        .and_then(|bytes| {
            // A server that says no more would let the store wait for good.
            if bytes.is_empty() && max > 0 { Err(ConnectionError::TimedOut) } else { Ok(bytes) }
        })
    }

    fn connection_close(&self, connection: u32) {
        if let Some(line) = self.lines.borrow_mut().get_mut(connection as usize) {
            *line = None;
        }
    }
}
