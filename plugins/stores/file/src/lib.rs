//! Backing store: a file or block device of this host.
//!
//! Data moves straight between the buffers of an operation, which are guest memory most often, and the file. The parts:
//!
//! - `medium`: what was opened: checks, size, alignment, locks, and what a file and a block device do differently;
//! - `transfer`: one operation under way: which bytes are still to be moved, and what an outcome means for it;
//! - `uring`: reads, writes and flushes by io_uring;
//! - `calls`: the same by system calls on a few `threads`, for hosts without io_uring; on every host, discards and zeroes go this way, and writes to the page caches of
//!   file systems that make io_uring wait.
//!
//! A file whose length is no multiple of 512 reads as if it were filled up with zeroes. A file that becomes shorter while it is open gives input and output errors.

mod calls;
mod lock;
mod medium;
mod threads;
mod transfer;
mod uring;

use std::sync::Arc;

use tenon_sdk::store::{
    Completions, Config, Level, NativeOperation, NativeStore, OperationKind, Result, StoreInfo,
};

use crate::calls::Calls;
use crate::medium::{Medium, Settings};
use crate::threads::Threads;
use crate::transfer::Task;
use crate::uring::Uring;

tenon_sdk::export_native_store!(FileStore);

/// The plugin's `plugin.toml`, for whoever links it in.
pub const MANIFEST: &str = include_str!("../plugin.toml");

/// Which way reads, writes and flushes go.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Engine {
    Auto,
    Uring,
    Threads,
}

/// A file or block device.
pub struct FileStore {
    /// Dropped first: it waits for its operations.
    uring: Option<Uring>,
    threads: Threads<Calls>,
    medium: Arc<Medium>,
    completions: Completions,
}

impl NativeStore for FileStore {
    fn open(config: &Config, completions: Completions) -> Result<(Self, StoreInfo)> {
        let engines = [("auto", Engine::Auto), ("io_uring", Engine::Uring), ("threads", Engine::Threads)];
        let engine = config.choice("engine", &engines)?.unwrap_or(Engine::Auto);
        let medium = Arc::new(Medium::open(&Settings::read(config)?, completions.clone())?);
        let uring = match engine {
            Engine::Threads => None,
            Engine::Uring | Engine::Auto => match Uring::new(&medium, &completions) {
                Ok(uring) => Some(uring),
                Err(why) if engine == Engine::Auto => {
                    let what = format!("{}: no io_uring ({why}); using threads", medium.path);
                    completions.log(Level::Info, &what);
                    None
                }
                Err(why) => {
                    return Err(tenon_sdk::store::Error::Unsupported(format!(
                        "`engine` is `io_uring`, which this host refuses: {why}; `threads` does without it"
                    )));
                }
            },
        };
        let threads = Threads::new(Calls { medium: medium.clone(), completions: completions.clone() });
        let info = medium.info();
        Ok((Self { uring, threads, medium, completions }, info))
    }

    fn submit(&self, operations: &[NativeOperation<'_>]) {
        let (mut moves, mut waits) = (Vec::with_capacity(operations.len()), Vec::new());
        for operation in operations {
            let task = Task::new(operation);
            if let Some(outcome) = self.medium.admit(operation) {
                self.completions.done(operation.token, outcome);
            } else if self.waits(operation.kind) {
                waits.push(task);
            } else {
                moves.push(task);
            }
        }
        if !waits.is_empty() {
            self.threads.submit(waits);
        }
        if moves.is_empty() {
            return;
        }
        match &self.uring {
            Some(uring) => uring.submit(moves),
            None => self.threads.submit(moves),
        }
    }

    fn resize(&self, size: u64) -> Result<StoreInfo> {
        self.medium.resize(size)?;
        Ok(self.medium.info())
    }

    fn close(&self) -> Result<()> {
        Ok(self.medium.flush()?)
    }
}

impl FileStore {
    /// Whether an operation keeps whoever makes it waiting in the kernel, also with io_uring.
    fn waits(&self, kind: OperationKind) -> bool {
        match kind {
            OperationKind::Discard | OperationKind::WriteZeroes { .. } => true,
            OperationKind::Write => self.medium.writes_wait(),
            OperationKind::Read | OperationKind::Flush => false,
        }
    }
}
