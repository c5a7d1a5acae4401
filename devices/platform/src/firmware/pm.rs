//! The power management registers of the PIIX4 (Intel 290562, ch. 7): status, enable and control, and the timer by which firmware measures time.
//!
//! The guest's operating system does not know them: its ACPI tables name the platform's own power registers.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tenon_core::{Clock, Lifecycle, Region, Request, Requests};

/// Where they are. The function's base register says so and cannot be changed.
pub(crate) const PORT: u16 = 0xb000;
/// How many ports are answered.
pub(crate) const PORTS: u64 = 12;
/// The PM timer's frequency in Hz, and its width in bits.
const FREQUENCY: u128 = 3_579_545;
const BITS: u32 = 24;

const ENABLE: u64 = 2;
const CONTROL: u64 = 4;
const TIMER: u64 = 8;
const SLEEP_ENABLE: u16 = 1 << 13;
const SLEEP_TYPE: u16 = 7 << 10;
/// The bits of the control register that stay: SCI enable, bus master reload, sleep type.
const CONTROL_KEPT: u16 = SLEEP_TYPE | 3;

#[derive(Clone, Copy, Default)]
struct Registers {
    enable: u16,
    control: u16,
}

/// See the module.
pub(crate) struct PmRegisters {
    clock: Arc<Clock>,
    requests: Requests,
    registers: Mutex<Registers>,
}

impl PmRegisters {
    pub(crate) fn new(clock: Arc<Clock>, requests: Requests) -> Self {
        Self { clock, requests, registers: Mutex::default() }
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn timer(&self) -> u32 {
        let ticks = u128::from(self.clock.now()) * FREQUENCY / 1_000_000_000;
        u32::try_from(ticks & ((1 << BITS) - 1)).unwrap_or(0)
    }
}

impl Region for PmRegisters {
    fn read(&self, offset: u64, _: u8) -> u64 {
        let registers = self.registers();
        // What an access leaves out at its end is cut off by the bus.
        let (from, value) = match offset {
            ENABLE..CONTROL => (ENABLE, registers.enable.into()),
            CONTROL..6 => (CONTROL, registers.control.into()),
            TIMER.. => (TIMER, self.timer().into()),
            // Nothing ever happens.
            _ => (offset, 0),
        };
        value >> (8 * (offset - from))
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        let mut registers = self.registers();
        let value = u16::try_from(value & 0xffff).unwrap_or(0);
        match (offset, size) {
            (ENABLE, 2) => registers.enable = value,
            (CONTROL, 2) => {
                registers.control = value & CONTROL_KEPT;
                // Sleep type 0 is soft off on this chip.
                if value & (SLEEP_ENABLE | SLEEP_TYPE) == SLEEP_ENABLE {
                    self.requests.send(Request::PowerOff);
                }
            }
            _ => {}
        }
    }
}

impl Lifecycle for PmRegisters {
    fn name(&self) -> &'static str {
        "pm"
    }

    fn reset(&self) {
        *self.registers() = Registers::default();
    }

    fn save(&self) -> Result<(u32, Vec<u8>), String> {
        let registers = *self.registers();
        Ok((1, [registers.enable.to_le_bytes(), registers.control.to_le_bytes()].concat()))
    }

    fn restore(&self, schema: u32, data: &[u8]) -> Result<(), String> {
        let (1, &[e0, e1, c0, c1]) = (schema, data) else {
            return Err(format!(
                "PM registers of schema {schema} with {} bytes; this version reads schema 1, 4 bytes",
                data.len()
            ));
        };
        let control = u16::from_le_bytes([c0, c1]) & CONTROL_KEPT;
        *self.registers() = Registers { enable: u16::from_le_bytes([e0, e1]), control };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_timer_follows_the_machines_clock_and_wraps_at_24_bits() {
        let clock = Clock::virtual_time();
        let pm = PmRegisters::new(clock.clone(), Requests::new());
        assert_eq!(pm.read(TIMER, 4), 0);
        clock.advance_to(1_000_000_000);
        assert_eq!(pm.read(TIMER, 4), 3_579_545);
        assert_eq!(pm.read(TIMER + 1, 1) & 0xff, 3_579_545 >> 8 & 0xff);
        clock.advance_to(5_000_000_000);
        assert_eq!(pm.read(TIMER, 4), 5 * 3_579_545 - (1 << 24));
    }

    #[test]
    fn only_soft_off_with_sleep_enable_powers_off() {
        let requests = Requests::new();
        let pm = PmRegisters::new(Clock::virtual_time(), requests.clone());
        pm.write(CONTROL, 2, 1);
        pm.write(CONTROL, 2, 1 << 13 | 1 << 10);
        assert!(requests.receiver().try_recv().is_err());
        assert_eq!(pm.read(CONTROL, 2), 1 << 10);
        pm.write(CONTROL, 2, 1 << 13 | 1);
        assert!(matches!(requests.receiver().try_recv(), Ok(Request::PowerOff)));
        let (schema, saved) = pm.save().unwrap();
        pm.reset();
        assert_eq!(pm.read(CONTROL, 2), 0);
        pm.restore(schema, &saved).unwrap();
        assert_eq!(pm.read(CONTROL, 2), 1);
        assert!(pm.restore(2, &saved).is_err() && pm.restore(1, &saved[1..]).is_err());
    }
}
