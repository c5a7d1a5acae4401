//! MSI-X (PCI 3.0 §6.8.2): the table of messages, the pending bits, and masks.

use std::sync::Arc;

use tenon_core::{InterruptController, Msi};

use crate::encode::{Reader, Writer};

/// The most vectors of a function.
pub(crate) const MAX_VECTORS: u16 = 512;
/// The bytes of a table entry.
pub(crate) const ENTRY: u64 = 16;
/// Bits of the capability's control word.
pub(crate) const ENABLE: u16 = 1 << 15;
pub(crate) const MASK_ALL: u16 = 1 << 14;

const MASKED: u32 = 1;

#[derive(Clone, Copy)]
struct Entry {
    /// Address low and high, data, control.
    words: [u32; 4],
    is_pending: bool,
}

const POWER_ON: Entry = Entry { words: [0, 0, 0, MASKED], is_pending: false };

/// The vectors of a function.
pub(crate) struct Msix {
    entries: Vec<Entry>,
    /// The control word's upper bits: [`ENABLE`], [`MASK_ALL`].
    control: u16,
    controller: Arc<dyn InterruptController>,
}

impl Msix {
    /// `vectors` is at most [`MAX_VECTORS`]; with none, it cannot be enabled.
    pub(crate) fn new(vectors: u16, controller: Arc<dyn InterruptController>) -> Self {
        Self { entries: vec![POWER_ON; vectors.into()], control: 0, controller }
    }

    pub(crate) fn reset(&mut self) {
        self.entries.fill(POWER_ON);
        self.control = 0;
    }

    pub(crate) fn is_enabled(&self) -> bool {
        self.control & ENABLE != 0
    }

    /// Whether there is such a vector.
    pub(crate) fn has(&self, vector: u16) -> bool {
        usize::from(vector) < self.entries.len()
    }

    pub(crate) fn set_control(&mut self, control: u16) {
        self.control = if self.entries.is_empty() { 0 } else { control & (ENABLE | MASK_ALL) };
        (0..self.entries.len()).for_each(|n| self.deliver_pending(n));
    }

    /// Delivers a vector, or notes it as pending where it is masked. Vectors that do not exist are passed over.
    pub(crate) fn signal(&mut self, vector: u16) {
        if let Some(entry) = self.entries.get_mut(usize::from(vector)) {
            entry.is_pending = true;
            self.deliver_pending(vector.into());
        }
    }

    fn deliver_pending(&mut self, number: usize) {
        let entry = &mut self.entries[number];
        let [low, high, data, control] = entry.words;
        if entry.is_pending && self.control & (ENABLE | MASK_ALL) == ENABLE && control & MASKED == 0 {
            entry.is_pending = false;
            self.controller.signal_msi(Msi { address: u64::from(high) << 32 | u64::from(low), data });
        }
    }

    /// The 32-bit word of the table at this index.
    pub(crate) fn table(&self, word: usize) -> u32 {
        self.entries.get(word / 4).map_or(0, |entry| entry.words[word % 4])
    }

    pub(crate) fn set_table(&mut self, word: usize, value: u32) {
        if let Some(entry) = self.entries.get_mut(word / 4) {
            entry.words[word % 4] = match word % 4 {
                0 => value & !3,
                3 => value & MASKED,
                _ => value,
            };
            self.deliver_pending(word / 4);
        }
    }

    /// 32 pending bits.
    pub(crate) fn pending(&self, word: usize) -> u32 {
        let bits = self.entries.iter().skip(word * 32).take(32);
        bits.enumerate().fold(0, |bits, (n, entry)| bits | u32::from(entry.is_pending) << n)
    }

    pub(crate) fn save(&self, out: &mut Writer) {
        out.u16(self.control);
        out.count(self.entries.len());
        for entry in &self.entries {
            entry.words.iter().for_each(|word| out.u32(*word));
            out.u8(entry.is_pending.into());
        }
    }

    pub(crate) fn restore(&mut self, from: &mut Reader) -> Result<(), String> {
        let control = from.u16()? & (ENABLE | MASK_ALL);
        let count = from.count()?;
        if count != self.entries.len() {
            return Err(format!("{count} MSI-X vectors; the device has {}", self.entries.len()));
        }
        for entry in &mut self.entries {
            for word in &mut entry.words {
                *word = from.u32()?;
            }
            entry.is_pending = from.u8()? != 0;
        }
        self.control = control;
        Ok(())
    }
}
