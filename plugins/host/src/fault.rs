//! How a call into an instance ends badly.

use std::fmt;
use std::time::Duration;

/// A call that did not return: the instance is good for nothing after it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It took longer than the instance's deadline.
    Deadline(Duration),
    /// It called the host more often than one call may.
    HostCalls(u32),
    /// It went over a limit of memory or handles, as the text says.
    Limit(String),
    /// It trapped or panicked; the text says how.
    Trap(String),
    /// It answered what the contract does not allow; the text says what.
    Contract(String),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Deadline(deadline) => {
                write!(f, "it did not return within its deadline of {} ms", deadline.as_millis())
            }
            Self::HostCalls(most) => write!(f, "it called the host more than {most} times in one call"),
            Self::Limit(what) => write!(f, "it went over a limit: {what}"),
            Self::Trap(how) => write!(f, "it trapped: {how}"),
            Self::Contract(what) => write!(f, "it broke the contract: {what}"),
        }
    }
}

impl std::error::Error for Fault {}

/// Raised by a host function when the budget of host calls is used up.
#[derive(Debug)]
pub(crate) struct TooManyHostCalls;

impl fmt::Display for TooManyHostCalls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("too many host calls in one call")
    }
}

impl std::error::Error for TooManyHostCalls {}

/// Raised by a host function that was used as the contract forbids.
#[derive(Debug)]
pub(crate) struct Misuse(pub(crate) String);

impl fmt::Display for Misuse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Misuse {}

/// Raised by the limiter when memory or a table grows past its limit.
#[derive(Debug)]
pub(crate) struct OverLimit(pub(crate) String);

impl fmt::Display for OverLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for OverLimit {}
