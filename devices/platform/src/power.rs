//! Sleep control, reset and the power button: four ports of the hardware-reduced ACPI platform.
//!
//! | port | read | write |
//! | --- | --- | --- |
//! | +0 | sleep control: 0 | bit 5 with sleep type 5 in bits 2–4: power off (ACPI 6.5 §4.8.3.7) |
//! | +1 | sleep status: 0 | ignored |
//! | +2 | all ones | 1: reset the machine |
//! | +3 | pending events; reading clears them and lowers the line | ignored |
//!
//! Event bit 0 is the power button: [`PowerRegisters::press_power_button`] sets it and raises [`POWER_BUTTON_GSI`]. Bit 1 says that
//! PCI slots have something to tell.

use std::sync::{Mutex, MutexGuard, PoisonError};

use tenon_core::{IrqLine, Lifecycle, Region, Request, Requests};

/// The first of the four ports.
pub const POWER_PORT: u16 = 0x600;
/// How many ports.
pub const POWER_PORTS: u16 = 4;
/// The line that tells of events.
pub const POWER_BUTTON_GSI: u32 = 9;
/// The sleep type of S5, soft off.
pub(crate) const S5: u8 = 5;
/// The value that resets.
pub(crate) const RESET_VALUE: u8 = 1;

const CONTROL: u64 = 0;
const STATUS: u64 = 1;
const RESET: u64 = 2;
const EVENTS: u64 = 3;
const SLEEP_ENABLE: u8 = 1 << 5;

/// Event: the power button.
pub(crate) const BUTTON_EVENT: u8 = 1;
/// Event: PCI slots.
pub(crate) const SLOTS_EVENT: u8 = 2;

/// The registers. Accesses come on vCPU threads; the button is pressed from any thread.
pub struct PowerRegisters {
    requests: Requests,
    line: IrqLine,
    /// The pending events. The line follows them under this lock.
    events: Mutex<u8>,
}

impl PowerRegisters {
    /// Registers that ask through `requests` and tell of events by `line`, which is [`POWER_BUTTON_GSI`], level-triggered.
    #[must_use]
    pub fn new(requests: Requests, line: IrqLine) -> Self {
        Self { requests, line, events: Mutex::new(0) }
    }

    /// Asks the guest to shut down, as the button on a machine's case does.
    pub fn press_power_button(&self) {
        self.tell(BUTTON_EVENT);
    }

    /// Tells the guest to look at PCI's slots.
    pub(crate) fn tell_slots(&self) {
        self.tell(SLOTS_EVENT);
    }

    fn tell(&self, event: u8) {
        let mut events = self.events();
        *events |= event;
        self.line.set_level(true);
    }

    fn set_events(&self, value: u8) -> u8 {
        let mut events = self.events();
        self.line.set_level(value != 0);
        std::mem::replace(&mut events, value)
    }

    fn events(&self) -> MutexGuard<'_, u8> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_byte(&self, offset: u64) -> u8 {
        match offset {
            CONTROL | STATUS => 0,
            EVENTS => self.set_events(0),
            _ => 0xff,
        }
    }

    fn write_byte(&self, offset: u64, value: u8) {
        match offset {
            CONTROL if value & SLEEP_ENABLE != 0 && value >> 2 & 7 == S5 => {
                self.requests.send(Request::PowerOff)
            }
            RESET if value == RESET_VALUE => self.requests.send(Request::Reset),
            _ => {}
        }
    }
}

impl Region for PowerRegisters {
    fn read(&self, offset: u64, size: u8) -> u64 {
        (0..u64::from(size)).fold(0, |value, n| value | u64::from(self.read_byte(offset + n)) << (8 * n))
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        for (n, byte) in (0..u64::from(size)).zip(value.to_le_bytes()) {
            self.write_byte(offset + n, byte);
        }
    }
}

impl Lifecycle for PowerRegisters {
    fn name(&self) -> &'static str {
        "power"
    }

    fn reset(&self) {
        self.set_events(0);
    }

    fn save(&self) -> Result<(u32, Vec<u8>), String> {
        Ok((1, vec![*self.events()]))
    }

    fn restore(&self, schema: u32, data: &[u8]) -> Result<(), String> {
        let (1, [events @ 0..=3]) = (schema, data) else {
            return Err(format!(
                "power registers of schema {schema} with {} bytes; this version reads schema 1, 1 byte",
                data.len()
            ));
        };
        self.set_events(*events);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};
    use tenon_core::{InterruptController, Interrupts, Msi, Trigger};

    #[derive(Default)]
    struct Levels(Mutex<Vec<(u32, bool)>>);
    impl InterruptController for Levels {
        fn set_line(&self, gsi: u32, high: bool) {
            self.0.lock().unwrap().push((gsi, high));
        }
        fn signal_msi(&self, _: Msi) {}
    }

    fn registers() -> (PowerRegisters, Requests, Arc<Levels>) {
        let levels = Arc::new(Levels::default());
        let line =
            Interrupts::new(levels.clone()).line("power", Some(POWER_BUTTON_GSI), Trigger::Level).unwrap();
        let requests = Requests::new();
        (PowerRegisters::new(requests.clone(), line), requests, levels)
    }

    #[test]
    fn only_soft_off_powers_off_and_only_one_resets() {
        let (registers, requests, _) = registers();
        for value in (0..=255u64).filter(|v| v & 0x3c != 0x34) {
            registers.write(CONTROL, 1, value);
        }
        registers.write(RESET, 1, 2);
        assert!(requests.receiver().try_recv().is_err());
        registers.write(CONTROL, 1, 0x34);
        assert!(matches!(requests.receiver().try_recv(), Ok(Request::PowerOff)));
        registers.write(RESET, 1, 1);
        assert!(matches!(requests.receiver().try_recv(), Ok(Request::Reset)));
    }

    #[test]
    fn the_button_raises_its_line_until_the_events_are_read() {
        let (registers, _, levels) = registers();
        registers.press_power_button();
        assert_eq!(*levels.0.lock().unwrap(), [(9, true)]);
        assert_eq!(registers.read(EVENTS, 1), 1);
        assert_eq!(registers.read(EVENTS, 1), 0);
        assert_eq!(*levels.0.lock().unwrap(), [(9, true), (9, false)]);
    }
}
