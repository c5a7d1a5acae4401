//! Virtio devices: one that works, and one that does what it must not. The component and the native library are built from the same source.

use std::sync::{Arc, OnceLock};

use tenon_core::{Clock, Lifecycle, NetworkPort, QueueDevice};
use tenon_plugins::{AttachError, Bundle, Grants, Plugin, Status, Store, VirtioDevice, VirtioParts};

use crate::machine::{Machine, fixture, host, misdeed};
use crate::rings::{Driver, Port};
use crate::stores::{blocks, open};

fn queues(native: bool) -> Arc<Plugin> {
    static PLUGINS: OnceLock<[Arc<Plugin>; 2]> = OnceLock::new();
    let plugins = PLUGINS.get_or_init(|| {
        let directory = fixture("queues");
        [Grants::none(), Grants::none().allow_native("queues")]
            .map(|grants| host().load(Bundle::open(&directory).unwrap(), &grants).unwrap())
    });
    plugins[usize::from(native)].clone()
}

struct Bench {
    clock: Arc<Clock>,
    store: Arc<Store>,
    port: Arc<Port>,
    device: Arc<VirtioDevice>,
    driver: Driver,
}

impl Bench {
    fn new(native: bool) -> Self {
        let ram = Driver::memory();
        let clock = Clock::virtual_time();
        let store = open(blocks(native), &[], Vec::new());
        let port = Arc::new(Port::default());
        let parts = VirtioParts {
            clock: clock.clone(),
            ram: ram.clone(),
            stores: vec![("disk".into(), store.clone())],
            ports: vec![("net".into(), port.clone() as Arc<dyn NetworkPort>)],
            sockets: Vec::new(),
            folders: Vec::new(),
        };
        let device = queues(native).attach_virtio("queues0", &[], &parts).unwrap();
        let mut driver = Driver::new(&ram);
        driver.start(&*device, 2);
        Self { clock, store, port, device, driver }
    }

    fn notify(&self) {
        self.device.notify(0);
    }
}

#[test]
fn blocks_pass_between_guest_memory_and_a_store_without_the_device() {
    for native in [false, true] {
        let bench = Bench::new(native);
        let block: Vec<u8> = (0..1024_u32).map(|n| n.to_le_bytes()[0] ^ 0x5a).collect();
        bench.driver.push(0, b'w', 4096, &block, 1);
        bench.notify();
        assert_eq!(bench.driver.answers(0, 1), [(0, 1)]);
        let read = bench.driver.push(0, b'r', 4096, &[], 1025);
        bench.driver.push(0, b'f', 0, &[], 1);
        bench.driver.push(0, b'z', 0, &[], 1);
        bench.notify();
        let mut answers = bench.driver.answers(0, 4);
        answers.sort_unstable();
        assert_eq!(answers, [(0, 1), (1, 1025), (2, 1), (3, 1)]);
        assert_eq!(bench.driver.written(read, 1025), [block.as_slice(), &[0]].concat());
        assert_eq!(bench.store.read(4096, 1024).unwrap(), block);
        // Operations that fail are the device's to answer.
        let outside = bench.driver.push(0, b'r', 1 << 40, &[], 513);
        let cannot = bench.driver.push(0, b'd', 0, &[], 1);
        let long = bench.driver.push(0, b'w', 0, &[1; 100], 1);
        bench.notify();
        bench.driver.answers(0, 7);
        assert_eq!(bench.driver.written(outside, 513)[512], 2, "out of range");
        assert_eq!(bench.driver.written(cannot, 1), [5], "unsupported");
        assert_eq!(bench.driver.written(long, 1), [2], "no whole block");
        assert_eq!(bench.device.usage().faults, 0);
    }
}

#[test]
fn sixty_four_requests_are_one_call_into_the_component() {
    let ram = Driver::memory();
    let store = open(blocks(false), &[], Vec::new());
    let parts = VirtioParts {
        clock: Clock::virtual_time(),
        ram: ram.clone(),
        stores: vec![("disk".into(), store)],
        ports: vec![("net".into(), Arc::new(Port::default()) as Arc<dyn NetworkPort>)],
        sockets: Vec::new(),
        folders: Vec::new(),
    };
    let device = queues(false).attach_virtio("queues1", &[], &parts).unwrap();
    let mut driver = Driver::new(&ram);
    driver.start(&*device, 2);
    // The worker is kept away while requests come.
    device.pause();
    let before = device.usage();
    for n in 0..64 {
        driver.push(0, b'r', n * 512 % 2048, &[], 513);
    }
    device.notify(0);
    device.resume();
    driver.answers(0, 64);
    let after = device.usage();
    assert_eq!((after.batches - before.batches, after.requests, after.operations), (1, 64, 64));
    assert_eq!(after.calls - before.calls, 1);
}

#[test]
fn misdeeds_of_a_request_end_in_a_device_that_needs_a_reset_and_gets_it() {
    for kind in *b"tshmguc" {
        let mut bench = Bench::new(false);
        bench.device.write_config(0, 8, 77);
        assert_eq!(bench.driver.heard(), "config changed");
        bench.driver.push(0, kind, 0, &[], 513);
        bench.notify();
        assert_eq!(bench.driver.heard(), "needs reset", "{}", char::from(kind));
        assert_eq!(bench.device.status(), Status::Failed);
        let usage = bench.device.usage();
        assert_eq!(usage.faults, 6, "{}: {usage:?}", char::from(kind));
        bench.device.stop();
        assert_eq!((bench.device.status(), bench.device.read_config(0, 8)), (Status::Running, 0));
        let device = bench.device.clone();
        bench.driver.start(&*device, 2);
        bench.driver.push(0, b'n', 0, &[], 1);
        bench.notify();
        assert_eq!(bench.driver.answers(0, 1).len(), 1, "{}", char::from(kind));
    }
}

#[test]
fn taking_a_frame_where_none_waits_is_a_misdeed() {
    let bench = Bench::new(false);
    bench.driver.push(0, b'q', 0, &[], 100);
    bench.notify();
    assert_eq!(bench.driver.heard(), "needs reset");
}

#[test]
fn a_request_that_is_answered_twice_is_answered_once() {
    let bench = Bench::new(false);
    bench.driver.push(0, b'2', 0, &[], 1);
    bench.notify();
    assert_eq!(bench.driver.answers(0, 1), [(0, 0)]);
    bench.driver.push(0, b'n', 0, &[], 1);
    bench.notify();
    assert_eq!(bench.driver.answers(0, 2), [(0, 0), (1, 0)]);
    let usage = bench.device.usage();
    assert_eq!((usage.faults, usage.restarts, usage.answers), (1, 1, 2));
}

#[test]
fn a_crash_with_an_operation_under_way_loses_nothing_and_repeats_nothing() {
    for native in [false, true] {
        let bench = Bench::new(native);
        bench.device.write_config(0, 8, 42);
        // The store takes its time over this one.
        let mut block = [9; 512];
        block[..4].copy_from_slice(b"wait");
        let slow = bench.driver.push(0, b'w', 512, &block, 1);
        bench.notify();
        while bench.store.usage().batches == 0 {
            std::thread::yield_now();
        }
        let requests: [(u8, u64, &[u8], u64); 3] =
            [(b'n', 0, &[], 1), (b'1', 0, &[], 1), (b'r', 1024, &[], 513)];
        let tokens = bench.driver.push_all(0, &requests);
        bench.notify();
        let mut answers = bench.driver.answers(0, 4);
        answers.sort_unstable();
        assert_eq!(answers, [(slow, 1), (tokens[0], 0), (tokens[1], 1), (tokens[2], 513)]);
        let usage = bench.device.usage();
        assert_eq!((usage.faults, usage.restarts, usage.divergences), (1, 1, 0));
        assert_eq!((usage.requests, usage.answers, usage.operations), (4, 4, 2));
        assert_eq!(bench.device.read_config(0, 8), 42);
        assert_eq!(bench.store.read(512, 512).unwrap(), block);
    }
}

#[test]
fn frames_go_out_whole_and_come_in_over_as_many_buffers_as_they_need() {
    for native in [false, true] {
        let bench = Bench::new(native);
        bench.driver.push(0, b'p', 0, b"a frame", 0);
        bench.notify();
        assert_eq!(bench.driver.answers(0, 1), [(0, 0)]);
        assert_eq!(&bench.port.sent.lock().unwrap()[0][16..], b"a frame");

        let rooms: Vec<u32> = (0..4).map(|_| bench.driver.push(1, 0, 0, &[], 64)).collect();
        bench.device.notify(1);
        let frame: Vec<u8> = (0..150).collect();
        bench.port.frame(frame.clone());
        bench.port.frame(vec![7; 20]);
        assert_eq!(
            bench.driver.answers(1, 4),
            [(rooms[0], 64), (rooms[1], 64), (rooms[2], 22), (rooms[3], 20)]
        );
        let mut came: Vec<u8> =
            rooms[..3].iter().flat_map(|token| bench.driver.written(*token, 64)).collect();
        came.truncate(150);
        let mut wanted = frame;
        wanted[10..12].copy_from_slice(&[3, 0]);
        assert_eq!(came, wanted);
    }
}

#[test]
fn random_bytes_channels_and_pages_work_on_requests() {
    for native in [false, true] {
        let bench = Bench::new(native);
        let out = bench.device.channel("out").unwrap().clone();
        let _ = out.take(0);
        let random = bench.driver.push(0, b'e', 0, &[], 3000);
        bench.driver.push(0, b'o', 0, b"to the outside", 0);
        bench.driver.push(0, b'b', 0, &[], 3000);
        bench.notify();
        let mut answers = bench.driver.answers(0, 3);
        answers.sort_unstable();
        assert_eq!(answers, [(0, 3000), (1, 0), (2, 0)]);
        assert!(bench.driver.written(random, 3000).iter().filter(|byte| **byte == 0).count() < 100);
        assert_eq!(out.take(100), b"to the outside");
    }
}

#[test]
fn a_timer_reaches_the_device_on_its_worker() {
    let bench = Bench::new(false);
    bench.device.write_config(8, 8, 1000);
    bench.clock.advance_to(1000);
    assert_eq!(bench.driver.heard(), "config changed");
    assert_eq!(bench.device.read_config(8, 8), 1);
}

#[test]
fn each_sort_of_device_is_attached_its_own_way() {
    let machine = Machine::still();
    let error = queues(false).attach("q", &[], &machine.parts).err().unwrap();
    assert!(matches!(error, AttachError::OtherDevice { .. }), "{error}");
    let parts = VirtioParts {
        clock: Clock::virtual_time(),
        ram: Driver::memory(),
        stores: Vec::new(),
        ports: Vec::new(),
        sockets: Vec::new(),
        folders: Vec::new(),
    };
    let error = misdeed().attach_virtio("m", &[], &parts).err().unwrap();
    assert!(matches!(error, AttachError::OtherDevice { .. }), "{error}");
    let error = queues(false).attach_virtio("q", &[], &parts).err().unwrap();
    assert_eq!(error.to_string(), "device `q` needs a store named `disk`; it was given none");
    let error = blocks(false).attach_virtio("q", &[], &parts).err().unwrap();
    assert_eq!(error.to_string(), "`blocks` is a store, not a device");
}
