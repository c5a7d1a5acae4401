//! Device plugin: serial.
