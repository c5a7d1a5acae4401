//! Where what was changed is: an entry of 64 bits for each 64 KiB of the copy.
//!
//! The low 16 bits of an entry say which of the cluster's 16 grains (4 KiB) were changed, the others in which cluster of the store for changes they are. Cluster 0 is none, and
//! the highest number stands for one that is all zeroes and takes no space. The grains that were not changed are the base's.
//!
//! The entries of the table are read in pages when they are needed first. Those that were changed stay in memory until [`Map::changed_pages`] were written.

use std::collections::{BTreeMap, BTreeSet};

/// The unit of what was changed.
pub const GRAIN: u64 = 4096;
/// A cluster of zeroes.
const ZEROES: u64 = (1 << 48) - 1;

/// An entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry(pub u64);

impl Entry {
    /// The entry of a cluster with these grains.
    #[must_use]
    pub fn of(cluster: u64, grains: u16) -> Self {
        Self(cluster << 16 | u64::from(grains))
    }

    /// The entry of grains that are zeroes.
    #[must_use]
    pub fn zeroes(grains: u16) -> Self {
        Self::of(ZEROES, grains)
    }

    /// The grains that were changed.
    #[must_use]
    pub fn grains(self) -> u16 {
        u16::try_from(self.0 & 0xffff).unwrap_or(0)
    }

    /// The cluster that they are in.
    #[must_use]
    pub fn cluster(self) -> Option<u64> {
        let cluster = self.0 >> 16;
        (cluster != 0 && cluster != ZEROES).then_some(cluster)
    }

    /// Those of the grains that are zeroes without a cluster.
    #[must_use]
    pub fn zero_grains(self) -> u16 {
        if self.0 >> 16 == ZEROES { self.grains() } else { 0 }
    }

    /// Whether it can be, if clusters from `first` up to `next` are in use.
    #[must_use]
    pub fn can_be(self, first: u64, next: u64) -> bool {
        match self.cluster() {
            Some(cluster) => (first..next).contains(&cluster),
            None => self.0 == 0 || self.0 >> 16 == ZEROES,
        }
    }
}

/// The entries that are in memory.
pub struct Map {
    /// Entries in a page.
    per_page: usize,
    pages: BTreeMap<u64, Vec<Entry>>,
    changed: BTreeSet<u64>,
}

impl Map {
    /// Nothing is in memory, of a table with pages of this many bytes.
    #[must_use]
    pub fn new(page: u64) -> Self {
        let per_page = usize::try_from(page / 8).unwrap_or(512);
        Self { per_page, pages: BTreeMap::new(), changed: BTreeSet::new() }
    }

    fn place(&self, number: u64) -> (u64, usize) {
        let per_page = self.per_page as u64;
        (number / per_page, usize::try_from(number % per_page).unwrap_or(0))
    }

    /// The page that an entry is on.
    #[must_use]
    pub fn page_of(&self, number: u64) -> u64 {
        self.place(number).0
    }

    /// An entry, if its page is in memory.
    #[must_use]
    pub fn get(&self, number: u64) -> Option<Entry> {
        let (page, at) = self.place(number);
        self.pages.get(&page)?.get(at).copied()
    }

    /// A page as it is stored.
    #[must_use]
    pub fn encode(&self, page: u64) -> Vec<u8> {
        self.pages.get(&page).into_iter().flatten().flat_map(|entry| entry.0.to_le_bytes()).collect()
    }

    /// Takes a page that was read.
    ///
    /// # Errors
    /// An entry cannot be; which, and what it says.
    pub fn load(&mut self, page: u64, bytes: &[u8], first: u64, next: u64) -> Result<(), (u64, u64)> {
        let entries = bytes.as_chunks::<8>().0.iter().map(|eight| Entry(u64::from_le_bytes(*eight)));
        let mut entries: Vec<Entry> = entries.collect();
        entries.resize(self.per_page, Entry::default());
        if let Some(at) = entries.iter().position(|entry| !entry.can_be(first, next)) {
            return Err((page * self.per_page as u64 + at as u64, entries[at].0));
        }
        self.pages.insert(page, entries);
        Ok(())
    }

    /// Changes an entry whose page is in memory.
    pub fn set(&mut self, number: u64, entry: Entry) {
        let (page, at) = self.place(number);
        if let Some(place) = self.pages.get_mut(&page).and_then(|page| page.get_mut(at))
            && *place != entry
        {
            *place = entry;
            self.changed.insert(number);
        }
    }

    /// The pages with entries that were changed.
    #[must_use]
    pub fn changed_pages(&self) -> Vec<u64> {
        let mut pages: Vec<u64> = self.changed.iter().map(|number| self.page_of(*number)).collect();
        pages.dedup();
        pages
    }

    /// The entries that were changed.
    pub fn changed(&self) -> impl ExactSizeIterator<Item = (u64, Entry)> {
        self.changed.iter().map(|number| (*number, self.get(*number).unwrap_or_default()))
    }

    /// The changed entries are in the table now.
    pub fn settle(&mut self) {
        self.changed.clear();
    }
}
