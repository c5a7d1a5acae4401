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
