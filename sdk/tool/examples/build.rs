//! Builds the plugins of the folders given, and says where they are: `cargo run -p tenon-plugin-tool --example build -- [--native] FOLDER…`.

use std::path::Path;

use tenon_plugin_tool::{BuildOptions, Error, build};

fn main() -> Result<(), Error> {
    let (flags, folders): (Vec<String>, Vec<String>) =
        std::env::args().skip(1).partition(|arg| arg.starts_with("--"));
    let native = flags.iter().any(|flag| flag == "--native");
    for folder in folders {
        let built =
            build(Path::new(&folder), &BuildOptions { native, archive: true, ..BuildOptions::default() })?;
        println!(
            "{} {} uses [{}]: {}",
            built.id,
            built.version,
            built.permissions.join(", "),
            built.directory.display()
        );
    }
    Ok(())
}
