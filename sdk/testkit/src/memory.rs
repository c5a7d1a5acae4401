//! A store in memory, under the test's control: faults by rule, operations held back, and the loss of power.
//!
//! Writes go to a volatile part first and become durable with a flush, so that a test can ask what would be left ([`MemoryStore::lose_power`]).

use std::collections::BTreeMap;

use tenon_sdk::store::{MOST, Operation, StoreError, StoreInfo};

use crate::random::Random;

/// The unit in which content is kept: the smallest block of any store.
const BLOCK: u64 = 512;
/// The same, as the length of a vector.
const LENGTH: usize = 512;
/// What discarded bytes read as: neither what was there nor zeroes, for a store promises neither.
const DISCARDED: u8 = 0xdd;

/// Which operations a fault is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum On {
    /// All.
    Any,
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Flushes.
    Flush,
    /// Discards.
    Discard,
    /// Writes of zeroes.
    WriteZeroes,
}

impl On {
    fn takes(self, operation: &Operation) -> bool {
        matches!(
            (self, operation),
            (Self::Any, _)
                | (Self::Read, Operation::Read { .. })
                | (Self::Write, Operation::Write { .. })
                | (Self::Flush, Operation::Flush)
                | (Self::Discard, Operation::Discard { .. })
                | (Self::WriteZeroes, Operation::WriteZeroes { .. })
        )
    }
}

#[derive(Clone, Debug)]
struct Fault {
    on: On,
    /// How many operations pass before it strikes.
    after: u64,
    /// How often it strikes.
    times: u64,
    error: StoreError,
}

/// How many operations a store has carried out, or failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Discards.
    pub discards: u64,
    /// Writes of zeroes.
    pub zeroes: u64,
    /// Operations that a fault has struck.
    pub faults: u64,
}

/// A store in memory. Its content is zeroes at first; only what was written takes room.
#[derive(Clone, Debug)]
pub struct MemoryStore {
    info: StoreInfo,
    /// Blocks by their number. None that is all zeroes is missed.
    durable: BTreeMap<u64, Vec<u8>>,
    /// What was written since the last flush.
    volatile: BTreeMap<u64, Vec<u8>>,
    faults: Vec<Fault>,
    counts: Counts,
}

impl MemoryStore {
    /// A store of `size` bytes in blocks of 512 that can do everything.
    #[must_use]
    pub fn new(size: u64) -> Self {
        Self::with(StoreInfo {
            discard: true,
            write_zeroes: true,
            identity: "memory".into(),
            ..StoreInfo::new(size)
        })
    }

    /// A store that is what `info` says.
    ///
    /// # Panics
    /// No store can be that.
    #[must_use]
    pub fn with(info: StoreInfo) -> Self {
        if let Err(text) = info.check() {
            panic!("a test makes a store that cannot be: {text}");
        }
        let (durable, volatile) = (BTreeMap::new(), BTreeMap::new());
        Self { info, durable, volatile, faults: Vec::new(), counts: Counts::default() }
    }

    /// What the store is.
    #[must_use]
    pub fn info(&self) -> &StoreInfo {
        &self.info
    }

    /// How many operations came.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// The next operation of this kind fails.
    pub fn fail_next(&mut self, on: On, error: StoreError) {
        self.fail_after(on, 0, 1, error);
    }

    /// Lets `after` operations of this kind pass, then fails `times` of them.
    pub fn fail_after(&mut self, on: On, after: u64, times: u64, error: StoreError) {
        self.faults.push(Fault { on, after, times, error });
    }

    /// Fails all operations of this kind until [`MemoryStore::clear_faults`].
    pub fn fail_always(&mut self, on: On, error: StoreError) {
        self.fail_after(on, 0, u64::MAX, error);
    }

    /// Takes back every fault.
    pub fn clear_faults(&mut self) {
        self.faults.clear();
    }

    /// The content of a range, as a read would give it. Beyond the end it is zeroes.
    #[must_use]
    pub fn content(&self, position: u64, length: usize) -> Vec<u8> {
        self.collect(position, length, |block| self.volatile.get(&block).or_else(|| self.durable.get(&block)))
    }

    /// The durable content of a range: what a flush covered.
    #[must_use]
    pub fn durable(&self, position: u64, length: usize) -> Vec<u8> {
        self.collect(position, length, |block| self.durable.get(&block))
    }

    /// Puts durable content there, without an operation.
    pub fn fill(&mut self, position: u64, bytes: &[u8]) {
        self.write(position, bytes);
        self.settle();
    }

    /// Power is lost: of what was written since the last flush, each block is kept or lost, as numbers from `seed` decide.
    pub fn lose_power(&mut self, seed: u64) {
        let mut random = Random::new(seed);
        for (block, data) in std::mem::take(&mut self.volatile) {
            if random.below(2) == 0 {
                self.durable.insert(block, data);
            }
        }
    }

    /// Changes the length, as an administrator does. What lies behind a smaller end is gone.
    ///
    /// # Panics
    /// The size is no multiple of the block size.
    pub fn resize(&mut self, size: u64) {
        assert!(size.is_multiple_of(self.info.block_size.into()), "{size} bytes are no whole blocks");
        self.info.size = size;
        self.durable.split_off(&size.div_ceil(BLOCK));
        self.volatile.split_off(&size.div_ceil(BLOCK));
    }

    /// Carries out an operation, unless a fault strikes it.
    ///
    /// # Errors
    /// A fault, or an operation that this store cannot do.
    pub fn submit(&mut self, operation: &Operation) -> Result<Vec<u8>, StoreError> {
        let count = match operation {
            Operation::Read { .. } => &mut self.counts.reads,
            Operation::Write { .. } => &mut self.counts.writes,
            Operation::Flush => &mut self.counts.flushes,
            Operation::Discard { .. } => &mut self.counts.discards,
            Operation::WriteZeroes { .. } => &mut self.counts.zeroes,
        };
        *count += 1;
        self.strike(operation)?;
        match operation {
            Operation::Read { position, length } => {
                self.check(*position, *length, MOST)?;
                Ok(self.content(*position, usize::try_from(*length).unwrap_or(0)))
            }
            Operation::Write { position, data } => {
                self.check_write(*position, data.len() as u64, MOST)?;
                self.write(*position, data);
                Ok(Vec::new())
            }
            Operation::Flush => {
                self.settle();
                Ok(Vec::new())
            }
            Operation::Discard { position, length } => {
                self.check_write(*position, *length, u64::MAX)?;
                if !self.info.discard {
                    return Err(StoreError::Unsupported);
                }
                self.cover(*position, *length, DISCARDED);
                Ok(Vec::new())
            }
            Operation::WriteZeroes { position, length, .. } => {
                self.check_write(*position, *length, u64::MAX)?;
                self.cover(*position, *length, 0);
                Ok(Vec::new())
            }
        }
    }

    fn strike(&mut self, operation: &Operation) -> Result<(), StoreError> {
        for fault in self.faults.iter_mut().filter(|fault| fault.on.takes(operation)) {
            if fault.after > 0 {
                fault.after -= 1;
            } else if fault.times > 0 {
                fault.times -= 1;
                self.counts.faults += 1;
                return Err(fault.error);
            }
        }
        Ok(())
    }

    fn check(&self, position: u64, length: u64, most: u64) -> Result<(), StoreError> {
        let block = u64::from(self.info.block_size);
        let inside = position.checked_add(length).is_some_and(|end| end <= self.info.size);
        if inside && length <= most && position.is_multiple_of(block) && length.is_multiple_of(block) {
            Ok(())
        } else {
            Err(StoreError::OutOfRange)
        }
    }

    fn check_write(&self, position: u64, length: u64, most: u64) -> Result<(), StoreError> {
        if self.info.read_only {
            return Err(StoreError::ReadOnly);
        }
        self.check(position, length, most)
    }

    fn collect<'a>(
        &self,
        position: u64,
        length: usize,
        find: impl Fn(u64) -> Option<&'a Vec<u8>>,
    ) -> Vec<u8> {
        let mut bytes = vec![0; length];
        let mut done = 0;
        while done < length {
            let at = position.saturating_add(done as u64);
            let offset = usize::try_from(at % BLOCK).unwrap_or(0);
            let piece = (length - done).min(LENGTH - offset);
            if let Some(block) = find(at / BLOCK) {
                bytes[done..done + piece].copy_from_slice(&block[offset..offset + piece]);
            }
            done += piece;
        }
        bytes
    }

    fn write(&mut self, position: u64, bytes: &[u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let at = position.saturating_add(done as u64);
            let offset = usize::try_from(at % BLOCK).unwrap_or(0);
            let piece = (bytes.len() - done).min(LENGTH - offset);
            let before = self.durable.get(&(at / BLOCK));
            let block = self
                .volatile
                .entry(at / BLOCK)
                .or_insert_with(|| before.cloned().unwrap_or_else(|| vec![0; LENGTH]));
            block[offset..offset + piece].copy_from_slice(&bytes[done..done + piece]);
            done += piece;
        }
    }

    /// Fills a range of whole blocks. Zeroes over what was never written take no room.
    fn cover(&mut self, position: u64, length: u64, byte: u8) {
        let (first, end) = (position / BLOCK, (position + length) / BLOCK);
        if byte == 0 {
            let known: Vec<u64> = self
                .durable
                .range(first..end)
                .chain(self.volatile.range(first..end))
                .map(|(block, _)| *block)
                .collect();
            for block in known {
                self.volatile.insert(block, vec![0; LENGTH]);
            }
        } else {
            // A range far larger than what was written would fill memory; its first blocks tell as much.
            for block in first..end.min(first + 4096) {
                self.volatile.insert(block, vec![byte; LENGTH]);
            }
        }
    }

    fn settle(&mut self) {
        let zeroes = |block: &[u8]| block.iter().all(|byte| *byte == 0);
        for (block, data) in std::mem::take(&mut self.volatile) {
            if zeroes(&data) {
                self.durable.remove(&block);
            } else {
                self.durable.insert(block, data);
            }
        }
    }
}
