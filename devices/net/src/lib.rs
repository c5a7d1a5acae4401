//! Device plugin: a virtio network card (virtio 1.2 §5.1), whose far end is the network port `net`.
//!
//! Frames never pass through the plugin. It sends requests as they come, in one call for a batch, and gives frames that wait to the driver's buffers by their
//! lengths alone. From this follows what it does not do:
//!
//! - **Filters.** Addresses and modes that the driver sets are taken and not looked at: the port is a line that has this guest at its end, and the
//!   specification lets frames through that nobody asked for (§5.1.6.5.1).
//! - **Steering.** All frames are received in the first queue, whatever the number of pairs that the driver uses: the flow that a frame belongs to is
//!   not known here, and frames of one flow must not overtake each other. Frames are sent from all queues.
//! - **Checksums and segments.** What the guest leaves undone, the port finishes, or drops. What it can is known only when features have been offered already, so
//!   `checksum` and `tso` are settings; a port that says that it cannot is named in the log.

mod control;
mod receive;

use tenon_sdk::virtio::{
    self, Answer, Attachment, Batch, Config, Decoder, Encoder, Error, Handle, Offloads, Port, PortInfo,
    Request, Result, VirtioDescription, VirtioDevice, debug, info,
};

use crate::control::Command;
use crate::receive::{HEADER, Plan, Room};

const DEVICE_TYPE: u16 = 1;

const F_CSUM: u64 = 1 << 0;
const F_GUEST_CSUM: u64 = 1 << 1;
const F_CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
const F_MTU: u64 = 1 << 3;
const F_MAC: u64 = 1 << 5;
const F_GUEST_TSO4: u64 = 1 << 7;
const F_GUEST_TSO6: u64 = 1 << 8;
const F_HOST_TSO4: u64 = 1 << 11;
const F_HOST_TSO6: u64 = 1 << 12;
const F_MRG_RXBUF: u64 = 1 << 15;
const F_STATUS: u64 = 1 << 16;
const F_CTRL_VQ: u64 = 1 << 17;
const F_CTRL_RX: u64 = 1 << 18;
const F_CTRL_RX_EXTRA: u64 = 1 << 20;
const F_MQ: u64 = 1 << 22;
const F_CTRL_MAC_ADDR: u64 = 1 << 23;

/// What the driver may accept of received frames, and switch off and on.
const GUEST_OFFLOADS: u64 = F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6;

const CONFIG_SIZE: u16 = 12;
const STATUS_LINK_UP: u16 = 1;

/// The most entries of a queue of frames, and of that of commands.
const QUEUE_SIZE: u16 = 256;
const CONTROL_SIZE: u16 = 64;
/// The most frames asked for at a time.
const FRAMES: usize = 256;

/// The card.
pub struct Net {
    port: Port,
    info: PortInfo,
    /// Pairs of queues.
    pairs: u16,
    /// Whether the cable is plugged in, as the administrator says.
    link: bool,
    /// What the driver accepted, once it is ready.
    features: Option<u64>,
    /// What of [`GUEST_OFFLOADS`] is switched on.
    offloads: u64,
    /// The address that the driver has set.
    address: Option<[u8; 6]>,
    room: Room,
    /// The port may have frames. It says when it gets some, but only after it has given fewer than it was asked for.
    frames: bool,
    /// The length of the first frame, if it was looked at and there was no room for it. Until there is, the port is not asked again: it would only tell of the same frame.
    first: Option<u32>,
}

tenon_sdk::export_virtio_device!(Net);

struct Settings {
    pairs: u16,
    mergeable: bool,
    checksum: bool,
    tso: bool,
    link: bool,
}

fn settings(config: &Config) -> Result<Settings> {
    let checksum = config.boolean("checksum")?.unwrap_or(true);
    Ok(Settings {
        pairs: config.number_in("queues", 1..=16_u16)?.unwrap_or(1),
        mergeable: config.boolean("mergeable")?.unwrap_or(true),
        checksum,
        tso: checksum && config.boolean("tso")?.unwrap_or(true),
        link: config.text("link").map_or(Ok(true), parse_link)?,
    })
}

fn parse_link(text: &str) -> Result<bool> {
    match text {
        "up" => Ok(true),
        "down" => Ok(false),
        _ => Err(Error::Invalid(format!("`link` is `{text}`, but must be `up` or `down`"))),
    }
}

fn to_offloads(bits: u64) -> Offloads {
    let checksum = bits & F_GUEST_CSUM != 0;
    // Segments come without checksums.
    Offloads {
        checksum,
        tso4: checksum && bits & F_GUEST_TSO4 != 0,
        tso6: checksum && bits & F_GUEST_TSO6 != 0,
    }
}

impl VirtioDevice for Net {
    fn describe(config: &Config) -> Result<VirtioDescription> {
        let Settings { pairs, mergeable, checksum, tso, .. } = settings(config)?;
        let when = |is_on: bool, features: u64| if is_on { features } else { 0 };
        let mut description = VirtioDescription::new(DEVICE_TYPE)
            .features(F_MAC | F_STATUS | F_MTU)
            .features(GUEST_OFFLOADS | F_CTRL_GUEST_OFFLOADS)
            .features(F_CTRL_VQ | F_CTRL_RX | F_CTRL_RX_EXTRA | F_CTRL_MAC_ADDR)
            .features(when(mergeable, F_MRG_RXBUF) | when(checksum, F_CSUM) | when(pairs > 1, F_MQ))
            .features(when(tso, F_HOST_TSO4 | F_HOST_TSO6))
            .config(CONFIG_SIZE)
            .port("net");
        for pair in 0..pairs {
            // A driver that does not accept MQ has its commands in queue 2.
            let head = if pair == 1 { control::HEAD } else { 0 };
            description = description.queue(&format!("receive{pair}"), QUEUE_SIZE, head).queue(
                &format!("transmit{pair}"),
                QUEUE_SIZE,
                0,
            );
        }
        Ok(description.queue("control", CONTROL_SIZE, control::HEAD))
    }

    fn start(config: &Config, mut attachment: Attachment) -> Result<Self> {
        let Settings { pairs, checksum, tso, link, .. } = settings(config)?;
        let port = attachment.port()?;
        let info = port.info();
        if checksum && !info.send.checksum {
            info!(
                "the port has to fill in checksums that the guest leaves out; `checksum=false` leaves them to the guest"
            );
        }
        if tso && !(info.send.tso4 && info.send.tso6) {
            info!(
                "the port has to cut up large TCP segments of the guest; `tso=false` leaves that to the guest"
            );
        }
        Ok(Self {
            port,
            info,
            pairs,
            link,
            features: None,
            offloads: 0,
            address: None,
            room: Room::default(),
            frames: true,
            first: None,
        })
    }

    fn activate(&mut self, features: u64) -> Result<()> {
        self.features = Some(features);
        self.set_offloads(features & GUEST_OFFLOADS);
        Ok(())
    }

    fn config_read(&mut self, offset: u32, size: u8) -> u64 {
        let status = if self.is_up() { STATUS_LINK_UP } else { 0 };
        let mut space = [0; CONFIG_SIZE as usize];
        space[0..6].copy_from_slice(&self.address.unwrap_or(self.info.mac));
        space[6..8].copy_from_slice(&status.to_le_bytes());
        space[8..10].copy_from_slice(&self.pairs.to_le_bytes());
        space[10..12].copy_from_slice(&self.info.mtu.to_le_bytes());
        virtio::field(&space, offset, size)
    }

    fn requests_ready(&mut self, queue: u16, batch: &Batch<'_>) {
        if queue == self.control_queue() {
            let answers: Vec<Answer> = batch.iter().map(|request| self.command(&request)).collect();
            virtio::complete_all(&answers);
        } else if queue % 2 == 1 {
            self.send(batch);
        } else if queue == 0 {
            self.add_room(batch);
            self.deliver();
        }
        // Buffers of other receive queues stay where they are: see the top of this file.
    }

    fn port_ready(&mut self, _port: u32) {
        self.frames = true;
        self.deliver();
    }

    fn port_changed(&mut self, _port: u32) {
        let before = (self.is_up(), self.info.mac, self.info.mtu);
        self.info = self.port.info();
        if before != (self.is_up(), self.info.mac, self.info.mtu) {
            virtio::config_changed();
        }
    }

    fn adjust(&mut self, key: &str, value: &str) -> Result<()> {
        if key != "link" {
            return Err(Error::Unsupported(format!(
                "`{key}` cannot be changed while the guest runs; `link` can"
            )));
        }
        let before = self.is_up();
        self.link = parse_link(value)?;
        if before != self.is_up() {
            info!("the link is {value}");
            virtio::config_changed();
        }
        // What came while the cable was out is not for the guest.
        self.deliver();
        Ok(())
    }

    fn reset(&mut self) {
        self.features = None;
        self.address = None;
        self.room.clear();
        self.frames = true;
        self.first = None;
        self.set_offloads(0);
    }

    fn save(&self, state: &mut Encoder) -> Result<()> {
        state.option(self.features).u64(self.offloads).bool(self.link);
        state.bool(self.address.is_some()).raw(&self.address.unwrap_or_default());
        Ok(())
    }

    fn restore(&mut self, state: &mut Decoder<'_>) -> Result<()> {
        self.features = state.option()?;
        let offloads = state.u64()?;
        self.link = state.bool()?;
        let (is_set, address) = (state.bool()?, state.array()?);
        self.address = is_set.then_some(address);
        self.set_offloads(offloads & GUEST_OFFLOADS);
        Ok(())
    }
}

impl Net {
    fn accepted(&self, feature: u64) -> bool {
        self.features.is_some_and(|features| features & feature != 0)
    }

    fn is_up(&self) -> bool {
        self.link && self.info.link_up
    }

    fn set_offloads(&mut self, bits: u64) {
        self.offloads = bits;
        self.port.accept(to_offloads(bits));
    }

    /// The number of the queue of commands (virtio 1.2 §5.1.2).
    fn control_queue(&self) -> u16 {
        if self.accepted(F_MQ) { 2 * self.pairs } else { 2 }
    }

    fn send(&mut self, batch: &Batch<'_>) {
        let requests: Vec<Handle> = batch.iter().map(|request| request.handle).collect();
        if self.link {
            self.port.send(&requests);
        } else {
            let answers: Vec<Answer> =
                requests.into_iter().map(|request| Answer { request, written: 0 }).collect();
            virtio::complete_all(&answers);
        }
    }

    fn add_room(&mut self, batch: &Batch<'_>) {
        let mut useless = Vec::new();
        for request in batch.iter() {
            if request.writable < HEADER {
                useless.push(Answer { request: request.handle, written: 0 });
            } else {
                self.room.add(request.handle, request.writable);
            }
        }
        virtio::complete_all(&useless);
    }

    /// Gives frames that wait to the driver, as far as there is room for them.
    fn deliver(&mut self) {
        let mergeable = self.accepted(F_MRG_RXBUF);
        while self.frames {
            let max = if self.link { self.room.requests().min(FRAMES) } else { FRAMES };
            let is_stuck = self.link && self.first.is_some_and(|frame| !self.room.settles(frame, mergeable));
            if max == 0 || is_stuck {
                return;
            }
            let lengths = self.port.waiting(u32::try_from(max).unwrap_or(u32::MAX));
            let plan =
                if self.link { self.room.plan(&lengths, mergeable) } else { Plan::dropping(lengths.len()) };
            self.port.receive(&plan.counts, &plan.requests);
            self.first = lengths.get(plan.counts.len()).copied();
            self.frames = self.first.is_some() || lengths.len() >= max;
        }
    }

    /// Carries out a command.
    fn command(&mut self, request: &Request<'_>) -> Answer {
        let answer = |written| Answer { request: request.handle, written };
        if request.writable == 0 {
            // A command that cannot be acknowledged is none.
            return answer(0);
        }
        let command = control::parse(request.head, request.readable);
        let done = command.is_some_and(|command| self.carry_out(command, request));
        if !done {
            debug!("a command is refused: {command:?}");
        }
        let acknowledgement = if done { control::OK } else { control::ERROR };
        answer(virtio::write(request.handle, 0, &[acknowledgement]))
    }

    fn carry_out(&mut self, command: Command, request: &Request<'_>) -> bool {
        match command {
            Command::Filter => self.accepted(F_CTRL_RX),
            Command::FilterTable { second } => {
                let count = virtio::read(request.handle, second, 4);
                self.accepted(F_CTRL_RX) && control::is_whole(second, &count, request.readable)
            }
            // The lowest bit of the first byte is that of groups.
            Command::SetAddress(address) if self.accepted(F_CTRL_MAC_ADDR) && address[0] & 1 == 0 => {
                self.address = Some(address);
                true
            }
            // All frames are received in the first queue, and sent from all: any number will do.
            Command::SetPairs(pairs) => self.accepted(F_MQ) && (1..=self.pairs).contains(&pairs),
            Command::SetOffloads(bits) if self.accepted(F_CTRL_GUEST_OFFLOADS) => {
                let accepted = self.features.unwrap_or(0) & GUEST_OFFLOADS;
                let right = bits & !accepted == 0;
                if right {
                    self.set_offloads(bits);
                }
                right
            }
            Command::SetAddress(_) | Command::SetOffloads(_) => false,
        }
    }
}
