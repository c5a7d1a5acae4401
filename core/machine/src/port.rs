//! Network ports: where the frames of a guest's network device go, and come from.

use crate::Buffers;

/// The length of the header that every frame begins with, in both directions: `virtio_net_hdr_v1` (virtio 1.2 §5.1.6).
pub const FRAME_HEADER: usize = 12;

/// What one side leaves to the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Checksums are left to be filled in.
    pub checksum: bool,
    /// TCP over IPv4 comes in segments of up to 64 KiB.
    pub tso4: bool,
    /// TCP over IPv6 comes in segments of up to 64 KiB.
    pub tso6: bool,
}

/// What a port is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortInfo {
    /// The MAC address of the guest's side.
    pub mac: [u8; 6],
    /// The largest frame payload in bytes: 68 to 65535.
    pub mtu: u16,
    /// Whether the link is up.
    pub link_up: bool,
    /// What the outside can be given.
    pub send: Offloads,
    /// What the outside can give.
    pub receive: Offloads,
}

/// What a port has done since it was opened, in frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortCounters {
    /// Taken from the guest.
    pub sent: u64,
    /// Given to the guest.
    pub received: u64,
    /// From the guest and dropped: no room, a wrong header, or nowhere to go.
    pub send_dropped: u64,
    /// For the guest and dropped: no room, or of a kind that the driver does not accept.
    pub receive_dropped: u64,
}

/// Where a guest's frames go. Called from any thread; nothing here blocks.
pub trait NetworkPort: Send + Sync {
    /// What it is now.
    fn info(&self) -> PortInfo;

    /// What the driver accepts of received frames. Frames with other offloads are turned into ones without (segmented, checksums filled in), or dropped and counted.
    fn accept(&self, offloads: Offloads);

    /// Takes a frame with its header. False if it was dropped: the outside has no room, or the header is wrong.
    fn send(&self, frame: &Buffers) -> bool;

    /// The lengths of the first frames that wait, with their headers; at most `most`, added to `into`.
    fn waiting(&self, most: usize, into: &mut Vec<u32>);

    /// Takes the first frame that waits.
    fn receive(&self) -> Option<Vec<u8>>;

    /// Sets what is called when a frame comes after [`NetworkPort::waiting`] gave fewer than it was asked for, and when the port's description changes. It must not block and not call back.
    fn watch(&self, news: Box<dyn Fn(PortNews) + Send + Sync>);

    /// What it has done. All zero for a port that does not count.
    fn counters(&self) -> PortCounters {
        PortCounters::default()
    }
}

/// What happened to a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortNews {
    /// Frames wait.
    Frames,
    /// [`NetworkPort::info`] has changed.
    Changed,
}
