//! Sets of byte ranges of a store: what was written and is not yet durable, and what was lost.
//!
//! Adding is cheap, since it happens at every write. The set is bounded: past [`MOST`] separate ranges it becomes the whole store, which errs on the side of a
//! flush that fails.

/// The most separate ranges.
const MOST: usize = 4096;

/// A set of bytes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ranges {
    /// Starts and ends; they may overlap and are in no order until [`Ranges::tidy`].
    list: Vec<(u64, u64)>,
    /// The whole store.
    all: bool,
}

impl Ranges {
    pub(crate) fn is_empty(&self) -> bool {
        self.list.is_empty() && !self.all
    }

    /// Adds `length` bytes at `start`.
    pub(crate) fn add(&mut self, start: u64, length: u64) {
        if self.all || length == 0 {
            return;
        }
        let end = start.saturating_add(length);
        match self.list.last_mut() {
            Some(last) if last.1 == start => last.1 = end,
            Some(last) if last.0 <= start && end <= last.1 => {}
            _ => self.list.push((start, end)),
        }
        if self.list.len() > 2 * MOST {
            self.tidy();
            if self.list.len() > MOST {
                self.list.clear();
                self.all = true;
            }
        }
    }

    /// Adds all of `other`, and leaves nothing there.
    pub(crate) fn absorb(&mut self, other: &mut Self) {
        self.all |= std::mem::take(&mut other.all);
        for (start, end) in other.list.drain(..) {
            self.add(start, end - start);
        }
        if self.all {
            self.list.clear();
        }
    }

    /// Takes `length` bytes at `start` out. From the whole store, only the whole store can be taken out.
    pub(crate) fn remove(&mut self, start: u64, length: u64, size: u64) {
        let end = start.saturating_add(length);
        if self.all {
            self.all = !(start == 0 && end >= size);
            return;
        }
        let old = std::mem::take(&mut self.list);
        for (from, to) in old {
            if from < start.min(to) {
                self.list.push((from, start.min(to)));
            }
            if to > end.max(from) {
                self.list.push((end.max(from), to));
            }
        }
        if self.list.len() > 2 * MOST {
            self.tidy();
        }
    }

    /// Sorts and joins.
    fn tidy(&mut self) {
        self.list.sort_unstable();
        let mut tidy: Vec<(u64, u64)> = Vec::with_capacity(self.list.len());
        for &(start, end) in &self.list {
            match tidy.last_mut() {
                Some(last) if last.1 >= start => last.1 = last.1.max(end),
                _ => tidy.push((start, end)),
            }
        }
        self.list = tidy;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_added_in_pieces_is_empty_once_it_was_taken_out() {
        let mut set = Ranges::default();
        for (start, length) in [(0, 10), (20, 10), (5, 20), (100, 1)] {
            set.add(start, length);
        }
        set.remove(0, 29, 1000);
        assert!(!set.is_empty());
        set.remove(29, 72, 1000);
        assert!(set.is_empty());
    }

    #[test]
    fn too_many_ranges_become_the_whole_store() {
        let mut set = Ranges::default();
        for n in 0..3 * MOST as u64 {
            set.add(n * 1024, 512);
        }
        assert!(set.all);
        set.remove(0, 999, 1000);
        assert!(!set.is_empty());
        set.remove(0, 1000, 1000);
        assert!(set.is_empty());
    }

    #[test]
    fn taking_out_the_middle_leaves_both_ends() {
        let mut set = Ranges::default();
        set.add(0, 30);
        set.remove(10, 10, 1000);
        set.remove(0, 10, 1000);
        assert!(!set.is_empty());
        set.remove(20, 10, 1000);
        assert!(set.is_empty());
    }
}
