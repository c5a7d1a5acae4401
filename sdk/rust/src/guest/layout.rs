//! Which guest-physical addresses are RAM, and which of them are taken.

use crate::personality::{Error, Machine, MemoryKind};

/// Pages of guest memory are this large; the smallest unit in which room is found.
const PAGE: u64 = 4096;

/// Finds room in guest memory. Ranges that touch are one: what is taken may lie across the borders of the machine's ranges.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Free ranges, start and end, ascending, apart from one another.
    free: Vec<(u64, u64)>,
    /// All RAM, in bytes.
    total: u64,
}

impl Layout {
    /// All of a machine's RAM is free.
    #[must_use]
    pub fn new(machine: &Machine) -> Self {
        let mut free: Vec<(u64, u64)> = Vec::new();
        let mut total = 0;
        for range in machine.memory.iter().filter(|range| range.kind == MemoryKind::Ram) {
            total += range.size;
            let (start, end) = (range.start, range.start.saturating_add(range.size));
            match free.last_mut() {
                Some(last) if last.1 == start => last.1 = end,
                _ if start < end => free.push((start, end)),
                _ => {}
            }
        }
        Self { free, total }
    }

    /// Takes exactly this range.
    ///
    /// # Errors
    /// Not all of it is RAM, or some of it is taken. `what` names the thing that was to lie there.
    pub fn take(&mut self, start: u64, size: u64, what: &str) -> Result<(), Error> {
        let end = start.saturating_add(size);
        let Some(index) = self.free.iter().position(|range| range.0 <= start && end <= range.1) else {
            return Err(Error::NoRoom(format!(
                "{what} needs the RAM from {start:#x} to {end:#x}, which is not free; the machine has {} of RAM{}",
                mebibytes(self.total),
                advice(end, self.total),
            )));
        };
        let (free_start, free_end) = self.free[index];
        let rest = [(free_start, start), (end, free_end)];
        self.free.splice(index..=index, rest.into_iter().filter(|range| range.0 < range.1));
        Ok(())
    }

    /// Takes the lowest room of whole pages that lies from `from` up to `below`; returns its address.
    ///
    /// # Errors
    /// There is none.
    pub fn take_lowest(&mut self, size: u64, from: u64, below: u64, what: &str) -> Result<u64, Error> {
        let found = self.free.iter().find_map(|&(start, end)| {
            let start = start.max(from).checked_next_multiple_of(PAGE)?;
            (start.checked_add(size)? <= end.min(below)).then_some(start)
        });
        self.found(found, size, from, below, what)
    }

    /// Takes the highest room of whole pages that ends at or before `below`; returns its address.
    ///
    /// # Errors
    /// There is none.
    pub fn take_highest(&mut self, size: u64, below: u64, what: &str) -> Result<u64, Error> {
        let found = self.free.iter().rev().find_map(|&(first, end)| {
            let start = end.min(below).checked_sub(size)? / PAGE * PAGE;
            (start >= first).then_some(start)
        });
        self.found(found, size, 0, below, what)
    }

    fn found(
        &mut self,
        found: Option<u64>,
        size: u64,
        from: u64,
        below: u64,
        what: &str,
    ) -> Result<u64, Error> {
        let Some(start) = found else {
            return Err(Error::NoRoom(format!(
                "{what} needs {} of RAM in one piece between {from:#x} and {below:#x}, which is not free; \
                 the machine has {} of RAM{}",
                mebibytes(size),
                mebibytes(self.total),
                advice(self.total.saturating_add(size), self.total),
            )));
        };
        self.take(start, size.next_multiple_of(PAGE).min(u64::MAX - start), what).or_else(|_| {
            // The last page of RAM may be a part of one.
            self.take(start, size, what)
        })?;
        Ok(start)
    }
}

/// What would do, when more memory would.
fn advice(end: u64, total: u64) -> String {
    let enough = end.checked_next_power_of_two().unwrap_or(end);
    if enough > total && enough <= 2 << 30 {
        format!(", {} would do", mebibytes(enough.max(16 << 20)))
    } else {
        String::new()
    }
}

/// A size as people read it: `62 MiB`, or in KiB or bytes where it is less than one.
#[must_use]
pub fn mebibytes(bytes: u64) -> String {
    match bytes {
        0..1024 => format!("{bytes} bytes"),
        1024..1_048_576 => format!("{} KiB", bytes.div_ceil(1024)),
        _ => format!("{} MiB", bytes.div_ceil(1 << 20)),
    }
}
