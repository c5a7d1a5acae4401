//! Device plugin: a traditional virtio memory balloon (virtio 1.2 §5.5).
//!
//! - **Inflate**: the driver names pages that it will not touch; the host takes them back. **Deflate** needs nothing: a page that was given back reads as zeroes and is
//!   taken again when the guest touches it, so the driver need not wait to be told (no MUST_TELL_HOST).
//! - **Target**: the setting `target` is the memory that the guest is to keep; the rest goes into the balloon, as far as the driver follows. It can be adjusted.
//! - **Statistics** are asked for every `stats-interval` seconds, kept in the state, and logged for the developer. The driver gives them once by itself.
//! - **Free page reporting**: pages that the guest does not use are given back without being asked for.
//!
//! Free page hinting (a help for migration) and page poisoning are not offered.

mod stats;

use tenon_sdk::virtio::{
    self, Answer, Attachment, Batch, Config, Decoder, Encoder, Error, Handle, Request, Result, Timer,
    VirtioDescription, VirtioDevice, debug,
};

use crate::stats::Stats;

const DEVICE_TYPE: u16 = 5;

const F_STATS_VQ: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_REPORTING: u64 = 1 << 5;

const CONFIG_SIZE: u16 = 8;
/// The offset of the only field that a driver writes: how many pages are in the balloon.
const ACTUAL: u32 = 4;

/// The unit of the balloon, whatever the guest's pages are.
const PAGE: u64 = 4096;
const SECOND: u64 = 1_000_000_000;
/// The longest time between two questions for statistics, in seconds.
const MAX_INTERVAL: u64 = 3600;

/// The balloon.
pub struct Balloon {
    timer: Timer,
    /// How many pages are to be in the balloon.
    pages: u32,
    /// How many the driver says there are.
    actual: u32,
    /// Seconds between two questions for statistics; 0 is never.
    interval: u64,
    /// When the next is due, in nanoseconds of the machine's clock.
    due: Option<u64>,
    /// The request by which the driver gave its last statistics. It comes back when new ones are wanted.
    held: Option<Handle>,
    stats: Stats,
    /// What the driver accepted, once it is ready.
    features: Option<u64>,
}

tenon_sdk::export_virtio_device!(Balloon);

/// What a queue is for.
enum Role {
    Inflate,
    Deflate,
    Stats,
    Reporting,
}

/// How many pages are to be in the balloon so that the guest keeps what the setting says.
fn pages(config: &Config) -> Result<u32> {
    let memory = virtio::memory_size();
    let keep = config.size("target")?.unwrap_or(memory);
    if keep > memory {
        return Err(Error::Invalid(format!(
            "`target` is {keep} bytes, but the guest has no more than {memory}"
        )));
    }
    Ok(u32::try_from((memory - keep) / PAGE).unwrap_or(u32::MAX))
}

fn interval(config: &Config) -> Result<u64> {
    Ok(config.number_in("stats-interval", 0..=MAX_INTERVAL)?.unwrap_or(0))
}

impl VirtioDevice for Balloon {
    fn describe(config: &Config) -> Result<VirtioDescription> {
        interval(config)?;
        config.size("target")?;
        let on_oom = config.boolean("deflate-on-oom")?.unwrap_or(true);
        let description = VirtioDescription::new(DEVICE_TYPE)
            .features(F_STATS_VQ | F_REPORTING | if on_oom { F_DEFLATE_ON_OOM } else { 0 })
            .config(CONFIG_SIZE)
            .timer();
        Ok(["inflate", "deflate", "stats", "reporting-3", "reporting"]
            .into_iter()
            .fold(description, |description, name| description.queue(name, 128, 0)))
    }

    fn start(config: &Config, mut attachment: Attachment) -> Result<Self> {
        Ok(Self {
            timer: attachment.timer()?,
            pages: pages(config)?,
            actual: 0,
            interval: interval(config)?,
            due: None,
            held: None,
            stats: Stats::default(),
            features: None,
        })
    }

    fn activate(&mut self, features: u64) -> Result<()> {
        self.features = Some(features);
        self.ask_later();
        Ok(())
    }

    fn config_read(&mut self, offset: u32, size: u8) -> u64 {
        let mut space = [0; CONFIG_SIZE as usize];
        space[0..4].copy_from_slice(&self.pages.to_le_bytes());
        space[4..8].copy_from_slice(&self.actual.to_le_bytes());
        virtio::field(&space, offset, size)
    }

    fn config_write(&mut self, offset: u32, size: u8, value: u64) {
        if (offset, size) == (ACTUAL, 4) {
            let [a, b, c, d, ..] = value.to_le_bytes();
            self.actual = u32::from_le_bytes([a, b, c, d]);
            debug!("the balloon has {} of {} pages", self.actual, self.pages);
        }
    }

    fn requests_ready(&mut self, queue: u16, batch: &Batch<'_>) {
        let role = self.role(queue);
        let mut answers = Vec::with_capacity(batch.len());
        for request in batch.iter() {
            match role {
                Role::Inflate => {
                    virtio::release_numbered(request.handle);
                }
                Role::Reporting => {
                    virtio::release_own(request.handle);
                }
                Role::Deflate => {}
                Role::Stats => {
                    // A driver has one such request; of more, the last is kept.
                    answers.extend(self.take_stats(&request));
                    continue;
                }
            }
            answers.push(Answer { request: request.handle, written: 0 });
        }
        virtio::complete_all(&answers);
    }

    fn timer_fired(&mut self, _timer: u32) {
        // A call may come after the timer was cancelled.
        if self.due.is_some_and(|due| due <= virtio::now()) {
            if let Some(request) = self.held.take() {
                virtio::complete(request, 0);
            }
            self.ask_later();
        }
    }

    fn adjust(&mut self, key: &str, value: &str) -> Result<()> {
        let config = Config::new([(key, value)]);
        match key {
            "target" => {
                let pages = pages(&config)?;
                if self.pages != pages {
                    self.pages = pages;
                    virtio::config_changed();
                }
            }
            "stats-interval" => {
                self.interval = interval(&config)?;
                self.ask_later();
            }
            _ => {
                return Err(Error::Unsupported(format!(
                    "`{key}` cannot be changed while the guest runs; `target` and `stats-interval` can"
                )));
            }
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.features = None;
        self.actual = 0;
        self.held = None;
        self.stats = Stats::default();
        self.ask_later();
    }

    fn save(&self, state: &mut Encoder) -> Result<()> {
        state.option(self.features).u32(self.pages).u32(self.actual);
        state.u64(self.interval).option(self.due);
        self.stats.save(state);
        Ok(())
    }

    fn restore(&mut self, state: &mut Decoder<'_>) -> Result<()> {
        self.features = state.option()?;
        self.pages = state.u32()?;
        self.actual = state.u32()?;
        self.interval = state.u64()?;
        if self.interval > MAX_INTERVAL {
            return Err(state.invalid("the interval is longer than any can be"));
        }
        self.due = state.option()?;
        self.stats = Stats::restore(state)?;
        self.arm();
        Ok(())
    }
}

impl Balloon {
    fn accepted(&self, feature: u64) -> bool {
        self.features.is_some_and(|features| features & feature != 0)
    }

    /// The specification numbers queues as if all of them were there; Linux leaves out those whose feature was not accepted, and counts on. With free page hinting never
    /// offered, both can be told apart.
    fn role(&self, queue: u16) -> Role {
        match queue {
            0 => Role::Inflate,
            1 => Role::Deflate,
            2 if self.accepted(F_STATS_VQ) => Role::Stats,
            _ => Role::Reporting,
        }
    }

    /// Takes the driver's statistics. Gives the answer to the request that was held before.
    fn take_stats(&mut self, request: &Request<'_>) -> Option<Answer> {
        let length = request.readable.min(stats::MOST);
        self.stats = Stats::parse(&virtio::read(request.handle, 0, length));
        debug!("the guest's memory: {}", self.stats);
        self.held.replace(request.handle).map(|request| Answer { request, written: 0 })
    }

    /// Sets the time of the next question for statistics.
    fn ask_later(&mut self) {
        let asks = self.interval > 0 && self.accepted(F_STATS_VQ);
        self.due = asks.then(|| virtio::now().saturating_add(self.interval * SECOND));
        self.arm();
    }

    fn arm(&self) {
        match self.due {
            Some(due) => self.timer.arm(due),
            None => self.timer.cancel(),
        }
    }
}
