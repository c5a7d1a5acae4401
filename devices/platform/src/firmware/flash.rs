//! A flash chip of 4 KiB blocks for the firmware's variables, with the part of the Intel command set that firmware uses (Intel 297859, CFI set 1), on
//! a bus one byte wide.
//!
//! | command | then |
//! | --- | --- |
//! | 0xff | reads give the content |
//! | 0x70 | reads give the status |
//! | 0x50 | the status is cleared |
//! | 0x10 or 0x40 | the next write clears bits of one byte to what is written |
//! | 0x20, 0xd0 | the block of the second write becomes all ones |
//!
//! The chip is never busy. What it takes is in its [`FlashStore`] before it says that it is done: bytes that are programmed into one block one after the other are
//! kept together, as soon as the guest looks at the chip, gives another command, or turns to another block.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tenon_core::{Lifecycle, Region};

use crate::encode::{Reader, Writer};

const BLOCK: usize = 4096;
const READY: u8 = 1 << 7;
const ERASE_FAILED: u8 = 1 << 5;
const PROGRAM_FAILED: u8 = 1 << 4;
/// The commands that program a byte.
const PROGRAM: u8 = 0x10;
const PROGRAM_TOO: u8 = 0x40;
const SCHEMA: u32 = 1;

/// Where what a flash chip holds is kept when the machine is gone.
pub trait FlashStore: Send + Sync {
    /// Keeps bytes at an offset: whole blocks of 4 KiB, as a disk keeps them too. Called on a vCPU's thread.
    ///
    /// # Errors
    /// They cannot be kept; the guest is told that the write failed.
    fn keep(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;
}

impl FlashStore for std::fs::File {
    fn keep(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Content,
    Status,
    Program,
    Erase,
}

const MODES: [Mode; 4] = [Mode::Content, Mode::Status, Mode::Program, Mode::Erase];

struct State {
    content: Vec<u8>,
    mode: Mode,
    status: u8,
    /// A block with bytes that were programmed and are not yet in the store, and its content there.
    unkept: Option<(usize, Vec<u8>)>,
}

/// See the module.
pub struct Flash {
    store: Option<Box<dyn FlashStore>>,
    size: u64,
    state: Mutex<State>,
}

impl Flash {
    /// A chip with this content, a whole number of 4 KiB blocks; the rest of a last block is all ones. Without a store it is forgotten with the machine.
    #[must_use]
    pub fn new(mut content: Vec<u8>, store: Option<Box<dyn FlashStore>>) -> Self {
        content.resize(content.len().next_multiple_of(BLOCK), 0xff);
        let size = content.len() as u64;
        Self {
            store,
            size,
            state: Mutex::new(State { content, mode: Mode::Content, status: 0, unkept: None }),
        }
    }

    /// Its size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep(&self, offset: usize, bytes: &[u8]) -> bool {
        let Some(store) = &self.store else { return true };
        match store.keep(offset as u64, bytes) {
            Ok(()) => true,
            Err(error) => {
                tracing::error!("the firmware's variables cannot be kept: {error}");
                false
            }
        }
    }

    /// Keeps what was programmed, or forgets it and says so.
    fn settle(&self, state: &mut State) {
        let Some((block, before)) = state.unkept.take() else { return };
        let programmed = &mut state.content[block..block + BLOCK];
        if !self.keep(block, programmed) {
            programmed.copy_from_slice(&before);
            state.status |= PROGRAM_FAILED;
        }
    }

    fn command(&self, at: usize, byte: u8) {
        let mut state = self.state();
        let state = &mut *state;
        let goes_on = match state.mode {
            Mode::Program => {
                state.unkept.as_ref().is_some_and(|(block, _)| (*block..block + BLOCK).contains(&at))
            }
            _ => matches!(byte, PROGRAM | PROGRAM_TOO),
        };
        if !goes_on {
            self.settle(state);
        }
        state.mode = match (state.mode, byte) {
            (Mode::Program, _) => {
                let block = at / BLOCK * BLOCK;
                state.unkept.get_or_insert_with(|| (block, state.content[block..block + BLOCK].to_vec()));
                state.content[at] &= byte;
                state.status |= READY;
                Mode::Status
            }
            (Mode::Erase, 0xd0) => {
                let block = at / BLOCK * BLOCK;
                if self.keep(block, &[0xff; BLOCK]) {
                    state.content[block..block + BLOCK].fill(0xff);
                } else {
                    state.status |= ERASE_FAILED;
                }
                state.status |= READY;
                Mode::Status
            }
            (Mode::Erase, _) => {
                // A sequence that is none (both bits).
                state.status |= READY | ERASE_FAILED | PROGRAM_FAILED;
                Mode::Status
            }
            (_, PROGRAM | PROGRAM_TOO) => Mode::Program,
            (_, 0x20) => Mode::Erase,
            (_, 0x70) => Mode::Status,
            (mode, 0x50) => {
                state.status = 0;
                mode
            }
            _ => Mode::Content,
        };
    }
}

impl Region for Flash {
    fn read(&self, offset: u64, size: u8) -> u64 {
        let mut state = self.state();
        self.settle(&mut state);
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        let mut bytes = [0; 8];
        for (to, at) in bytes.iter_mut().zip(at..).take(size.into()) {
            *to = match state.mode {
                Mode::Content => state.content.get(at).copied().unwrap_or(0xff),
                _ => state.status,
            };
        }
        u64::from_le_bytes(bytes)
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        // The bus is one byte wide; a wider access is not one that the chip answers.
        if size == 1 && offset < self.size {
            self.command(usize::try_from(offset).unwrap_or(0), value.to_le_bytes()[0]);
        }
    }
}

impl Lifecycle for Flash {
    fn name(&self) -> &'static str {
        "flash"
    }

    fn reset(&self) {
        let mut state = self.state();
        self.settle(&mut state);
        (state.mode, state.status) = (Mode::Content, 0);
    }

    fn save(&self) -> Result<(u32, Vec<u8>), String> {
        let mut state = self.state();
        self.settle(&mut state);
        let mut out = Writer::default();
        out.u8(MODES.iter().position(|mode| *mode == state.mode).map_or(0, |n| n.to_le_bytes()[0]));
        out.u8(state.status);
        out.bytes(&state.content);
        Ok((SCHEMA, out.0))
    }

    /// Takes over the content too, for the saved guest goes by it, and keeps it.
    fn restore(&self, schema: u32, data: &[u8]) -> Result<(), String> {
        if schema != SCHEMA {
            return Err(format!("flash of schema {schema}; this version reads schema {SCHEMA}"));
        }
        let mut from = Reader(data);
        let mode = from.u8()?;
        let mode = *MODES.get(usize::from(mode)).ok_or_else(|| format!("flash in mode {mode}"))?;
        let (status, content) = (from.u8()?, from.bytes()?);
        from.end()?;
        if content.len() as u64 != self.size {
            return Err(format!("{} bytes of flash; this machine has {}", content.len(), self.size));
        }
        let mut state = self.state();
        self.settle(&mut state);
        if state.content != content && !self.keep(0, content) {
            return Err("the content of the flash cannot be kept".into());
        }
        *state = State { content: content.to_vec(), mode, status, unkept: None };
        Ok(())
    }
}

impl Drop for Flash {
    fn drop(&mut self) {
        let mut state = self.state();
        self.settle(&mut state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    type Kept = Arc<Mutex<Vec<(u64, Vec<u8>)>>>;

    struct Notes(Kept, Arc<AtomicBool>);

    impl FlashStore for Notes {
        fn keep(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
            if self.1.load(Ordering::Relaxed) {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.0.lock().unwrap().push((offset, bytes.to_vec()));
            Ok(())
        }
    }

    fn chip(content: Vec<u8>) -> (Flash, Kept, Arc<AtomicBool>) {
        let (kept, full) = (Kept::default(), Arc::new(AtomicBool::new(false)));
        (Flash::new(content, Some(Box::new(Notes(kept.clone(), full.clone())))), kept, full)
    }

    fn commands(chip: &Flash, list: &[(u64, u64)]) {
        list.iter().for_each(|(at, byte)| chip.write(*at, 1, *byte));
    }

    #[test]
    fn programming_clears_bits_and_erasing_sets_a_blocks() {
        let (chip, kept, _) = chip(vec![0xf0; 2 * BLOCK]);
        commands(&chip, &[(0x1001, 0x10), (0x1001, 0x3c)]);
        assert_eq!(chip.read(0, 1), u64::from(READY));
        commands(&chip, &[(0, 0xff)]);
        assert_eq!(chip.read(0x1000, 4), 0xf0f0_30f0);
        commands(&chip, &[(0x1234, 0x20), (0x1234, 0xd0), (0, 0xff)]);
        assert_eq!((chip.read(0xfff, 1), chip.read(0x1000, 8), chip.read(0x1fff, 1)), (0xf0, u64::MAX, 0xff));
        let mut block = vec![0xf0; BLOCK];
        block[1] = 0x30;
        assert_eq!(*kept.lock().unwrap(), [(0x1000, block), (0x1000, vec![0xff; BLOCK])]);
    }

    #[test]
    fn a_cleared_status_tells_flash_from_ram_and_rom() {
        let (chip, ..) = chip(vec![0x5a; BLOCK]);
        commands(&chip, &[(8, 0x50)]);
        assert_eq!(chip.read(8, 1), 0x5a);
        commands(&chip, &[(8, 0x70)]);
        assert_eq!(chip.read(8, 1), 0);
        commands(&chip, &[(8, 0xff)]);
        assert_eq!(chip.read(8, 1), 0x5a);
    }

    #[test]
    fn what_cannot_be_kept_is_not_taken_and_the_guest_is_told() {
        let (chip, kept, full) = chip(vec![0xff; BLOCK]);
        full.store(true, Ordering::Relaxed);
        commands(&chip, &[(0, 0x10), (0, 0)]);
        assert_eq!(chip.read(0, 1), u64::from(READY | PROGRAM_FAILED));
        commands(&chip, &[(0, 0x50), (0, 0x20), (0, 0xd0)]);
        assert_eq!(chip.read(0, 1), u64::from(READY | ERASE_FAILED));
        commands(&chip, &[(0, 0x20), (0, 0x11), (0, 0xff)]);
        assert_eq!(chip.read(0, 1), 0xff);
        assert!(kept.lock().unwrap().is_empty());
    }

    #[test]
    fn bytes_programmed_into_one_block_are_kept_together_and_before_anybody_looks() {
        let (chip, kept, full) = chip(vec![0xff; 2 * BLOCK]);
        let kept = || std::mem::take(&mut *kept.lock().unwrap());
        commands(&chip, &[(1, 0x10), (1, 1), (2, 0x10), (2, 2), (3, 0x40), (3, 3)]);
        assert!(kept().is_empty());
        assert_eq!(chip.read(0, 1), u64::from(READY));
        let all = kept();
        assert!(all.len() == 1 && all[0].1[..5] == [0xff, 1, 2, 3, 0xff], "{all:x?}");
        // Another block, and another command.
        commands(&chip, &[(4, 0x10), (4, 4), (0x1004, 0x10), (0x1004, 5)]);
        assert_eq!(kept().len(), 1);
        commands(&chip, &[(0, 0xff)]);
        assert_eq!(kept()[0].0, 0x1000);
        // What cannot be kept is forgotten together.
        commands(&chip, &[(5, 0x10), (5, 5), (6, 0x10), (6, 6)]);
        full.store(true, Ordering::Relaxed);
        assert_eq!(chip.read(0, 1), u64::from(READY | PROGRAM_FAILED));
        full.store(false, Ordering::Relaxed);
        commands(&chip, &[(0, 0xff)]);
        assert_eq!(chip.read(0, 8), 0xffff_ff04_0302_01ff);
        // The machine ends in the middle.
        commands(&chip, &[(7, 0x10), (7, 7)]);
        drop(chip);
        assert_eq!(kept().len(), 1);
    }

    #[test]
    fn a_chip_takes_over_content_and_mode_of_one_of_its_size() {
        let (from, ..) = chip(vec![0xff; BLOCK]);
        commands(&from, &[(3, 0x10), (3, 7), (3, 0x10)]);
        let (schema, saved) = from.save().unwrap();
        let (to, kept, _) = chip(vec![0xff; BLOCK]);
        to.restore(schema, &saved).unwrap();
        commands(&to, &[(4, 9), (0, 0xff)]);
        assert_eq!(to.read(0, 8), 0xffff_ff09_07ff_ffff);
        assert_eq!(kept.lock().unwrap().len(), 2);
        let (larger, ..) = chip(vec![0; 2 * BLOCK]);
        assert!(larger.restore(schema, &saved).is_err());
        assert!(to.restore(schema, &saved[..9]).is_err());
    }
}
