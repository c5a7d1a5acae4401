//! The chip: time of day, alarm, interrupts, RAM (Motorola MC146818A data sheet, 1984).
//!
//! It knows no host: the time is passed in with every call. Nothing ticks. Flags are set when somebody looks ([`Chip::advance`]), for everything that
//! happened since the last look; [`Chip::next_event`] says when an interrupt is due, so that somebody looks then.

use tenon_sdk::device::{Decoder, Encoder, Result};

use crate::calendar::{DAY, Date};

/// The number of registers.
pub(crate) const REGISTERS: usize = 128;
/// The RAM begins behind register D.
const RAM: usize = 0x0e;
/// A PC keeps the century here.
const CENTURY: u8 = 0x32;

const REGISTER_A: u8 = 0x0a;
const REGISTER_B: u8 = 0x0b;
const REGISTER_C: u8 = 0x0c;
const REGISTER_D: u8 = 0x0d;

const A_UPDATE_IN_PROGRESS: u8 = 1 << 7;
const A_DIVIDER: u8 = 0x70;
/// The divider counts a 32.768 kHz crystal, the only one in PCs.
const A_DIVIDER_RUNS: u8 = 0x20;
const A_RATE: u8 = 0x0f;
const B_SET: u8 = 1 << 7;
const B_UPDATE_INTERRUPT: u8 = 1 << 4;
const B_BINARY: u8 = 1 << 2;
const B_24_HOURS: u8 = 1 << 1;
/// Enable bits in register B and flags in register C have the same places.
const PERIODIC: u8 = 1 << 6;
const ALARM: u8 = 1 << 5;
const UPDATED: u8 = 1 << 4;
const FLAGS: u8 = PERIODIC | ALARM | UPDATED;
const C_INTERRUPT: u8 = 1 << 7;
/// The RAM and the time are valid: the battery is good.
const D_VALID: u8 = 1 << 7;

/// An alarm field from here up matches every value.
const ANY: u8 = 0xc0;
const HOUR_PM: u8 = 1 << 7;

const SECOND: i128 = 1_000_000_000;
/// The last 244 µs before an update and the 1,984 µs that it takes on a 32.768 kHz crystal.
const UPDATE: i128 = 2_228_000;
const CRYSTAL: u128 = 32_768;
/// Times that exist, in seconds: more than ten thousand years before and after 1970.
const SECONDS: std::ops::RangeInclusive<i64> = -(1 << 40)..=1 << 40;

/// Both clocks at one moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Now {
    /// Nanoseconds of the machine's clock: it counts the periodic interrupt.
    pub(crate) machine: u64,
    /// Nanoseconds since 1970: it counts the time of day.
    pub(crate) wall: u64,
}

/// The time of day.
#[derive(Clone, Copy, Debug)]
enum Time {
    /// It is the host's, plus so many nanoseconds.
    Running(i128),
    /// The guest holds it in order to set it. Where in the second the clock goes on, relative to the host's, is kept.
    Held { date: Date, phase: i128 },
}

/// An MC146818.
#[derive(Clone, Debug)]
pub(crate) struct Chip {
    a: u8,
    b: u8,
    /// Flags of register C.
    flags: u8,
    /// The alarm's second, minute and hour, as written.
    alarm: [u8; 3],
    ram: [u8; REGISTERS - RAM],
    time: Time,
    /// Up to when the flags are true: on the machine's clock, and in seconds of the time of day.
    looked: (u64, i64),
}

impl Chip {
    /// A chip with a new battery, set to the host's UTC.
    pub(crate) fn new(now: Now) -> Self {
        let mut chip = Self {
            // 1,024 Hz.
            a: A_DIVIDER_RUNS | 6,
            b: B_24_HOURS,
            flags: 0,
            alarm: [0; 3],
            ram: [0; REGISTERS - RAM],
            time: Time::Running(0),
            looked: (now.machine, 0),
        };
        chip.looked.1 = chip.seconds(now);
        chip
    }

    /// The guest reads a register.
    pub(crate) fn read(&mut self, register: u8, now: Now) -> u8 {
        self.advance(now);
        match register {
            1 | 3 | 5 => self.alarm[usize::from(register / 2)],
            0..=9 | CENTURY => self.time_field(register, now),
            REGISTER_A => self.a | if self.updating(now) { A_UPDATE_IN_PROGRESS } else { 0 },
            REGISTER_B => self.b,
            REGISTER_C => {
                let interrupt = if self.interrupt() { C_INTERRUPT } else { 0 };
                std::mem::take(&mut self.flags) | interrupt
            }
            REGISTER_D => D_VALID,
            _ => self.ram.get(usize::from(register) - RAM).copied().unwrap_or(0xff),
        }
    }

    /// The guest writes a register.
    pub(crate) fn write(&mut self, register: u8, value: u8, now: Now) {
        self.advance(now);
        match register {
            1 | 3 | 5 => self.alarm[usize::from(register / 2)] = value,
            0..=9 | CENTURY => self.set_time_field(register, value, now),
            REGISTER_A => {
                let was_reset = self.divider_reset();
                self.a = value & !A_UPDATE_IN_PROGRESS;
                self.hold_or_run(was_reset, now);
            }
            REGISTER_B => {
                self.b = if value & B_SET == 0 { value } else { value & !B_UPDATE_INTERRUPT };
                self.hold_or_run(false, now);
            }
            REGISTER_C | REGISTER_D => {}
            _ => {
                if let Some(byte) = self.ram.get_mut(usize::from(register) - RAM) {
                    *byte = value;
                }
            }
        }
    }

    /// Sets the flags of everything that happened since the last look.
    pub(crate) fn advance(&mut self, now: Now) {
        let (machine, second) = self.looked;
        if let Some(period) = self.period()
            && ticks(now.machine) / period > ticks(machine) / period
        {
            self.flags |= PERIODIC;
        }
        let seconds = self.seconds(now);
        if seconds > second && matches!(self.time, Time::Running(_)) {
            self.flags |= UPDATED;
            if self.next_alarm(second).is_some_and(|alarm| alarm <= seconds) {
                self.flags |= ALARM;
            }
        }
        self.looked = (now.machine, seconds);
    }

    /// The level of the interrupt line.
    pub(crate) fn interrupt(&self) -> bool {
        self.flags & self.b & FLAGS != 0
    }

    /// When on the machine's clock an enabled interrupt is due that is not pending yet: the first one after the last look, which may have
    /// passed. It follows from the state, so that a restored chip waits for the same moment.
    pub(crate) fn next_event(&self, now: Now) -> Option<u64> {
        let wanted = |flag| self.b & flag != 0 && self.flags & flag == 0;
        let periodic = self.period().filter(|_| wanted(PERIODIC)).map(|period| {
            let tick = (ticks(self.looked.0) / period + 1) * period;
            u64::try_from((tick * 1_000_000_000).div_ceil(CRYSTAL)).unwrap_or(u64::MAX)
        });
        let Time::Running(offset) = self.time else {
            return periodic;
        };
        // Both clocks run alike: what is a second after midnight on one is as long after its own midnight on the other.
        let ahead = i128::from(now.machine) - (i128::from(now.wall) + offset);
        let due =
            |second: i64| u64::try_from((i128::from(second) * SECOND + ahead).max(0)).unwrap_or(u64::MAX);
        let second = self.looked.1;
        let update = wanted(UPDATED).then(|| due(second + 1));
        let alarm = if wanted(ALARM) { self.next_alarm(second).map(due) } else { None };
        [periodic, update, alarm].into_iter().flatten().min()
    }

    /// The period of the periodic interrupt, in ticks of the crystal.
    fn period(&self) -> Option<u128> {
        match self.a & A_RATE {
            _ if self.a & A_DIVIDER != A_DIVIDER_RUNS => None,
            0 => None,
            // The two fastest rates of this crystal are made from other taps of the divider.
            rate @ 1..=2 => Some(1 << (rate + 6)),
            rate => Some(1 << (rate - 1)),
        }
    }

    fn divider_reset(&self) -> bool {
        self.a & A_DIVIDER != A_DIVIDER_RUNS
    }

    /// The last moments before the second changes, when the data sheet forbids to read the time.
    fn updating(&self, now: Now) -> bool {
        match self.time {
            Time::Running(offset) => (i128::from(now.wall) + offset).rem_euclid(SECOND) >= SECOND - UPDATE,
            Time::Held { .. } => false,
        }
    }

    /// The time of day in whole seconds.
    fn seconds(&self, now: Now) -> i64 {
        match self.time {
            Time::Running(offset) => {
                i64::try_from((i128::from(now.wall) + offset).div_euclid(SECOND)).unwrap_or(0)
            }
            Time::Held { date, .. } => date.to_seconds(),
        }
    }

    /// Holds the time while the guest sets it or keeps the divider in reset, and lets it run otherwise.
    fn hold_or_run(&mut self, was_reset: bool, now: Now) {
        let hold = self.b & B_SET != 0 || self.divider_reset();
        match self.time {
            Time::Running(offset) if hold => {
                let date = Date::from_seconds(self.seconds(now));
                self.time = Time::Held { date, phase: offset.rem_euclid(SECOND) };
            }
            Time::Held { date, .. } if was_reset && !self.divider_reset() => {
                // The first update comes half a second after the divider starts.
                let phase = (SECOND / 2 - i128::from(now.wall)).rem_euclid(SECOND);
                self.time = Time::Held { date, phase };
                self.hold_or_run(false, now);
            }
            Time::Held { date, phase } if !hold => {
                let fraction = (i128::from(now.wall) + phase).rem_euclid(SECOND);
                let target = i128::from(date.to_seconds()) * SECOND + fraction;
                self.time = Time::Running(target - i128::from(now.wall));
                self.looked.1 = self.seconds(now);
            }
            _ => {}
        }
    }

    fn time_field(&self, register: u8, now: Now) -> u8 {
        let date = match self.time {
            Time::Running(_) => Date::from_seconds(self.seconds(now)),
            Time::Held { date, .. } => date,
        };
        let value = match register {
            0 => date.second,
            2 => date.minute,
            4 => return self.encode_hour(date.hour),
            6 => date.weekday(),
            7 => date.day,
            8 => date.month,
            9 => u8::try_from(date.year % 100).unwrap_or(0),
            _ => u8::try_from(date.year / 100).unwrap_or(99),
        };
        self.encode(value)
    }

    fn set_time_field(&mut self, register: u8, value: u8, now: Now) {
        let mut date = match self.time {
            Time::Running(_) => Date::from_seconds(self.seconds(now)),
            Time::Held { date, .. } => date,
        };
        let number = self.decode(value);
        match register {
            0 => date.second = number,
            2 => date.minute = number,
            4 => date.hour = self.decode_hour(value),
            // The day of the week follows from the date.
            6 => return,
            7 => date.day = number,
            8 => date.month = number,
            9 => date.year = date.year / 100 * 100 + u16::from(number.min(99)),
            _ => date.year = u16::from(number.min(99)) * 100 + date.year % 100,
        }
        match &mut self.time {
            Time::Held { date: held, .. } => *held = date,
            Time::Running(offset) => {
                let before = (i128::from(now.wall) + *offset).div_euclid(SECOND);
                *offset += (i128::from(date.to_seconds()) - before) * SECOND;
                self.looked.1 = self.seconds(now);
            }
        }
    }

    /// The first second after `after` that the alarm matches; none, if it is set to a time that does not exist.
    fn next_alarm(&self, after: i64) -> Option<i64> {
        let [second, minute, hour] = self.alarm;
        let wanted = |raw: u8, value: u8| (raw < ANY).then_some(i64::from(value));
        let hour = wanted(hour, self.decode_hour(hour));
        let minute = wanted(minute, self.decode(minute));
        let second = wanted(second, self.decode(second));
        let mut at = after + 1;
        // Whole hours and minutes that do not match are skipped, so these are at most some 150 steps.
        while at <= after + DAY {
            let of_day = at.rem_euclid(DAY);
            if hour.is_some_and(|hour| hour != of_day / 3600) {
                at += 3600 - of_day % 3600;
            } else if minute.is_some_and(|minute| minute != of_day / 60 % 60) {
                at += 60 - of_day % 60;
            } else if second.is_some_and(|second| second != of_day % 60) {
                at += 1;
            } else {
                return Some(at);
            }
        }
        None
    }

    fn encode(&self, value: u8) -> u8 {
        if self.b & B_BINARY != 0 { value } else { ((value / 10) << 4) | (value % 10) }
    }

    fn decode(&self, raw: u8) -> u8 {
        if self.b & B_BINARY != 0 { raw } else { (raw >> 4) * 10 + (raw & 0x0f) }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.b & B_24_HOURS != 0 {
            return self.encode(hour);
        }
        let of_twelve = if hour.is_multiple_of(12) { 12 } else { hour % 12 };
        self.encode(of_twelve) | if hour >= 12 { HOUR_PM } else { 0 }
    }

    fn decode_hour(&self, raw: u8) -> u8 {
        if self.b & B_24_HOURS != 0 {
            return self.decode(raw);
        }
        let hour = self.decode(raw & !HOUR_PM) % 12;
        if raw & HOUR_PM != 0 { hour + 12 } else { hour }
    }

    /// Writes the state, schema 1.
    pub(crate) fn save(&self, state: &mut Encoder) {
        state.raw(&[self.a, self.b, self.flags]).raw(&self.alarm).raw(&self.ram);
        state.u64(self.looked.0).i64(self.looked.1);
        match self.time {
            Time::Running(offset) => {
                state.bool(true);
                save_offset(state, offset);
            }
            Time::Held { date, phase } => {
                state.bool(false).u16(date.year);
                state.raw(&[date.month, date.day, date.hour, date.minute, date.second]);
                save_offset(state, phase);
            }
        }
    }

    /// Reads a state.
    pub(crate) fn restore(state: &mut Decoder<'_>) -> Result<Self> {
        let [a, b, flags] = state.array()?;
        let chip = Self {
            a: a & !A_UPDATE_IN_PROGRESS,
            b,
            flags: flags & FLAGS,
            alarm: state.array()?,
            ram: state.array()?,
            looked: (state.u64()?, state.i64()?),
            time: if state.bool()? {
                Time::Running(restore_offset(state)?)
            } else {
                let year = state.u16()?.min(9999);
                let [month, day, hour, minute, second] = state.array()?;
                let date = Date { year, month, day, hour, minute, second };
                Time::Held { date, phase: restore_offset(state)? }
            },
        };
        if !SECONDS.contains(&chip.looked.1) {
            return Err(state.invalid("the clock was looked at in a time that does not exist"));
        }
        Ok(chip)
    }
}

/// Ticks of the crystal since the machine's clock began.
fn ticks(machine: u64) -> u128 {
    u128::from(machine) * CRYSTAL / 1_000_000_000
}

fn save_offset(state: &mut Encoder, offset: i128) {
    // Dates have four-digit years: the seconds are small.
    state.i64(i64::try_from(offset.div_euclid(SECOND)).unwrap_or(0));
    state.u32(u32::try_from(offset.rem_euclid(SECOND)).unwrap_or(0));
}

fn restore_offset(state: &mut Decoder<'_>) -> Result<i128> {
    let seconds = state.i64()?;
    let nanoseconds = state.u32()?;
    if !SECONDS.contains(&seconds) || i128::from(nanoseconds) >= SECOND {
        return Err(state.invalid("the clock is set to a time that does not exist"));
    }
    Ok(i128::from(seconds) * SECOND + i128::from(nanoseconds))
}
