//! Links again when the layout changes.
fn main() {
    println!("cargo::rerun-if-changed=link.ld");
}
