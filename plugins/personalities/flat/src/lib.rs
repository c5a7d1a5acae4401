//! Personality: flat and ELF images.
