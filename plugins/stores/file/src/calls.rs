//! Operations by system calls, each on a thread of its own for as long as it takes: where there is no io_uring, and on every host what io_uring does no better.
#![allow(unsafe_code, reason = "preadv and pwritev on the buffers of operations")]

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use tenon_sdk::store::{Completions, OperationKind, StoreError};

use crate::medium::Medium;
use crate::threads::Work;
use crate::transfer::{Next, Task};

/// What every call needs.
pub(crate) struct Calls {
    pub(crate) medium: Arc<Medium>,
    pub(crate) completions: Completions,
}

impl Work for Calls {
    type Task = Task;

    fn carry_out(&self, mut task: Task, stop: &AtomicBool) {
        let Task { token, kind, position, length, .. } = task;
        let medium = &self.medium;
        let slow =
            |outcome: io::Result<()>| outcome.map_err(|error| medium.failed(kind, position, length, &error));
        let outcome = match kind {
            OperationKind::Read | OperationKind::Write => self.transfer(&mut task),
            OperationKind::Flush => medium.flush(),
            OperationKind::Discard => slow(medium.discard(position, length)),
            OperationKind::WriteZeroes { unmap } => slow(medium.write_zeroes(position, length, unmap, stop)),
        };
        self.completions.done(token, outcome);
    }
}

impl Calls {
    fn transfer(&self, task: &mut Task) -> Result<(), StoreError> {
        loop {
            let transfer = task.transfer(&self.medium);
            let (count, position) =
                (libc::c_int::try_from(transfer.count), libc::off_t::try_from(transfer.position));
            let (Ok(count), Ok(position)) = (count, position) else { return Err(StoreError::OutOfRange) };
            // SAFETY: the vectors and what they point to are good until the operation has ended.
            let moved = unsafe {
                if task.kind == OperationKind::Read {
                    libc::preadv(transfer.fd, transfer.vectors, count, position)
                } else {
                    libc::pwritev(transfer.fd, transfer.vectors, count, position)
                }
            };
            let moved = usize::try_from(moved).map_err(|_| io::Error::last_os_error());
            if let Next::End(outcome) = task.advance(&self.medium, moved) {
                return outcome;
            }
        }
    }
}
