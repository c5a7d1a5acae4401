//! Where changes are kept: in memory, or in a second store. Both are addressed by the byte, and have clusters of 64 KiB.

use std::collections::BTreeMap;

use tenon_sdk::store::{Lower, Operation, StoreError};

use crate::header::CLUSTER;
use crate::map::GRAIN;

/// How much a store grows at once.
const STEP: u64 = 64 << 20;

/// Where changes are kept.
pub(crate) enum Top {
    /// In memory.
    Memory(Memory),
    /// In a store.
    Store(Lower),
}

/// Grains by their number.
pub(crate) struct Memory {
    /// What was written.
    pub(crate) grains: BTreeMap<u64, Vec<u8>>,
    /// How many there may be.
    pub(crate) limit: u64,
}

impl Top {
    /// Carries out operations; their order is not kept.
    pub(crate) fn submit(&mut self, operations: &[Operation]) -> Vec<Result<Vec<u8>, StoreError>> {
        match self {
            Self::Store(lower) => lower.submit(operations),
            Self::Memory(memory) => operations.iter().map(|operation| memory.carry_out(operation)).collect(),
        }
    }

    /// Sees to it that there is room for all clusters before this one.
    ///
    /// # Errors
    /// The store cannot grow.
    pub(crate) fn reach(&self, end: u64) -> Result<(), StoreError> {
        let Self::Store(lower) = self else { return Ok(()) };
        let (size, needed) = (lower.info().size, end.checked_mul(CLUSTER).ok_or(StoreError::NoSpace)?);
        if needed <= size {
            return Ok(());
        }
        let roomy = needed.next_multiple_of(STEP);
        lower.resize(roomy).or_else(|_| lower.resize(needed)).map_err(|_| StoreError::NoSpace)
    }
}

impl Memory {
    fn carry_out(&mut self, operation: &Operation) -> Result<Vec<u8>, StoreError> {
        match operation {
            Operation::Read { position, length } => {
                let mut data = Vec::new();
                for (grain, from, to) in parts(*position, *length) {
                    match self.grains.get(&grain).and_then(|bytes| bytes.get(from..to)) {
                        Some(bytes) => data.extend(bytes),
                        None => data.resize(data.len() + to - from, 0),
                    }
                }
                return Ok(data);
            }
            Operation::Write { position, data } => self.write(*position, data.len() as u64, Some(data))?,
            Operation::WriteZeroes { position, length, .. } => self.write(*position, *length, None)?,
            Operation::Flush | Operation::Discard { .. } => {}
        }
        Ok(Vec::new())
    }

    fn write(&mut self, position: u64, length: u64, mut data: Option<&[u8]>) -> Result<(), StoreError> {
        let size = usize::try_from(GRAIN).map_err(|_| StoreError::Io)?;
        for (grain, from, to) in parts(position, length) {
            let room = (self.grains.len() as u64) < self.limit;
            if !room && !self.grains.contains_key(&grain) {
                return Err(StoreError::NoSpace);
            }
            let into = &mut self.grains.entry(grain).or_insert_with(|| vec![0; size])[from..to];
            match data.as_mut().and_then(|data| data.split_off(..to - from)) {
                Some(bytes) => into.copy_from_slice(bytes),
                None => into.fill(0),
            }
        }
        Ok(())
    }

    /// Gives the memory of a cluster back.
    pub(crate) fn release(&mut self, cluster: u64) {
        let first = cluster * (CLUSTER / GRAIN);
        (first..first + CLUSTER / GRAIN).for_each(|grain| drop(self.grains.remove(&grain)));
    }
}

/// The grains of a range, with the part of each.
fn parts(position: u64, length: u64) -> impl Iterator<Item = (u64, usize, usize)> {
    let end = position.saturating_add(length);
    (position / GRAIN..end.div_ceil(GRAIN)).filter_map(move |grain| {
        let from = usize::try_from(position.saturating_sub(grain * GRAIN)).ok()?;
        let to = usize::try_from((end - grain * GRAIN).min(GRAIN)).ok()?;
        Some((grain, from, to))
    })
}
