//! What every host relies on, checked for any device.

use tenon_sdk::Device;
use tenon_sdk::device::{Error, SavedState, Space};

use crate::Bench;
use crate::random::Random;

/// How many random operations a device has to stand.
const OPERATIONS: u32 = 20_000;
/// How many random operations follow on restoring.
const AFTERWARDS: u32 = 200;
/// How many damaged states a device has to stand, at most.
const DAMAGES: usize = 4_000;

/// Checks with these settings that the device
///
/// - describes itself, the same way twice, with regions that are not empty;
/// - stands random accesses, time and input without a panic;
/// - is not changed by `save`; comes back from it in the same state, with the same lines high and timers armed; and goes on as
///   if nothing had happened;
/// - is, after `reset`, as after power-on;
/// - refuses a state of a newer schema or of schema 0, and a truncated one; refuses or stands one with a flipped bit.
///
/// The random operations are the same in every run.
///
/// # Panics
/// The device fails a check. The panic says which.
pub fn conformance<D: Device>(settings: &[(&str, &str)]) {
    let bench = || match Bench::<D>::new(settings) {
        Ok(bench) => bench,
        Err(error) => panic!("the device does not start with {settings:?}: {error}"),
    };
    describes(&bench(), &bench());
    let mut random = Random::new(0x7e17);
    let mut used = bench();
    for round in 0..8 {
        operate(&mut used, &mut random, OPERATIONS / 8);
        continues(&mut used, &mut random);
        assert!(used.save() == used.save(), "two saves in a row differ");
        if round % 2 == 1 {
            resets(&mut used);
        }
    }
    hostile::<D>(settings, &used.save(), &random);
}

fn describes<D: Device>(first: &Bench<D>, second: &Bench<D>) {
    assert!(first.description() == second.description(), "`describe` answers differently the second time");
    for region in &first.description().regions {
        assert!(region.size > 0, "the region `{}` is empty", region.name);
        assert!(
            region.space == Space::Mmio || region.base.is_some(),
            "the port range `{}` has no base",
            region.name
        );
    }
}

/// A restored device is equal to the one that was saved, and goes on like it. Leaves the restored one on the bench.
fn continues<D: Device>(bench: &mut Bench<D>, random: &mut Random) {
    let mut restored = bench.forked();
    let mut same = random.clone();
    let (seen, again) = (operate(bench, random, AFTERWARDS), operate(&mut restored, &mut same, AFTERWARDS));
    if let Some(at) = seen.iter().zip(&again).position(|(a, b)| a != b) {
        panic!(
            "operation {} on a restored device gives {:?}, and on the one saved {:?}",
            at + 1,
            again[at],
            seen[at]
        );
    }
    let (old, new) = (bench.save(), restored.save());
    assert!(old == new, "a restored device later saves another state: {new:?}, not {old:?}");
    bench.assert_same_outside(&restored, "a restored device later");
    *bench = restored;
}

fn resets<D: Device>(bench: &mut Bench<D>) {
    bench.reset();
    let new = match bench.fresh() {
        Ok(new) => new,
        Err(error) => panic!("the device does not start a second time: {error}"),
    };
    let (reset, power_on) = (bench.save(), new.save());
    assert!(
        reset == power_on,
        "after `reset` the state is not as after power-on: {reset:?}, not {power_on:?}"
    );
    new.assert_same_outside(bench, "a device that was reset");
}

fn hostile<D: Device>(settings: &[(&str, &str)], state: &SavedState, random: &Random) {
    let restore = |state: &SavedState| {
        let mut bench = Bench::<D>::restored(settings, state)?;
        operate(&mut bench, &mut random.clone(), AFTERWARDS);
        let _ = bench.save();
        Ok(())
    };
    for schema in [0, D::SCHEMA + 1] {
        match restore(&SavedState { schema, ..state.clone() }) {
            Err(Error::Schema(_)) => {}
            _ => panic!("the device accepts a state of schema {schema}; it reads 1 to {}", D::SCHEMA),
        }
    }
    let length = state.data.len();
    for shorter in (0..length).step_by((length / DAMAGES).max(1)) {
        let truncated = SavedState { schema: state.schema, data: state.data[..shorter].to_vec() };
        assert!(
            restore(&truncated).is_err(),
            "the device accepts {shorter} of the {length} bytes of its state"
        );
    }
    for bit in (0..length * 8).step_by((length * 8 / DAMAGES).max(1)) {
        let mut damaged = state.clone();
        damaged.data[bit / 8] ^= 1 << (bit % 8);
        let _ = restore(&damaged);
    }
}

/// Something that can be told apart from outside.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Read(u64),
    Output(Vec<u8>),
    Nothing,
}

/// Does `count` random things to a device.
fn operate<D: Device>(bench: &mut Bench<D>, random: &mut Random, count: u32) -> Vec<Seen> {
    let regions = bench.description().regions.clone();
    let channels = bench.description().channels.len();
    (0..count)
        .map(|_| match random.below(16) {
            0 => {
                bench.advance(1 << random.below(34));
                Seen::Nothing
            }
            1 if channels > 0 => {
                let bytes: Vec<u8> = (0..random.below(40)).map(|_| random.byte()).collect();
                bench.push(random.index(channels), &bytes);
                Seen::Nothing
            }
            2 if channels > 0 => Seen::Output(bench.output(random.index(channels))),
            n if !regions.is_empty() => {
                let number = random.index(regions.len());
                let region = &regions[number];
                let sizes: &[u8] = if region.space == Space::Pio { &[1, 2, 4] } else { &[1, 2, 4, 8] };
                let size = sizes[random.index(sizes.len())];
                let size = if u64::from(size) > region.size { 1 } else { size };
                // Large regions have most of their registers at the start.
                let span = region.size - u64::from(size) + 1;
                let span = if random.below(2) == 0 { span.min(64) } else { span };
                let offset = random.below(span);
                let number = u32::try_from(number).unwrap_or(u32::MAX);
                if n.is_multiple_of(2) {
                    return Seen::Read(bench.read(number, offset, size));
                }
                let value = match random.below(4) {
                    0 => random.below(16),
                    1 => 1 << random.below(64),
                    2 => u64::MAX,
                    _ => random.next(),
                };
                bench.write(number, offset, size, value);
                Seen::Nothing
            }
            _ => Seen::Nothing,
        })
        .collect()
}
