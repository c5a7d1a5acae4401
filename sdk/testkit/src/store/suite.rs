//! What every user of a store relies on, checked for any store: on the bench, or as it was loaded.
//!
//! Longer than most files: the checks follow one another on one store, each on what the one before has left.

use tenon_sdk::store::{MOST, Operation, SavedState, Store, StoreError, StoreInfo};

use super::StoreBench;
use crate::random::Random;
use crate::{MemoryStore, On};

/// How much of the store is worked on, at most.
const SPAN: u64 = 8 << 20;
/// How many random batches it has to stand.
const BATCHES: u32 = 120;

/// A store under check, in some host. The host checks ranges and alignment. A fault of the store, such as a trap or a panic, panics or shows in [`StoreSubject::alive`].
pub trait StoreSubject {
    /// What the store is.
    fn info(&mut self) -> StoreInfo;
    /// Carries out operations, and waits for all of them.
    fn submit(&mut self, operations: Vec<Operation>) -> Vec<Result<Vec<u8>, StoreError>>;
    /// Changes the length.
    ///
    /// # Errors
    /// The store refuses.
    fn resize(&mut self, size: u64) -> Result<(), String>;
    /// Closes the store in good order and opens it again.
    ///
    /// # Errors
    /// The store refuses one or the other.
    fn reopen(&mut self) -> Result<(), String>;
    /// Saves the store, and puts a new instance in its place, opened and with the state; an error where the store refuses. None where this host restarts
    /// stores by itself alone.
    fn restart(&mut self) -> Option<Result<(), String>> {
        None
    }
    /// Loses power and opens the store again, as [`StoreBench::lose_power`] does. None where this host cannot.
    fn lose_power(&mut self, seed: u64) -> Option<Result<(), String>> {
        let _ = seed;
        None
    }
    /// A lower store, where the test can reach it.
    fn lower(&mut self, number: usize) -> Option<&mut MemoryStore> {
        let _ = number;
        None
    }
    /// Saves the store; an error where it refuses. None where this host keeps states to itself.
    fn save(&mut self) -> Option<Result<SavedState, String>> {
        None
    }
    /// Says whether the store has come to harm.
    ///
    /// # Errors
    /// It has, and how.
    fn alive(&mut self) -> Result<(), String>;
}

impl<S: Store> StoreSubject for StoreBench<S> {
    fn info(&mut self) -> StoreInfo {
        StoreBench::info(self).clone()
    }

    fn submit(&mut self, operations: Vec<Operation>) -> Vec<Result<Vec<u8>, StoreError>> {
        StoreBench::submit(self, operations)
    }

    fn resize(&mut self, size: u64) -> Result<(), String> {
        StoreBench::resize(self, size).map(drop).map_err(|error| error.to_string())
    }

    fn reopen(&mut self) -> Result<(), String> {
        StoreBench::reopen(self).map_err(|error| error.to_string())
    }

    fn restart(&mut self) -> Option<Result<(), String>> {
        Some(StoreBench::restart(self).map_err(|error| error.to_string()))
    }

    fn lose_power(&mut self, seed: u64) -> Option<Result<(), String>> {
        (self.lowers() > 0).then(|| StoreBench::lose_power(self, seed).map_err(|error| error.to_string()))
    }

    fn lower(&mut self, number: usize) -> Option<&mut MemoryStore> {
        (number < self.lowers()).then(|| StoreBench::lower(self, number))
    }

    fn save(&mut self) -> Option<Result<SavedState, String>> {
        Some(StoreBench::save(self).map_err(|error| error.to_string()))
    }

    fn alive(&mut self) -> Result<(), String> {
        Ok(())
    }
}

/// What a store promises of its content. Most stores promise all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoreChecks {
    /// What was written is read.
    pub content: bool,
    /// What was written is read after the store was closed and opened again.
    pub reopen: bool,
}

impl Default for StoreChecks {
    fn default() -> Self {
        Self { content: true, reopen: true }
    }
}

/// Checks a store with these settings over these lower stores; see [`store`].
///
/// # Panics
/// The store fails a check. The panic says which.
pub fn store_conformance<S: Store>(settings: &[(&str, &str)], lower: Vec<MemoryStore>, checks: StoreChecks) {
    let mut bench = match StoreBench::<S>::new(settings, lower) {
        Ok(bench) => bench,
        Err(error) => panic!("the store does not open with {settings:?}: {error}"),
    };
    if let Err(text) = store(&mut bench, checks) {
        panic!("{text}");
    }
}

/// Checks that a store that was just opened, and whose content may be overwritten,
///
/// - says what a store can be, and gives every byte of its first and last blocks;
/// - reads what was written: in batches, beside discards and zeroes, over restarts, and after it was closed and opened again;
/// - refuses what leaves it, is not aligned, or writes while it is read-only;
/// - keeps what a flush covered when power is lost, and of the rest either the old or the new, never anything else;
/// - never makes a success of a lower store's failure, and never one of a failed flush;
/// - keeps its content when it grows, if it can;
/// - is not changed by `save`.
///
/// What the subject's host cannot do, and what `checks` does not promise, is left out. Returns what was done, a line each.
///
/// # Errors
/// The store fails a check. The text says which.
pub fn store(store: &mut dyn StoreSubject, checks: StoreChecks) -> Result<Vec<String>, String> {
    let info = store.info();
    info.check()?;
    let block = u64::from(info.block_size);
    if info.size < 2 * block {
        return Err(format!("a store of {} bytes is too small to be checked", info.size));
    }
    let mut said = vec![format!("{} bytes in blocks of {block}", info.size)];
    let mut trial = Trial { store, info, block, random: Random::new(0x5704e), should: Vec::new() };
    trial.bounds()?;
    said.push("all of it is read; what leaves it or is not aligned is refused".into());
    if trial.info.read_only {
        trial.read_only()?;
        said.push("writes are refused".into());
        return Ok(said);
    }
    if checks.content {
        trial.content(checks.reopen, &mut said)?;
        trial.faults(&mut said)?;
        if checks.reopen {
            trial.power(&mut said)?;
        }
        trial.grows(&mut said)?;
    } else {
        trial.any()?;
        said.push("operations of every kind are taken".into());
    }
    let (before, again) = (trial.store.save().transpose()?, trial.store.save().transpose()?);
    if before != again {
        return Err(format!("two saves in a row differ: {again:?}, not {before:?}"));
    }
    trial.store.alive()?;
    Ok(said)
}

struct Trial<'a> {
    store: &'a mut dyn StoreSubject,
    info: StoreInfo,
    block: u64,
    random: Random,
    /// What the first part of the store should hold.
    should: Vec<u8>,
}

impl Trial<'_> {
    fn one(&mut self, operation: Operation) -> Result<Result<Vec<u8>, StoreError>, String> {
        let outcomes = self.store.submit(vec![operation]);
        self.store.alive()?;
        match <[_; 1]>::try_from(outcomes) {
            Ok([outcome]) => Ok(outcome),
            Err(outcomes) => Err(format!("{} outcomes of one operation", outcomes.len())),
        }
    }

    fn read(&mut self, position: u64, length: u64) -> Result<Vec<u8>, String> {
        match self.one(Operation::Read { position, length })? {
            Ok(data) if data.len() as u64 == length => Ok(data),
            Ok(data) => Err(format!("a read of {length} bytes at {position} gives {} bytes", data.len())),
            Err(error) => Err(format!("a read of {length} bytes at {position} fails: {error}")),
        }
    }

    fn refused(&mut self, what: &str, operation: Operation, right: &[StoreError]) -> Result<(), String> {
        match self.one(operation)? {
            Err(error) if right.contains(&error) => Ok(()),
            other => Err(format!("{what} ends as {other:?}, not one of {right:?}")),
        }
    }

    fn bounds(&mut self) -> Result<(), String> {
        let (size, block) = (self.info.size, self.block);
        self.read(0, block)?;
        self.read(size - block, block)?;
        self.read(0, size.min(MOST) / block * block)?;
        let reads = [
            ("behind the end", size, block),
            ("over the end", size - block, 2 * block),
            ("at the end of all", u64::MAX - block + 1, block),
            ("of half a block", 0, block / 2),
            ("at half a block", block / 2, block),
        ];
        for (what, position, length) in reads {
            let range = [StoreError::OutOfRange];
            self.refused(&format!("a read {what}"), Operation::Read { position, length }, &range)?;
            let data = vec![1; usize::try_from(length).unwrap_or(0)];
            let right = [StoreError::OutOfRange, StoreError::ReadOnly];
            self.refused(&format!("a write {what}"), Operation::Write { position, data }, &right)?;
        }
        Ok(())
    }

    fn read_only(&mut self) -> Result<(), String> {
        let before = self.read(0, self.block)?;
        let data = vec![0x77; before.len()];
        let right = [StoreError::ReadOnly];
        self.refused("a write to a read-only store", Operation::Write { position: 0, data }, &right)?;
        if self.read(0, self.block)? != before {
            return Err("a refused write changed the store".into());
        }
        self.store.restart().transpose()?;
        self.store.reopen()?;
        if self.read(0, self.block)? != before {
            return Err("the read-only store holds something else after it was opened again".into());
        }
        Ok(())
    }

    /// A random range of whole blocks in the part that is worked on.
    fn range(&mut self, most: u64) -> (u64, u64) {
        let blocks = self.span() / self.block;
        let length = 1 + self.random.below((most / self.block).clamp(1, blocks));
        (self.random.below(blocks - length + 1) * self.block, length * self.block)
    }

    /// The part of the store that is worked on.
    fn span(&self) -> u64 {
        self.info.size.min(SPAN)
    }

    fn verify(&mut self, when: &str) -> Result<(), String> {
        let piece = (256 << 10) / self.block * self.block;
        let mut position = 0;
        while position < self.span() {
            let length = piece.min(self.span() - position);
            let read = self.read(position, length)?;
            let at = usize::try_from(position).unwrap_or(0);
            if let Some(wrong) = read.iter().zip(&self.should[at..]).position(|(is, should)| is != should) {
                return Err(format!("{when}, byte {} is not as written", at + wrong));
            }
            position += length;
        }
        Ok(())
    }

    /// Takes what is there for what should be there.
    fn learn(&mut self) -> Result<(), String> {
        self.should.clear();
        let piece = (256 << 10) / self.block * self.block;
        while (self.should.len() as u64) < self.span() {
            let position = self.should.len() as u64;
            let data = self.read(position, piece.min(self.span() - position))?;
            self.should.extend(data);
        }
        Ok(())
    }

    fn put(&mut self, position: u64, data: &[u8]) {
        let at = usize::try_from(position).unwrap_or(0);
        self.should[at..at + data.len()].copy_from_slice(data);
    }

    fn content(&mut self, reopen: bool, said: &mut Vec<String>) -> Result<(), String> {
        self.learn()?;
        let (mut count, mut restarts) = (0, false);
        for batch in 0..BATCHES {
            // Operations of a batch are independent: no two of them touch the same block, and what one covers is no other's.
            let mut free: Vec<(u64, u64)> = Vec::new();
            let mut operations = Vec::new();
            let mut expected = Vec::new();
            for _ in 0..1 + self.random.below(24) {
                let (position, length) = self.range(128 << 10);
                let apart =
                    |(other, size): &(u64, u64)| position + length <= *other || other + size <= position;
                if !free.iter().all(apart) {
                    continue;
                }
                free.push((position, length));
                let at = usize::try_from(position).unwrap_or(0);
                let bytes = usize::try_from(length).unwrap_or(0);
                match self.random.below(8) {
                    0..=2 => {
                        expected.push(self.should[at..at + bytes].to_vec());
                        operations.push(Operation::Read { position, length });
                        continue;
                    }
                    3 if self.info.discard => operations.push(Operation::Discard { position, length }),
                    4 => {
                        let unmap = self.random.below(2) == 0;
                        self.put(position, &vec![0; bytes]);
                        operations.push(Operation::WriteZeroes { position, length, unmap });
                    }
                    5 => {
                        operations.push(Operation::Flush);
                        free.pop();
                    }
                    _ => {
                        let data = self.random.bytes(bytes);
                        self.put(position, &data);
                        operations.push(Operation::Write { position, data });
                    }
                }
                expected.push(Vec::new());
            }
            count += operations.len();
            let kinds = operations.clone();
            let outcomes = self.store.submit(operations);
            self.store.alive()?;
            if outcomes.len() != kinds.len() {
                return Err(format!("{} outcomes of {} operations", outcomes.len(), kinds.len()));
            }
            for ((operation, outcome), right) in kinds.into_iter().zip(outcomes).zip(expected) {
                match outcome {
                    Err(error) => return Err(format!("{} fails: {error}", describe(&operation))),
                    Ok(data) if data != right => {
                        return Err(format!("{} gives other bytes than were written", describe(&operation)));
                    }
                    Ok(_) => {}
                }
                // Discarded bytes are anything, but from then on the same.
                if let Operation::Discard { position, length } = operation {
                    let data = self.read(position, length)?;
                    self.put(position, &data);
                }
            }
            if batch % 40 == 19 {
                restarts |= self.store.restart().transpose()?.is_some();
                self.verify("after a restart")?;
            }
            if batch % 40 == 39 && reopen {
                self.store.reopen()?;
                self.verify("after it was closed and opened again")?;
            }
        }
        self.verify("after all operations")?;
        let largest = MOST.min(self.span()) / self.block * self.block;
        let data = self.random.bytes(usize::try_from(largest).unwrap_or(0));
        self.put(0, &data);
        if let Err(error) = self.one(Operation::Write { position: 0, data })? {
            return Err(format!("a write of {largest} bytes fails: {error}"));
        }
        self.verify("after the largest write")?;
        said.push(format!(
            "{count} operations in {BATCHES} batches read as written{}",
            match (restarts, reopen) {
                (true, true) => ", over restarts and reopening",
                (true, false) => ", over restarts",
                (false, true) => ", over reopening",
                (false, false) => "",
            }
        ));
        Ok(())
    }

    /// Operations of every kind on a store that does not keep its content.
    fn any(&mut self) -> Result<(), String> {
        for _ in 0..BATCHES {
            let (position, length) = self.range(128 << 10);
            let data = self.random.bytes(usize::try_from(length).unwrap_or(0));
            let operations = vec![
                Operation::Write { position, data },
                Operation::Flush,
                Operation::WriteZeroes { position, length, unmap: true },
            ];
            let _ = self.store.submit(operations);
            self.store.alive()?;
        }
        Ok(())
    }

    fn faults(&mut self, said: &mut Vec<String>) -> Result<(), String> {
        if self.store.lower(0).is_none() {
            return Ok(());
        }
        let (position, length) = (0, self.block);
        let data = vec![0x42; usize::try_from(length).unwrap_or(0)];
        let write = Operation::Write { position, data: data.clone() };
        let kinds = [
            (On::Read, Operation::Read { position, length }),
            (On::Write, write.clone()),
            (On::Flush, Operation::Flush),
        ];
        let mut struck = 0;
        for (on, operation) in kinds {
            // Something is there to be flushed.
            let _ = self.one(write.clone())?;
            let before = self.store.lower(0).map(|lower| {
                lower.fail_always(on, StoreError::Io);
                lower.counts().faults
            });
            let outcome = self.one(operation)?;
            let hit = self.store.lower(0).map(|lower| {
                lower.clear_faults();
                lower.counts().faults
            }) != before;
            if hit && outcome.is_ok() {
                return Err(format!("{on:?} is a success although the lower store failed"));
            }
            struck += u32::from(hit);
            // What was lost is written again; then it can be made durable.
            if let Err(error) = self.one(write.clone())? {
                return Err(format!("a write after the lower store recovered fails: {error}"));
            }
            self.put(position, &data);
            if on != On::Flush {
                if let Err(error) = self.one(Operation::Flush)? {
                    return Err(format!("a flush after the lower store recovered fails: {error}"));
                }
            } else {
                // A store may keep failing to flush until it is opened anew; it may not succeed without what was lost.
                let _ = self.one(Operation::Flush)?;
                match self.store.restart() {
                    Some(done) => done?,
                    None => self.store.reopen()?,
                }
            }
            self.verify("after a failure of the lower store")?;
        }
        said.push(format!("{struck} failures of the lower store came through as failures"));
        Ok(())
    }

    fn power(&mut self, said: &mut Vec<String>) -> Result<(), String> {
        let (mut kept, mut lost) = (0u64, 0u64);
        for round in 0..12 {
            if let Err(error) = self.one(Operation::Flush)? {
                return Err(format!("a flush fails: {error}"));
            }
            let durable = self.should.clone();
            for _ in 0..1 + self.random.below(20) {
                let (position, length) = self.range(16 << 10);
                let data = self.random.bytes(usize::try_from(length).unwrap_or(0));
                self.put(position, &data);
                if let Err(error) = self.one(Operation::Write { position, data })? {
                    return Err(format!("a write fails: {error}"));
                }
            }
            match self.store.lose_power(round) {
                None => return Ok(()),
                Some(opened) => opened.map_err(|text| format!("after a loss of power: {text}"))?,
            }
            let new = std::mem::take(&mut self.should);
            self.learn()?;
            // Blocks are written whole or not at all; one that was written twice is any of the three, so only blocks that did not change are compared strictly.
            let block = usize::try_from(self.block).unwrap_or(512);
            for (number, ((now, old), new)) in
                self.should.chunks(block).zip(durable.chunks(block)).zip(new.chunks(block)).enumerate()
            {
                if old == new && now != old {
                    return Err(format!("block {number} was durable, and a loss of power changed it"));
                }
                if old != new {
                    kept += u64::from(now == new);
                    lost += u64::from(now == old);
                }
            }
        }
        said.push(format!(
            "12 losses of power changed nothing that was flushed ({kept} other blocks were kept, {lost} lost)"
        ));
        Ok(())
    }

    fn grows(&mut self, said: &mut Vec<String>) -> Result<(), String> {
        let size = self.info.size + 64 * self.block;
        if self.store.resize(size).is_err() {
            return self.verify("after a refused change of length");
        }
        let info = self.store.info();
        if info.size != size {
            return Err(format!("after growing to {size} bytes the store says {}", info.size));
        }
        self.verify("after growing")?;
        self.read(size - self.block, self.block)?;
        said.push("keeps its content when it grows".into());
        Ok(())
    }
}

fn describe(operation: &Operation) -> String {
    match operation {
        Operation::Read { position, length } => format!("a read of {length} bytes at {position}"),
        Operation::Write { position, data } => format!("a write of {} bytes at {position}", data.len()),
        Operation::Flush => "a flush".into(),
        Operation::Discard { position, length } => format!("a discard of {length} bytes at {position}"),
        Operation::WriteZeroes { position, length, .. } => format!("zeroing {length} bytes at {position}"),
    }
}
