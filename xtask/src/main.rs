//! Every chore of the repository: `cargo xtask …`.
fn main() {}
