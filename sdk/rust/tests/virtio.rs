//! A native virtio device, called through its table as a host calls it.
//!
//! Long for the table: every function of the contract once in each direction.
#![allow(unsafe_code, clippy::unwrap_used, reason = "the host's side of a foreign-function interface")]

use std::cell::RefCell;
use std::ffi::c_void;
use std::ptr;

use tenon_sdk::abi::{Bytes, Sink, Status, StreamRecord, VirtioHost, VirtioTable, wire};
use tenon_sdk::virtio::{
    self, Answer, Attachment, Attributes, Batch, Channel, Config, Decoder, Encoder, Errno, Error, Folder,
    FolderAction, FolderEntry, FolderOutcome, Handle, Node, Offloads, OperationDone, Place, Port, PortInfo,
    RequestOperation, RequestRecord, Result, Sent, Socket, Store, StoreError, StoreInfo, StreamState, Timer,
    VirtioDescription, VirtioDevice, info,
};

/// Uses everything at the first request of a batch.
struct Everything {
    timer: Timer,
    channel: Channel,
    store: Store,
    port: Port,
    socket: Socket,
    folder: Folder,
    value: u64,
}

impl VirtioDevice for Everything {
    const SCHEMA: u32 = 2;

    fn describe(config: &Config) -> Result<VirtioDescription> {
        let size = config.number("size")?.unwrap_or(64);
        let description = VirtioDescription::new(7).features(5).queue("requests", size, 4).config(8);
        Ok(description.timer().channel("console").store("disk").port("net").socket("vsock").folder("share"))
    }

    fn start(_config: &Config, mut attachment: Attachment) -> Result<Self> {
        let (timer, channel) = (attachment.timer()?, attachment.channel()?);
        let (store, port, socket) = (attachment.store()?, attachment.port()?, attachment.socket()?);
        let folder = attachment.folder()?;
        // There are as many of each as the host says, and of no two as many.
        let (mut timers, mut channels, mut stores, mut ports, mut sockets, mut folders) = (1, 1, 1, 1, 1, 1);
        while attachment.timer().is_ok() {
            timers += 1;
        }
        while attachment.channel().is_ok() {
            channels += 1;
        }
        while attachment.store().is_ok() {
            stores += 1;
        }
        while attachment.port().is_ok() {
            ports += 1;
        }
        while attachment.socket().is_ok() {
            sockets += 1;
        }
        while attachment.folder().is_ok() {
            folders += 1;
        }
        assert_eq!([timers, channels, stores, ports, sockets, folders], [1, 2, 3, 4, 5, 6]);
        Ok(Self { timer, channel, store, port, socket, folder, value: 0 })
    }

    fn activate(&mut self, features: u64) -> Result<()> {
        if features == 4 { Err(Error::Unsupported("4 without 1".into())) } else { Ok(()) }
    }

    fn config_read(&mut self, offset: u32, size: u8) -> u64 {
        self.value + u64::from(offset) + u64::from(size)
    }

    fn config_write(&mut self, _offset: u32, _size: u8, value: u64) {
        self.value = value;
    }

    fn requests_ready(&mut self, queue: u16, batch: &Batch<'_>) {
        for request in batch.iter() {
            info!(
                "{queue} {:?} {} {} {:?}",
                request.handle, request.readable, request.writable, request.head
            );
        }
        let one = batch.iter().next().unwrap().handle;
        assert_eq!(virtio::read(one, 1, 9), [1, 2, 3]);
        assert_eq!(virtio::write(one, 2, b"ab"), 1);
        assert_eq!(virtio::to_channel(one, 3, 4, &self.channel), 5);
        assert_eq!(virtio::from_channel(one, 6, 7, &self.channel), 8);
        assert_eq!(virtio::fill_random(one, 9, 10), 11);
        assert_eq!((virtio::release_numbered(one), virtio::release_own(one)), (12, 13));
        assert_eq!((virtio::memory_size(), virtio::now(), virtio::wall_clock()), (14, 15, 16));
        assert_eq!((self.store.info().size, self.port.info().mtu), (1024, 1500));
        let place = |name: &str| Place { folder: Node::ROOT, name: name.into() };
        assert_eq!(self.folder.look_up(one, place("there")).map(|entry| entry.node), Ok(Node(21)));
        assert_eq!(self.folder.look_up(one, place("gone")), Err(Errno::NOENT));
        self.store.begin(&[]);
        self.store.begin(&[
            RequestOperation::read(one, 1, 2, 3).answering(b"ok"),
            RequestOperation::write(one, 4, 5, 6),
        ]);
        self.store.begin(&[
            RequestOperation::flush(one).answering(b"eight888"),
            RequestOperation::discard(one, 7, 8),
            RequestOperation::write_zeroes(one, 9, 10, false),
            RequestOperation::write_zeroes(one, 9, 10, true),
        ]);
        self.port.accept(Offloads { tso4: true, ..Offloads::default() });
        self.port.send(&[one, Handle(9)]);
        assert_eq!(self.port.waiting(5), [60, 61]);
        self.port.receive(&[1, 0], &[one]);
        assert_eq!((self.socket.connect(20), self.socket.connect(0)), (Some(21), None));
        let [first, second] = self.socket.news(6)[..] else { panic!("two are told of") };
        assert_eq!(first, StreamState { number: 1, wanted: Some(0), ended: true, ..StreamState::default() });
        let all =
            StreamState { number: 2, wanted: None, readable: true, ended: false, deaf: true, unsent: 3 };
        assert_eq!(second, all);
        self.socket.accept(22, 23);
        assert_eq!(self.socket.send(one, 24, 25, 26), Sent { taken: 27, unsent: 34 });
        assert_eq!(self.socket.receive(one, 28, 29, 30), 31);
        self.socket.shut(32, false, true);
        self.socket.close(33);
        self.timer.arm(17);
        assert_eq!((self.channel.write(b"cd"), self.channel.read(3)), (18, vec![7]));
        virtio::config_changed();
        virtio::needs_reset();
        virtio::complete(one, 19);
        virtio::complete_all(&[]);
    }

    fn operations_done(&mut self, done: &[OperationDone]) {
        info!("done {:?} {:?}", done[0].result(), done[1].result());
    }

    fn port_ready(&mut self, port: u32) {
        info!("port {port} ready");
    }

    fn port_changed(&mut self, port: u32) {
        info!("port {port} changed");
    }

    fn socket_ready(&mut self, socket: u32) {
        info!("socket {socket} ready");
    }

    fn store_changed(&mut self, store: u32) {
        info!("store {store} changed");
    }

    fn channel_readable(&mut self, channel: u32) {
        info!("channel {channel} readable");
    }

    fn channel_writable(&mut self, channel: u32) {
        info!("channel {channel} writable");
    }

    fn timer_fired(&mut self, timer: u32) {
        info!("timer {timer}");
    }

    fn adjust(&mut self, key: &str, value: &str) -> Result<()> {
        info!("{key}={value}");
        Ok(())
    }

    fn reset(&mut self) {
        panic!("no way back");
    }

    fn save(&self, state: &mut Encoder) -> Result<()> {
        state.u64(self.value);
        Ok(())
    }

    fn restore(&mut self, state: &mut Decoder<'_>) -> Result<()> {
        self.value = state.u64()?;
        Ok(())
    }
}

mod plugin {
    tenon_sdk::export_virtio_device!(super::Everything);
}

/// What the host saw.
#[derive(Default)]
struct Seen(RefCell<Vec<String>>);

fn note(context: *mut c_void, what: String) {
    // SAFETY: every instance here is made with the context of a `Seen` that outlives it.
    unsafe { &*context.cast::<Seen>() }.0.borrow_mut().push(what);
}

fn text(bytes: Bytes<'_>) -> String {
    // SAFETY: the bytes came in this call.
    String::from_utf8(unsafe { bytes.as_slice() }.to_vec()).unwrap()
}

/// Makes functions of the host's table: each notes its arguments, and gives what is behind the arrow.
macro_rules! notes {
    ($($name:ident($($argument:ident: $type:ty),*) $(-> $result:ty = $value:expr)?;)*) => {
        $(
            unsafe extern "C" fn $name(context: *mut c_void $(, $argument: $type)*) $(-> $result)? {
                let arguments: Vec<String> = vec![$(format!("{:?}", $argument)),*];
                note(context, format!("{}({})", stringify!($name), arguments.join(" ")));
                $($value)?
            }
        )*
    };
}

notes! {
    timer_arm(timer: u32, deadline: u64);
    timer_arm_periodic(timer: u32, first: u64, period: u64);
    timer_cancel(timer: u32);
    requests_to_channel(request: Handle, offset: u32, length: u32, channel: u32) -> u32 = 5;
    requests_from_channel(request: Handle, offset: u32, length: u32, channel: u32) -> u32 = 8;
    requests_config_changed();
    requests_needs_reset();
    port_accept(port: u32, offloads: u32);
    socket_accept(socket: u32, number: u32, port: u32);
    socket_receive(socket: u32, request: Handle, offset: u32, length: u32, number: u32) -> u32 = 31;
    socket_shut(socket: u32, number: u32, receive: u32, send: u32);
    socket_close(socket: u32, number: u32);
    entropy_fill(request: Handle, offset: u32, length: u32) -> u32 = 11;
    guest_pages_release_numbered(request: Handle) -> u32 = 12;
    guest_pages_release_own(request: Handle) -> u32 = 13;
}

unsafe extern "C" fn log_log(context: *mut c_void, level: u32, message: Bytes<'_>) {
    note(context, format!("{level} {}", text(message)));
}
unsafe extern "C" fn time_now(_: *mut c_void) -> u64 {
    15
}
unsafe extern "C" fn wall_clock_now(_: *mut c_void) -> u64 {
    16
}
unsafe extern "C" fn guest_pages_memory_size(_: *mut c_void) -> u64 {
    14
}
unsafe extern "C" fn channel_write(context: *mut c_void, channel: u32, bytes: Bytes<'_>) -> u32 {
    note(context, format!("channel_write({channel} {})", text(bytes)));
    18
}
unsafe extern "C" fn channel_read(_: *mut c_void, _: u32, buffer: *mut u8, max: u32) -> u32 {
    assert_eq!(max, 3);
    // SAFETY: the buffer has room for `max` bytes.
    unsafe { buffer.write(7) };
    1
}
unsafe extern "C" fn requests_read(
    _: *mut c_void,
    request: Handle,
    offset: u32,
    length: u32,
    buffer: *mut u8,
) -> u32 {
    assert_eq!((request, offset, length), (Handle(70), 1, 9));
    // SAFETY: the buffer has room for `length` bytes.
    unsafe { ptr::copy_nonoverlapping([1, 2, 3].as_ptr(), buffer, 3) };
    3
}
unsafe extern "C" fn requests_write(
    context: *mut c_void,
    request: Handle,
    offset: u32,
    bytes: Bytes<'_>,
) -> u32 {
    note(context, format!("requests_write({request:?} {offset} {})", text(bytes)));
    1
}
unsafe extern "C" fn requests_complete(context: *mut c_void, answers: *const Answer, count: u32) {
    // SAFETY: there are `count` answers.
    let answers = unsafe { std::slice::from_raw_parts(answers, count as usize) };
    note(context, format!("requests_complete({answers:?})"));
}
unsafe extern "C" fn store_info(_: *mut c_void, _: u32, output: Sink) {
    // SAFETY: the sink came in this call.
    unsafe { output.put(&wire::encode_store_info(&StoreInfo::new(1024))) }
}
unsafe extern "C" fn store_begin(
    context: *mut c_void,
    store: u32,
    operations: *const RequestOperation,
    count: u32,
) {
    // SAFETY: there are `count` operations.
    for operation in unsafe { std::slice::from_raw_parts(operations, count as usize) } {
        let RequestOperation { request, kind, offset, length, position, .. } = operation;
        let success = std::str::from_utf8(operation.success().unwrap()).unwrap();
        note(
            context,
            format!("store_begin({store} {request:?} {kind} {offset} {length} {position} {success})"),
        );
    }
    note(context, format!("store_begin({count})"));
}
unsafe extern "C" fn port_info(_: *mut c_void, _: u32, output: Sink) {
    let offloads = Offloads::default();
    let info = PortInfo { mac: [0; 6], mtu: 1500, link_up: true, send: offloads, receive: offloads };
    // SAFETY: the sink came in this call.
    unsafe { output.put(&wire::encode_port_info(&info)) }
}
unsafe extern "C" fn port_send(context: *mut c_void, port: u32, requests: *const Handle, count: u32) {
    // SAFETY: there are `count` requests.
    let requests = unsafe { std::slice::from_raw_parts(requests, count as usize) };
    note(context, format!("port_send({port} {requests:?})"));
}
unsafe extern "C" fn port_waiting(_: *mut c_void, _: u32, max: u32, lengths: *mut u32) -> u32 {
    assert_eq!(max, 5);
    // SAFETY: there is room for `max` numbers.
    unsafe { ptr::copy_nonoverlapping([60, 61].as_ptr(), lengths, 2) };
    2
}
unsafe extern "C" fn port_receive(
    context: *mut c_void,
    port: u32,
    counts: *const u16,
    frames: u32,
    requests: *const Handle,
    count: u32,
) {
    // SAFETY: there are so many of each.
    let (counts, requests) = unsafe {
        (
            std::slice::from_raw_parts(counts, frames as usize),
            std::slice::from_raw_parts(requests, count as usize),
        )
    };
    note(context, format!("port_receive({port} {counts:?} {requests:?})"));
}
unsafe extern "C" fn socket_connect(_: *mut c_void, _: u32, port: u32, number: *mut u32) -> u32 {
    // SAFETY: there is room for a number.
    unsafe { number.write(21) };
    port / 20
}
unsafe extern "C" fn socket_send(
    context: *mut c_void,
    socket: u32,
    request: Handle,
    offset: u32,
    length: u32,
    number: u32,
    unsent: *mut u32,
) -> u32 {
    note(context, format!("socket_send({socket} {request:?} {offset} {length} {number})"));
    // SAFETY: there is room for a number.
    unsafe { unsent.write(34) };
    27
}
unsafe extern "C" fn socket_news(_: *mut c_void, _: u32, max: u32, states: *mut StreamRecord) -> u32 {
    assert_eq!(max, 6);
    let first = StreamRecord { number: 1, wanted: 0, unsent: 0, flags: 0b0101 };
    let second = StreamRecord { number: 2, wanted: 9, unsent: 3, flags: 0b1010 };
    // SAFETY: there is room for `max` states.
    unsafe { ptr::copy_nonoverlapping([first, second].as_ptr(), states, 2) };
    2
}
unsafe extern "C" fn folder_act(
    context: *mut c_void,
    folder: u32,
    request: Handle,
    action: Bytes<'_>,
    output: Sink,
) -> u32 {
    // SAFETY: the bytes came in this call.
    let action = wire::decode_folder_action(unsafe { action.as_slice() }).unwrap();
    let FolderAction::LookUp(place) = action else { panic!("{action:?}") };
    note(
        context,
        format!("folder_act({folder} {request:?} {})", String::from_utf8(place.name.clone()).unwrap()),
    );
    if place.name != b"there" {
        return Errno::NOENT.0;
    }
    let entry = FolderEntry { node: Node(21), attributes: Attributes::default() };
    // SAFETY: the sink came in this call.
    unsafe { output.put(&wire::encode_folder_outcome(&FolderOutcome::Entry(entry))) };
    0
}
unsafe extern "C" fn panicked(context: *mut c_void, message: Bytes<'_>) {
    note(context, format!("panicked: {}", text(message)));
}

static HOST: VirtioHost = VirtioHost {
    size: VirtioHost::SIZE,
    log_log,
    time_now,
    timer_arm,
    timer_arm_periodic,
    timer_cancel,
    wall_clock_now,
    channel_write,
    channel_read,
    requests_read,
    requests_write,
    requests_complete,
    requests_to_channel,
    requests_from_channel,
    requests_config_changed,
    requests_needs_reset,
    store_info,
    store_begin,
    port_info,
    port_accept,
    port_send,
    port_waiting,
    port_receive,
    socket_connect,
    socket_news,
    socket_accept,
    socket_send,
    socket_receive,
    socket_shut,
    socket_close,
    entropy_fill,
    guest_pages_release_numbered,
    guest_pages_release_own,
    guest_pages_memory_size,
    folder_act,
    panicked,
};

fn table() -> &'static VirtioTable {
    plugin::PLUGIN.virtio.unwrap()
}

/// An instance. The functions of the table are called by the convention: own instance, one call at a time, good pointers.
struct Instance(*mut c_void);

impl Instance {
    fn started(seen: &Seen) -> Self {
        // SAFETY: the table and the context outlive the instance.
        let instance = unsafe { (table().create)(&raw const HOST, ptr::from_ref(seen).cast_mut().cast()) };
        let instance = Self(instance);
        let (status, output) = instance.ask(|table, instance, sink| {
            // SAFETY: by the convention.
            unsafe { (table.describe)(instance, Bytes::new(&wire::encode_settings(&[])), sink) }
        });
        assert_eq!(status, Status::OK);
        let description = wire::decode_virtio_description(&output).unwrap();
        assert_eq!((description.device_type, description.stores.as_slice()), (7, &["disk".to_owned()][..]));
        // SAFETY: by the convention.
        let started =
            instance.ask(|table, instance, sink| unsafe { (table.start)(instance, 1, 2, 3, 4, 5, 6, sink) });
        assert_eq!(started.0, Status::OK);
        instance
    }

    fn ask(&self, call: impl FnOnce(&VirtioTable, *mut c_void, Sink) -> Status) -> (Status, Vec<u8>) {
        let mut output = Vec::new();
        let status = call(table(), self.0, Sink::to(&mut output));
        (status, output)
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        // SAFETY: the last call with the instance.
        unsafe { (table().destroy)(self.0) };
    }
}

#[test]
fn every_call_crosses_the_boundary_in_both_directions() {
    let seen = Seen::default();
    let device = Instance::started(&seen);
    // SAFETY: by the convention.
    let (status, output) = device.ask(|table, device, sink| unsafe { (table.activate)(device, 4, sink) });
    assert_eq!(status, Status::REFUSED);
    assert_eq!(wire::decode_device_error(&output), Ok(Error::Unsupported("4 without 1".into())));
    let records = [
        RequestRecord { handle: Handle(70), readable: 10, writable: 20, head: 2 },
        RequestRecord { handle: Handle(71), readable: 1, writable: 0, head: 1 },
    ];
    // SAFETY: by the convention.
    let status = unsafe { (table().requests_ready)(device.0, 3, records.as_ptr(), 2, Bytes::new(b"abc")) };
    assert_eq!(
        (status, seen.0.borrow().last().map(String::as_str)),
        (Status::OK, Some("requests_complete([Answer { request: Handle(70), written: 19 }])"))
    );
    let expected = [
        "2 3 Handle(70) 10 20 [97, 98]",
        "2 3 Handle(71) 1 0 [99]",
        "requests_write(Handle(70) 2 ab)",
        "requests_to_channel(Handle(70) 3 4 0)",
        "requests_from_channel(Handle(70) 6 7 0)",
        "entropy_fill(Handle(70) 9 10)",
        "guest_pages_release_numbered(Handle(70))",
        "guest_pages_release_own(Handle(70))",
        "folder_act(0 Handle(70) there)",
        "folder_act(0 Handle(70) gone)",
        "store_begin(0 Handle(70) 0 1 2 3 ok)",
        "store_begin(0 Handle(70) 1 4 5 6 )",
        "store_begin(2)",
        "store_begin(0 Handle(70) 2 0 0 0 eight888)",
        "store_begin(0 Handle(70) 3 0 8 7 )",
        "store_begin(0 Handle(70) 4 0 10 9 )",
        "store_begin(0 Handle(70) 5 0 10 9 )",
        "store_begin(4)",
        "port_accept(0 2)",
        "port_send(0 [Handle(70), Handle(9)])",
        "port_receive(0 [1, 0] [Handle(70)])",
        "socket_accept(0 22 23)",
        "socket_send(0 Handle(70) 24 25 26)",
        "socket_receive(0 Handle(70) 28 29 30)",
        "socket_shut(0 32 0 1)",
        "socket_close(0 33)",
        "timer_arm(0 17)",
        "channel_write(0 cd)",
        "requests_config_changed()",
        "requests_needs_reset()",
        "requests_complete([Answer { request: Handle(70), written: 19 }])",
    ];
    assert_eq!(seen.0.take(), expected);
    let done =
        [OperationDone::new(Handle(70), Ok(())), OperationDone::new(Handle(71), Err(StoreError::NoSpace))];
    // SAFETY: by the convention.
    let statuses = unsafe {
        [
            (table().operations_done)(device.0, done.as_ptr(), 2),
            (table().port_ready)(device.0, 1),
            (table().port_changed)(device.0, 2),
            (table().socket_ready)(device.0, 7),
            (table().store_changed)(device.0, 3),
            (table().channel_readable)(device.0, 4),
            (table().channel_writable)(device.0, 5),
            (table().timer_fired)(device.0, 6),
        ]
    };
    assert_eq!(statuses, [Status::OK; 8]);
    // SAFETY: by the convention.
    let adjusted = device.ask(|table, device, sink| unsafe {
        (table.adjust)(device, Bytes::new(b"k"), Bytes::new(b"v"), sink)
    });
    assert_eq!(adjusted.0, Status::OK);
    let expected = [
        "2 done Ok(()) Err(NoSpace)",
        "2 port 1 ready",
        "2 port 2 changed",
        "2 socket 7 ready",
        "2 store 3 changed",
        "2 channel 4 readable",
        "2 channel 5 writable",
        "2 timer 6",
        "2 k=v",
    ];
    assert_eq!(seen.0.take(), expected);
}

#[test]
fn configuration_and_state_cross_and_a_panic_ends_the_instance() {
    let seen = Seen::default();
    let device = Instance::started(&seen);
    let mut value = 0;
    // SAFETY: by the convention.
    unsafe {
        assert_eq!((table().config_write)(device.0, 0, 4, 100), Status::OK);
        assert_eq!((table().config_read)(device.0, 2, 4, &raw mut value), Status::OK);
    }
    assert_eq!(value, 106);
    let mut schema = 0;
    // SAFETY: by the convention.
    let saved = device.ask(|table, device, sink| unsafe { (table.save)(device, &raw mut schema, sink) });
    assert_eq!((saved, schema), ((Status::OK, 100u64.to_le_bytes().to_vec()), 2));
    for (schema, data, right) in
        [(2, &[1; 8][..], Status::OK), (3, &[1; 8], Status::REFUSED), (2, &[1; 7], Status::REFUSED)]
    {
        // SAFETY: by the convention.
        let restored = device
            .ask(|table, device, sink| unsafe { (table.restore)(device, schema, Bytes::new(data), sink) });
        assert_eq!(restored.0, right, "schema {schema}, {} bytes", data.len());
    }
    // SAFETY: by the convention.
    let statuses = unsafe { [(table().reset)(device.0), (table().port_ready)(device.0, 0)] };
    assert_eq!(statuses, [Status::TRAPPED; 2]);
    assert_eq!(seen.0.take(), ["panicked: no way back"]);
}

#[test]
fn a_host_with_a_smaller_table_gets_no_instance() {
    let small = VirtioHost { size: VirtioHost::SIZE - 8, ..HOST };
    // SAFETY: no instance is made.
    assert!(unsafe { (table().create)(&raw const small, ptr::null_mut()) }.is_null());
}
