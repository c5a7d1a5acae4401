//! What a virtio network card sends: the component against the same source as a native library.
//!
//! Frames: a bare guest sends from ring 3 and polls, and a socket here counts what arrives; the time of a run with one frame is taken off. The guest
//! is faster than the socket: what counts is what the card took; the others are dropped, or under way when the machine ends. TCP: Debian on the
//! software engine sends to a socket here through the user network, so that the guest's and the host's TCP are in the figure.

use std::io::{ErrorKind, Read};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use serde::Serialize;

use super::{bare, median, summary_of, tenon, write};
use crate::demo::{COMMAND_LINE, Summary};
use crate::guests;

/// What the guest sends over TCP.
const SENT: u64 = 512 << 20;

#[derive(Serialize)]
struct Row {
    engine: &'static str,
    /// The frame's length in bytes; none for TCP.
    size: Option<u32>,
    /// Frames, or bytes.
    native_per_second: f64,
    wasm_per_second: f64,
    wasm_to_native: f64,
}

impl Row {
    fn new(engine: &'static str, size: Option<u32>, native: Vec<f64>, wasm: Vec<f64>) -> Self {
        let (native_per_second, wasm_per_second) = (median(native), median(wasm));
        let wasm_to_native = wasm_per_second / native_per_second;
        Self { engine, size, native_per_second, wasm_per_second, wasm_to_native }
    }
}

pub(super) fn run(rounds: u32) -> Result<()> {
    let guest = bare("net")?;
    let debian = guests::debian(false)?;
    let mut rows = Vec::new();
    for engine in ["soft", "kvm"] {
        if engine == "kvm" && !Path::new("/dev/kvm").exists() {
            println!("not run: kvm: there is no /dev/kvm here");
            continue;
        }
        for (size, count) in [(60, 1_000_000), (1514, 500_000)] {
            let (mut native, mut wasm) = (Vec::new(), Vec::new());
            for _ in 0..rounds {
                native.push(frames(&guest, engine, size, count, true)?);
                wasm.push(frames(&guest, engine, size, count, false)?);
            }
            let row = Row::new(engine, Some(size), native, wasm);
            println!(
                "{engine}: frames of {size} bytes: native {:.0}/s, wasm {:.0}/s, wasm to native {:.2}",
                row.native_per_second, row.wasm_per_second, row.wasm_to_native
            );
            rows.push(row);
        }
    }
    let (mut native, mut wasm) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        native.push(tcp(&debian, true)?);
        wasm.push(tcp(&debian, false)?);
    }
    let row = Row::new("soft", None, native, wasm);
    println!(
        "soft: TCP from the guest: native {:.1} MB/s, wasm {:.1} MB/s, wasm to native {:.2}",
        row.native_per_second / 1e6,
        row.wasm_per_second / 1e6,
        row.wasm_to_native
    );
    rows.push(row);
    write("net", &rows)
}

/// Frames a second that the card took.
fn frames(guest: &Path, engine: &str, size: u32, count: u32, native: bool) -> Result<f64> {
    let few = send_frames(guest, engine, size, 1, native)?;
    let all = send_frames(guest, engine, size, count, native)?;
    Ok(f64::from(count - 1) / ((all.run_ms - few.run_ms) / 1e3))
}

/// Has a guest send frames, and counts those that arrive.
fn send_frames(guest: &Path, engine: &str, size: u32, count: u32, native: bool) -> Result<Summary> {
    let scratch = tempfile::tempdir().context("cannot make a temporary folder")?;
    let socket = scratch.path().join("cable");
    let listener = UnixListener::bind(&socket).context("cannot listen")?;
    let counting = thread::spawn(move || -> std::io::Result<u64> {
        let (stream, _) = listener.accept()?;
        let mut stream = std::io::BufReader::with_capacity(1 << 20, stream);
        let (mut frames, mut length, mut frame) = (0, [0; 4], vec![0; 1 << 16]);
        loop {
            match stream.read_exact(&mut length) {
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(frames),
                other => other?,
            }
            let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
            let Some(frame) = frame.get_mut(..length) else { return Err(ErrorKind::InvalidData.into()) };
            stream.read_exact(frame)?;
            frames += 1;
        }
    });
    let mut command = tenon()?;
    command.args([
        "--engine",
        engine,
        "--memory",
        "64M",
        "--device",
        "exit",
        "--console",
        "none",
        "--kernel",
    ]);
    command.arg(guest).args(["--cmdline", &format!("count={count} size={size}")]);
    command.arg("--net").arg(format!("socket,connect={}", socket.display()));
    if native {
        command.args(["--allow-native", "virtio-net"]);
    }
    let summary = summary_of(&mut command)?;
    // A guest that never came would be waited for without end.
    drop(UnixStream::connect(&socket));
    let arrived = counting.join().map_err(|_| anyhow!("the counting thread fell"))??;
    let card = summary.virtio("virtio-net").context("the machine has no network card")?;
    if arrived + card.dropped_frames > u64::from(count) {
        bail!("{arrived} of {count} frames arrived, and {} were dropped", card.dropped_frames);
    }
    Ok(summary)
}

/// Bytes a second, from the first to the last.
fn tcp(debian: &guests::Debian, native: bool) -> Result<f64> {
    let listener = TcpListener::bind("127.0.0.1:0").context("cannot listen")?;
    let port = listener.local_addr()?.port();
    let counting = thread::spawn(move || -> std::io::Result<(u64, f64)> {
        let (mut stream, _) = listener.accept()?;
        let (mut bytes, mut buffer) = (0, vec![0; 1 << 20]);
        let started = Instant::now();
        loop {
            match stream.read(&mut buffer)? {
                0 => return Ok((bytes, started.elapsed().as_secs_f64())),
                count => bytes += count as u64,
            }
        }
    });
    let mut command = tenon()?;
    command.args(["--engine", "soft", "--memory", "256M", "--net", "user"]);
    command.args(["--cmdline", &format!("{COMMAND_LINE} quiet tenon.do=send:{port}"), "--kernel"]);
    command.arg(&debian.vmlinuz).arg("--initrd").arg(&debian.initramfs_virtio);
    if native {
        command.args(["--allow-native", "virtio-net"]);
    }
    summary_of(&mut command)?;
    drop(TcpStream::connect(("127.0.0.1", port)));
    let (bytes, seconds) = counting.join().map_err(|_| anyhow!("the counting thread fell"))??;
    if bytes != SENT {
        bail!("{bytes} of {SENT} bytes arrived");
    }
    Ok(SENT as f64 / seconds)
}
