//! The encoding in which compound values cross the native boundary: little-endian numbers; text and lists behind a `u32` count;
//! options behind a byte 0 or 1; enumerations as a byte in the order of the WIT.
//!
//! Decoders take bytes from the other side of a boundary: they check everything, allocate no more than the input is long,
//! and tell what is wrong.
