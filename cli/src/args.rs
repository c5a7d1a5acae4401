//! The command line: every option, its help and its parsing.

use std::path::PathBuf;
use std::str::FromStr;

use crate::disks::DiskSpec;
use crate::networks::NetworkSpec;
use crate::shares::ShareSpec;
use crate::vsock::VsockSpec;
use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};

/// Run virtual machines made of plugins.
#[derive(Debug, Parser)]
#[command(name = "tenon", version, max_term_width = 100, after_help = EXAMPLES)]
pub(crate) struct Cli {
    /// What is logged to stderr: `error`, `warn`, `info`, `debug`, `trace`, or rules such as `warn,tenon_soft=debug`.
    #[arg(long, global = true, value_name = "RULES", env = "TENON_LOG", default_value = "warn")]
    pub(crate) log: String,

    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXAMPLES: &str = "\
Examples:
  tenon run --kernel vmlinuz --initrd initramfs.gz      boot Linux on this terminal
  tenon run --kernel vmlinuz --cpus 4 --memory 2G       with four vCPUs and 2 GiB
  tenon run --kernel vmlinuz --disk file:disk.img --net user,forward=2222:22
                                                        with a disk and a network
  tenon run --firmware --nvram file:vars.fd --disk file:debian.img
                                                        a disk with its own boot loader
  tenon plugin new beeper --kind device                 begin a device of your own
  tenon doctor                                          what this host offers

Exit status of `tenon run`: 0 after the guest powered off; the guest's own status when it used the exit \
device; 1 after an error or a crashed guest; 2 when the command line is wrong; 3 when the guest asked \
for a reset (unless `--on-reset restart`); 128 and the signal's number after a signal.";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start a machine and stay with it until it ends
    Run(Box<RunArgs>),
    /// Say what this host offers and what is missing
    Doctor(DoctorArgs),
    /// Make, look at, resize, convert and check disks
    #[command(subcommand)]
    Disk(DiskCommand),
    /// Make, build, test and look at plugins
    #[command(subcommand)]
    Plugin(PluginCommand),
    /// Print the completions of a shell
    #[command(
        after_help = "Example:\n  tenon completions bash > ~/.local/share/bash-completion/completions/tenon"
    )]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// Which engine runs the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum EngineChoice {
    /// KVM where it runs guest kernels at hardware speed, else the software engine
    Auto,
    /// The kernel's virtual machine monitor
    Kvm,
    /// The software engine: runs anywhere
    Soft,
}

/// What guests see of time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ClockChoice {
    /// The host's time
    Real,
    /// Time counted in instructions: the same run every time (software engine only)
    Icount,
}

/// What CPUID shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum CpuChoice {
    /// The same on every host and engine
    Baseline,
    /// Everything that the engine can give on this host
    Max,
}

/// What a guest's reset does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OnReset {
    /// End `tenon run` with status 3
    Exit,
    /// Start the guest again
    Restart,
}

#[derive(Args, Debug)]
pub(crate) struct RunArgs {
    /// The image that the personality loads as `kernel`: a bzImage, an ELF file, or what else it knows
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, required_unless_present = "firmware", conflicts_with = "firmware", help_heading = "Guest")]
    pub(crate) kernel: Option<PathBuf>,
    /// Start PC firmware, which looks for a boot loader on the disks: Debian's OVMF, or FILE. The personality is `firmware`, if none is named
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, num_args = 0..=1, help_heading = "Guest")]
    pub(crate) firmware: Option<Option<PathBuf>>,
    /// Where the firmware's variables are kept: a store and its place, such as `file:vars.fd`. A blank one is given the firmware's own first variables; without it they are forgotten
    #[arg(long, value_name = "STORE:PLACE[,KEY=VALUE…]", help_heading = "Guest")]
    pub(crate) nvram: Option<DiskSpec>,
    /// The initial RAM disk
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Guest")]
    pub(crate) initrd: Option<PathBuf>,
    /// The guest's command line, for a personality that takes one. Its default is the personality's: `tenon plugin inspect linux`
    #[arg(long, value_name = "TEXT", help_heading = "Guest")]
    pub(crate) cmdline: Option<String>,
    /// The plugin that understands the image, with its options: `linux`, or `flat,mode=real`
    #[arg(
        long,
        value_name = "ID[,KEY=VALUE…]",
        default_value = "linux",
        default_value_if("firmware", clap::builder::ArgPredicate::IsPresent, "firmware"),
        help_heading = "Guest"
    )]
    pub(crate) personality: PluginSpec,

    /// What runs the guest
    #[arg(long, value_enum, default_value = "auto", help_heading = "Machine")]
    pub(crate) engine: EngineChoice,
    /// How many vCPUs, 1 to 64
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64), help_heading = "Machine")]
    pub(crate) cpus: u8,
    /// How much memory: bytes, or with K, M, G
    #[arg(long, value_name = "SIZE", default_value = "512M", help_heading = "Machine")]
    pub(crate) memory: Size,
    /// What CPUID shows
    #[arg(long, value_enum, default_value = "baseline", help_heading = "Machine")]
    pub(crate) cpu: CpuChoice,
    /// What guests see of time
    #[arg(long, value_enum, default_value = "real", help_heading = "Machine")]
    pub(crate) clock: ClockChoice,
    /// What a guest's reset does
    #[arg(long, value_name = "WHAT", value_enum, default_value = "exit", help_heading = "Machine")]
    pub(crate) on_reset: OnReset,

    /// Add a device, by plugin id or path, with its settings. Every machine has `serial` and `rtc`; naming one of them replaces it
    #[arg(long = "device", value_name = "ID[,KEY=VALUE…]", help_heading = "Devices")]
    pub(crate) devices: Vec<PluginSpec>,
    /// Leave out `serial` and `rtc` where they are not named
    #[arg(long, help_heading = "Devices")]
    pub(crate) no_default_devices: bool,
    /// Add a disk: a store and its place, such as `file:disk.img`, `qcow2:disk.qcow2,ro`, or stores on one another, such as `overlay:file:base.img`. Settings behind a comma go to the store or to the disk: `ro`, `id=NAME` for the guest, `KEY-file=FILE` for a setting kept in a file, such as a cipher's key, `top=STORE:PLACE` for where an overlay keeps what is changed, `device=ID` for another plugin that shows it to the guest; `tenon plugin inspect` lists others. A comma in a value is written twice
    #[arg(long = "disk", value_name = "STORE:PLACE[,KEY=VALUE…]", help_heading = "Devices")]
    pub(crate) disks: Vec<DiskSpec>,
    /// Add a read-only disk with the content of FILE
    #[arg(long = "cdrom", value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Devices")]
    pub(crate) cdroms: Vec<PathBuf>,
    /// Add a network card: `user` (no privileges; `forward=2222:22` lets ssh in), `tap:NAME`, or `socket,listen=PATH` and `socket,connect=PATH`; with `mac=…`, `mtu=…`, `pcap=FILE`, and the card's own settings, such as `queues=4`; `device=ID` takes another plugin for the card
    #[arg(long = "net", value_name = "KIND[,KEY=VALUE…]", help_heading = "Devices")]
    pub(crate) networks: Vec<NetworkSpec>,
    /// Let programs of the guest and of this host connect to each other. A program in the guest that connects to port P of CID 2 reaches the Unix socket `PATH_P`. A program here connects to the Unix socket PATH, writes `CONNECT P` and a line feed, and after `OK` reaches port P of the guest, whose CID is 3 or N
    #[arg(long, value_name = "PATH[,cid=N]", help_heading = "Devices")]
    pub(crate) vsock: Option<VsockSpec>,
    /// Share a folder with the guest, where `mount -t virtiofs NAME /mnt` shows it; NAME is `share`, then `share1` and so on, or what `tag` says. With `ro`, nothing in it can be changed. What other file systems are mounted in it, and extended attributes, are left out
    #[arg(long = "share", value_name = "DIR[,tag=NAME][,ro]", value_hint = ValueHint::DirPath, help_heading = "Devices")]
    pub(crate) shares: Vec<ShareSpec>,
    /// What the guest's console is connected to: `stdio` (escape Ctrl-B, `Ctrl-B ?` lists), `pty`, `file:FILE` or `none`
    #[arg(long, value_name = "WHERE", default_value = "stdio", help_heading = "Devices")]
    pub(crate) console: ConsoleChoice,

    #[command(flatten)]
    pub(crate) plugins: PluginUse,

    /// Write what happened to FILE as JSON when the machine ends
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Output")]
    pub(crate) summary: Option<PathBuf>,
}

/// Where plugins are looked for, and which may be native.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct PluginUse {
    #[command(flatten)]
    pub(crate) places: PluginPlaces,
    /// Run this plugin's native library instead of its component. Native plugins are trusted with the whole process
    #[arg(long, value_name = "ID", help_heading = "Plugins")]
    pub(crate) allow_native: Vec<String>,
}

/// Where plugins are looked for.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct PluginPlaces {
    /// Look for plugins in DIR first; then in TENON_PLUGIN_PATH, beside this program, and in ~/.local/share/tenon/plugins
    #[arg(long = "plugin-dir", value_name = "DIR", value_parser = folder, value_hint = ValueHint::DirPath, help_heading = "Plugins")]
    pub(crate) dirs: Vec<PathBuf>,
}

fn folder(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    if path.is_dir() { Ok(path) } else { Err("there is no such folder".to_owned()) }
}

#[derive(Args, Debug)]
pub(crate) struct DoctorArgs {
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// What is done with disks. A disk is written as for `tenon run --disk`.
#[derive(Debug, Subcommand)]
pub(crate) enum DiskCommand {
    /// Make a disk; stores that stand on it, such as `crypt`, are formatted
    #[command(
        after_help = "Examples:\n  tenon disk create qcow2:disk.qcow2 --size 10G\n  tenon disk create crypt:file:secret.img,key-file=key --size 1G"
    )]
    Create {
        /// The disk: STORE:PLACE[,KEY=VALUE…]
        disk: DiskSpec,
        /// How large; a qcow2 image is as large as its backing file if nothing is said
        #[arg(long, value_name = "SIZE")]
        size: Option<Size>,
        /// What a qcow2 image stands on: another image, or a raw file. Whoever uses the image later names it by `backing=FILE`
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        backing: Option<PathBuf>,
        #[command(flatten)]
        plugins: PluginUse,
    },
    /// Say what a disk is
    Info {
        /// The disk: STORE:PLACE[,KEY=VALUE…]
        disk: DiskSpec,
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        plugins: PluginUse,
    },
    /// Make a disk larger
    Resize {
        /// The disk: STORE:PLACE[,KEY=VALUE…]
        disk: DiskSpec,
        /// How large it is to be
        size: Size,
        #[command(flatten)]
        plugins: PluginUse,
    },
    /// Copy a disk to another, which is made if it is not there
    #[command(
        after_help = "Examples:\n  tenon disk convert file:disk.img qcow2:disk.qcow2\n  tenon disk convert http:http://example.org/disk.img crypt:file:secret.img,key-file=key"
    )]
    Convert {
        /// The disk that is copied
        from: DiskSpec,
        /// Where to
        to: DiskSpec,
        /// How large the new disk's file is [default: as large as what is copied]
        #[arg(long, value_name = "SIZE", conflicts_with = "overwrite")]
        size: Option<Size>,
        /// Write over a disk that is there; what it has beyond the length of the other stays
        #[arg(long)]
        overwrite: bool,
        #[command(flatten)]
        plugins: PluginUse,
    },
    /// Check an image's books, and read all of the disk
    #[command(
        after_help = "Examples:\n  tenon disk check qcow2:disk.qcow2\n  tenon disk check qcow2:disk.qcow2 --repair     one whose writer was killed\n\nExit status: 0 if the disk is good, 1 if it is not or cannot be checked."
    )]
    Check {
        /// The disk: STORE:PLACE[,KEY=VALUE…]
        disk: DiskSpec,
        /// First put right the reference counts of its qcow2 images
        #[arg(long)]
        repair: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        plugins: PluginUse,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum PluginCommand {
    /// Begin a plugin: a crate that builds, passes its tests and runs in a machine
    New {
        /// The plugin's id: lower-case letters, digits and hyphens
        name: String,
        /// What it is
        #[arg(long, value_enum)]
        kind: KindChoice,
        /// Where to make it [default: a folder of that name here]
        #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
        dir: Option<PathBuf>,
        /// The folder of the tenon-sdk crate [default: that of the source tree of this program]
        #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
        sdk: Option<PathBuf>,
    },
    /// Build a plugin into a folder and a `.tenon` archive
    Build {
        /// The plugin's crate
        #[arg(default_value = ".", value_hint = ValueHint::DirPath)]
        dir: PathBuf,
        /// Build the native library as well
        #[arg(long)]
        native: bool,
        /// Where to put the plugin [default: `plugins` in cargo's target folder]
        #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
        out: Option<PathBuf>,
    },
    /// Show a plugin's permissions, limits, digest and schema
    Inspect {
        /// A plugin id, folder or `.tenon` archive
        plugin: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        places: PluginPlaces,
    },
    /// Try a plugin as a machine would use it, with a hostile guest; first, if its crate is named, run its own tests and build it
    #[command(
        after_help = "Examples:\n  tenon plugin test                                the crate in this folder\n  tenon plugin test beeper-0.1.0.tenon --json      a plugin of somebody else, before it is used\n  tenon plugin test virtio-blk --set queues=4      with a setting that is not the default"
    )]
    Test {
        /// A plugin's crate, folder or `.tenon` archive, or the id of one that is found
        #[arg(default_value = ".", value_hint = ValueHint::AnyPath)]
        plugin: String,
        /// A setting of the plugin; `KEY-file=FILE` takes it from a file. A store may reach the host in its `url`
        #[arg(long = "set", value_name = "KEY=VALUE", value_parser = key_and_value)]
        settings: Vec<(String, String)>,
        /// Try the native library instead of the component. It is trusted with the whole process
        #[arg(long)]
        allow_native: bool,
        /// What a store promises of its content [default: `always` where it stands on another store, `open` otherwise]
        #[arg(long, value_enum)]
        keeps: Option<KeepsChoice>,
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        places: PluginPlaces,
    },
    /// List the plugins that are found
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        places: PluginPlaces,
    },
}

/// How long a store keeps what is written to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum KeepsChoice {
    /// After it was closed, too
    Always,
    /// Until it is closed
    Open,
    /// Not at all
    Never,
}

/// A kind of plugin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum KindChoice {
    /// Registers, interrupts, timers, channels
    Device,
    /// A device fed by queues of requests, such as a disk or a network card
    #[value(alias = "virtio-device")]
    Virtio,
    /// Keeps a disk's bytes, or changes them on their way to another store
    Store,
    /// Loads a guest OS
    Personality,
}

/// A plugin with its settings: `ID[,KEY=VALUE…]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PluginSpec {
    /// The id, or a path to a folder or archive.
    pub(crate) plugin: String,
    /// The settings in order.
    pub(crate) settings: Vec<(String, String)>,
}

impl FromStr for PluginSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        let plugin = parts.next().unwrap_or_default();
        if plugin.is_empty() {
            return Err("the plugin's id is missing; write ID or ID,KEY=VALUE,…".into());
        }
        let mut settings: Vec<(String, String)> = Vec::new();
        for part in parts {
            let (key, value) = key_and_value(part)?;
            if settings.iter().any(|(other, _)| *other == key) {
                return Err(format!("`{key}` is given twice"));
            }
            settings.push((key, value));
        }
        Ok(Self { plugin: plugin.to_owned(), settings })
    }
}

/// A setting: `KEY=VALUE`.
fn key_and_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(format!("`{text}` is not KEY=VALUE")),
    }
}

/// A number of bytes: `1048576`, `1024K`, `512M`, `2G`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size(pub(crate) u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("`{text}` is not a size; write bytes, or a number with K, M, G or T, such as 512M");
        let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
        let shift = match text[digits.len()..].to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kib" => 10,
            "m" | "mib" => 20,
            "g" | "gib" => 30,
            "t" | "tib" => 40,
            _ => return Err(wrong()),
        };
        let number: u64 = digits.parse().map_err(|_| wrong())?;
        number.checked_mul(1 << shift).map(Size).ok_or_else(|| format!("`{text}` is more than 16 EiB"))
    }
}

/// What the console is connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ConsoleChoice {
    /// This process's standard input and output.
    Stdio,
    /// A new pseudo-terminal, whose name is printed.
    Pty,
    /// Output to a file, which is made anew; no input.
    File(PathBuf),
    /// Nothing: output is thrown away.
    None,
}

impl FromStr for ConsoleChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "stdio" => Ok(Self::Stdio),
            "pty" => Ok(Self::Pty),
            "none" => Ok(Self::None),
            _ => match text.strip_prefix("file:") {
                Some("") => Err("`file:` needs a path: file:console.log".into()),
                Some(path) => Ok(Self::File(path.into())),
                None => Err(format!("`{text}` is not one of stdio, pty, file:FILE, none")),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_have_binary_units() {
        for (text, size) in
            [("4096", 4096), ("1k", 1024), ("512M", 512 << 20), ("2GiB", 2 << 30), ("1T", 1 << 40)]
        {
            assert_eq!(text.parse(), Ok(Size(size)));
        }
        for text in ["", "M", "-1M", "1.5G", "1P", "99999999999G", "0x10"] {
            assert!(text.parse::<Size>().is_err(), "{text} was accepted");
        }
    }

    #[test]
    fn a_plugin_is_an_id_with_settings() {
        let spec: PluginSpec = "serial,base=0x2f8,irq=3".parse().unwrap();
        assert_eq!(spec.plugin, "serial");
        assert_eq!(spec.settings, [("base".into(), "0x2f8".into()), ("irq".into(), "3".into())]);
        for text in ["", ",a=1", "serial,base", "serial,=1", "serial,a=1,a=2"] {
            assert!(text.parse::<PluginSpec>().is_err(), "{text} was accepted");
        }
    }
}
