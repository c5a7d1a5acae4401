//! The chip: registers, FIFO, interrupt conditions (PC16550D data sheet, National Semiconductor 1995). It knows no host: bytes
//! go in by [`Uart::receive`] and come out of [`Uart::write`], and [`Uart::interrupt`] is the level of its interrupt pin behind the PC's OUT2 gate.

use std::collections::VecDeque;

use tenon_sdk::device::{Decoder, Encoder, Result};

/// The schema of the state: 2 added whether the guest drives the modem lines.
pub(crate) const SCHEMA: u32 = 2;
/// The depth of the receive FIFO.
pub(crate) const FIFO: usize = 16;

/// Register offsets. What lies at 0 to 2 depends on the direction and on [`LCR_DLAB`].
pub(crate) const DATA: u64 = 0;
pub(crate) const IER: u64 = 1;
pub(crate) const IIR_FCR: u64 = 2;
pub(crate) const LCR: u64 = 3;
pub(crate) const MCR: u64 = 4;
pub(crate) const LSR: u64 = 5;
pub(crate) const MSR: u64 = 6;
pub(crate) const SCR: u64 = 7;

const IER_RECEIVED: u8 = 1 << 0;
const IER_TRANSMIT_EMPTY: u8 = 1 << 1;
const IER_LINE_STATUS: u8 = 1 << 2;
const IER_MODEM_STATUS: u8 = 1 << 3;

const IIR_MODEM_STATUS: u8 = 0x0;
const IIR_NONE: u8 = 0x1;
const IIR_TRANSMIT_EMPTY: u8 = 0x2;
const IIR_RECEIVED: u8 = 0x4;
const IIR_LINE_STATUS: u8 = 0x6;
const IIR_TIMEOUT: u8 = 0xc;
const IIR_FIFOS_ON: u8 = 0xc0;

const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RECEIVER: u8 = 1 << 1;
const FCR_TRIGGER: u8 = 0xc0;

const LCR_DLAB: u8 = 1 << 7;

const MCR_DTR: u8 = 1 << 0;
const MCR_RTS: u8 = 1 << 1;
const MCR_OUT1: u8 = 1 << 2;
const MCR_OUT2: u8 = 1 << 3;
const MCR_LOOPBACK: u8 = 1 << 4;

const LSR_DATA_READY: u8 = 1 << 0;
const LSR_OVERRUN: u8 = 1 << 1;
/// The holding register and the shift register are empty: always, since a byte is gone as soon as it is written.
const LSR_TRANSMITTER_EMPTY: u8 = 0b110_0000;

const MSR_CTS: u8 = 1 << 4;
const MSR_DSR: u8 = 1 << 5;
const MSR_RI: u8 = 1 << 6;
const MSR_DCD: u8 = 1 << 7;
/// The change of a line is reported four bits below it; that of RI when it ends only.
const MSR_CHANGES: u32 = 4;

/// A 16550A.
#[derive(Clone, Debug)]
pub(crate) struct Uart {
    divisor: [u8; 2],
    ier: u8,
    /// Enable and trigger bits of the FIFO control register.
    fcr: u8,
    lcr: u8,
    mcr: u8,
    msr: u8,
    scr: u8,
    overrun: bool,
    /// The transmitter became empty since the guest was last told.
    transmit_empty: bool,
    /// The guest has asserted DTR or RTS since power-on: it drives the modem lines, and RTS is the word by which it holds the sender off.
    drives_lines: bool,
    received: VecDeque<u8>,
}

impl Uart {
    /// The chip after power-on, with a ready peer at the other end.
    pub(crate) fn new() -> Self {
        Self {
            // 9,600 baud: what a PC's firmware leaves behind.
            divisor: [12, 0],
            ier: 0,
            fcr: 0,
            lcr: 0,
            mcr: 0,
            msr: MSR_CTS | MSR_DSR | MSR_DCD,
            scr: 0,
            overrun: false,
            transmit_empty: false,
            drives_lines: false,
            received: VecDeque::with_capacity(FIFO),
        }
    }

    /// The guest reads a register.
    pub(crate) fn read(&mut self, register: u64) -> u8 {
        match register {
            DATA if self.divisor_selected() => self.divisor[0],
            IER if self.divisor_selected() => self.divisor[1],
            DATA => self.received.pop_front().unwrap_or(0),
            IER => self.ier,
            IIR_FCR => {
                let identification = self.identification();
                if identification == IIR_TRANSMIT_EMPTY {
                    self.transmit_empty = false;
                }
                identification | if self.fifos() { IIR_FIFOS_ON } else { 0 }
            }
            LCR => self.lcr,
            MCR => self.mcr,
            LSR => {
                let ready = if self.received.is_empty() { 0 } else { LSR_DATA_READY };
                let overrun = if std::mem::take(&mut self.overrun) { LSR_OVERRUN } else { 0 };
                LSR_TRANSMITTER_EMPTY | ready | overrun
            }
            MSR => {
                let value = self.msr;
                self.msr &= 0xf0;
                value
            }
            SCR => self.scr,
            _ => 0xff,
        }
    }

    /// The guest writes a register. Returns the byte to transmit, if it wrote one.
    pub(crate) fn write(&mut self, register: u64, value: u8) -> Option<u8> {
        match register {
            DATA if self.divisor_selected() => self.divisor[0] = value,
            IER if self.divisor_selected() => self.divisor[1] = value,
            DATA => {
                self.transmit_empty = true;
                if !self.loopback() {
                    return Some(value);
                }
                self.receive(&[value]);
            }
            IER => {
                // Enabling it while the transmitter is empty raises it at once; drivers start their output this way.
                if value & !self.ier & IER_TRANSMIT_EMPTY != 0 {
                    self.transmit_empty = true;
                }
                self.ier = value & 0x0f;
            }
            IIR_FCR => {
                let switched = (value ^ self.fcr) & FCR_ENABLE != 0;
                let enabled = value & FCR_ENABLE != 0;
                // The one byte that a poller was shown and has not read is as good as still on the line.
                let shown = !self.drives_lines && !self.listens() && self.received.len() <= 1;
                if !shown && (switched || enabled && value & FCR_CLEAR_RECEIVER != 0) {
                    self.received.clear();
                }
                // The other bits take effect only together with the enable bit.
                self.fcr = if enabled { value & (FCR_ENABLE | FCR_TRIGGER) } else { 0 };
            }
            LCR => self.lcr = value,
            MCR => {
                self.mcr = value & 0x1f;
                // In loopback mode the outputs are off.
                self.drives_lines |= !self.loopback() && value & (MCR_DTR | MCR_RTS) != 0;
                self.update_modem_status();
            }
            SCR => self.scr = value,
            // Writing the line or modem status register is for the factory's tests.
            _ => {}
        }
        None
    }

    /// Bytes arrive. Those beyond [`Uart::room`] are lost, which the line status shows.
    pub(crate) fn receive(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if self.received.len() < self.depth() {
                self.received.push_back(*byte);
            } else {
                self.overrun = true;
            }
        }
    }

    /// How many bytes may come in by themselves: what the FIFO has room for while the guest listens.
    pub(crate) fn room(&self) -> usize {
        if self.listens() { self.depth().saturating_sub(self.received.len()) } else { 0 }
    }

    /// How many bytes may come in because the guest looks at the line status. One that drives no modem lines polls this way, and is given byte by byte.
    pub(crate) fn room_for_poller(&self) -> usize {
        if self.drives_lines || self.loopback() || !self.received.is_empty() { self.room() } else { 1 }
    }

    /// Whether the guest takes what comes: by RTS; or where it drives no modem lines, by its interrupt. Not while the chip talks to itself.
    fn listens(&self) -> bool {
        let wants = if self.drives_lines { self.mcr & MCR_RTS } else { self.ier & IER_RECEIVED };
        wants != 0 && !self.loopback()
    }

    /// The level of the interrupt line. OUT2 drives the gate before it; in loopback mode all outputs are off.
    pub(crate) fn interrupt(&self) -> bool {
        self.mcr & (MCR_OUT2 | MCR_LOOPBACK) == MCR_OUT2 && self.identification() != IIR_NONE
    }

    /// The pending interrupt of the highest priority.
    fn identification(&self) -> u8 {
        let enabled = |bit| self.ier & bit != 0;
        if enabled(IER_LINE_STATUS) && self.overrun {
            IIR_LINE_STATUS
        } else if enabled(IER_RECEIVED) && self.received.len() >= self.trigger() {
            IIR_RECEIVED
        } else if enabled(IER_RECEIVED) && !self.received.is_empty() {
            // The hardware waits four characters' time for more; nobody gains by waiting here, and every key arrives at once.
            IIR_TIMEOUT
        } else if enabled(IER_TRANSMIT_EMPTY) && self.transmit_empty {
            IIR_TRANSMIT_EMPTY
        } else if enabled(IER_MODEM_STATUS) && self.msr & 0x0f != 0 {
            IIR_MODEM_STATUS
        } else {
            IIR_NONE
        }
    }

    /// In loopback mode the modem control outputs are wired to the modem status inputs.
    fn update_modem_status(&mut self) {
        let lines = if self.loopback() {
            let wire = |output, input| if self.mcr & output != 0 { input } else { 0 };
            wire(MCR_RTS, MSR_CTS) | wire(MCR_DTR, MSR_DSR) | wire(MCR_OUT1, MSR_RI) | wire(MCR_OUT2, MSR_DCD)
        } else {
            MSR_CTS | MSR_DSR | MSR_DCD
        };
        let before = self.msr & 0xf0;
        let changed = (before ^ lines) & !(MSR_RI & lines);
        self.msr = lines | (self.msr & 0x0f) | changed >> MSR_CHANGES;
    }

    fn divisor_selected(&self) -> bool {
        self.lcr & LCR_DLAB != 0
    }

    fn loopback(&self) -> bool {
        self.mcr & MCR_LOOPBACK != 0
    }

    fn fifos(&self) -> bool {
        self.fcr & FCR_ENABLE != 0
    }

    fn depth(&self) -> usize {
        if self.fifos() { FIFO } else { 1 }
    }

    fn trigger(&self) -> usize {
        match self.fcr >> 6 {
            0 => 1,
            1 => 4,
            2 => 8,
            _ => 14,
        }
    }

    /// Writes the state, schema [`SCHEMA`].
    pub(crate) fn save(&self, state: &mut Encoder) {
        state.raw(&self.divisor).raw(&[self.ier, self.fcr, self.lcr, self.mcr, self.msr, self.scr]);
        state.bool(self.overrun).bool(self.transmit_empty).bool(self.drives_lines);
        let received: Vec<u8> = self.received.iter().copied().collect();
        state.bytes(&received);
    }

    /// Reads a state of any schema. Bits that no register has are dropped. Schema 1 does not say whether the guest drives the modem lines: it does if it does now.
    pub(crate) fn restore(state: &mut Decoder<'_>) -> Result<Self> {
        let divisor = state.array()?;
        let [ier, fcr, lcr, mcr, msr, scr] = state.array()?;
        let mut uart = Self {
            divisor,
            ier: ier & 0x0f,
            fcr: if fcr & FCR_ENABLE == 0 { 0 } else { fcr & (FCR_ENABLE | FCR_TRIGGER) },
            lcr,
            mcr: mcr & 0x1f,
            msr,
            scr,
            overrun: state.bool()?,
            transmit_empty: state.bool()?,
            drives_lines: match state.schema() {
                1 => mcr & (MCR_DTR | MCR_RTS) != 0,
                _ => state.bool()?,
            },
            received: VecDeque::with_capacity(FIFO),
        };
        uart.received.extend(state.bytes(uart.depth())?);
        Ok(uart)
    }
}
