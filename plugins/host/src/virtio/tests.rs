//! The worker and the keeper, with a device that does what the test says, a queue without rings, and a store whose operations end when the test says.
//!
//! Long for the driver and the device that the tests share.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::sync::{Condvar, MutexGuard};
use std::time::Duration;

use tempfile::TempDir;
use tenon_abi::{OperationDone, RequestOperation, StoreError, StoreInfo};
use tenon_core::{BrokenQueue, Buffers, GuestRequest, MIN_MEMORY};

use super::*;
use crate::manifest::FailurePolicy;
use crate::store::{Medium, Piece};

const PATIENCE: Duration = Duration::from_secs(30);

/// A store whose operations end when the test says.
struct Gate {
    pieces: Mutex<Vec<Piece>>,
    came: Condvar,
    shared: Arc<crate::store::Shared>,
}

struct Gated(Arc<Gate>);

impl Medium for Gated {
    fn submit(&self, pieces: Vec<Piece>) {
        self.0.pieces.lock().unwrap().extend(pieces);
        self.0.came.notify_all();
    }

    fn in_pieces(&self) -> bool {
        false
    }

    fn resize(&self, size: u64) -> Result<StoreInfo, String> {
        Ok(StoreInfo::new(size))
    }

    fn close(&self) -> Result<(), String> {
        Ok(())
    }
}

impl Gate {
    /// Waits until `count` operations are under way.
    fn wait(&self, count: usize) -> MutexGuard<'_, Vec<Piece>> {
        let pieces = self.pieces.lock().unwrap();
        let (pieces, late) =
            self.came.wait_timeout_while(pieces, PATIENCE, |pieces| pieces.len() < count).unwrap();
        assert!(!late.timed_out(), "{} operations came, and not {count}", pieces.len());
        pieces
    }

    /// Ends all operations, of which there must be `count`; their positions.
    fn end(&self, count: usize, result: Result<(), StoreError>) -> Vec<u64> {
        let pieces = std::mem::take(&mut *self.wait(count));
        assert_eq!(pieces.len(), count);
        let positions = pieces.iter().map(|piece| piece.position).collect();
        pieces.into_iter().for_each(|piece| self.shared.ended(piece.token, result, Vec::new()));
        positions
    }
}

/// What the driver's side of a queue sees.
#[derive(Default)]
struct Driver {
    waiting: Mutex<VecDeque<GuestRequest>>,
    /// Published answers: token and length.
    answers: Mutex<Vec<(u32, u32)>>,
    published: Condvar,
    armed: std::sync::atomic::AtomicBool,
    publications: AtomicU32,
}

/// The device's side.
struct Ring(Arc<Driver>, Vec<(u32, u32)>);

impl RequestQueue for Ring {
    fn take(&mut self, most: usize, into: &mut Vec<GuestRequest>) -> Result<(), BrokenQueue> {
        let mut waiting = self.0.waiting.lock().unwrap();
        let count = most.min(waiting.len());
        into.extend(waiting.drain(..count));
        Ok(())
    }

    fn complete(&mut self, token: u32, written: u32) {
        self.1.push((token, written));
    }

    fn publish(&mut self) {
        self.0.publications.fetch_add(1, Ordering::SeqCst);
        self.0.answers.lock().unwrap().append(&mut self.1);
        self.0.published.notify_all();
    }

    fn arm(&mut self) -> bool {
        let quiet = self.0.waiting.lock().unwrap().is_empty();
        self.0.armed.store(quiet, Ordering::SeqCst);
        quiet
    }
}

impl Driver {
    /// Waits for `count` answers in all.
    fn wait(&self, count: usize) -> Vec<(u32, u32)> {
        let answers = self.answers.lock().unwrap();
        let (answers, late) =
            self.published.wait_timeout_while(answers, PATIENCE, |answers| answers.len() < count).unwrap();
        assert!(!late.timed_out(), "{} answers came, and not {count}", answers.len());
        answers.clone()
    }
}

/// The transport: notes what it was told.
struct Transport(Mutex<mpsc::Sender<&'static str>>);

impl QueueTransport for Transport {
    fn config_changed(&self) {
        let _ = self.0.lock().unwrap().send("config changed");
    }

    fn needs_reset(&self) {
        let _ = self.0.lock().unwrap().send("needs reset");
    }
}

/// How the device behaves; shared by its instances, as the test's hand.
#[derive(Default)]
struct Script {
    /// So many more batches end in a trap, after their requests were begun.
    traps: AtomicU32,
    /// So many more batches commit this misdeed.
    misdeeds: AtomicU32,
    misdeed: AtomicU32,
    /// Operations end by `operations-done` and not by themselves.
    aware: std::sync::atomic::AtomicBool,
    /// So many more resets trap.
    reset_traps: AtomicU32,
    /// So many more savings are refused.
    save_refusals: AtomicU32,
    /// So many more states are refused, or trap.
    restore_refusals: AtomicU32,
    restore_traps: AtomicU32,
    done_calls: AtomicU32,
    instances: AtomicU32,
    /// The settings with which it was described last.
    settings: Mutex<Vec<(String, String)>>,
    /// It asks for a socket.
    has_socket: bool,
    policy: FailurePolicy,
}

fn once(counter: &AtomicU32) -> bool {
    counter.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok()
}

/// A disk: each request reads a block at the position that its first eight bytes name. Its state counts the writes to its configuration space.
struct Disk {
    services: Option<Box<VirtioServices>>,
    script: Arc<Script>,
    counter: u64,
}

impl Disk {
    fn host(&mut self) -> &mut VirtioServices {
        self.services.as_deref_mut().unwrap()
    }

    fn misuse<T>(result: Result<T, crate::fault::Misuse>) -> Result<T, Fault> {
        result.map_err(|misuse| Fault::Contract(misuse.0))
    }
}

impl VirtioInstance for Disk {
    fn attach(&mut self, services: Box<VirtioServices>) {
        self.services = Some(services);
    }

    fn detach(&mut self) -> Option<Box<VirtioServices>> {
        self.services.take()
    }

    fn services(&mut self) -> Option<&mut VirtioServices> {
        self.services.as_deref_mut()
    }

    fn describe(&mut self, settings: &[(String, String)]) -> crate::instance::Answer<VirtioDescription> {
        *self.script.settings.lock().unwrap() = settings.to_vec();
        let description =
            VirtioDescription::new(2).queue("requests", 128, 8).config(8).store("disk").channel("log");
        Ok(Ok(if self.script.has_socket { description.socket("vsock") } else { description }))
    }

    fn start(&mut self) -> crate::instance::Answer<()> {
        Ok(Ok(()))
    }

    fn call(&mut self, entry: &Entry<'_>) -> crate::instance::Answer<u64> {
        match *entry {
            Entry::ConfigRead { .. } => return Ok(Ok(self.counter)),
            Entry::ConfigWrite { value, .. } => {
                self.counter += value;
                self.host().config_changed();
                if once(&self.script.traps) {
                    return Err(Fault::Trap("as told".into()));
                }
            }
            Entry::Reset => {
                if once(&self.script.reset_traps) {
                    return Err(Fault::Trap("as told".into()));
                }
                self.counter = 0;
            }
            Entry::Requests { requests, heads, .. } => {
                let aware = self.script.aware.load(Ordering::SeqCst);
                for (n, request) in requests.iter().enumerate() {
                    let position = u64::from_le_bytes(heads[n * 8..n * 8 + 8].try_into().unwrap());
                    let handle = request.handle.0;
                    Self::misuse(self.host().move_to_channel(handle, 0, 1, 0))?;
                    let operation = RequestOperation::read(request.handle, 0, 512, position);
                    let success: &[u8] = if aware { b"" } else { b"S" };
                    Self::misuse(self.host().begin(0, &operation.answering(success)))?;
                    if once(&self.script.misdeeds) {
                        let misdeed = self.script.misdeed.load(Ordering::SeqCst);
                        let host = self.host();
                        Self::misuse(match misdeed {
                            0 => host.complete(handle, 0),
                            1 => host.complete(handle.wrapping_add(77), 0),
                            2 => host.begin(0, &operation),
                            3 => host.begin(0, &RequestOperation { success_length: 9, ..operation }),
                            4 => host.begin(0, &RequestOperation { kind: 6, ..operation }),
                            5 => host.receive(0, &[1], &[]),
                            _ => host.read(0, 0, 1).map(drop),
                        })?;
                    }
                }
                if once(&self.script.traps) {
                    return Err(Fault::Trap("as told".into()));
                }
            }
            Entry::Done(done) => {
                self.script.done_calls.fetch_add(1, Ordering::SeqCst);
                for OperationDone { request, error } in done {
                    let status = [u8::try_from(*error).unwrap()];
                    Self::misuse(self.host().write(request.0, 512, &status))?;
                    Self::misuse(self.host().complete(request.0, 513))?;
                }
            }
            _ => {}
        }
        Ok(Ok(0))
    }

    fn save(&mut self) -> crate::instance::Answer<SavedState> {
        if once(&self.script.save_refusals) {
            return Ok(Err(DeviceError::Other("as told".into())));
        }
        Ok(Ok(SavedState { schema: 1, data: self.counter.to_le_bytes().to_vec() }))
    }

    fn restore(&mut self, state: &SavedState) -> crate::instance::Answer<()> {
        if once(&self.script.restore_refusals) {
            return Ok(Err(DeviceError::Other("as told".into())));
        }
        if once(&self.script.restore_traps) {
            return Err(Fault::Trap("as told".into()));
        }
        self.counter = u64::from_le_bytes(state.data.as_slice().try_into().unwrap());
        Ok(Ok(()))
    }
}

struct Disks(Arc<Script>);

impl Maker for Disks {
    fn instance(&self) -> Result<Box<dyn VirtioInstance>, Fault> {
        self.0.instances.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(Disk { services: None, script: self.0.clone(), counter: 0 }))
    }

    fn plugin(&self) -> String {
        "disk 0.0.0".into()
    }

    fn policy(&self) -> FailurePolicy {
        self.0.policy
    }

    fn schema(&self) -> u32 {
        1
    }
}

/// A machine with one such disk.
struct Bench {
    ram: Arc<Ram>,
    gate: Arc<Gate>,
    script: Arc<Script>,
    device: Arc<VirtioDevice>,
    driver: Arc<Driver>,
    told: mpsc::Receiver<&'static str>,
    transport: Arc<Transport>,
    store: Arc<Store>,
    /// Where the socket `vm` is, if there is one.
    folder: TempDir,
}

impl Bench {
    fn new() -> Self {
        Self::with(Script::default())
    }

    fn with(script: Script) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut sockets = Vec::new();
        if script.has_socket {
            sockets.push(("vsock".to_owned(), UnixSocket::open(&folder.path().join("vm")).unwrap()));
        }
        let ram = Ram::new(MIN_MEMORY).unwrap();
        let shared = crate::store::Shared::new("disk0");
        let gate = Arc::new(Gate { pieces: Mutex::default(), came: Condvar::new(), shared: shared.clone() });
        let store = Store::on(shared, StoreInfo::new(1 << 30), Box::new(Gated(gate.clone())), Vec::new());
        let script = Arc::new(script);
        let parts = VirtioParts {
            clock: Clock::virtual_time(),
            ram: ram.clone(),
            stores: vec![("disk".into(), store.clone())],
            ports: Vec::new(),
            sockets,
            folders: Vec::new(),
        };
        let device =
            VirtioDevice::attach(Box::new(Disks(script.clone())), None, "disk0", Vec::new(), &parts).unwrap();
        let (sender, told) = mpsc::channel();
        let transport = Arc::new(Transport(Mutex::new(sender)));
        Self { ram, gate, script, device, driver: Arc::default(), told, transport, store, folder }
    }

    /// A program that connects to the guest.
    fn program(&self) -> UnixStream {
        let mut program = UnixStream::connect(self.folder.path().join("vm")).unwrap();
        program.set_read_timeout(Some(PATIENCE)).unwrap();
        program.write_all(b"CONNECT 5000\n").unwrap();
        program
    }

    fn start(&self) {
        let queue: Box<dyn RequestQueue> = Box::new(Ring(self.driver.clone(), Vec::new()));
        self.device.start(0, vec![Some(queue)], self.transport.clone());
    }

    /// Makes requests available, with these tokens; each reads block `token`.
    fn push(&self, tokens: std::ops::Range<u32>) {
        for token in tokens {
            let mut readable = Buffers::new(&self.ram);
            let address = 0x1000 + u64::from(token) * 1024;
            readable.push(address, 8).unwrap();
            readable.write(0, &(u64::from(token) * 512).to_le_bytes());
            let mut writable = Buffers::new(&self.ram);
            writable.push(address + 16, 520).unwrap();
            self.driver.waiting.lock().unwrap().push_back(GuestRequest { token, readable, writable });
        }
    }

    fn notify(&self) {
        self.device.notify(0);
    }

    /// The byte behind the data of request `token`.
    fn status(&self, token: u32) -> u8 {
        let mut row = Buffers::new(&self.ram);
        row.push(0x1000 + u64::from(token) * 1024 + 16 + 512, 1).unwrap();
        let mut byte = [0];
        row.read(0, &mut byte);
        byte[0]
    }

    /// Gives the worker a command that waits for operations, and does something once it has begun.
    fn while_waiting(&self, command: impl FnOnce(Sender<()>) -> Command, act: impl FnOnce()) {
        let (sender, done) = crossbeam_channel::bounded(1);
        self.device.commands.send(command(sender)).unwrap();
        self.device.shared.inbox.wake();
        while !self.device.commands.is_empty() {
            std::thread::yield_now();
        }
        assert_eq!(done.try_recv(), Err(crossbeam_channel::TryRecvError::Empty), "it does not wait");
        act();
        assert!(done.recv().is_err());
    }

    /// Waits for what the transport is told next.
    fn heard(&self) -> &'static str {
        self.told.recv_timeout(PATIENCE).unwrap()
    }
}

fn tokens(answers: &[(u32, u32)]) -> Vec<u32> {
    let mut tokens: Vec<u32> = answers.iter().map(|answer| answer.0).collect();
    tokens.sort_unstable();
    tokens
}

#[test]
fn sixty_four_ready_requests_are_one_call() {
    let bench = Bench::new();
    bench.push(0..64);
    bench.start();
    bench.gate.end(64, Ok(()));
    let answers = bench.driver.wait(64);
    assert_eq!(tokens(&answers), (0..64).collect::<Vec<_>>());
    assert!(answers.iter().all(|(_, written)| *written == 513), "{answers:?}");
    assert!((0..64).all(|token| bench.status(token) == b'S'));
    let usage = bench.device.usage();
    assert_eq!((usage.batches, usage.requests, usage.operations, usage.answers), (1, 64, 64, 64));
    // Activation, and the batch: no call for the outcomes.
    assert_eq!(usage.calls, 2);
}

#[test]
fn a_new_instance_has_the_settings_as_they_were_adjusted() {
    let bench = Bench::new();
    for (key, value) in [("size", "1"), ("label", "a"), ("size", "2")] {
        bench.device.adjust(key, value).unwrap();
    }
    assert!(bench.script.settings.lock().unwrap().is_empty(), "it is the instance that was there");
    bench.script.traps.store(1, Ordering::SeqCst);
    bench.device.write_config(0, 8, 5);
    let settings = [("label".to_owned(), "a".to_owned()), ("size".to_owned(), "2".to_owned())];
    assert_eq!(*bench.script.settings.lock().unwrap(), settings);
    assert_eq!(bench.device.read_config(0, 8), 5);
    assert_eq!(bench.device.last_fault(), Some(Fault::Trap("as told".into()).to_string()));
}

#[test]
fn an_adjusted_setting_outlives_an_instance_that_cannot_save_it() {
    let bench = Bench::new();
    bench.script.save_refusals.store(1, Ordering::SeqCst);
    bench.device.adjust("size", "1").unwrap();
    assert_eq!(bench.device.usage().restarts, 1);
    assert_eq!(*bench.script.settings.lock().unwrap(), [("size".to_owned(), "1".to_owned())]);
}

#[test]
fn a_device_settles_when_all_is_done_but_what_its_stores_keep() {
    let bench = Bench::new();
    assert_eq!(bench.device.settle(PATIENCE), Some(0));
    bench.push(0..200);
    bench.start();
    // The device holds at most 128 of them.
    assert_eq!(bench.device.settle(PATIENCE), Some(128));
    bench.gate.end(128, Ok(()));
    assert_eq!(bench.device.settle(PATIENCE), Some(72));
    assert_eq!(bench.driver.answers.lock().unwrap().len(), 128);
    bench.gate.end(72, Ok(()));
    assert_eq!(bench.device.settle(PATIENCE), Some(0));
    assert_eq!(bench.driver.answers.lock().unwrap().len(), 200);
}

#[test]
fn outcomes_that_the_device_is_to_hear_of_come_in_one_call() {
    let bench = Bench::new();
    bench.script.aware.store(true, Ordering::SeqCst);
    bench.push(0..32);
    bench.start();
    drop(bench.gate.wait(32));
    // A pause waits for what is under way; the device hears of it when the machine goes on.
    bench.while_waiting(Command::Pause, || {
        bench.gate.end(32, Err(StoreError::NoSpace));
    });
    assert!(bench.driver.answers.lock().unwrap().is_empty());
    bench.device.resume();
    bench.driver.wait(32);
    assert_eq!(bench.script.done_calls.load(Ordering::SeqCst), 1);
    assert_eq!(bench.status(5), StoreError::NoSpace as u8);
}

#[test]
fn a_storm_of_notifications_without_requests_is_no_call() {
    let bench = Bench::new();
    bench.push(0..100);
    bench.start();
    drop(bench.gate.wait(100));
    let before = bench.device.usage();
    (0..10_000).for_each(|_| bench.notify());
    bench.gate.end(100, Ok(()));
    bench.driver.wait(100);
    let after = bench.device.usage();
    assert_eq!((after.calls, after.batches), (before.calls, before.batches));
}

#[test]
fn a_crash_with_requests_in_flight_answers_each_once_and_repeats_no_operation() {
    let bench = Bench::new();
    let log = bench.device.channel("log").unwrap().clone();
    assert!(log.take(1).is_empty());
    bench.push(0..20);
    bench.start();
    drop(bench.gate.wait(20));
    bench.script.traps.store(1, Ordering::SeqCst);
    bench.push(20..40);
    bench.notify();
    let mut positions = bench.gate.end(40, Ok(()));
    positions.sort_unstable();
    assert_eq!(positions, (0..40).map(|n| n * 512).collect::<Vec<_>>());
    assert_eq!(tokens(&bench.driver.wait(40)), (0..40).collect::<Vec<_>>());
    assert!(bench.gate.pieces.lock().unwrap().is_empty());
    let usage = bench.device.usage();
    assert_eq!((usage.faults, usage.restarts, usage.divergences), (1, 1, 0));
    assert_eq!((usage.requests, usage.answers, usage.operations), (40, 40, 40));
    // Bytes that went out did not go out again.
    assert_eq!(log.take(1000).len(), 40);
}

#[test]
fn operations_that_end_while_the_device_restarts_are_told_to_the_new_instance() {
    let bench = Bench::new();
    bench.script.aware.store(true, Ordering::SeqCst);
    bench.push(0..8);
    bench.start();
    drop(bench.gate.wait(8));
    // The lock keeps the worker from telling the device.
    let guard = bench.device.shared.lock();
    bench.gate.end(8, Ok(()));
    bench.script.traps.store(3, Ordering::SeqCst);
    bench.push(8..9);
    drop(guard);
    bench.notify();
    bench.gate.end(1, Ok(()));
    assert_eq!(tokens(&bench.driver.wait(9)), (0..9).collect::<Vec<_>>());
    assert_eq!(bench.device.usage().operations, 9);
}

#[test]
fn misdeeds_cost_the_instance_and_no_request() {
    for misdeed in 0..7 {
        let bench = Bench::new();
        bench.script.misdeed.store(misdeed, Ordering::SeqCst);
        bench.script.misdeeds.store(2, Ordering::SeqCst);
        bench.push(0..10);
        bench.start();
        bench.gate.end(10, Ok(()));
        assert_eq!(tokens(&bench.driver.wait(10)), (0..10).collect::<Vec<_>>(), "misdeed {misdeed}");
        let usage = bench.device.usage();
        assert_eq!((usage.faults, usage.restarts), (2, 1), "misdeed {misdeed}");
    }
}

#[test]
fn a_device_that_always_falls_needs_a_reset_and_is_revived_by_it() {
    let bench = Bench::new();
    bench.script.traps.store(u32::MAX, Ordering::SeqCst);
    bench.push(0..3);
    bench.start();
    assert_eq!(bench.heard(), "needs reset");
    assert_eq!(bench.device.status(), Status::Failed);
    assert_eq!(bench.device.read_config(0, 8), u64::MAX);
    bench.gate.end(3, Ok(()));
    bench.script.traps.store(0, Ordering::SeqCst);
    bench.device.stop();
    assert_eq!(bench.device.status(), Status::Running);
    bench.driver.answers.lock().unwrap().clear();
    bench.push(3..5);
    bench.start();
    bench.gate.end(2, Ok(()));
    assert_eq!(tokens(&bench.driver.wait(2)), [3, 4]);
}

#[test]
fn programs_that_connect_to_a_failed_device_are_let_go() {
    let bench = Bench::with(Script { has_socket: true, ..Script::default() });
    bench.script.traps.store(u32::MAX, Ordering::SeqCst);
    bench.push(0..1);
    bench.start();
    assert_eq!(bench.heard(), "needs reset");
    bench.gate.end(1, Ok(()));
    for _ in 0..3 {
        assert_eq!(bench.program().read(&mut [0; 1]).unwrap(), 0);
    }
}

#[test]
fn nothing_touches_guest_memory_once_the_device_has_stopped() {
    let bench = Bench::new();
    bench.push(0..4);
    bench.start();
    drop(bench.gate.wait(4));
    bench.while_waiting(Command::Stop, || {
        bench.gate.end(4, Ok(()));
    });
    assert_eq!(Arc::strong_count(&bench.driver), 1, "the queues are dropped");
    assert_eq!(Arc::strong_count(&bench.transport), 1);
    assert!(bench.driver.answers.lock().unwrap().is_empty());
    assert!((0..4).all(|token| bench.status(token) == 0));
    bench.notify();
    bench.push(9..10);
    bench.start();
    bench.gate.end(1, Ok(()));
    assert_eq!(tokens(&bench.driver.wait(1)), [9]);
}

#[test]
fn a_write_to_the_configuration_space_is_kept_and_told_once_through_a_crash() {
    let bench = Bench::new();
    bench.start();
    bench.device.write_config(0, 8, 5);
    assert_eq!(bench.heard(), "config changed");
    bench.script.traps.store(1, Ordering::SeqCst);
    bench.device.write_config(0, 8, 7);
    assert_eq!(bench.device.read_config(0, 8), 12);
    assert_eq!(bench.device.usage().restarts, 1);
    let (schema, data) = bench.device.save().unwrap();
    bench.device.stop();
    assert_eq!(bench.device.read_config(0, 8), 0);
    bench.device.restore(schema, &data).unwrap();
    assert_eq!(bench.device.read_config(0, 8), 12);
}

#[test]
fn a_state_that_is_refused_costs_the_running_device_nothing() {
    for (policy, traps) in [
        (FailurePolicy::Reload, 0),
        (FailurePolicy::Reload, 1),
        (FailurePolicy::Fail, 0),
        (FailurePolicy::Fail, 1),
    ] {
        let bench = Bench::with(Script { policy, ..Script::default() });
        bench.device.write_config(0, 8, 5);
        bench.push(0..4);
        bench.start();
        drop(bench.gate.wait(4));
        // More often than a device may fault.
        for _ in 0..10 {
            bench.script.restore_refusals.store(1 - traps, Ordering::SeqCst);
            bench.script.restore_traps.store(traps, Ordering::SeqCst);
            let error = bench.device.restore(1, &7_u64.to_le_bytes()).unwrap_err();
            assert!(error.contains("as told"), "{error}");
        }
        bench.gate.end(4, Ok(()));
        assert_eq!((bench.device.status(), bench.device.read_config(0, 8)), (Status::Running, 5));
        let usage = bench.device.usage();
        assert_eq!((usage.faults, usage.restarts), (u64::from(traps) * 10, 0), "{policy:?}");
        assert_eq!(tokens(&bench.driver.wait(4)), [0, 1, 2, 3]);
        assert_eq!(bench.device.usage().divergences, 0);
    }
}

#[test]
fn streams_end_with_a_state_that_is_refused_and_nothing_else_does() {
    let bench = Bench::with(Script { has_socket: true, policy: FailurePolicy::Fail, ..Script::default() });
    bench.device.write_config(0, 8, 5);
    let before = bench.device.usage().calls;
    let mut program = bench.program();
    while bench.device.usage().calls == before {
        std::thread::yield_now();
    }
    bench.script.restore_refusals.store(1, Ordering::SeqCst);
    bench.device.restore(1, &7_u64.to_le_bytes()).unwrap_err();
    assert_eq!(program.read(&mut [0; 1]).unwrap(), 0);
    assert_eq!((bench.device.status(), bench.device.read_config(0, 8)), (Status::Running, 5));
    assert_eq!(
        bench.script.instances.load(Ordering::SeqCst),
        3,
        "one that is told that there are no streams"
    );
    assert_eq!(bench.device.usage().faults, 0);
}

#[test]
fn a_device_that_falls_over_its_reset_is_made_anew() {
    let bench = Bench::new();
    bench.device.write_config(0, 8, 5);
    bench.script.reset_traps.store(1, Ordering::SeqCst);
    bench.device.stop();
    assert_eq!(bench.device.read_config(0, 8), 0);
    assert_eq!((bench.device.status(), bench.device.usage().restarts), (Status::Running, 1));
}

#[test]
fn a_device_holds_no_more_requests_than_its_queue_has_entries() {
    let bench = Bench::new();
    bench.push(0..300);
    bench.start();
    let mut left = 300;
    while left > 0 {
        let count = 128.min(left);
        // More never come before these have ended.
        assert_eq!(bench.gate.wait(count).len(), count);
        bench.gate.end(count, Ok(()));
        left -= count;
    }
    bench.driver.wait(300);
}

#[test]
fn a_store_that_changes_is_told_and_one_that_is_missing_is_named() {
    let bench = Bench::new();
    let before = bench.device.usage().calls;
    bench.store.resize(1 << 20).unwrap();
    while bench.device.usage().calls == before {
        std::thread::yield_now();
    }
    let parts = VirtioParts {
        clock: Clock::virtual_time(),
        ram: bench.ram.clone(),
        stores: vec![("tape".into(), bench.store.clone())],
        ports: Vec::new(),
        sockets: Vec::new(),
        folders: Vec::new(),
    };
    let error = VirtioDevice::attach(Box::new(Disks(Arc::default())), None, "disk1", Vec::new(), &parts)
        .err()
        .unwrap();
    assert_eq!(error.to_string(), "device `disk1` needs a store named `disk`; it was given `tape`");
    let disk = ("disk".to_owned(), bench.store.clone());
    let parts = VirtioParts { stores: vec![disk, parts.stores[0].clone()], ..parts };
    let error = VirtioDevice::attach(Box::new(Disks(Arc::default())), None, "disk1", Vec::new(), &parts)
        .err()
        .unwrap();
    let expected = "device `disk1` has no use for a store named `tape`; it asks for `disk`";
    assert_eq!(error.to_string(), expected);
}

#[test]
fn a_description_has_no_more_of_anything_than_a_device_gets() {
    type More = fn(VirtioDescription, &str) -> VirtioDescription;
    let cases: [(&str, usize, More); 7] = [
        ("queues", 256, |description, name| description.queue(name, 16, 0)),
        ("timers", 64, |description, _| description.timer()),
        ("channels", 64, |description, name| description.channel(name)),
        ("stores", 16, |description, name| description.store(name)),
        ("network ports", 16, |description, name| description.port(name)),
        ("sockets", 16, |description, name| description.socket(name)),
        ("folders", 16, |description, name| description.folder(name)),
    ];
    for (what, most, more) in cases {
        let mut description = VirtioDescription::new(26);
        if what != "queues" {
            description = description.queue("requests", 16, 0);
        }
        for n in 0..most {
            description = more(description, &format!("thing{n}"));
        }
        assert!(check("greedy0", &description).is_ok(), "{most} {what}");
        let error = check("greedy0", &more(description, "more")).unwrap_err().to_string();
        let wanted = format!("it asks for {} {what}; a device gets at most {most}", most + 1);
        assert!(error.contains(&wanted), "{error}");
    }
}
