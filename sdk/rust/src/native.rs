//! What the two kinds of native plugin share: panics stop at the boundary, and errors go to the sink.
#![allow(unsafe_code, reason = "calls the host's side of the native tables")]

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use tenon_abi::{Sink, Status};

/// Calls plugin code. A panic becomes [`Status::TRAPPED`], with its text given to `panicked`.
pub(crate) fn guard(panicked: impl FnOnce(&str), call: impl FnOnce() -> Status) -> Status {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(status) => status,
        Err(payload) => {
            panicked(text(&*payload));
            // A payload of the plugin's own type may panic when it is dropped.
            std::mem::forget(payload);
            Status::TRAPPED
        }
    }
}

fn text(payload: &(dyn Any + Send)) -> &str {
    if let Some(text) = payload.downcast_ref::<&str>() {
        text
    } else if let Some(text) = payload.downcast_ref::<String>() {
        text
    } else {
        "(no text)"
    }
}

/// Puts an output, or a refusal.
///
/// # Safety
/// The sink came in the call that is still running.
pub(crate) unsafe fn answer(sink: Sink, result: Result<Vec<u8>, Vec<u8>>) -> Status {
    let (status, bytes) = match result {
        Ok(bytes) => (Status::OK, bytes),
        Err(bytes) => (Status::REFUSED, bytes),
    };
    // SAFETY: promised by the caller.
    unsafe { sink.put(&bytes) };
    status
}

/// The length of an array that goes over the boundary; none is longer than a `u32` can say.
pub(crate) fn count<T>(items: &[T]) -> u32 {
    u32::try_from(items.len()).expect("an array that goes over the native boundary has fewer than 2^32 items")
}

/// An array of the other side.
///
/// # Safety
/// The other side keeps to the convention: `count` items at `items` are good, and not written, while the call that brought them is running.
pub(crate) unsafe fn slice<'a, T>(items: *const T, count: u32) -> &'a [T] {
    if items.is_null() || count == 0 {
        return &[];
    }
    // SAFETY: promised by the caller.
    unsafe { std::slice::from_raw_parts(items, count as usize) }
}
