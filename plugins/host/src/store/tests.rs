//! What the host sees to for every store, with a medium that does what the test says.

use super::*;

/// Keeps what it is given until the test ends it.
#[derive(Default)]
struct Gate {
    pieces: Mutex<Vec<Piece>>,
}

struct Gated(Arc<Gate>, bool);

impl Medium for Gated {
    fn submit(&self, pieces: Vec<Piece>) {
        self.0.pieces.lock().unwrap().extend(pieces);
    }

    fn in_pieces(&self) -> bool {
        self.1
    }

    fn resize(&self, size: u64) -> Result<StoreInfo, String> {
        Ok(StoreInfo::new(size))
    }

    fn close(&self) -> Result<(), String> {
        Ok(())
    }
}

/// Notes outcomes by token.
#[derive(Default)]
struct Noted(Mutex<Vec<(u64, Result<(), StoreError>)>>);

impl Completed for Noted {
    fn completed(&self, token: u64, result: Result<(), StoreError>, _: Vec<u8>) {
        self.0.lock().unwrap().push((token, result));
    }
}

struct Bench {
    gate: Arc<Gate>,
    shared: Arc<Shared>,
    store: Arc<Store>,
    noted: Arc<Noted>,
}

const KIB: u64 = 1024;

impl Bench {
    fn new(info: StoreInfo, in_pieces: bool) -> Self {
        let (gate, shared) = (Arc::new(Gate::default()), Shared::new("test"));
        let store = Store::on(shared.clone(), info, Box::new(Gated(gate.clone(), in_pieces)), Vec::new());
        Self { gate, shared, store, noted: Arc::default() }
    }

    /// Begins an operation without data in guest memory.
    fn begin(&self, kind: OperationKind, position: u64, length: u64) {
        let data = if kind.moves_data() {
            Data::Host(vec![0; usize::try_from(length).unwrap()])
        } else {
            Data::None
        };
        let done: Arc<dyn Completed> = self.noted.clone();
        self.store.submit(&mut vec![Operation { kind, position, length, data, done, token: position }]);
    }

    /// Ends everything that the medium has.
    fn end(&self, result: Result<(), StoreError>) -> usize {
        let pieces = std::mem::take(&mut *self.gate.pieces.lock().unwrap());
        let count = pieces.len();
        pieces.into_iter().for_each(|piece| self.shared.ended(piece.token, result, Vec::new()));
        count
    }

    /// The outcome of one operation that the medium ends so; `None` if it never reached it.
    fn outcome(
        &self,
        kind: OperationKind,
        position: u64,
        length: u64,
        end: Result<(), StoreError>,
    ) -> (bool, Result<(), StoreError>) {
        self.begin(kind, position, length);
        let reached = self.end(end) > 0;
        (reached, self.noted.0.lock().unwrap().pop().unwrap().1)
    }
}

fn info() -> StoreInfo {
    StoreInfo::new(4096 * KIB)
}

#[test]
fn what_a_store_must_not_see_never_reaches_it() {
    use OperationKind::{Discard, Read, Write, WriteZeroes};
    let bench = Bench::new(info(), false);
    let cases = [
        (Read, 4096 * KIB, 512, StoreError::OutOfRange),
        (Read, u64::MAX - 511, 512, StoreError::OutOfRange),
        (Write, 1, 512, StoreError::OutOfRange),
        (Write, 0, 511, StoreError::OutOfRange),
        (Read, 0, 2 * MAX_TRANSFER, StoreError::OutOfRange),
        (WriteZeroes { unmap: true }, 512, 4096 * KIB, StoreError::OutOfRange),
        (Discard, 0, 512, StoreError::Unsupported),
    ];
    for (kind, position, length, error) in cases {
        assert_eq!(bench.outcome(kind, position, length, Ok(())), (false, Err(error)), "{kind:?} {position}");
    }
    let bench = Bench::new(StoreInfo { read_only: true, discard: true, ..info() }, false);
    for kind in [Write, Discard, WriteZeroes { unmap: false }] {
        assert_eq!(bench.outcome(kind, 0, 512, Ok(())), (false, Err(StoreError::ReadOnly)));
    }
    assert_eq!(bench.outcome(Read, 0, 512, Ok(())), (true, Ok(())));
    assert_eq!(bench.store.usage().errors, 3);
}

#[test]
fn a_failed_flush_stays_failed_until_what_was_lost_is_written_again() {
    use OperationKind::{Flush, Write};
    let bench = Bench::new(info(), false);
    let write = |position, length| assert_eq!(bench.outcome(Write, position, length, Ok(())).1, Ok(()));
    write(0, 4 * KIB);
    assert_eq!(bench.outcome(Flush, 0, 0, Ok(())), (true, Ok(())));
    write(8 * KIB, 4 * KIB);
    write(64 * KIB, 512);
    assert_eq!(bench.outcome(Flush, 0, 0, Err(StoreError::Io)), (true, Err(StoreError::Io)));
    assert_eq!(bench.outcome(Flush, 0, 0, Ok(())), (false, Err(StoreError::Io)));
    write(8 * KIB, 4 * KIB);
    assert_eq!(bench.outcome(Flush, 0, 0, Ok(())), (false, Err(StoreError::Io)));
    assert_eq!(bench.outcome(Write, 64 * KIB, 512, Err(StoreError::Io)).1, Err(StoreError::Io));
    assert_eq!(bench.outcome(Flush, 0, 0, Ok(())), (false, Err(StoreError::Io)));
    write(64 * KIB, 512);
    assert_eq!(bench.outcome(Flush, 0, 0, Ok(())), (true, Ok(())));
}

#[test]
fn a_flush_that_was_under_way_when_another_failed_fails_too() {
    use OperationKind::{Flush, Write};
    let bench = Bench::new(info(), false);
    assert_eq!(bench.outcome(Write, 0, 512, Ok(())).1, Ok(()));
    bench.begin(Flush, 0, 0);
    bench.begin(Flush, 0, 0);
    let mut pieces = std::mem::take(&mut *bench.gate.pieces.lock().unwrap());
    let second = pieces.pop().unwrap();
    bench.shared.ended(pieces.pop().unwrap().token, Err(StoreError::Io), Vec::new());
    bench.shared.ended(second.token, Ok(()), Vec::new());
    let noted = bench.noted.0.lock().unwrap();
    assert!(noted.iter().skip(1).all(|(_, result)| *result == Err(StoreError::Io)), "{noted:?}");
}

#[test]
fn an_instance_that_fell_over_unsaved_writes_fails_the_flush_that_covers_them() {
    use OperationKind::{Flush, Write};
    let bench = Bench::new(info(), false);
    assert_eq!(bench.outcome(Write, 0, 512, Ok(())).1, Ok(()));
    // The flush is under way when the instance falls, and succeeds on the next one.
    bench.begin(Flush, 0, 0);
    bench.shared.crashed();
    bench.end(Ok(()));
    assert_eq!(bench.noted.0.lock().unwrap().pop().unwrap().1, Err(StoreError::Io));
    assert_eq!(bench.outcome(Flush, 0, 0, Ok(())), (false, Err(StoreError::Io)));
    assert!(bench.store.close().is_err(), "closing says that something was lost");
}

#[test]
fn long_operations_reach_a_component_in_pieces_and_end_once() {
    let ram = tenon_core::Ram::new(4 << 20).unwrap();
    let mut row = Buffers::new(&ram);
    row.push(0, 4 << 20).unwrap();
    let bench = Bench::new(info(), true);
    let done: Arc<dyn Completed> = bench.noted.clone();
    let (kind, length) = (OperationKind::Read, 2 * MAX_TRANSFER + 512);
    let data = Data::Guest(row, 512);
    bench.store.submit(&mut vec![Operation { kind, position: 512, length, data, done, token: 9 }]);
    let places: Vec<_> = bench
        .gate
        .pieces
        .lock()
        .unwrap()
        .iter()
        .map(|piece| {
            let Data::Guest(_, offset) = &piece.data else { panic!("its data is in guest memory") };
            (piece.position, piece.length, *offset)
        })
        .collect();
    let mib = MAX_TRANSFER;
    assert_eq!(places, [(512, mib, 512), (mib + 512, mib, mib + 512), (2 * mib + 512, 512, 2 * mib + 512)]);
    let pieces = std::mem::take(&mut *bench.gate.pieces.lock().unwrap());
    let results = [Ok(()), Err(StoreError::NoSpace), Ok(())];
    pieces
        .iter()
        .zip(results)
        .for_each(|(piece, result)| bench.shared.ended(piece.token, result, Vec::new()));
    // A medium that says it once more changes nothing.
    bench.shared.ended(pieces[0].token, Ok(()), Vec::new());
    assert_eq!(*bench.noted.0.lock().unwrap(), [(9, Err(StoreError::NoSpace))]);
}

#[test]
fn operations_wait_while_the_length_changes_and_watchers_hear_of_it() {
    let bench = Bench::new(info(), false);
    let heard = Arc::new(AtomicU64::new(0));
    let watcher = heard.clone();
    bench.store.watch(move || count(&watcher));
    bench.begin(OperationKind::Read, 0, 512);
    std::thread::scope(|scope| {
        let resizing = scope.spawn(|| bench.store.resize(8192 * KIB).unwrap());
        // It waits for the operation that is under way, and holds back the next.
        while bench.shared.lock().phase != Phase::Resizing {
            std::thread::yield_now();
        }
        bench.begin(OperationKind::Read, 4096 * KIB, 512);
        assert_eq!(bench.end(Ok(())), 1);
        assert_eq!(resizing.join().unwrap().size, 8192 * KIB);
    });
    assert_eq!(bench.end(Ok(())), 1, "the one that was held back lies inside the longer store");
    assert_eq!(heard.load(Ordering::Relaxed), 1);
    assert_eq!(*bench.noted.0.lock().unwrap(), [(0, Ok(())), (4096 * KIB, Ok(()))]);
}

#[test]
fn a_closed_store_fails_everything() {
    let bench = Bench::new(info(), false);
    bench.store.close().unwrap();
    assert_eq!(bench.outcome(OperationKind::Read, 0, 512, Ok(())), (false, Err(StoreError::Io)));
    assert_eq!(bench.outcome(OperationKind::Flush, 0, 0, Ok(())), (false, Err(StoreError::Io)));
}
