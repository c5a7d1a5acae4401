//! Drives a native store through its table, as a host does; and a torture that compares it with a model.
#![allow(unsafe_code, clippy::unwrap_used, reason = "the host's side of a foreign-function interface")]
#![allow(
    dead_code,
    unreachable_pub,
    reason = "the tests of every native store use it, and none uses all of it"
)]

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use tenon_sdk::abi::{Bytes, Plugin, Sink, Status, StoreHost, StoreOperation, StoreTable, wire};
use tenon_sdk::store::{Error, IoVec, StoreError, StoreInfo};

/// What is asked of a store.
#[derive(Clone, Debug)]
pub enum Ask {
    Read { position: u64, length: u64 },
    Write { position: u64, data: Vec<u8> },
    Flush,
    Discard { position: u64, length: u64 },
    WriteZeroes { position: u64, length: u64, unmap: bool },
}

/// How the memory of reads and writes lies.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// The length of each piece; the last is what is left.
    pub piece: usize,
    /// How far each piece begins behind a page's begin.
    pub shift: usize,
}

impl Layout {
    pub const PAGES: Self = Self { piece: 4096, shift: 0 };
    pub const WHOLE: Self = Self { piece: usize::MAX, shift: 0 };
    pub const ODD: Self = Self { piece: 1000, shift: 3 };
}

#[derive(Default)]
struct Host {
    done: Mutex<HashMap<u64, Result<(), StoreError>>>,
    wake: Condvar,
    log: Mutex<Vec<String>>,
}

/// A store that is open, and its host.
pub struct Bench {
    table: &'static StoreTable,
    instance: *mut c_void,
    host: Box<Host>,
    _calls: Box<StoreHost>,
    next: u64,
    pub info: StoreInfo,
    pub layout: Layout,
}

/// Operations under way: their memory.
pub struct Begun {
    buffers: Vec<(u64, bool, Buffer)>,
}

struct Buffer {
    _memory: Vec<Vec<u8>>,
    vectors: Vec<IoVec>,
}

impl Buffer {
    fn new(length: usize, layout: Layout) -> Self {
        let (mut memory, mut vectors, mut left) = (Vec::new(), Vec::new(), length);
        while left > 0 {
            let length = left.min(layout.piece);
            let mut piece = vec![0xa5_u8; length + 4096 + layout.shift];
            let start = piece.as_ptr().align_offset(4096) + layout.shift;
            vectors.push(IoVec { base: piece[start..].as_mut_ptr(), length });
            memory.push(piece);
            left -= length;
        }
        Self { _memory: memory, vectors }
    }

    fn fill(&self, mut data: &[u8]) {
        for vector in &self.vectors {
            // SAFETY: the vectors are of memory that this holds.
            unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), vector.base, vector.length) };
            data = &data[vector.length..];
        }
    }

    fn bytes(&self) -> Vec<u8> {
        // SAFETY: the vectors are of memory that this holds, and no operation uses it any more.
        self.vectors
            .iter()
            .flat_map(|v| unsafe { std::slice::from_raw_parts(v.base, v.length) }.to_vec())
            .collect()
    }
}

impl Bench {
    /// Opens a store.
    pub fn open(plugin: &Plugin, settings: &[(&str, &str)]) -> Result<Self, Error> {
        let table = plugin.store.expect("the plugin is a store");
        let host = Box::<Host>::default();
        let calls = Box::new(calls());
        let context: *mut c_void = std::ptr::from_ref(&*host).cast_mut().cast();
        // SAFETY: table and context live until `destroy`.
        let instance = unsafe { (table.create)(&raw const *calls, context) };
        assert!(!instance.is_null());
        let mut bench = Self {
            table,
            instance,
            host,
            _calls: calls,
            next: 0,
            info: StoreInfo::default(),
            layout: Layout::PAGES,
        };
        let settings: Vec<_> = settings.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let mut output = Vec::new();
        // SAFETY: everything is good for the call.
        let status = unsafe {
            let config = wire::encode_settings(&settings);
            (table.open)(instance, Bytes::new(&config), 0, Sink::to(&mut output))
        };
        bench.info = Self::outcome(status, output).map(|info| wire::decode_store_info(&info).unwrap())?;
        Ok(bench)
    }

    fn outcome(status: Status, output: Vec<u8>) -> Result<Vec<u8>, Error> {
        match status {
            Status::OK => Ok(output),
            Status::REFUSED => Err(wire::decode_device_error(&output).unwrap()),
            other => panic!("the store's call came to {other:?}"),
        }
    }

    /// What was logged.
    pub fn log(&self) -> Vec<String> {
        self.host.log.lock().unwrap().clone()
    }

    /// Begins operations, in one call.
    pub fn begin(&mut self, asked: &[Ask]) -> Begun {
        let mut buffers = Vec::new();
        let mut operations = Vec::new();
        for ask in asked {
            self.next += 1;
            let (kind, flags, position, length, data): (_, _, _, _, Option<&[u8]>) = match ask {
                Ask::Read { position, length } => (StoreOperation::READ, 0, *position, *length, Some(&[])),
                Ask::Write { position, data } => {
                    (StoreOperation::WRITE, 0, *position, data.len() as u64, Some(data))
                }
                Ask::Flush => (StoreOperation::FLUSH, 0, 0, 0, None),
                Ask::Discard { position, length } => (StoreOperation::DISCARD, 0, *position, *length, None),
                Ask::WriteZeroes { position, length, unmap } => {
                    (StoreOperation::WRITE_ZEROES, u32::from(*unmap), *position, *length, None)
                }
            };
            let room = if data.is_some() { usize::try_from(length).unwrap() } else { 0 };
            let buffer = Buffer::new(room, self.layout);
            if let Some(data) = data.filter(|data| !data.is_empty()) {
                buffer.fill(data);
            }
            operations.push(StoreOperation {
                token: self.next,
                kind,
                flags,
                position,
                length,
                vectors: buffer.vectors.as_ptr(),
                vector_count: buffer.vectors.len(),
            });
            buffers.push((self.next, matches!(ask, Ask::Read { .. }), buffer));
        }
        // SAFETY: the buffers are kept until the operations have ended, or the store has.
        let status = unsafe {
            (self.table.submit)(self.instance, operations.as_ptr(), u32::try_from(operations.len()).unwrap())
        };
        assert_eq!(status, Status::OK);
        Begun { buffers }
    }

    /// Waits for operations to end.
    pub fn finish(&self, begun: Begun) -> Vec<Result<Vec<u8>, StoreError>> {
        let mut done = self.host.done.lock().unwrap();
        while begun.buffers.iter().any(|(token, ..)| !done.contains_key(token)) {
            let (now, late) = self.host.wake.wait_timeout(done, Duration::from_secs(120)).unwrap();
            assert!(!late.timed_out(), "operations have not ended after two minutes");
            done = now;
        }
        begun
            .buffers
            .iter()
            .map(|(token, read, buffer)| {
                done.remove(token).unwrap().map(|()| if *read { buffer.bytes() } else { Vec::new() })
            })
            .collect()
    }

    /// Carries out operations.
    pub fn run(&mut self, asked: &[Ask]) -> Vec<Result<Vec<u8>, StoreError>> {
        let begun = self.begin(asked);
        self.finish(begun)
    }

    fn one(&mut self, ask: Ask) -> Result<Vec<u8>, StoreError> {
        self.run(&[ask]).pop().unwrap()
    }

    pub fn read(&mut self, position: u64, length: u64) -> Result<Vec<u8>, StoreError> {
        self.one(Ask::Read { position, length })
    }

    pub fn write(&mut self, position: u64, data: &[u8]) -> Result<(), StoreError> {
        self.one(Ask::Write { position, data: data.to_vec() }).map(drop)
    }

    pub fn flush(&mut self) -> Result<(), StoreError> {
        self.one(Ask::Flush).map(drop)
    }

    pub fn discard(&mut self, position: u64, length: u64) -> Result<(), StoreError> {
        self.one(Ask::Discard { position, length }).map(drop)
    }

    pub fn write_zeroes(&mut self, position: u64, length: u64, unmap: bool) -> Result<(), StoreError> {
        self.one(Ask::WriteZeroes { position, length, unmap }).map(drop)
    }

    pub fn resize(&mut self, size: u64) -> Result<(), Error> {
        let mut output = Vec::new();
        // SAFETY: no operation is under way.
        let status = unsafe { (self.table.resize)(self.instance, size, Sink::to(&mut output)) };
        self.info = Self::outcome(status, output).map(|info| wire::decode_store_info(&info).unwrap())?;
        Ok(())
    }

    pub fn close(self) -> Result<(), Error> {
        let mut output = Vec::new();
        // SAFETY: no operation is under way.
        let status = unsafe { (self.table.close)(self.instance, Sink::to(&mut output)) };
        Self::outcome(status, output).map(drop)
    }

    /// Saves the store's state.
    pub fn save(&self) -> Result<(u32, Vec<u8>), Error> {
        let (mut schema, mut output) = (0, Vec::new());
        // SAFETY: no operation is under way.
        let status = unsafe { (self.table.save)(self.instance, &raw mut schema, Sink::to(&mut output)) };
        Ok((schema, Self::outcome(status, output)?))
    }

    /// Takes over a saved state.
    pub fn restore(&mut self, schema: u32, state: &[u8]) -> Result<(), Error> {
        let mut output = Vec::new();
        // SAFETY: no operation is under way.
        let status =
            unsafe { (self.table.restore)(self.instance, schema, Bytes::new(state), Sink::to(&mut output)) };
        Self::outcome(status, output).map(drop)
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        // SAFETY: the last call.
        unsafe { (self.table.destroy)(self.instance) };
    }
}

fn host(context: *mut c_void) -> &'static Host {
    // SAFETY: the context is a `Host` that outlives its instance.
    unsafe { &*context.cast::<Host>() }
}

/// A host that keeps outcomes for [`Bench`].
pub fn calls() -> StoreHost {
    unsafe extern "C" fn log(context: *mut c_void, _level: u32, message: Bytes<'_>) {
        // SAFETY: the message is good for the call.
        let text = String::from_utf8_lossy(unsafe { message.as_slice() }).into_owned();
        host(context).log.lock().unwrap().push(text);
    }
    unsafe extern "C" fn now(_: *mut c_void) -> u64 {
        0
    }
    unsafe extern "C" fn wait(_: *mut c_void, _: u64) {}
    unsafe extern "C" fn random(_: *mut c_void, _: *mut u8, _: u32) {
        unreachable!("native stores have no use for it")
    }
    unsafe extern "C" fn info(_: *mut c_void, _: u32, _: Sink) {
        unreachable!("there is no lower store")
    }
    unsafe extern "C" fn lower(_: *mut c_void, _: u32, _: *const StoreOperation, _: u32, _: *mut u32) {
        unreachable!("there is no lower store")
    }
    unsafe extern "C" fn lower_resize(_: *mut c_void, _: u32, _: u64) -> u32 {
        unreachable!("there is no lower store")
    }
    unsafe extern "C" fn send(_: *mut c_void, _: u32, _: Bytes<'_>, _: Sink) -> Status {
        unreachable!("there is no connection")
    }
    unsafe extern "C" fn receive(_: *mut c_void, _: u32, _: *mut u8, _: u32, _: *mut u32, _: Sink) -> Status {
        unreachable!("there is no connection")
    }
    unsafe extern "C" fn connect(
        _: *mut c_void,
        _: Bytes<'_>,
        _: u32,
        _: u32,
        _: *mut u32,
        _: Sink,
    ) -> Status {
        unreachable!("there is no connection")
    }
    unsafe extern "C" fn hang_up(_: *mut c_void, _: u32) {}
    unsafe extern "C" fn done(context: *mut c_void, token: u64, error: u32) {
        let host = host(context);
        let before = host.done.lock().unwrap().insert(token, StoreError::result(error));
        assert!(before.is_none(), "operation {token} ended twice");
        host.wake.notify_all();
    }
    unsafe extern "C" fn panicked(_: *mut c_void, message: Bytes<'_>) {
        // SAFETY: the message is good for the call.
        eprintln!("the store panicked: {}", String::from_utf8_lossy(unsafe { message.as_slice() }));
    }
    StoreHost {
        size: StoreHost::SIZE,
        log_log: log,
        time_now: now,
        time_wait: wait,
        entropy_random: random,
        lower_info: info,
        lower_submit: lower,
        lower_resize,
        connection_send: send,
        connection_receive: receive,
        connections_connect: connect,
        connection_close: hang_up,
        done,
        panicked,
    }
}

/// Numbers that are the same for the same seed (xorshift64*).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub fn bytes(&mut self, length: u64) -> Vec<u8> {
        (0..length.div_ceil(8))
            .flat_map(|_| self.next().to_le_bytes())
            .take(usize::try_from(length).unwrap())
            .collect()
    }
}

/// Batches of random operations that do not overlap within a batch, against a model that begins as the store reads. Every read is compared; at the end, everything is.
pub fn torture(bench: &mut Bench, model: &mut Vec<u8>, seed: u64, rounds: u32, zeroes: bool) {
    let mut random = Random(seed);
    let block = u64::from(bench.info.block_size);
    let blocks = bench.info.size / block;
    for round in 0..rounds {
        bench.layout = match random.below(4) {
            0 => Layout::WHOLE,
            1 => Layout::ODD,
            _ => Layout::PAGES,
        };
        let (mut asked, mut expected) = (Vec::new(), Vec::new());
        let mut from = 0;
        loop {
            let start = from + random.below(blocks.div_ceil(6));
            let longest = if random.below(4) == 0 { 512 } else { 16 };
            let count = 1 + random.below(longest);
            if start + count > blocks || asked.len() >= 40 {
                break;
            }
            from = start + count;
            let (position, length) = (start * block, count * block);
            let range = usize::try_from(position).unwrap()..usize::try_from(position + length).unwrap();
            match random.below(if zeroes { 10 } else { 8 }) {
                0..4 => {
                    let data = random.bytes(length);
                    model[range].copy_from_slice(&data);
                    asked.push(Ask::Write { position, data });
                    expected.push(Vec::new());
                }
                4..8 => {
                    asked.push(Ask::Read { position, length });
                    expected.push(model[range].to_vec());
                }
                _ => {
                    model[range].fill(0);
                    asked.push(Ask::WriteZeroes { position, length, unmap: random.below(2) == 0 });
                    expected.push(Vec::new());
                }
            }
        }
        if random.below(8) == 0 {
            asked.push(Ask::Flush);
            expected.push(Vec::new());
        }
        for ((outcome, expected), ask) in bench.run(&asked).into_iter().zip(expected).zip(&asked) {
            let what = || match ask {
                Ask::Write { position, data } => format!("write {} at {position}", data.len()),
                other => format!("{other:?}"),
            };
            let got =
                outcome.unwrap_or_else(|error| panic!("seed {seed}, round {round}: {}: {error}", what()));
            assert!(got == expected, "seed {seed}, round {round}: {} gave other bytes", what());
        }
    }
    assert!(everything(bench) == *model, "seed {seed}: the store is not what was written");
}

/// All of a store's bytes.
pub fn everything(bench: &mut Bench) -> Vec<u8> {
    let size = bench.info.size;
    (0..size)
        .step_by(1 << 20)
        .flat_map(|position| bench.read(position, (size - position).min(1 << 20)).unwrap())
        .collect()
}

/// How many threads and open files this process has whose names are of a store.
pub fn open_files(part: &str) -> usize {
    std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .flatten()
        .filter(|entry| std::fs::read_link(entry.path()).is_ok_and(|to| to.to_string_lossy().contains(part)))
        .count()
}
