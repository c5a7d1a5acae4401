//! Makes the folder of a new plugin.

use std::fs;
use std::path::{Path, PathBuf};

use crate::Error;

/// What a plugin is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A device with registers.
    Device,
    /// A device that is fed by queues of requests. Its manifest says `device`, too.
    Virtio,
    /// A backing store.
    Store,
    /// A personality: how a guest is loaded.
    Personality,
}

/// The files of a new plugin: where they go, and their text with `{{name}}`, `{{crate}}`, `{{type}}` and `{{sdk}}` to be filled in.
fn files(kind: Kind) -> [(&'static str, &'static str); 6] {
    macro_rules! of {
        ($kind:literal, $test:literal) => {
            [
                ("Cargo.toml", include_str!("../templates/Cargo.toml.in")),
                (".gitignore", "/target\n"),
                ("README.md", include_str!(concat!("../templates/", $kind, "/README.md"))),
                ("plugin.toml", include_str!(concat!("../templates/", $kind, "/plugin.toml"))),
                ("src/lib.rs", include_str!(concat!("../templates/", $kind, "/lib.rs"))),
                ($test, include_str!(concat!("../templates/", $kind, "/test.rs"))),
            ]
        };
    }
    match kind {
        Kind::Device => of!("device", "tests/device.rs"),
        Kind::Virtio => of!("virtio", "tests/device.rs"),
        Kind::Store => of!("store", "tests/store.rs"),
        Kind::Personality => of!("personality", "tests/personality.rs"),
    }
}

/// Names that are no package's: Rust's words, and those that cargo or the plugin's own code needs.
const TAKEN: &str = " abstract alloc as async await become box break build const continue core crate deps do dyn else enum examples extern \
                     false final fn for gen if impl in incremental let loop macro match mod move mut override priv proc-macro pub ref \
                     return self static std struct super tenon-abi tenon-sdk tenon-testkit test trait true try type typeof unsafe \
                     unsized use virtual where while yield ";

/// Makes a new plugin in `folder`, which must not exist or be empty. The plugin builds, passes its tests and runs unchanged.
/// `sdk` is the folder with the SDK's `rust` and `testkit`; without one it is looked for ([`find_sdk`]).
///
/// # Errors
/// The name is none for a plugin, the folder is taken, or there is no SDK.
pub fn new(name: &str, kind: Kind, folder: &Path, sdk: Option<&Path>) -> Result<(), Error> {
    let in_range = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let begins = name.starts_with(|c: char| c.is_ascii_lowercase());
    if !begins || !name.chars().all(in_range) || name.len() > 64 {
        return Err(Error::Name(format!(
            "`{name}` is no name for a plugin: take lower-case letters, digits and dashes, a letter first, 64 at most"
        )));
    }
    if TAKEN.contains(&format!(" {name} ")) {
        return Err(Error::Name(format!(
            "`{name}` is no name for a plugin: it means something else to Rust or cargo"
        )));
    }
    if folder.read_dir().is_ok_and(|mut entries| entries.next().is_some()) || folder.is_file() {
        return Err(Error::New(format!("{} exists already, and is not an empty folder", folder.display())));
    }
    let sdk = find_sdk(sdk)?;
    let sdk = sdk.to_str().filter(|path| !path.contains(['"', '\\', '\n'])).ok_or_else(|| {
        Error::New(format!(
            "the SDK's path {} cannot be written into Cargo.toml; put the SDK elsewhere",
            sdk.display()
        ))
    })?;
    let type_name: String = name
        .split('-')
        .filter_map(|word| word.split_at_checked(1))
        .flat_map(|(first, rest)| [first.to_ascii_uppercase(), rest.to_owned()])
        .collect();
    for (path, text) in files(kind) {
        let path = folder.join(path);
        let text = text
            .replace("{{name}}", name)
            .replace("{{crate}}", &name.replace('-', "_"))
            .replace("{{type}}", &type_name)
            .replace("{{sdk}}", sdk);
        let parent = path.parent().unwrap_or(folder);
        fs::create_dir_all(parent).map_err(Error::io(parent))?;
        fs::write(&path, text).map_err(Error::io(&path))?;
    }
    Ok(())
}

/// Finds the SDK: `given`, or the environment's `TENON_SDK`, or the `sdk` folder of the source tree that the running program lies in or
/// was built from.
///
/// # Errors
/// There is none.
pub fn find_sdk(given: Option<&Path>) -> Result<PathBuf, Error> {
    let is_sdk =
        |path: &Path| path.join("rust/Cargo.toml").is_file() && path.join("testkit/Cargo.toml").is_file();
    let asked = given.map(Path::to_owned).or_else(|| std::env::var_os("TENON_SDK").map(PathBuf::from));
    let found = if let Some(path) = asked {
        if !is_sdk(&path) {
            return Err(Error::New(format!(
                "{} is not the SDK: it has no rust/Cargo.toml and testkit/Cargo.toml",
                path.display()
            )));
        }
        path
    } else {
        let program = std::env::current_exe().unwrap_or_default();
        let built_from = Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_owned);
        program.ancestors().map(|folder| folder.join("sdk")).chain(built_from).find(|path| is_sdk(path)).ok_or_else(|| {
            Error::New("the SDK is not found: give `--sdk`, or set TENON_SDK, to the folder `sdk` of Tenon's sources".into())
        })?
    };
    found.canonicalize().map_err(Error::io(&found))
}
