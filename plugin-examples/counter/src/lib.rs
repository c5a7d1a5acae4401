//! A counter that counts up once in a period and raises its interrupt line when it reaches a limit.
//!
//! Memory-mapped registers, 32 bits each; other accesses read as all ones and write nothing:
//!
//! | offset | register |
//! | --- | --- |
//! | 0x00 | COUNT: the count; a write sets it |
//! | 0x04 | LIMIT: the count at which the line is raised; 0 means never. The count goes on from 0 |
//! | 0x08 | PERIOD: microseconds from one count to the next; 0 stops the counter. A write begins a new period |
//! | 0x0c | STATUS: bit 0 is the line's level; writing it as 1 lowers the line |

use tenon_sdk::device::{
    Attachment, Config, Decoder, Description, Device, Encoder, Line, Result, Timer, Trigger, now,
};

/// The device.
pub struct Counter {
    line: Line,
    timer: Timer,
    count: u32,
    limit: u32,
    period: u32,
    raised: bool,
    /// When the next count is due, while the counter runs.
    due: Option<u64>,
}

tenon_sdk::export_device!(Counter);

impl Device for Counter {
    fn describe(config: &Config) -> Result<Description> {
        Ok(Description::new()
            .mmio("registers", Some(config.number("base")?.unwrap_or(0xd000_0000)), 0x1000)
            .line(Some(config.number("irq")?.unwrap_or(11)), Trigger::Level)
            .timer())
    }

    fn start(_config: &Config, mut attachment: Attachment) -> Result<Self> {
        let (line, timer) = (attachment.line()?, attachment.timer()?);
        Ok(Self { line, timer, count: 0, limit: 0, period: 0, raised: false, due: None })
    }

    fn read(&mut self, _region: u32, offset: u64, size: u8) -> u64 {
        match (offset, size) {
            (0x00, 4) => self.count.into(),
            (0x04, 4) => self.limit.into(),
            (0x08, 4) => self.period.into(),
            (0x0c, 4) => self.raised.into(),
            _ => u64::MAX,
        }
    }

    fn write(&mut self, _region: u32, offset: u64, size: u8, value: u64) {
        let value = value as u32;
        match (offset, size) {
            (0x00, 4) => self.count = value,
            (0x04, 4) => self.limit = value,
            (0x08, 4) => {
                self.period = value;
                self.due = (value > 0).then(|| now() + self.period());
                self.arm();
            }
            (0x0c, 4) if value & 1 == 1 => self.set_line(false),
            _ => {}
        }
    }

    fn timer_fired(&mut self, _timer: u32) {
        // The call may be one that was on its way when the guest changed the period. If it is late, it stands for several counts.
        let now = now();
        let Some(due) = self.due.filter(|due| *due <= now) else { return };
        let counts = (now - due) / self.period() + 1;
        self.due = Some(due + counts * self.period());
        self.arm();
        self.add(counts);
    }

    fn reset(&mut self) {
        (self.count, self.limit, self.period, self.due) = (0, 0, 0, None);
        self.set_line(false);
        self.arm();
    }

    fn save(&self, state: &mut Encoder) -> Result<()> {
        state.u32(self.count).u32(self.limit).u32(self.period).bool(self.raised).option(self.due);
        Ok(())
    }

    fn restore(&mut self, state: &mut Decoder<'_>) -> Result<()> {
        (self.count, self.limit, self.period) = (state.u32()?, state.u32()?, state.u32()?);
        let raised = state.bool()?;
        self.due = state.option()?;
        if self.due.is_some() != (self.period > 0) || self.due > Some(1 << 63) {
            return Err(state.invalid("the period and the time of the next count do not go together"));
        }
        self.set_line(raised);
        self.arm();
        Ok(())
    }
}

impl Counter {
    /// The period in nanoseconds; at least 1 µs.
    fn period(&self) -> u64 {
        u64::from(self.period.max(1)) * 1_000
    }

    fn add(&mut self, counts: u64) {
        let count = u64::from(self.count) + counts;
        if self.limit > 0 && count >= self.limit.into() {
            self.count = (count % u64::from(self.limit)) as u32;
            self.set_line(true);
        } else {
            self.count = count as u32;
        }
    }

    fn set_line(&mut self, high: bool) {
        self.raised = high;
        self.line.set_level(high);
    }

    fn arm(&self) {
        match self.due {
            Some(due) => self.timer.arm(due),
            None => self.timer.cancel(),
        }
    }
}
