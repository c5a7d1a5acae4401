//! Control messages (virtio 1.2 §5.3.6.2): what the driver says, and what the device has still to say.
//!
//! What is to be said is kept as a set for each port, not as a list: a driver that asks again and again without giving buffers for
//! the answers makes nothing grow.

/// The length of a control message without what follows it.
pub(crate) const HEADER: u16 = 8;

const DEVICE_READY: u16 = 0;
const DEVICE_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const RESIZE: u16 = 5;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// What a driver says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    /// It is ready for ports, or has failed.
    DeviceReady(bool),
    /// It has made a port, or could not.
    PortReady { port: u32, ready: bool },
    /// A program in the guest has opened or closed a port.
    PortOpen { port: u32, open: bool },
}

/// Reads a message of the driver. Those that are too short, or of no use to a device, are none.
pub(crate) fn parse(head: &[u8]) -> Option<Heard> {
    let [a, b, c, d, e, f, g, h] = *head.first_chunk()?;
    let port = u32::from_le_bytes([a, b, c, d]);
    let is_set = u16::from_le_bytes([g, h]) == 1;
    match u16::from_le_bytes([e, f]) {
        DEVICE_READY => Some(Heard::DeviceReady(is_set)),
        PORT_READY => Some(Heard::PortReady { port, ready: is_set }),
        PORT_OPEN => Some(Heard::PortOpen { port, open: is_set }),
        _ => None,
    }
}

/// What the device may have to say of a port, in the order in which it is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Say {
    Add = 1 << 0,
    Console = 1 << 1,
    Resize = 1 << 2,
    Name = 1 << 3,
    Open = 1 << 4,
}

const ALL: [Say; 5] = [Say::Add, Say::Console, Say::Resize, Say::Name, Say::Open];

/// What is still to be said of one port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Due(u8);

impl Due {
    /// The set of these bits; others are dropped.
    pub(crate) fn from_bits(bits: u8) -> Self {
        Self(ALL.into_iter().fold(0, |set, say| set | (bits & say as u8)))
    }

    pub(crate) fn bits(self) -> u8 {
        self.0
    }

    pub(crate) fn insert(&mut self, say: Say) {
        self.0 |= say as u8;
    }

    pub(crate) fn remove(&mut self, say: Say) {
        self.0 &= !(say as u8);
    }

    /// What is to be said first.
    pub(crate) fn first(self) -> Option<Say> {
        ALL.into_iter().find(|say| self.0 & *say as u8 != 0)
    }
}

/// A message to the driver.
pub(crate) fn message(port: u32, say: Say, name: &str, size: (u16, u16)) -> Vec<u8> {
    let (event, value): (u16, u16) = match say {
        Say::Add => (DEVICE_ADD, 1),
        Say::Console => (CONSOLE_PORT, 1),
        Say::Resize => (RESIZE, 0),
        Say::Name => (PORT_NAME, 1),
        Say::Open => (PORT_OPEN, 1),
    };
    let mut message = port.to_le_bytes().to_vec();
    message.extend(event.to_le_bytes());
    message.extend(value.to_le_bytes());
    match say {
        // As the specification says. Linux before 6.15 and its stable branches of that time reads rows first.
        Say::Resize => {
            let (columns, rows) = size;
            message.extend(columns.to_le_bytes());
            message.extend(rows.to_le_bytes());
        }
        Say::Name => message.extend(name.bytes()),
        _ => {}
    }
    message
}
