//! Interrupt lines and message-signalled interrupts, as a device holds them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// The engine's interrupt controller.
pub trait InterruptController: Send + Sync {
    /// Sets the level of global system interrupt `gsi`. Called from any thread. A GSI that does not exist is ignored.
    fn set_line(&self, gsi: u32, high: bool);

    /// Delivers a message-signalled interrupt. Called from any thread.
    fn signal_msi(&self, msi: Msi);
}

/// A message-signalled interrupt: what a device writes, and where (Intel SDM vol. 3 §11.11).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Msi {
    /// The guest-physical address of the write, in 0xfee00000 to 0xfeefffff.
    pub address: u64,
    /// The data written.
    pub data: u32,
}

/// How a line is wired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// The controller latches a change from low to high. The line has one owner.
    Edge,
    /// The controller looks at the level. Owners share the line: it is high while any of them holds it high.
    Level,
}

/// A line that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    /// The number is past the controller's last input.
    #[error("GSI {gsi} does not exist; the interrupt controller has GSI 0 to {}", Interrupts::LINES - 1)]
    Range {
        /// The number asked for.
        gsi: u32,
    },
    /// Another device owns it and does not share.
    #[error("GSI {gsi} is taken by `{owner}`, and edge-triggered lines are not shared")]
    Taken {
        /// The number asked for.
        gsi: u32,
        /// Who has it.
        owner: String,
    },
    /// Every line is taken.
    #[error("every GSI from {} to {} is taken", Interrupts::FIRST_FREE, Interrupts::LINES - 1)]
    Exhausted,
}

struct LineUse {
    trigger: Trigger,
    owners: Vec<String>,
    high: u32,
}

/// The machine's lines: who owns which, and the one way to the controller.
pub struct Interrupts {
    controller: Arc<dyn InterruptController>,
    lines: Mutex<HashMap<u32, LineUse>>,
}

impl Interrupts {
    /// The number of GSIs.
    pub const LINES: u32 = 24;
    /// Where the search for a free line begins; those below have traditional owners.
    pub const FIRST_FREE: u32 = 16;

    /// Lines into this controller.
    #[must_use]
    pub fn new(controller: Arc<dyn InterruptController>) -> Arc<Self> {
        Arc::new(Self { controller, lines: Mutex::new(HashMap::new()) })
    }

    /// Gives `owner` the line `gsi`, or a free one.
    ///
    /// # Errors
    /// The line does not exist, or has an owner that does not share it.
    pub fn line(
        self: &Arc<Self>,
        owner: &str,
        gsi: Option<u32>,
        trigger: Trigger,
    ) -> Result<IrqLine, LineError> {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        let gsi = match gsi {
            Some(gsi) if gsi >= Self::LINES => return Err(LineError::Range { gsi }),
            Some(gsi) => gsi,
            None => (Self::FIRST_FREE..Self::LINES)
                .find(|gsi| !lines.contains_key(gsi))
                .ok_or(LineError::Exhausted)?,
        };
        if let Some(line) = lines.get(&gsi)
            && (line.trigger == Trigger::Edge || trigger == Trigger::Edge)
        {
            return Err(LineError::Taken { gsi, owner: line.owners.join("`, `") });
        }
        let line = lines.entry(gsi).or_insert(LineUse { trigger, owners: Vec::new(), high: 0 });
        line.owners.push(owner.to_owned());
        Ok(IrqLine { interrupts: self.clone(), gsi, owner: owner.to_owned(), high: Mutex::new(false) })
    }

    /// The controller, for message-signalled interrupts.
    #[must_use]
    pub fn controller(&self) -> &Arc<dyn InterruptController> {
        &self.controller
    }
}

/// One owner's end of an interrupt line. Dropping it lowers the line and gives it back.
pub struct IrqLine {
    interrupts: Arc<Interrupts>,
    gsi: u32,
    owner: String,
    high: Mutex<bool>,
}

impl IrqLine {
    /// The global system interrupt.
    #[must_use]
    pub fn gsi(&self) -> u32 {
        self.gsi
    }

    /// Sets the owner's own level. The line is high while any owner holds it high. Called from any thread.
    pub fn set_level(&self, high: bool) {
        let mut own = self.high.lock().unwrap_or_else(PoisonError::into_inner);
        if *own == high {
            return;
        }
        *own = high;
        let mut lines = self.interrupts.lines.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(line) = lines.get_mut(&self.gsi) else { return };
        let before = line.high > 0;
        line.high = if high { line.high + 1 } else { line.high.saturating_sub(1) };
        let after = line.high > 0;
        if before != after {
            self.interrupts.controller.set_line(self.gsi, after);
        }
    }

    /// Raises and lowers the line.
    pub fn pulse(&self) {
        self.set_level(true);
        self.set_level(false);
    }
}

impl Drop for IrqLine {
    fn drop(&mut self) {
        self.set_level(false);
        let mut lines = self.interrupts.lines.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(line) = lines.get_mut(&self.gsi) {
            if let Some(n) = line.owners.iter().position(|owner| *owner == self.owner) {
                line.owners.swap_remove(n);
            }
            if line.owners.is_empty() {
                lines.remove(&self.gsi);
            }
        }
    }
}
