//! Backing store: a copy of another store that keeps only what was changed.
//!
//! The first lower store is the base. It is read, and never written. What was changed goes to the second lower store, or, without one, stays in memory and is lost when the store is closed.
//! Many copies can stand on one base, as long as nobody changes that.
//!
//! The unit of space is the cluster of 64 KiB, the unit of what was changed the grain of 4 KiB: a [table](map) says for each cluster which of its grains were changed, and where they are.
//!
//! # What survives
//!
//! A new cluster is written first, and named by the table later: a flush makes the data durable, with a [header] that says up to where clusters are in use, then writes the entries that
//! were changed, then makes these durable. Whatever happens in between, the table names no cluster whose data is not there, and none that could be given away again. A cluster
//! that was zeroed is used again only after two flushes; which are free is not remembered beyond closing, and their space not found again.
//!
//! Long for its one story: where a cluster is, how it gets there, and in which order that becomes durable.

mod batch;
pub mod header;
pub mod map;
mod open;
mod top;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry as Place;

use tenon_sdk::store::{
    Config, Decoder, Encoder, Error, Lower, MOST, Operation, Result, Store, StoreError, StoreInfo, error,
};

use crate::batch::{Batch, For, Grain, Plan, Source};
use crate::header::{CLUSTER, Header, TABLE};
use crate::map::{Entry, GRAIN, Map};
use crate::open::{find, fresh, write_header};
use crate::top::{Memory, Top};

/// Grains in a cluster.
const GRAINS: u32 = 16;
/// The most memory that changes take.
const LIMIT: u64 = 256 << 20;

/// A copy of a store.
pub struct Overlay {
    base: Lower,
    base_size: u64,
    top: Top,
    map: Map,
    header: Header,
    /// The first cluster that holds data.
    first: u64,
    /// Pages of the table, in bytes.
    page: u64,
    free: Vec<u64>,
    /// Free, and named by the durable table.
    unused: Vec<u64>,
    /// Free, and out of the durable table since the last flush. A state that was saved before that may name them, so they are not given away before the next one.
    resting: Vec<u64>,
}

tenon_sdk::export_store!(Overlay);

impl Store for Overlay {
    fn open(config: &Config, lower: Vec<Lower>) -> Result<(Self, StoreInfo)> {
        let mut lower = lower.into_iter();
        let (Some(base), top, None) = (lower.next(), lower.next(), lower.next()) else {
            return Err(Error::Invalid(
                "overlay stands on one store, or on two: the second is for the changes".into(),
            ));
        };
        let below = base.info();
        let above = top.as_ref().map(Lower::info);
        let block = above.as_ref().map_or(512, |above| above.block_size).max(below.block_size);
        let size = config.size("size")?;
        let (header, top) = match top {
            Some(top) => {
                let format = config.boolean("format")?.unwrap_or(false);
                (find(&top, &below, block, size, format)?, Top::Store(top))
            }
            None => {
                let limit = config.size("limit")?.unwrap_or(128 << 20);
                if limit > LIMIT {
                    return Err(Error::Invalid(format!(
                        "`limit` is {limit}, but must be {LIMIT} at most; with a second store changes take no memory"
                    )));
                }
                let memory = Memory { grains: BTreeMap::new(), limit: limit / GRAIN };
                (fresh(&below, block, size)?, Top::Memory(memory))
            }
        };
        let page = GRAIN.max(block.into());
        let store = Self {
            base,
            base_size: below.size,
            map: Map::new(page),
            first: header.first_data(),
            page,
            free: Vec::new(),
            unused: Vec::new(),
            resting: Vec::new(),
            top,
            header,
        };
        let above = above.unwrap_or(below);
        let info = StoreInfo {
            size: store.header.size,
            block_size: block,
            optimal_size: u32::try_from(page).unwrap_or(block),
            read_only: matches!(store.top, Top::Store(_)) && above.read_only,
            discard: true,
            write_zeroes: true,
            identity: above.identity,
        };
        Ok((store, info))
    }

    fn read(&mut self, position: u64, into: &mut [u8]) -> Result<(), StoreError> {
        let data = self.one(Operation::Read { position, length: into.len() as u64 })?;
        into.copy_from_slice(&data);
        Ok(())
    }

    fn write(&mut self, position: u64, bytes: &[u8]) -> Result<(), StoreError> {
        self.one(Operation::Write { position, data: bytes.to_vec() }).map(drop)
    }

    fn flush(&mut self) -> Result<(), StoreError> {
        self.commit()
    }

    fn submit(&mut self, operations: Vec<Operation>) -> Vec<Result<Vec<u8>, StoreError>> {
        // A flush covers what was done before this batch.
        let flushes = operations.contains(&Operation::Flush);
        let flushed = if flushes { self.commit() } else { Ok(()) };
        let mut batch = Batch::default();
        let mut outcomes: Vec<Result<Vec<u8>, StoreError>> = operations
            .into_iter()
            .enumerate()
            .map(|(number, operation)| match operation {
                Operation::Read { position, length } => self.plan_read(number, position, length, &mut batch),
                Operation::Write { position, data } => self
                    .plan_write(number, position, data.len() as u64, Some(&data), &mut batch)
                    .map(|()| Vec::new()),
                Operation::Flush => flushed.map(|()| Vec::new()),
                Operation::Discard { position, length } => {
                    self.plan_zeroes(number, position, length, true, &mut batch).map(|()| Vec::new())
                }
                Operation::WriteZeroes { position, length, .. } => {
                    self.plan_zeroes(number, position, length, false, &mut batch).map(|()| Vec::new())
                }
            })
            .collect();
        self.carry_out(batch, &mut outcomes);
        outcomes
    }

    fn resize(&mut self, _size: u64) -> Result<StoreInfo> {
        Err(Error::Unsupported(
            "an overlay keeps the length with which it was made: `size` makes a longer one".into(),
        ))
    }

    fn save(&self, state: &mut Encoder) -> Result<()> {
        state.u64(self.header.next).u64(self.header.sequence);
        for list in [&self.free, &self.unused, &self.resting] {
            state.u64(list.len() as u64);
            for cluster in list {
                state.u64(*cluster);
            }
        }
        let changed = self.map.changed();
        state.u64(changed.len() as u64);
        for (number, entry) in changed {
            state.u64(number).u64(entry.0);
        }
        if let Top::Memory(memory) = &self.top {
            state.u64(memory.grains.len() as u64);
            let mut all = Vec::with_capacity(memory.grains.len() * 4104);
            for (number, data) in &memory.grains {
                all.extend(number.to_le_bytes());
                all.extend(data);
            }
            state.raw(&all);
        }
        Ok(())
    }

    fn restore(&mut self, state: &mut Decoder<'_>) -> Result<()> {
        let wrong = |what: String| Error::Other(format!("the state cannot be of this store: {what}"));
        let (next, sequence) = (state.u64()?, state.u64()?);
        if next < self.first || next > 1 << 47 {
            return Err(wrong(format!("cluster {next} comes next")));
        }
        self.header.next = next.max(self.header.next);
        let next = self.header.next;
        let lists = [read_list(state)?, read_list(state)?, read_list(state)?];
        if let Some(cluster) = lists.iter().flatten().find(|cluster| !(self.first..next).contains(*cluster)) {
            return Err(wrong(format!("cluster {cluster} is free")));
        }
        // A flush that came after the state was saved may have put free clusters into the table.
        if sequence == self.header.sequence {
            [self.free, self.unused, self.resting] = lists;
        }
        for _ in 0..state.u64()? {
            let (number, entry) = (state.u64()?, Entry(state.u64()?));
            if number >= self.header.size.div_ceil(CLUSTER) || !entry.can_be(self.first, next) {
                return Err(wrong(format!("entry {number} is {:#x}", entry.0)));
            }
            self.entry(number)?;
            self.map.set(number, entry);
        }
        if let Top::Memory(memory) = &mut self.top {
            for _ in 0..state.u64()? {
                let number = state.u64()?;
                if memory.grains.len() as u64 >= memory.limit || number / u64::from(GRAINS) >= next {
                    return Err(wrong(format!("grain {number}, and {} before it", memory.grains.len())));
                }
                memory.grains.insert(number, state.array::<4096>()?.to_vec());
            }
        }
        Ok(())
    }
}

fn read_list(state: &mut Decoder<'_>) -> Result<Vec<u64>> {
    let count = state.u64()?;
    (0..count).map(|_| state.u64()).collect()
}

impl Overlay {
    fn one(&mut self, operation: Operation) -> Result<Vec<u8>, StoreError> {
        self.submit(vec![operation]).pop().unwrap_or(Err(StoreError::Io))
    }

    /// The entry of a cluster of the copy.
    fn entry(&mut self, number: u64) -> Result<Entry, StoreError> {
        if let Some(entry) = self.map.get(number) {
            return Ok(entry);
        }
        let page = self.map.page_of(number);
        let bytes = match &self.top {
            Top::Store(top) => top.read(TABLE * CLUSTER + page * self.page, self.page)?,
            Top::Memory(_) => Vec::new(),
        };
        let loaded = self.map.load(page, &bytes, self.first, self.header.next);
        loaded.map_err(|(number, entry)| {
            error!("the table is damaged: the entry of cluster {number} is {entry:#x}, and clusters {} to {} are in use", self.first, self.header.next);
            StoreError::Io
        })?;
        Ok(self.map.get(number).unwrap_or_default())
    }

    /// A cluster that nothing is in.
    fn allocate(&mut self) -> Result<u64, StoreError> {
        if let Some(cluster) = self.free.pop() {
            return Ok(cluster);
        }
        let cluster = self.header.next;
        self.top.reach(cluster + 1)?;
        self.header.next += 1;
        Ok(cluster)
    }

    fn plan_read(
        &mut self,
        number: usize,
        position: u64,
        length: u64,
        batch: &mut Batch,
    ) -> Result<Vec<u8>, StoreError> {
        for (at, grain, in_grain, some) in grains(position, length) {
            let (cluster, index) = (grain / u64::from(GRAINS), grain % u64::from(GRAINS));
            let entry = self.entry(cluster)?;
            let changed = entry.grains() >> index & 1 == 1;
            let source = match entry.cluster() {
                Some(place) if changed => Source::Top(place * CLUSTER + index * GRAIN + in_grain),
                _ if changed => continue,
                _ => Source::Base(position + at as u64),
            };
            let some = match source {
                // Behind the base's end are zeroes.
                Source::Base(from) => some.min(self.base_size.saturating_sub(from)),
                Source::Top(_) => some,
            };
            if some > 0 {
                batch.read(number, at, source, some);
            }
        }
        Ok(vec![0; usize::try_from(length).map_err(|_| StoreError::OutOfRange)?])
    }

    /// Plans a write; without data, one of zeroes.
    fn plan_write(
        &mut self,
        number: usize,
        position: u64,
        length: u64,
        data: Option<&[u8]>,
        batch: &mut Batch,
    ) -> Result<(), StoreError> {
        for (at, grain, in_grain, some) in grains(position, length) {
            let (cluster, index) = (grain / u64::from(GRAINS), grain % u64::from(GRAINS));
            let size = usize::try_from(some).map_err(|_| StoreError::OutOfRange)?;
            let data = data.and_then(|data| data.get(at..at + size));
            let entry = self.entry(cluster)?;
            match entry.cluster() {
                Some(place) if entry.grains() >> index & 1 == 1 => {
                    batch.write(number, place * CLUSTER + index * GRAIN + in_grain, some, data);
                }
                _ => {
                    let plan = self.plan(cluster, entry, batch)?;
                    let index = u32::try_from(index).unwrap_or(0);
                    let from = usize::try_from(in_grain).unwrap_or(0);
                    plan.grains.entry(index).or_insert_with(|| Grain::new(false)).put(
                        from,
                        from + size,
                        data,
                    );
                    if plan.owners.last() != Some(&number) {
                        plan.owners.push(number);
                    }
                }
            }
        }
        Ok(())
    }

    /// What is to become of a cluster of the copy, of which grains are written that were not changed before.
    fn plan<'b>(
        &mut self,
        number: u64,
        before: Entry,
        batch: &'b mut Batch,
    ) -> Result<&'b mut Plan, StoreError> {
        match batch.plans.entry(number) {
            Place::Occupied(plan) => Ok(plan.into_mut()),
            Place::Vacant(place) => {
                let cluster = before.cluster().map_or_else(|| self.allocate(), Ok)?;
                // Zeroes without a cluster come to be zeroes in one.
                let zeroes = (0..GRAINS).filter(|index| before.zero_grains() >> index & 1 == 1);
                let grains = zeroes.map(|index| (index, Grain::new(true))).collect();
                Ok(place.insert(Plan { cluster, before, grains, owners: Vec::new(), failed: None }))
            }
        }
    }

    /// Plans zeroes. Of a discard, only what gives space back is done.
    fn plan_zeroes(
        &mut self,
        number: usize,
        position: u64,
        length: u64,
        discard: bool,
        batch: &mut Batch,
    ) -> Result<(), StoreError> {
        let end = position.checked_add(length).ok_or(StoreError::OutOfRange)?;
        let mut at = position;
        while at < end {
            let cluster = at / CLUSTER;
            let begin = cluster * CLUSTER;
            let to = end.min(begin + CLUSTER);
            let entry = self.entry(cluster)?;
            let all = at == begin && to == self.header.size.min(begin + CLUSTER);
            // The grains that become zero as a whole; those of the last cluster may reach over the end.
            let last = if to == self.header.size { to.next_multiple_of(GRAIN) } else { to };
            let whole =
                mask(at.next_multiple_of(GRAIN).saturating_sub(begin) / GRAIN, (last - begin) / GRAIN);
            if batch.plans.contains_key(&cluster) {
                self.plan_write(number, at, to - at, None, batch)?;
            } else if all {
                self.map.set(cluster, Entry::zeroes(u16::MAX));
                batch.freed.extend(entry.cluster());
            } else if discard {
                // A part of a cluster gives no space back.
            } else if entry.cluster().is_none() && whole != 0 {
                self.map.set(cluster, Entry::zeroes(entry.zero_grains() | whole));
                let (first, behind) =
                    (u64::from(whole.trailing_zeros()), 16 - u64::from(whole.leading_zeros()));
                let edges = [(at, begin + first * GRAIN), (begin + behind * GRAIN, to)];
                for (from, to) in edges.into_iter().filter(|(from, to)| from < to) {
                    self.plan_write(number, from, to - from, None, batch)?;
                }
            } else {
                self.plan_write(number, at, to - at, None, batch)?;
            }
            at = to;
        }
        Ok(())
    }

    fn carry_out(&mut self, mut batch: Batch, outcomes: &mut [Result<Vec<u8>, StoreError>]) {
        batch.ask_base(self.base_size);
        let (operations, whose): (Vec<Operation>, Vec<For>) =
            std::mem::take(&mut batch.base).into_iter().unzip();
        let ended = self.base.submit(&operations);
        settle(&mut batch, outcomes, &operations, whose, ended);

        batch.write_grains();
        let (operations, whose): (Vec<Operation>, Vec<For>) =
            std::mem::take(&mut batch.top).into_iter().unzip();
        let ended = self.top.submit(&operations);
        settle(&mut batch, outcomes, &operations, whose, ended);

        for (number, plan) in batch.plans {
            if let Some(error) = plan.failed {
                plan.owners.iter().for_each(|owner| outcomes[*owner] = Err(error));
                if plan.before.cluster().is_none() {
                    batch.freed.push(plan.cluster);
                }
                continue;
            }
            let written = plan.grains.keys().fold(0, |mask, index| mask | 1_u16 << index);
            self.map.set(number, Entry::of(plan.cluster, plan.before.grains() | written));
        }
        match &mut self.top {
            Top::Memory(memory) => {
                batch.freed.iter().for_each(|cluster| memory.release(*cluster));
                self.free.append(&mut batch.freed);
            }
            Top::Store(_) => self.unused.append(&mut batch.freed),
        }
    }

    /// Makes everything durable: the data, then the entries that name it.
    fn commit(&mut self) -> Result<(), StoreError> {
        let Top::Store(top) = &self.top else { return Ok(()) };
        let pages = self.map.changed_pages();
        if pages.is_empty() {
            return top.flush();
        }
        let header = Header { sequence: self.header.sequence + 1, ..self.header.clone() };
        write_header(top, &header)?;
        top.flush()?;
        // From here on, the other copy is the older one.
        self.header.sequence = header.sequence;
        let mut writes: Vec<Operation> = Vec::new();
        for page in pages {
            let place = TABLE * CLUSTER + page * self.page;
            let bytes = self.map.encode(page);
            match writes.last_mut() {
                Some(Operation::Write { position, data })
                    if *position + data.len() as u64 == place
                        && (data.len() + bytes.len()) as u64 <= MOST =>
                {
                    data.extend(bytes);
                }
                _ => writes.push(Operation::Write { position: place, data: bytes }),
            }
        }
        for some in writes.chunks(16) {
            top.submit(some).into_iter().try_for_each(|outcome| outcome.map(drop))?;
        }
        top.flush()?;
        self.map.settle();
        self.free.append(&mut self.resting);
        self.resting.append(&mut self.unused);
        Ok(())
    }
}

/// Gives outcomes to whom they are for.
fn settle(
    batch: &mut Batch,
    outcomes: &mut [Result<Vec<u8>, StoreError>],
    operations: &[Operation],
    whose: Vec<For>,
    ended: Vec<Result<Vec<u8>, StoreError>>,
) {
    let missing = std::iter::repeat_with(|| Err(StoreError::Io));
    for ((operation, whose), ended) in operations.iter().zip(whose).zip(ended.into_iter().chain(missing)) {
        let ended = match (operation, ended) {
            (Operation::Read { length, .. }, Ok(data)) if data.len() as u64 != *length => Err(StoreError::Io),
            (_, ended) => ended,
        };
        match (whose, ended) {
            (For::Read(number, at), Ok(data)) => {
                if let Ok(into) = &mut outcomes[number] {
                    into[at..at + data.len()].copy_from_slice(&data);
                }
            }
            (For::Read(number, _) | For::Write(number), Err(error)) => outcomes[number] = Err(error),
            (For::Fill(number, index), ended) => {
                if let Some(plan) = batch.plans.get_mut(&number) {
                    match (plan.grains.get_mut(&index), ended) {
                        (Some(grain), Ok(data)) => grain.fill(&data),
                        (_, Err(error)) => plan.failed = Some(error),
                        (None, Ok(_)) => {}
                    }
                }
            }
            (For::Plans(numbers), Err(error)) => {
                for number in numbers {
                    if let Some(plan) = batch.plans.get_mut(&number) {
                        plan.failed = Some(error);
                    }
                }
            }
            (For::Write(_) | For::Plans(_), Ok(_)) => {}
        }
    }
}

/// The grains of a range: how far into the range each begins, its number, how far into it the range begins, and how many bytes of it are in the range.
fn grains(position: u64, length: u64) -> impl Iterator<Item = (usize, u64, u64, u64)> {
    let end = position.saturating_add(length);
    (position / GRAIN..end.div_ceil(GRAIN)).map(move |grain| {
        let begin = position.max(grain * GRAIN);
        let at = usize::try_from(begin - position).unwrap_or(usize::MAX);
        (at, grain, begin - grain * GRAIN, end.min((grain + 1) * GRAIN) - begin)
    })
}

/// The grains from one up to another.
fn mask(from: u64, to: u64) -> u16 {
    (from..to)
        .fold(0, |mask, index| mask | 1_u16.checked_shl(u32::try_from(index).unwrap_or(16)).unwrap_or(0))
}
