//! A virtio device with streams to programs of this host, as a component and as native code.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use tempfile::TempDir;
use tenon_core::{Clock, QueueDevice};
use tenon_plugins::{Bundle, Grants, Plugin, UnixSocket, VirtioDevice, VirtioParts};

use crate::machine::{fixture, host};
use crate::rings::{Driver, PATIENCE};

fn streams(native: bool) -> Arc<Plugin> {
    let grants = if native { Grants::none().allow_native("streams") } else { Grants::none() };
    host().load(Bundle::open(&fixture("streams")).unwrap(), &grants).unwrap()
}

struct Bench {
    folder: TempDir,
    device: Arc<VirtioDevice>,
    driver: Driver,
    answered: usize,
}

impl Bench {
    fn new(native: bool) -> Self {
        let ram = Driver::memory();
        let folder = tempfile::tempdir().unwrap();
        let parts = VirtioParts {
            clock: Clock::virtual_time(),
            ram: ram.clone(),
            stores: Vec::new(),
            ports: Vec::new(),
            sockets: vec![("vsock".into(), UnixSocket::open(&folder.path().join("vm")).unwrap())],
            folders: Vec::new(),
        };
        let device = streams(native).attach_virtio("streams0", &[], &parts).unwrap();
        let mut driver = Driver::new(&ram);
        driver.start(&*device, 1);
        Self { folder, device, driver, answered: 0 }
    }

    /// Has a request carried out; what it wrote.
    fn ask(&mut self, kind: u8, argument: u64, bytes: &[u8]) -> Vec<u8> {
        let token = self.driver.push(0, kind, argument, bytes, 64);
        self.device.notify(0);
        self.answered += 1;
        let answers = self.driver.answers(0, self.answered);
        let written = answers.iter().find(|answer| answer.0 == token).unwrap().1;
        self.driver.written(token, written as usize)
    }

    fn numbers(&mut self, kind: u8, argument: u64, bytes: &[u8]) -> Vec<u32> {
        let bytes = self.ask(kind, argument, bytes);
        bytes.chunks_exact(4).map(|number| u32::from_le_bytes(number.try_into().unwrap())).collect()
    }

    /// A stream to a program that listens, and that program.
    fn connected(&mut self) -> (u64, UnixStream) {
        let path = self.folder.path().join("vm_80");
        let listener = UnixListener::bind(&path).unwrap();
        let number = self.numbers(b'c', 80, &[])[0];
        std::fs::remove_file(path).unwrap();
        (number.into(), listener.accept().unwrap().0)
    }

    /// A program that connects.
    fn program(&self) -> UnixStream {
        let mut program = UnixStream::connect(self.folder.path().join("vm")).unwrap();
        program.set_read_timeout(Some(PATIENCE)).unwrap();
        program.write_all(b"CONNECT 5000\n").unwrap();
        program
    }
}

#[test]
fn streams_pass_between_requests_and_programs_in_both_forms() {
    for native in [false, true] {
        let mut bench = Bench::new(native);
        assert_eq!(bench.numbers(b'c', 81, &[]), [u32::MAX]);
        let (number, mut program) = bench.connected();
        assert_eq!(bench.numbers(b's', number, b"hello"), [5, 0]);
        let mut got = [0; 5];
        program.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"hello");
        program.write_all(b"answer").unwrap();
        assert_eq!(bench.numbers(b'n', 0, &[]), [u32::try_from(number).unwrap(), u32::MAX, 1, 0]);
        assert_eq!(bench.ask(b'r', number, &[]), b"answer");
        bench.ask(b'h', number | 2 << 32, &[]);
        assert_eq!(program.read(&mut got).unwrap(), 0);
        drop(program);
        assert_eq!(bench.numbers(b'n', 0, &[])[2], 0b101, "readable, and deaf");
        assert_eq!(bench.ask(b'r', number, &[]), b"");
        assert_eq!(bench.numbers(b'n', 0, &[])[2], 0b110, "ended, and deaf");
        bench.ask(b'x', number, &[]);

        let mut program = bench.program();
        let news = bench.numbers(b'n', 0, &[]);
        assert_eq!(news[1..], [5000, 0, 0]);
        bench.ask(b'a', u64::from(news[0]) | 77 << 32, &[]);
        let mut line = [0; 6];
        program.read_exact(&mut line).unwrap();
        assert_eq!(&line, b"OK 77\n");
        assert_eq!((bench.device.usage().faults, bench.device.usage().restarts), (0, 0));
    }
}

#[test]
fn a_device_that_falls_loses_its_streams_and_nothing_else() {
    for native in [false, true] {
        let mut bench = Bench::new(native);
        let (number, mut program) = bench.connected();
        assert_eq!(bench.ask(b'!', 0, &[]), b"");
        assert_eq!(bench.device.usage().restarts, 1, "it fell once, and the new instance has no streams");
        assert_eq!(program.read(&mut [0; 1]).unwrap(), 0);
        let (again, _program) = bench.connected();
        assert_ne!(again, number);
    }
}

#[test]
fn a_stream_that_the_device_does_not_hold_ends_the_instance() {
    for native in [false, true] {
        for kind in *b"asrhx" {
            let mut bench = Bench::new(native);
            let (_, mut program) = bench.connected();
            bench.driver.push(0, kind, 99, b"x", 64);
            bench.device.notify(0);
            assert_eq!(program.read(&mut [0; 1]).unwrap(), 0, "its streams go with it");
            assert!(bench.device.usage().faults >= 1, "{}", char::from(kind));
        }
    }
}

#[test]
fn the_file_goes_with_the_device() {
    let bench = Bench::new(false);
    let Bench { folder, device, driver, .. } = bench;
    assert!(folder.path().join("vm").exists());
    drop((device, driver));
    assert!(!folder.path().join("vm").exists());
}
