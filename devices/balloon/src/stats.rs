//! Memory statistics of the driver (virtio 1.2 §5.5.6.3): a list of tags, each with a value.

use std::fmt;

use tenon_sdk::virtio::{Decoder, Encoder, Result};

/// The length of an entry: a tag of 2 bytes and a value of 8.
const ENTRY: usize = 10;
/// The tags that are kept: those that drivers know today, and a few more.
const TAGS: usize = 16;
/// The most bytes of a list that are looked at.
pub(crate) const MOST: u32 = 1024;

const FREE: usize = 4;
const TOTAL: usize = 5;
const AVAILABLE: usize = 6;

/// The latest statistics, by tag. Sizes are in bytes, the others are counts since the guest started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Stats([Option<u64>; TAGS]);

impl Stats {
    /// Reads what the driver gave. Tags that nobody knows, and a last entry that is not whole, are passed over; of two with the same tag the later counts.
    pub(crate) fn parse(bytes: &[u8]) -> Self {
        let mut stats = Self::default();
        let (entries, _) = bytes.as_chunks::<ENTRY>();
        for [low, high, value @ ..] in entries {
            let tag = usize::from(u16::from_le_bytes([*low, *high]));
            if let Some(slot) = stats.0.get_mut(tag) {
                *slot = Some(u64::from_le_bytes(*value));
            }
        }
        stats
    }

    pub(crate) fn save(&self, state: &mut Encoder) {
        self.0.iter().for_each(|value| {
            state.option(*value);
        });
    }

    pub(crate) fn restore(state: &mut Decoder<'_>) -> Result<Self> {
        let mut stats = Self::default();
        for slot in &mut stats.0 {
            *slot = state.option()?;
        }
        Ok(stats)
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut first = true;
        for (tag, name) in [(FREE, "free"), (AVAILABLE, "available"), (TOTAL, "in all")] {
            if let Some(bytes) = self.0[tag] {
                write!(f, "{}{} MiB {name}", if first { "" } else { ", " }, bytes >> 20)?;
                first = false;
            }
        }
        if first { f.write_str("nothing") } else { Ok(()) }
    }
}
