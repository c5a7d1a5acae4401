//! The socket device, from the driver's side and from that of programs outside.
//!
//! Long for the rules of the protocol: a test for each.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use tenon_device_virtio_vsock::Vsock;
use tenon_testkit::{Random, SocketEnd, Ticket, VirtioBench, VirtioSetup, virtio_conformance};

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const EVENTS: u16 = 2;

const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RST: u16 = 3;
const SHUTDOWN: u16 = 4;
const RW: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;

const HOST: u64 = 2;
const GUEST: u64 = 3;
const KIB64: u32 = 64 << 10;

/// A packet as one side says it to the other.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Packet {
    source: (u64, u32),
    destination: (u64, u32),
    kind: u16,
    op: u16,
    flags: u32,
    room: u32,
    forwarded: u32,
    data: Vec<u8>,
}

impl Packet {
    /// From a port of the guest to one of the host, with room for 64 KiB.
    fn new(op: u16, guest: u32, host: u32) -> Self {
        Self {
            source: (GUEST, guest),
            destination: (HOST, host),
            kind: 1,
            op,
            flags: 0,
            room: KIB64,
            forwarded: 0,
            data: Vec::new(),
        }
    }

    fn data(self, data: &[u8]) -> Self {
        Self { data: data.to_vec(), ..self }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(self.source.0.to_le_bytes());
        bytes.extend(self.destination.0.to_le_bytes());
        bytes.extend(self.source.1.to_le_bytes());
        bytes.extend(self.destination.1.to_le_bytes());
        bytes.extend(u32::try_from(self.data.len()).unwrap().to_le_bytes());
        bytes.extend(self.kind.to_le_bytes());
        bytes.extend(self.op.to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(self.room.to_le_bytes());
        bytes.extend(self.forwarded.to_le_bytes());
        bytes.extend(&self.data);
        bytes
    }

    fn parse(bytes: &[u8]) -> Self {
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let u16_at = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap());
        assert_eq!(u32_at(24) as usize, bytes.len() - 44, "the length is that of what follows");
        Self {
            source: (u64_at(0), u32_at(16)),
            destination: (u64_at(8), u32_at(20)),
            kind: u16_at(28),
            op: u16_at(30),
            flags: u32_at(32),
            room: u32_at(36),
            forwarded: u32_at(40),
            data: bytes[44..].to_vec(),
        }
    }
}

/// A guest with the device.
struct Guest {
    bench: VirtioBench<Vsock>,
    buffers: Vec<Ticket>,
}

impl Guest {
    /// With a driver that is ready and has given so many buffers of 4 KiB behind a header.
    fn with_buffers(count: usize) -> Self {
        let mut guest = Self { bench: VirtioBench::ready(&[]).unwrap(), buffers: Vec::new() };
        guest.give(count, 44 + 4096);
        guest
    }

    fn give(&mut self, count: usize, room: usize) {
        let buffers = vec![(&[][..], room); count];
        self.buffers.extend(self.bench.submit(RECEIVE, &buffers));
    }

    /// Says a packet, which the device takes at once.
    fn say(&mut self, packet: &Packet) {
        let answered = self.bench.ask(TRANSMIT, &packet.bytes(), 0);
        assert_eq!(answered.written, 0);
    }

    /// What the device has said since, in as many new buffers.
    fn heard(&mut self) -> Vec<Packet> {
        let mut packets = Vec::new();
        let mut waiting = Vec::new();
        for ticket in std::mem::take(&mut self.buffers) {
            match self.bench.answered(ticket) {
                Some(answered) => packets.push(Packet::parse(&answered.data)),
                None => waiting.push(ticket),
            }
        }
        self.buffers = waiting;
        self.give(packets.len(), 44 + 4096);
        packets
    }

    /// What the device has said since: one packet.
    #[track_caller]
    fn heard_one(&mut self) -> Packet {
        let mut packets = self.heard();
        assert_eq!(packets.len(), 1, "{packets:?}");
        packets.remove(0)
    }

    #[track_caller]
    fn heard_ops(&mut self) -> Vec<u16> {
        self.heard().iter().map(|packet| packet.op).collect()
    }

    fn outside(&mut self) -> SocketEnd<'_, Vsock> {
        self.bench.socket("vsock")
    }

    /// Connects from port 7000 of the guest to port 80 outside; the stream.
    fn connected(&mut self) -> u32 {
        self.outside().listen(80);
        self.say(&Packet::new(REQUEST, 7000, 80));
        let response = self.heard_one();
        assert_eq!(response.op, RESPONSE);
        *self.outside().streams().last().unwrap()
    }
}

#[test]
fn it_does_what_every_host_relies_on() {
    virtio_conformance::<Vsock>(&[], &VirtioSetup::new());
    virtio_conformance::<Vsock>(&[("cid", "4294967294")], &VirtioSetup::new());
}

#[test]
fn the_configuration_space_is_the_guests_cid() {
    let mut bench = VirtioBench::<Vsock>::ready(&[("cid", "77")]).unwrap();
    assert_eq!((bench.config_read(0, 8), bench.config_read(0, 4), bench.config_read(4, 4)), (77, 77, 0));
    for wrong in ["2", "0", "4294967295", "x"] {
        assert!(VirtioBench::<Vsock>::new(&[("cid", wrong)]).is_err(), "{wrong} was taken");
    }
}

#[test]
fn a_guest_connects_to_a_program_that_listens() {
    let mut guest = Guest::with_buffers(8);
    guest.outside().listen(80);
    guest.say(&Packet::new(REQUEST, 7000, 80));
    let response = guest.heard_one();
    assert_eq!((response.source, response.destination), ((HOST, 80), (GUEST, 7000)));
    assert_eq!((response.kind, response.op, response.room, response.forwarded), (1, RESPONSE, KIB64, 0));
    let [stream] = guest.outside().streams()[..] else { panic!("one stream") };
    guest.say(&Packet::new(RW, 7000, 80).data(b"ping"));
    assert_eq!(guest.outside().take(stream), b"ping");
    guest.outside().push(stream, b"pong");
    let packet = guest.heard_one();
    assert_eq!((packet.op, packet.data.as_slice(), packet.forwarded), (RW, &b"pong"[..], 4));
}

#[test]
fn where_nobody_listens_the_guest_is_refused() {
    let mut guest = Guest::with_buffers(8);
    guest.say(&Packet::new(REQUEST, 7000, 81));
    let reset = guest.heard_one();
    assert_eq!((reset.op, reset.source, reset.destination), (RST, (HOST, 81), (GUEST, 7000)));
}

#[test]
fn a_program_connects_to_a_guest_that_listens() {
    let mut guest = Guest::with_buffers(8);
    let stream = guest.outside().begin(5000);
    let request = guest.heard_one();
    assert_eq!((request.op, request.destination), (REQUEST, (GUEST, 5000)));
    let port = request.source.1;
    assert_eq!(guest.outside().port(stream), None);
    guest.say(&Packet::new(RESPONSE, 5000, port));
    assert_eq!(guest.outside().port(stream), Some(port));
    guest.outside().push(stream, b"hello");
    assert_eq!(guest.heard_one().data, b"hello");
    guest.say(&Packet::new(RW, 5000, port).data(b"you"));
    assert_eq!(guest.outside().take(stream), b"you");
    let other = guest.outside().begin(5000);
    assert_ne!(guest.heard_one().source.1, port, "two connections have two ports");
    assert!(guest.outside().is_open(other));
}

#[test]
fn a_program_that_the_guest_refuses_is_let_go() {
    let mut guest = Guest::with_buffers(8);
    let stream = guest.outside().begin(5000);
    let port = guest.heard_one().source.1;
    guest.say(&Packet::new(RST, 5000, port));
    assert!(!guest.outside().is_open(stream));
    assert_eq!((guest.outside().port(stream), guest.heard()), (None, vec![]), "a reset is not answered");
}

#[test]
fn a_program_that_does_not_wait_for_the_guest_leaves_nothing() {
    let mut guest = Guest::with_buffers(1);
    let stream = guest.outside().begin(5000);
    let port = guest.heard_one().source.1;
    guest.outside().hang_up(stream);
    assert_eq!(guest.heard_one().op, RST);
    assert!(!guest.outside().is_open(stream));
    guest.say(&Packet::new(RESPONSE, 5000, port));
    assert_eq!(guest.heard_one().op, RST);

    let mut guest = Guest::with_buffers(0);
    let stream = guest.outside().begin(5000);
    guest.outside().hang_up(stream);
    guest.give(2, 100);
    assert!(guest.heard().is_empty(), "the guest never heard of it");
}

#[test]
fn before_the_driver_is_ready_programs_are_let_go() {
    let mut bench = VirtioBench::<Vsock>::new(&[]).unwrap();
    let stream = bench.socket("vsock").begin(5000);
    assert!(!bench.socket("vsock").is_open(stream));
}

#[test]
fn what_belongs_to_no_connection_is_answered_by_a_reset() {
    let mut guest = Guest::with_buffers(8);
    for op in [RESPONSE, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST, 0, 8, 0xffff] {
        guest.say(&Packet::new(op, 7000, 80));
        let reset = guest.heard_one();
        assert_eq!((reset.op, reset.source, reset.destination), (RST, (HOST, 80), (GUEST, 7000)), "{op}");
    }
    guest.say(&Packet::new(RST, 7000, 80));
    assert!(guest.heard().is_empty());
}

#[test]
fn other_cids_and_other_sockets_are_refused() {
    let mut guest = Guest::with_buffers(8);
    guest.outside().listen(80);
    guest.say(&Packet { destination: (9, 80), ..Packet::new(REQUEST, 7000, 80) });
    let reset = guest.heard_one();
    assert_eq!((reset.op, reset.source, reset.destination), (RST, (9, 80), (GUEST, 7000)));
    guest.say(&Packet { kind: 2, ..Packet::new(REQUEST, 7000, 80) });
    let reset = guest.heard_one();
    assert_eq!((reset.op, reset.kind), (RST, 2));
    guest.say(&Packet { source: (4, 7000), ..Packet::new(REQUEST, 7000, 80) });
    assert!(guest.heard().is_empty(), "there is no such guest to answer");
    assert!(guest.outside().streams().is_empty());
}

#[test]
fn what_does_not_fit_a_connection_ends_it() {
    let wrong: [(&str, Packet); 6] = [
        ("a second request", Packet::new(REQUEST, 7000, 80)),
        ("a response", Packet::new(RESPONSE, 7000, 80)),
        ("no op", Packet::new(0, 7000, 80)),
        ("an unknown op", Packet::new(99, 7000, 80)),
        ("another kind of bytes", Packet { kind: 1, op: 8, ..Packet::new(RW, 7000, 80) }),
        ("more than its credit", Packet::new(RW, 7000, 80).data(&vec![1; KIB64 as usize + 1])),
    ];
    for (what, packet) in wrong {
        let mut guest = Guest::with_buffers(8);
        let stream = guest.connected();
        guest.outside().hold(stream);
        guest.say(&packet);
        assert_eq!(guest.heard_ops(), [RST], "{what}");
        assert!(!guest.outside().is_open(stream), "{what}");
    }
    // A length that the packet does not have.
    let mut guest = Guest::with_buffers(8);
    let stream = guest.connected();
    let mut bytes = Packet::new(RW, 7000, 80).data(b"abc").bytes();
    bytes.pop();
    guest.bench.ask(TRANSMIT, &bytes, 0);
    assert_eq!(guest.heard_ops(), [RST]);
    assert_eq!(guest.outside().take(stream), b"");
    // Too short for a header.
    guest.bench.ask(TRANSMIT, &bytes[..43], 0);
    guest.bench.ask(TRANSMIT, &[], 0);
    assert!(guest.heard().is_empty());
}

#[test]
fn the_guest_hears_of_its_credit_when_half_of_it_is_used() {
    let mut guest = Guest::with_buffers(8);
    let stream = guest.connected();
    guest.say(&Packet::new(RW, 7000, 80).data(&vec![1; KIB64 as usize / 2]));
    assert!(guest.heard().is_empty());
    guest.say(&Packet::new(RW, 7000, 80).data(&[1]));
    let update = guest.heard_one();
    assert_eq!((update.op, update.room, update.forwarded), (CREDIT_UPDATE, KIB64, KIB64 / 2 + 1));
    guest.say(&Packet::new(CREDIT_REQUEST, 7000, 80));
    assert_eq!(guest.heard_one().op, CREDIT_UPDATE);
    assert_eq!(guest.outside().take(stream).len(), KIB64 as usize / 2 + 1);
    // What was passed on and not said yet is no credit.
    guest.say(&Packet::new(RW, 7000, 80).data(b"a"));
    guest.say(&Packet::new(RW, 7000, 80).data(&vec![1; KIB64 as usize]));
    assert_eq!(guest.heard_ops(), [RST]);
    assert_eq!(guest.outside().take(stream), b"a");
}

#[test]
fn a_program_that_does_not_read_holds_its_own_connection_up() {
    let mut guest = Guest::with_buffers(8);
    let stream = guest.connected();
    guest.outside().hold(stream);
    let bytes: Vec<u8> = (0..KIB64).map(|n| n.to_le_bytes()[0]).collect();
    guest.say(&Packet::new(RW, 7000, 80).data(&bytes));
    assert!(guest.heard().is_empty(), "nothing has been passed on");
    // Another connection goes on.
    guest.say(&Packet::new(REQUEST, 7001, 80));
    assert_eq!(guest.heard_ops(), [RESPONSE]);
    guest.say(&Packet::new(RW, 7001, 80).data(b"x"));
    let other = *guest.outside().streams().last().unwrap();
    assert_eq!(guest.outside().take(other), b"x");
    guest.outside().release(stream, 1000);
    let update = guest.heard_one();
    assert_eq!((update.op, update.forwarded), (CREDIT_UPDATE, 1000));
    guest.outside().release(stream, usize::MAX);
    assert_eq!(guest.heard_one().forwarded, KIB64);
    assert!(guest.outside().take(stream) == bytes);
}

#[test]
fn the_guest_is_given_no_more_than_it_has_room_for() {
    let mut guest = Guest::with_buffers(8);
    let stream = guest.connected();
    guest.say(&Packet { room: 5000, ..Packet::new(CREDIT_UPDATE, 7000, 80) });
    let bytes: Vec<u8> = (0..9000_u32).map(|n| n.to_le_bytes()[0]).collect();
    guest.outside().push(stream, &bytes);
    let packets = guest.heard();
    assert_eq!(packets.iter().map(|packet| packet.data.len()).collect::<Vec<_>>(), [4096, 904, 0]);
    assert_eq!(packets[2].op, CREDIT_REQUEST);
    guest.outside().push(stream, b"!");
    assert!(guest.heard().is_empty(), "it is asked once");
    guest.say(&Packet { room: 5000, ..Packet::new(CREDIT_UPDATE, 7000, 80) });
    assert!(guest.heard().is_empty(), "nor is it asked again when it has none");
    assert_eq!(guest.outside().pending(stream), 4001);
    guest.say(&Packet { room: 5000, forwarded: 5000, ..Packet::new(CREDIT_UPDATE, 7000, 80) });
    let more = guest.heard_one();
    let got: Vec<u8> = packets.into_iter().chain([more]).flat_map(|packet| packet.data).collect();
    assert_eq!(got, [&bytes[..], b"!"].concat());
    // Nonsense is no room.
    guest.say(&Packet { room: 5000, forwarded: 4_000_000, ..Packet::new(CREDIT_UPDATE, 7000, 80) });
    guest.outside().push(stream, b"?");
    assert_eq!(guest.heard_ops(), [CREDIT_REQUEST]);
}

#[test]
fn connections_take_turns() {
    let mut guest = Guest::with_buffers(0);
    guest.outside().listen(80);
    for port in [7000, 7001] {
        guest.say(&Packet::new(REQUEST, port, 80));
    }
    guest.give(2, 100);
    assert_eq!(guest.heard_ops(), [RESPONSE, RESPONSE]);
    guest.buffers.clear();
    let mut guest = Guest::with_buffers(0);
    guest.outside().listen(80);
    for port in [7000, 7001] {
        guest.say(&Packet::new(REQUEST, port, 80));
    }
    for stream in guest.outside().streams() {
        guest.outside().push(stream, &[0; 100]);
    }
    guest.give(6, 44 + 10);
    let said: Vec<(u32, u16)> =
        guest.heard().iter().map(|packet| (packet.destination.1, packet.op)).collect();
    assert_eq!(said, [(7000, RESPONSE), (7001, RESPONSE), (7000, RW), (7001, RW), (7000, RW), (7001, RW)]);
}

#[test]
fn either_side_may_be_done_before_the_other() {
    let mut guest = Guest::with_buffers(8);
    let stream = guest.connected();
    // The guest first.
    guest.say(&Packet { flags: 2, ..Packet::new(SHUTDOWN, 7000, 80) });
    assert_eq!(guest.outside().is_shut(stream), (false, true));
    guest.outside().push(stream, b"still here");
    assert_eq!(guest.heard_one().data, b"still here");
    guest.say(&Packet { flags: 1, ..Packet::new(SHUTDOWN, 7000, 80) });
    assert_eq!(guest.heard_ops(), [RST], "both directions have ended");
    assert!(!guest.outside().is_open(stream));

    let mut guest = Guest::with_buffers(8);
    let stream = guest.connected();
    // The program first, with bytes on their way.
    guest.outside().push(stream, b"last words");
    guest.outside().finish(stream);
    let packets = guest.heard();
    assert_eq!(
        packets.iter().map(|packet| (packet.op, packet.flags)).collect::<Vec<_>>(),
        [(RW, 0), (SHUTDOWN, 2)]
    );
    guest.say(&Packet::new(RW, 7000, 80).data(b"answer"));
    assert_eq!(guest.outside().take(stream), b"answer");
    guest.outside().hang_up(stream);
    let shutdown = guest.heard_one();
    assert_eq!((shutdown.op, shutdown.flags), (SHUTDOWN, 3));
    guest.say(&Packet::new(RST, 7000, 80));
    assert!(!guest.outside().is_open(stream));
    // A guest that has said that it is done and sends.
    let mut guest = Guest::with_buffers(8);
    guest.connected();
    guest.say(&Packet { flags: 2, ..Packet::new(SHUTDOWN, 7000, 80) });
    guest.say(&Packet::new(RW, 7000, 80).data(b"more"));
    assert_eq!(guest.heard_ops(), [RST]);
}

#[test]
fn a_guest_without_buffers_makes_nothing_grow() {
    let mut guest = Guest::with_buffers(0);
    let packet = Packet::new(RW, 7000, 80).bytes();
    let packets = vec![(packet.as_slice(), 0); 600];
    let said = guest.bench.submit(TRANSMIT, &packets);
    let taken = said.iter().filter(|ticket| guest.bench.answered(**ticket).is_some()).count();
    assert_eq!(taken, 256, "the others wait where they are");
    guest.give(600, 44 + 100);
    assert_eq!(guest.heard_ops(), [RST; 600]);
    assert_eq!(guest.bench.unanswered().len(), 600, "the new buffers wait, and no packet");
}

#[test]
fn news_wait_while_the_guest_gives_no_buffers() {
    let mut guest = Guest::with_buffers(400);
    let streams: Vec<u32> = (0..400).map(|_| guest.outside().begin(5000)).collect();
    assert_eq!(guest.heard_ops(), [REQUEST; 400]);
    guest.bench.reset();
    guest.bench.activate(1).unwrap();
    assert!(streams.iter().all(|stream| !guest.outside().is_open(*stream)));
    guest.buffers.clear();
    // Asked for, and gone before the guest answers: each brings a reset, for which there is no buffer.
    guest.give(400, 44 + 10);
    let streams: Vec<u32> = (0..400).map(|_| guest.outside().begin(5000)).collect();
    for ticket in std::mem::take(&mut guest.buffers) {
        assert!(guest.bench.answered(ticket).is_some());
    }
    for stream in &streams {
        guest.outside().hang_up(*stream);
    }
    assert_eq!(guest.outside().streams().len(), 400 - 193, "the first batches are seen to, the others wait");
    guest.give(400, 44 + 10);
    assert_eq!(guest.heard_ops(), [RST; 400]);
    assert!(guest.outside().streams().is_empty());
}

#[test]
fn at_most_1024_streams_are_had() {
    let mut guest = Guest::with_buffers(256);
    guest.outside().listen(80);
    for port in 0..1030 {
        guest.say(&Packet::new(REQUEST, port, 80));
        let expected = if port < 1024 { RESPONSE } else { RST };
        assert_eq!(guest.heard_ops(), [expected], "{port}");
    }
}

#[test]
fn buffers_without_room_for_a_packet_come_back() {
    let mut guest = Guest::with_buffers(0);
    let useless = guest.bench.submit(RECEIVE, &[(&[], 0), (&[], 43), (&[], 44)]);
    guest.give(1, 45);
    let stream = guest.connected();
    for ticket in useless {
        assert_eq!(guest.bench.answered(ticket).unwrap().written, 0);
    }
    guest.outside().push(stream, b"a");
    assert_eq!(guest.heard_one().data, b"a");
}

#[test]
fn a_new_instance_has_no_connections_and_the_guest_is_told() {
    let mut guest = Guest::with_buffers(8);
    let event = guest.bench.request(EVENTS, &[], 4);
    let stream = guest.connected();
    let begun = guest.outside().begin(5000);
    let port = guest.heard_one().source.1;
    assert!(guest.bench.answered(event).is_none());
    guest.bench.round_trip();
    assert_eq!(guest.bench.answered(event).unwrap().data, [0; 4]);
    assert!(!guest.outside().is_open(stream) && !guest.outside().is_open(begun));
    for packet in [Packet::new(RW, 7000, 80), Packet::new(RESPONSE, 5000, port)] {
        guest.say(&packet);
        assert_eq!(guest.heard_one().op, RST);
    }
    guest.connected();
    guest.outside().begin(5000);
    assert_ne!(guest.heard_one().source.1, port, "the guest may still have the old one");
    let second = guest.bench.request(EVENTS, &[], 4);
    assert!(guest.bench.answered(second).is_none(), "it is told once");
}

#[test]
fn the_loss_is_told_as_soon_as_there_is_a_buffer() {
    let mut guest = Guest::with_buffers(1);
    guest.bench.round_trip();
    guest.bench.round_trip();
    assert_eq!(guest.bench.ask(EVENTS, &[], 3).written, 0);
    assert_eq!(guest.bench.ask(EVENTS, &[], 8).data, [0; 4]);
    let mut bench = VirtioBench::<Vsock>::new(&[]).unwrap();
    bench.round_trip();
    bench.activate(0).unwrap();
    let event = bench.request(EVENTS, &[], 4);
    assert!(bench.answered(event).is_none(), "a driver that was not there has lost nothing");
}

#[test]
fn a_reset_ends_every_connection() {
    let mut guest = Guest::with_buffers(8);
    let new = VirtioBench::<Vsock>::new(&[]).unwrap().save();
    let streams = [guest.connected(), guest.outside().begin(5000)];
    guest.bench.reset();
    assert_eq!(guest.bench.save(), new);
    assert!(streams.iter().all(|stream| !guest.outside().is_open(*stream)));
    guest.bench.activate(1).unwrap();
    guest.buffers.clear();
    guest.give(2, 100);
    guest.connected();
}

#[test]
fn whatever_a_driver_says_bytes_keep_their_order() {
    let mut random = Random::new(0x7673_6f63_6b00_0001);
    let mut guest = Guest::with_buffers(16);
    guest.outside().listen(80);
    // One connection that keeps to the rules among all others.
    guest.say(&Packet::new(REQUEST, 1, 80));
    assert_eq!(guest.heard_ops(), [RESPONSE]);
    let stream = guest.outside().streams()[0];
    let (mut sent, mut pushed, mut got, mut given, mut taken) = (0_u32, 0_u32, 0_u32, 0_u32, 0_u32);
    let mut forwarded = 0;
    for _ in 0..20_000 {
        match random.below32(8) {
            0 => {
                let room = KIB64 - (sent - forwarded);
                let count = random.below32(3000).min(room);
                let bytes: Vec<u8> = (sent..sent + count).map(|n| (n / 7).to_le_bytes()[0]).collect();
                guest.say(&Packet { forwarded: got, ..Packet::new(RW, 1, 80).data(&bytes) });
                sent += count;
            }
            1 => {
                let count = random.below32(9000);
                let bytes: Vec<u8> = (pushed..pushed + count).map(|n| (n / 5).to_le_bytes()[0]).collect();
                guest.outside().push(stream, &bytes);
                pushed += count;
            }
            2 => {
                guest.say(&Packet { forwarded: got, ..Packet::new(CREDIT_UPDATE, 1, 80) });
            }
            3 => match random.below32(3) {
                0 => guest.outside().hold(stream),
                _ => guest.outside().release(stream, random.index(5000)),
            },
            4 => {
                let open = guest.outside().streams();
                let other = open[random.index(open.len())];
                if other != stream {
                    guest.outside().hang_up(other);
                }
            }
            5 => {
                guest.outside().begin(random.below32(3));
            }
            _ => {
                let guest_port = 2 + random.below32(4);
                let mut packet = Packet::new(
                    u16::try_from(random.below32(9)).unwrap(),
                    guest_port,
                    [80, 81, 1 << 30][random.index(3)],
                );
                (packet.flags, packet.room) = (random.below32(4), random.below32(10_000));
                packet.data = vec![0; random.index(2000)];
                guest.say(&packet);
            }
        }
        for packet in guest.heard() {
            if packet.destination.1 == 1 && packet.source.1 == 80 {
                assert!(packet.op != RST && packet.op != SHUTDOWN, "{packet:?}");
                forwarded = packet.forwarded;
                for byte in packet.data {
                    assert_eq!(byte, (got / 5).to_le_bytes()[0], "byte {got} for the guest");
                    got += 1;
                }
                given += 1;
            }
        }
        for byte in guest.outside().take(stream) {
            assert_eq!(byte, (taken / 7).to_le_bytes()[0], "byte {taken} of the guest");
            taken += 1;
        }
    }
    assert!(given > 1000 && got > pushed / 2 && taken > sent / 2, "{given} {got}/{pushed} {taken}/{sent}");
}
