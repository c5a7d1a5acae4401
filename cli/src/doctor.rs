//! `tenon doctor`: what this host offers, and what would make it better.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Result;
use comfy_table::presets::NOTHING;
use comfy_table::{ContentArrangement, Table};
use serde::Serialize;

use crate::args::DoctorArgs;
use crate::{engine, say};

/// How good a thing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Grade {
    Good,
    Limited,
    Missing,
}

#[derive(Debug, Serialize)]
struct Finding {
    what: &'static str,
    grade: Grade,
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

impl Finding {
    fn new(what: &'static str, grade: Grade, found: impl Into<String>) -> Self {
        Self { what, grade, found: found.into(), remedy: None }
    }

    fn or(mut self, remedy: &str) -> Self {
        if self.grade != Grade::Good {
            self.remedy = Some(remedy.to_owned());
        }
        self
    }
}

pub(crate) fn doctor(args: &DoctorArgs) -> Result<()> {
    let findings = [
        kvm(),
        host(),
        cgroups(),
        io_uring(),
        tun(),
        cache(),
        target("wasm32-unknown-unknown"),
        target("x86_64-unknown-none"),
    ];
    if args.json {
        return say::print(serde_json::to_string_pretty(&findings)?);
    }
    let mut table = Table::new();
    table.load_style(NOTHING).set_content_arrangement(ContentArrangement::Dynamic);
    for finding in &findings {
        let grade = match finding.grade {
            Grade::Good => "good",
            Grade::Limited => "limited",
            Grade::Missing => "missing",
        };
        let remedy = finding.remedy.as_ref().map(|remedy| format!("\n→ {remedy}")).unwrap_or_default();
        table.add_row([finding.what.to_owned(), grade.to_owned(), format!("{}{remedy}", finding.found)]);
    }
    say::print_table(&table)
}

fn kvm() -> Finding {
    match engine::judge_kvm() {
        Ok(verdict) if verdict.is_fast => Finding::new("KVM", Grade::Good, verdict.details),
        Ok(verdict) => Finding::new("KVM", Grade::Limited, verdict.details)
            .or("guests run on the software engine; for hardware speed use a host whose KVM is not emulated"),
        Err(error) => Finding::new("KVM", Grade::Missing, say::explain(&error))
            .or("guests run on the software engine; to use KVM, switch virtualisation on in the firmware, load kvm_intel or kvm_amd, and join the group `kvm`"),
    }
}

fn host() -> Finding {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let memory = memory
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok())
        .unwrap_or(0);
    let found = format!("{cpus} CPUs, {:.1} GiB of memory available", memory as f64 / f64::from(1 << 20));
    Finding::new("host", Grade::Good, found)
}

fn cgroups() -> Finding {
    let remedy = "CPU entitlements and caps need the cgroup cpu controller, writable by this user";
    let v2 = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
    if v2.split_whitespace().any(|name| name == "cpu") {
        return Finding::new("cgroups", Grade::Good, "version 2 with the cpu controller");
    }
    for path in ["/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct"] {
        if Path::new(path).join("cpu.shares").exists() {
            return Finding::new(
                "cgroups",
                Grade::Good,
                format!("version 1 with the cpu controller at {path}"),
            );
        }
    }
    Finding::new("cgroups", Grade::Missing, "no cpu controller").or(remedy)
}

fn io_uring() -> Finding {
    match fs::read_to_string("/proc/sys/kernel/io_uring_disabled").as_deref().map(str::trim) {
        Ok("0") => Finding::new("io_uring", Grade::Good, "enabled"),
        Ok(value) => Finding::new("io_uring", Grade::Limited, format!("kernel.io_uring_disabled is {value}"))
            .or("sysctl kernel.io_uring_disabled=0"),
        Err(_) if Path::new("/proc/sys/kernel").exists() => Finding::new(
            "io_uring",
            Grade::Good,
            "the kernel has no switch for it, so it follows the kernel's build",
        ),
        Err(_) => Finding::new("io_uring", Grade::Missing, "/proc is not mounted"),
    }
}

fn tun() -> Finding {
    if Path::new("/dev/net/tun").exists() {
        Finding::new("TUN/TAP", Grade::Good, "/dev/net/tun")
    } else {
        Finding::new("TUN/TAP", Grade::Missing, "no /dev/net/tun").or("modprobe tun")
    }
}

fn cache() -> Finding {
    match crate::places::cache_dir() {
        Ok(dir) => Finding::new("code cache", Grade::Good, dir.display().to_string()),
        Err(error) => Finding::new("code cache", Grade::Limited, say::explain(&error))
            .or("set XDG_CACHE_HOME or HOME to a folder that this user can write; without it components are compiled at each start"),
    }
}

fn target(name: &'static str) -> Finding {
    let listed = Command::new("rustup").args(["target", "list", "--installed"]).output();
    match listed {
        Ok(output) if String::from_utf8_lossy(&output.stdout).lines().any(|line| line == name) => {
            Finding::new("Rust target", Grade::Good, name)
        }
        Ok(_) => Finding::new("Rust target", Grade::Missing, format!("{name} is not installed"))
            .or(&format!("rustup target add {name}")),
        Err(_) => {
            Finding::new("Rust target", Grade::Missing, "no rustup; it is only needed to build plugins")
        }
    }
}
