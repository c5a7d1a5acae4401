//! Runs the `tenon` command as a user would, and looks at everything that can be seen from outside: what it prints, how it ends, and what
//! it leaves behind. `cargo xtask test` builds the command, its plugins and the guests first.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

/// What Debian's kernel is told, but for what its init script shall do.
pub const LINUX_COMMAND_LINE: &str = "console=ttyS0 panic=-1 cryptomgr.notests mitigations=off tsc=reliable";
/// The prompt of the guest's shell, at the beginning of a line.
pub const PROMPT: &str = "\ntenon-guest:/# ";

/// How a run ended.
#[derive(Debug)]
pub struct Outcome {
    /// The exit status; 128 and the signal's number if a signal ended it.
    pub status: i32,
    /// What it printed on standard output: the guest's console.
    pub stdout: String,
    /// What it printed on standard error.
    pub stderr: String,
    /// What `--summary` wrote; null if it wrote nothing.
    pub summary: Value,
}

impl Outcome {
    /// Everything, for messages.
    #[must_use]
    pub fn all(&self) -> String {
        format!("status {}\n--- stdout\n{}\n--- stderr\n{}", self.status, self.stdout, self.stderr)
    }

    /// Checks that the run was refused: with this status, and an error that names each of these things.
    ///
    /// # Panics
    /// It was not.
    #[track_caller]
    pub fn refused(&self, status: i32, named: &[&str]) {
        assert_eq!(self.status, status, "{}", self.all());
        for thing in named {
            assert!(self.stderr.contains(thing), "the error does not name `{thing}`\n{}", self.all());
        }
        assert!(!self.stderr.contains("panicked"), "{}", self.all());
    }
}

/// A `tenon` command in the making. Each has its own temporary folder, which must be empty when the command has ended.
pub struct Tenon {
    command: Command,
    scratch: TempDir,
    limit: Duration,
    cues: VecDeque<Cue>,
}

/// What is done when the guest has printed a text so many times since the cue before.
struct Cue {
    text: String,
    times: usize,
    deed: Deed,
}

enum Deed {
    Type(String),
    Terminate,
}

impl Tenon {
    /// `tenon run`.
    ///
    /// # Panics
    /// The command has not been built.
    #[must_use]
    pub fn run() -> Self {
        let program = release().join("tenon");
        assert!(program.is_file(), "{} is not built; run `cargo xtask build`", program.display());
        let scratch = tempfile::tempdir().expect("a temporary folder");
        let temporary = scratch.path().join("tmp");
        fs::create_dir(&temporary).expect("a temporary folder");
        let mut command = Command::new(program);
        command.arg("run").env("TMPDIR", temporary).stdin(Stdio::null()).process_group(0);
        Self { command, scratch, limit: Duration::from_secs(120), cues: VecDeque::new() }
    }

    /// The command on a host without /dev/kvm: it runs in a mount namespace of its own, with nothing in /dev. Where that is not permitted this
    /// says that the test is not run, and returns nothing.
    ///
    /// # Panics
    /// There is no `unshare` program.
    #[must_use]
    pub fn without_kvm(mut self) -> Option<Self> {
        if !Path::new("/dev/kvm").exists() {
            return Some(self);
        }
        let mut why = String::new();
        // As root, or as any user that may make a user namespace.
        for namespaces in [&["--mount"][..], &["--map-root-user", "--mount"]] {
            let hidden = || {
                let mut command = Command::new("unshare");
                command.args(namespaces).args(["sh", "-c", "mount -t tmpfs none /dev && exec \"$@\"", "sh"]);
                command
            };
            let trial = hidden().arg("true").output().expect("unshare starts");
            if trial.status.success() {
                let mut command = hidden();
                command.arg(self.command.get_program()).args(self.command.get_args());
                command
                    .envs(self.command.get_envs().filter_map(|(key, value)| Some((key, value?))))
                    .stdin(Stdio::null())
                    .process_group(0);
                self.command = command;
                return Some(self);
            }
            why = String::from_utf8_lossy(&trial.stderr).trim_end().replace('\n', "; ");
        }
        println!("not run: /dev/kvm cannot be hidden: {why}");
        None
    }

    /// `tenon run` with a bare guest, entered by the flat personality, on this engine.
    #[must_use]
    pub fn bare(guest: &str, engine: &str) -> Self {
        Self::run()
            .args(["--personality", "flat", "--device", "exit", "--engine", engine, "--kernel"])
            .arg(bare(guest))
    }

    /// `tenon run` with a raw image, entered by the flat personality in `mode`, on this engine.
    #[must_use]
    pub fn raw(image: &[u8], mode: &str, engine: &str) -> Self {
        let tenon = Self::run();
        let file = tenon.file("image", image);
        tenon
            .args(["--personality", &format!("flat,mode={mode}"), "--device", "exit"])
            .args(["--engine", engine, "--kernel"])
            .arg(file)
    }
    /// `tenon run` with Debian on the software engine. The init script does what `doing` says.
    ///
    /// # Panics
    /// The guest has not been made.
    #[must_use]
    pub fn debian(doing: &str) -> Self {
        Self::plain_debian().args(["--cmdline", &format!("{LINUX_COMMAND_LINE} tenon.do={doing}")])
    }

    /// `tenon run` with Debian on the software engine and the default command line. The init script starts a shell.
    ///
    /// # Panics
    /// The guest has not been made.
    #[must_use]
    pub fn plain_debian() -> Self {
        let kernel = debian("vmlinuz");
        assert!(kernel.is_file(), "{} is missing; run `cargo xtask guests`", kernel.display());
        Self::run()
            .args(["--engine", "soft", "--kernel"])
            .arg(kernel)
            .arg("--initrd")
            .arg(debian("initramfs.cpio.gz"))
    }

    /// `tenon run` with Debian and virtio's modules on the software engine, in its shell.
    #[must_use]
    pub fn virtio_debian() -> Self {
        Self::run()
            .args(["--engine", "soft", "--cmdline", &format!("{LINUX_COMMAND_LINE} quiet"), "--kernel"])
            .arg(debian("vmlinuz"))
            .arg("--initrd")
            .arg(debian("initramfs-virtio.cpio.gz"))
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, word: impl AsRef<OsStr>) -> Self {
        self.command.arg(word);
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<S: AsRef<OsStr>>(mut self, words: impl IntoIterator<Item = S>) -> Self {
        self.command.args(words);
        self
    }

    /// Sets a variable of the command's environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// A file of the test's own, beside the folder that must stay empty.
    ///
    /// # Panics
    /// It cannot be written.
    #[must_use]
    pub fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.scratch.path().join(name);
        fs::create_dir_all(path.parent().unwrap_or(&path)).expect("a folder for a file");
        fs::write(&path, bytes).expect("a file");
        path
    }

    /// Changes how long the command may take. It is two minutes otherwise.
    #[must_use]
    pub fn within(mut self, seconds: u64) -> Self {
        self.limit = Duration::from_secs(seconds);
        self
    }

    /// Types `text` on the console, once the guest has printed `prompt` (again, if there was a cue before).
    #[must_use]
    pub fn typing(mut self, prompt: &str, text: &str) -> Self {
        self.command.stdin(Stdio::piped());
        self.cues.push_back(Cue { text: prompt.to_owned(), times: 1, deed: Deed::Type(text.to_owned()) });
        self
    }

    /// Ends the command by SIGTERM, once the guest has printed `text` so many times.
    #[must_use]
    pub fn until(mut self, text: &str, times: usize) -> Self {
        self.cues.push_back(Cue { text: text.to_owned(), times, deed: Deed::Terminate });
        self
    }

    /// Runs the command to its end, and checks that nothing is left behind.
    ///
    /// # Panics
    /// It takes too long, or leaves a process or a temporary file.
    #[must_use]
    #[track_caller]
    pub fn outcome(mut self) -> Outcome {
        let summary = self.scratch.path().join("summary.json");
        self.command.arg("--summary").arg(&summary).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = self.command.spawn().expect("tenon starts");
        let group = process.id();
        let (sender, ended) = mpsc::channel();
        let reader =
            |mut from: Box<dyn Read + Send>, mut cues: VecDeque<Cue>, mut input: Option<ChildStdin>| {
                let sender = sender.clone();
                thread::spawn(move || {
                    let (mut text, mut seen, mut bytes) = (String::new(), 0, [0; 4096]);
                    while let Ok(count @ 1..) = from.read(&mut bytes) {
                        text.push_str(&String::from_utf8_lossy(&bytes[..count]).replace('\r', ""));
                        if let Some(due) =
                            cues.pop_front_if(|cue| text[seen..].matches(&cue.text).count() >= cue.times)
                        {
                            seen = text.len();
                            due.deed.perform(group, &mut input);
                        }
                    }
                    let _ = sender.send(());
                    text
                })
            };
        let (out, err) = (process.stdout.take().expect("a pipe"), process.stderr.take().expect("a pipe"));
        let out = reader(Box::new(out), self.cues, process.stdin.take());
        let err = reader(Box::new(err), VecDeque::new(), None);
        let in_time = ended.recv_timeout(self.limit).is_ok() && ended.recv_timeout(self.limit).is_ok();
        if !in_time {
            let _ = process.kill();
        }
        let status = process.wait().expect("the status");
        let outcome = Outcome {
            status: status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)),
            stdout: out.join().expect("the output"),
            stderr: err.join().expect("the errors"),
            summary: fs::read(&summary)
                .ok()
                .and_then(|text| serde_json::from_slice(&text).ok())
                .unwrap_or(Value::Null),
        };
        assert!(in_time, "still running after {} s\n{}", self.limit.as_secs(), outcome.all());
        let left: Vec<PathBuf> = fs::read_dir(self.scratch.path().join("tmp"))
            .expect("the temporary folder")
            .filter_map(|entry| entry.ok().map(|entry| entry.path()))
            .collect();
        assert!(left.is_empty(), "temporary files are left behind: {left:?}\n{}", outcome.all());
        let processes = members(group);
        assert!(processes.is_empty(), "processes are left behind: {processes:?}\n{}", outcome.all());
        outcome
    }
}

impl Deed {
    fn perform(self, process: u32, input: &mut Option<ChildStdin>) {
        match self {
            Deed::Type(text) => {
                let input = input.as_mut().expect("standard input is a pipe");
                input.write_all(text.as_bytes()).expect("what is typed is taken");
            }
            Deed::Terminate => {
                let sent = Command::new("kill").arg(process.to_string()).status();
                assert!(sent.is_ok_and(|status| status.success()), "SIGTERM cannot be sent");
            }
        }
    }
}

/// The processes of a process group.
fn members(group: u32) -> Vec<String> {
    let Ok(all) = fs::read_dir("/proc") else { return Vec::new() };
    all.filter_map(|entry| {
        let stat = fs::read_to_string(entry.ok()?.path().join("stat")).ok()?;
        // The name, in brackets, may hold anything; the group is the third word behind it.
        let (name, rest) = stat.rsplit_once(')')?;
        (rest.split(' ').nth(3)? == group.to_string()).then(|| name.to_owned())
    })
    .collect()
}

/// Where cargo puts what it builds: this program lies in its `deps`.
fn release() -> PathBuf {
    let exe = std::env::current_exe().expect("this program's own file");
    exe.ancestors().nth(2).expect("a target folder").to_path_buf()
}

/// Bytes that look random and are the same for the same seed.
#[must_use]
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    })
    .flatten()
    .take(length)
    .collect()
}

/// The program.
#[must_use]
pub fn program() -> PathBuf {
    release().join("tenon")
}

/// `tenon` with these words, for what runs no machine; killed if it does not end.
#[must_use]
pub fn tenon(words: &[&str]) -> Command {
    let mut command = Command::new("timeout");
    command.args(["--signal=KILL", "120"]).arg(program()).args(words).stdin(Stdio::null());
    command
}

/// Runs a command, and gives its status and what it printed.
///
/// # Panics
/// It cannot be started.
pub fn outcome(command: &mut Command) -> (i32, String, String) {
    let output = command.output().expect("the command starts");
    let status = output.status.code().unwrap_or_else(|| 128 + output.status.signal().unwrap_or(0));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (status, text(&output.stdout), text(&output.stderr))
}

/// Checks that these words are refused with this status, and with an error that has all of `named`. Gives the error.
///
/// # Panics
/// They were not.
#[track_caller]
pub fn refused(words: &[&str], status: i32, named: &[&str]) -> String {
    let (found, _, error) = outcome(&mut tenon(words));
    assert_eq!(found, status, "{words:?}: {error}");
    for name in named {
        assert!(error.contains(name), "{words:?}: `{name}` is not in: {error}");
    }
    assert!(!error.contains("panicked"), "{error}");
    error
}

/// A bare guest's ELF file.
///
/// # Panics
/// It has not been built.
#[must_use]
pub fn bare(name: &str) -> PathBuf {
    let path = release().with_file_name("guests").join("x86_64-unknown-none/release").join(name);
    assert!(path.is_file(), "{} is missing; run `cargo xtask guests`", path.display());
    path
}

/// A file of the Debian guest.
///
/// # Panics
/// The environment names no home.
#[must_use]
pub fn debian(file: &str) -> PathBuf {
    let cache = match std::env::var_os("XDG_CACHE_HOME").filter(|value| !value.is_empty()) {
        Some(cache) => PathBuf::from(cache),
        None => PathBuf::from(std::env::var_os("HOME").expect("a home")).join(".cache"),
    };
    cache.join("tenon/guests").join(file)
}

/// The plugins that misbehave, built by `cargo xtask build`.
#[must_use]
pub fn test_plugins() -> PathBuf {
    release().with_file_name("test-plugins")
}

/// A bundled plugin's folder.
#[must_use]
pub fn bundled(id: &str) -> PathBuf {
    release().join("plugins").join(id)
}

/// Whether KVM can be used; if not, says that the test is not run.
#[must_use]
pub fn has_kvm() -> bool {
    let usable = fs::OpenOptions::new().read(true).write(true).open(Path::new("/dev/kvm"));
    if let Err(error) = &usable {
        println!("not run: /dev/kvm: {error}");
    }
    usable.is_ok()
}
