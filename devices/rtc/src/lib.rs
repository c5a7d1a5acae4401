//! Device plugin: rtc.
