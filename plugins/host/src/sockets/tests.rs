//! Sockets with real programs at their other ends; the test is the device.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc;

use tempfile::TempDir;
use tenon_core::{MIN_MEMORY, Ram};

use super::*;

const PATIENCE: Duration = Duration::from_secs(30);

/// A socket, the device's end of it, and memory for requests.
struct Bench {
    folder: TempDir,
    socket: Arc<UnixSocket>,
    told: mpsc::Receiver<()>,
    ram: Arc<Ram>,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = UnixSocket::open(&folder.path().join("vm")).unwrap();
        let (sender, told) = mpsc::channel();
        socket.watch(move || {
            let _ = sender.send(());
        });
        Self { folder, socket, told, ram: Ram::new(MIN_MEMORY).unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Waits to be told, and asks.
    fn news(&self) -> Vec<StreamState> {
        self.told.recv_timeout(PATIENCE).unwrap();
        self.socket.news(64)
    }

    /// Asks until a stream is as wanted.
    fn until(&self, number: u32, is_right: impl Fn(&StreamState) -> bool) {
        while !self.news().iter().any(|state| state.number == number && is_right(state)) {}
    }

    fn buffer(&self, length: u32) -> Buffers {
        let mut buffer = Buffers::new(&self.ram);
        buffer.push(0x1000, length.into()).unwrap();
        buffer
    }

    fn send(&self, number: u32, bytes: &[u8]) -> Sent {
        let length = u32::try_from(bytes.len()).unwrap();
        let buffer = self.buffer(length);
        buffer.write(0, bytes);
        self.socket.send(number, &buffer, 0, length).unwrap()
    }

    fn receive(&self, number: u32, length: u32) -> Vec<u8> {
        let buffer = self.buffer(length);
        let count = self.socket.receive(number, &buffer, 0, length).unwrap();
        let mut bytes = vec![0; count as usize];
        buffer.read(0, &mut bytes);
        bytes
    }

    /// A program that connects and says this.
    fn program(&self, greeting: &str) -> UnixStream {
        let mut program = UnixStream::connect(self.path("vm")).unwrap();
        program.set_read_timeout(Some(PATIENCE)).unwrap();
        program.write_all(greeting.as_bytes()).unwrap();
        program
    }

    /// A stream that a program has begun and the device has accepted, and the program.
    fn accepted(&self) -> (u32, UnixStream) {
        let mut program = self.program("CONNECT 5000\n");
        let [state] = self.news()[..] else { panic!("one stream") };
        assert_eq!(state.wanted, Some(5000));
        self.socket.accept(state.number, 77).unwrap();
        let mut answer = [0; 6];
        program.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"OK 77\n");
        (state.number, program)
    }

    /// A stream that the device has begun, and the program.
    fn connected(&self) -> (u32, UnixStream) {
        let listener = UnixListener::bind(self.path("vm_80")).unwrap();
        let number = self.socket.connect(80).unwrap();
        std::fs::remove_file(self.path("vm_80")).unwrap();
        (number, listener.accept().unwrap().0)
    }
}

/// Whether this process may have as many as a test of limits needs; it says so otherwise.
fn has_descriptors() -> bool {
    let soft = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
    if soft < 4096 {
        println!("not run: this process may have {soft} descriptors, and not 4096");
    }
    soft >= 4096
}

fn noise(length: usize) -> Vec<u8> {
    (0..length).map(|n| (n * 7 + n / 251).to_le_bytes()[0]).collect()
}

#[test]
fn a_program_is_connected_when_the_device_accepts_it() {
    let bench = Bench::new();
    let (number, mut program) = bench.accepted();
    program.write_all(b"hello").unwrap();
    bench.until(number, |state| state.readable && state.wanted.is_none());
    assert_eq!(bench.receive(number, 3), b"hel");
    assert_eq!(bench.receive(number, 30), b"lo");
    assert_eq!(bench.send(number, b"you"), Sent { taken: 3, unsent: 0 });
    let mut answer = [0; 3];
    program.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"you");
    bench.socket.close(number).unwrap();
    assert_eq!(program.read(&mut answer).unwrap(), 0);
    assert!(bench.socket.close(number).is_err(), "it is closed once");
}

#[test]
fn what_comes_right_behind_the_greeting_is_the_guests() {
    let bench = Bench::new();
    let mut program = bench.program("CONNECT 4294967295\nat once");
    program.shutdown(Shutdown::Write).unwrap();
    let [state] = bench.news()[..] else { panic!("one stream") };
    assert_eq!((state.wanted, state.ended, state.deaf), (Some(u32::MAX), false, false));
    bench.socket.accept(state.number, 1).unwrap();
    bench.until(state.number, |state| state.readable);
    assert_eq!(bench.receive(state.number, 100), b"at once");
    bench.until(state.number, |state| state.ended && !state.deaf);
    bench.send(state.number, b"!");
    bench.socket.close(state.number).unwrap();
    let mut rest = String::new();
    program.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "OK 1\n!");
}

#[test]
fn a_program_that_says_anything_else_is_let_go() {
    let bench = Bench::new();
    for greeting in [
        "\n",
        "connect 5\n",
        "CONNECT\n",
        "CONNECT \n",
        "CONNECT x\n",
        "CONNECT +5\n",
        "CONNECT 5 \n",
        "CONNECT 4294967296\n",
        "CONNECT 00000000005\n",
        "CONNECT 12345678901234567890123456789012345678901234567890",
    ] {
        let mut program = UnixStream::connect(bench.path("vm")).unwrap();
        program.set_read_timeout(Some(PATIENCE)).unwrap();
        // The last bytes may find nobody any more.
        let _ = program.write_all(greeting.as_bytes());
        let end = program.read(&mut [0; 1]);
        assert!(
            matches!(&end, Ok(0)) || end.is_err_and(|e| e.kind() == ErrorKind::ConnectionReset),
            "{greeting}"
        );
    }
    let half = bench.program("CONN");
    drop(half);
    assert!(bench.told.try_recv().is_err() && bench.socket.news(64).is_empty());
    bench.accepted();
}

#[test]
fn a_program_that_goes_before_it_is_accepted_is_told_of() {
    let bench = Bench::new();
    let program = bench.program("CONNECT 5000\n");
    let [state] = bench.news()[..] else { panic!("one stream") };
    assert!(!state.ended && !state.deaf);
    drop(program);
    bench.until(state.number, |state| state.wanted == Some(5000) && state.ended && state.deaf);
    bench.socket.accept(state.number, 1).unwrap();
    bench.socket.close(state.number).unwrap();
}

#[test]
fn a_device_connects_where_somebody_listens() {
    let bench = Bench::new();
    assert_eq!(bench.socket.connect(80), None);
    let (number, mut program) = bench.connected();
    bench.send(number, b"abc");
    let mut got = [0; 3];
    program.read_exact(&mut got).unwrap();
    program.write_all(&got).unwrap();
    bench.until(number, |state| state.readable);
    assert_eq!(bench.receive(number, 10), b"abc");
    // A file that is no socket, and a socket that nobody listens at any more.
    std::fs::write(bench.path("vm_81"), b"").unwrap();
    drop(UnixListener::bind(bench.path("vm_82")).unwrap());
    assert_eq!((bench.socket.connect(81), bench.socket.connect(82)), (None, None));
}

#[test]
fn a_program_that_does_not_read_is_given_everything_later() {
    let bench = Bench::new();
    let (number, mut program) = bench.connected();
    let bytes = noise(4 << 20);
    let mut sent = 0;
    // Until the kernel and the host take no more.
    loop {
        let Sent { taken, unsent } = bench.send(number, &bytes[sent..sent + (100 << 10)]);
        sent += taken as usize;
        if (taken as usize) < 100 << 10 {
            assert_eq!(unsent as usize, streams::KEPT);
            break;
        }
    }
    let expected = bytes[..sent].to_vec();
    let reader = std::thread::spawn(move || {
        let mut got = vec![0; sent];
        program.read_exact(&mut got).unwrap();
        (program, got)
    });
    bench.until(number, |state| state.unsent == 0);
    let (mut program, got) = reader.join().unwrap();
    assert!(got == expected);
    // What is kept goes out also after the device has given the stream up.
    while bench.send(number, &bytes[..100 << 10]).taken == 100 << 10 {}
    bench.socket.close(number).unwrap();
    let mut rest = Vec::new();
    program.read_to_end(&mut rest).unwrap();
    assert!(rest.len() >= streams::KEPT);
    assert!(rest.chunks(100 << 10).all(|chunk| *chunk == bytes[..chunk.len()]));
}

#[test]
fn what_was_sent_goes_out_also_when_the_device_goes() {
    let bytes = noise(100 << 10);
    // The device closes its streams, or falls, or nothing is said to them before the end.
    for how in 0..3 {
        let bench = Bench::new();
        let (number, mut program) = bench.connected();
        program.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut sent = 0;
        let unsent = loop {
            let Sent { taken, unsent } = bench.send(number, &bytes);
            sent += taken as usize;
            if (taken as usize) < bytes.len() {
                break unsent;
            }
        };
        assert_eq!(unsent as usize, streams::KEPT);
        match how {
            0 => bench.socket.close(number).unwrap(),
            1 => assert!(bench.socket.clear()),
            _ => {}
        }
        let Bench { folder, socket, .. } = bench;
        let dropping = std::thread::spawn(move || drop(socket));
        // The program reads only when the socket is on its way out.
        let gone = [rustix::io::Errno::CONNREFUSED, rustix::io::Errno::NOENT];
        while !connect(&folder.path().join("vm")).is_err_and(|error| gone.contains(&error)) {
            std::thread::yield_now();
        }
        let mut got = Vec::new();
        program.read_to_end(&mut got).unwrap();
        assert_eq!(got.len(), sent, "case {how}");
        assert!(got.chunks(bytes.len()).all(|chunk| *chunk == bytes[..chunk.len()]));
        dropping.join().unwrap();
    }
}

#[test]
fn a_program_that_never_reads_holds_up_the_end_for_two_seconds() {
    let bench = Bench::new();
    let (number, _program) = bench.connected();
    while bench.send(number, &[0; 1 << 16]).taken == 1 << 16 {}
    let (sender, gone) = mpsc::channel();
    let since = Instant::now();
    std::thread::spawn(move || {
        drop(bench);
        let _ = sender.send(());
    });
    gone.recv_timeout(PATIENCE).unwrap();
    assert!(since.elapsed() >= LINGER);
}

#[test]
fn either_end_may_be_done_before_the_other() {
    let bench = Bench::new();
    let (number, mut program) = bench.connected();
    program.shutdown(Shutdown::Write).unwrap();
    bench.until(number, |state| state.readable);
    assert_eq!(bench.receive(number, 1), b"");
    bench.until(number, |state| state.ended && !state.deaf);
    bench.send(number, b"still");
    bench.socket.shut(number, false, true).unwrap();
    let mut got = String::new();
    program.read_to_string(&mut got).unwrap();
    assert_eq!(got, "still");
    let buffer = bench.buffer(1);
    assert!(bench.socket.send(number, &buffer, 0, 1).is_err(), "it has said that it is done");

    let (number, mut program) = bench.connected();
    bench.socket.shut(number, true, false).unwrap();
    assert!(program.write_all(b"x").is_err());
    bench.send(number, b"y");
    let mut got = [0];
    program.read_exact(&mut got).unwrap();
}

#[test]
fn a_program_that_goes_without_reading_leaves_what_it_sent() {
    let bench = Bench::new();
    let (number, mut program) = bench.connected();
    bench.send(number, b"unread");
    program.write_all(b"last words").unwrap();
    drop(program);
    bench.until(number, |state| state.deaf);
    assert_eq!(bench.receive(number, 100), b"last words");
    bench.until(number, |state| state.ended && state.deaf);
    assert_eq!(bench.send(number, b"nobody"), Sent { taken: 6, unsent: 0 });
    bench.socket.close(number).unwrap();
}

#[test]
fn a_program_that_is_gone_keeps_nobody_busy() {
    let bench = Bench::new();
    let (number, program) = bench.connected();
    drop(program);
    bench.until(number, |state| state.deaf);
    // Were it still watched, it would be told of again before what happens now.
    let _other = bench.program("CONNECT 5000\n");
    let news = bench.news();
    assert!(matches!(&news[..], [state] if state.wanted == Some(5000)), "{news:?}");
    assert!(bench.told.try_recv().is_err() && bench.socket.news(64).is_empty());
}

#[test]
fn a_new_instance_has_no_streams() {
    let bench = Bench::new();
    let (number, mut program) = bench.accepted();
    let mut wanting = bench.program("CONNECT 1\n");
    bench.told.recv_timeout(PATIENCE).unwrap();
    assert!(bench.socket.clear());
    assert!(!bench.socket.clear());
    for program in [&mut program, &mut wanting] {
        assert_eq!(program.read(&mut [0; 1]).unwrap(), 0);
    }
    assert!(bench.socket.news(64).is_empty());
    assert!(bench.socket.shut(number, true, true).is_err());
    assert_ne!(bench.accepted().0, number);
}

#[test]
fn misuse_is_named() {
    let bench = Bench::new();
    let buffer = bench.buffer(8);
    let _program = bench.program("CONNECT 5000\n");
    let number = bench.news()[0].number;
    assert!(bench.socket.send(number, &buffer, 0, 8).is_err(), "before it is accepted");
    assert!(bench.socket.receive(number, &buffer, 0, 8).is_err(), "before it is accepted");
    bench.socket.accept(number, 1).unwrap();
    assert!(bench.socket.accept(number, 1).is_err(), "twice");
    assert!(bench.socket.accept(number + 1, 1).is_err(), "an unknown one");
    assert_eq!(bench.socket.receive(number, &buffer, 9, 8).unwrap(), 0, "behind the buffer");
}

#[test]
fn the_file_is_its_owners_and_goes_with_the_socket() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vm");
    let socket = UnixSocket::open(&path).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(matches!(UnixSocket::open(&path), Err(SocketError::InUse(_))));
    drop(socket);
    assert!(!path.exists());
    // A stale one is replaced, and nothing else.
    drop(UnixListener::bind(&path).unwrap());
    let socket = UnixSocket::open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, b"mine").unwrap();
    drop(socket);
    assert_eq!(std::fs::read(&path).unwrap(), b"mine");
    assert!(UnixSocket::open(&path).err().unwrap().to_string().contains("no socket"));
    let long = folder.path().join("x".repeat(100));
    assert!(matches!(UnixSocket::open(&long), Err(SocketError::TooLong(_))));
    assert!(matches!(UnixSocket::open(&folder.path().join("a/b")), Err(SocketError::Io { .. })));
}

#[test]
fn a_program_that_takes_nobody_in_listens_nevertheless() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vm");
    let busy = socket().unwrap();
    rustix::net::bind(&busy, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    rustix::net::listen(&busy, 0).unwrap();
    let mut callers = Vec::new();
    let full = loop {
        match connect(&path) {
            Ok(caller) => callers.push(caller),
            Err(error) => break error,
        }
    };
    assert_eq!(full, rustix::io::Errno::AGAIN);
    let (sender, opened) = mpsc::channel();
    std::thread::spawn(move || sender.send(UnixSocket::open(&path).err()));
    let refused = opened.recv_timeout(PATIENCE).expect("it waits for that program");
    assert!(matches!(refused, Some(SocketError::InUse(_))), "{refused:?}");
}

#[test]
fn programs_that_say_nothing_make_room_for_others() {
    if !has_descriptors() {
        return;
    }
    let bench = Bench::new();
    let mut silent: Vec<UnixStream> = (0..streams::GREETERS).map(|_| bench.program("")).collect();
    let (_, _program) = bench.accepted();
    assert_eq!(silent[0].read(&mut [0; 1]).unwrap(), 0, "the first one has to go");
    silent[1].write_all(b"CONNECT 7\n").unwrap();
    let [state] = bench.news()[..] else { panic!("one stream") };
    assert_eq!(state.wanted, Some(7), "{state:?}");
}

#[test]
fn no_more_than_1024_streams_are_had() {
    if !has_descriptors() {
        return;
    }
    let bench = Bench::new();
    let programs: Vec<UnixStream> = (0..streams::STREAMS).map(|_| bench.program("CONNECT 1\n")).collect();
    // The thread has let all of them in when it has let this one go.
    let mut last = UnixStream::connect(bench.path("vm")).unwrap();
    assert_eq!(last.read(&mut [0; 1]).unwrap(), 0);
    let _listener = UnixListener::bind(bench.path("vm_80")).unwrap();
    assert_eq!(bench.socket.connect(80), None);
    drop(programs);
    let mut callers = Vec::new();
    while bench.told.recv_timeout(Duration::from_millis(50)).is_err() {
        let mut caller = UnixStream::connect(bench.path("vm")).unwrap();
        // It may be one too many still.
        let _ = caller.write_all(b"CONNECT 1\n");
        callers.push(caller);
    }
    assert!(!bench.socket.news(64).is_empty());
}
