//! The I/O APIC: 24 inputs, each with a redirection entry (Intel 82093AA; version 0x20 with the EOI register).
//!
//! Lines come from any thread. The lock is held while a message goes to the local APICs, so that a line's edges keep their order.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::irqchip::{IrqChip, Message};

/// Where the registers are.
pub(crate) const IOAPIC_BASE: u64 = 0xfec0_0000;
/// How many addresses they take.
pub(crate) const IOAPIC_SIZE: u64 = 0x1000;

const PINS: usize = 24;
const VERSION: u32 = 0x20;
/// The version of the saved form.
const SCHEMA: u8 = 1;

const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
/// Bits of a redirection entry that the guest writes: vector, delivery mode, destination mode, polarity, trigger mode, mask, destination.
const WRITABLE: u64 = 0xff00_0000_0001_afff;

struct State {
    select: u8,
    id: u8,
    entries: [u64; PINS],
    /// The level of each line, a bit per pin.
    lines: u32,
}

/// The I/O APIC.
pub(crate) struct IoApic(Mutex<State>);

impl State {
    fn after_reset() -> Self {
        Self { select: 0, id: 0, entries: [MASKED; PINS], lines: 0 }
    }

    fn deliver(&mut self, chip: &IrqChip, pin: usize) {
        let entry = self.entries[pin];
        let level = entry & LEVEL != 0;
        if entry & MASKED != 0 || level && entry & REMOTE_IRR != 0 {
            return;
        }
        let [data, .., destination] = entry.to_le_bytes();
        let data = u32::from(data) | (u32::from(entry.to_le_bytes()[1]) & 7) << 8;
        let message = Message::from_bus(data, level, destination, entry >> 11 & 1 != 0);
        if message.is_some_and(|message| chip.send(message)) && level {
            self.entries[pin] |= REMOTE_IRR;
        }
    }

    /// Delivers a level-triggered pin that is still or again high.
    fn look_at_level(&mut self, chip: &IrqChip, pin: usize) {
        if self.entries[pin] & LEVEL != 0 && self.lines >> pin & 1 != 0 {
            self.deliver(chip, pin);
        }
    }

    fn end_of_interrupt(&mut self, chip: &IrqChip, vector: u8) {
        for pin in 0..PINS {
            let entry = self.entries[pin];
            if entry & REMOTE_IRR != 0 && entry.to_le_bytes()[0] == vector {
                self.entries[pin] &= !REMOTE_IRR;
                self.look_at_level(chip, pin);
            }
        }
    }
}

impl IoApic {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(State::after_reset()))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state after power-on. The levels of the lines are those of the devices, and stay.
    pub(crate) fn reset(&self) {
        let mut state = self.lock();
        *state = State { lines: state.lines, ..State::after_reset() };
    }

    /// Sets a line's level. A pin that does not exist is ignored. An edge while the entry is masked is lost, as on the real part.
    pub(crate) fn set_line(&self, chip: &IrqChip, gsi: u32, high: bool) {
        let Some(pin) = usize::try_from(gsi).ok().filter(|pin| *pin < PINS) else { return };
        let mut state = self.lock();
        let was = state.lines >> pin & 1 != 0;
        if high {
            state.lines |= 1 << pin;
        } else {
            state.lines &= !(1 << pin);
        }
        if high && !was {
            state.deliver(chip, pin);
        }
    }

    /// A local APIC has ended a level-triggered interrupt.
    pub(crate) fn end_of_interrupt(&self, chip: &IrqChip, vector: u8) {
        self.lock().end_of_interrupt(chip, vector);
    }

    pub(crate) fn read(&self, offset: u64) -> u32 {
        let state = self.lock();
        match offset {
            0x00 => state.select.into(),
            0x10 => match state.select {
                0 | 2 => u32::from(state.id) << 24,
                #[allow(clippy::cast_possible_truncation, reason = "23")]
                1 => VERSION | (PINS as u32 - 1) << 16,
                select => match entry_of(select) {
                    #[allow(clippy::cast_possible_truncation, reason = "one half of the entry")]
                    Some((pin, shift)) => (state.entries[pin] >> shift) as u32,
                    None => u32::MAX,
                },
            },
            _ => 0,
        }
    }

    pub(crate) fn write(&self, chip: &IrqChip, offset: u64, value: u32) {
        let mut state = self.lock();
        let byte = value.to_le_bytes()[0];
        match (offset, state.select) {
            (0x00, _) => state.select = byte,
            (0x10, 0) => state.id = value.to_le_bytes()[3] & 0xf,
            (0x10, select) => {
                let Some((pin, shift)) = entry_of(select) else { return };
                let old = state.entries[pin];
                let writable = WRITABLE & 0xffff_ffff << shift;
                let mut entry = old & !writable | u64::from(value) << shift & writable;
                if entry & LEVEL == 0 {
                    // Drivers switch to edge and back to clear a remote IRR that got stuck.
                    entry &= !REMOTE_IRR;
                }
                state.entries[pin] = entry;
                state.look_at_level(chip, pin);
            }
            (0x40, _) => state.end_of_interrupt(chip, byte),
            _ => {}
        }
    }

    pub(crate) fn save(&self) -> Vec<u8> {
        let state = self.lock();
        let mut bytes = vec![SCHEMA, state.select, state.id];
        bytes.extend(state.lines.to_le_bytes());
        state.entries.iter().for_each(|entry| bytes.extend(entry.to_le_bytes()));
        bytes
    }

    pub(crate) fn restore(&self, saved: &[u8]) -> Result<(), String> {
        match saved.first() {
            Some(&SCHEMA) => {}
            Some(other) => {
                return Err(format!(
                    "the I/O APIC's state has version {other}; this engine reads version {SCHEMA}"
                ));
            }
            None => return Err("the I/O APIC's state is empty".into()),
        }
        let (Some(head), Some(entries)) = (saved.get(1..7), saved.get(7..).filter(|e| e.len() == PINS * 8))
        else {
            return Err(format!(
                "the I/O APIC's state has {} bytes instead of {}",
                saved.len(),
                7 + PINS * 8
            ));
        };
        let mut state = self.lock();
        state.select = head[0];
        state.id = head[1] & 0xf;
        state.lines = u32::from_le_bytes([head[2], head[3], head[4], head[5]]) & 0xff_ffff;
        for (entry, bytes) in state.entries.iter_mut().zip(entries.chunks_exact(8)) {
            let bytes = <[u8; 8]>::try_from(bytes).unwrap_or_default();
            *entry = u64::from_le_bytes(bytes) & (WRITABLE | REMOTE_IRR);
        }
        Ok(())
    }
}

/// The pin and the half that an index register value selects.
fn entry_of(select: u8) -> Option<(usize, u32)> {
    let n = usize::from(select.checked_sub(0x10)?);
    (n < 2 * PINS).then_some((n / 2, if n.is_multiple_of(2) { 0 } else { 32 }))
}
