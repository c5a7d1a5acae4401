//! Device plugin: an MC146818 real-time clock, as in every PC: ports 0x70 (index) and 0x71 (data), interrupt line 8, ACPI node `PNP0B00`.
//!
//! - The time of day is the host's, in UTC, moved by whatever the guest set. BCD or binary, 12 or 24 hours, century at 0x32.
//! - Alarm, periodic and update-ended interrupts. They cost nothing while they are off: the one timer is armed for the next interrupt
//!   that is enabled and not pending, and flags are computed when they are read.
//! - The update-in-progress bit is set in the last 2.2 ms of each second, and never while the guest sets the clock. The time is the same whenever
//!   it is read, so reading it then does no harm.
//! - 114 bytes of CMOS RAM less the century. They and the time that the guest set last until the machine is reset, as with a new battery.
//!
//! Not there: daylight saving (the bit is kept and does nothing), the square-wave output, and what a PC's firmware stores in the RAM.

mod calendar;
mod chip;

use tenon_sdk::device::{
    Attachment, Config, Decoder, Description, Device, Encoder, Line, Result, Timer, Trigger, now, wall_clock,
};

use crate::chip::{Chip, Now};

const INDEX_PORT: u64 = 0;
const DATA_PORT: u64 = 1;
const IRQ: u32 = 8;

/// The real-time clock.
pub struct Rtc {
    chip: Chip,
    /// The register that the data port shows.
    index: u8,
    line: Line,
    timer: Timer,
    /// What the line and the timer were last set to.
    level: bool,
    deadline: Option<u64>,
}

tenon_sdk::export_device!(Rtc);

impl Device for Rtc {
    fn describe(_config: &Config) -> Result<Description> {
        Ok(Description::new()
            .pio("registers", 0x70, 2)
            .line(Some(IRQ), Trigger::Edge)
            .timer()
            .acpi("PNP0B00", 0))
    }

    fn start(_config: &Config, mut attachment: Attachment) -> Result<Self> {
        Ok(Self {
            chip: Chip::new(moment()),
            index: 0,
            line: attachment.line()?,
            timer: attachment.timer()?,
            level: false,
            deadline: None,
        })
    }

    fn read(&mut self, _region: u32, offset: u64, size: u8) -> u64 {
        let mut value = u64::MAX;
        // The index port cannot be read; the data port is one byte wide.
        if offset <= DATA_PORT && offset + u64::from(size) > DATA_PORT {
            let shift = 8 * (DATA_PORT - offset);
            let now = moment();
            let byte = self.chip.read(self.index, now);
            value = value & !(0xff << shift) | u64::from(byte) << shift;
            self.update(now);
        }
        value
    }

    fn write(&mut self, _region: u32, offset: u64, size: u8, value: u64) {
        for (byte, port) in value.to_le_bytes().into_iter().take(size.into()).zip(offset..) {
            match port {
                // The top bit masks NMIs on a PC.
                INDEX_PORT => self.index = byte & 0x7f,
                DATA_PORT => {
                    let now = moment();
                    self.chip.write(self.index, byte, now);
                    self.update(now);
                }
                _ => {}
            }
        }
    }

    fn timer_fired(&mut self, _timer: u32) {
        self.deadline = None;
        let now = moment();
        self.chip.advance(now);
        self.update(now);
    }

    fn reset(&mut self) {
        let now = moment();
        self.chip = Chip::new(now);
        self.index = 0;
        self.drive(now);
    }

    fn save(&self, state: &mut Encoder) -> Result<()> {
        state.u8(self.index);
        self.chip.save(state);
        Ok(())
    }

    fn restore(&mut self, state: &mut Decoder<'_>) -> Result<()> {
        self.index = state.u8()? & 0x7f;
        self.chip = Chip::restore(state)?;
        self.drive(moment());
        Ok(())
    }
}

impl Rtc {
    /// Tells the host what has changed.
    fn update(&mut self, now: Now) {
        let level = self.chip.interrupt();
        if level != self.level {
            self.level = level;
            self.line.set_level(level);
        }
        let deadline = self.chip.next_event(now);
        if deadline != self.deadline {
            self.deadline = deadline;
            match deadline {
                Some(deadline) => self.timer.arm(deadline),
                None => self.timer.cancel(),
            }
        }
    }

    /// Tells the host everything, whatever it knows.
    fn drive(&mut self, now: Now) {
        self.level = self.chip.interrupt();
        self.line.set_level(self.level);
        self.deadline = None;
        self.timer.cancel();
        self.update(now);
    }
}

fn moment() -> Now {
    Now { machine: now(), wall: wall_clock() }
}
