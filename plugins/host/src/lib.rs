//! The plugin host: load, permit, limit, watch and restart plugins.
