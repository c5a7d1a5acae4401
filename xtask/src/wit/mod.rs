//! The plugin contract: whether it changes compatibly ([`check`]), and its reference ([`docs`]).

pub(crate) mod check;
pub(crate) mod docs;

/// The packages of the contract: folders of wit/.
pub(crate) const PACKAGES: [&str; 3] = ["device", "personality", "store"];
