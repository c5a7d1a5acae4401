//! Stores behind their native tables: one that works on copies, and one that works on the data itself from a thread of its own. Both are plugins of this one program.
#![allow(unsafe_code, clippy::unwrap_used, reason = "a native store works on memory that is not its own")]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use tenon_sdk::store::{
    Completions, Config, Decoder, Encoder, Error, IoVec, Level, Lower, NativeOperation, NativeStore,
    OperationKind, Result, Store, StoreError, StoreInfo, info,
};
use tenon_testkit::{MemoryStore, NativeStoreBench, StoreChecks, suite};

/// Passes everything down.
struct Through(Lower);

impl Store for Through {
    fn open(_config: &Config, lower: Vec<Lower>) -> Result<(Self, StoreInfo)> {
        let lower = lower.into_iter().next().ok_or_else(|| Error::Invalid("no lower store".into()))?;
        let info = lower.info();
        info!("opened over {}", info.identity);
        Ok((Self(lower), info))
    }
    fn read(&mut self, position: u64, into: &mut [u8]) -> Result<(), StoreError> {
        assert!(position != 1 << 20, "as it should for this test");
        into.copy_from_slice(&self.0.read(position, into.len() as u64)?);
        Ok(())
    }
    fn write(&mut self, position: u64, bytes: &[u8]) -> Result<(), StoreError> {
        self.0.write(position, bytes)
    }
    fn flush(&mut self) -> Result<(), StoreError> {
        self.0.flush()
    }
    fn discard(&mut self, position: u64, length: u64) -> Result<(), StoreError> {
        self.0.discard(position, length)
    }
    fn write_zeroes(&mut self, position: u64, length: u64, unmap: bool) -> Result<(), StoreError> {
        self.0.write_zeroes(position, length, unmap)
    }
    fn resize(&mut self, size: u64) -> Result<StoreInfo> {
        self.0.resize(size)?;
        Ok(self.0.info())
    }
}

mod through {
    tenon_sdk::export_store!(super::Through);
}

/// Keeps everything in memory that outlives it, and works in a thread of its own, last operation first.
struct Threaded {
    medium: Arc<Mutex<Vec<u8>>>,
    jobs: Option<Sender<Vec<Job>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Job {
    token: u64,
    kind: OperationKind,
    position: u64,
    length: u64,
    vectors: Vec<IoVec>,
}

static MEDIUM: Mutex<Option<Arc<Mutex<Vec<u8>>>>> = Mutex::new(None);

impl Job {
    fn work(&self, medium: &mut [u8]) -> Result<(), StoreError> {
        let (start, length) =
            (usize::try_from(self.position).unwrap(), usize::try_from(self.length).unwrap());
        let range = &mut medium[start..start + length];
        match self.kind {
            OperationKind::Flush => {}
            OperationKind::WriteZeroes { .. } => range.fill(0),
            OperationKind::Discard => return Err(StoreError::Unsupported),
            OperationKind::Read | OperationKind::Write => {
                let mut rest = range;
                for vector in &self.vectors {
                    let (part, more) = rest.split_at_mut(vector.length);
                    // SAFETY: the operation has not ended.
                    unsafe {
                        if self.kind == OperationKind::Read {
                            std::ptr::copy_nonoverlapping(part.as_ptr(), vector.base, part.len());
                        } else {
                            std::ptr::copy_nonoverlapping(vector.base, part.as_mut_ptr(), part.len());
                        }
                    }
                    rest = more;
                }
                assert!(rest.is_empty(), "the vectors hold as many bytes as the operation says");
            }
        }
        Ok(())
    }
}

impl NativeStore for Threaded {
    const SCHEMA: u32 = 2;

    fn open(config: &Config, completions: Completions) -> Result<(Self, StoreInfo)> {
        let size = config.number("size")?.unwrap_or(2u64 << 20);
        let medium = MEDIUM
            .lock()
            .unwrap()
            .get_or_insert_with(|| Arc::new(Mutex::new(vec![0; usize::try_from(size).unwrap()])))
            .clone();
        let (jobs, queue) = channel::<Vec<Job>>();
        let worked_on = medium.clone();
        let thread = std::thread::spawn(move || {
            for batch in queue {
                for job in batch.into_iter().rev() {
                    let result = job.work(&mut worked_on.lock().unwrap());
                    completions.done(job.token, result);
                }
            }
            completions.log(Level::Info, "the thread ends");
        });
        let size = medium.lock().unwrap().len() as u64;
        Ok((Self { medium, jobs: Some(jobs), thread: Mutex::new(Some(thread)) }, StoreInfo::new(size)))
    }

    fn submit(&self, operations: &[NativeOperation<'_>]) {
        let job = |operation: &NativeOperation<'_>| Job {
            token: operation.token,
            kind: operation.kind,
            position: operation.position,
            length: operation.length,
            vectors: operation.vectors.to_vec(),
        };
        self.jobs.as_ref().unwrap().send(operations.iter().map(job).collect()).unwrap();
    }

    fn resize(&self, size: u64) -> Result<StoreInfo> {
        self.medium.lock().unwrap().resize(usize::try_from(size).unwrap(), 0);
        Ok(StoreInfo::new(size))
    }

    fn close(&self) -> Result<()> {
        Ok(())
    }

    fn save(&self, state: &mut Encoder) -> Result<()> {
        state.u8(42);
        Ok(())
    }

    fn restore(&self, state: &mut Decoder<'_>) -> Result<()> {
        match state.u8()? {
            42 => Ok(()),
            _ => Err(state.invalid("not 42")),
        }
    }
}

impl Drop for Threaded {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.lock().unwrap().take() {
            thread.join().unwrap();
        }
    }
}

mod threaded {
    tenon_sdk::export_native_store!(super::Threaded);
}

#[test]
fn a_store_of_copies_does_behind_its_table_what_every_user_relies_on() {
    // Smaller than the place where it panics.
    let lower = vec![MemoryStore::new(1 << 20)];
    let mut bench = NativeStoreBench::open(&through::PLUGIN, &[], lower).unwrap();
    assert_eq!(bench.take_log(), [(Level::Info, "opened over memory".into())]);
    let said = suite::store(&mut bench, StoreChecks::default()).unwrap();
    assert!(said.iter().any(|line| line.contains("3 failures of the lower store came through")), "{said:?}");
}

#[test]
fn a_store_with_its_own_thread_does_behind_its_table_what_every_user_relies_on() {
    let mut bench = NativeStoreBench::open(&threaded::PLUGIN, &[], vec![]).unwrap();
    suite::store(&mut bench, StoreChecks::default()).unwrap();
    assert_eq!(bench.save().unwrap().schema, 2);
    bench.take_log();
    bench.reopen().unwrap();
    assert_eq!(bench.take_log(), [(Level::Info, "the thread ends".into())]);
}

#[test]
fn a_refusal_carries_the_stores_words_and_a_panic_its_text() {
    let error = NativeStoreBench::open(&through::PLUGIN, &[], vec![]).err().unwrap();
    assert_eq!(error, Error::Invalid("no lower store".into()));
    let mut bench = NativeStoreBench::open(&through::PLUGIN, &[], vec![MemoryStore::new(2 << 20)]).unwrap();
    let payload = catch_unwind(AssertUnwindSafe(|| bench.read(1 << 20, 512))).unwrap_err();
    let text = payload.downcast_ref::<String>().unwrap();
    assert!(text.contains("as it should for this test"), "{text}");
}

#[test]
fn plugins_of_one_program_do_not_collide() {
    assert!(through::PLUGIN.store.is_some() && threaded::PLUGIN.store.is_some());
    assert!(!std::ptr::eq(through::PLUGIN.store.unwrap(), threaded::PLUGIN.store.unwrap()));
}
