//! A virtio device as a PCI function (virtio 1.2 §4.1): configuration space, one BAR with all registers, MSI-X or INTx.
//!
//! | BAR offset | registers |
//! | --- | --- |
//! | 0x0000 | common configuration |
//! | 0x1000 | interrupt status |
//! | 0x2000 | the device's configuration |
//! | 0x3000 | doorbells, 4 bytes for each queue |
//! | 0x4000 | MSI-X table |
//! | 0x6000 | MSI-X pending bits |
//!
//! Accesses come on vCPU threads, at the same time. The locks here are never held while another one is taken above them: configuration
//! space, then nothing; registers, then status and interrupts.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tenon_core::{Bus, Claim, InterruptController, IrqLine, QueueDevice, QueueProfile, Ram, Region};

use super::doorbell::{Doorbells, Hung, Ring};
use super::registers::Registers;
use super::session::Live;
use crate::encode::{Reader, Writer};
use crate::pci::PciError;
use crate::pci::config::{
    COMMAND, CONFIG_SIZE, Config, INTERRUPT_STATUS, INTX_DISABLE, Identity, MEMORY_ENABLE, STATUS,
};
use crate::pci::msix::{ENTRY, MAX_VECTORS, Msix};

/// The length of the BAR.
pub(crate) const BAR_SIZE: u64 = 0x8000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const TABLE: u64 = 0x4000;
const PENDING: u64 = 0x6000;
/// The distance of doorbells.
const NOTIFY_STEP: u16 = 4;
/// As many as there are doorbells for.
const MAX_QUEUES: usize = 1024;

const VENDOR: u16 = 0x1af4;
/// Device ids of virtio 1 are this plus the device type.
const MODERN: u16 = 0x1040;
const CAP_VENDOR: u8 = 9;
const CAP_MSIX: u8 = 0x11;
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

/// A function in a slot.
pub(crate) struct Function {
    name: String,
    device: Arc<dyn QueueDevice>,
    config_size: u64,
    queues: usize,
    registers: Registers,
    live: Arc<Live>,
    mmio: Arc<Bus>,
    config: Mutex<Config>,
    power_on: Config,
    /// Where the MSI-X capability is, if there is one, and the window into the BAR.
    msix_at: Option<usize>,
    window_at: usize,
    place: Mutex<Option<Place>>,
    doorbells: Option<Arc<Doorbells>>,
    me: Weak<Function>,
}

/// Where the BAR is on the bus.
struct Place {
    claim: Claim,
    _bells: Vec<Hung>,
}

/// What a function is made with.
pub(crate) struct Wiring<'a> {
    pub(crate) ram: &'a Arc<Ram>,
    pub(crate) mmio: &'a Arc<Bus>,
    pub(crate) controller: &'a Arc<dyn InterruptController>,
    pub(crate) line: IrqLine,
    pub(crate) doorbells: Option<Arc<Doorbells>>,
    /// Whether it has MSI-X. Without it interrupts come by the line.
    pub(crate) has_msix: bool,
    /// Where the BAR is at power-on.
    pub(crate) base: u64,
}

fn identity(device_type: u16) -> Identity {
    let class = match device_type {
        1 => 0x02_0000,
        2 => 0x01_0000,
        3 => 0x07_8000,
        _ => 0x00_ff00,
    };
    let device = MODERN + device_type;
    Identity { vendor: VENDOR, device, subsystem_vendor: VENDOR, subsystem: device, revision: 1, class }
}

fn check(name: &str, profile: &QueueProfile) -> Result<(), PciError> {
    let wrong = |what: String| Err(PciError::Profile { name: name.to_owned(), what });
    if profile.device_type == 0 || profile.device_type > 63 {
        return wrong(format!("device type {} is not 1 to 63", profile.device_type));
    }
    if profile.queues.is_empty() || profile.queues.len() > MAX_QUEUES {
        return wrong(format!("{} queues are not 1 to {MAX_QUEUES}", profile.queues.len()));
    }
    if let Some(size) = profile.queues.iter().find(|size| !size.is_power_of_two() || **size > 32768) {
        return wrong(format!("a queue of {size} entries is no power of two from 1 to 32768"));
    }
    if profile.config_size > 4096 {
        return wrong(format!("a configuration space of {} bytes is more than 4096", profile.config_size));
    }
    Ok(())
}

impl Function {
    pub(crate) fn new(
        name: &str,
        device: Arc<dyn QueueDevice>,
        wiring: Wiring,
    ) -> Result<Arc<Self>, PciError> {
        let profile = device.profile().clone();
        check(name, &profile)?;
        let vectors = if wiring.has_msix { profile.queues.len() + 1 } else { 0 };
        let vectors = u16::try_from(vectors).unwrap_or(MAX_VECTORS).min(MAX_VECTORS);
        let mut config = Config::new(identity(profile.device_type));
        config.add_bar(BAR_SIZE, wiring.base);
        config.add_interrupt(wiring.line.gsi().to_le_bytes()[0]);
        config.put(COMMAND, &MEMORY_ENABLE.to_le_bytes());
        let msix_at = vectors.checked_sub(1).map(|last| {
            let mut msix = last.to_le_bytes().to_vec();
            for place in [TABLE, PENDING] {
                msix.extend(&place.to_le_bytes()[..4]);
            }
            config.add_capability(CAP_MSIX, &msix, &[0, 0xc0])
        });
        let doorbells = profile.queues.len() as u64 * u64::from(NOTIFY_STEP);
        for (kind, offset, length) in
            [(CFG_COMMON, 0, 0x1000), (CFG_ISR, ISR, 1), (CFG_DEVICE, DEVICE, 0x1000)]
        {
            config.add_capability(CAP_VENDOR, &capability(kind, offset, length, &[]), &[]);
        }
        let step = u32::from(NOTIFY_STEP).to_le_bytes();
        config.add_capability(CAP_VENDOR, &capability(CFG_NOTIFY, NOTIFY, doorbells, &step), &[]);
        // The driver chooses BAR, offset and length of the window, and accesses the BAR by its data.
        let mut writable = [0xff; 18];
        writable[..2].fill(0);
        writable[3..6].fill(0);
        let window_at = config.add_capability(CAP_VENDOR, &capability(CFG_PCI, 0, 0, &[0; 4]), &writable);
        let msix = Msix::new(vectors, wiring.controller.clone());
        let live = Live::new(name, profile.queues.len(), msix, wiring.line, &device);
        let function = Arc::new_cyclic(|me| Self {
            name: name.to_owned(),
            registers: Registers::new(wiring.ram, device.clone(), live.clone()),
            device,
            config_size: profile.config_size.into(),
            queues: profile.queues.len(),
            live,
            mmio: wiring.mmio.clone(),
            config: Mutex::new(config.clone()),
            power_on: config,
            msix_at,
            window_at,
            place: Mutex::new(None),
            doorbells: wiring.doorbells,
            me: me.clone(),
        });
        function.follow(&function.config());
        Ok(function)
    }

    pub(crate) fn has_msix(&self) -> bool {
        self.msix_at.is_some()
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    fn config(&self) -> MutexGuard<'_, Config> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the claim on the bus and the interrupts follow what configuration space says.
    fn follow(&self, config: &Config) {
        let msix = self.msix_at.map_or(0, |at| config.u16(at + 2));
        self.live.set_pci(config.u16(COMMAND) & INTX_DISABLE != 0, msix);
        let mut place = self.place.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = config.bar();
        if place.as_ref().map(|place| place.claim.range().start) == wanted {
            return;
        }
        *place = None;
        if let Some(base) = wanted {
            let region = Arc::new(Bar(self.me.clone()));
            // Where something else is already, the function is not to be seen; so it is where a sizing driver puts it for a moment.
            match self.mmio.claim(&self.name, base, BAR_SIZE, region) {
                Ok(claim) => *place = Some(Place { claim, _bells: self.hang_bells(base) }),
                Err(error) => tracing::debug!("{error}"),
            }
        }
    }

    /// Hangs the doorbells that need no exit, as many as there are to be had.
    fn hang_bells(&self, base: u64) -> Vec<Hung> {
        let Some(doorbells) = &self.doorbells else { return Vec::new() };
        let queues = 0..u16::try_from(self.queues).unwrap_or(u16::MAX);
        let hang = |queue: u16| {
            let address = base + NOTIFY + u64::from(queue) * u64::from(NOTIFY_STEP);
            let me: Weak<dyn Ring> = self.me.clone();
            doorbells.hang(address, queue, me)
        };
        queues.map_while(hang).collect()
    }

    /// The guest reads configuration space: `size` is 1, 2 or 4, and the access is aligned.
    pub(crate) fn read_config(&self, at: usize, size: usize) -> u32 {
        if at + size > CONFIG_SIZE {
            return u32::MAX;
        }
        let data = self.window_at + 16;
        if (data..data + 4).contains(&at) {
            let config = self.config().clone();
            if let Some((offset, size)) = self.window(&config) {
                let value = self.read(offset, size).to_le_bytes();
                self.config().put(data, &value[..4]);
            }
        }
        let config = self.config();
        let mut value = config.read(at, size);
        if at <= STATUS && STATUS < at + size && self.live.is_interrupting() {
            value |= u32::from(INTERRUPT_STATUS) << (8 * (STATUS - at));
        }
        value
    }

    /// The guest writes configuration space.
    pub(crate) fn write_config(&self, at: usize, size: usize, value: u32) {
        if at + size > CONFIG_SIZE {
            return;
        }
        let mut config = self.config();
        config.write(at, size, value);
        let data = self.window_at + 16;
        if (data..data + 4).contains(&at) {
            let window = self.window(&config);
            let value = config.u32(data);
            drop(config);
            if let Some((offset, size)) = window {
                let ones = u64::MAX >> (64 - 8 * u32::from(size));
                self.write(offset, size, u64::from(value) & ones);
            }
            return;
        }
        self.follow(&config);
    }

    /// What the window shows: offset in the BAR and size, if the driver has set something that may be accessed.
    fn window(&self, config: &Config) -> Option<(u64, u8)> {
        let bar = config.read(self.window_at + 4, 1);
        let (offset, length) = (config.u32(self.window_at + 8), config.u32(self.window_at + 12));
        let size = u8::try_from(length).ok().filter(|size| matches!(size, 1 | 2 | 4))?;
        let fits =
            bar == 0 && u64::from(offset) + u64::from(size) <= BAR_SIZE && offset.is_multiple_of(length);
        fits.then_some((offset.into(), size))
    }

    /// The driver resets the machine: all is as after power-on.
    pub(crate) fn reset(&self) {
        self.registers.reset();
        self.live.state().msix.reset();
        let mut config = self.config();
        *config = self.power_on.clone();
        self.follow(&config);
    }

    /// The function leaves its slot: the device stops for good, and what accesses are under way do nothing.
    pub(crate) fn remove(&self) {
        *self.place.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.registers.remove();
    }

    pub(crate) fn resume(&self) {
        self.registers.resume();
    }

    pub(crate) fn save(&self, out: &mut Writer) {
        self.config().save(out);
        self.registers.save(out);
    }

    pub(crate) fn restore(&self, from: &mut Reader) -> Result<(), String> {
        self.registers.restore(from_config(&self.config, from)?)?;
        self.follow(&self.config());
        Ok(())
    }
}

fn from_config<'a, 'b>(
    config: &Mutex<Config>,
    from: &'a mut Reader<'b>,
) -> Result<&'a mut Reader<'b>, String> {
    config.lock().unwrap_or_else(PoisonError::into_inner).restore(from)?;
    Ok(from)
}

/// What follows the pointer of a virtio capability (virtio 1.2 §4.1.4).
fn capability(kind: u8, offset: u64, length: u64, more: &[u8]) -> Vec<u8> {
    // Capability header, these fields, `more`.
    let size = u8::try_from(16 + more.len()).unwrap_or(0);
    let mut body = vec![size, kind, 0, 0, 0, 0];
    body.extend(&offset.to_le_bytes()[..4]);
    body.extend(&length.to_le_bytes()[..4]);
    body.extend(more);
    body
}

impl Ring for Function {
    fn ring(&self, queue: u16) {
        if usize::from(queue) < self.queues && self.registers.is_running() {
            self.device.notify(queue);
        }
    }
}

impl Region for Function {
    fn read(&self, offset: u64, size: u8) -> u64 {
        let end = offset + u64::from(size);
        match offset & !0xfff {
            0 => {
                let image = self.registers.image();
                (offset..end).rev().fold(0, |value, at| {
                    value << 8
                        | u64::from(
                            usize::try_from(at).ok().and_then(|at| image.get(at)).copied().unwrap_or(0),
                        )
                })
            }
            ISR if offset == ISR => self.live.read_isr().into(),
            DEVICE if end - DEVICE <= self.config_size => {
                // Below 4096.
                self.device.read_config(u32::try_from(offset - DEVICE).unwrap_or(0), size)
            }
            TABLE..PENDING => self.words(offset - TABLE, size, Msix::table),
            PENDING => self.words(offset - PENDING, size, Msix::pending),
            _ => 0,
        }
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        match offset & !0xfff {
            0 => self.registers.write(offset, size, value),
            DEVICE if offset - DEVICE + u64::from(size) <= self.config_size => {
                self.device.write_config(u32::try_from(offset - DEVICE).unwrap_or(0), size, value);
            }
            NOTIFY => {
                let queue = (offset - NOTIFY) / u64::from(NOTIFY_STEP);
                self.ring(u16::try_from(queue).unwrap_or(u16::MAX));
            }
            TABLE..PENDING if matches!(size, 4 | 8) && offset.is_multiple_of(size.into()) => {
                let word = usize::try_from((offset - TABLE) / 4).unwrap_or(usize::MAX);
                let mut state = self.live.state();
                let [low, high] =
                    [value & 0xffff_ffff, value >> 32].map(|half| u32::try_from(half).unwrap_or(0));
                state.msix.set_table(word, low);
                if size == 8 {
                    state.msix.set_table(word + 1, high);
                }
            }
            _ => {}
        }
    }
}

impl Function {
    /// An aligned read of 32-bit words, or of 64 bits.
    fn words(&self, offset: u64, size: u8, word: impl Fn(&Msix, usize) -> u32) -> u64 {
        if !offset.is_multiple_of(size.into()) || size < 4 {
            return 0;
        }
        let at = usize::try_from(offset / 4).unwrap_or(usize::MAX / 2);
        let state = self.live.state();
        let low = u64::from(word(&state.msix, at));
        if size == 8 { low | u64::from(word(&state.msix, at + 1)) << 32 } else { low }
    }
}

/// The BAR as a claim on the bus. It does not keep the function.
struct Bar(Weak<Function>);

impl Region for Bar {
    fn read(&self, offset: u64, size: u8) -> u64 {
        self.0.upgrade().map_or(u64::MAX, |function| function.read(offset, size))
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        if let Some(function) = self.0.upgrade() {
            function.write(offset, size, value);
        }
    }
}

const _: () = assert!(MAX_VECTORS as u64 * ENTRY == PENDING - TABLE);
