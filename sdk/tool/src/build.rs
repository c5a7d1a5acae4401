//! Builds a plugin's folder: cargo, component, permissions, and the files that the host loads.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::Deserialize;

use crate::Error;
use crate::component::{componentize, inspect};

const WASM: &str = "wasm32-unknown-unknown";

/// How a plugin is built.
#[derive(Clone, Debug, Default)]
pub struct BuildOptions {
    /// Where the plugin's directory and archive are put. Without one: `plugins` in cargo's target folder.
    pub output: Option<PathBuf>,
    /// Cargo's target folder. Without one, cargo decides (`CARGO_TARGET_DIR`, or `target` beside the plugin's workspace).
    pub target_dir: Option<PathBuf>,
    /// Also builds the native library.
    pub native: bool,
    /// Also makes the `.tenon` archive.
    pub archive: bool,
    /// Shows cargo's warnings and errors only.
    pub quiet: bool,
}

/// What was built.
#[derive(Clone, Debug)]
pub struct Built {
    /// The plugin's id.
    pub id: String,
    /// The plugin's version.
    pub version: String,
    /// What it is for: `device`, `store` or `personality`.
    pub kind: String,
    /// The plugin's directory: `plugin.toml`, `plugin.wasm`, and `plugin.so` if asked for.
    pub directory: PathBuf,
    /// The component.
    pub component: PathBuf,
    /// The native library, if asked for.
    pub native: Option<PathBuf>,
    /// The archive, if asked for.
    pub archive: Option<PathBuf>,
    /// The interfaces that the component uses: its permissions.
    pub permissions: Vec<String>,
    /// Permissions that the manifest asks for and the component does not use.
    pub unused: Vec<String>,
}

/// What the build must know of a `plugin.toml`. The host checks the rest of it.
#[derive(Deserialize)]
struct Manifest {
    id: String,
    version: String,
    kind: String,
    #[serde(default)]
    permissions: Permissions,
}

#[derive(Default, Deserialize)]
struct Permissions {
    #[serde(default)]
    imports: Vec<String>,
}

/// Builds the plugin in `folder`, which has a `Cargo.toml` and a `plugin.toml`.
///
/// # Errors
/// The folder is no plugin's, cargo fails, or the component does not fit the manifest.
pub fn build(folder: &Path, options: &BuildOptions) -> Result<Built, Error> {
    let manifest_path = folder.join("plugin.toml");
    let (text, manifest) = read_manifest(&manifest_path)?;
    let wasm = compile(folder, Some(WASM), options)?;
    let component = componentize(&fs::read(&wasm).map_err(Error::io(&wasm))?)?;
    let found = inspect(&component)?;
    if let Some(foreign) = found.foreign.first() {
        return Err(Error::Component(format!(
            "the component imports `{foreign}`, which no host offers to a plugin; some dependency brings it in"
        )));
    }
    if !found.kinds().contains(&manifest.kind.as_str()) {
        return Err(Error::Manifest {
            path: manifest_path,
            what: format!(
                "kind is `{}`, but the component exports {}",
                manifest.kind,
                found.exports.join(", ")
            ),
        });
    }
    let missing = without(&found.permissions, &manifest.permissions.imports);
    if !missing.is_empty() {
        return Err(Error::Permissions {
            path: manifest_path,
            used: format!("\"{}\"", missing.join("\", \"")),
        });
    }
    let native = if options.native { Some(compile(folder, None, options)?) } else { None };

    // `TARGET/wasm32-unknown-unknown/release/NAME.wasm`.
    let target = wasm.ancestors().nth(3).unwrap_or(folder);
    let output = options.output.clone().unwrap_or_else(|| target.join("plugins"));
    let directory = output.join(&manifest.id);
    fs::create_dir_all(&directory).map_err(Error::io(&directory))?;
    let mut files = vec![("plugin.toml", text.into_bytes()), ("plugin.wasm", component)];
    if let Some(library) = &native {
        files.push(("plugin.so", fs::read(library).map_err(Error::io(library))?));
    }
    for (name, bytes) in &files {
        replace(&directory.join(name), bytes)?;
    }
    let archive = if options.archive {
        let path = output.join(format!("{}-{}.tenon", manifest.id, manifest.version));
        replace(&path, &pack(&files).map_err(Error::io(&path))?)?;
        Some(path)
    } else {
        None
    };
    Ok(Built {
        component: directory.join("plugin.wasm"),
        native: native.map(|_| directory.join("plugin.so")),
        unused: without(&manifest.permissions.imports, &found.permissions),
        permissions: found.permissions,
        id: manifest.id,
        version: manifest.version,
        kind: manifest.kind,
        directory,
        archive,
    })
}

/// Runs the plugin's own tests (`cargo test` in its folder), then builds it. Running what was built is the host's.
///
/// # Errors
/// A test fails, or the plugin does not build.
pub fn test(folder: &Path, options: &BuildOptions) -> Result<Built, Error> {
    // Before cargo, which would go up to a workspace that the folder happens to lie in.
    read_manifest(&folder.join("plugin.toml"))?;
    // What cargo says is progress: standard output is for what the caller finds.
    let status = cargo(folder, "test", options).stdout(std::io::stderr()).status().map_err(no_cargo)?;
    if !status.success() {
        return Err(Error::Cargo(format!("the tests of {} failed", folder.display())));
    }
    build(folder, options)
}

fn no_cargo(error: std::io::Error) -> Error {
    Error::Cargo(format!("running cargo: {error}; install Rust from https://rustup.rs"))
}

fn read_manifest(path: &Path) -> Result<(String, Manifest), Error> {
    let is_file = fs::metadata(path).is_ok_and(|about| about.is_file());
    if !is_file {
        return Err(Error::Manifest {
            path: path.to_owned(),
            what: "there is no such file, so the folder is no plugin; `tenon plugin new` makes one".into(),
        });
    }
    let text = fs::read_to_string(path).map_err(Error::io(path))?;
    let manifest: Manifest = toml::from_str(&text).map_err(|error| Error::Manifest {
        path: path.to_owned(),
        what: error.to_string().trim_end().to_owned(),
    })?;
    let wrong = |what: String| Err(Error::Manifest { path: path.to_owned(), what });
    // The id becomes the name of a folder.
    let in_range = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if !manifest.id.starts_with(|c: char| c.is_ascii_lowercase()) || !manifest.id.chars().all(in_range) {
        return wrong(format!(
            "id `{}`: an id is made of lower-case letters, digits and dashes, and begins with a letter",
            manifest.id
        ));
    }
    if !manifest.version.chars().all(|c| c.is_ascii_alphanumeric() || ".-+".contains(c)) {
        return wrong(format!("version `{}` is not a version such as `0.1.0`", manifest.version));
    }
    Ok((text, manifest))
}

fn without(all: &[String], known: &[String]) -> Vec<String> {
    all.iter().filter(|name| !known.contains(name)).cloned().collect()
}

fn cargo(folder: &Path, what: &str, options: &BuildOptions) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.arg(what).arg("--release").arg("--manifest-path").arg(folder.join("Cargo.toml"));
    if options.quiet {
        command.arg("--quiet");
    }
    if let Some(target) = &options.target_dir {
        command.arg("--target-dir").arg(target);
    }
    // What cargo sets for the program that it runs is about that program and not about the plugin.
    for name in ["CARGO_MANIFEST_DIR", "CARGO_MANIFEST_PATH", "CARGO_PKG_NAME", "CARGO_PRIMARY_PACKAGE"] {
        command.env_remove(name);
    }
    command
}

/// Whether rustc has the target's libraries, as far as it can be asked.
fn is_installed(target: &str) -> bool {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let asked = Command::new(rustc).args(["--print", "target-libdir", "--target", target]).output();
    asked.is_ok_and(|output| Path::new(String::from_utf8_lossy(&output.stdout).trim()).is_dir())
}

/// One of cargo's messages: those that name what was made.
#[derive(Deserialize)]
struct Message {
    reason: String,
    manifest_path: Option<PathBuf>,
    target: Option<Target>,
    #[serde(default)]
    filenames: Vec<PathBuf>,
}

#[derive(Deserialize)]
struct Target {
    crate_types: Vec<String>,
}

/// Compiles the plugin's library for `target`, or for this machine, and returns the file.
fn compile(folder: &Path, target: Option<&str>, options: &BuildOptions) -> Result<PathBuf, Error> {
    let mut command = cargo(folder, "build", options);
    command.args(["--lib", "--message-format=json-render-diagnostics"]);
    // Names are kept for backtraces; the rest of the debugging information would be most of the file.
    command.env("CARGO_PROFILE_RELEASE_STRIP", "debuginfo");
    match target {
        Some(target) => command.args(["--target", target]),
        // A library that is loaded by name exports its table as a symbol; one that is linked into a program does not. Naming the target gives it a
        // folder of its own, so that the two do not replace each other, time and again.
        None => command.args(["--target", "host-tuple", "--features", "tenon-sdk/export-symbol"]),
    };
    let output =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit()).output().map_err(
            |error| Error::Cargo(format!("running cargo: {error}; install Rust from https://rustup.rs")),
        )?;
    if !output.status.success() {
        let missing = target.filter(|target| !is_installed(target));
        let hint = missing.map(|target| format!(": the target is missing; `rustup target add {target}`"));
        return Err(Error::Cargo(format!(
            "building {} failed{}",
            folder.display(),
            hint.unwrap_or_default()
        )));
    }
    let own = folder.join("Cargo.toml").canonicalize().map_err(Error::io(folder.join("Cargo.toml")))?;
    let extension = if target.is_some() { "wasm" } else { "so" };
    output
        .stdout
        .split(|byte| *byte == b'\n')
        .filter_map(|line| serde_json::from_slice::<Message>(line).ok())
        .filter(|message| {
            message.reason == "compiler-artifact" && message.manifest_path.as_ref() == Some(&own)
        })
        .filter(|message| {
            message.target.as_ref().is_some_and(|t| t.crate_types.iter().any(|ty| ty == "cdylib"))
        })
        .flat_map(|message| message.filenames)
        .find(|file| file.extension().is_some_and(|found| found == extension))
        .ok_or_else(|| Error::Manifest {
            path: own.clone(),
            what: "the library is not a `cdylib`; add `[lib] crate-type = [\"cdylib\", \"rlib\"]`".into(),
        })
}

/// Writes a file whole or not at all, so that a host that watches it never sees a half.
fn replace(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(Error::io(path))?;
    file.write_all(bytes).map_err(Error::io(path))?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        file.as_file().set_permissions(fs::Permissions::from_mode(0o644)).map_err(Error::io(path))?;
    }
    file.persist(path).map_err(|error| Error::Io { path: path.to_owned(), source: error.error })?;
    Ok(())
}

/// Makes an archive: the same files give the same bytes.
fn pack(files: &[(&str, Vec<u8>)]) -> std::io::Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    for (name, bytes) in files {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(0);
        archive.append_data(&mut header, name, bytes.as_slice())?;
    }
    archive.into_inner()
}
