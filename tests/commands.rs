//! The command as people and scripts meet it: closed pipes, full disks, FIFOs, terminals, signals, and the words that it has for them.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};
use tempfile::TempDir;
use tenon_tests::{Tenon, bare, bundled, debian, outcome, program, refused, tenon};

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// A folder with a FIFO whose other end nobody opens.
fn fifo() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("fifo");
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).expect("a FIFO");
    (folder, path)
}

fn words(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

/// Commands that print a result.
const RESULTS: [&[&str]; 8] = [
    &["doctor"],
    &["doctor", "--json"],
    &["plugin", "list"],
    &["plugin", "list", "--json"],
    &["plugin", "inspect", "serial"],
    &["completions", "bash"],
    &["run", "--help"],
    &["--version"],
];

#[test]
fn a_reader_that_has_gone_is_no_error() {
    for result in RESULTS {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let (status, _, error) = outcome(tenon(result).stdout(writer));
        assert_eq!((status, error.as_str()), (0, ""), "{result:?}");
    }
}

#[test]
fn a_result_that_cannot_be_printed_is_an_error_in_one_line() {
    for result in RESULTS {
        let full = File::options().write(true).open("/dev/full").expect("/dev/full");
        let (status, _, error) = outcome(tenon(result).stdout(full));
        assert_eq!(status, 1, "{result:?}: {error}");
        assert!(error.contains("standard output") && error.contains("No space left"), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}

#[test]
fn messages_that_cannot_be_printed_change_nothing() {
    let full = || File::options().write(true).open("/dev/full").expect("/dev/full");
    let (status, ..) = outcome(tenon(&["run", "--kernel", "/nowhere"]).stderr(full()));
    assert_eq!(status, 1);
    let mut command = tenon(&["run", "--log", "trace", "--engine", "soft", "--personality", "flat"]);
    command.args(["--device", "exit", "--kernel"]).arg(bare("first")).stderr(full());
    assert_eq!(outcome(&mut command).0, 0);
}

#[test]
fn tables_have_no_blanks_at_the_ends_of_lines() {
    for result in [&["doctor"][..], &["plugin", "list"], &["plugin", "inspect", "linux"]] {
        let (status, text, _) = outcome(&mut tenon(result));
        assert_eq!(status, 0);
        assert!(text.lines().count() > 2, "{text}");
        assert!(text.lines().all(|line| line.trim_end() == line), "{text}");
        assert!(!text.starts_with(' '), "{text}");
    }
}

#[test]
fn a_fifo_is_refused_wherever_a_file_is_wanted() {
    let (folder, fifo) = fifo();
    let (kernel, path) = (debian("vmlinuz"), words(&fifo));
    let run = ["run", "--engine", "soft", "--kernel"];
    let kernel = [&run[..], &[words(&kernel)]].concat();
    refused(&[&run[..], &[path]].concat(), 1, &[path, "a FIFO"]);
    refused(&[&kernel[..], &["--initrd", path]].concat(), 1, &[path, "a FIFO"]);
    refused(&[&kernel[..], &["--device", path]].concat(), 1, &[path, "a FIFO"]);
    refused(&[&kernel[..], &["--personality", path]].concat(), 1, &[path, "a FIFO"]);
    refused(&[&kernel[..], &["--console", &format!("file:{path}")]].concat(), 1, &[path, "FIFO"]);
    refused(&[&kernel[..], &["--summary", path]].concat(), 1, &[path, "FIFO"]);
    refused(&["plugin", "inspect", path], 1, &[path, "a FIFO"]);
    std::fs::rename(&fifo, folder.path().join("plugin.toml")).expect("another name");
    let path = words(folder.path());
    refused(&["plugin", "inspect", path], 1, &[path, "a FIFO"]);
    refused(&["plugin", "build", path], 1, &[path, "plugin.toml"]);
    refused(&["plugin", "test", path], 1, &[path, "plugin.toml"]);
}

#[test]
fn a_plugin_that_nobody_knows_is_a_usage_error() {
    refused(&["plugin", "inspect", "beeper"], 2, &["beeper", "serial", "rtc"]);
    let (folder, _) = fifo();
    let (status, _, error) = outcome(tenon(&["plugin", "inspect", "fifo"]).current_dir(folder.path()));
    assert_eq!(status, 2, "{error}");
    assert!(error.contains("`./fifo`"), "{error}");
}

#[test]
fn a_name_that_is_none_for_a_plugin_is_a_usage_error() {
    for name in ["Beeper", "1st", "test"] {
        refused(&["plugin", "new", name, "--kind", "device"], 2, &[name, "no name for a plugin"]);
    }
}

#[test]
fn what_is_no_plugin_is_not_quoted() {
    let error = refused(&["plugin", "inspect", "/etc/passwd"], 1, &["/etc/passwd", "tar"]);
    assert!(!error.contains("root"), "{error}");
}

#[test]
fn a_folder_that_is_no_plugins_is_said_to_be_none() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for what in ["inspect", "build", "test"] {
        refused(&["plugin", what, words(folder.path())], 1, &[words(folder.path()), "no plugin"]);
    }
}

#[test]
fn a_plugin_that_does_not_load_is_shown_with_the_reason() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let manifest = std::fs::read(bundled("exit").join("plugin.toml")).expect("a bundled plugin");
    std::fs::write(folder.path().join("plugin.toml"), manifest).expect("a file");
    std::fs::write(folder.path().join("plugin.wasm"), "").expect("a file");
    let (status, text, _) = outcome(&mut tenon(&["plugin", "inspect", words(folder.path())]));
    assert_eq!(status, 0);
    assert!(text.contains("does not load") && text.contains("plugin.wasm"), "{text}");
    assert!(!text.contains("nothing"), "what it imports is not known: {text}");
}

#[test]
fn a_missing_file_is_said_to_be_missing_once() {
    for words in [&["plugin", "inspect", "/nowhere/plugin"][..], &["run", "--kernel", "/nowhere/kernel"]] {
        let error = refused(words, 1, &["/nowhere/", "No such file"]);
        assert_eq!(error.matches("No such file").count(), 1, "{error}");
    }
}

#[test]
fn a_setting_that_the_device_refuses_is_a_usage_error() {
    let kernel = debian("vmlinuz");
    for device in ["serial,base=70000", "serial,irq=400", "serial,base=high"] {
        let run = ["run", "--engine", "soft", "--kernel", words(&kernel), "--device", device];
        refused(&run, 2, &["--device serial", device.split(['=', ',']).nth(1).unwrap_or_default()]);
    }
}

#[test]
fn a_long_command_line_is_not_repeated() {
    let (kernel, long) = (debian("vmlinuz"), "long".repeat(32_500));
    let run = ["run", "--engine", "soft", "--kernel", words(&kernel), "--cmdline", &long];
    let error = refused(&run, 2, &["--cmdline", "130000 bytes", "4096"]);
    assert!(error.len() < 500, "{} bytes: {error}", error.len());
}

#[test]
fn a_relative_cache_folder_is_ignored() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut command = tenon(&["doctor", "--json"]);
    command.env("XDG_CACHE_HOME", "cache").env("HOME", folder.path()).current_dir(folder.path());
    let (status, text, _) = outcome(&mut command);
    assert_eq!(status, 0);
    assert!(text.contains(words(&folder.path().join(".cache/tenon"))), "{text}");
    assert!(!folder.path().join("cache").exists());
}

#[test]
fn a_guest_goes_on_when_nobody_reads_its_console() {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let mut command = tenon(&["run", "--engine", "soft", "--personality", "flat", "--device", "exit"]);
    let (status, _, error) = outcome(command.arg("--kernel").arg(bare("exceptions")).stdout(writer));
    assert_eq!(status, 0, "{error}");
    assert_eq!(error.matches("what the guest prints is lost").count(), 1, "{error}");
}

#[test]
fn a_flood_on_a_console_that_nobody_reads_is_dropped_and_takes_no_memory() {
    let mut flood = Command::new(program())
        .args([
            "run",
            "--engine",
            "soft",
            "--memory",
            "64M",
            "--device",
            "exit",
            "--cmdline",
            "bytes=3000000",
        ])
        .arg("--kernel")
        .arg(bare("flood"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the command starts");
    // Nothing is read until it says that it drops what the guest prints.
    let mut errors = BufReader::new(flood.stderr.take().expect("a pipe"));
    let (mut line, mut dropped) = (String::new(), false);
    while !dropped && errors.read_line(&mut line).expect("a pipe") > 0 {
        dropped = line.contains("output is dropped");
    }
    assert!(dropped, "{line}");
    let (mut console, mut bytes) = (flood.stdout.take().expect("a pipe"), [0; 4096]);
    let (mut printed, mut peak) = (0, 0);
    while let Ok(count @ 1..) = console.read(&mut bytes) {
        printed += count;
        let status = std::fs::read_to_string(format!("/proc/{}/status", flood.id())).unwrap_or_default();
        let most = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"));
        peak = peak.max(most.and_then(|kib| kib.parse().ok()).unwrap_or(0));
    }
    assert_eq!(flood.wait().expect("the status").code(), Some(0));
    assert!(printed > 4096 && printed < 3_000_000, "{printed} bytes were printed");
    // The guest's memory of which it uses little, the program, and buffers.
    assert!(peak > 1024 && peak < 64 << 10, "{peak} KiB at most");
}

#[test]
fn a_log_in_a_file_has_no_colours() {
    let outcome = Tenon::bare("first", "soft").args(["--log", "debug"]).outcome();
    assert!(outcome.stderr.contains("DEBUG"), "{}", outcome.all());
    assert!(!outcome.stderr.contains('\x1b'), "{}", outcome.all());
}

#[test]
fn a_log_on_a_terminal_has_colours_unless_they_are_unwanted() {
    for (variable, value, is_colourful) in
        [("UNRELATED", "", true), ("NO_COLOR", "", true), ("NO_COLOR", "1", false)]
    {
        let (mut near, far) = terminal();
        let mut command = tenon(&["run", "--log", "debug", "--engine", "soft", "--personality", "flat"]);
        command.args(["--device", "exit", "--kernel"]).arg(bare("first"));
        command.env_remove("NO_COLOR").env(variable, value).stderr(far);
        let mut process = command.spawn().expect("the command starts");
        drop(command);
        let mut log = Vec::new();
        // The end of a terminal is an error.
        let _ = near.read_to_end(&mut log);
        let log = String::from_utf8_lossy(&log);
        assert!(process.wait().expect("the status").success() && log.contains("DEBUG"), "{log}");
        assert_eq!(log.contains('\x1b'), is_colourful, "{variable}={value}: {log}");
    }
}

/// A new terminal: the end that a person sits at, and the one for programs.
fn terminal() -> (File, OwnedFd) {
    let near = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).expect("a terminal");
    grantpt(&near).and_then(|()| unlockpt(&near)).expect("its far end");
    let name = ptsname(&near, Vec::new()).expect("its name");
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
    let far = rustix::fs::open(&name, flags, rustix::fs::Mode::empty()).expect("its far end");
    (near.into(), far)
}

/// A machine on a terminal, with a guest that says that it runs and then does so for ever.
struct Seat {
    process: Child,
    terminal: File,
    lines: Receiver<String>,
    /// What it said when the machine started.
    start: String,
}

impl Seat {
    fn take(engine: &str) -> Self {
        let (terminal, far) = terminal();
        // A signal that dumps core shall leave no file, and none is ignored because whoever runs the tests ignores it.
        let mut command = Command::new("sh");
        command.args(["-c", "ulimit -c 0 && exec env --default-signal \"$@\"", "sh"]).arg(program());
        command.args(["run", "--engine", engine, "--personality", "flat", "--kernel"]).arg(bare("spin"));
        command.stdin(far).stdout(Stdio::null()).stderr(Stdio::piped()).process_group(0);
        let mut process = command.spawn().expect("tenon starts");
        let stderr = process.stderr.take().expect("a pipe");
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            BufReader::new(stderr).lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        let mut seat = Self { process, terminal, lines, start: String::new() };
        seat.start = seat.reads("Ctrl-B ?");
        assert!(!seat.echoes(), "the terminal is not raw, so nothing is tested");
        seat
    }

    /// Waits for a line with this text, and gives it.
    #[track_caller]
    fn reads(&self, text: &str) -> String {
        loop {
            let line = self.lines.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("never said: {text}"));
            if line.contains(text) {
                return line;
            }
        }
    }

    fn types(&mut self, keys: &str) {
        self.terminal.write_all(keys.as_bytes()).expect("keys are taken");
    }

    /// Whether the terminal is in the mode in which a shell leaves it.
    fn echoes(&self) -> bool {
        let modes = tcgetattr(&self.terminal).expect("the terminal's mode").local_modes;
        modes.contains(LocalModes::ECHO | LocalModes::ICANON | LocalModes::ISIG)
    }

    /// Waits for the end.
    #[track_caller]
    fn ended(&mut self) -> ExitStatus {
        // The pipe ends with the process.
        while self.lines.recv_timeout(PATIENCE).is_ok() {}
        self.process.wait().expect("the status")
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn the_terminal_is_put_back_by_every_signal_that_can_be_caught() {
    for (signal, status) in [(Signal::TERM, 143), (Signal::INT, 130), (Signal::HUP, 129)] {
        let mut seat = Seat::take("soft");
        kill_process(Pid::from_child(&seat.process), signal).expect("the signal is sent");
        assert_eq!(seat.ended().code(), Some(status));
        assert!(seat.echoes(), "{signal:?} leaves the terminal raw");
    }
    for signal in
        [Signal::QUIT, Signal::ABORT, Signal::SEGV, Signal::BUS, Signal::FPE, Signal::USR1, Signal::ALARM]
    {
        let mut seat = Seat::take("soft");
        kill_process(Pid::from_child(&seat.process), signal).expect("the signal is sent");
        assert_eq!(seat.ended().signal(), Some(signal.as_raw()));
        assert!(seat.echoes(), "{signal:?} leaves the terminal raw");
    }
}

#[test]
fn every_key_of_the_console_is_answered() {
    let mut seat = Seat::take("soft");
    for (key, answer) in [
        ("?", "Ctrl-B h"),
        ("s", "running; started"),
        ("h", "halted"),
        ("s", "halted; started"),
        ("h", "goes on"),
        ("p", "power button pressed"),
        ("r", "reset"),
        ("s", "running; started"),
    ] {
        seat.types(&format!("\x02{key}"));
        seat.reads(answer);
    }
    seat.types("\x02x");
    assert_eq!(seat.ended().code(), Some(0));
    assert!(seat.echoes());
}

#[test]
fn the_line_at_the_start_is_short() {
    let seat = Seat::take("auto");
    assert!(seat.start.len() < 200 && !seat.start.contains("million"), "{}", seat.start);
}
