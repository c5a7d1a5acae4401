//! What tests of PC firmware start: Debian's OVMF, from its package, and a small disk with Debian's GRUB, whose menu starts the Debian guest's kernel. Nothing is
//! installed but what makes the disk.

use std::fs::{self, File};
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::boot_disk::{partitioned, unpack};
use super::debian::{Debian, digest_of};
use crate::{host, tree};

/// Raised when the way in which the files are made changes.
const RECIPE: u32 = 1;
const OVMF: &str = "ovmf";
/// Where the package has its files.
const PLACE: &str = "usr/share/OVMF";
/// Code, and the first content of its variables.
const IMAGES: [&str; 2] = ["OVMF_CODE_4M.fd", "OVMF_VARS_4M.fd"];
const DISK: &str = "boot.img";
const KERNEL: &str = "::/vmlinuz";
const INITRAMFS: &str = "::/initramfs.gz";
/// The countdown is longer than the tests that stop it.
const GRUB_CONFIG: &str = "\
set timeout=300
search --no-floppy --file --set=root /vmlinuz
menuentry 'Power off' {
    linux /vmlinuz console=ttyS0 panic=-1 cryptomgr.notests mitigations=off tsc=reliable tenon.do=poweroff
    initrd /initramfs.gz
}
menuentry 'Reset' {
    linux /vmlinuz console=ttyS0 panic=-1 cryptomgr.notests mitigations=off tsc=reliable tenon.do=reboot
    initrd /initramfs.gz
}
";
const STAMP: &str = "firmware.stamp";

/// Makes the files, or takes them from the cache, and returns them.
///
/// # Errors
/// A package cannot be fetched, or a program that makes the disk fails.
pub(crate) fn make(debian: &Debian, refresh: bool) -> Result<Vec<PathBuf>> {
    let folder = tree::cache()?.join("guests/firmware");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let lock = File::create(folder.join(".lock"))?;
    lock.lock().context("cannot lock the firmware's cache")?;
    let files: Vec<PathBuf> = IMAGES.iter().chain([&DISK]).map(|name| folder.join(name)).collect();
    let stamp = folder.join(STAMP);
    let (kernel, initramfs) = (digest_of(&debian.vmlinuz)?, digest_of(&debian.initramfs)?);
    let wanted = format!("{RECIPE} {kernel} {initramfs} {GRUB_CONFIG}");
    let is_whole = fs::read_to_string(&stamp).ok().as_ref() == Some(&wanted);
    if refresh || !is_whole || !files.iter().all(|file| file.exists()) {
        host::prepare_boot_disk()?;
        host::package_lists()?;
        eprintln!("guests: fetching {OVMF}, and making a small disk with a boot loader");
        let scratch = tempfile::tempdir_in(&folder).context("cannot make a folder in the cache")?;
        let ovmf = unpack(scratch.path(), OVMF)?.join(PLACE);
        let content = [(&*debian.vmlinuz, KERNEL), (&*debian.initramfs, INITRAMFS)];
        partitioned(scratch.path(), GRUB_CONFIG, &content, None)?;
        let made = [ovmf.join(IMAGES[0]), ovmf.join(IMAGES[1]), scratch.path().join(DISK)];
        for (from, to) in made.iter().zip(&files) {
            fs::rename(from, to).with_context(|| format!("cannot make {}", to.display()))?;
        }
        // Written last: what is without it is not whole.
        fs::write(stamp, wanted)?;
    }
    Ok(files)
}
