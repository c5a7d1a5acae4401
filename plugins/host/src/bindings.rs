//! The host's side of the contract, generated from `wit/`: one module for each kind of plugin.
//!
//! Nothing here is written by hand, and nothing here is public: the crate's own types stand between the
//! generated ones and its users, so that a new version of the contract does not change them.

#[allow(
    missing_docs,
    unreachable_pub,
    unsafe_code,
    unused_variables,
    clippy::all,
    clippy::pedantic,
    reason = "generated"
)]
pub(crate) mod device {
    wasmtime::component::bindgen!({
        path: "../../wit/device",
        world: "device-plugin",
        imports: { default: trappable },
    });
}

#[allow(
    missing_docs,
    unreachable_pub,
    unsafe_code,
    unused_variables,
    clippy::all,
    clippy::pedantic,
    reason = "generated"
)]
pub(crate) mod virtio {
    wasmtime::component::bindgen!({
        path: "../../wit/device",
        world: "virtio-plugin",
        imports: { default: trappable },
    });
}

#[allow(
    missing_docs,
    unreachable_pub,
    unsafe_code,
    unused_variables,
    clippy::all,
    clippy::pedantic,
    reason = "generated"
)]
pub(crate) mod store {
    wasmtime::component::bindgen!({
        path: "../../wit/store",
        world: "store-plugin",
        imports: { default: trappable },
    });
}

#[allow(
    missing_docs,
    unreachable_pub,
    unsafe_code,
    unused_variables,
    clippy::all,
    clippy::pedantic,
    reason = "generated"
)]
pub(crate) mod personality {
    wasmtime::component::bindgen!({
        path: "../../wit/personality",
        world: "personality-plugin",
        imports: { default: trappable },
    });
}
