//! See the target's function.
#![no_main]
#![allow(dead_code)]

#[path = "../../devices/platform/tests/virtio/device.rs"]
mod device;
#[path = "../../devices/platform/tests/virtio/machine.rs"]
mod machine;
#[path = "../../devices/platform/tests/fuzz/targets.rs"]
mod targets;

libfuzzer_sys::fuzz_target!(|data: &[u8]| drop(targets::virtqueue(data)));
