//! Device plugin: exit.
