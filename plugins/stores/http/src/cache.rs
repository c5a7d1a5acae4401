//! Pieces of the image that were fetched. Those that nobody has asked for the longest go first.

use std::collections::BTreeMap;
use std::sync::Arc;

/// How long a piece is, but for the image's last.
pub(crate) const PIECE: u64 = 64 << 10;

/// Pieces by their number.
pub(crate) struct Cache {
    most: usize,
    pieces: BTreeMap<u64, (u64, Arc<[u8]>)>,
    /// The pieces in the order of their last use.
    order: BTreeMap<u64, u64>,
    clock: u64,
}

impl Cache {
    pub(crate) fn new(bytes: u64) -> Self {
        let most = usize::try_from(bytes / PIECE).unwrap_or(0);
        Self { most, pieces: BTreeMap::new(), order: BTreeMap::new(), clock: 0 }
    }

    pub(crate) fn has(&self, number: u64) -> bool {
        self.pieces.contains_key(&number)
    }

    pub(crate) fn get(&mut self, number: u64) -> Option<Arc<[u8]>> {
        let (used, piece) = self.pieces.get_mut(&number)?;
        self.clock += 1;
        self.order.remove(used);
        *used = self.clock;
        self.order.insert(self.clock, number);
        Some(piece.clone())
    }

    pub(crate) fn put(&mut self, number: u64, piece: Arc<[u8]>) {
        if self.most == 0 {
            return;
        }
        self.clock += 1;
        if let Some((used, _)) = self.pieces.insert(number, (self.clock, piece)) {
            self.order.remove(&used);
        }
        self.order.insert(self.clock, number);
        while self.pieces.len() > self.most {
            if let Some((_, oldest)) = self.order.pop_first() {
                self.pieces.remove(&oldest);
            }
        }
    }
}
