//! The measurement by which `--engine auto` chooses.

use std::time::{Duration, Instant};

use tenon_kvm::Verdict;

use crate::fixture::engine;

#[test]
fn a_measurement_is_short_and_agrees_with_itself() {
    let Some(kvm) = engine() else { return };
    let start = Instant::now();
    let quality = kvm.measure().unwrap();
    println!("{quality}\nmeasured in {:?}", start.elapsed());
    // Fifty milliseconds by design; the rest is for other tests on the same CPUs.
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    assert!(quality.ring0_mips > 0.0 && quality.ring3_mips > 0.0 && quality.exit_ns > 0.0, "{quality:?}");
    if quality.verdict() == Verdict::Hardware {
        assert!(quality.ring3_mips > quality.ring0_mips / 10.0, "{quality:?}");
    }
}
