//! `cargo xtask demo --full`: a whole Debian from a disk, entered over ssh, which writes to an encrypted disk and powers off.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::Summary;
use crate::process::{capture, command, run, shown};
use crate::{guests, host, plugins, tree};

/// The console's question when the system is up.
const LOGIN: &[u8] = b"login:";
/// How long the system may take until then.
const PATIENCE: Duration = Duration::from_secs(300);
/// How long its network and sshd may take after that.
const SSH_PATIENCE: Duration = Duration::from_secs(120);
/// What the guest writes, and must not be found in the image.
const MARK: &str = "the quick brown fox jumps over the encrypted dog";
/// What is done in the guest, on the disk that is encrypted.
const WORK: &str = "set -e; uname -a; systemctl is-system-running || true; \
    mkfs.ext4 -q /dev/vdb; mkdir -p /data; mount /dev/vdb /data; \
    for n in $(seq 1000); do echo \"$MARK\"; done > /data/mark; head -c 16M /dev/urandom > /data/noise; \
    sha256sum /data/mark /data/noise > /root/sums; umount /data; echo 3 > /proc/sys/vm/drop_caches; \
    mount /dev/vdb /data; sha256sum -c --quiet /root/sums; umount /data; echo written and read back";

/// Runs the demo.
///
/// # Errors
/// Something does not build, or the system does not do what it should.
pub(crate) fn run_full() -> Result<()> {
    host::prepare()?;
    host::prepare_disk()?;
    eprintln!("demo: building tenon and its plugins (the first build takes some minutes)");
    plugins::build_command()?;
    plugins::build_bundled()?;
    let disk = guests::disk(false)?;
    let scratch = tempfile::tempdir().context("cannot make a temporary folder")?;
    let at = |name: &str| scratch.path().join(name);
    let tenon = tree::release()?.join("tenon");
    let (data, key, summary) = (at("data.qcow2"), at("key"), at("summary.json"));
    fs::write(&key, random_key()?)?;
    let encrypted = format!("crypt:qcow2:{},key-file={}", data.display(), key.display());
    run(command(&tenon).args(["disk", "create", &encrypted, "--size", "256M"]))?;

    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let mut start = command(&tenon);
    start
        .args(["run", "--cpus", "2", "--memory", "1G", "--kernel"])
        .arg(&disk.kernel)
        .arg("--initrd")
        .arg(&disk.initramfs)
        .args(["--cmdline", "console=ttyS0 root=/dev/vda rw mitigations=off tsc=reliable"])
        .arg("--disk")
        .arg(format!("overlay:file:{}", disk.image.display()))
        .args(["--disk", &encrypted, "--net", &format!("user,forward=tcp:127.0.0.1:{port}-:22"), "--summary"])
        .arg(&summary)
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    eprintln!("demo: booting Debian from its disk");
    let started = Instant::now();
    let mut guest = start.spawn().with_context(|| format!("cannot start `{}`", shown(&start)))?;
    let outcome = drive(&mut guest, &disk.key, port, started);
    if outcome.is_err() {
        // It is the error that counts, and not whether the machine had ended already.
        let _ = guest.kill();
    }
    let status = guest.wait()?;
    let login_after = outcome?;
    if !status.success() {
        bail!("Debian did not power off in good order ({status})");
    }
    if fs::read(&data)?.windows(MARK.len()).any(|bytes| bytes == MARK.as_bytes()) {
        bail!("the image of the encrypted disk holds what the guest wrote, in plain");
    }
    if host::has_program("qemu-img") {
        run(command("qemu-img").args(["check", "-q"]).arg(&data))?;
    }
    let summary: Summary = serde_json::from_str(&fs::read_to_string(&summary)?).context("tenon's summary")?;
    eprintln!("demo: engine {}: {}", summary.engine, summary.engine_reason);
    println!(
        "demo: Debian reached its login in {login_after:.1} s on {}, {} vCPUs; ssh through --net user; crypt over qcow2 holds what was written",
        summary.engine, summary.vcpus
    );
    Ok(())
}

/// From the first line to the power-off. Gives the seconds until the login.
fn drive(guest: &mut Child, key: &Path, port: u16, started: Instant) -> Result<f64> {
    let console = guest.stdout.take().context("the guest has no console")?;
    let (sender, receiver) = std::sync::mpsc::channel();
    let reader = std::thread::spawn(move || show(console, &sender));
    receiver.recv_timeout(PATIENCE).context("Debian did not reach its login")?;
    let login_after = started.elapsed().as_secs_f64();
    // The login comes before the network is configured.
    let reached = Instant::now();
    while !ssh(key, port).arg("true").stderr(Stdio::null()).status()?.success() {
        if reached.elapsed() > SSH_PATIENCE {
            bail!("Debian's sshd does not let the key in, {} s after the login", SSH_PATIENCE.as_secs());
        }
        std::thread::sleep(Duration::from_secs(1));
    }
    let said = capture(ssh(key, port).arg(format!("MARK='{MARK}'; {WORK}")))?;
    print!("{said}");
    // The connection may end before the command does.
    let _ = ssh(key, port).arg("systemctl poweroff").status();
    reader.join().map_err(|_| anyhow::anyhow!("the console's reader failed"))??;
    Ok(login_after)
}

/// Copies the console to standard output, and says when the login is there.
fn show(console: ChildStdout, login: &std::sync::mpsc::Sender<()>) -> Result<()> {
    let mut console = BufReader::new(console);
    let mut out = std::io::stdout();
    let mut line = Vec::new();
    loop {
        let bytes = console.fill_buf()?;
        if bytes.is_empty() {
            return Ok(());
        }
        out.write_all(bytes)?;
        out.flush()?;
        let count = bytes.len();
        line.extend_from_slice(bytes);
        console.consume(count);
        if line.windows(LOGIN.len()).any(|part| part == LOGIN) {
            // Nobody waits for the second one.
            let _ = login.send(());
        }
        if let Some(end) = line.iter().rposition(|byte| *byte == b'\n') {
            line.drain(..=end);
        }
    }
}

fn ssh(key: &Path, port: u16) -> Command {
    let mut ssh = command("ssh");
    ssh.args([
        "-o",
        "StrictHostKeyChecking=no",
        "-o",
        "UserKnownHostsFile=/dev/null",
        "-o",
        "ConnectTimeout=60",
    ]);
    ssh.arg("-i").arg(key).args(["-p", &port.to_string(), "root@127.0.0.1"]).stdin(Stdio::null());
    ssh
}

/// 64 random bytes in hexadecimal.
fn random_key() -> Result<String> {
    let mut bytes = [0; 64];
    std::io::Read::read_exact(&mut fs::File::open("/dev/urandom")?, &mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
