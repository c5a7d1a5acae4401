//! One operation under way: what is still to be moved, and what an outcome means for it. Not who moves it.
#![allow(unsafe_code, reason = "copies to and from the buffers of operations, which are guest memory")]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::io;
use std::os::fd::RawFd;

use tenon_sdk::store::{IoVec, NativeOperation, OperationKind, StoreError};

use crate::medium::{Alignment, Medium};

/// The most vectors that one system call takes (`IOV_MAX`).
const MOST_VECTORS: usize = 1024;
/// The most bytes that one system call is asked to move.
const MOST_MOVED: u64 = 1 << 30;
/// The most bytes that go through a bounce buffer at a time.
const MOST_BOUNCED: u64 = 256 << 10;
/// How often a call is made again that was interrupted or put off before the operation fails.
const MOST_ATTEMPTS: u32 = 1000;

/// An operation that was admitted, and how far it has come.
pub(crate) struct Task {
    pub(crate) token: u64,
    pub(crate) kind: OperationKind,
    pub(crate) position: u64,
    pub(crate) length: u64,
    /// The host's array; it and what it points to are good until the operation has ended.
    vectors: *const IoVec,
    count: usize,
    /// Bytes moved.
    done: u64,
    /// Calls since bytes were last moved.
    attempts: u32,
    /// The vectors of the call under way, where they are not the host's array.
    pieces: Vec<libc::iovec>,
    bounce: Option<Bounce>,
}

// SAFETY: the pointers are the operation's, which may go on on any thread.
unsafe impl Send for Task {}

/// What a call is asked to move.
pub(crate) struct Transfer {
    pub(crate) fd: RawFd,
    pub(crate) vectors: *const libc::iovec,
    pub(crate) count: usize,
    pub(crate) position: u64,
}

/// What comes after a call.
pub(crate) enum Next {
    /// Another call: [`Task::transfer`] says which.
    Again,
    /// The operation has ended.
    End(Result<(), StoreError>),
}

impl Task {
    pub(crate) fn new(operation: &NativeOperation<'_>) -> Self {
        Self {
            token: operation.token,
            kind: operation.kind,
            position: operation.position,
            length: operation.length,
            vectors: operation.vectors.as_ptr(),
            count: operation.vectors.len(),
            done: 0,
            attempts: 0,
            pieces: Vec::new(),
            bounce: None,
        }
    }

    /// What a read or write moves next. What it points to is good until the next call of a method.
    pub(crate) fn transfer(&mut self, medium: &Medium) -> Transfer {
        let position = self.position + self.done;
        let left = self.length - self.done;
        let (fd, direct) = medium.route(position, left);
        self.bounce = None;
        if let Some(alignment) = direct
            && !self.is_aligned(alignment)
        {
            let bounce = Bounce::new(left.min(MOST_BOUNCED), alignment);
            if self.kind == OperationKind::Write {
                let mut into = bounce.memory;
                self.each_part(bounce.length as u64, |part, length| {
                    // SAFETY: the parts together are as long as the bounce buffer, and are the operation's.
                    unsafe {
                        std::ptr::copy_nonoverlapping(part, into, length);
                        into = into.add(length);
                    }
                });
            }
            self.pieces.clear();
            self.pieces.push(libc::iovec { iov_base: bounce.memory.cast(), iov_len: bounce.length });
            self.bounce = Some(bounce);
        } else if self.done == 0 && self.count <= MOST_VECTORS && left <= MOST_MOVED {
            // An `IoVec` is laid out as an `iovec`.
            return Transfer { fd, vectors: self.vectors.cast(), count: self.count, position };
        } else {
            let mut pieces = std::mem::take(&mut self.pieces);
            pieces.clear();
            self.each_part(left.min(MOST_MOVED), |part, length| {
                if pieces.len() < MOST_VECTORS {
                    pieces.push(libc::iovec { iov_base: part.cast(), iov_len: length });
                }
            });
            self.pieces = pieces;
        }
        Transfer { fd, vectors: self.pieces.as_ptr(), count: self.pieces.len(), position }
    }

    /// Takes the outcome of the call: bytes moved, or an error.
    pub(crate) fn advance(&mut self, medium: &Medium, outcome: io::Result<usize>) -> Next {
        match outcome {
            Ok(0) if self.kind == OperationKind::Read => {
                if self.position + self.done < medium.length() {
                    let what = io::Error::new(io::ErrorKind::UnexpectedEof, "the file has become shorter");
                    return Next::End(Err(medium.failed(self.kind, self.position, self.length, &what)));
                }
                // The end of a file whose length is no multiple of the block size.
                self.each_part(self.length - self.done, |part, length| {
                    // SAFETY: the part is the operation's.
                    unsafe { std::ptr::write_bytes(part, 0, length) };
                });
                Next::End(Ok(()))
            }
            Ok(0) => {
                let what = io::Error::from(io::ErrorKind::WriteZero);
                Next::End(Err(medium.failed(self.kind, self.position, self.length, &what)))
            }
            Ok(moved) => {
                if let Some(bounce) = self.bounce.take()
                    && self.kind == OperationKind::Read
                {
                    let mut from = bounce.memory.cast_const();
                    self.each_part(moved.min(bounce.length) as u64, |part, length| {
                        // SAFETY: the parts together are no longer than the bounce buffer, and are the operation's.
                        unsafe {
                            std::ptr::copy_nonoverlapping(from, part, length);
                            from = from.add(length);
                        }
                    });
                }
                self.done = (self.done + moved as u64).min(self.length);
                self.attempts = 0;
                if self.done == self.length { Next::End(Ok(())) } else { Next::Again }
            }
            // Work that the kernel did for a thread that has ended is cancelled, and done again by another.
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::ECANCELED))
                    && self.attempts < MOST_ATTEMPTS =>
            {
                self.attempts += 1;
                Next::Again
            }
            Err(error) => Next::End(Err(medium.failed(self.kind, self.position, self.length, &error))),
        }
    }

    /// Whether the rest can go to the medium without a bounce buffer.
    fn is_aligned(&self, alignment: Alignment) -> bool {
        let mut aligned = true;
        self.each_part(self.length - self.done, |part, length| {
            aligned &=
                part.addr().is_multiple_of(alignment.memory) && length.is_multiple_of(alignment.offset);
        });
        aligned
    }

    /// The parts of memory that hold the next `length` bytes to be moved.
    fn each_part(&self, mut length: u64, mut each: impl FnMut(*mut u8, usize)) {
        let mut skip = self.done;
        for index in 0..self.count {
            // SAFETY: the operation has not ended, so that the array is good.
            let vector = unsafe { self.vectors.add(index).read() };
            let whole = vector.length as u64;
            if skip >= whole {
                skip -= whole;
                continue;
            }
            let part = (whole - skip).min(length);
            if part == 0 {
                return;
            }
            // Both are at most a vector's length.
            let (start, count) = (usize::try_from(skip).unwrap_or(0), usize::try_from(part).unwrap_or(0));
            // SAFETY: inside the vector.
            each(unsafe { vector.base.add(start) }, count);
            skip = 0;
            length -= part;
        }
    }
}

/// Memory of our own, aligned as the medium wants it.
struct Bounce {
    memory: *mut u8,
    length: usize,
    layout: Layout,
}

impl Bounce {
    fn new(length: u64, alignment: Alignment) -> Self {
        let length = usize::try_from(length).unwrap_or(alignment.offset);
        let layout = Layout::from_size_align(length, alignment.memory)
            .unwrap_or_else(|_| panic!("{} is no alignment", alignment.memory));
        // SAFETY: the length is that of a part of an operation with bytes left, so not 0.
        let memory = unsafe { alloc_zeroed(layout) };
        if memory.is_null() {
            handle_alloc_error(layout);
        }
        Self { memory, length, layout }
    }
}

impl Drop for Bounce {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.memory, self.layout) };
    }
}
