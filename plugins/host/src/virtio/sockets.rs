//! The import `sockets`: what a device does with the streams of its sockets.
//!
//! Nothing is kept of it for a new instance: that has no streams.

use std::sync::Arc;

use tenon_abi::{Sent, StreamState};

use super::services::VirtioServices;
use crate::fault::Misuse;
use crate::sockets::UnixSocket;

/// The most streams of which one `socket.news` tells.
const MAX_NEWS: u32 = 1024;

impl VirtioServices {
    pub(super) fn socket(&self, socket: u32) -> Result<Arc<UnixSocket>, Misuse> {
        let index = usize::try_from(socket).unwrap_or(usize::MAX);
        let named = || Misuse(format!("it named socket {socket}, which it was not given"));
        self.sockets.get(index).cloned().ok_or_else(named)
    }

    pub(super) fn socket_news(&mut self, socket: u32, max: u32) -> Result<Vec<StreamState>, Misuse> {
        Ok(self.socket(socket)?.news(max.min(MAX_NEWS)))
    }

    pub(super) fn socket_send(
        &mut self,
        socket: u32,
        handle: u32,
        offset: u32,
        length: u32,
        number: u32,
    ) -> Result<Sent, Misuse> {
        let socket = self.socket(socket)?;
        socket.send(number, &self.table.get(handle)?.readable, offset, length)
    }

    pub(super) fn socket_receive(
        &mut self,
        socket: u32,
        handle: u32,
        offset: u32,
        length: u32,
        number: u32,
    ) -> Result<u32, Misuse> {
        let socket = self.socket(socket)?;
        socket.receive(number, &self.table.get(handle)?.writable, offset, length)
    }

    /// A new instance has no streams. Whether the old one had any.
    pub(super) fn clear_sockets(&self) -> bool {
        self.sockets.iter().filter(|socket| socket.clear()).count() > 0
    }
}
