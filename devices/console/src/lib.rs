//! Device plugin: a virtio console (virtio 1.2 §5.3). Port 0 is the terminal, whose far end is the channel `console`; each further port is the channel of its name.
//!
//! - **Nothing is lost and nothing grows.** A port has no buffer of its own: requests wait until the channel has bytes for them, or takes theirs. A slow reader outside
//!   holds the guest off, a guest that does not read holds the sender off.
//! - **A port is always connected**: the far end is a channel, which has no such thing as a hang-up.
//! - **What is sent to a port waits until a program in the guest opens it**; without MULTIPORT the terminal is open from the start.
//! - `emerg_wr` writes to the terminal at any time; a byte for which the channel has no room is dropped.

mod control;
mod port;

use std::collections::VecDeque;

use tenon_sdk::virtio::{
    self, Answer, Attachment, Batch, Config, Decoder, Encoder, Error, Handle, Result, VirtioDescription,
    VirtioDevice, debug, warn,
};

use crate::control::{Due, Heard, Say};
use crate::port::{Port, Sent};

const DEVICE_TYPE: u16 = 3;

const F_SIZE: u64 = 1 << 0;
const F_MULTIPORT: u64 = 1 << 1;
const F_EMERG_WRITE: u64 = 1 << 2;

const CONFIG_SIZE: u16 = 12;
/// The offset of the only field that a driver writes.
const EMERG_WR: u32 = 8;

/// The most entries of a port's queue.
const QUEUE_SIZE: u16 = 128;
/// The most ports, the console among them: 2 × 32 queues of theirs.
const MAX_PORTS: usize = 32;
/// The longest name of a port.
const MAX_NAME: usize = 64;

/// What a queue is for. The control queues have the numbers 2 and 3, between those of the first two ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Receive(usize),
    Transmit(usize),
    ToDriver,
    FromDriver,
}

fn role(queue: u16) -> Role {
    let pair = usize::from(queue / 2);
    match (pair, queue % 2) {
        (1, 0) => Role::ToDriver,
        (1, _) => Role::FromDriver,
        (_, 0) => Role::Receive(pair.saturating_sub(1)),
        (_, _) => Role::Transmit(pair.saturating_sub(1)),
    }
}

/// The console.
pub struct Console {
    ports: Vec<Port>,
    /// What is to be said of each port.
    due: Vec<Due>,
    /// Requests for what is to be said, with the lengths of their writable parts.
    listening: VecDeque<(Handle, u32)>,
    /// Columns and rows.
    size: (u16, u16),
    /// What the driver accepted, once it is ready.
    features: Option<u64>,
}

tenon_sdk::export_virtio_device!(Console);

/// The names of all ports.
fn names(config: &Config) -> Result<Vec<String>> {
    let mut names = vec!["console".to_owned()];
    let given = config.text("ports").unwrap_or_default();
    for name in given.split(',').map(str::trim).filter(|name| !name.is_empty()) {
        let right = name.len() <= MAX_NAME && name.bytes().all(|byte| byte.is_ascii_graphic());
        if !right || names.iter().any(|other| other == name) || names.len() == MAX_PORTS {
            return Err(Error::Invalid(format!(
                "`ports` is `{given}`, but must be at most {} different names of at most {MAX_NAME} ASCII characters, \
                 none of them `console`",
                MAX_PORTS - 1
            )));
        }
        names.push(name.to_owned());
    }
    Ok(names)
}

fn parse_size(text: &str) -> Result<(u16, u16)> {
    let numbers = text.split_once('x').and_then(|(columns, rows)| {
        Some((columns.trim().parse::<u16>().ok()?, rows.trim().parse::<u16>().ok()?))
    });
    numbers.filter(|(columns, rows)| *columns > 0 && *rows > 0).ok_or_else(|| {
        Error::Invalid(format!("`size` is `{text}`, but must be columns and rows, such as `80x25`"))
    })
}

impl VirtioDevice for Console {
    fn describe(config: &Config) -> Result<VirtioDescription> {
        let names = names(config)?;
        parse_size(config.text("size").unwrap_or("80x25"))?;
        let mut description = VirtioDescription::new(DEVICE_TYPE)
            .features(F_SIZE | F_MULTIPORT | F_EMERG_WRITE)
            .config(CONFIG_SIZE);
        for (number, name) in names.iter().enumerate() {
            description = description
                .queue(&format!("receive{number}"), QUEUE_SIZE, 0)
                .queue(&format!("transmit{number}"), QUEUE_SIZE, 0)
                .channel(name);
            if number == 0 {
                description = description.queue("control-receive", QUEUE_SIZE, 0).queue(
                    "control-transmit",
                    QUEUE_SIZE,
                    control::HEADER,
                );
            }
        }
        Ok(description)
    }

    fn start(config: &Config, mut attachment: Attachment) -> Result<Self> {
        let names = names(config)?;
        let ports: Result<Vec<Port>> =
            names.iter().map(|name| Ok(Port::new(name, attachment.channel()?))).collect();
        Ok(Self {
            ports: ports?,
            due: vec![Due::default(); names.len()],
            listening: VecDeque::new(),
            size: parse_size(config.text("size").unwrap_or("80x25"))?,
            features: None,
        })
    }

    fn activate(&mut self, features: u64) -> Result<()> {
        self.features = Some(features);
        self.ports[0].open = features & F_MULTIPORT == 0;
        Ok(())
    }

    fn config_read(&mut self, offset: u32, size: u8) -> u64 {
        let (columns, rows) = self.size;
        let ports = u32::try_from(self.ports.len()).unwrap_or(u32::MAX);
        let mut space = [0; CONFIG_SIZE as usize];
        space[0..2].copy_from_slice(&columns.to_le_bytes());
        space[2..4].copy_from_slice(&rows.to_le_bytes());
        space[4..8].copy_from_slice(&ports.to_le_bytes());
        virtio::field(&space, offset, size)
    }

    fn config_write(&mut self, offset: u32, _size: u8, value: u64) {
        if offset == EMERG_WR {
            self.ports[0].emergency(value.to_le_bytes()[0]);
        }
    }

    fn requests_ready(&mut self, queue: u16, batch: &Batch<'_>) {
        let mut answers = Vec::with_capacity(batch.len());
        match role(queue) {
            Role::Receive(number) => {
                let Some(port) = self.ports.get_mut(number) else { return };
                batch.iter().for_each(|request| port.add_room(&request));
                port.fill(&mut answers);
            }
            Role::Transmit(number) => {
                let Some(port) = self.ports.get_mut(number) else { return };
                batch.iter().for_each(|request| port.add_bytes(&request));
                port.send(&mut answers);
            }
            Role::ToDriver => {
                self.listening.extend(batch.iter().map(|request| (request.handle, request.writable)));
                self.speak(&mut answers);
            }
            Role::FromDriver => {
                for request in batch.iter() {
                    self.hear(request.head, &mut answers);
                    answers.push(Answer { request: request.handle, written: 0 });
                }
                self.speak(&mut answers);
            }
        }
        virtio::complete_all(&answers);
    }

    fn channel_readable(&mut self, channel: u32) {
        self.with_port(channel, |port, answers| {
            port.set_readable();
            port.fill(answers);
        });
    }

    fn channel_writable(&mut self, channel: u32) {
        self.with_port(channel, |port, answers| {
            port.set_writable();
            port.send(answers);
        });
    }

    fn adjust(&mut self, key: &str, value: &str) -> Result<()> {
        if key != "size" {
            return Err(Error::Unsupported(format!(
                "`{key}` cannot be changed while the guest runs; `size` can"
            )));
        }
        let size = parse_size(value)?;
        if self.size == size {
            return Ok(());
        }
        self.size = size;
        // Without MULTIPORT the driver reads the configuration space; with it, it waits to be told.
        if self.accepted(F_SIZE) {
            virtio::config_changed();
        }
        if self.accepted(F_MULTIPORT) {
            self.due[0].insert(Say::Resize);
            let mut answers = Vec::new();
            self.speak(&mut answers);
            virtio::complete_all(&answers);
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.features = None;
        self.listening.clear();
        self.due.fill(Due::default());
        self.ports.iter_mut().for_each(Port::reset);
    }

    fn save(&self, state: &mut Encoder) -> Result<()> {
        state.option(self.features).u16(self.size.0).u16(self.size.1);
        for (port, due) in self.ports.iter().zip(&self.due) {
            let sent = port.sent();
            state.bool(port.open).u8(due.bits());
            state.u32(sent.length).u32(sent.offset);
        }
        Ok(())
    }

    fn restore(&mut self, state: &mut Decoder<'_>) -> Result<()> {
        self.features = state.option()?;
        self.size = (state.u16()?, state.u16()?);
        for (port, due) in self.ports.iter_mut().zip(&mut self.due) {
            port.open = state.bool()?;
            *due = Due::from_bits(state.u8()?);
            let (length, offset) = (state.u32()?, state.u32()?);
            if offset > length {
                return Err(state.invalid("more of a request was sent than it has"));
            }
            port.set_sent(Sent { length, offset });
        }
        Ok(())
    }
}

impl Console {
    fn accepted(&self, feature: u64) -> bool {
        self.features.is_some_and(|features| features & feature != 0)
    }

    fn with_port(&mut self, number: u32, act: impl FnOnce(&mut Port, &mut Vec<Answer>)) {
        let port = usize::try_from(number).ok().and_then(|number| self.ports.get_mut(number));
        if let Some(port) = port {
            let mut answers = Vec::new();
            act(port, &mut answers);
            virtio::complete_all(&answers);
        }
    }

    /// Does what a message of the driver asks for.
    fn hear(&mut self, head: &[u8], answers: &mut Vec<Answer>) {
        let heard = control::parse(head);
        let number = |port: u32| usize::try_from(port).ok().filter(|port| *port < self.ports.len());
        match heard {
            Some(Heard::DeviceReady(true)) => self.due.iter_mut().for_each(|due| due.insert(Say::Add)),
            Some(Heard::DeviceReady(false)) => warn!("the driver could not take the device"),
            Some(Heard::PortReady { port, ready }) if let Some(port) = number(port) => {
                if ready {
                    self.introduce(port);
                } else {
                    warn!("the driver could not make the port `{}`", self.ports[port].name);
                }
            }
            Some(Heard::PortOpen { port, open }) if let Some(number) = number(port) => {
                let port = &mut self.ports[number];
                port.open = open;
                port.fill(answers);
            }
            other => debug!("a control message is passed over: {other:?}"),
        }
    }

    /// Says everything of a port.
    fn introduce(&mut self, port: usize) {
        let due = &mut self.due[port];
        if port == 0 {
            due.insert(Say::Console);
            due.insert(Say::Resize);
        } else {
            due.insert(Say::Name);
        }
        due.insert(Say::Open);
    }

    /// Says what is to be said, as far as the driver has given room. A buffer in which a message has no room comes back empty.
    fn speak(&mut self, answers: &mut Vec<Answer>) {
        for (number, due) in (0_u32..).zip(&mut self.due) {
            while let Some(say) = due.first() {
                let Some((request, room)) = self.listening.pop_front() else { return };
                let name = usize::try_from(number).ok().and_then(|number| self.ports.get(number));
                let message = control::message(number, say, name.map_or("", |port| &port.name), self.size);
                let length = u32::try_from(message.len()).unwrap_or(u32::MAX);
                if room < length {
                    answers.push(Answer { request, written: 0 });
                    continue;
                }
                answers.push(Answer { request, written: virtio::write(request, 0, &message) });
                due.remove(say);
            }
        }
    }
}
