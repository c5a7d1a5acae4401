//! The console, from the driver's side and from the far ends of its ports.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use tenon_device_virtio_console::Console;
use tenon_testkit::{Random, Ticket, VirtioBench, VirtioSetup, virtio_conformance};

const SIZE: u64 = 1;
const MULTIPORT: u64 = 2;

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const TO_DRIVER: u16 = 2;
const FROM_DRIVER: u16 = 3;
const RECEIVE_1: u16 = 4;
const TRANSMIT_1: u16 = 5;
const TRANSMIT_2: u16 = 7;

const DEVICE_READY: u16 = 0;
const DEVICE_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const RESIZE: u16 = 5;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

struct Terminal {
    bench: VirtioBench<Console>,
    /// Buffers in which something is to come, and what they are for.
    buffers: Vec<(u16, Ticket)>,
}

impl Terminal {
    fn with(settings: &[(&str, &str)], features: u64) -> Self {
        let mut bench = VirtioBench::new(settings).unwrap();
        bench.activate(features).unwrap();
        Self { bench, buffers: Vec::new() }
    }

    /// A console and nothing else.
    fn plain() -> Self {
        Self::with(&[], SIZE)
    }

    /// A console and a port `agent`, both open, after all that is to be said was said.
    fn opened() -> Self {
        let mut terminal = Self::with(&[("ports", "agent")], SIZE | MULTIPORT);
        terminal.listen(32, 64);
        terminal.say(0, DEVICE_READY, 1);
        for port in [0, 1] {
            terminal.say(port, PORT_READY, 1);
            terminal.say(port, PORT_OPEN, 1);
        }
        terminal.heard();
        terminal
    }

    fn say(&mut self, port: u32, event: u16, value: u16) {
        let mut message = port.to_le_bytes().to_vec();
        message.extend(event.to_le_bytes());
        message.extend(value.to_le_bytes());
        self.bench.ask(FROM_DRIVER, &message, 0);
    }

    /// Gives buffers for what comes in a queue.
    fn give(&mut self, queue: u16, rooms: &[usize]) {
        let requests: Vec<(&[u8], usize)> = rooms.iter().map(|room| (&[][..], *room)).collect();
        let given = self.bench.submit(queue, &requests);
        self.buffers.extend(given.into_iter().map(|request| (queue, request)));
    }

    /// Gives buffers for messages.
    fn listen(&mut self, count: usize, room: usize) {
        self.give(TO_DRIVER, &vec![room; count]);
    }

    /// What has come in a queue since the last call, one entry for each buffer.
    fn came(&mut self, queue: u16) -> Vec<Vec<u8>> {
        let mut came = Vec::new();
        let Self { bench, buffers } = self;
        buffers.retain(|(buffer, request)| {
            let answer = if *buffer == queue { bench.answered(*request) } else { None };
            let Some(answer) = answer else { return true };
            came.push(answer.data);
            false
        });
        came
    }

    /// What the device has said: port, event, value and what follows.
    fn heard(&mut self) -> Vec<(u32, u16, u16, Vec<u8>)> {
        let said = self.came(TO_DRIVER).into_iter().filter(|bytes| !bytes.is_empty());
        said.map(|bytes| {
            (
                u32::from_le_bytes(bytes[..4].try_into().unwrap()),
                u16::from_le_bytes(bytes[4..6].try_into().unwrap()),
                u16::from_le_bytes(bytes[6..8].try_into().unwrap()),
                bytes[8..].to_vec(),
            )
        })
        .collect()
    }

    fn output(&mut self, channel: &str) -> Vec<u8> {
        self.bench.channel(channel).take_output()
    }

    fn push(&mut self, channel: &str, bytes: &[u8]) {
        self.bench.channel(channel).push(bytes);
    }

    /// All output of the terminal, which a slow reader takes piece by piece.
    fn drain(&mut self, length: usize) -> Vec<u8> {
        let mut seen = Vec::new();
        while seen.len() < length {
            let piece = self.output("console");
            assert!(!piece.is_empty(), "no more comes after {} of {length} bytes", seen.len());
            seen.extend(piece);
        }
        seen
    }
}

#[test]
fn it_does_what_every_host_relies_on() {
    virtio_conformance::<Console>(&[], &VirtioSetup::new());
    virtio_conformance::<Console>(&[("ports", "agent,log"), ("size", "132x43")], &VirtioSetup::new());
}

#[test]
fn settings_that_cannot_be_are_refused_and_say_what_would_be_right() {
    let refusal = |key, value: &str| VirtioBench::<Console>::new(&[(key, value)]).err().unwrap().to_string();
    for size in ["", "80", "80x", "0x25", "80x65536", "-1x4", "80x25x2"] {
        assert!(refusal("size", size).contains("80x25"), "{size}");
    }
    let many: Vec<String> = (0..32).map(|n| format!("port{n}")).collect();
    for ports in ["console", "a,a", "a b", "\u{e9}", &"n".repeat(65), &many.join(",")] {
        assert!(refusal("ports", ports).contains("different names"), "{ports}");
    }
}

#[test]
fn each_port_has_two_queues_around_those_of_control() {
    let bench = VirtioBench::<Console>::new(&[("ports", "agent, log"), ("size", "132x43")]);
    let mut bench = bench.unwrap();
    let queues: Vec<&str> = bench.description().queues.iter().map(|queue| queue.name.as_str()).collect();
    let (control, others) =
        (["control-receive", "control-transmit"], ["receive1", "transmit1", "receive2", "transmit2"]);
    assert_eq!(queues, [&["receive0", "transmit0"][..], &control, &others].concat());
    assert_eq!(bench.description().channels, ["console", "agent", "log"]);
    assert_eq!((bench.config_read(0, 2), bench.config_read(2, 2), bench.config_read(4, 4)), (132, 43, 3));
}

#[test]
fn what_the_guest_writes_comes_out() {
    let mut terminal = Terminal::plain();
    terminal.bench.submit(TRANSMIT, &[(b"hello ", 0), (b"", 0), (b"world", 0)]);
    assert_eq!(terminal.output("console"), b"hello world");
    assert!(terminal.bench.unanswered().is_empty());
}

#[test]
fn a_far_end_that_takes_nothing_holds_the_guest_off_and_loses_nothing() {
    let mut terminal = Terminal::plain();
    terminal.bench.channel("console").set_capacity(10);
    let text: Vec<u8> = (0..100).collect();
    terminal.bench.submit(TRANSMIT, &[(&text[..25], 0), (&text[25..30], 0), (&text[30..], 0)]);
    assert_eq!(terminal.bench.unanswered().len(), 3);
    assert_eq!(terminal.drain(25), text[..30]);
    assert_eq!(terminal.bench.unanswered().len(), 1, "the first two have been taken whole");
    assert_eq!(terminal.drain(70), text[30..]);
    assert!(terminal.bench.unanswered().is_empty());
}

#[test]
fn what_is_typed_waits_until_the_guest_reads() {
    let mut terminal = Terminal::plain();
    terminal.push("console", b"early");
    assert_eq!(terminal.bench.channel("console").pending(), 5, "it stays outside");
    terminal.give(RECEIVE, &[3, 3, 3]);
    assert_eq!(terminal.came(RECEIVE), [b"ear".to_vec(), b"ly".to_vec()]);
    terminal.push("console", b"late");
    assert_eq!(terminal.came(RECEIVE), [b"lat".to_vec()]);
    terminal.give(RECEIVE, &[3]);
    assert_eq!(terminal.came(RECEIVE), [b"e".to_vec()]);
}

#[test]
fn ports_are_introduced_one_by_one() {
    let mut terminal = Terminal::with(&[("ports", "agent")], MULTIPORT);
    terminal.listen(16, 64);
    terminal.say(0, DEVICE_READY, 1);
    assert_eq!(terminal.heard(), [(0, DEVICE_ADD, 1, vec![]), (1, DEVICE_ADD, 1, vec![])]);
    terminal.say(1, PORT_READY, 1);
    assert_eq!(terminal.heard(), [(1, PORT_NAME, 1, b"agent".to_vec()), (1, PORT_OPEN, 1, vec![])]);
    terminal.say(0, PORT_READY, 1);
    // Rows before columns: see `control.rs`.
    let size = vec![80, 0, 25, 0];
    assert_eq!(
        terminal.heard(),
        [(0, CONSOLE_PORT, 1, vec![]), (0, RESIZE, 0, size), (0, PORT_OPEN, 1, vec![])]
    );
}

#[test]
fn what_is_to_be_said_waits_for_buffers_and_is_said_once() {
    let mut terminal = Terminal::with(&[("ports", "agent")], MULTIPORT);
    let before = terminal.bench.save().data.len();
    for _ in 0..1000 {
        terminal.say(0, DEVICE_READY, 1);
        terminal.say(1, PORT_READY, 1);
    }
    assert_eq!(terminal.bench.save().data.len(), before, "nothing grows");
    // Too short for any message, then for the name.
    terminal.listen(2, 7);
    terminal.listen(3, 8);
    assert_eq!(terminal.heard(), [(0, DEVICE_ADD, 1, vec![]), (1, DEVICE_ADD, 1, vec![])]);
    terminal.bench.round_trip();
    terminal.listen(16, 64);
    assert_eq!(terminal.heard(), [(1, PORT_NAME, 1, b"agent".to_vec()), (1, PORT_OPEN, 1, vec![])]);
}

#[test]
fn a_port_gets_its_own_bytes_and_only_while_it_is_open() {
    let mut terminal = Terminal::with(&[("ports", "agent")], MULTIPORT);
    terminal.give(RECEIVE, &[16]);
    terminal.give(RECEIVE_1, &[16]);
    terminal.push("agent", b"to agent");
    terminal.push("console", b"to console");
    assert_eq!(terminal.bench.unanswered().len(), 2, "neither is open");
    terminal.say(1, PORT_OPEN, 1);
    assert_eq!((terminal.came(RECEIVE_1), terminal.came(RECEIVE)), (vec![b"to agent".to_vec()], vec![]));
    terminal.say(0, PORT_OPEN, 1);
    assert_eq!(terminal.came(RECEIVE), [b"to console".to_vec()]);
    terminal.say(1, PORT_OPEN, 0);
    terminal.give(RECEIVE_1, &[16]);
    terminal.push("agent", b"later");
    assert!(terminal.came(RECEIVE_1).is_empty());
    terminal.bench.submit(TRANSMIT_1, &[(b"from agent", 0)]);
    assert_eq!((terminal.output("console"), terminal.output("agent")), (vec![], b"from agent".to_vec()));
    terminal.say(1, PORT_OPEN, 1);
    assert_eq!(terminal.came(RECEIVE_1), [b"later".to_vec()]);
}

#[test]
fn a_port_that_is_full_does_not_hold_up_another() {
    let mut terminal = Terminal::opened();
    terminal.bench.channel("console").set_capacity(1);
    let stuck = terminal.bench.request(TRANSMIT, b"stuck", 0);
    terminal.bench.ask(TRANSMIT_1, b"free", 0);
    assert_eq!(terminal.output("agent"), b"free");
    assert!(terminal.bench.answered(stuck).is_none());
}

#[test]
fn a_resize_is_told_in_the_way_that_the_driver_knows() {
    let mut terminal = Terminal::plain();
    terminal.bench.adjust("size", "100x50").unwrap();
    assert_eq!((terminal.bench.config_changes(), terminal.bench.config_read(0, 4)), (1, 50 << 16 | 100));
    terminal.bench.adjust("size", "100x50").unwrap();
    assert_eq!(terminal.bench.config_changes(), 1, "nothing has changed");
    assert!(terminal.bench.adjust("size", "wide").unwrap_err().to_string().contains("80x25"));
    assert!(terminal.bench.adjust("ports", "x").is_err());
    let mut terminal = Terminal::opened();
    terminal.bench.adjust("size", "100x50").unwrap();
    assert_eq!(terminal.heard(), [(0, RESIZE, 0, vec![100, 0, 50, 0])]);
    terminal.bench.reset();
    assert_eq!(terminal.bench.config_read(0, 4), 50 << 16 | 100, "settings stay as adjusted");
}

#[test]
fn emergency_output_needs_no_driver() {
    let mut bench = VirtioBench::<Console>::new(&[]).unwrap();
    for byte in b"boom" {
        bench.config_write(8, 4, (*byte).into());
    }
    bench.config_write(0, 2, 1);
    assert_eq!(bench.channel("console").take_output(), b"boom");
    assert_eq!(bench.config_read(0, 2), 80, "the driver does not set the size");
}

#[test]
fn a_restore_goes_on_in_the_middle_of_a_request() {
    let mut terminal = Terminal::opened();
    terminal.bench.channel("console").set_capacity(4);
    terminal.bench.submit(TRANSMIT, &[(b"first and ", 0), (b"second", 0)]);
    terminal.give(RECEIVE, &[8]);
    terminal.bench.round_trip();
    assert_eq!(terminal.drain(16), b"first and second");
    terminal.push("console", b"typed");
    assert_eq!(terminal.came(RECEIVE), [b"typed".to_vec()]);
}

#[test]
fn a_reset_forgets_requests_and_what_the_driver_said() {
    let mut terminal = Terminal::opened();
    let new = VirtioBench::<Console>::new(&[("ports", "agent")]).unwrap().save();
    terminal.bench.channel("console").set_capacity(4);
    terminal.bench.submit(TRANSMIT, &[(b"stuck in the middle", 0)]);
    terminal.give(RECEIVE, &[8]);
    terminal.say(1, PORT_READY, 1);
    terminal.bench.reset();
    assert_eq!(terminal.bench.save(), new);
    assert_eq!(terminal.output("console"), b"stuc");
    terminal.bench.activate(0).unwrap();
    terminal.bench.ask(TRANSMIT, b"new", 0);
    assert_eq!(terminal.output("console"), b"new");
}

#[test]
fn whatever_a_driver_writes_no_byte_is_lost() {
    const CHANNELS: [&str; 3] = ["console", "agent", "log"];
    let mut random = Random::new(0x636f_6e00_0000_0001);
    let mut terminal = Terminal::with(&[("ports", "agent,log")], SIZE | MULTIPORT);
    let mut sent = [const { Vec::new() }; 3];
    let mut seen = [const { Vec::new() }; 3];
    let (mut typed, mut received) = (0, 0);
    for round in 0..20_000 {
        let port = random.index(3);
        match random.below32(8) {
            0 => {
                let bytes = random.some_bytes(200);
                typed += bytes.len();
                terminal.push(CHANNELS[port], &bytes);
            }
            1 => seen[port].extend(terminal.output(CHANNELS[port])),
            2 => terminal.bench.channel(CHANNELS[port]).set_capacity(random.index(100) + 1),
            3 if round % 50 == 0 => terminal.bench.round_trip(),
            3 => {
                let size = format!("{}x{}", random.below32(70_000), random.below32(300));
                let _ = terminal.bench.adjust("size", &size);
            }
            _ => {
                let queue = u16::try_from(random.below32(8)).unwrap();
                let mut bytes = random.some_bytes(300);
                if queue == FROM_DRIVER && random.below32(4) > 0 {
                    bytes = random.below32(4).to_le_bytes().to_vec();
                    bytes.extend([
                        random.below32(8).to_le_bytes()[0],
                        0,
                        random.below32(2).to_le_bytes()[0],
                        0,
                    ]);
                }
                match queue {
                    TRANSMIT => sent[0].extend(&bytes),
                    TRANSMIT_1 => sent[1].extend(&bytes),
                    TRANSMIT_2 => sent[2].extend(&bytes),
                    _ => {}
                }
                let room = random.index(40);
                let given = terminal.bench.request(queue, &bytes, room);
                terminal.buffers.push((queue, given));
            }
        }
        for queue in [RECEIVE, RECEIVE_1, 6] {
            received += terminal.came(queue).concat().len();
        }
    }
    for (port, name) in CHANNELS.into_iter().enumerate() {
        terminal.bench.channel(name).set_capacity(1 << 20);
        while seen[port].len() < sent[port].len() {
            let output = terminal.output(name);
            assert!(!output.is_empty(), "{name} stands still");
            seen[port].extend(output);
        }
    }
    assert!(seen == sent);
    let waiting: usize = CHANNELS.into_iter().map(|name| terminal.bench.channel(name).pending()).sum();
    assert_eq!(received + waiting, typed);
    assert!(received > typed / 4, "{received} of {typed} bytes were received");
}
