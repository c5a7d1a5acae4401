//! `cargo xtask demo`: builds everything and boots Debian on the engine that fits this host.

mod full;

use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde::Deserialize;

use crate::process::command;
use crate::{guests, host, plugins, tree};

/// What the kernel is told: see tests/guests/linux/init for `tenon.do`.
pub(crate) const COMMAND_LINE: &str = "console=ttyS0 panic=-1 cryptomgr.notests mitigations=off tsc=reliable";
/// The guest says this when its shell runs.
pub(crate) const READY: &str = "TENON-GUEST-READY";

/// What `tenon run --summary` writes, as far as chores look at it.
#[derive(Deserialize)]
pub(crate) struct Summary {
    pub(crate) engine: String,
    pub(crate) engine_reason: String,
    pub(crate) vcpus: u32,
    pub(crate) start_ms: f64,
    pub(crate) run_ms: f64,
    pub(crate) cpu_ms: f64,
    pub(crate) instructions: Option<u64>,
    personality: Plugin,
    devices: Vec<Plugin>,
}

#[derive(Deserialize)]
struct Plugin {
    plugin: String,
    version: String,
    form: String,
    virtio: Option<Virtio>,
}

/// What a virtio device did.
#[derive(Deserialize)]
pub(crate) struct Virtio {
    pub(crate) batches: u64,
    pub(crate) requests: u64,
    pub(crate) answers: u64,
    pub(crate) dropped_frames: u64,
}

impl Summary {
    /// What the first virtio device of this plugin did.
    pub(crate) fn virtio(&self, plugin: &str) -> Option<&Virtio> {
        self.devices.iter().find(|device| device.plugin == plugin)?.virtio.as_ref()
    }

    /// The plugins that understood the image and carried the console, as the demo names them.
    fn plugins(&self) -> String {
        let devices = self.devices.iter().filter(|device| device.plugin == "serial");
        let all: Vec<String> = devices
            .chain([&self.personality])
            .map(|plugin| format!("{} {} ({})", plugin.plugin, plugin.version, plugin.form))
            .collect();
        all.join(", ")
    }
}

/// Which demo.
#[derive(Args)]
pub(crate) struct Options {
    /// Boot a whole Debian from a disk, log in over ssh, and write to an encrypted disk
    #[arg(long)]
    full: bool,
}

/// Runs the demo.
///
/// # Errors
/// Something does not build, or Debian does not reach its shell.
pub(crate) fn run(options: &Options) -> Result<()> {
    if options.full {
        return full::run_full();
    }
    host::prepare()?;
    eprintln!("demo: building tenon and its plugins (the first build takes some minutes)");
    plugins::build_command()?;
    plugins::build_bundled()?;
    let debian = guests::debian(false)?;
    let scratch = tempfile::tempdir().context("cannot make a temporary folder")?;
    let summary = scratch.path().join("summary.json");
    let tenon = tree::release()?.join("tenon");
    let mut start = command(&tenon);
    start
        .arg("run")
        .arg("--kernel")
        .arg(&debian.vmlinuz)
        .arg("--initrd")
        .arg(&debian.initramfs)
        .args(["--cmdline", &format!("{COMMAND_LINE} tenon.do=poweroff"), "--summary"])
        .arg(&summary)
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    eprintln!("demo: booting Debian {}", debian.release);
    let started = Instant::now();
    let mut guest = start.spawn().with_context(|| format!("cannot start {}", tenon.display()))?;
    let console = guest.stdout.take().context("the guest has no console")?;
    let mut shell_after = None;
    let mut out = std::io::stdout().lock();
    for line in BufReader::new(console).split(b'\n') {
        let line = line.context("cannot read the guest's console")?;
        out.write_all(&line)?;
        out.write_all(b"\n")?;
        if shell_after.is_none() && line.windows(READY.len()).any(|part| part == READY.as_bytes()) {
            shell_after = Some(started.elapsed());
        }
    }
    out.flush()?;
    let status = guest.wait()?;
    let Some(shell_after) = shell_after else { bail!("Debian did not reach its shell ({status})") };
    if !status.success() {
        bail!("Debian reached its shell but did not power off ({status})");
    }
    let summary: Summary =
        serde_json::from_str(&std::fs::read_to_string(&summary)?).context("tenon's summary")?;
    eprintln!("demo: engine {}: {}", summary.engine, summary.engine_reason);
    println!(
        "demo: Debian {} reached its shell in {:.1} s on {}, {} vCPU{}; {}",
        debian.release.trim_end_matches("-cloud-amd64"),
        shell_after.as_secs_f64(),
        summary.engine,
        summary.vcpus,
        if summary.vcpus == 1 { "" } else { "s" },
        summary.plugins()
    );
    Ok(())
}
