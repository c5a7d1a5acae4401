//! The bench of stores does what a host does, and the suite finds the mistakes that it is there for.
#![allow(clippy::unwrap_used, reason = "a test and its helpers")]

use std::panic::{AssertUnwindSafe, catch_unwind};

use tenon_sdk::store::{
    Config, Connection, ConnectionError, Decoder, Encoder, Error, Lower, Operation, Result, Store,
    StoreError, StoreInfo, connect, now, random, wait, warn,
};
use tenon_testkit::{MemoryStore, On, StoreBench, StoreChecks, store_conformance};

/// What a filter under check does wrong.
const FINE: u8 = 0;
const FLUSHES_NEVER: u8 = 1;
const FLUSH_ALWAYS_OK: u8 = 2;
const FORGETS_ON_CLOSE: u8 = 3;
const MIXES_UP: u8 = 4;
const PANICS: u8 = 5;
const SWALLOWS_READ_ERRORS: u8 = 6;
const ZEROES_TOO_MUCH: u8 = 7;
const SHORT_READ: u8 = 8;
const LOSES_ON_RESTART: u8 = 9;
const WRITES_BACK_UNASKED: u8 = 10;

/// A filter that inverts every bit; `MISTAKE` says what is wrong with it.
struct Inverts<const MISTAKE: u8> {
    lower: Lower,
    /// For those that keep writes to themselves.
    kept: Vec<(u64, Vec<u8>)>,
    opened: u64,
}

fn invert(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().map(|byte| !byte).collect()
}

impl<const MISTAKE: u8> Store for Inverts<MISTAKE> {
    fn open(_config: &Config, lower: Vec<Lower>) -> Result<(Self, StoreInfo)> {
        let Ok([lower]) = <[Lower; 1]>::try_from(lower) else {
            return Err(Error::Invalid("one lower store, please".into()));
        };
        let info = StoreInfo { write_zeroes: false, discard: false, ..lower.info() };
        Ok((Self { lower, kept: vec![], opened: now() }, info))
    }

    fn read(&mut self, position: u64, into: &mut [u8]) -> Result<(), StoreError> {
        let data = match self.lower.read(position, into.len() as u64) {
            Err(_) if MISTAKE == SWALLOWS_READ_ERRORS => vec![0; into.len()],
            data => data?,
        };
        into.copy_from_slice(&invert(&data));
        for (at, bytes) in &self.kept {
            for (n, byte) in (*at..).zip(bytes) {
                if let Some(place) =
                    n.checked_sub(position).and_then(|n| into.get_mut(usize::try_from(n).unwrap()))
                {
                    *place = *byte;
                }
            }
        }
        if MISTAKE == PANICS && position > 1 << 20 {
            panic!("as it should for this test");
        }
        Ok(())
    }

    fn write(&mut self, position: u64, bytes: &[u8]) -> Result<(), StoreError> {
        if MISTAKE == FORGETS_ON_CLOSE || MISTAKE == LOSES_ON_RESTART {
            self.kept.push((position, bytes.to_vec()));
            return Ok(());
        }
        self.lower.write(position, &invert(bytes))
    }

    fn flush(&mut self) -> Result<(), StoreError> {
        if MISTAKE == LOSES_ON_RESTART {
            for (position, bytes) in std::mem::take(&mut self.kept) {
                self.lower.write(position, &invert(&bytes))?;
            }
        }
        match MISTAKE {
            FLUSHES_NEVER => Ok(()),
            FLUSH_ALWAYS_OK => {
                let _ = self.lower.flush();
                Ok(())
            }
            WRITES_BACK_UNASKED => {
                self.lower.flush()?;
                // A header that a loss of power tears from the rest.
                self.lower.write(0, &vec![0; 512])
            }
            _ => self.lower.flush(),
        }
    }

    fn write_zeroes(&mut self, position: u64, length: u64, _unmap: bool) -> Result<(), StoreError> {
        let more =
            if MISTAKE == ZEROES_TOO_MUCH { 512.min(self.lower.info().size - position - length) } else { 0 };
        let length = length + more;
        let mut done = 0;
        while done < length {
            let piece = (length - done).min(64 << 10);
            self.write(position + done, &vec![0; usize::try_from(piece).unwrap()])?;
            done += piece;
        }
        Ok(())
    }

    fn submit(&mut self, operations: Vec<Operation>) -> Vec<Result<Vec<u8>, StoreError>> {
        let mut outcomes: Vec<_> = operations
            .into_iter()
            .map(|operation| match operation {
                Operation::Read { position, length } => {
                    let short = if MISTAKE == SHORT_READ && length > 512 { 512 } else { 0 };
                    let mut data = vec![0; usize::try_from(length).unwrap() - short];
                    self.read(position, &mut data).map(|()| data)
                }
                Operation::Write { position, data } => self.write(position, &data).map(|()| vec![]),
                Operation::Flush => self.flush().map(|()| vec![]),
                Operation::WriteZeroes { position, length, unmap } => {
                    self.write_zeroes(position, length, unmap).map(|()| vec![])
                }
                Operation::Discard { .. } => Err(StoreError::Unsupported),
            })
            .collect();
        if MISTAKE == MIXES_UP {
            outcomes.reverse();
        }
        outcomes
    }

    fn resize(&mut self, size: u64) -> Result<StoreInfo> {
        self.lower.resize(size)?;
        Ok(StoreInfo { write_zeroes: false, discard: false, ..self.lower.info() })
    }

    fn save(&self, state: &mut Encoder) -> Result<()> {
        state.u64(self.opened);
        Ok(())
    }

    fn restore(&mut self, state: &mut Decoder<'_>) -> Result<()> {
        self.opened = state.u64()?;
        Ok(())
    }
}

fn lower() -> Vec<MemoryStore> {
    vec![MemoryStore::new(4 << 20)]
}

fn finds<const MISTAKE: u8>(what: &[&str]) {
    let payload = catch_unwind(AssertUnwindSafe(|| {
        store_conformance::<Inverts<MISTAKE>>(&[], lower(), StoreChecks::default());
    }))
    .unwrap_err();
    let text = payload
        .downcast_ref::<String>()
        .map_or_else(|| *payload.downcast_ref::<&str>().unwrap(), String::as_str);
    assert!(what.iter().any(|what| text.contains(what)), "mistake {MISTAKE} was found as: {text}");
}

#[test]
fn the_suite_passes_a_store_that_is_right() {
    store_conformance::<Inverts<FINE>>(&[], lower(), StoreChecks::default());
}

#[test]
fn the_suite_finds_each_mistake() {
    finds::<FLUSHES_NEVER>(&["was durable, and a loss of power changed it"]);
    finds::<FLUSH_ALWAYS_OK>(&["Flush is a success although the lower store failed"]);
    finds::<FORGETS_ON_CLOSE>(&["after a restart", "closed and opened again"]);
    finds::<MIXES_UP>(&["other bytes", "input or output failed"]);
    finds::<PANICS>(&["as it should for this test"]);
    finds::<SWALLOWS_READ_ERRORS>(&["Read is a success although the lower store failed"]);
    finds::<ZEROES_TOO_MUCH>(&["is not as written", "other bytes"]);
    finds::<SHORT_READ>(&["input or output failed"]);
    finds::<LOSES_ON_RESTART>(&["after a restart"]);
    finds::<WRITES_BACK_UNASKED>(&["is not as written", "other bytes"]);
}

#[test]
fn a_store_that_keeps_nothing_is_checked_for_what_it_promises() {
    struct Null;
    impl Store for Null {
        fn open(config: &Config, _lower: Vec<Lower>) -> Result<(Self, StoreInfo)> {
            Ok((Self, StoreInfo::new(config.size("size")?.unwrap_or(1 << 40))))
        }
        fn read(&mut self, _position: u64, into: &mut [u8]) -> Result<(), StoreError> {
            into.fill(0);
            Ok(())
        }
        fn write(&mut self, _position: u64, _bytes: &[u8]) -> Result<(), StoreError> {
            Ok(())
        }
        fn flush(&mut self) -> Result<(), StoreError> {
            Ok(())
        }
    }
    store_conformance::<Null>(&[], vec![], StoreChecks { content: false, reopen: false });
    assert!(
        StoreBench::<Null>::new(&[("size", "1000")], vec![]).is_err(),
        "a size of no whole blocks was taken"
    );
}

#[test]
fn what_no_host_lets_through_never_comes_to_the_store() {
    let mut bench = StoreBench::<Inverts<FINE>>::new(&[], lower()).unwrap();
    let bad = [
        Operation::Read { position: 4 << 20, length: 512 },
        Operation::Write { position: 1, data: vec![0; 512] },
        Operation::Read { position: 0, length: 2 << 20 },
    ];
    for operation in bad {
        assert_eq!(bench.submit(vec![operation]), [Err(StoreError::OutOfRange)]);
    }
    assert_eq!(bench.discard(0, 512), Err(StoreError::Unsupported));
    assert_eq!(bench.calls(), 0);
    let writes = vec![Operation::Write { position: 0, data: vec![1; 1 << 20] }; 9];
    assert!(bench.submit(writes).iter().all(Result::is_ok));
    assert_eq!(bench.calls(), 3, "at most 4 MiB come at once");
}

#[test]
fn power_loss_and_faults_come_from_below() {
    let mut bench = StoreBench::<Inverts<FINE>>::new(&[], lower()).unwrap();
    bench.write(0, &[1; 512]).unwrap();
    bench.flush().unwrap();
    bench.write(0, &[2; 512]).unwrap();
    bench.write(512, &[3; 512]).unwrap();
    bench.lose_power(3).unwrap();
    let now = bench.read(0, 512).unwrap();
    assert!(now == [1; 512] || now == [2; 512]);
    bench.lower(0).fail_next(On::Any, StoreError::NoSpace);
    assert_eq!(bench.write(0, &[4; 512]), Err(StoreError::NoSpace));
    assert_eq!(bench.lower(0).counts().faults, 1);
    bench.advance(7);
    bench.restart().unwrap();
    assert_eq!(bench.store().opened, 0, "the state came back");
}

/// Asks a server at every read.
struct Remote {
    line: Option<Connection>,
}

impl Remote {
    fn ask(&mut self, question: &[u8]) -> Result<Vec<u8>, ConnectionError> {
        let mut line = match self.line.take() {
            Some(line) => line,
            None => connect("example.test", 80, true)?,
        };
        line.send(question)?;
        let answer = line.receive(1 << 20)?;
        self.line = Some(line);
        Ok(answer)
    }
}

impl Store for Remote {
    fn open(_config: &Config, _lower: Vec<Lower>) -> Result<(Self, StoreInfo)> {
        let mut remote = Self { line: None };
        let size = remote.ask(b"size").map_err(|error| Error::Other(error.to_string()))?;
        let size = u64::from_le_bytes(size.try_into().map_err(|_| Error::Other("no size".into()))?);
        Ok((remote, StoreInfo { read_only: true, ..StoreInfo::new(size) }))
    }
    fn read(&mut self, _position: u64, into: &mut [u8]) -> Result<(), StoreError> {
        for _ in 0..3 {
            if let Ok(answer) = self.ask(b"read") {
                into.fill(answer[0]);
                return Ok(());
            }
            warn!("asking again");
            wait(1_000_000);
        }
        Err(StoreError::Io)
    }
    fn write(&mut self, _position: u64, _bytes: &[u8]) -> Result<(), StoreError> {
        Err(StoreError::ReadOnly)
    }
    fn flush(&mut self) -> Result<(), StoreError> {
        assert_eq!(random(16).len(), 16);
        Ok(())
    }
}

fn serve(bench: &mut StoreBench<Remote>) {
    bench.serve("example.test", 80, || {
        |question: &[u8]| if question == b"size" { 8192u64.to_le_bytes().to_vec() } else { vec![0x42] }
    });
}

#[test]
fn a_store_reaches_the_servers_that_were_granted_and_no_others() {
    let error = StoreBench::<Remote>::new(&[], vec![]).err().unwrap().to_string();
    assert!(error.contains("not granted"), "{error}");
    let mut bench = StoreBench::<Remote>::prepare(&[], vec![]);
    serve(&mut bench);
    let mut bench = bench.opened().unwrap();
    assert_eq!((bench.info().size, bench.read(0, 512).unwrap()[0], bench.connections()), (8192, 0x42, 1));
    assert_eq!(bench.write(0, &[0; 512]), Err(StoreError::ReadOnly));
    bench.flush().unwrap();
    bench.set_down(true);
    assert_eq!(bench.read(0, 512), Err(StoreError::Io));
    assert_eq!((bench.now(), bench.take_log().len(), bench.connections()), (3_000_000, 3, 0));
    bench.set_down(false);
    assert_eq!(bench.read(0, 512).unwrap()[0], 0x42);
}

#[test]
fn a_read_only_store_passes_the_suite() {
    let mut bench = StoreBench::<Remote>::prepare(&[], vec![]);
    serve(&mut bench);
    let mut bench = bench.opened().unwrap();
    tenon_testkit::suite::store(&mut bench, StoreChecks::default()).unwrap();
}
