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

/// Exports a [`crate::Device`] as the plugin of this crate: a component's exports, or the native table.
#[macro_export]
macro_rules! export_device {
    ($device:ty) => {};
}

/// Exports a [`crate::Personality`] as the plugin of this crate: a component's exports, or the native table.
#[macro_export]
macro_rules! export_personality {
    ($personality:ty) => {};
}
