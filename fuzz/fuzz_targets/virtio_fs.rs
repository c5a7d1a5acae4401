//! See the target's function.
#![no_main]
#![allow(dead_code)]

#[path = "../../devices/fs/tests/fuzz.rs"]
mod fuzz;

libfuzzer_sys::fuzz_target!(|data: &[u8]| drop(fuzz::target(data)));
