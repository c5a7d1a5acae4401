//! The bench does what a host does, and the conformance check finds the mistakes that it is there for.
#![allow(clippy::unwrap_used, reason = "a test and its helpers")]

use std::panic::{AssertUnwindSafe, catch_unwind};

use tenon_sdk::device::{
    Attachment, Channel, Config, Decoder, Description, Device, Encoder, Level, Line, Request, Result, Timer,
    Trigger, info, now, request, wall_clock,
};
use tenon_sdk::personality::{self, Boot, CpuState, Image, Machine, Memory, Personality, StopMethod};
use tenon_testkit::{Bench, LoadBench, conformance};

/// What a device under check does wrong.
const FINE: u8 = 0;
const PANICS: u8 = 1;
const FORGETS_VALUE: u8 = 2;
const FORGETS_LINE: u8 = 3;
const FORGETS_TIMER: u8 = 4;
const RESET_KEEPS_VALUE: u8 = 5;
const RESET_KEEPS_TIMER: u8 = 6;
const TRUSTS_STATE: u8 = 7;
const STATE_MAY_END: u8 = 8;
const FORGETS_INPUT: u8 = 9;
/// Has a periodic timer, and does not save it.
const PERIODIC: u8 = 10;

/// A device with a line, a timer and a channel; `MISTAKE` says what is wrong with it.
struct Sample<const MISTAKE: u8> {
    line: Line,
    timer: Timer,
    channel: Channel,
    value: u8,
    input: u8,
    due: Option<u64>,
    fired: Vec<u64>,
}

impl<const MISTAKE: u8> Sample<MISTAKE> {
    fn set(&mut self, value: u8) {
        self.value = value;
        self.line.set_level(value & 1 == 1);
    }

    fn arm(&mut self, due: Option<u64>) {
        self.due = due;
        match due {
            Some(due) => self.timer.arm(due),
            None => self.timer.cancel(),
        }
    }
}

impl<const MISTAKE: u8> Device for Sample<MISTAKE> {
    fn describe(_config: &Config) -> Result<Description> {
        Ok(Description::new()
            .pio("registers", 0x10, 8)
            .line(Some(5), Trigger::Level)
            .timer()
            .channel("console"))
    }

    fn start(_config: &Config, mut attachment: Attachment) -> Result<Self> {
        let (line, timer, channel) = (attachment.line()?, attachment.timer()?, attachment.channel()?);
        Ok(Self { line, timer, channel, value: 0, input: 0, due: None, fired: Vec::new() })
    }

    fn read(&mut self, _region: u32, offset: u64, _size: u8) -> u64 {
        match offset {
            0 => self.value.into(),
            1 => self.input.into(),
            2 => wall_clock(),
            _ => u64::MAX,
        }
    }

    fn write(&mut self, _region: u32, offset: u64, _size: u8, value: u64) {
        match offset {
            0 => self.set(value.to_le_bytes()[0]),
            1 => self.arm(Some(now() + value)),
            2 => request(Request::Exit(value.to_le_bytes()[0])),
            3 => {
                self.channel.write(&value.to_le_bytes());
            }
            4 => info!("wrote {value}"),
            5 if MISTAKE == PANICS && value == u64::MAX >> 56 => panic!("as it should for this test"),
            6 if MISTAKE == PERIODIC => self.timer.arm_periodic(now() + 1, value),
            _ => {}
        }
    }

    fn timer_fired(&mut self, _timer: u32) {
        self.due = None;
        self.fired.push(now());
    }

    fn channel_readable(&mut self, _channel: u32) {
        while let [byte] = self.channel.read(1)[..] {
            self.input = byte;
        }
    }

    fn reset(&mut self) {
        if MISTAKE != RESET_KEEPS_VALUE {
            self.set(0);
        }
        self.input = 0;
        if MISTAKE == RESET_KEEPS_TIMER {
            self.due = None;
        } else {
            self.arm(None);
        }
    }

    fn save(&self, state: &mut Encoder) -> Result<()> {
        state.u8(self.value).option(self.due);
        if MISTAKE != FORGETS_INPUT {
            state.u8(self.input);
        }
        Ok(())
    }

    fn restore(&mut self, state: &mut Decoder<'_>) -> Result<()> {
        let value = state.u8()?;
        if MISTAKE == TRUSTS_STATE {
            assert!(value < 0x80 || value == self.value || value & 0x40 != 0, "as it should for this test");
        }
        match MISTAKE {
            FORGETS_VALUE => {}
            FORGETS_LINE => self.value = value,
            _ => self.set(value),
        }
        let due = state.option()?;
        if MISTAKE == FORGETS_TIMER {
            self.due = due;
        } else {
            self.arm(due);
        }
        if MISTAKE == STATE_MAY_END {
            self.input = state.u8().unwrap_or(0);
        } else if MISTAKE != FORGETS_INPUT {
            self.input = state.u8()?;
        }
        Ok(())
    }
}

fn finds<const MISTAKE: u8>(what: &str) {
    let payload = catch_unwind(AssertUnwindSafe(|| conformance::<Sample<MISTAKE>>(&[]))).unwrap_err();
    let text = payload
        .downcast_ref::<String>()
        .map_or_else(|| *payload.downcast_ref::<&str>().unwrap(), String::as_str);
    assert!(text.contains(what), "mistake {MISTAKE} was found as: {text}");
}

#[test]
fn conformance_passes_a_device_that_is_right() {
    conformance::<Sample<FINE>>(&[]);
}

#[test]
fn conformance_finds_each_mistake() {
    finds::<PANICS>("as it should for this test");
    finds::<FORGETS_VALUE>("saves another state");
    finds::<FORGETS_LINE>("holds lines");
    finds::<FORGETS_TIMER>("has timers");
    finds::<RESET_KEEPS_VALUE>("after `reset` the state is not as after power-on");
    finds::<RESET_KEEPS_TIMER>("a device that was reset has timers");
    finds::<TRUSTS_STATE>("as it should for this test");
    finds::<STATE_MAY_END>("bytes of its state");
    finds::<FORGETS_INPUT>("on a restored device gives");
    finds::<PERIODIC>("has timers");
}

#[test]
fn timers_fire_in_time_and_missed_periods_count_once() {
    let mut bench = Bench::<Sample<PERIODIC>>::new(&[]).unwrap();
    bench.advance(100);
    bench.write(0, 1, 1, 50);
    assert_eq!(bench.timer(0), Some(150));
    bench.advance(49);
    assert!(bench.device().fired.is_empty());
    bench.advance(1);
    assert_eq!((bench.device().fired.as_slice(), bench.timer(0), bench.now()), (&[150][..], None, 150));
    // A period under 10 µs is raised to that.
    bench.write(0, 6, 1, 1);
    bench.advance(20_001);
    assert_eq!(bench.device().fired, [150, 151, 10_151, 20_151]);
}

#[test]
fn channels_lines_clock_log_and_requests_are_the_tests() {
    let mut bench = Bench::<Sample<FINE>>::new(&[]).unwrap();
    bench.channel("console").push(b"abc");
    assert_eq!((bench.read(0, 1, 1), bench.channel("console").pending()), (b'c'.into(), 0));
    bench.channel("console").set_capacity(5);
    bench.write(0, 3, 4, 0x6463_6261);
    assert_eq!(bench.channel("console").take_output(), b"abcd\0");
    bench.write(0, 0, 1, 1);
    bench.write(0, 0, 1, 3);
    bench.write(0, 0, 1, 2);
    assert_eq!((bench.line(0).level(), bench.line(0).edges), (false, 1));
    bench.set_wall_clock(0x1234);
    assert_eq!(bench.read(0, 2, 4), 0x1234);
    bench.write(0, 4, 1, 7);
    assert_eq!(bench.take_log(), [(Level::Info, "wrote 7".into())]);
    bench.write(0, 2, 1, 3);
    bench.write(0, 2, 1, 4);
    assert_eq!(bench.request(), Some(Request::Exit(3)));
}

#[test]
fn a_saved_state_starts_another_device() {
    let mut bench = Bench::<Sample<FINE>>::new(&[]).unwrap();
    bench.write(0, 0, 1, 0x81);
    let mut other = Bench::<Sample<FINE>>::restored(&[], &bench.save()).unwrap();
    assert_eq!((other.read(0, 0, 1), other.line(0).level()), (0x81, true));
}

struct Loader;

impl Personality for Loader {
    fn load(
        machine: &Machine,
        memory: &Memory<'_>,
        images: Vec<Image>,
        options: &Config,
    ) -> personality::Result<Boot> {
        let image = &images[0];
        memory.copy_image(options.number("at")?.unwrap_or(0x1000), image, 0, image.size())?;
        memory.write(0x2ffe, b"text\0")?;
        personality::info!("{} bytes of {}", image.read_all()?.len(), image.role());
        let summary = format!("{} vCPU", machine.vcpus);
        Ok(Boot { summary, vcpu: CpuState::real_mode(0x100, 0), stop: StopMethod::None })
    }
}

#[test]
fn a_load_gives_back_memory_and_the_first_vcpu() {
    let bench = LoadBench::new(5 << 30).image("kernel", *b"\x01\x02\x03");
    let loaded = bench.load::<Loader>().unwrap();
    assert_eq!((loaded.number(0x1000, 4), loaded.text(0x2ffe).as_str()), (0x0003_0201, "text"));
    assert_eq!((loaded.boot.vcpu.cs.base, loaded.log[0].1.as_str()), (0x1000, "3 bytes of kernel"));
    let high = bench.clone().option("at", "0x100000000").load::<Loader>().unwrap();
    assert_eq!(high.memory(4 << 30, 3), [1, 2, 3]);
}

#[test]
fn memory_that_is_not_ram_cannot_be_written() {
    let bench = LoadBench::new(16 << 20).image("kernel", [0; 2]);
    for at in ["0x9ffff", "0xa0000", "0xfffff", "0xffffff", "0xffffffffffffffff"] {
        assert!(bench.clone().option("at", at).load::<Loader>().is_err(), "{at}");
    }
    assert!(bench.option("at", "0xfffffe").load::<Loader>().is_ok());
}
