//! Devices that are fed by queues of requests in guest memory, and what a transport (such as virtio over PCI) does for them.
//!
//! The transport owns the rings: it takes requests out of them, checks every address, and puts answers back. The device sees requests.
//! Neither knows the other but through these traits.

use std::sync::Arc;

use crate::{Buffers, Lifecycle};

/// What a device is to its transport.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueProfile {
    /// The virtio device type (virtio 1.2 §5).
    pub device_type: u16,
    /// The device-specific feature bits that it offers.
    pub features: u64,
    /// The most entries of each queue: a power of two, 1 to 32768.
    pub queues: Vec<u16>,
    /// The length of the configuration space in bytes, at most 4096.
    pub config_size: u16,
}

/// A request that the driver made available.
pub struct GuestRequest {
    /// Names it towards its queue.
    pub token: u32,
    /// What the driver says.
    pub readable: Buffers,
    /// Where the answer goes.
    pub writable: Buffers,
}

/// The driver broke the rules of the rings. The transport has told it so (DEVICE_NEEDS_RESET); the queue gives nothing more until then.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("queue {queue}: {what}")]
pub struct BrokenQueue {
    /// The queue's number.
    pub queue: u16,
    /// What was wrong.
    pub what: String,
}

/// The device's end of one queue. One thread uses it at a time.
pub trait RequestQueue: Send {
    /// Takes at most `most` requests, in the order in which the driver made them available, and adds them to `into`.
    ///
    /// # Errors
    /// The driver broke the rules. Requests that were taken before are good.
    fn take(&mut self, most: usize, into: &mut Vec<GuestRequest>) -> Result<(), BrokenQueue>;

    /// Gives a request back, with the first `written` bytes of its writable part as the answer. Every token that was taken comes back at most once. The driver sees it after [`RequestQueue::publish`].
    fn complete(&mut self, token: u32, written: u32);

    /// Makes completions visible to the driver, and interrupts it if it wants that. Does nothing when there are none.
    fn publish(&mut self);

    /// Asks for [`QueueDevice::notify`] when there are more requests. Returns false, and asks for nothing, if there are some already.
    fn arm(&mut self) -> bool;
}

/// What a device asks of its transport, from any thread.
pub trait QueueTransport: Send + Sync {
    /// The configuration space has changed: the driver is told.
    fn config_changed(&self);

    /// The device is beyond repair until the driver resets it (DEVICE_NEEDS_RESET).
    fn needs_reset(&self);
}

/// A device that is fed by queues.
pub trait QueueDevice: Lifecycle {
    /// What it is. Always the same.
    fn profile(&self) -> &QueueProfile;

    /// The driver reads the configuration space, on the vCPU's thread. `size` is 1, 2, 4 or 8; the range was checked.
    fn read_config(&self, offset: u32, size: u8) -> u64;

    /// The driver writes the configuration space, on the vCPU's thread.
    fn write_config(&self, offset: u32, size: u8, value: u64);

    /// The driver has set DRIVER_OK with these features. `queues` has one entry for each of the profile's, `None` where the driver does not use it. Work begins; the device looks at every
    /// queue without being notified first. Called on the vCPU's thread; must not block.
    fn start(
        &self,
        features: u64,
        queues: Vec<Option<Box<dyn RequestQueue>>>,
        transport: Arc<dyn QueueTransport>,
    );

    /// The driver resets the device, or it goes away: when this returns, no request touches guest memory any more and the queues are dropped. Requests that were not
    /// answered are forgotten. Called on the vCPU's thread, at any time, also when the device was not started.
    fn stop(&self);

    /// The driver made requests available in this queue. Called on the vCPU's thread or by an I/O thread; only wakes the device's own thread. Numbers that the driver made up are passed over.
    fn notify(&self, queue: u16);
}
