//! Device plugin: a 16550A serial port, whose far end is the byte channel `console`.
//!
//! Eight ports, one edge-triggered interrupt line, an ACPI node `PNP0501`. What differs from the chip, on purpose:
//!
//! - **Output takes no time.** A byte written is handed to the channel in the same call; the transmitter is always empty, and its interrupt is
//!   pending again at once. When the channel is full, bytes are dropped, and the log says so and how many.
//! - **Input waits outside** until the guest takes it, and overruns nothing.
//!   A guest that asserts DTR or RTS drives the modem lines, as Linux does from the moment on when the port is its console. It receives while it asserts RTS: what is typed before it opens its port
//!   waits, and with hardware flow control it holds the sender off.
//!   A guest that has asserted neither since power-on has a line of three wires, as PC firmware, and boot loaders that read by it. It receives when it looks: by its interrupt, or one byte whenever it
//!   reads the line status and has read the byte before. A real sender without handshake would send in any case, and what nobody read in time would be lost.
//!   Linux, where it opens a port that is not its console for the first time, looks too and throws away what it sees: up to three bytes typed before that are lost.
//! - **No character time.** Bytes below the FIFO's trigger level raise the timeout interrupt at once.
//! - Parity, framing and break do not happen; overrun happens in loopback mode only.

mod uart;

use tenon_sdk::device::{
    Attachment, Channel, Config, Decoder, Description, Device, Encoder, Line, Result, Trigger, info, warn,
};

use crate::uart::Uart;

/// How many ports the chip has.
const PORTS: u16 = 8;

/// The serial port.
pub struct Serial {
    uart: Uart,
    line: Line,
    /// The level that the line was last set to: a call to the host costs more than a compare.
    level: bool,
    channel: Channel,
    /// The channel may have bytes. It says when it gets some, but only after it was read empty.
    readable: bool,
    /// How many bytes were dropped since the channel was last able to take one.
    dropped: u64,
}

tenon_sdk::export_device!(Serial);

impl Device for Serial {
    const SCHEMA: u32 = uart::SCHEMA;

    fn describe(config: &Config) -> Result<Description> {
        let base = config.number_in("base", 0..=0xfff8_u16)?.unwrap_or(0x3f8);
        let irq = config.number_in("irq", 0..=23_u32)?.unwrap_or(4);
        // A PC's ports are numbered from 1; others take their base, which is as unique.
        let uid = match base {
            0x3f8 => 1,
            0x2f8 => 2,
            0x3e8 => 3,
            0x2e8 => 4,
            other => u32::from(other),
        };
        Ok(Description::new()
            .pio("registers", base, PORTS)
            .line(Some(irq), Trigger::Edge)
            .channel("console")
            .acpi("PNP0501", uid))
    }

    fn start(_config: &Config, mut attachment: Attachment) -> Result<Self> {
        Ok(Self {
            uart: Uart::new(),
            line: attachment.line()?,
            level: false,
            channel: attachment.channel()?,
            readable: true,
            dropped: 0,
        })
    }

    fn read(&mut self, _region: u32, offset: u64, size: u8) -> u64 {
        let mut value = 0;
        for byte in 0..u64::from(size) {
            let register = offset + byte;
            if register == uart::LSR {
                self.take(self.uart.room_for_poller());
            }
            value |= u64::from(self.uart.read(register)) << (8 * byte);
            if register == uart::DATA {
                self.refill();
            }
        }
        self.update_line();
        value
    }

    fn write(&mut self, _region: u32, offset: u64, size: u8, value: u64) {
        for (byte, register) in value.to_le_bytes().into_iter().take(size.into()).zip(offset..) {
            if let Some(sent) = self.uart.write(register, byte) {
                self.transmit(sent);
            }
            if matches!(register, uart::MCR | uart::IIR_FCR | uart::IER) {
                self.refill();
            }
        }
        self.update_line();
    }

    fn channel_readable(&mut self, _channel: u32) {
        self.readable = true;
        self.refill();
        self.update_line();
    }

    fn reset(&mut self) {
        self.uart = Uart::new();
        self.readable = true;
        self.drive_line();
    }

    fn save(&self, state: &mut Encoder) -> Result<()> {
        self.uart.save(state);
        Ok(())
    }

    fn restore(&mut self, state: &mut Decoder<'_>) -> Result<()> {
        self.uart = Uart::restore(state)?;
        // What the channel told the instance before this one is not known.
        self.readable = true;
        self.refill();
        self.drive_line();
        Ok(())
    }
}

impl Serial {
    fn transmit(&mut self, byte: u8) {
        if self.channel.write(&[byte]) == 0 {
            if self.dropped == 0 {
                warn!("the console takes no more bytes: output is dropped");
            }
            self.dropped += 1;
        } else if self.dropped > 0 {
            info!("the console takes bytes again; {} were dropped", self.dropped);
            self.dropped = 0;
        }
    }

    /// Takes from the channel what the guest listens to.
    fn refill(&mut self) {
        self.take(self.uart.room());
    }

    fn take(&mut self, room: usize) {
        if self.readable && room > 0 {
            let bytes = self.channel.read(room);
            self.readable = bytes.len() == room;
            self.uart.receive(&bytes);
        }
    }

    fn update_line(&mut self) {
        if self.uart.interrupt() != self.level {
            self.drive_line();
        }
    }

    fn drive_line(&mut self) {
        self.level = self.uart.interrupt();
        self.line.set_level(self.level);
    }
}
