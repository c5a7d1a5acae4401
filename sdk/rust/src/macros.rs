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

/// Exports a [`crate::Device`] as the plugin of this crate. Built for `wasm32-unknown-unknown`, these are the exports of the component;
/// otherwise it is the native table, as the symbol `tenon_plugin_v0`.
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
        #[cfg(not(target_arch = "wasm32"))]
        #[allow(unsafe_code, reason = "an exported symbol")]
        const _: () = {
            static TABLE: $crate::abi::DeviceTable = $crate::device::native::table::<$device>();
            #[unsafe(no_mangle)]
            static tenon_plugin_v0: $crate::abi::Plugin = $crate::device::native::plugin(&TABLE);
        };
    };
}

/// Exports a [`crate::Personality`] as the plugin of this crate. Built for `wasm32-unknown-unknown`, these are the exports of the component;
/// otherwise it is the native table, as the symbol `tenon_plugin_v0`.
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
        #[cfg(not(target_arch = "wasm32"))]
        #[allow(unsafe_code, reason = "an exported symbol")]
        const _: () = {
            static TABLE: $crate::abi::PersonalityTable =
                $crate::personality::native::table::<$personality>();
            #[unsafe(no_mangle)]
            static tenon_plugin_v0: $crate::abi::Plugin = $crate::personality::native::plugin(&TABLE);
        };
    };
}
