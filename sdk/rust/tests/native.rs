//! A native device and a native personality, called through their tables as a host calls them.
#![allow(unsafe_code, clippy::unwrap_used, reason = "the host's side of a foreign-function interface")]

use std::cell::RefCell;
use std::ffi::c_void;
use std::ptr;

use tenon_sdk::abi::{
    ABI_VERSION, Bytes, CONTRACT, DeviceHost, DeviceTable, MAGIC, PersonalityHost, Sink, Status, wire,
};
use tenon_sdk::device::{
    Attachment, Channel, Decoder, Description, Device, Encoder, Error, Line, Request, Result, Timer, Trigger,
    info, now, request, wall_clock,
};
use tenon_sdk::personality::{
    self, Boot, CpuState, Image, Machine, Memory, MemoryKind, MemoryRange, Personality, StopMethod,
};
use tenon_sdk::{Config, device};

/// Uses everything: each register does one thing.
struct Everything {
    line: Line,
    timer: Timer,
    channel: Channel,
    value: u8,
}

impl Drop for Everything {
    fn drop(&mut self) {
        info!("gone");
    }
}

impl Device for Everything {
    const SCHEMA: u32 = 3;

    fn describe(config: &Config) -> Result<Description> {
        let base = config.number("base")?.unwrap_or(0x10);
        Ok(Description::new().pio("registers", base, 4).line(None, Trigger::Edge).timer().channel("out"))
    }

    fn start(_config: &Config, mut attachment: Attachment) -> Result<Self> {
        let (line, timer, channel) = (attachment.line()?, attachment.timer()?, attachment.channel()?);
        Ok(Self { line, timer, channel, value: 0 })
    }

    fn read(&mut self, _region: u32, offset: u64, _size: u8) -> u64 {
        match offset {
            0 => now(),
            1 => wall_clock(),
            2 => self.channel.read(100).iter().map(|byte| u64::from(*byte)).sum(),
            _ => panic!("there is no register {offset}"),
        }
    }

    fn write(&mut self, region: u32, offset: u64, size: u8, value: u64) {
        info!("{region} {offset} {size} {value}");
        self.line.raise();
        self.line.pulse();
        self.timer.arm(5);
        self.timer.arm_periodic(6, 7);
        self.timer.cancel();
        self.value = u8::try_from(self.channel.write(b"abc")).unwrap();
        request(Request::Exit(9));
    }

    fn timer_fired(&mut self, timer: u32) {
        info!("timer {timer}");
    }

    fn channel_readable(&mut self, channel: u32) {
        info!("channel {channel}");
    }

    fn reset(&mut self) {
        self.value = 0;
    }

    fn save(&self, state: &mut Encoder) -> Result<()> {
        if self.value == 77 {
            return Err(Error::Unsupported("77 cannot be saved".into()));
        }
        state.u8(self.value);
        Ok(())
    }

    fn restore(&mut self, state: &mut Decoder<'_>) -> Result<()> {
        self.value = state.u8()?;
        Ok(())
    }
}

mod plugin {
    tenon_sdk::export_device!(super::Everything);
}

/// What the host saw.
#[derive(Default)]
struct Seen(RefCell<Vec<String>>);

impl Seen {
    fn context(&self) -> *mut c_void {
        ptr::from_ref(self).cast_mut().cast()
    }

    fn take(&self) -> Vec<String> {
        self.0.take()
    }
}

fn note(context: *mut c_void, what: String) {
    // SAFETY: every instance here is made with the context of a `Seen` that outlives it.
    unsafe { &*context.cast::<Seen>() }.0.borrow_mut().push(what);
}

fn text(bytes: Bytes<'_>) -> String {
    // SAFETY: the bytes came in this call.
    String::from_utf8(unsafe { bytes.as_slice() }.to_vec()).unwrap()
}

unsafe extern "C" fn log(context: *mut c_void, level: u32, message: Bytes<'_>) {
    note(context, format!("log {level} {}", text(message)));
}
unsafe extern "C" fn time_now(_: *mut c_void) -> u64 {
    11
}
unsafe extern "C" fn arm(context: *mut c_void, timer: u32, deadline: u64) {
    note(context, format!("arm {timer} {deadline}"));
}
unsafe extern "C" fn arm_periodic(context: *mut c_void, timer: u32, first: u64, period: u64) {
    note(context, format!("arm {timer} {first} {period}"));
}
unsafe extern "C" fn cancel(context: *mut c_void, timer: u32) {
    note(context, format!("cancel {timer}"));
}
unsafe extern "C" fn wall(_: *mut c_void) -> u64 {
    22
}
unsafe extern "C" fn level(context: *mut c_void, line: u32, high: u32) {
    note(context, format!("line {line} {high}"));
}
unsafe extern "C" fn pulse(context: *mut c_void, line: u32) {
    note(context, format!("pulse {line}"));
}
unsafe extern "C" fn channel_write(context: *mut c_void, channel: u32, bytes: Bytes<'_>) -> u32 {
    note(context, format!("channel {channel} {}", text(bytes)));
    2
}
unsafe extern "C" fn channel_read(_: *mut c_void, _: u32, buffer: *mut u8, max: u32) -> u32 {
    assert_eq!(max, 100);
    // SAFETY: the buffer has room for `max` bytes.
    unsafe { ptr::copy_nonoverlapping([1, 2, 3].as_ptr(), buffer, 3) };
    3
}
unsafe extern "C" fn ask(context: *mut c_void, kind: u32, status: u32) {
    note(context, format!("ask {kind} {status}"));
}
unsafe extern "C" fn panicked(context: *mut c_void, message: Bytes<'_>) {
    note(context, format!("panicked: {}", text(message)));
}

static HOST: DeviceHost = DeviceHost {
    size: DeviceHost::SIZE,
    log_log: log,
    time_now,
    timer_arm: arm,
    timer_arm_periodic: arm_periodic,
    timer_cancel: cancel,
    wall_clock_now: wall,
    line_set_level: level,
    line_pulse: pulse,
    channel_write,
    channel_read,
    machine_control_ask: ask,
    panicked,
};

static TABLE: DeviceTable = device::native::table::<Everything>();

/// A started device. The functions of the table are called by the convention: own instance, one call at a time, good pointers.
struct Instance(*mut c_void);

impl Instance {
    fn new(seen: &Seen) -> Self {
        // SAFETY: the table and the context outlive the instance.
        let instance = unsafe { (TABLE.create)(&raw const HOST, seen.context()) };
        assert!(!instance.is_null());
        Self(instance)
    }

    fn describe(&self, settings: &[(String, String)]) -> (Status, Vec<u8>) {
        let (config, mut output) = (wire::encode_settings(settings), Vec::new());
        // SAFETY: by the convention.
        let status = unsafe { (TABLE.describe)(self.0, Bytes::new(&config), Sink::to(&mut output)) };
        (status, output)
    }

    fn start(&self) -> (Status, Vec<u8>) {
        let mut output = Vec::new();
        // SAFETY: by the convention.
        let status = unsafe { (TABLE.start)(self.0, 1, 1, 1, Sink::to(&mut output)) };
        (status, output)
    }

    fn started(seen: &Seen) -> Self {
        let instance = Self::new(seen);
        assert_eq!(instance.describe(&[]).0, Status::OK);
        assert_eq!(instance.start().0, Status::OK);
        instance
    }

    fn read(&self, offset: u64) -> (Status, u64) {
        let mut value = 0;
        // SAFETY: by the convention.
        let status = unsafe { (TABLE.read)(self.0, 0, offset, 1, &raw mut value) };
        (status, value)
    }

    fn save(&self) -> (Status, u32, Vec<u8>) {
        let (mut schema, mut output) = (0, Vec::new());
        // SAFETY: by the convention.
        let status = unsafe { (TABLE.save)(self.0, &raw mut schema, Sink::to(&mut output)) };
        (status, schema, output)
    }

    fn restore(&self, schema: u32, data: &[u8]) -> (Status, Vec<u8>) {
        let mut output = Vec::new();
        // SAFETY: by the convention.
        let status = unsafe { (TABLE.restore)(self.0, schema, Bytes::new(data), Sink::to(&mut output)) };
        (status, output)
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        // SAFETY: the last call with the instance.
        unsafe { (TABLE.destroy)(self.0) };
    }
}

#[test]
fn every_call_crosses_the_boundary_in_both_directions() {
    let seen = Seen::default();
    let device = Instance::new(&seen);
    let (status, output) = device.describe(&[("base".into(), "0x40".into())]);
    assert_eq!(status, Status::OK);
    assert_eq!(wire::decode_description(&output).unwrap().regions[0].base, Some(0x40));
    assert_eq!(device.start(), (Status::OK, vec![]));
    assert_eq!(
        (device.read(0), device.read(1), device.read(2)),
        ((Status::OK, 11), (Status::OK, 22), (Status::OK, 6))
    );
    // SAFETY: by the convention.
    let statuses = unsafe {
        [
            (TABLE.write)(device.0, 0, 1, 2, 3),
            (TABLE.timer_fired)(device.0, 4),
            (TABLE.channel_readable)(device.0, 5),
        ]
    };
    assert_eq!(statuses, [Status::OK; 3]);
    let expected = [
        "log 2 0 1 2 3",
        "line 0 1",
        "pulse 0",
        "arm 0 5",
        "arm 0 6 7",
        "cancel 0",
        "channel 0 abc",
        "ask 2 9",
        "log 2 timer 4",
        "log 2 channel 5",
    ];
    assert_eq!(seen.take(), expected);
    assert_eq!(device.save(), (Status::OK, 3, vec![2]));
    // SAFETY: by the convention.
    assert_eq!(unsafe { (TABLE.reset)(device.0) }, Status::OK);
    assert_eq!(device.save(), (Status::OK, 3, vec![0]));
    drop(device);
    assert_eq!(seen.take(), ["log 2 gone"]);
}

#[test]
fn refusals_carry_the_devices_words() {
    let seen = Seen::default();
    let device = Instance::new(&seen);
    let (status, output) = device.describe(&[("base".into(), "x".into())]);
    assert_eq!(status, Status::REFUSED);
    assert!(
        matches!(wire::decode_device_error(&output), Ok(Error::Invalid(text)) if text.contains("`base` is `x`"))
    );
    assert_eq!(device.start().0, Status::REFUSED);
    assert_eq!(device.describe(&[]).0, Status::OK);
    assert_eq!(device.start().0, Status::OK);
    for (schema, data) in [(0, &[1][..]), (4, &[1])] {
        let (status, output) = device.restore(schema, data);
        assert_eq!(status, Status::REFUSED);
        assert!(matches!(wire::decode_device_error(&output), Ok(Error::Schema(_))));
    }
    for data in [&[][..], &[1, 2]] {
        let (status, output) = device.restore(3, data);
        assert_eq!(status, Status::REFUSED);
        assert!(matches!(wire::decode_device_error(&output), Ok(Error::Invalid(_))));
    }
    assert_eq!(device.restore(2, &[77]), (Status::OK, vec![]));
    let (status, _, output) = device.save();
    assert_eq!(status, Status::REFUSED);
    assert_eq!(wire::decode_device_error(&output), Ok(Error::Unsupported("77 cannot be saved".into())));
}

#[test]
fn a_panic_stops_at_the_boundary_and_ends_one_instance() {
    let (seen, other_seen) = (Seen::default(), Seen::default());
    let (device, other) = (Instance::started(&seen), Instance::started(&other_seen));
    assert_eq!(device.read(3), (Status::TRAPPED, 0));
    assert_eq!(seen.take(), ["panicked: there is no register 3"]);
    assert_eq!(device.read(0), (Status::TRAPPED, 0), "an instance that panicked was called again");
    assert_eq!(other.read(0), (Status::OK, 11));
    let early = Instance::new(&seen);
    assert_eq!(early.read(0).0, Status::TRAPPED);
}

#[test]
fn a_host_with_a_smaller_table_gets_no_instance() {
    let small = DeviceHost { size: DeviceHost::SIZE - 8, ..HOST };
    // SAFETY: no instance is made.
    assert!(unsafe { (TABLE.create)(&raw const small, ptr::null_mut()) }.is_null());
    // SAFETY: as above.
    assert!(unsafe { (TABLE.create)(ptr::null(), ptr::null_mut()) }.is_null());
}

#[test]
fn the_plugins_symbol_names_its_versions() {
    let plugin = device::native::plugin(&TABLE);
    assert_eq!((plugin.magic, plugin.abi, text(plugin.contract).as_str()), (MAGIC, ABI_VERSION, CONTRACT));
    assert!(plugin.device.is_some() && plugin.personality.is_none());
}

struct Copier;

impl Personality for Copier {
    fn load(
        machine: &Machine,
        memory: &Memory<'_>,
        images: Vec<Image>,
        options: &Config,
    ) -> personality::Result<Boot> {
        let kernel = &images[0];
        memory.write(0x1000, &kernel.read(1, 100)?)?;
        memory.copy_image(0x2000, kernel, 0, 4)?;
        let summary =
            format!("{} {} {}", kernel.role(), machine.vcpus, options.text("cmdline").unwrap_or("-"));
        let vcpu = CpuState::long_mode(0x1000, 0x9000);
        Ok(Boot { summary, vcpu, stop: StopMethod::PowerButton })
    }
}

const IMAGE: &[u8] = b"tenon";

unsafe extern "C" fn role(_: *mut c_void, image: u32, output: Sink) {
    assert_eq!(image, 0);
    // SAFETY: the sink came in this call.
    unsafe { output.put(b"kernel") }
}
unsafe extern "C" fn size(_: *mut c_void, _: u32) -> u64 {
    IMAGE.len() as u64
}
unsafe extern "C" fn image_read(
    _: *mut c_void,
    _: u32,
    offset: u64,
    buffer: *mut u8,
    length: u32,
    done: *mut u32,
    _: Sink,
) -> Status {
    let part = &IMAGE[usize::try_from(offset).unwrap()..];
    assert!(length as usize <= part.len(), "the plugin asks for {length} bytes and makes room for them");
    // SAFETY: the buffer has room for `length` bytes.
    unsafe {
        ptr::copy_nonoverlapping(part.as_ptr(), buffer, length as usize);
        done.write(length);
    }
    Status::OK
}
unsafe extern "C" fn memory_write(context: *mut c_void, address: u64, bytes: Bytes<'_>, _: Sink) -> Status {
    note(context, format!("{address:#x} {}", text(bytes)));
    Status::OK
}
unsafe extern "C" fn copy_image(
    context: *mut c_void,
    address: u64,
    _: u32,
    _: u64,
    length: u64,
    error: Sink,
) -> Status {
    note(context, format!("{address:#x} copy {length}"));
    // SAFETY: the context is a `Seen`.
    if !unsafe { &*context.cast::<Seen>() }.0.borrow().iter().any(|line| line == "full") {
        return Status::OK;
    }
    let refusal = personality::Error::NoRoom("no RAM there".into());
    // SAFETY: the sink came in this call.
    unsafe { error.put(&wire::encode_personality_error(&refusal)) };
    Status::REFUSED
}

fn load(seen: &Seen, images: u32) -> (Status, Vec<u8>) {
    let host = PersonalityHost {
        size: PersonalityHost::SIZE,
        log_log: log,
        image_role: role,
        image_size: size,
        image_read,
        memory_write,
        memory_copy_image: copy_image,
        panicked,
    };
    let table = personality::native::table::<Copier>();
    let memory = vec![MemoryRange { start: 0, size: 1 << 20, kind: MemoryKind::Ram }];
    let machine = wire::encode_machine(&Machine { vcpus: 2, memory, rsdp: None });
    let options = wire::encode_settings(&[("cmdline".into(), "quiet".into())]);
    let mut output = Vec::new();
    // SAFETY: everything lives for the call.
    let status = unsafe {
        (table.load)(
            &raw const host,
            seen.context(),
            Bytes::new(&machine),
            images,
            Bytes::new(&options),
            Sink::to(&mut output),
        )
    };
    (status, output)
}

#[test]
fn a_native_personality_loads_refuses_and_panics_within_its_call() {
    let seen = Seen::default();
    let (status, output) = load(&seen, 1);
    assert_eq!((status, seen.take()), (Status::OK, vec!["0x1000 enon".into(), "0x2000 copy 4".into()]));
    let boot = wire::decode_boot(&output).unwrap();
    assert_eq!((boot.summary.as_str(), boot.vcpu.rip), ("kernel 2 quiet", 0x1000));

    seen.0.borrow_mut().push("full".into());
    let (status, output) = load(&seen, 1);
    assert_eq!(status, Status::REFUSED);
    let refusal = personality::Error::NoRoom("no RAM there".into());
    assert_eq!(wire::decode_personality_error(&output).unwrap(), refusal);

    seen.take();
    assert_eq!(load(&seen, 0).0, Status::TRAPPED);
    assert!(seen.take()[0].starts_with("panicked: index out of bounds"));
}
