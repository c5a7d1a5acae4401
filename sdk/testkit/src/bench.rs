//! The bench: one device, and the test in the place of its machine.

use tenon_sdk::device::{
    self, Config, Description, Device, Level, Request, Result, SavedState, Space, hosted,
};

use crate::outside::{LineState, Outside};

/// A device on the bench.
pub struct Bench<D> {
    config: Config,
    description: Description,
    outside: Outside,
    device: D,
}

impl<D: Device> Bench<D> {
    /// Describes and starts a device with these settings, at time 0.
    ///
    /// # Errors
    /// The device refuses.
    pub fn new(settings: &[(&str, &str)]) -> Result<Self> {
        let config = Config::new(settings.iter().copied());
        let description = D::describe(&config)?;
        let outside = Outside::new(&description);
        let device = start(&config, &description, &outside)?;
        Ok(Self { config, description, outside, device })
    }

    /// A new device with these settings that takes over a saved state, at time 0.
    ///
    /// # Errors
    /// The device refuses.
    pub fn restored(settings: &[(&str, &str)], state: &SavedState) -> Result<Self> {
        let mut bench = Self::new(settings)?;
        bench.restore(state)?;
        Ok(bench)
    }

    /// What the device asked for.
    #[must_use]
    pub fn description(&self) -> &Description {
        &self.description
    }

    /// The device itself.
    #[must_use]
    pub fn device(&self) -> &D {
        &self.device
    }

    /// A guest reads `size` bytes.
    ///
    /// # Panics
    /// The access is not one that a host lets through: outside the region, or of a size that its address space does not have.
    pub fn read(&mut self, region: u32, offset: u64, size: u8) -> u64 {
        self.check(region, offset, size);
        let value = self.call(|device| device.read(region, offset, size));
        value & ones(size)
    }

    /// A guest writes `size` bytes.
    ///
    /// # Panics
    /// As [`Bench::read`].
    pub fn write(&mut self, region: u32, offset: u64, size: u8, value: u64) {
        self.check(region, offset, size);
        self.call(|device| device.write(region, offset, size, value & ones(size)));
    }

    /// The state of an interrupt line.
    ///
    /// # Panics
    /// The device has no such line.
    #[must_use]
    pub fn line(&self, line: usize) -> LineState {
        self.outside.lines.borrow()[line]
    }

    /// Nanoseconds of the machine's clock.
    #[must_use]
    pub fn now(&self) -> u64 {
        self.outside.now.get()
    }

    /// Lets time pass, in nanoseconds. Timers fire on the way.
    pub fn advance(&mut self, nanoseconds: u64) {
        let end = self.now().saturating_add(nanoseconds);
        while let Some(timer) = self.outside.fire_next(end) {
            self.call(|device| device.timer_fired(timer));
        }
    }

    /// When a timer fires next, if it is armed.
    ///
    /// # Panics
    /// The device has no such timer.
    #[must_use]
    pub fn timer(&self, timer: usize) -> Option<u64> {
        self.outside.timers.borrow()[timer].map(|armed| armed.deadline)
    }

    /// Sets the time of day, in nanoseconds since 1970. It goes on with the machine's clock.
    pub fn set_wall_clock(&mut self, nanoseconds: u64) {
        self.outside.epoch.set(nanoseconds.saturating_sub(self.now()));
    }

    /// The far end of a channel.
    ///
    /// # Panics
    /// The device has no channel of this name.
    pub fn channel(&mut self, name: &str) -> ChannelEnd<'_, D> {
        let found = self.description.channels.iter().position(|channel| channel == name);
        let Some(index) = found else {
            panic!("the device has no channel `{name}`; it has {:?}", self.description.channels);
        };
        ChannelEnd { bench: self, index }
    }

    /// What the device asked the machine for first, if anything.
    #[must_use]
    pub fn request(&self) -> Option<Request> {
        self.outside.request.get()
    }

    /// Takes the messages logged since the last call.
    pub fn take_log(&mut self) -> Vec<(Level, String)> {
        std::mem::take(self.outside.log.get_mut())
    }

    /// Resets the device.
    pub fn reset(&mut self) {
        self.call(Device::reset);
    }

    /// Saves the device.
    ///
    /// # Panics
    /// The device refuses.
    #[must_use]
    pub fn save(&self) -> SavedState {
        match hosted::enter(&self.outside, || device::save(&self.device)) {
            Ok(state) => state,
            Err(error) => panic!("the device cannot be saved: {error}"),
        }
    }

    /// Puts a new device in the place of this one, and gives it the state of this one: what a host does after a crash, or for a new version.
    /// Time, channels and what is in them stay.
    ///
    /// # Panics
    /// The new device is not equal to the old one: it saves another state, holds another line high, or has other timers armed.
    pub fn round_trip(&mut self) {
        *self = self.forked();
    }

    /// A second device that is equal to this one, or a panic that says how it is not.
    pub(crate) fn forked(&self) -> Self {
        let fork = match self.fork() {
            Ok(fork) => fork,
            Err(error) => panic!("the device does not restore what it saved: {error}"),
        };
        let (old, new) = (self.save(), fork.save());
        assert!(new == old, "the restored device saves another state: {new:?}, not {old:?}");
        self.assert_same_outside(&fork, "the restored device");
        fork
    }

    /// A second device in a copy of this one's machine, with its state.
    fn fork(&self) -> Result<Self> {
        let mut fork = self.fresh()?;
        fork.restore(&self.save())?;
        let edges = self.outside.lines.borrow().iter().map(|line| line.edges).collect::<Vec<_>>();
        // A line that is raised again on restoring is no new edge in the count of the test.
        for (line, edges) in fork.outside.lines.borrow_mut().iter_mut().zip(edges) {
            line.edges = edges;
        }
        Ok(fork)
    }

    /// A second device in a copy of this one's machine, as after power-on.
    pub(crate) fn fresh(&self) -> Result<Self> {
        let outside = self.outside.clone();
        outside.detach();
        let device = start(&self.config, &self.description, &outside)?;
        Ok(Self { config: self.config.clone(), description: self.description.clone(), outside, device })
    }

    fn restore(&mut self, state: &SavedState) -> Result<()> {
        hosted::enter(&self.outside, || device::restore(&mut self.device, state))?;
        self.tell_channels();
        Ok(())
    }

    pub(crate) fn assert_same_outside(&self, other: &Self, who: &str) {
        let lines =
            |bench: &Self| bench.outside.lines.borrow().iter().map(|line| line.high).collect::<Vec<_>>();
        assert!(lines(self) == lines(other), "{who} holds lines {:?}, not {:?}", lines(other), lines(self));
        let (own, others) = (self.outside.timers.borrow(), other.outside.timers.borrow());
        assert!(*own == *others, "{who} has timers {others:?}, not {own:?}");
    }

    pub(crate) fn push(&mut self, index: usize, bytes: &[u8]) {
        self.outside.channels.get_mut()[index].input.extend(bytes);
        self.tell_channels();
    }

    pub(crate) fn output(&mut self, index: usize) -> Vec<u8> {
        std::mem::take(&mut self.outside.channels.get_mut()[index].output)
    }

    fn tell_channels(&mut self) {
        for index in 0..self.outside.channels.get_mut().len() {
            let channel = &mut self.outside.channels.get_mut()[index];
            if channel.notify && !channel.input.is_empty() {
                channel.notify = false;
                let index = u32::try_from(index).unwrap_or(u32::MAX);
                self.call(|device| device.channel_readable(index));
            }
        }
    }

    fn call<R>(&mut self, call: impl FnOnce(&mut D) -> R) -> R {
        let Self { outside, device, .. } = self;
        hosted::enter(outside, || call(device))
    }

    fn check(&self, region: u32, offset: u64, size: u8) {
        let Some(found) = self.description.regions.get(region as usize) else {
            panic!(
                "the device has {} regions, and the test uses number {region}",
                self.description.regions.len()
            );
        };
        let sizes: &[u8] = match found.space {
            Space::Pio => &[1, 2, 4],
            Space::Mmio => &[1, 2, 4, 8],
        };
        assert!(
            sizes.contains(&size),
            "an access has one of {sizes:?} bytes in `{}`, not {size}",
            found.name
        );
        let inside = offset.checked_add(size.into()).is_some_and(|end| end <= found.size);
        assert!(
            inside,
            "{size} bytes at {offset:#x} are not inside `{}` of {:#x} bytes",
            found.name, found.size
        );
    }
}

fn start<D: Device>(config: &Config, description: &Description, outside: &Outside) -> Result<D> {
    let count = |length: usize| u32::try_from(length).unwrap_or(u32::MAX);
    let (lines, channels) = (count(description.lines.len()), count(description.channels.len()));
    hosted::enter(outside, || D::start(config, hosted::attachment(lines, description.timers, channels)))
}

pub(crate) fn ones(size: u8) -> u64 {
    u64::MAX >> (64 - 8 * u32::from(size))
}

/// The far end of a channel.
pub struct ChannelEnd<'a, D> {
    bench: &'a mut Bench<D>,
    index: usize,
}

impl<D: Device> ChannelEnd<'_, D> {
    /// Sends bytes to the device. It is told of them if it read all before.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bench.push(self.index, bytes);
    }

    /// Takes what the device has written since the last call. That makes room for more.
    #[must_use]
    pub fn take_output(&mut self) -> Vec<u8> {
        self.bench.output(self.index)
    }

    /// How many bytes wait for the device.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.bench.outside.channels.borrow()[self.index].input.len()
    }

    /// How many bytes of output are taken before there is no more room; at first 64 KiB.
    pub fn set_capacity(&mut self, bytes: usize) {
        self.bench.outside.channels.get_mut()[self.index].capacity = bytes;
    }
}
