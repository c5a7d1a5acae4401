//! See the target's function.
#![no_main]
#![allow(dead_code)]

#[path = "../../devices/vsock/tests/fuzz.rs"]
mod fuzz;

libfuzzer_sys::fuzz_target!(|data: &[u8]| drop(fuzz::target(data)));
