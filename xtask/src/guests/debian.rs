//! The Debian guest: fetched as packages, nothing installed, no root needed.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::cpio::Archive;
use super::kernel;
use super::modules::{self, Module};
use crate::process::{capture, command, run};
use crate::{host, tree};

/// The package that always depends on the newest kernel.
const KERNEL: &str = "linux-image-cloud-amd64";
const BUSYBOX: &str = "busybox-static";
/// Raised when the way in which the files are made changes.
const RECIPE: u32 = 2;
const MANIFEST: &str = "manifest.toml";
/// What the guest has besides busybox: programs in Rust, of one file each.
const PROGRAMS: [&str; 2] = ["port", "vsock"];
const FILES: [&str; 4] = ["vmlinuz", "vmlinux", "initramfs.cpio.gz", "initramfs-virtio.cpio.gz"];

/// The files of the Debian guest.
pub(crate) struct Debian {
    /// The kernel as the package has it, a bzImage.
    pub(crate) vmlinuz: PathBuf,
    /// The same, unpacked: an ELF file.
    pub(crate) vmlinux: PathBuf,
    /// Busybox, the init script and the [`PROGRAMS`].
    pub(crate) initramfs: PathBuf,
    /// The same with the modules of virtio devices, which the init script loads.
    pub(crate) initramfs_virtio: PathBuf,
    /// The kernel's release, such as `6.1.0-56-cloud-amd64`.
    pub(crate) release: String,
}

/// What the cache holds.
#[derive(Serialize, Deserialize)]
struct Manifest {
    /// The digest of everything in this repository that the files are made from.
    inputs: String,
    release: String,
    /// The packages as apt named their files.
    packages: Vec<String>,
    /// BLAKE3 of each of [`FILES`].
    digests: Vec<String>,
}

/// Makes the guest, or takes it from the cache if that is good.
///
/// # Errors
/// Packages cannot be fetched or are not as expected.
pub(crate) fn make(refresh: bool) -> Result<Debian> {
    let folder = tree::cache()?.join("guests");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    // Two chores at once make the guest once.
    let lock = File::create(folder.join(".lock"))?;
    lock.lock().context("cannot lock the guests' cache")?;
    let sources = Sources::read()?;
    let release = match usable(&folder, &sources.digest()) {
        Ok(release) if !refresh => release,
        Ok(_) => fetch(&folder, &sources)?,
        Err(why) => {
            eprintln!("guests: making the Debian guest: {why:#}");
            fetch(&folder, &sources)?
        }
    };
    Ok(Debian {
        vmlinuz: folder.join(FILES[0]),
        vmlinux: folder.join(FILES[1]),
        initramfs: folder.join(FILES[2]),
        initramfs_virtio: folder.join(FILES[3]),
        release,
    })
}

/// What this repository adds to the Debian guest.
struct Sources {
    /// The init script.
    init: Vec<u8>,
    /// The source of each of [`PROGRAMS`].
    programs: Vec<Vec<u8>>,
}

impl Sources {
    /// Where a program's source is.
    fn source(program: &str) -> PathBuf {
        tree::root().join(format!("tests/guests/linux/{program}.rs"))
    }

    fn read() -> Result<Self> {
        let read = |path: PathBuf| fs::read(&path).with_context(|| format!("cannot read {}", path.display()));
        let programs = PROGRAMS.iter().map(|program| read(Self::source(program))).collect::<Result<_>>()?;
        Ok(Self { init: read(tree::root().join("tests/guests/linux/init"))?, programs })
    }

    fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&RECIPE.to_le_bytes()).update(&self.init);
        for source in &self.programs {
            hasher.update(source);
        }
        hasher.finalize().to_string()
    }

    /// Compiles one of [`PROGRAMS`] into a static program.
    fn compile(name: &str, scratch: &Path) -> Result<Vec<u8>> {
        let program = scratch.join(name);
        let options = ["opt-level=s", "panic=abort", "strip=symbols"].map(|option| format!("-C{option}"));
        run(command("rustc")
            .args(["--edition", "2024", "--target", "x86_64-unknown-linux-musl", "-o"])
            .arg(&program)
            .args(options)
            .arg(Self::source(name)))?;
        Ok(fs::read(&program)?)
    }
}

/// The kernel's release, if the cache holds what its manifest says and was made from these inputs.
fn usable(folder: &Path, inputs: &str) -> Result<String> {
    let text = fs::read_to_string(folder.join(MANIFEST)).context("none in the cache")?;
    let manifest: Manifest = toml::from_str(&text).context("its manifest is damaged")?;
    if manifest.inputs != inputs {
        bail!("what it is made from has changed");
    }
    if manifest.digests.len() != FILES.len() {
        bail!("its manifest is damaged");
    }
    for (file, digest) in FILES.iter().zip(&manifest.digests) {
        if digest_of(&folder.join(file))? != *digest {
            bail!("{file} in the cache is damaged");
        }
    }
    Ok(manifest.release)
}

pub(super) fn digest_of(file: &Path) -> Result<String> {
    let bytes = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    Ok(blake3::hash(&bytes).to_string())
}

fn fetch(folder: &Path, sources: &Sources) -> Result<String> {
    host::package_lists()?;
    let depends = capture(command("apt-cache").args(["depends", KERNEL]))?;
    let image = depends
        .lines()
        .find_map(|line| line.trim().strip_prefix("Depends: "))
        .filter(|name| name.starts_with("linux-image-"))
        .with_context(|| format!("{KERNEL} depends on no kernel; apt-cache says:\n{depends}"))?;
    let scratch = tempfile::tempdir_in(folder).context("cannot make a folder in the cache")?;
    eprintln!("guests: fetching {KERNEL}, {image} and {BUSYBOX}");
    run(command("apt-get").current_dir(scratch.path()).args(["-qq", "download", KERNEL, image, BUSYBOX]))?;
    let mut packages = Vec::new();
    let tree = scratch.path().join("tree");
    for entry in fs::read_dir(scratch.path())? {
        let file = entry?.path();
        if file.extension().is_some_and(|extension| extension == "deb") {
            run(command("dpkg-deb").arg("-x").arg(&file).arg(&tree))?;
            packages.extend(file.file_name().map(|name| name.to_string_lossy().into_owned()));
        }
    }
    packages.sort();
    let release = image.trim_start_matches("linux-image-").to_owned();
    let vmlinuz =
        fs::read(tree.join(format!("boot/vmlinuz-{release}"))).context("the package has no kernel")?;
    eprintln!("guests: unpacking Linux {release}");
    let vmlinux = kernel::unpack(&vmlinuz).context("cannot unpack Debian's kernel")?;
    let busybox = ["usr/bin/busybox", "bin/busybox"].map(|path| tree.join(path));
    let busybox = busybox.iter().find(|path| path.is_file()).context("the package has no busybox")?;
    let programs = PROGRAMS.map(|name| Sources::compile(name, scratch.path()).map(|program| (name, program)));
    let programs = programs.into_iter().collect::<Result<Vec<_>>>()?;
    let modules =
        modules::with_dependencies(&tree.join(format!("lib/modules/{release}/kernel")), &modules::VIRTIO)?;
    let plain = initramfs(&sources.init, &programs, busybox, &[])?;
    let virtio = initramfs(&sources.init, &programs, busybox, &modules)?;
    let mut digests = Vec::new();
    for (file, bytes) in FILES.iter().zip([vmlinuz, vmlinux, plain, virtio]) {
        // Written beside and renamed, so that no reader sees half a file.
        let part = scratch.path().join(file);
        fs::write(&part, &bytes)?;
        fs::rename(&part, folder.join(file))?;
        digests.push(blake3::hash(&bytes).to_string());
    }
    let manifest = Manifest { inputs: sources.digest(), release: release.clone(), packages, digests };
    fs::write(folder.join(MANIFEST), toml::to_string(&manifest)?)?;
    Ok(release)
}

fn initramfs(
    init: &[u8],
    programs: &[(&str, Vec<u8>)],
    busybox: &Path,
    modules: &[Module],
) -> Result<Vec<u8>> {
    let applets = capture(command(busybox).arg("--list"))?;
    let mut archive = Archive::default();
    for folder in ["bin", "dev", "proc", "sys", "tmp"] {
        archive.folder(folder);
    }
    archive.device("dev/console", 5, 1);
    archive.program("bin/busybox", &fs::read(busybox)?);
    for applet in applets.lines().filter(|name| *name != "busybox") {
        archive.link(&format!("bin/{applet}"), "busybox");
    }
    for (name, program) in programs {
        archive.program(&format!("bin/{name}"), program);
    }
    archive.program("init", init);
    if !modules.is_empty() {
        archive.folder("modules");
        let mut order = String::new();
        for (name, bytes) in modules {
            archive.program(&format!("modules/{name}.ko"), bytes);
            order.push_str(name);
            order.push('\n');
        }
        archive.program("modules/order", order.as_bytes());
    }
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    gzip.write_all(&archive.finish())?;
    Ok(gzip.finish()?)
}
