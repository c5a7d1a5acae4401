//! The far ends of a virtio device's ports and channels, in the hands of the test.

use tenon_sdk::virtio::{Offloads, PortInfo, VirtioDevice};

use super::bench::{VirtioBench, number};
use super::outside::{HEADER, PortState};
use crate::outside::Stream;

/// The far end of a network port.
pub struct PortEnd<'a, D> {
    bench: &'a mut VirtioBench<D>,
    index: usize,
}

impl<'a, D: VirtioDevice> PortEnd<'a, D> {
    pub(super) fn new(bench: &'a mut VirtioBench<D>, index: usize) -> Self {
        Self { bench, index }
    }

    /// A frame comes from the outside, behind a header that says nothing.
    pub fn push(&mut self, frame: &[u8]) {
        self.push_with_header(&[&[0; HEADER], frame].concat());
    }

    /// A frame comes from the outside, with its header.
    ///
    /// # Panics
    /// There is not even a header.
    pub fn push_with_header(&mut self, frame: &[u8]) {
        assert!(frame.len() >= HEADER, "a frame begins with a header of {HEADER} bytes");
        self.state().waiting.push_back(frame.to_vec());
        self.bench.rest();
    }

    /// Takes the frames sent since the last call, each with its header.
    #[must_use]
    pub fn take_sent(&mut self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.state().sent)
    }

    /// How many frames wait for the device.
    #[must_use]
    pub fn pending(&mut self) -> usize {
        self.state().waiting.len()
    }

    /// How many frames were dropped: sent ones that were none, or while the link was down, and received ones for which the device had no room.
    #[must_use]
    pub fn dropped(&mut self) -> u64 {
        self.state().dropped
    }

    /// What the device says that the driver accepts of received frames.
    #[must_use]
    pub fn accepted(&mut self) -> Offloads {
        self.state().accepted
    }

    /// The port becomes another, and the device hears of it.
    pub fn change(&mut self, change: impl FnOnce(&mut PortInfo)) {
        change(&mut self.state().info);
        let port = number(self.index);
        self.bench.call(|device| device.port_changed(port));
        self.bench.rest();
    }

    fn state(&mut self) -> &mut PortState {
        &mut self.bench.outside.ports.get_mut()[self.index]
    }
}

/// The far end of a virtio device's channel.
pub struct VirtioChannelEnd<'a, D> {
    bench: &'a mut VirtioBench<D>,
    index: usize,
}

impl<'a, D: VirtioDevice> VirtioChannelEnd<'a, D> {
    pub(super) fn new(bench: &'a mut VirtioBench<D>, index: usize) -> Self {
        Self { bench, index }
    }

    /// Sends bytes to the device. It is told of them if it read all before.
    pub fn push(&mut self, bytes: &[u8]) {
        self.stream().input.extend(bytes);
        self.bench.rest();
    }

    /// Takes what the device has written since the last call. That makes room for more, and the device is told so if it waits for it.
    #[must_use]
    pub fn take_output(&mut self) -> Vec<u8> {
        let output = std::mem::take(&mut self.stream().output);
        self.bench.rest();
        output
    }

    /// How many bytes wait for the device.
    #[must_use]
    pub fn pending(&mut self) -> usize {
        self.stream().input.len()
    }

    /// How many bytes of output are taken before there is no more room; at first 64 KiB.
    pub fn set_capacity(&mut self, bytes: usize) {
        self.stream().capacity = bytes;
        self.bench.rest();
    }

    fn stream(&mut self) -> &mut Stream {
        &mut self.bench.outside.base.channels.get_mut()[self.index]
    }
}
