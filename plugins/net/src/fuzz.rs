//! The door for fuzzers: everything that looks at a frame of the guest, without a thread and without the outside.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use tenon_core::Offloads;

use crate::frame::{Header, fit};
use crate::poll::Bell;
use crate::queue::{Inbox, Outbox};
use crate::user::{Shared, Stack, UserConfig};

/// Gives one frame of a guest, with its header, to all that takes frames apart: the software side of the offloads, for every kind of receiver, and the user network
/// with one connection (10.0.2.2 port 49152 to 10.0.2.15 port 22).
///
/// # Panics
/// Never; that is what is tried. What the offloads make of a frame must be frames that need none.
pub fn fuzz_frame(frame: &[u8]) {
    for bits in 0..8 {
        let offloads = Offloads { checksum: bits & 1 != 0, tso4: bits & 2 != 0, tso6: bits & 4 != 0 };
        let _ = fit(frame.to_vec(), offloads, |made| {
            let header = Header::parse(&made);
            assert!(header.is_ok_and(|header| bits != 0 || header == Header::default()));
        });
    }
    if Header::parse(frame).is_ok() {
        // Without sockets there is nothing to try.
        let _ = through_a_stack(frame);
    }
}

fn through_a_stack(frame: &[u8]) -> std::io::Result<()> {
    // What is not a TCP socket will do: it is read and written like one.
    let (near, far) = UnixStream::pair()?;
    near.set_nonblocking(true)?;
    let (inbox, counts) = (Arc::new(Inbox::default()), Arc::default());
    let shared = Arc::new(Shared { outbox: Outbox::default(), inbox, counts, bell: Bell::new()? });
    let config = UserConfig { mac: [2; 6], mtu: 1500, forwards: Vec::new(), restrict: true, dns: None };
    Stack::new(shared, &config, Vec::new(), Vec::new())?
        .try_frame(std::os::fd::OwnedFd::from(near).into(), frame.to_vec());
    drop(far);
    Ok(())
}
