//! The macros: log at a level, and export a plugin.
//!
//! The log macros are written out, since a macro that another macro makes cannot be re-exported under a shorter name.

/// Logs that something failed and the device is the worse for it. Takes what `format!` takes.
#[macro_export]
macro_rules! device_error {
    ($($argument:tt)+) => {
        $crate::device::log($crate::device::Level::Error, ::core::format_args!($($argument)+))
    };
}

/// Logs that something is wrong and the device goes on. Takes what `format!` takes.
#[macro_export]
macro_rules! device_warn {
    ($($argument:tt)+) => {
        $crate::device::log($crate::device::Level::Warn, ::core::format_args!($($argument)+))
    };
}

/// Logs a rare event that an administrator wants to know of. Takes what `format!` takes.
#[macro_export]
macro_rules! device_info {
    ($($argument:tt)+) => {
        $crate::device::log($crate::device::Level::Info, ::core::format_args!($($argument)+))
    };
}

/// Logs for the device's developer. Takes what `format!` takes.
#[macro_export]
macro_rules! device_debug {
    ($($argument:tt)+) => {
        $crate::device::log($crate::device::Level::Debug, ::core::format_args!($($argument)+))
    };
}

/// Logs for the device's developer, at every access. Takes what `format!` takes.
#[macro_export]
macro_rules! device_trace {
    ($($argument:tt)+) => {
        $crate::device::log($crate::device::Level::Trace, ::core::format_args!($($argument)+))
    };
}

/// Logs that something failed. Takes what `format!` takes.
#[macro_export]
macro_rules! personality_error {
    ($($argument:tt)+) => {
        $crate::personality::log($crate::personality::Level::Error, ::core::format_args!($($argument)+))
    };
}

/// Logs that something is wrong and the start goes on. Takes what `format!` takes.
#[macro_export]
macro_rules! personality_warn {
    ($($argument:tt)+) => {
        $crate::personality::log($crate::personality::Level::Warn, ::core::format_args!($($argument)+))
    };
}

/// Logs a rare event that an administrator wants to know of. Takes what `format!` takes.
#[macro_export]
macro_rules! personality_info {
    ($($argument:tt)+) => {
        $crate::personality::log($crate::personality::Level::Info, ::core::format_args!($($argument)+))
    };
}

/// Logs for the personality's developer. Takes what `format!` takes.
#[macro_export]
macro_rules! personality_debug {
    ($($argument:tt)+) => {
        $crate::personality::log($crate::personality::Level::Debug, ::core::format_args!($($argument)+))
    };
}

/// Logs for the personality's developer, in detail. Takes what `format!` takes.
#[macro_export]
macro_rules! personality_trace {
    ($($argument:tt)+) => {
        $crate::personality::log($crate::personality::Level::Trace, ::core::format_args!($($argument)+))
    };
}

/// Logs that something failed and the store is the worse for it. Takes what `format!` takes.
#[macro_export]
macro_rules! store_error {
    ($($argument:tt)+) => {
        $crate::store::log($crate::store::Level::Error, ::core::format_args!($($argument)+))
    };
}

/// Logs that something is wrong and the store goes on. Takes what `format!` takes.
#[macro_export]
macro_rules! store_warn {
    ($($argument:tt)+) => {
        $crate::store::log($crate::store::Level::Warn, ::core::format_args!($($argument)+))
    };
}

/// Logs a rare event that an administrator wants to know of. Takes what `format!` takes.
#[macro_export]
macro_rules! store_info {
    ($($argument:tt)+) => {
        $crate::store::log($crate::store::Level::Info, ::core::format_args!($($argument)+))
    };
}

/// Logs for the store's developer. Takes what `format!` takes.
#[macro_export]
macro_rules! store_debug {
    ($($argument:tt)+) => {
        $crate::store::log($crate::store::Level::Debug, ::core::format_args!($($argument)+))
    };
}

/// Logs for the store's developer, at every operation. Takes what `format!` takes.
#[macro_export]
macro_rules! store_trace {
    ($($argument:tt)+) => {
        $crate::store::log($crate::store::Level::Trace, ::core::format_args!($($argument)+))
    };
}

/// Exports a [`crate::Device`] as the plugin of this crate. Built for `wasm32-unknown-unknown`, these are the exports of the component; otherwise it is the native table,
/// as `PLUGIN` of the module in which the macro stands, and in a library made by `tenon plugin build --native` also as the symbol `tenon_plugin_v0`.
#[macro_export]
macro_rules! export_device {
    ($device:ty) => {
        #[cfg(target_arch = "wasm32")]
        #[allow(unsafe_code, reason = "exported symbols")]
        const _: () = {
            struct Plugin;
            impl $crate::device::component::Exported for Plugin {
                type Device = $device;
                fn slot() -> &'static ::std::thread::LocalKey<
                    ::std::cell::RefCell<$crate::device::component::Slot<$device>>,
                > {
                    ::std::thread_local! {
                        static SLOT: ::std::cell::RefCell<$crate::device::component::Slot<$device>> =
                            const { $crate::device::component::Slot::new() };
                    }
                    &SLOT
                }
            }
            $crate::device::component::bindings::export!(
                Plugin with_types_in $crate::device::component::bindings
            );
        };
        $crate::__export_native!(
            $crate::device::native::plugin,
            $crate::abi::DeviceTable = $crate::device::native::table::<$device>()
        );
    };
}

/// Exports a [`crate::VirtioDevice`] as the plugin of this crate. Built for `wasm32-unknown-unknown`, these are the exports of the component; otherwise it is the native table,
/// as `PLUGIN` of the module in which the macro stands, and in a library made by `tenon plugin build --native` also as the symbol `tenon_plugin_v0`.
#[macro_export]
macro_rules! export_virtio_device {
    ($device:ty) => {
        #[cfg(target_arch = "wasm32")]
        #[allow(unsafe_code, reason = "exported symbols")]
        const _: () = {
            struct Plugin;
            impl $crate::virtio::component::Exported for Plugin {
                type Device = $device;
                fn slot() -> &'static ::std::thread::LocalKey<
                    ::std::cell::RefCell<$crate::virtio::component::Slot<$device>>,
                > {
                    ::std::thread_local! {
                        static SLOT: ::std::cell::RefCell<$crate::virtio::component::Slot<$device>> =
                            const { $crate::virtio::component::Slot::new() };
                    }
                    &SLOT
                }
            }
            $crate::virtio::component::bindings::export!(
                Plugin with_types_in $crate::virtio::component::bindings
            );
        };
        $crate::__export_native!(
            $crate::virtio::native::plugin,
            $crate::abi::VirtioTable = $crate::virtio::native::table::<$device>()
        );
    };
}

/// Exports a [`crate::Store`] as the plugin of this crate. Built for `wasm32-unknown-unknown`, these are the exports of the component; otherwise it is the native table,
/// as `PLUGIN` of the module in which the macro stands, and in a library made by `tenon plugin build --native` also as the symbol `tenon_plugin_v0`.
#[macro_export]
macro_rules! export_store {
    ($store:ty) => {
        #[cfg(target_arch = "wasm32")]
        #[allow(unsafe_code, reason = "exported symbols")]
        const _: () = {
            struct Plugin;
            impl $crate::store::component::Exported for Plugin {
                type Store = $store;
                fn slot() -> &'static ::std::thread::LocalKey<
                    ::std::cell::RefCell<$crate::store::component::Slot<$store>>,
                > {
                    ::std::thread_local! {
                        static SLOT: ::std::cell::RefCell<$crate::store::component::Slot<$store>> =
                            const { $crate::store::component::Slot::new() };
                    }
                    &SLOT
                }
            }
            $crate::store::component::bindings::export!(
                Plugin with_types_in $crate::store::component::bindings
            );
        };
        $crate::__export_native!(
            $crate::store::native::plugin,
            $crate::abi::StoreTable = $crate::store::native::table::<$store>()
        );
    };
}

/// Exports a [`crate::store::NativeStore`] as the plugin of this crate: as `PLUGIN` of the module in which the macro stands, and in a library made by
/// `tenon plugin build --native` also as the symbol `tenon_plugin_v0`. There is no component of it.
#[macro_export]
macro_rules! export_native_store {
    ($store:ty) => {
        $crate::__export_native!(
            $crate::store::native::plugin,
            $crate::abi::StoreTable = $crate::store::native::direct_table::<$store>()
        );
    };
}

/// Exports a [`crate::Personality`] as the plugin of this crate. Built for `wasm32-unknown-unknown`, these are the exports of the component; otherwise it is the native table,
/// as `PLUGIN` of the module in which the macro stands, and in a library made by `tenon plugin build --native` also as the symbol `tenon_plugin_v0`.
#[macro_export]
macro_rules! export_personality {
    ($personality:ty) => {
        #[cfg(target_arch = "wasm32")]
        #[allow(unsafe_code, reason = "exported symbols")]
        const _: () = {
            struct Plugin;
            impl $crate::personality::component::Exported for Plugin {
                type Personality = $personality;
            }
            $crate::personality::component::bindings::export!(
                Plugin with_types_in $crate::personality::component::bindings
            );
        };
        $crate::__export_native!(
            $crate::personality::native::plugin,
            $crate::abi::PersonalityTable = $crate::personality::native::table::<$personality>()
        );
    };
}

/// The native half of the export macros.
#[doc(hidden)]
#[macro_export]
macro_rules! __export_native {
    ($plugin:expr, $table:ty = $make:expr) => {
        /// The plugin, as a program that it is linked into takes it.
        #[cfg(not(target_arch = "wasm32"))]
        #[allow(unreachable_pub, dead_code, reason = "public where the module is")]
        pub static PLUGIN: $crate::abi::Plugin = {
            static TABLE: $table = $make;
            $plugin(&TABLE)
        };
        $crate::__export_symbol!();
    };
}

/// Exports the plugin as a symbol of the library. A program that links several plugins could not have it several times.
#[cfg(all(feature = "export-symbol", not(target_arch = "wasm32")))]
#[doc(hidden)]
#[macro_export]
macro_rules! __export_symbol {
    () => {
        #[allow(unsafe_code, reason = "an exported symbol")]
        const _: () = {
            #[unsafe(no_mangle)]
            static tenon_plugin_v0: $crate::abi::Plugin = PLUGIN;
        };
    };
}

/// Nothing: this build is linked into some program.
#[cfg(not(all(feature = "export-symbol", not(target_arch = "wasm32"))))]
#[doc(hidden)]
#[macro_export]
macro_rules! __export_symbol {
    () => {};
}
