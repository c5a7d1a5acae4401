//! The network card, from the driver's side and from its port.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use tenon_device_virtio_net::Net;
use tenon_sdk::virtio::{Offloads, PortInfo, Result};
use tenon_testkit::{Random, Ticket, VirtioBench, VirtioSetup, virtio_conformance};

const CSUM: u64 = 1 << 0;
const GUEST_CSUM: u64 = 1 << 1;
const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
const GUEST_TSO4: u64 = 1 << 7;
const GUEST_TSO6: u64 = 1 << 8;
const HOST_TSO: u64 = 3 << 11;
const MRG_RXBUF: u64 = 1 << 15;
const CTRL_VQ: u64 = 1 << 17;
const CTRL: u64 = CTRL_VQ | 1 << 18 | 1 << 23 | CTRL_GUEST_OFFLOADS;
const MQ: u64 = 1 << 22;

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const CONTROL: u16 = 2;

const OK: u8 = 0;
const ERROR: u8 = 1;

const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];

const ALL: Offloads = Offloads { checksum: true, tso4: true, tso6: true };
const NONE: Offloads = Offloads { checksum: false, tso4: false, tso6: false };

fn port() -> PortInfo {
    PortInfo { mac: MAC, mtu: 1500, link_up: true, send: ALL, receive: ALL }
}

struct Card {
    bench: VirtioBench<Net>,
    /// Buffers of the receive queue.
    buffers: Vec<Ticket>,
}

impl Card {
    /// Before its driver is ready.
    fn started(settings: &[(&str, &str)], port: PortInfo) -> Result<Self> {
        let setup = VirtioSetup::new().port("net", port);
        Ok(Self { bench: VirtioBench::with(settings, &setup)?, buffers: Vec::new() })
    }

    /// Ready, with a driver that accepted these features.
    fn with(settings: &[(&str, &str)], features: u64) -> Self {
        let mut card = Self::started(settings, port()).unwrap();
        card.bench.activate(features).unwrap();
        card
    }

    fn new(features: u64) -> Self {
        Self::with(&[], features)
    }

    /// The acknowledgement of a command.
    fn command(&mut self, queue: u16, class: u8, command: u8, data: &[u8]) -> u8 {
        let answer = self.bench.ask(queue, &[&[class, command], data].concat(), 1);
        assert_eq!(answer.written, 1);
        answer.data[0]
    }

    fn buffers(&mut self, rooms: &[usize]) {
        let requests: Vec<(&[u8], usize)> = rooms.iter().map(|room| (&[][..], *room)).collect();
        self.buffers.extend(self.bench.submit(RECEIVE, &requests));
    }

    /// What came in buffers since the last call.
    fn came(&mut self) -> Vec<Vec<u8>> {
        let mut came = Vec::new();
        let Self { bench, buffers } = self;
        buffers.retain(|request| {
            let Some(answer) = bench.answered(*request) else { return true };
            came.push(answer.data);
            false
        });
        came
    }

    /// What was received: the pieces of each frame, whose headers say how many there are.
    fn received(&mut self) -> Vec<Vec<Vec<u8>>> {
        let mut came = self.came().into_iter();
        let mut frames = Vec::new();
        // A buffer that came back empty had no room for a header.
        while let Some(first) = came.find(|bytes| !bytes.is_empty()) {
            let count = u16::from_le_bytes([first[10], first[11]]);
            let rest = came.by_ref().take(usize::from(count) - 1);
            frames.push(std::iter::once(first).chain(rest).collect());
        }
        frames
    }

    /// Each frame that was received, put together.
    fn received_whole(&mut self) -> Vec<Vec<u8>> {
        self.received().iter().map(|pieces| pieces.concat()).collect()
    }

    /// The mark of each frame that was received.
    fn marks(&mut self) -> Vec<u8> {
        self.received_whole().iter().map(|frame| frame[12]).collect()
    }

    fn push(&mut self, frame: &[u8]) {
        self.bench.port("net").push_with_header(frame);
    }

    fn sent(&mut self) -> Vec<Vec<u8>> {
        self.bench.port("net").take_sent()
    }

    fn accepted(&mut self) -> Offloads {
        self.bench.port("net").accepted()
    }

    fn address(&mut self) -> [u8; 6] {
        *self.bench.config_read(0, 8).to_le_bytes().first_chunk().unwrap()
    }

    fn is_up(&mut self) -> bool {
        self.bench.config_read(6, 2) == 1
    }
}

/// A frame of this length with its header; the frame's bytes are all `mark`.
fn frame(length: usize, mark: u8) -> Vec<u8> {
    [&[0; 12][..], &vec![mark; length - 12]].concat()
}

#[test]
fn it_does_what_every_host_relies_on() {
    virtio_conformance::<Net>(&[], &VirtioSetup::new());
    virtio_conformance::<Net>(
        &[("queues", "3"), ("mergeable", "false"), ("tso", "false"), ("link", "down")],
        &VirtioSetup::new(),
    );
}

#[test]
fn it_offers_what_its_settings_say() {
    let features =
        |settings: &[(&str, &str)]| Card::started(settings, port()).unwrap().bench.description().features;
    let usual = features(&[]);
    assert_eq!(usual & (CSUM | HOST_TSO | MRG_RXBUF | MQ), CSUM | HOST_TSO | MRG_RXBUF);
    assert_eq!(features(&[("tso", "false")]) & (CSUM | HOST_TSO), CSUM);
    assert_eq!(features(&[("checksum", "false")]) & (CSUM | HOST_TSO), 0, "segments come without checksums");
    assert_eq!(features(&[("mergeable", "false")]) & MRG_RXBUF, 0);
    assert_eq!(features(&[("queues", "2")]) & MQ, MQ);
    let bench = Card::started(&[("queues", "2")], port()).unwrap().bench;
    let queues: Vec<&str> = bench.description().queues.iter().map(|queue| queue.name.as_str()).collect();
    assert_eq!(queues, ["receive0", "transmit0", "receive1", "transmit1", "control"]);
}

#[test]
fn a_port_that_has_to_finish_frames_is_named_in_the_log() {
    let checksum = Offloads { checksum: true, ..NONE };
    for (settings, send, said) in [
        (&[][..], ALL, &[][..]),
        (&[], NONE, &["checksum=false", "tso=false"]),
        (&[], checksum, &["tso=false"]),
        (&[("tso", "false")], checksum, &[]),
        (&[("checksum", "false")], NONE, &[]),
    ] {
        let mut bench = Card::started(settings, PortInfo { send, ..port() }).unwrap().bench;
        let log = bench.take_log();
        assert_eq!(log.len(), said.len(), "{log:?}");
        assert!(log.iter().zip(said).all(|((_, line), said)| line.contains(said)), "{log:?}");
    }
}

#[test]
fn settings_that_cannot_be_are_refused_and_say_what_would_be_right() {
    let refusal = |key, value| Card::started(&[(key, value)], port()).err().unwrap().to_string();
    assert!(refusal("queues", "17").contains("1 to 16"));
    assert!(refusal("link", "sideways").contains("`up` or `down`"));
}

#[test]
fn the_configuration_space_describes_the_port() {
    let mut card = Card::with(&[("queues", "3")], 0);
    assert_eq!((card.address(), card.is_up()), (MAC, true));
    assert_eq!((card.bench.config_read(8, 2), card.bench.config_read(10, 2)), (3, 1500));
}

#[test]
fn a_batch_is_sent_in_its_order_with_one_entry() {
    let mut card = Card::new(0);
    let frames: Vec<Vec<u8>> = (0..64).map(|n| frame(60 + usize::from(n), n)).collect();
    let batch: Vec<(&[u8], usize)> = frames.iter().map(|frame| (frame.as_slice(), 0)).collect();
    card.bench.submit(TRANSMIT, &batch);
    assert_eq!(card.bench.entries(), 1);
    assert_eq!(card.sent(), frames);
    assert!(card.bench.unanswered().is_empty());
}

#[test]
fn what_is_no_frame_is_not_sent() {
    let mut card = Card::new(0);
    for length in [0, 1, 11, 12, 25] {
        card.bench.ask(TRANSMIT, &vec![0; length], 0);
    }
    assert!(card.sent().is_empty());
}

#[test]
fn frames_wait_for_buffers_and_buffers_for_frames() {
    let mut card = Card::new(MRG_RXBUF);
    card.push(&frame(100, 1));
    card.push(&frame(100, 2));
    card.buffers(&[1526]);
    assert_eq!(card.marks(), [1]);
    card.buffers(&[1526, 1526]);
    assert_eq!(card.marks(), [2]);
    card.push(&frame(60, 3));
    assert_eq!(card.marks(), [3]);
}

#[test]
fn a_large_frame_is_spread_over_as_many_buffers_as_it_needs() {
    let mut card = Card::new(MRG_RXBUF);
    card.buffers(&[1000; 8]);
    card.push(&frame(3500, 7));
    card.push(&frame(1000, 8));
    let lengths: Vec<Vec<usize>> =
        card.received().iter().map(|pieces| pieces.iter().map(Vec::len).collect()).collect();
    assert_eq!(lengths, [vec![1000, 1000, 1000, 500], vec![1000]]);
    card.push(&frame(3001, 9));
    assert!(card.received().is_empty(), "three buffers are left, and four are needed");
    card.push(&frame(60, 10));
    assert!(card.received().is_empty(), "frames do not overtake each other");
    card.buffers(&[1000; 2]);
    assert_eq!(card.marks(), [9, 10]);
}

#[test]
fn without_mergeable_buffers_a_frame_has_one_and_is_dropped_if_it_is_larger() {
    let mut card = Card::new(0);
    card.buffers(&[1526, 1526]);
    for (length, mark) in [(1526, 1), (1527, 2), (60, 3)] {
        card.push(&frame(length, mark));
    }
    let received = card.received();
    assert!(received.iter().all(|pieces| pieces.len() == 1));
    assert_eq!(received.iter().map(|pieces| pieces[0][12]).collect::<Vec<_>>(), [1, 3]);
    assert_eq!((card.bench.port("net").dropped(), card.bench.port("net").pending()), (1, 0));
}

#[test]
fn buffers_without_room_for_a_header_come_back() {
    let mut card = Card::new(MRG_RXBUF);
    card.buffers(&[0, 11, 12, 2000]);
    assert_eq!(card.came().len(), 2);
    card.push(&frame(60, 1));
    assert_eq!(card.received()[0].iter().map(Vec::len).collect::<Vec<_>>(), [12, 48]);
}

#[test]
fn the_port_is_told_what_the_driver_accepts() {
    let mut card = Card::new(GUEST_CSUM | GUEST_TSO4);
    assert_eq!(card.accepted(), Offloads { tso6: false, ..ALL });
    card.bench.reset();
    assert_eq!(card.accepted(), NONE);
    card.bench.activate(GUEST_TSO4 | GUEST_TSO6).unwrap();
    assert_eq!(card.accepted(), NONE, "no segments without checksums");

    let checksum = Offloads { checksum: true, ..NONE };
    let mut card = Card::new(CTRL | GUEST_CSUM | GUEST_TSO4);
    assert_eq!(card.command(CONTROL, 5, 0, &GUEST_CSUM.to_le_bytes()), OK);
    assert_eq!(card.accepted(), checksum);
    card.bench.round_trip();
    assert_eq!(card.accepted(), checksum);
    for wrong in [GUEST_CSUM | GUEST_TSO6, u64::MAX] {
        assert_eq!(card.command(CONTROL, 5, 0, &wrong.to_le_bytes()), ERROR, "was not accepted");
    }
    assert_eq!(card.accepted(), checksum);
}

#[test]
fn the_driver_sets_its_address() {
    let mut card = Card::new(CTRL);
    assert_eq!(card.command(CONTROL, 1, 1, &[2, 4, 6, 8, 10, 12]), OK);
    assert_eq!(card.address(), [2, 4, 6, 8, 10, 12]);
    assert_eq!(card.command(CONTROL, 1, 1, &[0xff; 6]), ERROR, "a group");
    card.bench.round_trip();
    assert_eq!(card.address(), [2, 4, 6, 8, 10, 12]);
    card.bench.reset();
    assert_eq!(card.address(), MAC);
}

#[test]
fn filters_are_taken_if_they_are_whole() {
    let mut card = Card::new(CTRL);
    for mode in 0..6 {
        assert_eq!(card.command(CONTROL, 0, mode, &[1]), OK);
    }
    assert_eq!(card.command(CONTROL, 0, 6, &[1]), ERROR);
    assert_eq!(card.command(CONTROL, 0, 0, &[]), ERROR);
    let list =
        |count: usize| [&u32::try_from(count).unwrap().to_le_bytes()[..], &vec![2; 6 * count]].concat();
    for (unicast, multicast) in [(0, 0), (1, 0), (0, 1), (3, 5), (200, 300)] {
        let table = [list(unicast), list(multicast)].concat();
        assert_eq!(card.command(CONTROL, 1, 0, &table), OK);
        assert_eq!(card.command(CONTROL, 1, 0, &table[..table.len() - 1]), ERROR);
        assert_eq!(card.command(CONTROL, 1, 0, &[&table[..], &[0]].concat()), ERROR);
    }
    assert_eq!(card.command(CONTROL, 1, 0, &[0xff; 8]), ERROR);
    assert_eq!(card.command(CONTROL, 1, 0, &[0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]), ERROR);
    let mut card = Card::new(CTRL_VQ);
    assert_eq!(card.command(CONTROL, 0, 0, &[1]), ERROR, "the driver has not accepted CTRL_RX");
}

#[test]
fn the_control_queue_is_the_last_only_with_mq() {
    let mut card = Card::with(&[("queues", "4")], CTRL | MQ);
    for (pairs, answer) in [(0, ERROR), (1, OK), (4, OK), (5, ERROR), (0x8000, ERROR)] {
        assert_eq!(card.command(8, 4, 0, &u16::to_le_bytes(pairs)), answer);
    }
    assert_eq!(card.command(8, 4, 0, &[1]), ERROR);
    card.bench.ask(3, &frame(60, 1), 0);
    assert_eq!(card.sent().len(), 1, "frames are sent from every queue");
    let other = card.bench.request(2, &[], 2000);
    card.push(&frame(60, 1));
    assert!(card.bench.answered(other).is_none(), "and received in the first");
    let mut card = Card::with(&[("queues", "4")], CTRL);
    assert_eq!(card.command(2, 1, 1, &[2; 6]), OK);
    assert_eq!(card.command(2, 4, 0, &[1, 0]), ERROR, "not without MQ");
}

#[test]
fn a_command_that_cannot_be_acknowledged_does_nothing() {
    let mut card = Card::new(CTRL);
    assert_eq!(card.bench.ask(CONTROL, &[1, 1, 2, 4, 6, 8, 10, 12], 0).written, 0);
    assert_eq!(card.address(), MAC);
}

#[test]
fn an_unplugged_cable_carries_nothing_either_way() {
    let mut card = Card::new(MRG_RXBUF);
    card.buffers(&[2000; 4]);
    card.bench.adjust("link", "down").unwrap();
    assert_eq!((card.is_up(), card.bench.config_changes()), (false, 1));
    card.bench.ask(TRANSMIT, &frame(60, 1), 0);
    card.push(&frame(60, 2));
    assert_eq!((card.sent().len(), card.received().len()), (0, 0));
    assert_eq!((card.bench.port("net").dropped(), card.bench.port("net").pending()), (1, 0));
    card.bench.round_trip();
    assert!(!card.is_up());
    card.bench.adjust("link", "up").unwrap();
    assert_eq!((card.is_up(), card.bench.config_changes()), (true, 2));
    card.push(&frame(60, 3));
    assert_eq!(card.marks(), [3]);
    assert!(card.bench.adjust("link", "loose").is_err());
    assert!(card.bench.adjust("mtu", "9000").is_err());
}

#[test]
fn what_changes_at_the_port_is_announced() {
    let mut card = Card::new(0);
    for (link_up, changes) in [(false, 1), (false, 1), (true, 2)] {
        card.bench.port("net").change(|info| info.link_up = link_up);
        assert_eq!((card.is_up(), card.bench.config_changes()), (link_up, changes));
    }
    card.bench.port("net").change(|info| info.mtu = 9000);
    assert_eq!((card.bench.config_read(10, 2), card.bench.config_changes()), (9000, 3));
}

#[test]
fn a_restored_card_has_its_buffers_again() {
    let mut card = Card::new(MRG_RXBUF);
    card.buffers(&[100, 100, 2000]);
    card.bench.round_trip();
    card.push(&frame(250, 1));
    assert_eq!(card.received()[0].len(), 3);
}

#[test]
fn a_reset_forgets_buffers_and_what_the_driver_set() {
    let mut card = Card::new(CTRL | MRG_RXBUF | GUEST_CSUM);
    let new = Card::started(&[], port()).unwrap().bench.save();
    card.buffers(&[2000; 4]);
    card.command(CONTROL, 1, 1, &[2; 6]);
    card.bench.reset();
    assert_eq!(card.bench.save(), new);
    card.push(&frame(60, 1));
    card.bench.activate(MRG_RXBUF).unwrap();
    card.buffers(&[2000]);
    assert_eq!(card.marks(), [1]);
}

#[test]
fn whatever_a_driver_writes_frames_keep_their_order() {
    for (settings, features) in [
        (&[("queues", "2")][..], CTRL | MRG_RXBUF | MQ | GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6),
        (&[("queues", "2")][..], CTRL | MRG_RXBUF | GUEST_CSUM),
        (&[][..], CTRL),
    ] {
        let mut random = Random::new(0x6e65_7400_0000_0001);
        let mut card = Card::with(settings, features);
        let queues = card.bench.description().queues.len();
        let control = if features & MQ == 0 { 2 } else { queues - 1 };
        // Without mergeable buffers, one that is too small for any frame stays the first for good.
        let rooms: &[usize] =
            if features & MRG_RXBUF == 0 { &[0, 11, 3100] } else { &[0, 1, 12, 13, 1000, 2000, 4000] };
        let (mut pushed, mut last) = (0_u32, 0);
        for round in 0..20_000 {
            match random.below32(8) {
                0..=2 => {
                    pushed += 1;
                    let mut frame = frame(16 + random.index(3000), 0);
                    frame[12..16].copy_from_slice(&pushed.to_le_bytes());
                    card.push(&frame);
                }
                3 if round % 50 == 0 => card.bench.round_trip(),
                3 if round % 50 == 1 => card.bench.adjust("link", ["up", "down"][random.index(2)]).unwrap(),
                _ => {
                    let queue = random.index(queues);
                    let mut bytes = random.some_bytes(40);
                    if random.below32(2) == 0 && bytes.len() > 5 {
                        bytes[0] %= 6;
                        bytes[1] %= 2;
                        bytes[2] %= 4;
                        bytes[3..6].fill(0);
                    }
                    let room = rooms[random.index(rooms.len())];
                    let given = card.bench.request(u16::try_from(queue).unwrap(), &bytes, room);
                    if queue == 0 {
                        card.buffers.push(given);
                    } else if queue == control || queue % 2 == 1 {
                        assert!(
                            card.bench.answered(given).is_some(),
                            "commands and frames to send do not wait"
                        );
                    }
                }
            }
            for pieces in card.received_whole() {
                let number = u32::from_le_bytes(pieces[12..16].try_into().unwrap());
                assert!(number > last, "frame {number} after {last}");
                last = number;
            }
        }
        assert!(last > pushed / 2, "{last} of {pushed} frames were received");
    }
}
