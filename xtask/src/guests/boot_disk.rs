//! The Debian disk as a PC has it: a partition table, an EFI system partition with Debian's own GRUB, and the root file system. PC firmware boots it by
//! itself.
//!
//! GRUB is the image that Debian signs and installs, from its package, unchanged; its configuration names the root file system by its label. No root rights are
//! needed: the partition's file system is written by mtools.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::disk::{self, Disk};
use crate::process::{capture, command, run};
use crate::{host, tree};

/// Raised when the way in which the file is made changes.
const RECIPE: u32 = 1;
const GRUB: &str = "grub-efi-amd64-signed";
/// Where the package has the image for installed systems.
const GRUB_IMAGE: &str = "usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed";
/// Firmware without variables of its own looks for this file on every disk.
const DEFAULT_LOADER: &str = "::/EFI/BOOT/BOOTX64.EFI";
/// The signed image looks for its configuration here.
const CONFIG: &str = "::/EFI/debian/grub.cfg";
const GRUB_CONFIG: &str = "\
set timeout=0
search --no-floppy --label --set=root tenon-root
menuentry 'Debian' {
    linux /vmlinuz root=LABEL=tenon-root ro console=ttyS0
    initrd /initrd.img
}
";
const MIB: u64 = 1 << 20;
/// The system partition's first byte and length; the root's partition follows, and a copy of the table is last.
const ESP: (u64, u64) = (MIB, 64 * MIB);
const STAMP: &str = "boot.stamp";

/// Makes the disk, or takes it from the cache.
///
/// # Errors
/// A package cannot be fetched, or a program that makes the disk fails.
pub(crate) fn make(refresh: bool) -> Result<PathBuf> {
    let root = disk::make(refresh)?;
    let folder = tree::cache()?.join("guests/disk");
    let lock = File::create(folder.join(".boot-lock"))?;
    lock.lock().context("cannot lock the boot disk's cache")?;
    let (image, stamp) = (folder.join("boot.img"), folder.join(STAMP));
    let made = fs::metadata(&root.image)?.modified()?;
    let age = made.duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_nanos();
    let wanted = format!("{RECIPE} {GRUB} {age}\n");
    if refresh || fs::read_to_string(&stamp).ok().as_ref() != Some(&wanted) || !image.exists() {
        host::prepare_boot_disk()?;
        host::package_lists()?;
        build(&folder, &root, &image)?;
        // Written last: what is without it is not whole.
        fs::write(&stamp, wanted)?;
    }
    Ok(image)
}

fn build(folder: &Path, root: &Disk, image: &Path) -> Result<()> {
    eprintln!("guests: making a Debian disk that boots by itself");
    let scratch = tempfile::tempdir_in(folder).context("cannot make a folder in the cache")?;
    partitioned(scratch.path(), GRUB_CONFIG, &[], Some(&root.image))?;
    fs::rename(scratch.path().join("boot.img"), image).context("cannot move the boot disk into the cache")
}

/// Fetches a Debian package and unpacks it into a new folder of its name.
pub(super) fn unpack(scratch: &Path, package: &str) -> Result<PathBuf> {
    run(command("apt-get").args(["-qq", "download", package]).current_dir(scratch))?;
    let mut files = fs::read_dir(scratch)?.flatten().map(|entry| entry.path());
    let file = files.find(|path| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&format!("{package}_")))
    });
    let file = file.with_context(|| format!("apt-get fetched no package {package}"))?;
    run(command("dpkg-deb").arg("-x").arg(file).arg(scratch.join(package)))?;
    Ok(scratch.join(package))
}

/// Makes `boot.img` in a folder: GRUB with this configuration and these files in the system partition, and perhaps a root file system behind it.
pub(super) fn partitioned(
    scratch: &Path,
    config: &str,
    files: &[(&Path, &str)],
    root: Option<&Path>,
) -> Result<()> {
    let at = |name: &str| scratch.join(name);
    let grub = unpack(scratch, GRUB)?.join(GRUB_IMAGE);
    fs::write(at("grub.cfg"), config)?;
    system_partition(&at("esp.img"), &grub, &at("grub.cfg"), files)?;
    let size = root.map_or(Ok(0), |root| fs::metadata(root).map(|file| file.len()))?;
    let whole = at("boot.img");
    let file = File::options().read(true).write(true).create_new(true).open(&whole)?;
    file.set_len(ESP.0 + ESP.1 + size + MIB)?;
    let sectors = |bytes: u64| bytes / 512;
    let mut layout = format!("label: gpt\nstart={}, size={}, type=U\n", sectors(ESP.0), sectors(ESP.1));
    if root.is_some() {
        layout += &format!("start={}, size={}, type=L\n", sectors(ESP.0 + ESP.1), sectors(size));
    }
    fs::write(at("layout"), layout)?;
    run(command("sfdisk").args(["-q", "--no-reread"]).arg(&whole).stdin(File::open(at("layout"))?))?;
    copy(&File::open(at("esp.img"))?, &file, ESP.0)?;
    if let Some(root) = root {
        copy(&File::open(root)?, &file, ESP.0 + ESP.1)?;
    }
    Ok(())
}

/// A FAT file system with GRUB as what firmware starts by default.
fn system_partition(image: &Path, grub: &Path, config: &Path, files: &[(&Path, &str)]) -> Result<()> {
    File::create(image)?.set_len(ESP.1)?;
    let on = |program: &str| {
        let mut command = command(program);
        command.arg("-i").arg(image);
        command
    };
    run(on("mformat").args(["-F", "-v", "ESP", "::"]))?;
    run(on("mmd").args(["::/EFI", "::/EFI/BOOT", "::/EFI/debian"]))?;
    run(on("mcopy").arg(grub).arg(DEFAULT_LOADER))?;
    run(on("mcopy").arg(config).arg(CONFIG))?;
    for (file, place) in files {
        run(on("mcopy").arg(file).arg(place))?;
    }
    let there = capture(on("mdir").args(["-b", "-/", "::"]))?;
    if !there.contains("BOOTX64.EFI") || !there.contains("grub.cfg") {
        bail!("the EFI system partition lacks its files:\n{there}");
    }
    Ok(())
}

/// Copies a file into another, leaving out what is zero.
fn copy(from: &File, to: &File, offset: u64) -> Result<()> {
    let mut buffer = vec![0; 1 << 20];
    let mut position = 0;
    loop {
        let count = from.read_at(&mut buffer, position)?;
        if count == 0 {
            return Ok(());
        }
        if buffer[..count].iter().any(|byte| *byte != 0) {
            to.write_all_at(&buffer[..count], offset + position)?;
        }
        position += count as u64;
    }
}
