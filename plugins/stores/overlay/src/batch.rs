//! What a batch of operations comes to, before any of it is carried out.
//!
//! Reads are taken apart into what the base has and what was changed. Writes to grains that were changed before go straight to where these are. Other grains are put together
//! here, since several operations may write parts of one: what none of them writes is read from the base, and the grain is written whole.

use std::collections::BTreeMap;

use tenon_sdk::store::{MOST, Operation, StoreError};

use crate::header::CLUSTER;
use crate::map::{Entry, GRAIN};

/// The smallest block, which is what a grain is put together of.
const SECTOR: usize = 512;

/// A grain that is put together.
pub(crate) struct Grain {
    pub(crate) data: Vec<u8>,
    /// Which of its eight sectors are there.
    known: u8,
}

impl Grain {
    /// A grain of zeroes, whole or with nothing of it known.
    pub(crate) fn new(known: bool) -> Self {
        Self { data: vec![0; usize::try_from(GRAIN).unwrap_or(0)], known: if known { 0xff } else { 0 } }
    }

    pub(crate) fn is_whole(&self) -> bool {
        self.known == 0xff
    }

    /// Puts data at `at`; without data, zeroes up to `to`.
    pub(crate) fn put(&mut self, at: usize, to: usize, data: Option<&[u8]>) {
        if let Some(part) = self.data.get_mut(at..to) {
            match data {
                Some(data) => part.copy_from_slice(data),
                None => part.fill(0),
            }
            (at / SECTOR..to / SECTOR).for_each(|sector| self.known |= 1 << sector);
        }
    }

    /// Fills in what is not known.
    pub(crate) fn fill(&mut self, base: &[u8]) {
        for (sector, part) in base.chunks(SECTOR).enumerate().take(8) {
            if self.known & 1 << sector == 0 {
                let at = sector * SECTOR;
                self.data[at..at + part.len()].copy_from_slice(part);
            }
        }
        self.known = 0xff;
    }
}

/// What is to become of a cluster of the copy.
pub(crate) struct Plan {
    /// Where its changed grains are, or will be.
    pub(crate) cluster: u64,
    /// The entry that it had.
    pub(crate) before: Entry,
    pub(crate) grains: BTreeMap<u32, Grain>,
    /// The operations that are done when it is.
    pub(crate) owners: Vec<usize>,
    pub(crate) failed: Option<StoreError>,
}

/// Whom the outcome of an operation on a lower store is for.
pub(crate) enum For {
    /// For the read of this number: here go the bytes.
    Read(usize, usize),
    /// For the operation of this number.
    Write(usize),
    /// For this grain of this cluster of the copy.
    Fill(u64, u32),
    /// For these clusters of the copy.
    Plans(Vec<u64>),
}

/// A batch.
#[derive(Default)]
pub(crate) struct Batch {
    /// What the base is asked for.
    pub(crate) base: Vec<(Operation, For)>,
    /// What is asked of where changes are kept.
    pub(crate) top: Vec<(Operation, For)>,
    pub(crate) plans: BTreeMap<u64, Plan>,
    /// Clusters that are free when the batch is done.
    pub(crate) freed: Vec<u64>,
}

/// Where bytes are read from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    Base(u64),
    Top(u64),
}

impl Batch {
    /// Reads bytes for the operation `number`, which go to `at` of its data.
    pub(crate) fn read(&mut self, number: usize, at: usize, source: Source, length: u64) {
        let (list, position) = match source {
            Source::Base(position) => (&mut self.base, position),
            Source::Top(position) => (&mut self.top, position),
        };
        if let Some((Operation::Read { position: before, length: so_far }, For::Read(owner, begin))) =
            list.last_mut()
            && *owner == number
            && *before + *so_far == position
            && (*begin as u64) + *so_far == at as u64
            && *so_far + length <= MOST
        {
            *so_far += length;
            return;
        }
        list.push((Operation::Read { position, length }, For::Read(number, at)));
    }

    /// Writes bytes for the operation `number`; without data, zeroes.
    pub(crate) fn write(&mut self, number: usize, position: u64, length: u64, data: Option<&[u8]>) {
        match (self.top.last_mut(), data) {
            (Some((Operation::Write { position: before, data: so_far }, For::Write(owner))), Some(data))
                if *owner == number
                    && *before + so_far.len() as u64 == position
                    && so_far.len() as u64 + length <= MOST =>
            {
                so_far.extend(data);
                return;
            }
            (
                Some((Operation::WriteZeroes { position: before, length: so_far, .. }, For::Write(owner))),
                None,
            ) if *owner == number && *before + *so_far == position => {
                *so_far += length;
                return;
            }
            _ => {}
        }
        let operation = match data {
            Some(data) => Operation::Write { position, data: data.to_vec() },
            None => Operation::WriteZeroes { position, length, unmap: false },
        };
        self.top.push((operation, For::Write(number)));
    }

    /// Asks the base for what grains lack, as far as there is a base.
    pub(crate) fn ask_base(&mut self, size: u64) {
        for (number, plan) in &self.plans {
            for (index, grain) in &plan.grains {
                let position = number * CLUSTER + u64::from(*index) * GRAIN;
                if !grain.is_whole() && position < size {
                    let length = GRAIN.min(size - position);
                    self.base.push((Operation::Read { position, length }, For::Fill(*number, *index)));
                }
            }
        }
    }

    /// Writes the grains that were put together, as many at a time as lie together.
    pub(crate) fn write_grains(&mut self) {
        let mut writes: Vec<(u64, Vec<u8>, Vec<u64>)> = Vec::new();
        for (number, plan) in self.plans.iter_mut().filter(|(_, plan)| plan.failed.is_none()) {
            for (index, grain) in &mut plan.grains {
                let position = plan.cluster * CLUSTER + u64::from(*index) * GRAIN;
                match writes.last_mut() {
                    Some((begin, data, numbers))
                        if *begin + data.len() as u64 == position && data.len() as u64 + GRAIN <= MOST =>
                    {
                        data.append(&mut grain.data);
                        if numbers.last() != Some(number) {
                            numbers.push(*number);
                        }
                    }
                    _ => writes.push((position, std::mem::take(&mut grain.data), vec![*number])),
                }
            }
        }
        let writes = writes.into_iter();
        self.top.extend(
            writes
                .map(|(position, data, numbers)| (Operation::Write { position, data }, For::Plans(numbers))),
        );
    }
}
