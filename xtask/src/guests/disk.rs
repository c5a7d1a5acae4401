//! A whole Debian system on a disk: systemd, sshd, fio, with its own kernel and initramfs. Made from Debian's packages by mmdebstrap, without root.
//!
//! The root file system is an ext4 image without a partition table, labelled `tenon-root`. Root logs in on every console without a password, and over ssh with the key
//! that lies beside the image. The network is configured by DHCP.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::process::{capture, command, run};
use crate::{host, tree};

/// Raised when the way in which the files are made changes.
const RECIPE: u32 = 1;
/// Where the packages come from, and how old they may be, is the host's apt's matter; the release is not.
const SUITE: &str = "bookworm";
const PACKAGES: [&str; 14] = [
    "systemd-sysv",
    "libpam-systemd",
    "udev",
    "linux-image-cloud-amd64",
    "initramfs-tools",
    "zstd",
    "openssh-server",
    "fio",
    "e2fsprogs",
    "iproute2",
    "iputils-ping",
    "ethtool",
    "procps",
    "kmod",
];
/// Files of packages that no test reads.
const LEFT_OUT: [&str; 3] = ["/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*"];
/// The size of the file system; the file is sparse.
const SIZE: &str = "2G";
const NETWORK: &str = "[Match]\nName=en* eth*\n[Network]\nDHCP=yes\n";
const STAMP: &str = "disk.stamp";

/// The files of the Debian disk.
pub(crate) struct Disk {
    /// The root file system, raw.
    pub(crate) image: PathBuf,
    /// Its kernel.
    pub(crate) kernel: PathBuf,
    /// Its initramfs.
    pub(crate) initramfs: PathBuf,
    /// The private key with which root logs in over ssh.
    pub(crate) key: PathBuf,
}

/// Makes the disk, or takes it from the cache.
///
/// # Errors
/// A package cannot be fetched, or a program that makes the disk fails.
pub(crate) fn make(refresh: bool) -> Result<Disk> {
    let folder = tree::cache()?.join("guests/disk");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let lock = File::create(folder.join(".lock"))?;
    lock.lock().context("cannot lock the disk's cache")?;
    let disk = Disk {
        image: folder.join("root.img"),
        kernel: folder.join("vmlinuz"),
        initramfs: folder.join("initrd.img"),
        key: folder.join("key"),
    };
    let stamp = folder.join(STAMP);
    let wanted = format!("{RECIPE} {SUITE} {}\n", PACKAGES.join(" "));
    if refresh || fs::read_to_string(&stamp).ok().as_ref() != Some(&wanted) {
        host::prepare_disk()?;
        host::package_lists()?;
        build(&folder, &disk)?;
        // Written last: what is without it is not whole.
        fs::write(&stamp, wanted)?;
    }
    Ok(disk)
}

fn build(folder: &Path, disk: &Disk) -> Result<()> {
    let scratch = tempfile::tempdir_in(folder).context("cannot make a folder in the cache")?;
    let at = |name: &str| scratch.path().join(name);
    run(command("ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", "", "-C", "tenon-guest", "-f"])
        .arg(at("key")))?;
    fs::write(at("20-wired.network"), NETWORK)?;
    fs::write(at("fstab"), "LABEL=tenon-root / ext4 errors=remount-ro 0 1\n")?;
    fs::write(at("hostname"), "tenon-debian\n")?;
    eprintln!("guests: making a Debian disk (some minutes)");
    let tar = at("root.tar");
    let mut debootstrap = command("mmdebstrap");
    debootstrap.args(["--quiet", "--variant=minbase", &format!("--include={}", PACKAGES.join(","))]);
    debootstrap.arg("--aptopt=Acquire::Languages \"none\"");
    for path in LEFT_OUT {
        debootstrap.arg(format!("--dpkgopt=path-exclude={path}"));
    }
    let copies = [
        ("key.pub", "/root/.ssh/authorized_keys"),
        ("20-wired.network", "/etc/systemd/network/20-wired.network"),
        ("fstab", "/etc/fstab"),
        ("hostname", "/etc/hostname"),
    ];
    debootstrap.arg("--customize-hook=mkdir -m 700 -p \"$1/root/.ssh\"");
    for (file, place) in copies {
        debootstrap.arg(format!("--customize-hook=upload {} {place}", at(file).display()));
    }
    debootstrap
        .arg("--customize-hook=chroot \"$1\" passwd -q -d root")
        .arg("--customize-hook=chroot \"$1\" systemctl -q enable systemd-networkd")
        .args([SUITE, &tar.to_string_lossy()]);
    run(&mut debootstrap)?;

    let names = capture(command("tar").arg("-tf").arg(&tar))?;
    let find = |prefix: &str| {
        names
            .lines()
            .find(|name| name.trim_start_matches("./").starts_with(prefix))
            .map(str::to_owned)
            .with_context(|| format!("the system has no {prefix}*"))
    };
    for (prefix, file) in [("boot/vmlinuz-", "vmlinuz"), ("boot/initrd.img-", "initrd.img")] {
        let name = find(prefix)?;
        run(command("tar").arg("-xf").arg(&tar).arg("-C").arg(scratch.path()).arg(&name))?;
        fs::rename(at(name.trim_start_matches("./")), at(file))?;
        fs::set_permissions(at(file), fs::Permissions::from_mode(0o644))?;
    }
    // Owners survive without root, in fakeroot's books; the kernel fills /dev itself.
    let script = "set -e; mkdir \"$1/tree\"; tar -xf \"$1/root.tar\" --exclude='./dev/*' -C \"$1/tree\"; \
                  truncate -s \"$2\" \"$1/root.img\"; mke2fs -q -t ext4 -L tenon-root -d \"$1/tree\" \"$1/root.img\"; rm -rf \"$1/tree\"";
    run(command("fakeroot").args(["sh", "-c", script, "sh"]).arg(scratch.path()).arg(SIZE))?;
    // ssh offers the public key that lies beside the private one.
    let public = disk.key.with_extension("pub");
    for (part, file) in [
        ("key.pub", &public),
        ("root.img", &disk.image),
        ("vmlinuz", &disk.kernel),
        ("initrd.img", &disk.initramfs),
        ("key", &disk.key),
    ] {
        fs::rename(at(part), file).with_context(|| format!("cannot move {part} into the cache"))?;
    }
    Ok(())
}
