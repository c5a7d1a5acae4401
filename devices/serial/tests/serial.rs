//! The serial port, from the guest's side and from the far end of its line.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use tenon_device_serial::Serial;
use tenon_testkit::{Bench, conformance};

const DATA: u64 = 0;
const IER: u64 = 1;
const IIR: u64 = 2;
const FCR: u64 = 2;
const LCR: u64 = 3;
const MCR: u64 = 4;
const LSR: u64 = 5;
const MSR: u64 = 6;
const SCR: u64 = 7;

/// DTR, RTS and OUT2: what a driver sets when it opens the port.
const OPEN: u64 = 0x0b;
const LOOPBACK: u64 = 0x10;

struct Port(Bench<Serial>);

impl Port {
    fn new() -> Self {
        Self(Bench::new(&[]).unwrap())
    }

    /// As a driver leaves it: FIFOs on with the trigger at `trigger`, open, with these interrupts.
    fn opened(trigger: u64, interrupts: u64) -> Self {
        let mut port = Self::new();
        port.write(FCR, trigger << 6 | 1);
        port.write(MCR, OPEN);
        port.write(IER, interrupts);
        port
    }

    fn read(&mut self, register: u64) -> u64 {
        self.0.read(0, register, 1)
    }

    fn write(&mut self, register: u64, value: u64) {
        self.0.write(0, register, 1, value);
    }

    fn typed(&mut self, bytes: &[u8]) {
        self.0.channel("console").push(bytes);
    }

    fn high(&self) -> bool {
        self.0.line(0).high
    }

    /// Everything that can be read now.
    fn read_all(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        while self.read(LSR) & 1 != 0 {
            bytes.push(u8::try_from(self.read(DATA)).unwrap());
        }
        bytes
    }
}

#[test]
fn it_does_what_every_host_relies_on() {
    conformance::<Serial>(&[]);
    conformance::<Serial>(&[("base", "0x2f8"), ("irq", "3")]);
}

#[test]
fn it_asks_for_the_ports_line_and_acpi_node_of_com1_or_of_another() {
    let bench = Bench::<Serial>::new(&[]).unwrap();
    let description = bench.description();
    assert_eq!((description.regions[0].base, description.regions[0].size), (Some(0x3f8), 8));
    assert_eq!(description.lines[0].gsi, Some(4));
    let com1 = description.acpi.clone().unwrap();
    assert_eq!((com1.hid.as_str(), com1.uid), ("PNP0501", 1));
    let bench = Bench::<Serial>::new(&[("base", "0x2f8"), ("irq", "3")]).unwrap();
    assert_eq!(bench.description().regions[0].base, Some(0x2f8));
    assert_eq!(bench.description().lines[0].gsi, Some(3));
    assert_ne!(bench.description().acpi.clone().unwrap().uid, 1);
    let error = Bench::<Serial>::new(&[("irq", "24")]).err().unwrap();
    assert!(error.to_string().contains("0 to 23"), "{error}");
}

#[test]
fn what_is_written_comes_out_and_the_transmitter_is_ready_again() {
    let mut port = Port::new();
    for byte in b"hello\n" {
        assert_eq!(port.read(LSR) & 0x60, 0x60);
        port.write(DATA, (*byte).into());
    }
    assert_eq!(port.0.channel("console").take_output(), b"hello\n");
}

#[test]
fn output_that_nobody_takes_is_dropped_and_said_once() {
    let mut port = Port::new();
    port.0.channel("console").set_capacity(2);
    for byte in b"abcdef" {
        port.write(DATA, (*byte).into());
    }
    assert_eq!(port.0.channel("console").take_output(), b"ab");
    assert_eq!(port.0.take_log().len(), 1);
    port.write(DATA, u64::from(b'g'));
    assert_eq!(port.0.channel("console").take_output(), b"g");
    let log = port.0.take_log();
    assert!(log.len() == 1 && log[0].1.contains("4 were dropped"), "{log:?}");
}

#[test]
fn each_key_interrupts_at_once_even_below_the_trigger_level() {
    let mut port = Port::opened(3, 1);
    assert!(!port.high());
    port.typed(b"x");
    assert!(port.high());
    assert_eq!(port.read(IIR), 0xcc, "timeout, with FIFOs");
    assert_eq!(port.read(LSR) & 1, 1);
    assert_eq!(port.read(DATA), u64::from(b'x'));
    assert!(!port.high());
    assert_eq!(port.read(IIR), 0xc1);
}

#[test]
fn the_trigger_level_tells_data_from_timeout() {
    for (trigger, level) in [(0, 1), (1, 4), (2, 8), (3, 14)] {
        let mut port = Port::opened(trigger, 1);
        for count in 1..=16 {
            port.typed(b"k");
            let expected = if count >= level { 0xc4 } else { 0xcc };
            assert_eq!(port.read(IIR), expected, "{count} bytes, trigger {level}");
        }
    }
}

#[test]
fn a_long_paste_arrives_whole_and_in_order() {
    let text: Vec<u8> = (0..5000_u32).map(|n| u8::try_from(n % 251).unwrap()).collect();
    let mut port = Port::opened(2, 1);
    port.typed(&text);
    assert_eq!(port.0.channel("console").pending(), text.len() - 16, "only what the FIFO holds is taken");
    assert_eq!(port.read_all(), text);
    assert_eq!(port.read(LSR) & 2, 0, "no overrun");
    port.typed(b"more");
    assert_eq!(port.read_all(), b"more", "the channel tells of bytes again");
}

#[test]
fn without_fifos_one_byte_is_held_and_the_others_wait() {
    let mut port = Port::new();
    port.write(MCR, OPEN);
    port.write(IER, 1);
    port.typed(b"abc");
    assert_eq!(port.read(IIR), 0x04, "data, without FIFOs");
    assert_eq!(port.0.channel("console").pending(), 2);
    assert_eq!(port.read_all(), b"abc");
}

#[test]
fn input_waits_until_the_guest_is_ready_for_it() {
    let mut port = Port::new();
    port.typed(b"early");
    // Linux: the port is probed, and becomes the console, which needs DTR and polls the line status for its output.
    port.write(MCR, 0x1a);
    port.write(MCR, 0);
    port.write(FCR, 0x07);
    port.read(DATA);
    port.write(MCR, 0x01);
    assert_eq!(port.read(LSR) & 1, 0, "RTS was not asserted yet");
    // Opening the port clears the FIFOs and the receiver first, and loses nothing by it.
    port.write(FCR, 0x07);
    port.read(LSR);
    port.read(DATA);
    port.write(MCR, OPEN);
    assert_eq!(port.read_all(), b"early");
    for closed in [OPEN & !2, 0] {
        port.write(MCR, closed);
        port.typed(b"held");
        assert_eq!(port.read(LSR) & 1, 0, "RTS is off");
        port.write(FCR, 0x07);
        port.write(MCR, OPEN);
        assert_eq!(port.read_all(), b"held");
    }
}

#[test]
fn a_guest_that_drives_no_modem_lines_is_given_what_it_polls_for() {
    let mut port = Port::new();
    port.write(FCR, 0x01);
    port.write(MCR, 0);
    port.typed(b"keys");
    assert_eq!(port.read(DATA), 0, "nothing comes unasked");
    assert_eq!(port.0.channel("console").pending(), 4);
    assert_eq!(port.read(LSR) & 1, 1);
    assert_eq!(port.read(LSR) & 1, 1);
    assert_eq!(port.0.channel("console").pending(), 3, "one byte is shown until it is read");
    port.write(FCR, 0x07);
    assert_eq!(port.read_all(), b"keys", "what was shown survives a clearing of the FIFOs");
    port.typed(&[b'x'; 100]);
    assert_eq!(port.read_all(), [b'x'; 100]);
    assert!(!port.high());
    // Without FIFOs as well.
    port.write(FCR, 0);
    port.typed(b"more");
    assert_eq!(port.read_all(), b"more");
    // Until it drives them; then RTS counts, as long as the machine is on.
    port.typed(b"later");
    port.write(MCR, 0x01);
    port.write(MCR, 0);
    assert_eq!(port.read(LSR) & 1, 0);
    port.0.round_trip();
    assert_eq!(port.read(LSR) & 1, 0);
    port.0.reset();
    assert_eq!(port.read_all(), b"later");
}

#[test]
fn a_guest_that_drives_no_modem_lines_may_listen_by_its_interrupt() {
    let mut port = Port::new();
    port.write(FCR, 0x01);
    port.write(MCR, 0x08);
    port.typed(b"ab");
    assert!(!port.high());
    port.write(IER, 1);
    assert!(port.high());
    assert_eq!(port.read(IIR), 0xc4);
    assert_eq!(port.read_all(), b"ab");
    assert!(!port.high());
    port.typed(b"c");
    assert!(port.high());
    assert_eq!(port.read(DATA), u64::from(b'c'));
}

#[test]
fn a_guest_that_drives_no_modem_lines_may_switch_the_fifos_off_while_they_are_full() {
    let mut port = Port::new();
    port.write(FCR, 1);
    port.write(IER, 1);
    port.typed(b"sixteen bytes in and more");
    port.write(IER, 0);
    port.write(FCR, 0);
    port.0.round_trip();
    port.write(IER, 1);
    port.0.round_trip();
    // The chip forgets what its FIFO held; the others waited on the line.
    assert_eq!(port.read_all(), b" and more");
}

#[test]
fn loopback_shows_nothing_of_the_line() {
    let mut port = Port::new();
    port.write(MCR, LOOPBACK);
    port.typed(b"k");
    assert_eq!(port.read(LSR) & 1, 0);
    port.write(MCR, LOOPBACK | 3);
    port.write(MCR, 0);
    assert_eq!(port.read_all(), b"k", "in loopback mode RTS is not asserted");
}

#[test]
fn a_state_of_the_version_before_is_read() {
    for (modem, given) in [(0, 1), (1, 0), (OPEN, 1)] {
        let mut port = Port::new();
        port.write(MCR, modem);
        let mut state = port.0.save();
        assert_eq!(state.schema, 2);
        // Behind the divisor, six registers and two flags.
        state.data.remove(10);
        state.schema = 1;
        let mut port = Port(Bench::restored(&[], &state).unwrap());
        port.typed(b"k");
        assert_eq!(port.read(LSR) & 1, given, "{modem:#x}");
    }
}

#[test]
fn the_transmitter_interrupts_when_enabled_and_after_each_byte_until_identified() {
    let mut port = Port::opened(0, 0);
    port.write(IER, 2);
    assert!(port.high(), "enabling it while empty raises it");
    assert_eq!(port.read(IIR), 0xc2);
    assert!(!port.high(), "reading the identification clears it");
    assert_eq!(port.read(IIR), 0xc1);
    port.write(DATA, 0x41);
    assert!(port.high());
    port.write(IER, 0);
    assert!(!port.high());
    port.write(IER, 2);
    assert_eq!(port.read(IIR), 0xc2, "Linux looks for this to find chips that have it wrong");
    assert_eq!(port.0.line(0).edges, 3);
}

#[test]
fn interrupts_are_told_in_the_order_of_their_priority() {
    let mut port = Port::opened(0, 0x0f);
    port.write(MCR, LOOPBACK);
    // Overrun: the seventeenth byte. The transmitter is empty, and the modem lines have changed.
    for byte in 0..17 {
        port.write(DATA, byte);
    }
    let mut told = Vec::new();
    loop {
        let identification = port.read(IIR) & 0x0f;
        told.push(identification);
        match identification {
            0x6 => assert_eq!(port.read(LSR) & 0x1f, 0b11, "overrun and data"),
            0x4 => assert_eq!(port.read_all(), (0..16).collect::<Vec<u8>>()),
            0x2 => {}
            0x0 => assert_ne!(port.read(MSR) & 0x0f, 0),
            _ => break,
        }
    }
    assert_eq!(told, [0x6, 0x4, 0x2, 0x0, 0x1]);
}

#[test]
fn out2_gates_the_interrupt() {
    let mut port = Port::opened(0, 1);
    port.typed(b"x");
    assert!(port.high());
    port.write(MCR, OPEN & !8);
    assert!(!port.high());
    assert_eq!(port.read(IIR), 0xc4, "the chip itself still has it");
    port.write(MCR, OPEN);
    assert!(port.high());
    port.write(MCR, OPEN | LOOPBACK);
    assert!(!port.high(), "outputs are off in loopback mode");
}

#[test]
fn loopback_wires_outputs_to_inputs_and_keeps_bytes_inside() {
    let mut port = Port::new();
    assert_eq!(port.read(MSR), 0xb0, "a ready peer");
    // Linux's probe: RTS and OUT2 come back as CTS and DCD.
    port.write(MCR, 0x1a);
    assert_eq!(port.read(MSR) & 0xf0, 0x90);
    for (output, input) in [(0x1, 0x20), (0x2, 0x10), (0x4, 0x40), (0x8, 0x80)] {
        port.write(MCR, LOOPBACK | output);
        assert_eq!(port.read(MSR) & 0xf0, input);
    }
    port.write(MCR, LOOPBACK);
    port.read(MSR);
    port.write(MCR, LOOPBACK | 0x4);
    assert_eq!(port.read(MSR) & 0x0f, 0, "the ring indicator is told of when it ends");
    port.write(MCR, LOOPBACK);
    assert_eq!(port.read(MSR) & 0x0f, 0x4);
    assert_eq!(port.read(MSR) & 0x0f, 0, "reading clears the changes");
    port.write(DATA, 0x55);
    assert_eq!(port.read(DATA), 0x55);
    assert_eq!(port.0.channel("console").take_output(), b"");
}

#[test]
fn linux_takes_it_for_a_16550a() {
    let mut port = Port::new();
    // No 8250: it has a scratch register.
    for value in [0xa5, 0x5a] {
        port.write(SCR, value);
        assert_eq!(port.read(SCR), value);
    }
    // The upper half of the interrupt enable register does not exist.
    port.write(IER, 0xff);
    assert_eq!(port.read(IER), 0x0f);
    port.write(IER, 0);
    // 16450, 16550 and 16550A differ in what the FIFO enable bit does to the identification.
    port.write(FCR, 1);
    assert_eq!(port.read(IIR) >> 6, 3);
    // 16650 and later have an enhanced feature register there while LCR is 0xbf, and 16750 a deeper FIFO behind bit 5.
    port.write(LCR, 0xbf);
    assert_ne!(port.read(2), 0);
    port.write(LCR, 0);
    port.write(FCR, 0x21);
    assert_eq!(port.read(IIR) & 0x20, 0);
    port.write(FCR, 0);
    assert_eq!(port.read(IIR) >> 6, 0);
}

#[test]
fn the_divisor_hides_behind_its_latch() {
    let mut port = Port::new();
    port.write(IER, 5);
    port.write(LCR, 0x83);
    port.write(DATA, 1);
    port.write(IER, 2);
    assert_eq!((port.read(DATA), port.read(IER)), (1, 2));
    port.write(LCR, 0x03);
    assert_eq!(port.read(IER), 5);
    assert_eq!(port.0.channel("console").take_output(), b"", "the divisor is not sent");
    // Both halves in one access.
    port.write(LCR, 0x83);
    port.0.write(0, 0, 2, 0x0180);
    assert_eq!(port.0.read(0, 0, 2), 0x0180);
}

#[test]
fn clearing_the_receiver_forgets_what_was_received_and_nothing_else() {
    let mut port = Port::opened(0, 1);
    port.typed(&[7; 20]);
    port.write(FCR, 0x03);
    assert!(port.read_all().len() == 4, "the sixteen are gone, the four were outside");
}

#[test]
fn a_restored_port_goes_on_in_the_middle_of_a_paste() {
    let mut port = Port::opened(2, 3);
    port.typed(&[b'p'; 40]);
    assert_eq!(port.read(DATA), u64::from(b'p'));
    port.0.round_trip();
    assert!(port.high());
    assert_eq!(port.read_all().len(), 39);
}
