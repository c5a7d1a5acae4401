//! The files and folders that a device has open.

use std::collections::HashMap;
use std::fs::File;

use tenon_abi::{Access, Errno, Node, OpenFile};

/// The most files and folders that a device may have open.
pub const MOST_FILES: usize = 4096;

/// One of them.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) file: File,
    pub(crate) purpose: Purpose,
}

/// What it was opened for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Purpose {
    /// A file's data.
    Data(Access),
    /// The names in this folder.
    List(Node),
}

/// All of them.
#[derive(Debug)]
pub(crate) struct Files {
    open: HashMap<OpenFile, Opened>,
    next: u32,
    most: usize,
}

impl Files {
    /// None yet.
    pub(crate) fn new(most: usize) -> Self {
        Self { open: HashMap::new(), next: 0, most }
    }

    /// The most.
    pub(crate) fn most(&self) -> usize {
        self.most
    }

    /// There is room for one more.
    pub(crate) fn check_room(&self) -> Result<(), Errno> {
        if self.open.len() < self.most { Ok(()) } else { Err(Errno::NFILE) }
    }

    pub(crate) fn add(&mut self, opened: Opened) -> OpenFile {
        loop {
            let number = OpenFile(self.next);
            self.next = self.next.wrapping_add(1);
            if let std::collections::hash_map::Entry::Vacant(place) = self.open.entry(number) {
                place.insert(opened);
                return number;
            }
        }
    }

    pub(crate) fn get(&self, file: OpenFile) -> Result<&Opened, Errno> {
        self.open.get(&file).ok_or(Errno::BADF)
    }

    pub(crate) fn close(&mut self, file: OpenFile) -> Result<(), Errno> {
        self.open.remove(&file).map(drop).ok_or(Errno::BADF)
    }

    pub(crate) fn clear(&mut self) {
        self.open.clear();
    }

    pub(crate) fn count(&self) -> usize {
        self.open.len()
    }
}
