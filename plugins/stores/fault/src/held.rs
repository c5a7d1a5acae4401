//! The volatile cache: blocks that were reported as written, and are not. Where a disk loses power, they are what it loses.

use std::collections::{BTreeMap, BTreeSet};

use tenon_sdk::store::{Decoder, Encoder, Error, MOST, Operation, Result};

use crate::rules::Numbers;

/// The most bytes that are held.
pub const LIMIT: u64 = 64 << 20;

/// Blocks by their number.
pub struct Held {
    block: u64,
    blocks: BTreeMap<u64, Vec<u8>>,
    /// Blocks that a failed flush should have made durable, and that were not written since.
    lost: BTreeSet<u64>,
}

impl Held {
    /// Nothing is held, of a store with blocks of this size.
    #[must_use]
    pub fn new(block_size: u32) -> Self {
        Self { block: block_size.into(), blocks: BTreeMap::new(), lost: BTreeSet::new() }
    }

    /// Whether a flush must fail since something was lost before it.
    #[must_use]
    pub fn has_lost(&self) -> bool {
        !self.lost.is_empty()
    }

    /// Whether no more than the limit is held with this data.
    #[must_use]
    pub fn has_room(&self, length: u64) -> bool {
        self.blocks.len() as u64 * self.block + length <= LIMIT
    }

    /// Holds the data of a write.
    pub fn hold(&mut self, position: u64, data: &[u8]) {
        let blocks = usize::try_from(self.block).unwrap_or(usize::MAX);
        for (number, block) in (position / self.block..).zip(data.chunks_exact(blocks)) {
            self.lost.remove(&number);
            self.blocks.insert(number, block.to_vec());
        }
    }

    /// What is held of a range goes, and nothing of it counts as lost: it was written otherwise.
    pub fn supersede(&mut self, position: u64, length: u64) {
        let range = self.range(position, length);
        let gone: Vec<u64> = self.blocks.range(range.clone()).map(|(number, _)| *number).collect();
        gone.iter().for_each(|number| drop(self.blocks.remove(number)));
        self.lost.retain(|number| !range.contains(number));
    }

    /// What is held of a range: how far into the range each block begins, and the block.
    #[must_use]
    pub fn parts(&self, position: u64, length: u64) -> Vec<(usize, Vec<u8>)> {
        self.blocks
            .range(self.range(position, length))
            .filter_map(|(number, data)| {
                Some((usize::try_from(number * self.block - position).ok()?, data.clone()))
            })
            .collect()
    }

    /// Takes all that is held, as writes. What of it fails is to be given to [`Held::lose`].
    pub fn take(&mut self) -> Vec<Operation> {
        let mut writes: Vec<Operation> = Vec::new();
        for (number, block) in std::mem::take(&mut self.blocks) {
            let at = number * self.block;
            match writes.last_mut() {
                Some(Operation::Write { position, data })
                    if *position + data.len() as u64 == at && (data.len() + block.len()) as u64 <= MOST =>
                {
                    data.extend(block);
                }
                _ => writes.push(Operation::Write { position: at, data: block }),
            }
        }
        writes
    }

    /// A range that should be durable is not.
    pub fn lose(&mut self, position: u64, length: u64) {
        self.lost.extend(self.range(position, length));
    }

    /// Leaves of what is held the blocks that `numbers` choose: every other one or so.
    pub fn thin_out(&mut self, numbers: &mut Numbers) {
        self.blocks.retain(|_, _| numbers.below(2) == 0);
    }

    /// What lies behind this end is gone.
    pub fn truncate(&mut self, size: u64) {
        let end = size.div_ceil(self.block);
        drop(self.blocks.split_off(&end));
        drop(self.lost.split_off(&end));
    }

    fn range(&self, position: u64, length: u64) -> std::ops::Range<u64> {
        position / self.block..position.saturating_add(length).div_ceil(self.block)
    }

    /// Writes what is held.
    pub fn save(&self, state: &mut Encoder) {
        state.u64(self.block).u64(self.blocks.len() as u64).u64(self.lost.len() as u64);
        for (number, data) in &self.blocks {
            state.u64(*number).bytes(data);
        }
        for number in &self.lost {
            state.u64(*number);
        }
    }

    /// Reads what was held.
    ///
    /// # Errors
    /// The state is damaged, or of a store with other blocks.
    pub fn restore(&mut self, state: &mut Decoder<'_>) -> Result<()> {
        let (block, held, lost) = (state.u64()?, state.u64()?, state.u64()?);
        if block != self.block {
            return Err(Error::Other(format!("it is of blocks of {block} bytes, not {}", self.block)));
        }
        let size = usize::try_from(block).unwrap_or(usize::MAX);
        for _ in 0..held {
            let (number, data) = (state.u64()?, state.bytes(size)?);
            if data.len() != size || number > u64::MAX / block {
                return Err(Error::Other(format!("a block of {} bytes is held as {number}", data.len())));
            }
            self.blocks.insert(number, data.to_vec());
        }
        for _ in 0..lost {
            self.lost.insert(state.u64()?);
        }
        Ok(())
    }
}
